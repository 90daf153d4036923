"""The training loop of all three stages, and what a run is made of.

    train        one loop: set the rate, accumulate gradients, clip, step, average, log, save
    state        EMA; one safetensors file from which a killed run resumes to the same numbers
    ranks        torchrun starts one process a GPU; gradients are summed, or FSDP2 shards the model
    memory       frozen weights may be bf16, blocks may be recomputed, the model may be sharded
    runs         a folder each in runs/; model.safetensors is written last: a folder that has it is finished
    data         latents and conditions of a run, and the flags that the training scripts share

The three stages differ in loss and in what is trainable, so these are arguments. Ablations enter by two
hooks, `on_step` and `lr_scale`.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from autoencoder import AUTOENCODERS, ae_config
from checkpoints import atomic, load_autoencoder, read_config, read_tensors, write_json, write_tensors
from data import LatentCache, cache_prompts, open_source, order, read_prompts, text_folder
from model import Text
from sample import choose_sampling, device_here, generate, latent_size, resolve_shift, with_guidance


# ---- the loop ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """The numbers of one stage: a column of the paper's Table 7."""
    steps: int
    lr: float
    batch: int                              # samples a step, over all ranks
    warmup: int = 0                         # steps of linear warm-up
    schedule: str = "constant"              # of the rate; "cosine" and "linear" fall to zero over the run
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0               # on matrices only
    clip: float | None = None               # limit of the gradient norm
    ema: float | None = None                # decay of the moving average
    accumulate: int = 1                     # microbatches a step
    save_every: int = 500
    log_every: int = 25

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        done = step / self.steps
        decay = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1.0 - done}
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * decay[self.schedule]


def train(out: Path, name: str, model: nn.Module, named: list[tuple[str, nn.Parameter]], loss_fn,
          num_samples: int, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float32, watch=None,
          watch_every: int = -1, on_step=None, lr_scale=None) -> tuple[list[dict], Callable]:
    """Train `named`, parameters of the model by name, and leave everything else as it is. Returns the log,
    and a context manager inside which the moving average stands in the place of the weights.

    loss_fn      (indices, generator) -> scalar loss, {metric: number}; indices are below num_samples
    dtype        of autocast
    watch        (step, averaged) -> {metric: number} for the log: at step 0, every watch_every steps and at
                 the end, on every rank; `with averaged():` evaluates the moving average
    on_step      called with every step's number before it is made
    lr_scale     name -> share of the learning rate of that parameter (default: all 1)

    A batch is cut into microbatches, at least `plan.accumulate`, which the ranks share; gradients add up.
    Noise belongs to the microbatch and not to the rank, so equally many microbatches give the same run on any
    number of ranks.

    Writes <out>/<name>.state.safetensors every save_every steps and after Ctrl-C or SIGTERM; if there is one,
    the run continues from it, to the same numbers. Raises RuntimeError after three non-finite gradients in a
    row."""
    rank, world_size = get_rank(), get_world_size()
    params = [p for _, p in named]
    device = params[0].device
    freeze_except(model, params)
    broadcast_parameters(params)
    groups = decay_groups(named, plan.weight_decay, lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas)
    ema = EMA(params, plan.ema) if plan.ema else None
    averaged = ema.swapped_in if ema else nullcontext

    state = TrainState(out / f"{name}.state.safetensors", named, ema, optimizer)
    first = state.load()
    # as many microbatches as the run began with, and a whole number of them for every rank
    state.microbatches = math.ceil(max(plan.accumulate, state.microbatches) / world_size) * world_size
    if state.microbatches > plan.batch:
        raise ValueError(f"--batch {plan.batch} in {state.microbatches} microbatches for {world_size} ranks: "
                         "give a larger --batch")

    bad_steps = 0
    since = time.perf_counter()
    with stop_signals() as stop:
        bar = tqdm(range(first, plan.steps), initial=first, total=plan.steps, desc=name, disable=rank > 0)
        for step in bar:
            # evaluate: at step 0 too, so that an out-of-memory of the previews shows in the first minute
            if watch and state.watch_is_due(step, watch_every):
                begun = time.perf_counter()
                state.log_watch(step, watch(step, averaged))
                since += time.perf_counter() - begun                 # not training time

            # set the rate
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(step) * group["scale"]
            if on_step:
                on_step(step)

            # accumulate gradients over this rank's microbatches, then over the ranks
            optimizer.zero_grad(set_to_none=True)
            batch = order(step, plan.batch, num_samples, seed).tensor_split(state.microbatches)
            for i in range(rank, state.microbatches, world_size):
                generator = noise_of(step, i, state.microbatches, seed)
                with autocast(device, dtype):
                    loss, metrics = loss_fn(batch[i], generator)
                (loss * len(batch[i]) / plan.batch).backward()
                state.note(loss=loss.detach(), **metrics)
            all_reduce_sum([p.grad for p in params if p.grad is not None])

            # clip, step, average; a step whose gradient is not finite is left out
            norm = full_tensor(nn.utils.clip_grad_norm_(params, plan.clip or math.inf))
            if torch.isfinite(norm):
                optimizer.step()
                bad_steps = 0
            else:
                bad_steps += 1
                report_bad_step(step, bad_steps, batch[0], state.file)
            if ema:
                ema.update(step)

            # log
            last = step + 1 == plan.steps
            if last or (step + 1) % plan.log_every == 0:
                row = state.log_row(step + 1, plan, norm, time.perf_counter() - since, device)
                bar.set_postfix({key: f"{row[key]:.4g}" for key in ("loss", "grad_norm", "images_per_s")})
                since = time.perf_counter()

            # save
            stopping = any_rank(bool(stop))
            if stopping or last or (step + 1) % plan.save_every == 0:
                state.save(step + 1)
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}, saved in {out}; "
                                        "the same command with --resume continues")

    if watch and state.watched < plan.steps:
        state.log_watch(plan.steps, watch(plan.steps, averaged))
        state.save(plan.steps)
    return state.log, averaged


