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
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from autoencoder import AUTOENCODERS, ae_config, load_autoencoder
from data import Buckets, LatentCache, bucket_sizes, cache_prompts, open_source, order, read_prompts, write_json
from evaluate import gap_table, layer_gap, pick_judge
from model import BASES, FluxConfig, SanaConfig, Text, atomic, cat_conditions, choose_conditions, config_dict, deepen, run, to_deep_latent, write_tensors
from sample import (SHIFTS, Chain, add_model_args, ddpm_loss, device_here, dtype_of, generate, latent_size, load_base, path, peak_gib, preset_of, resolve_shift, sample_t,
                    save_grid, settings, text_folder, timed, with_guidance)


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
    return choose_conditions(drop, model.null_condition(y), y)


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


# ---- several processes -------------------------------------------------------------------------------------------------------
# torchrun starts one a GPU. Each runs the whole script on its own parts of every batch; the gradients are added up. With DDP
# everybody holds the whole model; with FSDP2 a share of it, and a block is gathered when it is its turn. Only the first
# process writes and speaks. If one fails, torchrun ends the others.

def processes() -> tuple[int, int]:
    """This process's number, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device: str) -> torch.device:
    """Meet the others, if torchrun started this process. Returns the device to work on."""
    device = torch.device(device_here(device))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return device


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def of_the_first(f):
    """What f() returns on the first process, on all of them; it runs there only."""
    rank, count = processes()
    found = [f() if rank == 0 else None]
    if count > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


@contextmanager
def first_goes_first():
    """The first process does what is inside, and the others after it: they find the caches filled."""
    rank, count = processes()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if count > 1 else None   # encoding takes hours
    if rank:
        dist.barrier(patient)
    yield
    if count > 1 and rank == 0:
        dist.barrier(patient)


def anywhere(flag: bool) -> bool:
    """Whether it holds on any process. All ask at the same time, so all get one answer."""
    flag = torch.tensor(float(flag))
    if processes()[1] > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def from_everywhere(sums: dict[str, list]) -> dict[str, list[float]]:
    """The numbers that every process has noted, together."""
    mine = {k: [float(x) for x in v] for k, v in sums.items()}
    found = [mine]
    if processes()[1] > 1:
        dist.all_gather_object(found := [None] * processes()[1], mine)
    return {k: [x for part in found for x in part.get(k, [])] for k in dict.fromkeys(k for part in found for k in part)}


def add_up(tensors: list[Tensor]):
    """Replace every tensor by its sum over the processes, in one message. Shares of FSDP are left: it adds up its own."""
    tensors = [t for t in tensors if not isinstance(t, DTensor)]
    if processes()[1] > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def begin_alike(params: list[Tensor]):
    """Everybody takes the first process's values; from there on equal gradients keep them equal."""
    for p in params if processes()[1] > 1 else ():
        if not isinstance(p, DTensor):
            dist.broadcast(p.data, src=0)


