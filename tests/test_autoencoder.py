"""The autoencoders against the official code and diffusers; their scales; pictures in strips and in tiles."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import autoencoder
from autoencoder import (
    AUTOENCODERS, DCAE, DCAEConfig, KLVAE, KLConfig, MultiscaleAttention, ae_config, build_autoencoder,
    in_strips, in_tiles)
from checkpoints import ae_table, diffusers_ae_config, load_weights, map_keys, stated_config
from helpers import (
    DCAE_STYLES, TINY_KL, assert_near, digest, manifest, on_meta, parity, parity_cases, relative_error,
    scramble)

SMALL = [TINY_KL, *DCAE_STYLES.values()]
every_kind = pytest.mark.parametrize("cfg", SMALL, ids=lambda cfg: cfg.name)
every_dcae = pytest.mark.parametrize("cfg", DCAE_STYLES.values(), ids=lambda cfg: cfg.name)


def loaded(ae, weights: dict[str, Tensor]):
    """The autoencoder with weights of any published layout."""
    return load_weights(ae, weights, ae_table(ae.cfg, weights)).eval()


# ---- parity with the official code ---------------------------------------------------------------

def kl_config(config: dict) -> KLConfig:
    """The config of a stored case: diffusers' AutoencoderKL, or Black Forest Labs' autoencoder."""
    if "ch_mult" in config:
        widths = tuple(config["ch"] * m for m in config["ch_mult"])
        return KLConfig("case", config["z_channels"], config["scale_factor"], config["shift_factor"], widths,
                        config["num_res_blocks"])
    return KLConfig("case", config["latent_channels"], widths=tuple(config["block_out_channels"]),
                    depth=config["layers_per_block"], groups=config["norm_num_groups"],
                    quant_conv=config["use_quant_conv"])


def first_attention(types, stages: int) -> int:
    """The first stage that is not made of ResBlocks; one name stands for all stages."""
    names = [types] * stages if isinstance(types, str) else types
    return next((i for i, name in enumerate(names) if name != "ResBlock"), stages)


def dcae_config(config: dict) -> DCAEConfig:
    """The config of a stored case: diffusers' AutoencoderDC, or the original DC-AE."""
    if "enc_w" not in config:
        widths = tuple(config["encoder_block_out_channels"])
        cfg = DCAEConfig("case", config["latent_channels"], widths=widths)
        return stated_config(cfg, {**config, "_class_name": "AutoencoderDC"})
    stages = len(config["enc_w"])
    return DCAEConfig(
        "case",
        config["latent_channels"],
        widths=tuple(config["enc_w"]),
        encoder_depths=tuple(config["enc_d"]),
        decoder_depths=tuple(config["dec_d"]),
        encoder_attention_from=first_attention(config["enc_t"], stages),
        decoder_attention_from=first_attention(config["dec_t"], stages),
        multiscale="EViTS5GLU" in config["enc_t"],
        strided=config.get("down") == "Conv",
        interpolate=config.get("up") == "InterpolateConv",
        decoder_batch_norm="bn2d" in config.get("dec_norm", ""),
        latent_shortcut=not config.get("adaptive"),
        out_act=config.get("out_act", "relu"))


@pytest.mark.parametrize("name", parity_cases("autoencoder_kl", "autoencoder_kl_noquant"))
def test_kl_vae_matches_stored_diffusers_outputs(name):
    case = parity(name)
    ae = loaded(KLVAE(kl_config(case.config)), case.weights)
    mean, logvar = ae.moments(case.inputs["x"])
    assert_near(mean, case.outputs["mean"])
    assert_near(logvar, case.outputs["logvar"])
    assert_near(ae.decode_raw(case.inputs["z"]), case.outputs["decode"])


BFL_KINDS = ("bfl_ae", "bfl_ae_decoder_wide", "bfl_ae_decoder_wide2", "bfl_ae_encoder_wide")


@pytest.mark.parametrize("name", parity_cases(*BFL_KINDS))
def test_flux_vae_matches_the_official_code_scale_and_shift_included(name):
    case = parity(name)
    ae = KLVAE(kl_config(case.config))
    for half in {"encoder", "decoder"} - {key.split(".")[0] for key in case.weights}:
        delattr(ae, half)                                            # some cases hold one half only
    loaded(ae, case.weights)
    if "encode" in case.outputs:
        assert_near(ae.encode(case.inputs["x"]), case.outputs["encode"])
        assert_near(torch.cat(ae.moments(case.inputs["x"]), dim=1), case.outputs["moments"])
    if "decode" in case.outputs:
        assert_near(ae.decode(case.inputs["z"]), case.outputs["decode"])


