"""What bench.py counts, measures and reports: arithmetic against others' counts, the protocol with variants
that stand in for real ones, and the small twins on a CPU."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import bench
from align import RECIPES
from autoencoder import AUTOENCODERS
from bench import SWITCHES, DiffusersVariant, Variant, theory, workloads
from evaluate import token_features
from helpers import fresh_compiler, needs_gpu, relative_error
from model import BASES
from quant import FP8Linear

CPU = torch.device("cpu")
TRACED = dict(backend="eager")


def twins(name, res):
    """Workloads of the small twins, and their models with random weights."""
    pair = workloads(name, res, twin=True)
    return pair, bench.build_pair(pair, CPU, torch.float32)


def run(capfd, *flags):
    """The JSON that bench.py prints last, and all that it prints."""
    bench.main([*flags, "--device", "cpu", "--repeats", "1"])
    printed, errors = capfd.readouterr()
    return json.loads(printed.splitlines()[-1]), printed + errors


# ---- theory --------------------------------------------------------------------------------------

# counted by others: image tokens; TFLOP of a forward pass and of decoding
COUNTS = {
    ("flux-krea", 1024): ((4096, 74.38, 10.47), (1024, 21.5, 11.08)),
    ("flux-krea", 4096): ((65536, 3907.8, 299.5), (4096, 74.39, 190.4)),
    ("sana-1.6b", 1024): ((1024, 2.967, 8.37), (256, 0.837, 11.9)),
    ("dit-xl", 256): ((256, 0.2372, 0.62), (64, 0.0581, 0.69)),
    ("dit-xl", 512): ((1024, 1.0491, 2.51), (256, 0.2373, 2.77)),
}


@pytest.mark.parametrize("name, res", COUNTS)
def test_models_are_as_much_arithmetic_as_others_counted(name, res):
    passes = 1 if name == "flux-krea" else 2
    for work, (tokens, forward, decode) in zip(workloads(name, res), COUNTS[name, res]):
        counted = theory(work)
        assert (counted["tokens"], counted["passes"]) == (tokens, passes)
        assert counted["step_tf"] / passes == pytest.approx(forward, rel=0.01)
        assert counted["decode_tf"] == pytest.approx(decode, rel=0.01)


def test_floors_by_hand():
    """Linear maps at 800 or 1100 TFLOP/s, all else at 800; FLUX at 4K, in 80 GiB."""
    counted = theory(workloads("flux-krea", 4096)[0])
    linear = 20 * 852.8
    rest = 20 * 3055 + 299.5
    assert counted["floor_bf16_s"] == pytest.approx((linear + rest) / 800, rel=0.005)
    assert counted["floor_fp8_s"] == pytest.approx(linear / 1100 + rest / 800, rel=0.005)
    assert counted["memory_gib"] < 80


@pytest.mark.parametrize("name, res, latency, throughput", [
    ("flux-krea", 1024, 4.22, 4.12),
    ("flux-krea", 2048, 16.85, 26.37),
    ("flux-krea", 4096, 52.92, 56.46),
    ("sana-1.6b", 1024, None, 3.94),
    ("sana-4.8b", 1024, None, 3.88),
    ("dit-xl", 256, None, 4.92),
    ("dit-xl", 512, None, 4.74),
])
def test_the_papers_figures_have_the_ratios_that_the_paper_names(name, res, latency, throughput):
    paper = bench.PAPER[name, res]
    assert paper.per_minute[1] / paper.per_minute[0] == pytest.approx(throughput, abs=0.01)
    if latency:
        assert paper.seconds[0] / paper.seconds[1] == pytest.approx(latency, abs=0.01)


def test_dit_at_512_has_a_recipe_of_its_own():
    work, _ = workloads("dit-xl", 512)
    assert RECIPES[work.cfg.recipe].stage3.steps == 100_000


# ---- random weights ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, res", [("flux-krea", 1024), ("sana-1.6b", 1024), ("dit-xl", 256)])
def test_random_weights_are_no_zeros_and_keep_every_block_finite(name, res):
    pair, models = twins(name, res)
    for work, (net, _) in zip(pair, models):
        x = torch.randn(1, work.cfg.in_channels, *work.grid)
        layers = token_features(net, x, torch.tensor([0.5]), bench.random_condition(work.cfg, 1, CPU))
        assert all(0.1 < layer.square().mean().sqrt() < 100 for layer in layers)
        assert all(p.any() for p in net.parameters() if p.ndim > 1)


def test_a_network_that_predicts_noise_stays_finite_on_random_weights():
    """Its velocity is divided by t: from t = 0.006 on, the full DiT-XL's latent used to grow to 250."""
    works = workloads("dit-xl", 256, twin=True)
    pair = [replace(work, cfg=replace(work.cfg, clock="ddpm", predict="epsilon")) for work in works]
    parts = bench.build_pair(pair, CPU, torch.float32)[0]
    assert bench.draw(Variant(pair[0], *parts, ("eager",), num_steps=20))["image"] > 0


