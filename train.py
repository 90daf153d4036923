"""The training loop of all three stages, and what a run is made of.

    train        one loop: set the rate, accumulate gradients, clip, step, average, log, save
    state        EMA; one safetensors file from which a killed run resumes to the same numbers
    ranks        torchrun starts one process a GPU; gradients are summed, or FSDP2 shards the model
    memory       frozen weights may be bf16, blocks may be recomputed, the model may be sharded
    runs         a folder each: settings, lock, log and curves as they grow, the weights last
    data         latents and conditions of a run, and the flags that the training scripts share

The three stages differ in loss and in what is trainable, so these are arguments. Ablations enter by two
hooks, `on_step` and `lr_scale`.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:                         # Windows, where folders are not locked
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from autoencoder import AUTOENCODERS, ae_config
from checkpoints import (
    code_version, load_autoencoder, read_config, read_tensors, write_json, write_tensors)
from data import LatentCache, cache_prompts, check_encoders, open_source, order, read_prompts, text_folder
from evaluate import plot_curves
from flags import (
    at_least, choose_sampling, class_names, device_here, dtype_of, positive, with_guidance, within)
from model import Text, resolve_shift
from sample import generate, latent_size


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
    clip: float = 0.0                       # limit of the gradient norm; 0 = none
    ema: float = 0.0                        # decay of the moving average; 0 = none
    accumulate: int = 1                     # microbatches a step
    save_every: int = 500
    log_every: int = 25

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        done = step / self.steps
        decay = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1.0 - done}
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * decay[self.schedule]


def train(run: "Run", name: str, model: nn.Module, named: list[tuple[str, nn.Parameter]], loss_fn,
          num_samples: int, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float32, watch=None,
          watch_every: int = 0, on_step=None, lr_scale=None) -> tuple[list[dict], Callable]:
    """Train `named`, parameters of the model by name, and leave everything else as it is. Returns the log,
    and a context manager inside which the moving average stands in the place of the weights.

    loss_fn      (indices, generator) -> scalar loss, {metric: number}; indices are below num_samples
    dtype        of autocast
    watch        (step, averaged) -> {metric: number} for the log: at step 0, every watch_every steps (0:
                 never in between) and at the end, on every rank; `with averaged():` evaluates the average
    on_step      called with every step's number before it is made
    lr_scale     name -> share of the learning rate of that parameter (default: all 1)

    A batch is cut into microbatches, at least `plan.accumulate`, which the ranks share; gradients add up.
    Noise belongs to the microbatch and not to the rank, so equally many microbatches give the same run on any
    number of ranks.

    Writes <run>/<name>.state.safetensors every save_every steps and after Ctrl-C or SIGTERM; if there is one,
    the run continues from it, to the same numbers. The rows of the log go to the run as they come. ValueError
    after three non-finite gradients in a row."""
    rank, world_size = get_rank(), get_world_size()
    params = [p for _, p in named]
    device = params[0].device
    freeze_except(model, params)
    broadcast_parameters(params)
    groups = decay_groups(named, plan.weight_decay, lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas)
    ema = EMA(params, plan.ema) if plan.ema else None
    averaged = ema.swapped_in if ema else nullcontext

    state = TrainState(run, name, named, ema, optimizer)
    first = state.load()
    if first > plan.steps:
        raise ValueError(f"{state.file} is of step {first}, and this run has {plan.steps}; "
                         "give another --out")
    # as many microbatches as the run began with, and a whole number of them for every rank
    state.microbatches = math.ceil(max(plan.accumulate, state.microbatches) / world_size) * world_size
    if state.microbatches > plan.batch:
        raise ValueError(f"--batch {plan.batch} in {state.microbatches} microbatches for {world_size} ranks: "
                         "give a larger --batch")

    bad_steps = 0
    since = time.perf_counter()
    with stop_signals() as stop:
        bar = tqdm(range(first, plan.steps), initial=first, total=plan.steps, desc=name,
                   disable=True if rank > 0 else None)               # None: where there is no terminal
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
                with attention_in_training(device):                  # of recomputed blocks too
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
                show_row(bar, row, plan.steps)
                since = time.perf_counter()

            # save
            stopping = any_rank(bool(stop))
            if stopping or last or (step + 1) % plan.save_every == 0:
                state.save(step + 1)
                run.plot()
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}, saved in {run.folder}; "
                                        f"--resume --out {run.folder} continues")

    if watch and state.watched < plan.steps:
        state.log_watch(plan.steps, watch(plan.steps, averaged))
        state.save(plan.steps)
    run.plot()                              # a run may have been killed between its last state and this
    return state.log, averaged


def show_row(bar, row: dict, steps: int):
    """A row of the log on the bar; where there is no terminal, on a line."""
    shown = {key: f"{row[key]:.4g}" for key in ("loss", "grad_norm", "images_per_s")}
    bar.set_postfix(shown)
    if bar.disable or not sys.stdout.isatty():
        numbers = ", ".join(f"{key} {value}" for key, value in shown.items())
        print(f"{row['stage']} {row['step']}/{steps}: {numbers}", flush=True)


def attention_in_training(device: torch.device):
    """On a CPU the fused attention's backward pass in bf16 is slow: with plain products a step of `tiny` on
    16 tokens takes 0.14 s and not 0.35 (torch 2.13, two cores of an Intel Xeon)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def autocast(device, dtype: torch.dtype):
    """Autocast to dtype; float32 means none."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def noise_of(step: int, microbatch: int, microbatches: int, seed: int) -> torch.Generator:
    """The generator of a microbatch: a function of its place alone, so that resuming needs no generator's
    state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * max(64, microbatches) + microbatch)


