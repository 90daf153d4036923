from common import *


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_every_stage_of_the_method_runs_on_a_text_model(name):
    """Alignment, its closed forms, the flow loss with dropped prompts and the gap per layer take a Text as they take labels."""
    cfg = TINIES[name]
    base = scramble(FAMILIES[type(cfg)](cfg))
    net = to_deep_model(base, to_deep_latent(cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    g = torch.Generator().manual_seed(0)
    scale = 4 if name == "flux" else 2                               # cells of the old latent a side of a new token
    z_dc, z_base = torch.randn(40, 32, 2, 3, generator=g), torch.randn(40, cfg.in_channels, 2 * scale, 3 * scale, generator=g)
    text, t, x0 = prompts(cfg, 40, 45), torch.rand(40, generator=g), torch.randn(z_dc.shape, generator=g)
    net.null = base.null = prompts(cfg, 1, 45)
    before = embedding_loss(net, base, z_dc, z_base).item()
    sums = solve_embedder(net, base, [(z_dc[:20], z_base[:20]), (z_dc[20:], z_base[20:])], 1e-9)
    assert embedding_loss(net, base, z_dc, z_base).item() == pytest.approx(sums.mse, rel=1e-3) and sums.mse < 0.8 * before
    dropped = drop_labels(net, text, 0.5, g)
    same = (dropped.tokens == net.null.tokens).all(dim=(1, 2))
    assert 8 < same.sum() < 32 and torch.equal(dropped.tokens[~same], text.tokens[~same])
    loss = lambda: flow_matching_loss(net, z_dc, t, text, x0)[0].mean().item()
    before = loss()
    sums = solve_head(net, [(z_dc, t, text, x0)], 1e-9)
    assert loss() == pytest.approx(sums.mse, rel=1e-3) and sums.mse < 0.8 * before
    gaps = layer_gap(net, base, z_dc, z_base, text)
    assert len(gaps) == len(net.blocks) + 1 and all(math.isfinite(g) for g in gaps)
    assert layer_gap(base, base, z_base, z_base, text) == [0] * len(gaps)


def test_stage_1_targets_are_the_bases_embeddings_averaged_over_each_new_cell():
    base, model, z_dc, z_base, _ = small_pair()
    old = base.embed(z_base).view(48, 8, 4, 32)
    target = old.view(48, 8, 1, 4, 1, 32).mean(dim=(2, 4))                       # the grids here are equal: 8x4 tokens each
    new = model.embed(z_dc).view(48, 8, 4, 32)
    assert_close(align.embedding_loss(model, base, z_dc, z_base), (new - target).square().mean())
    coarse = z_dc[:, :, ::2, ::2]
    target = old.view(48, 4, 2, 2, 2, 32).mean(dim=(2, 4))                       # rows in pairs, columns in pairs
    assert_close(align.embedding_loss(model, base, coarse, z_base), (model.embed(coarse).view(48, 4, 2, 32) - target).square().mean())


def test_pooling_keeps_rows_and_columns_apart_on_a_picture_twice_as_high_as_wide():
    base, *_ = small_pair()
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 1, 8).expand(1, 4, 16, 8)
    bare = align.grid_tokens(base, ramp) - align.grid_tokens(base, torch.zeros_like(ramp))    # without positions
    pooled = torch.nn.functional.adaptive_avg_pool2d(bare, (4, 2))
    assert pooled.std(dim=2).max() < 1e-5                                        # constant down the picture
    assert (pooled[..., 1] - pooled[..., 0]).abs().max() > 0.1                   # not across


@pytest.mark.parametrize("match", ["downsample", "upsample", "average", "mixed"])
def test_every_way_of_matching_embeddings_is_zero_for_equal_embedders(match):
    base, model, *_ = small_pair()
    z = torch.randn(4, 4, 8, 8)
    assert float(align.embedding_loss(base, base, z, z, match)) < 1e-10
    with pytest.raises(ValueError, match="downsample, upsample"):
        align.embedding_loss(base, base, z, z, "nearest")


def test_the_ways_of_matching_embeddings_measure_what_their_names_say():
    base, model, z_dc, z_base, _ = small_pair()
    z_dc = z_dc[:, :, ::2, ::2]
    new, old = align.grid_tokens(model, z_dc), align.grid_tokens(base, z_base)
    loss = {m: align.embedding_loss(model, base, z_dc, z_base, m) for m in align.MATCHES}
    assert_close(loss["average"], (new.mean(dim=(2, 3)) - old.mean(dim=(2, 3))).square().mean())
    assert_close(loss["mixed"], loss["downsample"] + loss["average"])
    assert_close(loss["upsample"], (torch.nn.functional.interpolate(new, (8, 4), mode="bilinear") - old).square().mean())


def test_least_squares_is_the_exact_optimum_and_shards_add_up():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(500, 7, generator=g), torch.randn(3, 7, generator=g)
    y = x @ w.T + 2.0 + 0.1 * torch.randn(500, 3, generator=g)
    whole = align.LeastSquares(7, 3)
    whole.add(x, y)
    parts = [align.LeastSquares(7, 3) for _ in range(2)]
    parts[0].add(x[:123], y[:123]), parts[1].add(x[123:], y[123:])
    reference = torch.linalg.lstsq(torch.cat([torch.ones(500, 1), x], 1).double(), y.double()).solution
    for sums in (whole, parts[0] + parts[1]):
        got_w, got_b = sums.solve(ridge=1e-12)
        assert_close(torch.cat([got_b[:, None], got_w], 1).T, reference, atol=1e-8, rtol=0)
        assert abs(sums.loss(got_w, got_b) - float((x.double() @ got_w.T + got_b - y).square().mean())) < 1e-10


def test_the_closed_form_embedder_is_where_adamw_would_end():
    """At the optimum of Eq. 1 no gradient is left, and every other embedder is worse."""
    base, model, z_dc, z_base, _ = small_pair()
    sums = align.solve_embedder(model, base, [(z_dc[:20], z_base[:20]), (z_dc[20:], z_base[20:])])
    params = [p.requires_grad_(True) for p in model.x_embedder.parameters()]
    best = align.embedding_loss(model, base, z_dc, z_base)
    grads = torch.autograd.grad(best, params)
    assert max(g.abs().max() for g in grads) < 1e-5
    assert abs(float(best) - sums.mse) < 1e-5
    with torch.no_grad():
        params[0].add_(0.01 * torch.randn_like(params[0]))
    assert align.embedding_loss(model, base, z_dc, z_base) > best


def test_the_closed_form_head_leaves_no_gradient_in_the_flow_loss():
    base, model, z_dc, z_base, y = small_pair()
    g = torch.Generator().manual_seed(1)
    t, x0 = torch.rand(48, generator=g), torch.randn(z_dc.shape, generator=g)
    sums = align.solve_head(model, [(z_dc[:30], t[:30], y[:30], x0[:30]), (z_dc[30:], t[30:], y[30:], x0[30:])])
    params = [p.requires_grad_(True) for p in model.final_layer.linear.parameters()]
    loss = align.flow_matching_loss(model, z_dc, t, y, x0)[0].mean()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, params)) < 1e-4
    assert abs(float(loss.detach()) - sums.mse) < 1e-4