DCAE_KINDS = [f"dcae_{layout}_{style}" for layout in ("original", "diffusers") for style in DCAE_STYLES]


@pytest.mark.parametrize("name", parity_cases(*DCAE_KINDS))
def test_dc_ae_matches_the_official_code(name):
    case = parity(name)
    ae = loaded(DCAE(dcae_config(case.config)), case.weights)
    for size in ("", "_small"):
        assert_near(ae.moments(case.inputs["x" + size])[0], case.outputs["encode" + size])
        assert_near(ae.decode_raw(case.inputs["z" + size]), case.outputs["decode" + size])
    both_ways = ae.decode_raw(ae.moments(case.inputs["x_small"])[0])
    assert_near(both_ways, case.outputs["reconstruct_small"], 3e-5)
    for channels in case.config.get("partial", ()):                  # 1.5: the first channels alone
        part = ae.with_channels(channels)
        assert_near(part.moments(case.inputs["x"])[0], case.outputs[f"encode_c{channels}"])
        assert_near(part.decode_raw(case.inputs["z"][:, :channels]), case.outputs[f"decode_c{channels}"])


# ---- parity with diffusers' classes, in float64 --------------------------------------------------

def theirs_and_ours(cfg):
    """diffusers' autoencoder of a config with random weights, and ours with the same."""
    diffusers = pytest.importorskip("diffusers")
    cls = diffusers.AutoencoderKL if isinstance(cfg, KLConfig) else diffusers.AutoencoderDC
    theirs = scramble(cls.from_config(diffusers_ae_config(cfg)).double())
    return theirs, loaded(build_autoencoder(cfg), theirs.state_dict())


def image_and_latent(cfg, height: int, width: int, pictures: int = 2) -> tuple[Tensor, Tensor]:
    """Random float64 images of so many latent cells, and random latents."""
    image = torch.randn(pictures, 3, cfg.f * height, cfg.f * width).double()
    return image, torch.randn(pictures, cfg.channels, height, width).double()


@pytest.mark.parametrize("cfg", [
    replace(TINY_KL, channels=5, widths=(16, 32), quant_conv=True),
    replace(TINY_KL, channels=5, widths=(16, 32, 48), depth=2)], ids=["quant", "no quant"])
def test_kl_vae_matches_diffusers_by_both_names_of_its_attention(cfg):
    theirs, ours = theirs_and_ours(cfg)
    x, z = image_and_latent(cfg, 3, 5)
    want = theirs.encode(x).latent_dist
    mean, logvar = ours.moments(x)
    assert_near(mean, want.mean, 1e-10)
    assert_near(logvar, want.logvar, 1e-10)
    assert_near(ours.decode_raw(z), theirs.decode(z).sample, 1e-10)

    # the names in SD's published file
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in theirs.state_dict().items():
        old[re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: before[m[0]], key)] = value
    assert "encoder.mid_block.attentions.0.query.weight" in old
    again = loaded(KLVAE(cfg), old)
    assert torch.equal(again.decode_raw(z), ours.decode_raw(z))
    assert torch.equal(again.moments(x)[0], mean)


