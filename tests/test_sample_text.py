from common import *


def test_shifts_follow_from_the_size_as_published():
    seen = set()
    for s in stored_facts("dcgen_schedules")["schedules"]:
        rule = {"flux2_r": "flux2", "flowmatch_mu": "mu"}[s["kind"]]
        f = round(math.sqrt(s["height"] * s["width"] / s["tokens"]))
        times = time_grid(s["steps"], resolve_shift(rule, s["channels"], s["height"] // f, s["width"] // f, 1))
        assert max(abs(1 - t - sigma) for t, sigma in zip(times, s["sigmas"], strict=True)) < 1e-6, (s["size"], rule)
        seen.add((rule, s["tokens"], s["channels"]))
    assert len(seen) > 5
    _, _, _, out = fixture("flux_bfl")
    for tokens, steps, want in ((256, 4, "4steps_seq256"), (4096, 4, "4steps_seq4096"), (16384, 4, "4steps_seq16384"), (1024, 20, "20steps_seq1024")):
        side = math.isqrt(tokens) * 2                                # packed two by two
        times = torch.tensor(time_grid(steps, resolve_shift("mu", 16, side, side, 2)))
        close(1 - times, out[f"schedule_{want}"], 1e-6)
    assert resolve_shift("flux2", 32, 32, 32, 1) == resolve_shift("flux2", 8, 64, 64, 2) == math.sqrt(8)       # packing does not count
    assert resolve_shift(3, 1, 1, 1, 1) == resolve_shift("3.0", 1, 1, 1, 1) == 3.0
    for bad in ("flux3", "0", "-1", 0.0):
        with pytest.raises(ValueError, match=f"--shift {bad}: give a positive number, or one of mu, flux2"):
            resolve_shift(bad, 16, 8, 8, 1)


def test_sanas_times_are_the_official_ones():
    _, _, _, out = fixture("sana_dcgen")
    close(1000 * (1 - torch.tensor(time_grid(8, 3.0, sample.START["dpm"])[:-1])), out["dpms_model_t"], 1e-6)


@pytest.mark.filterwarnings("ignore:__array__")
def test_dpm_solver_matches_diffusers():
    """On a velocity that bends, with the grid of its own: steps few and many, where it chooses the orders differently."""
    diffusers = pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(0)
    x0, w = torch.randn(2, 4, 8, 8, generator=g), torch.randn(4, 4, generator=g)
    velocity = lambda x, t: torch.einsum("bchw,cd->bdhw", x, w).tanh() * (1 + t.view(-1, 1, 1, 1)) - x
    for steps, shift in ((1, 3.0), (4, 1.0), (8, 3.0), (20, 3.0), (30, 2.83)):
        official, x = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift), x0
        official.set_timesteps(steps)
        for k, t in enumerate(official.timesteps):
            x = official.step(-velocity(x, 1 - official.sigmas[k].expand(2)), t, x).prev_sample
        mine = integrate(velocity, x0, time_grid(steps, shift, sample.START["dpm"]), "dpm")
        close(mine, x, 2e-5)
        assert steps < 3 or off(integrate(velocity, x0, time_grid(steps, shift, sample.START["dpm"])), x) > 1e-3        # which Euler is not


def test_dpm_solver_is_of_second_order_and_starts_anywhere():
    """dx/dt = x cos(5t): x(b) = x(a) exp((sin(5b) - sin(5a)) / 5). Away from both ends, where log(t / (1-t)) is infinite."""
    x, inner = torch.ones(1, 1, 1, 1, dtype=torch.float64), lambda n: [0.1 + 0.8 * t for t in time_grid(n)]
    bend = lambda x, t: SimpleNamespace(float=lambda: x * math.cos(5 * t.double().item()))
    error = lambda n: (integrate(bend, x, inner(n), "dpm") - math.exp((math.sin(4.5) - math.sin(0.5)) / 5)).abs().item()
    assert 1.7 < math.log2(error(64) / error(128)) < 2.3
    got = integrate(lambda x, t: torch.full_like(x, 2.0), torch.zeros(1, 1, 1, 1), time_grid(5), "dpm")
    close(got, torch.full((1, 1, 1, 1), 2.0), 1e-6)                  # a straight path is exact, also from 0


def test_sana_with_its_solver_matches_the_official_loop():
    """Eight steps with guidance 4.5. The official model cuts its clock to whole steps, and its null caption keeps the mask."""
    config, weights, x, out = fixture("sana_dcgen")
    cfg = replace(BASES["sana-1.6b"], in_channels=config["in_channels"], hidden_size=config["hidden_size"], depth=config["depth"], num_heads=config["num_heads"],
                  mlp_ratio=config["mlp_ratio"], caption_channels=config["caption_channels"], integer_time=True)
    net = load_weights(Sana(cfg), weights, TABLES[Sana][detect_layout(weights)[1]]).eval()
    cond, net.null = Text(x["y"][:, 0], x["mask"].bool()), Text(weights["y_embedder.y_embedding"][None])
    times = time_grid(config["sampler_steps"], config["flow_shift"], sample.START["dpm"])
    close(integrate(lambda z, t: guided_velocity(net, z, t, cond, config["cfg_scale"]), x["sample_noise"], times, "dpm"), out["dpms_sample"], 1e-4)


@pytest.mark.parametrize("name, rule", [("flowmatch", "mu"), ("flux2", "flux2")])
def test_dc_gen_flux_draws_the_official_picture(name, rule, monkeypatch):
    """The authors' whole text-to-image loop: both schedules, every step, and the decoded picture."""
    config, weights, x, out = fixture("dcgen_pipeline")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    t, vae = config["transformer"], part("vae.")
    cfg = FluxConfig(t["in_channels"], t["patch_size"], "test", hidden_size=t["attention_head_dim"] * t["num_attention_heads"], depth=t["num_layers"],
                     depth_single=t["num_single_layers"], num_heads=t["num_attention_heads"], axes_dim=tuple(t["axes_dims_rope"]), context_in_dim=t["joint_attention_dim"],
                     vec_in_dim=t["pooled_projection_dim"])
    net = load_weights(Flux(cfg), part("transformer."), TABLES[Flux]["diffusers"]).eval()
    v = config["vae"]
    ae_cfg = DCAEConfig("test", v["latent_channels"], v["scaling_factor"], tuple(v["encoder_block_out_channels"]), tuple(v["encoder_layers_per_block"]),
                        tuple(v["decoder_layers_per_block"]), 9, 9)
    ae = load_weights(DCAE(ae_cfg), vae, ae_table(ae_cfg, vae)).eval()
    cond = Text(x["prompt_embeds"], None, x["pooled_prompt_embeds"], torch.full((2,), config["guidance_scale"]))
    steps, follow = [], sample.integrate
    monkeypatch.setattr(sample, "noise", lambda generators, shape: x["noise"])
    monkeypatch.setattr(sample, "integrate", lambda *args: follow(*args, each=lambda z: steps.append(net.patchify(z))))
    picture = generate(net, ae, cond, [0, 1], config["steps"], 1.0, "euler", rule, (config["height"], config["width"]))
    for got, want in zip(steps, out[f"{name}_steps"], strict=True):
        close(got, want, 1e-4)
    close((picture + 1) / 2, out[f"{name}_image"], 1e-4)


@pytest.mark.parametrize("name, extra", [("flux", ["--guidance", "2.5"]), ("sana", ["--negative", "a dog"]), ("flux", ["--negative", "a dog", "--cfg-scale", "2", "--sampler", "heun"])])
def test_prompts_become_pictures_that_say_how_they_were_made(name, extra, text_bases, capsys):
    from PIL import Image
    Path("p.txt").write_text("two blue squares\n# no\n")
    sample.main([*text_bases(name), "--prompt", "a red cat", "--prompts", "p.txt", "--count", "3", "--seed", "5", "--res", "96x48", "--shift", "2", *extra])
    folder = f"runs/samples-test-{name}"
    assert sorted(p.name for p in Path(folder).iterdir()) == ["00000_seed5.png", "00001_seed6.png", "00002_seed7.png"] and Path(f"{folder}-grid.png").is_file()
    for k, prompt in enumerate(("a red cat", "two blue squares", "a red cat")):
        with Image.open(f"{folder}/0000{k}_seed{5 + k}.png") as im:
            facts = json.loads(im.info["dcgen"])
            assert im.size == (96, 48) and im.info["prompt"] == prompt and im.info["negative"] == ("a dog" if "--negative" in extra else "") and im.info["seed"] == str(5 + k)
    assert facts["num_steps"] == 2 and facts["shift"] == "2" and facts["text_tokens"] == 32 and facts["model"]["family"] == ("FluxConfig" if name == "flux" else "SanaConfig")
    assert (facts["sampler"], facts["guidance"], facts["cfg_scale"]) == {"--guidance": ("euler", 2.5, 1.0), "--negative": ("dpm", None, 4.5)}.get(extra[0] if len(extra) < 3 else "", ("heun", 3.5, 2.0))
    said = capsys.readouterr().out
    assert re.search(r"wrote 3 pictures to .*text [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s; peak [\d.]+ GiB", said)
    first = pictures(folder)
    sample.main([*text_bases(name), "--prompt", "a red cat", "--prompts", "p.txt", "--count", "3", "--seed", "5", "--res", "96x48", "--shift", "2", *extra, "--batch", "3", "--offload", "--out", "other"])
    again = pictures("other")
    assert all(np.abs(first[k].astype(int) - again[k]).max() <= 1 for k in first) and first["00000_seed5.png"].std() > 1       # the batch changes nothing
    assert np.abs(first["00000_seed5.png"].astype(int) - first["00002_seed7.png"]).mean() > 1                                   # the seed does


def test_text_models_are_told_apart_by_their_flags(text_bases):
    """The guidance of a distilled model, true guidance, its negative prompt and the prompt each change the picture."""
    def draw(name, *flags):
        sample.main([*text_bases(name), "--out", "x", *(flags if "--prompt" in flags else [*flags, "--prompt", "a red cat"])])
        return pictures("x")["00000_seed0.png"].astype(int)
    differs = lambda a, b: np.abs(a - b).mean() > 0.05
    flux = draw("flux")
    assert not differs(flux, draw("flux", "--guidance", "3.5")) and differs(flux, draw("flux", "--guidance", "1")) and differs(flux, draw("flux", "--cfg-scale", "3"))
    assert differs(draw("flux", "--cfg-scale", "3"), draw("flux", "--cfg-scale", "3", "--negative", "two blue squares"))
    sana = draw("sana")
    assert differs(sana, draw("sana", "--negative", "two blue squares")) and differs(sana, draw("sana", "--cfg-scale", "1")) and differs(sana, draw("sana", "--sampler", "euler"))
    assert differs(sana, draw("sana", "--prompt", "two blue squares"))
    for name, full in (("flux", flux), ("sana", sana)):
        half = draw(name, "--dtype", "bf16")                         # text encoders, model and arithmetic
        assert 0 < np.abs(half - full).mean() < 4


@pytest.mark.parametrize("cls, name", [(Flux, "tiny-flux"), (Sana, "tiny-sana")])
def test_the_null_condition_keeps_guidance_and_true_guidance_extrapolates_from_it(cls, name):
    net = scramble(cls(replace(BASES[name], depth=1)))
    g = torch.Generator().manual_seed(0)
    rows = lambda n: Text(torch.randn(n, 7, 256, generator=g), torch.arange(7) < torch.tensor([[7], [3]])[:n] if cls is Sana else None,
                          torch.randn(n, 256, generator=g) if cls is Flux else None, torch.tensor([2.0, 5.0])[:n] if cls is Flux else None)
    cond, null = rows(2), rows(1)
    net.null = replace(null, mask=None, guidance=None)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.2, 0.7])
    off_by = net.null_condition(cond)
    assert len(off_by) == 2 and torch.equal(off_by.tokens[1], null.tokens[0])
    if cls is Flux:
        assert torch.equal(off_by.guidance, cond.guidance)           # each picture's own
    else:
        assert torch.equal(off_by.mask, cond.mask)
    by_hand = net(x, t, off_by) + 3.0 * (net(x, t, cond) - net(x, t, off_by))
    close(guided_velocity(net, x, t, cond, 3.0), by_hand, 1e-4)
    assert torch.equal(guided_velocity(net, x, t, cond, 1.0), net(x, t, cond))
    net.null = None
    with pytest.raises(ValueError, match="does not know its null prompt"):
        guided_velocity(net, x, t, cond, 3.0)