def report_bad_step(step: int, bad_steps: int, indices: Tensor, state_file: Path):
    """Print that a step was left out; ValueError if it is the third in a row."""
    print(f"step {step}: the gradient is not finite, step skipped (samples {indices[:8].tolist()} ...)")
    if bad_steps == 3:
        raise ValueError(f"three non-finite gradients in a row at step {step}; "
                         f"the last good state is {state_file}; a smaller learning rate or --clip may help")


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

    def __init__(self, run: "Run", name: str, named, ema: EMA | None, optimizer):
        self.run = run
        self.name = name
        self.file = run.folder / f"{name}{STATE}"
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
        for row in self.log:
            self.run.log(row)
        print(f"resuming {self.run.folder} at step {progress['step']} of {self.name}")
        return progress["step"]

    def note(self, **metrics):
        """Add a microbatch's metrics to the window: tensors, which are read from the device when a row is
        logged."""
        for key, value in metrics.items():
            self.window.setdefault(key, []).append(value)

    def log_row(self, step: int, plan: Plan, norm: Tensor, seconds: float, device) -> dict:
        """Append the means of the window to the log and empty it."""
        window = all_gather_metrics(self.window)
        row = {"stage": self.name, "step": step}
        row |= {key: float(torch.tensor(values).mean()) for key, values in window.items()}
        row |= dict(lr=plan.lr_at(step - 1), grad_norm=float(norm))
        row["images_per_s"] = round(len(window["loss"]) * plan.batch / self.microbatches / seconds, 1)
        if device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.log.append(row)
        self.run.log(row)
        self.window = {}
        return row

    def watch_is_due(self, step: int, every: int) -> bool:
        return step > self.watched and (step == 0 or (every > 0 and step % every == 0))

    def log_watch(self, step: int, metrics: dict):
        row = {"stage": self.name, "step": step, **metrics}
        self.log.append(row)
        self.run.log(row)
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


