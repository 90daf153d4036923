"""Four bits: the numbers themselves, SVDQuant's order of errors, models block by block, and their files.
FP8 is in test_fast.py."""

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import quant
import sample
from checkpoints import HERE, build, fingerprint, load_base, load_run, newest_run, write_tensors
from fast import Hoist, compile_blocks
from flags import check_finite, with_guidance
from helpers import (  # noqa: F401 (fixtures: fresh_compiler, words_base)
    TINY_DIT, TINY_FLUX, TINY_SANA, digest, fresh_compiler, on_meta, random_condition, random_text,
    relative_error, scramble, words_base)
from lora import add_lora, lora_state, merge_lora
from model import BASES, FAMILIES, Flux
from quant import (
    FORMATS, QuantLinear, arithmetic, calibration_batch, decode, encode, load_quantised, nearest, pack, plan,
    quantise_model, save_quantised, streamed, swizzle, unpack, weight_bytes)
from sample import integrate, time_grid
from shapes import encode_words
from test_sample import assert_same, draw, facts_of, write_run

SMALL = {
    "dit": replace(TINY_DIT, hidden_size=64),
    "flux": replace(TINY_FLUX, hidden_size=64, num_heads=4),
    "sana": TINY_SANA,
}
# 4-bit layers of a block: attention and MLP, and the modulations
LAYERS = {"dit": 3 * (4 + 1), "flux": 2 * (8 + 2) + 2 * (2 + 1), "sana": 2 * 7}


def small_model(name: str) -> nn.Module:
    return scramble(FAMILIES[type(SMALL[name])](SMALL[name]))


def small_batch(cfg, n: int = 2):
    """(x, t, y), to calibrate on and to compare with."""
    x = torch.randn(n, cfg.in_channels, 4, 6, generator=torch.Generator().manual_seed(5))
    return x, torch.linspace(0.2, 0.7, n), random_condition(cfg, n)


# ---- numbers -------------------------------------------------------------------------------------

def spread(rows: int, width: int) -> torch.Tensor:
    """Numbers of all sizes, with blocks of zeros, and negative zeros."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=g)
    x = x * torch.logspace(-4, 3, rows)[:, None]
    x[0, :64] = 0
    x[1, :64] = -0.0
    return x


@pytest.mark.parametrize("form", FORMATS)
def test_every_number_becomes_the_nearest_code_and_halfway_the_even_one(form):
    """Against a search through all eight sizes in float64."""
    fmt = FORMATS[form]
    sizes = torch.tensor(fmt.sizes, dtype=torch.float64)
    halfway = (sizes[1:] + sizes[:-1]) / 2
    exact = torch.cat([sizes, halfway, halfway * (1 + 1e-6), halfway * (1 - 1e-6)]).float()
    exact = F.pad(exact, (0, 64 - len(exact)))
    # the largest size in every block: their scales are one, and nothing is rounded before
    exact[15::16] = fmt.sizes[-1]
    x = torch.stack([exact, -exact])
    codes, scales = encode(x, fmt)
    assert (scales.float() == 1).all()
    distance = (x.abs().double()[..., None] - sizes).abs()
    # an odd code loses by less than any distance that there is
    distance[..., 1::2] += 1e-12
    assert torch.equal(codes & 7, distance.argmin(dim=-1).byte())
    assert torch.equal(codes > 7, torch.signbit(x))
    assert (decode(codes, scales, fmt).abs() - x.abs()).abs().max() <= 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", [2.0, 3.7])
def test_what_4_bits_hold_is_kept_and_the_rest_errs_by_half_a_step(form, scale):
    fmt = FORMATS[form]
    x = spread(32, 128)
    codes, scales = encode(x, fmt, scale)
    held = decode(codes, scales, fmt, scale)
    step = (scales.float() * scale).repeat_interleave(fmt.block, dim=1) * max(fmt.steps)
    # a scale that was rounded down cuts the largest number: by a sixteenth
    assert ((held - x).abs() <= step / 2 + x.abs() / 16).all()
    again = decode(*encode(held, fmt, scale), fmt, scale)
    assert relative_error(again, held) < 0.02
    assert torch.equal(unpack(pack(codes)), codes)


def test_two_codes_a_byte_the_first_in_the_low_half():
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_nvfp4_is_torchaos_to_the_bit():
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for scale in (None, 0.0123, 2.0**-9):
        x = spread(64, 256)
        theirs = None if scale is None else torch.tensor(scale)
        scales, packed = torchao.nvfp4_quantize(x, 16, theirs)
        codes, own_scales = encode(x, FORMATS["nvfp4"], 1.0 if scale is None else theirs)
        assert torch.equal(own_scales.view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(pack(codes), packed)


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_reads_its_bytes_as_decode_does(form):
    layer = QuantLinear(nn.Linear(256, 64), form)
    want = decode(unpack(layer.codes), layer.scales, FORMATS[form], layer.scale)
    assert torch.equal(layer.rest(), want)
    assert torch.equal(layer.rest(torch.bfloat16), want.bfloat16())


def test_a_weight_in_nvfp4_is_exact_in_bf16():
    layer = QuantLinear(nn.Linear(256, 64), "nvfp4")
    assert torch.equal(layer.rest(torch.bfloat16).float(), layer.rest())
    # the scales use e4m3's range
    assert 224 <= layer.scales.float().max() <= 448


def test_a_layer_keeps_its_types_when_its_model_is_converted():
    layer = QuantLinear(nn.Linear(64, 32), "nvfp4", 4, smooth=torch.ones(64))
    want = {key: value.clone() for key, value in layer.state_dict().items()}
    for key, value in layer.to(torch.float16).state_dict().items():
        assert value.dtype == want[key].dtype
        assert torch.equal(value, want[key])


# ---- what Blackwell multiplies -------------------------------------------------------------------

def unswizzled(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """cuBLAS's own description of where a scale lies, number by number."""
    out = torch.empty(rows, columns)
    flat = flat.flatten().float()
    tiles = -(-columns // 4)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * tiles + c // 4
            out[r, c] = flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4]
    return out