def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(text_bases, monkeypatch):
    monkeypatch.setattr(checkpoints, "find_weights", lambda *a: pytest.fail("looked for weights"))
    monkeypatch.setattr(checkpoints, "build", lambda *a: pytest.fail("loaded weights"))
    assert parse_size(None, 64) == (64, 64) and parse_size("1216x832", 64) == (832, 1216)
    p = ["--prompt", "x"]
    for flags, said in ((["--base", "flux-krea", *p, "--res", "1000"], "--res 1000: flux-vae-f8c16 with patch 2 needs a multiple of 16; try 992 or 1008"),
                        (["--base", "dc-gen-flux-1k", *p, "--res", "1000x512"], "--res 1000x512: dc-ae-f32c32-in-1.0 with patch 1 needs a multiple of 32; try 992x512 or 1024x512"),
                        (["--base", "flux-krea", *p, "--res", "big"], "--res big: give pixels a side, or WIDTHxHEIGHT"), (["--base", "flux-krea", *p, "--res", "8x8x8"], "--res 8x8x8"),
                        (["--base", "flux-kera", *p], "--base flux-kera: not a preset .*flux-krea.*sana-4.8b"), (["--base", "flux-krea"], "draws prompts: give --prompt TEXT"),
                        (["--base", "flux-krea", "--classes", "3"], "--classes: flux-krea draws prompts"), (["--base", "dit-xl", *p], "--prompt: dit-xl draws classes"),
                        (["--base", "dit-xl", "--negative", "x"], "--negative: dit-xl draws classes"), (["--base", "sana-1.6b", *p, "--guidance", "3"], "--guidance: sana-1.6b is not a distilled"),
                        (["--base", "flux-krea", *p, "--negative", "y"], "--negative: .*--cfg-scale above 1"), (["--base", "flux-krea", *p, "--count", "0"], "--count 0: at least 1"),
                        (["--base", "flux-krea", *p, "--shift", "mue"], "--shift mue: give a positive number, or one of mu, flux2"),
                        (["--base", "flux-krea", "--prompts", "gone.txt"], "--prompts gone.txt: not a readable text file")):
        with pytest.raises(ValueError, match=said):
            sample.main(flags)


