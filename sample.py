"""Draw pictures: the path from noise to data, its ODE, guidance; below them the scripts' shared flags.

    x0 noise, x1 data, t in [0,1]:   x_t = (1-t) x0 + t x1,   v = x1 - x0,   Euler: x <- x + (t_next - t) v(x, t)

Forward (`path`, for training) and reverse (`integrate`, for sampling) of the one ODE stand on the first page; then
DDPM's chain, for DiT as it was published.

    python sample.py                                   the newest run, or the embedded base if there is none
    python sample.py --base dit-xl --classes 207 360   an official model
    python sample.py --ckpt runs/finetune-tiny-1 --cfg-scale 3 --num-steps 50 --seed 7
    python sample.py --base dc-gen-flux-1k --prompt "a lighthouse at dusk" --res 1216x832
    python sample.py --base sana-4.8b --prompts FILE --dry-run           memory and arithmetic, without weights
    python sample.py --base sana-4.8b --prompts FILE --out DIR --dataset a training set, drawn by the base itself
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from autoencoder import ae_config, build_autoencoder
from checkpoints import (
    ae_folder, atomic, config_dict, export, fingerprint, load_autoencoder, load_base, load_peft, load_run,
    newest_run, read_base_config, read_run_config, run_file, write_json)
from data import SUFFIXES, TEXT_ENCODERS, cache_prompts, find_encoders, read_prompts, text_folder
from fast import (
    Hoist, attention_priority, bf16_is_fast, capture, compile_decoder, compile_layers, count_cost, example_condition,
    hoisted_bytes, peak_gib, pixels_on_host, timed, uncompile)
from lora import merge_lora
from model import BASES, FAMILIES, Sampling, Text, cat_conditions, ddpm_alphas_cumprod, to_float32
from shapes import SHAPES


# ---- the path and its ODE ------------------------------------------------------------------------------------------

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
        shift = float(rule)
    except ValueError:
        shift = -1.0
    if not shift > 0:
        raise ValueError(f"--shift {rule}: give a positive number, or one of {', '.join(SHIFTS)}")
    return shift


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


def guided_velocity(model, x: Tensor, t: Tensor, y, cfg_scale: float, null=None, call=None) -> Tensor:
    """Classifier-free guidance, v_null + s (v_cond - v_null), both halves in one batch; s = 1 is one pass, no guidance.
    call: which function of the model to guide (default: its velocity)."""
    call = call or model
    if cfg_scale == 1.0:
        return call(x, t, y)
    if null is None:
        null = model.null_condition(y)
    both = call(torch.cat([x, x]), torch.cat([t, t]), cat_conditions([y, null]))          # 2B C H W
    return extrapolate(model, both, cfg_scale)


def extrapolate(model, both: Tensor, cfg_scale: float) -> Tensor:
    """Outputs with and without condition, one behind the other (2B,C,H,W) -> the guided one (B,C,H,W) in float32.
    DiT as published guides three of its four channels; a learned variance is never guided."""
    cond, uncond = to_float32(both).chunk(2)
    out = uncond + cfg_scale * (cond - uncond)
    k = model.cfg.guided_channels or model.cfg.in_channels
    return torch.cat([out[:, :k], cond[:, k:]], dim=1)


SOLVERS = ("euler", "heun", "dpm")
START = {"dpm": 1e-3}                   # where a solver's clock starts: log(t / (1-t)) has to be finite


def log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if t > 0 else -math.inf


def integrate(velocity, x: Tensor, times: list[float], method: str = "euler", progress: bool = False, each=None) -> Tensor:
    """Follow dx/dt = velocity(x, t) over the grid of times. x (B,C,H,W), velocity takes t (B,). each(x): after every step.
    euler  one evaluation a step, first order
    heun   two, second order, except for the last step
    dpm    one, second order: DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), SANA's solver. On the straight path its step is
           Euler's towards a guess of the data that goes on as the last two guesses went, in units of log(t / (1-t));
           the last step, at whose end that is infinite, takes the guess as it is"""
    def at(t: float) -> Tensor:
        return torch.full((len(x),), t, device=x.device)

    guess = None                                                     # the last guess of the data
    before = None                                                    # and its time
    for a, b in tqdm(list(zip(times, times[1:])), desc=method, leave=False, disable=not progress):
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


# ---- DDPM's chain, for DiT as published ----------------------------------------------------------------------------

class DDPMChain:
    """The discrete diffusion that DiT was trained on, over a subset of its 1000 steps (arXiv 2006.11239, 2102.09672).
    steps: the kept step numbers, rising; the betas are recomputed so that alpha-bar at each kept step stays."""

    def __init__(self, steps: list[int] | None = None):
        full = ddpm_alphas_cumprod()
        self.steps = list(range(len(full))) if steps is None else steps
        ab = full[self.steps]
        prev = torch.cat([torch.ones(1, dtype=ab.dtype), ab[:-1]])
        beta = 1 - ab / prev
        var = beta * (1 - prev) / (1 - ab)
        # the first variance is 0 and has no logarithm
        var[0] = var[1] if len(var) > 1 else beta[0]
        self.ab = ab                                                 # alpha-bar at a step
        self.prev = prev                                             # and at the step before it
        self.log_beta = beta.log()
        self.log_var = var.log()
        self.coef_x1 = beta * prev.sqrt() / (1 - ab)
        self.coef_x = (1 - prev) * (1 - beta).sqrt() / (1 - ab)

    @classmethod
    def spaced(cls, n: int, ddim: bool = False) -> "DDPMChain":
        """n of the 1000 steps: spread over both ends (DiT's default for sampling), or DDIM's constant stride from 0."""
        if not 1 <= n <= 1000:
            raise ValueError(f"--num-steps {n}: the chain has 1000 steps; give 1 .. 1000")
        if not ddim:
            return cls([round(i * 999 / max(n - 1, 1)) for i in range(n)])
        steps = list(range(0, 1000, -(-1000 // n)))
        if len(steps) != n:
            raise ValueError(f"--num-steps {n}: DDIM wants a constant stride over 1000 steps; the nearest is {len(steps)}")
        return cls(steps)

    def at(self, table: Tensor, i, like: Tensor) -> Tensor:
        """Entries of a table at places i, a number or (B,), to be multiplied with (B,C,H,W)."""
        i = torch.as_tensor(i).cpu()
        return table[i].to(like.device, torch.float32).reshape(-1, 1, 1, 1)

    def predict(self, out: Tensor, x: Tensor, i) -> tuple[Tensor, Tensor, Tensor]:
        """Network output (B,2C,H,W), its state and place -> mean, log variance (both of the previous state), data."""
        eps, v = out.chunk(2, dim=1)
        low = self.at(self.log_var, i, x)
        high = self.at(self.log_beta, i, x)
        log_var = low + (v + 1) / 2 * (high - low)
        x1 = self.at((1 / self.ab).sqrt(), i, x) * x - self.at((1 / self.ab - 1).sqrt(), i, x) * eps
        mean = self.at(self.coef_x1, i, x) * x1 + self.at(self.coef_x, i, x) * x
        return mean, log_var, x1

    def sample(self, network, x: Tensor, ddim: bool, generators=None, progress: bool = False, each=None) -> Tensor:
        """From noise to data: ancestral steps with the learned variance, drawn from one generator a picture, or DDIM's
        deterministic ones (eta 0). network(x, clock) -> (B,2C,H,W). each(x) is called after every step."""
        name = "ddim" if ddim else "ddpm"
        for i in tqdm(range(len(self.steps) - 1, -1, -1), desc=name, leave=False, disable=not progress):
            clock = torch.full((len(x),), float(self.steps[i]), device=x.device)
            out = network(x, clock).float()
            mean, log_var, x1 = self.predict(out, x, i)
            if ddim:
                eps = out.chunk(2, dim=1)[0]
                x = self.at(self.prev.sqrt(), i, x) * x1 + self.at((1 - self.prev).sqrt(), i, x) * eps
            elif i:
                x = mean + (0.5 * log_var).exp() * noise(generators, x.shape[1:]).to(x)
            else:
                x = mean
            if each:
                each(x)
        return x


# ---- how fast ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Speed:
    """What of fast.py is put on. Attention's choice, the decoder's memory format and bytes to the host cost nothing and
    are always taken on a GPU."""
    hoist: bool = False                 # modulations and text once an image
    compile: bool = False               # blocks and decoder
    graph: bool = False                 # one captured evaluation, replayed
    why: str = ""


COMPILING_PAYS = 2000                   # evaluations: a minute of compiling over the 30 ms that FLUX at 1K gains in each
TABLE_LIMIT = 2 * 2**30                 # bytes of hoisted tables: 250 steps of a batch of 128 would take more


def choose_speed(pictures: int, sampling: Sampling, device, fast: bool | None = None, offload: bool = False) -> Speed:
    """What pays when this many pictures are drawn, and why. fast: True compiles in any case, False never.
    offload: the model leaves the device between its parts, so that a captured graph would replay freed memory."""
    cuda = torch.device(device).type == "cuda"
    evaluations = math.ceil(pictures / sampling.batch) * sampling.num_steps
    if fast is None:
        compiled = cuda and evaluations >= COMPILING_PAYS
        enough = "pay" if compiled else "do not pay"
        why = f"{evaluations:,} evaluations of the model {enough} for a minute of compiling"
        why = why if cuda else "a CPU gains little"
    else:
        compiled = fast
        why = "--fast" if fast else "--eager"
    return Speed(hoist=cuda or compiled, compile=compiled, graph=cuda and compiled and not offload, why=why)


def describe_speed(speed: Speed) -> str:
    """One line: what is taken, and why."""
    parts = {"modulations hoisted": speed.hoist, "compiled": speed.compile, "steps captured": speed.graph}
    taken = [name for name, on in parts.items() if on]
    if not speed.compile:
        taken.append("eager")
    return f"speed: {', '.join(taken)} ({speed.why})"


# ---- noise and a condition in, pictures out ------------------------------------------------------------------------

def latent_size(cfg, ae_cfg, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels (H,W) -> the latent's (H,W). Sizes must divide by f p (ValueError naming the nearest that do)."""
    def written(H: int, W: int) -> str:
        return f"{H}" if H == W else f"{W}x{H}"

    H, W = size
    unit = ae_cfg.f * cfg.patch_size
    if H % unit or W % unit:
        down = written(*(max(unit, side // unit * unit) for side in size))
        up = written(*(-(-side // unit) * unit for side in size))
        nearest = up if up == down else f"{down} or {up}"
        raise ValueError(f"--res {written(H, W)}: {ae_cfg.name} with patch {cfg.patch_size} needs a multiple of {unit}; "
                         f"try {nearest}")
    return H // ae_cfg.f, W // ae_cfg.f


@contextmanager
def on_device(module: torch.nn.Module, device):
    """Move the module to `device` inside the context and back afterwards. Its own tensors stay where they were, so the way
    back copies nothing."""
    if all(p.device == torch.device(device) for p in module.parameters()):
        yield module                                                 # FSDP's parameters change within: leave them alone
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


class Pipeline:
    """A model, its autoencoder, how to sample, and a size: pictures for conditions and seeds, batch by batch.

    size    (H,W) in pixels (default: the model's own)
    dtype   of the arithmetic; under autocast where the weights have another
    device  where to work; a model or autoencoder that is elsewhere is moved there for its part only (default: the model's)
    speed   what of fast.py is put on; `close` takes it off again
    """

    def __init__(self, model, ae, sampling: Sampling, size=None, dtype=torch.float32, device=None, speed: Speed = Speed()):
        self.size = size or (model.cfg.res, model.cfg.res)
        height, width = latent_size(model.cfg, ae.cfg, self.size)
        in_chain = sampling.sampler in ("ddim", "ddpm")
        if in_chain and model.cfg.predict != "epsilon":
            raise ValueError(f"--sampler {sampling.sampler} is for a model that predicts epsilon on DDPM's clock; this one "
                             "predicts a velocity: use euler or heun, or dpm")
        if sampling.num_steps < 1:
            raise ValueError(f"--num-steps {sampling.num_steps}: at least 1")
        self.model = model
        self.ae = ae
        self.sampling = sampling
        self.dtype = dtype
        self.home = next(model.parameters()).device
        self.device = torch.device(device or self.home)
        self.speed = speed
        self.shape = (model.cfg.in_channels, height, width)
        shift = resolve_shift(sampling.shift, *self.shape, model.cfg.patch_size)
        self.chain = DDPMChain.spaced(sampling.num_steps, ddim=sampling.sampler == "ddim") if in_chain else None
        self.times = time_grid(sampling.num_steps, shift, START.get(sampling.sampler, 0.0))
        self.hoisted = None
        self.evaluate = None
        if self.device.type == "cuda":
            ae.to(memory_format=torch.channels_last)
        if speed.compile:
            compile_layers(model.blocks)
            compile_decoder(ae)

    @torch.no_grad()
    def __call__(self, cond, seeds: list[int], progress: bool = False, seconds: dict | None = None) -> Tensor:
        """Pictures (B,3,H,W) float32 in [-1,1] on the device for a condition of B rows, classes or a Text, and B seeds.
        seconds: receives the times of denoising and decoding."""
        try:
            return self.draw(cond, seeds, progress, {} if seconds is None else seconds)
        except Exception as error:                                   # Inductor and Triton have errors of their own
            if not self.speed.compile:
                raise
            lines = str(error).splitlines() or [""]
            print(f"compiling failed ({type(error).__name__}: {lines[0][:200]}); drawing goes on without it")
        self.close()
        self.speed = replace(self.speed, compile=False, graph=False)
        return self.draw(cond, seeds, progress, {} if seconds is None else seconds)

    def draw(self, cond, seeds: list[int], progress: bool, seconds: dict) -> Tensor:
        cond = cond.to(self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        attention = attention_priority() if self.device.type == "cuda" else nullcontext()
        with timed(seconds, "denoising", self.device), on_device(self.model, self.device), attention:
            with self.arithmetic(self.model):
                z = self.denoise(cond, generators, progress)
            if self.home != self.device:
                self.unhoist()                                       # its tables are of a model that leaves now
        with timed(seconds, "decoding", self.device), on_device(self.ae, self.device), attention:
            with self.arithmetic(self.ae):
                return self.decode(z)

    def arithmetic(self, module):
        """Autocast to the pipeline's type, unless the module's weights have it."""
        needed = self.dtype != torch.float32 and next(module.parameters()).dtype != self.dtype
        # a captured graph would read casts of weights that autocast has thrown away
        return torch.autocast(self.device.type, self.dtype, enabled=needed, cache_enabled=not self.speed.graph)

    def denoise(self, cond, generators, progress: bool = False) -> Tensor:
        """Noise of the generators -> latents (B,C,H,W)."""
        x = noise(generators, self.shape).to(self.device)
        evaluate = self.evaluation(cond)
        if self.chain:
            return self.chain.sample(evaluate, x, self.sampling.sampler == "ddim", generators, progress)
        return integrate(evaluate, x, self.times, self.sampling.sampler, progress)

    def evaluation(self, cond):
        """The guided model as a function of x and its time, hoisted and captured as `speed` has it."""
        scale = self.sampling.cfg_scale
        null = None if scale == 1.0 else self.model.null_condition(cond)
        if self.hoisted and len(self.hoisted.cond) == len(cond):
            self.hoisted.fill(cond, null)
            return self.evaluate
        self.unhoist()
        rows = len(cond) if null is None else 2 * len(cond)
        fits = hoisted_bytes(self.model, self.sampling.num_steps, rows) <= TABLE_LIMIT
        if not (self.speed.hoist and fits):
            return self.guided(cond, null)
        self.hoisted = Hoist(self.model, self.clock(), cond, null)
        self.evaluate = self.guided(self.hoisted.cond, self.hoisted.null)
        if self.speed.graph:
            x = torch.zeros(len(cond), *self.shape, device=self.device)
            self.evaluate = capture(self.evaluate, x, torch.full((len(cond),), self.times[0], device=self.device))
        return self.evaluate

    def guided(self, cond, null):
        call = self.model.forward_native if self.chain else self.model

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return guided_velocity(self.model, x, t, cond, self.sampling.cfg_scale, null, call)
        return evaluate

    def clock(self) -> Tensor:
        """Readings (S,) of the model's own clock at every step."""
        if self.chain:
            return torch.tensor(self.chain.steps, dtype=torch.float32, device=self.device)
        t = torch.tensor(self.times[:-1], device=self.device)
        return self.model.to_native(t.new_zeros(len(t), 1, 1, 1), t)[1]

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pictures (B,3,H,W) in [-1,1]."""
        z = z.to(next(self.ae.parameters()).dtype)
        if self.device.type == "cuda":
            z = z.contiguous(memory_format=torch.channels_last)
        height, width = self.size
        parts = z.split(max(1, 2**22 // (height * width)))           # pixels need more room than tokens
        return torch.cat([self.ae.decode(part).float() for part in parts]).clamp(-1, 1)

    def unhoist(self):
        if self.hoisted:
            self.hoisted.remove()
        self.hoisted = None
        self.evaluate = None

    def close(self):
        """Leave model and autoencoder as they were."""
        self.unhoist()
        if self.speed.compile:
            uncompile(self.model)
            uncompile(self.ae)


@torch.no_grad()
def generate(model, ae, cond, seeds: list[int], sampling: Sampling, size: tuple[int, int] | None = None,
             dtype: torch.dtype = torch.float32, progress: bool = False, device=None, seconds: dict | None = None) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] on the CPU for conditions, classes (B,) or a Text, drawn plainly in batches.
    The rest as for Pipeline. ValueError for a size that does not divide by f p, and for a sampler of another kind of model."""
    pipeline = Pipeline(model, ae, sampling, size, dtype, device)
    starts = range(0, len(cond), sampling.batch)
    images = []
    for i in tqdm(starts, desc="drawing", disable=not progress or len(starts) == 1, leave=False):
        batch = slice(i, i + sampling.batch)
        images.append(pipeline(cond[batch], seeds[batch], progress, seconds).cpu())
    return torch.cat(images)


# ---- pictures on disk ----------------------------------------------------------------------------------------------

def to_uint8(x: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1] -> (B,H,W,3) bytes, rounded: truncating would darken every picture by half a step."""
    return pixels_on_host(x).numpy()


def save_png(path, pixels: np.ndarray, meta: dict | None = None):
    """(H,W,3) bytes as PNG, with the given facts as text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (meta or {}).items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    with atomic(path) as tmp:
        Image.fromarray(pixels).save(tmp, "PNG", pnginfo=info)


def save_grid(path, rows: list[tuple[str, Tensor]], columns: list[str] = (), meta: dict | None = None):
    """A labelled grid: rows = (name, pictures (B,3,H,W) in [-1,1]); names to the left, column titles above, over as many
    lines as they take."""
    H, W = rows[0][1].shape[-2:]
    titles = [textwrap.wrap(column, max(4, W // 6)) for column in columns]      # the font's letters are 6 pixels wide
    name_lines = [line for name, _ in rows for line in name.split("\n")]
    left = 10 + 7 * max(map(len, name_lines))
    top = 4 + 12 * max(map(len, titles)) if titles else 0
    pictures = max(len(x) for _, x in rows)
    sheet = Image.new("RGB", (left + pictures * (W + 2), top + len(rows) * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(titles):
        for k, line in enumerate(lines):
            draw.text((left + j * (W + 2) + 1, 1 + 12 * k), line, fill="black")
    for i, (name, x) in enumerate(rows):
        y = top + i * (H + 2)
        draw.multiline_text((5, y + H // 2 - 8), name, fill="black")
        for j, picture in enumerate(to_uint8(x)):
            sheet.paste(Image.fromarray(picture), (left + j * (W + 2), y))
    save_png(path, np.asarray(sheet), meta)


def thumbnails(images: Tensor, side: int = 512) -> Tensor:
    """(B,3,H,W) -> no side longer than `side`."""
    scale = side / max(images.shape[-2:])
    return images if scale >= 1 else F.interpolate(images, scale_factor=scale, mode="area")


# ---- data sets: what a base draws, to train its successor on -------------------------------------------------------
# A folder of pictures as others keep them: metadata.jsonl has a line a picture, {"file_name", "text", ...}. It is written
# when all pictures are there, so a folder without it is not finished; dataset.json holds the settings from the start.

def note_settings(folder: Path, settings: dict):
    """Write a data set's settings to dataset.json. ValueError if the folder holds other settings, or other pictures."""
    file = folder / "dataset.json"
    settings = json.loads(json.dumps(settings))                      # as they come back: tuples are lists
    noted = json.loads(file.read_text()) if file.exists() else {}
    for key, value in settings.items():
        if noted.get(key, value) != value:
            raise ValueError(f"{folder} holds a data set of another making ({key}: {noted[key]}, now {value}); "
                             "give another --out")
    if not noted and folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.rglob("*")):
        raise ValueError(f"{folder} holds pictures already; give another --out")
    write_json(file, noted | settings)


def write_captions(folder: Path, entries: list[dict]):
    """Write metadata.jsonl, which makes the data set whole."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    with atomic(folder / "metadata.jsonl") as tmp:
        tmp.write_text("".join(lines), encoding="utf-8")


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# ---- scripts: shared flags -----------------------------------------------------------------------------------------

def add_model_args(p: argparse.ArgumentParser, res=int):
    """The flags that choose a model; `load_base`, `load_run` and `load_autoencoder` read them. res: the type of --res."""
    p.add_argument("--base", default="tiny", metavar="NAME|RUN",
                   help=f"pretrained model: {', '.join(BASES)}, or the folder of a finished run (default tiny)")
    p.add_argument("--weights", metavar="PATH", help="the base's weights: a file in any published layout, or a pipeline "
                                                     "folder (default: shipped, or the model hub's cache)")
    p.add_argument("--base-ae-weights", metavar="FILE", help="weight file of the base's own autoencoder (default: as above)")
    sides = ", or WIDTHxHEIGHT" if res is str else ""
    p.add_argument("--res", type=res, help=f"pixels a side{sides} (default: the base's)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
                   help="arithmetic; auto = bf16 where it is faster (default auto)")
    p.add_argument("--seed", type=int, default=0, help="seed; picture i of a batch uses seed + i (default 0)")


def device_here(device: str) -> str:
    """The device of this process, made the current one, since streams, events and graphs are of the current device.
    "cuda" as torchrun means it: every process on a machine has its own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if torch.device(device).index is not None and torch.device(device).type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)
    return device


def dtype_of(args) -> torch.dtype:
    """The type of the arithmetic that --dtype and --device stand for."""
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and bf16_is_fast(args.device))
    return torch.bfloat16 if bf16 else torch.float32


def run_main(main):
    """Run a script's main: a user's error is one line on stderr and exit code 2, an interrupt ends with code 130."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # from here on a second Ctrl-C kills at once, whatever still waits for threads or processes
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def reject(condition, flag: str, why: str):
    if condition:
        raise ValueError(f"{flag}: {why}")


def parse_size(text: str | None, res: int) -> tuple[int, int]:
    """"1024" or "1216x832", width first as everybody writes it -> (H,W) in pixels."""
    sides = str(text or res).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--res {text}: give pixels a side, or WIDTHxHEIGHT, as 1024 or 1216x832")
    return int(sides[-1]), int(sides[0])


def class_names(cfg, info: dict) -> tuple[str, ...]:
    """The names of a model's classes: the run's own, the embedded shapes, or numbers."""
    if info.get("classes"):
        return tuple(info["classes"])
    return SHAPES if cfg.num_classes == len(SHAPES) else tuple(map(str, range(cfg.num_classes)))


def parse_classes(text: list[str] | None, names: tuple[str, ...], count: int) -> Tensor:
    """Class numbers or names -> (B,) indices; None -> the first classes in turn. ValueError names the valid ones."""
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    if not text:
        return torch.arange(count) % len(names)
    picked = []
    for word in text:
        if word in names:
            picked.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            picked.append(int(word))
        else:
            all_names = f" or {', '.join(names)}" if len(names) <= 20 else ""
            raise ValueError(f"--classes {word}: not a class; give 0 .. {len(names) - 1}{all_names}")
    count = max(count, len(picked))
    return torch.tensor(picked).repeat(-(-count // len(picked)))[:count]


def pick_prompts(given: list[str] | None, file: str | None, count: int | None) -> list[str]:
    """The prompts of --prompt and of a file, in turn up to `count` (default: each once)."""
    prompts = (given or []) + (read_prompts(file) if file else [])
    if not prompts:
        raise ValueError("this model draws prompts: give --prompt TEXT (again for another), or --prompts FILE with one on a line")
    if count is not None and count < 1:
        raise ValueError(f"--count {count}: at least 1")
    count = max(count or 0, len(prompts))
    return (prompts * -(-count // len(prompts)))[:count]


def with_guidance(text: Text, guidance: float | None) -> Text:
    """The same number for every prompt; None: none."""
    if guidance is None:
        return replace(text, guidance=None)
    return replace(text, guidance=torch.full((len(text),), guidance, device=text.device))


def choose_sampling(cfg, **given) -> Sampling:
    """How the model's authors draw with it, with what is given, unless None, in its place."""
    return replace(cfg.sampling, **{name: value for name, value in given.items() if value is not None})


def check_flags(cfg, label: str, cfg_scale: float, flags: dict):
    """ValueError for a flag that this kind of model does not have. flags: their values as given, by name."""
    def given(name: str) -> bool:
        return flags[name] not in (None, "")

    if not cfg.text_encoder:
        for name in ("prompt", "prompts", "negative", "guidance", "text_tokens"):
            reject(given(name), f"--{name.replace('_', '-')}", f"{label} draws classes, not prompts: use --classes")
        return
    reject(given("classes"), "--classes", f"{label} draws prompts, not classes: use --prompt")
    reject(given("guidance") and not getattr(cfg, "guidance_embed", False), "--guidance",
           f"{label} is not a distilled model that reads its guidance as a number: use --cfg-scale")
    reject(given("negative") and cfg_scale == 1, "--negative",
           "a negative prompt acts in classifier-free guidance: give --cfg-scale above 1")


# ---- what drawing takes, from the configurations alone -------------------------------------------------------------

def report(cfg, sampling: Sampling, size: tuple[int, int], count: int, dtype: torch.dtype, text_tokens: int | None,
           offload: bool) -> str:
    """Parameters, arithmetic and memory of drawing `count` pictures, in a few lines, counted without weights."""
    batch = min(sampling.batch, count)
    ae_cfg = ae_config(cfg.ae)
    height, width = latent_size(cfg, ae_cfg, size)
    passes = 1 if sampling.cfg_scale == 1 else 2
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg).eval()
        ae = build_autoencoder(ae_cfg).requires_grad_(False).eval()
        x = torch.empty(batch, cfg.in_channels, height, width)
        step = count_cost(model, x, torch.empty(batch), example_condition(cfg, batch, text_tokens))
        decode = count_cost(ae.decode_raw, x[:1])
    step_flops = step.flops * passes
    decode_flops = decode.flops * batch
    total_flops = step_flops * sampling.num_steps + decode_flops

    # bytes: weights and what is alive at once, of one network or, without --offload, of both
    parameters = sum(p.numel() for p in model.parameters())
    decoder_parameters = sum(p.numel() for p in ae.decoder.parameters())
    weights = parameters * dtype.itemsize
    decoder = decoder_parameters * 4
    denoising = weights + step.peak_bytes * passes * dtype.itemsize // 4
    decoding = decoder + decode.peak_bytes * dtype.itemsize // 4
    if not offload:
        denoising += decoder
        decoding += weights

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f} GB"

    def tera(flops: float) -> str:
        return f"{flops / 1e12:,.2f}"

    precision = str(dtype).removeprefix("torch.")
    tokens = height * width // cfg.patch_size**2
    lines = [("model", f"{parameters / 1e6:,.1f}M parameters, {gb(weights)} in {precision}")]
    encoders = TEXT_ENCODERS.get(cfg.text_encoder, ())
    for *_, name, _, millions in encoders:
        lines.append((name, f"{millions:,}M parameters, {gb(millions * 1e6 * dtype.itemsize)}, "
                            "loaded before the model and freed"))
    text = f" and {text_tokens} of text" if encoders else ""
    lines += [
        (cfg.ae, f"decoder {decoder_parameters / 1e6:,.1f}M parameters, {gb(decoder)} in float32"),
        ("picture", f"{size[1]}x{size[0]}, latent {cfg.in_channels}x{height}x{width}, {tokens:,} tokens{text}"),
        ("arithmetic", f"{tera(step_flops)} TFLOPs a step of {batch}, {sampling.num_steps} steps; "
                       f"{tera(decode_flops)} to decode; {tera(total_flops)} in all"),
        ("memory", f"about {gb(denoising)} while denoising, {gb(decoding)} while decoding")]
    return "\n".join(f"{name:22}{value}" for name, value in lines)


# ---- the script ----------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p, res=str)
    p.set_defaults(base=None)
    p.add_argument("--ckpt", metavar="RUN", help="a run's folder or file (default without --base: the newest run in runs/, "
                                                 "else the embedded base)")
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument("--ae-weights", metavar="FILE",
                   help="weight file of the run's deep autoencoder (default: shipped, or the model hub's cache)")
    p.add_argument("--text-encoders", metavar="DIR", help="pipeline folder with the text encoders (default: that of "
                                                          "--weights, or the model hub's cache)")
    p.add_argument("--lora", metavar="PATH",
                   help="a LoRA of diffusers or PEFT to add, a file or a folder with its embedder and head")
    # what to draw
    p.add_argument("--classes", nargs="+", help="class numbers or names (default: all in turn)")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; again for another")
    p.add_argument("--prompts", metavar="FILE", help="prompts, one a line, # for comments")
    p.add_argument("--negative", default="", metavar="TEXT",
                   help="what to keep away from, by --cfg-scale (default: the empty prompt)")
    p.add_argument("--count", type=int, help="pictures (default 8, or one a prompt)")
    p.add_argument("--text-tokens", type=int, help="prompt tokens kept (default: the model's; FLUX 512 or 256)")
    # how to draw it
    p.add_argument("--num-steps", type=int, help="ODE or chain steps (default: the authors' for the model; DiT 25)")
    p.add_argument("--cfg-scale", type=float, help="classifier-free guidance in two passes; 1 = off (default: the authors'; "
                                                   "DiT 3, FLUX 1, SANA 4.5)")
    p.add_argument("--guidance", type=float,
                   help="the number that a distilled model (FLUX) reads, one pass (default 3.5, flux-krea 4.5)")
    p.add_argument("--sampler", choices=(*SOLVERS, "ddim", "ddpm"),
                   help="default: euler; dpm for SANA; ddpm for DiT as published")
    p.add_argument("--shift", help="resolution shift of the time grid: a number, 1 = off, or "
                                   f"{' or '.join(SHIFTS)} (default: the one trained with)")
    p.add_argument("--batch", type=int, help="pictures at a time (default 64, with prompts 1)")
    p.add_argument("--offload", action="store_true", help="model and autoencoder are on the device only for their part")
    speed = p.add_mutually_exclusive_group()
    speed.add_argument("--fast", dest="fast", action="store_true", default=None,
                       help="compile, and capture on a GPU (default: on a GPU, if enough pictures pay for that minute)")
    speed.add_argument("--eager", dest="fast", action="store_false", help="never compile")
    # what comes of it
    p.add_argument("--dry-run", action="store_true", help="print memory and arithmetic, and stop; touches no weights")
    p.add_argument("--export", metavar="DIR", help="write model and autoencoder as a diffusers folder, LoRA merged (and "
                                                   "beside it in lora/), and stop")
    p.add_argument("--dataset", action="store_true", help="draw a training set into --out, with captions in "
                                                          "metadata.jsonl; the same command goes on with it")
    p.add_argument("--out", help="folder for the pictures (default: samples/ in the run, or runs/samples-BASE)")
    return p


def load_models(ckpt, base: str, weights: str | None, ae_weights: str | None, raw: bool, lora: str | None, device,
                dtype: torch.dtype, ae_dtype: torch.dtype):
    """A run or a base, with a LoRA of others merged into it, and its autoencoder -> model, autoencoder."""
    if ckpt:
        model, info = load_run(ckpt, device, not raw, weights, dtype)
        kind = "moving average" if Path(info["file"]).name.startswith("ema") else "weights as trained"
        print(f"{info['file']}: {kind}, base {info['base']}, latents of {model.cfg.ae}")
    else:
        model, info = load_base(base, weights, device, dtype)
    if lora:
        left_out = load_peft(merge_lora(model), lora)
        without = f", without {', '.join(left_out)}, which are bound to another latent space" if left_out else ""
        print(f"{lora}: added{without}")
    ae_weights = ae_weights or info.get("ae_weights") or (None if ckpt else ae_folder(base, weights))
    return model, load_autoencoder(model.cfg.ae, ae_weights, ae_dtype, device)


@dataclass(frozen=True)
class Pictures:
    """What a command draws: for each picture its title (prompt or class name), seed and file name; and how."""
    titles: list[str]
    seeds: list[int]
    files: list[str]
    facts: dict                         # written into every picture
    negative: str | None = None         # of prompts; None: the titles are classes

    def __len__(self) -> int:
        return len(self.seeds)

    def meta(self, i: int) -> dict:
        """The text fields of picture i."""
        kind = {"class": self.titles[i]} if self.negative is None else {"prompt": self.titles[i], "negative": self.negative}
        return kind | {"seed": str(self.seeds[i]), "dcgen": self.facts}

    def caption(self, i: int) -> dict:
        """The line of picture i in a data set's metadata.jsonl."""
        about = dict(steps=self.facts["num_steps"], guidance=self.facts.get("guidance"), cfg_scale=self.facts["cfg_scale"])
        return dict(file_name=self.files[i], text=self.titles[i], seed=self.seeds[i]) | about


def write_pictures(pipeline: Pipeline, condition, batches: list[Tensor], pictures: Pictures, out: Path, seconds: dict,
                   shown: int = 64) -> list[Tensor]:
    """Draw batches of picture numbers and write each as it comes: 50 000 do not fit in memory. condition(rows) is theirs.
    Returns thumbnails of the first few."""
    small = []
    for rows in tqdm(batches, desc="drawing", disable=len(batches) < 2, leave=False):
        seeds = [pictures.seeds[i] for i in rows]
        images = pipeline(condition(rows), seeds, len(batches) < 2, seconds)
        for i, pixels in zip(rows.tolist(), to_uint8(images)):
            save_png(out / pictures.files[i], pixels, pictures.meta(i))
        small += list(thumbnails(images)[: shown - len(small)].cpu())
    return small


def main(argv=None):
    args = parser().parse_args(argv)
    if args.ckpt and args.base:
        raise ValueError("--base and --ckpt each name a model; give one of them")
    reject(args.dataset and not args.out, "--dataset", "name its folder with --out DIR")
    device = device_here(args.device)
    dtype = dtype_of(args)
    ckpt = args.ckpt or (None if args.base else newest_run())
    base = args.base or "tiny"
    run = run_file(ckpt, not args.raw) if ckpt else None
    cfg, info = read_run_config(run) if ckpt else read_base_config(base)
    label = str(ckpt or base)

    # whatever is wrong is found here, before any weights are read
    sampling = choose_sampling(
        cfg, num_steps=args.num_steps, cfg_scale=args.cfg_scale, guidance=args.guidance, sampler=args.sampler,
        shift=args.shift, batch=args.batch)
    size = parse_size(args.res, cfg.res)
    resolve_shift(sampling.shift, cfg.in_channels, *latent_size(cfg, ae_config(cfg.ae), size), cfg.patch_size)
    check_flags(cfg, label, sampling.cfg_scale, vars(args))
    text_tokens = args.text_tokens or getattr(cfg, "text_tokens", None)
    if cfg.text_encoder:
        any_prompt = [""] if args.dry_run or args.export else None
        titles = pick_prompts(args.prompt or (None if args.prompts else any_prompt), args.prompts, args.count)
    else:
        names = class_names(cfg, info)
        labels = parse_classes(args.classes, names, 8 if args.count is None else args.count)
        titles = [names[k] for k in labels]
    if args.dry_run:
        print(report(cfg, sampling, size, len(titles), dtype, text_tokens, args.offload))
        return

    weights_dtype = dtype if cfg.text_encoder else torch.float32
    on_gpu = torch.device(device).type == "cuda" and not args.export
    load = partial(
        load_models, ckpt, base, args.weights, args.ae_weights or args.base_ae_weights, args.raw, args.lora,
        "cpu" if args.offload or args.export else device, weights_dtype, weights_dtype if on_gpu else torch.float32)
    if args.export:
        export(*load(), Path(args.export))
        return

    seeds = [args.seed + i for i in range(len(titles))]
    files = [f"{i:05d}_seed{seed}.png" for i, seed in enumerate(seeds)]
    facts = {key: getattr(sampling, key) for key in ("sampler", "num_steps", "cfg_scale", "shift")}
    facts["model"] = config_dict(cfg)
    folder = None
    if cfg.text_encoder:
        guidance = sampling.guidance if getattr(cfg, "guidance_embed", False) else None
        facts |= dict(guidance=guidance, text_tokens=text_tokens)
        folder = text_folder(label, cfg, args.text_encoders, args.weights)
    elif args.dataset:
        files = [f"{k:04d}/{file}" for k, file in zip(labels.tolist(), files)]      # a folder a class: data.ImageFolder
    batches = list(torch.arange(len(titles)).split(sampling.batch))
    if args.dataset:
        out = Path(args.out)
        encoders = [found[-1] for found in find_encoders(cfg.text_encoder, folder)] if cfg.text_encoder else None
        note_settings(out, facts | dict(
            prompts=short_hash(titles), count=len(titles), seed=args.seed, size=size, batch=sampling.batch,
            dtype=str(dtype), negative=args.negative, encoders=short_hash(encoders)))
        # whole batches, always the same: in another one the last bit of a picture may differ
        batches = [rows for rows in batches if not all((out / files[i]).exists() for i in rows)]

    # text before the model: 10 GB of encoders are freed when it is loaded
    seconds = {}
    if cfg.text_encoder and batches:
        with timed(seconds, "text", device):
            texts = cache_prompts(
                cfg.text_encoder, folder, titles, text_tokens, args.negative, dtype=dtype, device=device)

    def condition(rows: Tensor):
        return with_guidance(texts[rows], guidance) if cfg.text_encoder else labels[rows]

    model, ae = load()
    if args.dataset:
        note_settings(out, dict(weights=fingerprint(model), autoencoder=fingerprint(ae)))
    if cfg.text_encoder and batches:
        model.null = texts.null
    facts["weights"] = str(run or base)
    pictures = Pictures(titles, seeds, files, facts, args.negative if cfg.text_encoder else None)
    out = Path(args.out or (run.parent / "samples" if run else f"runs/samples-{Path(base).name}"))
    drawn = sum(map(len, batches))
    speed = choose_speed(drawn, sampling, device, args.fast, args.offload)
    print(describe_speed(speed))
    start = time.perf_counter()
    pipeline = Pipeline(model, ae, sampling, size, dtype, device, speed)
    small = write_pictures(pipeline, condition, batches, pictures, out, seconds)
    total = time.perf_counter() - start + seconds.get("text", 0.0)
    if args.dataset:
        write_captions(out, [pictures.caption(i) for i in range(len(pictures))])
        also = f"whole, {len(pictures)} pictures with captions in metadata.jsonl"
    else:
        grid = out.with_name(f"{out.name}-grid.png")                 # beside the folder, which so holds samples only
        rows = [(f"seed {seeds[i]} +", torch.stack(small[i : i + 8])) for i in range(0, len(small), 8)]
        save_grid(grid, rows, titles if len(titles) <= 8 else (), {"dcgen": facts})
        also = f"and {grid}"
    parts = ", ".join(f"{what} {s:.1f} s" for what, s in seconds.items())
    print(f"wrote {drawn} pictures to {out}/ {also} ({total:.1f} s, {total / max(1, drawn):.2f} s each: {parts}; "
          f"peak {peak_gib(device):.1f} GiB)")


if __name__ == "__main__":
    run_main(main)