@pytest.mark.parametrize("narrow", [False, True])
@every_dcae
def test_dc_ae_matches_diffusers(cfg, narrow):
    if narrow:                                                       # a second configuration
        cfg = replace(cfg, channels=cfg.channels // 2, widths=(*cfg.widths[:-1], 32))
    theirs, ours = theirs_and_ours(cfg)
    x, z = image_and_latent(cfg, 3, 5) if narrow else image_and_latent(cfg, 2, 2)
    assert_near(ours.moments(x)[0], theirs.encode(x).latent, 1e-6)   # theirs computes RMS norms in float32
    assert_near(ours.decode_raw(z), theirs.decode(z).sample, 1e-6)


# ---- published files -----------------------------------------------------------------------------

PUBLISHED = {name: cfg for name, cfg in AUTOENCODERS.items() if not name.startswith("tiny")}
FILES = {
    "sd-vae-ft-ema.diffusers": "sd-vae-f8c4",
    "flux1-vae.original": "flux-vae-f8c16",
    "flux1-vae.diffusers": "flux-vae-f8c16"}
for published in PUBLISHED:
    if published.startswith("dc-ae") and "mix" not in published:
        FILES |= {f"{published}.original": published, f"{published}.diffusers": published}


def assert_uses_every_key(cfg, shapes: dict[str, list[int]]):
    ae = on_meta(build_autoencoder, cfg)
    file = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert map_keys(ae, file, ae_table(cfg, file)).keys() == ae.state_dict().keys()


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_the_published_autoencoder_is_used_and_every_target_filled(name):
    m = manifest(name)
    cfg = AUTOENCODERS[FILES[name]]
    shapes = m["tensors"]
    assert_uses_every_key(cfg, shapes)
    if "scaling_factor" in m:
        assert (cfg.scale, cfg.shift) == (m["scaling_factor"], 0)
    # the mix-1.0 models have the shapes of in-1.0, and a scale of their own
    for twin in m.get("same_shapes_as", []):
        if found := re.match(r"(dc-ae-\S+-mix-1\.0) \(scaling factor ([\d.]+)\)", twin):
            assert AUTOENCODERS[found[1]].scale == float(found[2])
            assert_uses_every_key(AUTOENCODERS[found[1]], shapes)
    # older names of the same file, whose attention was linear, and convolutions before that
    aliases = m.get("old_key_aliases", {})
    if aliases:
        assert_uses_every_key(cfg, {aliases.get(key, key): shape for key, shape in shapes.items()})
        conv = {}
        for key, shape in shapes.items():
            is_linear = key in aliases and len(shape) == 2
            conv[aliases.get(key, key)] = [*shape, 1, 1] if is_linear else shape
        assert_uses_every_key(cfg, conv)


SCALES = {
    "sd-vae-f8c4": 0.18215,
    "flux-vae-f8c16": 0.3611,
    "dc-ae-f32c32-in-1.0": 0.3189,
    "dc-ae-f32c32-mix-1.0": 0.4552,
    "dc-ae-f64c128-in-1.0": 0.2889,
    "dc-ae-f64c128-mix-1.0": 0.4538,
    "dc-ae-f128c512-in-1.0": 0.4883,
    "dc-ae-f128c512-mix-1.0": 0.3620,
    "dc-ae-f32c32-sana-1.0": 0.41407,
    "dc-ae-f32c32-sana-1.1": 0.41407,
    "dc-ae-lite-f32c32-sana-1.1": 0.41407,
    "dc-ae-f32c128-1.5": None,
    "dc-ae-f64c128-1.5": 0.5935}


def test_scales_and_shifts_are_the_published_ones():
    assert {name: cfg.scale for name, cfg in PUBLISHED.items()} == SCALES
    assert {name: cfg.shift for name, cfg in PUBLISHED.items() if cfg.shift} == {"flux-vae-f8c16": 0.1159}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_name_tells_the_latent(name):
    cfg = AUTOENCODERS[name]
    assert cfg.name == name and f"f{cfg.f}c{cfg.channels}" in name


# ---- encode and decode ---------------------------------------------------------------------------

@every_kind
def test_scale_and_shift_are_applied_once_and_in_the_right_direction(cfg):
    ae = scramble(build_autoencoder(replace(cfg, scale=0.37, shift=0.11)))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = ae.moments(x)[0]
    torch.testing.assert_close(ae.encode(x), (raw - 0.11) * 0.37)
    assert_near(ae.decode(ae.encode(x)), ae.decode_raw(raw), 1e-4)
    assert torch.equal(ae.encode(x), ae.encode(x))


def test_the_posterior_is_drawn_only_on_request():
    ae = scramble(KLVAE(TINY_KL))
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    mean = ae.encode(x)
    std = (0.5 * ae.moments(x)[1]).exp() * TINY_KL.scale
    generator = torch.Generator().manual_seed(0)
    draws = ae.encode(x.expand(4000, -1, -1, -1), sample=True, generator=generator)
    assert draws[0].ne(draws[1]).all()
    assert ((draws.mean(0) - mean[0]).abs() < 5 * std[0] / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0), std[0], rtol=0.1, atol=0)


def test_dc_ae_has_no_posterior_to_draw_from():
    ae = scramble(DCAE(DCAE_STYLES["in"]))
    x = torch.ones(1, 3, 16, 16)
    assert torch.equal(ae.encode(x, sample=True), ae.encode(x))