def compile_blocks(model: nn.Module, **options):
    """torch.compile every block, before checkpoint_blocks: a checkpoint is not compiled, what it calls is.
    options: torch.compile's."""
    import torch._dynamo                                             # takes seconds: only where needed
    # the programs of all blocks of a class lie in one cache
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, **options)


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
                         recompute: bool | None = None, shard: bool = False,
                         compiled: bool = False) -> dict[str, nn.Parameter]:
    """Make a model ready to train the parameters of these names, also where it is big: from BIG parameters
    on, frozen blocks are bf16 and recomputed unless frozen and recompute say otherwise. shard: FSDP2, under
    torchrun. compiled: torch.compile every block.
    -> parameters by name (sharded, they are other objects than before)"""
    # cuDNN's masked attention gives NaN gradients at 64 mod 128 keys (pytorch issue 196678)
    if getattr(model.cfg, "text_tokens", 0) % 128 == 64:
        torch.backends.cuda.enable_cudnn_sdp(False)
    big = count_parameters(model) > BIG
    if frozen is None:
        frozen = torch.bfloat16 if big else torch.float32
    if recompute is None:
        recompute = big
    by_name = dict(model.named_parameters())
    freeze_except(model, [by_name[name] for name in trained])
    cast_frozen(model, set(trained), device, frozen)
    if compiled:
        compile_blocks(model)
    if recompute:
        checkpoint_blocks(model)
    if shard and get_world_size() > 1:
        shard_model(model, device)
    return dict(model.named_parameters())


# ---- runs: a folder each -------------------------------------------------------------------------
# config.json                 the flags with every value that was used, facts of the data, versions
# metrics.jsonl, curves.png   the log, a row a line as it comes; its plot, at every save
# STAGE.state.safetensors     what --resume continues from
# ema.safetensors, model.safetensors    at the end; then config.json says that the run is finished

STATE = ".state.safetensors"
# flags of which a resumed run may have others: where it runs, how it is watched, and where things lie, for
# what lies there is compared by fingerprint. Steps may grow.
FREE = {"resume", "out", "device", "parallel", "compile", "save_every", "sample_every", "previews", "cache",
        "prompts", "images", "weights", "ae_weights", "base_ae_weights", "text_encoders"}


