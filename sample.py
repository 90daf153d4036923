"""Draw pictures: the path from noise to data, its ODE, guidance, and the scripts' shared flags.

    x0 noise, x1 data, t in [0,1]:   x_t = (1-t) x0 + t x1,   v = x1 - x0,   Euler: x <- x + (t_next - t) v(x, t)

Forward (`path`, for training) and reverse (`integrate`, for sampling) of the one ODE stand on this page; below them is
DDPM's chain, for DiT as it was published.

    python sample.py                                   the newest run, or the embedded base if there is none
    python sample.py --base dit-xl --classes 207 360   an official model
    python sample.py --ckpt runs/finetune-tiny-1 --cfg-scale 3 --num-steps 50 --seed 7
    python sample.py --base dc-gen-flux-1k --prompt "a lighthouse at dusk" --res 1216x832
    python sample.py --base sana-4.8b --prompts FILE --dry-run        what it would take, without weights
    python sample.py --base sana-4.8b --prompts FILE --out DIR --dataset       a training set, drawn by the base itself (of classes: folders)
"""

import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import (BASES, Condition, FAMILIES, FluxConfig, Text, cat_conditions, ddpm_alphas_cumprod)
from lora import merge_lora
from autoencoder import ae_class, ae_config
from checkpoints import (ae_folder, atomic, config_dict, export, read_base_config, fingerprint, load_autoencoder, load_base, load_peft, load_run, newest_run, read_run_config, run_file, write_json)
from shapes import SHAPES
from data import (SUFFIXES, TEXT_ENCODERS, cache_prompts, encode_prompts, find_encoders, null_prompt, read_prompts, text_folder)
from fast import (cost, fast_bf16, peak_gib, pixels_on_host, timed)


# ---- the path and its ODE ------------------------------------------------------------------------------------------------

def path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Straight path from noise to data, and its velocity. (arXiv 2509.25180, Sec. 3.3)
    x0, x1 (B,C,H,W), t (B,) -> x_t, v, both (B,C,H,W)"""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * x1, x1 - x0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift: noise level s = 1 - t becomes r s / (1 + (r - 1) s). Larger latents bury less at the same noise
    level, so r > 1 spends more of the clock near the noise. 1 = off. (Written so that 0, 1 and r = 1 come out exact.)"""
    return t / (t + shift * (1 - t))


SHIFTS = ("mu", "flux2")


def resolve_shift(rule: str | float, channels: int, H: int, W: int, patch_size: int) -> float:
    """A published rule's shift r for a latent (C,H,W); a number is itself (SANA: 3 at every size).
    mu     exp(mu), mu on a line in the tokens through (256, 0.5) and (4096, 1.15)   (FLUX sampling.py; DC-Gen-FLUX at 4K)
    flux2  sqrt(C H W / 4096)                                                        (DC-Gen-FLUX at 1K)
    ValueError lists the rules."""
    if rule == "mu":
        tokens = H * W / patch_size**2
        return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    if rule == "flux2":
        return math.sqrt(channels * H * W / 4096)
    try:
        if (shift := float(rule)) > 0:
            return shift
    except ValueError:
        pass
    raise ValueError(f"--shift {rule}: give a positive number, or one of {', '.join(SHIFTS)}")


def sample_t(n: int, generator=None, kind: str = "logit-normal", shift: float = 1.0, device="cpu") -> Tensor:
    """Training times (n,) in (0,1): logit-normal(0,1) as the authors' code, or uniform; then the resolution shift."""
    if kind == "uniform":
        t = torch.rand(n, generator=generator, device=device)
    else:
        t = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    return shift_time(t, shift)


def time_grid(num_steps: int, shift: float = 1.0, start: float = 0.0) -> list[float]:
    """num_steps + 1 times from noise (0) to data (1), as Python floats: nothing is read back from the device.
    start: the first of them, before the shift."""
    return shift_time(torch.linspace(start, 1, num_steps + 1, dtype=torch.float64), shift).tolist()


def noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """One generator a picture, on the CPU, float32: picture i of a batch is the picture of its seed alone, anywhere.
    -> (len(generators), *shape)"""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def guided_velocity(model, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, null: Tensor | None = None, call=None) -> Tensor:
    """Classifier-free guidance, v_null + s (v_cond - v_null), both halves in one batch; s = 1 is one pass, no guidance.
    call: which function of the model to guide (default: its velocity). A learned variance is never guided."""
    call = call or model
    if cfg_scale == 1.0:
        return call(x, t, y)
    null = model.null_condition(y) if null is None else null
    return extrapolate(model, call(torch.cat([x, x]), torch.cat([t, t]), cat_conditions([y, null])), cfg_scale)


def extrapolate(model, both: Tensor, cfg_scale: float) -> Tensor:
    """Outputs with and without condition, one behind the other (2B,C,H,W) -> the guided one (B,C,H,W)."""
    cond, uncond = both.chunk(2)
    out = uncond + cfg_scale * (cond - uncond)
    k = model.cfg.guided_channels or model.cfg.in_channels           # DiT as published guides three of its four channels
    return torch.cat([out[:, :k], cond[:, k:]], dim=1)


SOLVERS = ("euler", "heun", "dpm")


START = {"dpm": 1e-3}                                                # where a solver's clock starts: log(t / (1-t)) has to be finite


