"""Embedding alignment: stages 1 and 2 of DC-Gen (arXiv 2509.25180, Sec. 3.3).

A pretrained model on f8 latents gets a new patch embedder and a new output head for the latents of a deeper
autoencoder. If both start random, fine-tuning starts from noise and destroys what the base has learned (Fig.
3). So first, with the trunk (all that lies between embedder and head) frozen:

  stage 1  The embedder alone learns to give the base's own patch embeddings of the same picture, averaged
           over each cell of the new grid (Eq. 1; clean latents, no noise, no time):

               L = || embed(z_dc) - pool(embed_base(z_base)) ||^2

  stage 2  Embedder and head learn together from the ordinary flow loss in the *deep* latent space (Eq. 2):

               L = || v(x_t, t, y) - (x1 - x0) ||^2,   x_t = (1-t) x0 + t x1,   x0 noise, x1 = z_dc

           The target x1 - x0 is computed from the deep latents, so it has their number of channels: the old
           head is never used. It works because stage 1 feeds the frozen trunk tokens that it understands, so
           its last features still describe the picture, and the new head only translates them. From here on
           the model generates recognisable pictures.

Stage 1 is linear least squares in the embedder. So is stage 2 in the head's last linear map, as long as the
embedder is fixed. By default (`--solver closed-form`) both are solved exactly, and then embedder and head are
trained together by AdamW for the steps of the recipe. `--solver adamw` is the paper's way.

On the bundled bases the flow loss alone lets the embedder drift into tokens that the trunk has never read. So
their recipe goes on asking for Eq. 1 beside it (`--hold`, ours): the frozen trunk draws better than after the
closed forms alone, and its features stay a third nearer to the base's than with the flow loss alone.

A base that predicts epsilon on DDPM's clock (DiT) keeps its clock: model.DiT.to_native rescales x_t so that
the trunk sees the signal-to-noise ratio that it was trained with. Only the new head predicts a velocity.

    python align.py                                    the bundled base, minutes on a CPU
    python align.py --base dit-xl --images DIR         DiT-XL/2 from SD-VAE f8 patch 2 to DC-AE f32 patch 1
    torchrun --nproc-per-node 8 align.py ...           on eight GPUs; the same for finetune.py

Stage 3 is finetune.py; the training loop is train.train.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from autoencoder import AUTOENCODERS, ae_config
from checkpoints import config_dict, exportable, load_base, read_base_config
from evaluate import gap_table, layer_gap, plot_gap, target_of, token_pixels
from fast import peak_gib
from flags import Parser, add_model_args, at_least, check_paths, positive, run_main
from model import to_deep_latent, to_deep_model, where_conditions
from sample import path, sample_t, save_grid
from shapes import pick_scorer
from train import (
    PATHS, PLAN_FLAGS, Plan, Run, RunData, add_data_args, add_plan_args, all_reduce_sum, autocast,
    data_settings, destroy_distributed, draw_previews, get_rank, get_world_size, init_distributed,
    named_parameters_with, open_data, open_pictures, open_run, planned, prepare_for_training, preview_count,
    rank0_first, resized, resume_flags, settle_dtype, train, trainable_prefixes, training_shift, write_run)


# ---- the recipes: Table 7 of the paper -----------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """One column of Table 7, and what the authors' code adds to it."""
    ae: str                                 # the autoencoder to move to
    stage1: Plan
    stage2: Plan
    stage3: Plan
    then: str | None = None                 # the next one: f32 serves up to 1K, f64 serves 2K and 4K
    rank: int = 256                         # of LoRA in stage 3; alpha is the same
    pictures: int | None = None             # number of procedural ones (bundled bases)
    match: str = "downsample"               # what Eq. 1 compares: one of MATCHES
    joint_steps: int | None = None          # of stage 2 after closed forms: None = all of them, or 0
    hold: float = 0.0                       # weight of Eq. 1 beside the flow loss then (ours)
    shift: float | str = 1.0                # of times: a number, or a rule of model.resolve_shift
    pos_step: float = 1.0                   # distance between neighbouring tokens, in positions of the base
    guidance: tuple[float, float] = (1.0, 14.0)    # range of g in training, as in the authors' code


F32 = "dc-ae-f32c32-in-1.0"
F64 = "dc-ae-f64c128-1.5"                   # Table 2 cites another paper for f64c128 than for f32c32
STAGE3 = dict(warmup=2000, weight_decay=1e-3, ema=0.999, clip=1.0)
# the paper's recipe in minutes: larger learning rates that end at zero, fewer steps, a smaller rank
TINY = Recipe(
    "tiny-dc-ae-f32c32",
    stage1=Plan(steps=400, lr=1e-2, batch=64),
    stage2=Plan(steps=1000, lr=5e-3, batch=64, schedule="cosine"),
    stage3=Plan(steps=2000, lr=1e-3, batch=64, schedule="cosine", **{**STAGE3, "warmup": 50}),
    pictures=4096, rank=32, match="resize", joint_steps=300, hold=10.0, pos_step=2.0,
    guidance=(1.0, 8.0))