class Run:
    """A run's folder, on every rank; rank 0 writes."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rows = []
        if get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def settle(self, script: str, args: argparse.Namespace, facts: dict):
        """Write config.json and print it in a line. facts: what the flags do not say of model and data.
        ValueError if this run began with others."""
        if args.resume:
            old = read_settings(self.folder)
            check_facts(self.folder, old["facts"], json.loads(json.dumps(facts)))
            if versions() != old["versions"]:
                print(f"note: {self.folder} began with {old['versions']}; numbers may differ a little")
        if get_rank() == 0:
            settings = dict(script=script, flags=vars(args), facts=facts, versions=versions(), finished=False)
            write_json(self.folder / "config.json", settings)
        given = [f"{key} {value}" for key, value in vars(args).items()
                 if value is not None and value is not False]
        print(f"{self.folder}: {', '.join(given)}; {versions()}")

    def log(self, row: dict):
        """Add a row to the log. The first one begins the file anew: what a resumed run has logged is in its
        states, and comes back with them; a run that is refused keeps its file."""
        mode = "a" if self.rows else "w"
        self.rows.append(row)
        if get_rank() == 0:
            with open(self.folder / "metrics.jsonl", mode) as file:
                file.write(json.dumps(row) + "\n")

    def plot(self):
        """Draw the log of every stage so far."""
        stages = {}
        for row in self.rows:
            if "step" in row:
                stages.setdefault(row["stage"], []).append(row)
        if stages and get_rank() == 0:
            plot_curves(self.folder / "curves.png", stages)

    def files(self) -> str:
        """The names of what is in the folder, but for states."""
        return ", ".join(sorted(file.name for file in self.folder.iterdir() if STATE not in file.name))

    def finish(self):
        """Say that everything is written."""
        settings = read_settings(self.folder)
        if settings and get_rank() == 0:
            write_json(self.folder / "config.json", settings | {"finished": True})


def check_facts(run: Path, old: dict, new: dict):
    """ValueError if a run that is resumed finds other things than it began with."""
    for key in old:
        if new.get(key) != old[key]:
            raise ValueError(f"{run} began with {key} {old[key]} and finds {new.get(key)} now; start another "
                             "run, without --resume")


def versions() -> str:
    """What made the numbers of a run."""
    return f"torch {torch.__version__}, python {platform.python_version()}, dcgen {code_version()}"


def read_settings(run: Path) -> dict | None:
    """The config.json of a run, None if there is none. ValueError if it is damaged or none of ours."""
    file = Path(run) / "config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text())
        return {key: settings[key] for key in ("script", "flags", "facts", "versions", "finished")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not the settings of a run, or of another version of this code") from None


def is_finished(run: Path) -> bool:
    settings = read_settings(run)
    return settings is not None and settings["finished"]


def has_state(run: Path) -> bool:
    return any(Path(run).glob(f"*{STATE}"))


@contextmanager
def open_run(name: str, out: str | None, resume: bool):
    """The Run in `out`, or in runs/NAME-N, the next N. Inside, the folder is this process's alone; a run that
    fails before it has trained anything leaves none. ValueError for a folder that is in use, or holds another
    run; a folder that is resumed was chosen by resume_flags."""
    if get_rank() > 0:
        yield Run(broadcast_from_rank0(None))
        return
    folder, made = make_folder(name, out)
    try:
        with locked(folder):
            before = set(folder.iterdir())
            if not resume and (has_state(folder) or is_finished(folder)):
                kind = "a finished" if is_finished(folder) else "an unfinished"
                raise ValueError(f"{folder} holds {kind} run; continue it with --resume, or give another "
                                 "--out")
            run = Run(broadcast_from_rank0(partial(str, folder)))
            try:
                yield run
            except BaseException:
                if not has_state(folder) and not any("loss" in row for row in run.rows):
                    remove(set(folder.iterdir()) - before)
                raise
    finally:
        for parent in made:                                          # those that are empty
            with suppress(OSError):
                parent.rmdir()


def make_folder(name: str, out: str | None) -> tuple[Path, list[Path]]:
    """The folder, and it and its parents as far as they are new, the deepest first."""
    numbers = [path.name.removeprefix(f"{name}-") for path in Path("runs").glob(f"{name}-*")]
    number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
    while True:
        folder = Path(out or f"runs/{name}-{number}")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            return folder, made
        except FileExistsError:
            if out:
                raise ValueError(f"--out {out}: a file of this name exists") from None
            number += 1                                              # another process was faster


@contextmanager
def locked(folder: Path):
    """The folder is this process's alone inside; a process that dies lets go of it. ValueError if another one
    has it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use: another process trains in it") from None
        yield
    finally:
        os.close(handle)


def remove(paths):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def resume_flags(script: str, args: argparse.Namespace, typed: dict):
    """Give args the flags of the run to resume: in args.out, or else the newest unfinished one of this script
    (of the base and the init that were typed). typed: the flags on the command line; those of FREE hold.
    ValueError if there is nothing to resume, and for a typed flag that the run does not have."""
    run = Path(args.out) if args.out else newest_unfinished(script, typed)
    settings = read_settings(run)
    if settings is None or not has_state(run):
        raise ValueError(f"--resume: nothing to resume in {run}, no state was saved there; start it without "
                         "--resume")
    if settings["script"] != script:
        raise ValueError(f"--resume: {run} is a run of {settings['script']}.py")
    flags = settings["flags"]
    more = False
    for flag, value in typed.items():
        old = flags.get(flag)
        grows = flag.endswith("_steps") and value > old
        more = more or grows
        if not grows and flag not in FREE and value != old:
            rule = "; steps only grow" if flag.endswith("_steps") else ""
            raise ValueError(f"--{flag.replace('_', '-')} {value}: {run} was started with {old}; a resumed "
                             f"run keeps its settings{rule}")
    if settings["finished"] and not more:
        raise ValueError(f"--resume: {run} is finished; only more steps go on with it")
    vars(args).update(flags | typed | {"out": str(run), "resume": True, "device": args.device})


