"""What this repository claims, as tests. Two references: the public diffusers classes at tiny size with random weights
copied across (needs diffusers), and outputs of the official code stored in ../shared (skipped where that is absent).

    pytest -q test_dcgen.py
"""

import hashlib
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import autoencoder
import model
from autoencoder import AUTOENCODERS, DCAE, KLVAE, DCAEConfig, KLConfig, ae_class, ae_config, ae_table, in_strips, in_tiles, load_autoencoder, psnr, ssim
from model import (BASES, DIT_TABLES, DiT, DiTConfig, build, ddpm_alphas_cumprod, ddpm_times, deepen, dit_layout, find_weights, linear_attention, load_weights,
                   map_keys, read_config, read_tensors, sincos_2d, timestep_embedding, to_deep_latent, write_tensors)

SHARED = Path(__file__).parent / "../shared"


def fixture(name):
    """(config, weights, inputs, outputs) of a stored case of official code."""
    if not (SHARED / f"parity/{name}.a.json").exists():
        pytest.skip("needs ../shared/parity, outputs of the official code that are not part of this repository")
    info = json.loads((SHARED / f"parity/{name}.a.json").read_text())
    tensors = load_file(SHARED / f"parity/{name}.a.safetensors")
    part = lambda prefix: {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
    return info["config"], part("w."), part("in."), part("out.")


def manifest(name):
    if not (SHARED / f"manifests/{name}.json").exists():
        pytest.skip("needs ../shared/manifests, key lists of the published files that are not part of this repository")
    return json.loads((SHARED / f"manifests/{name}.json").read_text())


def close(a, b, rel=1e-5):
    """a equals b within rel of b's largest absolute value."""
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    assert error <= rel, f"differs by {error:.2e} of the largest value, {rel:.0e} allowed"


def off(a, b):
    """Size of the difference relative to the size of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def scramble(module, seed=0):
    """Random values of a healthy size in every parameter and statistic: nothing stays zero, one or symmetric."""
    g = torch.Generator().manual_seed(seed)
    for k, v in module.state_dict().items():
        if not v.is_floating_point():
            continue
        noise = torch.randn(v.shape, generator=g, dtype=torch.float64)
        if v.dim() > 1:
            noise *= v[0].numel() ** -0.5
        elif k.endswith("running_var"):
            noise = 0.5 + noise.abs()
        else:
            noise = noise * 0.2 + (1 if k.endswith("weight") else 0)
        v.copy_(noise)
    return module.requires_grad_(False).eval()


def hash_of(tensors):
    h = hashlib.sha256()
    for k, v in sorted(tensors.items()):
        h.update(k.encode() + v.detach().contiguous().view(torch.uint8).numpy().tobytes() if v.dim() else str(v.item()).encode())
    return h.hexdigest()


def on_meta(cls, cfg):
    with torch.device("meta"):
        return cls(cfg)


# ---- model.py ----------------------------------------------------------------------------------------------------------

TINY_DIT = DiTConfig(hidden_size=48, depth=3, num_heads=4, patch_size=2, in_channels=4, ae="tiny-kl-f8c4", res=64, num_classes=8)
OLD_DIT = replace(TINY_DIT, clock="ddpm", predict="epsilon")


def dit_of(config):
    """A model for the config of an official or a diffusers DiT."""
    if "hidden_size" in config:
        return DiT(replace(OLD_DIT, **{k: config[k] for k in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "num_classes")}))
    nh = config["num_attention_heads"]
    return DiT(replace(OLD_DIT, hidden_size=nh * config["attention_head_dim"], depth=config["num_layers"], num_heads=nh, patch_size=config["patch_size"],
                       in_channels=config["in_channels"], num_classes=config["num_embeds_ada_norm"]))


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
def test_dit_matches_the_official_code(name):
    config, weights, x, out = fixture(name)
    net = load_weights(dit_of(config), weights, DIT_TABLES[dit_layout(weights)])
    close(net.network(x["x"], x["t"], x["y"]), out["forward"])


def test_dit_in_diffusers_layout_matches_with_the_frequencies_it_was_trained_with():
    """diffusers divides the exponent by 127 where the weights were trained with 128."""
    config, weights, x, out = fixture("dit_diffusers")
    net = load_weights(dit_of(config), weights, DIT_TABLES[dit_layout(weights)])
    got = net.network(x["hidden_states"], x["timestep"], x["class_labels"])
    close(got, out["forward_original_frequencies"])
    assert off(got, out["forward"]) > 1e-3


def test_timestep_and_position_tables_match_the_official_ones():
    _, _, x, out = fixture("tables")
    for dim in (16, 256):
        close(timestep_embedding(x["dit_t"], dim), out[f"dit_timestep_embedding_{dim}"], 1e-6)
    close(timestep_embedding(1000 * x["t01"], 256), out["flux_timestep_embedding_256"], 1e-6)
    for dim, n in ((32, 3), (64, 5), (1152, 2)):
        close(sincos_2d(dim, n, n), out[f"dit_sincos_{dim}_grid{n}"], 1e-6)


def test_timestep_embedding_tells_every_thousandth_apart():
    emb = timestep_embedding(torch.arange(1001).float(), 256)
    assert emb.dtype == torch.float32 and len(emb.unique(dim=0)) == 1001
    assert timestep_embedding(torch.arange(1001).bfloat16(), 256).dtype == torch.float32


def test_positions_of_a_non_square_grid_are_those_of_the_square_one():
    square = sincos_2d(32, 5, 5).view(5, 5, 32)
    torch.testing.assert_close(sincos_2d(32, 3, 5).view(3, 5, 32), square[:3])
    torch.testing.assert_close(sincos_2d(32, 5, 2).view(5, 2, 32), square[:, :2])
    wide = sincos_2d(32, 2, 7).view(2, 7, 32)
    assert torch.equal(wide[0, :, :16], wide[1, :, :16]) and torch.equal(wide[:, 0, 16:], wide[:, 6, 16:])      # columns first, rows second
    with torch.device("meta"):
        assert sincos_2d(36, 3, 2).device.type == "cpu"              # cached: the caller's default device must not leak in


@pytest.mark.parametrize("patch, size", [(2, 8), (1, 4)])
def test_dit_matches_diffusers(patch, size):
    diffusers = pytest.importorskip("diffusers")
    config = dict(num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=size, patch_size=patch, num_embeds_ada_norm=9)
    theirs = scramble(diffusers.DiTTransformer2DModel(**config).double())
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())    # as published: one embedder, copied
        block.norm1.emb.time_proj.downscale_freq_shift = 0           # 128, as trained; diffusers has 127
        block.norm3.eps = 1e-6                                       # as trained; diffusers has 1e-5
    x, t, y = torch.randn(3, 4, size, size).double(), torch.tensor([0, 417, 999]), torch.tensor([0, 8, 9])
    net = load_weights(dit_of(config), theirs.state_dict(), DIT_TABLES["diffusers"])
    close(net.network(x, t, y), theirs(x, timestep=t, class_labels=y).sample, 1e-7)


def test_dit_stages_compose_to_the_network():
    net = scramble(DiT(OLD_DIT))
    x, clock, y = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 700.5]), torch.tensor([1, 8])
    c, taps = net.condition(clock, y), []
    h = net.trunk(net.embed(x), c, taps)
    assert h.shape == (2, 15, 48) and len(taps) == 3 and taps[-1] is h
    out = net.head(h, c, (6, 10))
    assert out.shape == (2, 8, 6, 10) and torch.equal(out, net.network(x, clock, y))
    assert torch.equal(net.unpatchify(net.head_linear(net.head_features(h, c)), (6, 10)), out)
    assert torch.equal(net.unpatchify(net.patchify(x), (6, 10)), x)


def test_dit_reads_its_clock_in_thousands_and_returns_the_velocity():
    net = scramble(DiT(TINY_DIT))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.7]), torch.tensor([1, 2])
    assert torch.equal(net(x, t, y), net.network(x, torch.tensor([250.0, 700.0]), y))
    assert off(net(x, 1 - t, y), net(x, t, y)) > 1e-3


def test_every_ddpm_step_has_the_signal_to_noise_ratio_of_its_time():
    net, ab, times = on_meta(DiT, OLD_DIT), ddpm_alphas_cumprod(), ddpm_times().double()
    assert torch.all(times.diff() < 0)                               # t falls as the noise rises
    torch.testing.assert_close((times / (1 - times)) ** 2, ab / (1 - ab), rtol=1e-4, atol=0)
    x1, x0 = torch.randn(1000, 1, 1, 1).double(), torch.randn(1000, 1, 1, 1).double()
    t = times.view(-1, 1, 1, 1)
    state, clock = net.own_clock(t * x1 + (1 - t) * x0, times)
    torch.testing.assert_close(clock.double(), torch.arange(1000).double(), atol=2e-2, rtol=0)      # float32 times
    a = ab.view(-1, 1, 1, 1)
    torch.testing.assert_close(state, a.sqrt() * x1 + (1 - a).sqrt() * x0, atol=1e-5, rtol=1e-5)
    between = net.ddpm_step((times[:-1] + times[1:]).float() / 2)
    assert torch.all((between - torch.arange(999) - 0.5).abs() < 0.02)
    assert net.ddpm_step(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


def test_velocity_of_an_oracle_epsilon_is_exact():
    net, t = on_meta(DiT, OLD_DIT), torch.linspace(0.01, 0.999, 57).double()
    x1, x0 = torch.randn(57, 4, 2, 2).double(), torch.randn(57, 4, 2, 2).double()
    xt = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * x1
    torch.testing.assert_close(net.velocity(torch.cat([x0, torch.randn_like(x0)], dim=1), xt, t), x1 - x0)      # the variance is not read


def test_a_deep_model_shares_its_base_and_gets_a_new_embedder_and_head():
    base = scramble(DiT(OLD_DIT))
    deep = deepen(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    assert (deep.cfg.patch_size, deep.cfg.in_channels, deep.cfg.out_channels, deep.cfg.ae) == (1, 32, 32, "tiny-dc-ae-f32c32")
    old, new = base.state_dict(), deep.state_dict()
    fresh = {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    for k in new:
        assert (k in fresh) or new[k].data_ptr() == old[k].data_ptr(), k
    for k, fan in (("x_embedder.proj.weight", 48 + 32), ("final_layer.linear.weight", 48 + 32)):
        bound = math.sqrt(6 / fan)                                   # Xavier-uniform: neither zero nor the old rows
        assert new[k].abs().max() <= bound and new[k].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not new[k.replace("weight", "bias")].any()
    deep.requires_grad_(True)
    deep(torch.randn(2, 32, 3, 5), torch.tensor([0.2, 0.8]), torch.tensor([1, 8])).square().mean().backward()
    assert deep.x_embedder.proj.weight.grad.norm() > 1e-4 and deep.head_linear.weight.grad.norm() > 1e-4
    kept = deepen(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"], predict="epsilon"))
    assert kept.cfg.out_channels == 64


def test_a_model_from_scratch_starts_at_zero_and_can_learn():
    net = build(TINY_DIT)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 8])
    assert not net(x, t, y).any()
    (net(x, t, y) - 1).square().mean().backward()
    assert net.head_linear.weight.grad.norm() > 0
    assert net.null_condition(y).tolist() == [8, 8]


def test_dit_under_bf16_autocast_stays_within_a_percent():
    net = scramble(DiT(replace(OLD_DIT, hidden_size=96, depth=12)))
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0.05, 0.3, 0.6, 0.95]), torch.tensor([0, 3, 7, 8])
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y)
    whole = net.double()(x.double(), t, y)
    assert off(half, whole) < 0.01, off(half, whole)


def test_linear_attention_keeps_its_core_in_float32():
    q, k, v = torch.randn(3, 1, 2, 32, 5000, dtype=torch.float64).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 1e-15)
    assert half.dtype == torch.bfloat16
    exact = linear_attention(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), 1e-15)
    close(half, exact, 2**-8)                                        # one rounding, of the result
    weights = torch.einsum("bhdi,bhdj->bhij", q.relu()[..., :300], k.relu())
    close(linear_attention(q[..., :300], k, v, 1e-15), torch.einsum("bhij,bhdj->bhdi", weights / weights.sum(-1, keepdim=True), v), 1e-12)


EPSILONS = {"DiT original": lambda: on_meta(DiT, OLD_DIT), "AutoencoderKL diffusers": lambda: on_meta(KLVAE, AUTOENCODERS["sd-vae-f8c4"]),
            "DC-AE diffusers, in-1.0 style": lambda: on_meta(DCAE, AUTOENCODERS["dc-ae-f32c32-in-1.0"]),
            "DC-AE diffusers, sana style": lambda: on_meta(DCAE, AUTOENCODERS["dc-ae-f32c32-sana-1.1"])}


@pytest.mark.parametrize("name", EPSILONS)
def test_every_epsilon_is_the_official_one(name):
    """A wrong epsilon hides inside any tolerance of a comparison of outputs."""
    official = {re.sub(r"attn\.norm_out$", "attn.norm", k): v["eps"] for k, v in manifest("norm_eps")["models"][name].items() if v["type"] != "SanaMultiscaleLinearAttention"}
    ours = {re.sub(r"\.\d+", ".N", k): m.eps for k, m in EPSILONS[name]().named_modules() if hasattr(m, "eps")}
    assert ours == official


def test_the_epsilon_of_linear_attention_is_the_official_one(monkeypatch):
    seen = set()
    monkeypatch.setattr(autoencoder, "linear_attention", lambda q, k, v, eps: seen.add(eps) or linear_attention(q, k, v, eps))
    scramble(DCAE(STYLES["in"])).moments(torch.randn(1, 3, 16, 16))
    assert seen == {1e-15}


DIT_FILES = {f"dit-xl-2-{res}.{layout}": "dit-xl" if res == 256 else "dit-xl-512" for res in (256, 512) for layout in ("original", "diffusers")}


@pytest.mark.parametrize("name", DIT_FILES)
def test_every_key_of_the_published_dit_is_used_and_every_target_filled(name):
    shapes = manifest(name)["tensors"]
    file = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    assert dit_layout(file) == name.split(".")[1]
    net = on_meta(DiT, BASES[DIT_FILES[name]])
    assert map_keys(net, file, DIT_TABLES[dit_layout(file)]).keys() == net.state_dict().keys()


def test_a_wrong_key_is_an_error_that_names_it():
    net = DiT(TINY_DIT)
    good = net.state_dict()
    load_weights(DiT(TINY_DIT), dict(good), DIT_TABLES["ours"])
    missing = {k: v for k, v in good.items() if k != "blocks.1.attn.qkv.bias"}
    for bad, said in ((missing, "1 missing: blocks.1.attn.qkv.bias"), ({**good, "blocks.7.extra": torch.zeros(1)}, "1 unexpected: blocks.7.extra"),
                      ({**good, "x_embedder.proj.bias": torch.zeros(47)}, "x_embedder.proj.bias: file (47,), model (48,)")):
        with pytest.raises(ValueError, match=re.escape(said)):
            load_weights(DiT(TINY_DIT), bad, DIT_TABLES["ours"])
    kept = {**good, "pos_embed": torch.zeros(1, 16, 48)}             # of the old grid: dropped, but only in the layout that has it
    load_weights(DiT(TINY_DIT), kept, DIT_TABLES[dit_layout(kept)])
    with pytest.raises(ValueError, match="1 unexpected: pos_embed"):
        load_weights(DiT(TINY_DIT), kept, DIT_TABLES["ours"])


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_is_not_weights_is_one_clear_error(tmp_path):
    write_tensors(tmp_path / "good.safetensors", {"a": torch.randn(100, 100)})
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:2000])
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": Harmful(tmp_path / "executed")}, tmp_path / "harmful.pt")
    (tmp_path / "plain_pickle.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    for name, said in (("none.safetensors", "no such weight file"), ("half.safetensors", "download it again"), ("pointer.safetensors", "git lfs pull"),
                       ("empty.pt", "damaged"), ("harmful.pt", "never run here"), ("plain_pickle.bin", "never run here"), ("list.pt", "state dict")):
        with pytest.raises(ValueError, match=said) as e:
            read_tensors(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()


def test_wrappers_of_known_trainers_are_taken_off(tmp_path):
    w = {"x": torch.arange(3.0)}
    for i, wrapped in enumerate((w, {"state_dict": w, "epoch": 3}, {"model": {"x": torch.zeros(3)}, "ema": w, "opt": {}}, {"model_state_dict": w})):
        torch.save(wrapped, tmp_path / f"{i}.pt")
        assert read_tensors(tmp_path / f"{i}.pt")["x"].tolist() == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    shared = torch.randn(4, 6)
    write_tensors(file, {"a": shared, "view": shared[1:], "turned": shared.t(), "nhwc": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}, {"scale": 0.5})
    before = file.read_bytes()
    assert torch.equal(read_tensors(file)["turned"], shared.t()) and read_config(file) == {"scale": 0.5}

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_file", full_disk)
    with pytest.raises(OSError):
        write_tensors(file, {"a": torch.zeros(1)})
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_that_cannot_be_found_are_one_clear_error(tmp_path):
    for args, said in ((("dit-s", None), "has no published weights"), (("tiny", "weights/none.safetensors"), "should come with this repository"),
                       (("dit-xl", "a::b", str(tmp_path / "none")), "no such file")):
        with pytest.raises(ValueError, match=said):
            find_weights(*args)


def test_a_built_model_is_float32_whatever_the_file_holds(tmp_path):
    """bf16 parameters round small updates away; the shipped files are bf16."""
    net = scramble(DiT(TINY_DIT))
    write_tensors(tmp_path / "w.safetensors", {k: v.bfloat16() for k, v in net.state_dict().items()})
    assert {p.dtype for p in build(TINY_DIT, tmp_path / "w.safetensors").parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"w\.safetensors: .*x_embedder\.proj\.weight"):
        build(replace(TINY_DIT, in_channels=5), tmp_path / "w.safetensors")


def test_user_errors_end_as_one_line(capsys):
    def main():
        raise ValueError("--res 100: no")
    with pytest.raises(SystemExit) as e:
        model.run(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: --res 100: no\n"


# ---- autoencoder.py ------------------------------------------------------------------------------------------------------

def kl_of(config):
    """Our config for an AutoencoderKL of diffusers, or for Black Forest Labs' autoencoder."""
    if "ch_mult" in config:
        return KLConfig("test", config["z_channels"], config["scale_factor"], config["shift_factor"], tuple(config["ch"] * m for m in config["ch_mult"]), config["num_res_blocks"])
    return KLConfig("test", config["latent_channels"], widths=tuple(config["block_out_channels"]), depth=config["layers_per_block"], groups=config["norm_num_groups"],
                    quant_conv=config["use_quant_conv"])


def dc_of(config):
    """Our config for an AutoencoderDC of diffusers."""
    first = lambda types: (list(types) + ["EfficientViTBlock"]).index("EfficientViTBlock")
    return DCAEConfig("test", config["latent_channels"], 1.0, tuple(config["encoder_block_out_channels"]), tuple(config["encoder_layers_per_block"]),
                      tuple(config["decoder_layers_per_block"]), first(config["encoder_block_types"]), first(config["decoder_block_types"]),
                      any(map(len, config["encoder_qkv_multiscales"])), config["downsample_block_type"] == "Conv", config["upsample_block_type"] == "interpolate",
                      "batch_norm" in config["decoder_norm_types"], config["encoder_out_shortcut"], config["decoder_conv_act_fn"])


# the four kinds of published DC-AE, small: widths and depths differ everywhere, so that a mix-up shows
STYLES = {
    "in": DCAEConfig("test-in", 8, widths=(8, 16, 32, 64), encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 2), decoder_batch_norm=True),
    "sana": DCAEConfig("test-sana", 8, widths=(16, 32, 64), encoder_depths=(1, 2, 1), decoder_depths=(2, 1, 1), encoder_attention_from=2, decoder_attention_from=2,
                       multiscale=True, strided=True, interpolate=True),
    "lite": DCAEConfig("test-lite", 8, widths=(16, 32, 64), encoder_depths=(1, 1, 2), decoder_depths=(0, 2, 1), encoder_attention_from=2, decoder_attention_from=99,
                       multiscale=True, strided=True, out_act="silu"),
    "v15": DCAEConfig("test-v15", 16, widths=(16, 16, 32, 64), encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 1), encoder_attention_from=99, decoder_attention_from=99,
                      latent_shortcut=False, out_act="silu"),
}
TINY_KL = KLConfig("test-kl", 4, 0.5, 0.25, widths=(16, 32, 32), depth=1, groups=8)


