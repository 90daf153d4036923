from common import *


@pytest.mark.parametrize("name, res", COUNTS)
def test_flux_is_as_much_arithmetic_as_others_counted(name, res):
    floors = [floor(work) for work in workloads(name, res)]
    for got, (tokens, linear, attention, decode) in zip(floors, COUNTS[name, res]):
        assert got["tokens"] + 512 == tokens and abs(got["text"] / 4.853e12 - 1) < 0.005
        for key, want in (("linear", linear), ("attention", attention), ("decode", decode)):
            assert abs(got[key] / 1e12 / want - 1) < 0.005, (key, got[key], want)
        assert got["memory_gib"] < (40 if got["work"].startswith("dc-gen") else 80)
    # seconds at 800 TFLOP/s, and with linear maps at 1100
    want = {1024: ((1.88, 1.47), (0.557, 0.422)), 2048: ((10.52, 9.03), (0.603, 0.468)), 4096: ((98.1, 92.3), (2.104, 1.698))}[res]
    for got, (bf16, fp8) in zip(floors, want):
        assert abs(got["floor_bf16"] / bf16 - 1) < 0.005 and abs(got["floor_fp8"] / fp8 - 1) < 0.005
    paper = bench.PAPER[name, res]
    assert [f["paper_s"] for f in floors] == list(paper["latency"]) and [f["paper_per_min"] for f in floors] == list(paper["throughput"])


@pytest.mark.parametrize("name, res", FORWARDS)
def test_sana_and_dit_are_as_much_arithmetic_as_others_counted(name, res):
    for got, (tokens, forward, decode) in zip([floor(work) for work in workloads(name, res)], FORWARDS[name, res]):
        assert got["tokens"] == tokens and got["passes"] == 2
        assert abs(got["step"] / 2e12 / forward - 1) < 0.01 and abs(got["decode"] / 1e12 / decode - 1) < 0.01, got


def test_the_papers_figures_have_the_ratios_that_the_paper_names():
    named = {("flux-krea", 1024): (4.22, 4.12), ("flux-krea", 2048): (16.85, 26.37), ("flux-krea", 4096): (52.92, 56.46), ("sana-1.6b", 1024): (None, 3.94),
             ("sana-4.8b", 1024): (None, 3.88), ("dit-xl", 256): (None, 4.92), ("dit-xl", 512): (None, 4.74)}
    for key, (latency, rate) in named.items():
        base, dc = bench.PAPER[key].get("latency", (1, 1))
        assert latency is None or abs(base / dc - latency) < 0.01
        assert abs(bench.PAPER[key]["throughput"][1] / bench.PAPER[key]["throughput"][0] - rate) < 0.01, key
    assert bench.PAPER["flux-krea", 4096]["latency"] == (213.81, 4.04) and {key for key, row in bench.PAPER.items() if row["throughput"][0] is None} == set(bench.PAPER) - set(named)


def test_a_network_that_predicts_noise_stays_finite_on_random_weights():
    """Its velocity is divided by t: from t = 0.006 on, the full DiT-XL's latent used to grow to 250."""
    cfg = replace(OLD_DIT, ae="tiny-kl-f8c4", num_classes=1000)
    (net, ae), work = bench.build_pair((bench.Work("old", cfg, 64, 250, 1.5), bench.Work("dc-gen-old", to_deep_latent(cfg, ae_config("tiny-dc-ae-f32c32")), 64, 250, 1.5)),
                                       torch.device("cpu"), torch.float32)[0], bench.Work("old", cfg, 64, 250, 1.5)
    took = train.draw(Drawer(work, net, ae, ("attention", "hoist"), num_steps=20), torch.Generator().manual_seed(0))
    assert took["sum"] > 0


def test_random_weights_are_no_zeros_and_keep_every_block_finite():
    for work in workloads("flux-krea", 1024, twin=True) + workloads("sana-1.6b", 1024, twin=True) + workloads("dit-xl", 256, twin=True):
        net = init_random_(on_meta(FAMILIES[type(work.cfg)], work.cfg), torch.device("cpu"), torch.float32)
        x, taps = torch.randn(1, work.cfg.in_channels, *work.grid), []
        cond = work.condition(1, "cpu")
        c = net.condition(torch.tensor([0.5]), cond, work.grid)
        net.trunk(net.embed(x), c, taps)
        assert all(0.1 < t.square().mean().sqrt() < 100 for t in taps)
        sane("velocity", net(x, torch.tensor([0.5]), cond))
        assert not any((p == 0).all() for k, p in net.named_parameters())


