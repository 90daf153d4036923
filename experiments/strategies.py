"""Table 9 of the paper (A.8): other ways to let a model get used to a new latent space; DC-Gen beats them.

    python experiments/strategies.py --strategy layer-rates        later layers learn faster than early ones
    python experiments/strategies.py --strategy gradual-lora       LoRA comes in gradually
    python experiments/strategies.py --strategy freeze-then-all    embedder and head first, the trunk frozen
    python align.py && python finetune.py                          DC-Gen, to compare with

All start from a new embedder and head that are not aligned. Flags not listed here are finetune.py's:
    python experiments/strategies.py --strategy layer-rates --base flux-krea --images DIR --train-steps 10000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import align
import finetune
from flags import Parser, add_model_args, at_least, positive, run_main
from lora import LoRALinear
from train import add_data_args


def layer_rates(model, ratio: float):
    """Layer-wise learning rates: shares on a line from the first layer to the last, `ratio` times larger
    there, 1 on average. What comes before the blocks counts as the first layer, the head as the last.
    -> lr_scale of train.train"""
    last = len(model.blocks) + 1
    names = {id(module): name for name, module in model.named_modules()}
    layers = {f"{names[id(block)]}.": i + 1 for i, block in enumerate(model.blocks)}
    layers[model.HEAD_TRAINED] = last

    def share(name: str) -> float:
        layer = next((i for prefix, i in layers.items() if name.startswith(prefix)), 0)
        return 2 / (1 + ratio) * (1 + (ratio - 1) * layer / last)

    return share


def lora_ramp(model, steps: int):
    """LoRA that comes in gradually: its alpha grows on a line from 0 to its own within so many steps.
    -> on_step of train.train. ValueError for a model without LoRA."""
    own = {m: m.scale for m in model.modules() if isinstance(m, LoRALinear)}
    if not own:
        raise ValueError("--strategy gradual-lora: there is no LoRA in this run; leave out --tune full")

    def on_step(step: int):
        for m, scale in own.items():
            m.scale = scale * min(1.0, step / steps)

    return on_step


def train_layer_rates(flags: list[str], ratio: float):
    def hooks(model):
        return {"lr_scale": layer_rates(model, ratio)}

    finetune.main(["--init", "base", *flags], hooks, f"layer-rates {ratio:g}")


def train_gradual_lora(flags: list[str], ramp: int):
    args = finetune.parser().parse_args(flags)
    if args.compile:
        raise ValueError("--compile: a compiled block has its alpha built in; leave it out of gradual-lora")

    def hooks(model):
        # the finished run is loaded with its whole alpha
        steps = args.train_steps or align.RECIPES[model.cfg.recipe].stage3.steps
        if ramp >= steps:
            raise ValueError(f"--ramp {ramp}: it has to end before the run does, of {steps} steps")
        return {"on_step": lora_ramp(model, ramp)}

    finetune.main(["--init", "base", *flags], hooks, f"gradual-lora {ramp}")


def train_frozen_then_all(flags: list[str], frozen_steps: int | None):
    """Stage 2 without stage 1, then stage 3, which finds the newest alignment in runs/, as always."""
    p = Parser("")
    add_model_args(p)
    add_data_args(p)
    shared = known_flags(p, flags, without=("--out", "--resume"))
    steps = [] if frozen_steps is None else ["--stage2-steps", str(frozen_steps)]
    align.main([*shared, "--solver", "adamw", "--stage1-steps", "0", *steps])
    finetune.main([*flags, "--init", "align"])


def known_flags(p: Parser, flags: list[str], without: tuple[str, ...]) -> list[str]:
    """Those of the flags, with their values, that this parser has."""
    groups = []
    # a group is a flag and its values
    for word in flags:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    known = []
    for group in groups:
        _, unknown = p.parse_known_args(group)
        if not unknown and not group[0].startswith(without):
            known += group
    return known


def main(argv=None):
    p = Parser(__doc__, "--strategy NAME")
    p.add_argument("--strategy", required=True, choices=("layer-rates", "gradual-lora", "freeze-then-all"))
    p.add_argument("--ratio", type=positive, default=3.0,
                   help="layer-rates: learning rate of the last layer over that of the first (default 3)")
    p.add_argument("--ramp", type=at_least(int, 1), default=1000, metavar="STEPS",
                   help="gradual-lora: steps in which alpha grows from 0 to its own (default 1000)")
    p.add_argument("--frozen-steps", type=at_least(int, 0), metavar="STEPS",
                   help="freeze-then-all: steps with the trunk frozen (default: the recipe's stage 2)")
    args, flags = p.parse_known_args(argv)
    finetune.parser().parse_args(flags)                              # a flag of neither ends here
    match args.strategy:
        case "layer-rates":
            train_layer_rates(flags, args.ratio)
        case "gradual-lora":
            train_gradual_lora(flags, args.ramp)
        case "freeze-then-all":
            train_frozen_then_all(flags, args.frozen_steps)


if __name__ == "__main__":
    run_main(main)