def test_a_dry_run_prints_what_it_would_take_and_touches_nothing(text_bases, monkeypatch, capsys):
    for place in (data, checkpoints):
        monkeypatch.setattr(place, "find_weights", lambda *a: pytest.fail("looked for weights"))
    said = lambda *flags: (sample.main([*flags, "--dry-run"]), capsys.readouterr().out)[1]
    krea = said("--base", "flux-krea", "--dtype", "bf16", "--prompt", "x")
    assert "11,901.4M parameters, 23.80 GB in bfloat16" in krea and "4,096 tokens and 512 of text" in krea and "T5EncoderModel" in krea and "28 steps" in krea
    number = lambda text, unit: float(re.search(rf"([\d,.]+) {unit}", text)[1].replace(",", ""))
    assert 60 < number(krea, "TFLOPs a step") < 90
    deep = said("--base", "dc-gen-flux-1k", "--dtype", "bf16")
    assert "1,024 tokens" in deep and 3 < number(krea, "TFLOPs a step") / number(deep, "TFLOPs a step") < 4
    sana = said("--base", "sana-1.6b")
    assert "1,604.6M parameters" in sana and "Gemma2Model" in sana
    with_guidance, without = (number(said("--base", "dit-xl", "--cfg-scale", s), "TFLOPs a step") for s in ("4", "1"))
    assert with_guidance == pytest.approx(2 * without, rel=0.02)
    parts = lambda text: [float(n) for n in re.search(r"about ([\d.]+) GB while denoising, ([\d.]+) GB while decoding", text).groups()]
    alone = parts(said("--base", "dc-gen-flux-1k", "--dtype", "bf16", "--offload"))
    assert [a - b for a, b in zip(parts(deep), alone)] == pytest.approx([0.8, 23.8], abs=0.05) and not Path("runs").exists()


