"""End-to-end fine-tuning: stage 3 of DC-Gen (arXiv 2509.25180, Sec. 3.3, Eq. 2 and 7), training from scratch, and guidance
distillation (Eq. 3).

After alignment the model draws already. What is left is to let the trunk get used to its new latents, by LoRA, while the
new embedder and head go on training in full. The loss is stage 2's; only what is trainable differs.

    python finetune.py                                     LoRA on the newest alignment of the embedded base
    python finetune.py --init base                         the same without alignment: what the paper's Fig. 3 shows
    python finetune.py --tune full                         every weight instead of LoRA (Fig. 5)
    python finetune.py --layer-rates 3                     later layers learn three times as fast as early ones (A.8)
    python finetune.py --lora-ramp 500                     LoRA comes in gradually (A.8)
    python align.py --solver adamw --stage1-steps 0        then finetune.py: freeze the backbone, then end to end (A.8)
    python finetune.py --init base --ae-weights FILE       on an autoencoder that was aligned in its stead (A.9, autoencoder.py)
    python finetune.py --init scratch --train-steps 20000  no base at all: how the embedded base itself was made
    python finetune.py --base tiny-flux --init scratch                                  a teacher for two-pass guidance, and
    python finetune.py --base tiny-flux --distill-guidance runs/scratch-tiny-flux-1     the one-pass model made of it
    python finetune.py --base tiny-flux --objective flow   the plain loss on a distilled base: what Fig. 6 shows
    torchrun --nproc-per-node 8 finetune.py --base flux-krea    eight GPUs, each with a share of the model
"""

import argparse
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import (BASES, DiTConfig, FAMILIES, FluxConfig, ddpm_times, to_deep_model, rotary_table, sincos_2d, to_deep_latent, with_guidance_embed)
from lora import LoRALinear, add_lora, merge_lora
from autoencoder import ae_config
from checkpoints import (build, config_dict, load_base, load_run, newest_run, read_tensors, run_file)
from fast import Cost, timed
from sample import (add_model_args, dtype_of, example_text, run, save_grid, with_guidance)
from evaluate import plot_curves
from train import (BIG, add_data_args, draw, first_goes_first, frozen_dtype, guidance_limits, join, leave, new_run, new_step, note_dry_run, pick, prepare, processes, settle, shift_of, size_of, sized, train, write_run)
from align import (LOSSES, distillation_loss, ends, flow_matching_loss, pick_objective, recipe_of, sample_loss, target_ae, validation_losses)


def trainable(model, tune: str, final_adaln: bool = True) -> list[tuple[str, torch.nn.Parameter]]:
    """What stage 3 trains: the new embedder and head in full, and of the trunk its LoRA ("lora") or all ("full")."""
    if tune == "full":
        return pick(model, ("",))
    return pick(model, ends(model, final_adaln)) + [(k, q) for k, q in model.named_parameters() if k.endswith((".A", ".B"))]


def layer_rates(model, ratio: float):
    """Layer-wise learning rates (A.8): shares of the learning rate on a line from the first layer to the last, `ratio` times
    larger there, 1 on average. What comes before the blocks counts as the first layer, the head as the last. -> name -> share"""
    names, of = {id(m): n for n, m in model.named_modules()}, lambda place: 2 / (1 + ratio) * (1 + (ratio - 1) * place / (len(model.blocks) + 1))
    places = {names[id(block)] + ".": i + 1 for i, block in enumerate(model.blocks)} | {model.HEAD_TRAINED: len(model.blocks) + 1}
    return lambda name: of(next((place for start, place in places.items() if name.startswith(start)), 0))


def lora_ramp(model, steps: int):
    """LoRA that comes in gradually (A.8): its alpha grows on a line from 0 to its own within so many steps. -> what to call
    before every step"""
    loras = [(m, m.scale) for m in model.modules() if isinstance(m, LoRALinear)]

    def before(step):
        for m, scale in loras:
            m.scale = scale * min(1.0, step / steps)
    return before


@contextmanager
def without_contents():
    """Tensors made inside are their shapes alone, and so are the tables that models keep: neither side may see the other's."""
    forget = lambda: [table.cache_clear() for table in (sincos_2d, ddpm_times, rotary_table)]
    forget()
    try:
        with FakeTensorMode():
            yield
    finally:
        forget()