def newest_unfinished(script: str, typed: dict) -> Path:
    """ValueError if there is none."""
    wanted = {flag: typed[flag] for flag in ("base", "init") if flag in typed}
    fitting = []
    for file in Path("runs").glob("*/config.json"):
        with suppress(ValueError):                                   # of another version of this code
            settings = read_settings(file.parent)
            fits = settings["script"] == script and wanted.items() <= settings["flags"].items()
            if fits and not settings["finished"] and has_state(file.parent):
                fitting.append(file)
    if not fitting:
        such = "".join(f" of --{flag} {value}" for flag, value in wanted.items())
        raise ValueError(f"--resume: runs/ holds no unfinished run of {script}.py{such} that has saved a "
                         "state; start one without --resume, or name its folder with --out")
    return max(fitting, key=lambda file: file.stat().st_mtime).parent


def write_run(run: Run, info: dict, named, averaged=nullcontext, dtype=torch.float32, carried=()):
    """Write a run's moving average and weights, and finish it. info: facts that load_run reads. carried:
    parameters that an earlier run has trained and this one left alone; no base has them, so they travel
    on."""
    @torch.no_grad()
    def gather() -> dict[str, Tensor]:
        """Copies of the whole weights on rank 0's CPU; every rank takes part."""
        tensors = {}
        for name, p in (*carried, *named):
            whole = full_tensor(p)
            if get_rank() == 0:
                tensors[name] = whole.to("cpu", dtype, copy=True)
        return tensors

    if averaged is not nullcontext:
        with averaged():
            average = gather()
        if get_rank() == 0:
            write_tensors(run.folder / "ema.safetensors", average, info)
    trained = gather()
    if get_rank() == 0:
        write_tensors(run.folder / "model.safetensors", trained, info)
    run.finish()


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
    images: str | None = None
    captions: str | None = None
    pictures: int | None = None
    flip: bool = False
    any_classes: bool = False
    prompts: str | None = None
    text_encoders: Path | None = None
    cache: str = "runs/cache"


def open_pictures(cfg, info: dict, settings: DataSettings) -> tuple:
    """The sources of training and of validation pictures for a model of this configuration; info: that of its
    base, which may name its classes. Nothing is loaded or downloaded. ValueError if the pictures lack what
    the model is conditioned on, or its text encoders cannot be had."""
    if cfg.text_encoder:
        if settings.flip and not settings.images:
            raise ValueError("--flip: the captions of the procedural pictures tell left from right")
        check_encoders(cfg.text_encoder, settings.text_encoders)
        kind = dict(captions=settings.captions or "txt")
    else:
        kind = dict(names=class_names(cfg, info), num_classes=cfg.num_classes,
                    any_classes=settings.any_classes)
    return tuple(open_source(settings.images, cfg.res, split, **kind) for split in ("train", "val"))


def open_data(cfg, pictures: tuple, autoencoders: dict[str, str | None], settings: DataSettings, device,
              dtype, sizes: dict[str, int] | None = None) -> RunData:
    """Latents and conditions of these pictures for a model of this configuration. pictures: of open_pictures;
    autoencoders: {name: weight file or None}; sizes: {name: pixels} of those that see them smaller."""
    aes = {}
    for name, file in autoencoders.items():
        flag = "--ae-weights" if name == cfg.ae else "--base-ae-weights"
        aes[name] = load_autoencoder(name, file, device=device, flag=flag)
    # every picture goes through all autoencoders at once; validation pictures are never trained on
    source, val_source = pictures
    both = list(aes.values())
    cache = LatentCache(settings.cache, source, both, settings.pictures, settings.flip, device=device,
                        sizes=sizes)
    val = LatentCache(settings.cache, val_source, both, 256, device=device, sizes=sizes)
    latents, labels = val.batch(torch.arange(len(val)))
    latents = {name: z.to(device) for name, z in latents.items()}

    if cfg.text_encoder is None:
        def classes(indices):
            return cache.labels[indices].to(device)

        def class_previews(n):
            y = torch.arange(n) % cfg.num_classes
            return y, [str(source.classes[k]) if k < len(source.classes) else str(k) for k in y.tolist()]

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


