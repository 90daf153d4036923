"""Scores, each with its protocol: the gap of every layer, class accuracy, Frechet distance, FID and Inception score.

    python evaluate.py                                 base, aligned, fine-tuned, not aligned: the newest run of each kind
    python evaluate.py runs/finetune-tiny-1 --count 1024
    python evaluate.py --base tiny-flux --guidance 1 2 3.5 5                  pictures with captions, at several strengths of guidance
    python evaluate.py --train-classifier              the small judge of the embedded pictures, again from scratch
    python evaluate.py --train-classifier --images DIR --classifier FILE      a judge of your own pictures
    python evaluate.py --fid DIR --reference DIR --inception FILE             real pictures, Inception features

On the embedded pictures a small convolutional network judges: its answers give the class accuracy, its features the
Frechet distance. It never saw a generated picture. Pictures with captions are looked at by a program that finds every
object, its form, colour, size and place, and compares them with the words, as GenEval does. A distance means something only beside another one made from the
same number of pictures, the same features and the same reference; so every score prints them.
"""

import argparse
import json
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from autoencoder import load_autoencoder
from data import COLOURS, FORMS, HUES, RADII, RELATIONS, SHAPES, SIZES, ImageFolder, Scene, cache_prompts, cover, open_source, order, read_caption
from model import HERE, find_weights, read_config, read_tensors, run, write_tensors
from sample import (add_model_args, dtype_of, generate, load_base, load_run, newest_run, path, run_file, save_grid, settings, text_folder, to_uint8,
                    with_guidance)


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
        m.trunk(taps[0], m.condition(clock, y, z.shape[-2:]), taps)
        return [rearrange(h.float(), "b (h w) d -> b d h w", h=z.shape[-2] // m.cfg.patch_size) for h in taps]

    gaps = []
    for g, h in zip(features(model, z_dc, 1), features(base, z_base, 2)):
        h = F.adaptive_avg_pool2d(h, g.shape[-2:])
        gaps.append(float((g - h).norm() / (h - h.mean(dim=(0, 2, 3), keepdim=True)).norm()))
    return gaps


def gap_table(stages: dict[str, list[float]]) -> str:
    """{stage: gaps} as text, one row a layer."""
    names = list(stages)
    row = lambda title, cells: f"{title:<16}" + "".join(f"{c:>{max(10, len(n) + 2)}}" for n, c in zip(names, cells))
    lines = [row("gap to the base", names)]
    for i in range(len(stages[names[0]])):
        lines.append(row("embedder" if i == 0 else f"block {i}", [f"{stages[n][i]:.3f}" for n in names]))
    return "\n".join(lines + [row("mean", [f"{sum(v) / len(v):.3f}" for v in stages.values()])])


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


def load_classifier(file=None) -> Classifier:
    """The judge in this file (default: the shipped one), its class names in .classes. ValueError if it is none."""
    file = find_weights("the classifier", CLASSIFIER, file)
    tensors, names = read_tensors(file), read_config(file).get("classes")
    if names is None or "out.bias" not in tensors:
        raise ValueError(f"{file} is not a classifier of --train-classifier")
    judge = Classifier(len(names))
    judge.load_state_dict({k: v.float() for k, v in tensors.items()})
    judge.classes = tuple(names)
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
    features, y = judged_source(judge.eval(), val, 1024)
    score = share_right(judge, features, y)
    write_tensors(out, {k: v.bfloat16() for k, v in judge.state_dict().items()}, dict(classes=list(source.classes)))
    print(f"wrote {out}; accuracy on {len(y)} unseen pictures {score:.1%}")
    return score


@torch.no_grad()
def judged(judge: Classifier, images: Tensor, batch: int = 256) -> Tensor:
    """Features (B,D) of pictures (B,3,H,W) in [-1,1]."""
    return torch.cat([judge.features(x) for x in images.split(batch)])


def judged_source(judge: Classifier, source, n: int) -> tuple[Tensor, Tensor]:
    """Features (n,D) and classes (n,) of n pictures of a source, any n: a folder is sorted by class."""
    rows = order(0, min(n, len(source)), len(source), seed=0)
    features, labels = zip(*((judged(judge, x), y) for x, y in map(source.batch, rows.split(64))))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def share_right(judge: Classifier, features: Tensor, y: Tensor) -> float:
    return float((judge.out(features).argmax(dim=1) == y).float().mean())


def accuracy(judge: Classifier, images: Tensor, y: Tensor) -> float:
    """Share of the pictures that show the class they were asked to show."""
    return share_right(judge, judged(judge, images), y)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|| m1 - m2 ||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N,D), in float64. (arXiv 1706.08500)"""
    a, b = a.double(), b.double()
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    w, u = torch.linalg.eigh(s1)
    r1 = (u * w.clamp(min=0).sqrt()) @ u.T                           # S1 S2 has the eigenvalues of r1 S2 r1, which is symmetric
    root = torch.linalg.eigvalsh(r1 @ s2 @ r1).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root)


def inception_score(logits: Tensor) -> float:
    """exp E[KL(p(y|x) || p(y))] of class scores (N,K). (arXiv 1606.03498; one split, all pictures)"""
    p = logits.double().softmax(dim=1)
    return float((p * (p.clamp(min=1e-12).log() - p.mean(0, keepdim=True).clamp(min=1e-12).log())).sum(1).mean().exp())


# ---- the judge of captioned pictures: pixels in, words out --------------------------------------------------------------------------

class Seen(NamedTuple):
    form: str
    colour: str
    size: str
    x: float                                                         # the middle, in picture sides
    y: float


def _nearest_hue(rgb: Tensor) -> str:
    """The name of the hue of a colour (3,)."""
    r, g, b = rgb.tolist()
    hue = math.atan2(3**0.5 * (g - b), 2 * r - g - b) / (2 * math.pi)
    return COLOURS[int(((hue - HUES + 0.5) % 1 - 0.5).abs().argmin())]


def _outline(mask: Tensor) -> tuple[Tensor, float, float]:
    """One object's pixels (H,W) -> its outline stretched to 24x24, and its middle x, y in pixels."""
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    (top, bottom), (left, right) = ((v[0].item(), v[-1].item() + 1) for v in (rows, cols))
    box = mask[top:bottom, left:right].float()[None, None]
    return F.interpolate(box, (24, 24), mode="bilinear", antialias=True)[0, 0], (left + right) / 2, (top + bottom) / 2


@lru_cache(maxsize=1)
def _templates() -> list[tuple[str, Tensor, float]]:
    """Every form in a few turns: its name, its outline, and its area in squared radii."""
    one, found = torch.ones(1), []
    for form in FORMS:
        for turn in (-0.1, 0.0, 0.1):
            facts = dict(label=torch.tensor([SHAPES.index(form)]), x=0.5 * one, y=0.5 * one, radius=0.35 * one, turn=turn * one)
            mask = cover(facts, 96)[0] > 0.5
            found.append((form, _outline(mask)[0], float(mask.float().mean()) / 0.35**2))
    return found


def components(mask: Tensor) -> Tensor:
    """Connected pixels (also by corners) of masks (B,H,W) bool share a number > 0, that of their last pixel -> (B,H,W)."""
    label = mask * torch.arange(1, mask[0].numel() + 1, device=mask.device, dtype=torch.float32).view(mask.shape[1:])
    while True:
        spread = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def look_at(images: Tensor) -> list[tuple[list[Seen], str]]:
    """The objects in pictures (B,3,H,W) in [-1,1], and their background's colour. An object is a patch of strong colour
    (backgrounds are muted) of at least 0.6 % of the picture; its form is that of the most similar outline."""
    rgb = F.interpolate(images.float().cpu(), (128, 128), mode="bilinear", antialias=True).add(1).div(2).clamp(0, 1)
    strong = rgb.amax(dim=1) - rgb.amin(dim=1) > 0.31
    coarse = components(F.max_pool2d(strong[:, None].float(), 2)[:, 0] > 0)
    labels = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) * strong
    rest, out = F.max_pool2d(strong[:, None].float(), 13, 1, 6)[:, 0] == 0, []   # far enough from an object for its shine
    for picture, away, label in zip(rgb, rest, labels):
        seen = []
        for number, pixels in zip(*label.unique(return_counts=True)):
            if number and pixels >= 0.006 * label.numel():
                outline, x, y = _outline(mine := label == number)
                form, _, area = min(_templates(), key=lambda t: (t[1] - outline).square().mean())
                large = float(pixels) / 128**2 / area > RADII[0] * RADII[1]
                seen.append(Seen(form, _nearest_hue(picture[:, mine].mean(dim=1)), SIZES[large], x / 128, y / 128))
        out.append((seen, _nearest_hue(picture[:, away].mean(dim=1))))
    return out


