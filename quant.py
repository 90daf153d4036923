"""Linear maps in few bits: attention and MLP of a block, which are nearly all of a model's weights.

    fp8     a row of the weight and a token of the input share a scale    multiplied by Hopper and later
    nvfp4   16 numbers of 4 bits share a scale                            multiplied by Blackwell
    int4    64 numbers of 4 bits share a scale                            for memory only

    python quant.py --base tiny-flux --out DIR                  nvfp4, weights and inputs (W4A4), rank 32
    python quant.py --base RUN --out DIR --form int4 --weights-only
    python sample.py DIR --prompt "a small red ring on blue"    draws with it

Eight bits need nothing else. With four, one large channel of the input takes the digits of its neighbours.
SVDQuant (arXiv 2411.05007; the paper's Table 6) moves such channels into the weight, and what is large there
into a branch of 16 bits. Q rounds the rest R:

    y = W x + b  ~  Q(R) Q(x / s) + B A (x / s) + b        W diag(s) = R + B A, rank(B A) = 32

s_c = max|x_c|^a / max|W_c|^(1-a), with the a whose output comes nearest, for inputs of the model's own. W4A4
rounds weights and inputs. W4A16 rounds weights alone: FLUX is 7 GB instead of 24 on any device.

In 16 bits stay norms, and what reads or writes latents, time, text and guidance: a percent of the work, and
the part that few bits hurt (everything in FP8: LPIPS 0.74 to the picture in bf16, otherwise 0.07; vllm-omni
PR 2795). The blocks' modulations multiply one vector a picture, but are a quarter of FLUX. FP8 leaves them
alone; 4 bits round their weights without a branch and never their input, as SVDQuant does.

The order is fixed: merge a LoRA first, then quantise. A delta of a LoRA is smaller than the steps.

    batch = calibration_batch(model, y, device=device)               its own path from noise to data
    facts = quantise_model(model, "nvfp4", batch=batch)              in place, block by block
    save_quantised(model, folder, info | facts)
    model, info = load_quantised(folder)
"""

import math
import re
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from model import BASES, FAMILIES, Backbone, cat_conditions
from lora import TARGETS, lora_layers, merge_lora
from autoencoder import ae_config
from checkpoints import (
    SAME_NAMES, check_writable, config_dict, fingerprint, load_base, load_run, load_weights, read_base_config,
    read_run_config, read_tensors, run_file, write_tensors)
from shapes import captions_from
from data import cache_prompts, check_encoders, read_prompts, text_folder
from fast import on_device
from flags import (
    Parser, add_base_args, add_compute_args, at_least, check_finite, check_paths, device_here, dtype_of,
    guidance_of, reject, run_main, with_guidance)


# ---- FP8: rows ---------------------------------------------------------------------------------------

E4M3_MAX = 448.0


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M,K) -> codes (M,K) in e4m3 and the scales (M,1) float32 that they have to be multiplied by again.
    Written plainly: a compiler puts it into the kernel that makes x, where the maximum costs nothing."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


@torch.compiler.assume_constant_result
def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 products: Ada, Hopper and later. A CPU has a function for them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


class FixedTypes(nn.Module):
    """A layer that moves between devices, but keeps its types: model.to(dtype) would convert the codes."""

    def _apply(self, fn, recurse=True):
        def move(x):
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)