@pytest.mark.parametrize("name", ["autoencoder_kl", "autoencoder_kl_noquant"])
def test_kl_vae_matches_stored_diffusers_outputs(name):
    config, weights, x, out = fixture(name)
    ae = load_weights(KLVAE(kl_of(config)), weights, ae_table(kl_of(config), weights))
    mean, logvar = ae.moments(x["x"])
    close(mean, out["mean"]), close(logvar, out["logvar"]), close(ae.decode_raw(x["z"]), out["decode"])


@pytest.mark.parametrize("name", ["bfl_ae", "bfl_ae_decoder_wide", "bfl_ae_decoder_wide2", "bfl_ae_encoder_wide"])
def test_flux_vae_matches_the_official_code_scale_and_shift_included(name):
    config, weights, x, out = fixture(name)
    ae = KLVAE(kl_of(config))
    for half in {"encoder", "decoder"} - {k.split(".")[0] for k in weights}:
        delattr(ae, half)                                            # some cases hold one half only
    load_weights(ae, weights, ae_table(ae.cfg, weights))
    if "encode" in out:
        close(ae.encode(x["x"]), out["encode"]), close(torch.cat(ae.moments(x["x"]), dim=1), out["moments"])
    if "decode" in out:
        close(ae.decode(x["z"]), out["decode"])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_dc_ae_matches_the_official_code(layout, style):
    config = fixture(f"dcae_diffusers_{style}")[0]                   # the original's case is of the same sizes
    _, weights, x, out = fixture(f"dcae_{layout}_{style}")
    ae = load_weights(DCAE(dc_of(config)), weights, ae_table(dc_of(config), weights)).eval()
    encode = lambda x: ae.moments(x)[0]
    for size in ("", "_small"):
        close(encode(x["x" + size]), out["encode" + size]), close(ae.decode_raw(x["z" + size]), out["decode" + size])
    close(ae.decode_raw(encode(x["x_small"])), out["reconstruct_small"], 3e-5)
    for key in out:
        if m := re.fullmatch(r"encode_c(\d+)", key):
            part = ae.with_channels(n := int(m[1]))
            close(part.moments(x["x"])[0], out[key]), close(part.decode_raw(x["z"][:, :n]), out[f"decode_c{n}"])


