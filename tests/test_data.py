import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from autoencoder import DCAEConfig, KLConfig
from checkpoints import load_autoencoder
from data import ImageFolder, LatentCache, load_image, open_source, order
from helpers import assert_near
from shapes import ShapesSource


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


def test_a_flat_folder_has_captions_and_a_missing_one_is_named(tmp_path):
    source = ImageFolder(grey_folder(tmp_path, 4, text=True), 8, captions="txt")
    assert source.caption(3) == "a picture, grey 3"
    assert source.labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "002.txt").unlink()
    with pytest.raises(ValueError, match="002.png has no caption"):
        ImageFolder(tmp_path, 8, captions="txt")


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
            dict(flip=True)):
        folders.add(LatentCache(tmp_path, **{**given, **change}).dir)
    assert len(folders) == 7


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
