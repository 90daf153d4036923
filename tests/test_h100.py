"""The first half hour on a GPU, as far as a CPU has it: all facts on small sizes, failures, the deadline."""

import json
import math

import pytest
import torch
import torch.nn as nn

from experiments import h100
from experiments.h100 import Record

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are not small")


def kept(folder):
    """What the files of a folder hold, by part."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def breaks():
    yield "first", dict(ms=1.0)
    yield "second", h100.tried(math.sqrt, -1)
    raise AssertionError("expected size 3==4\nat dim 0")


def goes_on():
    yield "first", dict(ms=2.0)


def passes_the_deadline_of(record):
    yield "first", dict(ms=3.0)
    record.until = -math.inf
    yield "second", dict(ms=3.0)
    yield "third", dict(ms=3.0)


def test_what_fails_is_kept_with_its_reason_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(h100, "FACTS", (breaks, goes_on))
    with pytest.raises(SystemExit, match="2 entries failed: .breaks. second, .breaks. the rest"):
        h100.main(["facts", "--out", str(tmp_path)])
    found = kept(tmp_path)
    assert found["goes_on"] == {"first": {"ms": 2.0}}
    assert list(found["breaks"]) == ["first", "second", "the rest"]
    assert found["breaks"]["second"]["failed"].startswith("ValueError: ")
    assert found["breaks"]["the rest"] == {"failed": "AssertionError: expected size 3==4"}


def test_nothing_begins_after_the_deadline(tmp_path, capsys):
    record = Record(tmp_path, math.inf)
    record.part("in time", passes_the_deadline_of(record))
    record.part("late", goes_on())
    found = kept(tmp_path)
    assert list(found) == ["in-time"]
    assert list(found["in-time"]) == ["first", "second"]
    assert capsys.readouterr().out.count("no time left") == 2


@on_a_cpu
def test_the_facts_are_found_on_a_cpu(tmp_path):
    h100.main(["facts", "--out", str(tmp_path)])
    found = kept(tmp_path)
    assert set(found) == {fact.__name__ for fact in h100.FACTS}
    assert found["versions"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert all(entry["error"] < 1e-5 for entry in found["attentions"].values())
    assert all(entry["ms"] > 0 for entry in found["convolutions"].values())
    assert all(0.01 < entry["fp8 error"] < 0.05 for entry in found["products"].values())


def test_calls_of_layers_are_counted_by_shape_the_heaviest_first():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 8))
        calls = h100.layer_calls(nn.Linear, net, torch.empty(2, 3, 4))
        conv = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        convolved, = h100.layer_calls(nn.Conv2d, conv, torch.empty(1, 6, 5, 7)).values()
    # the first and the third layer are of the same shapes
    assert [call.times for call in calls.values()] == [2, 1]
    assert all(call.flops == 2 * 6 * 32 for call in calls.values())
    assert convolved.flops == 2 * (4 * 5 * 7) * (3 * 9)


def test_sizes_are_for_pictures_only():
    with pytest.raises(ValueError, match="tokens 1024: resolutions are for draw and base"):
        h100.main(["tokens", "1024"])
