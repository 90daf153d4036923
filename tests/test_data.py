import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from autoencoder import DCAEConfig, KLConfig, build_autoencoder
from checkpoints import load_autoencoder
from data import ImageFolder, LatentCache, TextEncoder, cache_prompts, load_image, open_source, order
from helpers import TINY_KL, assert_near, scramble
from shapes import ShapesSource, shapes


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


def described_folder(root: Path, entries: list) -> Path:
    """24 grey pictures and a metadata.jsonl of these lines: dicts, or lines as they are."""
    grey_folder(root, 24)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (root / "metadata.jsonl").write_text("\n".join(lines))
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


def calibrated_kl():
    """A scrambled KL-VAE whose latents of small shapes have a standard deviation of 1."""
    ae = scramble(build_autoencoder(TINY_KL))
    mean = ae.moments(shapes(torch.arange(64), 16)[0])[0]
    ae.cfg = replace(TINY_KL, scale=1 / mean.std().item(), shift=0.0)
    return ae


# ---- folders of pictures -------------------------------------------------------------------------

def test_a_picture_is_cropped_to_its_middle_and_turned_as_its_exif_says(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:32, 0] = 255                                      # the left half of the central square is red
    save(wide, tmp_path / "wide.png")
    x = load_image(tmp_path / "wide.png", 32)
    assert x.shape == (3, 32, 32)
    assert x[0, :, :15].min() > 0.95
    assert x[0, :, 17:].max() < -0.95
    assert x[1:].max() < -0.95

    exif = Image.Exif()
    exif[0x0112] = 6                                        # a camera held upright: turn right by 90 degrees
    save(wide, tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    y = load_image(tmp_path / "turned.jpg", 32)
    assert y[0, :14].min() > 0.8
    assert y[0, 18:].max() < -0.8


HALF = np.arange(64).reshape(8, 8) % 8 < 4                          # the left half of a small picture
RED = torch.tensor([1.0, -1.0, -1.0])


def transparent_palette() -> Image.Image:
    im = Image.fromarray((~HALF).astype(np.uint8), "P")
    im.putpalette([255, 0, 0, 0, 0, 0])                          # colour 1 is black, and will be transparent
    return im


@pytest.mark.parametrize("name, image, options, right", [
    ("alpha.png", Image.fromarray(HALF[..., None] * np.uint8([255, 0, 0, 255]), "RGBA"), {}, 1.0),
    ("palette.png", transparent_palette(), {"transparency": 1}, 1.0),
    ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 100}, RED),
])
def test_every_kind_of_picture_becomes_rgb_on_white(name, image, options, right, tmp_path):
    image.save(tmp_path / name, **options)
    x = load_image(tmp_path / name, 8)
    assert (x[:, :, 0] - RED[:, None]).abs().max() < 0.05
    assert (x[:, :, 7].T - right).abs().max() < 0.05


