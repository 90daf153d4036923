"""Pictures and prompts in, batches out: the latents that training reads, image folders, encoded prompts.

    order(step, batch, n, seed)      -> indices (batch,) of a training step
    LatentCache(root, source, aes)   -> cache.batch(indices): {autoencoder: z (B,C,H,W)}, label (B,)
    open_source(images, res)         -> source.batch(indices): image (B,3,H,W) in [-1,1], label (B,)
    number_classes(folders, names)   -> {folder: class number}
    cache_prompts(kind, folder, ...) -> texts[indices]: Text

Latents and prompts are encoded once, and read from the disk a batch at a time.

A source of pictures has len(), .size, .classes (names), .captioned, .identity (a text that changes with any
of its pictures or labels) and .batch(indices). A source with captions has no classes: a label is the
picture's number, .caption(number) its text. Autoencoders come in as arguments, text encoders as folders.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:                         # Windows, where folders are not locked
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model import Text
from autoencoder import AUTOENCODERS, KLConfig
from checkpoints import HERE, atomic, find_weights, fingerprint, write_json
from shapes import SHAPES, ScenesSource, ShapesSource, encode_words, note_unknown_words, print_once


# ---- the order of a run --------------------------------------------------------------------------

# a batch may lie across an epoch's end
@lru_cache(maxsize=16)
def epoch_permutation(epoch: int, n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def order(step: int, batch: int, n: int, seed: int) -> Tensor:
    """The indices of training step `step`, (batch,) of n samples: every epoch is a new permutation. A
    function of the step alone: a resumed run reads what the killed one would have read, on any number of
    ranks."""
    # positions in the sequence of all epochs, one behind the other
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    places = positions % n
    parts = [epoch_permutation(epoch, n, seed)[places[epochs == epoch]] for epoch in epochs.unique().tolist()]
    return torch.cat(parts)


# ---- latents -------------------------------------------------------------------------------------

def check_scale(cfg, latents: np.ndarray, foreign: bool = False, report=None):
    """ValueError unless latents (N,C,H,W) have a standard deviation of about 1: a scale forgotten, doubled or
    of another autoencoder trains to a finite loss, and ruins the run.
    foreign: the pictures are a user's own. The bundled autoencoders have seen procedural pictures alone: of
    photographs they make latents of 1.45 to 1.7, of plain black 2.4. That is noted, not refused.
    report: where the latents are, printed with their statistics."""
    z = latents[:: max(1, len(latents) // 2048)].astype(np.float32)
    std = z.std()
    trial = foreign and is_bundled(cfg.name)
    low, high = (0.3, 2.5) if trial else (0.6, 1.6)
    if not low < std < high:
        raise ValueError(f"{cfg.name}: latents of standard deviation {std:.2f}, where {low} to {high} is "
                         f"expected; is its scale {cfg.scale} right for these weights? If so, are the "
                         "pictures nearly empty?")
    if report:
        print(f"{cfg.name}: latents of mean {z.mean():+.3f}, standard deviation {std:.3f} -> {report}")
    if report and trial and not 0.7 < std < 1.4:
        print_once("note: the bundled autoencoders were trained on procedural pictures and blur these, which "
                   "are unlike them; fine for a trial. For photographs take a base with published weights, "
                   "as --base dit-xl --ae dc-ae-f32c32-in-1.0")


def is_bundled(autoencoder: str) -> bool:
    """Whether the weights of this autoencoder are in this repository."""
    cfg = AUTOENCODERS.get(autoencoder)
    return cfg is not None and cfg.weights.startswith("weights/")


def has_posterior(ae) -> bool:
    """Whether an autoencoder's latents are drawn from a Gaussian; a DC-AE's are points."""
    return isinstance(ae.cfg, KLConfig)


def progress(items, title: str, many: bool):
    """The items behind a bar if they are many; where there is no terminal, behind one printed line."""
    if many and not sys.stderr.isatty():
        print(f"{title} ...", flush=True)
    return tqdm(items, desc=title, leave=False, disable=None if many else True)


def make_writable(folder):
    """Make a cache folder. ValueError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission to write"
    except OSError as e:
        reason = e.strerror
    if reason:
        raise ValueError(f"--cache {folder}: {reason}; give a folder that can be written")


def reserve(file: Path):
    """Have the disk set aside all bytes of a file: a write into a memory map of a full disk kills the
    process. OSError if there is no room."""
    size = file.stat().st_size
    with file.open("rb+") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, size)
            return
        # macOS has none: write what is there, the zeros of a hole
        while block := f.read(2**20):
            f.seek(-len(block), os.SEEK_CUR)
            f.write(block)


