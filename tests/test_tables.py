"""The paper's tables and figures: each runs end to end and goes on where it was killed; a finished one is
only printed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
import shapes
import train
from checkpoints import read_config, read_tensors, run_file
from data import ImageFolder
from experiments import (
    alignment_cost, autoencoder_table, convergence, gap, guidance, harness, ranks, solvers,
    strategies_table)
from helpers import digest, tiny_base, words_base  # noqa: F401
from model import BASES
from test_trust import interrupted

SMALL = ("--pictures 8 --batch 4 --warmup 0 --num-steps 2 --dtype fp32 --device cpu --steps 0.001 --count 8 "
         "--seeds 0 --out table").split()
CLASSES = ["--base", "test", *SMALL]
WORDS = ["--base", "test-words", "--shift", "1", *SMALL]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """2048 pictures of reference and a plot of every run's curves take seconds."""
    make = evaluate.make_metrics

    def make_of_few(file, folder, source, count, captions):
        source.length = 64
        return make(file, folder, source, count, captions)

    monkeypatch.setattr(evaluate, "make_metrics", make_of_few)
    monkeypatch.setattr(train, "plot_curves", lambda *args: None)


@pytest.fixture
def base(tiny_base, monkeypatch):
    """A small base of the bundled one's recipe."""
    monkeypatch.setitem(BASES, "test", replace(BASES["test"], recipe="tiny"))


def result(name: str) -> dict:
    return json.loads(Path(f"table/{name}.json").read_text())


def rows_of(name: str) -> list[str]:
    """The rows of a table; all of their numbers are some."""
    found = result(name)
    for row in found["rows"]:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    assert found["command"].startswith(name) and found["minutes"] > 0 and found["device"]
    return [row["row"] for row in found["rows"]]


@pytest.mark.parametrize("flags, joint, steps", [
    ([], False, 0),
    ([], True, 3),
    (["--solver=adamw"], False, 10),
    (["--head-samples", "0"], False, 10),
])
def test_stage_2_trains_what_is_not_solved(flags, joint, steps, base):
    p = harness.parser("", "alone")
    x = harness.Experiment("alone", p, [*CLASSES, "--steps", "0.01", *flags])
    run = x.align(0, "aligned", joint=joint)
    assert train.read_settings(run)["flags"]["stage2_steps"] == steps
    assert x.align(0, "aligned", joint=joint) == run                 # finished
    if not flags:
        with pytest.raises(ValueError, match="seed-0/aligned was made with other steps of stage 2"):
            x.align(0, "aligned", joint=not joint)


# ---- each of them --------------------------------------------------------------------------------

def test_the_strategies_have_equal_steps(base):
    strategies_table.main([*CLASSES])
    assert rows_of("strategies") == [
        "base", "freeze then all", "layer-wise rates", "gradual LoRA", "LoRA at once",
        "DC-Gen, joint phase", "DC-Gen, held joint phase", "DC-Gen"]
    # two of the head's closed form (8 samples), two of stage 3
    assert {row.get("steps") for row in result("strategies")["rows"]} == {None, 4}
    assert Path("table/strategies.png").is_file()
    # the first two begin as they should
    assert read_config(run_file("table/seed-0/freeze-then-all"))["from"] == "table/seed-0/frozen"
    facts = [train.read_settings(f"table/seed-0/{name}")["facts"] for name in ("layer-rates", "gradual-lora")]
    assert [fact["strategy"] for fact in facts] == ["layer-rates 3", "gradual-lora 1"]


def test_some_of_the_strategies_have_the_steps_of_all(base):
    strategies_table.main([*CLASSES, "--only", "held-lora"])
    assert rows_of("strategies") == ["base", "DC-Gen, held joint phase"]
    assert {row.get("steps") for row in result("strategies")["rows"]} == {None, 4}


def test_an_aligned_autoencoder_is_compared_at_equal_steps(base):
    autoencoder_table.main([*CLASSES, "--ratios", "1", "--ae-batch", "2"])
    row = "autoencoder aligned, ratio 1"
    assert rows_of("autoencoder") == ["base", "nothing aligned", row, "DC-Gen"]
    assert {row.get("steps") for row in result("autoencoder")["rows"]} == {None, 4}
    # it is drawn with the autoencoder that it learned on
    weights = read_config(run_file("table/seed-0/autoencoder-1"))["ae_weights"]
    assert weights == "table/autoencoder-1.safetensors" and Path(weights).is_file()


