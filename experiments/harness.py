"""What the tables and figures of this folder share.

    runs      a folder each under --out, by seed; what is finished is skipped, what was killed resumes
    rows      drawn and scored as evaluate.py does, kept in NAME.json as they come, each made once
    result    mean and spread over the seeds, printed and in NAME.json; NAME.png

The same command again goes on where it was killed, a finished one only prints its table; more --seeds may be
added. Flags that a script does not know itself go to align.py, finetune.py and evaluate.py, to each those
that it has.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import align
import evaluate
import finetune
from bench import environment
from checkpoints import read_base_config, read_run_config, run_file, write_json
from experiments.strategies import known_flags
from flags import Parser, add_device_arg, at_least, device_here, dtype_of, positive
from sample import save_grid
from train import has_state, is_finished, read_settings, versions

# flags of the three scripts that every experiment gives itself
OWN = {"--out", "--resume", "--seed", "--init", "--train-steps", "--stage1-steps", "--stage2-steps"}
# columns that say what a row is; all others are measured
KEYS = ("row", "rank", "steps", "samples", "guidance")


def parser(doc: str, name: str, base: str = "tiny") -> Parser:
    """The flags of every experiment; base: the default."""
    p = Parser(doc, "[--base NAME] [--seeds N N N] [flags of align.py, finetune.py, evaluate.py]")
    p.add_argument("--base", default=base, metavar="NAME|RUN", help=f"pretrained model (default {base})")
    p.add_argument("--steps", type=positive, default=1.0, metavar="SHARE",
                   help="training steps of every stage, as a share of the recipe's (default 1)")
    p.add_argument("--seeds", type=at_least(int, 0), nargs="+", default=[0, 1, 2], metavar="N",
                   help="a row is the mean over these (default 0 1 2)")
    p.add_argument("--count", type=at_least(int, 2), default=512, metavar="N",
                   help="pictures a row and seed (default 512)")
    p.add_argument("--out", default=f"runs/experiments/{name}", metavar="DIR",
                   help=f"runs and results (default runs/experiments/{name})")
    add_device_arg(p)
    return p


class Judge(evaluate.Judge):
    """Draws and scores the runs of one base by these flags of evaluate.py."""

    def __init__(self, base: str, count: int, flags: list[str]):
        args = evaluate.parser().parse_args(["--base", base, *flags])
        cfg, info = read_base_config(base)
        device = device_here(args.device)
        super().__init__(base, cfg, info, args, count, args.images, args.weights, device, dtype_of(args))
        if self.reason:
            print(f"note: no scores: {self.reason}")

    def rows(self, run: Path | None, seed: int) -> list[dict]:
        """The scores of a run's pictures, a row a guidance scale. seed: every one has noise of its own."""
        model, info, ae = self.load(run)
        row = {"name": "", **self.facts(model, info, ae)}
        seeds = [100_000 * seed + i for i in range(len(self.task.seeds))]
        table = evaluate.Table()
        table.add_model(row, model, info, ae, replace(self.task, seeds=seeds), self.res, self.metrics)
        # its words, name and sampler, are those of the whole table
        return [numbers_of(row) for row in table.rows]

    def draw(self, run: Path | None, guidance: float) -> torch.Tensor:
        """The first eight pictures of the task, (8,3,H,W)."""
        model, _, ae = self.load(run)
        task = self.task
        few = replace(task, conditions=task.conditions[:8], seeds=task.seeds[:8])
        return evaluate.draw(model, ae, few, self.res, guidance)[0]


