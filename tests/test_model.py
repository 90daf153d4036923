"""DiT, FLUX and SANA equal the official code, and move to a deep latent."""

import math
import re
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

import autoencoder
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import TABLES, build, detect_layout, load_weights, write_tensors
from helpers import (
    DCAE_STYLES, DDPM_DIT, EVERY, TINIES, TINY_FLUX, TINY_SANA, assert_near, fixed_forward, manifest, on_meta,
    parity, parity_cases, random_condition, random_text, relative_error, scramble, tiny_model)
from model import (
    FAMILIES, FP16_MAX, DiT, Flux, Sana, Text, cat_conditions, ddpm_alphas_cumprod, ddpm_step, ddpm_times,
    linear_attention, rotary_table, rotate, sincos_2d, timestep_embedding, to_deep_latent, to_deep_model,
    where_conditions)

DEEP_AE = AUTOENCODERS["tiny-dc-ae-f32c32"]
CPU = torch.device("cpu")


# ---- stored and live models of the official code as ours -------------------------------------------

TINY_OF = {DiT: DDPM_DIT, Flux: TINY_FLUX, Sana: TINY_SANA}
# our fields and their names in configs of the official code and of diffusers: the first found counts
NAMES = {
    "depth": ("depth", "num_layers"),
    "depth_single": ("depth_single_blocks", "num_single_layers"),
    "num_heads": ("num_cross_attention_heads", "num_heads", "num_attention_heads"),
    "num_classes": ("num_classes", "num_embeds_ada_norm"),
    "axes_dim": ("axes_dim", "axes_dims_rope"),
    "context_in_dim": ("context_in_dim", "joint_attention_dim"),
    "vec_in_dim": ("vec_in_dim", "pooled_projection_dim"),
    "guidance_embed": ("guidance_embed", "guidance_embeds"),
    "in_channels": ("latent_channels", "in_channels"),
}


def pick(values: dict, *names: str):
    """The value of the first name that is there, or None."""
    return next((values[name] for name in names if name in values), None)


