"""Drawing: path, times, guidance, solvers, DDPM's chain, the choice of speed, and the script."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoints
import sample
from autoencoder import DCAE, KLVAE, DCAEConfig, ae_config
from checkpoints import ae_table, config_dict, find_weights, load_base, load_weights, write_tensors
from data import ImageFolder, load_image
from helpers import (  # noqa: F401 (fixtures: encoders, fresh_compiler, tiny_base, words_base)
    DEEP_DIT, ROOT, TINY_DIT, TINY_KL, assert_near, deep_model, encoders, fresh_compiler, on_meta, parity,
    parity_cases, random_text, relative_error, scramble, tiny_base, tiny_model, words_base)
from lora import add_lora, lora_state
from model import BASES, DiT, Flux, Sampling, Sana, ddpm_alphas_cumprod, to_deep_latent, to_deep_model
from sample import (
    SHAPES, START, DDPMChain, Pipeline, Speed, choose_sampling, choose_speed, generate, guided_velocity,
    integrate, noise, parse_classes, parse_size, path, pick_prompts, resolve_shift, sample_t, save_png,
    shift_time, time_grid, to_uint8)
from test_model import fill, stored, stored_condition

CPU = ["--device", "cpu", "--dtype", "fp32"]


# ---- path, times, solvers ------------------------------------------------------------------------

def test_path_is_noise_at_0_and_data_at_1():
    x0, x1 = torch.randn(2, 3, 4, 2, 5)
    xt, v = path(x0, x1, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[1], x1[1]) and torch.equal(v, x1 - x0)
    torch.testing.assert_close(xt[2], 0.75 * x0[2] + 0.25 * x1[2])


@pytest.mark.parametrize("times", [time_grid(1), time_grid(7), time_grid(7, 2.83)])
def test_euler_along_the_oracle_velocity_returns_the_data(times):
    x0, x1 = torch.randn(2, 2, 3, 4, 4)
    # knows the data, not the noise
    assert_near(integrate(lambda x, t: (x1 - x) / (1 - t).view(-1, 1, 1, 1), x0, times), x1)


@pytest.mark.parametrize("method, order, first, last", [
    ("euler", 1, 0, 1), ("heun", 2, 0, 1), ("dpm", 2, 0.1, 0.9)])
def test_a_solver_has_its_order(method, order, first, last):
    """dx/dt = x cos(5t): x(b) = x(a) exp((sin(5b) - sin(5a)) / 5). dpm off the ends, where it is infinite."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def velocity(x, t):
        v = x * math.cos(5 * t.double().item())
        return SimpleNamespace(float=lambda: v)                      # stays float64

    def error(n):
        times = [first + (last - first) * t for t in time_grid(n)]
        exact = math.exp((math.sin(5 * last) - math.sin(5 * first)) / 5)
        return (integrate(velocity, x, times, method) - exact).abs().item()

    assert abs(math.log2(error(64) / error(128)) - order) < 0.3


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps, shift", [(1, 3.0), (4, 1.0), (8, 3.0), (20, 3.0), (30, 2.83)])
def test_dpm_solver_matches_diffusers(steps, shift):
    """On a velocity that bends: steps few and many, where diffusers chooses the orders differently."""
    diffusers = pytest.importorskip("diffusers")
    x0 = torch.randn(2, 4, 8, 8)
    w = torch.randn(4, 4)

    def velocity(x, t):
        return torch.einsum("bchw,cd->bdhw", x, w).tanh() * (1 + t.view(-1, 1, 1, 1)) - x

    official = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    official.set_timesteps(steps)
    x = x0
    for k, t in enumerate(official.timesteps):
        x = official.step(-velocity(x, 1 - official.sigmas[k].expand(2)), t, x).prev_sample
    times = time_grid(steps, shift, START["dpm"])
    assert_near(integrate(velocity, x0, times, "dpm"), x, 2e-5)
    # which Euler is not
    assert steps < 3 or relative_error(integrate(velocity, x0, times), x) > 1e-3


def test_the_shift_moves_noise_levels_as_published():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for r in (0.5, 2.83, 8):
        torch.testing.assert_close(1 - shift_time(t, r), r * (1 - t) / (1 + (r - 1) * (1 - t)))
    assert torch.equal(shift_time(t, 1.0), t)


@pytest.mark.parametrize("n, r", [(1, 3), (20, 2.8284), (7, 1 / 3)])
def test_a_time_grid_rises_from_exactly_0_to_exactly_1(n, r):
    grid = time_grid(n, r)
    assert len(grid) == n + 1 and grid[0] == 0 and grid[-1] == 1 and grid == sorted(grid)


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