def autocast(device, dtype: torch.dtype):
    """Autocast to dtype; float32 means none."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def noise_of(step: int, microbatch: int, microbatches: int, seed: int) -> torch.Generator:
    """The generator of a microbatch: a function of its place alone, so that resuming needs no generator's
    state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * max(64, microbatches) + microbatch)


def report_bad_step(step: int, bad_steps: int, indices: Tensor, state_file: Path):
    """Print that a step was left out; RuntimeError if it is the third in a row."""
    print(f"step {step}: the gradient is not finite, step skipped (samples {indices[:8].tolist()} ...)")
    if bad_steps == 3:
        raise RuntimeError(f"three non-finite gradients in a row at step {step}; "
                           f"the last good state is {state_file}")


NO_DECAY = ("embedding_table", "scale_shift_table", "pos_embed")


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float, lr_scale=None) -> list[dict]:
    """AdamW groups: weight decay on matrices, none on norms, biases and embeddings (by name: a table of
    modulations is a 2-D tensor too); "scale" in a group is its parameters' share of the learning rate."""
    groups = {}
    for name, p in named:
        decays = p.ndim >= 2 and not any(word in name for word in NO_DECAY)
        scale = lr_scale(name) if lr_scale else 1.0
        groups.setdefault((decays, scale), []).append(p)
    return [dict(params=params, weight_decay=weight_decay if decays else 0.0, scale=scale)
            for (decays, scale), params in groups.items()]


@contextmanager
def stop_signals():
    """A list that fills at the first Ctrl-C or SIGTERM: the loop finishes its step, saves and ends. The
    second one ends the process at once."""
    received = []

    def handle(number, frame):
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt("interrupted")

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---- EMA and the state of a run ------------------------------------------------------------------

class EMA:
    """A moving average of parameters in float32. It warms up: a short run must not average its own start."""

    def __init__(self, params: list[Tensor], decay: float):
        self.params = params
        self.decay = decay
        self.values = [p.detach().float().clone() for p in params]

    @torch.no_grad()
    def update(self, step: int):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self.params], 1 - decay)

    @contextmanager
    def swapped_in(self):
        """The parameters hold the average inside, and their own values again afterwards."""
        own = [p.detach().clone() for p in self.params]
        copy_into(self.params, self.values)
        try:
            yield
        finally:
            copy_into(self.params, own)


@torch.no_grad()
def copy_into(params: list[Tensor], values: list[Tensor]):
    for p, value in zip(params, values):
        p.copy_(value)