def integrate(velocity, x: Tensor, times: list[float], method: str = "euler", progress: bool = False, each=None) -> Tensor:
    """Follow dx/dt = velocity(x, t) over the grid of times. x (B,C,H,W), velocity takes t (B,). each(x): after every step.
    euler  one evaluation a step, first order
    heun   two, second order, except for the last step
    dpm    one, second order: DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), SANA's solver. On the straight path its step is
           Euler's towards a guess of the data that goes on as the last two guesses went, in units of log(t / (1-t));
           the last step, at whose end that is infinite, takes the guess as it is"""
    at = lambda t: torch.full((len(x),), t, device=x.device)
    log_snr = lambda t: math.log(t / (1 - t)) if t > 0 else -math.inf
    guess, before = None, None                                       # the last guess of the data and its time
    for a, b in tqdm(list(zip(times, times[1:])), desc=f"{method}", leave=False, disable=not progress):
        v = velocity(x, at(a)).float()
        if method == "heun" and b < 1.0:
            v = 0.5 * (v + velocity(x + (b - a) * v, at(b)).float())
        if method == "dpm":
            last, guess = guess, x + (1 - a) * v
            if last is not None and b < 1.0:
                ratio = (log_snr(b) - log_snr(a)) / (log_snr(a) - log_snr(before))
                v = v + 0.5 * ratio * (guess - last) / (1 - a)
            before = a
        x = x + (b - a) * v
        if each:
            each(x)
    return x


# ---- DDPM's chain, for DiT as published ------------------------------------------------------------------------------------