# ---- flags that the training scripts share -------------------------------------------------------

# numbers of a Plan whose flags have the same names in every stage
PLAN_FLAGS = {name: name for name in ("batch", "accumulate", "betas", "warmup", "schedule", "clip",
                                      "save_every")}


# flags that name a file or a folder, checked before anything is loaded
PATHS = ("weights", "base_ae_weights", "ae_weights", "text_encoders", "prompts", "images")


def number_or_rule(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def add_data_args(p: argparse.ArgumentParser):
    """The flags of a run's data and objective, for stages 1 to 3."""
    share = within(float, 0, 1)
    data = p.add_argument_group("pictures and prompts")
    data.add_argument("--images", metavar="DIR", help="folder of pictures (default: procedural shapes)")
    data.add_argument(
        "--pictures", type=at_least(int, 1),
        help="use so many of them (default: the recipe's, all of a folder)")
    data.add_argument("--flip", action="store_true", help="mirrored pictures as well")
    data.add_argument(
        "--captions", metavar="TEMPLATE",
        help="captions made of the names of class folders, as 'a photo of a {}' (default: the folder's "
             "metadata.jsonl, else the .txt beside each picture)")
    data.add_argument(
        "--any-classes", action="store_true",
        help="class folders are new classes, in alphabetical order, and not those that the base knows")
    data.add_argument(
        "--text-tokens", type=at_least(int, 1),
        help="prompt tokens kept (default: the base's; FLUX 512, of which the authors' guides take 256)")
    data.add_argument(
        "--text-encoders", metavar="DIR",
        help="pipeline folder with the text encoders (default: that of --weights, or the model hub's cache)")
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
        "--pos-step", type=positive,
        help="distance of neighbouring tokens in the new position table, in tokens of the base; 1 = as the "
             "authors, 2 = spread over the base's positions (default: the recipe's; DiT 2, FLUX 1)")
    deep.add_argument(
        "--shift", type=number_or_rule,
        help="resolution shift of the times, a number or a rule (sample.py --help), saved with the run; "
             "1 = off (default: the recipe's, or the aligned run's)")

    objective = p.add_argument_group("objective of stages 2 and 3")
    objective.add_argument(
        "--objective", choices=("flow", "guided"),
        help="flow matching (Eq. 2), or guided flow matching (Eq. 7) for distilled models (default: "
             "guided for a distilled base, else flow)")
    objective.add_argument(
        "--guidance-range", type=at_least(float, 0), nargs=2, metavar=("MIN", "MAX"),
        help="of the guidance that a distilled model reads (default: the recipe's, 1 to 14)")
    objective.add_argument(
        "--t-sampling", default="logit-normal", choices=("logit-normal", "uniform"),
        help="distribution of training times (default logit-normal)")
    objective.add_argument(
        "--label-dropout", type=share, default=0.1,
        help="share of conditions replaced by the null one (default 0.1)")
    objective.add_argument(
        "--final-adaln", action=argparse.BooleanOptionalAction, default=True,
        help="train DiT's final modulation as a part of the head, as the authors do (default yes)")

    run = p.add_argument_group("the run")
    run.add_argument("--out", metavar="DIR", help="its folder (default: runs/KIND-BASE-N, the next N)")
    run.add_argument(
        "--resume", action="store_true",
        help="continue --out, or the newest unfinished run, with the flags that it began with; only steps "
             "may grow")
    run.add_argument(
        "--save-every", type=at_least(int, 1), help="steps between resumable states (default 500)")
    run.add_argument(
        "--previews", type=at_least(int, 0), metavar="N",
        help="pictures on each sheet of previews, 0 = none (default 8; 0 for a large model on a CPU)")
    run.add_argument(
        "--prompts", metavar="FILE",
        help="prompts of the preview pictures, one a line (default: captions of validation pictures)")
    run.add_argument(
        "--cfg-scale", type=at_least(float, 0),
        help="guidance of the preview pictures (default: the model's own; DiT 3)")


