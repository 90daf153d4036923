"""The experiments: autoencoders are trained and aligned, guidance is distilled, strategies enter by hooks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import finetune
import train
from align import Objective
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import HERE, load_autoencoder, load_run, read_config, read_tensors, write_tensors
from experiments import align_autoencoder, bases, causes, make_weights, strategies
from experiments.align_autoencoder import LatentAlignment
from experiments.causes import BinnedLinear
from experiments.make_weights import (
    distillation_loss, estimate_batch_norm, train_autoencoder, with_guidance_embed)
from experiments.strategies import layer_rates, lora_ramp
from helpers import (
    DCAE_STYLES, TINIES, TINY_FLUX, TINY_KL, assert_near, digest, random_text, scramble, tiny_base,
    tiny_model, words_base)
from lora import LoRALinear, add_lora
from model import BASES, FAMILIES, Flux
from sample import guided_velocity, path
from shapes import ShapesSource, load_classifier, shapes
from train import DataSettings, Plan

AE_PLAN = Plan(4, 1e-3, 3, warmup=2, schedule="linear", clip=1.0, save_every=2)


class Interrupted(ShapesSource):
    """Procedural pictures whose fourth batch is a kill."""
    left = 3

    def batch(self, indices):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().batch(indices)


def new_autoencoder(cfg):
    torch.manual_seed(0)
    return build_autoencoder(cfg)


def calibrated(cfg):
    """A scrambled autoencoder whose latents of small shapes have unit deviation."""
    ae = scramble(build_autoencoder(cfg))
    z = ae.moments(shapes(torch.arange(64), 16)[0])[0]
    ae.cfg = replace(cfg, scale=1 / z.std().item(), shift=0.0)
    return ae


# ---- autoencoders --------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [TINY_KL, DCAE_STYLES["in"]], ids=lambda cfg: cfg.name)
def test_an_autoencoders_training_resumes_to_the_same_numbers_with_their_scale(cfg, tmp_path, monkeypatch):
    def run(file, source):
        ae = new_autoencoder(cfg)
        extra = LatentAlignment(calibrated(TINY_KL), cfg.channels, 1.0)
        train_autoencoder(ae, source, file, AE_PLAN, extra)

    straight = tmp_path / "straight.safetensors"
    killed = tmp_path / "killed.safetensors"
    run(straight, ShapesSource(16))
    with pytest.raises(KeyboardInterrupt):
        run(killed, Interrupted(16))
    assert not killed.exists()
    run(killed, ShapesSource(16))
    assert digest(read_tensors(straight)) == digest(read_tensors(killed))
    # what learned along is thrown away: the file loads, and its latents have unit deviation
    monkeypatch.setitem(AUTOENCODERS, cfg.name, cfg)
    z = load_autoencoder(cfg.name, str(killed)).encode(ShapesSource(16).batch(torch.arange(256))[0])
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_batch_norm_statistics_are_those_of_the_finished_weights(tmp_path):
    """Moving ones lag behind, and are not part of a run's state."""
    ae = new_autoencoder(DCAE_STYLES["in"])
    train_autoencoder(ae, ShapesSource(16), tmp_path / "ae.safetensors", AE_PLAN)
    before = digest(ae.state_dict())
    estimate_batch_norm(ae.requires_grad_(True).train(), ShapesSource(16), AE_PLAN.batch)
    assert digest(ae.state_dict()) == before


def test_an_autoencoder_can_be_pulled_towards_anothers_latents(tmp_path):
    cfg = DCAE_STYLES["in"]
    ae = new_autoencoder(cfg)
    extra = LatentAlignment(calibrated(TINY_KL), cfg.channels, 10.0)
    x = ShapesSource(32).batch(torch.arange(16))[0]
    z = ae.moments(x)[0].detach().requires_grad_()
    before = extra(x, z)
    before.backward()
    assert z.grad.any()
    train_autoencoder(ae, ShapesSource(32), tmp_path / "ae.safetensors", Plan(10, 2e-3, 8), extra)
    assert extra(x, ae.moments(x)[0]) < 0.8 * before


def test_the_script_aligns_an_autoencoder_and_prints_what_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "1", "--batch", "2", "--res", "32", "--ratio", "0.5", "--device", "cpu"]
    align_autoencoder.main(flags)
    name = "tiny-dc-ae-f32c32"
    file = Path(f"runs/{name}-0.5.safetensors")
    assert load_autoencoder(name, str(file)).cfg.scale != load_autoencoder(name).cfg.scale
    assert f"--base tiny --init base --ae {name} --ae-weights {file}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is finished; give another --out"):
        align_autoencoder.main(flags)


