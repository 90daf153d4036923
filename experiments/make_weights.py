"""How the bundled weights were made: from random numbers and procedural pictures, so they carry no
photograph's licence.

    python experiments/make_weights.py                   all of them, about 6 hours on two CPU cores
    python experiments/make_weights.py --only kl dc      some of them
    python experiments/make_weights.py --install         the finished ones take the place of those in weights/
    python experiments/make_weights.py --only classifier --images DIR --classifier FILE     of your pictures

    stage        file                  what is trained                                            minutes
    kl           tiny-kl-f8c4          KL-VAE, at 64 px, then at 128                              17 + 10
    dc           tiny-dc-ae-f32c32     DC-AE at 128 px                                            36
    classifier   tiny-classifier       what scores pictures of the bundled classes                6
    tiny         tiny-dit              DiT; then at two sizes                                     36 + 27
    flux         tiny-flux             FLUX: a teacher; its guidance distilled; two sizes         67 + 25 + 36
    sana         tiny-sana             SANA: logit-normal times; uniform ones; two sizes          41 + 35 + 13

Models are trained on the KL-VAE in --out if it is there, else on the shipped one. The same command again
skips what is finished and resumes what was killed.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import finetune
from align import RECIPES, Objective, pick_objective
from autoencoder import AUTOENCODERS, Autoencoder, KLConfig, build_autoencoder
from checkpoints import (
    HERE, atomic, config_dict, load_autoencoder, load_run, read_config, read_tensors, run_file, write_tensors)
from data import open_source
from fast import bf16_is_fast
from flags import Parser, device_here, run_main
from model import BASES, Flux, cat_conditions
from sample import path
from shapes import CLASSIFIER, Classifier, accuracy
from train import (
    DataSettings, Plan, Run, has_state, is_finished, open_data, open_pictures, open_run, prepare_for_training,
    train, write_run)


# ---- what is trained, and for how long -----------------------------------------------------------

AE_PLAN = dict(warmup=200, schedule="linear", betas=(0.9, 0.99), clip=1.0)
PLANS = {
    "kl at 64": Plan(3500, 1e-3, 16, **AE_PLAN),
    "kl at 128": Plan(300, 6e-4, 16, **AE_PLAN),
    "dc": Plan(3000, 1e-3, 16, **AE_PLAN),
    "classifier": Plan(1500, 2e-3, 64, warmup=450, schedule="cosine", weight_decay=1e-2),
    "distillation": Plan(
        1000, 3e-4, 64, warmup=50, schedule="cosine", weight_decay=1e-3, clip=1.0, ema=0.998),
    # a batch is of small pictures; of large ones it is a quarter, so that it has as many tokens
    "two sizes": Plan(
        1600, 5e-4, 256, warmup=50, schedule="cosine", weight_decay=1e-3, clip=1.0, ema=0.998),
    "two sizes, text": Plan(
        700, 5e-4, 256, warmup=50, schedule="cosine", weight_decay=1e-3, clip=1.0, ema=0.998),
}
PICTURES = 16384
MODEL = f"--pictures {PICTURES} --batch 64 --lr 1e-3 --schedule cosine --ema 0.9995 --compile"
# flags of finetune.py
FLAGS = {
    "tiny": f"--base tiny --init scratch --train-steps 7500 --warmup 300 --save-dtype bf16 {MODEL}",
    "flux teacher": f"--base tiny-flux --init scratch --train-steps 4000 --warmup 300 {MODEL}",
    "sana": f"--base tiny-sana --init scratch --train-steps 3000 --warmup 300 {MODEL}",
    "sana uniform": "--base tiny-sana --tune full --train-steps 2500 --warmup 50 --t-sampling uniform "
                    f"--save-dtype bf16 {MODEL}",
}


def make_kl(file: Path, device: str):
    """Most steps at 64 px, where they are cheap; then the size that it is used at."""
    name = "tiny-kl-f8c4"
    small = file.with_name(f"{name}-64px.safetensors")
    if not small.exists():
        train_autoencoder(random_autoencoder(name, device), open_source(None, 64), small, PLANS["kl at 64"])
    ae = load_autoencoder(name, str(small), device=device)
    train_autoencoder(ae, open_source(None, 128), file, PLANS["kl at 128"])


def make_dc(file: Path, device: str):
    ae = random_autoencoder("tiny-dc-ae-f32c32", device)
    train_autoencoder(ae, open_source(None, 128), file, PLANS["dc"])


def make_classifier(file: Path, device: str, images: str | None = None, plan: Plan | None = None):
    """Pictures are blurred and noised at random, so that it judges shapes and not the grain. images: a folder
    of class folders, in the place of the procedural pictures; plan: another than that of PLANS."""
    source = open_source(images, 64)
    torch.manual_seed(0)
    classifier = Classifier(len(source.classes)).to(device)

    def loss(indices, generator):
        x, y = source.batch(indices)
        # a folder has the same few pictures again and again: mirrored ones are of the same class
        if images and torch.rand((), generator=generator) < 0.5:
            x = x.flip(-1)
        if torch.rand((), generator=generator) < 0.5:
            x = F.avg_pool2d(x, 3, 1, 1)
        grain = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
        x = x + grain * torch.randn(x.shape, generator=generator)
        return F.cross_entropy(classifier(x.to(device)), y.to(device)), {}

    named = list(classifier.named_parameters())
    plan = plan or PLANS["classifier"]
    train(Run(file.with_suffix("")), "train", classifier, named, loss, len(source), plan)
    val = open_source(images, 64, "val")
    x, y = val.batch(torch.arange(min(1024, len(val))))
    share = accuracy(classifier.cpu().eval(), x, y)
    write_tensors(file, to_bf16(classifier.state_dict()), dict(classes=list(source.classes)))
    print(f"wrote {file}; accuracy on {len(y)} unseen pictures {share:.1%}")


def make_tiny(file: Path, device: str):
    """At one size, then at two: what FLUX and SANA know from the many sizes that they were trained at."""
    first = train_model("tiny", file.parent, device)
    publish(train_two_sizes(first, file.parent / "tiny-two-sizes", device), file)


def make_flux(file: Path, device: str):
    """Distillation needs a teacher that is guided in two passes."""
    teacher = train_model("flux teacher", file.parent, device)
    student = file.parent / "flux-distilled"
    if not is_finished(student):
        distill_guidance("tiny-flux", teacher, student, PLANS["distillation"], PICTURES, device)
    publish(train_two_sizes(student, file.parent / "flux-two-sizes", device, PLANS["two sizes, text"]), file)


def make_sana(file: Path, device: str):
    """Uniform times in the end: the logit-normal ones seldom reach either end of the path."""
    first = train_model("sana", file.parent, device)
    second = train_model("sana uniform", file.parent, device, init=first)
    out = file.parent / "sana-two-sizes"
    publish(train_two_sizes(second, out, device, PLANS["two sizes, text"], t_sampling="uniform"), file)


class Stage(NamedTuple):
    make: Callable[[Path, str], None]           # (file, device): writes the file
    shipped: str                                # where --install puts it


STAGES = {
    "kl": Stage(make_kl, AUTOENCODERS["tiny-kl-f8c4"].weights),
    "dc": Stage(make_dc, AUTOENCODERS["tiny-dc-ae-f32c32"].weights),
    "classifier": Stage(make_classifier, CLASSIFIER),
    "tiny": Stage(make_tiny, BASES["tiny"].weights),
    "flux": Stage(make_flux, BASES["tiny-flux"].weights),
    "sana": Stage(make_sana, BASES["tiny-sana"].weights),
}


# ---- autoencoders --------------------------------------------------------------------------------

def random_autoencoder(name: str, device: str) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(AUTOENCODERS[name]).to(device, memory_format=torch.channels_last)


def train_autoencoder(ae: Autoencoder, source, file: Path, plan: Plan, extra: nn.Module | None = None,
                      beta: float = 3e-4, noise: float = 0.2):
    """Train every weight on a source's pictures; write `file`, scale and shift measured.

    extra         (picture, raw latent) -> another loss; its parameters learn along and are thrown away
    beta, noise   see reconstruction_loss
    A run that was killed resumes to the same numbers."""
    device = next(ae.parameters()).device
    ae.requires_grad_(True).train()
    # frozen parts of `extra` are not named, so they stay
    model = nn.ModuleDict({"ae": ae, "extra": extra or nn.Identity()})
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def loss(indices, generator):
        x = source.batch(indices)[0].to(device, memory_format=torch.channels_last)
        total, z, metrics = reconstruction_loss(ae, x, beta, noise, generator)
        if extra:
            more = extra(x, z)
            total = total + more
            metrics["extra"] = more.detach()
        return total, metrics

    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    train(Run(file.with_suffix("")), "train", model, named, loss, len(source), plan, dtype=dtype)
    estimate_batch_norm(ae, source, plan.batch)
    scale, shift = measure_scale(ae.requires_grad_(False).eval(), source)
    write_tensors(file, to_bf16(ae.state_dict()), asdict(replace(ae.cfg, scale=scale, shift=shift)))
    print(f"wrote {file} (scale {scale:.4f}, shift {shift:.4f})")


def reconstruction_loss(ae: Autoencoder, x: Tensor, beta: float, noise: float,
                        generator: torch.Generator) -> tuple[Tensor, Tensor, dict]:
    """L1 + MSE between pictures (B,3,fH,fW) and their reconstruction, + beta KL(posterior || N(0,1)) per
    latent number -> loss, raw latents (B,C,H,W), metrics.

    DC-AE has no variance of its own and gets a constant one, `noise`: latents that bear a little noise are
    latents that a diffusion model's small errors do not break."""
    mean, logvar = ae.moments(x)
    std = noise if logvar is None else (0.5 * logvar).exp()
    y = ae.decode_raw(mean + std * torch.randn(mean.shape, generator=generator).to(mean))
    l1 = (y.float() - x).abs().mean()
    mse = (y.float() - x).square().mean()
    # the KL of a constant variance is the mean's part alone, but for a constant
    kl = 0.5 * mean.float().square().mean()
    if logvar is not None:
        logvar = logvar.float()
        kl = kl + 0.5 * (logvar.exp() - 1 - logvar).mean()
    metrics = {"l1": l1.detach(), "psnr": 10 * torch.log10(4 / mse.detach()), "kl": kl.detach()}
    return l1 + mse + beta * kl, mean, metrics