def test_the_gap_has_a_row_a_stage_and_a_mean_over_seeds(base):
    gap.main([*CLASSES, "--seeds", "0", "1"])
    stages = ["base", "not aligned", "stage 1: embedder", "head in closed form"]
    assert rows_of("gap") == stages * 2
    summary = {row["row"]: row for row in result("gap")["summary"]}
    gaps = [row["gap"] for row in result("gap")["rows"] if row["row"] == "not aligned"]
    assert summary["not aligned"]["gap"] == pytest.approx(sum(gaps) / 2)
    assert summary["not aligned"]["± gap"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2**0.5)
    assert gap.mean_gaps({"0": {"a": [1, 2]}, "1": {"a": [3, 6]}}) == {"a": [2, 4]}
    assert Path("table/gap.png").is_file() and Path("table/gap-pictures.png").is_file()


def test_convergence_goes_on_from_point_to_point(base):
    convergence.main([*CLASSES, "--steps", "0.002"])
    steps = {}
    for row in result("convergence")["rows"]:
        steps.setdefault(row["row"], []).append(row.get("steps"))
    # four of the head, then one, two and four of stage 3
    assert steps == {"base": [None], "aligned, trunk frozen": [4],
                     "aligned-lora": [5, 6, 8], "noalign-lora": [4, 5, 6, 8],
                     "aligned-full": [5, 6, 8], "noalign-full": [4, 5, 6, 8]}
    curves = result("convergence")["curves"]
    for name in ("aligned-lora", "noalign-full"):
        assert curves[name]["0"]["grad_norm"][-1][0] == curves[name]["0"]["val_loss"][-1][0] == 8
    assert curves["aligned-lora"]["0"]["val_loss"][0][0] == 4
    # a point is the average as it was then
    files = [read_tensors(f"table/seed-0/aligned-lora/step-{n:06d}.safetensors") for n in (5, 6, 8)]
    assert len({digest(file) for file in files}) == 3


def test_guidance_is_scored_at_every_scale_with_the_reaction_to_it(words_base):
    guidance.main([*WORDS])
    assert rows_of("guidance") == [name for name in ("base", "guided loss", "flow loss") for _ in range(4)]
    for row in result("guidance")["rows"]:
        assert (row["reaction"] == 0) == (row["guidance"] == 1)
    assert read_config(run_file("table/seed-0/flow"))["objective"] == "flow"
    with pytest.raises(ValueError, match="reads its guidance as a number"):
        guidance.main(["--base", "tiny", "--out", "other"])


def test_ranks_are_scored_on_what_was_seen_and_on_the_rest(base):
    flags = [*CLASSES, "--ranks", "2", "4", "--half-pictures", "24", "--seeds", "0", "1"]
    ranks.main(flags)
    names = rows_of("ranks")
    ways = ("aligned", "every weight", "LoRA", "LoRA")
    rows = [f"{half}: {row}" for half in ("all", "half") for row in ways]
    assert names == 2 * ["base", *rows]
    assert [row["rank"] for row in result("ranks")["rows"] if "rank" in row] == 2 * [2, 4, 2, 4]
    for row in result("ranks")["rows"]:
        assert row["accuracy"] == pytest.approx((row["seen"] + row["unseen"]) / 2)
    assert sorted(path.name for path in Path("table/half").iterdir()) == sorted(shapes.SHAPES[:4])
    assert len(list(Path("table/half").glob("*/*.png"))) == 24
    facts = train.read_settings("table/seed-0/half-lora-2")["facts"]
    assert facts != train.read_settings("table/seed-0/all-lora-2")["facts"]


def test_halves_are_scored_apart():
    images, y = shapes.ShapesSource(64).batch(torch.arange(16))
    # of the second half every picture shows another class
    images = torch.where((y < 4).view(-1, 1, 1, 1), images, images.roll(1, 0))
    metrics, _ = evaluate.make_metrics(None, None, shapes.ShapesSource(64), 16, False)
    task = SimpleNamespace(titles=[shapes.SHAPES[k] for k in y], conditions=y)
    judge = SimpleNamespace(metrics=metrics, captions=False, task=task, train=shapes.ShapesSource(64))
    scores = ranks.Halves(judge)(images, y, task.titles)
    assert (scores["seen"], scores["unseen"], scores["accuracy"]) == (1, 0, 0.5)


def test_the_half_of_the_captions_names_no_unseen_form(words_base):
    source = shapes.ScenesSource(64)
    ranks.write_half(Path("half"), source, 8)
    captions = [file.read_text() for file in Path("half").glob("*.txt")]
    assert len(captions) == len(list(Path("half").glob("*.png"))) == 8
    assert not any("ring" in caption or "cross" in caption for caption in captions)