@pytest.mark.parametrize("name", parity_cases("flux_bfl"))
@pytest.mark.parametrize("steps, tokens", [(4, 256), (4, 4096), (4, 16384), (20, 1024)])
def test_flux_times_are_the_official_ones(name, steps, tokens):
    side = math.isqrt(tokens) * 2                                    # packed two by two
    times = torch.tensor(time_grid(steps, resolve_shift("mu", 16, side, side, 2)))
    assert_near(1 - times, parity(name).outputs[f"schedule_{steps}steps_seq{tokens}"], 1e-6)


def test_a_shift_is_a_number_or_a_rule():
    assert resolve_shift(3, 1, 1, 1, 1) == resolve_shift("3.0", 1, 1, 1, 1) == 3.0
    # packing does not count
    assert resolve_shift("flux2", 32, 32, 32, 1) == resolve_shift("flux2", 8, 64, 64, 2) == math.sqrt(8)
    for bad in ("flux3", "0", "-1", "nan"):
        with pytest.raises(ValueError, match=f"--shift {bad}: give a positive number, or one of mu, flux2"):
            resolve_shift(bad, 16, 8, 8, 1)


@pytest.mark.parametrize("shift", [1.0, 2.83])
def test_training_times_are_distributed_as_the_sampling_grid(shift):
    g = torch.Generator().manual_seed(0)
    t = sample_t(100_000, g, "uniform", shift).sort().values
    assert (t - torch.tensor(time_grid(99_999, shift))).abs().max() < 0.01
    # the shift is a translation of the logit
    logit = torch.logit(sample_t(100_000, g, "logit-normal", shift).double())
    assert abs(logit.mean() + math.log(shift)) < 0.02 and abs(logit.std() - 1) < 0.02


# ---- guidance ------------------------------------------------------------------------------------

