"""Fig. 9 and Table 8 of the paper: full fine-tuning against LoRA of several ranks, and what each forgets.

    python experiments/ranks.py
    python experiments/ranks.py --base dit-xl --images DIR --classifier FILE --ranks 16 64 256 --steps 0.02

Every way is trained twice: on all pictures, and ("half") with alignment too on those of the first half of
the classes, or on those whose captions name no ring and no cross. Pictures of both halves are then scored
apart: `unseen` is what the base knew and training did not repeat.
"""

import shutil
import sys
from itertools import count
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from data import ImageFolder
from evaluate import plot
from experiments.harness import Experiment, Judge, parser
from flags import at_least, run_main
from sample import to_uint8
from shapes import FORMS, SHAPES, accuracy, scene_scores

NAME = "ranks"
UNSEEN_FORMS = FORMS[3:]


def first_half(source) -> set[int]:
    """The first half of the classes of pictures."""
    labels = set(source.numbers.values()) if isinstance(source, ImageFolder) else range(len(SHAPES))
    return set(sorted(labels)[: len(labels) // 2])


def has_unseen(caption: str) -> bool:
    return any(form in caption for form in UNSEEN_FORMS)


class Halves:
    """Scores of all pictures, and the shares of right ones among those of each half."""

    def __init__(self, judge: Judge):
        self.metrics = judge.metrics
        self.mismatch = judge.metrics.mismatch
        if judge.captions:
            seen = [not has_unseen(caption) for caption in judge.task.titles]
        else:
            half = first_half(judge.train)
            seen = [k in half for k in judge.task.conditions.tolist()]
        seen = torch.tensor(seen)
        self.parts = {"seen": seen, "unseen": ~seen}                 # of the pictures, (B,) bool

    def __call__(self, images, y, titles: list[str]) -> dict[str, float]:
        scores = self.metrics(images, y, titles)
        for name, part in self.parts.items():
            rows = part.nonzero().flatten()
            if self.metrics.captions:
                scores[name] = scene_scores(images[rows], [titles[i] for i in rows.tolist()])["all"]
            else:
                scores[name] = accuracy(self.metrics.classifier, images[rows], y[rows])
        return scores


def write_half(folder: Path, source, pictures: int):
    """Write so many procedural pictures of the first half: in folders of their classes, or beside their
    captions."""
    half = first_half(source)
    written = 0
    for i in count():
        if source.captioned:
            title = source.caption(i)
            file = folder / f"{i:06d}.png"
            wanted = not has_unseen(title)
        else:
            label = i % len(SHAPES)                                  # picture i shows this one
            file = folder / SHAPES[label] / f"{i:06d}.png"
            wanted = label in half
        if not wanted:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(source.batch(torch.tensor([i]))[0])[0]).save(file)
        if source.captioned:
            file.with_suffix(".txt").write_text(title)
        written += 1
        if written == pictures:
            return


def half_of(x: Experiment) -> Path:
    """The folder of the first half's pictures, made once. ValueError for captions of --images."""
    folder = x.folder / "half"
    if folder.exists():
        return folder
    source = x.judge.train
    part = folder.with_name("half.part")
    shutil.rmtree(part, ignore_errors=True)
    if not isinstance(source, ImageFolder):
        write_half(part, source, x.args.half_pictures)
    elif source.captioned:
        raise ValueError("--images: nothing tells here which captions are of one half; leave it out")
    else:
        part.mkdir(parents=True)
        half = first_half(source)
        for name, label in source.numbers.items():
            if label in half:
                (part / name).symlink_to((source.root / name).resolve())
    part.rename(folder)
    return folder


def draw_plot(x: Experiment):
    """Shares right by rank, those of the rows without one as level lines; a column for each half."""
    ends = (min(x.args.ranks), max(x.args.ranks))
    columns = {}
    for half in ("seen", "unseen"):
        lines = x.lines("rank", half)
        for row in x.summary():
            if half in row and "rank" not in row:
                lines[row["row"]] = [(rank, row[half]) for rank in ends]
        columns[f"share right, {half} half"] = [lines]
    plot(x.folder / f"{NAME}.png", columns, "LoRA rank")


def main(argv=None):
    p = parser(__doc__, NAME)
    p.add_argument("--ranks", type=at_least(int, 1), nargs="+", default=[4, 16, 64, 256],
                   help="of the LoRA (default 4 16 64 256)")
    p.add_argument("--half-pictures", type=at_least(int, 20), default=4096, metavar="N",
                   help="procedural pictures of the first half (default 4096)")
    x = Experiment(NAME, p, argv, sets=("--tune", "--rank", "--alpha"))
    for seed in x.seeds():
        half = half_of(x)
        # once for all seeds
        if x.judge.metrics and not isinstance(x.judge.metrics, Halves):
            x.judge.metrics = Halves(x.judge)
        x.score(seed, "base", None)
        for pictures, flags in (("all", ()), ("half", ("--images", half))):
            aligned = x.align(seed, f"{pictures}-aligned", *flags)
            x.score(seed, f"{pictures}: aligned", aligned)
            start = ("--init", aligned, *flags)
            full = x.finetune(seed, f"{pictures}-full", x.steps(3), *start, "--tune", "full")
            x.score(seed, f"{pictures}: every weight", full)
            for rank in x.args.ranks:
                run = x.finetune(seed, f"{pictures}-lora-{rank}", x.steps(3), *start, "--rank", rank)
                x.score(seed, f"{pictures}: LoRA", run, rank=rank)
    draw_plot(x)
    x.show()


if __name__ == "__main__":
    run_main(main)
