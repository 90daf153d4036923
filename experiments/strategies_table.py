"""Table 9 of the paper (A.8): three other strategies against DC-Gen, at equal steps of 64 pictures.

    python experiments/strategies_table.py
    python experiments/strategies_table.py --base sana-1.6b --images DIR --seeds 0 --steps 0.1
    python experiments/strategies_table.py --base tiny-flux --only joint-lora aligned-lora       two of them

Freeze then all is DC-Gen without stage 1: embedder and head first, from random values, then LoRA too. The
other two begin with LoRA, not aligned. strategies.py trains one of them by itself. "Joint phase" is DC-Gen
with half of the steps of stage 3 given to stage 2, embedder and head together, after the closed forms; "held"
the same with Eq. 1 beside the flow loss (align.py --hold).
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from experiments import strategies
from experiments.harness import Experiment, parser, total_steps
from flags import positive, run_main

NAME = "strategies"
# folder of a way's runs: its row
WAYS = {
    "freeze-then-all": "freeze then all",
    "layer-rates": "layer-wise rates",
    "gradual-lora": "gradual LoRA",
    "noalign-lora": "LoRA at once",
    "joint-lora": "DC-Gen, joint phase",
    "held-lora": "DC-Gen, held joint phase",
    "aligned-lora": "DC-Gen",
}


def train_way(x: Experiment, seed: int, way: str) -> Path:
    """The finished run of one of WAYS; all have as many steps in all."""
    aligned = x.align(seed, "aligned")
    before = total_steps(aligned)
    last = x.steps(3)
    total = before + last
    half = last // 2
    match way:
        case "freeze-then-all":
            steps = ("--stage1-steps", 0, "--stage2-steps", before)
            init = x.align(seed, "frozen", "--solver", "adamw", *steps)
            return x.finetune(seed, way, last, "--init", init)
        case "layer-rates":
            layer_rates = partial(strategies.train_layer_rates, ratio=x.args.ratio)
            return x.finetune(seed, way, total, main=layer_rates)
        case "gradual-lora":
            gradual = partial(strategies.train_gradual_lora, ramp=max(1, total // 3))
            return x.finetune(seed, way, total, main=gradual)
        case "noalign-lora":
            return x.finetune(seed, way, total, "--init", "base")
        case "joint-lora" | "held-lora":
            hold = (x.recipe.hold or 10.0) if way == "held-lora" else 0.0
            init = x.align(seed, way.replace("lora", "aligned"), "--stage2-steps", half, "--hold", hold)
            return x.finetune(seed, way, total - total_steps(init), "--init", init)
        case "aligned-lora":
            return x.finetune(seed, way, last, "--init", aligned)


def main(argv=None):
    p = parser(__doc__, NAME)
    p.add_argument("--ratio", type=positive, default=3.0,
                   help="layer-wise rates: that of the last layer over that of the first (default 3)")
    p.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY",
                   help=f"of {', '.join(WAYS)} (default all)")
    x = Experiment(NAME, p, argv, sets=("--solver", "--tune", "--compile", "--hold"))
    for seed in x.seeds():
        runs = {"base": None} | {WAYS[way]: train_way(x, seed, way) for way in x.args.only or WAYS}
        x.score_all(seed, runs)
    x.show()


if __name__ == "__main__":
    run_main(main)
