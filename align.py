"""Embedding alignment: stages 1 and 2 of DC-Gen (arXiv 2509.25180, Sec. 3.3), and the training loop of all three.

A finished model on f8 latents gets a new patch embedder and a new output head for the latents of a deeper autoencoder.
With both random, fine-tuning starts from noise and destroys what the base knows (Fig. 3). So first, the trunk untouched:

  stage 1  the embedder alone learns to give the base's own patch embeddings of the same picture, pooled to the new
           grid:   L = || e_phi(z_dc) - pool(e(z_base)) ||^2      (Eq. 1; clean latents, no noise, no time)
  stage 2  embedder and head learn together from the ordinary flow loss in the *new* latent space (Eq. 2). No target
           from the old head is needed, so it does not matter that the two latents have different channels: the frozen
           trunk, the aligned embedder and the new space define what the head has to say. The model now draws.

Both are linear least squares in what they train (a 1x1 map and its bias; stage 2 while the embedder stands still), so
`--solver closed-form` finds the exact optimum from accumulated normal equations, with no learning rate at all.

    python align.py                                    the embedded base, minutes on a CPU
    python align.py --base dit-xl --images DIR         DiT-XL/2 from SD-VAE f8 patch 2 to DC-AE f32 patch 1
    torchrun --nproc-per-node 8 align.py ...           on eight GPUs; so for finetune.py
"""

import argparse
import math
import time
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import (BASES, FluxConfig, SanaConfig, cat_conditions, where_conditions, to_deep_model, to_deep_latent)
from autoencoder import AUTOENCODERS, ae_config
from checkpoints import config_dict, load_base, preset_of
from shapes import pick_scorer
from fast import peak_gib, timed
from sample import (Chain, add_model_args, ddpm_loss, dtype_of, path, run, sample_t, save_grid)
from evaluate import gap_table, layer_gap, plot_curves, plot_gap
from train import (add_data_args, add_up, draw, first_goes_first, frozen_dtype, guidance_limits, join, leave, new_run, new_step, note_dry_run, pick, prepare, processes, settle, shift_of, sized, train, write_run)


# ---- the losses --------------------------------------------------------------------------------------------------------------