class FP8Linear(FixedTypes):
    """A linear map with weight and input in e4m3, output in the input's type (multiplied out in bf16).
    e4m3 has 4 bits of exponent and 3 of mantissa: steps of 1/16 to 1/8 of a value, up to 448. The input's
    scales are computed anew at every call: no calibration, and an outlier spoils its own token only."""
    settings = {"form": "fp8"}

    def __init__(self, layer: nn.Linear):
        super().__init__()
        codes, scale = e4m3_rows(layer.weight.detach())
        self.register_buffer("weight", codes)                        # N K, multiplied transposed
        self.register_buffer("scale", scale.t().contiguous())        # 1 N
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        # row by row in memory: another order is refused on a GPU
        codes, scale = e4m3_rows(x.flatten(0, -2).contiguous())
        if not multiplies_fp8(x.device):
            y = F.linear((codes.float() * scale).to(x.dtype), self.dequantised().to(x.dtype))
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        # a bias in bf16 enters the product; one in float32 is refused there, and added afterwards
        inside = self.bias if self.bias is not None and self.bias.dtype == torch.bfloat16 else None
        # the fast accumulation keeps 22 bits of a sum, plenty beside 4 of the factors
        y = torch._scaled_mm(codes, self.weight.t(), scale, self.scale, bias=inside, out_dtype=torch.bfloat16,
                             use_fast_accum=True)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is inside else y + self.bias.to(y.dtype)

    def dequantised(self) -> Tensor:
        """The weight that is multiplied with, float32 (N,K)."""
        return self.weight.float() * self.scale.t()


def fp8_linears(model: nn.Module, targets: str = TARGETS, made: dict | None = None) -> list[str]:
    """Put an FP8Linear in the place of every linear map whose name matches; returns the names. Sizes must
    divide by 16, as the hardware wants. made: FP8Linears by name and address of their weight, for models
    that share a trunk. ValueError if there is a LoRA, or if nothing matches."""
    layers = layers_called(targets, model, (nn.Linear,), 16)
    made = {} if made is None else made
    for name, layer in layers.items():
        key = (name, layer.weight.data_ptr())
        if key not in made:
            made[key] = FP8Linear(layer)
        model.set_submodule(name, made[key])
    return list(layers)


def layers_called(targets: str, model: nn.Module, kinds: tuple[type, ...], unit: int) -> dict[str, nn.Module]:
    """The layers of these kinds whose whole name matches. ValueError if there are none, if there is a LoRA,
    or if a layer's sizes do not divide by `unit`."""
    if lora_layers(model):
        raise ValueError("this model carries a LoRA; merge it before it is quantised (lora.merge_lora)")
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds) and re.fullmatch(targets, name):
            layers[name] = layer
    if not layers:
        raise ValueError(f"no linear map is called {targets!r}; is this model quantised already?")
    for name, layer in layers.items():
        size_out, size_in = layer.weight.shape[:2]
        if size_in % unit or size_out % unit:
            raise ValueError(f"these numbers need sizes that divide by {unit}; {name} is {layer}")
    return layers


# ---- four bits: a sign, and one of eight sizes -------------------------------------------------------

@dataclass(frozen=True)
class Format:
    """sizes   what the codes 0 .. 7 stand for; codes 8 .. 15 are the same with a minus
    block   so many numbers in a row share a scale
    scale   type of the scales"""
    sizes: tuple[float, ...]
    block: int
    scale: torch.dtype

    @property
    def steps(self) -> list[float]:
        return [high - low for low, high in zip(self.sizes, self.sizes[1:])]

    @property
    def middles(self) -> list[float]:
        return [(high + low) / 2 for low, high in zip(self.sizes, self.sizes[1:])]

    def pairs(self) -> Tensor:
        """What the two codes of every byte stand for, (256,2)."""
        numbers = torch.tensor([*self.sizes, *(-size for size in self.sizes)])
        return numbers[unpack(torch.arange(256)[:, None])]


FORMATS = {
    "nvfp4": Format((0, 0.5, 1, 1.5, 2, 3, 4, 6), 16, torch.float8_e4m3fn),         # E2M1: 2 bits of exponent
    "int4": Format((0, 1, 2, 3, 4, 5, 6, 7), 64, torch.bfloat16),
}


def staircase(x: Tensor, edges, steps, dtype: torch.dtype) -> Tensor:
    """The sum of the steps whose edge lies below x. On an edge the even number of steps is taken.
    All elementwise: a compiler puts it into the kernel that makes x."""
    out = torch.zeros_like(x, dtype=dtype)
    for i, (edge, step) in enumerate(zip(edges, steps)):
        above = x >= edge if i % 2 else x > edge
        out = out.add(above, alpha=step)
    return out


