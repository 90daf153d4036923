"""Why does the frozen trunk draw on the paper's models, and not on a base of one size? One cause at a time.

    python experiments/causes.py --one-size RUN        all but the last two, about 40 minutes on two CPU cores
    python experiments/causes.py --only both joint     some of them

    row      base                   Eq. 1 against the base's embeddings of     deep model
    one      trained at 128 px only the picture, averaged over 2x2 tokens      128 px, 16 tokens
    bins     128 px only            the same                                   a head in eight parts, by t
    half     128 px only            the picture at half the size (16 tokens)   128 px, 16 tokens
    larger   128 px only            the picture at half the size (64 tokens)   256 px, 64 tokens
    two      tiny: 64 and 128 px    the picture, averaged over 2x2 tokens      128 px, 16 tokens
    both     tiny                   the picture at half the size (16 tokens)   128 px, 16 tokens
    joint    tiny                   as both                                    then 1000 steps of stage 2
    long     tiny                   as both                                    then 4000
    held     tiny                   as both                                    300, and 10 x Eq. 1 (default)
    blocks   tiny                   as both                                    1000, and Eq. 1 in every block
    narrow   half the width         as half                                    128 px, 16 tokens
    rich     16 channels for 4      as half                                    128 px, 16 tokens

No weight of a trunk changes in any row; those without steps are closed forms. --one-size is tiny before it
saw its second size: `python experiments/make_weights.py --only tiny` leaves it in runs/weights/tiny; "narrow"
and "rich" are of bases.py, and of one size too. "blocks" asks every block for the base's features of the same
picture at the same t, each model with noise of its own.
"""

import sys
import time
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from align import TINY, LeastSquares, Objective, embedding_loss, solve_embedder, solve_head
from autoencoder import ae_config
from checkpoints import load_autoencoder, load_base, load_run, write_json
from data import LatentCache, open_source
from evaluate import layer_gap, make_metrics, token_features
from experiments.bases import NAMES, register
from flags import Parser, at_least, choose_sampling, run_main
from model import to_deep_latent, to_deep_model
from sample import generate, path, save_grid
from train import (
    Run, autocast, is_finished, named_parameters_with, prepare_for_training, train, trainable_prefixes)

DEEP = "tiny-dc-ae-f32c32"
UNSEEN = 256                                # pictures of the validation loss


@dataclass(frozen=True)
class Row:
    """What differs between two alignments."""
    base: str = "tiny"                      # or "one-size", or one of bases.py
    base_res: int = 64                      # of the pictures that the base embeds in Eq. 1
    res: int = 128                          # of the deep model
    bins: int = 1                           # parts of the head, by t
    steps: int = 0                          # of stage 2 after the closed forms
    held: float = 0.0                       # weight of Eq. 1 in them
    blocks: float = 0.0                     # weight of the distance to the base's features, in every block

    @property
    def base_step(self) -> float:
        """Distance of the base's tokens: a smaller picture spreads over the same positions."""
        return 128 / self.base_res

    @property
    def deep_step(self) -> float:
        return 256 / self.res               # 4 or 8 tokens a side, over the positions that the base knows


ROWS = {
    "one": Row(base="one-size", base_res=128),
    "bins": Row(base="one-size", base_res=128, bins=8),
    "half": Row(base="one-size"),
    "larger": Row(base="one-size", base_res=128, res=256),
    "two": Row(base_res=128),
    "both": Row(),
    "joint": Row(steps=1000),
    "long": Row(steps=4000),
    "held": Row(steps=300, held=10.0),
    "blocks": Row(steps=1000, blocks=0.1),
    "narrow": Row(base="narrow"),
    "rich": Row(base="rich"),
}


def cached(ae, res: int, split: str, pictures: int) -> LatentCache:
    return LatentCache("runs/cache", open_source(None, res, split), [ae], pictures)


# ---- one alignment -------------------------------------------------------------------------------

class BinnedLinear(nn.Linear):
    """A head's linear map in parts, one for each bin of t; `t` is set before a forward pass."""

    def __init__(self, linear: nn.Linear, bins: int):
        super().__init__(linear.in_features, linear.out_features)
        self.parts = nn.ModuleList(nn.Linear(linear.in_features, linear.out_features) for _ in range(bins))
        self.t = None

    def bin(self) -> Tensor:
        return (self.t * len(self.parts)).long().clamp(max=len(self.parts) - 1)

    def forward(self, h):
        outs = torch.stack([part(h) for part in self.parts])         # bins B N C
        return outs[self.bin(), torch.arange(len(h))]


