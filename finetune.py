"""End-to-end fine-tuning: stage 3 of DC-Gen (arXiv 2509.25180, Sec. 3.3, Eq. 2 and 7), and training from
scratch.

After alignment the model draws already. Now its trunk adapts to the new latents, by LoRA, while the new
embedder and head go on training in full. The loss is stage 2's; only what is trainable differs.

    python finetune.py                          LoRA on the newest alignment of the bundled base
    python finetune.py --init base              without alignment: what the paper's Fig. 3 shows
    python finetune.py --tune full              every weight instead of LoRA (Fig. 5)
    python finetune.py --base tiny-flux --objective flow
                                                the plain loss on a distilled base: what Fig. 6 shows
    python finetune.py --init RUN --merge --res 1024
                                                LoRA merged, and a new one at the next resolution
    python finetune.py --init scratch           no base at all: how the bundled base itself was made
    torchrun --nproc-per-node 8 finetune.py --base flux-krea
                                                eight GPUs, each with a shard of the model

The paper's other strategies (A.8, A.9) are in experiments/.
"""

import argparse
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from align import next_autoencoder, pick_objective, recipe_of
from autoencoder import ae_config
from checkpoints import build, config_dict, load_base, load_run, newest_run, read_tensors, run_file
from evaluate import plot_curves
from lora import add_lora, merge_lora
from model import BASES, to_deep_latent, to_deep_model
from sample import add_model_args, dtype_of, run_main, save_grid, with_guidance
from train import (
    BIG, add_data_args, add_plan_args, count_parameters, data_settings, destroy_distributed, draw_previews,
    get_rank, init_distributed, named_parameters_with, new_run, open_data, planned, prepare_for_training,
    rank0_first, resized, train, trainable_prefixes, write_run)


# ---- what stage 3 trains -------------------------------------------------------------------------