@pytest.mark.parametrize("quant, depth, widths, size", [(True, 1, (16, 32), (16, 16)), (False, 2, (16, 32, 48), (12, 20))])
def test_kl_vae_matches_diffusers(quant, depth, widths, size):
    diffusers = pytest.importorskip("diffusers")
    n = len(widths)
    config = dict(down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=widths, layers_per_block=depth, latent_channels=5,
                  norm_num_groups=8, use_quant_conv=quant, use_post_quant_conv=quant)
    theirs = scramble(diffusers.AutoencoderKL(**config).double())
    weights = theirs.state_dict()
    ae = load_weights(KLVAE(kl_of(config)), weights, ae_table(kl_of(config), weights))
    x, z = torch.randn(2, 3, *size).double(), torch.randn(2, 5, size[0] >> (n - 1), size[1] >> (n - 1)).double()
    want = theirs.encode(x).latent_dist
    close(ae.moments(x)[0], want.mean, 1e-10), close(ae.moments(x)[1], want.logvar, 1e-10), close(ae.decode_raw(z), theirs.decode(z).sample, 1e-10)
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}       # the attention's names in the published SD file
    old = {re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: m[1] + before[m[2]], k): v for k, v in weights.items()}
    again = load_weights(KLVAE(ae.cfg), old, ae_table(ae.cfg, old))
    assert "encoder.mid_block.attentions.0.query.weight" in old and torch.equal(again.decode_raw(z), ae.decode_raw(z)) and torch.equal(again.encode(x), ae.encode(x))


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
@pytest.mark.parametrize("style", STYLES)
def test_dc_ae_matches_diffusers(style, size):
    diffusers, cfg = pytest.importorskip("diffusers"), STYLES[style]
    if size[0] != size[1]:                                           # a second configuration
        cfg = replace(cfg, channels=cfg.channels // 2, widths=(*cfg.widths[:-1], 32))
    n = len(cfg.widths)
    blocks = lambda first: tuple("EfficientViTBlock" if i >= first else "ResBlock" for i in range(n))
    scales = lambda first: tuple((5,) if cfg.multiscale and i >= first else () for i in range(n))
    norm = ["batch_norm" if cfg.decoder_batch_norm and b == "ResBlock" else "rms_norm" for b in blocks(cfg.decoder_attention_from)]
    config = dict(latent_channels=cfg.channels, encoder_block_types=blocks(cfg.encoder_attention_from), decoder_block_types=blocks(cfg.decoder_attention_from),
                  encoder_block_out_channels=cfg.widths, decoder_block_out_channels=cfg.widths, encoder_layers_per_block=cfg.encoder_depths,
                  decoder_layers_per_block=cfg.decoder_depths, encoder_qkv_multiscales=scales(cfg.encoder_attention_from), decoder_qkv_multiscales=scales(cfg.decoder_attention_from),
                  upsample_block_type="interpolate" if cfg.interpolate else "pixel_shuffle", downsample_block_type="Conv" if cfg.strided else "pixel_unshuffle",
                  decoder_norm_types=tuple(norm), decoder_act_fns=tuple("relu" if k == "batch_norm" else "silu" for k in norm),
                  encoder_out_shortcut=cfg.latent_shortcut, decoder_in_shortcut=cfg.latent_shortcut, decoder_conv_act_fn=cfg.out_act)
    theirs = scramble(diffusers.AutoencoderDC(**config).double())
    weights = theirs.state_dict()
    ae = load_weights(DCAE(cfg), weights, ae_table(cfg, weights)).eval()
    x, z = torch.randn(2, 3, *size).double(), torch.randn(2, cfg.channels, size[0] // cfg.f, size[1] // cfg.f).double()
    close(ae.moments(x)[0], theirs.encode(x).latent, 1e-6)           # theirs computes RMS norms in float32
    close(ae.decode_raw(z), theirs.decode(z).sample, 1e-6)


AE_FILES = {"sd-vae-ft-ema.diffusers": "sd-vae-f8c4", "flux1-vae.original": "flux-vae-f8c16", "flux1-vae.diffusers": "flux-vae-f8c16",
            **{f"{name}.{layout}": name for name in AUTOENCODERS if name.startswith("dc-ae") and "mix" not in name for layout in ("original", "diffusers")}}


def use_every_key(cfg, file):
    ae = on_meta(ae_class(cfg), cfg)
    assert map_keys(ae, file, ae_table(cfg, file)).keys() == ae.state_dict().keys()


@pytest.mark.parametrize("name", AE_FILES)
def test_every_key_of_the_published_autoencoder_is_used_and_every_target_filled(name):
    m, cfg = manifest(name), AUTOENCODERS[AE_FILES[name]]
    file = {k: torch.empty(s, device="meta") for k, s in m["tensors"].items()}
    use_every_key(cfg, file)
    if "scaling_factor" in m:
        assert cfg.scale == m["scaling_factor"] and cfg.shift == 0
    for twin in m.get("same_shapes_as", []):
        if found := re.match(r"(dc-ae-\S+-mix-1\.0) \(scaling factor ([\d.]+)\)", twin):
            assert AUTOENCODERS[found[1]].scale == float(found[2])
            use_every_key(AUTOENCODERS[found[1]], file)
    for old_shape in (lambda s: s, lambda s: [*s, 1, 1] if len(s) == 2 else s):        # linear, and the convolutions of before that
        if aliases := m.get("old_key_aliases"):
            use_every_key(cfg, {aliases.get(k, k): torch.empty(old_shape(s) if k in aliases else s, device="meta") for k, s in m["tensors"].items()})


def test_scales_are_the_published_ones():
    assert {n: (c.scale, c.shift) for n, c in AUTOENCODERS.items() if not n.startswith("tiny")} == {
        "sd-vae-f8c4": (0.18215, 0), "flux-vae-f8c16": (0.3611, 0.1159), "dc-ae-f32c32-in-1.0": (0.3189, 0), "dc-ae-f32c32-mix-1.0": (0.4552, 0),
        "dc-ae-f64c128-in-1.0": (0.2889, 0), "dc-ae-f64c128-mix-1.0": (0.4538, 0), "dc-ae-f128c512-in-1.0": (0.4883, 0), "dc-ae-f128c512-mix-1.0": (0.3620, 0),
        "dc-ae-f32c32-sana-1.0": (0.41407, 0), "dc-ae-f32c32-sana-1.1": (0.41407, 0), "dc-ae-lite-f32c32-sana-1.1": (0.41407, 0),
        "dc-ae-f32c128-1.5": (None, 0), "dc-ae-f64c128-1.5": (0.5935, 0)}
    for name, cfg in AUTOENCODERS.items():
        f, c = map(int, re.search(r"f(\d+)c(\d+)", name).groups()) if "sana" not in name else (32, 32)
        assert (cfg.f, cfg.channels, cfg.name) == (f, c, name)


@pytest.mark.parametrize("cfg", [TINY_KL, *STYLES.values()], ids=lambda c: c.name)
def test_scale_and_shift_are_applied_once_and_in_the_right_direction(cfg):
    ae = scramble(ae_class(cfg)(replace(cfg, scale=0.37, shift=0.11)))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = ae.moments(x)[0]
    torch.testing.assert_close(ae.encode(x), (raw - 0.11) * 0.37)
    close(ae.decode(ae.encode(x)), ae.decode_raw(raw), 1e-4)
    assert torch.equal(ae.encode(x), ae.encode(x))


def test_the_posterior_is_drawn_only_on_request():
    ae, x = scramble(KLVAE(TINY_KL)), torch.rand(1, 3, 8, 8) * 2 - 1
    mean, std = ae.encode(x), (0.5 * ae.moments(x)[1]).exp() * 0.5
    g = torch.Generator().manual_seed(0)
    draws = ae.encode(x.expand(4000, -1, -1, -1), sample=True, generator=g)
    assert draws[0].ne(draws[1]).all()
    assert ((draws.mean(0) - mean[0]).abs() < 5 * std[0] / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0), std[0], rtol=0.1, atol=0)
    ae.encoder.conv_out.bias[4:] += 1000                             # a log variance may be anything in a trained file
    assert ae.moments(x)[1].max() == 20
    dc = scramble(DCAE(STYLES["in"]))                                # has no posterior: the request changes nothing
    assert torch.equal(dc.encode(torch.ones(1, 3, 16, 16), sample=True), dc.encode(torch.ones(1, 3, 16, 16)))


def test_a_request_that_cannot_be_met_says_what_can():
    ae = DCAE(STYLES["in"])
    with pytest.raises(ValueError, match="a picture of 30x100: test-in needs sides that divide by 8; try 32x96"):
        ae.encode(torch.zeros(1, 3, 100, 30))
    with pytest.raises(ValueError, match="no scaling factor has been published for dc-ae-f32c128-1.5"):
        on_meta(DCAE, AUTOENCODERS["dc-ae-f32c128-1.5"]).decode(torch.empty(1, 128, 1, 1, device="meta"))
    with pytest.raises(ValueError, match="dc-ae-f64.*dc-ae-f64c128-1.5"):
        ae_config("dc-ae-f64")
    with pytest.raises(ValueError, match="no partial latent"):
        ae.with_channels(4)


def test_frozen_batch_norm_never_updates():
    """BatchNorm in train mode rewrites its statistics at every picture and mixes the pictures of a batch."""
    ae = scramble(DCAE(STYLES["in"])).double()
    before, z = hash_of(ae.state_dict()), torch.randn(4, 8, 3, 2).double()
    holder = nn.ModuleList([ae]).train()
    assert holder.training and not any(m.training for m in ae.modules())
    y = ae.decode(z)
    close(torch.cat([ae.decode(z[i : i + 1]) for i in range(4)]), y, 1e-12)
    assert hash_of(ae.state_dict()) == before
    trained = [DCAE(STYLES["in"]).train() for _ in range(2)]         # one that is being trained does train, on whole batches
    trained[1].load_state_dict(trained[0].state_dict())
    trained[1].max_elements = 1
    assert torch.equal(*(ae.decode(z.float()) for ae in trained)) and hash_of(trained[0].state_dict()) == hash_of(trained[1].state_dict())
    assert trained[0].decoder.up_blocks[1][1].norm.num_batches_tracked == 1


@pytest.mark.parametrize("cfg", [TINY_KL, *STYLES.values()], ids=lambda c: c.name)
def test_autoencoders_under_bf16_autocast_stay_within_two_percent(cfg):
    """Some twenty layers of 8-bit rounding, with random weights."""
    ae = scramble(ae_class(cfg)(cfg))
    x, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, cfg.channels, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = ae.moments(x)[0], ae.decode_raw(z)
    ae.double()
    whole = ae.moments(x.double())[0], ae.decode_raw(z.double())
    for a, b in zip(half, whole):
        assert a.dtype == torch.bfloat16 and off(a, b) < 0.02, off(a, b)


def strips_taken(ae, kind):
    """Counts the calls of every layer of this kind."""
    calls = {}
    for name, m in ae.named_modules():
        if isinstance(m, kind):
            m.register_forward_pre_hook(lambda m, args, name=name: calls.update({name: calls.get(name, 0) + 1}))
    return calls


@pytest.mark.parametrize("style", STYLES)
def test_strips_are_exact(style):
    ae = scramble(DCAE(STYLES[style])).double()
    f = ae.cfg.f
    x, z = torch.randn(2, 3, 11 * f, 3 * f).double(), torch.randn(2, ae.cfg.channels, 11, 3).double()
    whole = ae.moments(x)[0], ae.decode_raw(z)
    local, attention = strips_taken(ae, nn.Conv2d), strips_taken(ae, autoencoder.MultiscaleAttention)
    for limit in (4000, 1000, 1):
        ae.max_elements = limit
        local.clear(), attention.clear()
        close(ae.moments(x)[0], whole[0], 1e-12), close(ae.decode_raw(z), whole[1], 1e-12)
        assert local["encoder.down_blocks.1.0.conv1"] > 1 and local["decoder.up_blocks.1.1.conv1"] > 1
        assert all(n == 1 for n in attention.values()) and len(attention) == {"in": 3, "sana": 2, "lite": 2, "v15": 0}[style]
    assert local["decoder.up_blocks.1.1.conv1"] >= 2 * 11
    assert all(n >= 2 * 11 for k, n in local.items() if "conv_out.conv_" in k)        # what is local in an attention block


@pytest.mark.parametrize("style", STYLES)
def test_half_the_halo_is_not_enough(style, monkeypatch):
    """Otherwise the test above could not see a halo that is too small."""
    ae = scramble(DCAE(STYLES[style])).double()
    z, x = torch.randn(1, ae.cfg.channels, 11, 3).double(), torch.randn(1, 3, 11 * ae.cfg.f, 3 * ae.cfg.f).double()
    whole, ae.max_elements = (ae.decode_raw(z), ae.moments(x)[0]), 1000
    sees = autoencoder._sees
    monkeypatch.setattr(autoencoder, "_sees", lambda layer: (sees(layer)[0] / 2, *sees(layer)[1:]))
    assert off(ae.decode_raw(z), whole[0]) > 1e-6 and off(ae.moments(x)[0], whole[1]) > 1e-6


def test_strips_refuse_a_layer_whose_reach_is_unknown():
    with pytest.raises(TypeError, match="GroupNorm"):
        in_strips([nn.GroupNorm(1, 4)], torch.zeros(1, 4, 8, 8), 1)


class Memory(TorchDispatchMode):
    """Counts the numbers in the largest tensor, on the meta device without having it."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", ["sd-vae-f8c4", "flux-vae-f8c16", "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.1", "dc-ae-lite-f32c32-sana-1.1", "dc-ae-f32c128-1.5", "dc-ae-f64c128-in-1.0",
                                  "dc-ae-f64c128-1.5", "dc-ae-f128c512-in-1.0"])
def test_4k_needs_no_tensor_beyond_32_bit_indexing_and_little_extra_work(name):
    cfg = AUTOENCODERS[name]
    ae = on_meta(ae_class(cfg), cfg).requires_grad_(False).eval()
    z, x = torch.empty(1, cfg.channels, 4096 // cfg.f, 4096 // cfg.f, device="meta"), torch.empty(1, 3, 4096, 4096, device="meta")
    for fn, arg in ((ae.decode_raw, z), (ae.moments, x)):
        with FlopCounterMode(display=False) as work, Memory() as memory:
            fn(arg)
        assert memory.largest <= 2**30
        if isinstance(cfg, DCAEConfig):
            limit, ae.max_elements = ae.max_elements, math.inf
            with FlopCounterMode(display=False) as whole:
                fn(arg)
            ae.max_elements = limit
            assert 1 < work.get_total_flops() / whole.get_total_flops() < 1.05


@pytest.mark.parametrize("H, W, tile", [(20, 20, 8), (9, 31, 8), (8, 8, 8), (5, 40, 16), (17, 12, 16)])
def test_tiles_cover_any_size_and_their_weights_sum_to_one(H, W, tile):
    x = torch.randn(2, 3, H, W).double()
    close(in_tiles(lambda v: v, x, tile, 1, 1), x, 1e-12)
    close(in_tiles(lambda v: F.interpolate(v, scale_factor=8.0), x, tile, 1, 8), F.interpolate(x, scale_factor=8.0), 1e-12)
    big = F.interpolate(x, scale_factor=8.0)
    close(in_tiles(lambda v: F.avg_pool2d(v, 8), big, 8 * tile, 8, 1 / 8), x, 1e-12)


def test_tiles_blend_without_a_seam():
    """Tiles that disagree by up to 1 must meet in a slope, not in an edge."""
    count = iter(range(1000))
    y = in_tiles(lambda v: torch.full_like(v, (next(count) * 7 % 5) / 4), torch.zeros(1, 1, 300, 260), 64, 1, 1)
    assert y.diff(dim=2).abs().max() < 0.15 and y.diff(dim=3).abs().max() < 0.15
    assert y.max() - y.min() > 0.9


def test_kl_vae_in_tiles_gives_every_size_and_one_tile_is_the_whole():
    ae = scramble(KLVAE(TINY_KL))
    z = torch.randn(1, 4, 9, 14)
    whole = ae.decode(z)
    for tile in (14, 8, 5):
        ae.tile = tile
        assert ae.decode(z).shape == (1, 3, 36, 56) and ae.encode(torch.randn(1, 3, 36, 56)).shape == (1, 4, 9, 14)
        assert torch.equal(ae.decode(z), whole) == (tile == 14)


def test_psnr_and_ssim_by_hand():
    x = torch.rand(2, 3, 24, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    torch.testing.assert_close(psnr(x, x + 0.02), torch.full((2,), 40.0), atol=1e-3, rtol=0)          # 20 log10(2 / 0.02)
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), -0.6)                           # 0.6 and 0.2 of a range of 1
    torch.testing.assert_close(ssim(a, b), torch.tensor([(2 * 0.6 * 0.2 + 1e-4) / (0.36 + 0.04 + 1e-4)]), atol=1e-4, rtol=0)
    assert (ssim(x, -x) < 0).all() and (ssim(x, x + 0.1 * torch.randn_like(x)) < 0.999).all()


@pytest.mark.parametrize("name", ["tiny-kl-f8c4", "tiny-dc-ae-f32c32"])
def test_reconstructions_are_drawn_and_measured(name, tmp_path, capsys):
    from PIL import Image
    ae = scramble(ae_class(AUTOENCODERS[name])(AUTOENCODERS[name]))
    write_tensors(tmp_path / "w.safetensors", ae.state_dict(), {"scale": 0.5, "widths": list(ae.cfg.widths)})
    autoencoder.main(["--ae", name, "--weights", str(tmp_path / "w.safetensors"), "--count", "3", "--res", "64", "--out", str(tmp_path / "v1.0"), "--device", "cpu", "--dtype", "fp32"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {tmp_path / 'v1.0.png'}: 3 originals above their reconstructions" and len([s for s in said if re.match(r" +\d ", s)]) == 3
    assert Image.open(tmp_path / "v1.0.png").size == (192, 128)
    assert load_autoencoder(name, str(tmp_path / "w.safetensors")).cfg.scale == 0.5       # a file of ours brings its own


class Colours:
    """A source of 40 flat pictures; it can be told to fail at the n-th batch, as if killed."""

    def __init__(self, fail_at=None):
        self.left = fail_at

    def __len__(self):
        return 40

    def batch(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return (index.view(-1, 1, 1, 1) / 20 - 1).expand(-1, 3, 16, 16).contiguous(), index % 8


@pytest.mark.parametrize("cfg", [TINY_KL, STYLES["in"]], ids=lambda c: c.name)
def test_training_goes_on_where_it_was_killed_and_measures_the_scale(cfg, tmp_path):
    run = lambda out, source: autoencoder.train_autoencoder(cfg, source, tmp_path / out, steps=4, batch=3, lr=1e-3, beta=1e-3, noise=0.1, seed=1, save_every=2)
    run("straight", Colours())
    with pytest.raises(KeyboardInterrupt):
        run("killed", Colours(fail_at=3))
    assert not (tmp_path / "killed.safetensors").exists()
    run("killed", Colours())
    a, b = read_tensors(tmp_path / "straight.safetensors"), read_tensors(tmp_path / "killed.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    own = read_config(tmp_path / "straight.safetensors")
    ae = ae_class(cfg)(replace(cfg, scale=own["scale"], shift=own["shift"])).eval().requires_grad_(False)
    ae.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in a.items()})
    z = ae.encode(Colours().batch(torch.arange(40))[0])
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
