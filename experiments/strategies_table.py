"""Table 9 of the paper (A.8): three other strategies against DC-Gen, at equal steps of 64 pictures.

    python experiments/strategies_table.py
    python experiments/strategies_table.py --base sana-1.6b --images DIR --seeds 0 --steps 0.1

Freeze then all is DC-Gen without stage 1: embedder and head first, from random values, then LoRA too. The
other two begin with LoRA, not aligned. strategies.py trains one of them by itself. "Joint phase" is DC-Gen
with half of the steps of stage 3 given to stage 2, embedder and head together, after the closed forms.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from experiments import strategies
from experiments.harness import Experiment, parser, total_steps
from flags import positive, run_main

NAME = "strategies"


def main(argv=None):
    p = parser(__doc__, NAME)
    p.add_argument("--ratio", type=positive, default=3.0,
                   help="layer-wise rates: that of the last layer over that of the first (default 3)")
    x = Experiment(NAME, p, argv, sets=("--solver", "--tune", "--compile"))
    layer_rates = partial(strategies.train_layer_rates, ratio=x.args.ratio)
    for seed in x.seeds():
        aligned = x.align(seed, "aligned")
        before = total_steps(aligned)
        total = before + x.steps(3)
        gradual = partial(strategies.train_gradual_lora, ramp=max(1, total // 3))
        frozen = x.align(seed, "frozen", "--solver", "adamw", "--stage1-steps", 0, "--stage2-steps", before)
        half = x.steps(3) // 2
        joint = x.align(seed, "joint", "--stage2-steps", half)
        runs = {
            "base": None,
            "freeze then all": x.finetune(seed, "freeze-then-all", x.steps(3), "--init", frozen),
            "layer-wise rates": x.finetune(seed, "layer-rates", total, main=layer_rates),
            "gradual LoRA": x.finetune(seed, "gradual-lora", total, main=gradual),
            "LoRA at once": x.finetune(seed, "noalign-lora", total, "--init", "base"),
            "DC-Gen, joint phase": x.finetune(seed, "joint-lora", x.steps(3) - half, "--init", joint),
            "DC-Gen": x.finetune(seed, "aligned-lora", x.steps(3), "--init", aligned),
        }
        x.score_all(seed, runs)
    x.show()


if __name__ == "__main__":
    run_main(main)