@pytest.mark.parametrize("level", [0, 300, 16384, 65535])
def test_grey_of_16_bits_is_scaled_not_clipped(level, tmp_path):
    save(np.full((8, 8), level, np.uint16), tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png", 8) - (level / 32767.5 - 1)).abs().max() < 0.005


def test_folders_are_classes(tmp_path):
    for name, n in (("cat", 3), ("dog", 2), ("birds/owl", 1)):
        grey_folder(tmp_path / name, n)
    source = ImageFolder(tmp_path, 8)
    assert source.classes == ("birds/owl", "cat", "dog")
    assert source.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert len(source) == 6
    x, y = source.batch(torch.tensor([4, 1, 5]))
    assert x.shape == (3, 3, 8, 8)
    assert y.tolist() == [2, 1, 2]
    assert (x[0] == -1).all()

    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png lies beside class folders"):
        ImageFolder(tmp_path, 8)


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    """A part of ImageNet: its classes are those that the base was trained with, not the first ones."""
    for name, n in (("0207", 2), ("9", 1), ("0360", 1)):
        grey_folder(tmp_path / name, n)
    source = ImageFolder(tmp_path, 8)
    assert len(source.classes) == 361
    assert source.classes[207] == "207"
    assert source.labels.tolist() == [207, 207, 360, 9]
    (tmp_path / "9").rename(tmp_path / "nine")
    named = ImageFolder(tmp_path, 8)
    assert named.classes == ("0207", "0360", "nine")
    assert named.labels.tolist() == [0, 0, 1, 2]


def test_a_date_is_no_class_number(tmp_path):
    grey_folder(tmp_path / "20240131", 2)
    assert ImageFolder(tmp_path, 8).classes == ("20240131",)


def test_linked_class_folders_are_followed(tmp_path):
    grey_folder(tmp_path / "elsewhere", 3)
    (tmp_path / "all").mkdir()
    (tmp_path / "all/cat").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(tmp_path / "all", 16)
    assert len(source) == 3
    assert source.classes == ("cat",)


def test_a_flat_folder_has_captions_and_a_missing_one_is_named(tmp_path):
    source = ImageFolder(grey_folder(tmp_path, 4, text=True), 8, captions="txt")
    assert source.caption(3) == "a picture, grey 3"
    assert source.classes == ()
    assert source.labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "002.txt").unlink()
    with pytest.raises(ValueError, match="002.png has no caption"):
        ImageFolder(tmp_path, 8, captions="txt")
    assert len(ImageFolder(tmp_path, 8)) == 4                        # without captions it needs none


def test_captions_are_made_of_folder_names(tmp_path):
    grey_folder(tmp_path / "snow_owl", 1)
    grey_folder(tmp_path / "n02", 1)
    (tmp_path / "classes.json").write_text('{"n02": "red fox"}')
    source = ImageFolder(tmp_path, 8, captions="a photo of a {}")
    assert source.classes == ()
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
    assert len(train) == 38
    assert not set(train.files) & set(val.files)
    others = [ImageFolder(tmp_path, 8), ImageFolder(tmp_path, 16)]
    assert len({source.identity for source in (train, val, *others)}) == 4


def test_broken_pictures_are_listed_and_left_out_up_to_a_limit(tmp_path, capsys):
    grey_folder(tmp_path, 40)
    (tmp_path / "004.png").write_bytes(b"")
    source = ImageFolder(tmp_path, 8)
    assert len(source) == 39
    assert source.broken == [tmp_path / "004.png"]
    assert "004.png" in capsys.readouterr().out
    (tmp_path / "005.png").write_bytes(b"not a picture")
    assert len(ImageFolder(tmp_path, 8)) == 38
    (tmp_path / "006.png").write_bytes((tmp_path / "007.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match="3 of 40 pictures are broken, more than 5%.*006.png"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("n, split, error", [
    (None, "all", "no such folder"), (0, "all", "no pictures in it"), (19, "val", "fewer than 20")])
def test_a_folder_without_enough_pictures_is_one_clear_error(n, split, error, tmp_path):
    folder = tmp_path / "pictures"
    if n is not None:
        folder.mkdir()
        grey_folder(folder, n)
    with pytest.raises(ValueError, match=error):
        open_source(str(folder), 8, split)