def test_cost_counts_operations_and_what_is_alive_at_once():
    with torch.device("meta"):
        net, x = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10)), torch.zeros(5, 10)
        q, k = torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 9, 4)
        assert fast.cost(net, x) == (2 * 5 * 10 * 100 * 2, 4 * 5 * 100 * 2)             # two hidden layers' worth
        flops, peak = fast.cost(F.scaled_dot_product_attention, q, k, k)
        assert flops == 2 * 2 * 6 * 7 * 9 * 4 and peak == q.nbytes       # without the table of scores


def test_a_visiting_model_goes_home_without_a_copy():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    before, first = {k: v.data_ptr() for k, v in net.state_dict().items()}, net[0].weight
    with sample.on_device(net, "meta"):
        assert all(v.is_meta for v in net.state_dict().values())
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == before and net[0].weight is first


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_an_exported_folder_is_a_pipeline_to_draw_from(name, text_bases, encoders, capsys, monkeypatch):
    """Out and in again: transformer and autoencoder in diffusers layout, the text encoders beside them, one --weights."""
    sample.main([*text_bases(name), "--export", "pipe"])
    assert "wrote pipe/transformer/, pipe/vae/" in capsys.readouterr().out
    sample.main([*text_bases(name), "--prompt", "a red cat", "--out", "one"])
    shutil.copytree(encoders / name, "pipe", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="pipe/transformer"):        # never written over
        sample.main([*text_bases(name), "--export", "pipe"])
    flags = ["--base", f"test-{name}", "--weights", "pipe", "--num-steps", "2", "--device", "cpu", "--dtype", "fp32", "--prompt", "a red cat"]
    monkeypatch.setattr(checkpoints, "find_weights", lambda name, spec, path=None, *a, **k: find_weights(name, None, path))     # its own autoencoder, not the preset's
    sample.main([*flags, "--out", "two"])
    one, two = (pictures(k)["00000_seed0.png"].astype(int) for k in ("one", "two"))
    assert np.abs(one - two).max() <= 1 and one.std() > 1


