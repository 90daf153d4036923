"""How fast? Time, memory and arithmetic of the paper's models, beside what the hardware allows and what the paper reports.

    python bench.py --res 4096                    FLUX.1-Krea and DC-Gen-FLUX, 20 steps, batch 1: the paper's headline
    python bench.py --res all                     1K, 2K and 4K: Table 5 and Fig. 8
    python bench.py --model sana-1.6b --batches 1 8 32      Table 2: images a minute at the best batch;  --model dit-xl: Table 1
    python bench.py --model flux-krea --train     time and memory of a post-training step of each stage
    python bench.py --res 1024 --against diffusers          the same work by the diffusers library, interleaved
    python bench.py --tables                      rates of matrix products, attention and decoder stages: what the floors rest on
    python bench.py --res all --no-latency        only the floors

Speed is made in four places, each a switch here with a row of its own, each on top of the ones before:

    eager      plain PyTorch, FlashAttention-2, floats to the host: what the paper's row of the base looks like
    attention  cuDNN's attention first (sample.attention_priority); before compile, which freezes the choice
    compile    block by block (model.compile_layers)
    hoist      modulations of all steps at once, text and position tables once an image (sample.Steps)
    decoder    the autoencoder's layers compiled, channels last (fast.compile_decoder); strips are always on
    uint8      bytes, not floats, to the host (sample.pixels_on_host)
    graph      one step captured and replayed (sample.Steps, graph=True)
    fp8        linear maps of the blocks in FP8 (quant.fp8_linears)

Protocol. Weights are random, of a size at which every block's output stays near 1: the time does not depend on their values
as long as they are neither zeros nor infinities, and both are checked in what comes out. What compiles, tunes or captures
does so in a first call that is reported apart; then --warm seconds of real work, for a GPU at its power limit slows down; then
--repeats rounds in which all rows of a model take turns, with fresh noise each. Stages are timed by events on the device's
stream, and the host's clock around the whole has to agree. Where a step alone takes a second, three steps are timed and one
full image confirms them. The text is encoded once and timed apart. A row that fails (memory, a compiler) leaves the others
alive; --out is written after every row, and --minutes cuts rounds short rather than lose all to a time limit.

Without a GPU the small twins run on the CPU: the same code, not the same figures. The floors of the full models are counted
all the same.
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (BASES, DiTConfig, FAMILIES, FluxConfig, SanaConfig, Text, to_deep_model, to_deep_latent)
from lora import add_lora
from autoencoder import KLConfig, ae_class, ae_config
from checkpoints import (DCAE_DIFFUSERS, KL_DIFFUSERS, TABLES, atomic, diffusers_ae_config, diffusers_config, unmap_keys)
from fast import (compile_decoder, Cost, FusedAttention, compile_layers, attention_priority, fast_bf16, peak_gib, pixels_on_host)
from quant import e4m3_rows, fp8_linears
from sample import (Steps, example_text, guided_velocity, integrate, run, sample_t, time_grid)
from train import pick, settle
from align import LOSSES, embedding_loss, ends, pick_objective
from finetune import trainable, training_memory


# ---- what is timed -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Family:
    """How a model is drawn with and which autoencoder its DC-Gen sibling has, by resolution."""
    num_steps: int
    cfg_scale: float                              # 1: one pass a step; else two, batched
    deep: dict[int, str]
    paper: tuple[int, ...]                        # resolutions of the paper's tables
    twin: str                                     # the small preset of the same class
    shrink: int                                   # what a resolution is divided by for it
    schedule: dict[int, tuple]                    # of the paper's Table 7 by resolution (0: any): steps and batch of stages 1, 2, 3


_f32, _f64 = "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-1.5"


_flux, _sana = {512: _f32, 1024: _f32, 2048: _f64, 4096: _f64}, {512: _f64, 1024: _f64, 2048: _f64, 4096: _f64}


MODELS = {
    "flux-krea": Family(20, 1.0, _flux, (1024, 2048, 4096), "tiny-flux", 8, {0: ((20_000, 64), (5_000, 256), (10_000, 256))}),
    "sana-1.6b": Family(20, 4.5, _sana, (1024,), "tiny-sana", 8, {0: ((20_000, 64), (5_000, 1024), (150_000, 1024))}),
    "sana-4.8b": Family(20, 4.5, _sana, (1024,), "tiny-sana", 8, {0: ((20_000, 64), (5_000, 256), (50_000, 256))}),
    "dit-xl": Family(250, 1.5, {256: _f32, 512: _f32}, (256, 512), "tiny", 2,
                     {256: ((50_000, 64), (20_000, 1024), (500_000, 1024)), 512: ((50_000, 64), (20_000, 1024), (100_000, 1024))}),
}

# The paper's figures on one H100, (base, DC-Gen): seconds an image at batch 1, images a minute at its best batch.
PAPER = {
    ("flux-krea", 512): dict(throughput=(None, 118.96), where="Table 8"),
    ("flux-krea", 1024): dict(latency=(4.65, 1.10), throughput=(16.82, 69.37), where="Table 5"),
    ("flux-krea", 2048): dict(latency=(23.76, 1.41), throughput=(2.51, 66.20), where="Table 5"),
    ("flux-krea", 4096): dict(latency=(213.81, 4.04), throughput=(0.28, 15.81), where="Table 5"),
    ("sana-1.6b", 512): dict(throughput=(None, 1515.31), where="Table 8"),
    ("sana-1.6b", 1024): dict(throughput=(110.70, 435.68), where="Table 2"),
    ("sana-4.8b", 512): dict(throughput=(None, 511.72), where="Table 8"),
    ("sana-4.8b", 1024): dict(throughput=(37.68, 146.23), where="Table 2"),
    ("dit-xl", 256): dict(throughput=(2.44 * 60, 12.00 * 60), where="Table 1, there in images/s"),
    ("dit-xl", 512): dict(throughput=(0.85 * 60, 4.03 * 60), where="Table 1, there in images/s"),
}


WHY_TWO_RATIOS = ("our base runs with the same switches as our DC-Gen; the paper's base looks like eager code, since at 1K it takes longer than the paper's\n"
                  "DC-Gen at 4K, which does the same steps and more decoding. A better base makes the first ratio smaller; the second has the paper's base")


@dataclass(frozen=True)
class Work:
    """One model at one resolution."""
    name: str
    cfg: DiTConfig | FluxConfig | SanaConfig
    res: int
    num_steps: int
    cfg_scale: float
    latency: float | None = None                  # the paper's, seconds
    throughput: float | None = None               # the paper's, images/min
    where: str | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return (self.res // ae_config(self.cfg.ae).f,) * 2

    @property
    def rows(self) -> int:                        # of the condition, for an image
        return 1 if self.cfg_scale == 1.0 else 2

    def condition(self, batch: int, device, dtype=torch.float32):
        """A condition of random numbers; on meta one of shapes only."""
        if isinstance(self.cfg, DiTConfig):
            return torch.arange(batch, device=device) % self.cfg.num_classes
        with torch.device(device):
            text = example_text(self.cfg, batch, self.cfg.text_tokens)
        random = lambda v: v if v.dtype == torch.bool else v + 3.5 if v.ndim == 1 else torch.randn_like(v)       # mask, guidance, tokens and pooled
        return text.map(random).to(dtype=dtype)


def workloads(name: str, res: int, twin: bool = False) -> tuple[Work, Work]:
    """The base and its DC-Gen sibling: the paper's, or their small twins without the paper's figures."""
    family, paper = MODELS[name], PAPER.get((name, res), {})
    if res not in family.deep:
        raise ValueError(f"--res {res}: {name} is timed at {', '.join(map(str, family.deep))}")
    cfg, ae, size = (BASES[family.twin], "tiny-dc-ae-f32c32", res // family.shrink) if twin else (BASES[name], family.deep[res], res)
    figures = lambda i: {} if twin else {k: paper[k][i] for k in ("latency", "throughput") if k in paper} | {"where": paper.get("where")}
    both = (replace(cfg, res=size), replace(to_deep_latent(cfg, ae_config(ae)), res=size))
    return tuple(Work(prefix + (family.twin if twin else name), c, size, family.num_steps, family.cfg_scale, **figures(i))
                 for i, (prefix, c) in enumerate(zip(("", "dc-gen-"), both)))


# ---- floors: counted, not measured ---------------------------------------------------------------------------------------------

# What an H100 really gives (measured by public source_keys, see --tables for yours): bf16 products of any kind, FP8 products of
# linear maps with one scale a row (FBGEMM PR 2546), FLOP/s. A bf16 result above the first is an error of the benchmark.
H100_BF16, H100_FP8 = 800e12, 1100e12


def count(f, *args) -> dict:
    """Floating-point operations of f on the meta device (a multiplication with its addition is two): of linear maps, of
    softmax attention, and of the rest, which are convolutions and linear attention; peak bytes of f's own float32 tensors."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, FusedAttention() as attention, Cost() as memory:
        f(*args)
    linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    return dict(linear=linear, attention=attention.flops, rest=counter.get_total_flops() - linear, bytes=memory.peak)