def test_stage_1_brings_every_layer_closer_to_the_base():
    base, model, z_dc, z_base, y = small_pair()
    before = evaluate.layer_gap(model, base, z_dc, z_base, y)
    align.solve_embedder(model, base, [(z_dc, z_base)])
    after = evaluate.layer_gap(model, base, z_dc, z_base, y)
    assert all(a < b for a, b in zip(after, before)), (before, after)


def test_only_what_is_trained_moves_and_all_of_it_does(tmp_path):
    base, model, *_ = small_pair()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained, its_base, _ = run_train(tmp_path, steps=5)
    for k, v in trained.state_dict().items():
        moved = not torch.equal(v, before[k])
        assert moved == k.startswith((model.EMBEDDER, model.HEAD)), k
    assert all(torch.equal(v, w) for (_, v), (_, w) in zip(its_base.state_dict().items(), base.state_dict().items()))


def test_the_corrected_velocity_of_an_exact_distilled_model_is_the_undistilled_one():
    """Eq. 6 for any w: with and without gradients, which are one batch and two."""
    model, (z, t, y, x0) = Distilled(), distilled_inputs()
    with torch.no_grad():
        close(align.raw_velocity(model, z, t, y), model.of(z, t, y), 1e-5)
    close(align.raw_velocity(model, z, t, y).detach(), model.of(z, t, y).detach(), 1e-5)
    assert model.rows == [12, 6, 6] and torch.equal(model.told[0][6:], torch.ones(6)) and torch.equal(model.told[2], torch.ones(6))
    loss, pred, v = align.guided_loss(model, z, t, y, x0)
    plain = align.flow_matching_loss(model.of, z, t, y, x0)
    close(loss.detach(), plain[0].detach(), 1e-5), close(v, z - x0, 1e-6)
    wrong = align.flow_matching_loss(model, z, t, y, x0)[0]           # the plain loss asks the guided velocity to be the raw one
    assert off(wrong[1:].detach(), loss[1:].detach()) > 1 and off(wrong[:1].detach(), loss[:1].detach()) < 1e-5