class TrainState:
    """Everything that the next step depends on: weights, AdamW's moments, EMA, and how far the run is. One
    safetensors file of whole tensors, whatever number of ranks wrote it, so any number resumes it."""

    def __init__(self, file: Path, named, ema: EMA | None, optimizer):
        self.file = file
        self.named = named
        self.ema = ema
        self.optimizer = optimizer
        self.log = []                       # rows of metrics.jsonl
        self.window = {}                    # metrics since the last row, of this rank
        self.watched = -1                   # the last step that was evaluated
        self.microbatches = 1

    @torch.no_grad()
    def save(self, step: int):
        progress = dict(step=step, log=self.log, window=all_gather_metrics(self.window), watched=self.watched,
                        microbatches=self.microbatches)
        tensors = {}
        for i, (name, p) in enumerate(self.named):
            values = {"weights": p, **self.optimizer.state.get(p, {})}
            if self.ema:
                values["ema"] = self.ema.values[i]
            for kind, value in values.items():
                whole = full_tensor(value)                           # every rank takes part
                if get_rank() == 0:
                    tensors[f"{kind}.{name}"] = whole.cpu()
        if get_rank() == 0:
            write_tensors(self.file, tensors, progress)

    @torch.no_grad()
    def load(self) -> int:
        """Fill everything from the file and return its step; 0 if there is none."""
        if not broadcast_from_rank0(self.file.exists):
            return 0
        progress = read_config(self.file)
        saved = read_tensors(self.file)
        for i, (name, p) in enumerate(self.named):
            p.copy_(shard_like(saved[f"weights.{name}"], p))
            if self.ema:
                self.ema.values[i].copy_(shard_like(saved[f"ema.{name}"], p))
            if f"step.{name}" in saved:                              # a parameter without gradients has none
                self.optimizer.state[p] = {
                    "step": saved[f"step.{name}"].clone(),
                    "exp_avg": shard_like(saved[f"exp_avg.{name}"], p),
                    "exp_avg_sq": shard_like(saved[f"exp_avg_sq.{name}"], p)}
        self.log = progress["log"]
        self.watched = progress["watched"]
        self.microbatches = progress["microbatches"]
        if get_rank() == 0:                                          # it holds the metrics of all ranks
            self.window = progress["window"]
        print(f"{self.file}: continuing at step {progress['step']}")
        return progress["step"]

    def note(self, **metrics):
        """Add a microbatch's metrics to the window: tensors, which are read from the device when a row is
        logged."""
        for key, value in metrics.items():
            self.window.setdefault(key, []).append(value)

    def log_row(self, step: int, plan: Plan, norm: Tensor, seconds: float, device) -> dict:
        """Append the means of the window to the log and empty it."""
        window = all_gather_metrics(self.window)
        row = {"step": step, **{key: float(torch.tensor(values).mean()) for key, values in window.items()}}
        row |= dict(lr=plan.lr_at(step - 1), grad_norm=float(norm))
        row["images_per_s"] = round(len(window["loss"]) * plan.batch / self.microbatches / seconds, 1)
        if device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.log.append(row)
        self.window = {}
        return row

    def watch_is_due(self, step: int, every: int) -> bool:
        return step > self.watched and (step == 0 or (every > 0 and step % every == 0))

    def log_watch(self, step: int, metrics: dict):
        self.log.append({"step": step, **metrics})
        self.watched = step


# ---- ranks ---------------------------------------------------------------------------------------
# torchrun starts one process a GPU, a rank. Each runs the whole script on its own microbatches. Only rank 0
# writes and prints. If one rank fails, torchrun ends the others.

def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str) -> torch.device:
    """Join the process group if torchrun started this process. Returns the device to work on."""
    device = torch.device(device_here(device))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def destroy_distributed():
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_from_rank0(f):
    """Call f on rank 0 only and return its result on every rank."""
    result = [f() if get_rank() == 0 else None]
    if get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


