import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from autoencoder import AUTOENCODERS, DCAEConfig, KLConfig
from checkpoints import load_autoencoder
from data import (
    ImageFolder, LatentCache, check_scale, imagenet_names, load_image, number_classes, open_source, order)
from helpers import assert_near
from shapes import SHAPES, ShapesSource, print_once


# ---- small worlds --------------------------------------------------------------------------------

def save(pixels, path: Path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def grey_folder(root: Path, n: int, text: bool = False) -> Path:
    """Pictures 000.png, 001.png, ... of rising grey, with captions beside them if text."""
    for i in range(n):
        save(np.full((20, 24, 3), 10 * i % 256, np.uint8), root / f"{i:03d}.png")
        if text:
            (root / f"{i:03d}.txt").write_text(f" a picture, grey {i}\n")
    return root


class Averages(nn.Module):
    """An autoencoder whose latents are the mean colours of cells: they show which pixels they are from."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.ones(()))

    def posterior(self, x):
        mean = F.avg_pool2d(x, self.cfg.f) * self.cfg.scale
        return mean, 0.1 * torch.ones_like(mean) if isinstance(self.cfg, KLConfig) else None


def averages(f: int, scale: float = 5.0) -> Averages:
    return Averages(DCAEConfig(f"averages-f{f}", 3, scale, widths=(8,) * f.bit_length()))


def averages_kl(f: int) -> Averages:
    return Averages(KLConfig(f"averages-kl-f{f}", 3, 5.0, widths=(8,) * f.bit_length()))


# ---- folders of pictures -------------------------------------------------------------------------

def test_a_picture_is_cropped_to_its_middle_and_turned_as_its_exif_says(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:32, 0] = 255                                      # the left half of the central square is red
    save(wide, tmp_path / "wide.png")
    red = load_image(tmp_path / "wide.png", 32)[0]
    assert red[:, :15].min() > 0.95
    assert red[:, 17:].max() < -0.95

    exif = Image.Exif()
    exif[0x0112] = 6                                        # a camera held upright: turn right by 90 degrees
    save(wide, tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    red = load_image(tmp_path / "turned.jpg", 32)[0]
    assert red[:14].min() > 0.8
    assert red[18:].max() < -0.8


RED = torch.tensor([1.0, -1.0, -1.0])
HALF = np.arange(64).reshape(8, 8, 1) % 8 < 4                        # the left half is red, the rest nothing
SEE_THROUGH = Image.fromarray(HALF * np.uint8([255, 0, 0, 255]), "RGBA")


@pytest.mark.parametrize("name, image, right", [
    ("alpha.png", SEE_THROUGH, 1.0),
    ("palette.png", SEE_THROUGH.quantize(), 1.0),
    ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
])
def test_every_kind_of_picture_becomes_rgb_on_white(name, image, right, tmp_path):
    image.save(tmp_path / name)
    x = load_image(tmp_path / name, 8)
    assert (x[:, :, 0] - RED[:, None]).abs().max() < 0.05
    assert (x[:, :, 7].T - right).abs().max() < 0.05


@pytest.mark.parametrize("level", [300, 65535])
def test_grey_of_16_bits_is_scaled_not_clipped(level, tmp_path):
    save(np.full((8, 8), level, np.uint16), tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png", 8) - (level / 32767.5 - 1)).abs().max() < 0.005


def test_folders_are_classes(tmp_path):
    root = tmp_path / "all"
    grey_folder(tmp_path / "elsewhere", 3)
    grey_folder(root / "dog", 2)
    grey_folder(root / "birds/owl", 1)
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(root, 8)
    assert source.classes == ("birds/owl", "cat", "dog")
    assert source.labels.tolist() == [0, 1, 1, 1, 2, 2]
    x, y = source.batch(torch.tensor([5, 1]))
    assert y.tolist() == [2, 1]
    assert x[0].min() > x[1].max()

    save(np.zeros((8, 8, 3), np.uint8), root / "stray.png")
    with pytest.raises(ValueError, match="stray.png lies beside class folders"):
        ImageFolder(root, 8)


@pytest.mark.parametrize("folders, classes, labels", [
    (["0207", "9", "0360"], tuple(map(str, range(361))), [207, 360, 9]),
    (["0207", "nine", "0360"], ("0207", "0360", "nine"), [0, 1, 2]),
    (["20240131"], ("20240131",), [0]),                              # a date is no class number
])
def test_folders_that_are_all_named_by_numbers_are_those_classes(folders, classes, labels, tmp_path):
    """A part of ImageNet: its classes are those that the base was trained with, not the first ones."""
    for name in folders:
        grey_folder(tmp_path / name, 1)
    source = ImageFolder(tmp_path, 8)
    assert source.classes == classes
    assert source.labels.tolist() == labels


OWN = ("tabby", "red fox")
EIGHT = tuple("01234567")


@pytest.mark.parametrize("folders, model, numbers, classes", [
    (["bars", "star"], dict(names=SHAPES, num_classes=8), [7, 5], SHAPES),
    (["Red_Fox", "TABBY"], dict(names=OWN, num_classes=8), [1, 0], OWN + EIGHT[2:]),
    (["007", "3", "star"], dict(names=SHAPES, num_classes=8), [7, 3, 5], SHAPES),
    (["7"], dict(num_classes=8), [7], EIGHT),
    (["n01440764", "n02099601"], dict(num_classes=1000), [0, 207], imagenet_names()),
    (["construction_crane", "n02099601"], dict(num_classes=1000), [517, 207], imagenet_names()),
    (["cat", "dog"], dict(names=SHAPES, num_classes=8, any_classes=True), [0, 1], ("cat", "dog")),
    (["bars", "star"], dict(names=SHAPES, num_classes=8, any_classes=True), [0, 1], ("bars", "star")),
    (["n01440764", "n02099601"], {}, [0, 1], ("n01440764", "n02099601")),
    ([], {}, [], ()),
])
def test_class_folders_go_by_number_by_name_or_in_order(folders, model, numbers, classes):
    """`star` and `bars` trained circle and square, and a grid labelled a circle "bars"."""
    assert number_classes(folders, **model) == (dict(zip(folders, numbers)), classes)


@pytest.mark.parametrize("folders, model, error", [
    (["cat", "star"], dict(names=SHAPES, num_classes=8),
     r"cats: folder 'cat' is none of the model's 8 classes \(circle, square, triangle, ring, ...\); name "
     r"every.*--any-classes takes them in this order: cat -> 0 \(was circle\), star -> 1 \(was square\)$"),
    (["n01440764"], dict(names=OWN, num_classes=1000), "folder 'n01440764' is none of the model's 1000"),
    (["n99999999"], dict(num_classes=1000), "'n99999999' is none of the model's 1000 classes .tench, gold"),
    (["1", "8"], dict(num_classes=8), "2 class folders, of which '8' is class 8; the model has 8 .*0 to 7"),
    (["a", "b", "c"], dict(num_classes=2, any_classes=True), "3 class folders, of which 'c' is class 2"),
    (["."], dict(num_classes=8), "no class folders, and the model has 8 classes"),
])
def test_class_folders_that_do_not_fit_a_model_are_one_clear_error(folders, model, error, tmp_path):
    for folder in folders:
        grey_folder(tmp_path / "cats" / folder, 1)
    with pytest.raises(ValueError, match=error):
        open_source(str(tmp_path / "cats"), 8, **model)


def test_a_source_has_the_models_classes_and_its_identity_tells_mappings_apart(tmp_path):
    for folder in ("star", "bars"):
        grey_folder(tmp_path / folder, 20)
    named = open_source(str(tmp_path), 8, "val", names=SHAPES, num_classes=8)
    ordered = open_source(str(tmp_path), 8, "val", names=SHAPES, num_classes=8, any_classes=True)
    assert named.batch(torch.arange(2))[1].tolist() == [7, 5]
    assert ordered.batch(torch.arange(2))[1].tolist() == [0, 1]
    assert named.classes == SHAPES
    assert named.identity != ordered.identity


@pytest.mark.parametrize("model, noted", [
    (dict(names=SHAPES, num_classes=8), False),
    (dict(names=OWN, num_classes=8), True),
    (dict(names=tuple(map(str, range(1000))), num_classes=1000), True),
])
def test_procedural_pictures_are_a_trial_for_models_of_other_classes(model, noted, capsys):
    assert open_source(None, 8, **model).classes == SHAPES
    assert ("note: the procedural pictures are for a trial" in capsys.readouterr().out) == noted


def test_a_model_of_fewer_classes_than_the_procedural_pictures_needs_pictures_of_its_own():
    with pytest.raises(ValueError, match="have 8 classes .circle, .* the model has 4; give --images DIR"):
        open_source(None, 8, num_classes=4, any_classes=True)


def test_imagenets_classes_are_those_of_ilsvrc_2012():
    """Their order is that of the synsets; a name belongs to one class, whatever its case."""
    wnids = list(data.imagenet_classes())
    assert len(wnids) == len({name.lower() for name in imagenet_names()}) == 1000
    assert wnids == sorted(wnids)
    for wnid, number, name in [
            ("n01440764", 0, "tench"), ("n02102040", 217, "English springer"),
            ("n03028079", 497, "church"), ("n03888257", 701, "parachute"),
            ("n15075141", 999, "toilet tissue")]:
        assert wnids[number] == wnid
        assert imagenet_names()[number] == name


def test_a_flat_folder_has_captions_and_a_missing_one_is_named(tmp_path):
    source = ImageFolder(grey_folder(tmp_path, 4, text=True), 8, captions="txt")
    assert source.caption(3) == "a picture, grey 3"
    assert source.labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "002.txt").unlink()
    with pytest.raises(ValueError, match="002.png has no caption"):
        ImageFolder(tmp_path, 8, captions="txt")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    """Notepad and PowerShell put one at the start of a file."""
    plain = grey_folder(tmp_path / "plain", 1)
    (plain / "000.txt").write_text("a cat", encoding="utf-8-sig")
    listed = grey_folder(tmp_path / "listed", 1)
    entry = '{"file_name": "000.png", "text": "a cat"}'
    (listed / "metadata.jsonl").write_text(entry, encoding="utf-8-sig")
    assert ImageFolder(plain, 8, captions="txt").caption(0) == "a cat"
    assert ImageFolder(listed, 8, captions="txt").caption(0) == "a cat"
    (tmp_path / "classes.json").write_text('{"plain": "a cat"}', encoding="utf-8-sig")
    assert ImageFolder(tmp_path, 8, captions="{}").caption(1) == "a cat"


def test_captions_are_made_of_folder_names(tmp_path):
    grey_folder(tmp_path / "snow_owl", 1)
    grey_folder(tmp_path / "n02", 1)
    (tmp_path / "classes.json").write_text('{"n02": "red fox"}')
    source = ImageFolder(tmp_path, 8, captions="a photo of a {}")
    assert [source.caption(i) for i in range(2)] == ["a photo of a red fox", "a photo of a snow owl"]
    with pytest.raises(ValueError, match="mark with {} where the subfolder's name goes"):
        ImageFolder(tmp_path, 8, captions="a photo")
    with pytest.raises(ValueError, match="has no subfolders whose names could go into it"):
        ImageFolder(tmp_path / "n02", 8, captions="a {}")


def test_every_20th_picture_is_for_validation(tmp_path):
    grey_folder(tmp_path, 40)
    train = open_source(str(tmp_path), 8)
    val = open_source(str(tmp_path), 8, "val")
    assert [file.name for file in val.files] == ["019.png", "039.png"]
    assert len({*train.files, *val.files}) == len(train) + 2 == 40
    identities = {train.identity, val.identity, open_source(str(tmp_path), 16).identity}
    assert len(identities) == 3


def test_broken_pictures_are_listed_and_left_out_up_to_a_limit(tmp_path, capsys):
    grey_folder(tmp_path, 40)
    (tmp_path / "004.png").write_bytes(b"")
    (tmp_path / "005.png").write_bytes(b"not a picture")
    assert len(ImageFolder(tmp_path, 8)) == 38
    assert "004.png" in capsys.readouterr().out
    (tmp_path / "006.png").write_bytes((tmp_path / "007.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match="3 of 40 pictures are broken, more than 5%.*006.png"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("name, split, error", [
    ("gone", "all", "no such folder"),
    ("empty", "all", "no pictures in it"),
    ("few", "val", "fewer than 20"),
])
def test_a_folder_without_enough_pictures_is_one_clear_error(name, split, error, tmp_path):
    (tmp_path / "empty").mkdir()
    grey_folder(tmp_path / "few", 19)
    with pytest.raises(ValueError, match=error):
        open_source(str(tmp_path / name), 8, split)


def test_a_picture_that_does_not_decode_gives_its_place_to_the_next(tmp_path, capsys):
    """Hours of encoding ended at such a picture: half of a JPEG, which Pillow's verify() passes."""
    grey_folder(tmp_path, 60, text=True)
    file = tmp_path / "010a.jpg"
    save(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), file)
    file.write_bytes(file.read_bytes()[:2000])
    file.with_suffix(".txt").write_text("broken")
    source = ImageFolder(tmp_path, 8)
    assert source.files[11] == file
    x, labels = source.batch(torch.tensor([10, 11, 12]))
    assert torch.equal(x[1], x[2])
    assert not torch.equal(x[0], x[1])
    assert labels.tolist() == [10, 12, 12]
    assert "010a.jpg" in capsys.readouterr().out
    # a cache keeps the caption of what it holds, also for a source that has not met the broken picture
    for source in (source, ImageFolder(tmp_path, 8)):
        cache = LatentCache(tmp_path / "cache", source, [averages(4, 2)])
        assert cache.captions()[11:13] == ["a picture, grey 11"] * 2
    with pytest.raises(ValueError, match="1 of 61 pictures are broken.*010a.jpg"):
        ImageFolder(tmp_path, 8, max_broken=0).batch(torch.tensor([11]))


