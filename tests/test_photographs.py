"""The whole line on photographs: from a file of pictures to the scores, and on where it was killed. What is
not a file of pictures is refused in a line."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from checkpoints import read_config, run_file
from experiments import make_weights, photographs, unpack
from helpers import tiny_base  # noqa: F401
from model import BASES
from test_trust import interrupted
from train import Plan

NAMES = ["gas pump", "church", "../tench"]
FLAGS = ("--npz pictures.npz --base test --out table --steps 0.001 --count 8 --seeds 0 --batch 4 --warmup 0 "
         "--num-steps 2 --dtype fp32 --device cpu").split()


def webp(i: int) -> bytes:
    """A picture of noise of 64 px; those of a class are of one colour."""
    noise = np.random.default_rng(i).integers(0, 128, (64, 64, 3), dtype=np.uint8)
    noise[..., i % 3] += 127
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "WEBP")
    return file.getvalue()


def write_npz(file: str = "pictures.npz", **other):
    """60 pictures, whose labels take turns."""
    files = [webp(i) for i in range(60)]
    arrays = dict(
        webp=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=(np.arange(60) % 3).astype(np.uint8))
    np.savez(file, **{**arrays, **other})


def write_names(names: list[str], file: str = "my_classes.json"):
    classes = [{"label": k, "name": name} for k, name in enumerate(names)]
    Path(file).write_text(json.dumps({"classes": classes}))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A file of pictures with its names, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_npz()
    write_names(NAMES)


@pytest.fixture
def small(pictures, tiny_base, monkeypatch):  # noqa: F811
    """Every stage in a few steps, on the architecture "test"."""
    monkeypatch.setitem(BASES, "test", replace(BASES["test"], recipe="tiny"))
    plans = {"tiny-kl-f8c4": {32: Plan(1, 1e-4, 2), 64: Plan(1, 1e-4, 2)},
             "tiny-dc-ae-f32c32": {64: Plan(1, 1e-4, 2)}}
    monkeypatch.setattr(photographs, "AE_PLANS", plans)
    monkeypatch.setattr(photographs, "BASE_STEPS", 4000)
    monkeypatch.setattr(photographs, "BASE", photographs.BASE.replace("--batch 64", "--batch 4"))
    for name in ("classifier", "two sizes"):
        plan = replace(make_weights.PLANS[name], batch=8)
        monkeypatch.setitem(make_weights.PLANS, name, plan)
    # a plot of every run's curves takes seconds
    monkeypatch.setattr(train, "plot_curves", lambda *args: None)


def result() -> dict:
    return json.loads(Path("table/photographs.json").read_text())


# ---- the line ------------------------------------------------------------------------------------

def test_the_line_is_resumed_where_it_was_killed_and_ends_in_a_table(small, monkeypatch, capsys):
    # killed within the classifier, the base, the base of two sizes, LoRA; what was made before is kept
    kills = [
        (4, 2, "classifier/train.state.safetensors"),
        (3, 3, "base-one-size/train.state.safetensors"),
        (3, 3, "base/train.state.safetensors"),
        (3, 4, "seed-0/aligned-lora/train.state.safetensors"),
    ]
    for after, stages, state in kills:
        with interrupted(monkeypatch, after):
            photographs.main(FLAGS)
        assert len(result()["stages"]) == stages
        assert read_config(f"table/{state}")["step"] < 3
        assert not Path("table", state).with_name("model.safetensors").exists()
    photographs.main(FLAGS)
    rows = {row["row"]: row for row in result()["rows"]}
    assert list(rows) == [
        "unseen", "unseen, base's autoencoder", "unseen, deep autoencoder",
        "base", "closed forms, trunk frozen", "aligned, trunk frozen", "aligned, LoRA", "not aligned, LoRA"]
    for row in rows.values():
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        assert 0 <= row["accuracy"] <= 1 and row["frechet"] > 0
    # each stage was worth its steps, and both ways to the end have as many
    assert rows["not aligned, LoRA"]["steps"] == rows["aligned, LoRA"]["steps"] == 5
    assert rows["closed forms, trunk frozen"]["steps"] == 2
    assert rows["aligned, trunk frozen"]["steps"] == 3
    assert {"gap", "val_loss"} <= rows["aligned, LoRA"].keys()
    assert Path("table/photographs.png").is_file()

    # what was trained once: by itself, and from its own pictures
    stages = result()["stages"]
    assert list(stages) == ["tiny-kl-f8c4", "tiny-dc-ae-f32c32", "classifier", "base"]
    for name in ("tiny-kl-f8c4", "tiny-dc-ae-f32c32"):
        assert stages[name]["psnr"] != stages[name]["psnr before"] > 0
        assert read_config(stages[name]["file"])["scale"] > 0
    base = read_config(run_file("table/base"))
    assert base["model"]["num_classes"] == 3 and base["classes"] == ["_tench", "church", "gas_pump"]
    assert (base["steps"], stages["base"]["steps"]) == (6, 6)        # 4 at one size, 2 at two
    assert base["ae_weights"] == "table/tiny-kl-f8c4-64px.safetensors"
    lora = read_config(run_file("table/seed-0/aligned-lora"))
    assert (lora["base"], lora["from"]) == ("table/base", "table/seed-0/aligned")
    assert lora["ae_weights"] == "table/tiny-dc-ae-f32c32-64px.safetensors"

    # a finished one is only printed
    printed = capsys.readouterr().out.splitlines()
    before = Path("table/photographs.json").read_bytes()
    for name in ("train_autoencoder", "make_classifier", "train_two_sizes", "unpack"):
        monkeypatch.setattr(photographs, name, None)
    monkeypatch.setattr(photographs.Experiment, "train", None)
    photographs.main(FLAGS)
    assert capsys.readouterr().out.splitlines()[-9:-1] == printed[-9:-1]
    assert Path("table/photographs.json").read_bytes() == before


# ---- pictures ------------------------------------------------------------------------------------

def test_a_file_of_pictures_becomes_class_folders_and_every_tenth_is_unseen(pictures):
    unpack.unpack("pictures.npz", None, Path("out"))
    folders = {path.relative_to("out").as_posix() for path in Path("out").glob("*/*")}
    assert folders == {f"{split}/{name}" for split in ("train", "unseen")
                       for name in ("_tench", "church", "gas_pump")}
    counts = {split: [len(list(path.iterdir())) for path in Path("out", split).iterdir()]
              for split in ("train", "unseen")}
    assert counts == {"train": [18] * 3, "unseen": [2] * 3}
    # in its own class, and to the byte; label 1 is church's, and its tenth picture is number 28
    assert Path("out/unseen/church/000028.webp").read_bytes() == webp(28)
    assert Path("out/train/gas_pump/000003.webp").read_bytes() == webp(3)


def test_a_killed_unpacking_leaves_no_folder_that_counts_as_whole(pictures, monkeypatch):
    write = Path.write_bytes

    def fail(self, data):
        if self.name == "000007.webp":
            raise KeyboardInterrupt
        return write(self, data)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, "write_bytes", fail)
        unpack.unpack("pictures.npz", None, Path("out"))
    assert not Path("out").exists()
    unpack.unpack("pictures.npz", None, Path("out"))
    assert len(list(Path("out").glob("*/*/*.webp"))) == 60 and not Path("out.partial").exists()


def test_class_folders_are_taken_as_they_are(pictures):
    unpack.unpack("pictures.npz", None, Path("own"))

    def opened(*flags):
        return photographs.open_photographs(photographs.open_experiment(["--out", "table", *flags]))

    images, unseen = opened("--images", "own/train", "--unseen", "own/unseen")
    assert images == "own/train" and len(unseen) == 6
    # without a folder of unseen ones: every 20th, which no command trains on
    images, unseen = opened("--images", "own/train")
    assert [file.as_posix() for file in unseen.files] == [
        file.as_posix() for file in sorted(Path("own/train").glob("*/*"))[19::20]]
    Path("own/unseen/church").rename("own/unseen/chapel")
    with pytest.raises(ValueError, match="--unseen own/unseen: its class folders are not those of own/train"):
        opened("--images", "own/train", "--unseen", "own/unseen")
    with pytest.raises(ValueError, match="--images own/train/church: no class folders"):
        opened("--images", "own/train/church", "--unseen", "own/unseen/_tench")
    assert not Path("table").exists()


# ---- what cannot be ------------------------------------------------------------------------------

def cut_file():
    Path("pictures.npz").write_bytes(Path("pictures.npz").read_bytes()[:-100])


def hide_names():
    Path("my_classes.json").unlink()


@pytest.mark.parametrize("spoil, message", [
    (lambda: write_npz(offsets=np.arange(60)), "its offsets do not cut .* bytes into 60 pictures"),
    (lambda: write_npz(offsets=np.zeros(0)), "no npz file of webp, offsets and labels"),
    (lambda: np.savez("pictures.npz", webp=np.zeros(1)), "no npz file of webp, offsets and labels"),
    (lambda: np.save(open("pictures.npz", "wb"), np.zeros(1)), "no npz file of webp, offsets and labels"),
    (cut_file, "no npz file of webp, offsets and labels"),
    (hide_names, r"0 files \*classes.json beside it; name one with --names"),
    (lambda: write_names(NAMES[:2]), "label 2 has no name"),
    (lambda: write_names(["a", "b", "a"]), "a label or a name stands there twice"),
    (lambda: Path("my_classes.json").write_text("[]"), 'no list "classes" of label and name'),
])
def test_a_file_that_is_not_one_of_pictures_is_refused_before_anything_is_made(spoil, message, pictures):
    spoil()
    with pytest.raises(ValueError, match=message):
        unpack.unpack("pictures.npz", None, Path("out"))
    assert not list(Path(".").glob("out*"))


@pytest.mark.parametrize("flags, message", [
    ([], "--npz FILE or --images DIR: give one of them"),
    (["--npz", "pictures.npz", "--images", "."], "give one of them"),
    (["--npz", "pictures.npz", "--unseen", "."], "--unseen with --images"),
    (["--npz", "nope"], "--npz nope: no such file or folder"),
    (["--npz", "pictures.npz", "--base", "tiny-flux"], "--base tiny-flux: no class model on the bundled"),
    (["--npz", "pictures.npz", "--flip"], "--flip: this experiment sets it itself"),
])
def test_a_command_that_cannot_be_is_refused_before_anything_is_made(flags, message, pictures):
    with pytest.raises(ValueError, match=message):
        photographs.main([*flags, "--out", "table"])
    assert not Path("table").exists()