@contextmanager
def rank0_first():
    """Run the block on rank 0, then on the other ranks, which find its caches filled."""
    if get_world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))   # encoding a data set takes hours
    if get_rank() > 0:
        dist.barrier(group)
    yield
    if get_rank() == 0:
        dist.barrier(group)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; a collective, so all ranks get one answer."""
    flag = torch.tensor(float(flag))
    if get_world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def all_gather_metrics(metrics: dict[str, list]) -> dict[str, list[float]]:
    """The metrics of all ranks as numbers, in rank order."""
    own = {key: [float(value) for value in values] for key, values in metrics.items()}
    ranks = [own]
    if get_world_size() > 1:
        ranks = [None] * get_world_size()
        dist.all_gather_object(ranks, own)
    gathered = {}
    for part in ranks:
        for key, values in part.items():
            gathered.setdefault(key, []).extend(values)
    return gathered


def all_reduce_sum(tensors: list[Tensor]):
    """Replace every tensor by its sum over the ranks, in one message. Shards are left: FSDP sums its own
    gradients."""
    tensors = [t for t in tensors if not isinstance(t, DTensor)]
    if get_world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def broadcast_parameters(params: list[Tensor]):
    """Give every rank the values of rank 0; from there on equal gradients keep them equal."""
    if get_world_size() == 1:
        return
    for p in params:
        if not isinstance(p, DTensor):
            dist.broadcast(p.data, src=0)


def full_tensor(t: Tensor) -> Tensor:
    """A tensor with the shards of all ranks, each of which has to call this."""
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor on the device of `like`, or this rank's shard of it where `like` is
    sharded."""
    full = full.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


# ---- memory: what is frozen, recomputed, sharded -------------------------------------------------