@pytest.fixture
def undecodable(tmp_path) -> Path:
    """62 pictures, two of them halves of a JPEG: Pillow's verify() passes them."""
    grey_folder(tmp_path, 60, text=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in (10, 11):
        file = tmp_path / f"{i:03d}a.jpg"
        save(noise, file)
        file.write_bytes(file.read_bytes()[:2000])
        file.with_suffix(".txt").write_text("broken")
    return tmp_path


def test_a_picture_that_does_not_decode_gives_its_place_to_the_next(undecodable, capsys):
    """Hours of encoding ended at such a picture."""
    source = ImageFolder(undecodable, 8)
    broken = source.files.index(undecodable / "010a.jpg")
    assert not source.broken
    x, labels = source.batch(torch.arange(broken - 1, broken + 2))
    assert torch.equal(x[1], x[2])
    assert not torch.equal(x[0], x[1])
    assert source.broken == [undecodable / "010a.jpg"]
    assert "010a.jpg" in capsys.readouterr().out
    assert [source.caption(i) for i in labels[1:]] == ["a picture, grey 11"] * 2
    # a cache keeps the caption of what it holds, also for a source that has not met the broken picture
    for source in (source, ImageFolder(undecodable, 8)):
        cache = LatentCache(undecodable / "cache", source, [averages(4, 2)])
        assert len(cache) == 62
        assert cache.captions()[broken : broken + 2] == ["a picture, grey 11"] * 2


def test_pictures_that_do_not_decode_count_as_broken(undecodable):
    source = ImageFolder(undecodable, 8, max_broken=0)
    broken = source.files.index(undecodable / "010a.jpg")
    with pytest.raises(ValueError, match="1 of 62 pictures are broken.*010a.jpg"):
        source.batch(torch.tensor([broken]))


def test_a_folder_with_metadata_has_its_captions_if_captions_are_wanted(tmp_path):
    described_folder(tmp_path, [dict(file_name=f"{i:03d}.png", text=f"grey {i}") for i in range(24)])
    source = ImageFolder(tmp_path, 8, captions="txt")
    assert source.classes == ()
    assert [source.caption(i) for i in (0, 23)] == ["grey 0", "grey 23"]
    assert open_source(str(tmp_path), 8, "val", "txt").caption(0) == "grey 19"
    assert len(ImageFolder(tmp_path, 8)) == 24


@pytest.mark.parametrize("captions", [None, "txt"])
def test_an_unfinished_data_set_is_refused(captions, tmp_path):
    grey_folder(tmp_path, 24)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="this data set is not finished, 24 pictures and no metadata.jsonl"):
        ImageFolder(tmp_path, 8, captions=captions)


def test_copies_and_bad_entries_of_a_data_set_are_named_and_left_out(tmp_path, capsys):
    entries = [dict(file_name=f"{i:03d}.png", text=f"grey {i}", seed=i) for i in range(22)]
    entries[5]["text"] = " "
    entries[7].update(text="grey 6", seed=6)
    more = [dict(file_name="003.png", text="again"), "{half", dict(file_name="gone.png", text="x")]
    described_folder(tmp_path, [*entries, *more])
    shutil.copy(tmp_path / "010.png", tmp_path / "011.png")
    source = ImageFolder(tmp_path, 8, max_broken=0.5, captions="txt")
    out = capsys.readouterr().out
    for reason in ("005.png (its text is empty)",
                   "007.png (the same prompt and seed as 006.png)",
                   "metadata.jsonl:23 (a second entry for 003.png)",
                   "metadata.jsonl:24 (not an entry",
                   "gone.png (metadata.jsonl names it",
                   "011.png (a copy of 010.png)",
                   "022.png (no entry",
                   "023.png (no entry"):
        assert reason in out
    assert [file.name for file in source.files] == [f"{i:03d}.png" for i in range(22) if i not in (5, 7, 11)]
    assert source.caption(3) == "grey 3"
    with pytest.raises(ValueError, match="of 24 pictures are broken, more than 5%"):
        ImageFolder(tmp_path, 8, captions="txt")


# ---- the order of a run --------------------------------------------------------------------------

def test_the_order_of_a_run_is_a_function_of_the_step_and_every_epoch_a_permutation():
    steps = [order(k, 6, 20, seed=3) for k in range(20)]       # 6 epochs of 20, with edges inside of batches
    epochs = torch.cat(steps).view(6, 20)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(20).expand(6, 20))
    assert len(epochs.unique(dim=0)) == 6
    assert torch.equal(order(7, 6, 20, seed=3), steps[7])
    assert torch.equal(torch.cat([order(k, 12, 20, seed=3) for k in range(10)]), epochs.flatten())
    assert not torch.equal(order(0, 6, 20, seed=4), steps[0])
    assert order(1, 50, 20, seed=0).shape == (50,)                   # a batch of several epochs