class Scaled(nn.Module):
    """Returns its input times 1 + the class number: guidance is exact arithmetic. 9 is the null class."""

    def __init__(self, out=4, guided_channels=None):
        super().__init__()
        self.cfg = SimpleNamespace(in_channels=4, guided_channels=guided_channels)
        self.calls = []
        self.out = out

    def null_condition(self, y):
        return torch.full_like(y, 9)

    def forward(self, x, t, y):
        self.calls.append((len(x), t.tolist(), y.tolist()))
        return x.repeat(1, self.out // 4, 1, 1) * (1 + y).view(-1, 1, 1, 1)


X = torch.randn(2, 4, 3, 3)
T = torch.tensor([0.25, 0.5])
Y = torch.tensor([0, 3])


def test_guidance_extrapolates_from_the_null_class_and_scale_1_is_one_pass():
    net = Scaled()
    cond = net(X, T, Y)
    assert torch.equal(guided_velocity(net, X, T, Y, 1.0), cond) and net.calls[-1][0] == 2
    assert_near(guided_velocity(net, X, T, Y, 3.5), 10 * X + 3.5 * (cond - 10 * X), 1e-6)
    assert net.calls[-1] == (4, [0.25, 0.5, 0.25, 0.5], [0, 3, 9, 9])
    assert_near(guided_velocity(net, X, T, Y, 2.0, null=torch.tensor([1, 1])), 2 * cond - 2 * X, 1e-6)


@pytest.mark.parametrize("out, guided_channels, k", [(4, 3, 3), (8, 3, 3), (4, None, 4), (8, None, 4)])
def test_guidance_leaves_out_dits_fourth_channel_and_every_variance(out, guided_channels, k):
    net = Scaled(out, guided_channels)
    got = guided_velocity(net, X, T, Y, 3.0)
    cond = net(X, T, Y)
    assert_near(got[:, :k], (3 * cond - 20 * X.repeat(1, out // 4, 1, 1))[:, :k], 1e-6)
    assert torch.equal(got[:, k:], cond[:, k:])


@pytest.mark.parametrize("name", parity_cases("dit", "dit_patch1"))
def test_guidance_matches_the_official_code(name):
    case, net = stored(name, guided_channels=BASES["dit-xl"].guided_channels)
    x, t, y = (case.inputs[f"cfg_{key}"].chunk(2) for key in "xty")
    got = guided_velocity(net, x[0], t[0], y[0], 3.0, null=y[1], call=net.forward_native)
    assert_near(got, case.outputs["forward_with_cfg"].chunk(2)[0])
    assert torch.equal(net.null_condition(y[0]), y[1])


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_text_model_extrapolates_from_its_null_prompt_with_each_picture_s_own_guidance(name):
    net = tiny_model(name)
    cond = random_text(net.cfg)
    net.null = replace(net.null, mask=None, guidance=None)
    null = net.null_condition(cond)
    assert torch.equal(null.tokens[1], net.null.tokens[0])
    assert null.guidance is cond.guidance and null.mask is cond.mask
    x = torch.randn(2, net.cfg.in_channels, 8, 8)
    want = net(x, T, null) + 3.0 * (net(x, T, cond) - net(x, T, null))
    assert_near(guided_velocity(net, x, T, cond, 3.0), want, 1e-4)
    net.null = None
    with pytest.raises(ValueError, match="does not know its null prompt"):
        guided_velocity(net, x, T, cond, 3.0)


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
def test_ddim_sampling_matches_the_official_code(name, kind, respacing):
    case, net = stored(name, guided_channels=3)
    y = case.inputs["ddim_y"]
    scale = case.info["cfg_scale"]
    chain = DDPMChain.spaced(8, ddim=kind == "stride8")
    assert chain.steps == case.info["respacing"][respacing]
    steps = []
    chain.sample(lambda x, clock: guided_velocity(net, x, clock, y, scale, call=net.forward_native),
                 case.inputs["ddim_xT"], ddim=True, each=steps.append)
    for got, want in zip(steps, case.outputs[f"ddim_{kind}_steps"], strict=True):
        assert_near(got, want, 1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 250, 1000])
def test_spaced_chains_keep_the_noise_levels_of_their_steps(n):
    chain = DDPMChain.spaced(n)
    assert len(set(chain.steps)) == len(chain.log_var) == n and chain.log_var.isfinite().all()
    assert torch.equal(chain.ab, ddpm_alphas_cumprod()[chain.steps])


@pytest.mark.parametrize("n, ddim, message", [
    (300, True, "--num-steps 300.*nearest is 250"), (0, False, "1 .. 1000"), (1001, False, "1 .. 1000")])
def test_chains_of_impossible_length_are_refused(n, ddim, message):
    with pytest.raises(ValueError, match=message):
        DDPMChain.spaced(n, ddim)


def test_ancestral_sampling_draws_the_distribution_it_was_trained_on():
    """With the exact epsilon of data N(1, 0.5^2), and the lower bound as variance."""
    chain = DDPMChain()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]

    def network(x, clock):
        ab = chain.ab[int(clock[0])].item()
        x1 = 1 + (0.25 * ab**0.5) / (0.25 * ab + 1 - ab) * (x - ab**0.5)
        return torch.cat([(x - ab**0.5 * x1) / (1 - ab) ** 0.5, torch.zeros_like(x)], dim=1)

    x = chain.sample(network, noise(generators, (4, 16, 16)), False, generators)
    assert abs(x.mean() - 1) < 0.05 and abs(x.std() - 0.5) < 0.05


def test_the_noise_of_ancestral_steps_is_new_in_every_step(monkeypatch):
    drawn = []
    monkeypatch.setattr(sample, "noise", lambda *args: drawn.append(noise(*args)) or drawn[-1])
    g = [torch.Generator().manual_seed(0)]
    x = sample.noise(g, (4, 8, 8))
    DDPMChain.spaced(3).sample(lambda x, clock: torch.cat([x, x], dim=1), x, False, g)
    a, b, c = drawn
    assert max(abs((p * q).mean()) for p, q in ((a, b), (b, c), (a, c))) < 0.2


# ---- official loops ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", parity_cases("sana_dcgen"))
def test_sana_with_its_solver_matches_the_official_loop(name):
    """Eight guided steps. The official model cuts its clock to whole steps; its null keeps the mask."""
    case, net = stored(name, integer_time=True)
    cond = stored_condition(net, case.inputs)
    net.null = replace(cond[:1], tokens=case.weights["y_embedder.y_embedding"][None], mask=None)
    scale = case.config["cfg_scale"]
    times = time_grid(case.config["sampler_steps"], case.config["flow_shift"], START["dpm"])
    assert_near(1000 * (1 - torch.tensor(times[:-1])), case.outputs["dpms_model_t"], 1e-6)
    x0 = case.inputs["sample_noise"]
    z = integrate(lambda x, t: guided_velocity(net, x, t, cond, scale), x0, times, "dpm")
    assert_near(z, case.outputs["dpms_sample"], 1e-4)


@pytest.mark.parametrize("name", parity_cases("dcgen_pipeline"))
@pytest.mark.parametrize("kind, rule", [("flowmatch", "mu"), ("flux2", "flux2")])
def test_dc_gen_flux_draws_the_official_picture(name, kind, rule, monkeypatch):
    """The authors' whole text-to-image loop: both schedules, every step, and the decoded picture."""
    case = parity(name)
    config = case.config

    def part(prefix):
        return {key.removeprefix(prefix): v for key, v in case.weights.items() if key.startswith(prefix)}

    net = fill(config["transformer"], part("transformer."))
    v = config["vae"]
    ae_cfg = DCAEConfig(
        "test", v["latent_channels"], v["scaling_factor"], tuple(v["encoder_block_out_channels"]),
        tuple(v["encoder_layers_per_block"]), tuple(v["decoder_layers_per_block"]), 9, 9)
    ae = load_weights(DCAE(ae_cfg), part("vae."), ae_table(ae_cfg, part("vae."))).eval()
    x = {"txt": case.inputs["prompt_embeds"], "y": case.inputs["pooled_prompt_embeds"],
         "guidance": torch.full((2,), config["guidance_scale"])}
    steps = []
    monkeypatch.setattr(sample, "noise", lambda *args: case.inputs["noise"])
    monkeypatch.setattr(sample, "integrate", lambda *args: integrate(*args, each=steps.append))
    picture = generate(net, ae, stored_condition(net, x), [0, 1], Sampling(config["steps"], 1.0, shift=rule),
                       (config["height"], config["width"]))
    for got, want in zip(steps, case.outputs[f"{kind}_steps"], strict=True):
        assert_near(net.patchify(got), want, 1e-4)
    assert_near((picture + 1) / 2, case.outputs[f"{kind}_image"], 1e-4)


# ---- speed ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("pictures, batch, device, fast, offload, taken", [
    (10_000, 1, "cpu", None, False, "eager (on a CPU)"),
    (1, 1, "cpu", True, False, "modulations hoisted, compiled (--fast)"),
    (99, 1, "cuda", None, False,
     "modulations hoisted, eager (1,980 evaluations, too few for a minute of compiling)"),
    (100, 1, "cuda:1", None, False,
     "modulations hoisted, compiled, steps captured (2,000 evaluations, enough for a minute of compiling)"),
    (100, 2, "cuda", None, False,
     "modulations hoisted, eager (1,000 evaluations, too few for a minute of compiling)"),
    (1, 1, "cuda", True, False, "modulations hoisted, compiled, steps captured (--fast)"),
    (1, 1, "cuda", True, True, "modulations hoisted, compiled (--fast)"),
    (10_000, 1, "cuda", False, False, "modulations hoisted, eager (--eager)")])