def test_the_null_branch_of_the_guided_loss_passes_no_gradient():
    model, (z, t, y, x0) = Distilled(), distilled_inputs(3)
    align.guided_loss(model, z, t, y, x0)[0].mean().backward()
    xt, v = path(x0, z, t)
    g, w = y.guidance.view(-1, 1, 1, 1), torch.tensor(2.0, requires_grad=True)
    other = Distilled()
    other.w = w
    told = other(xt, t, y)
    with torch.no_grad():
        null = other(xt, t, align.unconditional(other, y))
    (((told + (g - 1) * null) / g - v).square().mean(dim=(1, 2, 3))).mean().backward()
    close(model.w.grad, w.grad, 1e-5)
    everything = torch.tensor(2.0, requires_grad=True)
    other.w = everything
    ((other(xt, t, y) + (g - 1) * other(xt, t, align.unconditional(other, y))) / g - v).square().mean().backward()
    assert off(everything.grad, w.grad) > 0.05                       # it would be another one


def test_distillation_asks_for_what_guidance_in_two_passes_says():
    """Eq. 3 and 4. The student starts as the teacher without guidance, whatever it is told."""
    teacher = scramble(Flux(replace(TINY_FLUX, guidance_embed=False)))
    teacher.null = prompts(teacher.cfg, 1)
    student = model.with_guidance_embed(teacher)
    z, t, x0 = torch.randn(3, TINY_FLUX.in_channels, 4, 4), torch.tensor([0.2, 0.5, 0.8]), torch.randn(3, TINY_FLUX.in_channels, 4, 4)
    y = replace(prompts(teacher.cfg, 3), guidance=torch.tensor([1.0, 3.0, 7.0]))
    xt = path(x0, z, t)[0]
    with torch.no_grad():
        close(student(xt, t, y), teacher(xt, t, y), 1e-6)
        loss, pred, v = align.distillation_loss(teacher, student, z, t, y, x0)
        both = [guided_velocity(teacher, xt[i : i + 1], t[i : i + 1], y[i : i + 1], float(y.guidance[i])) for i in range(3)]
    close(v, torch.cat(both), 1e-5)
    assert loss[0] < 1e-9 < loss[1] and loss[1] < loss[2]
    exact = lambda xt, t, c: torch.cat(both)
    exact.null_condition = student.null_condition
    assert align.distillation_loss(teacher, exact, z, t, y, x0)[0].max() < 1e-9
    with pytest.raises(ValueError, match="does not read it yet"):
        model.with_guidance_embed(student)
    with pytest.raises(ValueError, match="not into a Sana"):
        model.with_guidance_embed(tiny_of("sana"))


def test_the_closed_form_head_of_a_distilled_model_leaves_no_gradient_in_the_guided_loss():
    net = tiny_of("flux")
    net.null = prompts(net.cfg, 1)
    g = torch.Generator().manual_seed(1)
    batch = lambda: (torch.randn(32, net.cfg.in_channels, 4, 4, generator=g), torch.rand(32, generator=g),
                     replace(prompts(net.cfg, 32), guidance=1 + 6 * torch.rand(32, generator=g)), torch.randn(32, net.cfg.in_channels, 4, 4, generator=g))
    batches = [batch(), batch()]
    sums = solve_head(net, batches, 0.0, guided=True)
    net.head_linear.requires_grad_(True)
    loss = sum(align.guided_loss(net, *b)[0].mean() for b in batches) / 2
    loss.backward()
    # the null branch passes no gradient in training, but it is the same linear map: the optimum of the whole is stationary in it
    with torch.no_grad():
        before = float(loss)
        for p in net.head_linear.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=g))
        assert float(sum(align.guided_loss(net, *b)[0].mean() for b in batches) / 2) > before
    assert sums.mse == pytest.approx(before, rel=1e-3)


