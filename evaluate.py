"""Scores, each with its protocol: the gap of every layer, class accuracy, Frechet distance, FID and Inception score.

    python evaluate.py                                 base, aligned, fine-tuned, not aligned: the newest run of each kind
    python evaluate.py runs/finetune-tiny-1 --count 1024
    python evaluate.py --train-classifier              the small judge of the embedded pictures, again from scratch
    python evaluate.py --fid IMAGES --reference IMAGES --inception FILE      real pictures, Inception features

On the embedded pictures a small convolutional network judges: its answers give the class accuracy, its features the
Frechet distance. It never saw a generated picture. A distance means something only beside another one made from the
same number of pictures, the same features and the same reference; so every score prints them.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from autoencoder import load_autoencoder
from data import ImageFolder, LatentCache, ShapesSource, open_source
from model import HERE, find_weights, read_tensors, run, write_tensors
from sample import add_model_args, dtype_of, generate, load_base, load_run, newest_run, path, to_uint8


# ---- the gap between two models' representations (Fig. 4a) ----------------------------------------------------------------------

@torch.no_grad()
def layer_gap(model, base, z_dc: Tensor, z_base: Tensor, y: Tensor, t: float = 1.0, seed: int = 0) -> list[float]:
    """Relative distance of a converted model's features to its base's, after the embedder and after every block.

    Both see the same pictures, each in its own latents, at the same t (1 = clean; below, each with noise of its own) and
    class. The base's features h are averaged over each cell of the new grid, h' = pool(h); the gap of a layer is
    || g - h' || / || h' - mean(h') ||, over all pictures, places and channels, the mean per channel. A model that
    only knew the base's average feature would score 1; 0 is a perfect match.

    z_dc (B,C',H',W'), z_base (B,C,H,W) -> depth + 1 numbers."""
    def features(m, z, i):
        x0 = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed + i)).to(z)
        time = torch.full((len(z),), t, device=z.device)
        x, clock = m.own_clock(path(x0, z, time)[0], time)
        taps = [m.embed(x)]
        m.trunk(taps[0], m.condition(clock, y), taps)
        return [rearrange(h.float(), "b (h w) d -> b d h w", h=z.shape[-2] // m.cfg.patch_size) for h in taps]

    gaps = []
    for g, h in zip(features(model, z_dc, 1), features(base, z_base, 2)):
        h = F.adaptive_avg_pool2d(h, g.shape[-2:])
        gaps.append(float((g - h).norm() / (h - h.mean(dim=(0, 2, 3), keepdim=True)).norm()))
    return gaps


def gap_table(stages: dict[str, list[float]]) -> str:
    """{stage: gaps} as text, one row a layer."""
    names = list(stages)
    lines = ["gap to the base   " + "".join(f"{n:>16}" for n in names)]
    for i in range(len(stages[names[0]])):
        lines.append(f"{'embedder' if i == 0 else f'block {i}':<18}" + "".join(f"{stages[n][i]:>16.3f}" for n in names))
    return "\n".join(lines + [f"{'mean':<18}" + "".join(f"{sum(v) / len(v):>16.3f}" for v in stages.values())])


# ---- the judge of the embedded pictures --------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small convolutional network on 64-pixel pictures: features (B,128), and classes."""

    def __init__(self, classes: int = 8, width: int = 32):
        super().__init__()
        w = [3, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                                                    nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()) for a, b in zip(w, w[1:])])
        self.out = nn.Linear(w[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True) if x.shape[-1] != 64 else x
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


CLASSIFIER = "weights/tiny-classifier.safetensors"


def load_classifier(path=None) -> Classifier:
    tensors = read_tensors(find_weights("the classifier", CLASSIFIER, path))
    judge = Classifier(len(tensors["out.bias"]))
    judge.load_state_dict({k: v.float() for k, v in tensors.items()})
    return judge.requires_grad_(False).eval()


def train_classifier(out: str, source, val, steps: int = 1500, batch: int = 64, seed: int = 0) -> float:
    """Train the judge; pictures are blurred and noised at random, so that it judges shapes and not the grain."""
    torch.manual_seed(seed)
    judge = Classifier(len(source.classes))
    opt = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps)
    bar = tqdm(range(steps), desc="classifier")
    for step in bar:
        x, y = source.batch(torch.randint(len(source), (batch,)))
        if step % 2:
            x = F.avg_pool2d(x, 3, 1, 1)
        x = x + torch.rand(batch, 1, 1, 1) * 0.15 * torch.randn_like(x)
        loss = F.cross_entropy(judge(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        plan.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    x, y = val.batch(torch.arange(min(1024, len(val))))
    score = accuracy(judge.eval(), x, y)
    write_tensors(out, {k: v.bfloat16() for k, v in judge.state_dict().items()}, dict(classes=list(source.classes)))
    print(f"wrote {out}; accuracy on {len(y)} unseen pictures {score:.1%}")
    return score


@torch.no_grad()
def judged(judge: Classifier, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Features (B,D) and class scores (B,K) of pictures in [-1,1]."""
    f = torch.cat([judge.features(x) for x in images.split(batch)])
    return f, judge.out(f)


def accuracy(judge: Classifier, images: Tensor, y: Tensor) -> float:
    """Share of the pictures that show the class they were asked to show."""
    return float((judged(judge, images)[1].argmax(dim=1) == y).float().mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|| m1 - m2 ||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N,D), in float64. (arXiv 1706.08500)"""
    a, b = a.double(), b.double()
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root)


def inception_score(logits: Tensor) -> float:
    """exp E[KL(p(y|x) || p(y))] of class scores (N,K). (arXiv 1606.03498; one split, all pictures)"""
    p = logits.double().softmax(dim=1)
    return float((p * (p.clamp(min=1e-12).log() - p.mean(0, keepdim=True).clamp(min=1e-12).log())).sum(1).mean().exp())


# ---- real pictures: Inception features --------------------------------------------------------------------------------------------------

def inception(path: str | None):
    """Function from byte pictures (B,3,H,W) to FID's 2048 features and the Inception score's logits. The network is
    torch-fidelity's port of the original, through torchmetrics; its weights from `path`, or downloaded by it."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
        net = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    except ImportError:                                              # optional: only real runs need it
        raise ValueError("FID needs the original Inception network: pip install torchmetrics torch-fidelity") from None
    except Exception as e:
        raise ValueError(f"the Inception weights could not be had ({type(e).__name__}); give pt_inception-2015-12-05-6726825d.pth with --inception FILE") from None
    return lambda x: net.eval()(x)


def folder_scores(folder: str, extract, size: int, batch: int = 32) -> tuple[Tensor, Tensor]:
    source = ImageFolder(folder, size, check=False)
    f, logits = [], []
    for i in tqdm(range(0, len(source), batch), desc=f"features of {Path(folder).name}"):
        x, _ = source.batch(torch.arange(i, min(i + batch, len(source))))
        out = extract(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2))
        f.append(out[0]), logits.append(out[1])
    return torch.cat(f), torch.cat(logits)


# ---- main ----------------------------------------------------------------------------------------------------------------------------------

def score_model(model, ae, judge, reference: Tensor, count: int, cfg_scale: float, num_steps: int, shift: float, seed: int, dtype, batch: int = 64) -> dict:
    """Accuracy and Frechet distance of `count` pictures, all classes in turn, seeds seed + i."""
    y = torch.arange(count) % model.cfg.num_classes
    images = generate(model, ae, y, [seed + i for i in range(count)], num_steps, cfg_scale, shift=shift, batch=batch, dtype=dtype, progress=True)
    f, logits = judged(judge, images)
    return dict(accuracy=float((logits.argmax(1) == y).float().mean()), frechet=frechet_distance(f, reference))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    p.add_argument("runs", nargs="*", help="run folders (default: the newest of each kind in runs/)")
    p.add_argument("--count", type=int, default=512, help="pictures a model (default 512)")
    p.add_argument("--cfg-scale", type=float, default=3.0, help="classifier-free guidance; 1 = off (default 3)")
    p.add_argument("--num-steps", type=int, default=25, help="Euler steps (default 25)")
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument("--out", default="runs/evaluate.json", help="where the table goes (default runs/evaluate.json)")
    p.add_argument("--train-classifier", action="store_true", help="train the judge of the embedded pictures")
    p.add_argument("--images", help="with --train-classifier: a folder of class folders instead of the procedural pictures")
    p.add_argument("--classifier", help="another judge's file (default: the shipped one)")
    p.add_argument("--fid", metavar="DIR", help="score a folder of generated pictures by Inception features")
    p.add_argument("--reference", metavar="DIR", help="with --fid: the real pictures")
    p.add_argument("--inception", metavar="FILE", help="with --fid: the Inception network's weight file (default: torch-fidelity downloads it)")
    args = p.parse_args(argv)

    if args.train_classifier:
        train_classifier(args.out if args.out.endswith(".safetensors") else str(HERE / CLASSIFIER), open_source(args.images, 64), open_source(args.images, 64, "val"))
        return
    if args.fid:
        if not args.reference:
            raise ValueError("--fid DIR needs --reference DIR: a distance has two ends")
        extract, size = inception(args.inception), args.res or 256
        (f, logits), (r, _) = folder_scores(args.fid, extract, size), folder_scores(args.reference, extract, size)
        print(f"FID {frechet_distance(f, r):.3f}, Inception score {inception_score(logits):.2f}   [N {len(f)}, reference {args.reference} of {len(r)}, "
              f"inception-v3-compat of torch-fidelity, {size} px centre squares, bytes]")
        return

    judge, dtype = load_classifier(args.classifier), dtype_of(args)
    base, _ = load_base(args.base, args.weights, args.device)
    res = args.res or base.cfg.res
    val = ShapesSource(res, args.count, "val")
    real, labels = val.batch(torch.arange(args.count))
    reference = judged(judge, ShapesSource(res, max(2048, args.count), "train").batch(torch.arange(max(2048, args.count)))[0])[0]
    ae_base = load_autoencoder(base.cfg.ae, args.base_ae_weights, device=args.device)
    rows = [dict(name="real pictures", tokens="", steps="", gap="", accuracy=accuracy(judge, real, labels), frechet=frechet_distance(judged(judge, real)[0], reference))]
    z_base = ae_base.encode(real[:64].to(args.device))

    def add(name, model, ae, info):
        scores = score_model(model, ae, judge, reference, args.count, args.cfg_scale, args.num_steps, info.get("shift", 1.0), args.seed, dtype)
        gap = "" if model.cfg.ae == base.cfg.ae or len(model.blocks) != len(base.blocks) else \
            sum(g := layer_gap(model, base, ae.encode(real[:64].to(args.device)), z_base, labels[:64].to(args.device))) / len(g)
        rows.append(dict(name=name, tokens=(res // ae.cfg.f // model.cfg.patch_size) ** 2, steps=info.get("steps", ""), gap=gap, **scores))

    add(f"base {args.base}", base, ae_base, {})
    found = [Path(r) for r in args.runs] or [r for k in ("align", "finetune", "noalign") if (r := newest_run(kinds=(f"{k}-{args.base}",)))]
    for r in found:
        model, info = load_run(r, args.device, ema=not args.raw)
        add(r.name, model, load_autoencoder(model.cfg.ae, device=args.device), info)
    print(f"\n{'':<26}{'tokens':>8}{'steps':>14}{'gap':>8}{'accuracy':>10}{'Frechet':>9}")
    for row in rows:
        print(f"{row['name']:<26}{row['tokens']:>8}{row['steps']!s:>14}{row['gap'] if row['gap'] == '' else format(row['gap'], '.3f'):>8}{row['accuracy']:>10.1%}{row['frechet']:>9.3f}")
    protocol = (f"N {args.count}, all classes in turn, Euler {args.num_steps} steps, guidance {args.cfg_scale}, seeds {args.seed}+i, {'raw weights' if args.raw else 'moving average where there is one'}; "
                f"features of the shipped classifier, reference {len(reference)} real pictures; gap: mean over layers at t = 1 on 64 pictures; {dtype}, {args.device}")
    print(f"[{protocol}]")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(dict(protocol=protocol, rows=rows), indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