ANSWERS = ("object", "count", "colour", "position", "binding", "all")


def judge_scene(seen: list[Seen], background: str, scene: Scene) -> dict[str, bool]:
    """A picture against its caption, as GenEval asks (arXiv 2310.11513): is every form there; as many objects as asked;
    every colour; the two in their relation (left out if none is asked); each form with its own colour and size; all of it."""
    forms, colours = Counter(s.form for s in seen), {s.colour for s in seen}
    whole = Counter((s.form, s.colour, s.size) for s in seen)
    out = dict(object=all(forms[t.form] > 0 for t in scene.things), count=len(seen) == sum(t.number for t in scene.things),
               colour=all(t.colour in colours for t in scene.things))
    if scene.relation:
        a, b = ([s for s in seen if s.form == t.form] for t in scene.things)
        out["position"] = bool(a and b) and relation_of(a[0], b[0]) == scene.relation
    out["binding"] = all(whole[t.form, t.colour, t.size] == t.number for t in scene.things)
    return out | {"all": all(out.values()) and background == scene.background}


def relation_of(a: Seen, b: Seen) -> str:
    dx, dy = a.x - b.x, a.y - b.y
    return RELATIONS[(dy > 0) if abs(dy) > abs(dx) else 2 + (dx > 0)]


def scene_scores(images: Tensor, captions: list[str]) -> dict[str, float]:
    """The share of pictures that pass each of judge_scene's questions, among those that it is asked of. ValueError for a
    caption that is not one of the procedural pictures'."""
    asked = [read_caption(c) for c in captions]
    if None in asked:
        raise ValueError(f"{captions[asked.index(None)]!r} is not a caption of the procedural pictures, so nothing can score it")
    answers = [judge_scene(seen, background, scene) for (seen, background), scene in zip(look_at(images), asked)]
    of = lambda key: [a[key] for a in answers if key in a]
    return {key: sum(of(key)) / len(of(key)) for key in ANSWERS if of(key)}