def test_a_minute_of_compiling_has_to_be_paid_for(pictures, batch, device, fast, offload, taken):
    sampling = Sampling(num_steps=20, batch=batch)
    assert str(choose_speed(pictures, sampling, device, fast, offload)) == taken


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm", "ddim", "ddpm"])
@pytest.mark.parametrize("hoist", [False, True])
def test_a_picture_depends_on_its_seed_and_not_on_batches_or_hoisting(sampler, hoist):
    net = tiny_model("ddpm")
    ae = scramble(KLVAE(TINY_KL))
    y = torch.tensor([0, 5, 2, 7])
    sampling = Sampling(4, 2.0, sampler=sampler)
    four = generate(net, ae, y, [7, 8, 9, 10], sampling, (16, 24))
    assert four.shape == (4, 3, 16, 24) and four.abs().max() <= 1
    pipeline = Pipeline(net, ae, sampling, (16, 24), speed=Speed(hoist=hoist))
    # the same size twice, then a smaller one
    for rows in ([0, 1], [3, 2], [1]):
        assert_near(pipeline(y[rows], [7 + i for i in rows]), four[rows], 1e-4)
        assert bool(pipeline.hoisted) == hoist
    assert relative_error(pipeline(y[:1], [11])[0], four[0]) > 0.01
    pipeline.close()
    assert_near(generate(net, ae, y, [7, 8, 9, 10], replace(sampling, batch=3), (16, 24)), four, 1e-4)


def test_tables_that_would_fill_the_memory_are_not_made():
    pipeline = Pipeline(
        tiny_model("dit"), on_meta(KLVAE, TINY_KL), Sampling(3000, 2.0), (16, 16), speed=Speed(hoist=True))
    pipeline.evaluation(torch.tensor([1]))
    assert pipeline.hoisted is None


def test_a_compiler_that_fails_is_reported_and_drawing_goes_on(capsys, monkeypatch):
    def fail(*args):
        raise AssertionError("wrong stride\nat a place")

    def broken(layers):
        for layer in layers:
            layer._compiled_call_impl = fail

    monkeypatch.setattr(sample, "compile_layers", broken)
    net = tiny_model("dit")
    ae = scramble(KLVAE(TINY_KL))
    sampling = Sampling(2, 2.0)
    want = generate(net, ae, Y, [1, 2], sampling, (16, 16))
    pipeline = Pipeline(net, ae, sampling, (16, 16), speed=Speed(hoist=True, compile=True))
    assert_near(pipeline(Y, [1, 2]), want)
    message = "compiling failed (AssertionError: wrong stride); drawing goes on without it\n"
    assert capsys.readouterr().out == message


def test_a_model_comes_back_from_a_device_without_a_copy():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    before = {key: value.data_ptr() for key, value in net.state_dict().items()}
    weight = net[0].weight
    with sample.on_device(net, "meta"):
        assert all(value.is_meta for value in net.state_dict().values())
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == before
    assert net[0].weight is weight


# ---- pictures on disk ----------------------------------------------------------------------------

