"""Fig. 4 of the paper: the gap to the base, layer by layer, and pictures of a trunk that was not tuned.

    python experiments/gap.py
    python experiments/gap.py --base tiny-flux --guidance-range 1 5

gap.png is Fig. 4a, a line a stage, the mean over the seeds. gap-pictures.png is Fig. 4b: what the first seed
draws after each stage, no weight of the trunk changed. The gap is align.py's, of clean latents: 0 for the
base's own features, 1 for their average.
"""

import shutil
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from checkpoints import atomic, read_config, run_file
from evaluate import plot_gap
from experiments.harness import Experiment, parser
from flags import run_main

NAME = "gap"


def mean_gaps(gaps: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """{seed: {stage: gaps of the layers}} -> {stage: means over the seeds}"""
    stages = next(iter(gaps.values()))
    means = {}
    for stage in stages:
        layers = zip(*(of_seed[stage] for of_seed in gaps.values()))
        means[stage] = [mean(layer) for layer in layers]
    return means


def main(argv=None):
    x = Experiment(NAME, parser(__doc__, NAME), argv, sets=("--previews",))
    gaps = x.result.setdefault("gaps", {})
    for seed in x.seeds():
        run = x.align(seed, "aligned", "--count", x.args.count, "--previews", 8)
        info = read_config(run_file(run))
        gaps[str(seed)] = info["gaps"]
        for stage in info["stages"]:
            name = stage.pop("stage")
            x.add(seed, name, [stage].copy)
        plot_gap(x.folder / f"{NAME}.png", mean_gaps(gaps))
        pictures = x.folder / f"{NAME}-pictures.png"
        if not pictures.exists():
            with atomic(pictures) as tmp:
                shutil.copyfile(run / "samples.png", tmp)
    x.show()


if __name__ == "__main__":
    run_main(main)