@pytest.mark.parametrize("x", [torch.zeros(4), torch.full((4,), torch.nan), torch.full((4,), 1e3), torch.tensor([1.0, torch.inf])])
def test_data_that_would_run_fast_is_no_timing(x):
    with pytest.raises(RuntimeError, match="root mean square"):
        sane("it", x)


def test_a_shared_copy_has_the_same_tensors_and_modules_of_its_own():
    net = scramble(Flux(TINY_FLUX))
    copy = shared(net)
    assert all(a is b for a, b in zip(net.parameters(), copy.parameters())) and copy.single_blocks[0] is not net.single_blocks[0]
    fp8_linears(copy, r"single_blocks\.0\.linear1") if TINY_FLUX.hidden_size % 16 == 0 else None
    assert isinstance(net.single_blocks[0].linear1, nn.Linear)


def test_every_switch_draws_the_same_picture(fresh_compiler):
    """The rows of the table are one work: FP8 within its error, all others to rounding."""
    work = workloads("flux-krea", 1024, twin=True)[1]
    (_, _), (net, ae) = bench.build_pair(workloads("flux-krea", 1024, twin=True), torch.device("cpu"), torch.float32)
    cond, x0 = work.condition(1, "cpu"), torch.randn(1, 32, 4, 4)
    images = {}
    for s in SWITCHES:
        if s != "graph":
            d = Drawer(work, net, ae, tuple(k for k in bench.up_to(s) if k != "graph"), compiler=dict(backend="eager"), num_steps=3)
            d.cond = cond
            z = d.denoise(x0)
            images[s] = (z.clone(), d.to_host(d.decode(z)))
            on = dict(hoist=d.steps is not None, compile=all(b._compiled_call_impl for b in d.model.blocks), fp8=any(isinstance(m, FP8Linear) for m in d.model.modules()),
                      decoder=any(m._compiled_call_impl for m in d.ae.decoder.modules()))
            assert on == {k: k in bench.up_to(s) for k in on}
    for s, (z, pixels) in images.items():
        assert off(z, images["eager"][0]) < (0.05 if s == "fp8" else 1e-5), s
        assert pixels.dtype == torch.uint8 and pixels.shape == (1, 128, 128, 3)
        assert (pixels.int() - images["eager"][1].int()).abs().max() <= (255 if s == "fp8" else 1)
    assert off(images["fp8"][0], images["eager"][0]) > 1e-4          # and it is really on


@pytest.mark.parametrize("name", ["flux-krea", "sana-1.6b"])
def test_diffusers_does_the_same_work(name):
    pytest.importorskip("diffusers")
    pair = workloads(name, 1024, twin=True)
    for work, (net, ae) in zip(pair, bench.build_pair(pair, torch.device("cpu"), torch.float32)):
        ours, theirs = Drawer(work, net, ae, ("eager",), num_steps=2), DiffusersDrawer(work, net, ae, num_steps=2)
        theirs.cond, x0 = ours.cond, torch.randn(1, work.cfg.in_channels, *work.grid)
        z = ours.denoise(x0)
        assert off(theirs.denoise(x0), z) < 1e-3
        assert off(theirs.decode(z), ours.decode(z)) < 1e-4