# ---- latents -------------------------------------------------------------------------------------

def test_both_autoencoders_encode_the_very_same_pixels(tmp_path):
    """Two independent flips or crops leave a finite loss and a ruined alignment."""
    cache = LatentCache(tmp_path, ShapesSource(32), [averages_kl(4), averages(16)], n=48, flip=True)
    z, y = cache.batch(torch.arange(len(cache)))
    base = F.avg_pool2d(z["averages-kl-f4"], 4)
    deep = z["averages-f16"]
    assert len(cache) == 96
    assert (base - deep).abs().max() < 0.01
    assert torch.equal(y[:48], y[48:])
    assert torch.equal(deep[:48].flip(-1), deep[48:])
    assert (base[:48] - deep[48:]).abs().mean() > 0.1                # one flip too many would show


@pytest.mark.parametrize("name", ["tiny-kl-f8c4", "tiny-dc-ae-f32c32"])
def test_the_cache_holds_the_latents_of_the_pictures(name, tmp_path):
    source = ShapesSource(64)
    ae = load_autoencoder(name)
    cache = LatentCache(tmp_path, source, [ae], n=8, flip=True)
    images, labels = source.batch(torch.arange(8))
    z, y = cache.batch(torch.tensor([3, 8 + 5]))
    pictures = torch.stack([images[3], images[5].flip(-1)])
    assert_near(z[name], ae.encode(pictures), 2e-3)                  # stored in 16 bits
    assert y.tolist() == [labels[3], labels[5]]
    assert torch.equal(torch.cat(cache.batches(5)), torch.arange(16))


def test_the_key_of_a_cache_covers_all_that_it_holds(tmp_path):
    other = calibrated_kl()
    other.decoder.conv_out.bias += 1e-3
    scaled = calibrated_kl()
    scaled.cfg = replace(scaled.cfg, scale=scaled.cfg.scale * 1.01)
    small = ShapesSource(16)

    def folder(source=small, ae=calibrated_kl(), n=4, flip=False):
        return LatentCache(tmp_path, source, [ae], n, flip).dir

    folders = [
        folder(), folder(ShapesSource(16, split="val")), folder(ShapesSource(32)), folder(ae=other),
        folder(ae=scaled), folder(n=5), folder(flip=True)]
    assert len(set(folders)) == 7
    assert folder() == folders[0]