def stage3_parameters(model, tune: str, final_adaln: bool = True) -> list[tuple[str, nn.Parameter]]:
    """The new embedder and head in full, and of the trunk its LoRA (tune "lora") or everything ("full")."""
    if tune == "full":
        return list(model.named_parameters())
    lora = [(name, p) for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    return named_parameters_with(model, trainable_prefixes(model, final_adaln)) + lora


# ---- from where it starts ------------------------------------------------------------------------

class Start(NamedTuple):
    """A model before stage 3, the facts that its run keeps, and those of its parameters that no base has."""
    kind: str                               # finetune, noalign, scratch
    model: nn.Module
    info: dict
    own: list[nn.Parameter] = []


def start_from_scratch(base: str, ae: str | None, num_classes: int | None, seed: int) -> Start:
    """A preset's architecture with random weights, on the flow's clock; a FLUX that is guided in two
    passes."""
    if base not in BASES:
        raise ValueError(f"--init scratch --base {base}: a run is no preset; there are {', '.join(BASES)}")
    cfg = BASES[base]
    if ae and ae != cfg.ae:
        cfg = to_deep_latent(cfg, ae_config(ae))
    if getattr(cfg, "guidance_embed", False):
        sampling = replace(cfg.sampling, cfg_scale=cfg.sampling.guidance, guidance=None)
        cfg = replace(cfg, guidance_embed=False, sampling=sampling)
    if cfg.text_encoder is None:
        cfg = replace(cfg, num_classes=num_classes or cfg.num_classes, clock="flow", predict="velocity",
                      guided_channels=None, sampling=replace(cfg.sampling, sampler="euler"))
    cfg = replace(cfg, sampling=replace(cfg.sampling, shift=1.0))
    torch.manual_seed(seed)
    return Start("scratch", build(cfg), {"base": base, "base_weights": None})


def start_from_base(base: str, weights: str | None, ae: str | None, pos_step: float | None,
                    seed: int) -> Start:
    """A base with a new embedder and head that are not aligned."""
    model, info = load_base(base, weights, dtype=None)
    recipe = recipe_of(model.cfg)
    step = (pos_step or recipe.pos_step) * getattr(model.cfg, "pos_step", 1.0)
    cfg = to_deep_latent(model.cfg, next_autoencoder(ae, model.cfg, base), step, recipe.shift)
    torch.manual_seed(seed)
    return Start("noalign", to_deep_model(model, cfg), info)


def start_from_run(run: str, base: str, weights: str | None, merge: bool) -> Start:
    """A run: what it trained is carried on. "align" is the newest alignment of the base."""
    if run == "align":
        run = newest_run(kinds=(f"align-{Path(base).name}",))
        if run is None:
            raise ValueError(f"no alignment of {base} in runs/; first: python align.py --base {base}   "
                             "(or --init base to go without)")
    # 12B stays in the file's bf16: prepare_for_training makes float32 of what learns
    model, info = load_run(run, base_weights=weights, dtype=None)
    print(f"starting from {run}")
    own = set(read_tensors(run_file(run)))
    if merge:
        # the sum of W and the LoRA is as exact as what it is kept in
        merge_lora(model if count_parameters(model) > BIG else model.float())
        own = set(model.state_dict())
        info.pop("lora", None)
    kept = ("base", "base_weights", "base_print", "ae_weights", "images", "captions", "steps", "lora")
    facts = {key: info[key] for key in kept if key in info}
    own = [p for name, p in model.named_parameters() if name in own]
    return Start("finetune", model, facts | {"from": str(run)}, own)


# ---- what is trained, carried along, left alone -----------------------------------------------------

def split_parameters(start: Start, tune: str, final_adaln: bool) -> tuple[list[str], list[str]]:
    """Names of what this stage trains, and of what an earlier run has trained and this one leaves alone."""
    names = [name for name, _ in stage3_parameters(start.model, tune, final_adaln)]
    own = {id(p) for p in start.own}                                 # by identity: a new LoRA renames them
    carried = [name for name, p in start.model.named_parameters() if id(p) in own and name not in names]
    return names, carried


# ---- what a run is watched by ----------------------------------------------------------------------

GUIDANCES = (1.0, 2.0, 3.5, 5.0)            # of the guidance grid


class Watch:
    """Validation losses, and pictures of the same conditions and the same noise every time. All ranks draw,
    because a sharded model needs all; rank 0 writes."""

    def __init__(self, model, data, objective, out: Path, seed: int, cfg_scale: float | None, dtype):
        self.model = model
        self.data = data
        self.objective = objective
        self.out = out
        self.conditions, self.titles = data.previews(8)
        self.drawn_with = (seed, cfg_scale, dtype)
        self.dtype = dtype
        self.facts = {"seed": str(seed), "cfg_scale": str(cfg_scale)}

    def __call__(self, step: int, averaged) -> dict[str, float]:
        """Evaluate the weights as trained and their average, and write a grid; returns metrics."""
        self.model.eval()
        rows = [(f"step {step}", self.draw())]
        metrics = self.validate()
        if step and averaged is not nullcontext:                     # at step 0 both are the same
            with averaged():
                rows.append(("average", self.draw()))
                metrics["val_loss_ema"] = self.validate()["val_loss"]
        self.write(f"samples_{step:06d}.png", rows)
        self.model.train()
        return metrics

    def validate(self) -> dict[str, float]:
        z = self.data.val_latents[self.model.cfg.ae]
        return self.objective.validate(self.model, z, self.data.val_conditions, self.dtype)

    def draw(self, guidance: float | None = None):
        y = self.conditions if guidance is None else with_guidance(self.conditions, guidance)
        return draw_previews(self.model, self.data.autoencoders[self.model.cfg.ae], y, *self.drawn_with)

    def write(self, file: str, rows: list):
        if get_rank() == 0:
            save_grid(self.out / file, rows, self.titles, self.facts)

    def finish(self, kind: str, log: list[dict]):
        """Write the pictures and curves of a finished run."""
        self.model.eval()
        self.write("samples.png", [(kind, self.draw())])
        if self.objective.guidance:
            self.write("guidance.png", [(f"g = {g:g}", self.draw(g)) for g in GUIDANCES])
        if get_rank() == 0:
            plot_curves(self.out / "curves.png", {kind: log})


# ---- main ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    p.add_argument(
        "--init", default="align", metavar="WHAT",
        help="align = the newest alignment of --base (default); a run's folder; base = new embedder and "
             "head, not aligned; scratch = random weights")
    p.add_argument(
        "--tune", default="lora", choices=("lora", "full"),
        help="how the trunk learns (default lora; scratch is always full)")
    p.add_argument("--rank", type=int, help="LoRA rank (default: the recipe's; paper 256)")
    p.add_argument("--alpha", type=float, help="LoRA alpha (default: the rank)")
    p.add_argument(
        "--merge", action="store_true",
        help="merge the LoRA that --init RUN carries into its trunk, and start a new one (next resolution)")
    p.add_argument("--num-classes", type=int, help="with --init scratch: how many (default: the preset's)")
    p.add_argument(
        "--sample-every", type=int, default=-1, help="steps between preview grids; -1 = at start and end")
    p.add_argument(
        "--save-dtype", default="fp32", choices=("fp32", "bf16"), help="of the finished files (default fp32)")
    p.add_argument(
        "--parallel", choices=("ddp", "fsdp"),
        help="under torchrun: the whole model on every GPU, or a shard (default: fsdp from 1e9 parameters)")
    p.add_argument(
        "--compile", action="store_true", help="torch.compile every block: a minute, then a third faster")
    plan = add_plan_args(p, "stage 3")
    plan.add_argument("--train-steps", type=int, help="optimiser steps")
    plan.add_argument("--lr", type=float, help="learning rate")
    plan.add_argument("--weight-decay", type=float, help="on matrices only")
    plan.add_argument("--ema", type=float, help="decay of the moving average; 0 = none")
    add_data_args(p)
    return p.parse_args(argv)


