"""The experiments: autoencoders are trained and aligned, guidance is distilled, strategies enter by hooks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import finetune
from align import LeastSquares
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import load_autoencoder, load_run, read_config, read_tensors, write_tensors
from experiments import align_autoencoder, make_weights, strategies
from experiments.align_autoencoder import LatentAlignment
from experiments.make_weights import distillation_loss, train_autoencoder, with_guidance_embed
from experiments.strategies import layer_rates, lora_ramp
from helpers import (
    DCAE_STYLES, TINIES, TINY_DIT, TINY_FLUX, TINY_KL, assert_near, random_text, scramble, tiny_base,
    tiny_model, words_base)
from lora import LoRALinear, add_lora
from model import BASES, FAMILIES, DiT, Flux
from sample import guided_velocity, path
from shapes import ShapesSource, load_classifier, shapes
from train import Plan

AE_PLAN = Plan(4, 1e-3, 3, warmup=2, schedule="linear", clip=1.0, save_every=2)


class Interrupted(ShapesSource):
    """Procedural pictures whose n-th batch is a kill."""

    def __init__(self, batches: int):
        super().__init__(16)
        self.left = batches

    def batch(self, indices):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
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

@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("cfg", [TINY_KL, DCAE_STYLES["in"]], ids=lambda cfg: cfg.name)
def test_an_autoencoders_training_resumes_to_the_same_numbers(cfg, pulled, tmp_path):
    def run(name, source):
        ae = new_autoencoder(cfg)
        extra = LatentAlignment(calibrated(TINY_KL), cfg.channels, 1.0) if pulled else None
        train_autoencoder(ae, source, tmp_path / name, AE_PLAN, extra)

    run("straight.safetensors", ShapesSource(16))
    with pytest.raises(KeyboardInterrupt):
        run("killed.safetensors", Interrupted(3))
    assert not (tmp_path / "killed.safetensors").exists()
    run("killed.safetensors", ShapesSource(16))
    straight, killed = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() == new_autoencoder(cfg).state_dict().keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


@pytest.mark.parametrize("cfg", [TINY_KL, DCAE_STYLES["in"]], ids=lambda cfg: cfg.name)
def test_a_trained_autoencoder_carries_the_scale_of_its_latents(cfg, tmp_path, monkeypatch):
    file = tmp_path / "trained.safetensors"
    train_autoencoder(new_autoencoder(cfg), ShapesSource(16), file, AE_PLAN)
    monkeypatch.setitem(AUTOENCODERS, cfg.name, cfg)
    ae = load_autoencoder(cfg.name, str(file))
    assert ae.cfg.scale != cfg.scale
    z = ae.encode(ShapesSource(16).batch(torch.arange(256))[0])
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_batch_norm_statistics_are_those_of_the_finished_weights(tmp_path):
    """Moving ones lag behind, and are not part of a run's state."""
    cfg = DCAE_STYLES["in"]
    ae = new_autoencoder(cfg)
    train_autoencoder(ae, ShapesSource(16), tmp_path / "ae.safetensors", replace(AE_PLAN, steps=20, lr=1e-2))
    x = ShapesSource(16).batch(torch.arange(48))[0]                  # the first 16 batches of 3
    inputs = []
    norm = ae.decoder.up_blocks[2][1].norm
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ae.decode_raw(ae.moments(x)[0])
    mean = inputs[0].mean(dim=(0, 2, 3))
    assert (norm.running_mean - mean).abs().max() < 0.5 * norm.running_var.sqrt().mean()
    assert norm.num_batches_tracked == 16


def unread_share(ae, base) -> float:
    """The share of the base's latents that no linear map of the deep ones gives."""
    x = ShapesSource(32, split="val").batch(torch.arange(64))[0]
    z = ae.moments(x)[0]
    target = F.adaptive_avg_pool2d(base.encode(x), z.shape[-2:])
    squares = LeastSquares(z.shape[1], target.shape[1])
    squares.add(z.movedim(1, -1), target.movedim(1, -1))
    return squares.loss(*squares.solve()) / target.var().item()


def test_an_autoencoder_can_be_pulled_towards_anothers_latents(tmp_path):
    cfg = DCAE_STYLES["in"]
    base = calibrated(TINY_KL)
    plan = Plan(40, 2e-3, 8, warmup=20, schedule="linear", clip=1.0)
    left = {}
    for ratio in (0.0, 10.0):
        ae = new_autoencoder(cfg)
        torch.manual_seed(0)
        extra = LatentAlignment(base, cfg.channels, ratio)
        train_autoencoder(ae, ShapesSource(32), tmp_path / f"{ratio}.safetensors", plan, extra)
        left[ratio] = unread_share(ae, base)
    assert left[10.0] < 0.85 * left[0.0]


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

