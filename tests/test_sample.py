from common import *


def test_path_is_noise_at_0_and_data_at_1():
    x0, x1 = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    xt, v = path(x0, x1, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[1], x1[1]) and torch.equal(v, x1 - x0)
    torch.testing.assert_close(xt[2], 0.75 * x0[2] + 0.25 * x1[2])


def test_one_euler_step_along_the_oracle_velocity_returns_the_data():
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    close(integrate(lambda x, t: path(x0, x1, t)[1], x0, [0.0, 1.0]), x1, 1e-6)
    oracle = lambda x, t: (x1 - x) / (1 - t).view(-1, 1, 1, 1)       # knows the data, not the noise
    for times in (time_grid(1), time_grid(7), time_grid(7, 2.83)):
        close(integrate(oracle, x0, times), x1, 1e-5)
    assert off(integrate(lambda x, t: -oracle(x, t), x0, time_grid(1)), x1) > 1


def test_heun_is_of_second_order():
    """dx/dt = x cos(5t): x(1) = x(0) exp(sin(5) / 5)."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    error = lambda method, n: (integrate(lambda x, t: SimpleNamespace(float=lambda: x * math.cos(5 * t.double().item())), x, time_grid(n), method) - math.exp(math.sin(5) / 5)).abs().item()
    for method, k in (("euler", 1), ("heun", 2)):
        rate = math.log2(error(method, 64) / error(method, 128))
        assert k - 0.2 < rate < k + 0.2, (method, rate)


def test_the_shift_moves_noise_levels_as_published():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for r in (0.5, 1, 2.83, 8):
        s = 1 - t
        torch.testing.assert_close(1 - shift_time(t, r), r * s / (1 + (r - 1) * s))
    u = torch.rand(10000)
    assert torch.equal(shift_time(u, 1.0), u)
    for n, r in ((1, 3), (20, 2.8284), (7, 1 / 3)):
        grid = time_grid(n, r)
        assert len(grid) == n + 1 and grid[0] == 0 and grid[-1] == 1 and grid == sorted(grid)


def test_time_grids_are_the_official_schedules():
    file = SHARED / "parity/dcgen_schedules.a.json"
    if not file.exists():
        pytest.skip("needs ../shared/parity")
    for s in json.loads(file.read_text())["schedules"]:
        shift = s["r"] if s["kind"] == "flux2_r" else math.exp(s["mu"])
        got = [1 - t for t in time_grid(s["steps"], shift)]
        assert max(abs(a - b) for a, b in zip(got, s["sigmas"], strict=True)) < 1e-6, s["size"]


@pytest.mark.parametrize("shift", [1.0, 2.83])
def test_training_times_are_distributed_as_the_sampling_grid(shift):
    g = torch.Generator().manual_seed(0)
    t = sample_t(100_000, g, "uniform", shift).sort().values
    grid = torch.tensor(time_grid(99_999, shift)).float()
    assert (t - grid).abs().max() < 0.01
    z = torch.logit(sample_t(100_000, g, "logit-normal", 1.0).double())
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    shifted = torch.logit(sample_t(100_000, g, "logit-normal", shift).double())      # the shift is a translation of the logit
    assert abs(shifted.mean() + math.log(shift)) < 0.02 and abs(shifted.std() - 1) < 0.02


def test_guidance_extrapolates_from_the_null_class_and_scale_1_is_one_pass():
    net, x, t, y = Toy(4), torch.randn(2, 4, 3, 3), torch.tensor([0.2, 0.4]), torch.tensor([0, 3])
    assert torch.equal(guided_velocity(net, x, t, y, 1.0), net(x, t, y)) and net.calls[0][0] == 2
    cond, null = net(x, t, y), 10 * x
    for scale in (0.0, 2.0, 3.5):
        close(guided_velocity(net, x, t, y, scale), null + scale * (cond - null), 1e-6)
    assert net.calls[-1] == (4, pytest.approx([0.2, 0.4, 0.2, 0.4]), [0, 3, 9, 9])
    close(guided_velocity(net, x, t, y, 2.0, null=torch.tensor([1, 1])), 2 * cond - 2 * x, 1e-6)


def test_dit_as_published_guides_three_channels_and_a_converted_one_all_but_its_variance():
    x, t, y = torch.randn(2, 4, 3, 3), torch.zeros(2), torch.tensor([0, 3])
    for net, k in ((Toy(4, guided_channels=3), 3), (Toy(4, out=8, guided_channels=3), 3), (Toy(4), 4), (Toy(4, out=8), 4)):
        got, cond = guided_velocity(net, x, t, y, 3.0), net(x, t, y)
        null = net(x, t, net.null_condition(y))
        close(got[:, :k], (3 * cond - 2 * null)[:, :k], 1e-6)
        assert torch.equal(got[:, k:], cond[:, k:])
    assert BASES["dit-xl"].guided_channels == 3 and to_deep_latent(BASES["dit-xl"], ae_config("dc-ae-f32c32-in-1.0")).guided_channels is None


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
def test_guidance_matches_the_official_code(name):
    net, x, out, _ = official_dit(name)
    half = lambda k: x[k].chunk(2)
    got = guided_velocity(net, half("cfg_x")[0], half("cfg_t")[0], half("cfg_y")[0], 3.0, null=half("cfg_y")[1], call=net.forward_native)
    close(got, out["forward_with_cfg"].chunk(2)[0])
    assert torch.equal(net.null_condition(half("cfg_y")[0]), half("cfg_y")[1])


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
def test_the_ddpm_chain_matches_the_official_code(name):
    net, x, out, _ = official_dit(name)
    chain = Chain()
    close(chain.ab, out["alphas_cumprod"], 1e-6), close(chain.log_var, out["posterior_log_variance_clipped"], 1e-6)
    close(chain.add_noise(x["loss_x0"], x["loss_noise"], x["loss_t"]), out["loss_xt"], 1e-6)
    mean, log_var, x1 = chain.predict(net.forward_native(x["pmv_x"], x["pmv_t"], x["pmv_y"]), x["pmv_x"], x["pmv_t"])
    close(mean, out["pmv_mean"]), close(log_var, out["pmv_log_variance"]), close(log_var.exp(), out["pmv_variance"]), close(x1, out["pmv_pred_xstart"])


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
def test_the_ddpm_loss_matches_the_official_code(name):
    net, x, out, _ = official_dit(name)
    assert 0 in x["loss_t"]                                          # the decoder's term is among them
    mse, bound = ddpm_loss(net, Chain(), x["loss_x0"], x["loss_t"], x["loss_y"], x["loss_noise"])
    close(mse, out["loss_mse"]), close(bound, out["loss_vb"]), close(mse + bound, out["loss_loss"])


def test_the_variational_bound_teaches_the_variance_only():
    net = scramble(DiT(OLD_DIT)).requires_grad_(True)
    z, x0, i, y = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 500, 999]), torch.tensor([0, 1, 2, 8])
    last = net.final_layer.linear
    grad = lambda loss: torch.autograd.grad(loss.sum(), last.bias, retain_graph=True)[0].view(4, 2, 4)       # patch, epsilon or variance, channel
    mse, bound = ddpm_loss(net, Chain(), z, i, y, x0)
    assert grad(mse)[:, 0].ne(0).all() and grad(mse)[:, 1].eq(0).all()
    assert grad(bound)[:, 0].eq(0).all() and grad(bound)[:, 1].ne(0).all()


@pytest.mark.parametrize("name", ["dit", "dit_patch1"])
@pytest.mark.parametrize("kind", ["even8", "stride8"])
def test_ddim_sampling_matches_the_official_code(name, kind):
    net, x, out, info = official_dit(name)
    chain, steps = Chain.spaced(8, ddim=kind == "stride8"), []
    assert chain.steps == info["respacing"]["ddim8" if kind == "stride8" else "8"]
    chain.sample(lambda x_, clock: guided_velocity(net, x_, clock, x["ddim_y"], info["cfg_scale"], call=net.forward_native), x["ddim_xT"], ddim=True, each=steps.append)
    for got, want in zip(steps, out[f"ddim_{kind}_steps"], strict=True):
        close(got, want, 1e-4)


def test_spaced_chains_keep_the_official_steps_and_their_noise_levels():
    file = SHARED / "parity/dit.a.json"
    if file.exists():
        lists = json.loads(file.read_text())["timestep_lists_other"]
        even, ddim = Chain.spaced(250).steps, Chain.spaced(50, ddim=True).steps
        assert even[:10] == lists["250_first10"] and even[-3:] == lists["250_last3"] and ddim[:5] == lists["ddim50_first5"] and ddim[-1] == lists["ddim50_last"]
    assert Chain.spaced(7, ddim=True).steps == list(range(0, 1000, 143)) and Chain.spaced(1).steps == [0]
    for n in (1, 2, 3, 250, 1000):
        chain = Chain.spaced(n)
        assert len(chain.steps) == n == len(set(chain.steps)) and torch.equal(chain.ab, ddpm_alphas_cumprod()[chain.steps]) and chain.log_var.isfinite().all() and len(chain.log_var) == n
    for n, ddim, match in ((300, True, "--num-steps 300.*nearest is 250"), (0, False, "1 .. 1000"), (1001, False, "1 .. 1000")):
        with pytest.raises(ValueError, match=match):
            Chain.spaced(n, ddim)


def test_ancestral_sampling_draws_the_distribution_it_was_trained_on():
    """With the exact epsilon of data N(1, 0.5^2), and the lower bound as variance."""
    chain, generators = Chain(), [torch.Generator().manual_seed(s) for s in range(4)]

    def forward_native(x, clock):
        ab = chain.ab[int(clock[0])].item()
        data = 1 + (0.25 * ab**0.5) / (0.25 * ab + 1 - ab) * (x - ab**0.5)
        return torch.cat([(x - ab**0.5 * data) / (1 - ab) ** 0.5, torch.zeros_like(x)], dim=1)

    x = chain.sample(network, noise(generators, (4, 16, 16)), False, generators)
    assert abs(x.mean() - 1) < 0.05 and abs(x.std() - 0.5) < 0.05


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "ddpm"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(sampler):
    net, ae = scramble(DiT(OLD_DIT)), scramble(KLVAE(TINY_KL))
    y = torch.tensor([0, 5, 2, 7])
    draw = lambda y, seeds, batch=64: generate(net, ae, y, seeds, 4, 2.0, sampler, size=(16, 24), batch=batch)
    four = draw(y, [7, 8, 9, 10])
    assert four.shape == (4, 3, 16, 24) and four.abs().max() <= 1
    for i in range(4):
        close(draw(y[i : i + 1], [7 + i])[0], four[i], 1e-4)
    close(draw(y, [7, 8, 9, 10], batch=3), four, 1e-4)
    assert off(draw(y, [7, 8, 9, 11])[3], four[3]) > 0.01


def test_the_noise_of_ancestral_steps_is_not_the_first_noise_again():
    g = [torch.Generator().manual_seed(0)]
    a, b = noise(g, (4, 8, 8)), noise(g, (4, 8, 8))
    assert abs((a * b).mean()) < 0.2
    used = []
    chain = Chain.spaced(3)
    chain.predict = lambda out, x, i: (used.append(x), (torch.zeros_like(x), torch.zeros_like(x), x))[1]
    g = [torch.Generator().manual_seed(0)]
    chain.sample(lambda x, clock: torch.cat([x, x], dim=1), noise(g, (4, 8, 8)), False, g)
    assert torch.equal(used[0], a) and torch.equal(used[1], b) and abs((used[1] * used[2]).mean()) < 0.2


def test_pixels_are_rounded_and_survive_a_round_trip(tmp_path):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(torch.from_numpy(to_uint8(levels / 127.5 - 1)).permute(0, 3, 1, 2), levels.byte())
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    y = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).double() / 127.5 - 1
    assert (x - y).abs().max() <= 0.5 / 127.5 + 1e-6 and abs((x - y).mean()) < 2e-4   # truncation would be off by 4e-3 on average
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    save_png(tmp_path / "a/b.png", to_uint8(levels / 127.5 - 1)[0], {"class": "stern", "seed": "7", "dcgen": {"sampler": "euler", "cfg_scale": 3.0}})
    from PIL import Image
    with Image.open(tmp_path / "a/b.png") as im:
        assert im.info["class"] == "stern" and im.info["seed"] == "7" and json.loads(im.info["dcgen"]) == {"sampler": "euler", "cfg_scale": 3.0}
    assert torch.equal(load_image(tmp_path / "a/b.png", 16), levels[0] / 127.5 - 1)


def test_a_size_that_does_not_divide_names_those_that_do():
    net, ae = on_meta(DiT, TINY_DIT), on_meta(KLVAE, TINY_KL)        # cells of 4 pixels, patches of 2
    draw = lambda size: generate(net, ae, torch.tensor([0]), [0], 1, size=size)
    for size, said in (((100, 100), "--res 100: test-kl with patch 2 needs a multiple of 8; try 96 or 104"), ((96, 100), "--res 100x96.*try 96 or 104x96"), ((5, 5), "try 8$")):
        with pytest.raises(ValueError, match=said):
            draw(size)


def test_samplers_that_do_not_fit_the_model_are_refused():
    net, ae = on_meta(DiT, TINY_DIT), on_meta(KLVAE, TINY_KL)
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(ValueError, match=f"--sampler {sampler} is for a model that predicts epsilon.*use euler or heun"):
            generate(net, ae, torch.tensor([0]), [0], sampler=sampler)
    with pytest.raises(ValueError, match="--num-steps 0"):
        generate(net, ae, torch.tensor([0]), [0], 0)


def test_classes_are_names_or_numbers():
    assert parse_classes(None, SHAPES, 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert parse_classes(["star", "2"], SHAPES, 5).tolist() == [5, 2, 5, 2, 5] and parse_classes(["1", "2", "3"], SHAPES, 1).tolist() == [1, 2, 3]
    assert parse_classes(["7"], ("3", "7", "1"), 1).tolist() == [1]  # a folder's name goes first
    for bad, match in (("moon", "--classes moon: not a class; give 0 .. 7 or circle, square"), ("8", "0 .. 7"), ("-1", "0 .. 7"), ("²", "0 .. 7")):
        with pytest.raises(ValueError, match=match):
            parse_classes([bad], SHAPES, 1)
    with pytest.raises(ValueError, match="--count 0"):
        parse_classes(None, SHAPES, 0)


def test_a_run_loads_as_the_model_that_was_saved(tiny):
    aligned = deep(tiny)
    part = write_run("align-test-1", aligned, trained_part)
    tuned = deep(tiny, 2)
    add_lora(tuned, rank=2, alpha=3)
    draw_b(tuned)
    lora = write_run("finetune-test-1", tuned, trained_part, kind="finetune", lora=dict(rank=2, alpha=3))
    new = scramble(DiT(DEEP), seed=5)
    full = write_run("finetune-test-2", new, lambda k: True, kind="finetune")
    for run, net in ((part, aligned), (lora, tuned), (to_float32, new)):
        got, info = load_run(run)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in got.state_dict().items()) and not got.training and info["base"] == "test"
        close(got(*Z), net(*Z), 1e-6)                                # memory of another alignment may round differently
    base, info = load_base(str(lora))                                # a finished run is a base, its LoRA merged
    close(base(*Z), tuned(*Z), 1e-5)
    assert not lora_state(base) and "lora" not in info and info["base"] == str(lora) and info["classes"] == list(SHAPES)
    again = write_run("align-next-1", deep(base, 9), trained_part, **info)         # and the next stage starts from it
    assert off(load_run(again)[0](*Z), tuned(*Z)) > 1e-3


def test_sampling_takes_the_moving_average_unless_told(tiny):
    run = write_run("align-test-1", deep(tiny, 1), trained_part)
    average = deep(tiny, 2)
    write_tensors(run / "ema.safetensors", {k: v for k, v in average.state_dict().items() if trained_part(k)}, read_config(run / "model.safetensors"))
    embedder = lambda **kw: load_run(run, **kw)[0].x_embedder.proj.weight
    assert torch.equal(embedder(), average.x_embedder.proj.weight) and not torch.equal(embedder(ema=False), embedder())
    assert torch.equal(load_run(run / "model.safetensors")[0].x_embedder.proj.weight, embedder(ema=False))


def test_a_part_of_a_model_is_loaded_strictly(tiny):
    """A LoRA without its embedder and head means nothing in the new latent space, and draws rubbish without an error."""
    model = add_lora(tuned := to_deep_model(tiny, DEEP), rank=2) and tuned
    whole = {k: v for k, v in model.state_dict().items() if trained_part(k)}
    load_part(model, whole)
    for gone in ("x_embedder.proj.bias", "final_layer.linear.weight", "blocks.1.mlp.fc2.B", "blocks.0.attn.qkv.A"):
        with pytest.raises(ValueError, match=f"1 tensors missing.*{gone}"):
            load_part(model, {k: v for k, v in whole.items() if k != gone})
    with pytest.raises(ValueError, match="does not have in that shape: blocks.9.x"):
        load_part(model, whole | {"blocks.9.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="in that shape: x_embedder.proj.bias"):
        load_part(model, whole | {"x_embedder.proj.bias": torch.zeros(3)})
    run = write_run("finetune-test-1", model, lambda k: k.endswith((".A", ".B")), lora=dict(rank=2, alpha=2))
    with pytest.raises(ValueError, match="4 tensors missing that no base has"):
        load_run(run)


def test_a_run_knows_its_base(tiny, tmp_path):
    _, info = load_base("test")
    run = write_run("align-test-1", to_deep_model(tiny, DEEP), trained_part, **info)
    load_run(run), load_run(run, dtype=torch.bfloat16)                # in whatever precision it is wanted
    moved = tmp_path / "elsewhere.safetensors"
    Path("base.safetensors").rename(moved)
    with pytest.raises(ValueError, match="should come with this repository|no such"):
        load_run(run)
    load_run(run, base_weights=str(moved))
    write_tensors("base.safetensors", scramble(DiT(TINY_DIT), seed=3).state_dict())
    with pytest.raises(ValueError, match="was trained from another test than the one found now"):
        load_run(run)


def test_a_model_that_cannot_be_found_is_one_clear_error(tiny):
    with pytest.raises(ValueError, match="--base dit-xll: not a preset .tiny, dit-xl, .*not the folder of a run"):
        load_base("dit-xll")
    Path("runs/align-test-9").mkdir(parents=True)
    with pytest.raises(ValueError, match="align-test-9 holds no finished run"):
        load_run("runs/align-test-9")
    for missing in ("runs/gone", "runs/gone.safetensors"):
        with pytest.raises(ValueError, match="gone.*no such"):
            load_run(missing)
    with pytest.raises(ValueError, match="base.safetensors is not a run's file; an official weight file goes to --weights"):
        load_run("base.safetensors")
    with pytest.raises(ValueError, match="give one of them"):
        sample.main(["--base", "test", "--ckpt", "runs/align-test-9"])


def test_the_newest_run_is_found_by_its_facts(tiny):
    """dit-xl-512 is a base of its own, and no run of dit-xl: the folder names of the two look alike."""
    net = deep(tiny)
    assert newest_run() is None
    for k, (folder, facts) in enumerate((("align-test-1", {}), ("mine", dict(kind="finetune")), ("align-test-512-1", dict(base="test-512")), ("noalign-test-1", dict(kind="noalign")))):
        file = write_run(folder, net, trained_part, **facts) / "model.safetensors"
        os.utime(file, (1e9 + k, 1e9 + k))
    (Path("runs/align-test-7")).mkdir()                              # unfinished
    find = lambda *kinds: newest_run(kinds=kinds) and newest_run(kinds=kinds).name
    assert find("align-test") == "align-test-1" and find("align") == "align-test-512-1" and find("finetune-test") == "mine" and find("scratch") is None
    assert newest_run().name == "align-test-512-1"


def test_sample_writes_pictures_that_say_how_they_were_made(tiny, capsys):
    from PIL import Image
    sample.main(["--base", "test", "--count", "3", "--num-steps", "2", "--classes", "star", "circle", "--seed", "5", "--batch", "2", "--device", "cpu", "--dtype", "fp32", "--weights", "base.safetensors"])
    files = sorted(p.name for p in Path("runs/samples-test").iterdir())
    assert files == ["00000_seed5.png", "00001_seed6.png", "00002_seed7.png"] and Path("runs/samples-test-grid.png").is_file()
    with Image.open(f"runs/samples-test/{files[1]}") as im:
        assert im.size == (64, 64) and im.info["class"] == "circle" and im.info["seed"] == "6"
        assert json.loads(im.info["dcgen"]) | {"model": None} == dict(sampler="euler", num_steps=2, cfg_scale=3.0, shift=1.0, weights="test", model=None)
    # the newest run is the default; --out and a run's classes cannot lead a file name astray
    write_run("align-test-1", deep(tiny), trained_part, classes=["../../x", *SHAPES[1:]], shift=2.0)
    sample.main(["--count", "1", "--num-steps", "1", "--device", "cpu", "--dtype", "fp32"])
    assert [p.name for p in Path("runs/align-test-1/samples").iterdir()] == ["00000_seed0.png"]
    assert "weights as trained, base test, latents of tiny-dc-ae-f32c32" in capsys.readouterr().out
    with Image.open("runs/align-test-1/samples/00000_seed0.png") as im:
        assert im.info["class"] == "../../x" and json.loads(im.info["dcgen"])["shift"] == 2.0
    sample.main(["--base", "runs/align-test-1", "--count", "1", "--num-steps", "1", "--device", "cpu", "--dtype", "fp32"])
    assert Path("runs/samples-align-test-1/00000_seed0.png").is_file()
    assert {p.suffix for p in Path(".").rglob("*") if p.is_file()} == {".png", ".safetensors"} and not list(Path("..").glob("x*"))