def fill(config: dict, weights: dict, **changes):
    """Our model for an official config, filled with the weights by the table of their layout."""
    family, layout = detect_layout(weights)
    found = {}
    for field in fields(TINY_OF[family]):
        value = pick(config, *NAMES.get(field.name, [field.name]))
        if value is not None:
            found[field.name] = tuple(value) if isinstance(value, list) else value
    if "attention_head_dim" in config:
        found["hidden_size"] = config["num_attention_heads"] * config["attention_head_dim"]
    # the official FLUX has no patch size: a token of in_channels numbers is a square of cells
    if "latent_channels" in config:
        found["patch_size"] = math.isqrt(config["in_channels"] // config["latent_channels"])
    cfg = replace(TINY_OF[family], **found, **changes)
    return load_weights(on_meta(family, cfg), weights, TABLES[family][layout])


def stored(name: str, **changes):
    """A stored case and our model of it."""
    case = parity(name)
    net = fill(case.config, case.weights, **changes)
    if name.startswith("sana_diffusers"):
        for block in net.blocks:
            # diffusers' own, not those of the training
            block.cross_attn.q_norm.eps = 1e-5
            block.cross_attn.k_norm.eps = 1e-5
    return case, net


def grid_of(case) -> tuple[int, int]:
    """The latent grid (H,W) of a stored FLUX case."""
    height = pick(case.config, "latent_height", "grid_height")
    width = pick(case.config, "latent_width", "grid_width")
    return height, width


def stored_condition(net, x: dict):
    """The classes or the Text of a stored case."""
    if isinstance(net, DiT):
        return pick(x, "y", "class_labels")
    tokens = pick(x, "encoder_hidden_states", "txt", "y")
    if isinstance(net, Flux):
        return Text(tokens, None, pick(x, "y", "pooled_projections"), x.get("guidance"))
    # the official SANA keeps an axis of one between batch and tokens
    tokens = tokens[:, 0] if tokens.ndim == 4 else tokens
    return Text(tokens, pick(x, "mask", "encoder_attention_mask").bool())


def stored_inputs(net, case) -> tuple:
    """What forward_native reads of a stored case: latent, clock, condition."""
    x = pick(case.inputs, "img", "x", "hidden_states")
    if isinstance(net, Flux):
        x = net.unpatchify(x, grid_of(case))
    step = pick(case.inputs, "t", "timesteps", "timestep")
    return x, step.float(), stored_condition(net, case.inputs)


def assert_sinusoids(ours, theirs, reading):
    """Sines and cosines (rows,...) are equal but for the error of their arguments, up to reading (rows,)."""
    # frequencies are exponentials in float32, whose last bit depends on the machine: an argument s is off by
    # about s * 2^-23, and so are its sine and cosine
    assert ours.shape == theirs.shape
    bound = 2e-7 * (1 + reading.double().abs())
    error = (ours - theirs).abs().flatten(1).amax(dim=1)
    assert (error <= bound).all(), f"{error.tolist()} with {bound.tolist()} allowed"


def draw(net, n: int = 2, size: tuple[int, int] = (4, 6)) -> tuple:
    """Random latents, times and conditions for a model."""
    x = torch.randn(n, net.cfg.in_channels, *size)
    t = torch.linspace(0.1, 0.9, n)
    return x, t, random_condition(net.cfg, n)


# ---- parity with stored outputs --------------------------------------------------------------------

ALL_CASES = parity_cases(
    "dit", "dit_patch1", "dit_diffusers", "flux_bfl", "flux_diffusers", "flux_diffusers_dcgen", "sana_dcgen",
    "sana_diffusers")


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_forward_pass_equals_the_official_one(name):
    case, net = stored(name)
    out = net.forward_native(*stored_inputs(net, case))
    if isinstance(net, Flux):
        out = net.patchify(out)
    # diffusers divides DiT's exponent by 127 where the weights were trained with 128
    assert_near(out, pick(case.outputs, "forward_original_frequencies", "forward"))


@pytest.mark.parametrize("name", parity_cases("flux_bfl", "flux_diffusers_dcgen"))
def test_flux_packs_as_the_official_code(name):
    case, net = stored(name)
    assert torch.equal(net.patchify(case.inputs["latent"]), case.outputs["packed"])


@pytest.mark.parametrize("name", parity_cases("sana_dcgen"))
def test_sana_has_the_official_loss(name):
    case, net = stored(name)
    x = case.inputs
    out = case.outputs
    # on our clock, with our sign
    v = net(out["loss_xt"], 1 - out["loss_model_t"] / 1000, stored_condition(net, x))
    error = v - (x["loss_x0"] - x["loss_noise"])
    assert_near(error.square().mean(dim=(1, 2, 3)), out["loss"], 1e-4)


@pytest.mark.parametrize("name", parity_cases("sana_dcgen", "sana_diffusers"))
def test_sana_without_a_mask_attends_to_all_tokens(name):
    case, net = stored(name)
    x, step, text = stored_inputs(net, case)
    want = pick(case.outputs, "forward_no_mask", "forward_all_tokens")
    assert_near(net.forward_native(x, step, Text(text.tokens)), want)


@pytest.mark.parametrize("name", parity_cases("sana_dcgen"))
def test_sana_truncates_its_clock_as_the_official_code_if_asked(name):
    case, net = stored(name, integer_time=True)
    x, step, text = stored_inputs(net, case)
    assert_near(net.forward_native(x, step + 0.9, text), case.outputs["forward_fractional_t"])


# ---- tables ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", parity_cases("tables"))
def test_tables_of_clock_and_positions_are_the_official_ones(name):
    case = parity(name)
    out = case.outputs
    t = case.inputs["dit_t"]
    assert_sinusoids(timestep_embedding(t, 256), out["dit_timestep_embedding_256"], t)
    for dim, n in case.config["sincos"]:
        want = out[f"dit_sincos_{dim}_grid{n}"]
        assert_sinusoids(sincos_2d(dim, n, n), want, torch.full((n * n,), n))


@pytest.mark.parametrize("name", parity_cases("tables"))
def test_rotary_tables_turn_queries_and_keys_as_the_official_code(name):
    case = parity(name)
    x = case.inputs
    for i, (axes, height, width, text_tokens) in enumerate(case.config["rope"]):
        rotary = rotary_table(tuple(axes), 1e4, text_tokens, height, width, 1.0, CPU)
        cos, sin = (table[:, 0, 1::2] for table in rotary)
        ours = torch.stack([cos, -sin, sin, cos], dim=-1)
        theirs = case.outputs[f"rope{i}_bfl"][0, 0].flatten(-2)
        assert_sinusoids(ours, theirs, x[f"rope{i}_ids"].amax(dim=1))
        # the stored queries and keys are as long as one of the tables
        if x["rope_q"].shape[-2:] == (len(ours), sum(axes)):
            for key in ("rope_q", "rope_k"):
                turned = rotate(x[key].transpose(1, 2), rotary).transpose(1, 2)
                assert_near(turned, case.outputs[f"{key}_rotated"], 1e-6)


def test_a_clock_in_bf16_is_embedded_in_float32():
    assert timestep_embedding(torch.arange(9).bfloat16(), 256).dtype == torch.float32


def test_positions_of_a_non_square_grid_are_those_of_the_square_one():
    square = sincos_2d(32, 5, 5).view(5, 5, 32)
    assert_close(sincos_2d(32, 3, 5).view(3, 5, 32), square[:3])
    assert_close(sincos_2d(32, 5, 2).view(5, 2, 32), square[:, :2])


def test_a_cached_table_is_not_made_on_the_default_device():
    with torch.device("meta"):
        assert sincos_2d(36, 3, 2).device.type == "cpu"


def test_with_a_step_of_2_a_token_stands_in_the_middle_of_the_cells_that_it_covers():
    middles = torch.tensor([0.5, 2.5]).sin()
    # the column's first frequency is 1
    sin = rotary_table((4, 6, 6), 1e4, 0, 1, 2, 2.0, CPU)[1][:, 0]
    assert_near(sin[:, 11], middles, 1e-6)
    assert_near(sincos_2d(16, 1, 2, 2.0)[:, 0], middles, 1e-6)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_model_reads_the_step_of_its_positions(name):
    net = tiny_model(name)
    before = fixed_forward(net)
    net.cfg = replace(net.cfg, pos_step=2.0)
    assert relative_error(fixed_forward(net), before) > 1e-3


# ---- parity with diffusers' classes ----------------------------------------------------------------

@pytest.mark.parametrize("patch, size", [(2, 8), (1, 4)])
def test_dit_matches_diffusers(patch, size):
    diffusers = pytest.importorskip("diffusers")
    config = dict(
        num_attention_heads=4, attention_head_dim=12,
        in_channels=4, out_channels=8,
        num_layers=2, num_embeds_ada_norm=9,
        sample_size=size, patch_size=patch)
    theirs = scramble(diffusers.DiTTransformer2DModel(**config).double())
    shared = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        # as published, all blocks embed alike; as trained, 128 frequencies (not 127) and 1e-6 (not 1e-5)
        block.norm1.emb.load_state_dict(shared)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    net = fill(config, theirs.state_dict())
    x = torch.randn(3, 4, size, size).double()
    t = torch.tensor([0, 417, 999])
    y = torch.tensor([0, 8, 9])
    assert_near(net.forward_native(x, t, y), theirs(x, timestep=t, class_labels=y).sample, 1e-7)


@pytest.mark.parametrize("channels, patch, grid, guided", [
    (4, 2, (6, 10), True),
    (12, 1, (3, 4), False),
])
def test_flux_matches_diffusers(channels, patch, grid, guided):
    diffusers = pytest.importorskip("diffusers")
    config = dict(
        in_channels=channels * patch**2,
        num_layers=2, num_single_layers=2,
        num_attention_heads=3, attention_head_dim=16,
        joint_attention_dim=24, pooled_projection_dim=12,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6))
    theirs = scramble(diffusers.FluxTransformer2DModel(**config).double())
    net = fill({**config, "latent_channels": channels}, theirs.state_dict())
    x = torch.randn(2, channels, *grid).double()
    t = torch.tensor([0.1, 0.9]).double()
    text = random_text(net.cfg).to(dtype=torch.float64)
    rows, cols = (torch.arange(side / patch) for side in grid)
    ids = torch.cartesian_prod(torch.zeros(1), rows, cols)
    guidance = text.guidance.double() if guided else None
    want = theirs(net.patchify(x), text.tokens, text.pooled, t, ids, torch.zeros(5, 3), guidance).sample
    # the tables of clock and positions are float32
    assert_near(net.patchify(net.forward_native(x, t, text)), want, 2e-6)


