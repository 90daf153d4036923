"""Drawing: path, times, guidance, solvers, DDPM's chain, the choice of speed, and the script."""

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import checkpoints
import sample
from autoencoder import DCAE, KLVAE, DCAEConfig
from checkpoints import ae_table, config_dict, find_weights, load_base, load_weights, write_tensors
from data import load_image
from fast import compile_blocks
from flags import parse_classes
from helpers import (  # noqa: F401 (fixtures: encoders, fresh_compiler, tiny_base, words_base)
    DDPM_DIT, DEEP_DIT, EVERY, ROOT, TINY_DIT, TINY_KL, assert_near, deep_model, encoders, fresh_compiler,
    on_meta, parity, parity_cases, random_condition, relative_error, scramble, tiny_base, tiny_model,
    words_base)
from lora import add_lora, lora_state
from model import BASES, FAMILIES, DiT, Flux, Sampling, ddpm_alphas_cumprod
from sample import (
    START, DDPMChain, Pipeline, Speed, choose_speed, generate, guided_velocity, integrate, noise, path,
    resolve_shift, sample_t, save_png, time_grid, to_uint8)
from shapes import SHAPES
from test_model import fill, stored, stored_condition

T = torch.tensor([0.25, 0.5])
Y = torch.tensor([0, 3])


# ---- path, times, solvers ------------------------------------------------------------------------

def test_the_path_is_straight():
    x0, x1 = torch.randn(2, 3, 4, 2, 5)
    assert_near(path(x0, x1, torch.full((3,), 0.25))[0], 0.75 * x0 + 0.25 * x1, 1e-6)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_a_solver_has_its_order(method, order):
    """dx/dt = x cos(5t): x(1) = x(0) exp(sin(5) / 5)."""
    def velocity(x, t):
        return x * torch.cos(5 * t).view(1, 1, 1, 1)

    def error(n):
        x = integrate(velocity, torch.ones(1, 1, 1, 1), time_grid(n), method)
        return abs(x.item() - math.exp(math.sin(5) / 5))

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.1)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps, shift", [(1, 3.0), (4, 1.0), (20, 3.0), (30, 2.83)])
def test_dpm_solver_matches_diffusers(steps, shift):
    """On a velocity that bends: steps few and many, where diffusers chooses the orders differently."""
    diffusers = pytest.importorskip("diffusers")
    x = x0 = torch.randn(2, 4, 8, 8)

    def velocity(x, t):
        return torch.tanh(2 * x + 1) * (1 + t.view(-1, 1, 1, 1)) - x

    official = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    official.set_timesteps(steps)
    for t, sigma in zip(official.timesteps, official.sigmas):
        x = official.step(-velocity(x, 1 - sigma.expand(2)), t, x).prev_sample
    times = time_grid(steps, shift, START["dpm"])
    assert_near(integrate(velocity, x0, times, "dpm"), x, 2e-5)


@pytest.mark.parametrize("r", [1, 1 / 3, 2.83])
def test_times_rise_from_exactly_0_to_exactly_1_with_noise_levels_shifted_as_published(r):
    grid = time_grid(20, r)
    level = torch.linspace(1, 0, 21, dtype=torch.float64)
    assert (grid[0], grid[-1]) == (0, 1)
    assert_near(1 - torch.tensor(grid).double(), r * level / (1 + (r - 1) * level), 1e-6)