def text_flops(cfg) -> float:
    """Of the encoders of one prompt: 2 a weight and token, and attention. (T5-XXL and CLIP-L; Gemma-2-2B)"""
    def of(layers, tokens, width, heads, kv, mlp, gates):             # heads, kv: all heads' widths together
        return layers * tokens * (2 * (2 * width * heads + 2 * width * kv + gates * width * mlp) + 4 * tokens * heads)
    if isinstance(cfg, FluxConfig):
        return of(24, cfg.text_tokens, 4096, 4096, 4096, 10240, 3) + of(12, 77, 768, 768, 768, 3072, 2)
    return of(26, cfg.text_tokens, 2304, 2048, 1024, 9216, 3) if isinstance(cfg, SanaConfig) else 0.0


@lru_cache(maxsize=None)                                             # seconds of counting, and asked for twice
def floor(work: Work) -> dict:
    """Arithmetic and memory of one image, from the configurations alone, and the time an H100 could not go below."""
    cfg, ae_cfg = work.cfg, ae_config(work.cfg.ae)
    with torch.device("meta"):
        model, ae = FAMILIES[type(cfg)](cfg).requires_grad_(False), ae_class(ae_cfg)(ae_cfg).requires_grad_(False).eval()
        z, t = torch.empty(work.rows, cfg.in_channels, *work.grid), torch.empty(work.rows)
        step = count(model, z, t, work.condition(work.rows, "meta"))
        strips = count(ae.decode_raw, z[:1])                          # as it runs
        ae.tile, ae.max_elements = 10**9, math.inf
        decode = count(ae.decode_raw, z[:1])                          # the arithmetic of the whole, without strips' or tiles' overlap
    parameters, total = (lambda m: sum(p.numel() for p in m.parameters())), lambda c: c["linear"] + c["attention"] + c["rest"]
    weights, text = parameters(model), text_flops(cfg)
    rest = work.num_steps * (step["attention"] + step["rest"]) + total(decode) + text
    linear = work.num_steps * step["linear"]
    return dict(work=work.name, res=work.res, ae=cfg.ae, tokens=z.shape[-1] * z.shape[-2] // cfg.patch_size**2, num_steps=work.num_steps,
                passes=work.rows, parameters=weights, linear=step["linear"], attention=step["attention"], step=total(step),
                denoise=total(step) * work.num_steps, decode=total(decode), text=text,
                floor_bf16=(linear + rest) / H100_BF16, floor_fp8=linear / H100_FP8 + rest / H100_BF16,
                # bf16: weights of model and decoder, and the larger of what a step and a decode have alive at once (eager)
                memory_gib=(2 * (weights + parameters(ae.decoder)) + max(step["bytes"], strips["bytes"]) / 2) / 2**30,
                paper_s=work.latency, paper_per_min=work.throughput, paper_where=work.where)


def show(rows: list[dict], **columns):
    """Print rows as a table. columns: heading -> (key or function of a row, format[, factor]); what is None or missing is a dash."""
    def cell(row, what, form="", factor=None):
        value = what(row) if callable(what) else row.get(what)
        return "-" if value is None else format(value if factor is None else value * factor, form)
    cells = [[heading.replace("_", " ") for heading in columns]] + [[cell(row, *column) for column in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))


def print_floors(rows: list[dict]):
    print("\nfloors of the full models, counted: linear maps at 800 TFLOP/s in bf16 or 1100 in FP8, all else at 800; text included; GiB in bf16, eager")
    all_of = lambda r: r["denoise"] + r["decode"] + r["text"]
    show(rows, model=("work",), res=("res",), tokens=("tokens", ","), linear_TF=("linear", ".3f", 1e-12), attention_TF=("attention", ".3f", 1e-12),
         step_TF=("step", ".3f", 1e-12), decode_TF=("decode", ".2f", 1e-12), image_TF=(all_of, ",.1f", 1e-12), bf16_floor_s=("floor_bf16", ".3f"),
         FP8_floor_s=("floor_fp8", ".3f"), GiB=("memory_gib", ".1f"), paper_s=("paper_s", ".2f"),
         **{"paper_img/min": ("paper_per_min", ".2f")}, where=("paper_where",))


# ---- models with random weights ------------------------------------------------------------------------------------------------

