from common import *


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
    assert local["decoder.up_blocks.1.1.conv1"] >= 2 * 3                              # of two pictures
    assert all(n >= 2 * 3 for k, n in local.items() if "conv_out.conv_" in k)         # what is local in an attention block


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
    training.main(["--ae", name, "--weights", str(tmp_path / "w.safetensors"), "--count", "3", "--res", "64", "--out", str(tmp_path / "v1.0"), "--device", "cpu", "--dtype", "fp32"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {tmp_path / 'v1.0.png'}: 3 originals above their reconstructions" and len([s for s in said if re.match(r" +\d ", s)]) == 3
    assert Image.open(tmp_path / "v1.0.png").size == (192, 128)
    assert load_autoencoder(name, str(tmp_path / "w.safetensors")).cfg.scale == 0.5       # a file of ours brings its own


@pytest.mark.parametrize("cfg", [TINY_KL, STYLES["in"]], ids=lambda c: c.name)
def test_training_goes_on_where_it_was_killed_and_measures_the_scale(cfg, tmp_path):
    run = lambda out, source: training.train_autoencoder(cfg, source, tmp_path / out, steps=4, batch=3, lr=1e-3, beta=1e-3, noise=0.1, seed=1, save_every=2)
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


def test_an_autoencoder_can_be_pulled_towards_anothers_latents(tmp_path):
    """Killed and resumed to the same numbers; and the base's latents become readable in it, which without the pull they are not."""
    cfg, base = STYLES["in"], calibrated(TINY_KL)
    def run(out, steps, ratio=10.0, **kw):
        training.train_autoencoder(cfg, kw.get("source") or Killed(32), tmp_path / out, steps=steps, batch=8, lr=2e-3, beta=1e-3, noise=0.1, seed=1, save_every=2, towards=base, ratio=ratio)
        ae = ae_class(cfg)(cfg).eval().requires_grad_(False)
        ae.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in read_tensors(tmp_path / f"{out}.safetensors").items()})
        x = ShapesSource(32, split="val").batch(torch.arange(64))[0]
        z, target = ae.moments(x)[0], F.adaptive_avg_pool2d(base.encode(x), 32 // cfg.f)
        sums = align.LeastSquares(cfg.channels, target.shape[1])
        sums.add(z.movedim(1, -1), target.movedim(1, -1))
        return sums.loss(*sums.solve()) / target.var().item()
    run("straight", 4)
    with pytest.raises(KeyboardInterrupt):
        run("killed", 4, source=Killed(32, 3))
    run("killed", 4)
    a, b = (read_tensors(tmp_path / f"{k}.safetensors") for k in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert run("pulled", 40) < 0.85 * run("left", 40, ratio=0.0)
