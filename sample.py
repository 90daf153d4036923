"""Draw pictures: the path from noise to data, its ODE, guidance, and the scripts' shared flags.

    x0 noise, x1 data, t in [0,1]:   x_t = (1-t) x0 + t x1,   v = x1 - x0,   Euler: x <- x + (t_next - t) v(x, t)

Forward (`path`, for training) and reverse (`integrate`, for sampling) of the one ODE stand on this page; below them is
DDPM's chain, for DiT as it was published.

    python sample.py                                   the newest run, or the embedded base if there is none
    python sample.py --base dit-xl --classes 207 360   an official model
    python sample.py --ckpt runs/finetune-tiny-1 --cfg-scale 3 --num-steps 50 --seed 7
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder import load_autoencoder
from data import SHAPES, fingerprint
from lora import add_lora, merge_lora
from model import BASES, build, cat_conditions, config_dict, config_of, ddpm_alphas_cumprod, deepen, fast_bf16, find_weights, read_config, read_tensors, run


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


def sample_t(n: int, generator=None, kind: str = "logit-normal", shift: float = 1.0, device="cpu") -> Tensor:
    """Training times (n,) in (0,1): logit-normal(0,1) as the authors' code, or uniform; then the resolution shift."""
    if kind == "uniform":
        t = torch.rand(n, generator=generator, device=device)
    else:
        t = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    return shift_time(t, shift)


def time_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """num_steps + 1 times from noise (0) to data (1), as Python floats: nothing is read back from the device."""
    return shift_time(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64), shift).tolist()


def noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """One generator a picture, on the CPU, float32: picture i of a batch is the picture of its seed alone, anywhere.
    -> (len(generators), *shape)"""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def guided(model, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, null: Tensor | None = None, call=None) -> Tensor:
    """Classifier-free guidance, v_null + s (v_cond - v_null), both halves in one batch; s = 1 is one pass, no guidance.
    call: which function of the model to guide (default: its velocity). A learned variance is never guided."""
    call = call or model
    if cfg_scale == 1.0:
        return call(x, t, y)
    null = model.null_condition(y) if null is None else null
    cond, uncond = call(torch.cat([x, x]), torch.cat([t, t]), cat_conditions([y, null])).chunk(2)
    out = uncond + cfg_scale * (cond - uncond)
    k = model.cfg.guided_channels or model.cfg.in_channels           # DiT as published guides three of its four channels
    return torch.cat([out[:, :k], cond[:, k:]], dim=1)


def integrate(velocity, x: Tensor, times: list[float], method: str = "euler", progress: bool = False) -> Tensor:
    """Follow dx/dt = velocity(x, t) over the grid of times. x (B,C,H,W), velocity takes t (B,). Euler: one evaluation a
    step; Heun: two, second order, except for the last step."""
    at = lambda t: torch.full((len(x),), t, device=x.device)
    for a, b in tqdm(list(zip(times, times[1:])), desc=f"{method}", leave=False, disable=not progress):
        v = velocity(x, at(a)).float()
        step = x + (b - a) * v
        if method == "heun" and b < 1.0:
            step = x + (b - a) * 0.5 * (v + velocity(step, at(b)).float())
        x = step
    return x


# ---- DDPM's chain, for DiT as published ------------------------------------------------------------------------------------

class Chain:
    """The discrete diffusion that DiT was trained on, over a subset of its 1000 steps (arXiv 2006.11239, 2102.09672).
    steps: the kept step numbers, rising; the betas are recomputed so that alpha-bar at each kept step stays."""

    def __init__(self, steps: list[int] | None = None):
        full = ddpm_alphas_cumprod()
        self.steps = list(range(len(full))) if steps is None else steps
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
    out = model.network(x, torch.as_tensor(chain.steps, device=z.device)[i.to(z.device)], y).float()
    eps, v = out.chunk(2, dim=1)
    mean, log_var, _ = chain.predict(torch.cat([eps.detach(), v], dim=1), x, i)
    kl = gaussian_kl(*chain.posterior(z, x, i), mean, log_var)        # B C H W
    first = (i == 0).to(z.device).view(-1, 1, 1, 1)
    bound = torch.where(first, decoder_nll(z, mean, log_var), kl) / math.log(2)
    return (eps - x0).square().mean(dim=(1, 2, 3)), bound.mean(dim=(1, 2, 3))