def whole(t: Tensor) -> Tensor:
    """A tensor with the shares of all processes, who all have to ask."""
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def as_it_lies(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the other one's device, or this process's share of it where the other is a share."""
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full


@contextmanager
def holding(params: list[Tensor], values: list[Tensor]):
    """The parameters with these values in their place; afterwards they have their own again."""
    own = [p.detach().clone() for p in params]

    @torch.no_grad()
    def put(tensors):
        for p, t in zip(params, tensors):
            p.copy_(t)
    put(values)
    try:
        yield
    finally:
        put(own)


BIG = 1e9                                                            # parameters, from which on memory is what counts


def size_of(model) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def settle(model, trained: list[str], device, frozen: torch.dtype | None = None, recompute: bool | None = None,
           shard: bool = False) -> dict[str, nn.Parameter]:
    """Make a model ready to train where it is big: returns its parameters by name (sharded, they are other objects).

    frozen     type of the blocks' frozen weights; everything else is float32, what trains and what is small
    recompute  keep only the inputs of a block, and run it again in the backward pass (activation checkpointing)
    Defaults: bf16 and yes from BIG parameters on, as it was trained and no below.   shard: FSDP2"""
    big = size_of(model) > BIG
    in_blocks = {id(p) for block in model.blocks for p in block.parameters()}
    frozen = frozen or (torch.bfloat16 if big else torch.float32)
    for k, p in model.named_parameters():
        p.requires_grad_(k in trained)
        p.data = p.data.to(device, frozen if id(p) in in_blocks and k not in trained else torch.float32)
    if big if recompute is None else recompute:
        for block in model.blocks:                                   # no dropout anywhere: nothing random to repeat
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if shard and processes()[1] > 1:
        mesh = init_device_mesh(torch.device(device).type, (processes()[1],))
        # a block's modulations are read before the block is (model.modulations), so they are gathered by themselves
        modulations = [m for block in model.blocks for name, m in block.named_children() if name.endswith(("mod", "modulation"))]
        for part in (*modulations, *model.blocks, model):
            fully_shard(part, mesh=mesh)
            part.set_gradient_divide_factor(1.0)                     # a plain sum: the loop has divided by the batch
            part.set_force_sum_reduction_for_comms(True)
    return dict(model.named_parameters())


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
        x, clock = model.own_clock(xt, t)
        c = model.condition(clock, y, xt.shape[-2:])
        return model.head_features(model.trunk(model.embed(x), c), c).float()

    for z, t, y, x0 in islice(batches, processes()[0], None, processes()[1]):
        xt, v = path(x0, z, t)
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
            h = features(xt, t, y)
            if guided:
                g = y.guidance.view(-1, 1, 1)
                h = (h + (g - 1) * features(xt, t, unconditional(model, y))) / g
        sums.add(h, model.patchify(model.velocity(v, xt, t)))         # from velocity to output: a sign at most, its own inverse
    sums.add_up()
    sums.mse = sums.loss(*_set(layer, *sums.solve(ridge)))
    return sums


def _set(layer: nn.Module, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    layer.weight.copy_(w.reshape(layer.weight.shape))
    layer.bias.copy_(b)
    return w, b


# ---- the training loop -----------------------------------------------------------------------------------------------------------

def pick(model, prefixes: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names start so: what a stage trains."""
    return [(k, q) for k, q in model.named_parameters() if k.startswith(tuple(prefixes))]


def frozen_dtype(args) -> torch.dtype | None:
    return args.frozen_dtype and {"bf16": torch.bfloat16, "fp32": torch.float32}[args.frozen_dtype]


NO_DECAY = ("embedding_table", "scale_shift_table", "pos_embed")


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float, rate=lambda name: 1.0) -> list[dict]:
    """AdamW groups: weight decay on matrices, none on norms, biases and embeddings (by name: a table of modulations is
    a 2-D tensor too). rate(name): a parameter's share of the learning rate, "rate" in its group."""
    plain = lambda k, p: p.ndim < 2 or any(word in k for word in NO_DECAY)
    groups = {(False, 1.0): [], (True, 1.0): []}
    for k, p in named:
        groups.setdefault((plain(k, p), rate(k)), []).append(p)
    return [dict(params=params, weight_decay=0.0 if bare else weight_decay, rate=share) for (bare, share), params in groups.items()]


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM fills: the loop finishes its step, saves and ends. The old handlers come back."""
    asked, old = [], {}
    if threading.current_thread() is threading.main_thread():
        old = {s: signal.signal(s, lambda *_: asked.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def tensors_of(named, average, opt) -> dict[str, Tensor]:
    """All tensors that the next step depends on, by name, as they lie on this process."""
    flat = {}
    for i, (k, p) in enumerate(named):
        moments = opt.state[p] if p in opt.state else dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p.detach()), exp_avg_sq=torch.zeros_like(p.detach()))
        flat |= {f"weights.{k}": p.detach()} | {f"{moment}.{k}": v for moment, v in moments.items()}
        if average:
            flat[f"average.{k}"] = average[i]
    return flat


def find_state(out: Path, name: str) -> Path | None:
    """The newest whole state of a run: <name>.train, or a folder of shards <name>-<step>.train, in which .metadata is
    written last."""
    files = [out / f"{name}.train", *(d / ".metadata" for d in out.glob(f"{name}-*.train"))]
    files = sorted((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime_ns)
    return None if not files else files[-1].parent if files[-1].name == ".metadata" else files[-1]


def save_state(out: Path, name: str, named, average, opt, facts: dict):
    """Write the state as find_state finds it, then take the older ones away. One file if every process holds all of the
    model; else shards, each process its own."""
    rank, _ = processes()
    file, sharded = out / f"{name}.train", any(isinstance(p, DTensor) for _, p in named)
    facts = facts | dict(sums=from_everywhere(facts["sums"]))
    if sharded:
        file = out / f"{name}-{facts['step']:08d}.train"
        if rank == 0:
            shutil.rmtree(file, ignore_errors=True)
            file.mkdir(parents=True)
            write_json(file / "facts.json", facts)
        dcp.save(tensors_of(named, average, opt), checkpoint_id=file)
    elif rank == 0:
        with atomic(file) as tmp:
            torch.save(dict(weights={k: p.detach().cpu() for k, p in named}, ema=average, optimizer=opt.state_dict(), **facts), tmp)
    if rank == 0:
        for old in {out / f"{name}.train", *out.glob(f"{name}-*.train")} - {file}:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


@torch.no_grad()
def load_state(file: Path, named, average, opt) -> dict:
    """Fill weights, average and optimiser from a state, whatever number of processes wrote it; returns its facts."""
    params = [p for group in opt.param_groups for p in group["params"]]
    if file.is_dir():
        flat, names = tensors_of(named, average, opt), {p: k for k, p in named}
        dcp.load(flat, checkpoint_id=file)
        state = {i: {m: flat[f"{m}.{names[p]}"] for m in ("step", "exp_avg", "exp_avg_sq")} for i, p in enumerate(params)}
        opt.load_state_dict(dict(state=state, param_groups=opt.state_dict()["param_groups"]))
        return json.loads((file / "facts.json").read_text())
    saved = torch.load(file, map_location="cpu", weights_only=True)
    for i, (k, p) in enumerate(named):
        p.copy_(as_it_lies(saved["weights"][k], p))
        if average:
            average[i].copy_(as_it_lies(saved["ema"][i], p))
    state = {i: {m: v if m == "step" else as_it_lies(v, params[i]) for m, v in moments.items()} for i, moments in saved["optimizer"]["state"].items()}
    opt.load_state_dict(dict(state=state, param_groups=saved["optimizer"]["param_groups"]))
    return {k: v for k, v in saved.items() if k not in ("weights", "ema", "optimizer")}


def saved_average(out: Path, name: str, named) -> list[Tensor] | None:
    """The moving average in a run's state, whole, on this process alone; None if it kept none, or made no step."""
    file = find_state(out, name)
    if file is None:
        return None
    if not file.is_dir():
        return torch.load(file, map_location="cpu", weights_only=True)["ema"]
    if not json.loads((file / "facts.json").read_text())["average"]:
        return None
    flat = {f"average.{k}": torch.empty(p.shape) for k, p in named}
    dcp.load(flat, checkpoint_id=file, no_dist=True)
    return list(flat.values())