@torch.no_grad()
def init_random_(module: nn.Module, device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A module built on meta, with random weights: matrices of variance 1 / fan-in, norms 1, biases 0.1. No gate is zero."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    g = torch.Generator(device).manual_seed(seed)
    for k, v in module.state_dict().items():
        if v.ndim > 1:
            v.normal_(generator=g).mul_((v[0].numel()) ** -0.5)
        elif v.is_floating_point() and k.endswith(("weight", "scale", "running_var")):
            v.fill_(1.0)
        elif v.is_floating_point() and k.endswith("bias"):
            v.normal_(generator=g).mul_(0.1)
        else:
            v.zero_()
    return module


def shared(module: nn.Module) -> nn.Module:
    """A copy of the modules over the very same tensors: to be compiled or quantised without touching the original."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def build_pair(pair: tuple[Work, Work], device, dtype, seed: int = 0) -> list[tuple[nn.Module, nn.Module]]:
    """(model, autoencoder) of the base and of DC-Gen; their transformers share a trunk."""
    base_cfg, out = pair[0].cfg, []
    with torch.device("meta"):
        base = FAMILIES[type(base_cfg)](base_cfg)
    base = init_random_(base, device, dtype, seed)
    for work, model in zip(pair, (base, to_deep_model(base, pair[1].cfg).to(dtype))):
        with torch.device("meta"):
            ae_cfg = ae_config(work.cfg.ae)
            ae = ae_class(ae_cfg)(ae_cfg)
        if not isinstance(work.cfg, DiTConfig):                       # what guidance extrapolates from
            model.null = work.condition(1, device, dtype)
        out.append((model.eval(), init_random_(ae, device, dtype, seed + 1).to(memory_format=torch.channels_last)))
    return out


# ---- the ways to draw ------------------------------------------------------------------------------------------------------------

SWITCHES = ("eager", "attention", "compile", "hoist", "decoder", "uint8", "graph", "fp8")


def up_to(switch: str) -> tuple[str, ...]:
    return SWITCHES[: SWITCHES.index(switch) + 1]


def flash_attention():
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


class Drawer:
    """One way to draw: noise -> latent -> picture -> bytes on the host, each by itself so that it can be timed."""

    def __init__(self, work: Work, model, ae, switches: tuple[str, ...], batch: int = 1, compiler: dict | None = None, num_steps: int | None = None,
                 quantised: dict | None = None):
        self.work, self.switches, self.batch = work, switches, batch
        self.model, self.ae, weight = shared(model), shared(ae), model.embed_linear.weight
        self.dtype, self.device, self.steps = weight.dtype, weight.device, None
        # a network that predicts noise has its output divided by t: from t = 0 on, random weights would blow up. All times cost the same
        self.times = time_grid(num_steps or work.num_steps, start=0.5 if getattr(work.cfg, "predict", "velocity") == "epsilon" else 0.0)
        self.cond = work.condition(batch, self.device, self.dtype)
        if "fp8" in switches:
            fp8_linears(self.model, made=quantised)
        if "compile" in switches:
            compile_layers(self.model.blocks, **(compiler or {}))
        if "decoder" in switches:
            compile_decoder(self.ae, **(compiler or {}))

    def noise(self, generator) -> Tensor:
        return torch.randn(self.batch, self.work.cfg.in_channels, *self.work.grid, generator=generator, device=self.device)

    @torch.no_grad()
    def denoise(self, x0: Tensor, steps: int | None = None) -> Tensor:
        with attention_priority() if "attention" in self.switches else flash_attention():
            if "hoist" in self.switches:
                if self.steps is None:
                    self.steps = Steps(self.model, self.cond, x0.shape, self.times, self.work.cfg_scale, graph="graph" in self.switches)
                else:
                    self.steps.read(self.cond)                        # once an image: it is a part of the image's time
                return self.steps(x0, steps)
            call = lambda x, t, y: self.model(x.to(self.dtype), t, y)
            times = self.times if steps is None else self.times[: steps + 1]
            return integrate(lambda x, t: guided_velocity(self.model, x, t, self.cond, self.work.cfg_scale, call=call), x0, times)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.ae.decode(part.to(self.dtype, memory_format=torch.channels_last)) for part in z.split(1)])

    def to_host(self, x: Tensor) -> Tensor:
        return pixels_on_host(x if "uint8" in self.switches else x.float().cpu())


class DiffusersDrawer(Drawer):
    """The same work by the diffusers library's own classes over the same weights; compiler: its blocks and decoder compiled."""

    def __init__(self, work: Work, model, ae, batch: int = 1, compiler: dict | None = None, num_steps: int | None = None):
        import diffusers
        super().__init__(work, model, ae, ("attention",), batch, None, num_steps)

        def theirs(config: dict, state: dict, table):
            kind, config = getattr(diffusers, config["_class_name"]), {k: v for k, v in config.items() if k != "_class_name"}
            with torch.device("meta"):
                module = kind(**config)
            module.load_state_dict(unmap_keys(state, table), assign=True)
            return module.requires_grad_(False).eval()

        ae_cfg = ae.cfg
        self.net = theirs(diffusers_config(work.cfg), model.state_dict(), TABLES[type(model)]["diffusers"])
        self.vae = theirs(diffusers_ae_config(ae_cfg), ae.state_dict(), KL_DIFFUSERS if isinstance(ae_cfg, KLConfig) else DCAE_DIFFUSERS)
        if work.res > 2048:
            self.vae.enable_tiling()
        if compiler is not None:
            for part in (*self.net.transformer_blocks, *getattr(self.net, "single_transformer_blocks", ()), self.vae.decoder):
                part.compile(dynamic=False, **compiler)
        self.model.forward_native = self.forward_native                             # clocks, signs and guidance stay ours

    def forward_native(self, x: Tensor, clock: Tensor, cond: Text) -> Tensor:
        if isinstance(self.work.cfg, SanaConfig):
            return self.net(x, cond.tokens, clock, encoder_attention_mask=cond.mask.to(x.dtype), return_dict=False)[0]
        H, W = (n // self.work.cfg.patch_size for n in x.shape[-2:])
        rows, cols = torch.meshgrid(torch.arange(H, device=x.device), torch.arange(W, device=x.device), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).view(-1, 3)
        out = self.net(self.model.patchify(x), cond.tokens, cond.pooled, clock.to(x.dtype), ids, torch.zeros(cond.tokens.shape[1], 3, device=x.device),
                       cond.guidance, return_dict=False)[0]
        return self.model.unpatchify(out, x.shape[-2:])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.dtype) / self.ae.cfg.scale + self.ae.cfg.shift, return_dict=False)[0]


# ---- the clock -----------------------------------------------------------------------------------------------------------------

def now(device) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stages:
    """Times between marks: events on the device's stream, so that nothing waits for the host; on a CPU its clock."""

    def __init__(self, device):
        self.cuda, self.marks = torch.device(device).type == "cuda", []
        self.start = now(device)
        self.mark("")

    def mark(self, name: str):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self, device) -> dict[str, float]:
        """Seconds of every stage, "sum" of them, and "wall" by the host's clock."""
        wall = now(device) - self.start
        apart = (lambda a, b: a.elapsed_time(b) / 1e3) if self.cuda else lambda a, b: b - a
        out = {name: apart(a, b) for (_, a), (name, b) in zip(self.marks, self.marks[1:])}
        return out | {"sum": sum(out.values()), "wall": wall}


def sane(what: str, x: Tensor):
    """Infinities, zeros and constants run faster than pictures do: RuntimeError rather than a flattering figure."""
    rms = float(x.float().square().mean().sqrt())
    if not (math.isfinite(rms) and 0.1 <= rms <= 10):
        raise RuntimeError(f"{what} has a root mean square of {rms:.3g}; 0.1 .. 10 was expected, so this timing would not be one of the real work")


def draw(drawer: Drawer, generator) -> dict[str, float]:
    """One image (or batch) -> seconds of denoise, decode, uint8, their sum, and the host's wall clock."""
    x0 = drawer.noise(generator)
    stages = Stages(drawer.device)
    z = drawer.denoise(x0)
    stages.mark("denoise")
    x = drawer.decode(z)
    stages.mark("decode")
    drawer.to_host(x)
    stages.mark("uint8")
    took = stages.read(drawer.device)
    sane(f"{drawer.work.name}'s latent", z), sane(f"{drawer.work.name}'s picture", x)
    return took


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    q = sorted(values)
    at = lambda p: q[min(len(q) - 1, round(p * (len(q) - 1)))]
    return dict(median=statistics.median(q), p10=at(0.1), p90=at(0.9))