def test_pixels_are_rounded_clipped_and_come_back_from_disk_with_their_facts(tmp_path):
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    # truncation would be off by 4e-3 on average
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    file = tmp_path / "a/b.png"
    facts = {"sampler": "euler", "cfg_scale": 3.0}
    save_png(file, to_uint8(x)[0], {"class": "stern", "dcgen": facts})
    error = x[0] - load_image(file, 64)
    assert error.abs().max() <= 0.5 / 127.5 + 1e-6 and abs(error.mean()) < 2e-4
    with Image.open(file) as picture:
        assert picture.info["class"] == "stern" and json.loads(picture.info["dcgen"]) == facts


def test_thumbnails_are_no_larger_than_a_side():
    x = torch.randn(2, 3, 64, 128)
    assert sample.thumbnails(x) is x
    assert_near(sample.thumbnails(x, 64), nn.functional.avg_pool2d(x, 2), 1e-6)


# ---- flags ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampling, size, message", [
    (Sampling(1), (100, 100), "--res 100: test-kl with patch 2 needs a multiple of 8; try 96 or 104"),
    (Sampling(1), (96, 100), "--res 100x96.*try 96 or 104x96"),
    (Sampling(1), (5, 5), "try 8$"),
    (Sampling(sampler="ddim"), None, "--sampler ddim is for a model that predicts epsilon.*use euler"),
    (Sampling(sampler="ddpm"), None, "--sampler ddpm is for a model that predicts epsilon"),
    (Sampling(0), None, "--num-steps 0: at least 1")])
def test_sizes_and_samplers_that_do_not_fit_the_model_are_refused(sampling, size, message):
    with pytest.raises(ValueError, match=message):
        generate(on_meta(DiT, TINY_DIT), on_meta(KLVAE, TINY_KL), Y, [0, 1], sampling, size)


def test_classes_are_names_or_numbers_in_turn():
    assert parse_classes(None, SHAPES, 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert parse_classes(["star", "2"], SHAPES, 5).tolist() == [5, 2, 5, 2, 5]
    assert parse_classes(["1", "2", "3"], SHAPES, 1).tolist() == [1, 2, 3]
    assert parse_classes(["7"], ("3", "7", "1"), 1).tolist() == [1]  # a folder's name goes first
    for bad in ("moon", "8", "-1", "²"):
        with pytest.raises(ValueError, match=f"--classes {bad}: not a class; give 0 .. 7 or circle, square"):
            parse_classes([bad], SHAPES, 1)


def test_prompts_are_taken_in_turn_and_sizes_are_width_x_height():
    assert pick_prompts(["a", "b"], None, 3) == ["a", "b", "a"]
    assert pick_prompts(["a", "b"], None, 1) == ["a", "b"]
    assert parse_size(None, 64) == (64, 64) and parse_size("1216x832", 64) == (832, 1216)


def test_what_is_given_goes_before_the_authors_sampling():
    krea = BASES["flux-krea"]
    assert choose_sampling(krea, num_steps=None) == krea.sampling
    given = dict(num_steps=7, guidance=0.0)
    assert choose_sampling(krea, **given) == replace(krea.sampling, **given)


@pytest.mark.parametrize("flags, message", [
    ("flux-krea --prompt x --res 1000", "f8c16 with patch 2 needs a multiple of 16; try 992 or 1008"),
    ("flux-krea --prompt x --res big", "--res big: give pixels a side, or WIDTHxHEIGHT"),
    ("flux-krea --prompt x --res 8x8x8", "--res 8x8x8"),
    ("flux-kera --prompt x", "--base flux-kera: not a preset .*flux-krea.*sana-4.8b"),
    ("flux-krea", "draws prompts: give --prompt TEXT"),
    ("flux-krea --classes 3", "--classes: flux-krea draws prompts"),
    ("dit-xl --count 0", "--count 0: at least 1"),
    ("dit-xl --prompt x", "--prompt: dit-xl draws classes"),
    ("dit-xl --negative x", "--negative: dit-xl draws classes"),
    ("dit-xl --text-tokens 8", "--text-tokens: dit-xl draws classes"),
    ("sana-1.6b --prompt x --guidance 3", "--guidance: sana-1.6b is not a distilled"),
    ("flux-krea --prompt x --negative y", "--negative: .*--cfg-scale above 1"),
    ("flux-krea --prompt x --count 0", "--count 0: at least 1"),
    ("flux-krea --prompt x --shift mue", "--shift mue: give a positive number, or one of mu, flux2"),
    ("flux-krea --prompts gone.txt", "--prompts gone.txt: not a readable text file"),
    ("flux-krea --prompt x --dataset", "--dataset: name its folder"),
    ("tiny --ckpt runs/a", "--base and --ckpt each name a model; give one of them")])
def test_a_wrong_flag_is_found_before_anything_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "build", lambda *a: pytest.fail("loaded weights"))
    with pytest.raises(ValueError, match=message):
        sample.main(["--base", *flags.split()])