@pytest.mark.parametrize("channels, patch, grid", [
    (8, 2, (6, 10)),
    (12, 1, (5, 4)),
])
def test_sana_matches_diffusers(channels, patch, grid):
    diffusers = pytest.importorskip("diffusers")
    config = dict(
        in_channels=channels, out_channels=channels,
        patch_size=patch, sample_size=6,
        num_layers=2, mlp_ratio=1.5,
        num_attention_heads=2, attention_head_dim=32,
        num_cross_attention_heads=4, cross_attention_head_dim=16,
        cross_attention_dim=64, caption_channels=24,
        qk_norm="rms_norm_across_heads")
    theirs = scramble(diffusers.SanaTransformer2DModel(**config).double())
    for block in theirs.transformer_blocks:
        # as trained; diffusers has 1e-5
        block.attn2.norm_q.eps = 1e-6
        block.attn2.norm_k.eps = 1e-6
    net = fill(config, theirs.state_dict())
    x = torch.randn(2, channels, *grid).double()
    t = torch.tensor([3.0, 870.25]).double()
    text = random_text(net.cfg).to(dtype=torch.float64)
    want = theirs(x, text.tokens, t, encoder_attention_mask=text.mask.double()).sample
    assert_near(net.forward_native(x, t, text), want, 1e-6)


