"""Two bases that differ from `tiny` in one thing each: the causes "width" and "richer latents" of causes.py.

    python experiments/bases.py --one-size RUN       both, 85 minutes on one CPU core
    python experiments/bases.py --only narrow

    narrow   half the width, 96, a quarter of the weights; trained as tiny was, from random numbers
    rich     f8 latents of 16 channels for 4: 64 numbers a token, as FLUX has, for 32 in the new space

Both know 128 px only. "rich" begins as --one-size, tiny before it saw its second size (`python
experiments/make_weights.py --only tiny` leaves it in runs/weights/tiny), with a new embedder and head, and
learns in every weight, at more noise, through which 16 channels show; its autoencoder begins as the bundled
one of 4 channels, but for the convolutions at its latent. A base is a run in --out, drawn and scored;
finished ones are skipped, what was killed resumes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import finetune
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import config_dict, load_autoencoder, load_run, write_json, write_tensors
from data import open_source
from experiments.harness import Judge
from experiments.make_weights import AE_PLAN, FLAGS, MODEL, train_autoencoder
from flags import Parser, add_device_arg, at_least, device_here, run_main
from model import BASES, to_deep_model
from train import Plan, has_state, is_finished, read_settings

NAMES = ("narrow", "rich")
RICH = "tiny-kl-f8c16"
AE_PLANS = {64: Plan(800, 1e-3, 16, **AE_PLAN), 128: Plan(200, 6e-4, 16, **AE_PLAN)}
# flags of finetune.py; at shift 1 the rich base drew 27 % right after 1500 steps, in colours without forms
NARROW = FLAGS["tiny"].replace("--base tiny", "--base tiny-narrow")
RICH_TUNING = f"--tune full --train-steps 4000 --warmup 100 {MODEL} --ema 0.999 --shift 3"


def register():
    """Make the narrow base and the rich autoencoder known to this process by their names."""
    tiny = BASES["tiny"]
    BASES["tiny-narrow"] = replace(tiny, hidden_size=96, num_heads=3, weights=None)
    AUTOENCODERS[RICH] = replace(AUTOENCODERS[tiny.ae], name=RICH, channels=16, weights=None)


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


def begin_rich(one_size: str, ae_weights: Path, file: Path) -> Path:
    """Write the trunk of a base between a random embedder and head for 16 channels."""
    base, info = load_run(one_size)
    torch.manual_seed(0)
    model = to_deep_model(base, replace(base.cfg, in_channels=16, ae=RICH))
    kept = {key: info[key] for key in ("base", "classes", "steps")}
    facts = kept | dict(base_weights=None, ae_weights=str(ae_weights), model=config_dict(model.cfg))
    write_tensors(file, model.state_dict(), facts)
    return file


def check_made(run: Path, flags: dict):
    """ValueError for a run of other settings than these."""
    made = read_settings(run)["flags"]
    for key in ("train_steps", "lr", "shift"):
        if key in flags and made[key] != flags[key]:
            raise ValueError(f"{run} was made with {key} {made[key]}, not {flags[key]}; give another --out")


def make_base(name: str, one_size: str | None, out: Path, device: str) -> Path:
    """The finished run of a base, in a folder of `out`."""
    run = out / name
    start = out / "rich-start.safetensors"
    flags = NARROW.split() if name == "narrow" else ["--init", start, *RICH_TUNING.split()]
    flags += ["--previews", 0, "--out", run, "--device", device]
    if is_finished(run):
        check_made(run, finetune.parser().typed(list(map(str, flags))))
        return run
    if name == "rich" and not start.exists():
        begin_rich(one_size, make_rich_autoencoder(out, device), start)
    if has_state(run):
        flags += ["--resume"]
    finetune.main(list(map(str, flags)))
    return run


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--only", choices=NAMES, help="one of them (default both)")
    p.add_argument("--one-size", metavar="RUN", help="for rich: tiny before it saw its second size")
    p.add_argument("--count", type=at_least(int, 8), default=256, help="pictures to score (default 256)")
    p.add_argument("--out", default="runs/bases", metavar="DIR", help="of the runs (default runs/bases)")
    add_device_arg(p)
    args = p.parse_args(argv)
    device_here(args.device)
    out = Path(args.out)
    if args.only != "narrow" and not args.one_size and not is_finished(out / "rich"):
        raise ValueError("rich needs --one-size RUN, tiny before it saw its second size: `python "
                         "experiments/make_weights.py --only tiny` leaves it in runs/weights/tiny")
    register()
    for name in [args.only] if args.only else NAMES:
        run = make_base(name, args.one_size, out, args.device)
        scores = Judge(str(run), args.count, ["--device", args.device]).rows(None, seed=0)[0]
        write_json(run / "scores.json", scores | {"count": args.count})
        print(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in scores.items())}; in {run}/")


if __name__ == "__main__":
    run_main(main)
