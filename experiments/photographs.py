"""DC-Gen on real photographs, from a file of pictures to the scores, with this repository's small models.

    python experiments/photographs.py --npz FILE                  pictures in one file, see unpack.py
    python experiments/photographs.py --images DIR --unseen DIR   class folders, as Imagenette's train and val

    autoencoders  the bundled ones know procedural pictures and blur photographs, so they learn these too
    classifier    of these pictures, at 64 px: its 128 features are the space of the Frechet distance
    base          from random numbers, at one size, then at two: stage 1 reads its embeddings of small ones
    every seed    align.py, by its closed forms alone and as a whole; LoRA by finetune.py; "not aligned", LoRA
                  without alignment of as many steps in all

Real pictures that nothing has learned from ("unseen"), and their reconstructions, are scored as drawn ones
are: a floor for the distance, and how often the classifier itself is right. All rows have as many pictures,
so their distances compare. photographs.png shows them. What is finished is skipped, what was killed resumes.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import finetune
from checkpoints import load_autoencoder
from data import open_source
from evaluate import balanced_rows, batches, psnr, reconstruct
from experiments.harness import Experiment, parser, total_steps
from experiments.make_weights import AE_PLAN, PLANS, make_classifier, train_autoencoder, train_two_sizes
from experiments.unpack import unpack
from flags import check_paths, run_main
from sample import save_grid
from train import DataSettings, Plan, is_finished

NAME = "photographs"
# flags of the three scripts that this one gives itself
SETS = ("--weights", "--ae", "--ae-weights", "--base-ae-weights", "--classifier", "--num-classes",
        "--captions", "--any-classes", "--pictures", "--flip", "--cache", "--res")

# each size of pictures goes on from the one before: small ones are cheap, and the base reads both
AE_PLANS = {
    "tiny-kl-f8c4": {64: Plan(2000, 1e-3, 16, **AE_PLAN), 128: Plan(300, 6e-4, 16, **AE_PLAN)},
    "tiny-dc-ae-f32c32": {128: Plan(1500, 1e-3, 16, **AE_PLAN)},
}
BASE_STEPS = 2400
BASE = "--init scratch --batch 64 --lr 1e-3 --schedule cosine --ema 0.999 --flip"


# ---- pictures ------------------------------------------------------------------------------------

def open_photographs(x: Experiment) -> tuple[str, object]:
    """The folder to train on, and the source of unseen pictures. ValueError unless both have the same
    classes."""
    images = x.args.images
    unseen = x.args.unseen
    if x.args.npz:
        folder = x.folder / "pictures"
        if not folder.exists():
            unpack(x.args.npz, x.args.names, folder)
        images = str(folder / "train")
        unseen = str(folder / "unseen")
    # without a folder of their own: those that every command keeps from training
    source = open_source(unseen or images, x.cfg.res, "all" if unseen else "val")
    classes = open_source(images, x.cfg.res).classes
    if not classes:
        raise ValueError(f"--images {images}: no class folders; sort the pictures into a folder a class")
    if source.classes != classes:
        raise ValueError(f"--unseen {unseen}: its class folders are not those of {images}; rename them")
    return images, source


# ---- what is trained once ------------------------------------------------------------------------

def stage(x: Experiment, name: str, make: Callable[..., dict], *args) -> dict:
    """What make(x, *args) returns, with its minutes; kept in the table, where a second command reads it."""
    stages = x.result.setdefault("stages", {})
    if name not in stages:
        print(f"\n== {NAME}: {name}", flush=True)
        begun = time.time()
        x.write()                           # the settings, before anything is trained with them
        try:
            stages[name] = make(x, *args) | {"minutes": round((time.time() - begun) / 60, 2)}
        finally:
            x.write()
    print(f"{name}: {stages[name]}", flush=True)
    return stages[name]


def scaled(x: Experiment, plan: Plan) -> Plan:
    share = x.args.steps
    return replace(plan, steps=max(1, round(share * plan.steps)), warmup=round(share * plan.warmup))


def mean_psnr(ae, source) -> float:
    """Of the reconstructions of all pictures of a source, dB."""
    device = next(ae.parameters()).device
    values = []
    for images, _ in batches(source, torch.arange(len(source))):
        images = images.to(device)
        values.append(psnr(images, reconstruct(ae, images)[0]))
    return round(float(torch.cat(values).mean()), 2)


def tune_autoencoder(x: Experiment, name: str, images: str, unseen) -> dict:
    """Train a bundled autoencoder further, on photographs; its PSNR on unseen ones, in dB."""
    ae = load_autoencoder(name, device=x.args.device)
    before = mean_psnr(ae, unseen)
    for res, plan in AE_PLANS[name].items():
        file = x.folder / f"{name}-{res}px.safetensors"
        if not file.exists():
            train_autoencoder(ae, open_source(images, res), file, scaled(x, plan))
        ae = load_autoencoder(name, str(file), device=x.args.device)
    return {"file": str(file), "psnr before": before, "psnr": mean_psnr(ae, unseen)}


def train_classifier(x: Experiment, images: str) -> dict:
    file = x.folder / "classifier.safetensors"
    if not file.exists():
        make_classifier(file, x.args.device, images, scaled(x, PLANS["classifier"]))
    return {"file": str(file)}


def train_base(x: Experiment, images: str, num_classes: int, ae_weights: str) -> dict:
    """From random numbers at one size, then at two."""
    first = x.folder / "base-one-size"
    cache = str(x.folder / "cache")
    if not is_finished(first):
        steps = max(1, round(x.args.steps * BASE_STEPS))
        flags = (*BASE.split(), "--warmup", steps // 12, "--num-classes", num_classes, "--any-classes",
                 "--images", images, "--ae-weights", ae_weights, "--cache", cache)
        own = ["--previews", 0]
        x.train(finetune.main, finetune.parser(), first, 0, own, flags, ["--train-steps", steps])
    run = x.folder / "base"
    settings = DataSettings(images=images, flip=True, cache=cache)
    train_two_sizes(first, run, x.args.device, scaled(x, PLANS["two sizes"]), settings)
    return {"file": str(run), "steps": total_steps(run)}


# ---- rows and pictures ---------------------------------------------------------------------------

def real_pictures(x: Experiment, unseen, count: int, ae: tuple[str, str] | None) -> tuple:
    """Unseen pictures (B,3,H,W) whose classes take turns, or their reconstructions by an autoencoder (name,
    file); labels (B,)"""
    images, labels = unseen.batch(balanced_rows(unseen, count))
    if ae:
        ae = x.judge.load_ae(*ae)
        images = torch.cat([reconstruct(ae, part.to(x.args.device))[0].cpu() for part in images.split(64)])
    return images, labels


def score_real(x: Experiment, row: str, unseen, ae: tuple[str, str] | None):
    """Add the scores of unseen pictures, which belong to no seed and are kept under 0."""
    def make():
        images, labels = real_pictures(x, unseen, x.args.count, ae)
        return [x.judge.metrics(images, labels, [])]

    x.add(0, row, make)


def draw_sheet(x: Experiment, unseen, real: dict[str, tuple | None], runs: dict[str, Path | None]):
    """Write eight pictures of every row, in the order of their classes, unless the sheet is there."""
    file = x.folder / f"{NAME}.png"
    if file.exists():
        return
    sheet = []
    for row, ae in real.items():
        images, labels = real_pictures(x, unseen, len(unseen.classes), ae)
        sheet.append((row, images[labels.argsort()][:8]))
    for row, run in runs.items():
        for guidance in x.judge.task.guidance:
            sheet.append((f"{row}\nguidance {guidance:g}", x.judge.draw(run, guidance)))
    save_grid(file, sheet, x.judge.task.titles[:8])


# ---- main ----------------------------------------------------------------------------------------

def open_experiment(argv) -> Experiment:
    """ValueError unless there are pictures, and the base is a class model on the bundled autoencoders."""
    p = parser(__doc__, NAME)
    p.add_argument("--npz", metavar="FILE", help="pictures in one file; every tenth of a class is unseen")
    p.add_argument("--names", metavar="FILE",
                   help="with --npz: its classes (default: the only *classes.json beside it)")
    p.add_argument("--images", metavar="DIR", help="class folders to train on")
    p.add_argument("--unseen", metavar="DIR",
                   help="with --images: class folders to compare with (default: every 20th of --images)")
    x = Experiment(NAME, p, argv, SETS)
    check_paths(x.args, "npz", "names", "images", "unseen")
    if bool(x.args.npz) == bool(x.args.images):
        raise ValueError("--npz FILE or --images DIR: give one of them")
    if (x.args.names and not x.args.npz) or (x.args.unseen and not x.args.images):
        raise ValueError("--names goes with --npz, --unseen with --images; leave it out")
    if x.cfg.text_encoder or not {x.cfg.ae, x.recipe.ae} <= AE_PLANS.keys():
        raise ValueError(f"--base {x.args.base}: no class model on the bundled autoencoders; take tiny")
    return x


def main(argv=None):
    x = open_experiment(argv)
    images, unseen = open_photographs(x)
    # a distance compares with that of real pictures only if both are of as many
    x.args.count = min(x.args.count, len(unseen))

    # both autoencoders, the classifier, and a base, which is the table's from here on
    shallow = stage(x, x.cfg.ae, tune_autoencoder, x.cfg.ae, images, unseen)["file"]
    deep = stage(x, x.recipe.ae, tune_autoencoder, x.recipe.ae, images, unseen)["file"]
    classifier = stage(x, "classifier", train_classifier, images)["file"]
    x.args.base = stage(x, "base", train_base, images, len(unseen.classes), shallow)["file"]
    x.judged = ["--images", images, "--classifier", classifier]

    real = {
        "unseen": None,
        "unseen, base's autoencoder": (x.cfg.ae, shallow),
        "unseen, deep autoencoder": (x.recipe.ae, deep),
    }
    for row, ae in real.items():
        score_real(x, row, unseen, ae)
    data = ("--images", images, "--flip", "--ae-weights", deep, "--cache", x.folder / "cache")
    for seed in x.seeds():
        solved = x.align(seed, "closed-forms", *data)
        aligned = x.align(seed, "aligned", *data, joint=True)
        lora = x.finetune(seed, "aligned-lora", x.steps(3), "--init", aligned, *data)
        noalign = x.finetune(seed, "noalign-lora", total_steps(lora), "--init", "base", *data)
        runs = {
            "base": None,
            "closed forms, trunk frozen": solved,
            "aligned, trunk frozen": aligned,
            "aligned, LoRA": lora,
            "not aligned, LoRA": noalign,
        }
        for row, run in runs.items():
            x.score(seed, row, run)
        draw_sheet(x, unseen, real, runs)
    x.show()


if __name__ == "__main__":
    run_main(main)