class Experiment:
    """A row: its base, its deep model and its latents."""

    def __init__(self, row: Row, run: Path | None, pictures: int, seed: int, dtype: torch.dtype):
        self.row = row
        self.seed = seed
        self.dtype = dtype
        self.objective = Objective()
        base, info = load_run(run, "cpu") if run else load_base("tiny")
        base.cfg = replace(base.cfg, res=row.base_res, pos_step=row.base_step)
        prepare_for_training(base, [], "cpu")
        self.base = base
        whole = replace(base.cfg, pos_step=1.0)
        cfg = replace(to_deep_latent(whole, ae_config(DEEP), row.deep_step, 1.0), res=row.res)
        torch.manual_seed(seed)
        self.model = to_deep_model(base, cfg)
        self.ae = load_autoencoder(DEEP)
        base_ae = load_autoencoder(base.cfg.ae, info.get("ae_weights"))
        self.deep = cached(self.ae, row.res, "train", pictures)
        self.small = cached(base_ae, row.base_res, "train", pictures)
        self.val = [cached(self.ae, row.res, "val", UNSEEN), cached(base_ae, row.base_res, "val", UNSEEN)]

    def solve(self, head_samples: int):
        """Embedder and head in closed form (align.py), the head in parts if the row says so."""
        def pairs():
            for i in self.deep.batches(256):
                yield self.deep.batch(i)[0][DEEP], self.small.batch(i)[0][self.base.cfg.ae]

        def noisy():
            batches = islice(cycle(self.deep.batches(256)), max(1, head_samples // 256))
            for k, i in enumerate(batches):
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k)
                z, y = self.deep.batch(i)
                yield self.objective.draw(self.model, z[DEEP], y, generator)

        solve_embedder(self.model, self.base, pairs())
        if self.row.bins == 1:
            solve_head(self.model, noisy(), self.dtype)
        else:
            self.solve_binned_head(noisy())

    def train(self, run: Run):
        """Stage 2 by AdamW: embedder and head, the trunk frozen."""
        row, model = self.row, self.model
        plan = replace(TINY.stage2, steps=row.steps, batch=min(TINY.stage2.batch, len(self.deep)))

        def loss(indices, generator):
            z, y = self.deep.batch(indices)
            total, metrics = self.objective.train_loss(model, z[DEEP], y, generator)
            if row.held or row.blocks:
                small = self.small.batch(indices)[0][self.base.cfg.ae]
            if row.held:
                total = total + row.held * embedding_loss(model, self.base, z[DEEP], small)
            if row.blocks:
                total = total + row.blocks * self.block_distance(z[DEEP], small, y, generator)
            return total, metrics

        named = named_parameters_with(model, trainable_prefixes(model))
        train(run, "stage2", model, named, loss, len(self.deep), plan, seed=self.seed + 1, dtype=self.dtype)

    def block_distance(self, z: Tensor, small: Tensor, y: Tensor, generator) -> Tensor:
        """Mean over the blocks of || g - h ||^2 / || h ||^2: features g of the deep model, h of the base, at
        one t (B,). z (B,C',H',W'), small (B,C,H,W) of the same pictures"""
        _, t, _, x0 = self.objective.draw(self.model, z, y, generator)
        noise = torch.randn(small.shape, generator=generator)
        with torch.no_grad():
            wanted = token_features(self.base, path(noise, small, t)[0], t, y)
        found = token_features(self.model, path(x0, z, t)[0], t, y)
        distances = [(g.float() - h.float()).square().mean() / h.float().square().mean()
                     for g, h in zip(found, wanted)]
        return torch.stack(distances).mean()

    @torch.no_grad()
    def solve_binned_head(self, batches):
        """Least squares for every bin of t, on the samples whose t lies in it."""
        model = self.model
        head = BinnedLinear(model.final_layer.linear, self.row.bins)
        model.final_layer.linear = head
        sums = [LeastSquares(head.in_features, head.out_features) for _ in head.parts]
        seen = []
        hook = head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        native = model.to_native

        def to_native(x, t):
            head.t = t
            return native(x, t)

        model.to_native = to_native
        for z, t, y, x0 in batches:
            xt, v = path(x0, z, t)
            with autocast("cpu", self.dtype):
                model(xt, t, y)
            features = seen.pop().float()
            target = model.patchify(v)
            for k, part in enumerate(sums):
                rows = head.bin() == k
                if rows.any():
                    part.add(features[rows], target[rows])
        hook.remove()
        for layer, part in zip(head.parts, sums):
            weight, bias = part.solve(1e-4)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    @torch.no_grad()
    def score(self, metrics, count: int) -> tuple[dict, Tensor]:
        """Accuracy, Frechet distance, mean gap and validation loss; the pictures."""
        model = self.model.eval()
        z, y = self.val[0].batch(torch.arange(len(self.val[0])))
        few = torch.arange(min(64, UNSEEN))
        z_base, _ = self.val[1].batch(few)
        gaps = layer_gap(model, self.base, z[DEEP][few], z_base[self.base.cfg.ae], y[few])
        classes = torch.arange(count) % model.cfg.num_classes
        seeds = [1000 * self.seed + i for i in range(count)]
        sampling = choose_sampling(model.cfg, sampler="euler")
        images = generate(model, self.ae, classes, seeds, sampling, dtype=self.dtype, progress=True)
        scores = metrics(images, classes, [""] * count)
        losses = self.objective.validate(model, z[DEEP], y, self.dtype)
        return scores | dict(gap=sum(gaps) / len(gaps), val_loss=losses["val_loss"]), images


def find_base(args, base: str, row: str) -> Path | None:
    """The run of a row's base; None for the bundled one. ValueError if there is none."""
    if base == "tiny":
        return None
    if base == "one-size":
        if args.one_size:
            return Path(args.one_size)
        raise ValueError(f"the row {row} needs --one-size RUN, tiny before it saw its second size: `python "
                         "experiments/make_weights.py --only tiny` leaves it in runs/weights/tiny")
    run = Path(args.bases) / base
    if not is_finished(run):
        raise ValueError(f"the row {row} needs {run}; first: python experiments/bases.py --only {base}")
    register()
    return run


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW",
                   help="some rows (default: all but those of bases.py)")
    p.add_argument("--seeds", type=at_least(int, 0), nargs="+", default=[0], help="(default 0)")
    p.add_argument("--count", type=at_least(int, 8), default=256, help="pictures a row (default 256)")
    p.add_argument("--pictures", type=at_least(int, 64), default=4096, help="to learn from (default 4096)")
    p.add_argument("--one-size", metavar="RUN", help="tiny before it saw its second size")
    p.add_argument("--bases", default="runs/bases", metavar="DIR", help="of bases.py (default runs/bases)")
    p.add_argument("--out", default="runs/causes", metavar="DIR", help="(default runs/causes)")
    args = p.parse_args(argv)
    out = Path(args.out)
    dtype = torch.bfloat16
    names = args.only or [name for name in ROWS if name not in NAMES]
    for name in names:
        find_base(args, ROWS[name].base, name)
    metrics, _ = make_metrics(None, None, open_source(None, 128), args.count, captions=False)
    rows = []
    grid = []
    for name in names:
        for seed in args.seeds:
            begun = time.perf_counter()
            row = ROWS[name]
            # 256 px take four times as long
            pictures = args.pictures if row.res == 128 else max(64, args.pictures // 2)
            experiment = Experiment(row, find_base(args, row.base, name), pictures, seed, dtype)
            experiment.solve(head_samples=2 * args.pictures)
            if row.steps:
                experiment.train(Run(out / f"{name}-{row.steps}-steps-{pictures}-pictures-{seed}"))
            scores, images = experiment.score(metrics, args.count)
            rows.append({"row": name, "seed": seed, **scores})
            cells = [f"{key} {value:.3f}" for key, value in scores.items()]
            seconds = time.perf_counter() - begun
            print(f"{name}, seed {seed}: {', '.join(cells)} ({seconds:.0f} s)", flush=True)
            if seed == args.seeds[0]:
                small = nn.functional.interpolate(images[:8], size=128, mode="area")
                grid.append((f"{name}\n{scores['accuracy']:.0%} right", small))
    write_json(out / "causes.json", dict(rows=rows, count=args.count, pictures=args.pictures,
                                         torch=torch.__version__))
    save_grid(out / "causes.png", grid)
    print(f"wrote {out}/causes.json and causes.png")


if __name__ == "__main__":
    run_main(main)
