"""Fig. 3, 5 and 19 of the paper: aligned or not, LoRA or every weight, against training steps.

    python experiments/convergence.py
    python experiments/convergence.py --base dit-xl --images DIR --classifier FILE --steps 0.02

Four ways from one base: with and without stages 1 and 2, then LoRA or full fine-tuning. Steps count from the
base, so that those without alignment have as many more of stage 3. Each run is drawn and scored at five
points of it, by its moving average; the rate is constant after the warm-up, for a point must not depend on
how far the run goes on. convergence-curves.png has validation loss and gradient norm (Fig. 19).
"""

import shutil
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from checkpoints import atomic, run_file
from evaluate import curves, plot
from experiments.harness import Experiment, parser, read_log, total_steps
from flags import run_main

NAME = "convergence"
POINTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)   # of stage 3
CURVES = ("val_loss", "grad_norm")


def score_on_the_way(x: Experiment, seed: int, name: str, before: int, points: list[int], *flags):
    """Train a run to each of these steps in turn, and score it there. before: steps of its alignment."""
    for steps in points:
        snapshot = x.run_folder(seed, name) / f"step-{before + steps:06d}.safetensors"
        if not snapshot.exists():
            run = x.finetune(seed, name, steps, *flags)
            with atomic(snapshot) as tmp:
                shutil.copyfile(run_file(run), tmp)
        x.score(seed, name, snapshot)

    # its curves, on the steps of all stages
    log = curves(read_log(x.run_folder(seed, name)), CURVES)
    shifted = {key: [(before + step, value) for step, value in line] for key, line in log.items()}
    x.result.setdefault("curves", {}).setdefault(name, {})[str(seed)] = shifted


def mean_curves(by_seed: dict[str, dict], measure: str) -> list[tuple[float, float]]:
    """[(step, mean over the seeds), ...]"""
    values = {}
    for found in by_seed.values():
        for step, value in found[measure]:
            values.setdefault(step, []).append(value)
    return [(step, mean(numbers)) for step, numbers in sorted(values.items())]


def main(argv=None):
    sets = ("--tune", "--schedule", "--sample-every")
    x = Experiment(NAME, parser(__doc__, NAME), argv, sets)
    points = sorted({max(1, round(share * x.steps(3))) for share in POINTS})
    every = ("--schedule", "constant", "--sample-every", max(1, points[-1] // 32))
    for seed in x.seeds():
        aligned = x.align(seed, "aligned")
        before = total_steps(aligned)
        later = [before + steps for steps in (0, *points)]
        x.score(seed, "base", None)
        x.score(seed, "aligned, trunk frozen", aligned)
        for tune in ("lora", "full"):
            how = ("--tune", tune, *every)
            score_on_the_way(x, seed, f"aligned-{tune}", before, points, "--init", aligned, *how)
            score_on_the_way(x, seed, f"noalign-{tune}", 0, later, "--init", "base", *how)
    columns = {title: [x.lines("steps", measure)] for title, measure in
               ((f"share right ({x.quality})", x.quality), ("Frechet distance", "frechet"))}
    plot(x.folder / f"{NAME}.png", columns, "steps of all stages")
    by_row = x.result["curves"].items()
    columns = {measure: [{row: mean_curves(by_seed, measure) for row, by_seed in by_row}]
               for measure in CURVES}
    plot(x.folder / f"{NAME}-curves.png", columns, "steps of all stages", log=True)
    x.show()


if __name__ == "__main__":
    run_main(main)
