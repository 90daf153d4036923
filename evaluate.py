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
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from autoencoder import Autoencoder
from checkpoints import (HERE, load_autoencoder, load_base, load_run, newest_run, read_config, run_file, write_tensors)
from shapes import (ANSWERS, CLASSIFIER, Classifier, SHAPES, accuracy, classifier_features, load_classifier, scene_scores, share_right)
from data import (ImageFolder, cache_prompts, open_source, order, text_folder)
from sample import (add_model_args, choose_sampling, dtype_of, generate, path, run_main, save_grid, to_uint8, with_guidance)


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
        tokens = token_features(m, path(x0, z, time)[0], time, y)
        return [rearrange(h.float(), "b (h w) d -> b d h w", h=z.shape[-2] // m.cfg.patch_size) for h in tokens]

    gaps = []
    for g, h in zip(features(model, z_dc, 1), features(base, z_base, 2)):
        h = F.adaptive_avg_pool2d(h, g.shape[-2:])
        gaps.append(float((g - h).norm() / (h - h.mean(dim=(0, 2, 3), keepdim=True)).norm()))
    return gaps


def token_features(model, x: Tensor, t: Tensor, y) -> list[Tensor]:
    """The picture's tokens (B,N,D) after the embedder and after every block of one forward pass, by hooks."""
    features = []

    def keep_embedded(block, inputs):
        features.append(inputs[0])                                   # the first block reads what the embedder puts out

    def keep_output(block, inputs, output):
        tokens = output[0] if isinstance(output, tuple) else output  # a double block of FLUX returns (picture, text)
        features.append(tokens[:, -features[0].shape[1]:])           # a single block returns the text's tokens first

    hooks = [model.blocks[0].register_forward_pre_hook(keep_embedded)]
    hooks += [block.register_forward_hook(keep_output) for block in model.blocks]
    try:
        model(x, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(features) == len(model.blocks) + 1, "a compiled block passes over its hooks"
    return features


def gap_table(stages: dict[str, list[float]]) -> str:
    """{stage: gaps} as text, one row a layer."""
    names = list(stages)
    row = lambda title, cells: f"{title:<16}" + "".join(f"{c:>{max(10, len(n) + 2)}}" for n, c in zip(names, cells))
    lines = [row("gap to the base", names)]
    for i in range(len(stages[names[0]])):
        lines.append(row("embedder" if i == 0 else f"block {i}", [f"{stages[n][i]:.3f}" for n in names]))
    return "\n".join(lines + [row("mean", [f"{sum(v) / len(v):.3f}" for v in stages.values()])])


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


def judged_source(judge: Classifier, source, n: int) -> tuple[Tensor, Tensor]:
    """Features (n,D) and classes (n,) of n pictures of a source, any n: a folder is sorted by class."""
    rows = order(0, min(n, len(source)), len(source), seed=0)
    features, labels = zip(*((classifier_features(judge, x), y) for x, y in map(source.batch, rows.split(64))))
    return torch.cat(features), torch.cat(labels)


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


# ---- how good is it? -------------------------------------------------------------------------------------------------------

def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (B,3,H,W) in [-1,1], one number each (B,)."""
    return 10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures (B,3,H,W) in [-1,1], one number each (B,): a Gaussian window
    of 11 pixels, sigma 1.5, every place where it fits, mean over places and channels."""
    x, y = (x.float() + 1) / 2, (y.float() + 1) / 2
    g = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    mean = lambda v: F.conv2d(v, window, groups=v.shape[1])
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2                                         # of a range of 1
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean(dim=(1, 2, 3))


@torch.no_grad()
def reconstruct(ae: Autoencoder, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float, float]:
    """Pictures (B,3,H,W) -> their reconstructions, float32, clamped to [-1,1], and the seconds of encode and decode."""
    now = lambda: (torch.cuda.synchronize() if x.is_cuda else None, time.perf_counter())[1]
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        start = now()
        z = ae.encode(x)
        middle = now()
        y = ae.decode(z)
    return y.float().clamp(-1, 1), middle - start, now() - middle


def plot_curves(file: Path, logs: dict[str, list[dict]]):
    """Loss and validation loss, gradient norm (Fig. 19), and the validation loss at each t, against the step; a column a stage."""
    import matplotlib                                                # matplotlib: curves
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(3, len(logs), figsize=(5 * len(logs), 9), squeeze=False)
    for col, (stage, log) in enumerate(logs.items()):
        times = sorted({k for r in log for k in r if k.startswith("val_t")})
        for ax, keys in zip(axes[:, col], (("loss", "val_loss", "val_loss_ema"), ("grad_norm",), times)):
            for key in keys:
                if points := [(r["step"], r[key]) for r in log if key in r]:
                    ax.plot(*zip(*points), label=key, marker="o" if key.startswith("val") else None)
                    ax.legend(fontsize=7)
            ax.set_yscale("log"), ax.set_xlabel("step"), ax.grid(alpha=0.3)
        axes[0][col].set_title(stage)
    fig.tight_layout()
    fig.savefig(file, dpi=80)
    plt.close(fig)


def plot_gap(file: Path, gaps: dict[str, list[float]]):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    for name, values in gaps.items():
        ax.plot(range(len(values)), values, marker="o", label=name)
    ax.set_xlabel("block (0 = embedder)"), ax.set_ylabel("relative gap to the base"), ax.set_ylim(bottom=0), ax.grid(alpha=0.3), ax.legend()
    fig.tight_layout()
    fig.savefig(file, dpi=80)
    plt.close(fig)


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
    own, spaces = choose_sampling(base.cfg), {}
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
            rows.append(row | dict(guidance=guidance, sampler=sampler, **scored(images), frechet=frechet_distance(classifier_features(judge, images), reference)))

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
    run_main(main)