def pick_judge(source):
    """What scores pictures of the procedural kind of this source: judge(images, conditions, titles) -> {name: share}."""
    if source.classes:
        classifier = load_classifier()
        return lambda images, y, titles: {"accuracy": accuracy(classifier, images, y)}
    return lambda images, y, titles: scene_scores(images, titles)


# ---- real pictures: Inception features --------------------------------------------------------------------------------------------------

def inception(file: str | None, device="cpu"):
    """Function from byte pictures (B,3,H,W) to FID's features (B,2048) and the Inception score's logits (B,1008). The
    network is torch-fidelity's port of the original; its weights from `file`, or downloaded by it."""
    if file and not Path(file).is_file():
        raise ValueError(f"--inception {file}: no such file")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    except ImportError:                                              # optional: only real pictures need it
        raise ValueError("FID needs the original Inception network: pip install torch-fidelity") from None
    except Exception as e:                                           # a download, a pickle or a state dict that failed
        raise ValueError(f"the Inception weights {f'in {file} do not fit' if file else 'could not be downloaded'} ({type(e).__name__}); "
                         "give weights-inception-2015-12-05-6726825d.pth of torch-fidelity with --inception FILE") from None
    net = net.to(device).eval()
    return lambda x: [out.float().cpu() for out in net(x.to(device))]