def test_spreads_ratios_and_self_checks_by_hand():
    assert spread([3.0, 1.0, 2.0]) == dict(median=2.0, p10=1.0, p90=3.0)
    assert spread([float(i) for i in range(11)]) == dict(median=5.0, p10=1.0, p90=9.0)
    row = lambda work, res, end, tokens, denoise: dict(work=work, res=res, switch="graph", tokens=tokens, sum=dict(median=end), denoise=dict(median=denoise))
    rows = [row("flux-krea", 1024, 3.0, 4096, 2.0), row("dc-gen-flux-krea", 1024, 1.0, 1024, 0.5), row("dc-gen-flux-krea", 4096, 4.0, 4096, 2.02), row("flux-krea", 4096, 140.0, 65536, 139.0)]
    one, four = ratios(rows)
    assert (one["against_our_base"], one["denoise"]) == (3.0, 4.0) and four["against_our_base"] == 35.0 and abs(four["against_paper_base"] - 213.81 / 4.0) < 1e-9
    assert abs(four["paper"] - 52.92) < 0.01 and abs(one["paper"] - 4.227) < 0.01 and "eager" in one["why"]
    assert len(self_checks(rows)) == 1 and "agrees" in self_checks(rows)[0]
    rows[2]["denoise"]["median"] = 2.2
    assert "DIFFERS" in self_checks(rows)[0]


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_row_that_fails_leaves_the_others_alive(fails_at):
    """At its first call, while warming up, or in a round."""
    drawers = {"a": Played(), "b": Played(fails_at), "c": Played()}
    found = bench.measure(drawers, 3, 1e-6)
    assert found["b"] == dict(failed="OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB") and set(drawers) == {"a", "c"}
    assert all(len(drawers[k].calls) == 5 and found[k]["repeats"] == 3 and found[k]["sum"]["median"] > 0 for k in "ac")


def test_rounds_end_in_time_but_not_before_the_third():
    d = Played()
    assert bench.measure({"a": d}, 50, 0.0, until=time.perf_counter() - 1)["a"]["repeats"] == 3 and len(d.calls) == 4
    assert bench.measure({"a": Played()}, 5, 0.0, until=time.perf_counter() + 100)["a"]["repeats"] == 5
    assert 3 < bench.measure({"a": Played(seconds=0.001)}, 500, 0.0, until=time.perf_counter() + 0.3)["a"]["repeats"] < 50


def test_long_steps_are_estimated_from_three_and_confirmed_by_a_full_run_if_there_is_time():
    d = Played(seconds=0.005)
    row = bench.measure_long(d, True)
    assert d.calls == [1, 1, 1, 1, 1, None] and row["estimated"] and row["repeats"] == 3 and 0.1 < row["denoise"]["median"] < row["sum"]["median"] and row["full_run_s"] > 0.1
    assert abs(row["sum"]["median"] / (row["denoise"]["median"] + row["decode"]["median"] + row["uint8"]["median"]) - 1) < 1e-6
    for confirm, until in ((False, math.inf), (True, time.perf_counter() + 0.05)):
        assert "full_run_s" not in bench.measure_long(Played(seconds=0.005), confirm, until=until)


def test_attention_is_told_by_the_names_of_its_kernels():
    """cuDNN's kernel used to be counted as flash as well."""
    assert bench.attention_of(["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"]) == "cuDNN"
    assert bench.attention_of(["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>"]) == "flash"
    assert bench.attention_of(["fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"]) == "memory-efficient"
    assert bench.attention_of(["void cudnn::ops::nchwToNhwcKernel", "triton_poi_fused_gelu_3"]) == ""


def test_bench_runs_the_twins_on_a_cpu_and_says_so(tmp_path, capfd, fresh_compiler):
    bench.main(["--res", "1024", "--device", "cpu", "--num-steps", "2", "--repeats", "1", "--switches", "eager", "uint8", "graph", "fp8", "--out", str(tmp_path / "b-1.6")])
    said, err = capfd.readouterr()
    result = json.loads(said.splitlines()[-1])
    assert "NOT GPU figures" in said and "USDT" not in err and result["gpu_figures"] is False
    assert result == json.loads((tmp_path / "b-1.6.json").read_text()) and (tmp_path / "b-1.6.png").stat().st_size > 5000
    assert {"command", "date", "torch", "device", "dtype", "compile", "rows", "ratios", "throughput", "train", "tables", "checks", "floors"} <= set(result)
    timed, skipped = [r for r in result["rows"] if "sum" in r], [r for r in result["rows"] if "skipped" in r]
    assert [(r["work"], r["switch"]) for r in timed] == [(work, s) for work in ("dc-gen-tiny-flux", "tiny-flux") for s in ("eager", "uint8", "fp8")]
    assert [(r["switch"], r["skipped"]) for r in skipped] == [("graph", "needs a GPU")]
    for r in timed:
        assert r["sum"]["median"] > 0 and abs(r["sum"]["median"] / sum(r[k]["median"] for k in ("denoise", "decode", "uint8")) - 1) < 1e-6
        assert abs(r["tflop_per_s"] * r["sum"]["median"] / r["tflops"] - 1) < 1e-6 and r["tflops"] > 0
        assert {"p10", "p90"} <= set(r["denoise"]) and r["compile_s"] >= 0 and r["num_steps"] == 2 and (r["text_s"] is None or r["text_s"] > 0)
        assert r["paper_s"] is None and r["floor_s"] is None                                # the paper's figures stand beside full models only
    assert [(f["work"], f["paper_s"]) for f in result["floors"]] == [("flux-krea", 4.65), ("dc-gen-flux-krea", 1.10)]
    profiled = [r for r in timed if "profile" in r]
    assert [r["switch"] for r in profiled] == ["uint8", "uint8"] and all(len(r["profile"]["step"]) == len(r["profile"]["decode"]) == 5 and r["profile"]["attention"] == "flash" for r in profiled)
    assert {r["switch"] for r in result["ratios"]} == {"eager", "uint8", "fp8"} and all(r["paper"] is None for r in result["ratios"])