def test_an_unfinished_data_set_is_refused(tmp_path):
    grey_folder(tmp_path, 24)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="this data set is not finished, 24 pictures and no metadata.jsonl"):
        ImageFolder(tmp_path, 8)


def test_copies_and_bad_entries_of_a_data_set_are_named_and_left_out(tmp_path, capsys):
    grey_folder(tmp_path, 24)
    entries = [dict(file_name=f"{i:03d}.png", text=f"grey {i}", seed=i) for i in range(22)]
    entries[5]["text"] = " "
    entries[7].update(text="grey 6", seed=6)
    entries += [dict(file_name="003.png", text="again"), dict(file_name="gone.png", text="x")]
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "{half"]))
    shutil.copy(tmp_path / "010.png", tmp_path / "011.png")
    source = ImageFolder(tmp_path, 8, max_broken=0.5, captions="txt")
    out = capsys.readouterr().out
    for reason in ("005.png (its text is empty)",
                   "007.png (the same prompt and seed as 006.png)",
                   "metadata.jsonl:23 (a second entry for 003.png)",
                   "gone.png (metadata.jsonl names it",
                   "metadata.jsonl:25 (not an entry",
                   "011.png (a copy of 010.png)",
                   "023.png (no entry"):
        assert reason in out
    assert [file.name for file in source.files] == [f"{i:03d}.png" for i in range(22) if i not in (5, 7, 11)]
    assert source.classes == ()
    assert source.caption(3) == "grey 3"
    assert len(ImageFolder(tmp_path, 8)) == 24                       # they matter to captions alone
    with pytest.raises(ValueError, match="of 24 pictures are broken, more than 5%"):
        ImageFolder(tmp_path, 8, captions="txt")