@pytest.mark.parametrize("name", parity_cases("dcgen_schedules"))
def test_schedules_follow_from_the_size_as_published(name):
    rules = {"flux2_r": "flux2", "flowmatch_mu": "mu"}
    schedules = parity(name).info["schedules"]
    assert {s["kind"] for s in schedules} == set(rules)
    for s in schedules:
        f = round(math.sqrt(s["height"] * s["width"] / s["tokens"]))
        shift = resolve_shift(rules[s["kind"]], s["channels"], s["height"] // f, s["width"] // f, 1)
        noise_levels = [1 - t for t in time_grid(s["steps"], shift)]
        assert noise_levels == pytest.approx(s["sigmas"], abs=1e-6), s["size"]


@pytest.mark.parametrize("rule, patch, shift", [
    ("3.0", 2, 3.0),
    ("mu", 2, math.exp(1.15)),  # 4096 tokens
    ("flux2", 2, 16.0),
    ("flux2", 1, 16.0),  # packing does not count
])
def test_a_shift_is_a_number_or_a_rule(rule, patch, shift):
    assert resolve_shift(rule, 64, 128, 128, patch) == pytest.approx(shift)


def test_training_times_are_distributed_as_the_sampling_grid():
    g = torch.Generator().manual_seed(0)
    uniform = sample_t(100_000, g, "uniform", 2.83).sort().values
    assert (uniform - torch.tensor(time_grid(99_999, 2.83))).abs().max() < 0.01
    # the shift is a translation of the logit
    logit = torch.logit(sample_t(100_000, g, "logit-normal", 2.83))
    assert logit.mean() == pytest.approx(-math.log(2.83), abs=0.02)
    assert logit.std() == pytest.approx(1, abs=0.02)


# ---- guidance ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EVERY)
def test_guidance_extrapolates_from_the_null_condition_but_no_variance(name):
    net = tiny_model(name)
    k = net.cfg.in_channels
    x = torch.randn(2, k, 8, 8)
    y = random_condition(net.cfg)
    call = net.forward_native
    cond = call(x, T, y)
    null = call(x, T, net.null_condition(y))
    got = guided_velocity(net, x, T, y, 3.0, call=call)
    assert_near(got[:, :k], (null + 3 * (cond - null))[:, :k], 1e-4)
    assert_close(got[:, k:], cond[:, k:])
    # one pass, which needs none
    net.null_condition = None
    assert_close(guided_velocity(net, x, T, y, 1.0, call=call), cond)


# ---- DDPM's chain --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", parity_cases("dit", "dit_patch1"))
def test_the_ddpm_chain_matches_the_official_code(name):
    case, net = stored(name)
    x, t, y = (case.inputs[f"pmv_{key}"] for key in "xty")
    chain = DDPMChain()
    mean, log_var, x1 = chain.predict(net.forward_native(x, t, y), x, t)
    got = {"alphas_cumprod": chain.ab, "posterior_log_variance_clipped": chain.log_var, "pmv_mean": mean,
           "pmv_log_variance": log_var, "pmv_pred_xstart": x1}
    for key, value in got.items():
        assert_near(value, case.outputs[key])


@pytest.mark.parametrize("name", parity_cases("dit", "dit_patch1"))
@pytest.mark.parametrize("kind, respacing", [("even8", "8"), ("stride8", "ddim8")])
def test_guided_ddim_sampling_matches_the_official_code(name, kind, respacing):
    case, net = stored(name, guided_channels=BASES["dit-xl"].guided_channels)
    y = case.inputs["ddim_y"]
    chain = DDPMChain.spaced(8, ddim=kind == "stride8")
    assert chain.steps == case.info["respacing"][respacing]

    def network(x, clock):
        return guided_velocity(net, x, clock, y, case.info["cfg_scale"], call=net.forward_native)

    x = chain.sample(network, case.inputs["ddim_xT"], ddim=True)
    assert_near(x, case.outputs[f"ddim_{kind}_steps"][-1], 1e-4)


@pytest.mark.parametrize("n", [1, 2, 250])
def test_spaced_chains_keep_the_noise_levels_of_their_steps(n):
    chain = DDPMChain.spaced(n)
    assert len(set(chain.steps)) == n
    assert torch.equal(chain.ab, ddpm_alphas_cumprod()[chain.steps])
    assert chain.log_var.isfinite().all()


def test_ancestral_sampling_draws_the_distribution_it_was_trained_on():
    """With the exact epsilon of data N(1, 0.5^2), and the lower bound as variance. If the noise were the same
    in every step, it would add up."""
    chain = DDPMChain()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]

    def network(x, clock):
        ab = chain.ab[int(clock[0])].item()
        x1 = 1 + 0.25 * ab**0.5 / (0.25 * ab + 1 - ab) * (x - ab**0.5)
        return torch.cat([(x - ab**0.5 * x1) / (1 - ab) ** 0.5, torch.zeros_like(x)], dim=1)

    x = chain.sample(network, noise(generators, (4, 16, 16)), False, generators)
    assert x.mean() == pytest.approx(1, abs=0.05)
    assert x.std() == pytest.approx(0.5, abs=0.05)


# ---- official loops ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", parity_cases("sana_dcgen"))
def test_sana_with_its_solver_matches_the_official_loop(name):
    """Eight guided steps. The official model cuts its clock to whole steps; its null keeps the mask."""
    case, net = stored(name, integer_time=True)
    config = case.config
    cond = stored_condition(net, case.inputs)
    net.null = replace(cond[:1], tokens=case.weights["y_embedder.y_embedding"][None], mask=None)

    def velocity(x, t):
        return guided_velocity(net, x, t, cond, config["cfg_scale"])

    times = time_grid(config["sampler_steps"], config["flow_shift"], START["dpm"])
    z = integrate(velocity, case.inputs["sample_noise"], times, "dpm")
    assert_near(z, case.outputs["dpms_sample"], 1e-4)