def test_what_was_timed_is_kept_when_the_rest_fails_or_is_killed(tmp_path, capsys, monkeypatch):
    real, flags = Drawer.denoise, ["--res", "1024", "--device", "cpu", "--num-steps", "1", "--repeats", "1", "--switches", "eager", "attention", "--no-profile", "--out", str(tmp_path / "b")]

    def denoise(self, *args):
        if self.work.name == "tiny-flux" and "attention" in self.switches:
            raise error
        return real(self, *args)
    monkeypatch.setattr(Drawer, "denoise", denoise)
    error = torch.OutOfMemoryError("too much")
    with pytest.raises(SystemExit, match="1 rows failed"):
        bench.main(flags)
    said = capsys.readouterr().out
    assert "tiny-flux 128, attention: FAILED, OutOfMemoryError: too much" in said
    assert [(r["work"], r["switch"], "sum" in r) for r in json.loads((tmp_path / "b.json").read_text())["rows"]] == [
        ("dc-gen-tiny-flux", "eager", True), ("dc-gen-tiny-flux", "attention", True), ("tiny-flux", "eager", True), ("tiny-flux", "attention", False)]
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.main(flags)
    assert [r["work"] for r in json.loads((tmp_path / "b.json").read_text())["rows"]] == ["dc-gen-tiny-flux"] * 2


def test_bench_times_throughput_training_and_rates_of_the_twins(capsys, fresh_compiler):
    last = lambda: json.loads(capsys.readouterr().out.splitlines()[-1])
    bench.main(["--model", "dit-xl", "--res", "256", "--device", "cpu", "--num-steps", "2", "--repeats", "1", "--switches", "hoist", "--batches", "1", "3", "--no-latency"])
    result = last()
    assert result["rows"] == [] and [(r["work"], r["batch"]) for r in result["throughput"]] == [("dc-gen-tiny", 1), ("dc-gen-tiny", 3), ("tiny", 1), ("tiny", 3)]
    for r in result["throughput"]:
        assert r["denoise_per_min"] > r["with_decode_per_min"] > 0 and abs(r["forwards_per_s"] / (r["denoise_per_min"] / 60 * 2 * 2) - 1) < 1e-6
    bench.main(["--model", "flux-krea", "--res", "1024", "--device", "cpu", "--train", "--repeats", "1"])
    result = last()
    memory, rows = result["memory"][0], result["train"]
    parts = [memory[k] for k in ("frozen", "trained", "gradients", "optimizer", "average", "activations")]
    assert memory["total"] == sum(parts) < 80e9 and memory["frozen"] > 2 * 11.5e9 and memory["optimizer"] == 2 * memory["trained"]    # one GPU holds FLUX
    assert [r["stage"][0] for r in rows] == ["1", "2", "3"] and all(r["images_per_s"] > 0 and r["h100_days"] is None for r in rows)
    assert [r["schedule"] for r in rows] == [[20000, 64], [5000, 256], [10000, 256]] and rows[0]["trainable"] < rows[1]["trainable"] < rows[2]["trainable"]
    assert bench.days((20_000, 64), 10.0) == 128_000 / 86_400
    assert bench.MODELS["dit-xl"].schedule[512] == ((50000, 64), (20000, 1024), (100000, 1024))
    bench.main(["--tables", "--model", "dit-xl", "--res", "256", "--device", "cpu"])
    rows = last()["tables"]
    assert {r["table"] for r in rows} == {"products", "attention", "decoder stages"} and all(r["ms"] > 0 for r in rows)


