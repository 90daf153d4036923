"""End-to-end fine-tuning: stage 3 of DC-Gen (arXiv 2509.25180, Sec. 3.3, Eq. 2 and 7), and training from
scratch.

After alignment the model draws already. Now its trunk adapts to the new latents, by LoRA, while the new
embedder and head go on training in full. The loss is stage 2's; only what is trainable differs.

    python finetune.py                          LoRA on the newest alignment of the bundled base
    python finetune.py --init base              without alignment: what the paper's Fig. 3 shows
    python finetune.py --tune full              every weight instead of LoRA (Fig. 5)
    python finetune.py --init RUN               on another run, whose base it is then
    python finetune.py --base tiny-flux --objective flow
                                                the plain loss on a distilled base: what Fig. 6 shows
    python finetune.py --init RUN --merge --res 1024
                                                LoRA merged, and a new one at the next resolution
    python finetune.py --init scratch           no base at all: how the bundled base itself was made
    torchrun --nproc-per-node 8 finetune.py --base flux-krea
                                                eight GPUs, each with a shard of the model

The paper's other strategies (A.8, A.9) are in experiments/.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from align import (
    default_match, next_autoencoder, note_export, print_recipe, recipe_of, settled_objective)
from autoencoder import ae_config
from checkpoints import (
    build, config_dict, fingerprint, load_base, load_run, newest_run, read_base_config, read_run_config,
    read_tensors, run_file)
from flags import (
    Parser, add_model_args, at_least, check_base, check_paths, positive, run_main, with_guidance, within)
from lora import add_lora, merge_lora
from model import BASES, to_deep_latent, to_deep_model
from sample import save_grid
from train import (
    BIG, PATHS, PLAN_FLAGS, Run, add_data_args, add_plan_args, count_parameters, data_settings,
    destroy_distributed, draw_previews, get_rank, init_distributed, named_parameters_with, open_data,
    open_pictures, open_run, planned, prepare_for_training, preview_count, rank0_first, resized, resume_flags,
    settle_dtype, train, trainable_prefixes, write_run)


# ---- what stage 3 trains -------------------------------------------------------------------------

def stage3_parameters(model, tune: str, final_adaln: bool = True) -> list[tuple[str, nn.Parameter]]:
    """The new embedder and head in full, and of the trunk its LoRA (tune "lora") or everything ("full")."""
    if tune == "full":
        return list(model.named_parameters())
    lora = [(name, p) for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    return named_parameters_with(model, trainable_prefixes(model, final_adaln)) + lora


# ---- from where it starts ------------------------------------------------------------------------

KINDS = {"scratch": "scratch", "base": "noalign"}                    # else "finetune"


class Start(NamedTuple):
    """A model before stage 3, the facts that its run keeps, and those of its parameters that no base has."""
    model: nn.Module
    info: dict
    own: list[nn.Parameter] = []


def find_start(args, base_typed: bool):
    """Settle --init and --base: "align" is the newest alignment of the base, and a run's base is the run's.
    ValueError if there is no alignment, or the run's base is not the one that was typed."""
    if args.init in KINDS:
        return
    if args.init == "align":
        run = newest_run(kinds=(f"align-{Path(args.base).name}",))
        if run is None:
            raise ValueError(f"no alignment of {args.base} in runs/; first: python align.py --base "
                             f"{args.base}   (or --init base to go without)")
        args.init = str(run)
    _, info = read_run_config(run_file(args.init))
    check_base(args.base if base_typed else None, args.init, info)
    args.base = info["base"]


def start_config(args) -> tuple:
    """What the model will be, and what is known of it, before any weights are read."""
    if args.init == "scratch":
        return scratch_config(args.base, args.ae, args.num_classes), {}
    if args.init == "base":
        cfg, info = read_base_config(args.base)
        return unaligned_config(cfg, args), info
    return read_run_config(run_file(args.init))