@pytest.mark.parametrize("name", parity_cases("dcgen_pipeline"))
@pytest.mark.parametrize("kind, rule", [("flowmatch", "mu"), ("flux2", "flux2")])
def test_dc_gen_flux_draws_the_official_picture(name, kind, rule, monkeypatch):
    """The authors' whole text-to-image loop, with both schedules."""
    case = parity(name)
    config = case.config
    v = config["vae"]

    def part(prefix):
        return {key.removeprefix(prefix): v for key, v in case.weights.items() if key.startswith(prefix)}

    net = fill(config["transformer"], part("transformer."))
    cfg = DCAEConfig(
        "test", v["latent_channels"], v["scaling_factor"], v["encoder_block_out_channels"],
        v["encoder_layers_per_block"], v["decoder_layers_per_block"], 9, 9)
    ae = load_weights(DCAE(cfg), part("vae."), ae_table(cfg, part("vae."))).eval()
    text = stored_condition(net, {
        "txt": case.inputs["prompt_embeds"],
        "y": case.inputs["pooled_prompt_embeds"],
        "guidance": torch.full((2,), config["guidance_scale"]),
    })
    monkeypatch.setattr(sample, "noise", lambda *args: case.inputs["noise"])
    sampling = Sampling(config["steps"], 1.0, shift=rule)
    picture = generate(net, ae, text, [0, 1], sampling, (config["height"], config["width"]))
    assert_near((picture + 1) / 2, case.outputs[f"{kind}_image"], 1e-4)


# ---- pictures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("pictures, device, fast, offload, taken", [
    (9999, "cpu", None, False, "eager (on a CPU)"),
    (198, "cuda", None, False,
     "modulations hoisted, eager (1,980 evaluations, too few for a minute of compiling)"),
    (199, "cuda:1", None, False,
     "modulations hoisted, compiled, steps captured (2,000 evaluations, enough for a minute of compiling)"),
    (1, "cuda", True, True, "modulations hoisted, compiled (--fast)"),
    (9999, "cuda", False, False, "modulations hoisted, eager (--eager)"),
])
def test_a_minute_of_compiling_has_to_be_paid_for(pictures, device, fast, offload, taken):
    sampling = Sampling(num_steps=20, batch=2)
    assert str(choose_speed(pictures, sampling, device, fast, offload)) == taken


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm", "ddim", "ddpm"])
@pytest.mark.parametrize("hoist", [False, True])
def test_a_picture_depends_on_its_seed_and_not_on_batches_or_hoisting(sampler, hoist):
    net = tiny_model("ddpm")
    ae = scramble(KLVAE(TINY_KL))
    y = torch.tensor([0, 5, 2, 7])
    seeds = np.arange(4)
    sampling = Sampling(4, 2.0, sampler=sampler, batch=3)
    four = generate(net, ae, y, seeds.tolist(), sampling, (16, 24))
    pipeline = Pipeline(net, ae, sampling, (16, 24), speed=Speed(hoist=hoist))
    # the same size twice, then a smaller one
    for rows in ([0, 1], [3, 2], [1]):
        assert_near(pipeline(y[rows], seeds[rows].tolist()), four[rows], 1e-4)
        assert bool(pipeline.hoisted) == hoist
    assert relative_error(pipeline(y[:1], [11])[0], four[0]) > 0.01


def test_tables_that_would_fill_the_memory_are_not_made():
    net = tiny_model("dit")
    pipeline = Pipeline(net, on_meta(KLVAE, TINY_KL), Sampling(3000, 2.0), speed=Speed(hoist=True))
    pipeline.evaluation(Y)
    assert pipeline.hoisted is None


def test_a_compiler_that_fails_is_reported_and_drawing_goes_on(capsys, monkeypatch):
    def fail(*args):
        raise AssertionError("wrong stride\nat a place")

    def broken(blocks):
        blocks[0]._compiled_call_impl = fail

    monkeypatch.setattr(sample, "compile_blocks", broken)
    net = tiny_model("dit")
    ae = scramble(KLVAE(TINY_KL))
    sampling = Sampling(2, 2.0)
    want = generate(net, ae, Y, [1, 2], sampling)
    assert_near(Pipeline(net, ae, sampling, speed=Speed(hoist=True, compile=True))(Y, [1, 2]), want)
    message = "compiling failed (AssertionError: wrong stride); drawing goes on without it\n"
    assert capsys.readouterr().out == message


def test_a_model_comes_back_from_a_device_without_a_copy():
    net = nn.BatchNorm1d(4).requires_grad_(False)
    weight = net.weight
    places = [value.data_ptr() for value in net.state_dict().values()]
    with sample.on_device(net, "meta"):
        assert all(value.is_meta for value in net.state_dict().values())
    assert [value.data_ptr() for value in net.state_dict().values()] == places
    assert net.weight is weight