def test_class_folders_are_halved_by_the_numbers_of_their_classes(base):
    for name in ("ring", "circle", "cross", "square"):
        for i in range(6):
            file = Path(f"pictures/{name}/{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 50 + i).save(file)
    source = ImageFolder("pictures", 64, "train", names=shapes.SHAPES, num_classes=8)
    labels = sorted(shapes.SHAPES.index(name) for name in ("ring", "circle", "cross", "square"))
    assert ranks.first_half(source) == set(labels[:2])


def test_solvers_are_compared_by_sample_and_second(base):
    solvers.main([*CLASSES, "--steps", "0.002"])
    rows = result("solvers")["rows"]
    names = ["stage 1, closed form", "stage 1, AdamW", *["head, closed form"] * 3, "head, AdamW",
             "both, closed form", "both, closed form, joint phase", "both, AdamW, joint phase",
             "both, closed form, Eq. 1 held"]
    assert rows_of("solvers") == names
    assert all(row["seconds"] > 0 and "val_loss" in row for row in rows)
    # 8 pictures; a step of 64; 2048, 8192 and 32768 times 0.002; steps of 4
    assert [row.get("samples") for row in rows[:6]] == [8, 64, 4, 16, 66, 64]
    assert [row.get("steps") for row in rows[6:]] == [4, 6, 3, 6]
    assert len(result("solvers")["head by AdamW"]["0"]) > 2


def test_the_cost_of_flux_is_counted():
    parts = alignment_cost.count_alignment("flux-krea", 512, 256)
    # three passes of 5,000 batches of 256; a token of 512 meets 6.5B weights, for text has its own
    assert parts["stage 2, model"] == pytest.approx(3 * 2 * 6.5e9 * 512 * 1.28e6, rel=0.05)


def test_a_cost_in_hours_is_of_the_efficiency_given(monkeypatch, capsys):
    monkeypatch.setattr(alignment_cost, "count_alignment", lambda *args: {"a": 3600e12, "b": 7200e12})
    alignment_cost.main(["--res", "512", "--efficiency", "0.5", "--peak", "2"])
    assert "  512 px: 3.0 (a 1.0, b 2.0)" in capsys.readouterr().out


# ---- what is killed, what is finished ------------------------------------------------------------

def numbers(name: str) -> list[dict]:
    return result(name)["rows"]


def test_a_killed_table_resumes_to_the_same_numbers(base, monkeypatch):
    flags = [*CLASSES, "--ratio", "2"]
    strategies_table.main(flags)
    straight = numbers("strategies")
    Path("table").rename("straight")
    # within a run of each kind, then between two rows
    for after in (3, 4, 9):
        minutes = result("strategies")["minutes"] if Path("table").exists() else 0
        with interrupted(monkeypatch, after=after):
            strategies_table.main(flags)
        assert result("strategies")["minutes"] > minutes
    scored = []

    def rows(self, run, seed, own=harness.Judge.rows):
        scored.append(run)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return own(self, run, seed)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(harness.Judge, "rows", rows)
        strategies_table.main(flags)
    assert numbers("strategies") == straight[:2]
    strategies_table.main(flags)
    assert numbers("strategies") == straight


def test_a_finished_table_is_only_printed_and_other_settings_are_refused(base, monkeypatch, capsys):
    gap.main([*CLASSES])
    printed = capsys.readouterr().out.splitlines()
    before = Path("table/gap.json").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(harness.Experiment, "train", None)
        m.setattr(harness, "Judge", None)
        gap.main([*CLASSES])
    assert capsys.readouterr().out.splitlines()[1:-1] == printed[-6:-1]
    assert Path("table/gap.json").read_bytes() == before
    # only its seeds may be more
    with pytest.raises(ValueError, match="gap.json was made with count 8, not 16; give another --out"):
        gap.main([*CLASSES, "--count", "16"])
    gap.main([*CLASSES, "--seeds", "0", "1"])
    assert result("gap")["finished"] == [0, 1]


@pytest.mark.parametrize("flags, message", [
    (["--tune", "full"], "--tune: this experiment sets it itself"),
    (["--train-steps=4"], "--train-steps=4: this experiment sets it itself"),
    (["--bach", "4"], "unrecognised --bach"),
    (["tiny"], "unrecognised tiny"),
])
def test_a_flag_that_cannot_be_is_refused_before_anything_is_made(flags, message, base):
    with pytest.raises(ValueError, match=message):
        ranks.main([*flags, *CLASSES])
    assert not Path("table").exists()
