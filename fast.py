"""What makes the models fast, put on from outside: model.py stays the page that one reads.

    hoisting     what depends on the step and the condition alone leaves the steps: modulations, clock and
                 text are computed for all steps of an image at once and looked up afterwards (`Hoist`)
    capturing    one evaluation as a CUDA graph: the GPU no longer waits for Python (`capture`)
    compiling    layer by layer, of the transformer and of the decoder (`compile_blocks`, `compile_decoder`)
    kernels      cuDNN's attention first, tensor cores for what is left in float32 (`fast_kernels`)
    bytes        pictures cross the bus as bytes (`pixels_on_host`)

sample.py draws with these and bench.py times them, so that what is timed is what users run. Below: the one
way to time and to count.

    hoisted = Hoist(model, clock, cond)         # model(x, t, y) as ever, for these steps and this condition
    hoisted.fill(other_cond)                    # another condition of the same shape, in the same memory
    hoisted.remove()                            # the model as it was
"""

import os
import resource
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import KLResBlock, KLUp, MultiscaleAttention, ResBlock, Up
from model import ChannelRMSNorm, DiTConfig, FluxConfig, GLUMBConv, Text, cat_conditions


# ---- hoisting ------------------------------------------------------------------------------------

# names of the layers that map the condition c to shifts, scales and gates: DiT, FLUX, SANA
MODULATIONS = ("adaLN_modulation", "img_mod", "txt_mod", "modulation", "t_block")


def modulation_layers(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in MODULATIONS}


def without_tokens(cond):
    """The condition without its text tokens, the bulk of it: a hoisted model reads them no more."""
    return replace(cond, tokens=cond.tokens[:, :0]) if isinstance(cond, Text) else cond


def overwrite(old, new):
    """Copy the tensors of a condition into the places of another's, which a captured graph reads."""
    if isinstance(old, Text):
        old.map(overwrite, new)
    elif old is not None:
        assert old.shape == new.shape, f"made for {tuple(old.shape)}, not for {tuple(new.shape)}"
        old.copy_(new)


class Stored(nn.Module):
    """Replaces a modulation layer and returns its output at the current step, a view of Hoist.row."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.register_buffer("out", out, persistent=False)

    def forward(self, c):
        return self.out


class Hoist:
    """Takes out of a model's steps what does not read x. One pass over each modulation matrix an image, not
    one a step: a quarter of FLUX's weights multiply a single vector, so that reading them is all they cost.

    clock       (S,) readings of the model's own clock, one a step; a whole batch is at one of them
    cond, null  conditions of B rows; null only for guidance in two passes, which then has 2B rows

    `model.condition` looks up the row of its clock reading, on the device and so within a captured graph too;
    modulation layers return their part of that row, `model.read_text` what it returned once. Call the model
    with `hoisted.cond` and `hoisted.null`, which lie at fixed places and carry no text tokens. Tables have
    the types that a forward pass under the surrounding autocast has."""

    def __init__(self, model, clock: Tensor, cond, null=None):
        self.model = model
        self.clock = clock
        self.layers = modulation_layers(model)
        self.condition = model.condition
        self.read_text = getattr(model, "read_text", None)
        self.table = None
        self.fill(cond, null)
        for name, stored in zip(self.layers, self.stored[1:]):
            model.set_submodule(name, stored)
        model.condition = self.look_up
        if self.read_text:
            model.read_text = self.stored_text

    @torch.no_grad()
    def fill(self, cond, null=None):
        """Compute the tables for a condition; a second one has to have the shape of the first."""
        both = cond if null is None else cat_conditions([cond, null])
        steps = len(self.clock)
        rows = len(both)
        # every row at every step, as one batch of S R rows
        row = torch.arange(rows, device=self.clock.device).repeat(steps)
        # the model's own layers, once for all steps
        c = self.condition(self.clock.repeat_interleave(rows), without_tokens(both)[row])           # S R, D
        outputs = [c]
        outputs += [layer(c) for layer in self.layers.values()]                                     # S R, k D
        # as bytes, because under autocast types differ: whatever they are, a step copies one row
        table = torch.cat([out.reshape(steps, -1).view(torch.uint8) for out in outputs], dim=1)
        text = self.read_text(both) if self.read_text else None

        # the first tables stay where they are: views of the row are in the model, a graph reads them
        if self.table is None:
            self.table = table                                       # S, bytes
            self.row = table[:1].clone()
            self.stored = self.views_of_row(outputs, rows)
            self.text = text
            self.cond = clone(without_tokens(cond))
            self.null = clone(without_tokens(null))
        else:
            overwrite(self.table, table)
            overwrite(self.text, text)
            overwrite(self.cond, without_tokens(cond))
            overwrite(self.null, without_tokens(null))

    def views_of_row(self, outputs: list[Tensor], rows: int) -> list[Stored]:
        """The parts of the current row, in the types and shapes of c and of every modulation."""
        views = []
        start = 0
        for out in outputs:
            size = rows * out.shape[-1] * out.element_size()
            part = self.row[0, start : start + size].view(out.dtype)
            views.append(Stored(part.view(rows, -1)))
            start += size
        return views

    def look_up(self, step: Tensor, y) -> Tensor:
        """In the place of model.condition: make the row of this clock reading the current one. Its c"""
        # nothing comes back to the host: the number of the step stays a tensor
        nearest = (self.clock - step[:1]).abs().argmin(dim=0, keepdim=True)
        self.row.copy_(self.table.index_select(0, nearest))
        return self.stored[0](None)

    def stored_text(self, y) -> Tensor:
        return self.text

    def remove(self):
        """Give the model its own layers and methods back."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        del self.model.condition
        if self.read_text:
            del self.model.read_text