def test_the_objective_is_the_models_own_unless_another_one_fits():
    flux, sana, dit = BASES["tiny-flux"], BASES["tiny-sana"], BASES["dit-xl"]
    assert [align.pick_objective(c, None) for c in (flux, sana, dit, replace(flux, guidance_embed=False))] == ["guided", "flow", "flow", "flow"]
    assert align.pick_objective(flux, "flow") == "flow" and align.pick_objective(dit, "ddpm") == "ddpm"
    for cfg, asked, said in ((sana, "guided", "not distilled"), (flux, "ddpm", "on DDPM's clock")):
        with pytest.raises(ValueError, match=said):
            align.pick_objective(cfg, asked)
    y = Text(torch.zeros(3, 1, 1))
    assert align.tell_guidance(y, None, torch.rand(3)) is y
    assert align.tell_guidance(y, (1.0, 14.0), torch.tensor([0.0, 0.5, 1.0])).guidance.tolist() == [1.0, 7.5, 14.0]


def test_training_tells_guidance_uniformly_between_its_limits(monkeypatch):
    told = []
    monkeypatch.setitem(align.LOSSES, "guided", lambda model, z, t, y, x0: told.append(y.guidance) or (t, z, z))
    align.sample_loss(SimpleNamespace(null_condition=lambda y: y), torch.ones(4000, 1, 1, 1), Text(torch.zeros(4000, 1, 1)), torch.Generator().manual_seed(0),
                      objective="guided", t_sampling="uniform", shift=1.0, label_dropout=0.0, limits=(1.0, 14.0))
    hist = torch.histc(told[0], 13, 1.0, 14.0)
    assert hist.sum() == 4000 and hist.min() > 240 and hist.max() < 380


def test_the_embedded_text_bases_draw_what_captions_say():
    ae, source = checkpoints.load_autoencoder("tiny-kl-f8c4"), ScenesSource(128, split="val")
    said, seeds = [source.caption(i) for i in range(48)], list(range(48))
    flux, sana = (load_base(name)[0] for name in ("tiny-flux", "tiny-sana"))
    scores = [scene_scores(generate(flux, ae, sample.with_guidance(encode_words(said, 16), g), seeds, 12, 1.0), said) for g in (1.0, 3.5)]
    assert scores[1]["object"] > 0.9 and scores[1]["colour"] > 0.9 and scores[1]["position"] > 0.9 and scores[1]["all"] > 0.6
    assert scores[1]["all"] > scores[0]["all"]                       # guidance in one pass
    sana.null = cache_prompts("words", None, [], 16).null
    score = scene_scores(generate(sana, ae, encode_words(said, 16), seeds, 12, 2.0), said)
    assert score["object"] > 0.9 and score["colour"] > 0.9 and score["binding"] > 0.7 and score["all"] > 0.5
    swapped = scene_scores(generate(sana, ae, encode_words(said[1:] + said[:1], 16), seeds, 12, 2.0), said)
    assert swapped["all"] < 0.1                                      # it is the caption that does it


def test_a_new_head_passes_gradients_to_the_embedder_from_the_first_step():
    """A zero head, DiT's own initialisation, would leave the embedder without any."""
    base, model, z_dc, _, y = small_pair()
    model.x_embedder.requires_grad_(True)
    align.flow_matching_loss(model, z_dc, torch.full((48,), 0.5), y, torch.randn_like(z_dc))[0].mean().backward()
    assert model.x_embedder.proj.weight.grad.norm() > 0