def teacher_and_inputs():
    """A FLUX that is guided in two passes, and z, t, y, x0 for it; y with guidance 1, 3 and 7."""
    teacher = scramble(Flux(replace(TINY_FLUX, guidance_embed=False)))
    teacher.null = random_text(teacher.cfg, 1)
    g = torch.Generator().manual_seed(0)
    z, x0 = torch.randn(2, 3, TINY_FLUX.in_channels, 4, 4, generator=g)
    y = replace(random_text(teacher.cfg, 3), guidance=torch.tensor([1.0, 3.0, 7.0]))
    return teacher, (z, torch.tensor([0.2, 0.5, 0.8]), y, x0)


@torch.no_grad()
def test_a_student_starts_as_its_teacher_without_guidance_whatever_it_reads():
    teacher, (z, t, y, x0) = teacher_and_inputs()
    student = with_guidance_embed(teacher)
    assert student.cfg.guidance_embed
    assert_near(student(z, t, y), teacher(z, t, y), 1e-6)


@torch.no_grad()
def test_distillation_asks_for_what_guidance_in_two_passes_says():
    """Eq. 3 and 4."""
    teacher, (z, t, y, x0) = teacher_and_inputs()
    student = with_guidance_embed(teacher)
    loss, _, target = distillation_loss(teacher, student, z, t, y, x0)
    xt = path(x0, z, t)[0]
    for i in range(3):
        one = slice(i, i + 1)
        guided = guided_velocity(teacher, xt[one], t[one], y[one], float(y.guidance[i]))
        assert_near(target[one], guided, 1e-5)
    # at guidance 1 the student gives that already, the farther the less
    assert loss[0] < 1e-9 < loss[1] < loss[2]


@pytest.mark.parametrize("name, message", [("flux", "does not read it yet"), ("sana", "not into a Sana")])
def test_what_cannot_be_distilled_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        with_guidance_embed(tiny_model(name))


