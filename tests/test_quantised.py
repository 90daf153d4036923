"""experiments/quantised.py: its rows, and the errors that it measures by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import finetune
from experiments import quantised
from experiments.quantised import layer_error, outlier_model, path_error, random_text, relative, ways
from helpers import words_base  # noqa: F401
from quant import calibration_batch, quantise_model
from test_tables import WORDS, quick, rows_of  # noqa: F401

OF_A_MODEL = ["bf16", "FP8", "W4A16", "W4A16, smoothed", "W4A4", "W4A4, smoothed"]


def test_every_way_of_every_model_is_a_row(words_base, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(quantised, "CALIBRATION", 2)
    monkeypatch.setattr(quantised, "STEPS", 2)
    flags = [*WORDS, "--ranks", "2", "--width", "32"]
    quantised.main(flags)
    assert rows_of("quantised") == [f"{model}: {row}" for model in ("base", "outliers") for row in OF_A_MODEL]
    rows = json.loads(Path("table/quantised.json").read_text())["rows"]
    assert [row.get("rank") for row in rows] == 2 * [None, None, 2, 2, 2, 2]
    for row in rows:
        plain = row["row"].endswith("bf16")
        assert (row["layer_error"] == row["path_error"] == 0) == plain
        assert plain or 0.005 < row["layer_error"] < 0.7
        assert ("all" in row) == row["row"].startswith("base")
    assert Path("table/quantised.png").is_file() and Path("table/quantised-pictures.png").is_file()
    # a finished table is only printed
    capsys.readouterr()
    before = Path("table/quantised.json").stat().st_mtime_ns
    quantised.main(flags)
    assert Path("table/quantised.json").stat().st_mtime_ns == before
    assert "outliers: W4A4, smoothed" in capsys.readouterr().out


def test_a_converted_run_is_quantised_with_its_lora(words_base, monkeypatch):  # noqa: F811
    monkeypatch.setattr(quantised, "CALIBRATION", 2)
    monkeypatch.setattr(quantised, "STEPS", 2)
    few = ("--base test-words --init base --train-steps 1 --pictures 8 --batch 4 --previews 0 --dtype fp32 "
           "--device cpu --out tuned")
    finetune.main(few.split())
    quantised.main([*WORDS, "--ranks", "2", "--only", "models", "--run", "tuned"])
    assert rows_of("quantised")[6:] == [f"run: {row}" for row in OF_A_MODEL]
    rows = json.loads(Path("table/quantised.json").read_text())["rows"]
    assert all(row["layer_error"] > 0.005 for row in rows[7:])


def test_the_blocks_have_outliers_which_smoothing_takes_away():
    model = outlier_model(64, seed=0, channels=4)
    seen = []
    model.double_blocks[0].img_attn.qkv.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    batch = calibration_batch(model, random_text(model.cfg, 4, 0))
    model(*batch)
    largest = seen[-1].abs().flatten(0, -2).amax(dim=0).sort().values
    assert (largest[-4:] > 5 * largest[:-4].median()).all()
    assert largest[-5] < 3 * largest[:-4].median()

    found = {}
    for key, way in ways("nvfp4", [0, 16]).items():
        if key[0] in ("W4A16", "W4A4", "W4A4, smoothed"):
            made = quantised.quantised_copy(model, way, batch)
            found[key] = layer_error(model, made, batch)
    assert found["W4A4", 0] > 1.2 * found["W4A4, smoothed", 0] > 1.2 * found["W4A4, smoothed", 16]
    assert found["W4A4", 0] > 1.1 * found["W4A4", 16]
    assert found["W4A16", 0] < found["W4A4", 0]


def test_errors_by_hand():
    class Net(nn.Module):
        """dx/dt = w"""
        def __init__(self, w):
            super().__init__()
            self.w = w

        def forward(self, x, t, y):
            return torch.full_like(x, self.w)

    assert relative(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(5 / 4)
    # from 1 to 3, and from 1 to 4
    assert path_error(Net(2.0), Net(3.0), torch.ones(1, 1, 2, 2), None) == pytest.approx(1 / 3, rel=1e-5)
    # of what is not quantised there is no error; of a layer it is that of its weight
    model = outlier_model(64, seed=0)
    made = quantised.copy.deepcopy(model)
    quantise_model(made, "nvfp4", 0, activations=False)
    batch = calibration_batch(model, random_text(model.cfg, 2, 0))
    assert 0.02 < layer_error(model, made, batch) < 0.2
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("flags, message", [
    (["--width", "100"], "--width 100: a multiple of 32"),
    (["--run", "nope"], "--run nope: no such file or folder"),
    (["--tune", "full", "--bach"], "unrecognised --bach"),
])
def test_a_wrong_flag_is_refused_before_anything_is_made(flags, message, words_base):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        quantised.main([*flags, *WORDS])
    assert not Path("table").exists()