@pytest.mark.parametrize("ema", [None, 0.99])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, ema):
    """Killed after step 8 with its last state from step 5: twelve steps all the same, bit for bit, and across the end of
    an epoch (six steps of eight are one)."""
    straight, _, log = run_train(tmp_path / "a", ema=ema)
    class Killed(Exception): pass
    def dies(flow, model):
        calls = []
        def loss(rows, g):
            calls.append(1)
            if len(calls) == 9: raise Killed
            return flow(rows, g)
        return loss
    with pytest.raises(Killed):
        run_train(tmp_path / "b", ema=ema, loss=dies)
    resumed, _, log2 = run_train(tmp_path / "b", ema=ema)
    drop = lambda rows: [{k: v for k, v in r.items() if k != "images_per_s"} for r in rows]
    assert drop(log) == drop(log2)
    assert all(torch.equal(v, w) for v, w in zip(straight.state_dict().values(), resumed.state_dict().values()))
    if ema:
        a, b = (torch.load(tmp_path / d / "train.train", weights_only=True)["ema"] for d in "ab")
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_run_killed_while_it_saves_goes_on_from_the_state_before_to_the_same_numbers(tmp_path, monkeypatch):
    straight, _, log = run_train(tmp_path / "a")
    class Killed(BaseException): pass
    save_one, saved = torch.save, []
    def dies(state, file):
        saved.append(state["step"])
        if len(saved) < 2:
            return save_one(state, file)
        Path(file).write_bytes(b"half a state")
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(torch, "save", dies)
        with pytest.raises(Killed):
            run_train(tmp_path / "b")
    assert saved == [5, 10] and torch.load(tmp_path / "b/train.train", weights_only=True)["step"] == 5
    resumed, _, log2 = run_train(tmp_path / "b")
    assert [r["loss"] for r in log] == [r["loss"] for r in log2] and len(log2) == 12
    assert all(torch.equal(v, w) for v, w in zip(straight.state_dict().values(), resumed.state_dict().values()))


def test_shards_are_a_state_when_their_metadata_is_there_which_is_written_last(tmp_path):
    for step in (4, 8):
        (tmp_path / f"train-{step:08d}.train").mkdir()
        (tmp_path / f"train-{step:08d}.train/facts.json").write_text("{}")
    assert train.find_state(tmp_path, "train") is None
    (tmp_path / "train-00000004.train/.metadata").touch()
    assert train.find_state(tmp_path, "train").name == "train-00000004.train"       # killed while it saved step 8
    (tmp_path / "train.train").touch()                               # one process went on from there: what is newest counts
    for seconds, name in ((-9, "train-00000004.train"), (9, "train.train")):
        os.utime(tmp_path / "train.train", (time.time() + seconds,) * 2)
        assert train.find_state(tmp_path, "train").name == name


def test_the_moving_average_is_float32_warms_up_and_leaves_the_raw_weights_alone(tmp_path):
    model, _, _ = run_train(tmp_path, steps=3, ema=0.999, save_every=1)
    state = torch.load(tmp_path / "train.train", weights_only=True)
    raw = dict(model.named_parameters())
    for (k, w), s in zip(state["weights"].items(), state["ema"]):
        assert torch.equal(w, raw[k]) and s.dtype == torch.float32 and not torch.equal(s, w)
    _, before, _ = run_train(tmp_path / "one", steps=1, ema=0.999, save_every=1)
    state = torch.load(tmp_path / "one/train.train", weights_only=True)
    start = small_pair()[1].state_dict()
    for (k, w), s in zip(state["weights"].items(), state["ema"]):
        assert_close(s, start[k] + (1 - 1 / 10) * (w - start[k]))                # decay (1 + 0) / (10 + 0) at the first step


def test_accumulated_gradients_equal_the_big_batch(tmp_path):
    """The same eight samples, with the same noise, in one pass or in parts whose sizes differ."""
    sizes = []
    def fixed(flow, model):
        _, _, z_dc, _, y = small_pair()
        noise = torch.randn(z_dc.shape, generator=torch.Generator().manual_seed(3))
        return lambda rows, g: sizes.append(len(rows)) or (align.flow_matching_loss(model, z_dc[rows], torch.full((len(rows),), 0.4), y[rows], noise[rows])[0].mean(), {})
    whole, _, _ = run_train(tmp_path / "a", steps=3, loss=fixed)
    parts, _, _ = run_train(tmp_path / "b", steps=3, loss=fixed, accumulate=3)
    assert sizes == [8] * 3 + [3, 3, 2] * 3
    for v, w in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert_close(v, w, atol=2e-6, rtol=1e-5)


