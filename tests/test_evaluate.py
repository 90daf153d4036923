import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoints
import evaluate
from autoencoder import AUTOENCODERS, build_autoencoder
from checkpoints import config_dict, write_tensors
from data import ImageFolder
from helpers import (DEEP_DIT, TINY_DIT, deep_model, random_condition, scramble, tiny_base, tiny_model,
                     words_base)
from model import BASES, DiT, to_deep_model
from shapes import ANSWERS, SHAPES, Classifier, ShapesSource, load_classifier

QUICK = ["--count", "16", "--num-steps", "1", "--device", "cpu", "--dtype", "fp32"]
every_family = pytest.mark.parametrize("family", ["dit", "flux", "sana"])


def random_latents(model):
    return torch.randn(8, model.cfg.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))


def gaps_of(model, base, t=1.0):
    """Layer gaps on random latents that both read."""
    z = random_latents(base)
    return evaluate.layer_gap(model, base, z, z, random_condition(base.cfg, 8), t)


# ---- the layer gap -------------------------------------------------------------------------------

@every_family
def test_the_gap_of_a_model_to_itself_is_0_in_every_layer(family):
    model = tiny_model(family)
    assert gaps_of(model, model) == [0] * (1 + len(model.blocks))


def test_the_gap_of_the_average_feature_is_1():
    base = tiny_model("dit")
    model = tiny_model("dit")
    features = base.embed(random_latents(base))
    average = features.mean(dim=(0, 1)).expand_as(features)
    model.embed = lambda z: average
    assert gaps_of(model, base)[0] == pytest.approx(1, abs=1e-5)


@every_family
def test_the_last_feature_is_what_the_head_reads(family):
    model = tiny_model(family)
    read = []
    model.final_layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    y = random_condition(model.cfg, 8)
    layers = evaluate.token_features(model, random_latents(model), torch.ones(8), y)
    assert torch.equal(layers[-1], read[0])


def test_models_with_noise_of_their_own_differ():
    model = tiny_model("dit")
    assert all(0.1 < gap < 2 for gap in gaps_of(model, model, t=0.5))


def test_the_base_is_averaged_over_each_cell_of_the_new_grid():
    base = tiny_model("dit")
    deep = to_deep_model(base, replace(TINY_DIT, patch_size=1))
    z = random_latents(base)
    grid = base.embed(z).transpose(1, 2).unflatten(2, (4, 4))
    pooled = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    deep.embed = lambda z: pooled
    assert evaluate.layer_gap(deep, base, F.avg_pool2d(z, 4), z, torch.arange(8))[0] < 1e-6


def test_the_gap_table_has_a_row_a_layer_and_their_mean():
    table = evaluate.gap_table({"stage 1": [0.1, 0.2, 0.6]})
    gaps = [line.split()[-1] for line in table.splitlines()[1:]]
    assert gaps == ["0.100", "0.200", "0.600", "0.300"]


# ---- scores --------------------------------------------------------------------------------------

def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=g, dtype=torch.float64)
    a = a - a.mean(0)
    a = a @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T           # covariance 1, exactly
    b = a * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    expected = 5 + 1 + 0.25                             # |m|^2 + sum (s - 1)^2
    assert evaluate.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, abs=1e-6)


def test_the_frechet_distance_to_itself_is_0_even_of_fewer_pictures_than_features():
    few = torch.randn(10, 64)
    assert abs(evaluate.frechet_distance(few, few)) < 1e-3


@pytest.mark.parametrize("classes, score", [(torch.zeros(40).long(), 1), (torch.arange(40) % 8, 8)])
def test_the_inception_score_is_1_without_variety_and_the_number_of_classes_at_best(classes, score):
    logits = 100 * F.one_hot(classes, 8).float()
    assert evaluate.inception_score(logits) == pytest.approx(score)


def test_psnr_and_ssim_by_hand():
    # 0.6 and 0.2 of a range of 1, without structure
    a = torch.full((1, 3, 16, 16), 0.2)
    expected = (2 * 0.6 * 0.2 + 1e-4) / (0.36 + 0.04 + 1e-4)
    assert evaluate.ssim(a, a - 0.8).item() == pytest.approx(expected, abs=1e-4)
    x = torch.rand(1, 3, 24, 30) * 2 - 1
    assert evaluate.ssim(x, x).item() == pytest.approx(1)
    assert evaluate.psnr(x, x + 0.02).item() == pytest.approx(20 * np.log10(2 / 0.02), abs=1e-3)