BIG = 1e9                                   # parameters, from which on memory is what counts


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def named_parameters_with(model, prefixes: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names start with one of the prefixes."""
    return [(name, p) for name, p in model.named_parameters() if name.startswith(tuple(prefixes))]


def trainable_prefixes(model, final_adaln: bool = True) -> tuple[str, str]:
    """Names of what stages 2 and 3 train in full: the embedder, and the head with or without its
    modulation."""
    return model.EMBEDDER, model.HEAD_TRAINED if final_adaln else model.HEAD


def freeze_except(model: nn.Module, params: list[Tensor]):
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)


def cast_frozen(model: nn.Module, trained: set[str], device, frozen: torch.dtype):
    """Move the model to the device: frozen weights of the blocks in type `frozen`, everything else in
    float32, because what trains needs its digits and the rest is small."""
    in_blocks = {id(p) for block in model.blocks for p in block.parameters()}
    for name, p in model.named_parameters():
        dtype = frozen if id(p) in in_blocks and name not in trained else torch.float32
        p.data = p.data.to(device, dtype)


def checkpoint_blocks(model: nn.Module):
    """Keep only the inputs of a block, and run it again in the backward pass (activation checkpointing)."""
    for block in model.blocks:              # no dropout anywhere: nothing random to repeat
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard_model(model: nn.Module, device):
    """FSDP2: every rank holds a share of the parameters; a block is gathered when its turn comes."""
    mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)    # a plain sum: the loop has divided by the batch
        part.set_force_sum_reduction_for_comms(True)


def prepare_for_training(model: nn.Module, trained: list[str], device, frozen: torch.dtype | None = None,
                         recompute: bool | None = None, shard: bool = False) -> dict[str, nn.Parameter]:
    """Make a model ready to train the parameters of these names, also where it is big: from BIG parameters
    on, frozen blocks are bf16 and recomputed unless frozen and recompute say otherwise. shard: FSDP2, under
    torchrun.
    -> parameters by name (sharded, they are other objects than before)"""
    big = count_parameters(model) > BIG
    if frozen is None:
        frozen = torch.bfloat16 if big else torch.float32
    if recompute is None:
        recompute = big
    by_name = dict(model.named_parameters())
    freeze_except(model, [by_name[name] for name in trained])
    cast_frozen(model, set(trained), device, frozen)
    if recompute:
        checkpoint_blocks(model)
    if shard and get_world_size() > 1:
        shard_model(model, device)
    return dict(model.named_parameters())


# ---- runs: a folder each -------------------------------------------------------------------------

def is_finished(run: Path) -> bool:
    """Whether everything of a run is written: its weights come last."""
    return (run / "model.safetensors").exists()


def new_run(kind: str, base: str, settings: dict, out: str | None = None, resume: bool = False) -> Path:
    """The folder of a run, one for all ranks, with its settings in config.json: `out`; with resume the newest
    unfinished run of this kind and base; or runs/KIND-BASE-N, the next N. ValueError for a folder that holds
    a finished run, or an unfinished one that resume does not ask for."""
    return broadcast_from_rank0(partial(make_run, f"{kind}-{Path(base).name}", settings, out, resume))


def make_run(name: str, settings: dict, out: str | None, resume: bool) -> Path:
    numbers = [d.name.removeprefix(f"{name}-") for d in Path("runs").glob(f"{name}-*")]
    numbers = sorted(int(n) for n in numbers if n.isdigit())
    unfinished = [n for n in numbers if not is_finished(Path("runs") / f"{name}-{n}")]
    if out:
        run = Path(out)
    elif resume and unfinished:
        run = Path("runs") / f"{name}-{unfinished[-1]}"
    else:
        run = Path("runs") / f"{name}-{numbers[-1] + 1 if numbers else 1}"
    if is_finished(run):
        raise ValueError(f"{run} holds a finished run; give another --out")
    if any(run.glob("*.state.safetensors")) and not resume:
        raise ValueError(f"{run} holds an unfinished run; continue it with --resume, or give another --out")
    write_json(run / "config.json", settings)
    return run


def write_run(out: Path, info: dict, named, log: list[dict], averaged=nullcontext, dtype=torch.float32,
              carried=()):
    """Write a run's log, moving average and weights, which come last. info: facts that load_run reads.
    carried: parameters that an earlier run has trained and this one left alone; no base has them, so they
    travel on."""
    @torch.no_grad()
    def gather() -> dict[str, Tensor]:
        """Copies of the whole weights on rank 0's CPU; every rank takes part."""
        tensors = {}
        for name, p in (*carried, *named):
            whole = full_tensor(p)
            if get_rank() == 0:
                tensors[name] = whole.to("cpu", dtype, copy=True)
        return tensors

    if get_rank() == 0:
        with atomic(out / "metrics.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in log))
    if averaged is not nullcontext:
        with averaged():
            average = gather()
        if get_rank() == 0:
            write_tensors(out / "ema.safetensors", average, info)
    trained = gather()
    if get_rank() == 0:
        write_tensors(out / "model.safetensors", trained, info)


# ---- what a run learns from ----------------------------------------------------------------------

class RunData(NamedTuple):
    """Latents and conditions of a run."""
    autoencoders: dict                                               # by name
    source: object                                                   # pictures, their classes or captions
    cache: LatentCache                                               # latents of all autoencoders, by index
    conditions: Callable[[Tensor], object]                           # indices (B,) -> their conditions
    val_latents: dict[str, Tensor]                                   # of pictures that are never trained on
    val_conditions: object
    previews: Callable[[int], tuple]                                 # n -> their conditions, their titles
    null: Text | None                                                # the encoded empty prompt


@dataclass(frozen=True)
class DataSettings:
    """Which pictures and prompts a run uses, and where they are kept encoded; see data_settings."""
    images: str | None
    captions: str | None
    pictures: int | None
    flip: bool
    prompts: str | None
    text_encoders: Path | None
    cache: str


def open_data(cfg, autoencoders: dict[str, str | None], settings: DataSettings, device, dtype) -> RunData:
    """Pictures, latents and conditions for a model of this configuration. autoencoders: {name: weight file or
    None}. ValueError if the pictures lack what the model is conditioned on."""
    aes = {name: load_autoencoder(name, file, device=device) for name, file in autoencoders.items()}
    captions = (settings.captions or "txt") if cfg.text_encoder else None
    source = open_source(settings.images, cfg.res, "train", captions)
    val_source = open_source(settings.images, cfg.res, "val", captions)
    if cfg.text_encoder is None:
        check_classes(source, cfg.num_classes, settings.images)
    elif settings.flip and not settings.images:
        raise ValueError("--flip: the captions of the procedural pictures tell left from right")

    # every picture goes through all autoencoders at once; validation pictures are never trained on
    both = list(aes.values())
    cache = LatentCache(settings.cache, source, both, settings.pictures, settings.flip, device=device)
    val = LatentCache(settings.cache, val_source, both, 256, device=device)
    latents, labels = val.batch(torch.arange(len(val)))
    latents = {name: z.to(device) for name, z in latents.items()}

    if cfg.text_encoder is None:
        def classes(indices):
            return cache.labels[indices].to(device)

        def class_previews(n):
            y = torch.arange(n) % cfg.num_classes
            return y, class_names(source.classes, y.tolist())

        return RunData(aes, source, cache, classes, latents, labels.to(device), class_previews, None)

    # prompts of previews, of validation pictures and of training pictures, encoded together
    shown = read_prompts(settings.prompts) if settings.prompts else val.captions()
    prompts = [*shown, *val.captions(), *cache.captions()]
    texts = cache_prompts(cfg.text_encoder, settings.text_encoders, prompts, cfg.text_tokens,
                          cache=settings.cache, dtype=dtype, device=device)
    first_val = len(shown)
    first_train = first_val + len(val)

    def encoded(indices):
        return texts[indices + first_train].to(device)

    def prompt_previews(n):
        indices = torch.arange(n) % len(shown)
        return with_guidance(texts[indices], cfg.sampling.guidance), [shown[i] for i in indices.tolist()]

    val_text = texts[torch.arange(first_val, first_train)].to(device)
    return RunData(aes, source, cache, encoded, latents, val_text, prompt_previews, texts.null)


def check_classes(source, num_classes: int, images: str | None):
    """ValueError if a class model cannot learn from this source; a note if its classes may be other ones."""
    found = len(source.classes)
    if not 0 < found <= num_classes:
        limit = f", at most {num_classes}" if found else ""
        raise ValueError(f"{images or 'the procedural pictures'}: {found or 'no'} classes, "
                         f"and the model has {num_classes}; give class folders{limit}")
    if images and found < num_classes and not source.numbered:
        print(f"note: {images} has {found} class folders, the model {num_classes} classes: they are taken "
              "for its "
              "first ones, in alphabetical order; if they are others, name every folder by the number of its "
              "class")


def class_names(classes: tuple[str, ...], numbers: list[int]) -> list[str]:
    return [str(classes[k]) if k < len(classes) else str(k) for k in numbers]


# ---- settings that the training scripts share ----------------------------------------------------

def add_data_args(p: argparse.ArgumentParser):
    """The flags of a run's data and objective, for stages 1 to 3."""
    data = p.add_argument_group("pictures and prompts")
    data.add_argument("--images", metavar="DIR", help="folder of pictures (default: procedural shapes)")
    data.add_argument("--pictures", type=int, help="use so many of them (default: the recipe's, all of a "
                                                   "folder)")
    data.add_argument("--flip", action="store_true", help="mirrored pictures as well")
    data.add_argument(
        "--captions", metavar="TEMPLATE",
        help="captions made of the names of class folders, as 'a photo of a {}' (default: the folder's "
             "metadata.jsonl, else the .txt beside each picture)")
    data.add_argument(
        "--text-tokens", type=int,
        help="prompt tokens kept (default: the base's; FLUX 512, of which the authors' guides take 256)")
    data.add_argument(
        "--text-encoders", metavar="DIR",
        help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")
    data.add_argument(
        "--prompts", metavar="FILE",
        help="prompts of the preview pictures, one a line (default: captions of validation pictures)")
    data.add_argument(
        "--cache", default="runs/cache", metavar="DIR",
        help="where latents and encoded prompts are kept (default runs/cache)")

    deep = p.add_argument_group("the new latent space")
    deep.add_argument(
        "--ae", metavar="NAME",
        help=f"autoencoder to move to (default: the recipe's, or the run's): {', '.join(AUTOENCODERS)}")
    deep.add_argument(
        "--ae-weights", metavar="FILE", help="its weight file (default: shipped, or the model hub's cache)")
    deep.add_argument(
        "--pos-step", type=float,
        help="distance of neighbouring tokens in the new position table, in tokens of the base; 1 = as the "
             "authors, 2 = spread over the base's positions (default: the recipe's; DiT 2, FLUX 1)")
    deep.add_argument(
        "--shift",
        help="resolution shift of the times, a number or a rule (sample.py --help), saved with the run; "
             "1 = off (default: the recipe's, or the aligned run's)")

    objective = p.add_argument_group("objective of stages 2 and 3")
    objective.add_argument(
        "--objective", choices=("flow", "guided"),
        help="flow matching (Eq. 2), or guided flow matching (Eq. 7) for distilled models (default: "
             "guided for a distilled base, else flow)")
    objective.add_argument(
        "--guidance-range", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="of the guidance that a distilled model reads (default: the recipe's, 1 to 14)")
    objective.add_argument(
        "--t-sampling", default="logit-normal", choices=("logit-normal", "uniform"),
        help="distribution of training times (default logit-normal)")
    objective.add_argument(
        "--label-dropout", type=float, default=0.1,
        help="share of conditions replaced by the null one (default 0.1)")
    objective.add_argument(
        "--final-adaln", action=argparse.BooleanOptionalAction, default=True,
        help="train DiT's final modulation as a part of the head, as the authors do (default yes)")

    run = p.add_argument_group("the run")
    run.add_argument("--out", metavar="DIR", help="its folder (default: runs/KIND-BASE-N, the next N)")
    run.add_argument(
        "--resume", action="store_true", help="continue --out, or the newest unfinished run of this kind")
    run.add_argument("--save-every", type=int, help="steps between resumable states (default 500)")
    run.add_argument(
        "--cfg-scale", type=float, help="guidance of the preview pictures (default: the model's own; DiT 3)")


def add_plan_args(p: argparse.ArgumentParser, stage: str):
    """The flags that change a stage's Plan; see planned."""
    plan = p.add_argument_group(f"AdamW in {stage} (defaults: the recipe's)")
    plan.add_argument("--batch", type=int, help="samples a step, over all GPUs")
    plan.add_argument("--accumulate", type=int, help="microbatches that a batch is split into (default 1)")
    plan.add_argument(
        "--betas", type=float, nargs=2, metavar="B", help="0.9 0.999; the authors' guides use 0.9 0.95")
    plan.add_argument("--warmup", type=int, help="steps of linear warm-up")
    plan.add_argument(
        "--schedule", choices=("constant", "cosine", "linear"), help="of the rate after the warm-up")
    plan.add_argument(
        "--clip", type=float, help="limit of the gradient norm; -1 = none; the authors' guides use 0.1")
    return plan


def data_settings(args, cfg, pictures: int | None) -> DataSettings:
    """What add_data_args' flags say; pictures: how many procedural ones without --pictures."""
    count = args.pictures
    if count is None and args.images is None:
        count = pictures
    return DataSettings(
        images=args.images, captions=args.captions, pictures=count, flip=args.flip, prompts=args.prompts,
        text_encoders=text_folder(args.base, cfg, args.text_encoders, args.weights), cache=args.cache)


def planned(plan: Plan, **given) -> Plan:
    """The plan with what is given, unless None, in its place; a negative clip and an ema of 0 mean none."""
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("clip", 0) < 0:
        given["clip"] = None
    if given.get("ema") == 0:
        given["ema"] = None
    return replace(plan, **given)


def resized(cfg, res: int | None, text_tokens: int | None):
    """The configuration at another size of pictures and length of prompts; a run keeps both. ValueError for
    bad ones."""
    if text_tokens is not None:
        if cfg.text_encoder is None:
            raise ValueError(f"--text-tokens {text_tokens}: this model reads classes, not prompts")
        if text_tokens < 1:
            raise ValueError(f"--text-tokens {text_tokens}: at least 1")
        cfg = replace(cfg, text_tokens=text_tokens)
    return replace(cfg, res=res or cfg.res)


def training_shift(cfg) -> float:
    """The number of a configuration's resolution shift at its size. ValueError if the size does not fit."""
    H, W = latent_size(cfg, ae_config(cfg.ae), (cfg.res, cfg.res))
    return resolve_shift(cfg.sampling.shift, cfg.in_channels, H, W, cfg.patch_size)


def draw_previews(model, ae, conditions, seed: int, cfg_scale: float | None, dtype) -> Tensor:
    """Preview pictures, seeds seed + i: the same noise every time within a latent space. (B,3,H,W) in
    [-1,1]"""
    sampler = "ddim" if model.cfg.predict == "epsilon" else None
    sampling = choose_sampling(model.cfg, cfg_scale=cfg_scale, sampler=sampler)
    seeds = [seed + i for i in range(len(conditions))]
    return generate(model, ae, conditions, seeds, sampling, dtype=dtype)