# ---- the order of a run --------------------------------------------------------------------------

def test_the_order_of_a_run_is_a_function_of_the_step_and_every_epoch_a_permutation():
    steps = [order(k, 6, 20, seed=3) for k in range(20)]       # 6 epochs of 20, with edges inside of batches
    epochs = torch.cat(steps).view(6, 20)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(20).expand(6, 20))
    assert len(epochs.unique(dim=0)) == 6
    assert torch.equal(order(7, 6, 20, seed=3), steps[7])
    assert torch.equal(order(1, 60, 20, seed=3), epochs[3:].flatten())       # a batch of several epochs
    assert not torch.equal(order(0, 6, 20, seed=4), steps[0])


# ---- latents -------------------------------------------------------------------------------------

def test_the_cache_holds_every_autoencoders_latents_of_the_very_same_pixels(tmp_path):
    """Two independent flips or crops leave a finite loss and a ruined alignment."""
    source = ShapesSource(64)
    aes = [load_autoencoder("tiny-kl-f8c4"), load_autoencoder("tiny-dc-ae-f32c32")]
    cache = LatentCache(tmp_path, source, aes, n=8, flip=True, batch=3)
    images, labels = source.batch(torch.arange(8))
    rows = torch.tensor([13, 0, 3, 8, 15])
    z, y = cache.batch(rows)
    for ae in aes:
        encoded = ae.encode(torch.cat([images, images.flip(-1)])[rows])
        assert_near(z[ae.cfg.name], encoded, 2e-3)                   # stored in 16 bits
    assert torch.equal(y, labels[rows % 8])
    assert torch.equal(torch.cat(cache.batches(5)), torch.arange(16))


