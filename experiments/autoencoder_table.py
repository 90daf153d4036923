"""Table 10 of the paper (A.9): the autoencoder aligned instead of the model, at equal steps.

    python experiments/autoencoder_table.py

The deep autoencoder is fine-tuned until its latents resemble the base's, once for each --ratios and for all
seeds (align_autoencoder.py, whose steps are not counted); the model then learns on it by LoRA, not aligned.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from experiments import align_autoencoder
from experiments.harness import Experiment, parser, total_steps
from flags import at_least, positive, run_main

NAME = "autoencoder"


def aligned_autoencoder(x: Experiment, ratio: float) -> Path:
    """The weights of the recipe's autoencoder, pulled towards the base's with this weight."""
    file = x.folder / f"autoencoder-{ratio:g}.safetensors"
    if not file.exists():
        images = ["--images", x.judge.args.images] if x.judge.args.images else []
        steps = max(1, round(x.args.steps * x.args.ae_steps))
        flags = ["--ae", x.recipe.ae, "--to", x.cfg.ae, "--ratio", ratio, "--steps", steps, "--out", file,
                 "--batch", x.args.ae_batch, "--res", x.judge.res, "--device", x.args.device, *images]
        align_autoencoder.main(list(map(str, flags)))
    return file


def main(argv=None):
    p = parser(__doc__, NAME)
    p.add_argument("--ratios", type=positive, nargs="+", default=[0.1, 1.0, 10.0],
                   help="weights of the alignment loss (default 0.1 1 10)")
    p.add_argument("--ae-steps", type=at_least(int, 1), default=3000,
                   help="the autoencoder's, times --steps (default 3000)")
    p.add_argument("--ae-batch", type=at_least(int, 1), default=16, help="its pictures a step (default 16)")
    x = Experiment(NAME, p, argv, sets=("--ae", "--ae-weights", "--tune"))
    for seed in x.seeds():
        aligned = x.align(seed, "aligned")
        total = total_steps(aligned) + x.steps(3)
        runs = {
            "base": None,
            "nothing aligned": x.finetune(seed, "noalign-lora", total, "--init", "base"),
        }
        for ratio in x.args.ratios:
            weights = aligned_autoencoder(x, ratio)
            name = f"autoencoder-{ratio:g}"
            row = f"autoencoder aligned, ratio {ratio:g}"
            runs[row] = x.finetune(seed, name, total, "--init", "base", "--ae-weights", weights)
        runs["DC-Gen"] = x.finetune(seed, "aligned-lora", x.steps(3), "--init", aligned)
        x.score_all(seed, runs)
    x.show()


if __name__ == "__main__":
    run_main(main)
