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
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (
    AUTOENCODERS, DCAE, KLVAE, DCAEConfig, KLConfig, ae_config, build_autoencoder, in_tiles,
    repeat_channels)
from checkpoints import ae_table, load_weights, map_keys, stated_config
from helpers import (
    DCAE_STYLES, TINY_KL, assert_near, digest, manifest, on_meta, parity, parity_cases, relative_error,
    scramble)

every_kind = pytest.mark.parametrize("cfg", [TINY_KL, *DCAE_STYLES.values()], ids=lambda cfg: cfg.name)
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


def first_attention(types) -> int:
    """The first stage that is not made of ResBlocks, or 99; one name stands for all stages."""
    return next((i for i, name in enumerate(types) if "EViT" in name), 99)


def dcae_config(config: dict) -> DCAEConfig:
    """The config of a stored case: diffusers' AutoencoderDC, or the original DC-AE."""
    if "enc_w" not in config:
        widths = tuple(config["encoder_block_out_channels"])
        cfg = DCAEConfig("case", config["latent_channels"], widths=widths)
        return stated_config(cfg, {**config, "_class_name": "AutoencoderDC"})
    return DCAEConfig(
        "case",
        config["latent_channels"],
        widths=tuple(config["enc_w"]),
        encoder_depths=tuple(config["enc_d"]),
        decoder_depths=tuple(config["dec_d"]),
        encoder_attention_from=first_attention(config["enc_t"]),
        decoder_attention_from=first_attention(config["dec_t"]),
        multiscale="EViTS5GLU" in config["enc_t"],
        strided=config.get("down") == "Conv",
        interpolate=config.get("up") == "InterpolateConv",
        decoder_batch_norm="bn2d" in config.get("dec_norm", ""),
        latent_shortcut=not config.get("adaptive"),
        out_act=config.get("out_act", "relu"))


KL_KINDS = (
    "autoencoder_kl", "autoencoder_kl_noquant",
    "bfl_ae", "bfl_ae_decoder_wide", "bfl_ae_decoder_wide2", "bfl_ae_encoder_wide")


@pytest.mark.parametrize("name", parity_cases(*KL_KINDS))
def test_kl_vae_matches_the_official_code_scale_and_shift_included(name):
    case = parity(name)
    ae = KLVAE(kl_config(case.config))
    for half in {"encoder", "decoder"} - {key.split(".")[0] for key in case.weights}:
        delattr(ae, half)                                            # some cases hold one half only
    loaded(ae, case.weights)
    if "moments" in case.outputs:
        assert_near(torch.cat(ae.moments(case.inputs["x"]), dim=1), case.outputs["moments"])
    if "encode" in case.outputs:
        assert_near(ae.encode(case.inputs["x"]), case.outputs["encode"])
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
    for channels in case.config.get("partial", ()):                  # 1.5: the first channels alone
        part = ae.with_channels(channels)
        assert_near(part.moments(case.inputs["x"])[0], case.outputs[f"encode_c{channels}"])
        assert_near(part.decode_raw(case.inputs["z"][:, :channels]), case.outputs[f"decode_c{channels}"])


def test_the_old_names_of_sds_attention_are_read_as_what_they_were():
    """As in the published file: matrices of one shape, which only their names tell apart."""
    ae = scramble(KLVAE(TINY_KL))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in ae.state_dict().items():
        old[re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: names[m[0]], key)] = value
    assert "encoder.mid_block.attentions.0.query.weight" in old
    assert digest(loaded(KLVAE(TINY_KL), old).state_dict()) == digest(ae.state_dict())


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
    # the mix-1.0 models have the shapes of in-1.0
    if "in-1.0" in cfg.name:
        assert_uses_every_key(AUTOENCODERS[cfg.name.replace("in", "mix")], shapes)
    # older names of the same file, whose attention was linear, and convolutions before that
    if aliases := m.get("old_key_aliases"):
        linear = {}
        conv = {}
        for key, shape in shapes.items():
            old = aliases.get(key, key)
            linear[old] = shape
            conv[old] = [*shape, 1, 1] if key in aliases and len(shape) == 2 else shape
        assert_uses_every_key(cfg, linear)
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


# ---- encode and decode ---------------------------------------------------------------------------

@every_kind
def test_scale_and_shift_are_applied_once_and_in_the_right_direction(cfg):
    ae = scramble(build_autoencoder(replace(cfg, scale=0.37, shift=0.11)))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = ae.moments(x)[0]
    assert_close(ae.encode(x), (raw - 0.11) * 0.37)
    assert_near(ae.decode(ae.encode(x)), ae.decode_raw(raw), 1e-4)