def test_a_file_that_is_no_classifier_is_one_clear_error(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="w.safetensors is not a classifier"):
        load_classifier(str(tmp_path / "w.safetensors"))


# ---- plots ---------------------------------------------------------------------------------------

def test_plots_are_drawn_without_a_warning(tmp_path):
    """Logarithmic axes warned of logs without a positive value."""
    log = [{"step": i, "loss": 1.0 / (i + 1), "grad_norm": 0.0, "val_t0.5": float(i)} for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.plot_curves(tmp_path / "curves.png", {"stage 1": log, "stage 2": log[:1]})
        evaluate.plot_gap(tmp_path / "gap.png", {"stage 1": [0.1, 0.2], "stage 2": [0.0, 0.0]})
    assert Image.open(tmp_path / "curves.png").width > Image.open(tmp_path / "gap.png").width


# ---- python evaluate.py --------------------------------------------------------------------------

def write_run(name, model, **info):
    """A run's folder with the tensors that a stage of this kind trains."""
    info = dict(base="test", base_weights=None, kind="align", steps=400, classes=list(SHAPES)) | info
    trained = (model.EMBEDDER, model.HEAD) if info["kind"] == "align" else ""
    tensors = {key: value for key, value in model.state_dict().items() if key.startswith(trained)}
    write_tensors(Path("runs", name, "model.safetensors"), tensors, info | dict(model=config_dict(model.cfg)))


def write_pictures(folder, levels):
    """A grey picture a level."""
    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        Image.fromarray(np.full((20, 24, 3), level, np.uint8)).save(folder / f"{i:03d}.png")


def evaluated(capsys, *flags):
    """Rows by name, and the printed lines."""
    evaluate.main([*flags, *QUICK])
    rows = json.loads(Path("runs/evaluate.json").read_text())["rows"]
    return {row["name"]: row for row in rows}, capsys.readouterr().out.splitlines()


def test_evaluate_compares_the_newest_runs_and_gives_the_commands_of_the_missing(tiny_base, capsys):
    write_run("align-test-1", deep_model(tiny_base))
    write_run("finetune-test-1", scramble(DiT(DEEP_DIT), seed=2), kind="finetune", steps=1600)
    assert evaluate.pick_runs(None, ["runs/finetune-test-1"])[0] == "test"
    rows, lines = evaluated(capsys, "--base", "test")
    missing = "python finetune.py --init base --train-steps 1600 --base test"
    assert lines[0] == f"no noalign run of test yet: {missing}"
    assert list(rows) == ["real pictures", "base test", "align-test-1", "finetune-test-1"]
    assert [rows[name]["tokens"] for name in ("base test", "align-test-1")] == [16, 4]
    assert rows["real pictures"]["accuracy"] > 0.9
    assert rows["real pictures"]["frechet"] < rows["base test"]["frechet"]
    assert rows["align-test-1"]["gap"] > 0.5
    protocol = next(line for line in lines if line.startswith("["))
    for fact in ("N 16", "euler 1 steps", "guidance 3,", "shipped classifier", "2048 real pictures"):
        assert fact in protocol


def test_captioned_pictures_are_scored_by_every_question_at_every_guidance_scale(words_base, capsys):
    rows, lines = evaluated(capsys, "--base", "test-words", "--guidance", "1", "3")
    assert set(ANSWERS) <= set(rows["real pictures"])
    assert rows["real pictures"]["object"] > 0.9
    drawn = [re.split(r" {2,}", line)[3] for line in lines if line.startswith("base test-words")]
    assert drawn == ["1", "3"]


def test_evaluate_leaves_out_scores_of_pictures_that_the_shipped_classifier_does_not_know(tiny_base, capsys):
    for name in ("cat", "dog"):
        write_pictures(Path("pictures", name), range(0, 240, 8))
    write_run("align-test-1", deep_model(tiny_base), images="pictures", classes=["cat", "dog"])
    rows, lines = evaluated(capsys, "--base", "test")
    assert list(rows) == ["base test", "align-test-1"]
    assert "accuracy" not in rows["align-test-1"]
    assert rows["align-test-1"]["gap"] > 0.5
    assert lines[-2].startswith("no scores, no Frechet distance: the shipped classifier knows")
    assert lines[-2].endswith("--only classifier --images pictures --classifier FILE")


@pytest.mark.parametrize("known, pictures, info, reason", [
    (SHAPES, SHAPES, {"classes": "abcdefgh"}, "circle, square, triangle ..., the model a, b, c ..."),
    ("ab", "ab", {}, "2 classes, the model 8"),
    ("ab", SHAPES, {}, "a, b ..., the pictures are circle, square, triangle ..."),
    ("ab", "", {}, "a, b ..., the pictures are without classes"),
])
def test_a_classifier_scores_pictures_and_models_of_its_own_classes(known, pictures, info, reason, tmp_path):
    file = str(tmp_path / "classifier.safetensors")
    write_tensors(file, Classifier(len(known)).state_dict(), dict(classes=list(known)))
    source = ShapesSource(16, length=64)
    source.classes = pictures and tuple(pictures)
    metrics, why = evaluate.make_metrics(file, None, source, 8, captions=False)
    if metrics:
        why = metrics.mismatch(info, TINY_DIT)
    assert why == f"the classifier knows {reason}"


def test_real_pictures_of_a_folder_are_balanced_over_classes_as_far_as_there_are_some(tmp_path):
    """They were drawn at random: few of them scored worse than as many of a model, with classes in turn."""
    for name, n in dict(dark=30, grey=10, light=3).items():
        write_pictures(tmp_path / name, range(n))
    source = ImageFolder(tmp_path, 8)
    for count, expected in ((9, [3, 3, 3]), (17, [7, 7, 3]), (90, [30, 10, 3])):
        rows = evaluate.balanced_rows(source, count)
        assert source.labels[rows].bincount().tolist() == expected


@pytest.fixture
def two_runs(tiny_base, monkeypatch):
    """A run of "test" and one of "tiny"; weights are not to be loaded."""
    write_run("align-test-1", deep_model(tiny_base))
    write_run("align-tiny-1", deep_model(tiny_base), base="tiny")
    write_run("align-test-2", deep_model(tiny_base), ae_weights="gone.safetensors")
    Path("one").mkdir()
    monkeypatch.setattr(checkpoints, "build", lambda *args: pytest.fail("loaded weights"))
    monkeypatch.setattr(evaluate, "load_classifier", lambda *args: pytest.fail("loaded weights"))


@pytest.mark.parametrize("flags, message", [
    ("runs/nope", "runs/nope: no such"),
    ("runs/align-test-1 --base tiny", "--base tiny: runs/align-test-1 was trained from test; leave --base"),
    ("runs/align-test-1 runs/align-tiny-1", "runs/align-tiny-1: its base is tiny, that of runs/align-test-1"),
    ("runs/align-test-1 runs/align-test-2", "runs/align-test-2: needs gone.safetensors, which is not there"),
    ("--base tiny --images nope", "--images nope: no such"),
    ("--base tiny --images one", "--images one: no pictures in it"),
    ("--base test --classifier nope", "--classifier nope: no such"),
    ("--base test --device cuda:99", "--device cuda:99: this "),
    ("--base test --out /dev/null/x", "--out /dev/null/x: /dev/null is a file"),
    ("--base test --out x.png", "--out x.png: the table is JSON"),
    ("--base test --count 1", "--count 1: a Frechet distance needs two pictures"),
    ("--base tiny --res 50", "--res 50: tiny-kl-f8c4 with patch 2 needs a multiple of 16"),
    ("--base dit-xl --num-steps 300", "--num-steps 300: .*nearest is 250"),
    ("--ae tiny-kl-f8c4 --weights nope", "--weights nope: no such"),
    ("--fid nope --reference nope", "--fid nope: no such"),
    ("--fid one", "--fid DIR: needs --reference DIR"),
])
def test_what_is_missing_is_found_before_anything_is_loaded(flags, message, two_runs):
    with pytest.raises(ValueError, match=message):
        evaluate.main(flags.split())


@pytest.mark.parametrize("flags", [
    "--count 0", "--count -5", "--num-steps 0", "--guidance nan", "--guidance -1", "--res 0", "--seed -1"])
def test_numbers_are_never_taken_for_the_default(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(flags.split())
    assert capsys.readouterr().err.startswith(f"error: {flags}: ")


def test_a_table_of_other_settings_is_not_written_over(tiny_base, capsys):
    evaluated(capsys, "--base", "test")
    first = Path("runs/evaluate.json").read_text()
    _, lines = evaluated(capsys, "--base", "test", "--guidance", "2")
    assert lines[-1] == "wrote runs/evaluate-2.json and runs/evaluate-2.png"
    assert lines[-2].startswith("runs/evaluate.json holds results of other settings and stays")
    _, lines = evaluated(capsys, "--base", "test")
    assert lines[-1] == "wrote runs/evaluate.json and runs/evaluate.png"
    assert Path("runs/evaluate.json").read_text() == first


def test_a_run_is_compared_with_the_weights_that_it_was_trained_from(tiny_base):
    file = Path(BASES["test"].weights).rename("other.safetensors")
    write_run("align-test-1", deep_model(tiny_base), base_weights=str(file))
    evaluate.main(["runs/align-test-1", *QUICK])


def test_weights_that_are_not_finite_have_no_scores(tiny_base):
    model = deep_model(tiny_base)
    model.final_layer.linear.bias[0] = np.inf
    write_run("align-test-1", model)
    with pytest.raises(ValueError, match="align-test-1: final_layer.linear.bias is not finite"):
        evaluate.main(["runs/align-test-1", *QUICK])


def test_real_pictures_have_the_models_own_classes_by_the_names_of_their_folders(tiny_base, monkeypatch):
    for name in ("star", "cross"):
        write_pictures(Path("pictures", name), range(0, 240, 8))
    seen = []

    def look(self, *args):
        seen.append(self.y.unique())
        return 0.0
    monkeypatch.setattr(evaluate.Probe, "gap", look)
    write_run("align-test-1", deep_model(tiny_base))
    evaluate.main(["runs/align-test-1", "--images", "pictures", *QUICK])
    assert [SHAPES[k] for k in seen[0]] == ["cross", "star"]


# ---- python evaluate.py --ae, --fid --------------------------------------------------------------

def test_reconstructions_are_drawn_and_measured(tmp_path, capsys):
    cfg = AUTOENCODERS["tiny-kl-f8c4"]
    weights = str(tmp_path / "w.safetensors")
    out = tmp_path / "v1.0.png"
    write_tensors(weights, scramble(build_autoencoder(cfg)).state_dict(), config_dict(cfg))
    flags = ["--count", "3", "--res", "64", "--device", "cpu", "--dtype", "fp32"]
    evaluate.main(["--ae", cfg.name, "--weights", weights, "--out", str(out), *flags])
    printed = capsys.readouterr().out
    evaluate.main(["--ae", cfg.name, "--weights", weights, "--out", str(out), *flags, "--seed", "1"])
    evaluate.main(["--ae", cfg.name, "--weights", weights, "--out", str(out), *flags, "--res", "48"])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["v1.0-2.png", "v1.0.png"]
    assert len(re.findall(r"^ +\d +-?\d+\.\d\d +-?\d\.\d{4}$", printed, re.MULTILINE)) == 3
    assert Image.open(out).size == (192, 128)


class FakeInception(torch.nn.Module):
    """Three features and two logits of a picture, in the place of the real network."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        if feature_extractor_weights_path:
            torch.load(feature_extractor_weights_path, weights_only=True)

    def forward(self, x):
        assert x.dtype == torch.uint8
        means = x.float().mean(dim=(2, 3))
        return means, means[:, :2]


MODULE = "torch_fidelity.feature_extractor_inceptionv3"


@pytest.fixture
def fake_inception(monkeypatch):
    fake = SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, MODULE, fake)


def score_folders(folder, reference, *flags):
    folders = ["--fid", str(folder), "--reference", str(reference)]
    evaluate.main([*folders, "--res", "16", "--device", "cpu", *flags])


def test_the_fid_of_a_folder_with_itself_is_0_and_the_protocol_is_printed(tmp_path, capsys, fake_inception):
    write_pictures(tmp_path / "a", range(0, 240, 8))
    score_folders(tmp_path / "a", tmp_path / "a")
    expected = (r"FID -?0\.000, Inception score \d+\.\d\d   \[N 30, reference .* of 30, "
                r"inception-v3-compat of torch-fidelity, 16 px centre squares, bytes\]")
    assert re.match(expected, capsys.readouterr().out)


def test_a_broken_picture_is_an_error_because_their_number_is_part_of_the_score(tmp_path, fake_inception):
    write_pictures(tmp_path / "a", range(30))
    (tmp_path / "a/000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 30 pictures are broken"):
        score_folders(tmp_path / "a", tmp_path / "a")


def test_a_distance_needs_a_reference_and_the_inception_network(tmp_path, monkeypatch, fake_inception):
    a = tmp_path / "a"
    write_pictures(a, range(2))
    with pytest.raises(ValueError, match="needs --reference"):
        evaluate.main(["--fid", str(a)])
    for path in (a, tmp_path / "empty"):
        path.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="empty: no pictures in it"):
        score_folders(a, tmp_path / "empty", "--inception", str(a / "000.png"))
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"rubbish")
    fitting = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match=f"the Inception weights in .*wrong.pth do not fit .*{fitting}"):
        score_folders(a, a, "--inception", str(wrong))
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        score_folders(a, a)