def test_a_dry_run_prints_cost_and_memory_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "build", lambda *a: pytest.fail("loaded weights"))

    def dry_run(flags):
        sample.main(["--base", *flags.split(), "--dtype", "bf16", "--dry-run"])
        text = capsys.readouterr().out
        memory = re.search(r"about ([\d.]+) GB while denoising, ([\d.]+) GB while decoding", text).groups()
        return text, float(re.search(r"([\d.]+) TFLOPs a step", text)[1]), [float(n) for n in memory]

    text, krea, _ = dry_run("flux-krea --prompt x")
    facts = ["11,901.4M parameters, 23.80 GB in bfloat16", "4,096 tokens and 512 of text", "T5E", "28 steps"]
    assert all(fact in text for fact in facts)
    text, deep, memory = dry_run("dc-gen-flux-1k")
    assert "1,024 tokens" in text and 60 < krea < 90 and 3 < krea / deep < 4
    text, _, _ = dry_run("sana-1.6b")
    assert "1,604.6M parameters" in text and "Gemma2Model" in text
    guided, one_pass = (dry_run(f"dit-xl --cfg-scale {scale}")[1] for scale in (4, 1))
    assert guided == pytest.approx(2 * one_pass, rel=0.02)
    # each network by itself: without the decoder's 0.8 GB, without the model's 23.8
    _, _, alone = dry_run("dc-gen-flux-1k --offload")
    assert [a - b for a, b in zip(memory, alone)] == pytest.approx([0.8, 23.8], abs=0.05)
    assert not Path("runs").exists()


# ---- the script: classes -------------------------------------------------------------------------

def facts_of(file) -> dict:
    """The text fields of a picture, "dcgen" parsed, and its size."""
    with Image.open(file) as picture:
        return picture.info | {"dcgen": json.loads(picture.info["dcgen"]), "size": picture.size}


def pictures(folder) -> list[np.ndarray]:
    return [np.array(Image.open(file)).astype(int) for file in sorted(Path(folder).glob("*.png"))]


def draw(out: str, *flags) -> list[np.ndarray]:
    sample.main([*flags, "--out", out])
    return pictures(out)


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
    sample.main(["--base", "test", "--count", "3", "--num-steps", "2", "--classes", "star", "circle",
                 "--seed", "5", "--batch", "2", "--weights", "base.safetensors", *CPU])
    files = sorted(file.name for file in Path("runs/samples-test").iterdir())
    assert files == ["00000_seed5.png", "00001_seed6.png", "00002_seed7.png"]
    assert Path("runs/samples-test-grid.png").is_file()
    info = facts_of(f"runs/samples-test/{files[1]}")
    assert (info["size"], info["class"], info["seed"]) == ((64, 64), "circle", "6")
    facts = dict(sampler="euler", num_steps=2, cfg_scale=3.0, shift=1.0, weights="test")
    assert info["dcgen"] == facts | {"model": config_dict(BASES["test"])}


def test_the_newest_run_is_the_default_and_its_classes_lead_no_file_name_astray(tiny_base, capsys):
    model = deep_model(tiny_base)
    model.cfg = replace(DEEP_DIT, sampling=replace(DEEP_DIT.sampling, shift=2.0))
    write_run("align-test-1", model, classes=["../../x", *SHAPES[1:]])
    sample.main(["--count", "1", "--num-steps", "1", *CPU])
    assert "weights as trained, base test, latents of tiny-dc-ae-f32c32" in capsys.readouterr().out
    info = facts_of("runs/align-test-1/samples/00000_seed0.png")
    assert info["class"] == "../../x" and info["dcgen"]["shift"] == 2.0
    sample.main(["--base", "runs/align-test-1", "--count", "1", "--num-steps", "1", *CPU])
    assert Path("runs/samples-align-test-1/00000_seed0.png").is_file()
    assert {file.suffix for file in Path(".").rglob("*") if file.is_file()} == {".png", ".safetensors"}
    assert not list(Path("..").glob("x*"))


def test_fast_draws_the_same_pictures_on_a_cpu(tiny_base, capsys, fresh_compiler, monkeypatch):
    monkeypatch.setattr(sample, "compile_layers", lambda layers: [m.compile(backend="eager") for m in layers])
    monkeypatch.setattr(sample, "compile_decoder", lambda ae: None)
    flags = ["--base", "test", "--count", "2", "--num-steps", "2", *CPU]
    assert np.abs(np.subtract(draw("plain", *flags), draw("fast", *flags, "--fast"))).max() <= 1
    assert "speed: modulations hoisted, compiled (--fast)" in capsys.readouterr().out
    assert fresh_compiler["stats"]["unique_graphs"] == 1


