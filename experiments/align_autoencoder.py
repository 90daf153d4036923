"""Table 10 of the paper (A.9): what if the autoencoder is aligned, and not the model?

DC-Gen leaves the deep autoencoder as it is and aligns the model's embedder to it. The opposite is compared
here: the autoencoder is fine-tuned until its latents resemble those that the base was trained on, and the
model then learns without any alignment of its own. The paper finds DC-Gen ahead at all ratios, 0.1, 1 and 10.

    python experiments/align_autoencoder.py --ratio 1      1. pulls tiny-dc-ae-f32c32 towards tiny-kl-f8c4
    python finetune.py --init base --ae-weights FILE       2. trains on it; the script prints this command
    python align.py && python finetune.py                  DC-Gen, to compare with

    python experiments/align_autoencoder.py --ae dc-ae-f32c32-in-1.0 --to flux-vae-f8c16 --images DIR
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from autoencoder import AUTOENCODERS, Autoencoder
from checkpoints import load_autoencoder
from data import open_source
from experiments.make_weights import AE_PLAN, train_autoencoder
from flags import Parser, at_least, device_here, positive, run_main
from model import BASES
from train import Plan


class LatentAlignment(nn.Module):
    """The loss that pulls a deep latent space towards a base's. The paper does not say how two of different
    size are compared; here the base's latents, averaged over each deep cell, are to be a linear map of the
    deep ones: `reading`, C' to C channels, which learns along and is thrown away."""

    def __init__(self, base: Autoencoder, channels: int, ratio: float):
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.reading = nn.Conv2d(channels, base.cfg.channels, 1)
        self.ratio = ratio

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Pictures x (B,3,fH,fW), their raw deep latents z (B,C',H,W) -> scalar"""
        with torch.no_grad():
            target = self.base.encode(x).float()                     # B C h w, finer
        target = F.adaptive_avg_pool2d(target, z.shape[-2:])         # B C H W
        return self.ratio * F.mse_loss(self.reading(z).float(), target)


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--ae", default="tiny-dc-ae-f32c32", choices=AUTOENCODERS, metavar="NAME",
                   help="the deep autoencoder that is fine-tuned (default tiny-dc-ae-f32c32)")
    p.add_argument("--init", metavar="FILE", help="its weights (default: shipped, or the model hub's cache)")
    p.add_argument("--to", default="tiny-kl-f8c4", choices=AUTOENCODERS, metavar="NAME",
                   help="the base's autoencoder (default tiny-kl-f8c4)")
    p.add_argument("--ratio", type=at_least(float, 0), default=1.0,
                   help="weight of the alignment loss (default 1)")
    p.add_argument("--steps", type=at_least(int, 1), default=3000, help="optimiser steps (default 3000)")
    p.add_argument("--batch", type=at_least(int, 1), default=16, help="pictures a step (default 16)")
    p.add_argument("--lr", type=positive, default=1e-3, help="peak learning rate (default 1e-3)")
    p.add_argument("--images", metavar="DIR", help="folder of pictures (default: procedural shapes)")
    p.add_argument("--res", type=at_least(int, 1), default=128, help="pixels a side (default 128)")
    p.add_argument("--out", metavar="FILE", help="what is written (default runs/AE-RATIO.safetensors)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = p.parse_args(argv)
    device_here(args.device)
    file = Path(args.out or f"runs/{args.ae}-{args.ratio:g}.safetensors")
    if file.exists():
        raise ValueError(f"{file} is finished; give another --out")

    # every weight of the deep autoencoder learns; the base's is only read
    source = open_source(args.images, args.res)
    ae = load_autoencoder(args.ae, args.init, device=args.device)
    base = load_autoencoder(args.to, device=args.device)
    torch.manual_seed(0)
    alignment = LatentAlignment(base, ae.cfg.channels, args.ratio).to(args.device)
    plan = Plan(args.steps, args.lr, args.batch, **AE_PLAN)
    train_autoencoder(ae, source, file, plan, alignment)
    name = next(name for name, cfg in BASES.items() if cfg.ae == args.to)
    print(f"next: python finetune.py --base {name} --init base --ae {args.ae} --ae-weights {file}")


if __name__ == "__main__":
    run_main(main)