def train(out: Path, model: nn.Module, named: list[tuple[str, nn.Parameter]], loss_fn, rows: int | Tensor, steps: int, *,
          batch: int, lr: float, info: dict, name: str = "train", betas=(0.9, 0.999), warmup: int = 0,
          schedule: str = "constant", weight_decay: float = 0.0, clip: float | None = None, ema: float | None = None,
          accumulate: int = 1, seed: int = 0, dtype=torch.float32, save_every: int = 500, log_every: int = 25,
          watch=None, watch_every: int = -1, rate=lambda name: 1.0, before=None, seconds: dict | None = None) -> list[dict]:
    """One training run: every stage is this loop with another loss and other trainable parameters. Returns its log.

    named    what is trained; everything else stays as it is.   loss_fn(indices, generator) -> loss, {name: number}
    rows     how many the data set has, or their buckets: see `order`, which says what a step reads
    watch    called as watch(step, averaged) at step 0 (an out-of-memory in the preview shows in the first minute), every
             watch_every steps and at the end; returns {name: number} for the log. On every process: FSDP needs them all.
             averaged: `with averaged():` has the moving average in the weights' place; None where there is none
    rate     share of the learning rate by name (decay_groups).   before(step): called before every step, for what changes
             on the way and is no weight; a function of the step alone, so a resumed run goes on as it was
    seconds  receives the times of all steps and saves

    A batch is cut into at least `accumulate` parts, whose gradients add up; the processes share them out. The noise belongs
    to the part and not to the process, so as many parts give the same run, on any number of processes.

    Writes the state (weights, optimiser, average, step) every save_every steps and at a signal, atomically; if there is
    one, the run goes on from it, to the same numbers. Raises RuntimeError after three non-finite gradients."""
    (rank, count), params = processes(), [p for _, p in named]
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    begin_alike(params)
    opt = torch.optim.AdamW(decay_groups(named, weight_decay, rate), lr=lr, betas=betas)
    average = [p.detach().float().clone() for p in params] if ema else None
    first, bad, log, sums, parts = 0, 0, [], {}, accumulate
    if found := of_the_first(lambda: find_state(out, name)):
        facts = load_state(found, named, average, opt)
        first, log, parts = facts["step"], facts["log"], max(parts, facts.get("parts", 1))
        sums = facts["sums"] if rank == 0 else {}                     # of the log row in the making
        print(f"{found}: going on at step {first}")
    parts = -(-parts // count) * count
    if parts > batch:
        raise ValueError(f"--batch {batch} in {parts} parts for {count} processes: give a larger --batch")
    device, seconds, since = params[0].device, {} if seconds is None else seconds, time.perf_counter()
    averaged = partial(holding, params, average) if ema else None

    def save(step):
        with timed(seconds, "save", device):
            save_state(out, name, named, average, opt, dict(step=step, log=log, sums=sums, parts=parts, average=bool(ema), info=json.dumps(info)))

    with stop_signals() as stop:
        bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=rank > 0)
        for step in bar:
            if watch and (step == 0 or (watch_every > 0 and step % watch_every == 0 and step > first)):
                watching = time.perf_counter()
                log.append(dict(step=step, **watch(step, averaged)))
                since += time.perf_counter() - watching              # looking is not training
            begun, decay = time.perf_counter(), 0.5 + 0.5 * math.cos(math.pi * step / steps) if schedule == "cosine" else 1.0
            now_lr = lr * min(1.0, (step + 1) / max(1, warmup)) * decay
            for group in opt.param_groups:
                group["lr"] = now_lr * group["rate"]
            if before:
                before(step)
            opt.zero_grad(set_to_none=True)
            pieces = order(step, batch, rows, seed).tensor_split(parts)
            for part in range(rank, parts, count):
                g = torch.Generator().manual_seed((seed * 1_000_003 + step) * max(64, parts) + part)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, said = loss_fn(pieces[part], g)
                (loss * len(pieces[part]) / batch).backward()
                for k, v in (dict(loss=loss.detach()) | said).items():
                    sums.setdefault(k, []).append(v)
            add_up([p.grad for p in params if p.grad is not None])
            norm = whole(nn.utils.clip_grad_norm_(params, clip or math.inf))
            if torch.isfinite(norm):
                opt.step()
                bad = 0
            else:
                bad += 1
                print(f"step {step}: the gradient is not finite, step skipped (pictures {pieces[0][:8].tolist()} ...)")
                if bad == 3:
                    raise RuntimeError(f"three non-finite gradients in a row at step {step}; the last good state is {find_state(out, name)}")
            if ema:
                beta = min(ema, (1 + step) / (10 + step))             # a short run must not average its own start
                torch._foreach_lerp_(average, [p.detach().float() for p in params], 1 - beta)
            seconds["steps"] = seconds.get("steps", 0.0) + time.perf_counter() - begun
            if (step + 1) % log_every == 0 or step + 1 == steps:
                now, noted = time.perf_counter(), from_everywhere(sums)
                row = dict(step=step + 1, **{k: float(torch.tensor(v).mean()) for k, v in noted.items()}, lr=now_lr, grad_norm=float(norm),
                           images_per_s=round(len(noted["loss"]) * batch / parts / (now - since), 1))
                if device.type == "cuda":
                    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                log.append(row)
                bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "grad_norm", "images_per_s")})
                sums, since = {}, now
            stopping = anywhere(bool(stop))
            if stopping or (step + 1) % save_every == 0 or step + 1 == steps:
                save(step + 1)
            if stopping:
                raise SystemExit(f"stopped after step {step + 1}, saved in {out}; the same command with --resume goes on" if rank == 0 else 1)
    if watch and first < steps:
        log.append(dict(step=steps, **watch(steps, averaged)))
        save(steps)
    return log


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


