from common import *


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
def test_dit_matches_the_official_code(name):
    config, weights, x, out = fixture(name)
    net = load_weights(dit_of(config), weights, DIT_TABLES[detect_layout(weights)[1]])
    close(net.forward_native(x["x"], x["t"], x["y"]), out["forward"])


def test_dit_in_diffusers_layout_matches_with_the_frequencies_it_was_trained_with():
    """diffusers divides the exponent by 127 where the weights were trained with 128."""
    config, weights, x, out = fixture("dit_diffusers")
    net = load_weights(dit_of(config), weights, DIT_TABLES[detect_layout(weights)[1]])
    got = net.forward_native(x["hidden_states"], x["timestep"], x["class_labels"])
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
    close(net.forward_native(x, t, y), theirs(x, timestep=t, class_labels=y).sample, 1e-7)


def test_dit_stages_compose_to_the_network():
    net = scramble(DiT(OLD_DIT))
    x, clock, y = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 700.5]), torch.tensor([1, 8])
    c, taps = net.condition(clock, y, (6, 10)), []
    h = net.trunk(net.embed(x), c, taps)
    assert h.shape == (2, 15, 48) and len(taps) == 3 and taps[-1] is h
    out = net.head(h, c, (6, 10))
    assert out.shape == (2, 8, 6, 10) and torch.equal(out, net.forward_native(x, clock, y))
    assert torch.equal(net.unpatchify(net.head_linear(net.head_features(h, c)), (6, 10)), out)
    assert torch.equal(net.unpatchify(net.patchify(x), (6, 10)), x)


def test_dit_reads_its_clock_in_thousands_and_returns_the_velocity():
    net = scramble(DiT(TINY_DIT))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.7]), torch.tensor([1, 2])
    assert torch.equal(net(x, t, y), net.forward_native(x, torch.tensor([250.0, 700.0]), y))
    assert off(net(x, 1 - t, y), net(x, t, y)) > 1e-3


def test_every_ddpm_step_has_the_signal_to_noise_ratio_of_its_time():
    net, ab, times = on_meta(DiT, OLD_DIT), ddpm_alphas_cumprod(), ddpm_times().double()
    assert torch.all(times.diff() < 0)                               # t falls as the noise rises
    torch.testing.assert_close((times / (1 - times)) ** 2, ab / (1 - ab), rtol=1e-4, atol=0)
    x1, x0 = torch.randn(1000, 1, 1, 1).double(), torch.randn(1000, 1, 1, 1).double()
    t = times.view(-1, 1, 1, 1)
    state, clock = net.to_native(t * x1 + (1 - t) * x0, times)
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
    torch.testing.assert_close(net.to_velocity(torch.cat([x0, torch.randn_like(x0)], dim=1), xt, t), x1 - x0)      # the variance is not read


def test_a_deep_model_shares_its_base_and_gets_a_new_embedder_and_head():
    base = scramble(DiT(OLD_DIT))
    deep = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    assert (deep.cfg.patch_size, deep.cfg.in_channels, deep.cfg.out_channels, deep.cfg.ae) == (1, 32, 32, "tiny-dc-ae-f32c32")
    old, new = base.state_dict(), deep.state_dict()
    fresh = {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    for k in new.keys() - fresh:                                     # the head's modulation will learn, the base must not
        assert torch.equal(new[k], old[k]) and (new[k].data_ptr() == old[k].data_ptr()) != k.startswith("final_layer."), k
    for k, fan in (("x_embedder.proj.weight", 48 + 32), ("final_layer.linear.weight", 48 + 32)):
        bound = math.sqrt(6 / fan)                                   # Xavier-uniform: neither zero nor the old rows
        assert new[k].abs().max() <= bound and new[k].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not new[k.replace("weight", "bias")].any()
    deep.requires_grad_(True)
    deep(torch.randn(2, 32, 3, 5), torch.tensor([0.2, 0.8]), torch.tensor([1, 8])).square().mean().backward()
    assert deep.x_embedder.proj.weight.grad.norm() > 1e-4 and deep.head_linear.weight.grad.norm() > 1e-4
    kept = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"], predict="epsilon"))
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


def test_flux_matches_the_official_code_packing_and_positions_included():
    config, weights, x, out = fixture("flux_bfl")
    net = load_weights(Flux(flux_of(config, 4, 2)), weights, TABLES[Flux]["original"])
    assert detect_layout(weights) == (Flux, "original")
    grid = x["latent"].shape[-2:]
    close(net.patchify(x["latent"]), out["packed"], 0), close(net.unpatchify(out["packed"], grid), x["latent"], 0)
    got = net.forward_native(net.unpatchify(x["img"], grid), x["timesteps"], diffusers_text(x))
    close(net.patchify(got), out["forward"])
    cos, sin = model.rotary_table(net.cfg.axes_dim, 1e4, 7, 3, 5, 1.0, torch.device("cpu"))
    close(torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)[None, None, :, 0], out["pe"], 1e-6)