def bytes_of(*modules: nn.Module) -> int:
    """Of all their tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in modules for t in (*m.parameters(), *m.buffers())}.values())


def attempt(f, *args):
    """f(*args), or in a few words why it failed: one row too many for the memory, or for a compiler, is no reason to lose the others."""
    try:
        return f(*args)
    except RuntimeError as error:                                     # out of memory; a kernel's or a compiler's refusal; insane data
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def free():
    """Give back what no row needs any more: compiled modules lie in reference cycles, and a graph keeps its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Peak:
    """Most GiB that one way to draw has alive while a block runs: its weights, and all that comes on top; None on a CPU."""

    def __init__(self, drawer: Drawer):
        self.drawer, self.cuda, self.gib = drawer, drawer.device.type == "cuda", None

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.drawer.device)
            self.held = torch.cuda.memory_allocated(self.drawer.device)
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.gib = (torch.cuda.max_memory_allocated(self.drawer.device) - self.held + bytes_of(self.drawer.model, self.drawer.ae)) / 2**30


def measure(drawers: dict[str, Drawer], repeats: int, warm: float, seed: int = 0, until: float = math.inf) -> dict[str, dict]:
    """Time every way to draw, taking turns. -> name -> seconds of each stage (median, p10, p90), of the first call, peak GiB;
    or "failed". until: no round after this time (of time.perf_counter), except for the first three."""
    out, took, alive = {}, {name: [] for name in drawers}, dict(drawers)
    device = next(iter(drawers.values())).device
    g = torch.Generator(device).manual_seed(seed)

    def once(name: str) -> dict:
        result = attempt(draw, alive[name], g)
        if isinstance(result, str):
            out[name] = dict(failed=result)
            del alive[name], drawers[name]                            # drawers too: what it holds is to be freed
            free()
            return {}
        return result

    for name in list(alive):                                          # compiles, tunes, captures
        with Peak(alive[name]) as peak:
            first = once(name)
        if first:
            out[name] = dict(first_s=first["wall"], peak_gib=peak.gib)
    end = time.perf_counter() + warm
    while alive and warm:
        for name in list(alive):
            once(name)
        if time.perf_counter() >= end:
            break
    for k in range(repeats):
        begun = time.perf_counter()
        for name in list(alive):
            took[name].append(once(name))
        if k >= 2 and 2 * time.perf_counter() - begun > until:
            break
    for name in alive:
        rows, row = took[name], out[name]
        row |= {stage: spread([r[stage] for r in rows]) for stage in ("denoise", "decode", "uint8", "sum", "wall")}
        row |= dict(repeats=len(rows), compile_s=max(0.0, row["first_s"] - row["wall"]["median"]), estimated=False)
        if device.type == "cuda" and abs(row["sum"]["median"] / row["wall"]["median"] - 1) > 0.01:
            row["note"] = "events and the host's clock differ by more than 1 %"
    return out


def measure_long(drawer: Drawer, confirm: bool, seed: int = 0, until: float = math.inf) -> dict:
    """For steps of seconds: one warm step, three timed ones, which have to agree within 2 %, and their median times the number
    of steps: every step does the same work. confirm: one full run beside the estimate, if it ends before `until`."""
    g, device, n = torch.Generator(drawer.device).manual_seed(seed), drawer.device, len(drawer.times) - 1

    def denoise(count: int | None = None) -> tuple[Tensor, float]:
        x0, begun = drawer.noise(g), now(device)
        z = drawer.denoise(x0, count)
        return z, now(device) - begun

    with Peak(drawer) as peak:
        first = denoise(1)[1]
        steps = [denoise(1)[1] for _ in range(3)]
        z = denoise(1)[0]
        drawer.decode(z)                                              # warms up
        stages = Stages(device)
        x = drawer.decode(z)
        stages.mark("decode")
        drawer.to_host(x)
        stages.mark("uint8")
        rest = stages.read(device)
    sane(f"{drawer.work.name}'s latent", z), sane(f"{drawer.work.name}'s picture", x)
    step, one = statistics.median(steps), lambda v: dict(median=v, p10=v, p90=v)
    total = n * step + rest["decode"] + rest["uint8"]
    row = dict(denoise={k: n * v for k, v in spread(steps).items()}, decode=one(rest["decode"]), uint8=one(rest["uint8"]), sum=one(total), wall=one(total),
               first_s=first, compile_s=max(0.0, first - step), peak_gib=peak.gib, repeats=3, estimated=True)
    if max(steps) / min(steps) > 1.02:
        row["note"] = f"three steps differ by {max(steps) / min(steps) - 1:.1%}, more than 2 %"
    if confirm and time.perf_counter() + 1.1 * n * step < until:
        row["full_run_s"] = denoise()[1]
    return row


# ---- text, profile, clocks -------------------------------------------------------------------------------------------------------