def test_an_autoencoder_can_see_the_same_pictures_smaller(tmp_path):
    """The base's, in Eq. 1 by --match resize."""
    source = ShapesSource(32)
    aes = [averages_kl(8), averages(8)]
    z, _ = LatentCache(tmp_path, source, aes, n=4, sizes={"averages-kl-f8": 16}).batch(torch.arange(4))
    images, _ = source.batch(torch.arange(4))
    assert_near(z["averages-f8"], aes[1].posterior(images)[0], 2e-3)
    assert_near(z["averages-kl-f8"], aes[0].posterior(F.avg_pool2d(images, 2))[0], 2e-3)


def test_the_key_of_a_cache_covers_all_that_it_holds(tmp_path):
    retrained = averages(8)
    retrained.weight.data.fill_(2)
    given = dict(source=ShapesSource(16), autoencoders=[averages(8)], n=8, flip=False)
    folders = set()
    for change in (
            {},
            dict(source=ShapesSource(16, split="val")),
            dict(source=ShapesSource(32)),
            dict(autoencoders=[retrained]),
            dict(autoencoders=[averages(8, 5.05)]),
            dict(n=9),
            dict(sizes={"averages-f8": 8}),
            dict(flip=True)):
        folders.add(LatentCache(tmp_path, **{**given, **change}).dir)
    assert len(folders) == 8