def test_flux_loop_matches_the_official_denoise():
    config, weights, x, out = fixture("flux_bfl")
    net = load_weights(Flux(flux_of(config, 4, 2)), weights, TABLES[Flux]["original"])
    z, text = net.unpatchify(x["start"], x["latent"].shape[-2:]), replace(diffusers_text(x), guidance=torch.full((2,), 3.5))
    # get_schedule(6, 15): mu is a line through (256, 0.5) and (4096, 1.15)
    s, mu = torch.linspace(1, 0, 7), 0.5 + (15 - 256) * (1.15 - 0.5) / (4096 - 256)
    times = (1 - math.exp(mu) / (math.exp(mu) + (1 / s - 1))).tolist()
    close(net.patchify(integrate(lambda x, t: net(x, t, text), z, times)), out["denoise_final"], 1e-4)


@pytest.mark.parametrize("name", ["flux_diffusers", "flux_diffusers_dcgen"])
def test_flux_in_diffusers_layout_matches_at_one_cell_a_token(name):
    config, weights, x, out = fixture(name)
    assert detect_layout(weights) == (Flux, "diffusers")
    net = load_weights(Flux(flux_of(config)), weights, TABLES[Flux]["diffusers"])
    z = net.unpatchify(x["hidden_states"], (config["grid_height"], config["grid_width"]))
    got = net.forward_native(z, x["timestep"], diffusers_text(x))
    close(net.patchify(got), out["forward"])
    cos, sin = model.rotary_table(net.cfg.axes_dim, 1e4, config["text_tokens"], config["grid_height"], config["grid_width"], 1.0, torch.device("cpu"))
    close(cos[:, 0].repeat_interleave(2, 1), out["rope_cos"], 1e-6), close(sin[:, 0].repeat_interleave(2, 1), out["rope_sin"], 1e-6)
    if "latent" in x:
        assert torch.equal(net.patchify(x["latent"]), out["packed"]) and torch.equal(z, x["latent"])
        close(got, out["forward_unpacked"])


def test_rotary_and_text_tables_match_the_official_ones():
    _, _, x, out = fixture("tables")
    close(timestep_embedding(1000 * x["guidance"], 256), out["flux_guidance_embedding_256"], 1e-5)
    close(timestep_embedding(x["dit_t"], 256), out["sana_timestep_embedding_256"], 1e-6)


def test_sana_matches_the_official_code():
    config, weights, x, out = fixture("sana_dcgen")
    assert detect_layout(weights) == (Sana, "original")
    net = load_weights(Sana(sana_of(config)), weights, TABLES[Sana]["original"])
    text = Text(x["y"][:, 0], x["mask"].bool())
    c = net.condition(x["t"].float(), text, (5, 7))
    close(c.mods[-1], out["t_emb"]), close(c.context.y[:, None], out["caption"])
    close(net.forward_native(x["x"], x["t"].float(), text), out["forward"])
    close(net.forward_native(x["x"], x["t"].float(), replace(text, mask=torch.ones_like(text.mask))), out["forward_all_tokens"])
    close(net.forward_native(x["x"], x["t"].float(), Text(text.tokens)), out["forward_all_tokens"])
    pred = net(out["loss_xt"], 1 - out["loss_model_t"] / 1000, text)                                              # on our clock, with our sign
    close((pred - (x["loss_x0"] - x["loss_noise"])).square().mean(dim=(1, 2, 3)), out["loss"], 1e-4)