def test_a_second_interrupt_kills_at_once():
    program = ("import atexit, sys, time\nsys.path.insert(0, sys.argv[1])\nimport sample\n"
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


@pytest.mark.parametrize("error, code, line", [
    (ValueError("no such thing"), 2, "error: no such thing\n"), (KeyboardInterrupt(), 130, "interrupted\n")])
def test_errors_of_the_user_and_interrupts_are_one_line(error, code, line, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as exit_:
        sample.run_main(main)
    assert exit_.value.code == code and capsys.readouterr().err == line


# ---- the script: prompts -------------------------------------------------------------------------

@pytest.fixture
def text_bases(encoders, tmp_path, monkeypatch):
    """Scrambled bases "test-flux" and "test-sana" with files, in a working folder -> flags of a name."""
    monkeypatch.chdir(tmp_path)
    small = {"flux": (Flux, "dc-gen-flux-1k", dict(depth_single=1, context_in_dim=64, vec_in_dim=64)),
             "sana": (Sana, "sana-1.6b", dict(caption_channels=64))}
    for name, (family, published, sizes) in small.items():
        cfg = replace(
            BASES[f"tiny-{name}"], res=64, depth=1, text_tokens=32, text_encoder=name, text_weights="no::",
            sampling=replace(BASES[published].sampling, num_steps=2), **sizes,
            weights=str(tmp_path / f"{name}.safetensors"))
        write_tensors(cfg.weights, scramble(family(cfg)).state_dict())
        monkeypatch.setitem(BASES, f"test-{name}", cfg)
    return lambda name: ["--base", f"test-{name}", "--text-encoders", f"{encoders}/{name}", *CPU]


CAT = ["--prompt", "a red cat"]
DOG = ["--negative", "a dog"]


@pytest.mark.parametrize("name, extra, want", [
    ("flux", ["--guidance", "2.5"], ("euler", 2.5, 1.0)),
    ("sana", DOG, ("dpm", None, 4.5)),
    ("flux", [*DOG, "--cfg-scale", "2", "--sampler", "heun"], ("heun", 3.5, 2.0))])
def test_prompts_become_pictures_with_facts_whatever_the_batch(name, extra, want, text_bases, capsys):
    Path("p.txt").write_text("two blue squares\n# no\n")
    flags = [*text_bases(name), *CAT, "--prompts", "p.txt", "--count", "3", "--seed", "5", "--res", "96x48",
             "--shift", "2", *extra]
    first = draw("x", *flags)
    times = r"wrote 3 pictures to .*text [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s; peak [\d.]+ GiB"
    assert Path("x-grid.png").is_file() and re.search(times, capsys.readouterr().out)
    for i, prompt in enumerate(("a red cat", "two blue squares", "a red cat")):
        info = facts_of(f"x/0000{i}_seed{5 + i}.png")
        assert (info["size"], info["prompt"]) == ((96, 48), prompt)
    facts = info["dcgen"]
    assert info["negative"] == ("a dog" if "a dog" in extra else "")
    assert (facts["sampler"], facts["guidance"], facts["cfg_scale"]) == want
    assert (facts["num_steps"], facts["shift"], facts["text_tokens"]) == (2, "2", 32)
    assert np.abs(np.subtract(first, draw("y", *flags, "--batch", "3", "--offload"))).max() <= 1
    # another seed
    assert np.abs(first[0] - first[2]).mean() > 1


@pytest.mark.parametrize("name, a, b", [
    ("flux", CAT, [*CAT, "--guidance", "1"]), ("flux", CAT, [*CAT, "--cfg-scale", "3"]),
    ("flux", [*CAT, "--cfg-scale", "3"], [*CAT, *DOG, "--cfg-scale", "3"]),
    ("sana", CAT, [*CAT, *DOG]), ("sana", CAT, [*CAT, "--cfg-scale", "1"]),
    ("sana", CAT, [*CAT, "--sampler", "euler"]), ("sana", CAT, ["--prompt", "two blue squares"])])
def test_every_flag_changes_the_picture(name, a, b, text_bases):
    [one], [two] = (draw(out, *text_bases(name), *flags) for out, flags in (("a", a), ("b", b)))
    assert np.abs(one - two).mean() > 0.05


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_bf16_draws_nearly_the_same_picture(name, text_bases):
    [full], [half] = (draw(dtype, *text_bases(name), *CAT, "--dtype", dtype) for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(half - full).mean() < 4


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_an_exported_folder_is_a_pipeline_to_draw_from(name, text_bases, encoders, capsys, monkeypatch):
    """Out and in again: transformer, autoencoder and text encoders in diffusers layout, by one --weights."""
    sample.main([*text_bases(name), "--export", "pipe"])
    assert "wrote pipe/transformer/, pipe/vae/" in capsys.readouterr().out
    [one] = draw("one", *text_bases(name), *CAT)
    shutil.copytree(encoders / name, "pipe", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="pipe/transformer"):        # never written over
        sample.main([*text_bases(name), "--export", "pipe"])
    # the folder's own autoencoder, not the preset's
    monkeypatch.setattr(
        checkpoints, "find_weights", lambda name, spec, path=None, *a, **k: find_weights(name, None, path))
    [two] = draw("two", "--base", f"test-{name}", "--weights", "pipe", *CAT, *CPU)
    assert np.abs(one - two).max() <= 1 and one.std() > 1


def test_a_run_of_a_text_model_draws_exports_and_takes_a_lora(text_bases, encoders, capsys):
    """What stage 3 leaves of a FLUX: a new embedder and head, and a LoRA, on deep latents."""
    base, info = load_base("test-flux")
    model = to_deep_model(base, to_deep_latent(base.cfg, ae_config("tiny-dc-ae-f32c32"), shift="flux2"))
    scramble(model.img_in)
    scramble(model.final_layer.linear, seed=1)
    add_lora(model, rank=2)
    for key, value in lora_state(model).items():
        if key.endswith(".B"):
            value.normal_(std=0.05)
    tuned = write_run("finetune-test-1", model, **info, kind="finetune", lora=dict(rank=2, alpha=2))
    aligned = write_run("align-test-1", model, ends=(), **info)
    flags = [*CAT, *CPU, "--text-encoders", f"{encoders}/flux"]
    [one] = draw("one", "--ckpt", tuned, *flags)
    # the base is recognised by its file's own numbers
    draw("half", "--ckpt", tuned, *flags, "--dtype", "bf16")
    sample.main(["--ckpt", tuned, "--export", "pipe", *CPU])
    assert "wrote pipe/lora/, pipe/transformer/, pipe/vae/" in capsys.readouterr().out
    for same in (["--base", tuned], ["--ckpt", aligned, "--lora", "pipe/lora"]):
        assert np.abs(one - draw("x", *same, *flags)[0]).max() <= 1
    assert np.abs(one - draw("plain", "--ckpt", aligned, *flags)[0]).mean() > 0.05


# ---- the script: data sets -----------------------------------------------------------------------

@pytest.fixture
def draw_set(words_base):
    """A function that draws a data set of six captions into a folder."""
    Path("p.txt").write_text("a small red ring on blue\na large pink cross on green\n")
    return lambda out, *more: sample.main([
        "--base", "test-words", "--prompts", "p.txt", "--count", "6", "--seed", "4", "--num-steps", "2",
        "--batch", "2", "--dataset", "--out", out, *CPU, *more])


def files_of(folder) -> dict:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_a_killed_data_set_goes_on_to_the_same_bytes(draw_set, monkeypatch, capsys):
    draw_set("whole")
    line = json.loads(Path("whole/metadata.jsonl").read_text().splitlines()[2])
    about = dict(file_name="00002_seed6.png", text="a small red ring on blue", seed=6, steps=2, cfg_scale=1.0)
    assert line == about | {"guidance": 3.5}
    assert ImageFolder("whole", 64, captions="txt").caption(5) == "a large pink cross on green"

    def dies(file, *args):
        if file.name.startswith("00003"):
            raise KeyboardInterrupt
        save_png(file, *args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample, "save_png", dies)
        draw_set("killed")
    with pytest.raises(ValueError, match="this data set is not finished, 3 pictures and no metadata.jsonl"):
        ImageFolder("killed", 64)
    draw_set("killed")
    assert "wrote 4 pictures" in capsys.readouterr().out             # whole batches
    assert files_of("killed") == files_of("whole")
    draw_set("whole")
    assert "wrote 0 pictures" in capsys.readouterr().out


def test_a_data_set_of_other_settings_is_refused(draw_set, words_base):
    draw_set("x")
    with pytest.raises(ValueError, match="x holds a data set of another making .seed: 4, now 5.; give an"):
        draw_set("x", "--seed", "5")
    write_tensors(words_base.weights, scramble(Flux(words_base), seed=5).state_dict())
    with pytest.raises(ValueError, match="x holds a data set of another making .weights"):
        draw_set("x")
    Path("x/dataset.json").unlink()
    with pytest.raises(ValueError, match="x holds pictures already; give another --out"):
        draw_set("x")


def test_a_data_set_of_classes_has_a_folder_a_class(tiny_base):
    sample.main(["--base", "test", "--classes", "2", "5", "--num-steps", "1", "--count", "3", "--dataset",
                 "--out", "x", *CPU])
    names = sorted(str(file.relative_to("x")) for file in Path("x").rglob("*.png"))
    assert names == ["0002/00000_seed0.png", "0002/00002_seed2.png", "0005/00001_seed1.png"]