def encode(x: Tensor, fmt: Format, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """x (...,K) -> codes (...,K) uint8, one a byte, and the blocks' scales (...,K/block).
    scale: what all of these are multiplied by. To the bit what torchao's nvfp4_quantize does."""
    # SANA's 5600 channels have no blocks of 64: of 32, then
    blocks = x.float().unflatten(-1, (-1, math.gcd(fmt.block, x.shape[-1])))        # ... K/block block
    scales = blocks.abs().amax(dim=-1, keepdim=True) / fmt.sizes[-1] / scale
    # a block of zeros is not to be divided by zero
    limits = torch.finfo(fmt.scale)
    scales = scales.clamp(max(limits.tiny, 1e-9), limits.max).to(fmt.scale)
    # divided by the scale as it was rounded; what lies above the largest size then is cut to it
    blocks = blocks * (1 / scale / scales.float())
    codes = staircase(blocks.abs(), fmt.middles, [1] * 7, torch.uint8)
    codes = codes + 8 * torch.signbit(blocks).to(torch.uint8)
    return codes.flatten(-2), scales.squeeze(-1)


def decode(codes: Tensor, scales: Tensor, fmt: Format, scale: Tensor | float = 1.0) -> Tensor:
    """Codes (...,K) and scales (...,K/block) -> numbers (...,K) float32."""
    below = [i + 0.5 for i in range(7)]
    sizes = staircase(codes & 7, below, fmt.steps, torch.float32)
    numbers = torch.where(codes > 7, -sizes, sizes).unflatten(-1, (scales.shape[-1], -1))
    return (numbers * (scales.float() * scale)[..., None]).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """(...,K) -> (...,K/2): two codes a byte, the first in the low half, as in torch.float4_e2m1fn_x2."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def tensor_scale(x: Tensor, fmt: Format) -> Tensor:
    """The scale of a whole tensor that brings its blocks' scales into e4m3's range. A power of two: then a
    number of NVFP4 times its scales is exact in bf16."""
    largest = x.abs().amax().float().clamp(min=1e-30) / (fmt.sizes[-1] * E4M3_MAX)
    return largest.log2().ceil().exp2()


@torch.compiler.assume_constant_result
def multiplies_fp4(device: torch.device) -> bool:
    """Whether a device has NVFP4 products: Blackwell."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def swizzle(scales: Tensor) -> Tensor:
    """Scales (M,K/16) in the order in which cuBLAS reads them: tiles of 128 x 4, in which the rows r, r + 32,
    r + 64 and r + 96 lie side by side."""
    rows, columns = scales.shape
    # as bytes: there is no padding of e4m3
    padded = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiled = rearrange(padded, "(m four r) (k c) -> (m k r four c)", four=4, r=32, c=4)
    return tiled.contiguous().view(torch.float8_e4m3fn)


class QuantLinear(FixedTypes):
    """A linear map or 1x1 convolution with its weight in 4 bits, by SVDQuant: see the top of this file.

    form         a name in FORMATS
    rank         of the branch in bf16; 0 = none
    activations  round the input, too
    smooth       (K,) what the input's channels are divided by (None: nothing)"""

    def __init__(self, layer: nn.Linear | nn.Conv2d, form: str, rank: int = 0, activations: bool = False,
                 smooth: Tensor | None = None):
        super().__init__()
        self.form = form
        self.rank = rank
        self.activations = activations
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.bias = layer.bias
        rest = layer.weight.detach().flatten(1).float()              # N K
        # rounded before it is used, so that weight and input are scaled by the same numbers
        self.register_buffer("smooth", None if smooth is None else smooth.bfloat16())
        if smooth is not None:
            rest = rest * self.smooth.float()
        A, B = largest_directions(rest, rank) if rank else (None, None)
        self.register_buffer("A", A)                                 # rank K
        self.register_buffer("B", B)                                 # N rank
        if rank:
            rest = rest - B.float() @ A.float()
        scale = tensor_scale(rest, self.format)
        codes, scales = encode(rest, self.format, scale)
        self.register_buffer("codes", pack(codes))                   # N K/2
        self.register_buffer("scales", scales)                       # N K/block
        self.register_buffer("scale", scale)                         # one number
        # for a layer on meta on the CPU: this is in no file
        device = "cpu" if rest.is_meta else rest.device
        self.register_buffer("pairs", self.format.pairs().to(device), persistent=False)

    @property
    def format(self) -> Format:
        return FORMATS[self.form]

    @property
    def settings(self) -> dict:
        return dict(form=self.form, rank=self.rank, activations=self.activations,
                    smooth=self.smooth is not None)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv:
            x = x.movedim(1, -1)                                     # B H W K
        y = self.multiply(x)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.movedim(-1, 1) if self.is_conv else y

    def multiply(self, x: Tensor) -> Tensor:
        """x (...,K) -> (...,N), without the bias."""
        if self.smooth is not None:
            x = x / self.smooth.to(x.dtype)
        y = self.multiply_rest(x)
        if self.rank:
            y = y + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return y

    def multiply_rest(self, x: Tensor) -> Tensor:
        if not self.activations:
            return F.linear(x, self.rest(x.dtype))
        # the input gets no scale for the whole tensor: that would be a pass over it more
        codes, scales = encode(x.flatten(0, -2), self.format)
        if self.form == "nvfp4" and multiplies_fp4(x.device):
            fp4 = torch.float4_e2m1fn_x2
            y = torch._scaled_mm(pack(codes).view(fp4), self.codes.view(fp4).t(), swizzle(scales),
                                 swizzle(self.scales), out_dtype=torch.bfloat16)
            y = y.to(x.dtype) * self.scale.to(x.dtype)
        else:
            y = F.linear(decode(codes, scales, self.format).to(x.dtype), self.rest(x.dtype))
        return y.view(*x.shape[:-1], -1)

    def rest(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the 4 bits stand for, (N,K). Byte by byte from a table: a weight is decoded at every call, and
        `decode` passes over it seven times."""
        numbers = F.embedding(self.codes.int(), self.pairs.to(dtype))               # N K/2 2
        scales = (self.scales.float() * self.scale).to(dtype)                       # N K/block
        return (numbers.view(*scales.shape, -1) * scales[..., None]).flatten(1)


def largest_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank,K) and B (N,rank) in bf16: B A is the weight (N,K) of this rank that is nearest. The randomised
    SVD is many times faster than a whole one, and as good here; it draws with a seed of its own."""
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(weight, min(rank + 16, *weight.shape), niter=4)
    return V[:, :rank].t().bfloat16().contiguous(), (U * S)[:, :rank].bfloat16().contiguous()


# ---- smoothing: the one whose output comes nearest ---------------------------------------------------

ALPHAS = [i / 10 for i in range(11)]
# calibrated inputs reach so far after smoothing: far from both ends of e4m3, which their scales have to fit
REACH = 96.0


def smoothings(inputs: Tensor, weight: Tensor, search: bool) -> Iterator[Tensor]:
    """Factors (K,) of the channels to choose from, for inputs (M,K) and weight (N,K); the first are equal."""
    inputs = inputs.abs().amax(dim=0).clamp(min=1e-5).float()        # K
    weights = weight.abs().amax(dim=0).clamp(min=1e-5)               # K
    factors = [torch.ones_like(inputs)]
    if search:
        factors += [inputs**alpha / weights ** (1 - alpha) for alpha in ALPHAS]
    for smooth in factors:
        yield smooth * (inputs / smooth).max() / REACH


def nearest(
    layer: nn.Module, x: Tensor, search: bool, tokens: int, settings: dict
) -> tuple[nn.Module, float]:
    """The QuantLinear of a layer whose output is nearest for inputs x (M,K), and its relative error there.
    All of x decides how large channels are, evenly spaced tokens of it decide the rest."""
    weight = layer.weight.detach().flatten(1).float()
    rows = torch.linspace(0, len(x) - 1, min(tokens, len(x)), device=x.device)
    sample = x[rows.long()].float()
    want = F.linear(sample, weight)
    best = None
    lowest = math.inf
    for smooth in smoothings(x, weight, search):
        made = QuantLinear(layer, **settings, smooth=smooth)
        error = ((made.multiply(sample) - want).norm() / want.norm()).item()
        if best is None or error < lowest:
            best = made
            lowest = error
    return best, lowest


# ---- whole models, block by block ----------------------------------------------------------------------

MODULATIONS = "|".join((
    r"blocks\.\d+\.adaLN_modulation\.1",                                                # DiT
    r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin",      # FLUX
))


def plan(model: nn.Module, form: str, rank: int = 32, activations: bool = True) -> dict[str, dict]:
    """The settings of every layer that gets 4 bits, by name. ValueError for an unknown format, a LoRA, and
    sizes that the hardware does not multiply."""
    if form not in FORMATS:
        raise ValueError(f"{form!r} is no format; there are fp8, {', '.join(FORMATS)}")
    settings = {}
    for name in layers_called(f"{TARGETS}|{MODULATIONS}", model, (nn.Linear, nn.Conv2d), 32):
        if re.fullmatch(MODULATIONS, name):
            settings[name] = dict(form=form, rank=0, activations=False)
        else:
            settings[name] = dict(form=form, rank=rank, activations=activations)
    return settings


@contextmanager
def streamed(model: Backbone, device, title: str = ""):
    """Inside, the model works on a device that holds one of its blocks at a time; the others wait where they
    are. title: of a progress bar over the blocks."""
    home = next(model.parameters()).device
    visits = {}
    bar = tqdm(total=len(model.blocks), desc=title, leave=False, disable=None if title else True)

    def come(block, args):
        visits[block] = ExitStack()
        visits[block].enter_context(on_device(block, device))

    def go(block, args, out):
        visits.pop(block).close()
        block.to(home)                                               # layers that were made on the device
        bar.update()

    with bar, ExitStack() as stack:
        for part in model.children():
            if not isinstance(part, nn.ModuleList):
                stack.enter_context(on_device(part, device))
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(come).remove)
            stack.callback(block.register_forward_hook(go).remove)
        yield


@torch.no_grad()
def calibration_batch(
    model: Backbone, y, steps: int = 8, seed: int = 0, device=None, progress: bool = False
) -> tuple:
    """(x, t, y) that quantise_model calibrates on, on the device: what the model reads while it draws. One
    picture for each row of the condition y, classes (B,) or a Text, by Euler steps evenly over t and without
    guidance in two passes; picture i is held as it is after i mod `steps` of them. A model that is guided in
    two passes reads its null condition too, so the pictures are there twice."""
    cfg = model.cfg
    device = device or next(model.parameters()).device
    side = cfg.res // ae_config(cfg.ae).f
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(y), cfg.in_channels, side, side, generator=generator).to(device)
    t = torch.arange(len(y), device=device).remainder(steps) / steps
    y = y.to(device)
    held = x.clone()
    for i in range(min(steps, len(y)) - 1):
        now = torch.full_like(t, i / steps)
        with streamed(model, device, f"path, step {i + 1}" if progress else ""):
            x = x + model(x, now, y).float() / steps
        held[i + 1 :: steps] = x[i + 1 :: steps]
    if cfg.sampling.cfg_scale != 1:
        y = cat_conditions([y, model.null_condition(y)])
        held = torch.cat([held, held])
        t = torch.cat([t, t])
    return held, t, y