def test_sana_reads_fractions_of_a_step_unless_it_is_told_to_truncate():
    config, weights, x, out = fixture("sana_dcgen")
    text, t = Text(x["y"][:, 0], x["mask"].bool()), x["t"] + 0.9
    official = load_weights(Sana(replace(sana_of(config), integer_time=True)), weights, TABLES[Sana]["original"])
    close(official.forward_native(x["x"], t, text), out["forward_fractional_t"])
    ours = load_weights(Sana(sana_of(config)), weights, TABLES[Sana]["original"])
    assert 0.01 < off(ours.forward_native(x["x"], t, text), out["forward"]) < 0.2


def test_sana_in_diffusers_layout_matches():
    config, weights, x, out = fixture("sana_diffusers")
    assert detect_layout(weights) == (Sana, "diffusers")
    net = load_weights(Sana(sana_of(config)), weights, TABLES[Sana]["diffusers"])
    text = Text(x["encoder_hidden_states"], x["encoder_attention_mask"].bool())
    for block in net.blocks:                                         # diffusers' epsilons, not the trained ones
        block.cross_attn.q_norm.eps = block.cross_attn.k_norm.eps = 1e-5
    close(net.forward_native(x["hidden_states"], x["timestep"], text), out["forward"])
    close(net.forward_native(x["hidden_states"], x["timestep"], Text(text.tokens)), out["forward_no_mask"])