def clone(cond):
    if isinstance(cond, Text):
        return cond.map(torch.clone)
    return None if cond is None else cond.clone()


# ---- capturing -----------------------------------------------------------------------------------

@torch.no_grad()
def capture(f, *example: Tensor):
    """f as a CUDA graph -> a function of tensors of the same shapes that replays it. Nothing in f may come
    from the host."""
    inputs = [x.clone() for x in example]
    # what compiles, tunes, or allocates a workspace at its first call has to have done so before the capture
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = f(*inputs)

    def replay(*args: Tensor) -> Tensor:
        for place, x in zip(inputs, args, strict=True):
            place.copy_(x)
        graph.replay()
        return output.clone()                                        # the next replay writes over its output

    return replay


# ---- compiling -----------------------------------------------------------------------------------

def compile_layers(layers, **options):
    """torch.compile layer by layer, for fixed shapes: the same speed as the whole model at once, and layers
    of one class and size share one program. A graph break is an error. options: torch.compile's."""
    import torch._dynamo                                             # takes seconds: only where needed
    # the programs of all layers lie in one cache
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, **options)


def compile_blocks(blocks, mode: str | None = None, backend: str = "inductor"):
    """Compile a transformer's blocks. mode: torch.compile's."""
    if backend != "inductor":
        compile_layers(blocks, backend=backend)
        return
    from torch._inductor import list_mode_options
    # a token's maximum and its FP8 codes in one kernel; in two, FLUX's widest rows are read twice. There are
    # enough tokens to fill a GPU, unlike the groups of the decoder's norms
    options = dict(list_mode_options(mode or "default"), split_reductions=False)
    compile_layers(blocks, options=options)


def compile_decoder(ae, **options):
    """Compile the decoder's layers one by one. Convolutions stay cuDNN's; what gains is what lies between
    them: norms, activations, shortcuts and folding: each is a pass over memory otherwise."""
    kinds = (KLResBlock, KLUp, ResBlock, Up, MultiscaleAttention, GLUMBConv)
    layers = [m for m in ae.decoder.modules() if isinstance(m, kinds)]
    layers += [m for m in ae.decoder.children() if isinstance(m, ChannelRMSNorm)]
    compile_layers(layers, **options)


def uncompile(module: nn.Module):
    """Undo compile_blocks and compile_decoder."""
    for m in module.modules():
        m._compiled_call_impl = None


# ---- kernels, precision, pixels ------------------------------------------------------------------

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def attention_priority(order: list = ATTENTION):
    """A context in which softmax attention is the first of the order that takes the shapes at hand. cuDNN's
    is the fastest on an H100, and torch passes over it silently in several cases; a profile shows which ran.
    Compiled blocks keep the choice they were traced with, so the context has to surround their first call;
    and what the compiler keeps on the disk does not know of the choice, so every order has its own folder."""
    with sdpa_kernel(order, set_priority=True):
        if torch.cuda.is_available():
            from torch._inductor.runtime.cache_dir_utils import cache_dir
            before = cache_dir()
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{before}/attention-{order[0].name.lower()}"
            try:
                yield
            finally:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        else:
            yield