class Experiment:
    """A table: its settings, its runs, its rows. name: of its files; p: of parser; sets: flags that it varies
    itself; judged: flags of evaluate.py unless the command has them. ValueError if the command gives one of
    `sets`, or --out holds the same table of other settings."""

    def __init__(self, name: str, p: Parser, argv=None, sets: tuple = (), judged: tuple = ()):
        self.args, self.flags = p.parse_known_args(argv)
        device_here(self.args.device)
        self.check_flags(OWN | set(sets))
        self.name = name
        self.judged = list(judged)
        self.folder = Path(self.args.out)
        self.file = self.folder / f"{name}.json"
        self.cfg, _ = read_base_config(self.args.base)
        self.recipe = align.recipe_of(self.cfg)
        free = ("seeds", "out", "device")
        settings = {key: value for key, value in vars(self.args).items() if key not in free}
        settings["flags"] = self.flags
        self.result = self.open(json.loads(json.dumps(settings)))
        self.result["command"] = " ".join([f"{name}.py", *(sys.argv[1:] if argv is None else argv)])
        self.since = time.time() - 60 * self.result["minutes"]

    def check_flags(self, taken: set[str]):
        if self.flags and not self.flags[0].startswith("--"):
            raise ValueError(f"unrecognised {self.flags[0]}")
        known = set()
        for script in (align, finetune, evaluate):
            known.update(known_flags(script.parser(), self.flags, ()))
        for word in self.flags:
            if word.split("=")[0] in taken:
                raise ValueError(f"{word}: this experiment sets it itself; leave it out")
            if word.startswith("--") and word not in known:
                raise ValueError(f"unrecognised {word}: no flag of this script, align.py, finetune.py or "
                                 "evaluate.py")

    def open(self, settings: dict) -> dict:
        """What NAME.json holds of these settings, or a new table."""
        if not self.file.exists():
            now = time.strftime("%Y-%m-%d %H:%M")
            return dict(settings=settings, began=now, minutes=0.0, finished=[], rows=[])
        result = json.loads(self.file.read_text())
        old = result["settings"]
        for key in old | settings:
            if old.get(key) != settings.get(key):
                raise ValueError(f"{self.file} was made with {key} {old.get(key)}, not {settings.get(key)}; "
                                 "give another --out")
        return result

    def write(self):
        """Keep the table as it is."""
        here = environment(torch.device(self.args.device))
        self.result |= dict(device=here["device"], versions=versions(), ended=here["date"],
                            minutes=round((time.time() - self.since) / 60, 3), summary=self.summary())
        write_json(self.file, self.result)

    # ---- runs ----

    def seeds(self):
        """Yield the seeds that are not finished; each is, once the loop comes back for the next."""
        for seed in self.args.seeds:
            if seed not in self.result["finished"]:
                self.write()                # the settings, before anything is trained with them
                yield seed
                self.result["finished"].append(seed)
                self.write()

    def steps(self, stage: int) -> int:
        """Steps of a stage in this budget."""
        plan = getattr(self.recipe, f"stage{stage}")
        return max(1, round(self.args.steps * plan.steps))

    def align(self, seed: int, name: str, *flags, joint: bool = False) -> Path:
        """A finished run of align.py with these flags. joint: with the few joint steps of a recipe that can
        do without; the tables' are of the closed forms alone."""
        p = align.parser()
        samples = max(1, round(self.args.steps * p.get_default("head_samples")))
        own = ["--count", 0, "--previews", 0, "--head-samples", samples, "--stage1-steps", self.steps(1)]
        given = p.parse_args(list(map(str, [*own, *known_flags(p, self.flags, ()), *flags])))
        steps = self.steps(2)
        if self.recipe.joint_steps is not None and align.head_is_solved(given):
            steps = max(1, round(self.args.steps * self.recipe.joint_steps)) if joint else 0
        if given.stage2_steps is None:
            flags += ("--stage2-steps", steps)
        run = self.run_folder(seed, name)
        if not is_finished(run):
            self.train(align.main, p, run, seed, own, flags)
        elif given.stage2_steps is None and read_settings(run)["flags"]["stage2_steps"] != steps:
            raise ValueError(f"{run} was made with other steps of stage 2 than {steps}; give another --out")
        return run

    def finetune(self, seed: int, name: str, steps: int, *flags, main=finetune.main) -> Path:
        """A finished run of finetune.py of so many steps; one of fewer goes on. main: takes its flags."""
        run = self.run_folder(seed, name)
        settings = read_settings(run)
        if settings and settings["finished"] and settings["flags"]["train_steps"] >= steps:
            return run
        own = ["--previews", 0]
        self.train(main, finetune.parser(), run, seed, own, flags, ["--train-steps", steps])
        return run

    def run_folder(self, seed: int, name: str) -> Path:
        return self.folder / f"seed-{seed}" / name

    def train(self, main, p: Parser, run: Path, seed: int, own: list, flags: tuple, always: tuple = ()):
        """Start a run, or resume it, which then has its flags already."""
        # of two that are alike the last counts
        given = ["--base", self.args.base, "--seed", seed, *own, *known_flags(p, self.flags, ()), *flags]
        if has_state(run):
            given = ["--resume"]
        given += [*always, "--out", run, "--device", self.args.device]
        print(f"\n== {self.name}, seed {seed}: {run.name}", flush=True)
        try:
            main(list(map(str, given)))
        finally:
            self.write()                    # the minutes, of a run that is killed too

    # ---- rows ----

    @cached_property
    def judge(self) -> Judge:
        flags = ["--device", self.args.device, *self.judged]
        flags += known_flags(evaluate.parser(), self.flags, ())
        return Judge(self.args.base, self.args.count, flags)

    def add(self, seed: int, row: str, make: Callable[[], list[dict]], **keys):
        """Add the rows that `make` returns, unless they are there. keys: what tells them from others of this
        name."""
        keys = {"row": row, "seed": seed, **keys}
        if not any(keys.items() <= old.items() for old in self.result["rows"]):
            self.result["rows"] += [{**keys, **new} for new in make()]
            self.write()

    def score(self, seed: int, row: str, run: Path | None, **keys):
        """Add the scores of a run, or of the base (None), with its steps of all stages. val_loss compares
        within one latent space and objective."""
        def make():
            rows = self.judge.rows(run, seed)
            loss = {"val_loss": last_val_loss(run)} if run and run.is_dir() else {}
            return [row | loss for row in rows]

        if run:
            keys["steps"] = total_steps(run)
        self.add(seed, row, make, **keys)

    # ---- result ----

    def summary(self) -> list[dict]:
        """A row for every KEYS: measures' means over the seeds, and as "± ..." its standard deviation."""
        groups = {}
        for row in self.result["rows"]:
            key = tuple((key, row[key]) for key in KEYS if key in row)
            groups.setdefault(key, []).append(row)
        return [dict(key) | mean_and_spread(rows) for key, rows in groups.items()]

    def show(self):
        """Print the table."""
        rows = self.summary()
        found = {key for row in rows for key in row}
        measures = dict.fromkeys(key for row in rows for key in row if key not in KEYS and f"± {key}" in row)
        columns = [*(key for key in KEYS if key in found), *measures]
        widths = [max(len(row["row"]) for row in rows) + 2] + [max(20, len(key) + 2) for key in columns[1:]]
        print("\n" + "".join(f"{key:<{width}}" for key, width in zip(columns, widths)))
        for row in rows:
            print("".join(f"{cell(row, key):<{width}}" for key, width in zip(columns, widths)))
        seeds = len(self.result["finished"])
        print(f"[{seeds} seeds, mean ± standard deviation; {self.args.count} pictures a row; "
              f"{self.result['device']}, {self.result['minutes']:.1f} min; {self.file}]")

    def lines(self, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
        """{row: [(x, mean of y), ...]} of the summary, for evaluate.plot."""
        lines = {}
        for row in self.summary():
            if x in row and y in row:
                lines.setdefault(row["row"], []).append((row[x], row[y]))
        return {name: sorted(points) for name, points in lines.items()}

    @property
    def quality(self) -> str:
        """The name of the share of right pictures."""
        return "all" if self.cfg.text_encoder else "accuracy"

    def score_all(self, seed: int, runs: dict[str, Path | None]):
        """A row for each of these runs, by name, and their pictures."""
        for row, run in runs.items():
            self.score(seed, row, run)
        self.pictures(runs)

    def pictures(self, runs: dict[str, Path | None], file: str | None = None):
        """Write the first eight pictures of each run, a row a guidance scale, unless they are there."""
        file = self.folder / (file or f"{self.name}.png")
        if file.exists():
            return
        rows = []
        for name, run in runs.items():
            for guidance in self.judge.task.guidance:
                rows.append((f"{name}\nguidance {guidance:g}", self.judge.draw(run, guidance)))
        save_grid(file, rows, self.judge.task.titles[:8])


def numbers_of(row: dict) -> dict:
    return {key: value for key, value in row.items() if not isinstance(value, str)}


def total_steps(run: Path) -> int:
    """Training steps of a run and of those that it began with."""
    return read_run_config(run_file(run))[1]["steps"]


def read_log(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_val_loss(run: Path) -> float:
    """The last validation loss in a run's log, the average's where there is one."""
    row = [row for row in read_log(run) if "val_loss" in row][-1]
    return row.get("val_loss_ema", row["val_loss"])


def mean_and_spread(rows: list[dict]) -> dict:
    """Of the measures of several seeds."""
    found = {}
    for key in rows[0]:
        if key in KEYS or key == "seed":
            continue
        values = [row[key] for row in rows if key in row]
        found[key] = statistics.mean(values)
        found[f"± {key}"] = statistics.stdev(values) if len(values) > 1 else None
    return found


SHARES = {"accuracy", "seen", "unseen", *evaluate.ANSWERS}


def cell(row: dict, key: str) -> str:
    """A measure with its spread as text, a dash where there is none."""
    if key not in row:
        return "-"
    value = row[key]
    spread = row.get(f"± {key}")
    if key in SHARES:
        return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f} %" if spread is not None else " %")
    if isinstance(value, str) or key in KEYS:
        return f"{value}"
    return f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