def test_a_damaged_cache_is_refused_with_the_reason(tmp_path):
    def fill():
        return LatentCache(tmp_path, ShapesSource(16), [averages_kl(8)], n=64)

    file = fill().dir / "averages-kl-f8.std.npy"
    rows = np.load(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="std.npy is missing or not whole.*delete the folder"):
        fill()
    np.save(file, rows[:-1])
    with pytest.raises(ValueError, match="has 63 rows instead of 64"):
        fill()
    meta = file.with_name("meta.json")
    stored = json.loads(meta.read_text())
    stored["what"]["n"] = 9
    meta.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="describes another cache than its folder's name"):
        fill()
    meta.write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        fill()


def test_a_cache_gives_means_without_a_generator_and_draws_with_one(tmp_path):
    """Noise in the target would be learnt by nobody; a frozen draw would be learnt by heart."""
    cache = LatentCache(tmp_path, ShapesSource(16), [averages_kl(8), averages(8)], n=8)
    rows = torch.tensor([2, 7]).repeat(1000)
    means = cache.batch(rows)[0]
    draws = cache.batch(rows, torch.Generator().manual_seed(0))[0]
    assert torch.equal(draws["averages-f8"], means["averages-f8"])             # no posterior, no draw
    noise = draws["averages-kl-f8"] - means["averages-kl-f8"]
    assert noise.mean().abs() < 5 * 0.1 / noise.numel() ** 0.5
    assert noise.std(dim=0).mean() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("scale", [0.3, 25.0])