def test_pixels_are_rounded_and_clipped_and_come_back_from_disk(tmp_path):
    file = tmp_path / "a/b.png"
    x = torch.linspace(-1.3, 1.3, 3 * 64 * 64).view(1, 3, 64, 64)
    save_png(file, to_uint8(x)[0])
    assert (load_image(file, 64) - x[0].clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


def test_thumbnails_are_no_larger_than_a_side():
    assert sample.thumbnails(torch.zeros(1, 3, 64, 1024)).shape == (1, 3, 32, 512)


# ---- flags ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg, settings, message", [
    (TINY_DIT, dict(sampler="ddim"), "--sampler ddim is for a model that predicts epsilon.*use euler"),
    (TINY_DIT, dict(num_steps=0), "--num-steps 0: at least 1"),
    (DDPM_DIT, dict(num_steps=300, sampler="ddim"), "--num-steps 300.*nearest is 250"),
    (DDPM_DIT, dict(num_steps=1001, sampler="ddpm"), "--num-steps 1001.*1 .. 1000"),
])
def test_steps_and_samplers_that_do_not_fit_the_model_are_refused(cfg, settings, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(on_meta(DiT, cfg), on_meta(KLVAE, TINY_KL), Sampling(**settings))


def test_classes_are_names_or_numbers_in_turn():
    assert parse_classes(None, SHAPES, 9).tolist() == [*range(8), 0]
    assert parse_classes(["star", "2"], SHAPES, 3).tolist() == [5, 2, 5]
    # a folder's name goes first
    assert parse_classes(["7"], ("3", "7"), 1).tolist() == [1]
    names = sample.class_names(BASES["dit-xl"], {})
    assert parse_classes(["Golden_Retriever", "360"], names, 2).tolist() == [207, 360]


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """An empty working folder, and weights are not to be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "build", lambda *args: pytest.fail("loaded weights"))


@pytest.mark.parametrize("flags, message", [
    ("tiny --res 96x100", "--res 96x100: tiny-kl-f8c4 with patch 2 needs a multiple of 16; try 96 or 96x112"),
    ("tiny --res 5", "try 16$"),
    ("tiny --res 8x8x8", "--res 8x8x8: give pixels a side, or WIDTHxHEIGHT"),
    ("tiny --classes 8", "--classes 8: not a class; give 0 .. 7 or circle, square"),
    ("tiny --classes ²", "--classes ²: not a class"),
    ("tiny --shift mue", "--shift mue: give a positive number, or one of mu, flux2"),
    ("tiny --shift nan", "--shift nan: give a positive number"),
    ("flux-kera --prompt x", "--base flux-kera: not a preset .*flux-krea.*sana-4.8b"),
    ("flux-krea", "draws prompts: give --prompt TEXT"),
    ("flux-krea --classes 3", "--classes: flux-krea draws prompts"),
    ("dit-xl --prompt x", "--prompt: dit-xl draws classes"),
    ("sana-1.6b --prompt x --guidance 3", "--guidance: sana-1.6b reads no guidance number"),
    ("flux-krea --prompt x --negative y", "--negative: .*--cfg-scale above 1"),
    ("flux-krea --prompts gone.txt", "--prompts gone.txt: not a readable text file"),
    ("tiny --dataset", "--dataset: name its folder"),
    ("tiny --dataset --out x --weights gone", "--weights gone: no such file or folder"),
    ("tiny --lora gone", "--lora gone: no such file or folder"),
    ("tiny --guidance 5", "--guidance: tiny reads no guidance number: it is guided in two"),
    ("tiny tiny", "RUN tiny: a preset is named by --base tiny"),
    ("tiny --classes cirle", "did you mean circle.$"),
    ("tiny --shift inf", "--shift inf: give a positive number"),
    ("tiny --sampler ddim", "--sampler ddim is for a model that predicts epsilon"),
    ("dit-xl --sampler ddim --num-steps 300", "--num-steps 300.*nearest is 250"),
    ("tiny --export /dev/null/x", "--export /dev/null/x: /dev/null is a file, not a folder"),
    ("tiny --out /dev/null/x", "--out /dev/null/x: /dev/null is a file, not a folder"),
    ("tiny --device cuda:99", "--device cuda:99: this "),
])
def test_a_wrong_flag_is_found_before_anything_is_loaded(flags, message, no_weights):
    with pytest.raises(ValueError, match=message):
        sample.main(["--base", *flags.split()])


@pytest.mark.parametrize("flags, facts", [
    ("dit-xl", "3.80 TFLOPs a step of 8, 25 steps"),  # 118.6 G multiplications, in two passes
    ("flux-krea", "11,901.4M parameters, 23.80 GB in bf.*T5E.*4,096 tokens and 512 of text.*74.38 TFLOPs"),
    ("dc-gen-flux-1k", "1,024 tokens.*21.50 TF.*24.[6-9]. GB while denoising, 25... GB while decoding"),
    # each network by itself: without the decoder's 0.8 GB, without the model's 23.8
    ("dc-gen-flux-1k --offload", "24.[0-2]. GB while denoising, 1... GB while decoding"),
])
def test_a_dry_run_prints_cost_and_memory_and_touches_nothing(flags, facts, no_weights, capsys):
    sample.main(["--base", *flags.split(), "--dtype", "bf16", "--dry-run"])
    assert re.search(facts, capsys.readouterr().out, re.DOTALL)
    assert not any(Path().iterdir())


# ---- the script: classes -------------------------------------------------------------------------

def facts_of(file) -> dict:
    """The text fields of a picture, "dcgen" parsed, and its size."""
    with Image.open(file) as picture:
        return picture.info | {"dcgen": json.loads(picture.info["dcgen"]), "size": picture.size}


def run(flags: str):
    sample.main(f"--device cpu --dtype fp32 {flags}".split())


def draw(out: str, flags: str) -> np.ndarray:
    """The pictures that the script draws into a folder."""
    run(f"--out {out} {flags}")
    return np.stack([np.array(Image.open(file)).astype(int) for file in sorted(Path(out).iterdir())])


def assert_same(a: np.ndarray, b: np.ndarray):
    assert np.abs(a - b).max() <= 1


def write_run(name: str, model, ends=(".A", ".B"), **info) -> str:
    """A run's file with the model's embedder, head and the tensors with these endings: its LoRA."""
    facts = dict(base="test", base_weights=None, kind="align", model=config_dict(model.cfg))
    part = {}
    for key, value in model.state_dict().items():
        if key.startswith((model.EMBEDDER, model.HEAD)) or key.endswith(ends):
            part[key] = value
    write_tensors(Path("runs") / name / "model.safetensors", part, facts | info)
    return f"runs/{name}"


def test_pictures_of_a_base_have_names_and_facts(tiny_base):
    run("--base test --count 3 --num-steps 2 --classes star circle --seed 5 --batch 2")
    files = sorted(file.name for file in Path("runs/samples-test").iterdir())
    assert files == ["00000_seed5.png", "00001_seed6.png", "00002_seed7.png"]
    assert Path("runs/samples-test-grid.png").is_file()
    info = facts_of(f"runs/samples-test/{files[1]}")
    assert (info["size"], info["class"], info["seed"]) == ((64, 64), "circle", "6")
    assert info["dcgen"] == dict(
        sampler="euler", num_steps=2, cfg_scale=3.0, shift=1.0, weights="test",
        model=config_dict(BASES["test"]))


def test_a_run_is_drawn_with_its_own_shift_and_classes_which_lead_no_file_name_astray(tiny_base):
    model = deep_model(tiny_base)
    model.cfg = replace(DEEP_DIT, sampling=replace(DEEP_DIT.sampling, shift=2.0))
    folder = write_run("align-test-1", model, classes=["../../x", *SHAPES[1:]])
    run("--count 1 --num-steps 1")
    info = facts_of(f"{folder}/samples/00000_seed0.png")
    assert (info["class"], info["dcgen"]["shift"]) == ("../../x", 2.0)


def test_a_run_is_drawn_by_its_name_and_has_a_base_of_its_own(tiny_base, capsys):
    folder = write_run("align-test-1", deep_model(tiny_base))
    for name in (folder, f"{folder}/model.safetensors"):
        run(f"{name} --base test --count 1 --num-steps 1 --out {folder}/x")
    assert f"{folder}/model.safetensors: weights as trained, base test" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"--base tiny: {folder} was trained from test; leave --base out"):
        run(f"{folder} --base tiny")


def test_pictures_of_other_settings_are_not_written_over(tiny_base, capsys):
    flags = "--base test --count 2 --num-steps 1"
    Path("x").mkdir()
    first = draw("x", flags)
    # the same settings make the same pictures, in the same place
    assert_same(first, draw("x", flags))
    assert "other settings" not in capsys.readouterr().out
    run(f"{flags} --cfg-scale 2 --out x")
    run(f"{flags} --classes star --out x")
    run(f"{flags} --classes star --out x")
    write_tensors(BASES["test"].weights, scramble(DiT(BASES["test"]), seed=9).state_dict())
    run(f"{flags} --out x")
    lines = [line for line in capsys.readouterr().out.splitlines() if "other settings" in line]
    said = "x holds results of other settings and stays; the new ones go to x-"
    assert lines == [f"{said}{n}" for n in (2, 3, 3, 4)]
    assert sorted(path.name for path in Path().glob("x*")) == sorted(
        name for folder in ("x", "x-2", "x-3", "x-4") for name in (folder, f"{folder}-grid.png"))
    assert_same(first, np.stack([np.array(Image.open(file)) for file in sorted(Path("x").iterdir())]))


@pytest.mark.parametrize("there, name", [
    (None, "a.json"),
    ({"settings": "this"}, "a.json"),
    ({"settings": "that"}, "a-2.json"),
    ({}, "a-2.json"),
    ([], "a-2.json"),
])
def test_a_file_of_unknown_settings_counts_as_another_one(there, name, tmp_path):
    file = tmp_path / "a.json"
    if there is not None:
        file.write_text(json.dumps(there))
    assert sample.free_path(file, "this") == tmp_path / name


@pytest.mark.parametrize("key", [
    "x_embedder.proj.weight", "blocks.0.attn.qkv.bias", "final_layer.linear.weight"])
def test_weights_that_are_not_finite_are_named_before_drawing(key, tiny_base):
    state = tiny_base.state_dict()
    state[key].view(-1)[-1] = math.nan
    write_tensors(BASES["test"].weights, state)
    with pytest.raises(ValueError, match=f"^test: {key} is not finite"):
        run("--base test")
    assert not Path("runs").exists()


def test_pictures_that_are_not_finite_are_not_written(tiny_base, monkeypatch):
    monkeypatch.setattr(Pipeline, "decode", lambda self, z: torch.full((len(z), 3, 64, 64), math.nan))
    with pytest.raises(ValueError, match="^test: 2 of 2 pictures are not finite"):
        run("--base test --count 2 --num-steps 1")
    assert not list(Path().rglob("*.png"))


def test_six_lines_of_python_draw_what_the_script_draws(tiny_base):
    write_run("align-test-1", deep_model(tiny_base), classes=["a", "b", *SHAPES[2:]])
    drawn = draw("x", "--base runs/align-test-1 --classes b star --seed 3 --num-steps 25")
    model, info = load_base("runs/align-test-1")
    ae = checkpoints.load_autoencoder(model.cfg.ae)
    images = generate(model, ae, sample.conditions(model, ["b", 5] * 4, info), seeds=range(3, 11))
    assert_same(drawn, to_uint8(images).astype(int))
    with pytest.raises(ValueError, match="8 conditions and 2 seeds"):
        generate(model, ae, torch.arange(8), seeds=range(2))


def test_fast_draws_the_same_pictures_on_a_cpu(tiny_base, capsys, fresh_compiler, monkeypatch):
    monkeypatch.setattr(sample, "compile_blocks", partial(compile_blocks, backend="eager"))
    monkeypatch.setattr(sample, "compile_decoder", lambda ae: None)
    flags = "--base test --count 2 --num-steps 2"
    assert_same(draw("plain", flags), draw("fast", f"{flags} --fast"))
    assert "speed: modulations hoisted, compiled (--fast)" in capsys.readouterr().out
    assert fresh_compiler["stats"]["unique_graphs"] == 1


def test_a_second_interrupt_kills_at_once():
    # a process that was started in the background ignores SIGINT, and so do its children
    program = ("import atexit, signal, sys, time\nsys.path.insert(0, sys.argv[1])\nimport sample\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "atexit.register(time.sleep, 60)\n"
               "def main():\n    print('ready', flush=True)\n    time.sleep(60)\n"
               "sample.run_main(main)")
    command = [sys.executable, "-c", program, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "interrupted\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT


def test_an_error_of_the_user_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.run_main(lambda: int("x"))
    assert capsys.readouterr().err == "error: invalid literal for int() with base 10: 'x'\n"


@pytest.mark.parametrize("error, line", [
    (OSError(28, "No space left on device", "x/ckpt.pt"), "x/ckpt.pt: No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU's memory is full; lower --batch"),
])
def test_a_full_disk_and_a_full_gpu_are_one_line(error, line, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit, match="2"):
        sample.run_main(main)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1


def make_parser():
    p = sample.Parser("What it does.\n\n    as written", "[RUN]")
    sample.add_model_args(p)
    p.add_argument("--prompt", action="append")
    p.add_argument("--lr", type=sample.within(float, 0, 1), default=0.5)
    p.add_argument("--warm", type=sample.at_least(float, 0))
    p.add_argument("run", nargs="?")
    p.set_defaults(base="dit-xl")
    return p


@pytest.mark.parametrize("flags, line", [
    ("--sede 3", "unrecognised --sede; did you mean --seed?"),
    ("--weight=x", "unrecognised --weight; did you mean --weights?"),
    ("--ckpt x", "unrecognised --ckpt"),
    ("--dtype fp33", "--dtype fp33: choose from auto, bf16, fp32; did you mean fp32?"),
    ("--seed -1", "--seed -1: 0 to 4294967295"),
    ("--res 0", "--res 0: at least 1"),
    ("--res 0.5", "--res 0.5: not a whole number; at least 1"),
    ("--lr nan", "--lr nan: 0 to 1"),
    ("--warm inf", "--warm inf: at least 0"),
    ("--lr", "--lr: expected one argument"),
])
def test_a_wrong_flag_is_one_line_with_a_hint(flags, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(flags.split())
    assert capsys.readouterr().err == f"error: {line}\n"


def test_help_has_one_line_of_usage_and_the_docstring_as_written():
    text = make_parser().format_help()
    assert text.split("\n")[0].endswith(" [RUN] [options]; --help lists them")
    assert "What it does.\n\n    as written" in text
    assert "the model:" in text and "the device:" in text
    for name in BASES:
        assert re.search(rf"\s{name},", text)


def test_what_was_typed_is_known_from_what_is_a_default():
    p = make_parser()
    assert p.typed([]) == {}
    assert p.typed(["--prompt", "a", "--seed", "0", "r"]) == dict(prompt=["a"], seed=0, run="r")
    assert p.parse_args([]).base == "dit-xl"


@pytest.mark.parametrize("device, gpus, message", [
    ("cuda", 0, "--device cuda: this PyTorch sees no GPU; use --device cpu"),
    ("cuda:7", 1, "--device cuda:7: this machine has 1 GPU"),
    ("gpu", 1, "--device gpu: unknown; give cpu"),
])
def test_a_device_that_is_not_here_is_an_error(device, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        sample.device_here(device)


# ---- the script: prompts -------------------------------------------------------------------------

@pytest.fixture
def text_bases(encoders, tmp_path, monkeypatch):
    """Scrambled bases "test-flux" and "test-sana" with files, in a working folder -> flags of a name."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "flux": dict(depth_single=1, context_in_dim=64, vec_in_dim=64),
        "sana": dict(caption_channels=64),
    }
    for name in sizes:
        cfg = BASES[f"tiny-{name}"]
        cfg = replace(
            cfg, **sizes[name], res=64, depth=1, text_tokens=32, text_encoder=name, text_weights="no::",
            sampling=replace(cfg.sampling, num_steps=2), weights=f"{tmp_path}/{name}.safetensors")
        write_tensors(cfg.weights, scramble(FAMILIES[type(cfg)](cfg)).state_dict())
        monkeypatch.setitem(BASES, f"test-{name}", cfg)
    return lambda name: f"--base test-{name} --text-encoders {encoders}/{name} --prompt cat"