def test_a_run_of_a_text_model_draws_exports_and_takes_a_lora(text_bases, encoders, capsys):
    """What stage 3 will leave of a FLUX: a new embedder and head, and a LoRA, on latents of a deep autoencoder."""
    base, info = load_base("test-flux")
    net = to_deep_model(base, to_deep_latent(base.cfg, ae_config("tiny-dc-ae-f32c32")))
    scramble(net.img_in), scramble(net.final_layer.linear, seed=1)
    add_lora(net, rank=2)
    draw_b(net)
    own = {k: v for k, v in net.state_dict().items() if k.startswith((net.EMBEDDER, net.HEAD)) or k.endswith((".A", ".B"))}
    write_tensors("runs/finetune-test-1/model.safetensors", own, {**info, "kind": "finetune", "model": config_dict(net.cfg), "lora": dict(rank=2, alpha=2), "shift": "flux2"})
    draw = lambda *flags: sample.main([*flags, "--text-encoders", str(encoders / "flux"), "--prompt", "a red cat", "--num-steps", "2", "--device", "cpu", "--dtype", "fp32"])
    draw("--ckpt", "runs/finetune-test-1")
    one = pictures("runs/finetune-test-1/samples")["00000_seed0.png"].astype(int)
    draw("--ckpt", "runs/finetune-test-1", "--dtype", "bf16", "--out", "half")       # the base is known again by its file's own numbers
    draw("--base", "runs/finetune-test-1", "--out", "merged")
    assert np.abs(one - pictures("merged")["00000_seed0.png"]).max() <= 1
    sample.main(["--ckpt", "runs/finetune-test-1", "--export", "pipe", "--device", "cpu", "--dtype", "fp32"])
    assert "wrote pipe/lora/, pipe/transformer/, pipe/vae/" in capsys.readouterr().out
    write_tensors("runs/align-test-1/model.safetensors", {k: v for k, v in own.items() if not k.endswith((".A", ".B"))}, {**info, "kind": "align", "model": config_dict(net.cfg), "shift": "flux2"})
    draw("--ckpt", "runs/align-test-1", "--lora", "pipe/lora", "--out", "lora")
    draw("--ckpt", "runs/align-test-1", "--out", "plain")
    assert np.abs(one - pictures("lora")["00000_seed0.png"]).max() <= 1 and np.abs(one - pictures("plain")["00000_seed0.png"]).mean() > 0.05


