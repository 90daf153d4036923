"""The training loop of all three stages, its state, its processes and its run folders."""

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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Text
from autoencoder import AUTOENCODERS, ae_config
from checkpoints import (atomic, load_autoencoder, preset_of, write_json, write_tensors)
from data import (Buckets, LatentCache, bucket_sizes, cache_prompts, open_source, order, read_prompts, text_folder)
from fast import peak_gib, timed
from sample import (SHIFTS, device_here, dtype_of, generate, latent_size, resolve_shift, settings, with_guidance)


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
    return distribute_tensor(to_float32, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full


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
    p.add_argument("--objective", choices=("flow", "guided", "ddpm"),
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