@pytest.mark.parametrize("x", [0.0, math.nan, 1e3])
def test_data_that_would_run_fast_is_no_timing(x):
    with pytest.raises(RuntimeError, match="root mean square"):
        bench.check_magnitude("it", torch.tensor([x, x, x, 1e-3]))


# ---- variants draw the same ----------------------------------------------------------------------

def test_every_switch_draws_the_same_picture(fresh_compiler):
    """The rows of the table are one work: FP8 within its error, all others to rounding."""
    pair, models = twins("flux-krea", 1024)
    eager = Variant(pair[1], *models[1], ("eager",), num_steps=3)
    x0 = eager.noise()
    z = eager.denoise(x0)
    pixels = eager.to_host(eager.decode(z)).int()
    for switch in bench.switches_on(CPU):
        on = bench.switches_up_to(switch, CPU)
        variant = Variant(pair[1], *models[1], on, compiler=TRACED, num_steps=3)
        error = bench.relative_error(variant, x0, 3, z)
        drawn = variant.to_host(variant.decode(variant.denoise(x0)))
        is_on = dict(
            hoist=variant.hoisted is not None,
            compile=all(block._compiled_call_impl for block in variant.model.blocks),
            fp8=any(isinstance(m, FP8Linear) for m in variant.model.modules()),
            decoder=any(m._compiled_call_impl for m in variant.ae.decoder.modules()))
        assert is_on == {name: name in on for name in is_on}
        if switch == "fp8":
            assert 1e-4 < error < 0.15
        else:
            assert error < 1e-5, switch
            assert (drawn.int() - pixels).abs().max() <= 1
    # the modules are each variant's own, the tensors all variants' in common
    net = models[1][0]
    assert not any(isinstance(m, FP8Linear) for m in net.modules())
    assert variant.model.embed_linear.weight is net.embed_linear.weight


def test_a_variant_that_does_nothing_is_as_far_from_eager_as_can_be():
    """A graph that recorded nothing used to look fast and sane."""
    x0 = torch.randn(9)
    assert bench.relative_error(Played(), x0, 3, x0 + torch.randn(9)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["flux-krea", "sana-1.6b"])
def test_diffusers_does_the_same_work(name):
    pytest.importorskip("diffusers")
    pair, models = twins(name, 1024)
    for work, parts in zip(pair, models):
        ours = Variant(work, *parts, ("eager",), num_steps=2)
        theirs = DiffusersVariant(work, *parts, num_steps=2)
        x0 = ours.noise()
        z = ours.denoise(x0)
        assert relative_error(theirs.denoise(x0), z) < 1e-3
        assert relative_error(theirs.decode(z).clamp(-1, 1), ours.decode(z)) < 1e-4


TINY_PARTS = {
    "DiT": (replace(BASES["tiny"], clock="ddpm", predict="epsilon"), 128, 2),
    "FLUX": (BASES["tiny-flux"], 128, 2),
    "SANA": (BASES["tiny-sana"], 128, 2),
    "DC-AE": (AUTOENCODERS["tiny-dc-ae-f32c32"], 64, 1),
    "KL-VAE": (AUTOENCODERS["tiny-kl-f8c4"], 64, 1),
}