def test_latents_of_a_wrong_scale_are_refused_every_time(scale, tmp_path):
    for _ in range(2):                                               # the second try finds no finished cache
        with pytest.raises(ValueError, match=f"standard deviation.*is its scale {scale} right"):
            LatentCache(tmp_path, ShapesSource(16), [averages(8, scale)], n=8)


@pytest.mark.parametrize("name, foreign, std, refused, noted", [
    ("tiny-kl-f8c4", False, 1.0, False, False),
    ("tiny-kl-f8c4", True, 1.0, False, False),
    ("tiny-kl-f8c4", True, 1.63, False, True),                       # photographs: 1.45 to 1.7
    ("tiny-dc-ae-f32c32", True, 2.4, False, True),                   # plain black
    ("tiny-kl-f8c4", True, 3.1, True, False),                        # photographs, the scale doubled
    ("tiny-kl-f8c4", False, 1.97, True, False),                      # its own pictures, the scale doubled
    ("sd-vae-f8c4", True, 1.63, True, False),
    ("sd-vae-f8c4", True, float("nan"), True, False),
])
def test_photographs_on_bundled_autoencoders_are_noted_and_wrong_scales_refused(
        name, foreign, std, refused, noted, capsys):
    print_once.cache_clear()
    latents = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32) * std
    if refused:
        with pytest.raises(ValueError, match=f"{name}: latents of standard deviation .* is its scale"):
            check_scale(AUTOENCODERS[name], latents, foreign, "cache")
    else:
        check_scale(AUTOENCODERS[name], latents, foreign, "cache")
    assert ("note: the bundled autoencoders were trained on procedural" in capsys.readouterr().out) == noted


def test_a_folder_is_foreign_to_a_bundled_autoencoder(tmp_path, capsys):
    """White pictures: latents of standard deviation 1.86."""
    print_once.cache_clear()
    for i in range(4):
        save(np.full((32, 32, 3), 255 - i, np.uint8), tmp_path / f"{i}.png")
    LatentCache(tmp_path / "cache", ImageFolder(tmp_path, 32), [load_autoencoder("tiny-kl-f8c4")])
    assert "For photographs take a base with published weights" in capsys.readouterr().out


FULL_DISK = """
import os, resource
from data import LatentCache
from shapes import ShapesSource
from test_data import averages, averages_kl
if {plain}:
    del os.posix_fallocate
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    LatentCache("cache", ShapesSource(64), [averages_kl(8), averages(4)], n=400)
except ValueError as e:
    print(e)
"""


