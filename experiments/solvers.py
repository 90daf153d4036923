"""Ours: the closed form against AdamW, per sample and per second, with and without the joint phase.

    python experiments/solvers.py
    python experiments/solvers.py --base tiny-flux --seeds 0

Stage 1, then the head alone, then both stages, the joint phase by the flow loss alone or, where the recipe
holds Eq. 1, with that beside it. Seconds are those of the solving, with its data, without loading, validation
and scores. `loss` is stage 1's, or the flow's on the noisy samples of the head; val_loss is the flow's on
unseen pictures.
"""

import json
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import align
from checkpoints import read_config, run_file, write_json
from evaluate import plot
from experiments.harness import Experiment, parser, read_log, total_steps
from flags import positive, run_main
from train import read_settings

NAME = "solvers"
HEAD_SAMPLES = (2048, 8192, 32768)          # times --steps


# ---- runs that are clocked -----------------------------------------------------------------------

@contextmanager
def clocked(file: Path):
    """Inside, align.py's closed forms leave their seconds and losses in this file, as they end."""
    own = {name: getattr(align, name) for name in ("solve_embedder", "solve_head")}
    found = {}

    def clock(name):
        def solve(*args):
            begun = time.perf_counter()
            loss = own[name](*args)
            found[name] = dict(seconds=time.perf_counter() - begun, loss=loss)
            write_json(file, found)
            return loss
        return solve

    for name in own:
        setattr(align, name, clock(name))
    try:
        yield
    finally:
        for name, solve in own.items():
            setattr(align, name, solve)


class Solved:
    """A finished run of align.py whose solving was clocked. flags: align.py's."""

    def __init__(self, x: Experiment, seed: int, name: str, *flags):
        file = x.run_folder(seed, name) / "solvers.json"
        with clocked(file):
            self.run = x.align(seed, name, *flags)
        self.closed = json.loads(file.read_text()) if file.exists() else {}
        used = read_settings(self.run)["flags"]
        self.batches = {"stage1": x.recipe.stage1.batch, "stage2": used["batch"]}
        self.last = read_config(run_file(self.run))["stages"][-1]    # gap and validation loss

    def row(self, solver: str) -> dict:
        """Seconds and loss of a closed form."""
        return {**self.closed[solver], **self.judged()}

    def judged(self) -> dict:
        return {key: self.last[key] for key in ("val_loss", "gap")}

    def log(self, stage: str) -> list[dict]:
        """The rows of a stage by AdamW, with the samples and seconds until then."""
        rows = []
        samples = 0
        seconds = 0.0
        for row in read_log(self.run):
            if row["stage"] != stage or "step" not in row:
                continue
            if "images_per_s" in row:                                # else a validation
                size = self.batches[stage] * row["step"] - samples
                samples += size
                seconds += size / row["images_per_s"]
            rows.append(row | dict(samples=samples, seconds=seconds))
        return rows

    def adamw_row(self, stage: str) -> dict:
        """Samples, seconds and loss of a stage by AdamW."""
        last = [row for row in self.log(stage) if "loss" in row][-1]
        return {key: last[key] for key in ("seconds", "loss")} | self.judged()

    def seconds(self) -> float:
        """Of all that was solved."""
        logs = [self.log(stage) for stage in self.batches]
        by_adamw = sum(log[-1]["seconds"] for log in logs if log)
        return by_adamw + sum(solver["seconds"] for solver in self.closed.values())


# ---- what is compared ----------------------------------------------------------------------------

def compare_stage1(x: Experiment, seed: int):
    closed = Solved(x, seed, "stage1-closed", "--head-samples", 0, "--stage2-steps", 0)
    adamw = Solved(x, seed, "stage1-adamw", "--solver", "adamw", "--stage2-steps", 0)
    pictures = read_settings(closed.run)["facts"]["pictures"]
    x.add(seed, "stage 1, closed form", partial(listed, closed.row, "solve_embedder"), samples=pictures)
    samples = x.steps(1) * x.recipe.stage1.batch
    x.add(seed, "stage 1, AdamW", partial(listed, adamw.adamw_row, "stage1"), samples=samples)


def compare_head(x: Experiment, seed: int):
    sizes = [max(2, round(x.args.steps * samples)) for samples in HEAD_SAMPLES]
    for samples in sizes:
        flags = ("--head-samples", samples, "--stage2-steps", 0)
        closed = Solved(x, seed, f"head-closed-{samples}", *flags)
        x.add(seed, "head, closed form", partial(listed, closed.row, "solve_head"), samples=samples)
    batch = closed.batches["stage2"]
    steps = max(1, sizes[-1] // batch)
    flags = ("--head-samples", 0, "--head-only", "--no-final-adaln", "--schedule", "constant")
    adamw = Solved(x, seed, "head-adamw", *flags, "--lr2", x.args.head_lr, "--stage2-steps", steps)
    x.add(seed, "head, AdamW", partial(listed, adamw.adamw_row, "stage2"), samples=steps * batch)
    watched = [row for row in adamw.log("stage2") if "val_loss" in row]
    curves = x.result.setdefault("head by AdamW", {})
    curves[str(seed)] = [[row["samples"], row["seconds"], row["val_loss"]] for row in watched]


def compare_both(x: Experiment, seed: int):
    ways = {
        "both, closed form": ("--stage2-steps", 0),
        "both, closed form, joint phase": ("--stage2-steps", x.steps(2), "--hold", 0),
        "both, AdamW, joint phase": ("--solver", "adamw", "--hold", 0),
    }
    if x.recipe.hold:
        ways["both, closed form, Eq. 1 held"] = ("--stage2-steps", x.steps(2), "--hold", x.recipe.hold)
    for row, flags in ways.items():
        solved = Solved(x, seed, row.replace(", ", "-").replace(" ", "-").replace(".", ""), *flags)

        def rows(solved=solved):
            found = {"seconds": solved.seconds(), "val_loss": solved.last["val_loss"]}
            return [found | row for row in x.judge.rows(solved.run, seed)]

        x.add(seed, row, rows, steps=total_steps(solved.run))


def listed(make, *args) -> list[dict]:
    return [make(*args)]


def draw_plot(x: Experiment):
    """Validation loss of the head by samples and by seconds; the curve is the first seed's."""
    by_adamw = next(iter(x.result["head by AdamW"].values()))
    solved = [row for row in x.summary() if row["row"] == "head, closed form"]
    columns = {}
    for i, unit in enumerate(("samples", "seconds")):
        closed = sorted((row[unit], row["val_loss"]) for row in solved)
        adamw = [(point[i], point[2]) for point in by_adamw]
        columns[f"validation loss of the head, by {unit}"] = [{"closed form": closed, "AdamW": adamw}]
    plot(x.folder / f"{NAME}.png", columns, "samples or seconds")


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    p = parser(__doc__, NAME)
    p.add_argument("--head-lr", type=positive, default=3e-3,
                   help="learning rate of the head alone by AdamW (default 3e-3)")
    sets = ("--solver", "--head-samples", "--head-only", "--schedule", "--final-adaln", "--no-final-adaln",
            "--hold")
    x = Experiment(NAME, p, argv, sets)
    for seed in x.seeds():
        compare_stage1(x, seed)
        compare_head(x, seed)
        compare_both(x, seed)
    draw_plot(x)
    x.show()


if __name__ == "__main__":
    run_main(main)
