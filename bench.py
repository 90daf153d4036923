"""How fast? Time, memory and arithmetic of the paper's models, beside the hardware's limits and the paper's.

    python bench.py --res 4096                      FLUX.1-Krea and DC-Gen-FLUX, 20 steps, batch 1: headline
    python bench.py --res all                       1K, 2K and 4K: Table 5 and Fig. 8
    python bench.py --model sana-1.6b               Table 2: images a minute by batch; --model dit-xl: Table 1
    python bench.py --model flux-krea --train       time and memory of an optimizer step of each stage
    python bench.py --res all --quant               DC-Gen in 4 bits: Table 6; the paper's is of an RTX 5090
    python bench.py --res 1024 --against diffusers  the same work by the diffusers library, in turns with ours
    python bench.py --res 4096 --only dc-gen        without its base, whose 4K takes minutes an image
    python bench.py --res all --no-latency          only what is counted: floors of time and memory

What is fast comes from fast.py and quant.py, through sample.Pipeline. Each part is a switch with a row of its
own, on top of those before it:

    eager      plain PyTorch, FlashAttention-2, floats to the host: by its times, what the paper's base is
    attention  cuDNN's attention first, and TF32 for what is in float32; before compile, which freezes it
    compile    the transformer, block by block
    hoist      modulations of all steps at once, text once an image
    decoder    the autoencoder's layers compiled, channels last
    uint8      bytes, not floats, to the host
    graph      one step captured as a CUDA graph and replayed
    fp8        linear maps of the blocks in FP8

Protocol. Weights are random, of a size at which every block's output stays near 1: time does not depend on
values as long as they are neither zero nor infinite, and outputs are checked for both. The first call of a
row compiles, tunes and captures; it is reported apart. Then come --warm seconds of work, since a GPU slows
at its power limit, and --repeats rounds in which all rows of a model take turns, with fresh noise each.
Where a step takes a second, single steps are timed and one full image confirms them. Every row's latent
after three steps is compared with eager's from the same noise. A row that fails leaves the others alive;
--out is written after every row.

Without a GPU the small presets of the same classes run on the CPU: the same code, not the same figures. Only
--against diffusers times real widths there: a table of parts, eager and in float32, whatever the model.
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from model import (
    BASES, FAMILIES, DiT, DiTConfig, FluxConfig, SanaConfig, Sampling, Text, ddpm_times, rotary_table,
    sincos_2d, to_deep_latent, to_deep_model)
from lora import add_lora
from autoencoder import AUTOENCODERS, KLConfig, ae_config, build_autoencoder
from checkpoints import (
    DCAE_DIFFUSERS, KL_DIFFUSERS, atomic, check_writable, diffusers_ae_config, diffusers_config,
    diffusers_state, unmap_keys, write_json)
from fast import (
    LiveBytes, attention_priority, bf16_is_fast, compile_blocks, compile_decoder, count_cost,
    example_condition, fast_kernels, peak_gib, pixels_on_host, synchronized_time, timed)
from flags import Parser, add_device_arg, at_least, device_here, positive, run_main, within
from quant import (
    FORMATS, MODULATIONS, QuantLinear, arithmetic, e4m3_rows, encode, format_name, fp8_linears,
    multiplies_fp4, multiplies_fp8, pack, plan, swizzle, weight_bytes)
from sample import Pipeline, Speed, free_path, integrate, latent_size, short_hash, time_grid
from train import autocast, count_parameters, named_parameters_with, prepare_for_training, trainable_prefixes
from align import RECIPES, Objective, embedding_loss, flow_matching_loss, guided_flow_matching_loss
from finetune import stage3_parameters


# ---- the paper: how it times, and what it reports ----------------------------------------------------

# steps, and the scale of guidance in two passes (1 = one pass); for other bases their own sampling
PROTOCOLS = {"flux-krea": (20, 1.0), "sana-1.6b": (20, 4.5), "sana-4.8b": (20, 4.5), "dit-xl": (250, 1.5)}


@dataclass(frozen=True)
class Figures:
    """The paper's on one H100, (base, DC-Gen): images a minute at the best batch, seconds at batch 1."""
    per_minute: tuple[float | None, float | None] = (None, None)
    seconds: tuple[float | None, float | None] = (None, None)


PAPER = {
    ("flux-krea", 512): Figures((None, 118.96)),                     # Table 8
    ("flux-krea", 1024): Figures((16.82, 69.37), (4.65, 1.10)),      # Table 5
    ("flux-krea", 2048): Figures((2.51, 66.20), (23.76, 1.41)),
    ("flux-krea", 4096): Figures((0.28, 15.81), (213.81, 4.04)),
    ("sana-1.6b", 512): Figures((None, 1515.31)),                    # Table 8
    ("sana-1.6b", 1024): Figures((110.70, 435.68)),                  # Table 2
    ("sana-4.8b", 512): Figures((None, 511.72)),                     # Table 8
    ("sana-4.8b", 1024): Figures((37.68, 146.23)),                   # Table 2
    ("dit-xl", 256): Figures((2.44 * 60, 12.00 * 60)),               # Table 1, there in images/s
    ("dit-xl", 512): Figures((0.85 * 60, 4.03 * 60)),
}

# Table 6, on one RTX 5090, by pixels: seconds of a step and of an image, of the base, DC-Gen, and DC-Gen by
# SVDQuant in NVFP4. Its images hold the text encoders, which come and go where the model is in bf16
PAPER_5090 = {
    1024: ((0.42, 22.33), (0.07, 15.17), (0.03, 0.65)),
    2048: ((2.12, 56.91), (0.14, 16.38), (0.05, 0.99)),
    4096: ((19.22, 486.96), (0.42, 22.33), (0.16, 3.52)),
}

WHY_TWO_RATIOS = """\
Our base runs with the same switches as our DC-Gen. The paper's base looks like eager code, since at 1K it
takes longer than the paper's DC-Gen at 4K, which does the same steps and more decoding. A better base makes
the first ratio smaller; the second has the paper's base."""

# What an H100 sustains, FLOP/s (public measurements): bf16 products of any kind; FP8 products of linear maps
# with one scale a row (FBGEMM PR 2546). A bf16 result above the first is an error of the benchmark.
H100_BF16 = 800e12
H100_FP8 = 1100e12


def table_sizes(name: str) -> list[int]:
    """Resolutions at which the paper compares this base with its DC-Gen, or else the base's own."""
    sizes = [res for (model, res), figures in PAPER.items() if model == name and figures.per_minute[0]]
    return sizes or [BASES[name].res]


# ---- workloads: a base and its DC-Gen sibling, by the recipe -----------------------------------------

TWINS = {DiTConfig: "tiny", FluxConfig: "tiny-flux", SanaConfig: "tiny-sana"}       # what runs without a GPU


@dataclass(frozen=True)
class Workload:
    """A model at one resolution, with the paper's figures."""
    name: str
    cfg: DiTConfig | FluxConfig | SanaConfig
    res: int
    num_steps: int
    cfg_scale: float
    paper_s: float | None = None
    paper_per_min: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return latent_size(self.cfg, ae_config(self.cfg.ae), (self.res, self.res))

    @property
    def passes(self) -> int:
        """Forward passes a step."""
        return 1 if self.cfg_scale == 1.0 else 2