# ---- what the families share -----------------------------------------------------------------------

@pytest.mark.parametrize("name", EVERY)
def test_patches_become_the_same_latent_again(name):
    net = on_meta(FAMILIES[type(EVERY[name])], replace(EVERY[name], patch_size=2))
    x = torch.randn(2, 3, 6, 10)
    assert torch.equal(net.unpatchify(net.patchify(x), (6, 10)), x)


@pytest.mark.parametrize("name", TINIES)
def test_tokens_are_contiguous_which_compiled_blocks_on_a_cpu_need(name):
    model = tiny_model(name)
    z = torch.randn(2, model.cfg.in_channels, 4 * model.cfg.patch_size, 4 * model.cfg.patch_size)
    assert model.embed(z).is_contiguous()


@pytest.mark.parametrize("name, scale, sign", [
    ("dit", 1000, 1),
    ("flux", 1, -1),
    ("sana", 1000, -1),
])
def test_clocks_and_signs_are_turned_to_the_projects(name, scale, sign):
    net = tiny_model(name)
    x, t, y = draw(net)
    step = scale * (t if sign == 1 else 1 - t)
    assert torch.equal(net(x, t, y), sign * net.forward_native(x, step, y))


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_reads_its_own_condition_and_no_neighbour(name):
    net = tiny_model(name)
    x, t, y = draw(net)
    alone = net(x[1:], t[1:], y[1:])
    assert_near(alone, net(x, t, y)[1:])


@pytest.mark.parametrize("part", ["pooled", "guidance"])
def test_flux_refuses_a_text_that_lacks_what_it_reads(part):
    net = tiny_model("flux")
    x, t, text = draw(net)
    with pytest.raises(ValueError, match="guidance"):
        net(x, t, replace(text, **{part: None}))


# ---- DDPM's clock ----------------------------------------------------------------------------------

def test_a_point_of_the_path_is_a_state_of_the_ddpm_chain():
    net = on_meta(DiT, DDPM_DIT)
    times = ddpm_times().double()
    t = times.view(-1, 1, 1, 1)
    ab = ddpm_alphas_cumprod().view(-1, 1, 1, 1)
    x0, x1 = torch.randn(2, 1000, 1, 1, 1).double()
    state, step = net.to_native(t * x1 + (1 - t) * x0, times)
    assert_close(state, ab.sqrt() * x1 + (1 - ab).sqrt() * x0, atol=1e-5, rtol=1e-5)
    assert_close(step.double(), torch.arange(1000).double(), atol=2e-2, rtol=0)     # the times are float32