def test_a_distilled_run_reads_its_guidance_and_its_teacher_does_not(words_base, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
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


def test_what_is_finished_is_not_made_again(stages):
    make_weights.main(["--only", "second"])
    make_weights.main([])
    make_weights.main([])
    assert stages == ["second", "first"]


def test_the_shipped_weights_are_left_alone_unless_asked(stages):
    make_weights.main([])
    assert not Path("weights").exists()
    make_weights.main(["--only", "first", "--install"])
    assert [file.name for file in Path("weights").iterdir()] == ["first.safetensors"]


def test_the_stages_make_the_shipped_weights():
    shipped = {Path(stage.shipped).name for stage in make_weights.STAGES.values()}
    assert shipped == {file.name for file in (make_weights.HERE / "weights").glob("*.safetensors")}


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Every stage in two steps of few pictures, without compiling, in a working folder."""
    monkeypatch.chdir(tmp_path)
    for name, plan in make_weights.PLANS.items():
        monkeypatch.setitem(make_weights.PLANS, name, replace(plan, steps=2, batch=2, save_every=1))
    for name, flags in make_weights.FLAGS.items():
        flags = flags.replace("--compile", "--train-steps 2 --batch 2 --pictures 8 --res 64 --dtype fp32")
        monkeypatch.setitem(make_weights.FLAGS, name, flags)


def test_a_stage_of_its_own_loop_writes_a_file_like_the_shipped_one(short):
    make_weights.main(["--only", "classifier", "--device", "cpu"])
    made = Path("runs/weights/tiny-classifier.safetensors")
    shipped = make_weights.HERE / "weights/tiny-classifier.safetensors"
    assert read_tensors(made).keys() == read_tensors(shipped).keys()
    assert read_config(made) == read_config(shipped)


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
    assert not Path("runs").exists()


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


# ---- strategies.py -------------------------------------------------------------------------------
SMALL = "--base test --ae tiny-dc-ae-f32c32 --pictures 8 --batch 4 --device cpu --dtype fp32".split()


@pytest.mark.parametrize("name", TINIES)
def test_layer_rates_are_on_a_line_and_one_on_average(name):
    net = FAMILIES[type(TINIES[name])](TINIES[name])
    share = layer_rates(net, 3.0)
    layers = [net.embed_linear, *net.blocks, net.head_linear]
    shares = []
    for layer in layers:
        ids = {id(p) for p in layer.parameters()}
        (one,) = {share(key) for key, p in net.named_parameters() if id(p) in ids}
        shares.append(one)
    assert shares == pytest.approx([0.5 + i / (len(layers) - 1) for i in range(len(layers))])
    assert sum(shares) / len(shares) == pytest.approx(1)
    assert {layer_rates(net, 1.0)(key) for key, _ in net.named_parameters()} == {1.0}


def test_layer_rates_tell_block_1_from_block_10():
    share = layer_rates(DiT(replace(TINY_DIT, depth=12)), 3.0)
    assert share("blocks.1.x") < share("blocks.9.x") < share("blocks.10.x") < share("blocks.11.x")


def lora_net():
    net = tiny_model("dit")
    add_lora(net, 4, 8)
    return net, [m for m in net.modules() if isinstance(m, LoRALinear)]


@pytest.mark.parametrize("step, share", [(0, 0), (1, 0.25), (3, 0.75), (4, 1), (9, 1)])
def test_lora_comes_in_gradually_and_is_whole_at_the_end(step, share):
    net, loras = lora_net()
    on_step = lora_ramp(net, 4)
    on_step(2)
    on_step(step)
    assert {m.scale for m in loras} == {2 * share}


@pytest.mark.parametrize("flags, hook", [
    (["--strategy", "layer-rates", "--ratio", "3"], "lr_scale"),
    (["--strategy", "gradual-lora", "--ramp", "2"], "on_step")])
def test_a_strategy_is_a_finetune_from_the_base_with_a_hook(flags, hook, monkeypatch):
    called = []
    monkeypatch.setattr(finetune, "main", lambda argv, hooks: called.append((argv, hooks)))
    strategies.main([*flags, "--train-steps", "4", "--rank", "4"])
    (argv, hooks), = called
    assert argv == ["--init", "base", "--train-steps", "4", "--rank", "4"]
    assert list(hooks(lora_net()[0])) == [hook]


def test_freeze_then_all_gives_both_scripts_their_flags(monkeypatch):
    called = []
    monkeypatch.setattr(strategies.align, "main", lambda argv: called.append(argv))
    monkeypatch.setattr(finetune, "main", lambda argv: called.append(argv))
    flags = ["--images", "DIR", "--train-steps", "4", "--out", "runs/x", "--pictures", "4", "--rank", "4"]
    strategies.main(["--strategy", "freeze-then-all", "--frozen-steps", "7", *flags])
    frozen = "--images DIR --pictures 4 --solver adamw --stage1-steps 0 --stage2-steps 7"
    assert called == [frozen.split(), [*flags, "--init", "align"]]


@pytest.mark.parametrize("flags, message", [
    (["--strategy", "layer-rates", "--ratio", "0"], "--ratio 0: above 0"),
    (["--strategy", "gradual-lora", "--ramp", "0"], "--ramp 0: at least 1"),
    (["--strategy", "gradual-lora", "--compile"], "leave it out of gradual-lora"),
    (["--strategy", "gradual-lora", "--ramp", "3", "--train-steps", "3"], "--ramp 3: it has to end before"),
    (["--strategy", "gradual-lora", "--ramp", "1", "--train-steps", "3", "--tune", "full"], "is no LoRA")])
def test_a_strategy_that_cannot_be_is_refused(flags, message, tiny_base):
    with pytest.raises(ValueError, match=message):
        strategies.main([*flags, *SMALL])


def test_layer_rates_train_a_run_end_to_end(tiny_base):
    """AdamW's first step is as large as the learning rate."""
    one_step = "--train-steps 1 --warmup 0 --schedule constant --ema 0 --weight-decay 0 --clip -1 --tune full"
    weights = {}
    for ratio in ("1", "3"):
        flags = ["--strategy", "layer-rates", "--ratio", ratio, "--out", f"runs/{ratio}"]
        strategies.main([*flags, *SMALL, *one_step.split()])
        weights[ratio] = read_tensors(f"runs/{ratio}/model.safetensors")
    torch.manual_seed(0)
    start = finetune.start_from_base("test", None, "tiny-dc-ae-f32c32", None, 0).model.state_dict()
    for name, share in (("x_embedder.proj.weight", 0.5), ("final_layer.linear.weight", 1.5)):
        even, uneven = ((weights[ratio][name] - start[name]).abs().max() for ratio in ("1", "3"))
        assert uneven / even == pytest.approx(share, rel=1e-3)