@torch.no_grad()
def quantise_model(
    model: Backbone, form: str, rank: int = 32, activations: bool = True, batch: tuple | None = None,
    smooth: bool = True, tokens: int = 256, progress: bool = False
) -> dict:
    """Quantise a model in place; returns facts for its file: the settings, the fingerprint that the model
    had, and the relative errors of calibrated layers' outputs. ValueError as fp8_linears and plan raise it.

    form         "fp8", or a name in FORMATS; the other arguments are for these
    rank         of the branch in bf16
    activations  round inputs as well (W4A4), or weights alone (W4A16)
    batch        (x, t, y) to calibrate on, rows of several prompts and times in the model's own types, on the
                 device where to work. In one forward pass each block visits it, and each of its layers is
                 replaced as soon as it has run. None: no calibration, so no smoothing either
    smooth       search the smoothing of every layer; otherwise all channels are treated alike
    tokens       so many inputs of a layer decide on its smoothing"""
    facts = dict(form=form, source_print=fingerprint(model), errors={})
    if form == "fp8":
        fp8_linears(model)
        return facts
    settings = plan(model, form, rank, activations)
    facts |= dict(rank=rank, activations=activations, smooth=smooth and batch is not None)
    if batch is None:
        for name in settings:
            model.set_submodule(name, QuantLinear(model.get_submodule(name), **settings[name]))
        return facts

    def shrink(name, layer, args, out):
        if re.fullmatch(MODULATIONS, name):
            made = QuantLinear(layer, **settings[name])
        else:
            x = args[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0]
            made, error = nearest(layer, x.flatten(0, -2), smooth, tokens, settings[name])
            facts["errors"][name] = error
        model.set_submodule(name, made)

    title = f"{form}, block by block" if progress else ""
    with streamed(model, batch[0].device, title), ExitStack() as hooks:
        for name in settings:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(partial(shrink, name)).remove)
        model(*batch)
    return facts