# pos_step: a base that was trained at one size only (DiT) has its new tokens spread over the positions that
# it was trained with; the bundled ones have seen small pictures at such positions. FLUX was trained at many
# sizes, so a smaller grid uses step 1, as in the authors' code and in diffusers' pipeline.
RECIPES = {
    "tiny": TINY,
    "tiny-text": replace(TINY, pictures=8192, hold=0.3),
    "dit": Recipe(
        F32, pos_step=2.0,
        stage1=Plan(steps=50_000, lr=1e-4, batch=64),
        stage2=Plan(steps=20_000, lr=2e-4, batch=1024),
        stage3=Plan(steps=500_000, lr=2e-4, batch=1024, **STAGE3)),
    "dit-512": Recipe(
        F32, pos_step=2.0,
        stage1=Plan(steps=50_000, lr=1e-4, batch=64),
        stage2=Plan(steps=20_000, lr=2e-4, batch=1024),
        stage3=Plan(steps=100_000, lr=2e-4, batch=1024, **STAGE3)),
    "sana-1.6b": Recipe(
        F64, shift=3.0,
        stage1=Plan(steps=20_000, lr=1e-4, batch=64),
        stage2=Plan(steps=5_000, lr=2e-4, batch=1024),
        stage3=Plan(steps=150_000, lr=2e-4, batch=1024, **STAGE3)),
    "sana-4.8b": Recipe(
        F64, shift=3.0,
        stage1=Plan(steps=20_000, lr=1e-4, batch=64),
        stage2=Plan(steps=5_000, lr=1e-4, batch=256),
        stage3=Plan(steps=50_000, lr=1e-4, batch=256, **STAGE3)),
    "flux": Recipe(
        F32, then=F64, shift="flux2",
        stage1=Plan(steps=20_000, lr=1e-4, batch=64),
        stage2=Plan(steps=5_000, lr=1e-4, batch=256),
        stage3=Plan(steps=10_000, lr=1e-4, batch=256, **STAGE3)),
}


def recipe_of(cfg) -> Recipe:
    return RECIPES[cfg.recipe]


def print_recipe(base: str):
    """Print the recipe of a base, every number with its flag's meaning."""
    cfg, _ = read_base_config(base)
    recipe = asdict(recipe_of(cfg))
    print(f"recipe {cfg.recipe} of --base {base} (Table 7 of the paper):")
    for name, value in recipe.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        print(f"  {name:10}{value}")


def next_autoencoder(asked: str | None, cfg, base: str):
    """The configuration of the autoencoder to move a base to: the one asked for, else the recipe's next one
    that is deeper than the base's own. ValueError where the recipe ends, and for the base's own."""
    recipe = recipe_of(cfg)
    own = ae_config(cfg.ae)
    deeper = [name for name, ae in AUTOENCODERS.items() if ae.f > own.f]
    if asked == own.name:
        raise ValueError(f"--ae {asked}: the base is on it already; stages 1 and 2 are for another one, "
                         f"stage 3 is finetune.py --init {base}")
    if asked:
        return ae_config(asked)
    for name in (recipe.ae, recipe.then):
        if name in deeper:
            return ae_config(name)
    raise ValueError(f"this base is on {own.name} already, where its recipe ends; "
                     f"name the autoencoder to move to with --ae, one of {', '.join(deeper)}")


# ---- stage 1: Eq. 1 ------------------------------------------------------------------------------