@contextmanager
def turn_to_fill(folder: Path):
    """Of two processes that would fill one folder, the second waits here until the first is done."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another process fills it; waiting", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass                                # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


class LatentCache:
    """Latents of one source under one or more autoencoders, in a folder of arrays that are read
    memory-mapped.

    Embedding alignment needs both autoencoders' latents of *the very same pixels*: two independent flips or
    crops ruin it with a finite loss. So a picture is drawn once, flipped or not, and goes through every
    encoder in one pass. With flip, row n + i is picture i mirrored. KL-VAE latents are stored as mean and
    standard deviation.

    The folder's name is a hash of all that decides the latents; meta.json spells it out and counts the
    finished rows: a killed filling goes on there, to the same bytes. What is missing, short or of another
    source is refused with the reason (ValueError), and so is a disk without room for all of it.

    sizes: {autoencoder: pixels} of those that see the pictures at a smaller size than the source's."""

    def __init__(self, root, source, autoencoders: list, n: int | None = None, flip: bool = False,
                 batch: int | None = None, device="cpu", sizes: dict[str, int] | None = None):
        n = min(n or len(source), len(source))
        # the key: all that decides the latents
        made_by = []
        for ae in autoencoders:
            settings = {name: getattr(ae.cfg, name) for name in ("name", "f", "channels", "scale", "shift")}
            made_by.append({**settings, "weights": fingerprint(ae)})
        self.what = dict(
            layout=2, source=source.identity, n=n, flip=flip, dtype="float16", autoencoders=made_by)
        self.sizes = sizes or {}
        if self.sizes:
            self.what["sizes"] = self.sizes
        key = hashlib.sha256(json.dumps(self.what, sort_keys=True).encode()).hexdigest()[:12]
        self.dir = Path(root) / f"latents-{key}"
        self.source = source
        self.length = 2 * n if flip else n

        # fill what is missing, then map the arrays into memory
        if self._finished_rows() < self.length:
            # 32 pictures up to 512 px, 8 of 1K, 1 of 4K
            batch = batch or max(1, min(32, 2**23 // source.size**2))
            make_writable(self.dir)
            with turn_to_fill(self.dir):
                self._fill(self._finished_rows(), n, autoencoders, batch, device)
        self.labels = torch.from_numpy(np.array(self._open("labels")))
        self.mean = {ae.cfg.name: self._open(ae.cfg.name) for ae in autoencoders}
        drawn = [ae.cfg.name for ae in autoencoders if has_posterior(ae)]
        self.std = {name: self._open(f"{name}.std") for name in drawn}

    def __len__(self):
        return self.length

    def batch(self, indices: Tensor, generator=None) -> tuple[dict[str, Tensor], Tensor]:
        """{autoencoder: normalised latents (B,C,H,W)}, class (B,). Without a generator a KL-VAE's latents are
        its means (alignment targets), with one they are drawn from its posterior (training)."""
        rows = indices.numpy()
        z = {name: torch.from_numpy(mean[rows].astype(np.float32)) for name, mean in self.mean.items()}
        if generator is not None:
            for name, std in self.std.items():
                noise = torch.randn(z[name].shape, generator=generator)
                z[name] = z[name] + torch.from_numpy(std[rows].astype(np.float32)) * noise
        return z, self.labels[indices]

    def batches(self, size: int) -> list[Tensor]:
        """The indices of all rows in order, `size` at a time."""
        return list(torch.arange(self.length).split(size))

    def captions(self) -> list[str]:
        """The captions of all rows in order."""
        return [self.source.caption(label) for label in self.labels.tolist()]

    def facts(self) -> dict:
        """What a run has to say about its data: plain values that change with pictures, labels, captions and
        autoencoders."""
        facts = {"pictures": self.what["n"], "source": self.what["source"], "flip": self.what["flip"]}
        if self.source.captioned:
            facts["captions"] = hashlib.sha256("\n".join(self.captions()).encode()).hexdigest()[:16]
        facts["autoencoders"] = {ae["name"]: ae["weights"] for ae in self.what["autoencoders"]}
        return facts

    def _finished_rows(self) -> int:
        meta = self.dir / "meta.json"
        if not meta.exists():
            return 0
        try:
            stored = json.loads(meta.read_text())
            rows = stored["rows"]
        except (ValueError, KeyError, TypeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"{meta} is damaged ({reason}); delete the folder and run again") from None
        if stored.get("what") != json.loads(json.dumps(self.what)):
            raise ValueError(f"{meta} describes another cache than its folder's name; "
                             "delete the folder and run again")
        return rows

    def _open(self, name: str, mode: str = "r") -> np.ndarray:
        file = self.dir / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode=mode)
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{file} is missing or not whole ({e}); "
                             "delete the folder and run again") from None
        if len(array) != self.length:
            raise ValueError(f"{file} has {len(array)} rows instead of {self.length}; "
                             "delete the folder and run again")
        return array

    def _arrays_to_fill(self, finished: int, autoencoders: list) -> dict[str, np.ndarray]:
        """Every array of the cache, writable: those of a killed filling, or new ones."""
        shapes = {"labels": ((), np.int64)}
        for ae in autoencoders:
            size = self.sizes.get(ae.cfg.name, self.source.size)
            latent = (ae.cfg.channels, size // ae.cfg.f, size // ae.cfg.f)
            shapes[ae.cfg.name] = latent, np.float16
            if has_posterior(ae):
                shapes[f"{ae.cfg.name}.std"] = latent, np.float16
        if finished:
            return {name: self._open(name, "r+") for name in shapes}
        files = {name: self.dir / f"{name}.npy" for name in shapes}
        try:
            arrays = {name: np.lib.format.open_memmap(files[name], "w+", dtype, (self.length, *shape))
                      for name, (shape, dtype) in shapes.items()}
            for file in files.values():
                reserve(file)
        except OSError as e:
            shutil.rmtree(self.dir, ignore_errors=True)
            row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
            needed = self.length * row / 1e6
            free = shutil.disk_usage(self.dir.parent).free / 1e6
            raise ValueError(f"--cache {self.dir.parent}: latents of {self.length} pictures need "
                             f"{needed:,.1f} MB, and {free:,.1f} MB are free ({e.strerror}); make room, give "
                             "another folder, or fewer --pictures") from None
        return arrays

    @torch.no_grad()
    def _fill(self, finished: int, n: int, autoencoders: list, batch: int, device):
        arrays = self._arrays_to_fill(finished, autoencoders)
        starts = range(finished, self.length, batch)
        for start in progress(starts, f"encoding {self.length - finished} pictures", len(starts) > 8):
            end = min(start + batch, self.length)
            rows = torch.arange(start, end)
            # one draw of every picture, mirrored in the second half, for all encoders
            images, labels = self.source.batch(rows % n)
            mirrored = (rows >= n).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
            images = images.to(device).to(memory_format=torch.channels_last)
            arrays["labels"][start:end] = labels.numpy()
            for ae in autoencoders:
                mean, std = ae.posterior(self._as_seen(images, ae.cfg.name))
                arrays[ae.cfg.name][start:end] = mean.float().cpu().numpy()
                if std is not None:
                    arrays[f"{ae.cfg.name}.std"][start:end] = std.float().cpu().numpy()
            if (start // batch) % 50 == 49 or end == self.length:
                self._commit(arrays, end, autoencoders)

    def _as_seen(self, images: Tensor, autoencoder: str) -> Tensor:
        """Pictures at the size that this autoencoder sees: averages over areas, as the embeddings are in Eq.
        1."""
        size = self.sizes.get(autoencoder, self.source.size)
        return images if size == self.source.size else F.interpolate(images, (size, size), mode="area")

    def _commit(self, arrays: dict[str, np.ndarray], rows: int, autoencoders: list):
        """Record that so many rows are finished."""
        # the scale first: a second try must not find a cache that counts as whole
        foreign = isinstance(self.source, ImageFolder)
        report = self.dir if rows == self.length else None
        for ae in autoencoders:
            check_scale(ae.cfg, arrays[ae.cfg.name][:rows], foreign, report)
        # the latents reach the disk before the count that includes them
        for array in arrays.values():
            array.flush()
        write_json(self.dir / "meta.json", dict(what=self.what, rows=rows))


# ---- folders of pictures -------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def load_image(path, size: int) -> Tensor:
    """One picture as (3,size,size) in [-1,1]: turned as its EXIF says, transparency onto white, 16 bits and
    CMYK to 8-bit RGB, cropped to the central square, Lanczos. ValueError with the file's name if it does not
    decode."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as im:
            im = ImageOps.exif_transpose(im)
            # 16 bits a channel: convert("RGB") would clip at 255
            if im.mode.startswith("I"):
                im = Image.fromarray((np.asarray(im) / 257.0).round().clip(0, 255).astype(np.uint8))
            # transparency lies on white
            if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = ImageOps.fit(im.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(im)).permute(2, 0, 1).float() / 127.5 - 1
    except Exception as e:
        # Pillow raises a dozen kinds on damaged files
        raise ValueError(f"{path}: not a readable picture ({type(e).__name__}: {e})") from None


def read_metadata(root: Path) -> tuple[dict[Path, str], list[tuple[Path, str]]]:
    """Captions by file from a folder's metadata.jsonl, a line a picture, {"file_name", "text", ...}; and the
    bad entries: (file or line, reason). Of two entries for a file the first counts; of two samples of one
    prompt and seed, too."""
    captions = {}
    first_samples = {}                                               # (prompt, seed) -> name
    bad = []
    lines = (root / "metadata.jsonl").read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        place = root / f"metadata.jsonl:{number}"
        try:
            entry = json.loads(line)
            file = root / entry["file_name"]
            text = entry["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            bad.append((place, "not an entry with file_name and text"))
            continue
        sample = (text, entry["seed"]) if "seed" in entry else file
        if file in captions:
            bad.append((place, f"a second entry for {file.name}"))
        elif not text:
            bad.append((file, "its text is empty"))
        elif sample in first_samples:
            bad.append((file, f"the same prompt and seed as {first_samples[sample]}"))
        elif not file.is_file():
            bad.append((file, "metadata.jsonl names it, and it is not there"))
        else:
            captions[file] = text
            first_samples[sample] = file.name
    return captions, bad


def find_copies(files: list[Path]) -> list[tuple[Path, Path]]:
    """(copy, original) of all files with the same bytes as an earlier one."""
    # by size first: hashing reads the whole file
    by_size = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)
    originals = {}
    copies = []
    for same_size in by_size.values():
        if len(same_size) == 1:
            continue
        for file in same_size:
            original = originals.setdefault(hashlib.sha256(file.read_bytes()).digest(), file)
            if original != file:
                copies.append((file, original))
    return copies


@lru_cache(maxsize=1)
def imagenet_classes() -> dict[str, str]:
    """The 1,000 classes of ImageNet (ILSVRC 2012) in their order: {"n01440764": "tench", ...}"""
    lines = (HERE / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's classes by number."""
    return tuple(imagenet_classes().values())


def plain(name: str) -> str:
    """A class's name as it is compared: "Golden_Retriever" is "golden retriever"."""
    return name.lower().replace("_", " ")


def first_few(items) -> str:
    items = list(items)
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "")


def model_classes(names, num_classes: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of a model's classes (a number where there is no name), and the number of every plain name.
    1000 classes without names of their own are ImageNet's, which its synsets name too."""
    numbers = tuple(map(str, range(num_classes)))
    synsets = {}
    if num_classes == 1000 and names in (None, numbers, imagenet_names()):
        names = imagenet_names()
        synsets = {wnid: k for k, wnid in enumerate(imagenet_classes())}
    names = tuple(names or ())
    names += numbers[len(names):]
    return names, {plain(name): k for k, name in enumerate(names)} | synsets


def number_classes(folders: list[str], names=None, num_classes: int | None = None,
                   any_classes: bool = False) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class numbers of folders, and the names of all classes in order.

    by number   "0207" is class 207 (six digits and more are a date)
    by name     "golden_retriever" is the model's class of this name; ImageNet's, "n02099601" too
    in order    alphabetical, if not every folder has a number so: for new classes, which any_classes says
                that these are, and without a model

    names, num_classes: the model's, None = there is none. ValueError if these are not its classes."""
    if not folders and num_classes is not None:
        raise ValueError(f"no class folders, and the model has {num_classes} classes; sort the pictures into "
                         "a folder a class")
    known = {}
    if num_classes is not None and not any_classes:
        names, known = model_classes(names, num_classes)
    found = {folder: known[plain(folder)] for folder in folders if plain(folder) in known}
    found |= {folder: int(folder) for folder in folders if folder.isdecimal() and len(folder) <= 5}
    in_order = {folder: k for k, folder in enumerate(folders)}
    strangers = [folder for folder in folders if folder not in found]
    numbers = in_order if strangers else found

    last = max(numbers, key=numbers.get, default=None)
    if num_classes is not None and numbers[last] >= num_classes:
        raise ValueError(f"{len(folders)} class folders, of which {last!r} is class {numbers[last]}; the "
                         f"model has {num_classes} classes, 0 to {num_classes - 1}")
    if strangers and known:
        mapping = first_few(f"{folder} -> {k} (was {names[k]})" for folder, k in in_order.items())
        raise ValueError(f"folder {strangers[0]!r} is none of the model's {num_classes} classes "
                         f"({first_few(names)}); name every folder by the name or the number of its class. "
                         f"If they are new classes, --any-classes takes them in this order: {mapping}")
    if strangers or not folders:
        return numbers, tuple(folders)
    return numbers, names if known else tuple(map(str, range(1 + numbers[last])))


class ImageFolder:
    """Pictures of a folder, cropped to the central square, with classes or captions or neither:
    captions=None     the classes of subfolders, if it has any; see number_classes
            "txt"     captions, those of metadata.jsonl, else of the .txt file beside each picture
            "... {}"  a text in which {} is the name of the picture's subfolder, or its name in classes.json,
                      {subfolder: name}
    names, num_classes, any_classes: as in number_classes.

    Broken files, entries and copies are listed and left out, unless they are more than max_broken
    (ValueError): a wrong folder should not become a small data set. Most are found when they are opened,
    here. If a picture turns out to be broken when it is decoded, the next one takes its place, with its own
    label and caption."""

    def __init__(self, root, size: int, split: str = "all", max_broken: float = 0.05,
                 captions: str | None = None, names: tuple[str, ...] | None = None,
                 num_classes: int | None = None, any_classes: bool = False):
        self.root = Path(root)
        self.size = size
        self.max_broken = max_broken
        self.broken = []
        files = self._find_files()
        self.total = len(files)
        has_metadata = (self.root / "metadata.jsonl").is_file()
        if not has_metadata and (self.root / "dataset.json").is_file():
            raise ValueError(f"--images {root}: this data set is not finished, {len(files)} pictures and no "
                             "metadata.jsonl; the command that draws it goes on")

        # the names of subfolders are classes, or words of a caption
        folders = sorted({self._subfolder(file) for file in files} - {"."})
        self.captioned = captions is not None
        self.classes = ()
        self.texts = {}                                              # captions of metadata.jsonl
        self.template = None
        if captions == "txt" and has_metadata:
            files = self._read_texts(files)
        elif captions == "txt":
            self._check_txt_files(files)
        else:
            self._check_folders(files, folders, captions)
            if captions:
                self.template = captions
                self.words = self._read_words()
            else:
                self.numbers, self.classes = self._number_classes(folders, names, num_classes, any_classes)

        # every 20th picture is for validation; the share of broken ones is that of this part from here on
        if split != "all":
            files = [file for i, file in enumerate(files) if (i % 20 == 19) == (split == "val")]
            if not files:
                raise ValueError(f"--images {root}: fewer than 20 pictures, and every 20th is kept for "
                                 "validation; add some")
            self.total = len(files)
            self.broken = []
        # most broken files show when they are opened
        opening = progress(files, f"opening {len(files)} pictures of {self.root}", len(files) >= 5000)
        self.files = [file for file in opening if self._opens(file)]
        self.labels = self._labels()
        self.identity = self._identity()

    def __len__(self):
        return len(self.files)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        # threads, because decoding releases Python's lock
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            pictures, numbers = zip(*pool.map(self._load, indices.tolist()))
        return torch.stack(pictures), self.labels[list(numbers)]

    def caption(self, index: int) -> str:
        """ValueError if its file is not a text."""
        file = self.files[index]
        if self.texts:
            return self.texts[file]
        if self.template:
            folder = self._subfolder(file)
            return self.template.replace("{}", self.words.get(folder, folder.replace("_", " ")))
        text = file.with_suffix(".txt")
        try:
            return text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{text}: not a readable caption ({type(e).__name__}: {e})") from None

    def _find_files(self) -> list[Path]:
        if not self.root.is_dir():
            raise ValueError(f"--images {self.root}: no such folder")
        files = []
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                    files.append(Path(folder) / name)
        if not files:
            raise ValueError(f"--images {self.root}: no pictures in it ({', '.join(SUFFIXES)})")
        return sorted(files)

    def _subfolder(self, file: Path) -> str:
        return file.parent.relative_to(self.root).as_posix()

    def _read_texts(self, files: list[Path]) -> list[Path]:
        """The files with a good entry in metadata.jsonl; the others are left out."""
        # bad entries, then pictures that are copies, then pictures without an entry
        self.texts, bad = read_metadata(self.root)
        described = [file for file in files if file in self.texts]
        bad += [(copy, f"a copy of {original.name}") for copy, original in find_copies(described)]
        known = {file for file, _ in bad} | set(self.texts)
        bad += [(file, "no entry in metadata.jsonl") for file in files if file not in known]
        for file, reason in bad:
            self._leave_out(file, reason)
        return [file for file in files if file not in self.broken]

    def _check_txt_files(self, files: list[Path]):
        for file in files:
            text = file.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{file} has no caption: put one in {text.name}, or sort the pictures into "
                                 "class folders and make captions of their names: "
                                 "--captions 'a photo of a {}'")

    def _check_folders(self, files: list[Path], folders: list[str], template: str | None):
        loose = [file for file in files if file.parent == self.root]
        if folders and loose:
            raise ValueError(f"{loose[0]} lies beside class folders and has no class; "
                             "move it into one of them")
        if template and not folders:
            raise ValueError(f"--captions {template!r}: {self.root} has no subfolders whose names could go "
                             "into it")
        if template and "{}" not in template:
            raise ValueError(f"--captions {template!r}: mark with {{}} where the subfolder's name goes")

    def _read_words(self) -> dict[str, str]:
        """The words for folders in classes.json, {folder: words}, if there is one."""
        file = self.root / "classes.json"
        return json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}

    def _number_classes(self, folders, *model) -> tuple[dict[str, int], tuple[str, ...]]:
        try:
            return number_classes(folders, *model)
        except ValueError as e:
            raise ValueError(f"--images {self.root}: {e}") from None

    def _labels(self) -> Tensor:
        if not self.classes:
            return torch.arange(len(self.files))
        return torch.tensor([self.numbers[self._subfolder(file)] for file in self.files])

    def _identity(self) -> str:
        listing = []
        for file, label in zip(self.files, self.labels.tolist()):
            stat = file.stat()
            listing.append(f"{label} {file.relative_to(self.root)} {stat.st_size} {stat.st_mtime_ns}")
        digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
        return f"folder {self.root.name} size={self.size} crop=centre {digest}"

    def _opens(self, path: Path) -> bool:
        from PIL import Image
        try:
            with Image.open(path) as im:
                im.verify()
        except Exception as e:
            self._leave_out(path, f"{type(e).__name__}: {e}")
            return False
        return True

    def _leave_out(self, path: Path, reason):
        if path not in self.broken:
            self.broken.append(path)
            print(f"left out: {path} ({reason})")
        if len(self.broken) > self.max_broken * self.total:
            raise ValueError(f"--images {self.root}: {len(self.broken)} of {self.total} pictures are broken, "
                             f"more than {self.max_broken:.0%}; mend or remove them, the last was {path}: "
                             f"{reason}")

    def _load(self, i: int) -> tuple[Tensor, int]:
        """Picture i, or the next one that decodes, and its number."""
        for k in range(len(self)):
            j = (i + k) % len(self)
            try:
                return load_image(self.files[j], self.size), j
            except ValueError as e:
                self._leave_out(self.files[j], e)