def empty_quantised(cfg, form: str, rank: int, activations: bool, dtype: torch.dtype) -> Backbone:
    """A quantised model of this configuration on meta, to be counted. ValueError if it cannot be one."""
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg).to(dtype).requires_grad_(False).eval()
    if form == "fp8":
        fp8_linears(model)
    else:
        # what is smoothed has factors
        settings = plan(model, form, rank, activations)
        for name, kept in settings.items():
            kept["smooth"] = not re.fullmatch(MODULATIONS, name)
        put_empty(model, settings)
    return model.to("meta")                                          # the tables of codes too


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, on any device, meta included."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def size_of(count: int) -> str:
    """Bytes for a user to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def format_name(facts: dict) -> str:
    """What a model was quantised to, of quantise_model's facts: "fp8", "nvfp4 W4A4 rank 32"."""
    if facts["form"] == "fp8":
        return "fp8"
    return f"{facts['form']} W4A{4 if facts['activations'] else 16} rank {facts['rank']}"


def arithmetic(form: str, activations: bool, device) -> str:
    """How a device multiplies a format, for a user to read."""
    device = torch.device(device)
    if form == "fp8" and device.type == "cuda" and multiplies_fp8(device):
        return "multiplied in FP8"
    if form == "nvfp4" and activations and multiplies_fp4(device):
        return "multiplied in NVFP4"
    hint = ""
    if form != "fp8" and activations:
        hint = "; nothing is gained by rounding inputs here, --weights-only errs less"
    return f"turned back into wide numbers at every product: exact and slow{hint}"


