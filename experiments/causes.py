"""Why does the frozen trunk draw on the paper's models and not on ours? One cause at a time, on `tiny`.

    python experiments/causes.py                       every row, about 25 minutes on two CPU cores
    python experiments/causes.py --only shipped half   some of them

    row      base                          Eq. 1 against the base's embeddings of           deep model
    shipped  tiny: 64 tokens, one size     the picture, averaged over 2x2 tokens            128 px, 16 tokens
    half     tiny                          the picture at half the size (16 tokens)         128 px, 16 tokens
    larger   tiny                          the picture at half the size (64 tokens)         256 px, 64 tokens
    bins     tiny                          as shipped; a head in eight parts, by t          128 px, 16 tokens
    two      trained on at two sizes       the picture, averaged over 2x2 tokens            128 px, 16 tokens
    both     trained on at two sizes       the picture at half the size (16 tokens)         128 px, 16 tokens

All rows are closed forms of embedder and head with the trunk frozen: no step of AdamW. The base of the last
two rows is tiny, trained on for 600 steps at 64 px (16 tokens) and 128 px (64) in turn, positions spread over
the same range: what FLUX and SANA have had by being trained at many sizes.
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
from align import LeastSquares, Objective, solve_embedder, solve_head
from autoencoder import ae_config
from checkpoints import load_autoencoder, load_base, read_tensors, write_json, write_tensors
from data import LatentCache, open_source
from evaluate import layer_gap, make_metrics
from model import to_deep_latent, to_deep_model
from sample import Parser, at_least, choose_sampling, generate, path, run_main, save_grid
from train import Plan, Run, autocast, prepare_for_training, train

DEEP = "tiny-dc-ae-f32c32"
UNSEEN = 256                                # pictures of the validation loss
TWO_SIZES = Plan(
    steps=600, lr=5e-4, batch=256, warmup=50, schedule="cosine", weight_decay=1e-3, clip=1.0, ema=0.998)


@dataclass(frozen=True)
class Row:
    """What differs between two alignments."""
    two_sizes: bool = False                 # the base was trained on at two sizes
    base_res: int = 128                     # of the pictures that the base embeds in Eq. 1
    res: int = 128                          # of the deep model
    bins: int = 1                           # parts of the head, by t

    @property
    def base_step(self) -> float:
        """Distance of the base's tokens: a smaller picture spreads over the same positions."""
        return 128 / self.base_res

    @property
    def deep_step(self) -> float:
        return 256 / self.res               # 4 or 8 tokens a side, over the positions that the base knows


ROWS = {
    "shipped": Row(),
    "half": Row(base_res=64),
    "larger": Row(res=256),
    "bins": Row(bins=8),
    "two": Row(two_sizes=True),
    "both": Row(two_sizes=True, base_res=64),
}


# ---- a base that knows two sizes -----------------------------------------------------------------

def train_two_sizes(base, out: Path, plan: Plan, pictures: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base's weights after training on at 64 and 128 px in turn; as many tokens in a step of either."""
    file = out / "two-sizes.safetensors"
    if file.exists():
        return read_tensors(file)
    ae = load_autoencoder(base.cfg.ae)
    sizes = {64: 2.0, 128: 1.0}                                      # pixels, position step
    caches = {res: cached(ae, res, "train", pictures) for res in sizes}
    turns = []

    def loss(indices, generator):
        res = 64 if turns[-1] % 2 == 0 else 128
        if res == 128:
            indices = indices[: max(1, len(indices) // 4)]
        base.cfg = replace(base.cfg, res=res, pos_step=sizes[res])
        z, y = caches[res].batch(indices, generator)
        return Objective().train_loss(base, z[base.cfg.ae], y, generator)

    named = list(base.named_parameters())
    base.train()
    _, averaged = train(Run(out / "two-sizes"), "train", base, named, loss, pictures, plan, dtype=dtype,
                        on_step=turns.append)
    with averaged():
        write_tensors(file, base.state_dict())
    return read_tensors(file)


def cached(ae, res: int, split: str, pictures: int) -> LatentCache:
    return LatentCache("runs/cache", open_source(None, res, split), [ae], pictures)


# ---- one alignment in closed form ----------------------------------------------------------------

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
    def __init__(self, row: Row, weights: dict | None, pictures: int, seed: int, dtype: torch.dtype):
        self.row = row
        self.seed = seed
        self.dtype = dtype
        self.objective = Objective()
        base, _ = load_base("tiny")
        base.cfg = replace(base.cfg, res=row.base_res, pos_step=row.base_step)
        if weights:
            base.load_state_dict(weights)
        prepare_for_training(base, [], "cpu")
        self.base = base
        whole = replace(base.cfg, pos_step=1.0)
        cfg = replace(to_deep_latent(whole, ae_config(DEEP), row.deep_step, 1.0), res=row.res)
        torch.manual_seed(seed)
        self.model = to_deep_model(base, cfg)
        self.ae = load_autoencoder(DEEP)
        base_ae = load_autoencoder(base.cfg.ae)
        self.deep = cached(self.ae, row.res, "train", pictures)
        self.small = cached(base_ae, row.base_res, "train", pictures)
        self.val = [cached(ae, res, "val", UNSEEN) for ae, res in ((self.ae, row.res), (base_ae, row.base_res))]

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


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="some rows (default all)")
    p.add_argument("--seeds", type=at_least(int, 0), nargs="+", default=[0], help="(default 0)")
    p.add_argument("--count", type=at_least(int, 8), default=256, help="pictures a row (default 256)")
    p.add_argument("--pictures", type=at_least(int, 64), default=4096, help="to learn from (default 4096)")
    p.add_argument(
        "--steps", type=at_least(int, 1), default=TWO_SIZES.steps, help="at two sizes (default 600)")
    p.add_argument("--out", default="runs/causes", metavar="DIR", help="(default runs/causes)")
    args = p.parse_args(argv)
    out = Path(args.out)
    dtype = torch.bfloat16
    weights = None
    if any(ROWS[name].two_sizes for name in args.only or ROWS):
        plan = replace(TWO_SIZES, steps=args.steps, batch=min(TWO_SIZES.batch, args.pictures))
        weights = train_two_sizes(load_base("tiny")[0], out, plan, args.pictures, dtype)
    metrics, _ = make_metrics(None, None, open_source(None, 128), args.count, captions=False)
    rows = []
    grid = []
    for name in args.only or ROWS:
        for seed in args.seeds:
            begun = time.perf_counter()
            row = ROWS[name]
            # 256 px take four times as long
            pictures = args.pictures if row.res == 128 else max(64, args.pictures // 2)
            experiment = Experiment(row, weights if row.two_sizes else None, pictures, seed, dtype)
            experiment.solve(head_samples=2 * args.pictures)
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