@pytest.mark.parametrize("channels, patch, grid, guidance", [(4, 2, (6, 10), True), (12, 1, (3, 4), False)])
def test_flux_matches_diffusers(channels, patch, grid, guidance):
    diffusers = pytest.importorskip("diffusers")
    config = dict(in_channels=channels * patch**2, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=24, pooled_projection_dim=12,
                  guidance_embeds=guidance, axes_dims_rope=(4, 6, 6))
    theirs = scramble(diffusers.FluxTransformer2DModel(**config).double())
    net = load_weights(on_meta(Flux, flux_of(config, channels, patch)), theirs.state_dict(), TABLES[Flux]["diffusers"])
    x, t, text = torch.randn(2, channels, *grid).double(), torch.tensor([0.1, 0.9]).double(), prompts(net.cfg).to(dtype=torch.float64)
    H, W = grid[0] // patch, grid[1] // patch
    ids = torch.stack([torch.zeros(H, W), *torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")], dim=-1).view(-1, 3)
    want = theirs(net.patchify(x), text.tokens, text.pooled, t, ids, torch.zeros(5, 3), text.guidance.double() if guidance else None).sample
    close(net.patchify(net.forward_native(x, t, text)), want, 2e-6)         # the clock's and the positions' tables are float32


@pytest.mark.parametrize("channels, patch, grid", [(8, 2, (6, 10)), (12, 1, (5, 4))])
def test_sana_matches_diffusers(channels, patch, grid):
    diffusers = pytest.importorskip("diffusers")
    config = dict(in_channels=channels, out_channels=channels, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=16,
                  cross_attention_dim=64, caption_channels=24, mlp_ratio=1.5, sample_size=6, patch_size=patch, qk_norm="rms_norm_across_heads")
    theirs = scramble(diffusers.SanaTransformer2DModel(**config).double())
    for block in theirs.transformer_blocks:
        block.attn2.norm_q.eps = block.attn2.norm_k.eps = 1e-6       # as trained; diffusers has 1e-5
    net = load_weights(on_meta(Sana, sana_of(config)), theirs.state_dict(), TABLES[Sana]["diffusers"])
    x, t, text = torch.randn(2, channels, *grid).double(), torch.tensor([3.0, 870.25]).double(), prompts(net.cfg).to(dtype=torch.float64)
    want = theirs(x, text.tokens, t, encoder_attention_mask=text.mask.double()).sample
    close(net.forward_native(x, t, text), want, 1e-6)


@pytest.mark.parametrize("name", TINIES)
def test_every_family_has_the_same_three_stages(name):
    cfg = TINIES[name]
    net, (H, W) = scramble(FAMILIES[type(cfg)](cfg)), (6, 10)
    x, clock, cond = torch.randn(2, cfg.in_channels, H, W), torch.tensor([0.3, 0.8]), condition_of(cfg)
    c, taps = net.condition(clock, cond, (H, W)), []
    h = net.embed(x)
    assert h.shape == (2, H * W // cfg.patch_size**2, cfg.hidden_size)
    g = net.trunk(h, c, taps)
    assert len(taps) == len(net.blocks) and all(tap.shape == h.shape for tap in taps) and torch.equal(taps[-1], g)      # image tokens only
    out = net.head(g, c, (H, W))
    assert out.shape == x.shape and torch.equal(out, net.forward_native(x, clock, cond))
    assert torch.equal(net.unpatchify(net.head_linear(net.head_features(g, c)), (H, W)), out)
    assert torch.equal(net.unpatchify(net.patchify(x), (H, W)), x)
    names = dict(net.named_parameters())
    for layer, prefix in ((net.embed_linear, net.EMBEDDER), (net.head_linear, net.HEAD)):
        assert {id(p) for p in layer.parameters()} == {id(p) for k, p in names.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_text_families_turn_clock_and_sign_around(name):
    """Noise is at their 1 (FLUX) or 1000 (SANA), and they predict noise - data."""
    cfg = TINIES[name]
    net, x, t, cond = scramble(FAMILIES[type(cfg)](cfg)), torch.randn(2, cfg.in_channels, 4, 6), torch.tensor([0.25, 0.75]), condition_of(cfg)
    assert torch.equal(net(x, t, cond), -net.forward_native(x, (1 - t) * (1000 if name == "sana" else 1), cond))
    assert off(net(x, 1 - t, cond), net(x, t, cond)) > 1e-3


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_text_model_reads_every_part_of_its_condition_and_no_neighbour(name):
    cfg = TINIES[name]
    net, x, t = scramble(FAMILIES[type(cfg)](cfg)), torch.randn(2, cfg.in_channels, 4, 6), torch.tensor([0.3, 0.6])
    cond = prompts(cfg)
    out = net(x, t, cond)
    close(net(x[1:], t[1:], cond[1:]), out[1:])                      # rows do not see each other
    for part in ("tokens", "pooled", "guidance"):
        if getattr(cond, part) is not None:
            assert off(net(x, t, replace(cond, **{part: getattr(cond, part) + 1})), out) > 1e-4, part
    if cond.mask is not None:                                        # padding is not read
        noisy = torch.where(cond.mask[..., None], cond.tokens, torch.full_like(cond.tokens, 7.0))
        assert torch.equal(net(x, t, replace(cond, tokens=noisy)), out)
    else:
        with pytest.raises(ValueError, match="guidance"):
            net(x, t, replace(cond, guidance=None))


@pytest.mark.parametrize("name", TINIES)
def test_blocks_compile_without_a_graph_break(name):
    cfg = TINIES[name]
    net = scramble(FAMILIES[type(cfg)](cfg))
    want = run_of(net)
    for block in net.blocks:
        block.compile(fullgraph=True, backend="eager")
    close(run_of(net), want, 1e-6)
    torch._dynamo.reset()


def test_conditions_of_both_kinds_are_joined_and_chosen_alike():
    y, text = torch.tensor([1, 2, 3]), prompts(TINY_FLUX, 3)
    null, rows = text.map(lambda part: part * 0), torch.tensor([True, False, True])
    assert cat_conditions([y, y]).tolist() == [1, 2, 3, 1, 2, 3] and where_conditions(rows, y * 0, y).tolist() == [0, 2, 0]
    both, some = cat_conditions([text, null]), where_conditions(rows, null, text)
    assert len(both) == 6 and both.mask is None and torch.equal(both[3:].pooled, null.pooled) and torch.equal(both[:3].tokens, text.tokens)
    assert not some.tokens[[0, 2]].any() and torch.equal(some[1:2].tokens, text[1:2].tokens) and some.guidance.tolist() == [0, 3.5, 0]
    half = text.to("cpu", torch.bfloat16)
    assert (half.tokens.dtype, half.pooled.dtype, half.guidance.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert prompts(TINY_SANA).to(dtype=torch.float64).mask.dtype == torch.bool
    with pytest.raises(ValueError, match="5 and 6 tokens"):
        cat_conditions([text, prompts(TINY_FLUX, 3, 6)])


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_the_null_prompt_is_one_for_training_and_sampling(name):
    cfg = TINIES[name]
    net, cond = scramble(FAMILIES[type(cfg)](cfg)), prompts(cfg, 3)
    with pytest.raises(ValueError, match="null prompt"):
        net.null_condition(cond)
    net.null = prompts(cfg, 1, seed=9)
    null = net.null_condition(cond)
    assert len(null) == 3 and torch.equal(null.tokens[2], net.null.tokens[0])
    if name == "flux":
        assert torch.equal(null.guidance, cond.guidance)             # the distilled guidance is not part of the prompt
    else:
        assert torch.equal(null.mask[1], net.null.mask[0]) and torch.equal(net.null_condition(cond).mask, null.mask)
        net.null = Text(net.null.tokens)
        assert torch.equal(net.null_condition(cond).mask, cond.mask)
    assert to_deep_model(net, to_deep_latent(cfg, AUTOENCODERS["tiny-dc-ae-f32c32"])).null is net.null
    x, t = torch.randn(3, cfg.in_channels, 4, 4), torch.full((3,), 0.4)
    v, v0 = net(x, t, cond), net(x, t, net.null_condition(cond))
    close(guided_velocity(net, x, t, cond, 3.0), v0 + 3 * (v - v0), 1e-5)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_deep_text_model_shares_its_base_and_gets_a_new_embedder_and_head(name):
    cfg = TINIES[name]
    base = scramble(FAMILIES[type(cfg)](cfg))
    deep = to_deep_model(base, to_deep_latent(cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    assert (deep.cfg.patch_size, deep.cfg.in_channels) == (1, 32)
    old, new = base.state_dict(), deep.state_dict()
    assert {k for k in new if k not in old or new[k].data_ptr() != old[k].data_ptr()} == {k for k in new if k.startswith((deep.EMBEDDER, deep.HEAD))}
    deep.requires_grad_(True)
    deep(torch.randn(2, 32, 3, 5), torch.tensor([0.2, 0.8]), condition_of(cfg)).square().mean().backward()
    assert deep.embed_linear.weight.grad.norm() > 1e-4 and deep.head_linear.weight.grad.norm() > 1e-4
    with pytest.raises(ValueError, match="DiT's"):
        to_deep_latent(cfg, AUTOENCODERS["tiny-dc-ae-f32c32"], predict="epsilon")


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_text_model_from_scratch_starts_at_zero_and_can_learn(name):
    cfg = TINIES[name]
    net = build(cfg)
    x, t, cond = torch.randn(2, cfg.in_channels, 4, 6), torch.tensor([0.2, 0.8]), condition_of(cfg)
    assert not net(x, t, cond).any()
    (net(x, t, cond) - 1).square().mean().backward()
    assert net.head_linear.weight.grad.norm() > 0
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_text_models_under_bf16_stay_within_a_percent(name):
    cfg = TINIES[name]
    cfg = replace(cfg, hidden_size=96, num_heads=6, **(dict(axes_dim=(4, 6, 6)) if name == "flux" else dict(depth=8)))
    net, cond = scramble(FAMILIES[type(cfg)](cfg)), prompts(cfg, 4)
    x, t = torch.randn(4, cfg.in_channels, 8, 8), torch.tensor([0.05, 0.3, 0.6, 0.95])
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, cond)
    whole = net.double()(x.double(), t, cond.to(dtype=torch.float64))
    assert off(half, whole) < 0.01, off(half, whole)


def test_sana_trained_in_fp16_is_cut_to_its_range_and_others_are_not(tmp_path):
    """Its activations pass 65504, and the weights count on the cut whatever the arithmetic is now."""
    net = scramble(Sana(TINY_SANA))
    huge = lambda m: m.blocks[0].attn(torch.randn(1, 6, 64))
    for dtype, clamped in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        write_tensors(tmp_path / "w.safetensors", {k: v.to(dtype) for k, v in net.state_dict().items()})
        loaded = build(TINY_SANA, tmp_path / "w.safetensors")
        loaded.blocks[0].attn.proj.weight.mul_(1e6)
        assert loaded.cfg.clamp == clamped and (huge(loaded).abs().max() > 65504) != clamped


def test_positions_follow_the_grid_and_the_step():
    cos, sin = model.rotary_table((4, 6, 6), 1e4, 2, 2, 3, 1.0, torch.device("cpu"))
    assert cos.shape == (8, 1, 8) and not sin[:2].any()              # text stands still
    assert torch.equal(sin[2:5, 0, 2:5], torch.zeros(3, 3)) and sin[5:, 0, 2:5].all()               # rows
    assert torch.equal(sin[2, 0, 5:], torch.zeros(3)) and torch.equal(sin[3, 0, 5:], sin[6, 0, 5:])  # columns
    middle = model.rotary_table((4, 6, 6), 1e4, 0, 1, 2, 2.0, torch.device("cpu"))[1]
    close(middle[:, 0, 5], torch.tensor([0.5, 2.5]).sin(), 1e-6)     # the middle of the two places that a cell covers
    x = torch.randn(1, 8, 3, 16)
    close(model.rotate(x, (cos, sin)).norm(dim=-1), x.norm(dim=-1), 1e-6)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_key_of_the_published_text_models_is_used_and_every_target_filled(name):
    info = manifest(name)
    file, cfg = {k: torch.empty(s, device="meta") for k, s in info["tensors"].items()}, BASES[FULL_SIZE[name]]
    family, layout = detect_layout(file)
    assert layout == name.split(".")[-1] and family is FAMILIES[type(cfg)]
    table, net = TABLES[family][layout], on_meta(family, cfg)
    assert map_keys(net, file, table).keys() == net.state_dict().keys()
    # and its configuration is told by the shapes alone
    facts = config_from_shapes(family, table, file, {})
    assert match_config(cfg, family, facts) is cfg
    assert replace(match_config(None, family, facts), weights=None, res=0, ae="") == replace(cfg, weights=None, res=0, ae="")
    if layout == "diffusers":
        assert match_config(cfg, family, config_from_shapes(family, table, file, info["config"])) is cfg
        back = unmap_keys(map_keys(net, file, table), table)         # the table read backwards
        assert {k: list(v.shape) for k, v in back.items()} == info["tensors"]


def test_linear_attention_keeps_its_core_in_float32():
    q, k, v = torch.randn(3, 1, 2, 32, 5000, dtype=torch.float64).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 1e-15)
    assert half.dtype == torch.bfloat16
    exact = linear_attention(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), 1e-15)
    close(half, exact, 2**-8)                                        # one rounding, of the result
    weights = torch.einsum("bhdi,bhdj->bhij", q.relu()[..., :300], k.relu())
    close(linear_attention(q[..., :300], k, v, 1e-15), torch.einsum("bhij,bhdj->bhdi", weights / weights.sum(-1, keepdim=True), v), 1e-12)


@pytest.mark.parametrize("name", EPSILONS)
def test_every_epsilon_is_the_official_one(name):
    """A wrong epsilon hides inside any tolerance of a comparison of outputs."""
    official = {re.sub(r"attn\.norm_out$", "attn.norm", k): float(str(v["eps"]).split()[0]) for k, v in manifest("norm_eps")["models"][name].items() if v["type"] != "SanaMultiscaleLinearAttention"}
    ours = {re.sub(r"\.\d+", ".N", k): m.eps for k, m in EPSILONS[name]().named_modules() if hasattr(m, "eps")}
    assert ours == official


def test_the_epsilon_of_linear_attention_is_the_official_one(monkeypatch):
    seen = set()
    monkeypatch.setattr(autoencoder, "linear_attention", lambda q, k, v, eps: seen.add(eps) or linear_attention(q, k, v, eps))
    scramble(DCAE(STYLES["in"])).moments(torch.randn(1, 3, 16, 16))
    assert seen == {1e-15}


@pytest.mark.parametrize("name", DIT_FILES)
def test_every_key_of_the_published_dit_is_used_and_every_target_filled(name):
    shapes = manifest(name)["tensors"]
    file = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    assert detect_layout(file)[1] == name.split(".")[1]
    net = on_meta(DiT, BASES[DIT_FILES[name]])
    assert map_keys(net, file, DIT_TABLES[detect_layout(file)[1]]).keys() == net.state_dict().keys()


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
    load_weights(DiT(TINY_DIT), kept, DIT_TABLES[detect_layout(kept)[1]])
    with pytest.raises(ValueError, match="1 unexpected: pos_embed"):
        load_weights(DiT(TINY_DIT), kept, DIT_TABLES["ours"])


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

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
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
    with pytest.raises(ValueError, match=r"w\.safetensors: .*in_channels 4 \(not 5\)"):
        build(replace(TINY_DIT, in_channels=5), tmp_path / "w.safetensors")


def test_user_errors_end_as_one_line(capsys):
    def main():
        raise ValueError("--res 100: no")
    with pytest.raises(SystemExit) as e:
        sample.run(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: --res 100: no\n"