# ---- files -----------------------------------------------------------------------------------------------

def save_quantised(model: Backbone, path, info: dict):
    """Write a quantised model: a file, or model.safetensors in a folder. info: quantise_model's facts and
    whatever else the file has to tell (load_base's info). ValueError if nothing is quantised."""
    layers = {name: layer.settings for name, layer in quantised_layers(model).items()}
    if not layers:
        raise ValueError("this model has no quantised layer; quant.quantise_model makes them")
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    write_tensors(file, model.state_dict(), info | {"model": config_dict(model.cfg), "quantised": layers})


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (FP8Linear, QuantLinear))}


def load_quantised(path, cfg=None, source_print: str | None = None) -> tuple[Backbone, dict]:
    """The model that save_quantised wrote (memory-mapped), in eval mode, and its info.
    cfg, source_print: the configuration, and the fingerprint of the weights, that it has to be made from.
    ValueError if it is another model's, damaged, or no such file."""
    file = run_file(path)
    found, info = read_run_config(file)
    if not isinstance(info.get("quantised"), dict):
        raise ValueError(f"{file} holds no quantised model; make one with: python quant.py")
    if cfg is not None and cfg != found:
        raise ValueError(f"{file} is another model: a quantised {info.get('base', type(found).__name__)}; "
                         "quantise the one that you ask for")
    if source_print is not None and source_print != info.get("source_print"):
        raise ValueError(f"{file} was made from other weights than the ones found now; quantise these")
    tensors = read_tensors(file)
    with torch.device("meta"):
        model = FAMILIES[type(found)](found)
    try:
        put_empty(model, info["quantised"])
        for key, own in model.named_buffers():
            if key in tensors and tensors[key].dtype != own.dtype:
                raise ValueError(f"{key} is of type {tensors[key].dtype}, not {own.dtype}")
        load_weights(model, tensors, SAME_NAMES)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file}: {e}; make it again") from None
    return model.eval(), info | {"file": str(file)}


