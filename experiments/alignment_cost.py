"""What aligning FLUX-12B costs, projected from counted operations: nothing is trained, no weight is read.

    python experiments/alignment_cost.py
    python experiments/alignment_cost.py --base sana-1.6b --res 1024 --efficiency 0.35

Stages 1 and 2 with Table 7's steps and batches. Every sample's picture is encoded anew, in stage 1 by both
autoencoders. In stage 2 a sample costs three passes of the model: forward, the null branch of Eq. 6, and the
gradient through the frozen trunk, counted as a forward pass, for it has none for weights; two for a base
that is not distilled. Stage 1's own map is nothing beside that.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from align import recipe_of
from autoencoder import ae_config, build_autoencoder
from fast import count_cost, example_condition
from flags import Parser, at_least, positive, run_main, within
from model import BASES, FAMILIES, to_deep_latent
from sample import latent_size


def count_alignment(base: str, res: int, text_tokens: int) -> dict[str, float]:
    """Floating-point operations of stages 1 and 2 at this size: of the autoencoders and of the model."""
    recipe = recipe_of(BASES[base])
    cfg = to_deep_latent(BASES[base], ae_config(recipe.ae))
    grid = latent_size(cfg, ae_config(cfg.ae), (res, res))
    # on meta a model of 12B takes no memory and its forward pass no time
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg).requires_grad_(False)
        z = torch.empty(1, cfg.in_channels, *grid)
        forward = count_cost(model, z, torch.empty(1), example_condition(cfg, 1, text_tokens)).flops
        encode = {}
        for name in (BASES[base].ae, cfg.ae):
            ae = build_autoencoder(ae_config(name)).requires_grad_(False).eval()
            encode[name] = count_cost(ae.moments, torch.empty(1, 3, res, res)).flops
    samples1 = recipe.stage1.steps * recipe.stage1.batch
    samples2 = recipe.stage2.steps * recipe.stage2.batch
    # with guidance distilled: a forward pass, the null branch's, and the gradient of the first one's input
    passes = 3 if getattr(cfg, "guidance_embed", False) else 2
    return {"stage 1, encoding": samples1 * sum(encode.values()),
            "stage 2, encoding": samples2 * encode[cfg.ae],
            "stage 2, model": samples2 * passes * forward}


def main(argv=None):
    p = Parser(__doc__, "[--base NAME]")
    p.add_argument("--base", default="flux-krea", choices=BASES, metavar="NAME",
                   help="what is aligned (default flux-krea)")
    p.add_argument("--res", type=at_least(int, 1), nargs="+", default=[512, 1024], metavar="PIXELS",
                   help="of the training pictures (default 512 1024)")
    p.add_argument("--text-tokens", type=at_least(int, 1), default=256,
                   help="of a prompt (default 256, as the authors' guides)")
    p.add_argument("--efficiency", type=within(float, 0.01, 1), default=0.4,
                   help="share of the peak that training reaches (default 0.4)")
    p.add_argument("--peak", type=positive, default=989.0,
                   help="10^12 operations a second of the GPU (default 989: an H100's dense bf16)")
    args = p.parse_args(argv)
    print(f"aligning {args.base}, GPU-hours at {args.efficiency:.0%} of {args.peak:g} TFLOP/s, "
          f"{args.text_tokens} text tokens; the paper gives 40 H100-days for all stages")
    for res in args.res:
        hours = {}
        for part, flops in count_alignment(args.base, res, args.text_tokens).items():
            hours[part] = flops / (args.efficiency * args.peak * 1e12) / 3600
        parts = ", ".join(f"{part} {value:.1f}" for part, value in hours.items())
        print(f"{res:5d} px: {sum(hours.values()):.1f} ({parts})")


if __name__ == "__main__":
    run_main(main)