# ---- noise and a condition in, pictures out ----------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, ae, y: Tensor, seeds: list[int], num_steps: int = 25, cfg_scale: float = 3.0, sampler: str = "euler", shift: float = 1.0,
             size: tuple[int, int] | None = None, batch: int = 64, dtype: torch.dtype = torch.float32, progress: bool = False) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] on the CPU for classes y (B,). size = (H,W) in pixels (default: the model's own);
    sampler: euler, heun (flow), ddim, ddpm (DiT as published only). Sizes must divide by f p (ValueError)."""
    H, W = size or (model.cfg.res,) * 2
    unit = ae.cfg.f * model.cfg.patch_size
    if H % unit or W % unit:
        name = lambda H, W: f"{H}" if H == W else f"{W}x{H}"
        down, up = (name(*(max(unit, round_(s / unit) * unit) for s in (H, W))) for round_ in (math.floor, math.ceil))
        raise ValueError(f"--res {name(H, W)}: {ae.cfg.name} with patch {model.cfg.patch_size} needs a multiple of {unit}; try {up if up == down else f'{down} or {up}'}")
    if sampler in ("ddim", "ddpm") and model.cfg.predict != "epsilon":
        raise ValueError(f"--sampler {sampler} is for a model that predicts epsilon on DDPM's clock; this one predicts a velocity: use euler or heun")
    if num_steps < 1:
        raise ValueError(f"--num-steps {num_steps}: at least 1")
    device, images = next(model.parameters()).device, []
    chain = Chain.spaced(num_steps, ddim=sampler == "ddim") if sampler in ("ddim", "ddpm") else None
    for i in tqdm(range(0, len(y), batch), desc="drawing", disable=not progress or len(y) <= batch, leave=False):
        yb = y[i : i + batch].to(device)
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        x = noise(generators, (model.cfg.in_channels, H // ae.cfg.f, W // ae.cfg.f)).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if chain:
                z = chain.sample(lambda x, clock: guided(model, x, clock, yb, cfg_scale, call=model.network), x, sampler == "ddim", generators, progress)
            else:
                z = integrate(lambda x, t: guided(model, x, t, yb, cfg_scale), x, time_grid(num_steps, shift), sampler, progress)
            images += [ae.decode(part).float().cpu() for part in z.split(max(1, 2**22 // (H * W)))]      # pixels need more room than tokens
    return torch.cat(images).clamp(-1, 1)


# ---- pictures on disk ----------------------------------------------------------------------------------------------------------

def to_uint8(x: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1] -> (B,H,W,3) bytes, rounded: truncating would darken every picture by half a step."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_png(path, pixels: np.ndarray, meta: dict | None = None):
    """(H,W,3) bytes as PNG, with the given facts as text fields."""
    from PIL import Image, PngImagePlugin
    info = PngImagePlugin.PngInfo()
    for k, v in (meta or {}).items():
        info.add_text(k, v if isinstance(v, str) else json.dumps(v))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, pnginfo=info)


def save_grid(path, rows: list[tuple[str, Tensor]], columns: list[str] = (), meta: dict | None = None):
    """A labelled grid: rows = (name, pictures (B,3,H,W) in [-1,1]); names to the left, column titles above."""
    from PIL import Image, ImageDraw
    H, W = rows[0][1].shape[-2:]
    n, left, top = max(len(x) for _, x in rows), 10 + 7 * max(len(line) for name, _ in rows for line in name.split("\n")), 16 if columns else 0
    sheet = Image.new("RGB", (left + n * (W + 2), top + len(rows) * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, c in enumerate(columns):
        draw.text((left + j * (W + 2) + 4, 2), c[: max(4, W // 7)], fill="black")
    for i, (name, x) in enumerate(rows):
        draw.multiline_text((5, top + i * (H + 2) + H // 2 - 8), name, fill="black")
        for j, p in enumerate(to_uint8(x)):
            sheet.paste(Image.fromarray(p), (left + j * (W + 2), top + i * (H + 2)))
    save_png(path, np.asarray(sheet), meta)


# ---- models by name, shared flags ------------------------------------------------------------------------------------------------

def add_model_args(p: argparse.ArgumentParser):
    """The flags that choose a model; `load_base`, `load_run` and `load_ae` read them."""
    p.add_argument("--base", default="tiny", metavar="NAME|RUN", help=f"pretrained model: {', '.join(BASES)}, or the folder of a finished run (default tiny)")
    p.add_argument("--weights", metavar="FILE", help="the base's weight file, any published layout (default: shipped, or the model hub's cache)")
    p.add_argument("--base-ae-weights", metavar="FILE", help="weight file of the base's own autoencoder (default: as above)")
    p.add_argument("--res", type=int, help="pixels a side (default: the base's)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="arithmetic; auto = bf16 where it is faster (default auto)")
    p.add_argument("--seed", type=int, default=0, help="seed; picture i of a batch uses seed + i (default 0)")


def dtype_of(args) -> torch.dtype:
    return torch.bfloat16 if args.dtype == "bf16" or (args.dtype == "auto" and fast_bf16(args.device)) else torch.float32


def load_base(name: str, weights: str | None = None, device="cpu"):
    """A preset, or a finished run (its LoRA merged) -> model in eval mode, what a run trained from it has to know.
    ValueError lists the names."""
    if name in BASES:
        model, kept = build(BASES[name], find_weights(name, BASES[name].weights, weights)), {}
    elif Path(name).exists():
        model, info = load_run(name, base_weights=weights)
        kept, weights = {k: info[k] for k in ("classes", "shift", "images", "ae_weights") if k in info}, None
        merge_lora(model)
    else:
        raise ValueError(f"--base {name}: not a preset ({', '.join(BASES)}) and not the folder of a run")
    return model.to(device).eval(), {**kept, "base": name, "base_weights": weights, "base_print": fingerprint(model)}


def run_file(path, ema: bool = True) -> Path:
    """The weight file of a run: a file as given; of a folder the moving average if there is one and it is wanted."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / "ema.safetensors"] * ema + [path / "model.safetensors"]
    if not files[-1].exists():
        raise ValueError(f"{path} holds no finished run (no model.safetensors); an unfinished one goes on with --resume")
    return next(f for f in files if f.exists())


def load_run(path, device="cpu", ema: bool = True, base_weights: str | None = None):
    """A run's folder or file -> model in eval mode (LoRA attached), the facts written with it. A run keeps what it
    trained; the rest comes from its base, which is loaded first unless everything was trained (base_weights: where its
    file is now). ValueError if this is not a run, or its base is another one than it was trained from."""
    path = run_file(path, ema)
    tensors, info = read_tensors(path), read_config(path)
    if "model" not in info:
        raise ValueError(f"{path} is not a run's file; an official weight file goes to --weights, with --base naming its model")
    cfg = config_of(info["model"])
    if info.get("lora") or not any("blocks." in k for k in tensors):
        base, found = load_base(info["base"], base_weights or info["base_weights"])
        if info.get("base_print", found["base_print"]) != found["base_print"]:
            raise ValueError(f"{path} was trained from another {info['base']} than the one found now; give that one's file with --weights")
        model = deepen(base, cfg)
        if info.get("lora"):
            add_lora(model, **info["lora"])
        load_part(model, tensors, path)
    else:
        model = build(cfg, path)
    return model.float().requires_grad_(False).to(device).eval(), info | {"file": str(path)}


def load_part(model, tensors: dict[str, Tensor], source="the file"):
    """Copy tensors over a model's own of the same names; what the file leaves out stays, as its base has it. ValueError
    for a name or a shape that the model does not have, and for a missing embedder, head or LoRA: no base has those."""
    own = model.state_dict()
    wrong = [k for k, v in tensors.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k not in tensors and (k.startswith((model.EMBEDDER, model.HEAD)) or k.endswith((".A", ".B")))]
    for what, keys in (("tensors that this model does not have in that shape", wrong), ("tensors missing that no base has", missing)):
        if keys:
            raise ValueError(f"{source}: {len(keys)} {what}: {', '.join(keys[:3])}")
    for k, v in tensors.items():
        own[k].copy_(v)


def newest_run(root="runs", kinds=("align", "finetune")) -> Path | None:
    """The newest finished run's folder of these kinds, or None. A kind is align, finetune, noalign or scratch, or one of
    one base: align-tiny. The files' own facts decide, not the folders' names: dit-xl is not dit-xl-512."""
    def fits(file):
        info = read_config(file)
        kind, base = info.get("kind", ""), Path(info.get("base", "")).name
        return kind in kinds or f"{kind}-{base}" in kinds
    files = [f for f in Path(root).glob("*/model.safetensors") if fits(f)]
    return max(files, key=lambda f: f.stat().st_mtime).parent if files else None


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


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    p.set_defaults(base=None)
    p.add_argument("--ckpt", metavar="RUN", help="a run's folder or file (default without --base: the newest run in runs/, else the embedded base)")
    p.add_argument("--ae-weights", metavar="FILE", help="weight file of the run's deep autoencoder (default: shipped, or the model hub's cache)")
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument("--classes", nargs="+", help="class numbers or names (default: all in turn)")
    p.add_argument("--count", type=int, default=8, help="pictures (default 8)")
    p.add_argument("--num-steps", type=int, default=25, help="ODE or chain steps (default 25)")
    p.add_argument("--cfg-scale", type=float, default=3.0, help="classifier-free guidance in two passes; 1 = off (default 3)")
    p.add_argument("--sampler", default=None, choices=("euler", "heun", "ddim", "ddpm"), help="default: euler; ddpm for DiT as published")
    p.add_argument("--shift", type=float, help="resolution shift of the time grid; 1 = off (default: the one trained with)")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time (default 64)")
    p.add_argument("--out", help="folder for the pictures (default: samples/ in the run, or runs/samples-BASE)")
    args = p.parse_args(argv)

    if args.ckpt and args.base:
        raise ValueError("--base and --ckpt each name a model; give one of them")
    ckpt = args.ckpt or (None if args.base else newest_run())
    name = args.base or "tiny"
    if ckpt:
        model, info = load_run(ckpt, args.device, not args.raw, args.weights)
        print(f"{info['file']}: {'moving average' if Path(info['file']).name.startswith('ema') else 'weights as trained'}, base {info['base']}, latents of {model.cfg.ae}")
    else:
        model, info = load_base(name, args.weights, args.device)
    ae = load_autoencoder(model.cfg.ae, args.ae_weights or args.base_ae_weights or info.get("ae_weights"), device=args.device)
    classes = tuple(info.get("classes") or (SHAPES if model.cfg.num_classes == len(SHAPES) else [str(i) for i in range(model.cfg.num_classes)]))
    y = parse_classes(args.classes, classes, args.count)
    seeds = [args.seed + i for i in range(len(y))]
    sampler = args.sampler or ("ddpm" if model.cfg.predict == "epsilon" else "euler")
    shift = args.shift if args.shift is not None else info.get("shift", 1.0)
    out = Path(args.out or (Path(info["file"]).parent / "samples" if ckpt else f"runs/samples-{Path(name).name}"))
    grid = out.with_name(f"{out.name}-grid.png")                      # beside the folder, which so holds samples only
    facts = dict(sampler=sampler, num_steps=args.num_steps, cfg_scale=args.cfg_scale, shift=shift, weights=str(info.get("file", name)), model=config_dict(model.cfg))
    shown, start = [], time.perf_counter()
    for rows in torch.arange(len(y)).split(args.batch):               # written as they come: 50 000 do not fit in memory
        images = generate(model, ae, y[rows], [seeds[i] for i in rows], args.num_steps, args.cfg_scale, sampler, shift, (args.res, args.res) if args.res else None,
                          args.batch, dtype_of(args), progress=True)
        for i, pixels in zip(rows.tolist(), to_uint8(images)):
            save_png(out / f"{i:05d}_seed{seeds[i]}.png", pixels, {"class": classes[y[i]], "seed": str(seeds[i]), "dcgen": facts})
        shown += list(images[: 64 - len(shown)])
    seconds = time.perf_counter() - start
    save_grid(grid, [(f"seed {seeds[i]} +", torch.stack(shown[i : i + 8])) for i in range(0, len(shown), 8)], [classes[k] for k in y[:8]] if len(y) <= 8 else (), {"dcgen": facts})
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.startswith("cuda") else ""
    print(f"wrote {len(y)} pictures to {out}/ and {grid} ({seconds:.1f} s, {seconds / len(y):.2f} s each{peak})")


if __name__ == "__main__":
    run(main)
