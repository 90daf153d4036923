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
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder import AUTOENCODERS, ae_config, load_autoencoder
from data import SHAPES
from lora import add_lora, merge_lora
from model import (BASES, DiTConfig, build, config_dict, ddpm_alphas_cumprod, deepen, fast_bf16, find_weights, read_config, read_tensors, run,
                   to_deep_latent)


# ---- the path and its ODE ------------------------------------------------------------------------------------------------

def path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Straight path from noise to data, and its velocity. (arXiv 2509.25180, Sec. 3.3)
    x0, x1 (B,C,H,W), t (B,) -> x_t, v, both (B,C,H,W)"""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * x1, x1 - x0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift: noise level s = 1 - t becomes r s / (1 + (r - 1) s). Larger latents bury less at the same noise
    level, so r > 1 spends more of the clock near the noise. 1 = off."""
    s = 1 - t
    return 1 - shift * s / (1 + (shift - 1) * s)


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


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """One generator a picture, on the CPU, float32: picture i of a batch is the picture of its seed alone, anywhere."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def guided(model, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, null: Tensor | None = None, call=None) -> Tensor:
    """Classifier-free guidance, v_null + s (v_cond - v_null), both halves in one batch; s = 1 is one pass, no guidance.
    call: which function of the model to guide (default: its velocity)."""
    call = call or model
    if cfg_scale == 1.0:
        return call(x, t, y)
    null = model.null_condition(y) if null is None else null
    cond, uncond = call(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    out = uncond + cfg_scale * (cond - uncond)
    k = model.cfg.guided_channels            # DiT guided three of its four channels, and its published scores did too
    return out if k is None else torch.cat([out[:, :k], cond[:, k:]], dim=1)


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
        self.ab, self.prev, self.log_beta = ab, prev, beta.log()
        self.log_var = torch.cat([var[1:2], var[1:]]).log()           # the first posterior variance is 0: use the second
        self.coef_x1, self.coef_x = beta * prev.sqrt() / (1 - ab), (1 - prev) * (1 - beta).sqrt() / (1 - ab)

    @classmethod
    def spaced(cls, n: int, ddim: bool = False) -> "Chain":
        """n of the 1000 steps: spread over both ends (DiT's default for sampling), or DDIM's constant stride from 0."""
        return cls(list(range(0, 1000, 1000 // n))[:n] if ddim else [round(i * 999 / max(n - 1, 1)) for i in range(n)])

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

    def sample(self, network, x: Tensor, ddim: bool, generator=None, progress: bool = False, each=None) -> Tensor:
        """From noise to data: ancestral steps with the learned variance, or DDIM's deterministic ones (eta 0).
        network(x, clock) -> (B,2C,H,W). each(x) is called after every step."""
        for i in tqdm(range(len(self.steps) - 1, -1, -1), desc="ddim" if ddim else "ddpm", leave=False, disable=not progress):
            out = network(x, torch.full((len(x),), float(self.steps[i]), device=x.device)).float()
            mean, log_var, x1 = self.predict(out, x, i)
            if ddim:
                eps = (x - self._at(self.ab.sqrt(), i, x) * x1) / self._at((1 - self.ab).sqrt(), i, x)
                x = self._at(self.prev.sqrt(), i, x) * x1 + self._at((1 - self.prev).sqrt(), i, x) * eps
            else:
                z = torch.randn(x.shape, generator=generator).to(x) if i else torch.zeros_like(x)
                x = mean + (0.5 * log_var).exp() * z
            if each:
                each(x)
        return x


# ---- noise and a condition in, pictures out ----------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, ae, y: Tensor, seeds: list[int], num_steps: int = 25, cfg_scale: float = 3.0, sampler: str = "euler", shift: float = 1.0,
             size: tuple[int, int] | None = None, batch: int = 64, dtype: torch.dtype = torch.float32, progress: bool = False) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] on the CPU for classes y (B,). size = (H,W) in pixels (default: the model's own);
    sampler: euler, heun (flow), ddim, ddpm (DiT as published only). Sizes must divide by f p (ValueError)."""
    H, W = size or (model.cfg.res,) * 2
    unit = ae.cfg.f * model.cfg.patch_size
    if H % unit or W % unit:
        low, high = (H // unit) * unit or unit, -(-max(H, W) // unit) * unit
        raise ValueError(f"--res {H if H == W else f'{W}x{H}'}: {ae.cfg.name} with patch {model.cfg.patch_size} needs a multiple of {unit}; try {low} or {high}")
    if sampler in ("ddim", "ddpm") and model.cfg.predict != "epsilon":
        raise ValueError(f"--sampler {sampler} is for a model that predicts epsilon on DDPM's clock; this one predicts a velocity: use euler or heun")
    device, images = next(model.parameters()).device, []
    chain = Chain.spaced(num_steps, ddim=sampler == "ddim") if sampler in ("ddim", "ddpm") else None
    for i in tqdm(range(0, len(y), batch), desc="drawing", disable=not progress or len(y) <= batch, leave=False):
        yb = y[i : i + batch].to(device)
        x = noise(seeds[i : i + batch], (model.cfg.in_channels, H // ae.cfg.f, W // ae.cfg.f)).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if chain:
                g = torch.Generator().manual_seed(seeds[i])
                z = chain.sample(lambda x, clock: guided(model, x, clock, yb, cfg_scale, call=model.network), x, sampler == "ddim", g, progress)
            else:
                z = integrate(lambda x, t: guided(model, x, t, yb, cfg_scale), x, time_grid(num_steps, shift), sampler, progress)
            images.append(ae.decode(z).float().cpu())
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
    """A preset, or a finished run (its LoRA merged) -> model in eval mode, its file's facts. ValueError lists the names."""
    if name in BASES:
        return build(BASES[name], find_weights(name, BASES[name].weights, weights)).to(device).eval(), {"base": name, "base_weights": weights}
    if Path(name).exists():
        model, info = load_run(name, device=device)
        merge_lora(model)
        return model, {**info, "base": name, "base_weights": None}
    raise ValueError(f"--base {name}: not a preset ({', '.join(BASES)}) and not the folder of a run")


def load_run(path, device="cpu", ema: bool = True):
    """A run's folder or file -> model in eval mode (LoRA attached), the facts written with it. A run keeps what it
    trained; the rest comes from its base, which is loaded first unless everything was trained."""
    path = Path(path)
    if path.is_dir():
        file = path / "ema.safetensors"
        path = file if ema and file.exists() else path / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{path.parent} holds no finished run (no model.safetensors); an unfinished one goes on with --resume")
    info, tensors = read_config(path), read_tensors(path)
    if "model" not in info:
        raise ValueError(f"{path} is not a run's file; an official weight file goes to --weights, with --base naming its model")
    cfg = DiTConfig(**{k: v for k, v in info["model"].items() if k != "family"})
    if info.get("lora") or not any(k.startswith("blocks.") for k in tensors):
        base, _ = load_base(info["base"], info["base_weights"])
        model = deepen(base, cfg)
        if info.get("lora"):
            add_lora(model, **info["lora"])
        load_part(model, tensors, path)
    else:
        model = build(cfg, path)
    return model.float().requires_grad_(False).to(device).eval(), info | {"file": str(path)}


def load_part(model, tensors: dict[str, Tensor], source="the file"):
    """Copy tensors over a model's own of the same names; what the file leaves out stays. ValueError for a name or a
    shape that the model does not have."""
    own = model.state_dict()
    wrong = [k for k, v in tensors.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors that this model does not have in that shape: {', '.join(wrong[:3])}")
    for k, v in tensors.items():
        own[k].copy_(v)


def newest_run(root="runs", kinds=("align", "finetune")) -> Path | None:
    """The newest finished run's folder of these kinds, or None."""
    runs = [p.parent for k in kinds for p in Path(root).glob(f"{k}-*/model.safetensors")]
    return max(runs, key=lambda r: (r / "model.safetensors").stat().st_mtime, default=None)


def parse_classes(text: list[str] | None, names: tuple[str, ...], count: int) -> Tensor:
    """Class numbers or names -> (B,) indices; None -> the first classes in turn. ValueError names the valid ones."""
    if not text:
        return torch.arange(count) % len(names)
    for t in text:
        if t not in names and not (t.isdigit() and int(t) < len(names)):
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
    p.add_argument("--out", help="folder for the pictures (default: samples/ in the run, or runs/samples-BASE)")
    args = p.parse_args(argv)

    ckpt = args.ckpt or (None if args.base else newest_run())
    if ckpt:
        model, info = load_run(ckpt, args.device, ema=not args.raw)
        print(f"{info['file']}: {'moving average' if 'ema' in Path(info['file']).name else 'weights as trained'}, base {info['base']}, latents of {model.cfg.ae}")
    else:
        model, info = load_base(args.base or "tiny", args.weights, args.device)
    ae = load_autoencoder(model.cfg.ae, args.ae_weights if ckpt else args.base_ae_weights, device=args.device)
    classes = tuple(info.get("classes") or (SHAPES if model.cfg.num_classes == len(SHAPES) else [str(i) for i in range(model.cfg.num_classes)]))
    y = parse_classes(args.classes, classes, args.count)
    seeds = [args.seed + i for i in range(len(y))]
    sampler = args.sampler or ("ddpm" if model.cfg.predict == "epsilon" else "euler")
    shift = args.shift if args.shift is not None else info.get("shift", 1.0)
    start = time.perf_counter()
    images = generate(model, ae, y, seeds, args.num_steps, args.cfg_scale, sampler, shift, (args.res, args.res) if args.res else None, dtype=dtype_of(args), progress=True)
    seconds = time.perf_counter() - start
    out = Path(args.out or (Path(ckpt if Path(ckpt).is_dir() else Path(ckpt).parent) / "samples" if ckpt else f"runs/samples-{args.base or 'tiny'}"))
    facts = dict(sampler=sampler, num_steps=args.num_steps, cfg_scale=args.cfg_scale, shift=shift, weights=str(info.get("file", args.base or "tiny")), model=config_dict(model.cfg))
    for i, pixels in enumerate(to_uint8(images)):
        save_png(out / f"{i:04d}_seed{seeds[i]}.png", pixels, {"class": classes[y[i]], "seed": str(seeds[i]), "dcgen": facts})
    save_grid(out / "grid.png", [(f"seed {seeds[i]} +", images[i : i + 8]) for i in range(0, len(images), 8)], [classes[k] for k in y[:8]] if len(y) <= 8 else (), {"dcgen": facts})
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.startswith("cuda") else ""
    print(f"wrote {len(images)} pictures and {out / 'grid.png'} ({seconds:.1f} s, {seconds / len(images):.2f} s each{peak})")


if __name__ == "__main__":
    run(main)