def grid_tokens(model, z: Tensor) -> Tensor:
    """Patch embeddings on their grid: z (B,C,H,W) -> (B,D,H/p,W/p)."""
    p = model.cfg.patch_size
    return rearrange(model.embed(z), "b (h w) d -> b d h w", h=z.shape[-2] // p)


MATCHES = ("downsample", "upsample", "average", "mixed")


def embedding_loss(model, base, z_dc: Tensor, z_base: Tensor, match: str = "downsample") -> Tensor:
    """Stage 1 (Eq. 1): mean squared distance between the new patch embeddings and the base's, on one grid.
    z_dc (B,C',H',W'), z_base (B,C,H,W) of the same pictures -> scalar.

    match: "downsample"  the base's embeddings averaged over each new cell (the paper)
           "upsample"    the new ones brought up to the base's grid, bilinear (the authors' guides)
           "average"     only the means over the picture;  "mixed"  downsample + average
    Each embedder has added its own grid's positions (as in the authors' code for DiT)."""
    new = grid_tokens(model, z_dc)                                    # B D H'/p' W'/p'
    with torch.no_grad():
        old = grid_tokens(base, z_base).to(new.dtype)                 # B D H/p W/p
    mean = lambda e: e.mean(dim=(2, 3))
    down = lambda: F.mse_loss(new, F.adaptive_avg_pool2d(old, new.shape[-2:]))
    if match == "downsample":
        return down()
    if match == "upsample":
        return F.mse_loss(F.interpolate(new, old.shape[-2:], mode="bilinear"), old)
    if match == "average":
        return F.mse_loss(mean(new), mean(old))
    if match == "mixed":
        return down() + F.mse_loss(mean(new), mean(old))
    raise ValueError(f"--match {match}: choose one of {', '.join(MATCHES)}")


def flow_matching_loss(model, z: Tensor, t: Tensor, y: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 2 and 3 (Eq. 2): || v(x_t, y, t) - (x1 - x0) ||^2. z = x1 and x0 (B,C,H,W), t (B,), y (B,) ->
    the loss of every sample (B,), predicted and target velocity."""
    xt, v = path(x0, z, t)
    pred = model(xt, t, y).float()
    return (pred - v).square().mean(dim=(1, 2, 3)), pred, v


def raw_velocity(model, xt: Tensor, t: Tensor, y) -> Tensor:
    """What a guidance-distilled model would have said before its distillation, Eq. 6 with g = 1 + w the number it is told:

        v_hat(c) = ( v(c, g) + (g - 1) v(null, 1) ) / g

    It follows from v(c, g) = g v(c) - (g - 1) v(null), which it was distilled to say (Eq. 4). The null branch is told 1 and
    passes no gradient: it stands for the base's own v(null), which is not to be bent until the sum fits.
    xt (B,C,H,W), t (B,), y a Text with its guidance (B,) -> (B,C,H,W). Without gradients both halves are one batch."""
    g, null = y.guidance.view(-1, 1, 1, 1), unconditional(model, y)
    if not torch.is_grad_enabled():
        v, v_null = model(torch.cat([xt, xt]), torch.cat([t, t]), cat_conditions([y, null])).float().chunk(2)
    else:
        v = model(xt, t, y).float()
        with torch.no_grad():
            v_null = model(xt, t, null).float()
    return (v + (g - 1) * v_null) / g


def unconditional(model, y):
    """The null condition of a distilled model: the empty prompt, at guidance 1."""
    return replace(model.null_condition(y), guidance=torch.ones_like(y.guidance))


def guided_loss(model, z: Tensor, t: Tensor, y, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 2 and 3 of a guidance-distilled model (Eq. 7): || v_hat(x_t, y, t) - (x1 - x0) ||^2. The plain loss would
    teach it to say v(c) where it is told g, and so to forget guidance (Fig. 6). As flow_matching_loss otherwise."""
    xt, v = path(x0, z, t)
    pred = raw_velocity(model, xt, t, y)
    return (pred - v).square().mean(dim=(1, 2, 3)), pred, v


def distillation_loss(teacher, model, z: Tensor, t: Tensor, y, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance distillation (Eq. 3): what a teacher says under classifier-free guidance in two passes (Eq. 4), the student
    says in one, told the scale. As flow_matching_loss otherwise."""
    xt, _ = path(x0, z, t)
    with torch.no_grad():
        v, v_null = teacher(torch.cat([xt, xt]), torch.cat([t, t]), cat_conditions([y, model.null_condition(y)])).float().chunk(2)
        v = v_null + y.guidance.view(-1, 1, 1, 1) * (v - v_null)
    pred = model(xt, t, y).float()
    return (pred - v).square().mean(dim=(1, 2, 3)), pred, v


# each (model, z, t, y, x0) -> loss of every sample (B,), predicted and target velocity; "ddpm" is sample.ddpm_loss
LOSSES = {"flow": flow_matching_loss, "guided": guided_loss}


def pick_objective(cfg, asked: str | None) -> str:
    """The objective asked for, or the model's own: guided for a distilled one, flow for others. ValueError if it has none such."""
    distilled = getattr(cfg, "guidance_embed", False)
    if asked == "ddpm" and cfg.clock != "ddpm":
        raise ValueError(f"--objective ddpm is for bases on DDPM's clock; this {type(cfg).__name__.removesuffix('Config')} runs on the flow's")
    if asked == "guided" and not distilled:
        raise ValueError("--objective guided is for a model that is told its guidance as a number; this one is not distilled: use flow")
    return asked or ("guided" if distilled else "flow")


def tell_guidance(y, limits: tuple[float, float] | None, places: Tensor):
    """The conditions with guidance at these places (B,) in [0,1] between the limits; labels, and prompts of a model that is
    not told any (limits None), stay as they are."""
    return y if limits is None else replace(y, guidance=(limits[0] + (limits[1] - limits[0]) * places).to(y.device))


def ends(model, final_adaln: bool = True) -> tuple[str, str]:
    """Names of what stages 2 and 3 train in full: the embedder, and the head with or without its modulation."""
    return model.EMBEDDER, model.HEAD_TRAINED if final_adaln else model.HEAD


def drop_labels(model, y: Tensor, p: float, generator) -> Tensor:
    """Replace a share p of the conditions by the null condition, so that the model stays able to be guided."""
    drop = torch.rand(len(y), generator=generator) < p
    return where_conditions(drop, model.null_condition(y), y)


@torch.no_grad()
def validation_losses(model, z: Tensor, y, dtype=torch.float32, times: int = 8, loss=flow_matching_loss, limits=None) -> dict[str, float]:
    """The loss at eight fixed t (and guidances between the limits) on fixed noise: steady from step to step, comparable from
    run to run in one latent space. -> {"val_loss": their mean, "val_t0.06": at t = 0.06, ...}"""
    g, rows = torch.Generator().manual_seed(12345), torch.arange(len(z))
    t = (rows % times + 0.5) / times
    y = tell_guidance(y, limits, (rows // times % times + 0.5) / times)
    with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
        each = loss(model, z, t.to(z.device), y, torch.randn(z.shape, generator=g).to(z.device))[0].cpu()
    return {"val_loss": float(each.mean()), **{f"val_t{x:.2f}": float(each[t == x].mean()) for x in t.unique()}}


def validation_loss(*args, **kw) -> float:
    """Their mean."""
    return validation_losses(*args, **kw)["val_loss"]


# ---- both stages in closed form ------------------------------------------------------------------------------------------------

class LeastSquares:
    """min_W,b || W x + b - y ||^2 + ridge, streaming: sums of outer products in float64, a row (1, x) at a time. Sums of
    shards add up (`+`), so any number of passes or processes give one answer."""

    def __init__(self, size_in: int, size_out: int, device="cpu"):
        self.xx = torch.zeros(size_in + 1, size_in + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(size_in + 1, size_out, dtype=torch.float64, device=device)
        self.yy, self.n, self.mse = torch.zeros((), dtype=torch.float64, device=device), 0, math.nan

    def add(self, x: Tensor, y: Tensor):
        """x (..., size_in), y (..., size_out)"""
        x, y = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()
        self.n += len(x)

    def __add__(self, other: "LeastSquares") -> "LeastSquares":
        out = LeastSquares(self.xx.shape[0] - 1, self.xy.shape[1], self.xx.device)
        out.xx, out.xy, out.yy, out.n = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.n + other.n
        return out

    def add_up(self):
        """Everybody gets the sums of all processes."""
        n = torch.tensor(float(self.n), dtype=torch.float64, device=self.yy.device)
        add_up([self.xx, self.xy, self.yy, n])
        self.n = int(n)

    def solve(self, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """W (size_out,size_in), b (size_out,). The ridge is relative to the mean power of x, and spares the bias."""
        penalty = torch.full_like(self.xx.diagonal(), ridge * float(self.xx.diagonal()[1:].mean()))
        penalty[0] = 0.0
        w = torch.linalg.solve(self.xx + penalty.diag(), self.xy)
        return w[1:].T.contiguous(), w[0].contiguous()

    def loss(self, w: Tensor, b: Tensor) -> float:
        """Mean squared error of (W, b) on everything added, per number of y."""
        wb = torch.cat([b[:, None], w], dim=1).double().T
        return float((self.yy - 2 * (wb * self.xy).sum() + (wb * (self.xx @ wb)).sum()) / (self.n * self.xy.shape[1]))


@torch.no_grad()
def solve_embedder(model, base, batches, ridge: float = 1e-6) -> LeastSquares:
    """Stage 1 exactly: the embedder that minimises Eq. 1 over `batches` of (z_dc, z_base). The map is linear, so one pass
    is enough. Sets it in the model; returns the sums."""
    layer, p = model.embed_linear, model.cfg.patch_size
    sums = LeastSquares(layer.weight[0].numel(), len(layer.weight), layer.weight.device)
    for z_dc, z_base in islice(batches, processes()[0], None, processes()[1]):
        x = rearrange(z_dc, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        target = F.adaptive_avg_pool2d(grid_tokens(base, z_base).float(), (z_dc.shape[-2] // p, z_dc.shape[-1] // p)).flatten(2).transpose(1, 2)
        positions = model.embed(torch.zeros_like(z_dc)) - layer.bias  # what the embedder adds to its linear map
        sums.add(x, target - positions)
    sums.add_up()
    sums.mse = sums.loss(*_set(layer, *sums.solve(ridge)))
    return sums


@torch.no_grad()
def solve_head(model, batches, ridge: float = 1e-6, dtype=torch.float32, guided: bool = False) -> LeastSquares:
    """Stage 2 exactly, while the embedder stands still: the head's last linear map that minimises the flow loss (Eq. 2), or
    the guided one (Eq. 7), over `batches` of (z, t, y, x0). Its input is fixed, so the loss is quadratic in it. Of the
    guided loss too: v_hat is the same linear map of (h(c, g) + (g - 1) h(null, 1)) / g, whose weights add up to one."""
    layer = model.head_linear
    sums = LeastSquares(layer.in_features, layer.out_features, layer.weight.device)

    def features(xt, t, y):
        x, clock = model.to_native(xt, t)
        c = model.condition(clock, y, xt.shape[-2:])
        return model.head_features(model.trunk(model.embed(x), c), c).float()

    for z, t, y, x0 in islice(batches, processes()[0], None, processes()[1]):
        xt, v = path(x0, z, t)
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
            h = features(xt, t, y)
            if guided:
                g = y.guidance.view(-1, 1, 1)
                h = (h + (g - 1) * features(xt, t, unconditional(model, y))) / g
        sums.add(h, model.patchify(model.to_velocity(v, xt, t)))         # from velocity to output: a sign at most, its own inverse
    sums.add_up()
    sums.mse = sums.loss(*_set(layer, *sums.solve(ridge)))
    return sums


def _set(layer: nn.Module, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    layer.weight.copy_(w.reshape(layer.weight.shape))
    layer.bias.copy_(b)
    return w, b


# ---- what the scripts share: recipes, runs, pictures ---------------------------------------------------------------------------------

# Table 7 of the paper, and what recipe.md adds: the shift of training times, the range of guidance. "tiny" and its text
# models are the same recipe in minutes: larger learning rates that end at zero, fewer steps, a smaller rank. DiT's head is
# its whole final layer, modulation included, as in the authors' code. w in Eq. 3-7 is guidance - 1. pos_step: a base that
# knows one size only (DiT, the embedded ones) finds its new tokens spread over the places that it knows; FLUX was trained at
# many sizes, so a smaller grid is nothing new to it and counts by ones, as the authors have it and as diffusers' pipeline feeds it.
def _recipe(ae: str, stage1: int, stage2: tuple, stage3: tuple, pictures: int | None = None, rank: int = 256, **more) -> dict:
    """stage1: steps; stage2: (steps, lr, batch); stage3: (steps, lr, batch)."""
    stage = lambda steps, lr, batch, **kw: dict(steps=steps, lr=lr, batch=batch, **kw)
    return dict(ae=ae, pictures=pictures, rank=rank, stage1=stage(stage1, 1e-4, 64), stage2=stage(*stage2), stage3=stage(*stage3, warmup=2000),
                shift=1.0, pos_step=1.0, guidance=(1.0, 14.0)) | more


_tiny = dict(stage1=dict(steps=400, lr=1e-2, batch=64), stage2=dict(steps=1000, lr=5e-3, batch=64, schedule="cosine"),
             stage3=dict(steps=2000, lr=1e-3, batch=64, warmup=50, schedule="cosine"), pictures=4096, rank=32, shift=1.0, pos_step=2.0, guidance=(1.0, 8.0))


RECIPES = {
    "tiny":       dict(ae="tiny-dc-ae-f32c32", **_tiny),
    "tiny-flux":  dict(ae="tiny-dc-ae-f32c32", **_tiny | dict(pictures=8192)),
    "tiny-sana":  dict(ae="tiny-dc-ae-f32c32", **_tiny | dict(pictures=8192)),
    "dit-xl":     _recipe("dc-ae-f32c32-in-1.0", 50_000, (20_000, 2e-4, 1024), (500_000, 2e-4, 1024), pos_step=2.0),
    "dit-xl-512": _recipe("dc-ae-f32c32-in-1.0", 50_000, (20_000, 2e-4, 1024), (100_000, 2e-4, 1024), pos_step=2.0),
    "sana-1.6b":  _recipe("dc-ae-f64c128-in-1.0", 20_000, (5_000, 2e-4, 1024), (150_000, 2e-4, 1024), shift=3.0),
    "sana-4.8b":  _recipe("dc-ae-f64c128-in-1.0", 20_000, (5_000, 1e-4, 256), (50_000, 1e-4, 256), shift=3.0),
    "flux-krea":  _recipe("dc-ae-f32c32-in-1.0", 20_000, (5_000, 1e-4, 256), (10_000, 1e-4, 256), shift="flux2", then="dc-ae-f64c128-1.5"),
}


def recipe_of(base: str) -> dict:
    """The recipe of a preset, or of the one that a run came from; another model of its family has that family's."""
    name = preset_of(base)
    kin = {FluxConfig: "flux-krea", SanaConfig: "sana-1.6b"}.get(type(BASES[name]), "dit-xl")
    return RECIPES.get(name, RECIPES[kin])


def target_ae(asked: str | None, recipe: dict, cfg):
    """The autoencoder to move a base of this configuration to: the one asked for, else the recipe's next one that is deeper
    than the base's own (FLUX at 2K and 4K: from f32 on to f64). ValueError where the recipe ends."""
    own = ae_config(cfg.ae)
    for name in (asked,) if asked else (recipe["ae"], recipe.get("then")):
        if name and (asked or ae_config(name).f > own.f):
            return ae_config(name)
    raise ValueError(f"this base is on {own.name} already, where its recipe ends; name the autoencoder to move to with --ae, "
                     f"one of {', '.join(k for k, ae in AUTOENCODERS.items() if ae.f > own.f)}")


def sample_loss(model, z: Tensor, y, g, *, objective: str, t_sampling: str, shift: float, label_dropout: float, limits=None, teacher=None) -> tuple[Tensor, dict]:
    """One batch of the training objective of stages 2 and 3: "flow" (Eq. 2), "guided" (Eq. 7), "ddpm", DiT's own (epsilon
    and a learned variance on the integer clock); with a teacher, its distillation (Eq. 3). limits: the range of the
    guidance that the model is told. All randomness comes from g, on the CPU."""
    y = drop_labels(model, y, label_dropout, g)
    x0 = torch.randn(z.shape, generator=g).to(z.device)
    if objective == "ddpm":
        chain = Chain()
        mse, bound = ddpm_loss(model, chain, z, torch.randint(len(chain.steps), (len(z),), generator=g), y, x0)
        return (mse + bound).mean(), {"mse": mse.mean().detach()}
    t = sample_t(len(z), g, t_sampling, shift).to(z.device)
    y = tell_guidance(y, limits, torch.rand(len(z), generator=g) if limits else None)
    loss_of = partial(distillation_loss, teacher) if teacher else LOSSES[objective]
    loss, pred, v = loss_of(model, z, t, y, x0)
    return loss.mean(), {"pred_norm": pred.detach().norm() / v.norm()}


# ---- main --------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    add_data_args(p)
    p.add_argument("--solver", default="closed-form", choices=("closed-form", "adamw"),
                   help="how stage 1, and the head before stage 2, find their optimum (default closed-form)")
    p.add_argument("--ridge", type=float, default=1e-6, help="closed form: relative ridge (default 1e-6)")
    p.add_argument("--head-samples", type=int, default=8192, help="closed form: noisy samples for the head; 0 = leave it random (default 8192)")
    p.add_argument("--head-only", action="store_true", help="stage 2 leaves the embedder alone, as the closed form does: to compare the two")
    p.add_argument("--match", default="downsample", choices=MATCHES, help="stage 1 by AdamW: how embeddings are compared (default downsample)")
    p.add_argument("--stage1-steps", type=int, help="AdamW steps of stage 1 (default: the recipe's; 0 = no stage 1, by either solver)")
    p.add_argument("--stage2-steps", type=int, help="AdamW steps of embedder and head together (default: the recipe's; 0 = none)")
    p.add_argument("--lr1", type=float, help="stage 1 learning rate (default: the recipe's)")
    p.add_argument("--lr2", type=float, help="stage 2 learning rate (default: the recipe's)")
    p.add_argument("--batch", type=int, help="pictures a step, both stages (default: the recipe's)")
    p.add_argument("--batch1", type=int, help="pictures a step of stage 1 (default: --batch, or the recipe's)")
    p.add_argument("--warmup", type=int, default=0, help="steps of stage 2's linear warm-up (default 0; the authors' guides use 1000)")
    p.add_argument("--schedule", choices=("constant", "cosine"), help="of stage 2's learning rate (default: the recipe's)")
    p.add_argument("--clip", type=float, default=-1, help="stage 2 gradient norm limit; -1 = never (default; the authors' guides use 0.1)")
    p.add_argument("--shift", help="resolution shift of the times, a number or a rule (sample.py --help), saved with the run; 1 = off (default: the recipe's)")
    p.add_argument("--count", type=int, default=128, help="pictures a stage for the class accuracy; 0 = none (default 128)")
    p.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/align-BASE-N, the next N)")
    args = p.parse_args(argv)

    closed = args.solver == "closed-form"
    if args.dry_run:
        args.stage1_steps, args.stage2_steps, args.head_samples, args.count = 0 if args.stage1_steps == 0 else 1, 1, min(16, args.head_samples), 0
    if closed and args.match != "downsample":
        raise ValueError(f"--match {args.match} has no closed form here; use --solver adamw")
    begun, recipe, dtype, device = time.perf_counter(), recipe_of(args.base), dtype_of(args), join(args.device)
    base, info = load_base(args.base, args.weights, device, dtype=None)
    settle(base, [], device, frozen_dtype(args))
    old, new = base.cfg.ae, target_ae(args.ae, recipe, base.cfg).name
    if old == new:
        raise ValueError(f"--ae {new}: the base is on it already; stages 1 and 2 are for another one, stage 3 is finetune.py --init {args.base}")
    goal = pick_objective(base.cfg, args.objective)
    cfg = sized(to_deep_latent(base.cfg, ae_config(new), "epsilon" if goal == "ddpm" else "velocity", new_step(args.pos_step, recipe, base.cfg)), args)
    shift, rule = shift_of(args.shift or recipe["shift"], cfg)        # a size that does not fit is said here, before there is a run
    limits = guidance_limits(args, recipe, cfg)
    out, (rank, _) = new_run("align", args), processes()
    with first_goes_first():
        data = prepare(args, recipe, {old: args.base_ae_weights or info.get("ae_weights"), new: args.ae_weights}, cfg, device)
    ae, source, cache, y_val, base.null = data.ae, data.source, data.cache, data.val[1], data.null
    z_dc, z_base = data.val[0][new], data.val[0][old]
    torch.manual_seed(args.seed)
    model = to_deep_model(base, cfg).to(device)
    settle(model, [k for k, _ in pick(model, ends(model, args.final_adaln))], device, frozen_dtype(args), args.recompute)
    tokens = lambda m, z: z.shape[-1] * z.shape[-2] // m.cfg.patch_size**2
    print(f"{args.base}: {old} patch {base.cfg.patch_size}, {tokens(base, z_base)} tokens -> {new} patch 1, {tokens(model, z_dc)} tokens; "
          f"{len(cache)} pictures, {dtype} -> {out}")
    judge = pick_scorer(source) if args.count and not args.images else None   # they know the procedural pictures only
    told = lambda places: tell_guidance(y_val[:64], limits, places)   # what both models are told where their features are compared
    stages, gaps, logs, seconds = [], {}, {}, {}

    def look(name: str, m):
        """A stage's pictures, class accuracy, gap to the base and validation loss."""
        y, titles = data.ask(max(8, args.count if judge else 8))
        seconds["pictures"] = 0.0
        with timed(seconds, "pictures", device):
            images = draw(m, ae[m.cfg.ae], y, args.seed, args.cfg_scale, rule, dtype, args.base)
        row = dict(stage=name) | (judge(images, y, titles) if judge else {})
        if m is model:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and next(m.blocks[0].parameters()).dtype != torch.float32):
                gaps[name] = layer_gap(m, base, z_dc[:64], z_base[:64], told(torch.zeros(len(z_dc[:64]))))
            row |= dict(gap=sum(gaps[name]) / len(gaps[name]), val_loss=validate()["val_loss"])
        stages.append((row, images[:8]))
        print("  " + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in row.items()), flush=True)

    def validate():
        return validation_losses(model, z_dc, y_val, dtype, loss=LOSSES.get(goal, flow_matching_loss), limits=limits)

    def pair(rows):                                                   # means, not draws: a target should not be noise
        z, _ = cache.batch(rows)
        return z[new].to(device), z[old].to(device)

    objective = dict(objective=goal, t_sampling=args.t_sampling, shift=shift, label_dropout=args.label_dropout, limits=limits)

    def flow_loss(rows, g):
        return sample_loss(model, cache.batch(rows)[0][new].to(device), data.condition(rows), g, **objective)

    def noisy(rows, g):
        z, y = cache.batch(rows)[0][new].to(device), drop_labels(model, data.condition(rows), args.label_dropout, g)
        t, x0 = sample_t(len(z), g, args.t_sampling, shift).to(device), torch.randn(z.shape, generator=g).to(device)
        return z, t, tell_guidance(y, limits, torch.rand(len(z), generator=g) if limits else None), x0

    rows = getattr(cache, "buckets", len(cache))
    look("base", base)
    look("not aligned", model)

    # stage 1: the embedder
    clock, steps1 = time.perf_counter(), 0
    if args.stage1_steps == 0:
        print("no stage 1: the embedder stays random")
    elif closed:
        sums = solve_embedder(model, base, (pair(r) for r in cache.pieces(256)), args.ridge)
        print(f"stage 1 in closed form: loss {sums.mse:.5f} over {sums.n} cells, {time.perf_counter() - clock:.1f} s")
    else:
        s1 = recipe["stage1"]
        steps1 = s1["steps"] if args.stage1_steps is None else args.stage1_steps
        logs["stage 1"] = train(out, model, pick(model, (model.EMBEDDER,)), lambda rows, g: (embedding_loss(model, base, *pair(rows), args.match), {}),
                                rows, steps1, batch=args.batch1 or args.batch or s1["batch"], lr=args.lr1 or s1["lr"], info=info, name="stage1", seed=args.seed,
                                betas=args.betas, save_every=args.save_every)
        print(f"stage 1 by AdamW: loss {logs['stage 1'][-1]['loss']:.5f}, {time.perf_counter() - clock:.1f} s")
    if args.stage1_steps != 0:
        look("stage 1: embedder", model)

    # stage 2: embedder and head
    both = pick(model, ends(model, args.final_adaln)[args.head_only:])
    clock, s2 = time.perf_counter(), recipe["stage2"]
    batch2, head_steps = args.batch or s2["batch"], 0
    if closed and args.head_samples and goal in LOSSES:
        head_steps = -(-args.head_samples // batch2)                  # what it looks at, counted as if it were steps
        at_once = min(256, args.head_samples, len(cache))
        pieces = islice(cycle(cache.pieces(at_once)), -(-args.head_samples // at_once))
        batches = (noisy(r, torch.Generator().manual_seed(args.seed * 1_000_003 + i)) for i, r in enumerate(pieces))
        sums = solve_head(model, batches, args.ridge, dtype, goal == "guided")
        print(f"head in closed form: loss {sums.mse:.4f} over {args.head_samples} samples, {time.perf_counter() - clock:.1f} s")
        look("head in closed form", model)
    steps, clock = s2["steps"] if args.stage2_steps is None else args.stage2_steps, time.perf_counter()
    if steps:
        logs["stage 2"] = train(out, model, both, flow_loss, rows, steps, batch=batch2, lr=args.lr2 or s2["lr"], info=info, name="stage2", betas=args.betas,
                                warmup=args.warmup, schedule=args.schedule or s2.get("schedule", "constant"), seed=args.seed + 1, dtype=dtype,
                                clip=None if args.clip < 0 else args.clip, save_every=args.save_every, watch=lambda step, _: validate(),
                                watch_every=max(1, steps // 8), seconds=seconds)
        print(f"stage 2: {steps} steps, {time.perf_counter() - clock:.1f} s")
        look("stage 2: both", model)

    print("\n" + gap_table(gaps))
    print("[|| g - pool(h) || / || pool(h) - its mean || per layer, clean latents of 64 unseen pictures; 0 = the base's own features]\n")
    scores = [row for row, _ in stages]
    info |= dict(kind="align", model=config_dict(cfg), shift=rule, classes=list(source.classes), images=args.images, captions=args.captions,
                 ae_weights=args.ae_weights, objective=goal, steps=steps1 + head_steps + steps, stages=scores, gaps=gaps)
    write_run(out, info, both, [dict(stage=k, **row) for k, log in logs.items() for row in log] + scores, state="stage2")
    leave()
    if rank:
        return
    if args.dry_run:
        return note_dry_run(out, model, both, seconds, batch2, False, device, "stage2")
    title = lambda r: r["stage"].replace(": ", "\n").replace(" in ", "\nin ") + (f"\n{r[score]:.0%} right" if (score := "all" if "all" in r else "accuracy") in r else "")
    save_grid(out / "samples.png", [(title(r), x) for r, x in stages], data.ask(8)[1], {"seed": str(args.seed), "cfg_scale": str(args.cfg_scale)})
    plot_gap(out / "gap.png", gaps)
    if curves := {k: v for k, v in logs.items() if v}:                # without AdamW there are none
        plot_curves(out / "curves.png", curves)
    print(f"{(time.perf_counter() - begun) / 60:.1f} min, peak memory {peak_gib(device):.1f} GiB; "
          f"wrote {out}/ (model.safetensors, metrics.jsonl, samples.png, gap.png{', curves.png' if curves else ''})")


if __name__ == "__main__":
    run(main)