def new_run(kind: str, args) -> Path:
    """The folder of a run: --out, the newest unfinished one with --resume, or the next number. A folder that holds a
    finished run is never written over (ValueError). One for all processes."""
    out = of_the_first(lambda: _new_run(kind, args))
    if args.dry_run:
        args.cache = str(out / "cache")                              # it leaves nothing
    return out


def _new_run(kind: str, args) -> Path:
    name = f"{kind}-{Path(args.base).name}"
    if args.dry_run:
        out = Path("runs") / f"dry-run-{name}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        return out
    finished = lambda d: (d / "model.safetensors").exists()
    number = lambda d: int(tail) if (tail := d.name.removeprefix(name + "-")).isdigit() else 0
    runs = sorted((d for d in Path("runs").glob(f"{name}-*") if number(d)), key=number)
    if args.out:
        out = Path(args.out)
    elif args.resume and (open_runs := [d for d in runs if not finished(d)]):
        out = open_runs[-1]
    else:
        out = Path("runs") / f"{name}-{number(runs[-1]) + 1 if runs else 1}"
    if finished(out):
        raise ValueError(f"{out} holds a finished run; give another --out")
    if any(out.glob("*.train")) and not args.resume:
        raise ValueError(f"{out} holds an unfinished run; go on with it by --resume, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", vars(args))
    return out


