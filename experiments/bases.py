"""Bases that differ from `tiny` in one thing and are trained equally: the causes "width" and "richer latents"
of causes.py.

    python experiments/bases.py                      all of them, about an hour on two CPU cores
    python experiments/bases.py --only plain wide    some of them

    base     width   latent                what it is
    plain    192     f8, 4 channels        tiny, trained for fewer steps: what the others compare with
    narrow   96      f8, 4 channels        a quarter of the weights
    wide     256     f8, 4 channels        1.8 times the weights
    rich     192     f8, 16 channels       64 numbers a token, as FLUX has, for 32 in the new space

All at 128 px only and from random numbers. The autoencoder of 16 channels begins as the bundled one of 4, but
for the convolutions at its latent. Every base is a run in --out, drawn and scored; finished ones are skipped.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import finetune
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import load_autoencoder, write_json
from data import open_source
from experiments.harness import Judge
from experiments.make_weights import AE_PLAN, train_autoencoder
from flags import Parser, add_device_arg, at_least, device_here, run_main
from model import BASES
from train import Plan, has_state, is_finished

RICH = "tiny-kl-f8c16"
AE_PLANS = {64: Plan(800, 1e-3, 16, **AE_PLAN), 128: Plan(200, 6e-4, 16, **AE_PLAN)}
WIDTHS = {"plain": 192, "narrow": 96, "wide": 256, "rich": 192}
FLAGS = ("--init scratch --train-steps 2000 --warmup 150 --pictures 16384 --batch 64 --lr 1e-3 "
         "--schedule cosine --ema 0.999 --previews 0 --compile")


def register(name: str) -> str:
    """Make a base of WIDTHS a preset of this process; returns the preset's name."""
    tiny = BASES["tiny"]
    if name == "rich":
        plain = AUTOENCODERS[tiny.ae]
        AUTOENCODERS[RICH] = replace(plain, name=RICH, channels=16, weights=None)
        tiny = replace(tiny, in_channels=16, ae=RICH)
    width = WIDTHS[name]
    BASES[f"tiny-{name}"] = replace(tiny, hidden_size=width, num_heads=width // 32, weights=None)
    return f"tiny-{name}"


def make_rich_autoencoder(folder: Path, device: str) -> Path:
    """The bundled KL-VAE with 16 channels: small pictures first, as the bundled one learned them."""
    plain = load_autoencoder(BASES["tiny"].ae)
    torch.manual_seed(0)
    ae = build_autoencoder(AUTOENCODERS[RICH])
    fitting = {name: v for name, v in plain.state_dict().items() if v.shape == ae.state_dict()[name].shape}
    ae.load_state_dict(ae.state_dict() | fitting)
    ae.to(device, memory_format=torch.channels_last)
    for res, plan in AE_PLANS.items():
        file = folder / f"{RICH}-{res}px.safetensors"
        if not file.exists():
            train_autoencoder(ae, open_source(None, res), file, plan)
        ae = load_autoencoder(RICH, str(file), device=device)
    return file


def make_base(name: str, out: Path, device: str) -> Path:
    """The finished run of a base, in a folder of `out`."""
    preset = register(name)
    run = out / name
    if is_finished(run):
        return run
    flags = ["--base", preset, *FLAGS.split(), "--out", run, "--device", device]
    if name == "rich":
        flags += ["--ae-weights", make_rich_autoencoder(out, device)]
    if has_state(run):
        flags += ["--resume"]
    finetune.main(list(map(str, flags)))
    return run


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=WIDTHS, metavar="BASE", help="some of them (default all)")
    p.add_argument("--count", type=at_least(int, 8), default=256, help="pictures to score (default 256)")
    p.add_argument("--out", default="runs/bases", metavar="DIR", help="of the runs (default runs/bases)")
    add_device_arg(p)
    args = p.parse_args(argv)
    device_here(args.device)
    for name in args.only or WIDTHS:
        run = make_base(name, Path(args.out), args.device)
        scores = Judge(str(run), args.count, ["--device", args.device]).rows(None, seed=0)[0]
        write_json(run / "scores.json", scores | {"count": args.count})
        print(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in scores.items())}; in {run}/")


if __name__ == "__main__":
    run_main(main)