def training_memory(cfg, pictures: int, grid: tuple[int, int], *, text_tokens: int | None = None, tune: str = "lora", rank: int = 256,
                    dtype: torch.dtype = torch.bfloat16, frozen: torch.dtype | None = None, recompute: bool | None = None, ema: bool = True) -> dict[str, int]:
    """Bytes that a training pass over so many latents of (H,W) = grid takes on one GPU, from the configuration alone: a step
    is run on tensors without contents. Of weights frozen and trained; gradients; optimizer (AdamW's two moments); average;
    activations (the most that is alive at one time besides); total. frozen, recompute: see settle."""
    with without_contents():
        model = FAMILIES[type(cfg)](cfg)
        if tune == "lora":
            add_lora(model, rank)
        trained = [k for k, _ in trainable(model, tune)]
        sizes = {k: p.nbytes for k, p in settle(model, trained, "cpu", frozen, recompute).items()}
        cond = torch.zeros(pictures, dtype=torch.long) if isinstance(cfg, DiTConfig) else example_text(cfg, pictures, text_tokens or cfg.text_tokens)
        z, t = torch.empty(pictures, cfg.in_channels, *grid), torch.empty(pictures)
        with Cost() as memory:
            for _ in range(2):                                       # the second pass, as --accumulate makes it, finds gradients there
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = flow_matching_loss(model, z, t, cond, torch.empty_like(z))[0].mean()
                loss.backward()
    bytes_ = dict(frozen=sum(n for k, n in sizes.items() if k not in trained), trained=(own := sum(sizes[k] for k in trained)), gradients=own,
                  optimizer=2 * own, average=own * ema, activations=memory.peak - own)
    return bytes_ | dict(total=sum(bytes_.values()))


def start_model(args, recipe):
    """The model before stage 3, its facts, and the parameters in it that no base has: a run's own."""
    if args.distill_guidance:
        teacher, info = load_run(args.distill_guidance, base_weights=args.weights)
        kept = {k: info[k] for k in ("base", "base_weights", "shift", "ae_weights", "images", "captions") if k in info}
        return with_guidance_embed(teacher), {**kept, "kind": "distill", "from": str(args.distill_guidance)}, []
    if args.init == "scratch" and args.base not in BASES:
        raise ValueError(f"--init scratch --base {args.base}: a run is no preset; there are {', '.join(BASES)}")
    if args.init == "scratch":
        cfg = BASES[args.base]
        if args.ae and args.ae != cfg.ae:
            cfg = to_deep_latent(cfg, ae_config(args.ae))
        own = dict(guidance_embed=False) if isinstance(cfg, FluxConfig) else {} if cfg.encoders else \
            dict(num_classes=args.num_classes or cfg.num_classes, clock="flow", predict="velocity", guided_channels=None)
        cfg = replace(cfg, **own)
        torch.manual_seed(args.seed)
        return build(cfg), {"base": args.base, "base_weights": None, "kind": "scratch"}, []
    if args.init == "base":
        base, info = load_base(args.base, args.weights, dtype=None)
        torch.manual_seed(args.seed)
        cfg = to_deep_latent(base.cfg, target_ae(args.ae, recipe, base.cfg), pos_step=new_step(args.pos_step, recipe, base.cfg))
        return to_deep_model(base, cfg), {**info, "kind": "noalign"}, []
    aligned = Path(args.init) if args.init != "align" else newest_run(kinds=(f"align-{Path(args.base).name}",))
    if aligned is None:
        raise ValueError(f"no alignment of {args.base} in runs/; first: python align.py --base {args.base}   (or --init base to go without)")
    model, info = load_run(aligned, base_weights=args.weights, dtype=None)   # 12B in the file's bf16: `settle` makes float32 of what learns
    print(f"starting from {aligned}")
    kept = ("base", "base_weights", "base_print", "shift", "ae_weights", "images", "captions", "steps", "lora")
    own = read_tensors(run_file(aligned)).keys()
    if args.merge:
        merge_lora(model if size_of(model) > BIG else model.float())  # the sum of both as exact as what comes of it is kept
        info, own = {k: v for k, v in info.items() if k != "lora"}, model.state_dict().keys()
    facts = {**{k: info[k] for k in kept if k in info}, "kind": "finetune", "from": str(aligned)}
    return model, facts, [q for k, q in model.named_parameters() if k in own]