class Data(NamedTuple):
    """What a stage learns from, and what it is looked at with."""
    ae: dict                                                         # autoencoders by name
    source: object
    cache: LatentCache | Buckets
    condition: Callable[[Tensor], object]                            # rows of the cache (B,) -> their conditions
    val: tuple[dict[str, Tensor], object]                            # latents and conditions that are never trained on
    ask: Callable[[int], tuple]                                      # so many conditions for pictures, and their titles
    null: Text | None


def prepare(args, recipe: dict, weights: dict[str, str | None], cfg, device) -> Data:
    """Autoencoders {name: weight file or None}, pictures, latents and conditions for a model of this configuration.
    ValueError if the pictures have not what it is conditioned on."""
    ae = {name: load_autoencoder(name, file, device=device) for name, file in weights.items()}
    captions, own, cache_dir = (args.captions or "txt") if cfg.encoders else None, settings(cfg, preset_of(args.base)), args.cache
    source, val = (open_source(args.images, cfg.res, split, captions) for split in ("train", "val"))
    if not cfg.encoders and (len(source.classes) > cfg.num_classes or not source.classes):
        raise ValueError(f"{args.images or 'the procedural pictures'}: {len(source.classes) or 'no'} classes, and the model has "
                         f"{cfg.num_classes}; give class folders" + (f", at most {cfg.num_classes}" if source.classes else ""))
    if args.images and not cfg.encoders and len(source.classes) < cfg.num_classes and not source.numbered:
        print(f"note: {args.images} has {len(source.classes)} class folders, the model {cfg.num_classes} classes: they are taken for its first ones, in "
              "alphabetical order; if they are others, name every folder by the number of its class")
    if args.flip and cfg.encoders and not args.images:
        raise ValueError("--flip: the captions of the procedural pictures tell left from right")
    count = 16 if args.dry_run else args.pictures or (None if args.images else recipe["pictures"])
    if args.buckets and not args.dry_run:
        if not args.images or args.pictures:
            raise ValueError("--buckets sorts all pictures of a folder by shape: give --images DIR, and leave out --pictures")
        unit = math.lcm(*(a.cfg.f for a in ae.values()), ae[cfg.ae].cfg.f * cfg.patch_size)
        cache = Buckets([LatentCache(cache_dir, part, list(ae.values()), flip=args.flip, device=device) for part in source.by_shape(bucket_sizes(cfg.res, unit))])
    else:
        cache = LatentCache(cache_dir, source, list(ae.values()), count, args.flip, device=device)
    rows = LatentCache(cache_dir, val, list(ae.values()), 16 if args.dry_run else 256, device=device)
    z = {name: latents.to(device) for name, latents in rows.batch(torch.arange(len(rows)))[0].items()}
    if cfg.encoders is None:
        ask = lambda n: ((y := torch.arange(n) % cfg.num_classes), class_names(source.classes, y.tolist()))
        return Data(ae, source, cache, lambda r: cache.labels[r].to(device), (z, rows.labels.to(device)), ask, None)

    prompts = read_prompts(args.prompts) if args.prompts else rows.captions()
    every = [*prompts, *rows.captions(), *cache.captions()]
    folder = text_folder(args.base, cfg.encoders, own["text"], args.text_encoders, args.weights)
    text = cache_prompts(cfg.encoders, folder, every, cfg.text_tokens, cache=cache_dir, dtype=dtype_of(args), device=device)
    first, n = len(prompts), len(prompts) + len(rows)

    def ask(count):
        r = torch.arange(count) % first
        return with_guidance(text[r], own["guidance"]), [prompts[i] for i in r]

    return Data(ae, source, cache, lambda r: text[r + n].to(device), (z, text[torch.arange(first, n)].to(device)), ask, text.null)


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