def test_a_data_set_is_drawn_in_shares_or_after_a_kill_to_the_same_bytes(words_base, monkeypatch, capsys):
    Path("p.txt").write_text("a small red ring on blue\na large pink cross on green\ntwo small blue squares on red\n")
    draw = lambda out, *more: sample.main(["--base", "test-words", "--prompts", "p.txt", "--count", "6", "--seed", "4", "--num-steps", "2", "--batch", "2", "--dataset",
                                           "--out", out, "--device", "cpu", "--dtype", "fp32", *more])
    read = lambda out: {f.name: f.read_bytes() for f in sorted(Path(out).iterdir()) if f.suffix == ".png"}
    draw("whole")
    entries = [json.loads(line) for line in Path("whole/metadata.jsonl").read_text().splitlines()]
    assert [(e["file_name"], e["text"], e["seed"]) for e in entries[2:4]] == [("00002_seed6.png", "two small blue squares on red", 6), ("00003_seed7.png", "a small red ring on blue", 7)]
    save_one, written = sample.save_png, []
    with monkeypatch.context() as m:
        def dies(*args):
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(save_one(*args))
        m.setattr(sample, "save_png", dies)
        with pytest.raises(KeyboardInterrupt):
            draw("killed")
    assert len(read("killed")) == 3 and not Path("killed/metadata.jsonl").exists()
    with pytest.raises(ValueError, match="this data set is not finished, 3 pictures and no metadata.jsonl"):
        ImageFolder("killed", 64)
    with pytest.raises(ValueError, match="killed holds a data set of another making .seed: 4, now 5.; give another --out"):
        draw("killed", "--seed", "5")
    draw("killed")
    draw("shares", "--shard", "1/2")
    assert len(read("shares")) == 2 and not Path("shares/metadata.jsonl").exists() and "4 pictures are left to other shares" in capsys.readouterr().out
    draw("shares", "--shard", "0/2")
    for out in ("killed", "shares"):
        assert read(out) == read("whole") and Path(out, "metadata.jsonl").read_text() == Path("whole/metadata.jsonl").read_text()
    assert [ImageFolder("whole", 64, captions="txt").caption(i) for i in (0, 5)] == ["a small red ring on blue", "two small blue squares on red"]
    draw("whole")                                                    # it is whole: nothing is drawn again
    assert "wrote 0 pictures" in capsys.readouterr().out
    write_tensors(words_base.weights, scramble(Flux(words_base), seed=5).state_dict())
    with pytest.raises(ValueError, match="whole holds a data set of another making .weights"):
        draw("whole")
    with pytest.raises(ValueError, match="--shard 2/2: give I/N"):
        draw("x", "--shard", "2/2")
    with pytest.raises(ValueError, match="--dataset: name its folder"):
        sample.main(["--base", "test-words", "--prompts", "p.txt", "--dataset"])


def test_a_grid_of_large_pictures_is_of_small_ones():
    x = torch.randn(2, 3, 64, 128)
    assert sample.thumbnails(x) is x and sample.thumbnails(x, 32).shape == (2, 3, 16, 32)
    close(sample.thumbnails(x, 64), F.avg_pool2d(x, 2), 1e-6)


def test_repeated_prompts_keep_their_places_and_every_row_its_guidance(text_bases, encoders):
    text, null = sample.encode("flux", encoders / "flux", [PROMPTS[0], PROMPTS[0], PROMPTS[1]], "", 2.5, 16, torch.float32, "cpu")
    assert torch.equal(text.tokens[0], text.tokens[1]) and off(text.tokens[2], text.tokens[0]) > 0.01 and text.guidance.tolist() == [2.5] * 3
    assert len(null) == 1 and null.guidance is None and sample.pick_prompts(["a", "b"], None, 3) == ["a", "b", "a"]
    assert sample.pick_prompts(["a", "b"], None, 1) == ["a", "b"] and sample.pick_prompts(["a"], None, None) == ["a"]