def test_throughput_uses_every_switch_up_to_the_last_one_named_and_scales_twenty_steps(monkeypatch, capsys):
    """`--switches fp8` used to time FP8 without anything else."""
    seen = []
    monkeypatch.setattr(bench, "Drawer", lambda work, model, ae, switches, batch, compiler, num_steps, made: seen.append((switches, num_steps)) or Played(seconds=0.002))
    bench.main(["--res", "1024", "--device", "cpu", "--repeats", "1", "--no-latency", "--num-steps", "40", "--switches", "hoist", "fp8", "--batches", "1"])
    assert seen == 2 * [(("eager", "attention", "compile", "hoist"), 20), (("eager", "attention", "compile", "hoist", "decoder", "uint8", "fp8"), 20)]
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])["throughput"]
    assert len(rates) == 4 and all(r["denoise_per_min"] < 60 / (40 * 0.002) for r in rates)


def test_bench_says_what_it_cannot_time(capsys):
    for flags, said in ((["--res", "1000"], "512, 1024, 2048, 4096"), (["--res", "big"], "or all"), (["--model", "dit-xl", "--res", "4096"], "timed at 256, 512"),
                        (["--model", "dit-xl", "--against", "diffusers"], "FLUX and SANA are compared"), (["--train", "--tables"], "one of them"),
                        (["--device", "tpu"], "cpu or cuda"), (["--device", "cpu", "--switches", "graph"], "needs a GPU")):
        with pytest.raises(ValueError, match=said):
            bench.main(flags)
    for flag in ("--repeats", "--num-steps", "--batches", "--train-batch", "--minutes"):
        with pytest.raises(SystemExit):
            bench.main([flag, "0"])
        assert f"argument {flag}: invalid positive" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("name", EVERY)
def test_a_captured_step_is_the_plain_loop(name):
    net, cond, x = fast_case(name)
    net, cond, x = net.cuda(), cond.to("cuda"), x.cuda()
    if net.null is not None:
        net.null = net.null.to("cuda")
    times = time_grid(6)
    steps = Steps(net, cond, x.shape, times, 2.5, graph=True)
    close(steps(x), integrate(lambda x, t: guided_velocity(net, x, t, cond, 2.5), x, times), 1e-4)
    again = steps(x).clone()
    steps(torch.randn_like(x)), close(steps(x), again, 0)             # nothing is left over from another picture


@needs_gpu
@pytest.mark.parametrize("tokens", [768, 1000, 1536, 4608])
def test_cudnns_attention_is_what_runs_and_it_is_right(tokens):
    q, k, v = (torch.randn(1, 24, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with fast.attention_priority(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        out = F.scaled_dot_product_attention(q, k, v)
    assert any("cudnn" in e.key.lower() for e in p.key_averages()), [e.key for e in p.key_averages()]
    assert off(out, torch.softmax(q.float() @ k.float().transpose(-1, -2) / 128**0.5, -1) @ v.float()) < 0.01


@needs_gpu
def test_a_channels_last_decoder_converts_no_layouts():
    work = workloads("flux-krea", 1024)[1]
    ae = init_random_(on_meta(DCAE, ae_config(work.cfg.ae)), torch.device("cuda"), torch.bfloat16).to(memory_format=torch.channels_last)
    compile_decoder(ae)
    z = torch.randn(1, 32, 32, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    ae.decode(z)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        ae.decode(z)
    moved = [e.key for e in p.key_averages() if "nchwToNhwc" in e.key or "nhwcToNchw" in e.key]
    assert not moved, moved


@needs_gpu
def test_compiled_fp8_blocks_err_by_five_percent_a_step_at_most(fresh_compiler):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that multiplies FP8")
    cfg = BASES["tiny-flux"]
    net = scramble(Flux(cfg)).cuda().bfloat16()
    fast, x, t, cond = shared(net), torch.randn(2, cfg.in_channels, 16, 16, device="cuda"), torch.tensor([0.2, 0.7], device="cuda"), condition_of(cfg).to("cuda", torch.bfloat16)
    fp8_linears(fast)
    fast.compile_layers(fast.blocks)
    assert off(fast(x.bfloat16(), t, cond), net(x.bfloat16(), t, cond)) < 0.05
