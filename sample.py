"""Draw pictures: the path from noise to data, its ODE, guidance.

    x0 noise, x1 data, t in [0,1]:  x_t = (1-t) x0 + t x1,  v = x1 - x0,  Euler: x <- x + (t_next - t) v(x, t)

Forward (`path`, for training) and reverse (`integrate`, for sampling) of the one ODE stand on the first page;
then DDPM's chain, for DiT as it was published, and `Pipeline`, which puts on what makes it fast (fast.py).

    python sample.py                                   the newest run, or the bundled base if there is none
    python sample.py --base dit-xl --classes "golden retriever" 360      an official model
    python sample.py runs/finetune-tiny-1 --cfg-scale 3 --num-steps 50 --seed 7
    python sample.py --base dc-gen-flux-1k --prompt "a lighthouse at dusk" --res 1216x832
    python sample.py --base sana-4.8b --prompts FILE --dry-run           memory and arithmetic, no weights
    python sample.py --base dc-gen-flux-4k --prompt TEXT --quant nvfp4   in few bits; or a folder of quant.py
    python sample.py --base sana-4.8b --prompts FILE --out DIR --dataset a training set, drawn by a base
"""

import hashlib
import json
import math
import textwrap
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    BASES, FAMILIES, SHIFTS, Sampling, cat_conditions, ddpm_alphas_cumprod, resolve_shift, to_float32)
from lora import merge_lora
from autoencoder import ae_config, build_autoencoder
from checkpoints import (
    ae_folder, atomic, check_exportable, check_writable, config_dict, export, fingerprint, load_autoencoder,
    load_base, load_peft, load_run, newest_run, read_base_config, read_run_config, run_file, write_json)
from data import SUFFIXES, TEXT_ENCODERS, cache_prompts, check_encoders, find_encoders, text_folder
from fast import (
    Hoist, capture, compile_blocks, compile_decoder, count_cost, example_condition, fast_kernels, numbered,
    on_device, peak_gib, pixels_on_host, timed, uncompile)
from flags import (
    Parser, add_model_args, at_least, check_base, check_finite, check_flags, check_paths, check_pictures,
    choose_sampling, class_names, device_here, dtype_of, guidance_of, parse_classes, parse_size, pick_prompts,
    reject, run_main, with_guidance, within)
from quant import (
    FORMATS, QuantLinear, arithmetic, calibration_batch, empty_quantised, format_name, load_quantised,
    quantise_model, weight_bytes)


# ---- the path and its ODE ------------------------------------------------------------------------

def path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Straight path from noise to data, and its velocity. (arXiv 2509.25180, Sec. 3.3)
    x0, x1 (B,C,H,W), t (B,) -> x_t, v, both (B,C,H,W)"""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * x1, x1 - x0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift: noise level s = 1 - t becomes r s / (1 + (r - 1) s). Larger latents bury less at the
    same noise level, so r > 1 spends more of the clock near the noise. 1 = off.
    Written so that 0, 1 and r = 1 come out exact."""
    return t / (t + shift * (1 - t))


def sample_t(n: int, generator=None, kind="logit-normal", shift: float = 1.0, device="cpu") -> Tensor:
    """Training times (n,) in (0,1): logit-normal(0,1) as in the authors' code, or uniform; then shifted."""
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
    """One generator a picture, on the CPU, float32: picture i of a batch is the picture of its seed alone,
    anywhere. -> (len(generators), *shape)"""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def guided_velocity(model, x: Tensor, t: Tensor, y, cfg_scale: float, null=None, call=None) -> Tensor:
    """Classifier-free guidance, v_null + s (v_cond - v_null), both halves in one batch; s = 1 is one pass, no
    guidance. call: which function of the model to guide (default: its velocity)."""
    call = call or model
    if cfg_scale == 1.0:
        return call(x, t, y)
    if null is None:
        null = model.null_condition(y)
    # one batch of twice the size is faster than two passes
    both = call(torch.cat([x, x]), torch.cat([t, t]), cat_conditions([y, null]))     # 2B C H W
    return extrapolate(model, both, cfg_scale)


def extrapolate(model, both: Tensor, cfg_scale: float) -> Tensor:
    """Outputs with and without condition, one behind the other (2B,C,H,W) -> the guided one (B,C,H,W).
    DiT as published guides three of its four channels; a learned variance is never guided."""
    cond, uncond = to_float32(both).chunk(2)
    out = uncond + cfg_scale * (cond - uncond)
    k = model.cfg.guided_channels or model.cfg.in_channels
    return torch.cat([out[:, :k], cond[:, k:]], dim=1)


SOLVERS = ("euler", "heun", "dpm")
START = {"dpm": 1e-3}                   # where a solver's clock starts: log(t / (1-t)) has to be finite


def integrate(velocity, x: Tensor, times: list[float], method="euler", progress=False, each=None) -> Tensor:
    """Follow dx/dt = velocity(x, t) over the grid of times. x (B,C,H,W); velocity takes t (B,).
    each(x): called after every step.

    euler  one evaluation a step, first order
    heun   two, second order, except for the last step
    dpm    one, second order: DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), SANA's solver. On the straight path
           its step is Euler's towards a guess of the data that goes on as the last two guesses went, in units
           of log(t / (1-t)); the last step, at whose end that is infinite, takes the guess as it is"""
    def at(t: float) -> Tensor:
        return torch.full((len(x),), t, device=x.device)

    guess = None                                                     # the last guess of the data
    before = None                                                    # and its time
    for a, b in tqdm(list(zip(times, times[1:])), desc=method, leave=False, disable=not progress or None):
        v = velocity(x, at(a)).float()
        # the mean of the slopes at both ends of the step
        if method == "heun" and b < 1.0:
            v = 0.5 * (v + velocity(x + (b - a) * v, at(b)).float())
        if method == "dpm":
            last, guess = guess, x + (1 - a) * v
            # the first and the last step have no second guess to go by
            if last is not None and b < 1.0:
                ratio = (log_snr(b) - log_snr(a)) / (log_snr(a) - log_snr(before))
                v = v + 0.5 * ratio * (guess - last) / (1 - a)
            before = a
        x = x + (b - a) * v
        if each:
            each(x)
    return x