@pytest.mark.parametrize("name, more, negative, sampler, guidance, cfg_scale", [
    ("flux", "--guidance 2.5 --sampler heun", "", "heun", 2.5, 1.0),
    ("sana", "--negative dog --sampler dpm", "dog", "dpm", None, 4.5),
])
def test_prompts_become_pictures_with_facts_whatever_the_batch(
        name, more, negative, sampler, guidance, cfg_scale, text_bases):
    Path("p.txt").write_text("two blue squares\n# no\n")
    flags = f"{text_bases(name)} {more} --prompts p.txt --count 3 --seed 5 --res 96x48 --shift 2"
    drawn = draw("x", flags)
    # the first prompt again, with another seed
    assert np.abs(drawn[0] - drawn[2]).mean() > 1
    assert_same(drawn, draw("y", f"{flags} --batch 2 --offload"))
    info = facts_of("x/00001_seed6.png")
    assert (info["prompt"], info["negative"], info["size"]) == ("two blue squares", negative, (96, 48))
    facts = dict(
        sampler=sampler, guidance=guidance, cfg_scale=cfg_scale, num_steps=2, shift="2", text_tokens=32)
    assert info["dcgen"].items() >= facts.items()


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_prompts_in_python_draw_what_the_script_draws(name, text_bases, encoders):
    drawn = draw("x", text_bases(name))
    model, info = load_base(f"test-{name}")
    ae = checkpoints.load_autoencoder(model.cfg.ae)
    texts = sample.conditions(model, ["cat"], info, encoders / name)
    assert_same(drawn, to_uint8(generate(model, ae, texts, [0])).astype(int))