def scratch_config(base: str, ae: str | None, num_classes: int | None):
    """A preset's architecture on the flow's clock; a FLUX that is guided in two passes."""
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
    return replace(cfg, sampling=replace(cfg.sampling, shift=1.0))


def unaligned_config(base_cfg, args):
    """That of a base on the recipe's next latent space."""
    recipe = recipe_of(base_cfg)
    args.pos_step = args.pos_step or recipe.pos_step
    step = args.pos_step * getattr(base_cfg, "pos_step", 1.0)
    return to_deep_latent(base_cfg, next_autoencoder(args.ae, base_cfg, args.base), step, recipe.shift)


def load_start(args) -> Start:
    """The model that --init stands for: random weights, a base with a new embedder and head that are not
    aligned, or a run, which is carried on."""
    if args.init == "scratch":
        torch.manual_seed(args.seed)
        model = build(scratch_config(args.base, args.ae, args.num_classes))
        return Start(model, {"base": args.base, "base_weights": None})
    if args.init == "base":
        base, info = load_base(args.base, args.weights, dtype=None)
        torch.manual_seed(args.seed)
        cfg = unaligned_config(base.cfg, args)
        # its gap is measured to what it would have been aligned to
        info["match"] = default_match(base.cfg, cfg)
        return Start(to_deep_model(base, cfg), info)
    # 12B stays in the file's bf16: prepare_for_training makes float32 of what learns
    model, info = load_run(args.init, base_weights=args.weights, dtype=None)
    own = set(read_tensors(run_file(args.init)))
    if args.merge:
        # the sum of W and the LoRA is as exact as what it is kept in
        merge_lora(model if count_parameters(model) > BIG else model.float())
        own = set(model.state_dict())
        info.pop("lora", None)
    kept = ("base", "base_weights", "base_print", "ae_weights", "images", "captions", "match", "steps",
            "lora")
    facts = {key: info[key] for key in kept if key in info}
    own = [p for name, p in model.named_parameters() if name in own]
    return Start(model, facts | {"from": args.init}, own)


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

    def __init__(self, model, data, objective, run: Run, previews: int, args, dtype):
        self.model = model
        self.data = data
        self.objective = objective
        self.run = run
        self.previews = previews                                     # pictures a sheet
        self.conditions, self.titles = data.previews(max(1, previews))
        self.drawn_with = (args.seed, args.cfg_scale, dtype)
        self.dtype = dtype
        self.facts = {"seed": str(args.seed), "cfg_scale": str(args.cfg_scale)}

    def __call__(self, step: int, averaged) -> dict[str, float]:
        """Evaluate the weights as trained and their average, and write a grid; returns metrics."""
        self.model.eval()
        metrics = self.validate()
        both = step and averaged is not nullcontext                  # at step 0 they are the same
        if both:
            with averaged():
                metrics["val_loss_ema"] = self.validate()["val_loss"]
        if self.previews:
            rows = [(f"step {step}", self.draw())]
            if both:
                with averaged():
                    rows.append(("average", self.draw()))
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
            save_grid(self.run.folder / file, rows, self.titles, self.facts)

    def finish(self, kind: str):
        """Write the pictures of a finished run."""
        if self.previews == 0:
            return
        self.model.eval()
        self.write("samples.png", [(kind, self.draw())])
        if self.objective.guidance:
            self.write("guidance.png", [(f"g = {g:g}", self.draw(g)) for g in GUIDANCES])