def open_source(images: str | None, res: int, split: str = "train", captions: str | None = None,
                names: tuple[str, ...] | None = None, num_classes: int | None = None,
                any_classes: bool = False):
    """A folder of pictures (every 20th is kept for "val"), or the procedural ones (None). captions: as in
    ImageFolder; the procedural pictures have classes, or captions if it is a text. names, num_classes,
    any_classes: as in number_classes; ValueError if a model of these classes cannot learn from the source."""
    if images:
        return ImageFolder(images, res, split, captions=captions, names=names, num_classes=num_classes,
                           any_classes=any_classes)
    if captions:
        return ScenesSource(res, split=split)
    if num_classes is not None and num_classes < len(SHAPES):
        raise ValueError(f"the procedural pictures have {len(SHAPES)} classes ({first_few(SHAPES)}), the "
                         f"model has {num_classes}; give --images DIR with a folder a class")
    if split == "train" and not any_classes and names not in (None, SHAPES):
        print(f"note: the procedural pictures are for a trial; {first_few(SHAPES)} take the places of the "
              f"model's first {len(SHAPES)} classes. Real training wants --images DIR")
    return ShapesSource(res, split=split)


# ---- text encoders: each encodes one prompt -> {part of a Text: (1,...)} -------------------------

# The instruction before every prompt of SANA's text encoder, a chat model (arXiv 2410.10629, Sec. 2.3). SANA
# was trained on its embeddings of prompts after these very words: another instruction gives other embeddings.
SANA_INSTRUCTION = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable "
    "for image generation. Evaluate the level of detail in the user prompt:\n"
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.\n"
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.\n"
    "Here are examples of how to transform or refine prompts:\n"
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, "
    "sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.\n"
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing "
    "street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by "
    "towering glass skyscrapers.\n"
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:\n"
    "User Prompt: ")