def test_ddpm_steps_are_interpolated_and_end_with_the_chain():
    times = ddpm_times()
    between = ddpm_step((times[:-1] + times[1:]) / 2)
    assert_close(between, torch.arange(999) + 0.5, atol=0.02, rtol=0)
    assert ddpm_step(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


def test_the_velocity_of_an_exact_epsilon_is_exact():
    net = on_meta(DiT, DDPM_DIT)
    t = torch.linspace(0.01, 0.999, 57).double().view(-1, 1, 1, 1)
    x0, x1 = torch.randn(2, 57, 4, 2, 2).double()
    out = torch.cat([x0, torch.randn_like(x0)], dim=1)               # the variance is not read
    assert_close(net.to_velocity(out, (1 - t) * x0 + t * x1, t.flatten()), x1 - x0)


# ---- conditions ------------------------------------------------------------------------------------

def test_texts_are_concatenated_and_chosen():
    text = random_text(TINY_FLUX, 3)
    zeros = text.map(torch.zeros_like)
    both = cat_conditions([text, zeros])
    assert both.mask is None
    assert torch.equal(both[:3].tokens, text.tokens)
    assert not both[3:].pooled.any()
    some = where_conditions(torch.tensor([True, False, True]), zeros, text)
    assert some.guidance.tolist() == [0, 3.5, 0]
    assert some.tokens.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_texts_of_two_lengths_cannot_share_a_batch():
    with pytest.raises(ValueError, match="5 and 6 tokens"):
        cat_conditions([random_text(TINY_FLUX), random_text(TINY_FLUX, length=6)])


def test_the_guidance_stays_float32():
    half = random_text(TINY_FLUX).to("cpu", torch.bfloat16)
    assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16
    assert half.guidance.dtype == torch.float32


def test_a_null_prompt_has_its_own_mask_and_the_guidance_of_the_prompt():
    text = random_text(TINY_FLUX, 3)
    assert torch.equal(tiny_model("flux").null_condition(text).guidance, text.guidance)
    net = tiny_model("sana")
    text = random_text(TINY_SANA, 3)
    null = net.null_condition(text)
    assert torch.equal(null.mask, net.null.mask.expand(3, -1))
    assert torch.equal(null.tokens[2], net.null.tokens[0])
    net.null = Text(net.null.tokens)
    assert torch.equal(net.null_condition(text).mask, text.mask)


def test_a_text_model_without_a_null_prompt_names_the_remedy():
    with pytest.raises(ValueError, match="null prompt"):
        on_meta(Sana, TINY_SANA).null_condition(random_text(TINY_SANA))


# ---- deep models, new models: the shared trunk is tested in test_dcgen.py ---------------------------

@pytest.mark.parametrize("name", EVERY)
def test_a_deep_config_has_the_new_latent_and_predicts_a_velocity(name):
    cfg = EVERY[name]
    deep = to_deep_latent(cfg, DEEP_AE, pos_step=2.0, shift=3.0)
    assert (deep.ae, deep.patch_size, deep.in_channels, deep.out_channels) == (DEEP_AE.name, 1, 32, 32)
    assert (deep.predict, deep.guided_channels, deep.weights) == ("velocity", None, None)
    assert deep.clock == cfg.clock
    assert getattr(deep, "pos_step", 2.0) == 2.0                     # SANA has no positions
    # DDPM's sampler needs the epsilon of the old head
    sampler = "euler" if name == "ddpm" else cfg.sampling.sampler
    assert deep.sampling == replace(cfg.sampling, shift=3.0, sampler=sampler)
    assert to_deep_latent(cfg, DEEP_AE).sampling.shift == cfg.sampling.shift


@pytest.mark.parametrize("name", TINIES)
def test_a_new_embedder_and_head_are_xavier_uniform(name):
    """Neither zero, which would pass no gradient, nor the base's rows."""
    base = tiny_model(name)
    deep = to_deep_model(base, to_deep_latent(base.cfg, DEEP_AE))
    for layer in (deep.embed_linear, deep.head_linear):
        limit = math.sqrt(6 / (layer.weight.shape[0] + layer.weight[0].numel()))
        assert layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()
    assert deep.null is base.null
    assert not any(p.requires_grad for p in deep.parameters())


@pytest.mark.parametrize("name", TINIES)
def test_a_model_from_scratch_starts_at_zero_and_can_learn(name):
    cfg = TINIES[name]
    net = FAMILIES[type(cfg)](cfg).init_from_scratch()
    v = net(*draw(net))
    assert not v.any()
    (v - 1).square().mean().backward()
    assert net.head_linear.weight.grad.norm() > 0


# ---- numbers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TINIES)
def test_bf16_autocast_stays_within_a_percent_of_fp64(name):
    net = tiny_model(name)
    x, t, y = draw(net, 4, size=(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y)
        assert net.embed(x).dtype == torch.float32                   # the residual stream
    wide_y = y.to(dtype=torch.float64) if isinstance(y, Text) else y
    assert relative_error(half, net.double()(x.double(), t, wide_y)) < 0.01


def test_linear_attention_keeps_its_core_in_float32():
    q, k, v = torch.randn(3, 1, 2, 32, 5000).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_attention(q, k, v, 1e-15)
    assert half.dtype == torch.bfloat16
    # one rounding, of the result
    assert_near(half, linear_attention(q.double(), k.double(), v.double(), 1e-15), 2**-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sana_trained_in_fp16_is_clamped_to_its_range_and_others_are_not(dtype, tmp_path):
    """Its activations pass 65504, and the weights rely on the clamp whatever the arithmetic is now."""
    file = tmp_path / "w.safetensors"
    state = scramble(Sana(TINY_SANA)).state_dict()
    write_tensors(file, {key: value.to(dtype) for key, value in state.items()})
    attn = build(TINY_SANA, file).blocks[0].attn
    attn.proj.weight.mul_(1e6)
    largest = attn(torch.randn(1, 6, 64)).abs().max()
    assert (largest <= FP16_MAX) == (dtype == torch.float16)


EPSILONS = {
    "DiT original": (DiT, DDPM_DIT),
    "FLUX transformer original": (Flux, TINY_FLUX),
    "SANA original": (Sana, TINY_SANA),
    "AutoencoderKL diffusers": (build_autoencoder, AUTOENCODERS["sd-vae-f8c4"]),
    "DC-AE diffusers, in-1.0 style": (build_autoencoder, AUTOENCODERS["dc-ae-f32c32-in-1.0"]),
    "DC-AE diffusers, sana style": (build_autoencoder, AUTOENCODERS["dc-ae-f32c32-sana-1.1"]),
}


@pytest.mark.parametrize("name", EPSILONS)
def test_every_epsilon_is_the_official_one(name):
    """A wrong epsilon hides inside any tolerance of a comparison of outputs."""
    official = {}
    for key, norm in manifest("norm_eps")["models"][name].items():
        # DC-AE's attention hands its epsilon to linear_attention: see the next test
        if norm["type"] != "SanaMultiscaleLinearAttention":
            key = re.sub(r"attn\.norm_out$", "attn.norm", key)
            official[key] = float(str(norm["eps"]).split()[0])
    ours = {}
    for key, module in on_meta(*EPSILONS[name]).named_modules():
        if hasattr(module, "eps"):
            ours[re.sub(r"\.\d+", ".N", key)] = module.eps
    assert ours == official


def test_the_epsilon_of_dc_ae_s_linear_attention_is_the_official_one(monkeypatch):
    seen = set()

    def record(q, k, v, eps):
        seen.add(eps)
        return v

    monkeypatch.setattr(autoencoder, "linear_attention", record)
    build_autoencoder(DCAE_STYLES["in"]).moments(torch.randn(1, 3, 16, 16))
    assert seen == {1e-15}