def grid_tokens(model, z: Tensor) -> Tensor:
    """Patch embeddings with their positions, as a 2-D grid: z (B,C,H,W) -> (B,D,H/p,W/p)."""
    return rearrange(model.embed(z), "b (h w) d -> b d h w", h=z.shape[-2] // model.cfg.patch_size)


@torch.no_grad()
def pooled_base_tokens(base, z_base: Tensor, grid: tuple[int, int]) -> Tensor:
    """The target of Eq. 1: the base's patch embeddings averaged over each cell of the new grid.
    z_base (B,C,H,W) -> (B,D,*grid) float32"""
    return F.adaptive_avg_pool2d(grid_tokens(base, z_base).float(), grid)


MATCHES = ("downsample", "upsample", "resize")


def embedding_loss(model, base, z_dc: Tensor, z_base: Tensor, match: str = "downsample") -> Tensor:
    """Stage 1 (Eq. 1): mean squared distance between the new patch embeddings and the base's, on one grid.
    z_dc (B,C',H',W'), z_base (B,C,H,W) of the same pictures -> scalar.

    match: "downsample"  the base's embeddings averaged over each new cell (the paper)
           "upsample"    the new ones brought up to the base's grid, bilinear (the authors' guides)
           "resize"      the base's embeddings of the picture at the size at which both grids are one (ours):
                         z_base comes from there, and nothing is left to average
    Each embedder has added its own grid's positions (as in the authors' code for DiT)."""
    new = grid_tokens(model, z_dc)                                   # B D H'/p' W'/p'
    if match != "upsample":
        return F.mse_loss(new, pooled_base_tokens(base, z_base, new.shape[-2:]).to(new.dtype))
    grid = [side // base.cfg.patch_size for side in z_base.shape[-2:]]
    old = pooled_base_tokens(base, z_base, grid).to(new.dtype)       # B D H/p W/p: as they are
    return F.mse_loss(F.interpolate(new, grid, mode="bilinear"), old)


# ---- stages 2 and 3: Eq. 2, and Eq. 6-7 for a distilled model ------------------------------------

def flow_matching_loss(model, z: Tensor, t: Tensor, y, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 2 and 3 (Eq. 2): || v(x_t, t, y) - (x1 - x0) ||^2.
    z data x1, x0 noise (B,C,H,W), t (B,), y classes (B,) or a Text of prompts (model.Text)
    -> the loss of every sample (B,), predicted and target velocity (B,C,H,W)"""
    xt, v = path(x0, z, t)                                           # (1-t) x0 + t z,  z - x0
    pred = model(xt, t, y).float()
    return (pred - v).square().mean(dim=(1, 2, 3)), pred, v


def unguided_null(model, y):
    """The null condition of a distilled model: the empty prompt, at guidance 1, which is no guidance."""
    return replace(model.null_condition(y), guidance=torch.ones_like(y.guidance))


def corrected_velocity(model, xt: Tensor, t: Tensor, y) -> Tensor:
    """What a guidance-distilled model would give without its distillation (Eq. 6).

    Such a model takes the guidance scale g as an input and was trained to give the guided velocity in one
    pass, v(c, g) = g v(c) - (g - 1) v(null)   (Eq. 4, where g = 1 + w). Solved for v(c), with v(null) =
    v(null, 1):

        v_hat(c) = ( v(c, g) + (g - 1) v(null, 1) ) / g

    No gradient goes through the null term (as in the authors' code): otherwise training could lower the loss
    by changing v(null) instead of v(c, g).
    xt (B,C,H,W), t (B,), y a Text with its guidance (B,) -> (B,C,H,W)"""
    g = y.guidance.view(-1, 1, 1, 1)
    v = model(xt, t, y).float()
    with torch.no_grad():
        v_null = model(xt, t, unguided_null(model, y)).float()
    return (v + (g - 1) * v_null) / g


def guided_flow_matching_loss(model, z: Tensor, t: Tensor, y, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 2 and 3 of a guidance-distilled model (Eq. 7): || v_hat(x_t, t, y) - (x1 - x0) ||^2. The plain
    loss would teach it to give v(c) whatever g it takes, and so to forget guidance (Fig. 6). Arguments and
    results are those of flow_matching_loss."""
    xt, v = path(x0, z, t)
    pred = corrected_velocity(model, xt, t, y)
    return (pred - v).square().mean(dim=(1, 2, 3)), pred, v


@dataclass(frozen=True)
class Objective:
    """The training objective of stages 2 and 3: a loss, and how noise, time and guidance are sampled for
    it."""
    loss: Callable = flow_matching_loss
    guidance: tuple[float, float] | None = None    # range of what a distilled model reads
    t_sampling: str = "logit-normal"
    shift: float = 1.0
    label_dropout: float = 0.1              # share of null conditions: classifier-free guidance needs them

    @property
    def guided(self) -> bool:
        return self.loss is guided_flow_matching_loss

    @property
    def name(self) -> str:
        return "guided" if self.guided else "flow"

    def draw(self, model, z: Tensor, y, generator) -> tuple:
        """A batch's latents and conditions -> (z, t, y, x0), the arguments of a loss. All randomness comes
        from the generator, on the CPU."""
        drop = torch.rand(len(y), generator=generator) < self.label_dropout
        y = where_conditions(drop, model.null_condition(y), y)
        x0 = torch.randn(z.shape, generator=generator).to(z.device)
        t = sample_t(len(z), generator, self.t_sampling, self.shift).to(z.device)
        if self.guidance:
            y = self.with_guidance(y, torch.rand(len(z), generator=generator))
        return z, t, y, x0

    def with_guidance(self, y, u: Tensor):
        """Conditions with guidance at u (B,) in [0,1] of its range; those of a model that reads none stay as
        they are."""
        if self.guidance is None:
            return y
        low, high = self.guidance
        return replace(y, guidance=(low + (high - low) * u).to(y.device))

    def train_loss(self, model, z: Tensor, y, generator) -> tuple[Tensor, dict]:
        """The loss of a batch, and metrics."""
        loss, pred, v = self.loss(model, *self.draw(model, z, y, generator))
        return loss.mean(), {"pred_norm": pred.detach().norm() / v.norm()}

    @torch.no_grad()
    def validate(self, model, z: Tensor, y, dtype=torch.float32, times: int = 8) -> dict[str, float]:
        """The loss at eight fixed t (and guidances) on fixed noise: steady from step to step, comparable from
        run to run in one latent space. -> {"val_loss": their mean, "val_t0.06": at t = 0.06, ...}"""
        g = torch.Generator().manual_seed(12345)
        i = torch.arange(len(z))
        t = (i % times + 0.5) / times
        y = self.with_guidance(y, (i // times % times + 0.5) / times)
        x0 = torch.randn(z.shape, generator=g).to(z.device)
        with autocast(z.device, dtype):
            losses = self.loss(model, z, t.to(z.device), y, x0)[0].cpu()
        by_time = {f"val_t{x:.2f}": float(losses[t == x].mean()) for x in t.unique()}
        return {"val_loss": float(losses.mean()), **by_time}


def pick_objective(cfg, kind: str | None = None, guidance: tuple[float, float] | None = None,
                   t_sampling: str = "logit-normal", label_dropout: float = 0.1) -> Objective:
    """The objective of this kind, "flow" or "guided"; by default guided for a distilled model, flow for
    others. guidance: the range (default: the recipe's). ValueError for what does not fit the model."""
    distilled = getattr(cfg, "guidance_embed", False)
    if kind is None:
        kind = "guided" if distilled else "flow"
    if not distilled and (kind == "guided" or guidance):
        flag = "--objective guided" if kind == "guided" else "--guidance-range"
        raise ValueError(f"{flag} is for a model that reads its guidance as a number; this one is not "
                         "distilled: use --objective flow, without a range")
    low, high = guidance or recipe_of(cfg).guidance
    if not 1 <= low <= high:
        raise ValueError(f"--guidance-range {low:g} {high:g}: two numbers of at least 1 (no guidance), "
                         "the smaller first")
    return Objective(
        loss=guided_flow_matching_loss if kind == "guided" else flow_matching_loss,
        guidance=(low, high) if distilled else None,
        t_sampling=t_sampling, shift=training_shift(cfg), label_dropout=label_dropout)


# ---- both stages in closed form ------------------------------------------------------------------

class LeastSquares:
    """min_W,b || W x + b - y ||^2 + ridge, streaming: sums of outer products in float64, every x with a
    leading 1 for the bias. Sums add up, so any number of passes or ranks give one answer."""

    def __init__(self, size_in: int, size_out: int, device="cpu"):
        self.xx = torch.zeros(size_in + 1, size_in + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(size_in + 1, size_out, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        self.n = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor):
        """x (..., size_in), y (..., size_out)"""
        x = x.reshape(-1, x.shape[-1]).double()
        y = y.reshape(-1, y.shape[-1]).double()
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()
        self.n += len(x)

    def solve(self, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """W (size_out,size_in), b (size_out,). The ridge is relative to the mean power of x, and does not
        penalise the bias."""
        penalty = torch.full_like(self.xx.diagonal(), ridge * float(self.xx.diagonal()[1:].mean()))
        penalty[0] = 0.0
        w = torch.linalg.solve(self.xx + penalty.diag(), self.xy)
        return w[1:].T.contiguous(), w[0].contiguous()

    def loss(self, w: Tensor, b: Tensor) -> float:
        """Mean squared error of (W, b) on everything added, averaged over the entries of y."""
        wb = torch.cat([b[:, None], w], dim=1).double().T
        residual = self.yy - 2 * (wb * self.xy).sum() + (wb * (self.xx @ wb)).sum()
        return float(residual / (self.n * self.xy.shape[1]))

    def solve_into(self, layer: nn.Module) -> float:
        """Add up the sums of all ranks, put the solution into the layer; returns its mean squared error."""
        all_reduce_sum([self.xx, self.xy, self.yy, self.n])
        w, b = self.solve()
        layer.weight.copy_(w.reshape(layer.weight.shape))            # of a Linear, or a Conv2d
        layer.bias.copy_(b)
        return self.loss(w, b)


def share_of_rank(batches):
    """Every world_size-th batch, from this rank's on."""
    return islice(batches, get_rank(), None, get_world_size())


@torch.no_grad()
def solve_embedder(model, base, batches) -> float:
    """Stage 1 exactly: put the embedder that minimises Eq. 1 over `batches` of (z_dc, z_base) into the model;
    returns its loss. The map is linear, so one pass is enough."""
    layer = model.embed_linear
    p = model.cfg.patch_size
    sums = LeastSquares(layer.weight[0].numel(), len(layer.weight), layer.weight.device)
    for z_dc, z_base in share_of_rank(batches):
        x = rearrange(z_dc, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        target = rearrange(pooled_base_tokens(base, z_base, x.shape[1:3]), "b d h w -> b (h w) d")
        # what the embedder adds to its linear map
        positions = model.embed(torch.zeros_like(z_dc)) - layer.bias
        sums.add(x, target - positions)
    return sums.solve_into(layer)


def head_input(model, xt: Tensor, t: Tensor, y) -> Tensor:
    """What the last linear map of the head reads in a forward pass, (B,N,D) float32."""
    read = []
    hook = model.head_linear.register_forward_pre_hook(lambda layer, args: read.append(args[0]))
    try:
        model(xt, t, y)
    finally:
        hook.remove()
    return read[0].float()


@torch.no_grad()
def solve_head(model, batches, dtype=torch.float32, guided: bool = False) -> float:
    """Stage 2 exactly, with the embedder fixed: put the last linear map that minimises the flow loss (Eq. 2),
    or the guided one (Eq. 7), over `batches` of (z, t, y, x0) into the head; returns its loss. The map's
    input is then fixed, so the loss is quadratic in the map. For Eq. 7 v_hat is the same linear map of
    (h(c, g) + (g - 1) h(null, 1)) / g, whose weights add up to one, so that the bias is unchanged. This moves
    the null branch too, which training by gradients leaves alone: as a starting point that is fine."""
    layer = model.head_linear
    sums = LeastSquares(layer.in_features, layer.out_features, layer.weight.device)
    for z, t, y, x0 in share_of_rank(batches):
        xt, v = path(x0, z, t)
        with autocast(z.device, dtype):
            h = head_input(model, xt, t, y)                          # B N D
            if guided:
                g = y.guidance.view(-1, 1, 1)
                h = (h + (g - 1) * head_input(model, xt, t, unguided_null(model, y))) / g
        # a deep model predicts v or -v, so that converting the target is converting back
        sums.add(h, model.patchify(model.to_velocity(v, xt, t)))
    return sums.solve_into(layer)


# ---- the stages ----------------------------------------------------------------------------------

@dataclass
class Alignment:
    """A base, its deep sibling, and what they learn from: what every stage takes. target, match: the base as
    Eq. 1 reads it, and how."""
    base: nn.Module
    target: nn.Module
    match: str
    model: nn.Module
    data: RunData
    objective: Objective
    run: Run
    device: torch.device
    dtype: torch.dtype
    seed: int

    def pairs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Deep and base latents of the same pictures: posterior means, because a target should not be
        noisy."""
        z, _ = self.data.cache.batch(indices)
        return z[self.model.cfg.ae].to(self.device), z[self.base.cfg.ae].to(self.device)

    def samples(self, indices: Tensor) -> tuple:
        """Deep latents and conditions."""
        z, _ = self.data.cache.batch(indices)
        return z[self.model.cfg.ae].to(self.device), self.data.conditions(indices)

    def validate(self, *_) -> dict[str, float]:
        z = self.data.val_latents[self.model.cfg.ae]
        return self.objective.validate(self.model, z, self.data.val_conditions, self.dtype)


def align_embedder_exactly(a: Alignment):
    """Stage 1 in closed form: one pass over all pictures."""
    loss = solve_embedder(a.model, a.target, (a.pairs(indices) for indices in a.data.cache.batches(256)))
    print(f"stage 1 in closed form: loss {loss:.5f} over {len(a.data.cache)} pictures")


def align_embedder_by_adamw(a: Alignment, plan: Plan):
    """Stage 1 as in the paper."""
    def loss(indices, generator):
        return embedding_loss(a.model, a.target, *a.pairs(indices), a.match), {}

    named = named_parameters_with(a.model, (a.model.EMBEDDER,))
    log, _ = train(a.run, "stage1", a.model, named, loss, len(a.data.cache), plan, seed=a.seed)
    print(f"stage 1 by AdamW: loss {log[-1]['loss']:.5f}")


def align_head_exactly(a: Alignment, num_samples: int):
    """The head's initial value for stage 2 in closed form, on num_samples noisy samples."""
    size = min(256, num_samples, len(a.data.cache))
    num_batches = math.ceil(num_samples / size)
    batches = islice(cycle(a.data.cache.batches(size)), num_batches)

    def draw(i, indices):
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + i)
        return a.objective.draw(a.model, *a.samples(indices), generator)

    noisy = (draw(i, indices) for i, indices in enumerate(batches))
    loss = solve_head(a.model, noisy, a.dtype, a.objective.guided)
    print(f"head in closed form: loss {loss:.4f} over about {num_batches * size} noisy samples")


def align_embedder_and_head(a: Alignment, plan: Plan, prefixes: tuple[str, ...], hold: float):
    """Stage 2 by AdamW: the flow loss in the deep latent space, the trunk frozen, the head from where it
    is. hold: weight of Eq. 1 beside it, so that tokens stay such as the trunk can read (ours)."""
    def loss(indices, generator):
        total, metrics = a.objective.train_loss(a.model, *a.samples(indices), generator)
        if hold:
            distance = embedding_loss(a.model, a.target, *a.pairs(indices), a.match)
            total = total + hold * distance
            metrics["eq1"] = distance.detach()
        return total, metrics

    named = named_parameters_with(a.model, prefixes)
    train(a.run, "stage2", a.model, named, loss, len(a.data.cache), plan, seed=a.seed + 1, dtype=a.dtype,
          watch=a.validate, watch_every=max(1, plan.steps // 8))


class Report:
    """What every stage is judged by: pictures, their scores, the gap to the base (Fig. 4a), the validation
    loss."""

    def __init__(self, a: Alignment, count: int, previews: int, cfg_scale: float | None):
        self.a = a
        self.count = count                                           # pictures to score
        self.previews = previews                                     # pictures to show
        self.cfg_scale = cfg_scale
        self.scorer = pick_scorer(a.data.source) if count else None
        self.rows = []
        self.images = []
        self.gaps = {}

    def add(self, stage: str, model):
        """Draw and score the model as it is after a stage, and print the row."""
        a = self.a
        row = {"stage": stage}
        drawn = max(self.previews, self.count)
        if drawn:
            y, titles = a.data.previews(drawn)
            ae = a.data.autoencoders[model.cfg.ae]
            images = draw_previews(model, ae, y, a.seed, self.cfg_scale, a.dtype)
            self.images.append(images[: self.previews])
            if self.scorer:
                row |= self.scorer(images, y, titles)
        if model is a.model:
            self.gaps[stage] = self.gap(model)
            row["gap"] = sum(self.gaps[stage]) / len(self.gaps[stage])
            row["val_loss"] = a.validate()["val_loss"]
        self.rows.append(row)
        a.run.log(row)
        cells = [f"{key} {value:.3f}" for key, value in row.items() if key != "stage"]
        print("  " + ", ".join([stage, *cells]), flush=True)

    def gap(self, model) -> list[float]:
        """The gap of every layer to the target of Eq. 1, on clean latents of 64 unseen pictures."""
        a = self.a
        z_dc = a.data.val_latents[model.cfg.ae][:64]
        z_base = a.data.val_latents[a.base.cfg.ae][:64]              # as the target reads them
        y = a.objective.with_guidance(a.data.val_conditions[:64], torch.zeros(len(z_dc)))
        frozen = next(model.blocks[0].parameters()).dtype
        with autocast(a.device, a.dtype if frozen != torch.float32 else torch.float32):
            return layer_gap(model, a.target, z_dc, z_base, y)

    def write(self, facts: dict[str, str]):
        """Print the table of gaps; write the pictures and the plot of the gaps."""
        print("\n" + gap_table(self.gaps))
        print("[|| g - pool(h) || / || pool(h) - its mean || per layer, clean latents of 64 unseen pictures; "
              "0 = the base's own features]\n")
        if get_rank() > 0:
            return
        plot_gap(self.a.run.folder / "gap.png", self.gaps)
        if self.previews:
            grid = [(self.title(row), images) for row, images in zip(self.rows, self.images)]
            titles = self.a.data.previews(self.previews)[1]
            save_grid(self.a.run.folder / "samples.png", grid, titles, facts)

    def title(self, row: dict) -> str:
        title = row["stage"].replace(": ", "\n").replace(" in ", "\nin ")
        for score in ("all", "accuracy"):
            if score in row:
                return f"{title}\n{row[score]:.0%} right"
        return title


# ---- main ----------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(__doc__, "[--base NAME|RUN] [--images DIR]")
    add_model_args(p)
    add_data_args(p)
    plan = add_plan_args(p, "stage 2")
    plan.add_argument(
        "--stage2-steps", type=at_least(int, 0),
        help="steps of embedder and head together (default: the recipe's); 0 = none")
    plan.add_argument("--lr2", type=positive, help="learning rate")
    plan.add_argument(
        "--hold", type=at_least(float, 0), metavar="WEIGHT",
        help="of Eq. 1 beside the flow loss (default: the recipe's after closed forms, else 0, as in the "
             "paper)")
    stages = p.add_argument_group("stage 1, and the head before stage 2")
    stages.add_argument(
        "--solver", default="closed-form", choices=("closed-form", "adamw"),
        help="how stage 1, and the head before stage 2, find their optimum (default closed-form)")
    stages.add_argument(
        "--stage1-steps", type=at_least(int, 0),
        help="AdamW steps of stage 1 (default: the recipe's); 0 = no stage 1, by either solver")
    stages.add_argument("--lr1", type=positive, help="its learning rate (default: the recipe's)")
    stages.add_argument(
        "--match", choices=MATCHES,
        help="Eq. 1 against the base's embeddings averaged over each new cell; with the new ones brought up "
             "to the base's grid (by AdamW); or against those of the resized, smaller picture (default: the "
             "recipe's)")
    stages.add_argument(
        "--head-samples", type=at_least(int, 0), default=8192,
        help="closed form: noisy samples for the head; 0 = leave it random (default 8192)")
    stages.add_argument(
        "--head-only", action="store_true",
        help="stage 2 leaves the embedder alone, as the closed form does: to compare the two")
    p.add_argument(
        "--count", type=at_least(int, 0), default=128,
        help="pictures a stage for its scores; 0 = no scores (default 128)")
    return p


def deep_config(base_cfg, args):
    """The configuration that the flags ask for, of a base's on the next latent space; the flags that it
    settles get their values. ValueError for what does not fit."""
    recipe = recipe_of(base_cfg)
    ae = next_autoencoder(args.ae, base_cfg, args.base)
    args.ae = ae.name
    args.pos_step = args.pos_step or recipe.pos_step
    args.shift = recipe.shift if args.shift is None else args.shift
    # a base that is a deep run has spread positions already, so steps multiply
    pos_step = args.pos_step * getattr(base_cfg, "pos_step", 1.0)
    cfg = resized(to_deep_latent(base_cfg, ae, pos_step, args.shift), args.res, args.text_tokens)
    args.res = cfg.res
    args.match = args.match or default_match(base_cfg, cfg)
    return cfg


def default_match(base_cfg, cfg) -> str:
    """What Eq. 1 compares for a deep model of this configuration: the recipe's; the average where tokens do
    not become fewer, so that no smaller picture has as many."""
    fits = token_pixels(cfg) % token_pixels(base_cfg) == 0
    return recipe_of(base_cfg).match if fits else "downsample"


def settled_objective(cfg, args) -> Objective:
    """The objective that the flags ask for; those that it settles get its values."""
    objective = pick_objective(cfg, args.objective, args.guidance_range, args.t_sampling, args.label_dropout)
    args.objective = objective.name
    args.guidance_range = objective.guidance and list(objective.guidance)
    return objective


def settled_plans(recipe: Recipe, args) -> tuple[Plan, Plan]:
    """The plans of stages 1 and 2 that the flags ask for; those that they settle get their values."""
    if args.solver == "closed-form" and args.match == "upsample":
        raise ValueError(f"--match {args.match} has no closed form here; use --solver adamw")
    if head_is_solved(args) and args.stage2_steps is None:
        args.stage2_steps = recipe.joint_steps
    if args.hold and args.head_only:
        raise ValueError(f"--hold {args.hold:g}: with --head-only nothing learns from Eq. 1; leave one out")
    if args.hold is None:
        # what stage 1 has not reached is not to be held; a run from before this flag goes on without it
        reached = head_is_solved(args) and args.stage1_steps != 0 and not args.head_only and not args.resume
        args.hold = recipe.hold if reached else 0.0
    stage1 = planned(recipe.stage1, args, steps="stage1_steps", lr="lr1")
    stage2 = planned(recipe.stage2, args, steps="stage2_steps", lr="lr2", **PLAN_FLAGS)
    return replace(stage1, betas=stage2.betas, save_every=stage2.save_every), stage2


def head_is_solved(args) -> bool:
    """Whether stage 2 begins from the head's closed form."""
    return args.solver == "closed-form" and args.head_samples > 0


def note_export(cfg):
    reason = exportable(cfg)
    if reason:
        print(f"note: diffusers has no such model, sample.py --export will refuse it: {reason}")


def main(argv=None):
    args = parser().parse_args(argv)
    device = init_distributed(args.device)
    if args.resume:
        resume_flags("align", args, parser().typed(argv))
    if args.recipe:
        return print_recipe(args.base)
    with open_run(f"align-{Path(args.base).name}", args.out, args.resume) as run:
        align(args, run, device)
    destroy_distributed()


def align(args, run: Run, device: torch.device):
    """Stages 1 and 2, from the flags to the files of the run."""
    begun = time.perf_counter()
    dtype = settle_dtype(args)

    # what is wrong with flags and pictures shows before any weights are read
    check_paths(args, *PATHS)
    base_cfg, base_info = read_base_config(args.base)
    recipe = recipe_of(base_cfg)
    cfg = deep_config(base_cfg, args)
    objective = settled_objective(cfg, args)
    stage1, stage2 = settled_plans(recipe, args)
    settings = data_settings(args, cfg, recipe.pictures)
    pictures = open_pictures(cfg, base_info, settings)

    # a finished model, and the same trunk on the latents of a deeper autoencoder (Sec. 3.1)
    base, info = load_base(args.base, args.weights, device, dtype=None)
    prepare_for_training(base, [], device)
    cfg = deep_config(base.cfg, args)                                # its file may have said more
    torch.manual_seed(args.seed)
    model = to_deep_model(base, cfg).to(device)
    prefixes = trainable_prefixes(model, args.final_adaln)
    prepare_for_training(model, [name for name, _ in named_parameters_with(model, prefixes)], device)

    # the same pictures in both latent spaces
    weights = {base.cfg.ae: args.base_ae_weights or info.get("ae_weights"), cfg.ae: args.ae_weights}
    target = target_of(base, cfg, args.match)
    sizes = {base.cfg.ae: target.cfg.res} if args.match == "resize" else None
    with rank0_first():
        data = open_data(cfg, pictures, weights, settings, device, dtype, sizes)
    base.null = model.null = data.null
    run.settle("align", args, {"base weights": info["base_print"], **data.cache.facts()})
    a = Alignment(base, target, args.match, model, data, objective, run, device, dtype, args.seed)
    # only the bundled pictures have something that scores them
    report = Report(a, args.count if not args.images else 0, preview_count(args, model), args.cfg_scale)
    tokens = [(cfg.res // ae_config(c.ae).f // c.patch_size) ** 2 for c in (base.cfg, cfg)]
    print(f"{args.base}: {base.cfg.ae} patch {base.cfg.patch_size}, {tokens[0]} tokens -> "
          f"{cfg.ae} patch {cfg.patch_size}, {tokens[1]} tokens; "
          f"{len(data.cache)} pictures, {dtype} -> {run.folder}")
    note_export(cfg)
    report.add("base", base)
    report.add("not aligned", model)

    # stage 1: the embedder learns the base's embeddings (Eq. 1)
    if stage1.steps == 0:
        print("no stage 1: the embedder stays random")
    else:
        if args.solver == "closed-form":
            align_embedder_exactly(a)
        else:
            align_embedder_by_adamw(a, stage1)
        report.add("stage 1: embedder", model)

    # stage 2: embedder and head learn the flow in the new latent space, the trunk frozen (Eq. 2)
    if head_is_solved(args):
        align_head_exactly(a, args.head_samples)
        report.add("head in closed form", model)
    if stage2.steps:
        # of the two prefixes the second is the head's
        align_embedder_and_head(a, stage2, prefixes[1:] if args.head_only else prefixes, args.hold)
        report.add("stage 2: embedder and head", model)

    # finish: tables and pictures, and the weights last
    steps = 0
    if args.solver == "closed-form":
        # samples that the head's closed form has seen, counted as if they were steps of stage 2
        steps += math.ceil(args.head_samples / stage2.batch)
    else:
        steps += stage1.steps
    info |= dict(kind="align", model=config_dict(cfg), classes=list(data.source.classes), images=args.images,
                 captions=args.captions, ae_weights=args.ae_weights, objective=objective.name,
                 match=args.match, steps=steps + stage2.steps, stages=report.rows, gaps=report.gaps)
    report.write({"seed": str(args.seed), "cfg_scale": str(args.cfg_scale)})
    write_run(run, info, named_parameters_with(model, prefixes))
    print(f"{(time.perf_counter() - begun) / 60:.1f} min, peak memory {peak_gib(device):.1f} GiB; "
          f"wrote {run.folder}/ ({run.files()})")


if __name__ == "__main__":
    run_main(main)