def add_plan_args(p: argparse.ArgumentParser, stage: str):
    """The flags that change a stage's Plan; see planned."""
    plan = p.add_argument_group(f"AdamW in {stage} (defaults: the recipe's)")
    plan.add_argument("--recipe", action="store_true", help="print the recipe of --base, and stop")
    plan.add_argument("--batch", type=at_least(int, 1), help="samples a step, over all GPUs")
    plan.add_argument(
        "--accumulate", type=at_least(int, 1), help="microbatches that a batch is split into (default 1)")
    plan.add_argument(
        "--betas", type=within(float, 0, 0.99999), nargs=2, metavar="B",
        help="0.9 0.999; the authors' guides use 0.9 0.95")
    plan.add_argument("--warmup", type=at_least(int, 0), help="steps of linear warm-up")
    plan.add_argument(
        "--schedule", choices=("constant", "cosine", "linear"), help="of the rate after the warm-up")
    plan.add_argument(
        "--clip", type=at_least(float, 0),
        help="limit of the gradient norm; 0 = none; the authors' guides use 0.1")
    return plan


def settle_dtype(args) -> torch.dtype:
    """The type of the arithmetic; the flag gets its name."""
    dtype = dtype_of(args)
    args.dtype = "bf16" if dtype == torch.bfloat16 else "fp32"
    return dtype


def data_settings(args, cfg, pictures: int | None) -> DataSettings:
    """What add_data_args' flags say; pictures: how many procedural ones without --pictures."""
    if args.pictures is None and args.images is None:
        args.pictures = pictures
    return DataSettings(
        images=args.images, captions=args.captions, pictures=args.pictures, flip=args.flip,
        any_classes=args.any_classes, prompts=args.prompts,
        text_encoders=text_folder(args.base, cfg, args.text_encoders, args.weights), cache=args.cache)


def planned(plan: Plan, args, **flags: str) -> Plan:
    """The plan with the flags that were given in place of its numbers; the others' flags get these numbers.
    flags: of a number of the plan, the name of its flag."""
    given = {field: getattr(args, flag) for field, flag in flags.items()}
    plan = replace(plan, **{field: value for field, value in given.items() if value is not None})
    vars(args).update({flag: getattr(plan, field) for field, flag in flags.items()})
    return plan


def resized(cfg, res: int | None, text_tokens: int | None):
    """The configuration at another size of pictures and length of prompts; a run keeps both. ValueError for
    text tokens of a class model."""
    if text_tokens is not None:
        if cfg.text_encoder is None:
            raise ValueError(f"--text-tokens {text_tokens}: this model reads classes, not prompts")
        cfg = replace(cfg, text_tokens=text_tokens)
    return replace(cfg, res=res or cfg.res)


def training_shift(cfg) -> float:
    """The number of a configuration's resolution shift at its size. ValueError if the size does not fit."""
    H, W = latent_size(cfg, ae_config(cfg.ae), (cfg.res, cfg.res))
    return resolve_shift(cfg.sampling.shift, cfg.in_channels, H, W, cfg.patch_size)


def preview_count(args, model: nn.Module) -> int:
    """How many preview pictures to draw: a large model takes minutes for one on a CPU."""
    slow = args.device == "cpu" and count_parameters(model) > 1e8
    if args.previews is None and slow:
        print("no preview pictures, this model is slow on a CPU; --previews N draws some")
    if args.previews is None:
        args.previews = 0 if slow else 8
    return args.previews


def draw_previews(model, ae, conditions, seed: int, cfg_scale: float | None, dtype) -> Tensor:
    """Preview pictures, seeds seed + i: the same noise every time within a latent space. (B,3,H,W) in
    [-1,1]"""
    sampler = "ddim" if model.cfg.predict == "epsilon" else None
    sampling = choose_sampling(model.cfg, cfg_scale=cfg_scale, sampler=sampler)
    seeds = [seed + i for i in range(len(conditions))]
    return generate(model, ae, conditions, seeds, sampling, dtype=dtype)