# ---- main ----------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(__doc__, "[--base NAME] [--init RUN]")
    add_model_args(p)
    start = p.add_argument_group("from where, and what learns")
    start.add_argument(
        "--init", default="align", metavar="WHAT",
        help="align = the newest alignment of --base (default); a run's folder; base = new embedder and "
             "head, not aligned; scratch = random weights")
    start.add_argument(
        "--tune", default="lora", choices=("lora", "full"),
        help="how the trunk learns (default lora; scratch is always full)")
    start.add_argument("--rank", type=at_least(int, 1), help="LoRA rank (default: the recipe's; paper 256)")
    start.add_argument("--alpha", type=positive, help="LoRA alpha (default: the rank)")
    start.add_argument(
        "--merge", action="store_true",
        help="merge the LoRA that --init RUN carries into its trunk, and start a new one (next resolution)")
    start.add_argument(
        "--num-classes", type=at_least(int, 1),
        help="with --init scratch: how many (default: the preset's)")
    plan = add_plan_args(p, "stage 3")
    plan.add_argument("--train-steps", type=at_least(int, 1), help="optimiser steps")
    plan.add_argument("--lr", type=positive, help="learning rate")
    plan.add_argument("--weight-decay", type=at_least(float, 0), help="on matrices only")
    plan.add_argument(
        "--ema", type=within(float, 0, 0.999999), help="decay of the moving average; 0 = none")
    add_data_args(p)
    p.add_argument(
        "--sample-every", type=at_least(int, 0),
        help="steps between sheets of previews and validation losses; 0 = at start and end (default: a "
             "quarter of the run)")
    p.add_argument(
        "--save-dtype", default="fp32", choices=("fp32", "bf16"), help="of the finished files (default fp32)")
    p.add_argument(
        "--parallel", choices=("ddp", "fsdp"),
        help="under torchrun: the whole model on every GPU, or a shard (default: fsdp from 1e9 parameters)")
    p.add_argument(
        "--compile", action="store_true", help="torch.compile every block: a minute, then a third faster")
    return p


def main(argv=None, hooks=None, strategy: str | None = None):
    """For experiments: hooks, model -> {"on_step": ..., "lr_scale": ...} of train.train; and what they stand
    for, which a resumed run has to have again."""
    args = parser().parse_args(argv)
    device = init_distributed(args.device)
    typed = parser().typed(argv)
    if args.resume:
        resume_flags("finetune", args, typed)
    if args.recipe:
        return print_recipe(args.base)
    find_start(args, base_typed="base" in typed and not args.resume)
    kind = KINDS.get(args.init, "finetune")
    with open_run(f"{kind}-{Path(args.base).name}", args.out, args.resume) as run:
        finetune(args, run, kind, device, hooks, strategy)
    destroy_distributed()