def test_a_non_finite_gradient_is_skipped_and_the_third_in_a_row_ends_the_run(tmp_path, capsys):
    def poisoned(when):
        def wrap(flow, model):
            calls = []
            def loss(rows, g):
                calls.append(1)
                value, said = flow(rows, g)
                return (value * float("nan") if len(calls) in when else value), said
            return loss
        return wrap
    model, _, _ = run_train(tmp_path / "a", loss=poisoned({4, 5}))               # two, then fine
    assert all(torch.isfinite(p).all() for p in model.parameters()) and "not finite, step skipped" in capsys.readouterr().out
    before, _, _ = run_train(tmp_path / "c", steps=5)
    with pytest.raises(RuntimeError, match="three non-finite gradients in a row"):
        run_train(tmp_path / "b", loss=poisoned({6, 7, 8}))
    state = torch.load(tmp_path / "b/train.train", weights_only=True)
    assert state["step"] == 5 and all(torch.equal(state["weights"][k], dict(before.named_parameters())[k]) for k in state["weights"])


def test_a_signal_finishes_the_step_saves_and_ends(tmp_path):
    import os, signal
    def interrupted(flow, model):
        calls = []
        def loss(rows, g):
            calls.append(1)
            if len(calls) == 3: os.kill(os.getpid(), signal.SIGTERM)
            return flow(rows, g)
        return loss
    with pytest.raises(SystemExit, match="--resume"):
        run_train(tmp_path, loss=interrupted)
    assert torch.load(tmp_path / "train.train", weights_only=True)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL                    # the old handlers are back


