"""Ours, after SVDQuant (arXiv 2411.05007): what few bits cost, with and without smoothing, branch by branch.

    python experiments/quantised.py --seeds 0
    python experiments/quantised.py --base tiny-sana --run runs/finetune-tiny-sana-1 --out DIR
    python experiments/quantised.py --only outliers --width 3072 --device cuda

    row               of every model: a base, a run converted from it, random FLUX blocks with outliers
    bf16              as it is
    FP8               rows of weights and inputs
    W4A16, W4A4       4 bits for weights, and for inputs too; all channels treated alike
    ..., smoothed     large channels of the inputs moved into the weights
    rank              of the branch in 16 bits, for each of the last four

A base and a run are scored as evaluate.py does. layer_error: how far a layer's output is off for the inputs
that the model as it is gives it, as a share of it; mean over all layers. path_error: the same of the latents
after 20 steps from the same noise, without guidance in two passes. The blocks with outliers have layers in
FLUX's shapes: ten channels of every modulated input are twenty times the others, and every weight has eight
strong directions. They are scored by these errors alone.
"""

import copy
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import evaluate
from bench import init_random_
from checkpoints import read_run_config, run_file
from data import text_folder
from evaluate import plot
from experiments.harness import Experiment, Judge, parser
from experiments.strategies import known_flags
from flags import at_least, check_paths, guidance_of, run_main, with_guidance
from lora import merge_lora
from model import Flux, FluxConfig, Sampling, Text
from quant import FORMATS, calibration_batch, calibration_condition, quantise_model, quantised_layers
from sample import integrate, save_grid, time_grid

NAME = "quantised"
RANKS = (0, 16, 32, 64)
CALIBRATION = 16                            # pictures
STEPS = 20                                  # of path_error
ERRORS = ("layer_error", "path_error")


# ---- ways to quantise ----------------------------------------------------------------------------

def ways(form: str, ranks: list[int]) -> dict[tuple[str, int | None], dict | None]:
    """{(row, rank): arguments of quantise_model}; None: as it is."""
    found = {("bf16", None): None, ("FP8", None): dict(form="fp8")}
    for activations in (False, True):
        for smooth in (False, True):
            row = f"W4A{4 if activations else 16}{', smoothed' if smooth else ''}"
            for rank in ranks:
                found[row, rank] = dict(form=form, rank=rank, activations=activations, smooth=smooth)
    return found


def quantised_copy(model, way: dict, batch: tuple):
    made = copy.deepcopy(model)
    quantise_model(made, **way, batch=batch)
    return made


# ---- errors --------------------------------------------------------------------------------------

def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@torch.no_grad()
def layer_error(model, made, batch: tuple) -> float:
    """Relative error of a quantised layer's output for the model's own inputs, mean over these layers."""
    errors = []

    def compare(name, layer, args, out):
        errors.append(relative(made.get_submodule(name)(*args), out))

    hooks = []
    for name in quantised_layers(made):
        hooks.append(model.get_submodule(name).register_forward_hook(partial(compare, name)))
    model(*batch)
    for hook in hooks:
        hook.remove()
    return sum(errors) / len(errors)


@torch.no_grad()
def path_error(model, made, x: Tensor, y) -> float:
    """Relative error of the latents (B,C,H,W) after STEPS steps from the noise x."""
    ends = []
    for net in (made, model):
        def velocity(x, t, net=net):
            return net(x, t, y)

        ends.append(integrate(velocity, x, time_grid(STEPS)))
    return relative(*ends)


def errors_of(model, made, y, seed: int) -> dict[str, float]:
    """Both errors, on paths of the model's own that it was not calibrated on, one for each row of y."""
    batch = calibration_batch(model, y, seed=10_000 + seed)
    generator = torch.Generator().manual_seed(20_000 + seed)
    noise = torch.randn(len(y), *batch[0].shape[1:], generator=generator).to(batch[0])
    return dict(layer_error=layer_error(model, made, batch), path_error=path_error(model, made, noise, y))


# ---- blocks with outliers ------------------------------------------------------------------------

@torch.no_grad()
def outlier_model(width: int, seed: int, channels: int = 10, factor: float = 20.0) -> Flux:
    """A double and a single block of FLUX with random weights, in which so many channels of every modulated
    input are `factor` times the others, and the weights have strong directions."""
    head = 128 if width % 128 == 0 else 32
    cfg = FluxConfig(
        in_channels=16, patch_size=1, ae="dc-ae-f32c32-in-1.0", res=256, hidden_size=width, depth=1,
        depth_single=1, num_heads=width // head, axes_dim=(head // 8, 7 * head // 16, 7 * head // 16),
        context_in_dim=64, vec_in_dim=64, sampling=Sampling(cfg_scale=1.0, guidance=3.5))
    with torch.device("meta"):
        model = Flux(cfg)
    model = init_random_(model, "cpu", torch.float32, seed)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(width, generator=g)[:channels]
    for name, layer in model.named_modules():
        if name.endswith(("_mod.lin", ".modulation.lin")):
            # in threes of shift, scale and gate
            for scale in layer.bias.view(-1, 3, width)[:, 1]:
                scale[chosen] = factor
        elif name.endswith((".qkv", ".proj", "_mlp.0", "_mlp.2", ".linear1", ".linear2")):
            N, K = layer.weight.shape
            strong = torch.randn(N, 8, generator=g) @ torch.randn(8, K, generator=g)
            layer.weight += 0.8 * strong / K**0.5
            layer.weight /= layer.weight.norm() / N**0.5             # rows of length 1, as before
    return model


def random_text(cfg, count: int, seed: int) -> Text:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 32, cfg.context_in_dim, generator=g)
    pooled = torch.randn(count, cfg.vec_in_dim, generator=g)
    return Text(tokens, pooled=pooled, guidance=torch.full((count,), 3.5))