@contextmanager
def fast_kernels(device: torch.device, dtype: torch.dtype):
    """A context for drawing in this type. On a GPU: attention_priority; and unless the type is float32
    itself, what little is computed in float32 uses tensor cores, which read 10 bits of a factor (TF32). That
    is linear attention, of SANA and DC-AE: its factors have no more, only its state is rounded."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or dtype != torch.float32
    try:
        with attention_priority():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def bf16_is_fast(device) -> bool:
    """Whether bf16 products are faster than fp32's here: on GPUs, and on CPUs that have the instructions."""
    if torch.device(device).type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return True


def pixels_on_host(x: Tensor) -> Tensor:
    """(B,3,H,W) in [-1,1] -> (B,H,W,3) bytes on the CPU, complete when this returns. Rounded on the
    device and copied once: floats would be four times the bytes, and most of a decode's time on the CPU."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
    if not x.is_cuda:
        return pixels
    # page-locked memory, which the device writes by itself
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host


# ---- from device to device --------------------------------------------------------------------------

def numbered(device) -> torch.device:
    """The device with its number: "cuda" is the current one, and tensors there are on cuda:0."""
    return torch.empty(0, device=device).device


@contextmanager
def on_device(module: nn.Module, device):
    """Move the module to `device` inside the context and back afterwards. Its own tensors stay where they
    were, so the way back copies nothing."""
    if all(p.device == numbered(device) for p in module.parameters()):
        # nothing to restore: FSDP's parameters even change within
        yield module
        return
    home = []
    for m in module.modules():
        for store in (m._parameters, m._buffers):
            home += [(store, name, t, t.data) for name, t in store.items() if t is not None]
    module.to(device)
    yield module
    for store, name, t, data in home:
        t.data = data
        store[name] = t


# ---- time and memory -----------------------------------------------------------------------------

def synchronized_time(device) -> float:
    """The host's clock in seconds, once the device has done all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(seconds: dict, what: str, device):
    """Add the time of a block to seconds[what], the device's own work included."""
    start = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + synchronized_time(device) - start


def peak_gib(device) -> float:
    """Most GiB allocated on the GPU; on a CPU, most that the process has had in memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20            # kilobytes on Linux


# ---- cost, counted on the meta device without a single weight ------------------------------------

@dataclass(frozen=True)
class Cost:
    """Floating-point operations, a multiplication with its addition being two, and bytes."""
    linear: float                       # linear maps
    attention: float                    # softmax attention, as fused kernels do it
    rest: float                         # convolutions, linear attention
    peak_bytes: int                     # most alive at one time of what the code itself made

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.rest


@torch.no_grad()
def count_cost(f, *args) -> Cost:
    """The Cost of f(*args). Run it on the meta device."""
    with FlopCounterMode(display=False) as counter, FusedAttention() as attention, LiveBytes() as memory:
        f(*args)
    per_operator = counter.get_flop_counts().get("Global", {})
    linear = sum(flops for op, flops in per_operator.items() if str(op) in ("aten.mm", "aten.addmm"))
    return Cost(linear, attention.flops, counter.get_total_flops() - linear, memory.peak)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that code creates; `peak` is the most bytes alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))                             # a view of what was there makes nothing
        for key, storage in storages(out).items():
            if key not in given:
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def free(self, size: int):
        self.alive -= size


def storages(tree) -> dict:
    """The storages of all tensors in nested lists, tuples and dicts, by identity."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {id(storage): storage for storage in found}


class FusedAttention(TorchFunctionMode):
    """Softmax attention as fused kernels do it, without the table of scores; counts its arithmetic."""
    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        queries = q.numel() // q.shape[-1]
        self.flops += 2 * queries * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return torch.empty_like(q)


def example_condition(cfg, batch: int, text_tokens: int | None = None):
    """A condition of the shapes that a model reads, all zeros: classes (batch,) or a Text."""
    if isinstance(cfg, DiTConfig):
        return torch.zeros(batch, dtype=torch.long)
    length = text_tokens or cfg.text_tokens
    if isinstance(cfg, FluxConfig):
        tokens = torch.zeros(batch, length, cfg.context_in_dim)
        guidance = torch.zeros(batch) if cfg.guidance_embed else None
        return Text(tokens, pooled=torch.zeros(batch, cfg.vec_in_dim), guidance=guidance)
    tokens = torch.zeros(batch, length, cfg.caption_channels)
    return Text(tokens, mask=torch.ones(batch, length, dtype=torch.bool))