def test_the_posterior_is_drawn_only_on_request():
    ae = scramble(KLVAE(TINY_KL))
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    std = (0.5 * ae.moments(x)[1]).exp() * TINY_KL.scale
    generator = torch.Generator().manual_seed(0)
    draws = ae.encode(x.expand(4000, -1, -1, -1), sample=True, generator=generator)
    assert ((draws.mean(0) - ae.encode(x)[0]).abs() < 5 * std[0] / 4000**0.5).all()
    assert_close(draws.std(0), std[0], rtol=0.1, atol=0)


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
    (TINY_KL, lambda ae: ae_config("dc-ae-f64"), "dc-ae-f64.*dc-ae-f64c128-1.5"),
    (DCAE_STYLES["in"], lambda ae: ae.with_channels(4), "no partial latent of 4 channels"),
    (DCAE_STYLES["v15"], lambda ae: ae.with_channels(17), "no partial latent of 17 channels")])
def test_a_request_that_cannot_be_met_says_what_can(cfg, request_, message):
    with pytest.raises(ValueError, match=message):
        request_(on_meta(build_autoencoder, cfg))


def test_frozen_batch_norm_never_updates():
    """BatchNorm in train mode rewrites its statistics at every picture and mixes the pictures of a batch."""
    ae = scramble(DCAE(DCAE_STYLES["in"]))
    before = digest(ae.state_dict())
    # a trainer's call, of all that a model holds
    nn.ModuleList([ae]).train()
    ae.decode(torch.randn(4, 8, 3, 2))
    assert digest(ae.state_dict()) == before


def test_batch_norm_in_training_sees_the_whole_batch():
    whole, strips = (DCAE(DCAE_STYLES["in"]).train() for _ in range(2))
    strips.load_state_dict(whole.state_dict())
    strips.max_elements = 1
    z = torch.randn(4, 8, 3, 2)
    assert torch.equal(whole.decode(z), strips.decode(z))
    assert digest(whole.state_dict()) == digest(strips.state_dict())


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


def test_repeated_channels_stay_channels_last():
    """repeat_interleave over dim 1 does not: the decoder's shortcuts were sums of two memory layouts."""
    x = torch.randn(2, 3, 4, 5)
    want = x.repeat_interleave(2, dim=1)
    assert torch.equal(repeat_channels(x, 2), want)
    out = repeat_channels(x.contiguous(memory_format=torch.channels_last), 2)
    assert torch.equal(out, want)
    assert out.is_contiguous(memory_format=torch.channels_last)


# ---- strips: exact -------------------------------------------------------------------------------

def count_calls(ae) -> Counter:
    """Calls of every convolution from now on, by name."""
    calls = Counter()
    for name, layer in ae.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("limit", [1000, 500, 1])
@every_dcae
def test_strips_are_exact(cfg, limit):
    ae = scramble(DCAE(cfg)).double()
    x = torch.randn(2, 3, 11 * cfg.f, 3 * cfg.f).double()
    z = torch.randn(2, cfg.channels, 11, 3).double()
    latent, image = ae.moments(x)[0], ae.decode_raw(z)
    calls = count_calls(ae)
    ae.max_elements = limit
    assert_near(ae.moments(x)[0], latent, 1e-12)
    assert_near(ae.decode_raw(z), image, 1e-12)
    # more strips than pictures
    assert calls["encoder.down_blocks.1.0.conv1"] > 2 and calls["decoder.up_blocks.1.1.conv1"] > 2


class LargestTensor(TorchDispatchMode):
    """Counts the numbers in the largest tensor, on the meta device without having it."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors)])
        return out


# one of every architecture
ALIKE = ("sd-vae-f8c4", "dc-ae-f32c32-sana-1.0")
DISTINCT = [name for name in PUBLISHED if "mix" not in name and name not in ALIKE]


@pytest.mark.parametrize("name", DISTINCT)
def test_4k_needs_no_tensor_beyond_32_bit_indexing_and_little_extra_work(name):
    cfg = AUTOENCODERS[name]
    ae = on_meta(build_autoencoder, cfg).requires_grad_(False).eval()
    default = ae.max_elements
    cells = 4096 // cfg.f
    latent = torch.empty(1, cfg.channels, cells, cells, device="meta")
    image = torch.empty(1, 3, 4096, 4096, device="meta")
    for f, x in ((ae.decode_raw, latent), (ae.moments, image)):
        work = {}
        for limit in (math.inf, default):
            ae.max_elements = limit
            with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
                f(x)
            work[limit] = counter.get_total_flops()
        assert largest.numbers <= 2**30
        assert work[default] / work[math.inf] < 1.05


# ---- tiles: close --------------------------------------------------------------------------------

def enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=8.0)


def shrink(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 8)


@pytest.mark.parametrize("H, W, tile", [(20, 20, 8), (9, 31, 8), (8, 8, 8), (5, 40, 16), (17, 12, 16)])
def test_tiles_cover_any_size_and_their_weights_sum_to_one(H, W, tile):
    x = torch.randn(2, 3, H, W).double()
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


def test_kl_vae_in_tiles_gives_every_size():
    ae = scramble(KLVAE(TINY_KL))
    z = torch.randn(1, 4, 9, 14)
    whole = ae.decode(z)
    ae.tile = 8
    assert ae.encode(torch.randn(1, 3, 36, 56)).shape == z.shape
    tiled = ae.decode(z)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