@torch.no_grad()
def folder_scores(folder: str, extract, size: int, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Inception features and logits of all pictures of a folder. A broken one is an error: N is part of the score."""
    source = ImageFolder(folder, size, max_broken=0)
    rows = torch.arange(len(source)).split(batch)
    out = [extract(torch.from_numpy(to_uint8(source.batch(r)[0])).permute(0, 3, 1, 2)) for r in tqdm(rows, desc=f"features of {Path(folder).name}")]
    return torch.cat([f for f, _ in out]), torch.cat([logits for _, logits in out])


# ---- main ----------------------------------------------------------------------------------------------------------------------------------

def unfit(judge: Classifier, info: dict, num_classes: int) -> str | None:
    """Why this judge cannot judge a model of so many classes, with these facts, or None if it can."""
    if num_classes != len(judge.classes):
        return f"the classifier knows {len(judge.classes)} classes, the model {num_classes}"
    names = info.get("classes") or (SHAPES if num_classes == len(SHAPES) else judge.classes)    # a preset's are not written down
    if tuple(names) != judge.classes:
        return f"the classifier knows {', '.join(judge.classes[:3])} ..., the model {', '.join(names[:3])} ..."


def missing_runs(kinds: dict[str, dict | None], base: str) -> list[str]:
    """The commands that make the kinds of run that are not there; {kind: facts of the newest run, or None}."""
    equal = f" --train-steps {kinds['finetune']['steps']}" if kinds["finetune"] else ""    # as many as the aligned one has had
    how = {"align": "python align.py", "finetune": "python finetune.py", "noalign": f"python finetune.py --init base{equal}"}
    return [f"no {kind} run of {base} yet: {command} --base {base}" for kind, command in how.items() if kinds[kind] is None]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    p.set_defaults(base=None)
    p.add_argument("runs", nargs="*", help="run folders (default: of --base, the newest of each kind in runs/)")
    p.add_argument("--images", metavar="DIR", help="real pictures in class folders (default: those of the newest run, else procedural ones)")
    p.add_argument("--classifier", metavar="FILE", help="another judge (default: the shipped one, for the procedural pictures)")
    p.add_argument("--count", type=int, default=512, help="pictures a model (default 512)")
    p.add_argument("--guidance", type=float, nargs="+", help="strengths of guidance: what a distilled model is told, for others the classifier-free scale, 1 = off "
                   "(default: the model's own; DiT 3)")
    p.add_argument("--text-encoders", metavar="DIR", help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")
    p.add_argument("--num-steps", type=int, default=25, help="steps of Euler, or of DDIM for a model of epsilon (default 25)")
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument("--out", default="runs/evaluate.json", help="where the table goes (default runs/evaluate.json)")
    p.add_argument("--train-classifier", action="store_true", help="train a judge and write it to --classifier (default: the shipped one's place)")
    p.add_argument("--fid", metavar="DIR", help="score a folder of generated pictures by Inception features")
    p.add_argument("--reference", metavar="DIR", help="with --fid: the real pictures")
    p.add_argument("--inception", metavar="FILE", help="with --fid: the Inception network's weight file (default: torch-fidelity downloads it)")
    args = p.parse_args(argv)

    if args.train_classifier:
        if args.images and not args.classifier:
            raise ValueError("--train-classifier --images DIR needs --classifier FILE, or it would write over the shipped judge")
        train_classifier(args.classifier or str(HERE / CLASSIFIER), open_source(args.images, 64), open_source(args.images, 64, "val"))
        return
    if args.fid:
        if not args.reference:
            raise ValueError("--fid DIR needs --reference DIR: a distance has two ends")
        extract, size = inception(args.inception, args.device), args.res or 256
        (f, logits), (r, _) = folder_scores(args.fid, extract, size), folder_scores(args.reference, extract, size)
        print(f"FID {frechet_distance(f, r):.3f}, Inception score {inception_score(logits):.2f}   [N {len(f)}, reference {args.reference} of {len(r)}, "
              f"inception-v3-compat of torch-fidelity, {size} px centre squares, bytes]")
        return

    dtype, seeds = dtype_of(args), [args.seed + i for i in range(args.count)]
    if found := [Path(r) for r in args.runs]:
        name = args.base or read_config(run_file(found[0])).get("base", "tiny")
    else:
        name = args.base or "tiny"
        kinds = {k: newest_run(kinds=(f"{k}-{Path(name).name}",)) for k in ("align", "finetune", "noalign")}
        found = [r for r in kinds.values() if r]
        for line in missing_runs({k: r and read_config(run_file(r)) for k, r in kinds.items()}, name):
            print(line)
    base, base_info = load_base(name, args.weights, args.device)
    facts = read_config(run_file(found[-1])) if found else base_info
    folder, encoders, res = args.images or facts.get("images"), base.cfg.encoders, args.res or base.cfg.res
    train, val = (open_source(folder, res, split, (facts.get("captions") or "txt") if encoders else None) for split in ("train", "val"))
    own, spaces = settings(base.cfg, name), {}
    chosen = order(0, min(64, len(val)), len(val), seed=0)
    real, labels = val.batch(chosen)
    if encoders:
        titles = [val.caption(i % len(val)) for i in range(args.count)]
        text = cache_prompts(encoders, text_folder(name, encoders, own["text"], args.text_encoders, args.weights),
                             titles + [val.caption(int(i)) for i in chosen], base.cfg.text_tokens, dtype=dtype, device=args.device)
        asked, labels = text[torch.arange(args.count)], text[args.count + torch.arange(len(chosen))]
        if own["guidance"] is not None:
            labels = with_guidance(labels, 1.0)
    else:
        asked = torch.arange(args.count) % base.cfg.num_classes
        titles = [str(train.classes[k]) if k < len(train.classes) else str(k) for k in asked.tolist()]
    real, labels = real.to(args.device), labels.to(args.device)

    def ae_of(model, info):                                          # loaded once for all the models in its space
        own = args.base_ae_weights if model.cfg.ae == base.cfg.ae else None
        if model.cfg.ae not in spaces:
            spaces[model.cfg.ae] = load_autoencoder(model.cfg.ae, own or info.get("ae_weights"), device=args.device)
        return spaces[model.cfg.ae]

    def draw(model, ae, side, guidance, sampler, shift):
        told = getattr(model.cfg, "guidance_embed", False)
        cond, cfg_scale = (with_guidance(asked, guidance), 1.0) if told else (asked, guidance)
        if encoders:
            model.null = text.null
        return generate(model, ae, cond, seeds, args.num_steps, cfg_scale, sampler, shift, (side, side), dtype=dtype, progress=True)

    judge, no_judge = load_classifier(args.classifier) if args.classifier or not folder else None, None
    if judge is None:
        no_judge = f"the shipped classifier knows the procedural pictures only; train one: python evaluate.py --train-classifier --images {folder} --classifier FILE"
    elif not encoders and judge.classes != tuple(train.classes):
        no_judge = f"the classifier knows {', '.join(judge.classes[:3])} ..., the pictures are {', '.join(train.classes[:3]) or 'without classes'} ..."
    scored = (lambda images: scene_scores(images, titles)) if encoders else lambda images: {"accuracy": accuracy(judge, images, asked)}
    strengths = args.guidance or [own["cfg_scale"] if own["guidance"] is None else own["guidance"]]
    rows, drawn, notes = [], [], [f"no scores, no Frechet distance: {no_judge}"] if no_judge else []
    if not no_judge:
        reference = judged_source(judge, train, max(2048, args.count))[0]
        some = [val.batch(r)[0] for r in (torch.arange(args.count) % len(val)).split(64)]
        f, y = judged_source(judge, val, args.count)
        scores = scene_scores(torch.cat(some), titles) if encoders else dict(accuracy=share_right(judge, f, y))
        rows.append(dict(name="real pictures", **scores, frechet=frechet_distance(f, reference)))
    for r in [None, *found]:
        model, info = load_run(r, args.device, not args.raw, args.weights) if r else (base, base_info)
        ae, side = ae_of(model, info), args.res or model.cfg.res
        row = dict(name=r.name if r else f"base {Path(name).name}", tokens=(side // ae.cfg.f // model.cfg.patch_size) ** 2, steps=str(info.get("steps", "")))
        known = encoders or int(labels.max()) < base.cfg.num_classes
        if r and side == res and model.cfg.ae != base.cfg.ae and len(model.blocks) == len(base.blocks) and known:
            gaps = layer_gap(model, base, ae.encode(real), ae_of(base, base_info).encode(real), labels)
            row["gap"] = sum(gaps) / len(gaps)
        why = None if no_judge or encoders else unfit(judge, info, model.cfg.num_classes)
        if why:
            notes.append(f"{row['name']}: no scores, no Frechet distance: {why}")
        if why or no_judge:
            rows.append(row)
        for guidance in () if why or no_judge else strengths:
            sampler = "ddim" if model.cfg.predict == "epsilon" else "euler"
            images = draw(model, ae, side, guidance, sampler, info.get("shift", 1.0))
            drawn.append((f"{row['name']}\n{row['tokens']} tokens" + f"\nguidance {guidance:g}" * (len(strengths) > 1), images[:8]))
            rows.append(row | dict(guidance=guidance, sampler=sampler, **scored(images), frechet=frechet_distance(judged(judge, images), reference)))

    shares = list(dict.fromkeys(key for row in rows for key in ("accuracy", *ANSWERS) if key in row))
    columns = {"tokens": "", "steps": "", "guidance": "g", "gap": ".3f"} | dict.fromkeys(shares, ".1%") | {"frechet": ".3f"}
    print("\n" + " " * 26 + "".join(f"{key:>10}" for key in columns))
    for row in rows:
        print(f"{row['name']:<26}" + "".join(f"{format(row[key], form) if row.get(key) not in (None, '') else '-':>10}" for key, form in columns.items()))
    samplers = " or ".join(sorted({row["sampler"] for row in rows if "sampler" in row})) or "nothing drawn,"
    protocol = (f"N {args.count}, {'captions of unseen pictures' if encoders else 'all classes in turn'}, {samplers} {args.num_steps} steps, guidance {', '.join(f'{g:g}' for g in strengths)}, "
                f"seeds {args.seed}+i, {'raw weights' if args.raw else 'moving average where there is one'}; "
                + ("" if no_judge else f"features of {args.classifier or 'the shipped classifier'}, reference {len(reference)} real pictures; ")
                + f"gap: mean over layers at t = 1 on {len(real)} {'pictures of ' + str(folder) if folder else 'procedural pictures'}, {res} px; {dtype}, {args.device}")
    print(f"[{protocol}]" + "".join(f"\n{note}" for note in notes))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(dict(protocol=protocol, notes=notes, rows=rows), indent=1))
    if drawn:                                                        # pictures of several sizes do not make one grid
        size = drawn[0][1].shape[-2:]
        save_grid(Path(args.out).with_suffix(".png"), [(n, x) for n, x in drawn if x.shape[-2:] == size],
                  titles[:8] if len(titles) >= 8 else (), {"protocol": protocol})
    print(f"wrote {args.out}" + (f" and {Path(args.out).with_suffix('.png')}" if drawn else ""))


if __name__ == "__main__":
    run(main)