def tokenize(tokenizer, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (1,length): padded, or cut with a note."""
    n = len(tokenizer(prompt).input_ids)
    if n > length:
        print(f"note: a prompt of {n} tokens is cut to {length}; its end is lost: ... {prompt[-40:]!r}")
    out = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def encode_t5(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    ids, _ = tokenize(tokenizer, prompt, length)
    # no mask: FLUX was trained on the padding too
    return {"tokens": model(ids.to(model.device))[0]}                # 1 L 4096


def encode_clip(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    # 77 tokens; the rest of a longer prompt is read by T5 alone
    longest = model.config.max_position_embeddings
    out = tokenizer(prompt, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    return {"pooled": model(out.input_ids.to(model.device)).pooler_output}     # 1 768


def encode_gemma(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    """The first token and the last length - 1 of the instruction and the prompt together (Sana's
    app/sana_pipeline.py): the instruction keeps its start and its last words. A plain prompt has no
    instruction."""
    tokenizer.padding_side = "right"
    # the case stays, as in the authors' code; diffusers lowers it
    prompt = prompt.strip()
    total = length
    if not plain:
        prompt = SANA_INSTRUCTION + prompt
        total = len(tokenizer.encode(SANA_INSTRUCTION)) + length - 2
    ids, mask = tokenize(tokenizer, prompt, total)
    tokens = model(ids.to(model.device), attention_mask=mask.to(model.device))[0]
    # the first token, and the end of the instruction with the prompt
    keep = [0, *range(total - length + 1, total)]
    return {"tokens": tokens[:, keep], "mask": mask[:, keep].bool()}           # 1 L 2304, 1 L


class TextEncoder(NamedTuple):
    model: str                          # its two subfolders of a diffusers pipeline folder
    tokenizer: str
    class_name: str                     # in transformers
    encode: Callable                    # (tokenizer, model, prompt, length, plain) -> parts of a Text
    millions: int                       # of parameters


TEXT_ENCODERS = {
    "flux": (
        TextEncoder("text_encoder_2", "tokenizer_2", "T5EncoderModel", encode_t5, 4762),
        TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", encode_clip, 123)),
    "sana": (TextEncoder("text_encoder", "tokenizer", "Gemma2Model", encode_gemma, 2614),),
    "words": (),                        # shapes.encode_words: nothing to load
}


def text_parts(kind: str) -> tuple[str, ...]:
    """The subfolders of a pipeline folder that hold the text encoders of this kind."""
    return tuple(part for encoder in TEXT_ENCODERS[kind] for part in (encoder.model, encoder.tokenizer))


def text_folder(name: str, cfg, given: str | None, weights: str | None) -> Path | None:
    """The pipeline folder with a model's text encoders: the one given, the one that its weights came from, or
    that of the hub; None for a model that needs no files."""
    if cfg.text_encoder is None or cfg.text_weights is None:
        return None
    parts = text_parts(cfg.text_encoder)
    if not given and weights and (Path(weights) / parts[0]).is_dir():
        return Path(weights)
    return find_weights(f"{name}'s text encoder", cfg.text_weights, given, parts, "--text-encoders")


class FoundEncoder(NamedTuple):
    encoder: TextEncoder
    model_folder: Path
    tokenizer_folder: Path
    digest: str                         # files_digest of both folders


def files_digest(*folders: Path) -> str:
    """A short hash of folders of files, without reading all of them: names, sizes, and samples along each."""
    h = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            size = file.stat().st_size
            sample = 2**16 if size <= 2**24 else 2**12
            h.update(f"{file.name} {size}".encode())
            with file.open("rb") as f:
                for position in range(0, size, max(2**16, size // 256)):
                    f.seek(position)
                    h.update(f.read(sample))
    return h.hexdigest()[:16]


def encoder_folders(kind: str, folder) -> list[tuple[TextEncoder, Path, Path]]:
    """The text encoders of this kind in a pipeline folder: each, its folder and its tokenizer's. ValueError
    if one is missing."""
    folder = Path(folder)
    encoders = TEXT_ENCODERS[kind]
    # the folder may be the one encoder itself
    alone = len(encoders) == 1 and (folder / "config.json").is_file()
    found = []
    for encoder in encoders:
        parts = [folder if alone else folder / part for part in (encoder.model, encoder.tokenizer)]
        for part in parts:
            if not part.is_dir():
                names = ", ".join(text_parts(kind))
                raise ValueError(f"{part}: no such folder; the text encoders are {names} of a diffusers "
                                 "pipeline folder: give one with --text-encoders DIR")
        found.append((encoder, *parts))
    return found


NO_TRANSFORMERS = "prompts need text encoders: pip install transformers sentencepiece"


def check_encoders(kind: str | None, folder=None):
    """ValueError for what is missing before anything is loaded or downloaded: transformers, or a part of the
    folder that was given. kind: a configuration's text_encoder."""
    if not TEXT_ENCODERS.get(kind):
        return
    if find_spec("transformers") is None:
        raise ValueError(NO_TRANSFORMERS)
    if folder is None:
        return
    for _, _, tokenizer in encoder_folders(kind, folder):
        # without the fast tokenizer's file it is made of the slow one's
        slow = any(tokenizer.glob("*.model")) and not (tokenizer / "tokenizer.json").is_file()
        if slow and find_spec("sentencepiece") is None:
            raise ValueError(f"{tokenizer} holds no tokenizer.json: pip install sentencepiece")


def find_encoders(kind: str, folder) -> list[FoundEncoder]:
    """The text encoders of this kind in a pipeline folder. ValueError if one is missing."""
    return [FoundEncoder(encoder, model, tokenizer, files_digest(*dict.fromkeys([model, tokenizer])))
            for encoder, model, tokenizer in encoder_folders(kind, folder)]


def load_encoder(found: FoundEncoder, dtype: torch.dtype, device):
    """A tokenizer and a frozen text encoder, from local files only."""
    try:
        import transformers
    except ImportError:
        raise ValueError(NO_TRANSFORMERS) from None
    cls = found.encoder.class_name
    local = dict(local_files_only=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(found.tokenizer_folder, **local)
        model = getattr(transformers, cls).from_pretrained(
            found.model_folder, dtype=dtype, use_safetensors=True, **local)
    except Exception as e:
        # a dozen kinds: missing, damaged, another class
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
        raise ValueError(f"{found.model_folder} and {found.tokenizer_folder.name} are not a whole {cls} with "
                         f"its tokenizer ({reason})") from None
    return tokenizer, model.to(device).eval().requires_grad_(False)


# ---- the cache of prompts ------------------------------------------------------------------------

def read_prompts(file) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that start with # are left out."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--prompts {file}: not a readable text file ({type(e).__name__})") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"--prompts {file}: no prompts in it; write one on a line")
    return prompts


class EncodedPrompts:
    """texts[rows] is the Text of prompts[rows] on the CPU, read when it is indexed: a batch at a time,
    because T5's tokens are 4 MB a prompt in FLUX.

    texts.null, one row, is the condition that stands for "no condition" in training and sampling: the encoded
    empty prompt, or a negative prompt in its place. The empty prompt has no mask and takes that of the prompt
    beside it: SANA's training dropped captions and kept their masks (diffusers differs)."""

    def __init__(self, prompts: list[str], negative: str, read):
        self.prompts = prompts
        self.read = read                                             # (prompts, plain) -> Text
        null = read([negative], True)
        self.null = null if negative else replace(null, mask=None)

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, rows) -> Text:
        chosen = torch.arange(len(self))[rows].tolist()
        return self.read([self.prompts[i] for i in chosen], False)


def read_encoded(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as e:
        # safetensors' own kinds, and those of files
        raise ValueError(f"{file} is missing or damaged ({e}); delete it and run again") from None


@torch.no_grad()
def cache_prompts(kind: str, folder, prompts: list[str], length: int, negative: str = "", cache="runs/cache",
                  dtype: torch.dtype = torch.float32, device="cpu") -> EncodedPrompts:
    """The prompts and the null prompt, `length` tokens each, under the text encoders of `kind` in a pipeline
    folder.

    Every prompt is encoded by itself into a file named by a hash of the encoder and the prompt. So it is the
    same whatever it is encoded with, equal prompts are encoded once, and a killed filling goes on. The
    encoders (10 GB in FLUX) are loaded one after the other, only for prompts that have no file yet, and
    freed. A negative or null prompt is `plain`: SANA's has no instruction. ValueError if transformers or a
    part of the folder is missing."""
    # faster to compute than to read from a disk
    if kind == "words":
        note_unknown_words([negative, *prompts])

        def encode(chosen, plain):
            return encode_words(chosen, length)
        return EncodedPrompts(prompts, negative, encode)

    # one file a prompt and encoder
    found = find_encoders(kind, folder)

    def file_of(part: FoundEncoder, prompt: str, plain: bool) -> Path:
        key = f"{part.encoder.class_name} {part.digest} {length} {plain} {dtype} {prompt}"
        return Path(cache) / f"text-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def read(chosen: list[str], plain: bool) -> Text:
        rows = []
        for prompt in chosen:
            row = {}
            for part in found:
                row |= read_encoded(file_of(part, prompt, plain))
            rows.append(row)
        return Text(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    # encode what has no file yet, one encoder after the other
    wanted = [(negative, True), *((prompt, False) for prompt in dict.fromkeys(prompts))]
    for part in found:
        missing = [(prompt, plain) for prompt, plain in wanted if not file_of(part, prompt, plain).is_file()]
        if not missing:
            continue
        make_writable(cache)
        tokenizer, model = load_encoder(part, dtype, device)
        title = f"encoding {len(missing)} prompts ({part.encoder.class_name})"
        for prompt, plain in progress(missing, title, len(missing) > 3):
            encoded = part.encoder.encode(tokenizer, model, prompt, length, plain)
            encoded = {name: value.cpu().contiguous() for name, value in encoded.items()}
            with atomic(file_of(part, prompt, plain)) as tmp:
                save_file(encoded, tmp)
        # the next encoder, and the model after it, need the memory
        del tokenizer, model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return EncodedPrompts(prompts, negative, read)