def test_a_log_variance_stays_within_its_limits():
    """It may be anything in a trained file."""
    ae = scramble(KLVAE(TINY_KL))
    ae.encoder.conv_out.bias[4:] += 1000
    assert ae.moments(torch.zeros(1, 3, 8, 8))[1].max() == 20
    ae.encoder.conv_out.bias[4:] -= 2000
    assert ae.moments(torch.zeros(1, 3, 8, 8))[1].min() == -30


NO_SCALE = AUTOENCODERS["dc-ae-f32c128-1.5"]


@pytest.mark.parametrize("cfg, request_, message", [
    (DCAE_STYLES["in"], lambda ae: ae.encode(torch.empty(1, 3, 100, 30, device="meta")),
     "a picture of 30x100: test-in needs sides that divide by 8; try 32x96"),
    (NO_SCALE, lambda ae: ae.decode(torch.empty(1, 128, 1, 1, device="meta")),
     "no scaling factor has been published for dc-ae-f32c128-1.5"),
    (NO_SCALE, lambda ae: ae.encode(torch.empty(1, 3, 32, 32, device="meta")),
     "no scaling factor has been published for dc-ae-f32c128-1.5"),
    (TINY_KL, lambda ae: ae_config("dc-ae-f64"), "dc-ae-f64.*dc-ae-f64c128-1.5"),
    (DCAE_STYLES["in"], lambda ae: ae.with_channels(4), "no partial latent of 4 channels"),
    (DCAE_STYLES["v15"], lambda ae: ae.with_channels(17), "no partial latent of 17 channels")])
def test_a_request_that_cannot_be_met_says_what_can(cfg, request_, message):
    with pytest.raises(ValueError, match=message):
        request_(on_meta(build_autoencoder, cfg))


def test_frozen_batch_norm_never_updates():
    """BatchNorm in train mode rewrites its statistics at every picture and mixes the pictures of a batch."""
    ae = scramble(DCAE(DCAE_STYLES["in"])).double()
    before = digest(ae.state_dict())
    z = torch.randn(4, 8, 3, 2).double()
    holder = nn.ModuleList([ae]).train()
    assert holder.training and not any(m.training for m in ae.modules())
    one_by_one = torch.cat([ae.decode(z[i : i + 1]) for i in range(4)])
    assert_near(one_by_one, ae.decode(z), 1e-12)
    assert digest(ae.state_dict()) == before


def test_batch_norm_in_training_sees_the_whole_batch():
    whole, strips = (DCAE(DCAE_STYLES["in"]).train() for _ in range(2))
    strips.load_state_dict(whole.state_dict())
    strips.max_elements = 1
    z = torch.randn(4, 8, 3, 2)
    assert torch.equal(whole.decode(z), strips.decode(z))
    assert digest(whole.state_dict()) == digest(strips.state_dict())
    assert whole.decoder.up_blocks[1][1].norm.num_batches_tracked == 1


@every_kind
def test_autoencoders_under_bf16_autocast_stay_within_two_percent(cfg):
    """Some twenty layers of 8-bit rounding, with random weights."""
    ae = scramble(build_autoencoder(cfg))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = torch.randn(2, cfg.channels, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = ae.moments(x)[0], ae.decode_raw(z)
    ae.double()
    exact = ae.moments(x.double())[0], ae.decode_raw(z.double())
    for a, b in zip(half, exact):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) < 0.02


# ---- strips: exact -------------------------------------------------------------------------------

def count_calls(ae, kind: type) -> Counter:
    """Calls of every layer of this kind from now on, by name."""
    calls = Counter()

    def register(name, layer):
        layer.register_forward_pre_hook(lambda *_: calls.update([name]))

    for name, layer in ae.named_modules():
        if isinstance(layer, kind):
            register(name, layer)
    return calls


ATTENTION_LAYERS = {"test-in": 3, "test-sana": 2, "test-lite": 2, "test-v15": 0}


@pytest.mark.parametrize("limit", [4000, 1000, 1])
@every_dcae
def test_strips_are_exact(cfg, limit):
    ae = scramble(DCAE(cfg)).double()
    x, z = image_and_latent(cfg, 11, 3)
    latent, image = ae.moments(x)[0], ae.decode_raw(z)
    convs = count_calls(ae, nn.Conv2d)
    attention = count_calls(ae, MultiscaleAttention)
    ae.max_elements = limit
    assert_near(ae.moments(x)[0], latent, 1e-12)
    assert_near(ae.decode_raw(z), image, 1e-12)
    # and they were strips, of all but attention
    assert convs["encoder.down_blocks.1.0.conv1"] > 1 and convs["decoder.up_blocks.1.1.conv1"] > 1
    assert list(attention.values()) == [1] * ATTENTION_LAYERS[cfg.name]
    if limit == 1:                                                   # every picture by itself
        local = [n for name, n in convs.items() if "conv_out.conv_" in name]
        assert min([convs["decoder.up_blocks.1.1.conv1"], *local]) >= 2 * 3


