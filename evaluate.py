"""Scores with their protocol: layer gap, class accuracy, Frechet distance, FID, Inception score, PSNR, SSIM.

    python evaluate.py                          base, aligned, fine-tuned, not aligned: the newest run of each
    python evaluate.py runs/finetune-tiny-1 --count 1024
    python evaluate.py --base tiny-flux --guidance 1 2 3.5 5        pictures with captions, by guidance scale
    python evaluate.py --ae tiny-dc-ae-f32c32                       reconstructions of an autoencoder
    python evaluate.py --fid DIR --reference DIR --inception FILE   folders of pictures, Inception features

A small convolutional network, which never saw a generated picture, scores the bundled pictures: its answers
give the class accuracy, its features the Frechet distance. On pictures with captions shapes.py detects every
object and compares form, colour, size and place with the words, as GenEval does. Two distances compare only
if they come from the same number of pictures, the same features and the same reference: every table prints
these.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from model import Sampling, Text
from autoencoder import AUTOENCODERS, Autoencoder, ae_config
from checkpoints import (
    atomic, check_writable, load_autoencoder, load_base, load_run, newest_run, read_base_config, read_config,
    read_run_config, run_file, write_json)
from shapes import (ANSWERS, SHAPES, Classifier, classifier_features, load_classifier, scene_scores,
                    share_right)
from data import ImageFolder, cache_prompts, check_encoders, open_source, order, text_folder
from fast import peak_gib, timed
from flags import (
    Parser, add_model_args, at_least, check_base, check_finite, check_paths, check_pictures, choose_sampling,
    class_names, device_here, dtype_of, guidance_of, reject, run_main, with_guidance, within)
from sample import (
    free_path, generate, latent_size, make_clock, path, save_grid, save_png, short_hash, to_uint8)


# ---- the gap between two models' features (Fig. 4a) ----------------------------------------------

@torch.no_grad()
def layer_gap(model, base, z_dc: Tensor, z_base: Tensor, y, t: float = 1.0, seed: int = 0) -> list[float]:
    """Relative distance of a converted model's features to its base's, after the embedder and every block.

    Both read the same pictures, each in its own latents, at the same t (1 = clean; below, each with noise of
    its own) and condition. The base's features h are averaged over each cell of the new grid, h' = pool(h);
    the gap of a layer is || g - h' || / || h' - mean(h') || over all pictures, places and channels, the mean
    per channel. 0 is a perfect match, 1 the score of the base's average feature.

    z_dc (B,C',H',W'), z_base (B,C,H,W) -> depth + 1 numbers."""
    gaps = []
    dc_layers = features_on_grid(model, z_dc, y, t, seed + 1)
    base_layers = features_on_grid(base, z_base, y, t, seed + 2)
    for g, h in zip(dc_layers, base_layers):
        h = F.adaptive_avg_pool2d(h, g.shape[-2:])      # B D H' W'
        average = h.mean(dim=(0, 2, 3), keepdim=True)
        gap = (g - h).norm() / (h - average).norm()
        gaps.append(float(gap))
    return gaps


def token_pixels(cfg) -> int:
    """A side of a token, in pixels."""
    return ae_config(cfg.ae).f * cfg.patch_size


def target_of(base, cfg, match: str):
    """The base as Eq. 1 reads it for a deep model of this configuration, by align.py's --match: as it is; by
    "resize" the same weights at the size at which its grid is the deep model's, at the same positions.
    ValueError for a deep model with more tokens than the base."""
    if match != "resize":
        return base
    own, new = token_pixels(base.cfg), token_pixels(cfg)
    if new % own:
        raise ValueError(f"--match resize: a token of {new} pixels is no multiple of the base's {own}; "
                         "use --match downsample")
    target = copy.copy(base)
    target.cfg = replace(base.cfg, res=cfg.res * own // new)
    if hasattr(cfg, "pos_step"):
        target.cfg = replace(target.cfg, pos_step=cfg.pos_step)
    return target


def features_on_grid(model, z: Tensor, y, t: float, seed: int) -> list[Tensor]:
    """Features (B,D,H,W) float32 of every layer at x_t of the latents z, with H W cells of p x p latents."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(z.shape, generator=generator).to(z)
    times = torch.full((len(z),), t, device=z.device)
    xt, _ = path(x0, z, times)
    height = z.shape[-2] // model.cfg.patch_size
    layers = token_features(model, xt, times, y)
    return [rearrange(h.float(), "b (h w) d -> b d h w", h=height) for h in layers]


def token_features(model, x: Tensor, t: Tensor, y) -> list[Tensor]:
    """Image tokens (B,N,D) after the embedder and after every block of one forward pass, by hooks."""
    layers = []

    def keep_embedded(block, inputs):
        layers.append(inputs[0])

    def keep_output(block, inputs, output):
        # FLUX's double blocks return (image, text), its single blocks the text's tokens before the image's
        tokens = output[0] if isinstance(output, tuple) else output
        N = layers[0].shape[1]
        layers.append(tokens[:, -N:])

    # the first block's input is the embedder's output, positions included
    hooks = [model.blocks[0].register_forward_pre_hook(keep_embedded)]
    hooks += [block.register_forward_hook(keep_output) for block in model.blocks]
    try:
        model(x, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(layers) == len(model.blocks) + 1, "compiled blocks skip their hooks"
    return layers


def gap_table(stages: dict[str, list[float]]) -> str:
    """{stage: gaps} as text, one row a layer, the mean last."""
    widths = [max(10, len(name) + 2) for name in stages]

    def line(title: str, cells) -> str:
        return f"{title:<16}" + "".join(f"{cell:>{width}}" for width, cell in zip(widths, cells))

    lines = [line("gap to the base", stages)]
    for i, layer in enumerate(zip(*stages.values())):
        lines.append(line(f"block {i}" if i else "embedder", [f"{gap:.3f}" for gap in layer]))
    lines.append(line("mean", [f"{sum(gaps) / len(gaps):.3f}" for gaps in stages.values()]))
    return "\n".join(lines)


# ---- distances between sets of features ----------------------------------------------------------

def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|| m1 - m2 ||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N,D), in float64.
    (arXiv 1706.08500)"""
    a = a.double()
    b = b.double()
    s1 = torch.cov(a.T)
    s2 = torch.cov(b.T)
    # S1 S2 has the eigenvalues of r1 S2 r1 with r1 = S1^(1/2), and that matrix is symmetric
    values, vectors = torch.linalg.eigh(s1)
    r1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    root = torch.linalg.eigvalsh(r1 @ s2 @ r1).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + s1.trace() + s2.trace() - 2 * root)


def inception_score(logits: Tensor) -> float:
    """exp E[KL(p(y|x) || p(y))] of class logits (N,K). (arXiv 1606.03498; one split, all pictures)"""
    p = logits.double().softmax(dim=1)
    marginal = p.mean(0, keepdim=True)
    # a probability of 0 has no logarithm, and adds nothing to the sum
    log_p = p.clamp(min=1e-12).log()
    log_marginal = marginal.clamp(min=1e-12).log()
    kl = (p * (log_p - log_marginal)).sum(1)
    return float(kl.mean().exp())


# ---- reconstruction by an autoencoder ------------------------------------------------------------

def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of pictures (B,3,H,W) in [-1,1]."""
    mse = (x - y).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)                    # the range of values is 2


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (B,) of pictures (B,3,H,W) in [-1,1] (Wang et al. 2004): a Gaussian window of 11
    pixels with sigma 1.5 at every place where it fits, mean over places and channels."""
    x = (x.float() + 1) / 2
    y = (y.float() + 1) / 2
    distance = torch.arange(11, device=x.device) - 5.0
    g = torch.exp(-(distance**2) / (2 * 1.5**2))
    window = g[:, None] * g / g.sum() ** 2              # 11 11, sums to 1
    window = window.expand(x.shape[1], 1, 11, 11)

    def local_mean(v):
        return F.conv2d(v, window, groups=v.shape[1])

    mx = local_mean(x)
    my = local_mean(y)
    vx = local_mean(x * x) - mx * mx
    vy = local_mean(y * y) - my * my
    cov = local_mean(x * y) - mx * my
    # the paper's constants, for a range of 1: both ratios stay finite where a picture is black or flat
    c1 = 0.01**2
    c2 = 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * cov + c2) / (vx + vy + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


@torch.no_grad()
def reconstruct(ae: Autoencoder, x: Tensor, dtype=torch.float32) -> tuple[Tensor, float, float]:
    """Reconstructions of pictures (B,3,H,W), float32 in [-1,1], and the seconds of encode and decode."""
    seconds = {}
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        with timed(seconds, "encode", x.device):
            z = ae.encode(x)
        with timed(seconds, "decode", x.device):
            y = ae.decode(z)
    return y.float().clamp(-1, 1), seconds["encode"], seconds["decode"]


def score_autoencoder(name: str, weights: str | None, images: str | None, res: int, count: int, out: Path,
                      dtype: torch.dtype, device: str):
    """Print PSNR and SSIM of the first pictures of a folder, or of procedural ones (None); write them above
    their reconstructions to `out`."""
    check_writable(out)
    # procedural pictures of the split that no autoencoder was trained on
    source = open_source(images, res, "all" if images else "val")
    ae = load_autoencoder(name, weights, device=device)
    check_finite(ae, name)
    settings = short_hash([name, weights, images, res, count, str(dtype)])
    out = free_path(out, settings)
    n = min(count, len(source))
    cells = res // ae.cfg.f
    print(f"{ae.cfg.name}: {res}x{res} -> {cells}x{cells} places of {ae.cfg.channels} channels, "
          f"{dtype} on {device}")
    print("picture  PSNR dB    SSIM")
    rows = []
    pairs = []
    for i in range(n):
        x, _ = source.batch(torch.tensor([i]))
        x = x.to(device)
        y, encode, decode = reconstruct(ae, x, dtype)
        quality = psnr(x, y).item()
        similarity = ssim(x, y).item()
        rows.append((quality, similarity, encode, decode))
        pairs.append(torch.cat([x, y], dim=2))          # 1 3 2H W
        print(f"{i:7d}  {quality:7.2f}  {similarity:6.4f}")
    # means of the scores, medians of the times: the first picture also warms up
    psnrs, ssims, encodes, decodes = (sorted(column) for column in zip(*rows))
    print(f"   mean  {sum(psnrs) / n:7.2f}  {sum(ssims) / n:6.4f}")
    memory = f", peak {peak_gib(device):.2f} GiB" if torch.device(device).type == "cuda" else ""
    print(f"a picture: encode {encodes[n // 2]:.3f} s, decode {decodes[n // 2]:.3f} s (median){memory}")
    save_png(out, to_uint8(torch.cat(pairs, dim=3))[0], {"settings": settings})
    print(f"wrote {out}: {n} originals above their reconstructions")


# ---- folders of pictures: Inception features -----------------------------------------------------

def load_inception(file: str | None, device="cpu"):
    """A function from byte pictures (B,3,H,W) to FID's features (B,2048) and the Inception score's logits
    (B,1008). The network is torch-fidelity's port of the original; its weights come from `file`, or
    torch-fidelity downloads them."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    except ImportError:
        raise ValueError("FID needs the original Inception network: pip install torch-fidelity") from None
    except Exception as e:                              # a download, a pickle or a state dict that failed
        problem = f"in {file} do not fit" if file else "could not be downloaded"
        raise ValueError(
            f"the Inception weights {problem} ({type(e).__name__}); give "
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity with --inception FILE") from None
    net = net.to(device).eval()

    def extract(pixels: Tensor) -> list[Tensor]:
        return [out.float().cpu() for out in net(pixels.to(device))]
    return extract


@torch.no_grad()
def folder_features(source: ImageFolder, extract, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Inception features and logits of a folder's pictures."""
    features = []
    logits = []
    name = f"features of {source.root.name}"
    for rows in tqdm(torch.arange(len(source)).split(batch), desc=name, disable=None):
        pixels = torch.from_numpy(to_uint8(source.batch(rows)[0]))   # B H W 3
        f, scores = extract(rearrange(pixels, "b h w c -> b c h w"))
        features.append(f)
        logits.append(scores)
    return torch.cat(features), torch.cat(logits)


def score_folder(folder: str, reference: str, inception: str | None, size: int, device: str):
    """Print FID and Inception score of a folder of pictures against a folder of real ones. ValueError for a
    broken picture: their number is part of the score."""
    # both folders before the network, which may have to be downloaded
    sources = [ImageFolder(path, size, max_broken=0) for path in (folder, reference)]
    for source in sources:
        reject(len(source) < 2, str(source.root), "one picture; a Frechet distance needs two at least")
    extract = load_inception(inception, device)
    (features, logits), (real, _) = (folder_features(source, extract) for source in sources)
    print(f"FID {frechet_distance(features, real):.3f}, Inception score {inception_score(logits):.2f}   "
          f"[N {len(features)}, reference {reference} of {len(real)}, inception-v3-compat of torch-fidelity, "
          f"{size} px centre squares, bytes]")


# ---- plots ---------------------------------------------------------------------------------------

def plot(file: Path, columns: dict[str, list[dict]], xlabel: str, ylabel: str = "", log=False):
    """Draw columns of panels {title: [lines, ...]} to a PNG file; lines are {label: [(x, y), ...]}. log: a
    logarithmic y axis where all values are positive. A panel without lines stays empty."""
    from matplotlib.figure import Figure
    height = max(len(panels) for panels in columns.values())
    figure = Figure(figsize=(5.5 * len(columns), 3.5 * height))
    grid = figure.subplots(height, len(columns), squeeze=False)
    for (title, panels), axes_of_column in zip(columns.items(), grid.T):
        axes_of_column[0].set_title(title)
        for lines, axes in zip(panels, axes_of_column):
            if not lines:
                axes.set_axis_off()
                continue
            lowest = math.inf
            for label, points in lines.items():
                x, y = zip(*points)
                axes.plot(x, y, label=label, marker="." if len(points) <= 64 else None)
                lowest = min(lowest, *y)
            if log and lowest > 0:
                axes.set_yscale("log")
            if not log:
                axes.set_ylim(bottom=0)
            axes.set_xlabel(xlabel)
            axes.set_ylabel(ylabel)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.tight_layout()
    with atomic(file) as tmp:
        figure.savefig(tmp, dpi=80, format="png")


def plot_curves(file: Path, logs: dict[str, list[dict]]):
    """Plot training logs, a column a stage: losses, gradient norm (Fig. 19), validation loss at each t."""
    columns = {}
    for stage, log in logs.items():
        names = {key for record in log for key in record}
        at_t = sorted(name for name in names if name.startswith("val_t"))
        groups = [["loss", "val_loss", "val_loss_ema"], ["grad_norm"], at_t]
        columns[stage] = [curves(log, [name for name in group if name in names]) for group in groups]
    plot(file, columns, "step", log=True)


def curves(log: list[dict], names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """{name: [(step, value), ...]} of a training log, whose records do not all hold every name."""
    lines = {}
    for name in names:
        lines[name] = [(record["step"], record[name]) for record in log if name in record]
    return lines


def plot_gap(file: Path, gaps: dict[str, list[float]]):
    """Plot the gap of every layer, a line a stage (Fig. 4a)."""
    lines = {stage: list(enumerate(values)) for stage, values in gaps.items()}
    plot(file, {"": [lines]}, "block (0 = embedder)", "relative gap to the base")


# ---- what every model of a table draws -----------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """What every model of a table draws, and how: a row of the conditions, a title and a seed a picture."""
    conditions: Tensor | Text
    titles: list[str]                                   # class names or captions
    null: Text | None                                   # the encoded empty prompt
    seeds: list[int]
    guidance: list[float]                               # the scales to draw at
    num_steps: int
    dtype: torch.dtype

    def describe(self, samplers: list[str], raw: bool) -> str:
        """The task's part of the protocol, for these samplers; raw: weights without moving average."""
        kind = "captions of unseen pictures" if isinstance(self.conditions, Text) else "all classes in turn"
        weights = "raw weights" if raw else "moving average where there is one"
        sampler = " or ".join(samplers) or "nothing drawn,"
        scales = ", ".join(f"{scale:g}" for scale in self.guidance)
        return (f"N {len(self.seeds)}, {kind}, {sampler} {self.num_steps} steps, guidance {scales}, "
                f"seeds {self.seeds[0]}+i, {weights}")


def own_guidance(cfg) -> float:
    """The guidance scale that a model's authors draw with."""
    number = guidance_of(cfg, cfg.sampling)
    return cfg.sampling.cfg_scale if number is None else number


def task_sampling(cfg, num_steps: int, guidance: float) -> Sampling:
    """How a task is drawn: by Euler; by DDIM for a model that predicts epsilon. A distilled model reads the
    guidance, in one pass."""
    sampler = "ddim" if cfg.predict == "epsilon" else "euler"
    in_one_pass = guidance_of(cfg, cfg.sampling) is not None
    cfg_scale = 1.0 if in_one_pass else guidance
    return choose_sampling(cfg, num_steps=num_steps, cfg_scale=cfg_scale, sampler=sampler)


def class_conditions(cfg, names, count: int) -> tuple[Tensor, list[str]]:
    """Classes in turn (count,), and their names where they have one."""
    y = torch.arange(count) % cfg.num_classes
    names = dict(enumerate(names))
    return y, [str(names.get(k, k)) for k in y.tolist()]


def caption_conditions(cfg, source, rows: Tensor, encoders, dtype, device) -> tuple[Text, list[str], Text]:
    """The encoded captions of these pictures of a source, the captions, and the encoded empty prompt."""
    captions = [source.caption(i) for i in rows.tolist()]
    texts = cache_prompts(
        cfg.text_encoder, encoders, captions, cfg.text_tokens, dtype=dtype, device=device)
    return texts[torch.arange(len(rows))], captions, texts.null


def draw(model, ae: Autoencoder, task: Task, side: int, guidance: float) -> tuple[Tensor, str]:
    """Pictures (B,3,side,side) of a task, and the sampler."""
    conditions = task.conditions
    if isinstance(conditions, Text):
        model.null = task.null
        if guidance_of(model.cfg, model.cfg.sampling) is not None:
            conditions = with_guidance(conditions, guidance)
    sampling = task_sampling(model.cfg, task.num_steps, guidance)
    images = generate(
        model, ae, conditions, task.seeds, sampling, size=(side, side), dtype=task.dtype, progress=True)
    return images, sampling.sampler


# ---- and what it is scored with ------------------------------------------------------------------

@dataclass(frozen=True)
class Metrics:
    """Scores of pictures by a classifier, and by its features of real pictures (N,128), the reference."""
    classifier: Classifier
    name: str
    reference: Tensor
    captions: bool                                      # the conditions are captions, not classes

    def __call__(self, images: Tensor, y, titles: list[str]) -> dict[str, float]:
        features = classifier_features(self.classifier, images)
        if self.captions:
            scores = scene_scores(images, titles)
        else:
            scores = {"accuracy": share_right(self.classifier, features, y)}
        return scores | {"frechet": frechet_distance(features, self.reference)}

    def mismatch(self, info: dict, cfg) -> str | None:
        """Why a model with these run facts and this config cannot be scored, or None if it can."""
        if self.captions:
            return None
        known = self.classifier.classes
        if cfg.num_classes != len(known):
            return f"the classifier knows {len(known)} classes, the model {cfg.num_classes}"
        # a preset's file has no class names; those of the bundled base are known
        preset = SHAPES if cfg.num_classes == len(SHAPES) else known
        names = tuple(info.get("classes") or preset)
        if names != known:
            return f"the classifier knows {first_names(known)}, the model {first_names(names)}"
        return None

    def describe(self) -> str:
        return f"features of {self.name}, reference {len(self.reference)} real pictures"


def make_metrics(file: str | None, folder: str | None, source, count: int, captions: bool):
    """Metrics for pictures of this source by the classifier in `file` (None: the shipped one), and None; or
    None and the reason why that classifier cannot score them."""
    if folder and not file:
        return None, (
            "the shipped classifier knows the procedural pictures only; train one: "
            f"python experiments/make_weights.py --only classifier --images {folder} --classifier FILE")
    classifier = load_classifier(file)
    if not captions and classifier.classes != tuple(source.classes):
        names = first_names(source.classes) if source.classes else "without classes"
        return None, f"the classifier knows {first_names(classifier.classes)}, the pictures are {names}"
    # a reference of few pictures is a noisy one
    size = min(max(2048, count), len(source))
    rows = order(0, size, len(source), seed=0)
    features = [classifier_features(classifier, images) for images, _ in batches(source, rows)]
    reference = torch.cat(features)
    return Metrics(classifier, file or "the shipped classifier", reference, captions), None


def first_names(names) -> str:
    return ", ".join(names[:3]) + " ..."


def batches(source, rows: Tensor, size: int = 64):
    """Yield pictures (B,3,H,W) and labels (B,) of these rows of a source, B <= size."""
    for part in rows.split(size):
        yield source.batch(part)


def balanced_rows(source, count: int) -> Tensor:
    """Indices of `count` pictures of a source (or all it has) whose classes take turns, as a task's do."""
    count = min(count, len(source))
    # procedural picture i shows class i mod 8; pictures with captions are scored in the order of the captions
    if not isinstance(source, ImageFolder) or not source.classes:
        return torch.arange(count)
    # a folder is sorted by class: shuffle it, number the pictures of each class, take all first ones first
    rows = order(0, len(source), len(source), seed=0)
    labels = source.labels[rows]
    turn = torch.zeros_like(rows)
    for k in labels.unique():
        of_class = (labels == k).nonzero().flatten()
        turn[of_class] = torch.arange(len(of_class))
    return rows[turn.argsort(stable=True)[:count]]


def real_scores(metrics: Metrics, source, count: int) -> dict[str, float]:
    """Scores of `count` real pictures: what a perfect model would reach."""
    rows = balanced_rows(source, count)
    images, labels = (torch.cat(parts) for parts in zip(*batches(source, rows)))
    captions = [source.caption(i) for i in rows.tolist()] if metrics.captions else []
    return metrics(images, labels, captions)


@dataclass(frozen=True)
class Probe:
    """Real pictures (B,3,H,W) and their conditions, on which models are compared with their base."""
    base: torch.nn.Module
    base_ae: Autoencoder
    images: Tensor
    y: Tensor | Text

    def fits(self, model) -> bool:
        """Whether the model is the base in other latents, layer by layer, and the base knows the classes."""
        base = self.base
        if isinstance(self.y, Tensor) and int(self.y.max()) >= base.cfg.num_classes:
            return False
        return model.cfg.ae != base.cfg.ae and len(model.blocks) == len(base.blocks)

    def describe(self, folder: str | None) -> str:
        """The probe's part of the protocol; folder: of its pictures, None = procedural."""
        kind = f"pictures of {folder}" if folder else "procedural pictures"
        return f"gap: mean over layers at t = 1 on {len(self.images)} {kind}, {self.images.shape[-1]} px"

    def gap(self, model, info: dict, ae: Autoencoder) -> float:
        """Mean layer gap of clean latents to what the model was aligned to."""
        target = target_of(self.base, model.cfg, info.get("match", "downsample"))
        images = self.images
        if target is not self.base:
            side = images.shape[-1] * target.cfg.res // model.cfg.res
            images = F.interpolate(images, (side, side), mode="area")
        z_dc = ae.encode(self.images)
        z_base = self.base_ae.encode(images)
        gaps = layer_gap(model, target, z_dc, z_base, self.y)
        return sum(gaps) / len(gaps)


class Judge:
    """What all models of one base draw, and what they are scored with; what they share is loaded once.

    name, cfg, info   of the base; info may name the pictures' captions or classes
    args              the flags of parser()
    count             pictures a model
    folder            of real pictures, None = procedural
    weights           of the base, where they are not its own"""

    def __init__(self, name: str, cfg, info: dict, args, count: int, folder: str | None, weights: str | None,
                 device, dtype: torch.dtype):
        self.args = args
        self.cfg = cfg
        self.device = device
        self.res = args.res or cfg.res
        self.captions = cfg.text_encoder is not None
        self.train, self.val = open_pictures(cfg, info, folder, self.res, args.any_classes)
        self.metrics, self.reason = make_metrics(args.classifier, folder, self.train, count, self.captions)

        # what every model draws, and the pictures on which its features are compared with the base's
        val = self.val
        probe_rows = order(0, min(64, len(val)), len(val), seed=0)
        probe_images, probe_y = val.batch(probe_rows)
        null = None
        if self.captions:
            check_encoders(cfg.text_encoder, args.text_encoders)
            encoders = text_folder(name, cfg, args.text_encoders, weights)
            rows = torch.cat([torch.arange(count) % len(val), probe_rows])
            text, titles, null = caption_conditions(cfg, val, rows, encoders, dtype, device)
            y = text[:count]
            probe_y = with_guidance(text[count:], 1.0)  # FLUX reads a guidance scale as well
        else:
            y, titles = class_conditions(cfg, self.train.classes, count)
        seeds = [args.seed + i for i in range(count)]
        guidance = args.guidance or [own_guidance(cfg)]
        self.task = Task(y, titles[:count], null, seeds, guidance, args.num_steps, dtype)

        # models of one latent space share an autoencoder
        self.base, self.base_info = load_base(name, weights, device)
        self.load_ae = lru_cache(partial(load_autoencoder, device=device))
        base_ae = self.load_ae(cfg.ae, args.base_ae_weights or self.base_info.get("ae_weights"))
        self.probe = Probe(self.base, base_ae, probe_images.to(device), probe_y.to(device))

    def load(self, run: Path | None) -> tuple:
        """A run, or the base (None) -> model, info, autoencoder"""
        model, info = self.base, self.base_info
        if run:
            model, info = load_run(run, self.device, not self.args.raw, self.args.weights)
        weights = self.args.base_ae_weights if model.cfg.ae == self.cfg.ae else None
        return model, info, self.load_ae(model.cfg.ae, weights or info.get("ae_weights"))

    def facts(self, model, info: dict, ae: Autoencoder) -> dict:
        """Its tokens, and its gap where that can be measured."""
        side = self.args.res or model.cfg.res
        facts = {"tokens": (side // ae.cfg.f // model.cfg.patch_size) ** 2}
        if side == self.res and self.probe.fits(model):
            facts["gap"] = self.probe.gap(model, info, ae)
        return facts


# ---- main ----------------------------------------------------------------------------------------

@dataclass
class Table:
    """Rows {"name": ..., column: value}, notes, and a label and the first pictures of every drawn row."""
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[str, Tensor]] = field(default_factory=list)

    def add_model(self, row: dict, model, info: dict, ae: Autoencoder, task: Task, side: int, metrics):
        """Draw a task and add the row with its scores, once for every guidance scale; or the row as it is, if
        there are no metrics for this model."""
        # accuracy means nothing for a model of other classes
        mismatch = metrics and metrics.mismatch(info, model.cfg)
        if mismatch:
            self.notes.append(f"{row['name']}: no scores, no Frechet distance: {mismatch}")
        if mismatch or not metrics:
            self.rows.append(row)
            return
        for guidance in task.guidance:
            images, sampler = draw(model, ae, task, side, guidance)
            check_pictures(images, row["name"])
            scores = metrics(images, task.conditions, task.titles)
            self.rows.append({**row, "guidance": guidance, "sampler": sampler, **scores})
            label = f"{row['name']}\n{row['tokens']} tokens"
            if len(task.guidance) > 1:
                label += f"\nguidance {guidance:g}"
            self.samples.append((label, images[:8]))

    def samplers(self) -> list[str]:
        return sorted({row["sampler"] for row in self.rows if "sampler" in row})

    def print(self, protocol: str):
        """Print the rows, a dash where one has no number, the protocol and the notes."""
        formats = {"tokens": "", "steps": "", "guidance": "g", "gap": ".3f"}
        for key in ("accuracy", *ANSWERS):
            if any(key in row for row in self.rows):
                formats[key] = ".1%"
        formats["frechet"] = ".3f"
        print("\n" + " " * 26 + "".join(f"{key:>10}" for key in formats))
        for row in self.rows:
            line = f"{row['name']:<26}"
            for key, form in formats.items():
                cell = format(row[key], form) if key in row else ""
                line += f"{cell or '-':>10}"
            print(line)
        print("\n".join([f"[{protocol}]", *self.notes]))

    def write(self, out: Path, protocol: str, titles: list[str]):
        """Write the table as JSON and the samples as a grid beside it, or beside a table of others."""
        settings = short_hash([protocol, [(row["name"], row.get("steps")) for row in self.rows]])
        out = free_path(out, settings)
        write_json(out, dict(settings=settings, protocol=protocol, notes=self.notes, rows=self.rows))
        if not self.samples:
            print(f"wrote {out}")
            return
        # pictures of several sizes do not make one grid
        size = self.samples[0][1].shape[-2:]
        rows = [(label, images) for label, images in self.samples if images.shape[-2:] == size]
        grid = out.with_suffix(".png")
        columns = titles[:8] if len(titles) >= 8 else ()
        save_grid(grid, rows, columns, {"protocol": protocol})
        print(f"wrote {out} and {grid}")


def pick_runs(base: str | None, runs: list[str]) -> tuple[str, list[Path]]:
    """The base's name, and the runs given, else the newest run of each kind of this base. Prints the commands
    that make a missing kind. ValueError if a run is none, or of another base."""
    if runs:
        infos = {run: read_run_config(run_file(run))[1] for run in runs}
        first, info = next(iter(infos.items()))
        check_base(base, first, info)
        for run, other in infos.items():
            reject(other["base"] != info["base"], run, f"its base is {other['base']}, that of {first} is "
                   f"{info['base']}; evaluate the runs of one base at a time")
        return info["base"], list(map(Path, runs))
    name = base or "tiny"
    kinds = {"align": "align.py", "finetune": "finetune.py", "noalign": "finetune.py --init base"}
    newest = {kind: newest_run(kinds=(f"{kind}-{Path(name).name}",)) for kind in kinds}
    # the run without alignment gets as many steps as the aligned one has had
    if newest["finetune"]:
        kinds["noalign"] += f" --train-steps {read_config(run_file(newest['finetune']))['steps']}"
    for kind, command in kinds.items():
        if newest[kind] is None:
            print(f"no {kind} run of {name} yet: python {command} --base {name}")
    return name, [folder for folder in newest.values() if folder]


def open_pictures(cfg, info: dict, folder: str | None, res: int, any_classes: bool) -> list:
    """The training and the validation pictures of a folder, or procedural ones (None), with what a model of
    this configuration and info reads: captions, or its own classes by the names of their folders."""
    kind = {}
    if cfg.text_encoder:
        kind = dict(captions=info.get("captions") or "txt")
    elif folder:
        kind = dict(names=class_names(cfg, info), num_classes=cfg.num_classes, any_classes=any_classes)
    return [open_source(folder, res, split, **kind) for split in ("train", "val")]


def run_title(run: Path) -> str:
    return run.name if run.is_dir() else f"{run.parent.name}/{run.name}"


def check_model(cfg, res: int | None, num_steps: int, guidance: float):
    """ValueError if a model of this configuration cannot draw at this size in these steps."""
    side = res or cfg.res
    latent = latent_size(cfg, ae_config(cfg.ae), (side, side))
    make_clock(cfg, task_sampling(cfg, num_steps, guidance), (cfg.in_channels, *latent))


def parser() -> Parser:
    p = Parser(__doc__, "[RUN ...]")
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="folders or files of runs (default: of --base, the newest of each kind in runs/)")
    add_model_args(p)
    p.set_defaults(base=None)
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    p.add_argument(
        "--out", metavar="FILE",
        help="the table (default runs/evaluate.json), or with --ae the picture (default runs/NAME.png); if "
             "it holds results of other settings, the next free name")

    real = p.add_argument_group("real pictures, and what scores them")
    real.add_argument(
        "--images", metavar="DIR",
        help="real pictures (default: those of the newest run, else procedural ones)")
    real.add_argument(
        "--any-classes", action="store_true",
        help="its class folders are not the models' classes: take them in alphabetical order")
    real.add_argument(
        "--classifier", metavar="FILE",
        help="another classifier (default: the shipped one, for the procedural pictures)")

    drawn = p.add_argument_group("drawn pictures")
    drawn.add_argument(
        "--count", type=at_least(int, 1), metavar="N",
        help="pictures a model (default 512), or an autoencoder (default 8)")
    drawn.add_argument(
        "--guidance", type=at_least(float, 0), nargs="+", metavar="S",
        help="guidance scales: what a distilled model reads, for others classifier-free guidance, 1 = off "
             "(default: the model's own; DiT 3)")
    drawn.add_argument(
        "--num-steps", type=within(int, 1, 10_000), default=25, metavar="N",
        help="steps of Euler, or of DDIM for a model that predicts epsilon (default 25)")
    drawn.add_argument(
        "--text-encoders", metavar="DIR",
        help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")

    other = p.add_argument_group("instead of models")
    other.add_argument(
        "--ae", choices=AUTOENCODERS, metavar="NAME",
        help="score an autoencoder's reconstructions at --res (default 128); --weights: its file")
    other.add_argument(
        "--fid", metavar="DIR", help="score a folder of generated pictures by Inception features")
    other.add_argument(
        "--reference", metavar="DIR", help="with --fid: the real pictures")
    other.add_argument(
        "--inception", metavar="FILE",
        help="with --fid: the Inception network's weight file (default: torch-fidelity downloads it)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    device = device_here(args.device)
    dtype = dtype_of(args)
    check_paths(args, "weights", "base_ae_weights", "text_encoders", "images", "classifier", "fid",
                "reference", "inception")
    if args.ae:
        out = Path(args.out or f"runs/{args.ae}.png")
        return score_autoencoder(
            args.ae, args.weights, args.images, args.res or 128, args.count or 8, out, dtype, device)
    if args.fid:
        reject(not args.reference, "--fid DIR", "needs --reference DIR: a distance has two ends")
        return score_folder(args.fid, args.reference, args.inception, args.res or 256, device)

    # the models, and the real pictures that the newest of them was trained on
    count = args.count or 512
    reject(count < 2, f"--count {count}", "a Frechet distance needs two pictures at least")
    out = Path(args.out or "runs/evaluate.json")
    reject(out.suffix == ".png", f"--out {out}", "the table is JSON, and its pictures go beside it as .png")
    check_writable(out)
    name, runs = pick_runs(args.base, args.runs)
    cfg, info = read_base_config(name)
    guidance = args.guidance or [own_guidance(cfg)]
    check_model(cfg, args.res, args.num_steps, guidance[0])
    for run in runs:
        run_cfg, info = read_run_config(run_file(run, not args.raw))
        check_model(run_cfg, args.res, args.num_steps, guidance[0])
        for path in (info.get("ae_weights"), args.weights or info.get("base_weights")):
            reject(path and not Path(path).exists(), str(run), f"needs {path}, which is not there")
    # the base as the runs know it
    weights = args.weights or info.get("base_weights")
    folder = args.images or info.get("images")
    judge = Judge(name, cfg, info, args, count, folder, weights, device, dtype)
    metrics = judge.metrics

    # real pictures are the bound for every model
    table = Table()
    if metrics:
        table.rows.append({"name": "real pictures", **real_scores(metrics, judge.val, count)})
    else:
        table.notes.append(f"no scores, no Frechet distance: {judge.reason}")
    # the base first, then its runs
    for run in [None, *runs]:
        model, info, ae = judge.load(run)
        title = run_title(run) if run else f"base {Path(name).name}"
        check_finite(model, title)
        row = {"name": title, "steps": str(info.get("steps", "")), **judge.facts(model, info, ae)}
        table.add_model(row, model, info, ae, judge.task, args.res or model.cfg.res, metrics)

    task = judge.task
    parts = [task.describe(table.samplers(), args.raw), judge.probe.describe(folder), f"{dtype}, {device}"]
    if metrics:
        parts.insert(1, metrics.describe())
    protocol = "; ".join(parts)
    table.print(protocol)
    table.write(out, protocol, task.titles)


if __name__ == "__main__":
    run_main(main)
