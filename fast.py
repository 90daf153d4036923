"""What makes the models fast, put on from outside."""

import time
import weakref
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import KLResBlock, KLUp, MultiscaleAttention, ResBlock, Up
from model import ChannelRMSNorm, GLUMBConv


def fast_bf16(device) -> bool:
    """Whether bf16 matrix work is faster than fp32 on this device: yes on GPUs, on a CPU only with the instructions."""
    if torch.device(device).type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return True


def compile_layers(layers, **options):
    """torch.compile layer by layer, for fixed shapes: the same speed as the whole model at once, and layers of one class and
    size share one program. A graph break is an error. options: torch.compile's."""
    import torch._dynamo
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)      # the programs of all layers lie in one cache
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, **options)


@contextmanager
def timed(seconds: dict, what: str, device):
    """Adds the time of a block to seconds[what], the device's own work included."""
    start = time.perf_counter()
    yield
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


# ---- the same loop, fast -------------------------------------------------------------------------------------------------------

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_priority():
    """Softmax attention by the first of ATTENTION that takes the shapes at hand. cuDNN's is the fastest on an H100, and torch
    passes over it silently in several cases: whoever counts on it asks a profile afterwards (bench.py). Compiled blocks keep
    what was chosen when they were traced, so this has to be around their first call already."""
    return sdpa_kernel(ATTENTION, set_priority=True)


def pixels_on_host(x: Tensor) -> Tensor:
    """`to_uint8` on the device and a single copy: (B,3,H,W) in [-1,1] -> (B,H,W,3) bytes on the CPU, complete when this returns.
    Floats would be four times the bytes over the bus, and most of a decode's time on the CPU."""
    bytes_ = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
    if not x.is_cuda:
        return bytes_
    host = torch.empty(bytes_.shape, dtype=torch.uint8, pin_memory=True).copy_(bytes_, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host


# ---- what it costs, without a single weight ------------------------------------------------------------------------------------

class Cost(TorchDispatchMode):
    """Counts while code runs on the meta device: the most bytes alive at one time, of what the code itself made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = lambda tree: {id(s): s for t in tree_leaves(tree) if isinstance(t, Tensor) for s in [t.untyped_storage()]}
        given = storages((args, kwargs))                             # a view of what was there makes nothing
        for key, storage in storages(out).items():
            if key not in given:
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, size: int):
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Softmax attention as fused kernels do it, without the table of scores; its arithmetic is counted here."""
    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.flops += 2 * q.numel() * k.shape[-2] + 2 * q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1]
            return torch.empty_like(q)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def cost(f, *args) -> tuple[float, float]:
    """Floating-point operations (a multiplication with its addition is two) and peak bytes of f's own tensors, float32."""
    with FlopCounterMode(display=False) as rest, FusedAttention() as attention, Cost() as memory:
        f(*args)
    return rest.get_total_flops() + attention.flops, memory.peak


def peak_gib(device) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def compile_decoder(ae, **options):
    """Compile the decoder's layers one by one. Convolutions stay cuDNN's; what gains is what lies between them, norms,
    activations, shortcuts and folding: each is a pass over memory otherwise."""
    kinds = (KLResBlock, KLUp, ResBlock, Up, MultiscaleAttention, GLUMBConv)
    last = [m for m in ae.decoder.children() if isinstance(m, ChannelRMSNorm)]
    compile_layers([m for m in ae.decoder.modules() if isinstance(m, kinds)] + last, **options)