def log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if t > 0 else -math.inf


# ---- DDPM's chain, for DiT as published ----------------------------------------------------------

class DDPMChain:
    """The discrete diffusion that DiT was trained on, over a subset of its 1000 steps.
    steps: the kept step numbers, rising; the betas are recomputed so that alpha-bar at each kept step stays.
    (arXiv 2006.11239, 2102.09672)"""

    def __init__(self, steps: list[int] | None = None):
        # float64: products of a thousand betas
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
        """n of the 1000 steps: spread over both ends (DiT's default), or DDIM's constant stride from 0."""
        if not 1 <= n <= 1000:
            raise ValueError(f"--num-steps {n}: the chain has 1000 steps; give 1 .. 1000")
        if not ddim:
            return cls([round(i * 999 / max(n - 1, 1)) for i in range(n)])
        steps = list(range(0, 1000, -(-1000 // n)))
        if len(steps) != n:
            raise ValueError(f"--num-steps {n}: DDIM wants a constant stride over 1000 steps; the nearest is "
                             f"{len(steps)}")
        return cls(steps)

    def at(self, table: Tensor, i, like: Tensor) -> Tensor:
        """Entries of a table at places i, a number or (B,), to be multiplied with (B,C,H,W)."""
        i = torch.as_tensor(i).cpu()
        return table[i].to(like.device, torch.float32).reshape(-1, 1, 1, 1)

    def predict(self, out: Tensor, x: Tensor, i) -> tuple[Tensor, Tensor, Tensor]:
        """Network output (B,2C,H,W), its state and place -> mean and log variance of the next state, data."""
        eps, v = out.chunk(2, dim=1)
        low = self.at(self.log_var, i, x)
        high = self.at(self.log_beta, i, x)
        log_var = low + (v + 1) / 2 * (high - low)
        x1 = self.at((1 / self.ab).sqrt(), i, x) * x - self.at((1 / self.ab - 1).sqrt(), i, x) * eps
        mean = self.at(self.coef_x1, i, x) * x1 + self.at(self.coef_x, i, x) * x
        return mean, log_var, x1

    def sample(self, network, x: Tensor, ddim: bool, generators=None, progress=False, each=None) -> Tensor:
        """From noise to data: ancestral steps with the learned variance, drawn from one generator a picture,
        or DDIM's deterministic ones (eta 0).
        network(x, clock) -> (B,2C,H,W). each(x): called after every step."""
        name = "ddim" if ddim else "ddpm"
        places = range(len(self.steps) - 1, -1, -1)
        for i in tqdm(places, desc=name, leave=False, disable=not progress or None):
            clock = torch.full((len(x),), float(self.steps[i]), device=x.device)
            out = network(x, clock).float()
            mean, log_var, x1 = self.predict(out, x, i)
            # the last step's mean is the picture: nothing is added to it
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


# ---- how fast ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Speed:
    """What of fast.py is put on, and why. Attention's choice, the decoder's memory format and bytes to the
    host cost nothing: a GPU always has them."""
    hoist: bool = False                 # modulations and text once an image
    compile: bool = False               # blocks and decoder
    graph: bool = False                 # one captured evaluation, replayed
    why: str = ""

    def __str__(self):
        parts = {"modulations hoisted": self.hoist, "compiled": self.compile, "eager": not self.compile,
                 "steps captured": self.graph}
        return f"{', '.join(name for name, on in parts.items() if on)} ({self.why})"


# a minute of compiling over the 30 ms that FLUX at 1K gains in each evaluation of the model
COMPILING_PAYS = 2000
TABLE_ROWS = 4096                       # hoisted: 2 MB each in FLUX, 0.4 MB in DiT-XL


def choose_speed(pictures: int, sampling: Sampling, device, fast: bool | None = None, offload=False) -> Speed:
    """What pays when this many pictures are drawn.
    fast     True compiles in any case, False never (None: if it pays)
    offload  the model leaves the device between its parts: a captured graph would read freed memory"""
    cuda = torch.device(device).type == "cuda"
    evaluations = math.ceil(pictures / sampling.batch) * sampling.num_steps
    compiled = fast
    why = "--fast" if fast else "--eager"
    if fast is None:
        compiled = cuda and evaluations >= COMPILING_PAYS
        enough = "enough" if compiled else "too few"
        why = f"{evaluations:,} evaluations, {enough} for a minute of compiling" if cuda else "on a CPU"
    return Speed(hoist=cuda or compiled, compile=compiled, graph=cuda and compiled and not offload, why=why)


# ---- noise and a condition in, pictures out ------------------------------------------------------

def latent_size(cfg, ae_cfg, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels (H,W) -> the latent's (H,W). ValueError for sizes that do not divide by f p."""
    def written(H: int, W: int) -> str:
        return f"{H}" if H == W else f"{W}x{H}"

    H, W = size
    unit = ae_cfg.f * cfg.patch_size
    if H % unit or W % unit:
        down = written(*(max(unit, side // unit * unit) for side in size))
        up = written(*(-(-side // unit) * unit for side in size))
        nearest = up if up == down else f"{down} or {up}"
        raise ValueError(f"--res {written(H, W)}: {ae_cfg.name} with patch {cfg.patch_size} needs a multiple "
                         f"of {unit}; try {nearest}")
    return H // ae_cfg.f, W // ae_cfg.f


def make_clock(cfg, sampling: Sampling, shape: tuple[int, int, int]) -> tuple[DDPMChain | None, list[float]]:
    """The chain of a sampler, or None for an ODE, and the ODE's times, for latents of this shape (C,H,W).
    ValueError for a sampler of another kind of model, and for steps or a shift that it does not have."""
    in_chain = sampling.sampler in ("ddim", "ddpm")
    if in_chain and cfg.predict != "epsilon":
        raise ValueError(f"--sampler {sampling.sampler} is for a model that predicts epsilon on DDPM's "
                         "clock; this one predicts a velocity: use euler or heun, or dpm")
    if sampling.num_steps < 1:
        raise ValueError(f"--num-steps {sampling.num_steps}: at least 1")
    chain = DDPMChain.spaced(sampling.num_steps, sampling.sampler == "ddim") if in_chain else None
    shift = resolve_shift(sampling.shift, *shape, cfg.patch_size)
    return chain, time_grid(sampling.num_steps, shift, START.get(sampling.sampler, 0.0))


class Pipeline:
    """A model, its autoencoder, how to sample, and a size: pictures for conditions and seeds, batch by batch.

    size    (H,W) in pixels (default: the model's own)
    dtype   of the arithmetic; under autocast where the weights have another
    device  where to work (default: the model's); what comes from elsewhere is there for its part only
    speed   what of fast.py is put on; `close` takes it off again

    ValueError for a size that does not divide by f p, and for a sampler of another kind of model."""

    def __init__(self, model, ae, sampling: Sampling, size: tuple[int, int] | None = None,
                 dtype: torch.dtype = torch.float32, device=None, speed: Speed = Speed()):
        self.size = size or (model.cfg.res, model.cfg.res)
        self.shape = (model.cfg.in_channels, *latent_size(model.cfg, ae.cfg, self.size))
        self.chain, self.times = make_clock(model.cfg, sampling, self.shape)
        self.model = model
        self.ae = ae
        self.sampling = sampling
        self.dtype = dtype
        self.home = next(model.parameters()).device
        self.device = numbered(device or self.home)
        self.speed = speed
        self.hoisted = None
        self.evaluate = None
        # cuDNN's convolutions want channels last, and convert at every layer otherwise
        if self.device.type == "cuda":
            ae.to(memory_format=torch.channels_last)
        # nothing happens yet: a layer compiles at its first call
        if speed.compile:
            compile_blocks(model.blocks)
            compile_decoder(ae)

    @torch.no_grad()
    def __call__(self, cond, seeds: list[int], progress=False, seconds: dict | None = None) -> Tensor:
        """Pictures (B,3,H,W) float32 in [-1,1] on the device, for a condition of B rows, classes or a Text,
        and B seeds. seconds: receives the times of denoising and decoding."""
        seconds = {} if seconds is None else seconds
        try:
            return self.draw(cond, seeds, progress, seconds)
        except Exception as error:
            # Inductor and Triton have errors of their own
            if not self.speed.compile:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"compiling failed ({reason}); drawing goes on without it")
        self.close()
        self.speed = replace(self.speed, compile=False, graph=False)
        return self.draw(cond, seeds, progress, seconds)

    def draw(self, cond, seeds: list[int], progress: bool, seconds: dict) -> Tensor:
        cond = cond.to(self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        kernels = partial(fast_kernels, self.device, self.dtype)
        with timed(seconds, "denoising", self.device), on_device(self.model, self.device), kernels():
            with self.autocast(self.model):
                z = self.denoise(cond, generators, progress)
            if self.home != self.device:
                # the tables belong to a model that leaves now
                self.unhoist()
        with timed(seconds, "decoding", self.device), on_device(self.ae, self.device), kernels():
            with self.autocast(self.ae):
                return self.decode(z)

    def autocast(self, module):
        """Autocast to the pipeline's type, unless all of the module's weights have it."""
        needed = self.dtype != torch.float32 and any(p.dtype != self.dtype for p in module.parameters())
        # a captured graph would read casts of weights that autocast has freed
        cache = not self.speed.graph
        return torch.autocast(self.device.type, self.dtype, enabled=needed, cache_enabled=cache)

    def denoise(self, cond, generators: list[torch.Generator], progress=False) -> Tensor:
        """Latents (B,C,H,W) from the generators' noise."""
        x = noise(generators, self.shape).to(self.device)
        evaluate = self.evaluation(cond)
        if self.chain:
            return self.chain.sample(evaluate, x, self.sampling.sampler == "ddim", generators, progress)
        return integrate(evaluate, x, self.times, self.sampling.sampler, progress)

    def evaluation(self, cond):
        """The guided model as a function of x and its time, hoisted and captured as `speed` has it."""
        null = None if self.sampling.cfg_scale == 1.0 else self.model.null_condition(cond)
        # another batch of the same size: new tables in the same places, the same graph
        if self.hoisted and len(self.hoisted.cond) == len(cond):
            self.hoisted.fill(cond, null)
            return self.evaluate
        self.unhoist()
        rows = len(cond) if null is None else 2 * len(cond)
        if not self.speed.hoist or self.sampling.num_steps * rows > TABLE_ROWS:
            return self.guided(cond, null)
        self.hoisted = Hoist(self.model, self.clock(), cond, null)
        self.evaluate = self.guided(self.hoisted.cond, self.hoisted.null)
        if self.speed.graph:
            x = torch.zeros(len(cond), *self.shape, device=self.device)
            t = torch.full((len(cond),), self.times[0], device=self.device)
            self.evaluate = capture(self.evaluate, x, t)
        return self.evaluate

    def guided(self, cond, null):
        call = self.model.forward_native if self.chain else self.model

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return guided_velocity(self.model, x, t, cond, self.sampling.cfg_scale, null, call)
        return evaluate

    def clock(self) -> Tensor:
        """Readings (S,) of the model's own clock, one a step."""
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


def generate(model, ae, cond, seeds, sampling: Sampling | None = None, size: tuple[int, int] | None = None,
             dtype=torch.float32, progress=False, device=None, seconds: dict | None = None) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] on the CPU for conditions, classes (B,) or a Text, and as many seeds,
    drawn eagerly in batches of sampling.batch (default: the model's own sampling). The rest as for
    Pipeline."""
    sampling = sampling or model.cfg.sampling
    if len(seeds) != len(cond):
        raise ValueError(f"{len(cond)} conditions and {len(seeds)} seeds: every picture needs one of each")
    pipeline = Pipeline(model, ae, sampling, size, dtype, device)
    starts = range(0, len(cond), sampling.batch)
    images = []
    for i in tqdm(starts, desc="drawing", disable=not progress or len(starts) == 1 or None, leave=False):
        batch = slice(i, i + sampling.batch)
        images.append(pipeline(cond[batch], list(seeds[batch]), progress, seconds).cpu())
    return torch.cat(images)


def conditions(model, wanted: list[str], info: dict | None = None, encoders=None):
    """What `generate` takes for a list of class names or numbers, (B,), or of prompts, a Text with the
    guidance that the model's authors draw with. The prompts' null condition becomes the model's.
    info: what load_base gave with the model; encoders: a pipeline folder with the text encoders."""
    cfg = model.cfg
    info = info or {}
    if not cfg.text_encoder:
        return parse_classes(wanted, class_names(cfg, info), len(wanted))
    device = next(model.parameters()).device
    folder = text_folder(info.get("base", "the model"), cfg, encoders, None)
    texts = cache_prompts(cfg.text_encoder, folder, wanted, cfg.text_tokens, device=device)
    model.null = texts.null.to(device)
    return with_guidance(texts[:], guidance_of(cfg, cfg.sampling))


# ---- pictures on disk ----------------------------------------------------------------------------

def to_uint8(x: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1] -> (B,H,W,3) bytes, rounded: truncating would darken a picture by half a step."""
    return pixels_on_host(x).numpy()


def save_png(path, pixels: np.ndarray, meta: dict | None = None):
    """Write (H,W,3) bytes as PNG, with the given facts as text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (meta or {}).items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    with atomic(path) as tmp:
        Image.fromarray(pixels).save(tmp, "PNG", pnginfo=info)


def save_grid(path, rows: list[tuple[str, Tensor]], columns: list[str] = (), meta: dict | None = None):
    """Write a labelled grid: rows = (name, pictures (B,3,H,W) in [-1,1]); names to the left, column titles
    above, over as many lines as they take."""
    H, W = rows[0][1].shape[-2:]
    titles = [textwrap.wrap(column, max(4, W // 6)) for column in columns]      # letters are 6 pixels wide
    left = 10 + 7 * max(len(line) for name, _ in rows for line in name.split("\n"))
    top = 4 + 12 * max(map(len, titles)) if titles else 0
    across = max(len(x) for _, x in rows)
    # two pixels between neighbours
    sheet = Image.new("RGB", (left + across * (W + 2), top + len(rows) * (H + 2)), "white")
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


# ---- results of other settings are not overwritten ------------------------------------------------

def free_path(path, settings: str) -> Path:
    """Where results of these settings go, a digest of short_hash: to `path`, if nothing is there or the same
    settings made it, since they make the same; else to path-2, path-3 ... A line says so."""
    path = Path(path)
    suffix = "" if path.is_dir() else path.suffix
    place = path
    n = 1
    while is_taken(place) and settings_of(place) != settings:
        n += 1
        place = path.with_name(f"{path.name.removesuffix(suffix)}-{n}{suffix}")
    if place != path:
        print(f"{path} holds results of other settings and stays; the new ones go to {place}")
    return place


def is_taken(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def settings_of(path: Path) -> str | None:
    """The digest in a picture, in a folder of pictures or in a JSON file; None if it has none."""
    file = min(path.glob("*.png"), default=path) if path.is_dir() else path
    try:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                return picture.info.get("settings")
        return json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# ---- data sets: what a base draws, to train its successor on -------------------------------------
# A folder of pictures as others keep them: metadata.jsonl has a line a picture, {"file_name", "text", ...}.
# It is written last, so without it a folder is not finished. dataset.json has the settings from the start.

def note_settings(folder: Path, settings: dict):
    """Write a data set's settings to dataset.json. ValueError if other ones, or other pictures, are there."""
    file = folder / "dataset.json"
    settings = json.loads(json.dumps(settings))                      # as they come back: tuples become lists
    noted = json.loads(file.read_text()) if file.exists() else {}
    for key, value in settings.items():
        if noted.get(key, value) != value:
            raise ValueError(f"{folder} holds a data set of another making ({key}: {noted[key]}, "
                             f"now {value}); give another --out")
    if not noted and folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.rglob("*")):
        raise ValueError(f"{folder} holds pictures already; give another --out")
    write_json(file, noted | settings)


def write_captions(folder: Path, entries: list[dict]):
    """Write metadata.jsonl, which makes the data set whole."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    with atomic(folder / "metadata.jsonl") as tmp:
        tmp.write_text("".join(lines), encoding="utf-8")


# ---- the script ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Request:
    """What a command draws, and how."""
    cfg: object
    sampling: Sampling
    size: tuple[int, int]               # (H,W) in pixels
    dtype: torch.dtype
    source: str                         # a run's file, or a base
    run: Path | None                    # that file
    label: str                          # what errors call the model
    titles: list[str]                   # the prompt or class name of each picture
    seed: int                           # of the first picture; they count up
    labels: Tensor | None = None        # of a class model
    negative: str = ""                  # of a text model
    text_tokens: int | None = None
    dataset: bool = False
    quant: dict | None = None           # form, rank, activations: what the weights are quantised to
    quantised: bool = False             # they are already
    digest: str = ""                    # of the settings and the weights

    def __len__(self) -> int:
        return len(self.titles)

    @property
    def guidance(self) -> float | None:
        """The number that a distilled model reads."""
        return guidance_of(self.cfg, self.sampling)

    def facts(self) -> dict:
        """What stands in every picture."""
        facts = {key: getattr(self.sampling, key) for key in ("sampler", "num_steps", "cfg_scale", "shift")}
        facts["model"] = config_dict(self.cfg)
        if self.quant:
            facts["quant"] = format_name(self.quant)
        if self.cfg.text_encoder:
            facts |= dict(guidance=self.guidance, text_tokens=self.text_tokens)
        return facts

    def settings(self) -> dict:
        """What the pictures depend on besides the weights."""
        return self.facts() | dict(
            prompts=short_hash(self.titles), count=len(self), seed=self.seed, size=self.size,
            dtype=str(self.dtype), negative=self.negative)

    def file(self, i: int) -> str:
        """The name of picture i; a data set of classes has a folder a class, as data.ImageFolder reads it."""
        folder = f"{int(self.labels[i]):04d}/" if self.dataset and not self.cfg.text_encoder else ""
        return f"{folder}{i:05d}_seed{self.seed + i}.png"

    def meta(self, i: int) -> dict:
        """The text fields of picture i."""
        title = {"class": self.titles[i]}
        if self.cfg.text_encoder:
            title = {"prompt": self.titles[i], "negative": self.negative}
        facts = self.facts() | {"weights": self.source}
        return title | {"seed": str(self.seed + i), "dcgen": facts, "settings": self.digest}

    def caption(self, i: int) -> dict:
        """The line of picture i in a data set's metadata.jsonl."""
        return dict(file_name=self.file(i), text=self.titles[i], seed=self.seed + i,
                    steps=self.sampling.num_steps, guidance=self.guidance, cfg_scale=self.sampling.cfg_scale)


def report(request: Request, offload: bool) -> str:
    """Parameters, arithmetic and memory of drawing, in a few lines, counted without weights."""
    cfg = request.cfg
    sampling = request.sampling
    bytes_each = request.dtype.itemsize
    ae_cfg = ae_config(cfg.ae)
    H, W = latent_size(cfg, ae_cfg, request.size)
    batch = min(sampling.batch, len(request))
    passes = 1 if sampling.cfg_scale == 1 else 2
    # on meta: shapes without numbers, so that the largest model is counted anywhere
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg).eval()
        ae = build_autoencoder(ae_cfg).requires_grad_(False).eval()
        x = torch.empty(batch, cfg.in_channels, H, W)
        t = torch.empty(batch)
        cond = example_condition(cfg, batch, request.text_tokens)
        step = count_cost(model, x, t, cond)
        decode = count_cost(ae.decode_raw, x[:1])
    # counted in float32, but for few bits, which have a type of their own
    step_bytes = step.peak_bytes * passes * bytes_each // 4
    precision = str(request.dtype).removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters())
    weights = parameters * bytes_each
    calibrating = None
    if request.quant:
        if request.quant["form"] != "fp8" and not request.quantised:
            calibrating = calibration_bytes(request, model, step_bytes / batch)
        model = empty_quantised(cfg, dtype=request.dtype, **request.quant)
        with torch.device("meta"):
            step_bytes = count_cost(model, x, t, cond).peak_bytes * passes
        precision = f"{format_name(request.quant)}, the rest in {precision}"
        weights = weight_bytes(model)
    step_flops = step.flops * passes
    decode_flops = decode.flops * batch
    total_flops = step_flops * sampling.num_steps + decode_flops

    # of one network, or without --offload of both: weights, and what is alive at one time
    decoder_parameters = sum(p.numel() for p in ae.decoder.parameters())
    decoder = decoder_parameters * 4
    denoising = weights + step_bytes + (0 if offload else decoder)
    decoding = decoder + decode.peak_bytes * bytes_each // 4 + (0 if offload else weights)

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f} GB"

    def tera(flops: float) -> str:
        return f"{flops / 1e12:,.2f}"

    encoders = TEXT_ENCODERS.get(cfg.text_encoder, ())
    text = f" and {request.text_tokens} of text" if encoders else ""
    tokens = H * W // cfg.patch_size**2
    lines = [("model", f"{parameters / 1e6:,.1f}M parameters, {gb(weights)} in {precision}")]
    for encoder in encoders:
        size = gb(encoder.millions * 1e6 * bytes_each)
        about = f"{encoder.millions:,}M parameters, {size}, freed before the model is loaded"
        lines.append((encoder.class_name, about))
    height, width = request.size
    lines += [
        (cfg.ae, f"decoder {decoder_parameters / 1e6:,.1f}M parameters, at most {gb(decoder)}"),
        ("picture", f"{width}x{height}, latent {cfg.in_channels}x{H}x{W}, {tokens:,} tokens{text}"),
        ("arithmetic", f"{tera(step_flops)} TFLOPs a step of {batch}, {sampling.num_steps} steps; "
                       f"{tera(decode_flops)} to decode; {tera(total_flops)} in all"),
        ("memory", f"about {gb(denoising)} while denoising, {gb(decoding)} while decoding")]
    if calibrating:
        lines.append(("calibrating", f"about {gb(calibrating)}, with a block at a time on the device"))
    return "\n".join(f"{name:22}{value}" for name, value in lines)


def calibration_bytes(request: Request, model, step_bytes: float) -> float:
    """Bytes on the device while a model, here on meta, is quantised: what is no block, the largest block with
    what its largest layer is rounded with, and a forward pass of all pictures. step_bytes: of that pass of
    one picture in the request's size, in the type of the arithmetic."""
    height, width = request.size
    pictures = CALIBRATION * request.cfg.res**2 / (height * width)
    blocks = [weight_bytes(block) for block in model.blocks]
    weights = weight_bytes(model) - sum(blocks) + max(blocks)        # in float32, as on meta
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    largest = max(linears, key=lambda layer: layer.weight.numel())
    rounding = count_cost(QuantLinear, largest, request.quant["form"]).peak_bytes
    return pictures * step_bytes + weights * request.dtype.itemsize // 4 + rounding


def undrawn(request: Request, out: Path, encoders: Path | None) -> list[Tensor]:
    """Batches of picture numbers; of a data set those that are not in its folder yet. ValueError if the
    folder holds another data set. encoders: the folder of the text encoders, if it has any."""
    batches = torch.arange(len(request)).split(request.sampling.batch)
    if not request.dataset:
        return list(batches)
    digests = []
    if encoders:
        digests = [found.digest for found in find_encoders(request.cfg.text_encoder, encoders)]
    note_settings(out, request.settings() | dict(
        batch=request.sampling.batch, encoders=short_hash(digests)))
    # whole batches, always the same: in another one the last bit of a picture may differ
    return [rows for rows in batches if not all((out / request.file(i)).exists() for i in rows.tolist())]


# what --quant stands for, by name in quant.quantise_model; SVDQuant's rank
QUANT = dict(form="nvfp4", rank=32, activations=True)
CALIBRATION = 8                         # pictures; one forward pass has to hold them


def load_models(request: Request, args, device, ae_device=None):
    """The run, quantised folder or base of a request, with a LoRA of others merged into it, and its
    autoencoder, on their devices (by default the same). args: the flags, of which those of files are read."""
    run = request.run
    weights = args.weights
    # a text model is large: its weights are kept in the type of the arithmetic
    dtype = request.dtype if request.cfg.text_encoder else torch.float32
    ae_device = ae_device or device
    ae_dtype = dtype if torch.device(ae_device).type == "cuda" else torch.float32
    base = None if run else request.source
    if run and is_quantised(read_run_config(run)[1]):
        model, info = load_quantised(run)
        model = model.to(device, dtype)
        base, weights = info["base"], info.get("base_weights")
        print(f"{run}: made from {base}, latents of {model.cfg.ae}")
    elif run:
        model, info = load_run(run, device, base_weights=weights, dtype=dtype)
        kind = "moving average" if run.name.startswith("ema") else "weights as trained"
        print(f"{run}: {kind}, base {info['base']}, latents of {model.cfg.ae}")
    else:
        model, info = load_base(request.source, weights, device, dtype)
    if args.lora:
        left_out = load_peft(merge_lora(model), args.lora)
        without = f", without {', '.join(left_out)}, which are bound to another latent" if left_out else ""
        print(f"{args.lora}: added{without}")
    file = args.ae_weights or args.base_ae_weights or info.get("ae_weights")
    if base and not file:
        file = ae_folder(base, weights)     # a preset's may lie beside its weights
    ae = load_autoencoder(model.cfg.ae, file, ae_dtype, ae_device)
    check_finite(model, request.source)
    check_finite(ae, model.cfg.ae)
    return model, ae


def is_quantised(info: dict) -> bool:
    """Whether a file with this info is one of quant.py's."""
    return bool(info.get("quantised"))


def check_quant(args, label: str, cfg, info: dict) -> dict | None:
    """Form, rank and activations of what is drawn with, --quant's or a quantised folder's; None for neither.
    ValueError for flags that contradict it, and for a model that cannot be quantised."""
    if is_quantised(info):
        found = {key: info.get(key, default) for key, default in QUANT.items()}
        why = f"{label} is quantised already ({format_name(found)})"
        reject(args.quant, f"--quant {args.quant}", f"{why}; leave --quant out")
        reject(args.weights_only, "--weights-only", why)
        reject(args.weights, "--weights", f"{why} and holds all of its weights")
        reject(args.lora, "--lora", f"{why}; merge it into what that was made from, {info.get('base')}")
        reject(args.export, "--export", f"{why}, and diffusers has no such layers; export {info.get('base')}")
        return found
    four_bits = args.quant in FORMATS
    reject(args.weights_only and not four_bits, "--weights-only", "it goes with --quant nvfp4 or int4")
    if not args.quant:
        return None
    reject(args.export, "--export", "diffusers has no quantised layers of this kind; export without --quant")
    quant = QUANT | dict(form=args.quant, activations=not args.weights_only)
    empty_quantised(cfg, dtype=torch.float32, **quant)               # raises for sizes that do not fit
    return quant


def quantise_here(model, request: Request, texts, device):
    """Merge a model's LoRA and quantise it in place for a request, calibrated on the prompts or classes that
    it draws."""
    merge_lora(model)
    rows = torch.arange(CALIBRATION) % len(request)
    cond = request.labels[rows] if texts is None else with_guidance(texts[rows], request.guidance)
    batch = None
    if request.quant["form"] != "fp8":
        batch = calibration_batch(model, cond, seed=request.seed, device=device, progress=True)
    quantise_model(model, **request.quant, batch=batch, progress=True)


def write_pictures(pipeline: Pipeline, request: Request, batches: list[Tensor], texts, out: Path, seconds):
    """Draw batches of picture numbers and write each as it comes: 50 000 do not fit in memory. texts: the
    encoded prompts of all pictures. Returns thumbnails of the first 64."""
    small = []
    for rows in tqdm(batches, desc="drawing", disable=len(batches) == 1 or None, leave=False):
        cond = request.labels[rows] if texts is None else with_guidance(texts[rows], request.guidance)
        seeds = [request.seed + i for i in rows.tolist()]
        images = pipeline(cond, seeds, len(batches) == 1, seconds)
        check_pictures(images, request.source)
        for i, pixels in zip(rows.tolist(), to_uint8(images)):
            save_png(out / request.file(i), pixels, request.meta(i))
        small += list(thumbnails(images)[: 64 - len(small)].cpu())
    return small


def write_sheet(out: Path, request: Request, small: list[Tensor]) -> Path:
    """Write thumbnails on one sheet beside the folder, which so holds samples only."""
    sheet = out.with_name(f"{out.name}-grid.png")
    rows = []
    for i in range(0, len(small), 8):
        rows.append((f"seed {request.seed + i} +", torch.stack(small[i : i + 8])))
    columns = request.titles if len(request) <= 8 else ()
    save_grid(sheet, rows, columns, {"dcgen": request.meta(0)["dcgen"]})
    return sheet


def parser() -> Parser:
    p = Parser(__doc__, "[RUN | --base NAME]")
    p.add_argument("run", nargs="?", metavar="RUN",
                   help="a run's folder or file (default without --base: the newest in runs/, or base tiny)")
    files = add_model_args(p, res=str)
    p.set_defaults(base=None)
    files.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    files.add_argument("--ae-weights", metavar="FILE",
                       help="weight file of the run's deep autoencoder (default: shipped, or in the hub's "
                            "cache)")
    files.add_argument("--text-encoders", metavar="DIR",
                       help="pipeline folder with the text encoders (default: --weights, or the hub's cache)")
    files.add_argument("--lora", metavar="PATH",
                       help="a LoRA of diffusers or PEFT to add, a file or a folder with its embedder and "
                            "head")

    what = p.add_argument_group("what to draw")
    what.add_argument("--classes", nargs="+", metavar="CLASS",
                      help="class numbers or names (default: all in turn)")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; again for another")
    what.add_argument("--prompts", metavar="FILE", help="prompts, one a line, # for comments")
    what.add_argument("--negative", default="", metavar="TEXT",
                      help="what to keep away from, by --cfg-scale (default: the empty prompt)")
    what.add_argument("--count", type=at_least(int, 1), metavar="N",
                      help="pictures (default 8, or one a prompt)")
    what.add_argument("--text-tokens", type=at_least(int, 1), metavar="N",
                      help="prompt tokens kept (default: the model's; FLUX 512)")

    how = p.add_argument_group("how to draw it")
    how.add_argument("--num-steps", type=within(int, 1, 10_000), metavar="N",
                     help="ODE or chain steps (default: the authors'; DiT 25)")
    how.add_argument("--cfg-scale", type=at_least(float, 0), metavar="S",
                     help="classifier-free guidance in two passes; 1 = off (default: DiT 3, FLUX 1, SANA "
                          "4.5)")
    how.add_argument("--guidance", type=at_least(float, 0), metavar="S",
                     help="the number that a distilled FLUX reads, in one pass (default 3.5, flux-krea 4.5)")
    how.add_argument("--sampler", choices=(*SOLVERS, "ddim", "ddpm"),
                     help="default: euler; dpm for SANA; ddpm for DiT as published")
    how.add_argument("--shift", help="resolution shift of the time grid: a number, 1 = off, or "
                                     f"{' or '.join(SHIFTS)} (default: the one trained with)")
    how.add_argument("--batch", type=at_least(int, 1), metavar="N",
                     help="pictures at a time (default 64, with prompts 1)")
    how.add_argument("--offload", action="store_true",
                     help="have model and autoencoder on the device in turn")
    how.add_argument("--quant", choices=("fp8", *FORMATS),
                     help="draw in few bits, calibrated on what is drawn (a folder of quant.py has its own)")
    how.add_argument("--weights-only", action="store_true",
                     help="with --quant nvfp4 or int4: round weights alone, not the inputs")
    how.add_argument("--fast", action="store_true", default=None,
                     help="compile, and capture steps (default: on a GPU, if it pays for that minute)")
    how.add_argument("--eager", dest="fast", action="store_false", help="do not compile")

    result = p.add_argument_group("what comes of it")
    result.add_argument("--dry-run", action="store_true", help="print memory and arithmetic, and stop")
    result.add_argument("--export", metavar="DIR",
                        help="write the folder of a diffusers pipeline, LoRA merged, and stop; with "
                             "--text-encoders, these are copied in")
    result.add_argument("--dataset", action="store_true",
                        help="draw a training set with captions into --out; run again to go on with it")
    result.add_argument("--out", metavar="DIR",
                        help="folder of the pictures (default: samples/ in the run, or runs/samples-*; if it "
                             "has pictures of other settings, the next free name)")
    return p


def pick_model(run: str | None, base: str | None, ema: bool) -> tuple[Path | None, object, dict]:
    """The file of a run, by default of the newest, and its configuration and info; None and those of a base,
    if there is no run or a base is given."""
    reject(run in BASES, f"RUN {run}", f"a preset is named by --base {run}")
    chosen = run or (None if base else newest_run())
    if chosen is None:
        cfg, info = read_base_config(base or "tiny")
        reject(is_quantised(info), f"--base {base}", f"it is quantised; draw with it by: sample.py {base}")
        return None, cfg, info
    file = run_file(chosen, ema)
    cfg, info = read_run_config(file)
    check_base(base, chosen, info)
    return file, cfg, info


def read_request(args) -> Request:
    """What the flags ask for. Whatever is wrong with them raises a ValueError, before any weights are
    read."""
    check_paths(args, "weights", "base_ae_weights", "ae_weights", "text_encoders", "lora")
    run, cfg, info = pick_model(args.run, args.base, not args.raw)
    source = str(run or args.base or "tiny")
    label = args.run or source
    sampling = choose_sampling(
        cfg, num_steps=args.num_steps, cfg_scale=args.cfg_scale, guidance=args.guidance, sampler=args.sampler,
        shift=args.shift, batch=args.batch)
    size = parse_size(args.res, cfg.res)
    make_clock(cfg, sampling, (cfg.in_channels, *latent_size(cfg, ae_config(cfg.ae), size)))
    check_flags(cfg, label, sampling.cfg_scale, vars(args))
    labels = None
    # prompts or classes; nothing is drawn without a prompt, but cost and export need none
    if cfg.text_encoder:
        draws = not args.dry_run and not args.export
        prompts = args.prompt or ([] if draws or args.prompts else [""])
        titles = pick_prompts(prompts, args.prompts, args.count)
    else:
        names = class_names(cfg, info)
        labels = parse_classes(args.classes, names, args.count or 8)
        titles = [names[k] for k in labels]
    return Request(
        cfg, sampling, size, dtype_of(args), source, run, label, titles, args.seed, labels,
        negative=args.negative, text_tokens=args.text_tokens or getattr(cfg, "text_tokens", None),
        dataset=args.dataset, quant=check_quant(args, label, cfg, info), quantised=is_quantised(info))


def main(argv=None):
    args = parser().parse_args(argv)
    reject(args.dataset and not args.out, "--dataset", "name its folder with --out DIR")
    device = device_here(args.device)
    request = read_request(args)
    if args.dry_run:
        print(report(request, args.offload))
    elif args.export:
        check_exportable(request.cfg, args.export)
        model, ae = load_models(request, args, "cpu")
        export(model, ae, args.export, args.text_encoders)
    else:
        draw(request, args, device)


def draw(request: Request, args, device: torch.device):
    """Load what the request needs, draw it, and write the pictures."""
    own = request.run.parent / "samples" if request.run else f"runs/samples-{Path(request.source).name}"
    out = Path(args.out or own)
    check_writable(out)

    # text before the model: 10 GB of encoders are freed when it is loaded
    encoder = request.cfg.text_encoder
    check_encoders(encoder, args.text_encoders)
    folder = text_folder(request.label, request.cfg, args.text_encoders, args.weights)
    batches = undrawn(request, out, folder)
    seconds = {}
    texts = None
    if encoder and batches:
        with timed(seconds, "text", device):
            texts = cache_prompts(encoder, folder, request.titles, request.text_tokens,
                                  request.negative, dtype=request.dtype, device=device)
    # with --offload the Pipeline fetches each network for its part; what is quantised is fetched by blocks
    home = "cpu" if args.offload else device
    quantise = args.quant and batches
    model, ae = load_models(request, args, "cpu" if quantise else home, home)
    weights = dict(weights=fingerprint(model), autoencoder=fingerprint(ae))
    request = replace(request, digest=short_hash(request.settings() | weights))
    if args.dataset:
        note_settings(out, weights)
    else:
        out = free_path(out, request.digest)
    if texts is not None:
        model.null = texts.null
    if quantise:
        with timed(seconds, "quantising", device):
            quantise_here(model, request, texts, device)
        model.to(home)
    quant = request.quant
    if quant:
        print(f"{format_name(quant)}: {arithmetic(quant['form'], quant['activations'], device)}")

    drawn = sum(map(len, batches))
    speed = choose_speed(drawn, request.sampling, device, args.fast, args.offload)
    print(f"speed: {speed}")
    start = time.perf_counter()
    pipeline = Pipeline(model, ae, request.sampling, request.size, request.dtype, device, speed)
    small = write_pictures(pipeline, request, batches, texts, out, seconds)
    total = time.perf_counter() - start + seconds.get("text", 0.0) + seconds.get("quantising", 0.0)
    # captions make a data set whole; anything else is looked at on one sheet
    if args.dataset:
        write_captions(out, [request.caption(i) for i in range(len(request))])
        also = f"whole, {len(request)} pictures with captions in metadata.jsonl"
    else:
        also = f"and {write_sheet(out, request, small)}"
    parts = ", ".join(f"{what} {s:.1f} s" for what, s in seconds.items())
    each = total / max(1, drawn)
    print(f"wrote {drawn} pictures to {out}/ {also} ({total:.1f} s, {each:.2f} s each: {parts}; "
          f"peak {peak_gib(device):.1f} GiB)")


if __name__ == "__main__":
    run_main(main)