class Outliers:
    """The errors of a model with outliers in every way; what its rows share is made once."""

    def __init__(self, width: int, seed: int, device):
        self.seed = seed
        self.model = outlier_model(width, seed).to(device)
        self.batch = calibration_batch(self.model, random_text(self.model.cfg, CALIBRATION, seed).to(device))
        self.other = random_text(self.model.cfg, 8, seed + 1).to(device)

    def rows(self, way: dict | None) -> list[dict]:
        if way is None:
            return [dict.fromkeys(ERRORS, 0.0)]
        made = quantised_copy(self.model, way, self.batch)
        return [errors_of(self.model, made, self.other, self.seed)]


# ---- models that are scored ----------------------------------------------------------------------

class QuantisedJudge(Judge):
    """A judge that loads models in a way to quantise; `way` None: as they are."""
    way = None
    seed = 0
    made = (None, None)                     # the last one, by run, way and seed

    def plain(self, run: Path | None) -> tuple:
        model, info, ae = super().load(run)
        return merge_lora(model), info, ae                           # what is quantised is whole layers

    def load(self, run: Path | None) -> tuple:
        model, info, ae = self.plain(run)
        key = (run, self.seed, self.way)
        if self.way and self.made[0] != key:
            self.made = (key, quantised_copy(model, self.way, self.calibration(model)))
        return self.made[1] if self.way else model, info, ae

    def calibration(self, model) -> tuple:
        """What quant.py calibrates on by itself."""
        cfg = model.cfg
        folder = text_folder(self.args.base, cfg, self.args.text_encoders, self.args.weights)
        y, model.null = calibration_condition(
            cfg, None, CALIBRATION, folder, self.task.dtype, self.device)
        return calibration_batch(model, y, seed=self.seed)

    def scored(self, run: Path | None, seed: int, way: dict | None) -> list[dict]:
        """The scores of a run, or the base, in this way, and its errors; a row a guidance scale."""
        self.way = way
        self.seed = seed
        rows = self.rows(run, seed)
        made, _, _ = self.load(run)
        model, _, _ = self.plain(run)
        model.null = self.task.null
        y = self.task.conditions[:8]
        if isinstance(y, Text):
            y = with_guidance(y, guidance_of(model.cfg, model.cfg.sampling))
        errors = errors_of(model, made, y.to(self.device), seed) if way else dict.fromkeys(ERRORS, 0.0)
        return [row | errors for row in rows]

    def row_of_pictures(self, run: Path | None, way: dict | None) -> Tensor:
        self.way = way
        return self.draw(run, self.task.guidance[0])


class QuantisedTable(Experiment):
    @cached_property
    def judge(self) -> QuantisedJudge:
        flags = ["--device", self.args.device, *known_flags(evaluate.parser(), self.flags, ())]
        return QuantisedJudge(self.args.base, self.args.count, flags)

    def write_pictures(self, runs: dict[str, Path | None], found: dict):
        """The first eight pictures in every way, of branches rank 32 or the largest."""
        file = self.folder / f"{NAME}-pictures.png"
        if file.exists():
            return
        rank = 32 if 32 in self.args.ranks else max(self.args.ranks)
        rows = []
        for model, run in runs.items():
            for (row, own), way in found.items():
                if own in (None, rank):
                    rows.append((f"{model}\n{row}", self.judge.row_of_pictures(run, way)))
        save_grid(file, rows, self.judge.task.titles[:8])


def add_rows(x: Experiment, seed: int, model: str, found: dict, rows: Callable[[dict | None], list[dict]]):
    """A row of a model for every way; rows: of a way."""
    for (row, rank), way in found.items():
        keys = {} if rank is None else {"rank": rank}
        x.add(seed, f"{model}: {row}", partial(rows, way), **keys)


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    p = parser(__doc__, NAME, base="tiny-flux")
    p.add_argument("--run", metavar="RUN", help="a run that was converted from the base (default: none)")
    p.add_argument("--form", default="nvfp4", choices=FORMATS, help="of the 4 bits (default nvfp4)")
    p.add_argument("--ranks", type=at_least(int, 0), nargs="+", default=list(RANKS), metavar="N",
                   help="of the branch (default 0 16 32 64)")
    p.add_argument("--width", type=at_least(int, 32), default=1024, metavar="N",
                   help="of the blocks with outliers; FLUX's is 3072 (default 1024)")
    p.add_argument("--only", choices=("outliers", "models"), help="half of the table (default both)")
    x = QuantisedTable(NAME, p, argv)
    if x.args.width % 32:
        raise ValueError(f"--width {x.args.width}: a multiple of 32, for heads of 32 or 128")
    check_paths(x.args, "run")
    if x.args.run:
        read_run_config(run_file(x.args.run))                        # raises if it is none
    runs = {"base": None} | ({"run": Path(x.args.run)} if x.args.run else {})
    found = ways(x.args.form, x.args.ranks)

    for seed in x.seeds():
        if x.args.only != "outliers":
            for model, run in runs.items():
                add_rows(x, seed, model, found, partial(x.judge.scored, run, seed))
        if x.args.only != "models":
            add_rows(x, seed, "outliers", found, Outliers(x.args.width, seed, x.args.device).rows)
    if x.args.only != "outliers":
        x.write_pictures(runs, found)
    measures = [*ERRORS, *([x.quality, "frechet"] if x.args.only != "outliers" else [])]
    plot(x.folder / f"{NAME}.png", {measure: [x.lines("rank", measure)] for measure in measures}, "rank")
    x.show()


if __name__ == "__main__":
    run_main(main)