def test_on_a_cpu_parts_are_timed_beside_diffusers(capfd, monkeypatch, tmp_path):
    """The flag used to time tiny twins there, and to refuse DiT."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "PARTS", TINY_PARTS)
    result, printed = run(capfd, "--against", "diffusers", "--model", "dit-xl", "--out", str(tmp_path / "it"))
    assert [row["part"] for row in result["parts"]] == list(TINY_PARTS)
    for row in result["parts"]:
        assert (row["precision"], row["rounds"], row["notes"]) == ("float32", 1, "")
        assert row["difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["diffusers_ms"] / row["ours_ms"])
    assert json.loads((tmp_path / "it.json").read_text()) == result
    # a table by itself
    assert "beside diffusers' classes" in printed
    assert "NOT GPU figures" not in printed
    assert not any(result[kind] for kind in bench.COLUMNS if kind != "parts")


@pytest.mark.parametrize("theirs, note", [
    (torch.ones(9), ""),
    (torch.ones(9) + 1e-5, ""),
    (torch.cat([torch.ones(8), torch.zeros(1)]), "RETURNS SOMETHING ELSE"),
    (torch.ones(8), "FAILED, RuntimeError"),
    (torch.zeros(9), "FAILED, RuntimeError"),
])
def test_a_part_that_returns_something_else_is_marked(theirs, note, monkeypatch):
    monkeypatch.setattr(bench, "build_both", lambda *args: (lambda: torch.ones(9), lambda: theirs))
    settings = bench.Settings(CPU, torch.float32, ("eager",), TRACED, repeats=1)
    row, = bench.part_rows({"it": (None, 64, 1)}, settings)
    assert note in row["notes"]
    assert bool(note) == bool(row["notes"])


# ---- the protocol, with variants that play their part --------------------------------------------

class Played:
    """Stands in for a Variant: 20 steps in so many seconds each; fails at its n-th call."""
    device = CPU
    num_steps = 20
    work = SimpleNamespace(name="it")

    def __init__(self, fails_at=None, seconds=0.0):
        self.fails_at = fails_at
        self.seconds = seconds
        self.calls = []

    def noise(self):
        return torch.randn(64)

    def denoise(self, x0, steps=None):
        self.calls.append(steps)
        time.sleep(self.seconds * (steps or self.num_steps))
        if len(self.calls) == self.fails_at:
            raise AssertionError("expected size 3==4\nat dim 0")
        return x0

    def decode(self, z):
        return z

    def to_host(self, x):
        return x


def test_parts_and_images_are_summarized_by_hand():
    timings = [dict(denoise=x, decode=1.0, to_host=0.5, image=x + 1.5) for x in (3.0, 1.0, 2.0)]
    assert bench.summarize(timings) == dict(
        denoise_ms=2000.0, decode_ms=1000.0, to_host_ms=500.0, image_s=3.5, p10=2.5, p90=4.5, repeats=3)


def test_ratios_by_hand():
    rows = [
        dict(work="flux-krea", res=1024, switch="graph", image_s=3.0, denoise_ms=2000),
        dict(work="dc-gen-flux-krea", res=1024, switch="graph", image_s=1.0, denoise_ms=500),
        dict(work="dc-gen-flux-krea", res=2048, switch="graph", failed="no"),
    ]
    ratio, = bench.ratios(rows)
    assert (ratio["denoise"], ratio["against_our_base"]) == (4.0, 3.0)
    assert (ratio["against_paper_base"], ratio["paper"]) == (4.65, 4.65 / 1.10)


@pytest.mark.parametrize("change, note", [
    (dict(), ""),
    (dict(tflop_per_s=801.0), "THE BENCHMARK IS WRONG"),
    (dict(tflop_per_s=900.0, precision="fp8", error=0.1), ""),
    (dict(error=0.04), "DRAWS SOMETHING ELSE"),
    (dict(error=math.nan), "DRAWS SOMETHING ELSE"),
    (dict(error=0.2, precision="fp8"), "DRAWS SOMETHING ELSE"),
    (dict(estimated=True, p90=1.03), "THEY SHOULD AGREE"),
])
def test_what_is_wrong_with_a_row_is_noted(change, note):
    row = dict(switch="graph", precision="bfloat16", estimated=False, p10=1.0, p90=1.5)
    row |= dict(error=0.01, tflop_per_s=700.0)
    notes = "; ".join(bench.notes_on(row | change, on_h100=True))
    assert note in notes
    assert bool(note) == bool(notes)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 4])
def test_a_row_that_fails_leaves_the_others_alive(fails_at):
    """While it is made, at its first call, in the first round, in the last. Inductor's stride check raises an
    AssertionError: it used to end the run."""
    def make():
        if fails_at == 0:
            raise AssertionError("expected size 3==4")
        return Played(fails_at)

    rows, variants = bench.measure({"a": Played, "b": make, "c": Played}, 3)
    assert rows["b"] == dict(failed="AssertionError: expected size 3==4")
    assert set(variants) == {"a", "c"}
    assert all(rows[name]["repeats"] == 3 for name in "ac")


@pytest.mark.parametrize("most, left, repeats", [(50, -1, 3), (5, 100, 5)])
def test_rounds_end_in_time_but_not_before_the_third(most, left, repeats):
    rows, _ = bench.measure({"a": Played}, most, until=time.perf_counter() + left)
    assert rows["a"]["repeats"] == repeats


def test_long_steps_are_timed_one_at_a_time_and_scaled_after_a_warm_up():
    rows, variants = bench.measure({"a": partial(Played, None, 0.005)}, 3, warm=0.1, steps=1)
    calls = variants["a"].calls
    assert len(calls) > 4
    assert set(calls) == {1}
    assert rows["a"]["estimated"]
    assert 100 < rows["a"]["denoise_ms"] < 1e3 * rows["a"]["image_s"]


@pytest.mark.parametrize("left, confirmed", [(100.0, True), (0.05, False)])
def test_long_steps_are_confirmed_by_a_full_run_if_there_is_time(monkeypatch, left, confirmed):
    monkeypatch.setattr(bench.Settings, "has_long_steps", lambda self, work: True)
    settings = bench.Settings(CPU, torch.float32, ("graph",), {})
    make = partial(Played, None, 0.005)
    row = bench.time_group({"graph": make}, make(), settings, time.perf_counter() + left)["graph"]
    assert (row.get("full_run_s", 0) > 0.1) == confirmed


@pytest.mark.parametrize("kernels, kind", [
    (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "nvjet_tst_128x256_64x4"], "cuDNN"),
    (["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>"], "flash"),
    (["fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)"], "memory-efficient"),
    (["void cudnn::ops::nchwToNhwcKernel", "triton_poi_fused_gelu_3"], "")])
def test_attention_is_known_by_the_names_of_its_kernels(kernels, kind):
    """cuDNN's kernel used to be counted as flash as well."""
    assert bench.attention_of(kernels) == kind