@pytest.mark.parametrize("name, a, b", [
    ("flux", "", "--guidance 1"),
    ("flux", "--cfg-scale 3", "--cfg-scale 3 --negative dog"),
    ("sana", "", "--negative dog"),
    ("sana", "", "--sampler heun"),
    ("sana", "--count 2", "--prompt two-blue-squares"),
])
def test_every_flag_changes_the_picture(name, a, b, text_bases):
    flags = text_bases(name)
    assert np.abs(draw("a", f"{flags} {a}") - draw("b", f"{flags} {b}")).mean() > 0.05


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_bf16_draws_nearly_the_same_picture(name, text_bases):
    flags = text_bases(name)
    assert 0 < np.abs(draw("full", flags) - draw("half", f"{flags} --dtype bf16")).mean() < 4


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_an_exported_folder_is_a_pipeline_to_draw_from(name, text_bases, encoders, monkeypatch):
    """Out and in again: transformer, autoencoder and text encoders in diffusers layout, by one --weights."""
    flags = text_bases(name)
    one = draw("one", flags)
    run(f"{flags} --export pipe")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="--export pipe: it is not empty"):
        patch.setattr(checkpoints, "build", lambda *args: pytest.fail("loaded weights"))
        run(f"{flags} --export pipe")
    # the folder's own autoencoder, not the preset's
    monkeypatch.setattr(
        checkpoints, "find_weights", lambda name, spec, path=None, *a, **k: find_weights(name, None, path))
    assert_same(one, draw("two", f"--base test-{name} --weights pipe --prompt cat"))