@pytest.mark.parametrize("rows, columns", [(128, 4), (200, 6), (16, 12)])
def test_scales_lie_where_cublas_reads_them(rows, columns):
    scales = torch.arange(rows * columns).view(rows, columns).remainder(97).to(torch.float8_e4m3fn)
    swizzled = swizzle(scales)
    assert swizzled.numel() == -(-rows // 128) * 128 * -(-columns // 4) * 4
    assert torch.equal(unswizzled(swizzled, rows, columns), scales.float())


def test_the_fp4_product_is_the_dequantised_one(monkeypatch):
    """No CPU has it: the product here unpacks what it is handed, as the hardware would."""
    fmt = FORMATS["nvfp4"]

    def product(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
        assert a.stride(1) == b.stride(0) == 1
        factors = []
        for packed, scales in ((a, scale_a), (b.t(), scale_b)):
            codes = unpack(packed.view(torch.uint8))
            scales = unswizzled(scales, len(codes), codes.shape[1] // 16)
            factors.append(decode(codes, scales, fmt))
        return (factors[0] @ factors[1].t()).to(out_dtype)

    layer = QuantLinear(nn.Linear(128, 48), "nvfp4", 8, True, smooth=torch.rand(128) + 0.5)
    x = torch.randn(2, 5, 128).bfloat16()
    with torch.no_grad():
        want = layer(x)
        monkeypatch.setattr(quant, "multiplies_fp4", lambda device: True)
        monkeypatch.setattr(torch, "_scaled_mm", product)
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 0.005


# ---- SVDQuant ------------------------------------------------------------------------------------

def outlier_layer(K: int = 512, N: int = 768) -> tuple[nn.Linear, torch.Tensor]:
    """A layer with a few strong directions, and inputs of which ten channels are twenty times the others."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(K, N).requires_grad_(False)
    strong = torch.randn(N, 8, generator=g) @ torch.randn(8, K, generator=g)
    layer.weight.copy_((torch.randn(N, K, generator=g) + 0.8 * strong) / K**0.5)
    x = torch.randn(256, K, generator=g)
    x[:, torch.randperm(K, generator=g)[:10]] *= 20
    return layer, x


@pytest.mark.parametrize("form", FORMATS)
def test_smoothing_and_the_branch_each_lower_the_error(form):
    """The order that SVDQuant reports, in weights and inputs of 4 bits: rank by rank, and both together."""
    layer, x = outlier_layer()
    ranks = (0, 16, 32, 64)
    errors = {}
    for smooth in (False, True):
        for rank in ranks:
            settings = dict(form=form, rank=rank, activations=True)
            _, errors[smooth, rank] = nearest(layer, x, smooth, 256, settings)
    for smooth in (False, True):
        assert all(errors[smooth, a] > 1.02 * errors[smooth, b] for a, b in zip(ranks, ranks[1:])), errors
    assert all(errors[False, rank] > 1.5 * errors[True, rank] for rank in ranks), errors
    # both leave a quarter of what was lost
    assert errors[False, 0] > 4 * errors[True, 32]
    # with them, four bits lose less than rounded rows of eight do
    codes, scale = quant.e4m3_rows(x)
    fp8 = quant.FP8Linear(layer).dequantised()
    want = x @ layer.weight.t()
    assert errors[True, 32] < relative_error((codes.float() * scale) @ fp8.t(), want)


def test_the_branch_is_nearly_the_best_of_its_rank():
    weight = outlier_layer()[0].weight
    A, B = quant.largest_directions(weight, 32)
    best = torch.linalg.svdvals(weight)[32:].norm()
    assert (weight - B.float() @ A.float()).norm() < 1.01 * best
    # it leaves the generator of the caller alone
    state = torch.get_rng_state()
    quant.largest_directions(weight, 4)
    assert torch.equal(torch.get_rng_state(), state)


def trained_case():
    """tiny-flux, a batch to calibrate on, and another to compare with."""
    net = build(BASES["tiny-flux"], HERE / BASES["tiny-flux"].weights)
    batches = []
    for seed, ground in enumerate(("blue", "grey")):
        words = [f"a small {color} ring on {ground}" for color in ("red", "green", "pink", "white")]
        y = with_guidance(encode_words(words, net.cfg.text_tokens), net.cfg.sampling.guidance)
        x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        batches.append((x, torch.linspace(0.1, 0.9, 4), y))
    return net, *batches


@torch.no_grad()
def test_a_trained_model_errs_in_the_order_of_its_bits_and_branch():
    """Smoothing is shown on layers with outliers: of this model, which has few, it changes little."""
    net, batch, other = trained_case()
    want = net(*other)

    def error(form, *args, **options):
        model = copy.deepcopy(net)
        quantise_model(model, form, *args, **options)
        return relative_error(model(*other), want)

    fp8 = error("fp8")
    weights_only = error("nvfp4", 32, False)
    rounded = error("nvfp4", 0, batch=batch, smooth=False, tokens=64)
    branch = error("nvfp4", 32, batch=batch, tokens=64)
    found = [fp8, weights_only, branch, rounded]
    assert all(low < 0.95 * high for low, high in zip(found, found[1:])), found
    assert rounded < 0.25, found


# ---- models --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SMALL)
def test_the_maps_of_every_block_are_quantised_and_nothing_else(name):
    net = small_model(name)
    x, t, y = small_batch(net.cfg)
    want = net(x, t, y)
    facts = quantise_model(net, "nvfp4", 8, batch=(x, t, y))
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == LAYERS[name]
    left = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert left and not any("blocks" in name for name in left)
    # modulations lose the digits of their weights only
    for layer_name, layer in layers.items():
        modulates = "mod" in layer_name.lower()
        assert layer.settings == dict(
            form="nvfp4", rank=0 if modulates else 8, activations=not modulates, smooth=not modulates)
        assert modulates == (layer_name not in facts["errors"])
    assert all(0 < error < 0.2 for error in facts["errors"].values())
    assert 0.001 < relative_error(net(x, t, y), want) < 0.3
    # no hook is left over
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_1x1_convolution_is_the_linear_map_of_every_pixel():
    conv = nn.Conv2d(64, 96, 1)
    layer = QuantLinear(conv, "int4", 4)
    x = torch.randn(2, 64, 3, 5)
    weight = layer.rest() + layer.B.float() @ layer.A.float()
    want = F.conv2d(x, weight[..., None, None], conv.bias)
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)
    # SANA's 5600 channels: groups of 32 where 64 do not fit
    assert QuantLinear(nn.Conv2d(160, 32, 1), "int4").scales.shape == (32, 5)


def test_a_block_is_small_before_the_next_one_runs():
    """Else FLUX-12B would be on the device as a whole."""
    net = small_model("flux")
    seen = []

    def look(before, block, args):
        seen.append([m for m in before.modules() if isinstance(m, nn.Linear)])

    for before, block in zip(net.blocks, net.blocks[1:]):
        block.register_forward_pre_hook(partial(look, before))
    quantise_model(net, "int4", 4, batch=small_batch(net.cfg))
    assert seen == [[]] * (len(net.blocks) - 1)


@pytest.mark.parametrize("name", SMALL)
def test_a_streamed_model_has_one_block_on_the_device_at_a_time(name):
    net = small_model(name)
    want = {key: value.clone() for key, value in net.state_dict().items()}
    places = {key: value.data_ptr() for key, value in net.state_dict().items()}
    x, t, y = (part.to("meta") for part in small_batch(net.cfg))
    seen = []

    def look(block, args):
        seen.append(sum(any(p.is_meta for p in other.parameters()) for other in net.blocks))
        assert all(p.is_meta for p in block.parameters())
        assert net.embed_linear.weight.is_meta

    with streamed(net, "meta"):
        for block in net.blocks:
            block.register_forward_pre_hook(look)
        assert net(x, t, y).is_meta
    assert seen == [1] * len(net.blocks)
    # no copy on the way back
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == places
    assert all(torch.equal(value, want[key]) for key, value in net.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name, scale", [("dit", 3.0), ("flux", 1.0), ("sana", 2.0)])
def test_a_model_is_calibrated_on_its_own_path_at_all_times(name, scale):
    net = small_model(name)
    net.cfg = replace(net.cfg, sampling=replace(net.cfg.sampling, cfg_scale=scale))
    cond = random_condition(net.cfg, 6)
    if net.cfg.text_encoder:
        net.null = random_text(net.cfg, 1, seed=9)
    x, t, y = calibration_batch(net, cond, steps=4, seed=3)
    states = []
    side = 64 // (32 if net.cfg.ae.endswith("32c32") else 8)
    start = torch.randn(6, net.cfg.in_channels, side, side, generator=torch.Generator().manual_seed(3))
    integrate(lambda x, t: net(x, t, cond), start, time_grid(4), each=states.append)
    states = [start, *states]
    for i in range(6):
        assert t[i] == (i % 4) / 4
        torch.testing.assert_close(x[i], states[i % 4][i])
    # guided in two passes, it reads its null condition as well
    if scale == 1:
        assert len(x) == len(t) == len(y) == 6
        return
    assert torch.equal(x[6:], x[:6]) and torch.equal(t[6:], t[:6])
    null = net.null_condition(cond)
    half = y[6:] if name == "dit" else y[torch.arange(6, 12)].tokens
    assert torch.equal(half, null if name == "dit" else null.tokens)


def test_the_hooks_are_gone_after_an_error():
    net = small_model("dit")
    x, t, y = small_batch(net.cfg)
    with pytest.raises(RuntimeError):
        quantise_model(net, "int4", 4, batch=(x[:, :1], t, y))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_what_cannot_be_quantised_is_refused_before_anything_changes():
    lora = small_model("flux")
    add_lora(lora, 2)
    done = small_model("dit")
    quantise_model(done, "int4", 0)
    for model, form, message in (
        (lora, "nvfp4", "merge it before"),
        (done, "nvfp4", "quantised already"),
        (small_model("dit"), "int5", "there are fp8, nvfp4, int4"),
        (scramble(Flux(TINY_FLUX)), "int4", "divide by 32; double_blocks.0.img_mod.lin"),
    ):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            quantise_model(model, form)
        assert fingerprint(model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_a_quantised_model_compiles_without_a_break_and_hoists(name, fresh_compiler):
    net = small_model(name)
    x, t, y = small_batch(net.cfg)
    quantise_model(net, "nvfp4", 4, batch=(x, t, y))
    t = t[:1].expand(2)
    want = net(x, t, y)
    _, clock = net.to_native(x, t)
    hoisted = Hoist(net, clock[:1], y)
    torch.testing.assert_close(net(x, t, hoisted.cond), want, atol=1e-5, rtol=1e-4)
    hoisted.remove()
    compile_blocks(net.blocks, backend="eager")
    torch.testing.assert_close(net(x, t, y), want)


@pytest.mark.parametrize("form, low, high", [("nvfp4", 6.9e9, 7.1e9), ("int4", 6.5e9, 6.8e9)])
def test_flux_of_24_gb_is_7_in_4_bits(form, low, high):
    cfg = BASES["flux-krea"]
    net = on_meta(Flux, cfg).bfloat16()
    assert 23.7e9 < weight_bytes(net) < 23.9e9
    quant.put_empty(net, plan(net, form, 32))
    assert low < weight_bytes(net) < high


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
@pytest.mark.parametrize("name", SMALL)
def test_a_saved_model_is_the_same_again(name, form, tmp_path):
    net = small_model(name).bfloat16()
    print_before = fingerprint(net)
    x, t, y = small_batch(net.cfg)
    facts = quantise_model(net, form, 4, batch=(x, t, y))
    save_quantised(net, tmp_path, {"base": "a preset"} | facts)
    loaded, info = load_quantised(tmp_path, net.cfg, print_before)
    assert torch.equal(loaded(x, t, y), net(x, t, y))
    assert (info["base"], info["form"], info["source_print"]) == ("a preset", form, print_before)
    assert info["errors"] == facts["errors"]
    assert fingerprint(loaded) == fingerprint(net)


def test_another_models_file_is_refused(tmp_path):
    net = small_model("dit")
    facts = quantise_model(net, "int4", 4)
    file = tmp_path / "q.safetensors"
    save_quantised(net, file, {"base": "mine"} | facts)
    with pytest.raises(ValueError, match="is another model: a quantised mine"):
        load_quantised(file, SMALL["flux"])
    with pytest.raises(ValueError, match="made from other weights"):
        load_quantised(file, source_print="0" * 16)
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, net.state_dict(), {"model": quant.config_dict(net.cfg)})
    with pytest.raises(ValueError, match="holds no quantised model"):
        load_quantised(plain)
    with pytest.raises(ValueError, match="no quantised layer"):
        save_quantised(small_model("dit"), file, {})


@pytest.mark.parametrize("change, message", [
    ({"form": "int5"}, "int5"),
    ({"form": "nvfp4"}, "shape|type"),
    ({"rank": 8}, "of another shape"),
    ({"rank": "a"}, "make it again"),
    ({"more": 1}, "more"),
    (None, "missing|unexpected"),
])
def test_damaged_settings_are_refused(change, message, tmp_path):
    net = small_model("dit")
    facts = quantise_model(net, "int4", 4)
    file = tmp_path / "q.safetensors"
    save_quantised(net, file, facts)
    info = quant.load_quantised(file)[1]
    layers = info["quantised"]
    name = "blocks.0.attn.qkv"
    if change is None:
        del layers[name]
    else:
        layers[name] |= change
    write_tensors(file, load_file(file), info)
    with pytest.raises(ValueError, match=message) as error:
        load_quantised(file)
    assert "make it again" in str(error.value)


def test_scales_of_another_type_are_refused(tmp_path):
    net = small_model("dit")
    facts = quantise_model(net, "int4", 4)
    file = tmp_path / "q.safetensors"
    save_quantised(net, file, facts)
    info = load_quantised(file)[1]
    converted = {key: x.half() if key.endswith("scales") else x for key, x in load_file(file).items()}
    write_tensors(file, converted, info)
    with pytest.raises(ValueError, match="scales is of type torch.float16, not torch.bfloat16"):
        load_quantised(file)


# ---- the commands --------------------------------------------------------------------------------

QUICK = "--device cpu --dtype fp32 --count 4 --tokens 16 --rank 4".split()
PROMPT = "--base test-words --prompt ring --num-steps 2"


def make(*flags) -> dict:
    """The info of the folder that quant.py writes."""
    quant.main([*QUICK, *flags])
    return load_quantised(flags[flags.index("--out") + 1])[1]


def test_a_written_folder_is_calibrated_and_draws_as_its_model(words_base, capsys):  # noqa: F811
    net, _ = load_base("test-words")
    info = make("--base", "test-words", "--out", "q")
    printed = capsys.readouterr().out.splitlines()
    assert info["source_print"] == fingerprint(net)
    assert (info["kind"], info["base"], info["form"], info["rank"]) == ("quantised", "test-words", "nvfp4", 4)
    assert len(info["errors"]) == 10 and info["smooth"] and info["activations"]
    assert "13 layers in nvfp4 W4A4 rank 4" in printed[-1] and "their outputs off by " in printed[-1]
    # the same again is the same file
    make("--base", "test-words", "--out", "again")
    assert digest(load_file("q/model.safetensors")) == digest(load_file("again/model.safetensors"))
    # and it draws nearly what its model draws
    flags = PROMPT.replace("--base test-words", "")
    few = draw("few", f"q {flags}")
    plain = draw("plain", PROMPT)
    assert 0 < abs(few - plain).mean() < 12
    assert_same(few, draw("offloaded", f"q {flags} --offload"))
    assert "q/model.safetensors: made from test-words" in capsys.readouterr().out


def test_a_run_is_quantised_with_its_lora_merged(words_base, capsys):  # noqa: F811
    base, info = load_base("test-words")
    model = add_lora_of_ones(base)
    write_run("finetune-test-1", model, kind="finetune", **info | {"base": "test-words"},
              lora=dict(rank=2, alpha=2))
    run = "runs/finetune-test-1"
    made = make("--base", run, "--out", "q", "--form", "int4", "--weights-only")
    assert made["source_print"] == fingerprint(merge_lora(load_run(run)[0])) != fingerprint(base)
    assert made["base"] == run and not made["activations"]
    # sample.py merges it too
    flags = "--prompt ring --num-steps 2"
    weights_only = "--quant int4 --weights-only"
    few = draw("few", f"{run} {flags} {weights_only}")
    assert 0 < abs(few - draw("plain", f"{run} {flags}")).mean() < 12
    # it is no run to go on with, and never the newest one
    assert newest_run(".") is None
    with pytest.raises(ValueError, match=f"q/model.safetensors is a quantised model: .* from, {run}"):
        load_run("q")
    with pytest.raises(ValueError, match="it is quantised already; give what it was made from"):
        make("--base", "q", "--out", "again")


def add_lora_of_ones(net):
    add_lora(net, 2)
    for value in lora_state(net).values():
        value.fill_(0.1)
    return net


@pytest.mark.parametrize("flags, arithmetic", [
    ("--quant fp8", "fp8: turned back into wide numbers at every product: exact and slow"),
    ("--quant nvfp4", "nvfp4 W4A4 rank 32: .*--weights-only errs less"),
    ("--quant int4 --weights-only", "int4 W4A16 rank 32: turned back"),
])
def test_sampling_quantises_by_itself(flags, arithmetic, words_base, capsys):  # noqa: F811
    few = draw("few", f"{PROMPT} {flags}")
    assert re.search(arithmetic, capsys.readouterr().out)
    assert 0 < abs(few - draw("plain", PROMPT)).mean() < 12
    facts = facts_of(next(Path("few").iterdir()))["dcgen"]
    assert facts["quant"] == re.match(r"[\w ]+", arithmetic)[0]
    assert_same(few, draw("offloaded", f"{PROMPT} {flags} --offload"))


@pytest.mark.parametrize("flags, message", [
    ("q --base tiny-sana --prompt ring", "--base tiny-sana: q was trained from test-words; leave --base out"),
    ("q --quant int4 --prompt ring", "--quant int4: q is quantised already .nvfp4 W4A4 rank 4."),
    ("q --weights-only --prompt ring", "--weights-only: q is quantised already"),
    ("q --weights q --prompt ring", "--weights: q is quantised already .* holds all of its weights"),
    ("q --lora q --prompt ring", "--lora: .*merge it into what that was made from, test-words"),
    ("q --export x", "--export: .*export test-words"),
    ("--base q --prompt ring", "--base q: it is quantised; draw with it by: sample.py q"),
])
def test_what_contradicts_a_quantised_folder_is_refused(flags, message, words_base):  # noqa: F811
    save_empty_words("q")
    with pytest.raises(ValueError, match=message):
        sample.main(["--device", "cpu", *flags.split()])
    assert not Path("x").exists()


def save_empty_words(folder):
    """The folder of a quantised "test-words", without calibration: made at once."""
    net, info = load_base("test-words")
    save_quantised(net, folder, info | quantise_model(net, "nvfp4", 4) | {"kind": "quantised"})


def test_a_model_that_does_not_divide_is_refused_before_its_weights_are_read(monkeypatch):
    monkeypatch.setitem(BASES, "test", replace(TINY_DIT, weights="nowhere"))
    for main, flags in ((quant.main, []), (sample.main, ["--quant", "nvfp4", "--classes", "1"])):
        with pytest.raises(ValueError, match="divide by 32; blocks.0.attn.qkv"):
            main(["--base", "test", "--device", "cpu", *flags])


def test_4k_on_a_card_of_12_gb_by_the_dry_run(monkeypatch, capsys):
    """Of two blocks: a step and a decode take as much as with all of them, only the weights are less."""
    cfg = BASES["dc-gen-flux-4k"]
    monkeypatch.setitem(BASES, "two-blocks", replace(cfg, depth=1, depth_single=1))
    sample.main("--base two-blocks --quant nvfp4 --offload --dtype bf16 --device cpu --dry-run".split())
    printed = capsys.readouterr().out
    found = re.search(r"memory +about ([\d.]+) GB while denoising, ([\d.]+) GB while decoding", printed)
    denoising, decoding = map(float, found.groups())
    calibrating = float(re.search(r"calibrating +about ([\d.]+) GB", printed)[1])

    def weights_of(name):
        return weight_bytes(quant.empty_quantised(BASES[name], "nvfp4", 32, True, torch.bfloat16)) / 1e9

    weights = weights_of("two-blocks")
    whole = weights_of("dc-gen-flux-4k")
    assert f"{weights:.2f} GB in nvfp4 W4A4 rank 32, the rest in bfloat16" in printed
    # a gigabyte less than the card has, for its driver and the tables that are counted nowhere
    assert 0.5 < denoising - weights and whole + denoising - weights < 11
    assert decoding < 11 and calibrating < 11


def test_a_gpu_without_the_products_computes_the_same_and_says_so(monkeypatch):
    """Older GPUs have no FP8: the codes are turned back into wide numbers there."""
    layer = quant.FP8Linear(nn.Linear(64, 32))
    x = torch.randn(3, 64)
    want = layer(x)
    monkeypatch.setattr(quant, "multiplies_fp8", lambda device: False)
    assert relative_error(layer(x), want) < 0.004
    assert arithmetic("fp8", True, "cpu").startswith("turned back")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert arithmetic("nvfp4", True, "cuda").startswith("turned back")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert arithmetic("nvfp4", True, "cuda") == "multiplied in NVFP4"
    assert arithmetic("nvfp4", False, "cuda").startswith("turned back")
    assert arithmetic("int4", True, "cuda").startswith("turned back")
    monkeypatch.setattr(quant, "multiplies_fp8", lambda device: True)
    assert arithmetic("fp8", True, "cuda") == "multiplied in FP8"


def test_a_quantised_weight_that_is_not_finite_is_named():
    net = small_model("dit")
    quantise_model(net, "nvfp4", 0)
    check_finite(net, "it")
    net.blocks[1].mlp.fc1.scales.view(torch.uint8)[0, 0] = 0x7F                     # e4m3's NaN
    with pytest.raises(ValueError, match="it: blocks.1.mlp.fc1.scales is not finite"):
        check_finite(net, "it")