def main(argv=None, hooks=None):
    """hooks: for experiments, model -> {"on_step": ..., "lr_scale": ...} of train.train."""
    args = parse_args(argv)
    device = init_distributed(args.device)
    dtype = dtype_of(args)

    # the model that the stages before have left
    if args.init == "scratch":
        start = start_from_scratch(args.base, args.ae, args.num_classes, args.seed)
    elif args.init == "base":
        start = start_from_base(args.base, args.weights, args.ae, args.pos_step, args.seed)
    else:
        start = start_from_run(args.init, args.base, args.weights, args.merge)
    model = start.model
    info = start.info
    cfg = resized(model.cfg, args.res, args.text_tokens)
    if args.shift:
        cfg = replace(cfg, sampling=replace(cfg.sampling, shift=args.shift))
    model.cfg = cfg
    recipe = recipe_of(cfg)
    objective = pick_objective(cfg, args.objective, args.guidance_range, args.t_sampling, args.label_dropout)
    plan = planned(recipe.stage3, steps=args.train_steps, lr=args.lr, batch=args.batch, betas=args.betas,
                   warmup=args.warmup, schedule=args.schedule, clip=args.clip, weight_decay=args.weight_decay,
                   ema=args.ema, accumulate=args.accumulate, save_every=args.save_every)
    tune = "full" if start.kind == "scratch" else args.tune
    if info.get("lora") and (tune == "full" or args.rank or args.alpha):
        raise ValueError(f"{info['from']} carries a LoRA of its own, which goes on learning as it is; "
                         "for another one, or full tuning, add --merge")
    out = new_run(start.kind, args.base, vars(args), args.out, args.resume)

    # what is trainable: embedder and head in full, the trunk by LoRA
    if tune == "lora" and not info.get("lora"):
        rank = args.rank or recipe.rank
        info["lora"] = dict(rank=rank, alpha=args.alpha or rank)
        torch.manual_seed(args.seed + 1)
        add_lora(model, **info["lora"])
    names, carried = split_parameters(start, tune, args.final_adaln)
    sharded = args.parallel == "fsdp" or (args.parallel is None and count_parameters(model) > BIG)
    params = prepare_for_training(model, names, device, shard=sharded)
    named = [(name, params[name]) for name in names]

    # what it learns from
    args.images = args.images or info.get("images")
    args.captions = args.captions or info.get("captions")
    weights = {cfg.ae: args.ae_weights or info.get("ae_weights")}
    with rank0_first():
        data = open_data(cfg, weights, data_settings(args, cfg, recipe.pictures), device, dtype)
    model.null = data.null
    millions = sum(p.numel() for _, p in named) / 1e6
    print(f"{start.kind} of {args.base} on {cfg.ae}: {millions:.2f}M trainable of "
          f"{count_parameters(model) / 1e6:.2f}M, {dtype}, {len(data.cache)} pictures -> {out}")
    if args.compile:
        for block in model.blocks:
            block.compile()
    watch = Watch(model, data, objective, out, args.seed, args.cfg_scale, dtype)

    def loss(indices, generator):
        z, _ = data.cache.batch(indices, generator)                  # of a KL-VAE: draws of its posterior
        return objective.train_loss(model, z[cfg.ae].to(device), data.conditions(indices), generator)

    begun = time.perf_counter()
    more = hooks(model) if hooks else {}
    model.train()
    log, averaged = train(
        out, "train", model, named, loss, len(data.cache), plan, seed=args.seed, dtype=dtype, watch=watch,
        watch_every=args.sample_every, **more)

    # finish: pictures and curves, and the weights last
    with averaged():
        watch.finish(start.kind, log)
    info |= dict(
        kind=start.kind, model=config_dict(cfg), objective=objective.name, classes=list(data.source.classes),
        images=args.images, captions=args.captions, ae_weights=weights[cfg.ae],
        steps=plan.steps + info.get("steps", 0))                     # of all stages so far
    save_dtype = torch.bfloat16 if args.save_dtype == "bf16" else torch.float32
    write_run(out, info, named, log, averaged, save_dtype, [(name, params[name]) for name in carried])
    destroy_distributed()
    average = f", {log[-1]['val_loss_ema']:.4f} by the average" if "val_loss_ema" in log[-1] else ""
    print(f"validation loss {log[0]['val_loss']:.4f} -> {log[-1]['val_loss']:.4f} as trained{average}, "
          f"in {time.perf_counter() - begun:.0f} s; "
          f"wrote {out}/ (weights, metrics.jsonl, pictures, curves.png)")


if __name__ == "__main__":
    run_main(main)