def test_a_run_of_a_text_model_draws_exports_and_takes_a_lora(text_bases, encoders):
    """What stage 3 leaves of a FLUX: a new embedder and head, and a LoRA, on deep latents."""
    base, info = load_base("test-flux")
    model = deep_model(base)
    add_lora(model, rank=2)
    for key, value in lora_state(model).items():
        if key.endswith(".B"):
            value.normal_(std=0.05)
    tuned = write_run("finetune-test-1", model, **info, kind="finetune", lora=dict(rank=2, alpha=2))
    aligned = write_run("align-test-1", model, ends=(), **info)
    flags = f"--prompt cat --text-encoders {encoders}/flux"
    one = draw("one", f"{tuned} {flags}")
    # the base is recognised by its file's own numbers
    draw("half", f"{tuned} {flags} --dtype bf16")
    run(f"{tuned} --export pipe")
    assert_same(one, draw("base", f"--base {tuned} {flags}"))
    assert_same(one, draw("lora", f"{aligned} --lora pipe/lora {flags}"))
    assert np.abs(one - draw("plain", f"{aligned} {flags}")).mean() > 0.05


# ---- the script: data sets -----------------------------------------------------------------------

@pytest.fixture
def draw_set(words_base):
    """A function that draws a data set of six captions into the folder x."""
    Path("p.txt").write_text("a small red ring on blue\na large pink cross on green\n")
    flags = "--base test-words --prompts p.txt --count 6 --num-steps 2 --batch 2 --dataset --out x"
    return lambda seed: run(f"{flags} --seed {seed}")


