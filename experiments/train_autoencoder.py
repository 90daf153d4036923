"""Train one of the small autoencoders."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sys; from pathlib import Path as _P; sys.path.insert(0, str(_P(__file__).resolve().parent.parent))
from autoencoder import (AUTOENCODERS, Autoencoder, KLConfig, ae_class, ae_config)
from checkpoints import atomic, load_autoencoder, read_tensors, write_tensors
from data import open_source
from fast import fast_bf16
from sample import run
from evaluate import psnr, reconstruct, ssim


# ---- training a small one --------------------------------------------------------------------------------------------------

def training_loss(ae: Autoencoder, x: Tensor, beta: float, noise: float, pull=None) -> tuple[Tensor, dict]:
    """L1 + MSE between a picture and its reconstruction, + beta KL(posterior || N(0,1)) per latent number.
    DC-AE has no variance of its own and gets a constant one, `noise`: latents that bear a little noise are latents
    that a diffusion model's small errors do not break. pull(x, mean): another loss of the latents, to be added."""
    mean, logvar = ae.moments(x)
    z = mean + (noise if logvar is None else (0.5 * logvar).exp()) * torch.randn_like(mean)
    y = ae.decode_raw(z)
    l1, mse = (y.float() - x).abs().mean(), (y.float() - x).square().mean()
    spread = 0.0 if logvar is None else logvar.float().exp() - 1 - logvar.float()      # a constant variance only adds a constant
    kl = 0.5 * (mean.float().square() + spread).mean()
    more = pull(x, mean) if pull else mean.new_zeros(())
    return l1 + mse + beta * kl + more, {"l1": l1.item(), "psnr": 10 * torch.log10(4 / mse).item(), "kl": kl.item(), "pull": more.item()}


def latent_alignment_loss(base: Autoencoder, reading: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """What pulls a deep latent space towards a base's (arXiv 2509.25180, A.9, which does not say how two of different
    size are compared): the base's latents, averaged over each deep cell, are to be a linear map of the deep latents, `reading`
    (C' to C channels), which learns along and is thrown away. x (B,3,fH,fW), its deep latent z (B,C',H,W) -> scalar."""
    with torch.no_grad():
        target = base.encode(x).float()                              # B C h w, finer
    return F.mse_loss(reading(z).float(), F.adaptive_avg_pool2d(target, z.shape[-2:]))


def train_autoencoder(cfg, source, out, steps: int, batch: int, lr: float, beta: float, noise: float, seed: int,
                      device="cpu", dtype: torch.dtype = torch.float32, start: str | None = None, save_every: int = 500,
                      towards: Autoencoder | None = None, ratio: float = 1.0):
    """Train cfg on a picture source; writes <out>.safetensors with the measured scale and shift, and a resumable
    <out>.train every save_every steps. A run that is killed and started again gives the same numbers.
    start: a file of ours to start from. towards: a base's autoencoder; ratio times latent_alignment_loss comes on top."""
    torch.manual_seed(seed)
    ae = ae_class(cfg)(cfg).to(device, memory_format=torch.channels_last).train()
    reading = nn.Conv2d(cfg.channels, towards.cfg.channels, 1).to(device) if towards else nn.Identity()
    params = [*ae.parameters(), *reading.parameters()]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    if start:
        load = read_tensors(start)
        ae.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load.items()})
    state_file, file, first = Path(f"{out}.train"), Path(f"{out}.safetensors"), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        ae.load_state_dict(state["model"]), reading.load_state_dict(state["reading"]), opt.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"continuing {state_file} at step {first}")
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=cfg.name)
    for step in bar:
        for g in opt.param_groups:                                    # warm-up, then linear to zero
            g["lr"] = lr * min(1.0, (step + 1) / 200, (steps - step) / (0.6 * steps))
        torch.manual_seed(seed * 1_000_003 + step)                    # resuming needs no generator state
        x = source.batch(torch.randint(len(source), (batch,)))[0].to(device, memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss, said = training_loss(ae, x, beta, noise, (lambda x, z: ratio * latent_alignment_loss(towards, reading, x, z)) if towards else None)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}; nothing was written after the last checkpoint, {state_file}")
        opt.step()
        if (step + 1) % 50 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in said.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            with atomic(state_file) as tmp:
                torch.save({"model": ae.state_dict(), "reading": reading.state_dict(), "optimizer": opt.state_dict(), "step": step + 1}, tmp)
    scale, shift = measure_scale(ae.requires_grad_(False).eval(), source)
    done = replace(cfg, scale=scale, shift=shift)
    write_tensors(file, {k: v.bfloat16() if v.is_floating_point() else v for k, v in ae.state_dict().items()}, asdict(done))
    print(f"wrote {file} (scale {scale:.4f}, shift {shift:.4f})")