# ---- guidance distillation -----------------------------------------------------------------------

@torch.no_grad()
def test_distillation_asks_for_what_guidance_in_two_passes_says():
    """Eq. 3 and 4."""
    teacher = scramble(Flux(replace(TINY_FLUX, guidance_embed=False)))
    teacher.null = random_text(teacher.cfg, 1)
    z, x0 = torch.randn(2, 3, TINY_FLUX.in_channels, 4, 4)
    t = torch.tensor([0.2, 0.5, 0.8])
    y = replace(random_text(teacher.cfg, 3), guidance=torch.tensor([1.0, 3.0, 7.0]))
    student = with_guidance_embed(teacher)
    loss, pred, target = distillation_loss(teacher, student, z, t, y, x0)
    xt, _ = path(x0, z, t)
    # it starts as its teacher without guidance, whatever it reads
    assert_near(pred, teacher(xt, t, y), 1e-6)
    for i in range(3):
        one = slice(i, i + 1)
        guided = guided_velocity(teacher, xt[one], t[one], y[one], float(y.guidance[i]))
        assert_near(target[one], guided, 1e-5)
    # at guidance 1 the student gives that already, the farther the less
    assert loss[0] < 1e-9 < loss[1] < loss[2]


def test_a_distilled_run_reads_its_guidance_and_its_teacher_does_not(words_base, monkeypatch):
    monkeypatch.setattr(train, "compile_blocks", lambda model: None)
    short = ["--batch", "4", "--pictures", "32", "--train-steps", "1", "--device", "cpu", "--dtype", "fp32"]
    finetune.main(["--base", "test-words", "--init", "scratch", "--out", "runs/teacher", *short])
    plan = Plan(1, 1e-3, 4, ema=0.9)
    make_weights.distill_guidance("test-words", Path("runs/teacher"), Path("runs/student"), plan, 32, "cpu")
    teacher, _ = load_run("runs/teacher")
    student, info = load_run("runs/student")
    assert (teacher.cfg.guidance_embed, student.cfg.guidance_embed) == (False, True)
    assert info["kind"] == "distill"
    assert student.cfg.sampling == BASES["test-words"].sampling


# ---- make_weights.py -----------------------------------------------------------------------------