def workloads(name: str, res: int, twin: bool = False) -> tuple[Workload, Workload]:
    """The base and its DC-Gen sibling at one resolution. twin: small presets of the same classes, at their
    own resolution where the base is at its own, without the paper's figures. ValueError for a size that
    does not fit the latents."""
    figures = PAPER.get((name, res), Figures())
    # DiT-XL/2 was published once for each size
    base = BASES["dit-xl-512"] if (name, res) == ("dit-xl", 512) else BASES[name]
    protocol = PROTOCOLS.get(name, (base.sampling.num_steps, base.sampling.cfg_scale))
    recipe = RECIPES[base.recipe]
    # up to 1K the recipe's first autoencoder; beyond, where it goes on to a deeper one, that
    ae = recipe.then if recipe.then and res > 1024 else recipe.ae
    if twin:
        name = TWINS[type(base)]
        res = res * BASES[name].res // base.res
        base = BASES[name]
        ae = RECIPES[base.recipe].ae
        figures = Figures()

    pair = []
    for i, cfg in enumerate((base, to_deep_latent(base, ae_config(ae)))):
        prefix = ("", "dc-gen-")[i]
        pair.append(Workload(prefix + name, cfg, res, *protocol, figures.seconds[i], figures.per_minute[i]))
        assert pair[i].grid                                          # raises for a size that does not fit
    return tuple(pair)


# ---- theory: counted, not measured -------------------------------------------------------------------

@lru_cache(maxsize=None)                                             # counting takes seconds
def theory(work: Workload) -> dict:
    """Arithmetic and memory of one image, from the configuration alone, and the least time on an H100."""
    cfg = work.cfg
    # on meta a model of 12B takes no memory and its forward pass no time
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg).requires_grad_(False)
        ae = build_autoencoder(ae_config(cfg.ae)).requires_grad_(False).eval()
        z = torch.empty(work.passes, cfg.in_channels, *work.grid)
        step = count_cost(model, z, torch.empty(work.passes), example_condition(cfg, work.passes))
        in_parts = count_cost(ae.decode_raw, z[:1])
        # the arithmetic of the picture itself, without the overlap of strips or tiles
        ae.tile = 10**9
        ae.max_elements = math.inf
        decode = count_cost(ae.decode_raw, z[:1])

    # FP8 speeds up linear maps only
    linear = work.num_steps * step.linear
    rest = work.num_steps * (step.attention + step.rest) + decode.flops
    # bf16: weights of model and decoder, and the larger of what a step and a decode have alive at once
    weights = count_parameters(model) + count_parameters(ae.decoder)
    memory = 2 * weights + max(step.peak_bytes, in_parts.peak_bytes) / 2
    return dict(
        work=work.name, res=work.res, tokens=math.prod(work.grid) // cfg.patch_size**2, passes=work.passes,
        linear_tf=step.linear / 1e12, attention_tf=step.attention / 1e12, step_tf=step.flops / 1e12,
        decode_tf=decode.flops / 1e12, image_tf=(linear + rest) / 1e12,
        floor_bf16_s=(linear + rest) / H100_BF16, floor_fp8_s=linear / H100_FP8 + rest / H100_BF16,
        memory_gib=memory / 2**30,
        paper_s=work.paper_s, paper_per_min=work.paper_per_min)


# ---- models with random weights ----------------------------------------------------------------------