class Chain:
    """The discrete diffusion that DiT was trained on, over a subset of its 1000 steps (arXiv 2006.11239, 2102.09672).
    steps: the kept step numbers, rising; the betas are recomputed so that alpha-bar at each kept step stays."""

    def __init__(self, steps: list[int] | None = None):
        full = ddpm_alphas_cumprod()
        self.steps = list(range(len(to_float32))) if steps is None else steps
        ab = full[self.steps]
        prev = torch.cat([torch.ones(1, dtype=ab.dtype), ab[:-1]])
        beta = 1 - ab / prev
        var = beta * (1 - prev) / (1 - ab)
        var[0] = var[1] if len(var) > 1 else beta[0]                  # the first is 0 and has no logarithm
        self.ab, self.prev, self.log_beta, self.log_var = ab, prev, beta.log(), var.log()
        self.coef_x1, self.coef_x = beta * prev.sqrt() / (1 - ab), (1 - prev) * (1 - beta).sqrt() / (1 - ab)

    @classmethod
    def spaced(cls, n: int, ddim: bool = False) -> "Chain":
        """n of the 1000 steps: spread over both ends (DiT's default for sampling), or DDIM's constant stride from 0."""
        if not 1 <= n <= 1000:
            raise ValueError(f"--num-steps {n}: the chain has 1000 steps; give 1 .. 1000")
        if not ddim:
            return cls([round(i * 999 / max(n - 1, 1)) for i in range(n)])
        steps = list(range(0, 1000, -(-1000 // n)))
        if len(steps) != n:
            raise ValueError(f"--num-steps {n}: DDIM wants a constant stride over 1000 steps; the nearest is {len(steps)}")
        return cls(steps)

    def _at(self, table: Tensor, i, like: Tensor) -> Tensor:
        i = torch.as_tensor(i).cpu()
        return table[i].to(like.device, torch.float32).reshape(-1, 1, 1, 1)

    def add_noise(self, x1: Tensor, x0: Tensor, i) -> Tensor:
        """Data x1, noise x0 (B,C,H,W), place i (B,) in this chain -> the chain's state, sqrt(ab) x1 + sqrt(1-ab) x0."""
        return self._at(self.ab.sqrt(), i, x1) * x1 + self._at((1 - self.ab).sqrt(), i, x1) * x0

    def posterior(self, x1: Tensor, x: Tensor, i) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the previous state, given data and state."""
        return self._at(self.coef_x1, i, x) * x1 + self._at(self.coef_x, i, x) * x, self._at(self.log_var, i, x)

    def predict(self, out: Tensor, x: Tensor, i) -> tuple[Tensor, Tensor, Tensor]:
        """Network output (B,2C,H,W), its state and place -> mean, log variance (both of the previous state), data."""
        eps, v = out.chunk(2, dim=1)
        low, high = self._at(self.log_var, i, x), self._at(self.log_beta, i, x)
        log_var = low + (v + 1) / 2 * (high - low)
        x1 = self._at((1 / self.ab).sqrt(), i, x) * x - self._at((1 / self.ab - 1).sqrt(), i, x) * eps
        return self.posterior(x1, x, i)[0], log_var, x1

    def sample(self, network, x: Tensor, ddim: bool, generators=None, progress: bool = False, each=None) -> Tensor:
        """From noise to data: ancestral steps with the learned variance, drawn from one generator a picture, or DDIM's
        deterministic ones (eta 0). network(x, clock) -> (B,2C,H,W). each(x) is called after every step."""
        for i in tqdm(range(len(self.steps) - 1, -1, -1), desc="ddim" if ddim else "ddpm", leave=False, disable=not progress):
            out = network(x, torch.full((len(x),), float(self.steps[i]), device=x.device)).float()
            mean, log_var, x1 = self.predict(out, x, i)
            if ddim:
                x = self._at(self.prev.sqrt(), i, x) * x1 + self._at((1 - self.prev).sqrt(), i, x) * out.chunk(2, dim=1)[0]
            elif i:
                x = mean + (0.5 * log_var).exp() * noise(generators, x.shape[1:]).to(x)
            else:
                x = mean
            if each:
                each(x)
        return x


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N1 || N2) of every number, in nats."""
    return 0.5 * (log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mean1 - mean2).square() / log_var2.exp() - 1)


def decoder_nll(x1: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of the mass that a Gaussian puts on the 1/255 to either side of x1, in nats; beyond +-1 all of the tail. The bins
    are those of 8-bit pixels (arXiv 2006.11239, Eq. 13); DiT was trained with them on latents, so they stay. The normal
    distribution function is the tanh approximation, as in that code."""
    cdf = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    above, below = (cdf((x1 - mean + d) * (-0.5 * log_var).exp()) for d in (1 / 255, -1 / 255))
    mass = torch.where(x1 < -0.999, above, torch.where(x1 > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def ddpm_loss(model, chain: Chain, z: Tensor, i: Tensor, y: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """DiT's own objective, to be added up: the squared error of epsilon, and the variational bound of the step in bits per
    number, which teaches the variance (arXiv 2102.09672, Sec. 3.1: epsilon is detached in it, or its noise would drown
    the first). z = x1 and x0 (B,C,H,W), i (B,) places in the chain, y (B,) -> (B,), (B,)"""
    x = chain.add_noise(z, x0, i)
    out = model.forward_native(x, torch.as_tensor(chain.steps, device=z.device)[i.to(z.device)], y).float()
    eps, v = out.chunk(2, dim=1)
    mean, log_var, _ = chain.predict(torch.cat([eps.detach(), v], dim=1), x, i)
    kl = gaussian_kl(*chain.posterior(z, x, i), mean, log_var)        # B C H W
    first = (i == 0).to(z.device).view(-1, 1, 1, 1)
    bound = torch.where(first, decoder_nll(z, mean, log_var), kl) / math.log(2)
    return (eps - x0).square().mean(dim=(1, 2, 3)), bound.mean(dim=(1, 2, 3))


# ---- noise and a condition in, pictures out ----------------------------------------------------------------------------------

def latent_size(cfg, ae_cfg, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels (H,W) -> the latent's (H,W). Sizes must divide by f p (ValueError naming the nearest that do)."""
    (H, W), unit = size, ae_cfg.f * cfg.patch_size
    if H % unit or W % unit:
        name = lambda H, W: f"{H}" if H == W else f"{W}x{H}"
        down, up = (name(*(max(unit, round_(s / unit) * unit) for s in (H, W))) for round_ in (math.floor, math.ceil))
        raise ValueError(f"--res {name(H, W)}: {ae_cfg.name} with patch {cfg.patch_size} needs a multiple of {unit}; "
                         f"try {up if up == down else f'{down} or {up}'}")
    return H // ae_cfg.f, W // ae_cfg.f


@contextmanager
def on_device(module: torch.nn.Module, device):
    """The module on the device, and where it was again afterwards. Its own tensors wait there: coming home copies nothing."""
    if all(p.device == torch.device(device) for p in module.parameters()):
        yield module                                                 # as it is: FSDP's parameters come and go
        return
    home = [(store, name, t, t.data) for m in module.modules() for store in (m._parameters, m._buffers) for name, t in store.items() if t is not None]
    module.to(device)
    yield module
    for store, name, t, data in home:
        t.data = data
        store[name] = t


@torch.no_grad()
def generate(model, ae, cond, seeds: list[int], num_steps: int = 25, cfg_scale: float = 3.0, sampler: str = "euler", shift: float | str = 1.0,
             size: tuple[int, int] | None = None, batch: int = 64, dtype: torch.dtype = torch.float32, progress: bool = False, device=None,
             seconds: dict | None = None) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] on the CPU for conditions, classes (B,) or a Text. size = (H,W) in pixels (default: the
    model's own); sampler: euler, heun, dpm (flow), ddim, ddpm (DiT as published only); shift: a number or a rule of SHIFTS.
    Sizes must divide by f p (ValueError). device: where to work; a model or autoencoder that is elsewhere comes there for
    its part only (default: the model's). seconds: receives the times of denoising and decoding."""
    size = size or (model.cfg.res,) * 2
    h, w = latent_size(model.cfg, ae.cfg, size)
    if sampler in ("ddim", "ddpm") and model.cfg.predict != "epsilon":
        raise ValueError(f"--sampler {sampler} is for a model that predicts epsilon on DDPM's clock; this one predicts a velocity: "
                         "use euler or heun, or dpm")
    if num_steps < 1:
        raise ValueError(f"--num-steps {num_steps}: at least 1")
    shift = resolve_shift(shift, model.cfg.in_channels, h, w, model.cfg.patch_size)
    device, seconds, images = torch.device(device or next(model.parameters()).device), {} if seconds is None else seconds, []
    chain = Chain.spaced(num_steps, ddim=sampler == "ddim") if sampler in ("ddim", "ddpm") else None
    for i in tqdm(range(0, len(cond), batch), desc="drawing", disable=not progress or len(cond) <= batch, leave=False):
        rows = cond[i : i + batch].to(device)
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        x = noise(generators, (model.cfg.in_channels, h, w)).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with timed(seconds, "denoising", device), on_device(model, device):
                if chain:
                    network = lambda x, clock: guided_velocity(model, x, clock, rows, cfg_scale, call=model.forward_native)
                    z = chain.sample(network, x, sampler == "ddim", generators, progress)
                else:
                    velocity = lambda x, t: guided_velocity(model, x, t, rows, cfg_scale)
                    z = integrate(velocity, x, time_grid(num_steps, shift, START.get(sampler, 0.0)), sampler, progress)
            with timed(seconds, "decoding", device), on_device(ae, device):
                parts = z.split(max(1, 2**22 // (size[0] * size[1])))  # pixels need more room than tokens
                images += [ae.decode(part).float().cpu() for part in parts]
    return torch.cat(images).clamp(-1, 1)


class Steps:
    """`integrate` by Euler over `guided`, for one model, size and batch, with all that does not read x taken out of the step:

    modulations  of all steps at once, one pass over each matrix instead of one a step. They are a quarter of FLUX's weights
                 and multiply a single vector, so reading them is all that they cost
    context      text and position tables, once an image
    graph        with graph=True one step is captured as a CUDA graph and replayed: the device no longer waits for Python.
                 Nothing in a step may then come from the host: its number is a tensor that the step itself counts up

    cond as for `guided`; shape (B,C,H,W) of the latent. Works in the type of the model's weights, without autocast; the
    latent itself stays float32. Another condition of the same shape is read by `read`, without a new capture."""

    @torch.no_grad()
    def __init__(self, model, cond, shape: tuple[int, ...], times: list[float], cfg_scale: float = 1.0, null=None, graph: bool = False):
        weight = model.embed_linear.weight
        self.model, self.cfg_scale, self.dtype, device = model, cfg_scale, weight.dtype, weight.device
        self.t = torch.tensor(times, device=device)                  # S+1
        self.i = torch.zeros(1, dtype=torch.long, device=device)     # the step's number
        self.x = torch.zeros(shape, device=device)
        self.table = self.context = self.graph = None
        self.read(cond, null)
        if graph:
            self.capture()

    @torch.no_grad()
    def read(self, cond, null=None):
        """All that the steps need of a condition: the modulations of every step (S,rows,sum of chunks D), and the context."""
        model, steps = self.model, self.t[:-1]
        if self.cfg_scale != 1.0:
            cond = cat_conditions([cond, model.null_condition(cond) if null is None else null])
        cond = cond.to(dtype=self.dtype) if isinstance(cond, Text) else cond
        rows = len(cond)
        _, clock = model.to_native(self.x.new_zeros(len(steps), 1, 1, 1), steps)
        # every row of the condition at every step: (S rows) readings of the clock. Text tokens, the bulk of a prompt, are not asked for
        short = replace(cond, tokens=cond.tokens[:, :0], mask=None) if isinstance(cond, Text) else cond
        mods = model.modulations(clock.repeat_interleave(rows), short[torch.arange(rows, device=cond.device).repeat(len(steps))])
        self.sizes = [m.shape[-1] for m in mods]
        table, context = torch.cat(mods, dim=-1).unflatten(0, (len(steps), rows)), model.context(cond, self.x.shape[-2:])
        if self.table is None:
            self.table, self.context = table, context
        else:                                                        # a captured graph reads these very places
            self.table.copy_(table)
            tree_map(lambda old, new: old.copy_(new) if isinstance(old, Tensor) else old, self.context, context)

    def step(self):
        """x += (t[i+1] - t[i]) v(x, t[i]), i += 1"""
        model, x, grid = self.model, self.x, self.x.shape[-2:]
        t, t_next = self.t[self.i], self.t[self.i + 1]               # 1
        mods = self.table[self.i][0].split(self.sizes, dim=-1)
        if self.cfg_scale != 1.0:
            x = torch.cat([x, x])
        t = t.expand(len(x))
        c, (x_in, _) = Condition(mods, self.context), model.to_native(x, t)
        v = model.to_velocity(model.head(model.trunk(model.embed(x_in.to(self.dtype)), c), c, grid).float(), x, t)
        v = v if self.cfg_scale == 1.0 else extrapolate(model, v, self.cfg_scale)
        self.x.add_((t_next - t[:1]) * v)
        self.i.add_(1)

    def start(self, x0: Tensor):
        self.x.copy_(x0)
        self.i.zero_()

    def capture(self):
        """What compiles, tunes, or allocates a workspace at its first call has to have done so before the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.start(self.x)
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.start(self.x)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    @torch.no_grad()
    def __call__(self, x0: Tensor, count: int | None = None) -> Tensor:
        """Noise (B,C,H,W) -> latent, after `count` steps (default: all of them). The result is overwritten by the next call."""
        self.start(x0)
        for _ in range(len(self.t) - 1 if count is None else count):
            self.graph.replay() if self.graph else self.step()
        return self.x


def estimate(cfg, ae_cfg, cond, size: tuple[int, int], num_steps: int, passes: int, dtype: torch.dtype) -> dict:
    """What drawing one batch takes, from the configurations alone; cond on the meta device. Bytes are those of the dtype."""
    h, w = latent_size(cfg, ae_cfg, size)
    with torch.device("meta"):
        model, ae = FAMILIES[type(cfg)](cfg).eval(), ae_class(ae_cfg)(ae_cfg).requires_grad_(False).eval()
        x, t = torch.empty(len(cond), cfg.in_channels, h, w), torch.empty(len(cond))
        step, step_bytes = cost(model, x, t, cond)
        decode, decode_bytes = cost(ae.decode_raw, x[:1])
    count = lambda m: sum(p.numel() for p in m.parameters())
    return dict(parameters=count(model), decoder_parameters=count(ae.decoder), tokens=h * w // cfg.patch_size**2, latent=(cfg.in_channels, h, w),
                step_flops=step * passes, decode_flops=decode * len(cond), total_flops=step * passes * num_steps + decode * len(cond),
                weights_bytes=count(model) * dtype.itemsize, step_bytes=step_bytes * passes * dtype.itemsize // 4,
                decode_bytes=decode_bytes * dtype.itemsize // 4)


# ---- pictures on disk ----------------------------------------------------------------------------------------------------------

def to_uint8(x: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1] -> (B,H,W,3) bytes, rounded: truncating would darken every picture by half a step."""
    return pixels_on_host(x).numpy()


def save_png(path, pixels: np.ndarray, meta: dict | None = None):
    """(H,W,3) bytes as PNG, with the given facts as text fields."""
    from PIL import Image, PngImagePlugin
    info = PngImagePlugin.PngInfo()
    for k, v in (meta or {}).items():
        info.add_text(k, v if isinstance(v, str) else json.dumps(v))
    with atomic(path) as tmp:
        Image.fromarray(pixels).save(tmp, "PNG", pnginfo=info)


def save_grid(path, rows: list[tuple[str, Tensor]], columns: list[str] = (), meta: dict | None = None):
    """A labelled grid: rows = (name, pictures (B,3,H,W) in [-1,1]); names to the left, column titles above, over as many
    lines as they take."""
    from PIL import Image, ImageDraw
    H, W = rows[0][1].shape[-2:]
    titles = [textwrap.wrap(c, max(4, W // 6)) for c in columns]     # the font's letters are 6 pixels wide
    n, left, top = max(len(x) for _, x in rows), 10 + 7 * max(len(line) for name, _ in rows for line in name.split("\n")), 4 + 12 * max(map(len, titles)) if titles else 0
    sheet = Image.new("RGB", (left + n * (W + 2), top + len(rows) * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(titles):
        for k, line in enumerate(lines):
            draw.text((left + j * (W + 2) + 1, 1 + 12 * k), line, fill="black")
    for i, (name, x) in enumerate(rows):
        draw.multiline_text((5, top + i * (H + 2) + H // 2 - 8), name, fill="black")
        for j, p in enumerate(to_uint8(x)):
            sheet.paste(Image.fromarray(p), (left + j * (W + 2), top + i * (H + 2)))
    save_png(path, np.asarray(sheet), meta)


# ---- data sets: what a base draws, to train its successor on -----------------------------------------------------------------------
# A folder of pictures as others keep them: metadata.jsonl has a line a picture, {"file_name", "text", ...}. It is written when
# all pictures are there, so a folder without it is not finished; dataset.json says from the start what it is made of.

def parse_shard(text: str | None) -> tuple[int, int]:
    """"2/8" -> (2, 8), the third of eight shares; None -> torchrun's process and number of processes, else all of it."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--shard {text}: give I/N, one of 0/N .. N-1/N, as 0/8")
    return int(i), int(n)


def claim_dataset(folder: Path, facts: dict):
    """Note in dataset.json what the data set is made of. ValueError if another one is in the folder, or other pictures."""
    file, facts = folder / "dataset.json", json.loads(json.dumps(facts))
    noted = json.loads(file.read_text()) if file.exists() else {}
    if wrong := [k for k in facts if noted.get(k, facts[k]) != facts[k]]:
        raise ValueError(f"{folder} holds a data set of another making ({wrong[0]}: {noted[wrong[0]]}, now {facts[wrong[0]]}); give another --out")
    if not noted and folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.rglob("*")):
        raise ValueError(f"{folder} holds pictures already; give another --out")
    write_json(file, noted | facts)


def finish_dataset(folder: Path, entries: list[dict]) -> int:
    """Write metadata.jsonl if every picture is there; returns how many are missing. Whichever process comes last does it, and
    two at a time write the same."""
    missing = sum(not (folder / entry["file_name"]).exists() for entry in entries)
    if not missing:
        with atomic(folder / "metadata.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return missing


# ---- models by name, shared flags ------------------------------------------------------------------------------------------------

def add_model_args(p: argparse.ArgumentParser, res=int):
    """The flags that choose a model; `load_base`, `load_run` and `load_ae` read them. res: what --res is read as."""
    p.add_argument("--base", default="tiny", metavar="NAME|RUN", help=f"pretrained model: {', '.join(BASES)}, or the folder of a finished run (default tiny)")
    p.add_argument("--weights", metavar="PATH", help="the base's weights: a file in any published layout, or a pipeline folder "
                                                     "(default: shipped, or the model hub's cache)")
    p.add_argument("--base-ae-weights", metavar="FILE", help="weight file of the base's own autoencoder (default: as above)")
    p.add_argument("--res", type=res, help="pixels a side" + (", or WIDTHxHEIGHT" if res is str else "") + " (default: the base's)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="arithmetic; auto = bf16 where it is faster (default auto)")
    p.add_argument("--seed", type=int, default=0, help="seed; picture i of a batch uses seed + i (default 0)")


def device_here(device: str) -> str:
    """"cuda" as torchrun means it: every process on a machine has its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def dtype_of(args) -> torch.dtype:
    return torch.bfloat16 if args.dtype == "bf16" or (args.dtype == "auto" and fast_bf16(args.device)) else torch.float32


def parse_classes(text: list[str] | None, names: tuple[str, ...], count: int) -> Tensor:
    """Class numbers or names -> (B,) indices; None -> the first classes in turn. ValueError names the valid ones."""
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    if not text:
        return torch.arange(count) % len(names)
    for t in text:
        if t not in names and not (t.isdecimal() and int(t) < len(names)):
            raise ValueError(f"--classes {t}: not a class; give 0 .. {len(names) - 1}" + (f" or {', '.join(names)}" if len(names) <= 20 else ""))
    picked = torch.tensor([names.index(t) if t in names else int(t) for t in text])
    return picked.repeat(-(-count // len(picked)))[: max(count, len(picked))]


def thumbnails(images: Tensor, side: int = 512) -> Tensor:
    """(B,3,H,W) -> no side longer than `side`: a grid is for looking."""
    scale = side / max(images.shape[-2:])
    return images if scale >= 1 else F.interpolate(images, scale_factor=scale, mode="area")


def reject(found, flag: str, why: str):
    if found:
        raise ValueError(f"{flag}: {why}")


# ---- a model's own settings ------------------------------------------------------------------------------------------------------

# How a family's authors draw with it, and what differs in an embedded model and in a base of theirs. text: where the text encoders are
SETTINGS = {
    "DiTConfig":  dict(num_steps=25, cfg_scale=3.0, guidance=None, sampler="euler", shift=1.0, batch=64),
    "FluxConfig": dict(num_steps=20, cfg_scale=1.0, guidance=3.5, sampler="euler", shift="flux2", batch=1,
                       text="black-forest-labs/FLUX.1-Krea-dev::"),
    "SanaConfig": dict(num_steps=20, cfg_scale=4.5, guidance=None, sampler="dpm", shift=3.0, batch=1,
                       text="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers::"),
    "words":      dict(num_steps=25, sampler="euler", shift=1.0, batch=64, text=None),
    "flux-krea":      dict(num_steps=28, guidance=4.5, shift="mu"),
    "flux-dev":       dict(num_steps=50, shift="mu", text="black-forest-labs/FLUX.1-dev::"),
    "dc-gen-flux-1k": dict(text=BASES["dc-gen-flux-1k"].weights),
    "dc-gen-flux-4k": dict(text=BASES["dc-gen-flux-4k"].weights, shift="mu"),
}


def settings(cfg, base: str | None = None, **given) -> dict:
    """A model's settings; those given, unless None, go first."""
    own = {**SETTINGS[type(cfg).__name__], **SETTINGS.get(cfg.encoders, {}), **SETTINGS.get(base, {}), "encoders": cfg.encoders}
    if not getattr(cfg, "guidance_embed", True):                     # a FLUX that is not distilled is guided in two passes
        own |= dict(cfg_scale=own["guidance"], guidance=None)
    if cfg.predict == "epsilon":
        own["sampler"] = "ddpm"                                      # DiT as published
    return own | {k: v for k, v in given.items() if v is not None}


def parse_size(text: str | None, res: int) -> tuple[int, int]:
    """"1024" or "1216x832", width first as everybody writes it -> (H,W) in pixels."""
    sides = str(text or res).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--res {text}: give pixels a side, or WIDTHxHEIGHT, as 1024 or 1216x832")
    return int(sides[-1]), int(sides[0])


def pick_prompts(given: list[str] | None, file: str | None, count: int | None) -> list[str]:
    """The prompts of --prompt and of a file, in turn up to `count` (default: each once)."""
    prompts = (given or []) + (read_prompts(file) if file else [])
    if not prompts:
        raise ValueError("this model draws prompts: give --prompt TEXT (again for another), or --prompts FILE with one on a line")
    if count is not None and count < 1:
        raise ValueError(f"--count {count}: at least 1")
    count = max(count or 0, len(prompts))
    return (prompts * -(-count // len(prompts)))[:count]


def encode(family: str, folder, prompts: list[str], negative: str, guidance: float | None, length: int, dtype, device) -> tuple[Text, Text]:
    """Prompts -> their Text with the guidance that a distilled model is told, and the null condition for `model.null`."""
    kw, distinct = dict(dtype=dtype, device=device), list(dict.fromkeys(prompts))
    text = encode_prompts(family, folder, distinct, length, **kw)[torch.tensor([distinct.index(p) for p in prompts])]
    return with_guidance(text, guidance), null_prompt(family, folder, length, negative, **kw)


def with_guidance(text: Text, guidance: float | None) -> Text:
    """The same number for every prompt; None: none."""
    return replace(text, guidance=None if guidance is None else torch.full((len(text),), guidance, device=text.device))


def report(cfg, own: dict, size: tuple[int, int], count: int, dtype: torch.dtype, text_tokens: int | None, offload: bool) -> str:
    """What drawing takes, in a few lines, from the configurations alone."""
    ae_cfg, batch = ae_config(cfg.ae), min(own["batch"], count)
    with torch.device("meta"):
        cond = torch.zeros(batch, dtype=torch.long) if not own["encoders"] else example_text(cfg, batch, text_tokens)
    e = estimate(cfg, ae_cfg, cond, size, own["num_steps"], 1 if own["cfg_scale"] == 1 else 2, dtype)
    gb, encoders = lambda n: f"{n / 1e9:.2f} GB", TEXT_ENCODERS.get(own["encoders"], ())
    model, decoder = e["weights_bytes"], e["decoder_parameters"] * 4
    denoising, decoding = model + e["step_bytes"] + (0 if offload else decoder), decoder + e["decode_bytes"] + (0 if offload else model)
    tera = lambda key: f"{e[key] / 1e12:,.2f}"
    rows = [("model", f"{e['parameters'] / 1e6:,.1f}M parameters, {gb(model)} in {str(dtype).removeprefix('torch.')}"),
            *((cls, f"{millions:,}M parameters, {gb(millions * 1e6 * dtype.itemsize)}, there before the model and freed") for *_, cls, _, millions in encoders),
            (cfg.ae, f"decoder {e['decoder_parameters'] / 1e6:,.1f}M parameters, {gb(decoder)} in float32"),
            ("picture", f"{size[1]}x{size[0]}, latent {'x'.join(map(str, e['latent']))}, {e['tokens']:,} tokens" + (f" and {text_tokens} of text" if encoders else "")),
            ("arithmetic", f"{tera('step_flops')} TFLOPs a step of {batch}, {own['num_steps']} steps; {tera('decode_flops')} to decode; {tera('total_flops')} in all"),
            ("memory", f"about {gb(denoising)} while denoising, {gb(decoding)} while decoding")]
    return "\n".join(f"{name:22}{text}" for name, text in rows)


def example_text(cfg, rows: int, tokens: int) -> Text:
    """A Text of the shapes that a model reads, with nothing in it."""
    if isinstance(cfg, FluxConfig):
        guidance = torch.zeros(rows) if cfg.guidance_embed else None
        return Text(torch.zeros(rows, tokens, cfg.context_in_dim), None, torch.zeros(rows, cfg.vec_in_dim), guidance)
    return Text(torch.zeros(rows, tokens, cfg.caption_channels), torch.ones(rows, tokens, dtype=torch.bool))


def run(main):
    """A script's main with the user's errors as one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except ValueError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted", file=sys.stderr) or 130)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p, res=str)
    p.set_defaults(base=None)
    p.add_argument("--ckpt", metavar="RUN", help="a run's folder or file (default without --base: the newest run in runs/, else the embedded base)")
    p.add_argument("--ae-weights", metavar="FILE", help="weight file of the run's deep autoencoder (default: shipped, or the model hub's cache)")
    p.add_argument("--text-encoders", metavar="DIR", help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument("--classes", nargs="+", help="class numbers or names (default: all in turn)")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; again for another")
    p.add_argument("--prompts", metavar="FILE", help="prompts, one a line, # for comments")
    p.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from, by --cfg-scale (default: the empty prompt)")
    p.add_argument("--count", type=int, help="pictures (default 8, or one a prompt)")
    p.add_argument("--num-steps", type=int, help="ODE or chain steps (default: the authors' for the model; DiT 25)")
    p.add_argument("--cfg-scale", type=float, help="classifier-free guidance in two passes; 1 = off (default: the authors'; DiT 3, FLUX 1, SANA 4.5)")
    p.add_argument("--guidance", type=float, help="the number that a distilled model (FLUX) is told, one pass (default 3.5, flux-krea 4.5)")
    p.add_argument("--sampler", choices=(*SOLVERS, "ddim", "ddpm"), help="default: euler; dpm for SANA; ddpm for DiT as published")
    p.add_argument("--shift", help=f"resolution shift of the time grid: a number, 1 = off, or {' or '.join(SHIFTS)} (default: the one trained with)")
    p.add_argument("--text-tokens", type=int, help="prompt tokens kept (default: the model's; FLUX 512 or 256)")
    p.add_argument("--batch", type=int, help="pictures at a time (default 64, with prompts 1)")
    p.add_argument("--offload", action="store_true", help="model and autoencoder are on the device only for their part")
    p.add_argument("--lora", metavar="PATH", help="a LoRA of diffusers or PEFT to add, a file or a folder with its embedder and head")
    p.add_argument("--dry-run", action="store_true", help="print what it would take, and stop; touches no weights")
    p.add_argument("--export", metavar="DIR", help="write model and autoencoder as a diffusers folder, LoRA merged (and beside it in lora/), and stop")
    p.add_argument("--dataset", action="store_true", help="draw a training set into --out, with captions in metadata.jsonl; the same command goes on with it")
    p.add_argument("--shard", metavar="I/N", help="of a data set: draw share I of N, 0/N .. N-1/N (default: torchrun's, else all)")
    p.add_argument("--out", help="folder for the pictures (default: samples/ in the run, or runs/samples-BASE)")
    args = p.parse_args(argv)

    if args.ckpt and args.base:
        raise ValueError("--base and --ckpt each name a model; give one of them")
    reject(args.dataset and not args.out, "--dataset", "name its folder with --out DIR")
    reject(args.shard and not args.dataset, "--shard", "only a data set is drawn in shares: add --dataset")
    args.device = device_here(args.device)
    ckpt, name, dtype, seconds = args.ckpt or (None if args.base else newest_run()), args.base or "tiny", dtype_of(args), {}
    cfg, info = read_run_config(run_file(ckpt, not args.raw)) if ckpt else read_base_config(name)
    label = str(ckpt or name)
    own = settings(cfg, None if ckpt else name, num_steps=args.num_steps, cfg_scale=args.cfg_scale, guidance=args.guidance, sampler=args.sampler,
                   shift=args.shift if args.shift is not None else info.get("shift"), batch=args.batch)
    size, length = parse_size(args.res, cfg.res), args.text_tokens or getattr(cfg, "text_tokens", None)
    resolve_shift(own["shift"], cfg.in_channels, *latent_size(cfg, ae_config(cfg.ae), size), cfg.patch_size)      # errors before anything is loaded
    distilled = getattr(cfg, "guidance_embed", False)                 # told its guidance as a number
    if own["encoders"]:
        reject(args.classes, "--classes", f"{label} draws prompts, not classes: use --prompt")
        reject(args.guidance is not None and not distilled, "--guidance", f"{label} is not a distilled model that is told its guidance: use --cfg-scale")
        reject(args.negative and own["cfg_scale"] == 1, "--negative", "a negative prompt acts in classifier-free guidance: give --cfg-scale above 1")
        draws = not args.dry_run and not args.export
        shown_as = prompts = pick_prompts(args.prompt or ([""] if not draws and not args.prompts else None), args.prompts, args.count)
    else:
        for flag in ("prompt", "prompts", "negative", "guidance", "text_tokens"):
            reject(getattr(args, flag) not in (None, ""), f"--{flag.replace('_', '-')}", f"{label} draws classes, not prompts: use --classes")
        classes = tuple(info.get("classes") or (SHAPES if cfg.num_classes == len(SHAPES) else [str(i) for i in range(cfg.num_classes)]))
        cond = parse_classes(args.classes, classes, 8 if args.count is None else args.count)
        shown_as = [classes[k] for k in cond]
    if args.dry_run:
        print(report(cfg, own, size, len(shown_as), dtype, length, args.offload))
        return
    home, weights_dtype = "cpu" if args.offload or args.export else args.device, dtype if own["encoders"] else torch.float32

    def load():
        model, info = load_run(ckpt, home, not args.raw, args.weights, weights_dtype) if ckpt else load_base(name, args.weights, home, weights_dtype)
        if ckpt:
            kind = "moving average" if Path(info["file"]).name.startswith("ema") else "weights as trained"
            print(f"{info['file']}: {kind}, base {info['base']}, latents of {model.cfg.ae}")
        if args.lora:
            left_out = load_peft(merge_lora(model), args.lora)
            print(f"{args.lora}: added" + (f", without {', '.join(left_out)}, which are bound to another latent space" if left_out else ""))
        file = args.ae_weights or args.base_ae_weights or info.get("ae_weights") or (None if ckpt else ae_folder(name, args.weights))
        return model, info, load_autoencoder(model.cfg.ae, file, device=home)

    if args.export:
        export(*load()[::2], Path(args.export))
        return
    seeds = [args.seed + i for i in range(len(shown_as))]
    names = [f"{i:05d}_seed{seed}.png" for i, seed in enumerate(seeds)]
    if args.dataset and not own["encoders"]:                          # a folder a class, as data.ImageFolder reads it
        names = [f"{k:04d}/{file}" for k, file in zip(cond.tolist(), names)]
    batches, null, guidance = torch.arange(len(seeds)).split(own["batch"]), None, own["guidance"] if distilled else None
    facts = {k: own[k] for k in ("sampler", "num_steps", "cfg_scale", "shift")} | dict(model=config_dict(cfg))
    if own["encoders"]:
        facts |= dict(guidance=guidance, text_tokens=length)
        folder = text_folder(label, own["encoders"], own["text"], args.text_encoders, args.weights)
    if args.dataset:
        shard = parse_shard(args.shard)
        digest = lambda x: hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]
        made_of = facts | dict(prompts=digest(shown_as), count=len(seeds), seed=args.seed, size=size, batch=own["batch"], dtype=str(dtype), negative=args.negative,
                               encoders=digest([e[-1] for e in find_encoders(own["encoders"], folder)] if own["encoders"] else None))
        claim_dataset(Path(args.out), made_of)
        share = batches[shard[0] :: shard[1]]                         # whole batches, always the same: in another one the last bit may differ
        batches = [rows for rows in share if not all((Path(args.out) / names[i]).exists() for i in rows)]
    if own["encoders"] and len(batches):                              # before the model: 10 GB of encoders are gone when it comes
        with timed(seconds, "text", args.device):
            if args.dataset:                                          # read from the disk as they are needed: 4 MB each in FLUX
                mine = torch.cat(share).tolist()
                texts = cache_prompts(own["encoders"], folder, [prompts[i] for i in mine], length, args.negative, dtype=dtype, device=args.device)
                place, null = {i: k for k, i in enumerate(mine)}, texts.null
            else:
                cond, null = encode(own["encoders"], folder, prompts, args.negative, guidance, length, dtype, args.device)

    def condition(rows):
        if not (args.dataset and own["encoders"]):
            return cond[rows]
        return with_guidance(texts[torch.tensor([place[int(i)] for i in rows])], guidance)

    model, info, ae = load()
    if args.dataset:
        claim_dataset(Path(args.out), dict(weights=fingerprint(model), autoencoder=fingerprint(ae)))
    if own["encoders"]:
        model.null = null
    facts["weights"] = str(info.get("file", name))
    out = Path(args.out or (Path(info["file"]).parent / "samples" if ckpt else f"runs/samples-{Path(name).name}"))
    grid = out.with_name(f"{out.name}-grid.png")                      # beside the folder, which so holds samples only
    said = {"prompt": shown_as, "negative": [args.negative] * len(seeds)} if own["encoders"] else {"class": shown_as}
    shown, start = [], time.perf_counter()
    for rows in tqdm(batches, desc="data set", disable=not args.dataset):          # written as they come: 50 000 do not fit in memory
        images = generate(model, ae, condition(rows), [seeds[i] for i in rows], own["num_steps"], own["cfg_scale"], own["sampler"], own["shift"], size,
                          own["batch"], dtype, progress=not args.dataset, device=args.device, seconds=seconds)
        for i, pixels in zip(rows.tolist(), to_uint8(images)):
            save_png(out / names[i], pixels, {**{k: v[i] for k, v in said.items()}, "seed": str(seeds[i]), "dcgen": facts})
        shown += list(thumbnails(images)[: 64 - len(shown)])
    total, drawn = time.perf_counter() - start + seconds.get("text", 0.0), sum(map(len, batches))
    if args.dataset:
        about = dict(steps=own["num_steps"], guidance=guidance, cfg_scale=own["cfg_scale"])
        missing = finish_dataset(out, [dict(file_name=names[i], text=shown_as[i], seed=seeds[i], **about) for i in range(len(seeds))])
        state = f"{missing} pictures are left to other shares" if missing else f"whole, {len(seeds)} pictures with captions in metadata.jsonl"
    else:
        rows = [(f"seed {seeds[i]} +", torch.stack(shown[i : i + 8])) for i in range(0, len(shown), 8)]
        save_grid(grid, rows, shown_as if len(seeds) <= 8 else (), {"dcgen": facts})
        state = f"and {grid}"
    print(f"wrote {drawn} pictures to {out}/ {state} ({total:.1f} s, {total / max(1, drawn):.2f} s each: "
          f"{', '.join(f'{what} {s:.1f} s' for what, s in seconds.items())}; peak {peak_gib(args.device):.1f} GiB)")


if __name__ == "__main__":
    run(main)