@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Two stages that write empty files, "first" and "second", in a working folder -> what was made"""
    made = []

    def make(file, device):
        made.append(file.stem)
        write_tensors(file, {"x": torch.zeros(1)})

    names = ("first", "second")
    table = {name: make_weights.Stage(make, f"weights/{name}.safetensors") for name in names}
    monkeypatch.setattr(make_weights, "STAGES", table)
    monkeypatch.setattr(make_weights, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return made


def test_what_is_finished_is_not_made_again_and_installed_only_if_asked(stages):
    make_weights.main(["--only", "second"])
    make_weights.main([])
    assert stages == ["second", "first"]
    assert not Path("weights").exists()
    make_weights.main(["--only", "first", "--install"])
    assert stages == ["second", "first"]
    assert [file.name for file in Path("weights").iterdir()] == ["first.safetensors"]


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Every stage in two steps of few pictures, without compiling, in a working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_weights, "PICTURES", 8)
    for name, plan in make_weights.PLANS.items():
        monkeypatch.setitem(make_weights.PLANS, name, replace(plan, steps=2, batch=2, save_every=1))
    for name, flags in make_weights.FLAGS.items():
        flags = flags.replace("--compile", "--train-steps 2 --batch 2 --pictures 8 --res 64 --dtype fp32")
        monkeypatch.setitem(make_weights.FLAGS, name, flags)


def test_a_classifier_of_other_pictures_goes_to_a_file_of_its_own(short):
    for name in ("cat", "dog"):
        Path(f"pictures/{name}").mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (70, 64), (i, i, i)).save(f"pictures/{name}/{i}.png")
    flags = ["--only", "classifier", "--images", "pictures", "--device", "cpu"]
    with pytest.raises(ValueError, match="--classifier FILE"):
        make_weights.main(flags)
    make_weights.main([*flags, "--classifier", "own.safetensors"])
    assert load_classifier("own.safetensors").classes == ("cat", "dog")
    assert {file.name for file in Path(".").iterdir()} == {"pictures", "own.safetensors", "own"}
    with pytest.raises(ValueError, match="own.safetensors: exists; name another file"):
        make_weights.main([*flags, "--classifier", "own.safetensors"])


def test_a_model_is_made_on_the_new_kl_vae_and_published_without_paths(short, tmp_path):
    out = Path("runs/weights")
    kl = out / "tiny-kl-f8c4.safetensors"
    out.mkdir(parents=True)
    kl.write_bytes((make_weights.HERE / "weights/tiny-kl-f8c4.safetensors").read_bytes())
    make_weights.main(["--only", "tiny", "--device", "cpu"])
    made = out / "tiny-dit.safetensors"
    assert read_config(out / "tiny/model.safetensors")["ae_weights"] == str(kl)
    assert "runs" not in str(read_config(made)) and str(tmp_path) not in str(read_config(made))
    assert read_config(made)["kind"] == "scratch"
    shipped = make_weights.HERE / "weights/tiny-dit.safetensors"
    assert read_tensors(made).keys() == read_tensors(shipped).keys()
    # two steps at one size, two at both
    assert read_config(made)["steps"] == 4


def test_a_base_of_two_sizes_learns_as_many_tokens_of_each_and_keeps_its_own(short, tiny_base, monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda *args: None)
    seen = set()

    def train_loss(self, model, z, y, generator, own=Objective.train_loss):
        seen.add((model.cfg.res, model.cfg.pos_step, *z.shape, len(y)))
        return own(self, model, z, y, generator)

    monkeypatch.setattr(Objective, "train_loss", train_loss)
    flags = "--init scratch --num-classes 8 --pictures 8 --batch 2 --train-steps 1 --previews 0 --device cpu"
    finetune.main(["--base", "test", "--out", "first", *flags.split()])
    seen.clear()
    plan = Plan(8, 1e-3, 8, ema=0.9)
    run = make_weights.train_two_sizes(Path("first"), Path("second"), "cpu", plan, DataSettings(pictures=16))
    # 8 latents of 4x4 cells, 2 of 8x8
    assert seen == {(32, 2.0, 8, 4, 4, 4, 8), (64, 1.0, 2, 4, 8, 8, 2)}
    model, info = load_run(run)
    assert (model.cfg.res, model.cfg.pos_step, info["steps"]) == (64, 1.0, 9)
    assert train.read_settings(run)["facts"]["small"]["pictures"] == 16
    # a finished one is not trained again
    seen.clear()
    assert make_weights.train_two_sizes(Path("first"), Path("second"), "cpu") == run and not seen


# ---- causes.py -----------------------------------------------------------------------------------

def test_a_head_in_parts_is_the_linear_map_of_its_bin_of_t():
    head = BinnedLinear(torch.nn.Linear(4, 3), 2)
    head.t = torch.tensor([0.1, 0.9, 1.0])
    h = torch.randn(3, 5, 4)
    expected = torch.stack([head.parts[0](h[0]), head.parts[1](h[1]), head.parts[1](h[2])])
    assert_near(head(h), expected, 1e-6)


def test_causes_are_measured_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(causes, "UNSEEN", 16)
    for name in ("both", "held", "blocks"):
        few = replace(causes.ROWS[name], steps=2 if causes.ROWS[name].steps else 0)
        monkeypatch.setitem(causes.ROWS, name, few)
    causes.main(["--only", "both", "held", "blocks", "--pictures", "64", "--count", "8"])
    rows = json.loads(Path("runs/causes/causes.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["both", "held", "blocks"]
    assert len({row["val_loss"] for row in rows}) == 3
    with pytest.raises(ValueError, match="row bins needs --one-size RUN"):
        causes.main(["--only", "bins"])
    with pytest.raises(ValueError, match="first: python experiments/bases.py --only rich"):
        causes.main(["--only", "both", "rich"])


def test_bases_differ_in_one_thing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(causes, "UNSEEN", 16)
    few = "--pictures 64 --batch 8 --train-steps 2"
    monkeypatch.setattr(bases, "NARROW", f"--base tiny-narrow --init scratch {few}")
    monkeypatch.setattr(bases, "RICH_TUNING", f"--tune full {few}")
    monkeypatch.setattr(bases, "AE_PLANS", {64: Plan(2, 1e-3, 4)})

    # 2048 pictures of reference take seconds
    def small_metrics(file, folder, source, count, captions, own=evaluate.make_metrics):
        source.length = 64
        return own(file, folder, source, count, captions)

    monkeypatch.setattr(evaluate, "make_metrics", small_metrics)
    monkeypatch.setattr(causes, "make_metrics", small_metrics)
    # presets and autoencoders of one process only
    monkeypatch.setitem(BASES, "tiny-narrow", BASES["tiny"])
    monkeypatch.setitem(AUTOENCODERS, bases.RICH, AUTOENCODERS["tiny-kl-f8c4"])
    with pytest.raises(ValueError, match="rich needs --one-size RUN"):
        bases.main(["--device", "cpu"])
    small = ["--count", "8", "--device", "cpu"]
    bases.main(["--one-size", str(HERE / BASES["tiny"].weights), *small])
    assert json.loads(Path("runs/bases/rich/scores.json").read_text())["count"] == 8
    narrow, _ = load_run("runs/bases/narrow")
    rich, info = load_run("runs/bases/rich")
    assert (narrow.cfg.hidden_size, narrow.cfg.in_channels) == (96, 4)
    assert (rich.cfg.hidden_size, rich.cfg.in_channels, rich.cfg.ae) == (192, 16, bases.RICH)
    assert info["ae_weights"] == "runs/bases/tiny-kl-f8c16-64px.safetensors"
    # finished ones are scored again, not trained
    monkeypatch.setattr(finetune, "main", None)
    bases.main(["--only", "rich", *small])
    other = "rich was made with train_steps 2, not 3"
    with monkeypatch.context() as m, pytest.raises(ValueError, match=other):
        m.setattr(bases, "RICH_TUNING", f"--tune full {few}".replace("steps 2", "steps 3"))
        bases.main(["--only", "rich", *small])
    causes.main(["--only", "rich", "--pictures", "64", "--count", "8"])
    row, = json.loads(Path("runs/causes/causes.json").read_text())["rows"]
    assert row["row"] == "rich" and 0 < row["gap"] < 2


# ---- strategies.py -------------------------------------------------------------------------------

SMALL = "--base test --ae tiny-dc-ae-f32c32 --pictures 8 --batch 4 --device cpu --dtype fp32".split()


@pytest.mark.parametrize("name", TINIES)
def test_layer_rates_are_on_a_line_and_one_on_average(name):
    # block 10 begins as block 1 does
    cfg = replace(TINIES[name], depth=12)
    net = FAMILIES[type(cfg)](cfg)
    share = layer_rates(net, 3.0)
    layers = [net.embed_linear, *net.blocks, net.head_linear]
    names = {id(p): key for key, p in net.named_parameters()}
    for i, layer in enumerate(layers):
        shares = [share(names[id(p)]) for p in layer.parameters()]
        assert shares == pytest.approx([0.5 + i / (len(layers) - 1)] * len(shares))


def test_lora_comes_in_gradually_and_is_whole_at_the_end():
    net = tiny_model("dit")
    add_lora(net, 4, 8)
    on_step = lora_ramp(net, 4)
    for step, share in ((0, 0), (3, 0.75), (9, 1)):
        on_step(step)
        assert {m.scale for m in net.modules() if isinstance(m, LoRALinear)} == {2 * share}


def test_freeze_then_all_gives_both_scripts_their_flags(monkeypatch):
    called = []
    monkeypatch.setattr(strategies.align, "main", lambda argv: called.append(argv))
    monkeypatch.setattr(finetune, "main", lambda argv: called.append(argv))
    flags = ["--images", "DIR", "--train-steps", "4", "--out", "runs/x", "--pictures", "4", "--rank", "4"]
    strategies.main(["--strategy", "freeze-then-all", "--frozen-steps", "7", *flags])
    frozen = "--images DIR --pictures 4 --solver adamw --stage1-steps 0 --stage2-steps 7"
    assert called == [frozen.split(), [*flags, "--init", "align"]]


@pytest.mark.parametrize("flags, message", [
    (["--strategy", "gradual-lora", "--compile"], "leave it out of gradual-lora"),
    (["--strategy", "gradual-lora", "--ramp", "3", "--train-steps", "3"], "--ramp 3: it has to end before"),
    (["--strategy", "gradual-lora", "--ramp", "1", "--train-steps", "3", "--tune", "full"], "is no LoRA")])
def test_a_strategy_that_cannot_be_is_refused(flags, message, tiny_base):
    with pytest.raises(ValueError, match=message):
        strategies.main([*flags, *SMALL])


def test_layer_rates_train_a_run_end_to_end(tiny_base):
    """AdamW's first step is as large as the learning rate."""
    one_step = "--train-steps 1 --warmup 0 --schedule constant --weight-decay 0 --clip 0 --tune full"
    strategies.main(["--strategy", "layer-rates", *SMALL, *one_step.split(), "--ema", "0", "--out", "runs/x"])
    weights = read_tensors("runs/x/model.safetensors")
    torch.manual_seed(0)
    start = finetune.load_start(finetune.parser().parse_args(["--init", "base", *SMALL])).model.state_dict()
    ends = ("x_embedder.proj.weight", "final_layer.linear.weight")
    first, last = ((weights[name] - start[name]).abs().max() for name in ends)
    assert last / first == pytest.approx(3, rel=1e-2)