@torch.no_grad()
def init_random_(module: nn.Module, device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A module built on meta, with random weights: matrices of variance 1 / fan-in, norms 1, biases 0.1. No
    gate is zero, so that no block is skipped."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    g = torch.Generator(device).manual_seed(seed)
    for key, value in module.state_dict().items():
        if value.ndim > 1:
            value.normal_(generator=g).mul_(value[0].numel() ** -0.5)
        elif value.is_floating_point() and key.endswith(("weight", "scale", "running_var")):
            value.fill_(1.0)
        elif value.is_floating_point() and key.endswith("bias"):
            value.normal_(generator=g).mul_(0.1)
        else:
            value.zero_()
    return module


def random_condition(cfg, batch: int, device, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Classes 0, 1, ... or a Text of random numbers at guidance 3.5, the same for the same seed."""
    g = torch.Generator(device).manual_seed(seed)

    def fill(part: Tensor) -> Tensor:
        if part.dtype == torch.bool:                                 # mask
            return part
        if part.ndim == 1:                                           # guidance
            return torch.full_like(part, 3.5)
        return torch.randn(part.shape, generator=g, device=device)

    cond = example_condition(cfg, batch).to(device)
    if isinstance(cond, Tensor):
        return torch.arange(batch, device=device) % cfg.num_classes
    return cond.map(fill).to(device, dtype)


def build_pair(
        pair: tuple[Workload, Workload], device, dtype, seed: int = 0) -> list[tuple[nn.Module, nn.Module]]:
    """(model, autoencoder) of the base and of DC-Gen; their transformers share a trunk."""
    with torch.device("meta"):
        base = FAMILIES[type(pair[0].cfg)](pair[0].cfg)
        autoencoders = [build_autoencoder(ae_config(work.cfg.ae)) for work in pair]
    base = init_random_(base, device, dtype, seed)
    # new embedder and head, the same ones at every call, and the base's own blocks
    torch.manual_seed(seed)
    deep = to_deep_model(base, pair[1].cfg).to(dtype).eval()
    if base.cfg.text_encoder:
        base.null = deep.null = random_condition(base.cfg, 1, device, dtype, seed + 1)
    autoencoders = [init_random_(ae, device, dtype, seed + 1) for ae in autoencoders]
    return list(zip((base, deep), autoencoders))


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors: compiling or quantising it leaves the original alone."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


# ---- variants: the ways to draw ----------------------------------------------------------------------

SWITCHES = ("eager", "attention", "compile", "hoist", "decoder", "uint8", "graph", "fp8")


def switches_on(device) -> tuple[str, ...]:
    """The switches that this device has."""
    return SWITCHES if torch.device(device).type == "cuda" else tuple(s for s in SWITCHES if s != "graph")


def switches_up_to(row: str, device) -> tuple[str, ...]:
    """The switches that are on in a row: its own and all before it."""
    on = switches_on(device)
    return on[: on.index(row) + 1]


def flash_attention():
    """A context in which softmax attention is what it would be without cuDNN's."""
    return attention_priority([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Variant(Pipeline):
    """One way to draw: noise -> latent -> picture -> bytes on the host, each part by itself so that it can
    be timed. compiler: options of torch.compile. quantised: FP8 layers by weight, shared between variants
    (quant.fp8_linears)."""

    def __init__(self, work: Workload, model, ae, switches: tuple[str, ...], batch: int = 1,
                 compiler: dict | None = None, num_steps: int | None = None, quantised: dict | None = None):
        sampling = Sampling(num_steps or work.num_steps, work.cfg_scale, batch=batch)
        speed = Speed(hoist="hoist" in switches, graph="graph" in switches)
        dtype = model.embed_linear.weight.dtype
        super().__init__(
            shared_copy(model), shared_copy(ae), sampling, (work.res, work.res), dtype=dtype, speed=speed)
        self.work = work
        self.switches = switches
        self.num_steps = sampling.num_steps
        self.cond = random_condition(work.cfg, batch, self.device, dtype)
        # a network that predicts noise has its output divided by t: near t = 0 random weights would blow up.
        # Every time costs the same
        if work.cfg.predict == "epsilon":
            self.times = time_grid(self.num_steps, start=0.5)
        if "fp8" in switches:
            if not multiplies_fp8(self.device):
                name = torch.cuda.get_device_name(self.device)
                raise ValueError(f"{name} does not multiply FP8; that takes Ada or Hopper, compute "
                                 "capability 8.9 or more")
            fp8_linears(self.model, made=quantised)
        if "compile" in switches:
            compile_blocks(self.model.blocks, **(compiler or {}))
        if "decoder" in switches:
            compile_decoder(self.ae, **(compiler or {}))

    def noise(self) -> Tensor:
        return torch.randn(self.sampling.batch, *self.shape, device=self.device)

    @torch.no_grad()
    def denoise(self, x0: Tensor, steps: int | None = None) -> Tensor:
        """Noise -> latent after so many of the steps (None: all), what is hoisted once an image included."""
        times = self.times if steps is None else self.times[: steps + 1]
        with self.kernels():
            return integrate(self.evaluation(self.cond), x0, times)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        with self.kernels():
            return super().decode(z)

    def kernels(self):
        return fast_kernels(self.device, self.dtype) if "attention" in self.switches else flash_attention()

    def to_host(self, x: Tensor) -> Tensor:
        return pixels_on_host(x if "uint8" in self.switches else x.float().cpu())


class DiffusersVariant(Variant):
    """The same work by the diffusers library's own classes over the same weights; with compiler, its blocks
    and its decoder are compiled. Clocks, signs and guidance stay ours."""

    def __init__(self, work: Workload, model, ae, compiler: dict | None = None, num_steps: int | None = None):
        super().__init__(work, model, ae, ("attention",), num_steps=num_steps)
        self.net = diffusers_model(model)
        self.vae = diffusers_autoencoder(ae)
        if work.res > 2048:
            self.vae.enable_tiling()
        if compiler is not None:
            blocks = [*self.net.transformer_blocks, *getattr(self.net, "single_transformer_blocks", ())]
            for part in (*blocks, self.vae.decoder):
                part.compile(dynamic=False, **compiler)
        self.model.forward_native = partial(diffusers_forward, self.net, self.model)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        raw = z.to(self.dtype) / self.ae.cfg.scale + self.ae.cfg.shift
        return self.vae.decode(raw, return_dict=False)[0]


def diffusers_class(config: dict, state: dict[str, Tensor]) -> nn.Module:
    """The class that a config.json of diffusers names, over these tensors."""
    import diffusers
    family = getattr(diffusers, config.pop("_class_name"))
    with torch.device("meta"):
        theirs = family(**config)
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False).eval()


def diffusers_model(ours: nn.Module) -> nn.Module:
    """diffusers' transformer over the weights of ours."""
    theirs = diffusers_class(diffusers_config(ours.cfg), diffusers_state(ours))
    if isinstance(ours, DiT):
        # what is not among the weights: the positions, and the clock's frequencies as in training
        patches = theirs.pos_embed
        table = sincos_2d(ours.cfg.hidden_size, patches.height, patches.width, ours.cfg.pos_step)
        patches.pos_embed = table.to(ours.embed_linear.weight)[None]
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


def diffusers_autoencoder(ours: nn.Module) -> nn.Module:
    """diffusers' autoencoder over the weights of ours."""
    table = KL_DIFFUSERS if isinstance(ours.cfg, KLConfig) else DCAE_DIFFUSERS
    return diffusers_class(diffusers_ae_config(ours.cfg), unmap_keys(ours.state_dict(), table))


def diffusers_forward(theirs: nn.Module, ours: nn.Module, x: Tensor, step: Tensor, cond) -> Tensor:
    """ours.forward_native(x, step, cond) by diffusers' model."""
    x = x.to(ours.embed_linear.weight.dtype)
    if isinstance(ours, DiT):
        return theirs(x, step, cond, return_dict=False)[0]
    if isinstance(ours.cfg, SanaConfig):
        mask = cond.mask.to(x.dtype)
        return theirs(x, cond.tokens, step, encoder_attention_mask=mask, return_dict=False)[0]
    # FLUX's pipeline packs the latent and numbers rows and columns
    sides = [torch.arange(side // ours.cfg.patch_size, device=x.device) for side in x.shape[-2:]]
    image_ids = torch.cartesian_prod(torch.zeros_like(sides[0][:1]), *sides)
    text_ids = torch.zeros(cond.tokens.shape[1], 3, device=x.device)
    out = theirs(
        ours.patchify(x), cond.tokens, cond.pooled, step.to(x.dtype), image_ids, text_ids, cond.guidance,
        return_dict=False)[0]
    return ours.unpatchify(out, x.shape[-2:])


# ---- timing ------------------------------------------------------------------------------------------

def check_magnitude(what: str, x: Tensor):
    """RuntimeError for infinities, zeros and the like, which run faster than pictures do."""
    rms = float(x.float().square().mean().sqrt())
    if not 0.1 <= rms <= 10:                                         # true for nan as well
        raise RuntimeError(
            f"{what} has a root mean square of {rms:.3g}; 0.1 .. 10 was expected, "
            "so this timing would not be one of the real work")


def draw(variant: Variant, steps: int | None = None) -> dict[str, float]:
    """Seconds of one image (or batch): denoise, decode, to_host; image, their sum. steps: run only so many
    of the steps, which all do the same work, and scale their time."""
    x0 = variant.noise()
    seconds = {}
    # nothing of what went before may be counted here
    synchronized_time(variant.device)
    with timed(seconds, "denoise", variant.device):
        z = variant.denoise(x0, steps)
    with timed(seconds, "decode", variant.device):
        x = variant.decode(z)
    with timed(seconds, "to_host", variant.device):
        variant.to_host(x)
    if steps:
        seconds["denoise"] *= variant.num_steps / steps
    check_magnitude(f"{variant.work.name}'s latent", z)
    check_magnitude(f"{variant.work.name}'s picture", x)
    return seconds | dict(image=sum(seconds.values()))


def attempt(f, *args):
    """(f(*args), None), or (None, why it failed, in a line): out of memory, a compiler's refusal, a failed
    check. What Inductor and Triton raise is not always a RuntimeError."""
    try:
        return f(*args), None
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def free():
    """Release what no row needs any more."""
    # compiled modules lie in reference cycles, and a captured graph keeps its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(variant: Variant, row: dict):
    """Put row["peak_gib"]: the most GiB alive inside the context, this variant's weights included and what
    other variants hold left out. None on a CPU."""
    row["peak_gib"] = None
    if variant.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(variant.device)
    held = torch.cuda.memory_allocated(variant.device)
    yield
    weights = nn.ModuleList([variant.model, variant.ae])
    storages = {}
    for tensor in (*weights.parameters(), *weights.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    row["peak_gib"] = peak_gib(variant.device) + (sum(storages.values()) - held) / 2**30


def measure(
        makers: dict, repeats: int, warm: float = 0.0, until: float = math.inf, steps: int | None = None
        ) -> tuple[dict[str, dict], dict[str, Variant]]:
    """Make variants and time them, taking turns -> rows, and the variants that did not fail, by name. A row
    is that of summarize with the seconds of the first call and peak GiB; or "failed". until: no round
    begins after this time.perf_counter(), except the first three. steps: see draw."""
    rows = {}
    variants = {}

    def draw_or_drop(name: str) -> dict | None:
        seconds, failure = attempt(draw, variants[name], steps)
        if failure:
            rows[name] = dict(failed=failure)
            del variants[name]
            free()
        return seconds

    # the first call compiles, tunes and captures
    for name, make in makers.items():
        row = dict(estimated=steps is not None)
        rows[name] = row
        start = time.perf_counter()
        variants[name], failure = attempt(make)
        if failure:
            rows[name] = dict(failed=failure)
            del variants[name]
            continue
        with peak_memory(variants[name], row):
            draw_or_drop(name)
        row["first_s"] = time.perf_counter() - start

    # at its power limit a GPU slows down within seconds
    warm_until = time.perf_counter() + warm
    while variants and time.perf_counter() < warm_until:
        for name in list(variants):
            draw_or_drop(name)

    # in turns, so that a clock that drifts is the same for all
    timings = {name: [] for name in variants}
    for k in range(repeats):
        start = time.perf_counter()
        for name in list(variants):
            timings[name].append(draw_or_drop(name))
        now = time.perf_counter()
        if k >= 2 and now + (now - start) > until:
            break
    for name in variants:
        rows[name] |= summarize(timings[name])
    return rows, variants


def summarize(timings: list[dict]) -> dict:
    """Medians of the parts in milliseconds; median, 10th and 90th percentile of the image in seconds."""
    median = {part: statistics.median(seconds[part] for seconds in timings) for part in timings[0]}
    images = sorted(seconds["image"] for seconds in timings)
    last = len(images) - 1
    return dict(
        denoise_ms=1e3 * median["denoise"],
        decode_ms=1e3 * median["decode"],
        to_host_ms=1e3 * median["to_host"],
        image_s=median["image"],
        p10=images[round(0.1 * last)],
        p90=images[round(0.9 * last)],
        repeats=len(images))


# softmax attention by the names of its kernels, or on a CPU its operators; cuDNN's hold "flash" too: first
ATTENTION_KERNELS = {
    "cuDNN": "cudnn.*(sdpa|attention|fmha|flash)",
    "memory-efficient": "fmha_cutlass|efficient_attention",
    "flash": "flash",
}


def attention_of(names) -> str:
    """Which softmax attention ran, by the names of the kernels in a profile."""
    found = set()
    for name in names:
        kinds = [kind for kind, sign in ATTENTION_KERNELS.items() if re.search(sign, name.lower())]
        found.update(kinds[:1])
    return " + ".join(sorted(found))


# kinds of kernels by their names; the first that matches
KERNELS = {
    "attention": "sdpa|fmha|flash",
    "convolution": "conv|fprop|wgrad|implicit",
    "product": "nvjet|gemm|cutlass|xmma|gemv|splitk|cublas|mm$",
    "triton": "^triton",
    "copy": "memcpy|copy",
}


class KernelCalls(NamedTuple):
    """All calls of one kernel; on a CPU, of one operator."""
    name: str
    count: int
    ms: float


def profile(f, device) -> list[KernelCalls]:
    """What a call of f runs on the device."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                  # else it writes to the terminal
    on_gpu = torch.device(device).type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as record:
        f()
        synchronized_time(device)
    calls = []
    for event in record.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls.append(KernelCalls(event.key, event.count, spent / 1e3))
    return calls


def by_kind(calls: list[KernelCalls]) -> dict[str, float]:
    """{kernels, kernels_ms, and both of every kind}"""
    found = dict(kernels_ms=sum(call.ms for call in calls), kernels=sum(call.count for call in calls))
    for call in calls:
        kind = next((kind for kind, sign in KERNELS.items() if re.search(sign, call.name.lower())), "other")
        found[f"{kind}_ms"] = found.get(f"{kind}_ms", 0.0) + call.ms
        found[f"{kind}_kernels"] = found.get(f"{kind}_kernels", 0) + call.count
    return found


def profile_step(variant: Variant, x0: Tensor) -> dict:
    """Where a step's time goes, and which softmax attention runs in it: asking for a backend is not the same
    as getting it."""
    calls = profile(partial(variant.denoise, x0, 1), variant.device)
    attention = attention_of(call.name for call in calls) or "math, or none"
    return dict(attention=attention, step=by_kind(calls))


# ---- rows: one image at a time -----------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """What all rows of a run share."""
    device: torch.device
    dtype: torch.dtype
    switches: tuple[str, ...]           # rows to time, in the order of SWITCHES
    compiler: dict                      # options of torch.compile
    num_steps: int | None = None        # None: the protocol's
    repeats: int = 20
    warm: float = 10.0
    seed: int = 0
    # places in a pair, DC-Gen first: if time or memory ends early, its rows are there
    models: tuple[int, ...] = (1, 0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def fastest(self) -> str:
        """The last row in the run's own precision."""
        return ([s for s in self.switches if s != "fp8"] or self.switches)[-1]

    def precision(self, switch: str) -> str:
        return "fp8" if switch == "fp8" else str(self.dtype).removeprefix("torch.")

    def has_long_steps(self, work: Workload) -> bool:
        return self.on_gpu and theory(work)["step_tf"] * 1e12 / H100_BF16 > 1.0


def latency_rows(pair: tuple[Workload, Workload], settings: Settings, against: bool, until: float):
    """Time a base and its DC-Gen sibling, one image at a time. Yields every row once it is finished, DC-Gen's
    first: a row for each switch; of the base the first, the fastest in its own precision, and the last.
    against: diffusers too."""
    models = build_pair(pair, settings.device, settings.dtype, settings.seed)
    quantised = {}
    base_rows = dict.fromkeys([settings.switches[0], settings.fastest, settings.switches[-1]])
    for i in settings.models:
        work = pair[i]
        switches = settings.switches if i == 1 else base_rows
        make = partial(Variant, work, *models[i], num_steps=settings.num_steps)
        makers = {}
        for switch in switches:
            on = switches_up_to(switch, settings.device)
            makers[switch] = partial(make, switches=on, compiler=settings.compiler, quantised=quantised)
        if against:
            diffusers = partial(DiffusersVariant, work, *models[i], num_steps=settings.num_steps)
            makers["diffusers"] = diffusers
            makers["diffusers, compiled"] = partial(diffusers, compiler=settings.compiler)

        # rows take turns; but where steps take seconds each has the memory for itself
        groups = [{name: makers[name]} for name in makers] if settings.has_long_steps(work) else [makers]
        for group in groups:
            rows = time_group(group, make(switches=("eager",)), settings, until)
            free()
            for name, row in rows.items():
                yield describe(row, work, name, settings)


def time_group(makers: dict, eager: Variant, settings: Settings, until: float) -> dict[str, dict]:
    """Measure variants, compare what they draw with eager's, and profile the fastest -> {name: row}."""
    is_long = settings.has_long_steps(eager.work)
    if is_long:
        rows, variants = measure(makers, 3, steps=1)
    else:
        # a third of the time that is left: the base and the throughput need theirs
        now = time.perf_counter()
        rows, variants = measure(makers, settings.repeats, settings.warm, now + (until - now) / 3)

    # a fast row that draws something else is no row: a graph that recorded nothing would be the fastest
    x0 = eager.noise()
    steps = 1 if is_long else min(3, eager.num_steps)
    reference, _ = attempt(eager.denoise, x0, steps)
    for name, variant in variants.items():
        row = rows[name]
        row["error"], _ = attempt(relative_error, variant, x0, steps, reference)
        if name != settings.fastest:
            continue
        if is_long and time.perf_counter() + 1.1 * row["image_s"] < until:
            with timed(row, "full_run_s", settings.device):
                attempt(variant.denoise, x0)
        found, _ = attempt(profile_step, variant, x0)
        row |= found or {}
    return rows


def relative_error(variant: Variant, x0: Tensor, steps: int, reference: Tensor) -> float:
    """How far from the reference a variant's steps from x0 end, as a share of the way: 1 for no step."""
    z = variant.denoise(x0, steps)
    return ((z - reference).norm() / (reference - x0).norm()).item()


def describe(row: dict, work: Workload, switch: str, settings: Settings) -> dict:
    """A measured row with what it is of, its rate, and notes on what is wrong with it."""
    precision = settings.precision(switch)
    row = dict(work=work.name, res=work.res, switch=switch, precision=precision) | row
    if "failed" in row:
        return row | dict(notes=f"FAILED, {row['failed']}")
    counted = theory(work)
    num_steps = settings.num_steps or work.num_steps
    tflop = num_steps * counted["step_tf"] + counted["decode_tf"]
    row |= dict(
        tokens=counted["tokens"], num_steps=num_steps, image_tf=tflop, tflop_per_s=tflop / row["image_s"],
        paper_s=work.paper_s, paper_over_ours=work.paper_s and work.paper_s / row["image_s"])
    if settings.on_gpu:
        row["floor_s"] = counted["floor_fp8_s" if precision == "fp8" else "floor_bf16_s"]
    on_h100 = settings.on_gpu and "H100" in torch.cuda.get_device_name(settings.device)
    return row | dict(notes="; ".join(notes_on(row, on_h100)))


def notes_on(row: dict, on_h100: bool) -> list[str]:
    """What a reader has to know of a row before he believes it; what is wrong, in capitals."""
    notes = []
    if "step" in row:
        step = dict(row["step"])
        whole = step.pop("kernels_ms")
        parts = [f"{kind.removesuffix('_ms')} {ms:.3g}" for kind, ms in step.items() if kind.endswith("_ms")]
        notes.append(f"a step: {whole:.3g} ms in {step['kernels']} kernels ({', '.join(parts)})")
    if row["estimated"]:
        spread = row["p90"] / row["p10"] - 1
        notes.append(f"estimated from 3 steps, which differ by {spread:.1%}")
        if spread > 0.02:
            notes.append("THEY SHOULD AGREE within 2 %")
    if "full_run_s" in row:
        notes.append(f"a full run: {row['full_run_s']:.1f} s")
    limit = 0.15 if row["precision"] == "fp8" else 0.03
    differs = row["error"] is None or not row["error"] <= limit      # true for nan as well
    # diffusers rounds the clock to bf16, which moves random weights far
    if differs and row["switch"] in SWITCHES:
        notes.append("DRAWS SOMETHING ELSE than eager")
    if on_h100 and row["precision"] != "fp8" and row["tflop_per_s"] * 1e12 > H100_BF16:
        notes.append("more TFLOP/s than an H100 has: THE BENCHMARK IS WRONG")
    return notes


def ratios(rows: list[dict]) -> list[dict]:
    """How many times faster DC-Gen is: than our base with the same switches, and than the paper's base."""
    measured = {(row["work"], row["res"], row["switch"]): row for row in rows if "image_s" in row}
    result = []
    for (name, res, switch), dc in measured.items():
        base_name = name.removeprefix("dc-gen-")
        base = measured.get((base_name, res, switch))
        if base is None or base is dc:
            continue
        paper_base, paper_dc = PAPER.get((base_name, res), Figures()).seconds
        result.append(dict(
            work=name, res=res, switch=switch,
            denoise=base["denoise_ms"] / dc["denoise_ms"], against_our_base=base["image_s"] / dc["image_s"],
            against_paper_base=paper_base and paper_base / dc["image_s"],
            paper=paper_base and paper_base / paper_dc))
    return result


# ---- rows: images a minute ---------------------------------------------------------------------------

def throughput_rows(pair: tuple[Workload, Workload], batches: list[int], settings: Settings, until: float):
    """Images a minute by batch, up to the last that fits, denoising alone and with the decoder; DC-Gen
    first, rows as they are finished. Of many steps, which all do the same work, 20 are timed and scaled."""
    models = build_pair(pair, settings.device, settings.dtype, settings.seed)
    num_steps = settings.num_steps or pair[0].num_steps
    timed_steps = min(num_steps, 20)
    rounds = max(1, settings.repeats // 3)
    switches = dict.fromkeys([settings.fastest, settings.switches[-1]])
    for i, switch in product(settings.models, switches):
        work = pair[i]
        make = partial(Variant, work, *models[i], switches_up_to(switch, settings.device))
        for batch in batches:
            if time.perf_counter() > until:
                print(f"{work.name} {work.res}: no time left for a batch of {batch} (--minutes)")
                break
            makers = {switch: partial(make, batch=batch, compiler=settings.compiler, num_steps=timed_steps)}
            row = measure(makers, rounds)[0][switch]
            free()
            if "failed" in row:
                print(f"{work.name} {work.res}, {switch}: a batch of {batch} does not run: {row['failed']}")
                break
            denoise = row["denoise_ms"] / 1e3 * num_steps / timed_steps
            decode = (row["decode_ms"] + row["to_host_ms"]) / 1e3
            yield dict(
                work=work.name,
                res=work.res,
                switch=switch,
                precision=settings.precision(switch),
                batch=batch,
                denoise_per_min=60 * batch / denoise,
                with_decode_per_min=60 * batch / (denoise + decode),
                peak_gib=row["peak_gib"],
                paper_per_min=work.paper_per_min)


# ---- rows: parts beside diffusers', on a CPU -----------------------------------------------------------

# a part: its configuration, pixels a side, batch. Widths are real; of a transformer's blocks there are a few,
# at 256 tokens: the others would be the same work again
PARTS = {
    "DiT-XL, 8 blocks": (replace(BASES["dit-xl"], depth=8), 256, 2),
    "SANA-1.6B, 2 blocks": (replace(BASES["sana-1.6b"], depth=2), 512, 2),
    "FLUX, 1 + 1 blocks": (replace(BASES["flux-krea"], depth=1, depth_single=1), 256, 1),
    "DC-AE f32, decoding": (AUTOENCODERS["dc-ae-f32c32-in-1.0"], 512, 1),
    "DC-AE f32 of SANA, decoding": (AUTOENCODERS["dc-ae-f32c32-sana-1.1"], 256, 1),
    "SD-VAE, decoding": (AUTOENCODERS["sd-vae-f8c4"], 256, 1),
}


def build_both(cfg, res: int, batch: int, settings: Settings) -> tuple:
    """A forward pass of a transformer, or the decoding of an autoencoder, by our class and by diffusers' over
    the same random weights, as two functions without arguments. Their DiT embeds time and class anew in every
    block: little beside 256 tokens, but not nothing."""
    is_model = type(cfg) in FAMILIES
    with torch.device("meta"):
        ours = FAMILIES[type(cfg)](cfg) if is_model else build_autoencoder(cfg)
    ours = init_random_(ours, settings.device, settings.dtype, settings.seed)
    if not is_model:
        theirs = diffusers_autoencoder(ours)
        ours.to(memory_format=torch.channels_last)                   # as load_autoencoder leaves it
        z = torch.randn(batch, cfg.channels, res // cfg.f, res // cfg.f)
        return partial(ours.decode_raw, z), lambda: theirs.decode(z, return_dict=False)[0]
    theirs = diffusers_model(ours)
    grid = latent_size(cfg, ae_config(cfg.ae), (res, res))
    x = torch.randn(batch, cfg.in_channels, *grid)
    x, step = ours.to_native(x, torch.full((batch,), 0.5))
    args = (x, step, random_condition(cfg, batch, settings.device))
    return partial(ours.forward_native, *args), partial(diffusers_forward, theirs, ours, *args)


@torch.no_grad()
def compare_part(cfg, res: int, batch: int, settings: Settings, most: float = 15.0) -> dict:
    """Median milliseconds of a part by our class and by diffusers', in turns; the median of the rounds'
    ratios; the largest difference of what they return, as a share of the largest number. No round begins
    after `most` seconds, except the first three."""
    calls = build_both(cfg, res, batch, settings)
    # the first calls warm up
    ours, theirs = (call() for call in calls)
    check_magnitude("what diffusers returns", theirs)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = difference <= 1e-3                                        # false for nan as well

    rounds = []
    until = time.perf_counter() + most
    while len(rounds) < settings.repeats and (len(rounds) < 3 or time.perf_counter() < until):
        clock = [time.perf_counter()]
        for call in calls:
            call()
            clock.append(time.perf_counter())
        rounds.append((clock[1] - clock[0], clock[2] - clock[1]))
    ours_s, theirs_s = (statistics.median(seconds) for seconds in zip(*rounds))
    return dict(
        ours_ms=1e3 * ours_s,
        diffusers_ms=1e3 * theirs_s,
        ratio=statistics.median(theirs_s / ours_s for ours_s, theirs_s in rounds),
        difference=difference,
        rounds=len(rounds),
        notes="" if same else "RETURNS SOMETHING ELSE than diffusers")


def part_rows(parts: dict, settings: Settings):
    """A row for each part, as it is finished."""
    for name, (cfg, res, batch) in parts.items():
        row, failure = attempt(compare_part, cfg, res, batch, settings)
        free()
        row = row or dict(failed=failure, notes=f"FAILED, {failure}")
        yield dict(part=name, res=res, batch=batch, precision=settings.precision("eager")) | row


# ---- rows: few bits ----------------------------------------------------------------------------------

RANK = 32                               # SVDQuant's


def product_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large product on this device in its own type and in each form that it multiplies, at best.
    What a model's products would take at these rates is its floor here."""
    size = 8192 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device)
    wide = x.to(dtype)
    products = {"own": partial(torch.mm, wide, wide)}
    product = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
    if device.type == "cuda" and multiplies_fp8(device):
        codes, scale = e4m3_rows(x)
        columns = scale.t().contiguous()
        products["fp8"] = partial(product, codes, codes.t(), scale, columns, use_fast_accum=True)
    if multiplies_fp4(device):
        codes, scales = encode(x, FORMATS["nvfp4"])
        codes = pack(codes).view(torch.float4_e2m1fn_x2)
        products["nvfp4"] = partial(product, codes, codes.t(), swizzle(scales), swizzle(scales))
    rates = {}
    for name, run in products.items():
        seconds = []
        for _ in range(20):
            start = synchronized_time(device)
            run()
            seconds.append(synchronized_time(device) - start)
        rates[name] = 2 * size**3 / min(seconds)
    return rates


def floor_seconds(work: Workload, num_steps: int, linear_rate: float, rate: float) -> tuple[float, float]:
    """The least seconds of a step and of an image: linear maps at one rate, all else at the other."""
    counted = theory(work)
    step = counted["linear_tf"] / linear_rate + (counted["step_tf"] - counted["linear_tf"]) / rate
    return 1e12 * step, 1e12 * (num_steps * step + counted["decode_tf"] / rate)


def quantise_in_place(model: nn.Module, form: str):
    """Quantise a model with random weights as a calibrated one would be: its smoothing factors are ones,
    which take their time all the same. Every layer is freed before the next is made."""
    if form == "fp8":
        fp8_linears(model)
        return
    for name, kept in plan(model, form, RANK).items():
        layer = model.get_submodule(name)
        smooth = None
        if not re.fullmatch(MODULATIONS, name):
            smooth = torch.ones(layer.weight.shape[1], device=layer.weight.device)
        model.set_submodule(name, QuantLinear(layer, **kept, smooth=smooth))


def quant_rows(pair: tuple[Workload, Workload], forms: list[str], settings: Settings, until: float):
    """Table 6: DC-Gen and its base as they are, and DC-Gen in each form, one image at a time, with every
    switch but fp8. Yields every row once it is finished; 4 bits with rounded inputs (W4A4) and without
    (W4A16)."""
    rates = product_rates(settings.device, settings.dtype)
    on = switches_up_to(settings.fastest, settings.device)
    ours = settings.precision("eager")
    reference = None

    def timed_row(i: int, parts: tuple, facts: dict | None = None) -> dict:
        work = pair[i]
        make = partial(Variant, work, *parts, on, compiler=settings.compiler, num_steps=settings.num_steps)
        name = format_name(facts) if facts else ours
        is_long = settings.has_long_steps(work)
        if is_long:
            rows, variants = measure({name: make}, 3, steps=1)
        else:
            now = time.perf_counter()
            rows, variants = measure({name: make}, settings.repeats, settings.warm, now + (until - now) / 4)
        row = dict(work=work.name, res=work.res, numbers=name) | rows[name]
        if facts and reference and name in variants:
            row["error"], _ = attempt(relative_error, variants[name], *reference)
        return row | quant_figures(row, work, i, parts[0], facts, rates, settings)

    models = build_pair(pair, settings.device, settings.dtype, settings.seed)
    eager = Variant(pair[1], *models[1], ("eager",), num_steps=settings.num_steps)
    x0 = eager.noise()
    steps = min(3, eager.num_steps)
    latent, _ = attempt(eager.denoise, x0, steps)
    if latent is not None:
        reference = (x0, steps, latent)
    del eager
    for i in settings.models:
        yield timed_row(i, models[i])
        free()
    for form in forms if 1 in settings.models else ():
        # the base's trunk is DC-Gen's own: both have to go before few bits save any memory
        models = None
        free()
        _, parts = build_pair(pair, settings.device, settings.dtype, settings.seed)
        quantise_in_place(parts[0], form)
        for activations in (True, False) if form in FORMATS else (True,):
            for layer in parts[0].modules():
                if isinstance(layer, QuantLinear) and layer.smooth is not None:
                    layer.activations = activations
            yield timed_row(1, parts, dict(form=form, rank=RANK, activations=activations))
            free()


def quant_figures(row: dict, work: Workload, i: int, model, facts: dict | None, rates: dict,
                  settings: Settings) -> dict:
    """What a measured row is to be compared with: floors of this device, the paper's figures, notes."""
    figures = dict(weights_gb=weight_bytes(model) / 1e9, arithmetic="", notes="")
    if facts:
        figures["arithmetic"] = arithmetic(facts["form"], facts["activations"], settings.device).split(":")[0]
    if "failed" in row:
        return figures | dict(notes=f"FAILED, {row['failed']}")
    num_steps = settings.num_steps or work.num_steps
    # inputs in 16 bits are multiplied in 16 bits
    multiplied = facts["form"] if facts and facts["activations"] else "own"
    linear_rate = rates.get(multiplied, rates["own"])
    step, image = floor_seconds(work, num_steps, linear_rate, rates["own"])
    figures |= dict(step_ms=row["denoise_ms"] / num_steps, floor_step_ms=1e3 * step, floor_s=image)
    if work.name.endswith("flux-krea") and work.res in PAPER_5090 and (not facts or facts["form"] == "nvfp4"):
        column = 2 if facts else i
        figures["paper_step_ms"] = 1e3 * PAPER_5090[work.res][column][0]
        figures["paper_s"] = PAPER_5090[work.res][column][1]
    if facts and not (row["error"] or math.inf) < 0.5:               # true for nan as well
        figures["notes"] = "DRAWS SOMETHING ELSE than eager"
    return figures


# ---- rows: training ----------------------------------------------------------------------------------

def train_rows(pair: tuple[Workload, Workload], plans: list, batch: int, settings: Settings):
    """An optimizer step of each stage: images/s, memory, and the days on one GPU that the stage's plan
    takes at this rate; rows as they are finished. A distilled model's loss has a second forward pass (Eq.
    7)."""
    (base, _), (model, _) = build_pair(pair, settings.device, settings.dtype, settings.seed)
    device = settings.device
    cfg = pair[1].cfg
    cond = random_condition(cfg, batch, device)
    # the plain loss would take a distilled model's guidance away
    objective = Objective()
    if getattr(cfg, "guidance_embed", False):
        objective = Objective(guided_flow_matching_loss, RECIPES[cfg.recipe].guidance)
    # large models recompute their blocks from here on
    prepare_for_training(model, [], device, settings.dtype)

    def latent(work: Workload) -> Tensor:
        return torch.randn(batch, work.cfg.in_channels, *work.grid, device=device)

    def alignment_loss() -> Tensor:
        return embedding_loss(model, base, latent(pair[1]), latent(pair[0]))

    def training_loss() -> Tensor:
        return objective.train_loss(model, latent(pair[1]), cond, torch.Generator())[0]

    for stage, plan in enumerate(plans, start=1):
        loss_fn = alignment_loss if stage == 1 else training_loss
        if stage == 1:
            named = named_parameters_with(model, (model.EMBEDDER,))
        elif stage == 2:
            named = named_parameters_with(model, trainable_prefixes(model))
        else:
            add_lora(model, RECIPES[cfg.recipe].rank)
            named = stage3_parameters(model, "lora")
        if settings.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds, failure = attempt(time_training, model, [name for name, _ in named], loss_fn, settings)
        schedule = [plan.steps, plan.batch]
        row = dict(work=pair[1].name, res=pair[1].res, stage=stage, batch=batch, schedule=schedule)
        if failure:
            yield row | dict(failed=failure, notes=f"FAILED, {failure}")
        else:
            yield row | dict(
                trainable_m=sum(p.numel() for _, p in named) / 1e6,
                images_per_s=batch / seconds,
                peak_gib=peak_gib(device),
                h100_days=gpu_days(plan, batch / seconds) if settings.on_gpu else None)
        model.requires_grad_(False)
        free()


def time_training(model, names: list[str], loss_fn, settings: Settings) -> float:
    """Median seconds of an optimizer step that trains the parameters of these names, in float32."""
    parameters = prepare_for_training(model, names, settings.device, settings.dtype, recompute=False)
    # the first two steps tune and allocate
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-5)
    seconds = []
    for _ in range(3 + settings.repeats // 2):
        start = synchronized_time(settings.device)
        with autocast(settings.device, settings.dtype):
            loss = loss_fn()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(synchronized_time(settings.device) - start)
    if not math.isfinite(loss.item()):
        raise RuntimeError("the loss is not finite, so this timing would not be one of the real work")
    return statistics.median(seconds[2:])


def gpu_days(plan, images_per_s: float) -> float:
    """Days of one GPU for a stage of Table 7."""
    return plan.steps * plan.batch / images_per_s / 86400


@contextmanager
def without_contents():
    """Tensors made inside have shapes only; so have the tables that models cache, which are dropped on
    entry and exit."""
    tables = (sincos_2d, ddpm_times, rotary_table)
    for table in tables:
        table.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for table in tables:
            table.cache_clear()


def training_memory(
        cfg, batch: int, grid: tuple[int, int], rank: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    """GiB that a training pass of stage 3 over this many latents of (H,W) = grid takes on one GPU, from
    the configuration alone: a step runs on tensors without contents. Of weights frozen and trained;
    gradients; optimizer (AdamW's two moments); average; activations (the most alive at one time besides);
    total."""
    with without_contents():
        model = FAMILIES[type(cfg)](cfg)
        add_lora(model, rank)
        names = [name for name, _ in stage3_parameters(model, "lora")]
        sizes = {name: p.nbytes for name, p in prepare_for_training(model, names, "cpu").items()}
        trained = sum(sizes[name] for name in names)
        cond = example_condition(cfg, batch)
        z = torch.empty(batch, cfg.in_channels, *grid)
        with LiveBytes() as memory:
            for _ in range(2):                                       # the second pass finds gradients there
                with autocast("cpu", dtype):
                    loss, _, _ = flow_matching_loss(model, z, torch.empty(batch), cond, torch.empty_like(z))
                loss.mean().backward()
    parts = dict(
        frozen=sum(sizes.values()) - trained, trained=trained, gradients=trained, optimizer=2 * trained,
        average=trained, activations=memory.peak - trained)
    parts["total"] = sum(parts.values())
    return {part: size / 2**30 for part, size in parts.items()}


# ---- tables ------------------------------------------------------------------------------------------

COLUMNS = {
    "rows": "work res switch tokens image_tf floor_s denoise_ms decode_ms to_host_ms image_s p10 p90 "
            "peak_gib tflop_per_s error first_s attention paper_s paper_over_ours notes",
    "throughput": "work res precision batch denoise_per_min with_decode_per_min peak_gib "
                  "paper_per_min",
    "ratios": "work res switch denoise against_our_base against_paper_base paper",
    "parts": "part res batch precision ours_ms diffusers_ms ratio difference rounds notes",
    "quant": "work res numbers weights_gb step_ms floor_step_ms paper_step_ms image_s floor_s paper_s "
             "peak_gib error first_s arithmetic notes",
    "train": "work res stage batch trainable_m images_per_s peak_gib schedule h100_days notes",
    "memory": "work res batch frozen trained gradients optimizer average activations total",
    "floors": "work res tokens passes linear_tf attention_tf step_tf decode_tf image_tf floor_bf16_s "
              "floor_fp8_s memory_gib paper_s paper_per_min",
}
TITLES = {
    "rows": "one image at a time",
    "throughput": "images a minute, from noise to latent, and to bytes with the decoder; the paper does not "
                  "say whether its figures include it",
    "ratios": "times faster than the base",
    "parts": "parts of real width beside diffusers' classes over the same weights, eager, in turns; a ratio "
             "above 1: ours is faster; their DiT embeds time and class in every block",
    "quant": "few bits, one image at a time; floors at the rates of this device's own large products; the "
             "paper's figures are of an RTX 5090 (Table 6), its images with the text encoders",
    "train": "an optimizer step of each stage; the schedule is the paper's Table 7, steps and batch",
    "memory": "stage 3 at full size, counted, GiB: LoRA; large models in bf16, their blocks recomputed",
    "floors": "floors of the full models, counted: linear maps at 800 TFLOP/s in bf16 or 1100 in FP8, all "
              "else at 800; memory of eager bf16",
}


def cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(kind: str, rows: list[dict]):
    """Print rows as the table of their kind; what is missing is a dash."""
    if not rows:
        return
    print(f"\n{TITLES[kind]}")
    keys = COLUMNS[kind].split()
    lines = [keys] + [[cell(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)), flush=True)


def chart(file: Path, rows: list[dict], title: str):
    """Seconds an image of every row and of the paper, logarithmic. (Fig. 8)"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    bars = {}
    for row in rows:
        name = f"{row['work']} {row['res']}"
        if "image_s" in row:
            bars[f"{name}, {row['switch']}"] = row["image_s"]
        if row.get("paper_s"):
            bars[f"{name}, the paper"] = row["paper_s"]
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.22 * len(bars)))
    colors = ["#999999" if name.endswith("the paper") else "#76b900" for name in bars]
    ax.bar_label(ax.barh(list(bars), list(bars.values()), color=colors), fmt="%.3g", fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlabel("seconds an image, logarithmic")
    ax.set_title(title, fontsize=9)
    fig.tight_layout()
    with atomic(file) as temporary:
        fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)


# ---- main --------------------------------------------------------------------------------------------

def environment(device: torch.device) -> dict:
    """What a figure is worth nothing without."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M"), device=name, gpu_figures=on_gpu,
        torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())


def parser() -> Parser:
    p = Parser(__doc__, "[--model NAME] [--res PIXELS|all]")
    count = at_least(int, 1)
    # a base that is on a recipe's deep autoencoder already has no sibling
    bases = []
    for name, cfg in BASES.items():
        if cfg.ae not in (RECIPES[cfg.recipe].ae, RECIPES[cfg.recipe].then):
            bases.append(name)
    add_device_arg(p)
    p.add_argument("--seed", type=within(int, 0, 2**32 - 1), default=0,
                   help="of weights and noise (default 0)")
    p.add_argument("--out", metavar="FILE",
                   help="keep the results in FILE.json, after every row, and a chart in FILE.png; if these "
                        "are of another command or machine, the next free name")

    work = p.add_argument_group("what to time")
    work.add_argument("--model", default="flux-krea", choices=bases, metavar="NAME",
                      help="the base; its DC-Gen sibling comes with it (default flux-krea): "
                           f"{', '.join(bases)}")
    work.add_argument("--res", metavar="PIXELS|all",
                      help="pixels a side, or all of the paper's tables (default: the largest of them)")
    work.add_argument("--switches", nargs="+", default=SWITCHES, choices=SWITCHES, metavar="SWITCH",
                      help="rows to time; each has all before it on (default all)")
    work.add_argument("--num-steps", type=count, metavar="N",
                      help="steps an image (default: the paper's; 4 on a CPU)")
    work.add_argument("--batches", type=count, nargs="*", metavar="N",
                      help="also time throughput at these (default: 1 8 32 64 for SANA and DiT, 1 2 4 for "
                           "FLUX on a GPU)")
    work.add_argument("--only", choices=("dc-gen", "base"), help="time one of the two models")
    work.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True,
                      help="the rows of one image at a time (default yes)")
    work.add_argument("--quant", nargs="*", choices=("fp8", *FORMATS), metavar="FORM",
                      help="time DC-Gen in few bits instead: fp8, nvfp4, int4 (default nvfp4)")
    work.add_argument("--train", action="store_true", help="time post-training steps instead")
    work.add_argument("--train-batch", type=count, metavar="N",
                      help="images a training step (default: 1 for FLUX, 16 otherwise)")
    work.add_argument("--against", choices=("diffusers",),
                      help="the same work through this library too; on a CPU a table of parts by itself")

    how = p.add_argument_group("how to time it")
    how.add_argument("--repeats", type=count, metavar="N",
                     help="timed rounds at most (default 20; 2 of the twins on a CPU)")
    how.add_argument("--warm", type=at_least(float, 0), metavar="S",
                     help="seconds of work before timing (default 10; 0 on a CPU)")
    how.add_argument("--minutes", type=positive, default=9.0, metavar="M",
                     help="of a resolution; rounds are cut, to three at least, to end in time (default 9)")
    how.add_argument("--compile-mode",
                     help="torch.compile's, such as max-autotune-no-cudagraphs (a CPU only traces)")
    return p


def sizes_of(name: str, res: str | None) -> list[int]:
    """The resolutions that --res stands for."""
    sizes = table_sizes(name)
    if res is None:
        return sizes[-1:]
    if res == "all":
        return sizes
    if not res.isdecimal() or int(res) == 0:
        raise ValueError(f"--res {res}: give pixels a side ({', '.join(map(str, sizes))}), or all")
    return [int(res)]


def check_args(args):
    """ValueError for flags that ask for what cannot be timed."""
    if args.device == "cpu" and list(args.switches) == ["graph"]:
        raise ValueError("--switches graph: that needs a GPU")
    if sum(map(bool, (args.against, args.train, args.quant is not None))) > 1:
        raise ValueError("--train, --quant and --against are different things to time; one of them at a time")
    if args.against and args.device != "cpu" and isinstance(BASES[args.model], DiTConfig):
        raise ValueError("--against diffusers: FLUX and SANA are compared; its DiT has an embedder in every "
                         "block and is another work")
    if args.against and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--against diffusers needs: pip install diffusers")
    if args.out:
        check_writable(f"{args.out}.json")


NO_GPU = """\
no GPU: the small twins ({} and its DC-Gen sibling) run in place of {}. These are NOT GPU figures, and
say nothing about speed: blocks are traced without a break but not compiled, the CPU multiplies FP8 out, and
there is no graph. What is shown is that every row runs and that what it makes is sane."""


# what is not given
DEFAULTS = {
    "cuda": dict(num_steps=None, repeats=20, warm=10.0, batches=[1, 8, 32, 64]),
    "cpu": dict(num_steps=4, repeats=2, warm=0.0, batches=[1, 2]),
    "parts": dict(num_steps=None, repeats=20, warm=0.0, batches=[]),
}


def settings_of(args, device: torch.device) -> Settings:
    """How to time, by the flags; those that were not given get the device's values."""
    on_gpu = device.type == "cuda"
    in_parts = args.against and not on_gpu
    if args.batches is None and isinstance(BASES[args.model], FluxConfig):
        args.batches = [1, 2, 4] if on_gpu else []
    for name, value in DEFAULTS["parts" if in_parts else device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    compiler = dict(mode=args.compile_mode) if args.compile_mode else {}
    return Settings(
        device=device,
        dtype=torch.bfloat16 if bf16_is_fast(device) and not in_parts else torch.float32,
        switches=tuple(s for s in switches_on(device) if s in args.switches),
        compiler=compiler if on_gpu else dict(backend="eager"),
        num_steps=args.num_steps,
        repeats=args.repeats,
        warm=args.warm,
        seed=args.seed,
        models={"dc-gen": (1,), "base": (0,), None: (1, 0)}[args.only])


def main(argv=None):
    args = parser().parse_args(argv)
    device = torch.device(device_here(args.device))
    check_args(args)
    pairs = [workloads(args.model, res) for res in sizes_of(args.model, args.res)]
    settings = settings_of(args, device)
    on_gpu = settings.on_gpu
    in_parts = args.against and not on_gpu
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = on_gpu                          # shapes are fixed

    command = " ".join(["bench.py", *(sys.argv[1:] if argv is None else argv)])
    result = dict(command=command, **environment(device), dtype=settings.precision("eager"))
    # the same command on the same machine is the same measurement, made again
    same = {key: value for key, value in result.items() if key != "date"}
    result["settings"] = short_hash(same)
    out = free_path(f"{args.out}.json", result["settings"]) if args.out else None
    result |= {kind: [] for kind in COLUMNS}
    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}, {result['date']}")
    with_twins = args.train or args.quant is not None or args.latency or args.batches
    if with_twins and not on_gpu and not in_parts:
        print(NO_GPU.format(TWINS[type(BASES[args.model])], args.model))

    def keep(kind: str, rows):
        """Write the results after each row, so that a run that is cut short keeps them, then print them."""
        first = len(result[kind])
        for row in rows:
            result[kind].append(row)
            if out:
                write_json(out, result)
        show(kind, result[kind][first:])

    if in_parts:
        keep("parts", part_rows(PARTS, settings))
        pairs = []
    # one resolution after the other
    for base, dc in pairs:
        until = time.perf_counter() + 60 * args.minutes
        pair = (base, dc) if on_gpu else workloads(args.model, base.res, twin=True)
        if args.train:
            recipe = RECIPES[base.cfg.recipe]
            plans = [recipe.stage1, recipe.stage2, recipe.stage3]
            batch = args.train_batch or (1 if isinstance(base.cfg, FluxConfig) else 16)
            keep("train", train_rows(pair, plans, batch, settings))
            memory = training_memory(dc.cfg, batch, dc.grid, recipe.rank)
            keep("memory", [dict(work=dc.name, res=dc.res, batch=batch) | memory])
            continue
        if args.quant is not None:
            keep("quant", quant_rows(pair, args.quant or ["nvfp4"], settings, until))
            continue
        if args.latency:
            keep("rows", latency_rows(pair, settings, bool(args.against), until))
        keep("throughput", throughput_rows(pair, args.batches, settings, until))

    keep("ratios", ratios(result["rows"]))
    if result["ratios"]:
        print(WHY_TWO_RATIOS)
    keep("floors", [theory(work) for pair in pairs for work in pair])
    if out and result["rows"]:
        title = result["device"] if on_gpu else f"small twins on a {result['device']}: not GPU figures"
        chart(out.with_suffix(".png"), result["rows"], title)
    # last, so that a program finds it
    print(json.dumps(result))
    failed = [row for kind in ("rows", "parts", "quant", "train") for row in result[kind] if "failed" in row]
    if failed:
        sys.exit(f"{len(failed)} rows failed")


if __name__ == "__main__":
    run_main(main)