def test_a_data_set_goes_on_with_the_batch_that_is_missing(draw_set, capsys):
    draw_set(4)
    before = {file: file.read_bytes() for file in Path("x").iterdir()}
    Path("x/metadata.jsonl").unlink()
    Path("x/00003_seed7.png").unlink()
    draw_set(4)
    assert "wrote 2 pictures" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in Path("x").iterdir()} == before


def test_a_data_set_of_other_settings_is_refused(draw_set, words_base):
    draw_set(4)
    with pytest.raises(ValueError, match="x holds a data set of another making .seed: 4, now 5.; give an"):
        draw_set(5)
    write_tensors(words_base.weights, scramble(Flux(words_base), seed=5).state_dict())
    with pytest.raises(ValueError, match="x holds a data set of another making .weights"):
        draw_set(4)
    Path("x/dataset.json").unlink()
    with pytest.raises(ValueError, match="x holds pictures already; give another --out"):
        draw_set(4)


@pytest.mark.parametrize("flags, wanted", [
    (["--ae-weights", "own"], "own"),
    (["--base-ae-weights", "base"], "base"),
    (["--ae-weights", "own", "--base-ae-weights", "base"], "own"),
    ([], None),
])
def test_the_autoencoder_is_of_the_file_that_was_named(flags, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own", "base"):
        Path(name).touch()
    load = sample.load_autoencoder
    read = []

    def note(name, file, *args):
        read.append(file)
        return load(name, None, *args)

    monkeypatch.setattr(sample, "load_autoencoder", note)
    sample.main(["--base", "tiny", "--count", "1", "--num-steps", "1", "--device", "cpu", *flags])
    assert [file and Path(file).name for file in read] == [wanted]