# ---- the small twins on a CPU --------------------------------------------------------------------

def test_bench_runs_the_twins_on_a_cpu_and_says_so(tmp_path, capfd, fresh_compiler):
    out = str(tmp_path / "b-1.6")
    flags = ["--res", "1024", "--num-steps", "2", "--out", out, "--switches"]
    result, printed = run(capfd, *flags, "fp8", "eager", "graph", "uint8")
    assert "NOT GPU figures" in printed
    assert result == json.loads((tmp_path / "b-1.6.json").read_text())
    assert (tmp_path / "b-1.6.png").stat().st_size > 5000

    rows = result["rows"]
    drawn = [(row["work"], row["switch"]) for row in rows]
    assert drawn == list(product(["dc-gen-tiny-flux", "tiny-flux"], ["eager", "uint8", "fp8"]))
    for row in rows:
        assert row["tflop_per_s"] * row["image_s"] == pytest.approx(row["image_tf"])
        assert row["paper_s"] is None                                # those of full models only
        if row["switch"] != "uint8":                                 # the fastest in its precision
            assert row["notes"] == ""
            continue
        step = row["step"]
        of_kinds = sum(value for key, value in step.items() if key.endswith("_ms") and key != "kernels_ms")
        assert of_kinds == pytest.approx(step["kernels_ms"]) and step["product_ms"] > 0 < step["attention_ms"]
        assert row["notes"].startswith("a step: ") and "product" in row["notes"]
    assert len(result["ratios"]) == 3
    floors = [(floor["work"], floor["paper_s"]) for floor in result["floors"]]
    assert floors == [("flux-krea", 4.65), ("dc-gen-flux-krea", 1.10)]


@pytest.mark.parametrize("error, kept, failed", [
    (torch.OutOfMemoryError("too much"), 3, ["OutOfMemoryError: too much"]),
    (KeyboardInterrupt(), 2, []),
])
def test_what_was_timed_is_kept_when_the_rest_fails_or_is_killed(
        tmp_path, monkeypatch, capfd, error, kept, failed):
    real = Variant.denoise

    def denoise(self, *args):
        if self.work.name == "tiny-flux" and "attention" in self.switches:
            raise error
        return real(self, *args)

    monkeypatch.setattr(Variant, "denoise", denoise)
    flags = ["--res", "1024", "--num-steps", "1", "--switches", "eager", "attention"]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run(capfd, *flags, "--out", str(tmp_path / "b"))
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len([row for row in rows if "image_s" in row]) == kept
    assert [row["failed"] for row in rows if "failed" in row] == failed