GUIDANCES = (1.0, 2.0, 3.5, 5.0)                                      # of the guidance grid


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(p)
    add_data_args(p)
    p.add_argument("--init", default="align", metavar="WHAT", help="align = the newest alignment of --base (default); a run's folder; "
                   "base = new embedder and head, not aligned; scratch = random weights")
    p.add_argument("--distill-guidance", metavar="RUN", help="train a one-pass model that is told its guidance, from this run of a FLUX that needs two passes (all weights)")
    p.add_argument("--tune", default="lora", choices=("lora", "full"), help="how the trunk learns (default lora; scratch is always full)")
    p.add_argument("--layer-rates", type=float, default=1.0, metavar="RATIO",
                   help="learning rate of the last layer over that of the first, on a line between, the average as given (default 1; A.8: 3)")
    p.add_argument("--lora-ramp", type=int, default=0, metavar="STEPS", help="steps in which LoRA's alpha grows from 0 to its own (default 0 = from the start)")
    p.add_argument("--rank", type=int, help="LoRA rank (default: the recipe's; paper 256)")
    p.add_argument("--alpha", type=float, help="LoRA alpha (default: the rank)")
    p.add_argument("--merge", action="store_true", help="merge the LoRA that --init RUN carries into its trunk, and start a new one (next resolution)")
    p.add_argument("--num-classes", type=int, help="with --init scratch: number of classes (default: the preset's)")
    p.add_argument("--train-steps", type=int, help="optimiser steps (default: the recipe's)")
    p.add_argument("--batch", type=int, help="pictures a step (default: the recipe's)")
    p.add_argument("--accumulate", type=int, default=1, help="split each batch into so many passes (default 1)")
    p.add_argument("--lr", type=float, help="learning rate (default: the recipe's)")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up (default: the recipe's)")
    p.add_argument("--schedule", choices=("constant", "cosine"), help="after the warm-up (default: the recipe's)")
    p.add_argument("--weight-decay", type=float, default=1e-3, help="AdamW's, on matrices only (default 1e-3)")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm limit; -1 = never (default 1)")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the moving average; 0 = none (default 0.999)")
    p.add_argument("--shift", help="resolution shift of the times, a number or a rule (sample.py --help), saved with the run; 1 = off (default: the aligned run's, "
                   "else the recipe's; 1 from scratch)")
    p.add_argument("--sample-every", type=int, default=-1, help="a preview grid every so many steps; -1 = only at start and end")
    p.add_argument("--save-dtype", default="fp32", choices=("fp32", "bf16"), help="of the finished files (default fp32)")
    p.add_argument("--parallel", choices=("ddp", "fsdp"),
                   help="under torchrun: the whole model on every GPU, or a share of it (default: fsdp from 1e9 parameters on)")
    p.add_argument("--compile", action="store_true", help="torch.compile every block: a minute at first, then a third faster")
    p.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/finetune-BASE-N, the next N)")
    args = p.parse_args(argv)

    recipe = recipe_of(args.base)
    stage3 = recipe["stage3"]
    steps = args.train_steps or stage3["steps"]
    if args.layer_rates <= 0:
        raise ValueError(f"--layer-rates {args.layer_rates:g}: a ratio above 0, 1 = all layers alike")
    if args.lora_ramp and (args.tune == "full" or args.init == "scratch" or args.distill_guidance):
        raise ValueError(f"--lora-ramp {args.lora_ramp}: there is no LoRA in this run")
    if args.lora_ramp and args.compile:
        raise ValueError(f"--lora-ramp {args.lora_ramp}: a compiled block has its alpha built in; leave out --compile")
    if args.lora_ramp >= steps:
        raise ValueError(f"--lora-ramp {args.lora_ramp}: it has to end before the run does, of {steps} steps")
    if args.dry_run:
        steps, args.lora_ramp = 1, 0
    model, info, own = start_model(args, recipe)
    model.cfg = sized(model.cfg, args)
    kind, dtype, device, teacher = info["kind"], dtype_of(args), join(args.device), None
    goal = "distill" if kind == "distill" else pick_objective(model.cfg, args.objective)
    shift, rule = shift_of(args.shift or info.get("shift") or (1.0 if kind == "scratch" else recipe["shift"]), model.cfg)
    limits = guidance_limits(args, recipe, model.cfg)
    out = new_run(kind, args)
    model = model.to(device).train()
    if info.get("lora") and (args.tune == "full" or args.rank or args.alpha):
        raise ValueError(f"{info['from']} carries a LoRA of its own, which goes on learning as it is; "
                         "for another one, or full tuning, add --merge")
    everything = kind in ("scratch", "distill")
    if not everything and args.tune == "lora" and not info.get("lora"):
        lora = dict(rank=args.rank or recipe["rank"], alpha=args.alpha or args.rank or recipe["rank"])
        torch.manual_seed(args.seed + 1)
        add_lora(model, **lora)
        info["lora"] = lora
    named = trainable(model, "full" if everything else args.tune, args.final_adaln)
    carried = [(k, q) for k, q in model.named_parameters() if any(q is o for o in own) and k not in dict(named)]
    sharded = args.parallel == "fsdp" or (args.parallel is None and size_of(model) > BIG)
    now = settle(model, [k for k, _ in named], device, frozen_dtype(args), args.recompute, sharded)
    named, carried = ([(k, now[k]) for k, _ in part] for part in (named, carried))
    args.images, args.captions = args.images or info.get("images"), args.captions or info.get("captions")
    files = {model.cfg.ae: args.ae_weights or info.get("ae_weights")}
    with first_goes_first():
        data = prepare(args, recipe, files, model.cfg, device)
    (ae,), source, cache, model.null = data.ae.values(), data.source, data.cache, data.null
    (z_val,), y_val = data.val[0].values(), data.val[1]
    if kind == "distill":
        teacher = load_run(args.distill_guidance, device, base_weights=args.weights)[0]
    info |= dict(model=config_dict(model.cfg), shift=rule, objective=goal, classes=list(source.classes), images=args.images, captions=args.captions,
                 ae_weights=files[model.cfg.ae], steps=steps + (info.get("steps") or 0 if kind == "finetune" else 0))   # of all stages so far
    count = lambda params: sum(q.numel() for q in params) / 1e6
    print(f"{kind} of {args.base} on {model.cfg.ae}: {count(q for _, q in named):.2f}M trainable of {count(model.parameters()):.2f}M, {dtype}, "
          f"{len(cache)} pictures -> {out}")
    if args.compile:
        for block in model.blocks:
            block.compile()
    seconds, objective = {}, dict(objective=goal, t_sampling=args.t_sampling, shift=shift, label_dropout=args.label_dropout, limits=limits, teacher=teacher)
    val_loss = partial(distillation_loss, teacher) if teacher else LOSSES.get(goal, flow_matching_loss)

    def loss_fn(rows, g):
        return sample_loss(model, cache.batch(rows, g)[0][model.cfg.ae].to(device), data.condition(rows), g, **objective)

    def grid(file, rows):
        if processes()[0] == 0:
            save_grid(out / file, rows, data.ask(8)[1], {"seed": str(args.seed), "cfg_scale": str(args.cfg_scale)})

    def pictures(m, told=lambda y: y):
        """The same conditions and the same noise every time; told: what changes their guidance."""
        m.null = data.null
        return draw(m, ae, told(data.ask(8)[0]), args.seed, args.cfg_scale, rule, dtype, args.base)

    def watch(step, averaged):
        model.eval()
        validate = partial(validation_losses, model, z_val, y_val, dtype, loss=val_loss, limits=limits)
        seconds["pictures"] = 0.0
        with timed(seconds, "pictures", device):
            rows = [(f"step {step}", pictures(model))]                # all processes draw: a sharded model takes all
        said = validate()
        if averaged and step:                                         # at step 0 it is the same
            with averaged():
                rows, said["val_loss_ema"] = [*rows, ("average", pictures(model))], validate()["val_loss"]
        grid(f"samples_{step:06d}.png", rows)
        model.train()
        return said

    start, batch = time.perf_counter(), args.batch or stage3["batch"]
    log = train(out, model, named, loss_fn, getattr(cache, "buckets", len(cache)), steps, batch=batch, lr=args.lr or stage3["lr"], info=info,
                warmup=stage3["warmup"] if args.warmup is None else args.warmup, schedule=args.schedule or stage3.get("schedule", "constant"), weight_decay=args.weight_decay,
                betas=args.betas, clip=None if args.clip < 0 else args.clip, ema=args.ema or None, accumulate=args.accumulate, seed=args.seed, dtype=dtype,
                save_every=args.save_every, watch=watch, watch_every=args.sample_every, rate=layer_rates(model, args.layer_rates),
                before=lora_ramp(model, args.lora_ramp) if args.lora_ramp else None, seconds=seconds)
    write_run(out, info, named, log, torch.bfloat16 if args.save_dtype == "bf16" else torch.float32, carried=carried)
    rank, _ = processes()
    leave()
    if rank:
        return
    if args.dry_run:
        return note_dry_run(out, model, named, seconds, batch, bool(args.ema), device)
    plot_curves(out / "curves.png", {kind: log})
    done, more = load_run(out, args.device)[0], ""
    grid("samples.png", [(kind, pictures(done))])
    if limits:
        grid("guidance.png", [(f"g = {g:g}", pictures(done, lambda y: with_guidance(y, g))) for g in GUIDANCES])
        more = ", guidance.png"
    average = f", {log[-1]['val_loss_ema']:.4f} by the average" if "val_loss_ema" in log[-1] else ""
    print(f"validation loss {log[0]['val_loss']:.4f} -> {log[-1]['val_loss']:.4f} as trained{average}, in {time.perf_counter() - start:.0f} s; "
          f"wrote {out}/ (weights, metrics.jsonl, samples.png, curves.png{more})")


if __name__ == "__main__":
    run(main)