def measure_scale(ae: Autoencoder, source, n: int = 512) -> tuple[float, float]:
    """Scale and shift that give this source's latents zero mean and unit standard deviation, over all channels."""
    n, device = min(n, len(source)), next(ae.parameters()).device
    with torch.no_grad():
        z = torch.cat([ae.moments(source.batch(torch.arange(i, min(i + 64, n)))[0].to(device))[0] for i in range(0, n, 64)])
    shift = float(z.mean()) if isinstance(ae.cfg, KLConfig) else 0.0  # DC-AE's convention has no shift
    return float(1 / (z - shift).square().mean().sqrt()), shift


# ---- main --------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ae", default="tiny-kl-f8c4", choices=AUTOENCODERS, metavar="NAME", help="one of: " + ", ".join(AUTOENCODERS))
    p.add_argument("--weights", metavar="FILE", help="its weight file, in any published layout (default: shipped, or the model hub's cache)")
    p.add_argument("--images", metavar="DIR", help="folder of pictures (default: procedural shapes)")
    p.add_argument("--res", type=int, default=128, help="pixels a side (default 128)")
    p.add_argument("--count", type=int, default=8, help="pictures to reconstruct (default 8)")
    p.add_argument("--out", help="where to write, without a suffix (default: runs/NAME)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="arithmetic; auto = bf16 where it is faster (default auto)")
    p.add_argument("--train", action="store_true", help="train it from scratch instead")
    p.add_argument("--init", metavar="FILE", help="with --train: start from this file of ours, not from scratch")
    p.add_argument("--align-to", metavar="NAME", help="with --train: pull its latents towards those of this one, as the paper's A.9 does instead of embedding alignment")
    p.add_argument("--align-weights", metavar="FILE", help="weight file of that one (default: shipped, or the model hub's cache)")
    p.add_argument("--align-ratio", type=float, default=1.0, help="weight of that loss (default 1; the paper tries 0.1, 1 and 10)")
    p.add_argument("--steps", type=int, default=3000, help="training steps (default 3000)")
    p.add_argument("--batch", type=int, default=16, help="pictures a step (default 16)")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    p.add_argument("--beta", type=float, default=3e-4, help="weight of the KL term, per latent number (default 3e-4)")
    p.add_argument("--noise", type=float, default=0.2, help="DC-AE: noise on the latent while training (default 0.2, 0 = none)")
    p.add_argument("--seed", type=int, default=0, help="of the training run (default 0)")
    args = p.parse_args(argv)
    out = args.out or f"runs/{args.ae}"
    dtype = torch.bfloat16 if args.dtype == "bf16" or (args.dtype == "auto" and fast_bf16(args.device)) else torch.float32
    if args.train:
        source = open_source(args.images, args.res)
        towards = load_autoencoder(args.align_to, args.align_weights, device=args.device) if args.align_to else None
        return train_autoencoder(ae_config(args.ae), source, out, args.steps, args.batch, args.lr, args.beta, args.noise, args.seed, args.device, dtype, args.init,
                                 towards=towards, ratio=args.align_ratio)

    source = open_source(args.images, args.res, "all" if args.images else "val")     # procedural: none that it was trained on
    ae = load_autoencoder(args.ae, args.weights, device=args.device)
    n, rows = min(args.count, len(source)), []
    print(f"{args.ae}: {args.res}x{args.res} -> {args.res // ae.cfg.f}x{args.res // ae.cfg.f} places of {ae.cfg.channels} channels, {dtype} on {args.device}")
    print("picture  PSNR dB    SSIM")
    for i in range(n):
        x = source.batch(torch.tensor([i]))[0].to(args.device)
        y, encode, decode = reconstruct(ae, x, dtype)
        rows.append((psnr(x, y).item(), ssim(x, y).item(), encode, decode, torch.cat([x, y], dim=2).cpu()))
        print(f"{i:7d}  {rows[-1][0]:7.2f}  {rows[-1][1]:6.4f}")
    mean, median = lambda k: sum(r[k] for r in rows) / n, lambda k: sorted(r[k] for r in rows)[n // 2]
    print(f"   mean  {mean(0):7.2f}  {mean(1):6.4f}")
    memory = f", peak {torch.cuda.max_memory_allocated(args.device) / 2**30:.2f} GiB" if torch.device(args.device).type == "cuda" else ""
    print(f"a picture: encode {median(2):.3f} s, decode {median(3):.3f} s (median){memory}")
    pixels = ((torch.cat([r[4] for r in rows], dim=3)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with atomic(f"{out}.png") as tmp:
        Image.fromarray(pixels).save(tmp, "png")
    print(f"wrote {out}.png: {n} originals above their reconstructions")


if __name__ == "__main__":
    run(main)