def put_empty(model: nn.Module, settings: dict[str, dict]):
    """Put quantised layers without values in the place of layers of a model on meta. settings: by name."""
    for name, kept in settings.items():
        layer = model.get_submodule(name)
        if kept == FP8Linear.settings:
            made = FP8Linear(layer)
        else:
            factors = torch.empty(layer.weight.shape[1], device="meta") if kept.get("smooth") else None
            made = QuantLinear(layer, **kept | {"smooth": factors})
        model.set_submodule(name, made)


# ---- the script ------------------------------------------------------------------------------------------

# a prompt for each picture that is calibrated on, if --prompts gives none
PROMPTS = (
    "a lighthouse on a rocky coast at dusk, waves breaking below it",
    "portrait of an old fisherman with a wool cap, soft window light",
    "a bowl of ramen with an egg, seen from above",
    "a red fox asleep in fresh snow",
    "the words OPEN ALL NIGHT in pink neon above a diner",
    "a watercolour of a market street in the rain, crowded with umbrellas",
    "a glass chess set on a marble table, macro photograph",
    "an astronaut reading a newspaper on a bench in an empty park",
)


def calibration_condition(cfg, prompts: list[str] | None, count: int, folder, dtype, device):
    """`count` rows of a condition, the prompts or all classes in turn, and the null prompt of a text model
    (None for classes). prompts None: captions of the bundled world, or PROMPTS."""
    if not cfg.text_encoder:
        return torch.arange(count) % cfg.num_classes, None
    own = captions_from(0, 0)[:count] if cfg.text_encoder == "words" else PROMPTS
    prompts = list(prompts or own)
    texts = cache_prompts(cfg.text_encoder, folder, prompts, cfg.text_tokens, dtype=dtype, device=device)
    rows = torch.arange(count) % len(prompts)
    return with_guidance(texts[rows], guidance_of(cfg, cfg.sampling)), texts.null


def add_format_args(p):
    """Add the flags of a format besides its name; returns their group."""
    group = p.add_argument_group("the numbers")
    group.add_argument("--rank", type=at_least(int, 0), default=32, metavar="N",
                       help="of the branch in 16 bits; 0 = none (default 32; fp8 has none)")
    group.add_argument("--weights-only", action="store_true",
                       help="round weights alone (W4A16), not the inputs (W4A4)")
    return group