def test_few_bits_of_the_twins_beside_the_floors_of_this_machine(capfd):
    """The rows of Table 6, and the same codes with inputs in 16 bits."""
    flags = ["--res", "1024", "--num-steps", "2", "--switches", "eager", "--quant", "nvfp4", "fp8"]
    result, printed = run(capfd, *flags)
    rows = result["quant"]
    own = result["dtype"]
    assert [(row["work"], row["numbers"]) for row in rows] == [
        ("dc-gen-tiny-flux", own), ("tiny-flux", own), ("dc-gen-tiny-flux", "nvfp4 W4A4 rank 32"),
        ("dc-gen-tiny-flux", "nvfp4 W4A16 rank 32"), ("dc-gen-tiny-flux", "fp8")]
    plain, _, rounded, weights_only, fp8 = rows
    for row in rows:
        assert 0 < row["floor_step_ms"] and row["step_ms"] > 0 and row["notes"] == ""
        assert row["floor_s"] > 2e-3 * row["floor_step_ms"]
        assert "paper_s" not in row                                  # those of full models only
    # the fewer bits, the farther from eager; the fewer bytes
    assert 0 < fp8["error"] < rounded["error"] and 0 < weights_only["error"] < rounded["error"] < 0.5
    assert rounded["weights_gb"] == weights_only["weights_gb"] < fp8["weights_gb"] < plain["weights_gb"]
    assert {row["arithmetic"] for row in rows[2:]} == {"turned back into wide numbers at every product"}
    assert "of an RTX 5090 (Table 6)" in printed


def test_table_6_is_the_papers():
    """The speedups that the paper names, from the base to SVDQuant, of a step and of an image."""
    named = {1024: (14.00, 34.35), 2048: (42.40, 57.48), 4096: (120.13, 138.34)}
    for res, (base, _, quantised) in bench.PAPER_5090.items():
        ratios = [a / b for a, b in zip(base, quantised)]
        assert ratios == pytest.approx(named[res], abs=0.01)


@pytest.mark.parametrize("facts, linear_rate, paper", [
    (None, 100e12, (19220, 486.96)),
    (dict(form="nvfp4", rank=32, activations=True), 400e12, (160, 3.52)),
    (dict(form="nvfp4", rank=32, activations=False), 100e12, (160, 3.52)),
    (dict(form="fp8"), 200e12, (None, None)),
    (dict(form="int4", rank=32, activations=True), 100e12, (None, None)),
])
def test_floors_in_few_bits_by_hand(facts, linear_rate, paper):
    """Of 4K on a card of 100, 200 and 400 TFLOP/s: only what it multiplies is faster."""
    work = workloads("flux-krea", 4096)[0]
    facts = facts and {"activations": True, **facts}
    row = dict(denoise_ms=20_000, error=0.1)
    settings = bench.Settings(CPU, torch.bfloat16, SWITCHES, {})
    rates = dict(own=100e12, fp8=200e12, nvfp4=400e12)
    figures = bench.quant_figures(row, work, 0, torch.nn.Linear(2, 2), facts, rates, settings)
    counted = theory(work)
    step = counted["linear_tf"] * 1e12 / linear_rate + (counted["step_tf"] - counted["linear_tf"]) / 100
    assert figures["floor_step_ms"] == pytest.approx(1e3 * step)
    assert figures["floor_s"] == pytest.approx(20 * step + counted["decode_tf"] / 100)
    assert figures["step_ms"] == 1000
    assert (figures.get("paper_step_ms"), figures.get("paper_s")) == paper


@pytest.mark.parametrize("error", [None, math.nan, 0.6])
def test_few_bits_that_draw_something_else_are_noted(error):
    facts = dict(form="int4", rank=32, activations=True)
    settings = bench.Settings(CPU, torch.bfloat16, SWITCHES, {})
    row = dict(denoise_ms=1, error=error)
    work = workloads("flux-krea", 1024, twin=True)[1]
    figures = bench.quant_figures(row, work, 1, torch.nn.Linear(2, 2), facts, dict(own=1e12), settings)
    assert figures["notes"] == "DRAWS SOMETHING ELSE than eager"


def test_a_product_here_has_a_rate():
    rates = bench.product_rates(CPU, torch.float32)
    assert set(rates) == {"own"}
    assert 1e8 < rates["own"] < 1e14