@pytest.mark.parametrize("name", ["averages-kl-f8", "averages-kl-f8.std", "labels"])
def test_a_damaged_cache_is_refused_with_the_reason(name, tmp_path):
    def fill():
        return LatentCache(tmp_path, ShapesSource(16), [averages_kl(8)], n=64)

    file = fill().dir / f"{name}.npy"
    whole = file.read_bytes()
    for damaged in (whole[:-100], b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.npy is missing or not whole.*delete the folder"):
            fill()
    file.write_bytes(whole)
    np.save(file, np.load(file)[:-1])
    with pytest.raises(ValueError, match="has 63 rows instead of 64"):
        fill()
    file.write_bytes(whole)
    fill()


def test_a_cache_of_something_else_is_refused(tmp_path):
    def fill():
        return LatentCache(tmp_path, ShapesSource(16), [averages(8)], n=8)

    meta = fill().dir / "meta.json"
    stored = json.loads(meta.read_text())
    meta.write_text(json.dumps({**stored, "what": {**stored["what"], "n": 9}}))
    with pytest.raises(ValueError, match="describes another cache than its folder's name"):
        fill()
    meta.write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        fill()


def test_a_cache_gives_means_without_a_generator_and_draws_with_one(tmp_path):
    """Noise in the target would be learnt by nobody; a frozen draw would be learnt by heart."""
    cache = LatentCache(tmp_path, ShapesSource(16), [averages_kl(8), averages(8)], n=8)
    rows = torch.tensor([2, 7])
    g = torch.Generator().manual_seed(0)
    mean = cache.batch(rows)[0]
    draws = [cache.batch(rows, g)[0] for _ in range(500)]
    assert all(torch.equal(z["averages-f8"], mean["averages-f8"]) for z in draws)      # no posterior, no draw
    z = torch.stack([z["averages-kl-f8"] for z in draws])
    assert z[0].ne(z[1]).all()
    assert (z.mean(0) - mean["averages-kl-f8"]).abs().max() < 5 * 0.1 / 500**0.5
    torch.testing.assert_close(z.std(0).mean(), torch.tensor(0.1), rtol=0.05, atol=0)


@pytest.mark.parametrize("scale", [0.3, 25.0])
def test_latents_of_a_wrong_scale_are_refused_every_time(scale, tmp_path):
    for _ in range(2):                                               # the second try finds no finished cache
        with pytest.raises(ValueError, match=f"standard deviation.*is its scale {scale} right"):
            LatentCache(tmp_path, ShapesSource(16), [averages(8, scale)], n=8)


# ---- a kill while a cache is written -------------------------------------------------------------

class Killed(BaseException):
    """Unlike KeyboardInterrupt, it does not end pytest too."""


class Fuse:
    """Counts calls, and raises Killed at call number `at`."""

    def __init__(self, at: int = 10**6):
        self.at = at
        self.calls = 0

    def __call__(self):
        if self.calls == self.at:
            raise Killed
        self.calls += 1


class FusedSource(ShapesSource):
    def __init__(self, fuse: Fuse):
        super().__init__(16)
        self.fuse = fuse

    def batch(self, indices):
        self.fuse()
        return super().batch(indices)


def fill_latents(root: Path, fuse: Fuse):
    LatentCache(root, FusedSource(fuse), [averages_kl(8), averages(8)], n=70, flip=True, batch=1)


def fill_prompts(root: Path, fuse: Fuse):
    """30 prompts, 20 of them different, under two text encoders of one part of a Text each."""
    def encode(tokenizer, model, prompt, length, plain):
        fuse()
        g = torch.Generator().manual_seed(len(prompt) + 100 * plain)
        return {model: torch.randn(1, length, generator=g).bfloat16()}

    def load_encoder(found, dtype, device):
        return None, found.encoder.class_name

    kind = tuple(TextEncoder(part, part, part, encode, 0) for part in ("tokens", "pooled"))
    pipeline = root.with_name("pipeline")
    for encoder in kind:
        (pipeline / encoder.model).mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.TEXT_ENCODERS, "fused", kind)
        patch.setattr(data, "load_encoder", load_encoder)
        cache_prompts("fused", pipeline, ["x" * (1 + i % 20) for i in range(30)], 8, cache=root)


# the writer, what it encodes in all, and how much of it becomes safe at a time
WRITERS = {"latents": (fill_latents, 140, 50), "prompts": (fill_prompts, 2 * (1 + 20), 1)}


@pytest.mark.parametrize("writer, killed_at", [
    ("latents", 49), ("latents", 50), ("latents", 117), ("prompts", 0), ("prompts", 1), ("prompts", 22)])
def test_a_killed_cache_goes_on_to_the_same_bytes_and_encodes_nothing_twice(writer, killed_at, tmp_path):
    fill, total, step = WRITERS[writer]
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    fill(straight, Fuse())
    with pytest.raises(Killed):
        fill(killed, Fuse(killed_at))
    rest = Fuse()
    fill(killed, rest)
    assert rest.calls == total - killed_at // step * step
    names = {file.relative_to(straight) for file in straight.rglob("*") if file.is_file()}
    assert names == {file.relative_to(killed) for file in killed.rglob("*") if file.is_file()}
    for name in names:
        assert (straight / name).read_bytes() == (killed / name).read_bytes()
    fill(killed, Fuse(0))                                            # finished: nothing is encoded