@pytest.mark.parametrize("plain", [False, True])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(plain, tmp_path):
    """A memory map is written without asking: a bus error killed the process."""
    root = Path(data.__file__).parent
    path = {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", FULL_DISK.format(plain=plain)], cwd=tmp_path,
                         env=os.environ | path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # 400 rows of a label, two arrays of 3*8*8 and one of 3*16*16 half numbers
    assert "--cache cache: latents of 400 pictures need 0.9 MB, and " in run.stdout
    assert "make room, give another folder" in run.stdout
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("plain", [False, True])
def test_the_bytes_of_an_array_are_set_aside(plain, tmp_path, monkeypatch):
    if plain:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    file = tmp_path / "array"
    with file.open("wb") as f:
        f.write(b"head")
        f.truncate(3_000_000)
    assert file.stat().st_blocks * 512 < 100_000
    data.reserve(file)
    assert file.stat().st_blocks * 512 >= 3_000_000
    assert file.read_bytes() == b"head" + bytes(2_999_996)


def test_a_cache_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache .*file/.*: Not a directory; give a folder"):
        LatentCache(tmp_path / "file", ShapesSource(16), [averages(8)], n=8)


def test_a_long_encoding_says_so_in_one_line_where_there_is_no_terminal(tmp_path, capsys):
    for n, said in ((256, 0), (300, 1)):
        LatentCache(tmp_path, ShapesSource(8), [averages(4)], n=n)
        out, err = capsys.readouterr()
        assert out.count(f"encoding {n} pictures ...\n") == said
        assert err == ""


def test_the_facts_of_a_cache_change_with_captions_and_labels(tmp_path):
    def facts(source, **options):
        found = LatentCache(tmp_path / "cache", source, [averages(4, 2.0)], **options).facts()
        return json.dumps(found, sort_keys=True)

    folder = grey_folder(tmp_path / "pictures", 26, text=True)
    before = facts(ImageFolder(folder, 8, captions="txt"))
    assert facts(ImageFolder(folder, 8, captions="txt")) == before
    (folder / "002.txt").write_text("another")
    after = facts(ImageFolder(folder, 8, captions="txt"))
    different = {before, after, facts(ImageFolder(folder, 8)), facts(ImageFolder(folder, 8), flip=True),
                 facts(ImageFolder(folder, 8), n=25)}
    assert len(different) == 5
    assert "captions" not in facts(ImageFolder(folder, 8))


class Killed(BaseException):
    """Unlike KeyboardInterrupt, it does not end pytest too."""


class DyingSource(ShapesSource):
    """Counts batches, and raises Killed at number `at`."""

    def __init__(self, at: int | None):
        super().__init__(16)
        self.at = at
        self.calls = 0

    def batch(self, indices):
        if self.calls == self.at:
            raise Killed
        self.calls += 1
        return super().batch(indices)


def fill(root: Path, at: int | None = None) -> int:
    """Fill a cache of 140 rows, one a batch, fifty of which become safe at a time -> batches drawn."""
    source = DyingSource(at)
    LatentCache(root, source, [averages_kl(8), averages(8)], n=70, flip=True, batch=1)
    return source.calls


@pytest.mark.parametrize("killed_at", [49, 50, 117])
def test_a_killed_cache_goes_on_to_the_same_bytes_and_encodes_nothing_twice(killed_at, tmp_path):
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    fill(straight)
    with pytest.raises(Killed):
        fill(killed, killed_at)
    assert fill(killed) == 140 - killed_at // 50 * 50
    for file in straight.rglob("*.*"):
        assert (killed / file.relative_to(straight)).read_bytes() == file.read_bytes()
    assert fill(killed) == 0                                         # finished


def test_of_two_that_fill_one_cache_the_second_waits(tmp_path):
    """Two runs on the same pictures, started at once: the second emptied the arrays that the first wrote."""
    second = DyingSource(None)
    other = threading.Thread(
        target=LatentCache, args=(tmp_path, second, [averages(8)]), kwargs=dict(n=70, batch=1))

    class First(DyingSource):
        def batch(self, indices):
            if self.calls == 10:
                other.start()
            return super().batch(indices)

    cache = LatentCache(tmp_path, First(None), [averages(8)], n=70, batch=1)
    other.join()
    assert second.calls == 0
    latents = cache.batch(torch.arange(70))[0]["averages-f8"]
    assert latents.flatten(1).abs().amax(dim=1).min() > 0