@pytest.mark.parametrize("only, works", [
    ([], ["dc-gen-tiny", "tiny"]),
    (["--only", "dc-gen"], ["dc-gen-tiny"]),
])
def test_throughput_of_the_twins(only, works, capfd):
    flags = ["--model", "dit-xl", "--res", "256", "--num-steps", "2", "--no-latency", "--batches", "3"]
    result, _ = run(capfd, *flags, "--switches", "hoist", *only)
    assert [row["work"] for row in result["throughput"]] == works
    for row in result["throughput"]:
        assert row["denoise_per_min"] > row["with_decode_per_min"] > 0


def test_throughput_uses_every_switch_up_to_the_last_one_and_scales_twenty_steps(monkeypatch, capfd):
    """`--switches fp8` used to time FP8 without anything else."""
    seen = []

    def variant(work, model, ae, switches, batch, compiler, num_steps):
        seen.append((switches, num_steps))
        return Played(seconds=0.002)

    monkeypatch.setattr(bench, "Variant", variant)
    result, _ = run(capfd, "--res", "1024", "--no-latency", "--num-steps", "40", "--batches", "1",
                    "--switches", "hoist", "fp8")
    exact = SWITCHES[:4]
    fp8 = (*SWITCHES[:6], "fp8")
    assert seen == 2 * [(exact, 20), (fp8, 20)]
    assert len(result["throughput"]) == 4
    assert all(row["denoise_per_min"] < 60 / (40 * 0.002) for row in result["throughput"])


def test_training_steps_of_the_twins_and_the_counted_memory_of_stage_3(capfd):
    result, _ = run(capfd, "--model", "flux-krea", "--res", "1024", "--train", "--train-batch", "2")
    rows = result["train"]
    # the full model's
    assert [row["schedule"] for row in rows] == [[20_000, 64], [5_000, 256], [10_000, 256]]
    assert rows[0]["trainable_m"] < rows[1]["trainable_m"] < rows[2]["trainable_m"]
    assert bench.gpu_days(RECIPES["flux"].stage1, 10.0) == 128_000 / 86_400

    # one GPU holds FLUX
    memory = result["memory"][0]
    assert 2 * 11.5e9 / 2**30 < memory["frozen"] < memory["total"] < 70
    assert memory["optimizer"] == 2 * memory["trained"]


# ---- errors --------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--res", "1000"], "needs a multiple of 16; try 992 or 1008"),
    (["--res", "big"], "1024, 2048, 4096\\), or all"),
    (["--train", "--against", "diffusers"], "one of them"),
    (["--train", "--quant"], "one of them"),
    (["--device", "tpu"], "--device tpu: unknown; give cpu"),
    (["--device", "cuda:99"], "--device cuda:99: this "),
    (["--res", "0"], "--res 0: give pixels a side"),
    (["--out", "/dev/null/x"], "--out /dev/null/x.json: /dev/null is a file"),
    (["--device", "cpu", "--switches", "graph"], "needs a GPU")])
def test_what_cannot_be_timed_is_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        bench.main(flags)


def test_on_a_gpu_dit_is_not_compared_with_diffusers():
    args = bench.parser().parse_args(["--model", "dit-xl", "--against", "diffusers", "--device", "cuda"])
    with pytest.raises(ValueError, match="FLUX and SANA are compared"):
        bench.check_args(args)


@pytest.mark.parametrize("flags", [
    "--batches 0", "--num-steps 0", "--repeats -5", "--train-batch 0", "--minutes 0", "--warm nan",
    "--seed -1"])
def test_numbers_are_never_taken_for_the_default(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(flags.split())
    assert capsys.readouterr().err.startswith(f"error: {flags}: ")


def test_results_of_another_command_are_not_written_over(capfd, tmp_path, monkeypatch):
    dates = iter("abc")
    monkeypatch.setattr(bench.time, "strftime", lambda form: next(dates))
    out = str(tmp_path / "v1.0")
    flags = ["--model", "dit-xl", "--no-latency", "--batches", "--out", out]
    run(capfd, *flags)
    run(capfd, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["v1.0.json"]
    _, printed = run(capfd, *flags, "--num-steps", "3")
    assert "v1.0.json holds results of other settings and stays; the new ones go to " in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v1.0-2.json", "v1.0.json"]


# ---- on a GPU ------------------------------------------------------------------------------------

@needs_gpu
def test_the_captured_row_draws_what_eager_draws(capfd, fresh_compiler):
    bench.main(["--res", "1024", "--switches", "eager", "graph", "--repeats", "3", "--warm", "0"])
    rows = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    assert all(row["error"] < 0.03 and row["notes"] == "" for row in rows)