def add_data_args(p: argparse.ArgumentParser):
    """The flags that stages 2 and 3 share: data and objective."""
    p.add_argument("--ae", metavar="NAME", help=f"autoencoder to move to: {', '.join(AUTOENCODERS)} (default: the recipe's, or the aligned run's)")
    p.add_argument("--ae-weights", metavar="FILE", help="its weight file (default: shipped, or the model hub's cache)")
    p.add_argument("--images", metavar="DIR", help="folder of pictures (default: procedural shapes)")
    p.add_argument("--pictures", type=int, help="use so many of them (default: the recipe's, or all of a folder)")
    p.add_argument("--flip", action="store_true", help="mirrored pictures as well")
    p.add_argument("--buckets", action="store_true", help="pictures of a folder in their own shapes, a batch of one shape each, not cropped to squares")
    p.add_argument("--captions", metavar="TEMPLATE", help="captions made of the names of class folders, as 'a photo of a {}' (default: the folder's metadata.jsonl, "
                   "else the .txt beside each picture)")
    p.add_argument("--text-tokens", type=int, help="prompt tokens kept (default: the base's; FLUX 512, of which the authors' guides take 256)")
    p.add_argument("--text-encoders", metavar="DIR", help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")
    p.add_argument("--prompts", metavar="FILE", help="prompts of the preview pictures, one a line (default: captions of validation pictures)")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                   help="run blocks again in the backward pass instead of keeping their activations (default: yes from 1e9 parameters on)")
    p.add_argument("--frozen-dtype", choices=("bf16", "fp32"), help="of frozen blocks (default: bf16 from 1e9 parameters on, else fp32)")
    p.add_argument("--objective", choices=(*LOSSES, "ddpm"),
                   help="flow matching; guided flow matching, for distilled models; DDPM's epsilon with a learned variance, for DiT (default: guided for a distilled base, else flow)")
    p.add_argument("--guidance-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="of the guidance that a distilled model is told (default: the recipe's, 1 to 14)")
    p.add_argument("--cache", default="runs/cache", metavar="DIR", help="where latents and encoded prompts are kept (default runs/cache)")
    p.add_argument("--pos-step", type=float, help="distance of neighbouring tokens in the new position table, in tokens of the base; 1 = as the authors, "
                   "2 = spread over the base's places (default: the recipe's; DiT 2, FLUX 1; SANA has no positions)")
    p.add_argument("--final-adaln", action=argparse.BooleanOptionalAction, default=True,
                   help="stages 2 and 3 train DiT's final modulation as a part of the head, as the authors do (default yes)")
    p.add_argument("--label-dropout", type=float, default=0.1, help="share of conditions replaced by the null one (default 0.1)")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999), metavar="B", help="AdamW's (default 0.9 0.999; the authors' guides use 0.9 0.95)")
    p.add_argument("--t-sampling", default="logit-normal", choices=("logit-normal", "uniform"), help="distribution of training times (default logit-normal)")
    p.add_argument("--cfg-scale", type=float, help="guidance of the preview pictures (default: the model's own; DiT 3)")
    p.add_argument("--dry-run", action="store_true", help="all of it with 16 pictures and one step: print what it takes, leave that as a note in runs/, and stop")
    p.add_argument("--save-every", type=int, default=500, help="steps between resumable states (default 500)")
    p.add_argument("--resume", action="store_true", help="go on with --out, or with the newest unfinished run of this kind")


def sized(cfg, args):
    """A configuration at the size of pictures and the length of prompts that were asked for; the run keeps both."""
    length = args.text_tokens
    if length is not None and (length < 1 or not cfg.encoders):
        raise ValueError(f"--text-tokens {length}: " + ("at least 1" if cfg.encoders else "this model reads classes, not prompts"))
    return replace(cfg, res=args.res or cfg.res, **(dict(text_tokens=length) if length else {}))


def new_step(asked: float | None, recipe: dict, cfg) -> float:
    """Distance of neighbouring tokens in a deeper model's position table: so many tokens of the base, which are its own step apart."""
    return (asked or recipe["pos_step"]) * getattr(cfg, "pos_step", 1.0)


