"""Fig. 6 of the paper: the guided loss (Eq. 7) against the plain one (Eq. 2) for a guidance-distilled base.

    python experiments/guidance.py
    python experiments/guidance.py --base flux-krea --images DIR --text-encoders DIR --seeds 0

Both begin with one alignment. Drawn and scored at every --guidance; "reaction" is how far the guidance that
the model reads moves its velocity, || v(x_t, t, c, g) - v(x_t, t, c, 1) || / || v(x_t, t, c, 1) || at t = 0.5
of 64 unseen pictures: 0 for a model that has forgotten guidance.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from evaluate import plot
from experiments.harness import Experiment, Judge, parser
from finetune import GUIDANCES
from flags import run_main, with_guidance
from sample import path

NAME = "guidance"


@torch.no_grad()
def reaction(judge: Judge, run: Path | None, guidance: float) -> float:
    """How far a run, or the base (None), reacts to this guidance scale."""
    model, _, ae = judge.load(run)
    z = ae.encode(judge.probe.images)
    x0 = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    t = torch.full((len(z),), 0.5, device=z.device)
    xt, _ = path(x0, z, t)
    unguided = model(xt, t, with_guidance(judge.probe.y, 1.0))
    guided = model(xt, t, with_guidance(judge.probe.y, guidance))
    return float((guided - unguided).norm() / unguided.norm())


def main(argv=None):
    scales = ["--guidance", *map(str, GUIDANCES)]
    sets = ("--objective", "--tune")
    x = Experiment(NAME, parser(__doc__, NAME, base="tiny-flux"), argv, sets, scales)
    if not getattr(x.cfg, "guidance_embed", False):
        raise ValueError(f"--base {x.args.base}: Fig. 6 is of a base that reads its guidance as a number; "
                         "tiny-flux is one")
    for seed in x.seeds():
        aligned = x.align(seed, "aligned")
        runs = {"base": None}
        for objective in ("guided", "flow"):
            flags = ("--init", aligned, "--objective", objective)
            runs[f"{objective} loss"] = x.finetune(seed, objective, x.steps(3), *flags)
        for row, run in runs.items():
            def rows(run=run):
                rows = x.judge.rows(run, seed)
                return [row | {"reaction": reaction(x.judge, run, row["guidance"])} for row in rows]

            x.add(seed, row, rows)
        x.pictures(runs, f"{NAME}-pictures.png")
    panels = [x.lines("guidance", measure) for measure in (x.quality, "frechet", "reaction")]
    titles = (f"share right ({x.quality})", "Frechet distance", "reaction to guidance")
    plot(x.folder / f"{NAME}.png", {title: [lines] for title, lines in zip(titles, panels)}, "guidance scale")
    x.show()


if __name__ == "__main__":
    run_main(main)