@every_dcae
def test_half_the_halo_is_not_enough(cfg, monkeypatch):
    """Otherwise the test above could not see a halo that is too small."""
    ae = scramble(DCAE(cfg)).double()
    x, z = image_and_latent(cfg, 11, 3, pictures=1)
    latent, image = ae.moments(x)[0], ae.decode_raw(z)
    ae.max_elements = 1000
    extent = autoencoder.layer_extent

    def half_the_reach(layer):
        reach, ratio, width = extent(layer)
        return reach / 2, ratio, width

    monkeypatch.setattr(autoencoder, "layer_extent", half_the_reach)
    assert relative_error(ae.moments(x)[0], latent) > 1e-6
    assert relative_error(ae.decode_raw(z), image) > 1e-6


def test_strips_refuse_a_layer_whose_reach_is_unknown():
    with pytest.raises(TypeError, match="GroupNorm"):
        in_strips([nn.GroupNorm(1, 4)], torch.zeros(1, 4, 8, 8), 1)


class LargestTensor(TorchDispatchMode):
    """Counts the numbers in the largest tensor, on the meta device without having it."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors)])
        return out


def count_flops(f, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        f(x)
    return counter.get_total_flops()


# one of every architecture
DISTINCT = [name for name in PUBLISHED if "mix" not in name and "sana-1.0" not in name]


@pytest.mark.parametrize("name", DISTINCT)
def test_4k_needs_no_tensor_beyond_32_bit_indexing_and_little_extra_work(name):
    cfg = AUTOENCODERS[name]
    ae = on_meta(build_autoencoder, cfg).requires_grad_(False).eval()
    cells = 4096 // cfg.f
    latent = torch.empty(1, cfg.channels, cells, cells, device="meta")
    image = torch.empty(1, 3, 4096, 4096, device="meta")
    for f, x in ((ae.decode_raw, latent), (ae.moments, image)):
        ae.max_elements = 2**28
        with LargestTensor() as largest:
            work = count_flops(f, x)
        assert largest.numbers <= 2**30
        if isinstance(ae, DCAE):
            ae.max_elements = math.inf
            assert 1 < work / count_flops(f, x) < 1.05


# ---- tiles: close --------------------------------------------------------------------------------

def enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=8.0)


def shrink(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 8)


@pytest.mark.parametrize("H, W, tile", [(20, 20, 8), (9, 31, 8), (8, 8, 8), (5, 40, 16), (17, 12, 16)])
def test_tiles_cover_any_size_and_their_weights_sum_to_one(H, W, tile):
    x = torch.randn(2, 3, H, W).double()
    assert_near(in_tiles(torch.clone, x, tile, 1, 1), x, 1e-12)
    assert_near(in_tiles(enlarge, x, tile, 1, 8), enlarge(x), 1e-12)
    assert_near(in_tiles(shrink, enlarge(x), 8 * tile, 8, 1 / 8), x, 1e-12)


def test_tiles_blend_without_a_seam():
    """Tiles that disagree by up to 1 must meet in a slope, not in an edge."""
    count = iter(range(1000))

    def flat(tile):
        return torch.full_like(tile, (next(count) * 7 % 5) / 4)

    y = in_tiles(flat, torch.zeros(1, 1, 300, 260), 64, 1, 1)
    assert y.diff(dim=2).abs().max() < 0.15
    assert y.diff(dim=3).abs().max() < 0.15
    assert y.max() - y.min() > 0.9


@pytest.mark.parametrize("tile", [14, 8, 5])
def test_kl_vae_in_tiles_gives_every_size_and_one_tile_is_the_whole(tile):
    ae = scramble(KLVAE(TINY_KL))
    z = torch.randn(1, 4, 9, 14)
    whole = ae.decode(z)
    ae.tile = tile
    assert ae.encode(torch.randn(1, 3, 36, 56)).shape == z.shape
    assert ae.decode(z).shape == (1, 3, 36, 56)
    assert torch.equal(ae.decode(z), whole) == (tile == 14)