def test_weight_decay_spares_norms_biases_and_embeddings():
    base, *_ = small_pair()
    decayed, spared = train.decay_groups(list(base.named_parameters()), 0.1)
    names = {id(p): k for k, p in base.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert {names[id(p)] for p in spared["params"]} == {k for k in names.values() if k.endswith("bias") or "embedding_table" in k}


def test_labels_are_dropped_at_the_given_rate_to_the_null_class():
    base, *_ = small_pair()
    y = torch.arange(10_000) % 8
    dropped = align.drop_labels(base, y, 0.1, torch.Generator().manual_seed(0))
    assert 0.08 < float((dropped == 8).float().mean()) < 0.12
    assert torch.equal(dropped[dropped != 8], y[dropped != 8]) and torch.equal(base.null_condition(y[:2]), torch.tensor([8, 8]))


def test_the_ddpm_objective_trains_a_head_of_twice_the_channels(tmp_path):
    base, _, z_dc, _, y = small_pair(clock="ddpm")
    model = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"], "epsilon"))
    assert model.final_layer.linear.out_features == 64
    loss, said = align.sample_loss(model, z_dc, y, torch.Generator().manual_seed(0), objective="ddpm", t_sampling="uniform", shift=1.0, label_dropout=0.0)
    assert torch.isfinite(loss) and said["mse"] > 0
    assert model(z_dc, torch.full((48,), 0.5), y).shape == z_dc.shape            # its forward is a velocity all the same


def test_a_missing_hub_is_told_in_two_lines_with_the_way_out(monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    def unreachable(*a, **k): raise OSError("no network")
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError) as e:
        align.main(["--base", "dit-xl"])
    assert len(str(e.value).split("\n")) == 2 and "facebook/DiT-XL-2-256" in str(e.value) and "--weights PATH" in str(e.value)


def test_bad_flags_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in ((["--match", "upsample"], "adamw"), (["--ae", "vae"], "tiny-dc-ae-f32c32"), (["--base", "dit-huge"], "dit-xl"),
                         (["--objective", "ddpm"], "flow's"), (["--res", "100"], "--res 100: tiny-dc-ae-f32c32 with patch 1 needs a multiple of 32; try 96 or 128")):
        with pytest.raises(ValueError, match=words):
            align.main([*flags, "--pictures", "8", "--count", "0"])


def test_layer_rates_are_on_a_line_and_one_on_average(tmp_path):
    for name in TINIES:
        net = FAMILIES[type(TINIES[name])](TINIES[name])
        rate, n = finetune.layer_rates(net, 3.0), len(net.blocks)
        of = lambda m: {rate(k) for k, p in net.named_parameters() if any(p is q for q in m.parameters())}
        rates = [of(net.embed_linear), *(of(block) for block in net.blocks), of(net.head_linear)]
        assert [len(r) for r in rates] == [1] * (n + 2)
        rates = [r.pop() for r in rates]
        assert rates == pytest.approx([0.5 + i / (n + 1) for i in range(n + 2)]) and sum(rates) / (n + 2) == pytest.approx(1)
    assert {finetune.layer_rates(net, 1.0)(k) for k, _ in net.named_parameters()} == {1.0}
    deep = finetune.layer_rates(DiT(replace(TINY_DIT, depth=12)), 3.0)
    assert deep("blocks.1.x") < deep("blocks.9.x") < deep("blocks.10.x") < deep("blocks.11.x")
    net = small_pair()[1]
    moved = lambda k, model: (model.state_dict()[k] - net.state_dict()[k]).abs().max().item()
    even, uneven = (run_train(tmp_path / str(r), steps=1, rate=finetune.layer_rates(net, r))[0] for r in (1.0, 3.0))
    for k, share in ((f"{net.EMBEDDER}proj.weight", 0.5), (f"{net.HEAD}weight", 1.5)):           # AdamW's first step is the learning rate
        assert moved(k, uneven) == pytest.approx(share * moved(k, even), rel=1e-3)


def test_lora_comes_in_gradually_and_is_whole_at_the_end():
    net = with_lora()[1]
    before, own = finetune.lora_ramp(net, 4), {m: m.scale for m in net.modules() if isinstance(m, LoRALinear)}
    for step, share in ((0, 0), (1, 0.25), (3, 0.75), (4, 1), (9, 1), (2, 0.5)):
        before(step)
        assert own and all(m.scale == share * scale for m, scale in own.items())


def test_the_next_autoencoder_is_the_recipes_or_the_one_asked_for():
    flux, at = align.RECIPES["flux-krea"], lambda name: replace(BASES["flux-krea"], ae=name)
    assert align.target_ae(None, flux, BASES["flux-krea"]).name == "dc-ae-f32c32-in-1.0"
    assert align.target_ae(None, flux, at("dc-ae-f32c32-in-1.0")).name == BASES["dc-gen-flux-4k"].ae
    assert align.target_ae("dc-ae-f64c128-in-1.0", flux, at("dc-ae-f32c32-in-1.0")).name == "dc-ae-f64c128-in-1.0"
    with pytest.raises(ValueError, match="on dc-ae-f64c128-1.5 already, where its recipe ends; name the autoencoder to move to with --ae, one of dc-ae-f128c512-in-1.0, "):
        align.target_ae(None, flux, at("dc-ae-f64c128-1.5"))


def test_positions_are_spread_for_bases_that_know_one_size_and_count_by_ones_for_flux():
    """As recipe.md has it for FLUX, whose runs diffusers' pipeline can then draw from; a run's own step multiplies."""
    step = lambda base, asked=None, own=1.0: train.new_step(asked, align.recipe_of(base), replace(BASES[base], pos_step=own))
    assert [step(k) for k in ("tiny", "tiny-flux", "dit-xl", "dit-xl-512", "flux-krea", "flux-dev")] == [2, 2, 2, 2, 1, 1]
    assert step("flux-krea", 2.0) == 2 and step("tiny", 1.0) == 1 and step("tiny", None, 2.0) == 4 and step("flux-krea", None, 2.0) == 2
    assert train.new_step(None, align.recipe_of("sana-1.6b"), BASES["sana-1.6b"]) == 1


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_model_of_spread_positions_is_not_exported_to_diffusers_which_counts_by_ones(name, tmp_path):
    net = tiny_of(name)
    net.cfg = replace(net.cfg, pos_step=2.0)
    with pytest.raises(ValueError, match="positions by ones, this one's go by 2.*--pos-step 1"):
        export_diffusers(net, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_run_keeps_the_length_of_prompts_and_the_size_that_it_was_trained_with(words_base, monkeypatch):
    lengths, make = [], data.cache_prompts
    monkeypatch.setattr(train, "cache_prompts", lambda family, folder, prompts, length, **kw: lengths.append(length) or make(family, folder, prompts, length, **kw))
    same = ["--base", "test-words", "--batch", "4", "--pictures", "32", "--device", "cpu", "--dtype", "fp32"]
    align.main([*same, "--ae", "tiny-dc-ae-f32c32", "--text-tokens", "12", "--res", "96", "--stage2-steps", "1", "--head-samples", "16", "--count", "0", "--out", "runs/a"])
    finetune.main([*same, "--init", "runs/a", "--rank", "2", "--train-steps", "1", "--out", "runs/b"])
    finetune.main([*same, "--init", "runs/a", "--rank", "2", "--train-steps", "1", "--text-tokens", "10", "--res", "64", "--out", "runs/c"])
    cfg = lambda run: (c := checkpoints.load_run(run)[0].cfg) and (c.text_tokens, c.res)
    assert [cfg(f"runs/{k}") for k in "abc"] == [(12, 96), (12, 96), (10, 64)] and lengths == [12, 12, 10]
    with pytest.raises(ValueError, match="--text-tokens 8: this model reads classes"):
        finetune.main(["--init", "base", "--text-tokens", "8"])
    for script, res in ((align, "100"), (finetune, "104")):          # before anything is encoded, and no folder is left
        with pytest.raises(ValueError, match=f"--res {res}: tiny-dc-ae-f32c32 with patch 1 needs a multiple of 32; try 96 or 128"):
            script.main([*same, "--ae", "tiny-dc-ae-f32c32", "--res", res, "--out", "runs/d", *(["--init", "runs/a"] if script is finetune else [])])
    assert not Path("runs/d").exists()
    with pytest.raises(ValueError, match="--text-tokens 0: at least 1"):
        finetune.main([*same, "--init", "runs/a", "--text-tokens", "0"])


def test_a_teacher_is_not_told_its_guidance_and_what_is_distilled_from_it_is(words_base):
    same = ["--base", "test-words", "--batch", "4", "--pictures", "32", "--train-steps", "1", "--device", "cpu", "--dtype", "fp32"]
    finetune.main([*same, "--init", "scratch", "--out", "runs/teacher"])
    finetune.main([*same, "--distill-guidance", "runs/teacher", "--out", "runs/student"])
    (teacher, facts), (student, info) = (load_run(f"runs/{k}") for k in ("teacher", "student"))
    assert not teacher.cfg.guidance_embed and student.cfg.guidance_embed and (facts["objective"], info["objective"]) == ("flow", "distill")
    assert Path("runs/student/guidance.png").exists() and not Path("runs/teacher/guidance.png").exists()


def test_the_average_stands_in_for_the_weights_while_it_is_looked_at():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError):
        with train.holding([p], [torch.zeros(2)]):
            assert p.tolist() == [0, 0]
            raise KeyError
    assert p.tolist() == [1, 1] and p.requires_grad


def test_the_validation_loss_is_told_at_eight_times():
    _, net, z, _, y = small_pair()
    said = align.validation_losses(net, z, y)
    assert list(said) == ["val_loss"] + [f"val_t{(k + 0.5) / 8:.2f}" for k in range(8)]
    assert said["val_loss"] == pytest.approx(sum(list(said.values())[1:]) / 8, rel=1e-5) == align.validation_loss(net, z, y)
    told = []                                                        # a distilled model, at guidances between its limits, every time with each
    align.validation_losses(None, torch.zeros(64, 1, 1, 1), Text(torch.zeros(64, 1, 1)), limits=(1.0, 5.0), loss=lambda m, z, t, y, x0: (told.append((t, y.guidance)) or t,))
    assert len({(a, b) for a, b in zip(*(v.tolist() for v in told[0]))}) == 64 and sorted(set(told[0][1].tolist())) == [1.25 + 0.5 * k for k in range(8)]


def test_long_titles_stand_on_several_lines(tmp_path):
    from PIL import Image
    x, title = torch.ones(2, 3, 96, 96), "three large yellow triangles above a small pink cross on green"
    heights = []
    for name, columns in (("none", ()), ("short", ("a", "b")), ("long", (title, "b"))):
        sample.save_grid(tmp_path / f"{name}.png", [("x", x)], columns)
        heights.append(Image.open(tmp_path / f"{name}.png").height)
    assert heights[0] == 98 and heights[1] == 98 + 16 and heights[2] >= 98 + 4 + 12 * (len(title) // 16)