def parser() -> Parser:
    p = Parser(__doc__, "[--base NAME|RUN] [--out DIR]")
    base = add_base_args(p)
    base.add_argument("--text-encoders", metavar="DIR",
                      help="pipeline folder with the text encoders (default: --weights, or the hub's cache)")
    add_compute_args(p)
    numbers = add_format_args(p)
    numbers.add_argument("--form", default="nvfp4", choices=("fp8", *FORMATS), help="(default nvfp4)")
    numbers.add_argument("--no-smooth", dest="smooth", action="store_false",
                         help="treat all channels of an input alike")
    data = p.add_argument_group("what to calibrate on")
    data.add_argument("--prompts", metavar="FILE",
                      help="prompts, one a line, # for comments (default: eight of all kinds)")
    data.add_argument("--count", type=at_least(int, 1), default=8, metavar="N",
                      help="pictures, at eight times in turn (default 8); all are in one forward pass")
    data.add_argument("--tokens", type=at_least(int, 1), default=256, metavar="N",
                      help="inputs of a layer that decide on its smoothing (default 256)")
    p.add_argument("--out", metavar="DIR", help="a new folder (default runs/quant-BASE-FORM)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    # whatever is wrong with the flags is found before any weights are read
    device = device_here(args.device)
    check_paths(args, "weights", "text_encoders")
    cfg, info = read_base_config(args.base)
    why = "it is quantised already; give what it was made from"
    reject(info.get("quantised"), f"--base {args.base}", why)
    reject(args.prompts and not cfg.text_encoder, "--prompts", f"{args.base} draws classes, not prompts")
    why = "fp8 rounds weights and inputs; give --form nvfp4 or int4"
    reject(args.weights_only and args.form == "fp8", "--weights-only", why)
    out = Path(args.out or f"runs/quant-{Path(args.base).name}-{args.form}")
    check_writable(out)
    reject(out.is_file(), f"--out {out}", "a file of this name exists; name a new folder")
    reject(out.is_dir() and any(out.iterdir()), f"--out {out}", "it is not empty; name a new folder")
    dtype = dtype_of(args) if cfg.text_encoder else torch.float32
    activations = not args.weights_only
    after = weight_bytes(empty_quantised(cfg, args.form, args.rank, activations, dtype))
    with torch.device("meta"):
        before = weight_bytes(FAMILIES[type(cfg)](cfg).to(dtype))
    print(f"{args.base}: {size_of(before)} of weights become {size_of(after)}")
    prompts = read_prompts(args.prompts) if args.prompts else None
    check_encoders(cfg.text_encoder, args.text_encoders)

    # text before the model: 10 GB of encoders are freed when it is loaded
    calibrated = args.form != "fp8"
    if calibrated:
        folder = text_folder(args.base, cfg, args.text_encoders, args.weights)
        y, null = calibration_condition(cfg, prompts, args.count, folder, dtype, device)
    # the weights stay on the CPU, in the file if it has their type: a block at a time visits the device
    if args.base in BASES:
        model, info = load_base(args.base, args.weights, dtype=dtype)
    else:
        model, info = load_run(args.base, base_weights=args.weights, dtype=dtype)
        model = merge_lora(model)
    check_finite(model, args.base)
    batch = None
    if calibrated:
        model.null = null
        batch = calibration_batch(model, y, seed=args.seed, device=device, progress=True)
    facts = quantise_model(model, args.form, args.rank, activations, batch, args.smooth, args.tokens, True)
    kept = {key: info[key] for key in ("classes", "ae_weights") if key in info}
    kept |= dict(kind="quantised", base=args.base, base_weights=args.weights)
    save_quantised(model, out, kept | facts)
    print(summary(out, model, facts))


def summary(out: Path, model: Backbone, facts: dict) -> str:
    """What was written, in a line."""
    line = f"wrote {out}/model.safetensors: {len(quantised_layers(model))} layers in {format_name(facts)}, "
    line += size_of(weight_bytes(model))
    errors = facts["errors"]
    if errors:
        worst = max(errors, key=errors.get)
        middle = statistics.median(errors.values())
        line += f", their outputs off by {middle:.1%} (at most {errors[worst]:.1%}, {worst})"
    return line


if __name__ == "__main__":
    run_main(main)