def finetune(args, run: Run, kind: str, device: torch.device, hooks=None, strategy: str | None = None):
    """Stage 3, from the flags to the files of the run."""
    dtype = settle_dtype(args)

    # what is wrong with flags and pictures shows before any weights are read
    check_paths(args, *PATHS)
    cfg, known = start_config(args)
    args.images = args.images or known.get("images")
    args.captions = args.captions or known.get("captions")
    args.ae_weights = args.ae_weights or known.get("ae_weights")
    check_start(args, kind, cfg)
    cfg = stage3_config(cfg, args)
    recipe = recipe_of(cfg)
    objective = settled_objective(cfg, args)
    plan = planned(recipe.stage3, args, steps="train_steps", lr="lr", weight_decay="weight_decay", ema="ema",
                   **PLAN_FLAGS)
    adds_lora = settled_tuning(args, kind, known, recipe)
    if args.sample_every is None:
        args.sample_every = max(1, plan.steps // 4)
    settings = data_settings(args, cfg, recipe.pictures)
    pictures = open_pictures(cfg, known, settings)

    # the model that the stages before have left
    start = load_start(args)
    model = start.model
    info = start.info
    start_print = fingerprint(model)
    cfg = stage3_config(model.cfg, args)
    model.cfg = cfg

    # what is trainable: embedder and head in full, the trunk by LoRA
    if adds_lora:
        info["lora"] = dict(rank=args.rank, alpha=args.alpha)
        torch.manual_seed(args.seed + 1)
        add_lora(model, **info["lora"])
    names, carried = split_parameters(start, args.tune, args.final_adaln)
    sharded = args.parallel == "fsdp" or (args.parallel is None and count_parameters(model) > BIG)
    params = prepare_for_training(model, names, device, shard=sharded, compiled=args.compile)
    named = [(name, params[name]) for name in names]

    # what it learns from
    with rank0_first():
        data = open_data(cfg, pictures, {cfg.ae: args.ae_weights}, settings, device, dtype)
    model.null = data.null
    run.settle("finetune", args, {"weights": start_print, "strategy": strategy, **data.cache.facts()})
    millions = sum(p.numel() for _, p in named) / 1e6
    print(f"{kind} of {args.base} on {cfg.ae}: {millions:.2f}M trainable of "
          f"{count_parameters(model) / 1e6:.2f}M, {dtype}, {len(data.cache)} pictures -> {run.folder}")
    note_export(cfg)
    watch = Watch(model, data, objective, run, preview_count(args, model), args, dtype)

    def loss(indices, generator):
        z, _ = data.cache.batch(indices, generator)                  # of a KL-VAE: draws of its posterior
        return objective.train_loss(model, z[cfg.ae].to(device), data.conditions(indices), generator)

    begun = time.perf_counter()
    more = hooks(model) if hooks else {}
    model.train()
    log, averaged = train(
        run, "train", model, named, loss, len(data.cache), plan, seed=args.seed, dtype=dtype, watch=watch,
        watch_every=args.sample_every, **more)

    # finish: pictures, and the weights last
    with averaged():
        watch.finish(kind)
    info |= dict(
        kind=kind, model=config_dict(cfg), objective=objective.name, classes=list(data.source.classes),
        images=args.images, captions=args.captions, ae_weights=args.ae_weights,
        steps=plan.steps + info.get("steps", 0))                     # of all stages so far
    save_dtype = torch.bfloat16 if args.save_dtype == "bf16" else torch.float32
    write_run(run, info, named, averaged, save_dtype, [(name, params[name]) for name in carried])
    average = f", {log[-1]['val_loss_ema']:.4f} by the average" if "val_loss_ema" in log[-1] else ""
    print(f"validation loss {log[0]['val_loss']:.4f} -> {log[-1]['val_loss']:.4f} as trained{average}, "
          f"in {time.perf_counter() - begun:.0f} s; "
          f"wrote {run.folder}/ ({run.files()})")


def check_start(args, kind: str, cfg):
    """ValueError for flags of another start than --init names."""
    if kind == "finetune" and args.ae not in (None, cfg.ae):
        raise ValueError(f"--ae {args.ae}: {args.init} is on {cfg.ae}; another latent space begins with "
                         f"align.py --base {args.init} --ae {args.ae}")
    if kind != "noalign" and args.pos_step:
        raise ValueError("--pos-step: only a new embedder (--init base, align.py) gets new positions")
    if kind != "scratch" and args.num_classes:
        raise ValueError("--num-classes: only a model from scratch (--init scratch) has other classes")
    args.ae = cfg.ae


def settled_tuning(args, kind: str, known: dict, recipe) -> bool:
    """Whether the trunk gets a new LoRA; the flags that this settles get their values. ValueError for flags
    of another LoRA than the one that --init RUN carries."""
    if kind == "scratch":
        args.tune = "full"
    carries_lora = "lora" in known and not args.merge
    if carries_lora and (args.tune == "full" or args.rank or args.alpha):
        raise ValueError(f"{args.init} carries a LoRA of its own, which goes on learning as it is; "
                         "for another one, or full tuning, add --merge")
    if args.tune == "full" or carries_lora:
        return False
    args.rank = args.rank or recipe.rank
    args.alpha = args.alpha or float(args.rank)
    return True


def stage3_config(cfg, args):
    """A configuration at the size, length of prompts and shift that the flags ask for."""
    cfg = resized(cfg, args.res, args.text_tokens)
    args.res = cfg.res
    if args.shift is None:
        args.shift = cfg.sampling.shift
    return replace(cfg, sampling=replace(cfg.sampling, shift=args.shift))


if __name__ == "__main__":
    run_main(main)
