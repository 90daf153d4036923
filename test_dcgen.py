"""The claims of the paper (arXiv 2509.25180) and of README, as tests. What serves them is tested in
tests/."""

import argparse
import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import align
import bench
import evaluate
import finetune
import quant
import sample
from align import (
    RECIPES, LeastSquares, corrected_velocity, embedding_loss, flow_matching_loss, grid_tokens,
    guided_flow_matching_loss, solve_embedder, solve_head, unguided_null)
from autoencoder import AUTOENCODERS, ae_config
from checkpoints import load_autoencoder, load_base, load_run, read_tensors
from data import cache_prompts
from evaluate import layer_gap, target_of
from flags import with_guidance
from helpers import ROOT, TINIES, assert_near, random_condition, random_text, relative_error, tiny_model
from lora import add_lora, lora_state, merge_lora
from model import BASES, to_deep_latent, to_deep_model
from sample import generate, integrate, path
from shapes import ScenesSource, accuracy, encode_words, load_classifier, scene_scores
from train import named_parameters_with
from training import Distilled, distilled_batch, run_train, small_pair


# ---- Sec. 3.1: fewer tokens, the same trunk ------------------------------------------------------

def tokens(cfg, pixels):
    return (pixels // ae_config(cfg.ae).f // cfg.patch_size) ** 2


@pytest.mark.parametrize("name, ae, pixels, before, after", [
    ("dit-xl", "dc-ae-f32c32-in-1.0", 256, 256, 64),
    ("dit-xl-512", "dc-ae-f32c32-in-1.0", 512, 1024, 256),
    ("sana-1.6b", "dc-ae-f64c128-1.5", 1024, 1024, 256),
    ("flux-krea", "dc-ae-f32c32-in-1.0", 1024, 4096, 1024),
    ("flux-krea", "dc-ae-f64c128-1.5", 4096, 65536, 4096),
    ("tiny", "tiny-dc-ae-f32c32", 128, 64, 16),
])
def test_a_deep_latent_has_a_quarter_or_a_sixteenth_of_the_tokens(name, ae, pixels, before, after):
    deep = to_deep_latent(BASES[name], ae_config(ae))
    assert (tokens(BASES[name], pixels), tokens(deep, pixels)) == (before, after)


@pytest.mark.parametrize("name", TINIES)
def test_the_deep_model_shares_the_trunk_and_brings_a_new_embedder_and_head(name):
    base = tiny_model(name)
    model = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    theirs = dict(base.named_parameters())
    for key, p in model.named_parameters():
        if key.startswith((model.EMBEDDER, model.HEAD)):
            assert p.shape != theirs[key].shape or not torch.equal(p, theirs[key]), key
        elif key.startswith(model.HEAD_TRAINED):                     # DiT's modulation learns too: a copy
            assert torch.equal(p, theirs[key]) and p.data_ptr() != theirs[key].data_ptr(), key
        else:
            assert p.data_ptr() == theirs[key].data_ptr(), key


@pytest.mark.parametrize("row, stage1, stage2, stage3", [
    ("dit", (50_000, 1e-4, 64), (20_000, 2e-4, 1024), (500_000, 2e-4, 1024)),
    ("dit-512", (50_000, 1e-4, 64), (20_000, 2e-4, 1024), (100_000, 2e-4, 1024)),
    ("sana-1.6b", (20_000, 1e-4, 64), (5_000, 2e-4, 1024), (150_000, 2e-4, 1024)),
    ("sana-4.8b", (20_000, 1e-4, 64), (5_000, 1e-4, 256), (50_000, 1e-4, 256)),
    ("flux", (20_000, 1e-4, 64), (5_000, 1e-4, 256), (10_000, 1e-4, 256)),
])
def test_recipes_are_table_7(row, stage1, stage2, stage3):
    recipe = RECIPES[row]
    stages = [(plan.steps, plan.lr, plan.batch) for plan in (recipe.stage1, recipe.stage2, recipe.stage3)]
    assert stages == [stage1, stage2, stage3]
    last = recipe.stage3
    assert (last.warmup, last.weight_decay, last.ema, last.betas) == (2000, 1e-3, 0.999, (0.9, 0.999))
    assert recipe.rank == 256


def test_every_base_has_a_recipe_an_autoencoder_and_a_way_to_be_drawn_with():
    for name, cfg in BASES.items():
        assert cfg.recipe in RECIPES, name
        assert cfg.ae in AUTOENCODERS, name
        sampler = cfg.sampling.sampler
        assert sampler in ("ddpm", "ddim") if cfg.predict == "epsilon" else sampler in sample.SOLVERS, name


# ---- Eq. 2: the path, its velocity, its ODE ------------------------------------------------------

def test_path_is_noise_at_0_and_data_at_1():
    x0, x1 = torch.randn(2, 2, 3, 4, 4).unbind()
    xt, v = path(x0, x1, torch.tensor([0.0, 1.0]))
    assert torch.equal(xt[0], x0[0])
    assert torch.equal(xt[1], x1[1])
    assert torch.equal(v, x1 - x0)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_one_step_along_the_oracle_velocity_returns_the_data(method):
    x0, x1 = torch.randn(2, 2, 3, 4, 4).unbind()
    assert_close(integrate(lambda x, t: x1 - x0, x0, [0.0, 1.0], method), x1)


# ---- Eq. 1: stage 1, the embedder ----------------------------------------------------------------

def test_the_target_of_stage_1_is_the_bases_embeddings_averaged_over_each_new_cell():
    base, model, z_dc, z_base, _ = small_pair()
    old = base.embed(z_base).view(48, 8, 4, 32)
    coarse = z_dc[:, :, ::2, ::2]
    target = old.view(48, 4, 2, 2, 2, 32).mean(dim=(2, 4))           # rows in pairs, columns in pairs
    expected = (model.embed(coarse).view(48, 4, 2, 32) - target).square().mean()
    assert_close(embedding_loss(model, base, coarse, z_base), expected)


def test_matching_upsampled_brings_the_new_embeddings_to_the_bases_grid():
    base, model, z_dc, z_base, _ = small_pair()
    coarse = z_dc[:, :, ::2, ::2]
    new = F.interpolate(grid_tokens(model, coarse), (8, 4), mode="bilinear")
    expected = (new - grid_tokens(base, z_base)).square().mean()
    assert_close(embedding_loss(model, base, coarse, z_base, "upsample"), expected)


@pytest.mark.parametrize("match", align.MATCHES)
def test_the_loss_of_stage_1_is_zero_for_equal_embedders(match):
    base, *_ = small_pair()
    z = torch.randn(4, 4, 8, 8)
    assert float(embedding_loss(base, base, z, z, match)) < 1e-10


@pytest.mark.parametrize("name", ["tiny", "tiny-flux", "tiny-sana", "dit-xl", "flux-krea", "sana-1.6b"])
def test_a_resized_picture_gives_the_base_the_grid_of_the_deep_model(name):
    cfg = BASES[name]
    deep = align.deep_config(cfg, align.parser().parse_args(["--base", name]))
    small = target_of(SimpleNamespace(cfg=cfg), deep, "resize").cfg
    sides = [c.res // AUTOENCODERS[c.ae].f // c.patch_size for c in (small, deep)]
    assert sides[0] == sides[1]
    assert getattr(small, "pos_step", None) == getattr(deep, "pos_step", None)


def test_the_closed_form_embedder_is_where_adamw_would_end():
    """At the optimum of Eq. 1 no gradient is left."""
    base, model, z_dc, z_base, _ = small_pair()
    loss = solve_embedder(model, base, [(z_dc[:20], z_base[:20]), (z_dc[20:], z_base[20:])])
    params = [p.requires_grad_(True) for p in model.x_embedder.parameters()]
    best = embedding_loss(model, base, z_dc, z_base)
    assert max(g.abs().max() for g in torch.autograd.grad(best, params)) < 1e-5
    assert loss == pytest.approx(best.item(), abs=1e-5)


def test_stage_1_brings_every_layer_closer_to_the_base():
    """Fig. 4a: the embedder is aligned, and the features of all blocks behind it follow."""
    base, model, z_dc, z_base, y = small_pair()
    before = layer_gap(model, base, z_dc, z_base, y)
    solve_embedder(model, base, [(z_dc, z_base)])
    after = layer_gap(model, base, z_dc, z_base, y)
    assert all(a < b for a, b in zip(after, before)), (before, after)


def test_least_squares_is_the_exact_optimum():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 7, generator=g)
    y = x @ torch.randn(7, 3, generator=g) + 2.0 + 0.1 * torch.randn(500, 3, generator=g)
    sums = LeastSquares(7, 3)
    sums.add(x[:123], y[:123])
    sums.add(x[123:], y[123:])
    w, b = sums.solve(ridge=1e-12)
    reference = torch.linalg.lstsq(torch.cat([torch.ones(500, 1), x], 1).double(), y.double()).solution
    assert_close(torch.cat([b[:, None], w], 1).T, reference, atol=1e-8, rtol=0)
    assert sums.loss(w, b) == pytest.approx(float((x.double() @ w.T + b - y).square().mean()), abs=1e-10)


def test_the_ridge_does_not_penalise_the_bias():
    sums = LeastSquares(3, 2)
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    sums.add(x - x.mean(dim=0), torch.tensor([5.0, -2.0]).expand(100, 2))
    w, b = sums.solve(ridge=1e6)
    assert_close(b, torch.tensor([5.0, -2.0], dtype=torch.float64))
    assert w.abs().max() < 1e-6


# ---- Eq. 2 again: stage 2, the head --------------------------------------------------------------

def test_the_closed_form_head_leaves_no_gradient_in_the_flow_loss():
    """The new head needs no target from the old one: the flow loss in the new latent space defines it."""
    base, model, z_dc, z_base, y = small_pair()
    g = torch.Generator().manual_seed(1)
    t = torch.rand(48, generator=g)
    x0 = torch.randn(z_dc.shape, generator=g)
    loss = solve_head(model, [(z_dc[i], t[i], y[i], x0[i]) for i in torch.arange(48).split(30)])
    params = [p.requires_grad_(True) for p in model.final_layer.linear.parameters()]
    best = flow_matching_loss(model, z_dc, t, y, x0)[0].mean()
    assert max(g.abs().max() for g in torch.autograd.grad(best, params)) < 1e-4
    assert loss == pytest.approx(best.item(), abs=1e-4)


def test_a_new_head_passes_gradients_to_the_embedder_from_the_first_step():
    """A zero head, DiT's own initialisation, would leave the embedder without any."""
    base, model, z_dc, _, y = small_pair()
    model.x_embedder.requires_grad_(True)
    loss = flow_matching_loss(model, z_dc, torch.full((48,), 0.5), y, torch.randn_like(z_dc))[0]
    loss.mean().backward()
    assert model.x_embedder.proj.weight.grad.norm() > 0


def test_stage_2_moves_embedder_and_head_and_nothing_else(tmp_path):
    _, before, *_ = small_pair()
    model, base, *_ = run_train(tmp_path, steps=5)
    for (key, value), (_, old) in zip(model.state_dict().items(), before.state_dict().items()):
        assert torch.equal(value, old) != key.startswith((model.EMBEDDER, model.HEAD)), key


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_every_stage_of_the_method_takes_prompts_as_it_takes_classes(name):
    base = tiny_model(name)
    net = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    g = torch.Generator().manual_seed(0)
    side = 4 if name == "flux" else 2       # cells of the old latent a side of a new token
    z_dc = torch.randn(40, 32, 2, 3, generator=g)
    z_base = torch.randn(40, base.cfg.in_channels, 2 * side, 3 * side, generator=g)
    text = random_text(base.cfg, 40, 45)
    t = torch.rand(40, generator=g)
    x0 = torch.randn(z_dc.shape, generator=g)

    before = embedding_loss(net, base, z_dc, z_base).item()
    loss = solve_embedder(net, base, [(z_dc, z_base)])
    assert embedding_loss(net, base, z_dc, z_base).item() == pytest.approx(loss, rel=1e-3)
    assert loss < 0.8 * before
    before = flow_matching_loss(net, z_dc, t, text, x0)[0].mean().item()
    loss = solve_head(net, [(z_dc, t, text, x0)])
    assert flow_matching_loss(net, z_dc, t, text, x0)[0].mean().item() == pytest.approx(loss, rel=1e-3)
    assert loss < 0.8 * before


# ---- Eq. 4-7: a guidance-distilled base ----------------------------------------------------------

@pytest.mark.parametrize("with_gradients", [False, True], ids=["one-batch", "two-passes"])
def test_the_corrected_velocity_of_an_exact_distilled_model_is_the_undistilled_one(with_gradients):
    """Eq. 6 for guidances from 1 to 14."""
    model = Distilled()
    z, t, y, _ = distilled_batch()
    with torch.set_grad_enabled(with_gradients):
        got = corrected_velocity(model, z, t, y)
    assert_near(got.detach(), model.undistilled(z, t, y).detach())
    assert model.guidances[-1][-6:] == [1.0] * 6                     # the null branch reads 1


def test_the_guided_loss_is_the_plain_loss_of_the_undistilled_model():
    """Eq. 7."""
    model = Distilled()
    z, t, y, x0 = distilled_batch()
    guided = guided_flow_matching_loss(model, z, t, y, x0)[0]
    plain = flow_matching_loss(model.undistilled, z, t, y, x0)[0]
    assert_near(guided.detach(), plain.detach())


def test_the_plain_loss_punishes_a_distilled_model_for_its_guidance():
    """Fig. 6: a perfect model has a large plain loss wherever g > 1, so training on it forgets guidance."""
    model = Distilled()
    batch = distilled_batch()
    plain = flow_matching_loss(model, *batch)[0].detach()
    guided = guided_flow_matching_loss(model, *batch)[0].detach()
    assert relative_error(plain[:1], guided[:1]) < 1e-5              # g = 1
    assert relative_error(plain[1:], guided[1:]) > 1


def test_the_null_branch_passes_no_gradient():
    z, t, y, x0 = distilled_batch(3)
    xt, v = path(x0, z, t)
    g = y.guidance.view(-1, 1, 1, 1)

    def gradient(detached: bool):
        model = Distilled()
        null = model(xt, t, unguided_null(model, y))
        pred = (model(xt, t, y) + (g - 1) * (null.detach() if detached else null)) / g
        return torch.autograd.grad((pred - v).square().mean(), model.w)[0]

    model = Distilled()
    guided_flow_matching_loss(model, z, t, y, x0)[0].mean().backward()
    assert_near(model.w.grad, gradient(detached=True))
    assert relative_error(gradient(detached=False), gradient(detached=True)) > 0.05


def test_the_closed_form_head_of_a_distilled_model_minimises_the_guided_loss():
    net = tiny_model("flux")
    g = torch.Generator().manual_seed(1)
    y = replace(random_text(net.cfg, 64), guidance=1 + 6 * torch.rand(64, generator=g))
    z, x0 = torch.randn(2, 64, net.cfg.in_channels, 4, 4, generator=g).unbind()
    t = torch.rand(64, generator=g)
    best = solve_head(net, [(z, t, y, x0)], guided=True)

    @torch.no_grad()
    def loss():
        return guided_flow_matching_loss(net, z, t, y, x0)[0].mean().item()

    assert loss() == pytest.approx(best, rel=1e-3)
    for p in net.head_linear.parameters():
        p.add_(0.01 * torch.randn(p.shape, generator=g))
    assert loss() > best


def test_a_distilled_base_learns_by_the_guided_loss_and_others_by_the_plain_one():
    for name, guided in (("tiny-flux", True), ("tiny-sana", False), ("tiny", False)):
        assert align.pick_objective(BASES[name]).guided == guided, name


# ---- stage 3: LoRA -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TINIES)
def test_lora_starts_as_the_aligned_model_and_merges_into_it(name):
    net = tiny_model(name)
    x = torch.randn(2, net.cfg.in_channels, 4, 4)
    inputs = x, torch.tensor([0.3, 0.8]), random_condition(net.cfg)
    before = net(*inputs)
    add_lora(net, rank=4)
    assert torch.equal(net(*inputs), before)
    for key, value in lora_state(net).items():
        if key.endswith(".B"):
            value.normal_(std=0.05)
    adapted = net(*inputs)
    assert relative_error(adapted, before) > 1e-3
    assert_near(merge_lora(net)(*inputs), adapted, 1e-4)


def test_stage_3_trains_embedder_and_head_in_full_and_the_trunk_by_lora():
    net = tiny_model("dit")
    add_lora(net, rank=4)
    names = {re.sub(r"\.\d+\.", ".N.", name) for name, _ in finetune.stage3_parameters(net, "lora")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    lora = {f"blocks.N.{layer}.{m}" for layer in layers for m in "AB"}
    ends = {name for name, _ in named_parameters_with(net, ("x_embedder", "final_layer"))}
    assert names == lora | {re.sub(r"\.\d+\.", ".N.", name) for name in ends}


# ---- the bundled models, from end to end --------------------------------------------------------

QUICK = ["--pictures", "64", "--batch", "8", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A folder in which the bundled base was aligned in a hurry, by the script itself."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        align.main([*QUICK, "--stage2-steps", "3", "--head-samples", "512", "--count", "8"])
    return root


def test_align_writes_a_run_that_holds_embedder_and_head_alone(aligned):
    run = aligned / "runs/align-tiny-1"
    written = {file.name for file in run.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl"} <= written
    assert {"samples.png", "gap.png", "curves.png"} <= written
    keys = read_tensors(run / "model.safetensors")
    assert {key.split(".")[0] for key in keys} == {"x_embedder", "final_layer"}


def test_alignment_closes_the_gap_to_the_base(aligned):
    _, info = load_run(aligned / "runs/align-tiny-1")
    rows = {row["stage"]: row for row in info["stages"]}
    assert rows["stage 1: embedder"]["gap"] < 0.5 * rows["not aligned"]["gap"]
    assert rows["head in closed form"]["val_loss"] < 0.5 * rows["not aligned"]["val_loss"]


def test_after_alignment_the_untouched_trunk_draws(tmp_path, monkeypatch):
    """Fig. 4b, on a sixth of the default's pictures: most classes are recognised, an eighth by chance."""
    monkeypatch.chdir(tmp_path)
    few = "--pictures 768 --head-samples 1536 --stage2-steps 50 --count 0 --previews 0 --device cpu --out run"
    align.main(few.split())
    # the base has seen the pictures at half the size
    caches = [json.loads(file.read_text())["what"] for file in Path("runs/cache").glob("*/meta.json")]
    assert [what["sizes"] for what in caches] == 2 * [{"tiny-kl-f8c4": 64}]
    model, _ = load_run("run")
    base, _ = load_base("tiny")
    trunk = model.blocks.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in base.blocks.state_dict().items())
    classes = torch.arange(48) % 8
    sampling = replace(model.cfg.sampling, num_steps=12)
    images = generate(model, load_autoencoder(model.cfg.ae), classes, list(range(48)), sampling)
    assert accuracy(load_classifier(), images, classes) > 0.6


def test_finetune_continues_from_the_alignment_and_sample_draws_the_result(aligned, monkeypatch):
    monkeypatch.chdir(aligned)
    finetune.main([*QUICK, "--train-steps", "2", "--out", "runs/tuned"])
    model, info = load_run("runs/tuned")
    assert (info["kind"], model.cfg.ae) == ("finetune", "tiny-dc-ae-f32c32")
    assert model.blocks[0].attn.qkv.A.shape[0] == RECIPES["tiny"].rank
    sample.main(["runs/tuned", "--count", "2", "--num-steps", "2", "--device", "cpu"])
    assert len(list(Path("runs/tuned/samples").glob("*.png"))) == 2


def test_the_bundled_text_bases_draw_what_captions_say():
    """And guidance makes them better: as a number for tiny-flux, in two passes for tiny-sana."""
    ae = load_autoencoder("tiny-kl-f8c4")
    source = ScenesSource(128, split="val")
    captions = [source.caption(i) for i in range(48)]
    words = encode_words(captions, 16)

    def score(name, condition, **settings):
        model, _ = load_base(name)
        model.null = cache_prompts("words", None, [""], 16).null
        sampling = replace(model.cfg.sampling, num_steps=12, sampler="euler", **settings)
        return scene_scores(generate(model, ae, condition, list(range(48)), sampling), captions)

    unguided, guided = (score("tiny-flux", with_guidance(words, g))["all"] for g in (1.0, 3.5))
    assert guided > 0.6 and guided > unguided
    assert score("tiny-sana", words, cfg_scale=2.0)["all"] > 0.5
    swapped = words[torch.arange(1, 49) % 48]
    assert score("tiny-sana", swapped, cfg_scale=2.0)["all"] < 0.1   # it is the caption that does it


# ---- the project ---------------------------------------------------------------------------------

ROOMS = ("model lora autoencoder checkpoints shapes data fast flags quant sample evaluate train align "
         "finetune bench").split()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_left(room):
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not imported & set(ROOMS[ROOMS.index(room):])


@pytest.mark.parametrize("room", [*ROOMS, "test_dcgen"])
def test_no_line_is_wider_than_110_columns(room):
    wide = [i for i, line in enumerate((ROOT / f"{room}.py").read_text().split("\n"), 1) if len(line) > 110]
    assert not wide


def known_flags(script: str) -> set[str]:
    """The flags that a script's parser accepts, from its --help."""
    modules = {"align": align, "finetune": finetune, "sample": sample, "evaluate": evaluate, "bench": bench,
               "quant": quant}
    main = modules[script].main
    seen = set()
    add_argument = argparse._ActionsContainer.add_argument

    def note(self, *names, **settings):
        action = add_argument(self, *names, **settings)
        seen.update(action.option_strings)                           # with --no-... of a switch
        return action

    with pytest.MonkeyPatch.context() as m:
        m.setattr(argparse._ActionsContainer, "add_argument", note)
        with pytest.raises(SystemExit):
            main(["--help"])
    return seen


@pytest.mark.parametrize("script", ["align", "finetune", "quant", "sample", "evaluate", "bench"])
def test_every_flag_in_the_documents_is_one_of_its_script(script, capsys):
    text = "".join((ROOT / file).read_text() for file in ("README.md", "docs/results.md", "docs/speed.md"))
    commands = re.findall(rf"(?<![\w/]){script}\.py([^\n`#|)]*)", text)
    used = {flag for command in commands for flag in re.findall(r"--[a-z0-9][a-z0-9-]*", command)}
    assert used <= known_flags(script)