def text_seconds(cfg, device, dtype, small: bool) -> tuple[float | None, str]:
    """Median of the encoding of one prompt by random encoders of the real (or a small) size, and what was timed."""
    if isinstance(cfg, DiTConfig):
        return 0.0, "class labels"
    try:
        import transformers as tf
    except ImportError:
        return None, "not timed: needs transformers"
    width = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4) if small else {}
    if isinstance(cfg, FluxConfig):                                   # T5-XXL and CLIP-L
        t5 = tf.T5Config(**(dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4) if small else
                            dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)), feed_forward_proj="gated-gelu")
        clip = tf.CLIPTextConfig(**width or dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        parts = [(tf.T5EncoderModel, t5, cfg.text_tokens), (tf.CLIPTextModel, clip, 77)]
    else:                                                             # Gemma-2-2B, by its class's defaults
        parts = [(tf.Gemma2Model, tf.Gemma2Config(**width, **(dict(num_key_value_heads=2, head_dim=16, vocab_size=256) if small else {})), cfg.text_tokens)]
    encoders = [(_on(cls, config, device, dtype), torch.randint(1, 200, (1, n), device=device)) for cls, config, n in parts]
    took = []
    with torch.no_grad():
        for _ in range(5):
            begun = now(device)
            for encoder, ids in encoders:
                encoder(ids)
            took.append(now(device) - begun)
    return statistics.median(took[2:]), " + ".join(cls.__name__ for cls, *_ in parts) + (", small" if small else "") + ", random weights, eager"


def _on(cls, config, device, dtype):
    """An encoder initialised on the device: 5 billion numbers take minutes on a CPU."""
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return cls(config).eval()
        finally:
            torch.set_default_dtype(before)


# softmax attention by the names of its kernels, or on a CPU its operators; cuDNN's have "flash" in them as well, so it comes first
ATTENTION_KERNELS = {"cuDNN": "cudnn.*(sdpa|attention|fmha|flash)", "memory-efficient": "fmha_cutlass|efficient_attention", "flash": "flash"}


def attention_of(names) -> str:
    kinds = {next((kind for kind, sign in ATTENTION_KERNELS.items() if re.search(sign, name.lower())), "") for name in names}
    return " + ".join(sorted(kinds - {""}))


def profile(drawer: Drawer, seed: int = 0) -> dict:
    """One step and one decode under the profiler -> the five largest items with their share of all time, and which softmax
    attention ran, by its name: forcing a backend is not the same as getting it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                   # else the profiler writes to the terminal when it starts and stops
    cuda = drawer.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU       # one of them: with both, a kernel counts twice
    x0 = drawer.noise(torch.Generator(drawer.device).manual_seed(seed))
    drawer.denoise(x0, 1), drawer.decode(x0)
    out = {}
    for what, work in (("step", lambda: drawer.denoise(x0, 1)), ("decode", lambda: drawer.decode(x0))):
        with torch.profiler.profile(activities=[activity]) as p:
            work()
            now(drawer.device)
        spent = [(e.key, e.self_device_time_total if cuda else e.self_cpu_time_total) for e in p.key_averages()]
        total = sum(t for _, t in spent) or 1
        out[what] = [(name[:80], round(t / total, 4)) for name, t in sorted(spent, key=lambda e: -e[1])[:5]]
        if what == "step":
            out["attention"] = attention_of(name for name, _ in spent) or "math, or none"
    return out


class Clocks:
    """Reads, never sets, the GPU's clock (MHz) and power (W) once a second while a block runs."""

    def __init__(self, device):
        self.on, self.rows, self.stop = torch.device(device).type == "cuda", [], threading.Event()

    def _poll(self):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        while not self.stop.wait(1.0):
            try:
                self.rows.append(tuple(map(float, subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.splitlines()[0].split(","))))
            except (OSError, ValueError, IndexError, subprocess.SubprocessError):
                return

    def __enter__(self):
        if self.on:
            threading.Thread(target=self._poll, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()

    def read(self) -> dict:
        clocks, watts = zip(*self.rows) if self.rows else ((), ())
        return dict(sm_mhz=spread(list(clocks)), watts=spread(list(watts))) if clocks else {}


def facts(device) -> dict:
    """What a figure is worth nothing without."""
    out = dict(date=time.strftime("%Y-%m-%d %H:%M"), torch=torch.__version__, python=platform.python_version())
    if torch.device(device).type != "cuda":
        return out | dict(device=f"CPU, {torch.get_num_threads()} threads", gpu_figures=False)
    try:
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = None
    return out | dict(device=torch.cuda.get_device_name(device), gpu_figures=True, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver)


# ---- tables ------------------------------------------------------------------------------------------------------------------------

def precision_of(fp8: bool, dtype: torch.dtype) -> str:
    return "fp8" if fp8 else str(dtype).removeprefix("torch.")


def bench_pair(pair: tuple[Work, Work], args, device, dtype, compiler: dict, text: tuple[float | None, str], until: float):
    """All rows of one base and its DC-Gen sibling at one resolution: every switch for DC-Gen, of the base the first, the last
    in its own precision, and FP8; then, if asked for, diffusers. Yields rows as they are finished, DC-Gen's first."""
    models, quantised = build_pair(pair, device, dtype, args.seed), {}
    cuda = torch.device(device).type == "cuda"
    left_out = {} if cuda else {"graph": "needs a GPU"}
    chosen = [s for s in args.switches if s not in left_out]
    exact = [s for s in chosen if s != "fp8"] or chosen
    best = exact[-1] if exact else None                               # as fast as it gets in its own precision
    for i in (1, 0):
        work, (model, ae), counted = pair[i], models[i], floor(pair[i])
        n = args.num_steps or work.num_steps
        arithmetic = counted["step"] * n + counted["decode"]
        ways = {s: (lambda on=up_to(s): Drawer(work, model, ae, tuple(k for k in on if k not in left_out), compiler=compiler, num_steps=n, quantised=quantised))
                for s in (chosen if i else dict.fromkeys([*exact[:1], *exact[-1:], *chosen[-1:]]))}
        if args.against:
            ways["diffusers"] = lambda: DiffusersDrawer(work, model, ae, num_steps=n)
            ways["diffusers, compiled"] = lambda: DiffusersDrawer(work, model, ae, compiler=compiler, num_steps=n)
        long = cuda and counted["step"] / H100_BF16 > 1.0
        for group in [[s] for s in ways] if long else [list(ways)]:
            made = {s: attempt(ways[s]) for s in group}
            drawers = {s: d for s, d in made.items() if not isinstance(d, str)}
            found = {s: dict(failed=d) for s, d in made.items() if isinstance(d, str)}
            del made
            with Clocks(device) as clocks:
                if long:
                    for s in drawers:
                        row = attempt(measure_long, drawers[s], s == best, args.seed, until)
                        found[s] = dict(failed=row) if isinstance(row, str) else row
                elif drawers:
                    started = time.perf_counter()
                    found |= measure(drawers, args.repeats, args.warm, args.seed, started + (until - started) / 3)
            if args.profile and "sum" in found.get(best, {}) and time.perf_counter() < until:
                found[best]["profile"] = profile(drawers[best])
            for s in group:
                row = dict(work=work.name, res=work.res, switch=s, precision=precision_of(s == "fp8", dtype)) | found[s]
                if "sum" in row:
                    rate = arithmetic / row["sum"]["median"] / 1e12
                    row |= dict(tokens=counted["tokens"], num_steps=n, tflops=arithmetic / 1e12, text_s=text[0], text=text[1], tflop_per_s=rate, paper_s=work.latency, paper_where=work.where, clocks=clocks.read(),
                                floor_s=counted["floor_fp8" if s == "fp8" else "floor_bf16"] if cuda else None)
                    if cuda and s != "fp8" and rate * 1e12 > H100_BF16 and "H100" in torch.cuda.get_device_name(device):
                        row["note"] = "more TFLOP/s than an H100 has: THE BENCHMARK IS WRONG"
                yield row
            drawers.clear(), free()
        if i:
            yield from (dict(work=work.name, res=work.res, switch=s, skipped=why) for s, why in left_out.items() if s in args.switches)


def ratios(rows: list[dict]) -> list[dict]:
    """How much faster DC-Gen is: against our base with the same switches, and against the paper's base."""
    out, end = [], lambda r: r["sum"]["median"]
    timed = [r for r in rows if "sum" in r]
    for r in (r for r in timed if r["work"].startswith("dc-gen-")):
        base = next((b for b in timed if b["work"] == r["work"].removeprefix("dc-gen-") and b["res"] == r["res"] and b["switch"] == r["switch"]), None)
        if base is None:
            continue
        paper = PAPER.get((base["work"], r["res"]), {}).get("latency")
        out.append(dict(work=r["work"], res=r["res"], switch=r["switch"], denoise=base["denoise"]["median"] / r["denoise"]["median"],
                        against_our_base=end(base) / end(r), against_paper_base=paper[0] / end(r) if paper else None,
                        paper=paper[0] / paper[1] if paper else None, why=WHY_TWO_RATIOS))
    return out


def self_checks(rows: list[dict]) -> list[str]:
    """The same transformer over the same tokens takes the same time, whatever the picture: within 2 %."""
    best, said = {}, []
    for r in (r for r in rows if "sum" in r and not r.get("estimated")):
        best[r["tokens"], r["switch"]] = best.get((r["tokens"], r["switch"]), []) + [r]
    for (tokens, switch), same in best.items():
        for a, b in zip(same, same[1:]):
            x = a["denoise"]["median"] / b["denoise"]["median"]
            if (a["work"], a["res"]) != (b["work"], b["res"]):
                said.append(f"{a['work']} {a['res']} / {b['work']} {b['res']}, both {tokens} tokens, {switch}: denoising {x:.3f} "
                            + ("(agrees)" if abs(x - 1) <= 0.02 else "(DIFFERS by more than 2 %)"))
    return said


def print_rows(rows: list[dict]):
    median = lambda stage: (lambda r: r[stage]["median"])
    full = lambda r: f"a full run: {r['full_run_s']:.1f} s" if "full_run_s" in r else None
    notes = lambda r: "; ".join(filter(None, ["estimated from 3 steps" if r["estimated"] else None, to_float32(r), r.get("note")])) or None
    show([r for r in rows if "sum" in r], model=("work",), res=("res",), switch=(lambda r: "+ " * (r["switch"] in SWITCHES[1:]) + r["switch"],),
         tokens=("tokens", ","), TFLOPs=("tflops", ",.4g"), floor_s=("floor_s", ".3f"), text_ms=("text_s", ".1f", 1e3),
         denoise_s=(median("denoise"), ".3f"), decode_s=(median("decode"), ".3f"), uint8_ms=(median("uint8"), ".1f", 1e3), end_to_end_s=(median("sum"), ".3f"), **{"p10-p90": (lambda r: f"{r['sum']['p10']:.3f}-{r['sum']['p90']:.3f}",)},
         GiB=("peak_gib", ".1f"), **{"TFLOP/s": ("tflop_per_s", ".4g")}, compile_s=("compile_s", ".1f"), paper_s=("paper_s", ".2f"),
         **{"paper/ours": (lambda r: r["paper_s"] and r["paper_s"] / r["sum"]["median"], ".2f")}, notes=(notes,))
    for r in (r for r in rows if "sum" not in r):
        print(f"{r['work']} {r['res']}, {r['switch']}: " + (r.get("skipped") or f"FAILED, {r['failed']}"))
    for r in (r for r in rows if "profile" in r):
        for what in ("step", "decode"):
            print(f"  {r['work']} {r['switch']}, {what}: " + ", ".join(f"{share:.0%} {name}" for name, share in r["profile"][what]))
        print(f"  {r['work']} {r['switch']}, softmax attention: {r['profile']['attention']}")


def throughput(pair: tuple[Work, Work], args, device, dtype, compiler: dict, until: float):
    """Images a minute by batch, denoising alone and with the decoder, up to the last batch that fits; DC-Gen first, rows as
    they are finished. The steps of many-step models all do the same work: 20 are timed and scaled."""
    models, quantised = build_pair(pair, device, dtype, args.seed), {}
    usable = [s for s in SWITCHES if s != "graph" or torch.device(device).type == "cuda"]
    chosen = [s for s in args.switches if s in usable]
    kinds = dict.fromkeys([*[s for s in chosen if s != "fp8"][-1:], *chosen[-1:]])
    n = args.num_steps or pair[0].num_steps

    def time_batch(work: Work, model, ae, switch: str, batch: int) -> list[dict]:
        g = torch.Generator(device).manual_seed(args.seed)
        d = Drawer(work, model, ae, tuple(s for s in up_to(switch) if s in usable), batch, compiler, min(n, 20), quantised)
        draw(d, g)                                                    # compiles, tunes, captures
        return [draw(d, g) for _ in range(max(1, args.repeats // 3))]

    for work, (model, ae), switch in ((pair[i], models[i], switch) for i in (1, 0) for switch in kinds):
        for batch in args.batches:
            if time.perf_counter() + 2 * batch * floor(work)["floor_bf16"] * min(n, 20) / n * (1 + max(1, args.repeats // 3)) > until:
                print(f"{work.name} {work.res}: no time left for a batch of {batch} (--minutes)")
                break
            took = attempt(time_batch, work, model, ae, switch, batch)
            free()
            if isinstance(took, str):
                print(f"{work.name} {work.res}, {switch}: a batch of {batch} does not run: {took}")
                break
            denoise, rest = statistics.median(t["denoise"] for t in took) * n / min(n, 20), statistics.median(t["decode"] + t["uint8"] for t in took)
            yield dict(work=work.name, res=work.res, switch=switch, precision=precision_of(switch == "fp8", dtype), batch=batch, denoise_per_min=60 * batch / denoise,
                       with_decode_per_min=60 * batch / (denoise + rest), forwards_per_s=n * work.rows * batch / denoise,
                       paper_per_min=work.throughput, paper_where=work.where)


def print_throughput(rows: list[dict], pair: tuple[Work, Work], num_steps: int):
    print(f"\nthroughput, images a minute: {num_steps} steps, {pair[0].rows} forward(s) a step and image, from noise to latent, and to bytes with the decoder;\n"
          "* = best batch. The paper does not say whether its figures include the decoder")
    key = lambda r: (r["work"], r["res"], r["precision"])
    best = {key(r): max(x["with_decode_per_min"] for x in rows if key(x) == key(r)) for r in rows}
    show(rows, model=("work",), res=("res",), precision=("precision",), batch=("batch",), denoise=("denoise_per_min", ",.1f"),
         with_decode=(lambda r: f"{r['with_decode_per_min']:,.1f}" + "* "[r["with_decode_per_min"] != best[key(r)]],), **{"forwards/s": ("forwards_per_s", ",.1f")},
         paper=("paper_per_min", ",.2f"), where=("paper_where",))


def days(plan: tuple[int, int], images_per_s: float) -> float:
    """Of one GPU, for a schedule of (steps, batch)."""
    steps, batch = plan
    return steps * batch / images_per_s / 86400


def train_rows(schedule: tuple | None, pair: tuple[Work, Work], args, device, dtype):
    """One optimiser step of each stage: images/s, memory, and the H100-days that the paper's schedule (Table 7) would take at
    this rate; rows as they are finished. Stage 3 has LoRA of rank 256. The loss is the model's own: of a distilled one the
    guided loss (Eq. 7), which has a second forward pass."""
    (base, _), (model, _) = build_pair(pair, device, dtype, args.seed)
    cuda, work = torch.device(device).type == "cuda", pair[1]
    batch = args.train_batch or (2 if not cuda else 1 if isinstance(work.cfg, FluxConfig) else 16)
    latent = lambda w: torch.randn(batch, w.cfg.in_channels, *w.grid, device=device)
    cond, loss_of = work.condition(batch, device), LOSSES[pick_objective(work.cfg, None)]
    settle(model, [], device, dtype)                                   # as finetune.py does: big models run blocks again in the backward pass

    def flow():
        z = latent(work)
        return loss_of(model, z, sample_t(batch).to(device), cond, torch.randn_like(z))[0].mean()

    stages = {"1 embedder": (lambda: pick(model, (model.EMBEDDER,)), lambda: embedding_loss(model, base, latent(work), latent(pair[0]))),
              "2 embedder and head": (lambda: pick(model, ends(model)), flow),
              "3 LoRA": (lambda: (add_lora(model, 256 if cuda else 8), trainable(model, "lora"))[1], flow)}

    def time_stage(what, loss) -> tuple[int, list[float]]:
        names = [k for k, _ in what()]
        now_named = settle(model, names, device, dtype, recompute=False)                # what learns is float32
        params = [now_named[k] for k in names]
        opt, took = torch.optim.AdamW(params, lr=1e-5), []
        for _ in range(3 + args.repeats // 2):
            begun = now(device)
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                value = loss()
            value.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            took.append(now(device) - begun)
        if not math.isfinite(float(value.detach())):
            raise RuntimeError("the loss is not finite, so this timing would not be one of the real work")
        return sum(p.numel() for p in params), took[2:]

    for (stage, what), plan in zip(stages.items(), schedule or (None,) * 3):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        found = attempt(time_stage, *what)
        row = dict(work=work.name, res=work.res, stage=stage, batch=batch, schedule=plan)
        if isinstance(found, str):
            yield row | dict(failed=found)
        else:
            rate = batch / statistics.median(found[1])
            yield row | dict(trainable=found[0], images_per_s=rate, peak_gib=peak_gib(device), h100_days=days(plan, rate) if plan and cuda else None)
        model.requires_grad_(False), free()


def memory_rows(name: str, sizes, batch: int | None):
    """What stage 3 takes of a GPU's memory at full size, counted on tensors without contents (finetune.training_memory)."""
    for work in (workloads(name, res)[1] for res in sizes):
        pictures = batch or (1 if isinstance(work.cfg, FluxConfig) else 16)
        yield dict(work=work.name, res=work.res, batch=pictures, **training_memory(work.cfg, pictures, work.grid))


def print_memory(rows: list[dict]):
    print("\nstage 3 at full size, counted, GiB: LoRA 256, blocks in bf16 and run again in the backward pass if the model is large")
    gib = lambda key: (key, ".1f", 2.0**-30)
    show(rows, model=("work",), res=("res",), batch=("batch",), **{key: gib(key) for key in ("frozen", "trained", "gradients", "optimizer", "average", "activations", "total")})


def print_train(rows: list[dict], name: str):
    print("\npost-training, one optimiser step of each stage; the schedule is the paper's Table 7, steps x batch")
    show(rows, model=("work",), res=("res",), stage=("stage",), batch=("batch",), trainable_M=("trainable", ",.2f", 1e-6), **{"images/s": ("images_per_s", ".2f")},
         GiB=("peak_gib", ".1f"), schedule=(lambda r: r["schedule"] and "{:,} x {:,}".format(*r["schedule"]),), **{"H100-days": ("h100_days", ".1f")},
         notes=(lambda r: r.get("failed") and f"FAILED, {r['failed']}",))
    if all(r.get("h100_days") for r in rows):
        print(f"together {sum(r['h100_days'] for r in rows):.1f} H100-days" + ("; the paper names 40 for FLUX" if name.startswith("flux") else ""))


# ---- what the floors rest on ---------------------------------------------------------------------------------------------------------

def seconds_of(f, device, repeats: int = 20) -> float:
    """Seconds of one call: the median of five runs of `repeats` calls that the host does not wait for, after one that warms up."""
    took = []
    for _ in range(6):
        begun = now(device)
        for _ in range(repeats):
            f()
        took.append((now(device) - begun) / repeats)
    return statistics.median(took[1:])


@torch.no_grad()
def rate_tables(device, dtype):
    """TFLOP/s of matrix products (bf16, FP8 with one scale a row or a tensor, with and without fast accumulation), of softmax
    attention, and milliseconds of the f64c128 decoder's stages, contiguous against channels last. Rows as they are finished."""
    cuda = torch.device(device).type == "cuda"
    rand = lambda *shape: torch.randn(shape, device=device, dtype=dtype)

    def row(table: str, what: str, way: str, f, flops: float | None = None, repeats: int = 20 if cuda else 2) -> dict:
        took = attempt(seconds_of, f, device, repeats)
        figure = dict(failed=took) if isinstance(took, str) else dict(ms=1e3 * took, tflop_per_s=flops and flops / took / 1e12)
        return dict(table=table, what=what, way=way) | figure

    sizes = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)] if cuda else [(576, 192)]
    for n, k in sizes:
        w = rand(n, k) * k**-0.5
        (qw, sw), one = e4m3_rows(w), torch.ones((), device=device)
        for m in (512, 1024, 1536, 4096, 4608) if cuda else (64,):
            x = rand(m, k)
            qx, sx = e4m3_rows(x)
            ways = {precision_of(False, dtype): lambda: x @ w.t()}
            for scales, (a, b) in {"rows": (sx, sw.t().contiguous()), "tensor": (one, one)}.items():
                for fast in (True, False):
                    kw = dict(scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)
                    ways[f"fp8 {scales}, fast accumulation {fast}"] = lambda kw=kw: torch._scaled_mm(qx, qw.t(), **kw)
            for way, f in ways.items():
                yield row("products", f"{m} x {k} x {n}", way, f, 2 * m * n * k)
    backends = ({"cuDNN": SDPBackend.CUDNN_ATTENTION} if cuda else {}) | {"flash": SDPBackend.FLASH_ATTENTION}
    for n in (768, 1536, 4608, 16896, 66048) if cuda else (96,):
        q = rand(1, 24 if cuda else 6, n, 128 if cuda else 32)
        for way, backend in backends.items():
            with sdpa_kernel(backend):
                yield row("attention", f"{n} tokens, {q.shape[1]} heads of {q.shape[3]}", way, lambda: F.scaled_dot_product_attention(q, q, q), 4 * n * q.numel(), 3)
    cfg = ae_config("dc-ae-f64c128-1.5" if cuda else "tiny-dc-ae-f32c32")
    with torch.device("meta"):
        ae = ae_class(cfg)(cfg)
    ae = init_random_(ae, device, dtype)
    for way, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        decoder = ae.decoder.to(memory_format=layout)
        x = decoder.conv_in(rand(1, cfg.channels, 16, 16).to(memory_format=layout))
        for i, stage in enumerate(s for s in reversed(decoder.up_blocks) if len(s)):
            yield row("decoder stages", f"stage {i} at {x.shape[-1]} px", way, lambda: stage(x), repeats=3)
            x = stage(x)


# ---- main --------------------------------------------------------------------------------------------------------------------------

def chart(file: Path, rows: list[dict], floors: list[dict], device: str, gpu: bool):
    """Like the paper's Fig. 8: seconds an image by resolution, of the paper, ours, and ours in FP8."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    timed = [r for r in rows if "sum" in r and r["switch"] in SWITCHES]
    places = sorted({(r["work"], r["res"]) for r in timed}, key=lambda place: (place[1], place[0].startswith("dc-gen-")))
    fig, ax = plt.subplots(figsize=(2.5 + 1.4 * len(places), 4))
    def ours(work, res, fp8):
        found = [r["sum"]["median"] for r in timed if (r["work"], r["res"]) == (work, res) and (r["precision"] == "fp8") == fp8]
        return min(found, default=None)
    precision = next((r["precision"] for r in timed if r["precision"] != "fp8"), "")
    bars = {f"ours, {precision}": [ours(*p, False) for p in places], "ours, FP8": [ours(*p, True) for p in places]}
    if gpu:
        bars = {"the paper": [next((f["paper_s"] for f in floors if (f["work"], f["res"]) == p), None) for p in places]} | bars
    colors = dict(zip(bars, ("#999999", "#4878a8", "#76b900")[3 - len(bars):]))
    for k, (name, values) in enumerate(bars.items()):
        shown = [(i + 0.27 * (k - (len(bars) - 1) / 2), v) for i, v in enumerate(values) if v]
        if shown:
            ax.bar_label(ax.bar(*zip(*shown), 0.26, color=colors[name], label=name), fmt="%.2f", fontsize=7)
    values = [v for bar in bars.values() for v in bar if v]
    ax.set_yscale("log"), ax.set_ylim(0.5 * min(values), 2.5 * max(values)), ax.tick_params(axis="y", which="both", left=False, labelleft=False)
    ax.set_xticks(range(len(places)), [f"{work}\n{res}" for work, res in places], fontsize=7)
    ax.set_ylabel("seconds an image, logarithmic"), ax.legend(fontsize=8, ncols=len(bars), loc="upper center")
    ax.set_title(device if gpu else f"small twins on a {device}: not GPU figures", fontsize=9)
    fig.tight_layout()
    with atomic(file) as tmp:
        fig.savefig(tmp, dpi=120, format="png")
    plt.close(fig)


def positive(kind):
    """An argument's type: a number above zero."""
    def parse(text: str):
        if (value := kind(text)) <= 0:
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"                      # argparse says: invalid positive int value: '0'
    return parse


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="flux-krea", choices=MODELS, help="the base; its DC-Gen sibling comes with it (default flux-krea)")
    p.add_argument("--res", default=None, help="pixels a side, or all of the paper's tables (default: the largest of them)")
    p.add_argument("--switches", nargs="+", default=list(SWITCHES), choices=SWITCHES, help="rows to time; each has all before it on (default all)")
    p.add_argument("--num-steps", type=positive(int), help="steps an image (default: the paper's; 4 for the twins on a CPU)")
    p.add_argument("--batches", type=positive(int), nargs="*", help="also time throughput at these batches (default: 1 8 32 64 for SANA and DiT, none for FLUX)")
    p.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True, help="the rows of one image at a time (default yes)")
    p.add_argument("--train", action="store_true", help="time post-training steps instead")
    p.add_argument("--train-batch", type=positive(int), help="images a training step (default: 1 for FLUX, 16 otherwise)")
    p.add_argument("--against", choices=("diffusers",), help="the same work through this library as well, eager and compiled")
    p.add_argument("--tables", action="store_true", help="rates of matrix products, attention and decoder stages instead")
    p.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True,
                   help="the largest items of a step and of decoding, and which attention ran (default yes)")
    p.add_argument("--repeats", type=positive(int), help="timed rounds at most (default 10, 30 at 1K and below; 2 on a CPU)")
    p.add_argument("--warm", type=float, help="seconds of work before timing (default 10; 0 on a CPU)")
    p.add_argument("--minutes", type=positive(float), default=9.0,
                   help="for one resolution: rounds are cut, to three at least, and what is optional left out, to end in about this time (default 9)")
    p.add_argument("--compile-mode", help="torch.compile's mode, such as max-autotune-no-cudagraphs (on a CPU blocks are only traced)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--seed", type=int, default=0, help="of weights and noise (default 0)")
    p.add_argument("--out", metavar="FILE", help="keep the results in FILE.json, after every row, and the chart in FILE.png")
    args = p.parse_args(argv)

    family = MODELS[args.model]
    if args.device.split(":")[0] not in ("cpu", "cuda") or args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: " + ("torch finds no GPU here" if args.device.startswith("cuda") else "cpu or cuda"))
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if args.against and isinstance(BASES[args.model], DiTConfig):
        raise ValueError("--against diffusers: FLUX and SANA are compared; its DiT has an embedder in every block and is another work")
    if args.against and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--against diffusers needs: pip install diffusers")
    if args.train and args.tables or (args.train or args.tables) and args.against:
        raise ValueError("--train, --tables and --against are different things to time; one of them at a time")
    if args.res not in (None, "all") and not args.res.isdecimal():
        raise ValueError(f"--res {args.res}: give pixels a side ({', '.join(map(str, family.deep))}), or all")
    sizes = family.paper if args.res == "all" else (int(args.res) if args.res else family.paper[-1],)
    args.switches = [s for s in SWITCHES if s in args.switches]
    if args.switches == ["graph"] and not cuda:
        raise ValueError("--switches graph: that needs a GPU")
    args.repeats = args.repeats or ((30 if max(sizes) <= 1024 else 10) if cuda else 2)
    args.warm = (10.0 if cuda else 0.0) if args.warm is None else args.warm
    args.num_steps = args.num_steps or (None if cuda else 4)
    args.batches = args.batches if args.batches is not None else [] if args.model.startswith("flux") else [1, 8, 32, 64] if cuda else [1, 2]
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    compiler = (dict(mode=args.compile_mode) if args.compile_mode else {}) if cuda else dict(backend="eager")
    torch.manual_seed(args.seed)
    if cuda:
        torch.backends.cudnn.benchmark = True                         # shapes are fixed
    pairs = [workloads(args.model, res, twin=not cuda) for res in sizes]
    result = dict(command=" ".join(["bench.py", *(sys.argv[1:] if argv is None else argv)]), **facts(device), dtype=precision_of(False, dtype),
                  compile=args.compile_mode or "default" if cuda else "traced only",
                  rows=[], ratios=[], throughput=[], train=[], memory=[], tables=[], checks=[], floors=[])

    file = lambda kind: Path(f"{args.out}.{kind}")                    # not with_suffix: of sana-1.6b it would leave sana-1

    def save():
        if args.out:
            with atomic(file("json")) as tmp:
                tmp.write_text(json.dumps(result, indent=1))

    def keep(kind: str, rows) -> list[dict]:
        """Rows into the result as they are finished, and into its file: what ends too early loses nothing."""
        before = len(result[kind])
        for row in rows:
            result[kind].append(row)
            save()
        return result[kind][before:]

    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}, {result['date']}")
    if not cuda and (args.tables or args.train or args.latency or args.batches):
        print(f"no GPU: the small twins ({family.twin} and its DC-Gen sibling) run in place of {args.model}. These are NOT GPU figures, and say\n"
              "nothing about speed: blocks are traced without a break but not compiled, and the CPU multiplies FP8 out. What is shown is that\n"
              "every row runs and that what it makes is sane.")
    if args.tables:
        rows = keep("tables", rate_tables(device, dtype))
        show(rows, table=("table",), what=("what",), way=("way",), ms=("ms", ".3f"), **{"TFLOP/s": ("tflop_per_s", ".2f")}, notes=("failed",))
    elif args.train:
        for res, pair in zip(sizes, pairs):
            keep("train", train_rows(family.schedule.get(res, family.schedule.get(0)), pair, args, device, dtype))
        print_train(result["train"], args.model)
        print_memory(keep("memory", memory_rows(args.model, sizes, args.train_batch)))
    else:
        text = attempt(text_seconds, BASES[args.model] if cuda else BASES[family.twin], device, dtype, not cuda) if args.latency else None
        text = (None, f"not timed: {text}") if isinstance(text, str) else text
        free()                                                        # 10 GB of T5
        for pair in pairs:
            until = time.perf_counter() + 60 * args.minutes
            if args.latency:
                print(flush=True)
                print_rows(keep("rows", bench_pair(pair, args, device, dtype, compiler, text, until)))
            if args.batches:
                print_throughput(keep("throughput", throughput(pair, args, device, dtype, compiler, until)), pair, args.num_steps or family.num_steps)
        result["ratios"], result["checks"] = ratios(result["rows"]), self_checks(result["rows"])
        if result["ratios"]:
            print("\ntimes faster than the base")
            show(result["ratios"], model=("work",), res=("res",), switch=("switch",), denoise=("denoise", ".2f"), than_our_base=("against_our_base", ".2f"),
                 **{"than the paper's base": ("against_paper_base", ".2f")}, the_paper=("paper", ".2f"))
        for line in [*[WHY_TWO_RATIOS] * any(r["paper"] for r in result["ratios"]), *result["checks"]]:
            print(line)
    result["floors"] = [floor(work) for res in sizes for work in workloads(args.model, res)]
    print_floors(result["floors"])
    save()
    drawn = args.out and any("sum" in r for r in result["rows"])
    if drawn:
        chart(file("png"), result["rows"], result["floors"], result["device"], cuda)
    if args.out:
        print(f"wrote {file('json')}" + f" and {file('png')}" * bool(drawn))
    print(json.dumps(result))
    if failed := [r for kind in ("rows", "train", "tables") for r in result[kind] if "failed" in r]:
        sys.exit(f"{len(failed)} rows failed")


if __name__ == "__main__":
    run(main)