@torch.no_grad()
def estimate_batch_norm(ae: Autoencoder, source, batch: int, batches: int = 16):
    """Statistics of the finished weights, in the place of those that moved along in training: these are not
    part of a run's state, and would differ after it was resumed."""
    norms = [m for m in ae.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    device = next(ae.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                         # the plain mean over all batches
    for i in range(batches):
        indices = torch.arange(i * batch, (i + 1) * batch) % len(source)
        ae.decode_raw(ae.moments(source.batch(indices)[0].to(device))[0])


@torch.no_grad()
def measure_scale(ae: Autoencoder, source, count: int = 512) -> tuple[float, float]:
    """Scale and shift that give this source's latents zero mean and unit deviation, over all channels."""
    device = next(ae.parameters()).device
    indices = torch.arange(min(count, len(source)))
    z = torch.cat([ae.moments(source.batch(part)[0].to(device))[0] for part in indices.split(64)])
    shift = float(z.mean()) if isinstance(ae.cfg, KLConfig) else 0.0         # DC-AE's convention has none
    return float(1 / (z - shift).square().mean().sqrt()), shift


# ---- models --------------------------------------------------------------------------------------

def train_model(name: str, out: Path, device: str, init: Path | None = None) -> Path:
    """The finished run of finetune.py by FLAGS[name], in a folder of `out`."""
    run = out / name.replace(" ", "-")
    if is_finished(run):
        return run
    flags = [*FLAGS[name].split(), "--out", str(run), "--device", device]
    if has_state(run):
        flags += ["--resume"]
    if init:
        flags += ["--init", str(init)]
    kl = out / "tiny-kl-f8c4.safetensors"
    if kl.exists():
        flags += ["--ae-weights", str(kl)]
    finetune.main(flags)
    return run


def distillation_loss(teacher, model, z: Tensor, t: Tensor, y, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance distillation (Eq. 3): what a teacher gives under classifier-free guidance in two passes
    (Eq. 4), the student gives in one, reading the scale. Arguments and result: align.flow_matching_loss."""
    xt, _ = path(x0, z, t)
    with torch.no_grad():
        both = cat_conditions([y, model.null_condition(y)])
        v, v_null = teacher(torch.cat([xt, xt]), torch.cat([t, t]), both).float().chunk(2)
        target = v_null + y.guidance.view(-1, 1, 1, 1) * (v - v_null)
    pred = model(xt, t, y).float()
    return (pred - target).square().mean(dim=(1, 2, 3)), pred, target


def with_guidance_embed(teacher: Flux) -> Flux:
    """A FLUX that reads its guidance as a number, before its distillation: a copy of the teacher's weights,
    and an embedder of the number that starts at zero, so that it gives the teacher's own velocity whatever it
    reads. ValueError for a teacher that is no FLUX, or reads the number already."""
    if not isinstance(teacher, Flux):
        raise ValueError("guidance is distilled into a FLUX that does not read it yet, "
                         f"not into a {type(teacher).__name__}")
    if teacher.cfg.guidance_embed:
        raise ValueError("guidance is distilled into a FLUX that does not read it yet")
    student = Flux(replace(teacher.cfg, guidance_embed=True)).init_from_scratch()
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    copied = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.load_state_dict(student.state_dict() | copied, assign=True)
    student.null = teacher.null
    return student


def distill_guidance(name: str, teacher_run: Path, out: Path, plan: Plan, pictures: int, device: str):
    """A run of the base `name` that reads its guidance, learned from one that is guided in two passes."""
    teacher, info = load_run(teacher_run, device)
    model = with_guidance_embed(teacher)
    # it is drawn with as the base is: one pass, and a number
    cfg = replace(model.cfg, sampling=BASES[name].sampling)
    model.cfg = cfg
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    names = [key for key, _ in model.named_parameters()]
    named = list(prepare_for_training(model, names, device, compiled=True).items())
    settings = DataSettings(pictures=pictures)
    weights = {cfg.ae: info.get("ae_weights")}
    data = open_data(cfg, open_pictures(cfg, info, settings), weights, settings, device, dtype)
    model.null = data.null
    objective = Objective(loss=partial(distillation_loss, teacher), guidance=RECIPES[cfg.recipe].guidance)

    def loss(indices, generator):
        z, _ = data.cache.batch(indices, generator)
        return objective.train_loss(model, z[cfg.ae].to(device), data.conditions(indices), generator)

    model.train()
    resume = has_state(out)
    with open_run("distill", str(out), resume) as run:
        flags = argparse.Namespace(base=name, teacher=str(teacher_run), plan=asdict(plan), resume=resume)
        run.settle("make_weights", flags, data.cache.facts())
        _, averaged = train(run, "train", model, named, loss, len(data.cache), plan, dtype=dtype)
        facts = dict(kind="distill", base=name, base_weights=None, model=config_dict(cfg),
                     objective="distill", classes=[], ae_weights=info.get("ae_weights"), steps=plan.steps)
        write_run(run, facts, named, averaged)
    print(f"wrote {out}/")


def train_two_sizes(init: Path, out: Path, device: str, plan: Plan | None = None,
                    settings: DataSettings | None = None, t_sampling: str = "logit-normal") -> Path:
    """A run that goes on from `init` at its own size and at half of it, drawn for every step. Small pictures
    have a quarter of the tokens, spread over the same positions. A distilled FLUX learns by the guided loss
    (Eq. 7), which needs no teacher. plan: another than that of PLANS; settings: other pictures than PICTURES
    procedural ones."""
    plan = plan or PLANS["two sizes"]
    settings = settings or DataSettings(pictures=PICTURES)
    if is_finished(out):
        return out
    model, info = load_run(init, device)
    cfg = model.cfg
    small = replace(cfg, res=cfg.res // 2, **({"pos_step": 2.0} if hasattr(cfg, "pos_step") else {}))
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    names = [key for key, _ in model.named_parameters()]
    named = list(prepare_for_training(model, names, device).items())
    weights = {cfg.ae: info.get("ae_weights")}
    data = [open_data(size, open_pictures(size, info, settings), weights, settings, device, dtype)
            for size in (small, cfg)]
    model.null = data[0].null
    objective = pick_objective(cfg, t_sampling=t_sampling)

    def loss(indices, generator):
        if torch.rand((), generator=generator) < 0.5:
            model.cfg, seen = small, data[0]
        else:
            model.cfg, seen = cfg, data[1]
            indices = indices[: max(1, len(indices) // 4)]
        z, _ = seen.cache.batch(indices, generator)
        return objective.train_loss(model, z[cfg.ae].to(device), seen.conditions(indices), generator)

    model.train()
    resume = has_state(out)
    with open_run("two-sizes", str(out), resume) as run:
        flags = argparse.Namespace(init=str(init), plan=asdict(plan), t_sampling=t_sampling, resume=resume)
        run.settle("make_weights", flags, {"small": data[0].cache.facts(), "large": data[1].cache.facts()})
        _, averaged = train(run, "train", model, named, loss, len(data[0].cache), plan, dtype=dtype)
        model.cfg = cfg
        # where the weights came from is no fact of these
        facts = {key: value for key, value in info.items() if key != "file"}
        facts |= dict(model=config_dict(cfg), steps=plan.steps + info.get("steps", 0))
        write_run(run, facts, named, averaged)
    print(f"wrote {out}/")
    return out


# ---- files ---------------------------------------------------------------------------------------

def to_bf16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.bfloat16() if v.is_floating_point() else v for name, v in state.items()}


LOCAL = ("from", "ae_weights", "base_weights", "images", "captions")


def publish(run: Path, file: Path):
    """Write a run's moving average to a file of its own, in bf16, without the paths of this machine."""
    source = run_file(run)
    facts = {key: value for key, value in read_config(source).items() if key not in LOCAL}
    write_tensors(file, to_bf16(read_tensors(source)), facts | dict(base_weights=None))
    print(f"wrote {file}")


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)} (default all)")
    p.add_argument(
        "--out", default="runs/weights", metavar="DIR", help="of files and runs (default runs/weights)")
    p.add_argument("--install", action="store_true", help="copy the files to weights/ when they are made")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    p.add_argument("--images", metavar="DIR", help="with --only classifier: class folders of your own")
    p.add_argument("--classifier", metavar="FILE", help="with --images: the file to write")
    args = p.parse_args(argv)
    device_here(args.device)
    if args.images or args.classifier:
        if args.only != ["classifier"] or not (args.images and args.classifier) or args.install:
            raise ValueError("--images and --classifier are for a classifier of your own pictures: "
                             "--only classifier --images DIR --classifier FILE, without --install")
        if Path(args.classifier).exists():
            raise ValueError(f"--classifier {args.classifier}: exists; name another file")
        make_classifier(Path(args.classifier), args.device, args.images)
        return
    for name in args.only or STAGES:
        stage = STAGES[name]
        file = Path(args.out) / Path(stage.shipped).name
        if file.exists():
            print(f"{name}: {file} is there")
        else:
            stage.make(file, args.device)
        if args.install:
            with atomic(HERE / stage.shipped) as tmp:
                shutil.copyfile(file, tmp)
            print(f"installed {stage.shipped}")


if __name__ == "__main__":
    run_main(main)