def draw(model, ae, cond, seed: int, cfg_scale: float | None, shift: float | str, dtype, base: str) -> Tensor:
    """Preview pictures of these conditions, seeds seed + i, as the settings of the base's preset have it. The same noise
    within a latent space."""
    own = settings(model.cfg, preset_of(base), cfg_scale=cfg_scale)
    sampler = "ddim" if model.cfg.predict == "epsilon" else own["sampler"]
    return generate(model, ae, cond, [seed + i for i in range(len(cond))], own["num_steps"], own["cfg_scale"], sampler, shift, dtype=dtype)


def shift_of(rule: str | float, cfg) -> tuple[float, str | float]:
    """The shift of training times for a model, and what a run writes down: the number, or the rule's name, which gives
    another number at another size. ValueError for a bad one."""
    grid = latent_size(cfg, ae_config(cfg.ae), (cfg.res, cfg.res))
    shift = resolve_shift(rule, cfg.in_channels, *grid, cfg.patch_size)
    return shift, rule if rule in SHIFTS else shift


def guidance_limits(args, recipe: dict, cfg) -> tuple[float, float] | None:
    """The range of guidance that a distilled model is told while it trains; None for others. ValueError for no range."""
    if not getattr(cfg, "guidance_embed", False):
        return None
    low, high = args.guidance_range or recipe["guidance"]
    if not 1 <= low <= high:
        raise ValueError(f"--guidance-range {low:g} {high:g}: from 1 (no guidance) upwards")
    return low, high


def class_names(names, y: list[int]) -> list[str]:
    """Titles of pictures of these classes; a folder may name fewer classes than the model has."""
    return [str(names[k]) if k < len(names) else str(k) for k in y]


def write_run(out: Path, info: dict, named, log: list[dict], dtype=torch.float32, state: str = "train", carried=()):
    """A finished run: what it trained (and its moving average) as safetensors with its facts, and its log. carried: what
    an earlier run had trained and this one left alone; no base has it, so it travels on."""
    rest, trained = ({k: whole(p).to(dtype) for k, p in part} for part in (carried, named))
    if processes()[0]:
        return
    if average := saved_average(out, state, named):
        write_tensors(out / "ema.safetensors", rest | {k: s.to(dtype) for (k, _), s in zip(named, average)}, info)
    with atomic(out / "metrics.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in log))
    write_tensors(out / "model.safetensors", rest | trained, info)


def note_dry_run(out: Path, model, named, seconds: dict, batch: int, ema: bool, device, name: str = "train"):
    """What a dry run has measured, printed and noted beside its folder, which goes away."""
    size, state = lambda params: sum(p.nbytes for p in params) / 1e9, find_state(out, name)
    own, files = size(p for _, p in named), [f for f in (state.rglob("*") if state.is_dir() else [state]) if f.is_file()]
    count = lambda params: f"{sum(p.numel() for p in params) / 1e6:,.2f}M"
    rows = [("parameters", f"{count(p for _, p in named)} trained, {count(model.parameters())} in all"),
            ("weights", f"{size(model.parameters()) - own:.3f} GB frozen, {own:.3f} GB trained"),
            ("beside them", f"gradients {own:.3f} GB, optimizer {2 * own:.3f} GB" + (f", average {own:.3f} GB" if ema else "")),
            ("a step", f"{seconds['steps']:.2f} s with {batch} pictures, the first one"),
            ("a save", f"{seconds['save']:.2f} s, {sum(f.stat().st_size for f in files) / 1e9:.3f} GB"),
            ("8 pictures", f"{seconds['pictures']:.2f} s"),
            ("peak memory", f"{peak_gib(device):.2f} GiB, of everything in this run")]
    text, note = "\n".join(f"{what:14}{said}" for what, said in rows), out.with_name(f"{out.name}.txt")
    with atomic(note) as tmp:
        tmp.write_text(text + "\n")
    shutil.rmtree(out)
    print(f"{text}\nwrote {note}")


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
    model = deepen(base, cfg).to(device)
    settle(model, [k for k, _ in pick(model, ends(model, args.final_adaln))], device, frozen_dtype(args), args.recompute)
    tokens = lambda m, z: z.shape[-1] * z.shape[-2] // m.cfg.patch_size**2
    print(f"{args.base}: {old} patch {base.cfg.patch_size}, {tokens(base, z_base)} tokens -> {new} patch 1, {tokens(model, z_dc)} tokens; "
          f"{len(cache)} pictures, {dtype} -> {out}")
    judge = pick_judge(source) if args.count and not args.images else None   # they know the procedural pictures only
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
