"""Pictures and prompts in, batches out: procedural pictures, image folders, encoded prompts, and the cache of paired latents.

    image (B,3,H,W) in [-1,1], label (B,)          ShapesSource, ScenesSource, ImageFolder
    prompts -> Text                                encode_words: made at once; encode_prompts: read once, kept on disk;
                                                   cache_prompts: those of whole data sets
    z_base, z_dc of the very same pixels, label    LatentCache: filled once, read afterwards

A source of pictures is anything with len(), .classes (names) and .batch(indices) -> images, labels. A source with captions
has no classes: a label is the picture's number then, and .caption(number) its text. Autoencoders come in as arguments,
text encoders as folders.
"""

import copy
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import Text
from checkpoints import (find_weights, fingerprint, read_tensors, write_json, write_tensors)
from shapes import ScenesSource, ShapesSource, encode_words


# ---- folders of real pictures ----------------------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """A picture's size, pixels a side or (H,W) -> (H,W)."""
    return (size, size) if isinstance(size, int) else size


def image_size(path) -> tuple[int, int]:
    """A picture file's (H,W) as it is seen, from its header."""
    from PIL import Image
    with Image.open(path) as im:
        return im.size if im.getexif().get(0x0112, 1) >= 5 else im.size[::-1]                # EXIF: it lies on its side


def load_image(path, size: int | tuple[int, int]) -> Tensor:
    """One picture as (3,H,W) in [-1,1]: turned as its EXIF says, transparency onto white, 16 bits and CMYK to 8-bit RGB,
    as much of the centre as has the shape, Lanczos. ValueError naming the file if it does not decode."""
    from PIL import Image, ImageOps                                  # Pillow: decoding pictures is not our subject
    try:
        with Image.open(path) as im:
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith("I"):                              # 16 bits a channel: convert("RGB") would clip at 255
                im = Image.fromarray((np.asarray(im) / 257.0).round().clip(0, 255).astype(np.uint8))
            if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = ImageOps.fit(im.convert("RGB"), sides(size)[::-1], Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(im)).permute(2, 0, 1).float() / 127.5 - 1
    except Exception as e:                                           # Pillow raises a dozen kinds on damaged files
        raise ValueError(f"{path}: not a readable picture ({type(e).__name__}: {e})") from None


def read_metadata(root: Path) -> tuple[dict[Path, str], list[tuple[Path, str]]]:
    """A folder's metadata.jsonl, a line a picture, {"file_name", "text", ...} -> captions by file, and what is wrong with
    it: (file or line, why). Of two entries for a file the first one counts; of two drawings of one prompt and seed, too."""
    captions, wrong, drawings = {}, [], {}
    for number, line in enumerate((root / "metadata.jsonl").read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            file, text = root / entry["file_name"], entry["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong.append((root / f"metadata.jsonl:{number}", "not an entry with file_name and text"))
            continue
        drawing = (text, entry["seed"]) if "seed" in entry else file
        if file in captions:
            wrong.append((root / f"metadata.jsonl:{number}", f"a second entry for {file.name}"))
        elif not text:
            wrong.append((file, "its text is empty"))
        elif drawing in drawings:
            wrong.append((file, f"the same prompt and seed as {drawings[drawing]}"))
        elif not file.is_file():
            wrong.append((file, "metadata.jsonl names it, and it is not there"))
        else:
            captions[file], drawings[drawing] = text, file.name
    return captions, wrong


def copies(files: list[Path]) -> list[tuple[Path, Path]]:
    """Files that hold the same bytes as an earlier one: (copy, original). Only files of equal size are read."""
    sizes, seen, found = {}, {}, []
    for file in files:
        sizes.setdefault(file.stat().st_size, []).append(file)
    for file in (f for same in sizes.values() if len(same) > 1 for f in same):
        original = seen.setdefault(hashlib.sha256(file.read_bytes()).digest(), file)
        if original != file:
            found.append((file, original))
    return found


class ImageFolder:
    """Pictures of a folder, cropped to a centred square, with classes or captions or neither:
    captions=None     the classes of subfolders, if it has any
            "txt"     captions, those of metadata.jsonl, else of the .txt file beside each picture; a missing one is a
                      ValueError that names it
            "... {}"  a text with the name of the picture's subfolder put in (classes.json there may say {subfolder: name})

    Subfolders that are all named by numbers are those classes, so that a part of ImageNet keeps the numbers that a model
    knows; others are classes in alphabetical order.

    Broken files, entries and copies are listed and left out, unless they are more than max_broken (ValueError): a wrong
    folder should not become a small data set. Most show when they are opened, here; of a picture that does only when it is
    decoded, the place is taken by the next one, with its label, and so its caption."""

    def __init__(self, root, size: int, split: str = "all", max_broken: float = 0.05, captions: str | None = None):
        self.root, self.broken, self.max_broken, self.texts = Path(root), [], max_broken, {}
        if not self.root.is_dir():
            raise ValueError(f"--images {root}: no such folder")
        found = (Path(folder) / name for folder, _, names in os.walk(self.root, followlinks=True) for name in names)
        files = sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise ValueError(f"--images {root}: no pictures in it ({', '.join(SUFFIXES)})")
        self.total, told = len(files), (self.root / "metadata.jsonl").is_file()
        described = told and captions == "txt"
        if not told and (self.root / "dataset.json").is_file():
            raise ValueError(f"--images {root}: this data set is not finished, {len(files)} pictures and no metadata.jsonl; the command that draws it goes on")
        folder = lambda p: p.parent.relative_to(self.root).as_posix()
        names = sorted({folder(p) for p in files} - {"."})
        self.numbered = bool(names) and all(name.isdecimal() and len(name) <= 5 for name in names)     # 20240131 is a date
        self.classes = () if described else tuple(map(str, range(1 + max(map(int, names))))) if self.numbered else tuple(names)
        if captions != "txt" and self.classes and (loose := [p for p in files if p.parent == self.root]):
            raise ValueError(f"{loose[0]} lies beside class folders and has no class; move it into one of them")
        self.template = captions if captions and captions != "txt" else None
        if self.template and ("{}" not in self.template or not self.classes):
            raise ValueError(f"--captions {self.template!r}: " + (f"{root} has no subfolders whose names could go into it" if self.classes == () else
                                                                   "mark with {} where the subfolder's name goes"))
        if described:
            self.texts, wrong = read_metadata(self.root)
            wrong += [(p, f"a copy of {q.name}") for p, q in copies([p for p in files if p in self.texts])]
            wrong += [(p, "no entry in metadata.jsonl") for p in files if p not in self.texts and p not in dict(wrong)]
            for p, why in wrong:
                self._leave_out(p, why)
            files = [p for p in files if p not in self.broken]
        elif captions == "txt":
            for p in files:
                if not p.with_suffix(".txt").is_file():
                    raise ValueError(f"{p} has no caption: put one in {p.with_suffix('.txt').name}, or sort the pictures into class folders"
                                     " and make captions of their names: --captions 'a photo of a {}'")
            self.classes = ()
        if split != "all":                                           # every 20th picture is for validation
            files = [p for i, p in enumerate(files) if (i % 20 == 19) == (split == "val")]
            if not files:
                raise ValueError(f"--images {root}: fewer than 20 pictures, and every 20th is kept for validation; add some")
            self.total, self.broken = len(files), []                 # the share of broken ones is that of this part from here on
        if self.template:
            names = self.root / "classes.json"
            self.names, self.classes = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else {}, ()
        self._take([p for p in tqdm(files, desc=f"opening {self.root.name}", disable=len(files) < 5000) if self._opens(p)], size)

    def _take(self, files: list[Path], size: int | tuple[int, int]):
        """Make these the pictures."""
        self.files, self.size, folder, number = files, size, lambda p: p.parent.relative_to(self.root).as_posix(), {name: k for k, name in enumerate(self.classes)}
        label = lambda p: int(folder(p)) if self.numbered else number[folder(p)]
        self.labels = torch.tensor([label(p) for p in files]) if self.classes else torch.arange(len(files))
        listing = "\n".join(f"{p.relative_to(self.root)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
        self.identity = f"folder {self.root.name} size={size} crop=centre labels={('given' if self.numbered else 'classes') if self.classes else 'numbers'} " + hashlib.sha256(listing.encode()).hexdigest()[:16]

    def by_shape(self, sizes: list[tuple[int, int]]) -> list["ImageFolder"]:
        """Aspect-ratio buckets: the pictures sorted to the sizes (H,W) that are nearest to their shape, a folder for each
        size that has any. Cropped to a square, a picture loses what is said of its sides."""
        ratio = lambda size: math.log(size[1] / size[0])
        nearest = [min(range(len(sizes)), key=lambda k: abs(ratio(sizes[k]) - ratio(image_size(p)))) for p in self.files]
        parts = []
        for k in sorted(set(nearest)):
            parts.append(copy.copy(self))
            parts[-1]._take([p for p, n in zip(self.files, nearest) if n == k], sizes[k])
        return parts

    def _opens(self, path) -> bool:
        from PIL import Image
        try:
            with Image.open(path) as im:
                im.verify()
        except Exception as e:
            self._leave_out(path, f"{type(e).__name__}: {e}")
            return False
        return True

    def _leave_out(self, path, why):
        if path not in self.broken:
            self.broken.append(path)
            print(f"left out: {path} ({why})")
        if len(self.broken) > self.max_broken * self.total:
            raise ValueError(f"--images {self.root}: {len(self.broken)} of {self.total} pictures are broken, more than {self.max_broken:.0%}; "
                             f"mend or remove them, the last was {path}: {why}")

    def __len__(self):
        return len(self.files)

    def caption(self, index: int) -> str:
        """ValueError if its file is not a text."""
        file = self.files[index]
        if self.texts:
            return self.texts[file]
        if self.template:
            name = file.parent.relative_to(self.root).as_posix()
            return self.template.replace("{}", self.names.get(name, name.replace("_", " ")))
        try:
            return file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file.with_suffix('.txt')}: not a readable caption ({type(e).__name__}: {e})") from None

    def _picture(self, i: int) -> tuple[Tensor, int]:
        """Picture i, or the next one that decodes, and which it is."""
        for k in range(len(self)):
            j = (i + k) % len(self)
            try:
                return load_image(self.files[j], self.size), j
            except ValueError as e:
                self._leave_out(self.files[j], e)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:   # decoding releases Python's lock
            pictures, numbers = zip(*pool.map(self._picture, indices.tolist()))
        return torch.stack(pictures), self.labels[list(numbers)]


def bucket_sizes(res: int, unit: int, widest: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (H,W) of about res x res pixels, in multiples of `unit` pixels, from upright to wide: as many tokens as the
    square has, so that a step costs the same in every bucket."""
    sizes = {(H, round(res * res / H / unit) * unit) for H in range(unit, round(res * widest) + 1, unit)}
    return sorted(((H, W) for H, W in sizes if W and max(H, W) <= widest * min(H, W)), key=lambda size: size[1] / size[0])


def open_source(images: str | None, res: int, split: str = "train", captions: str | None = None):
    """A folder of pictures (every 20th is kept for "val"), or the procedural ones (None). captions: as in ImageFolder; the
    procedural pictures have classes, or scenes and captions if it is a text."""
    if images:
        return ImageFolder(images, res, split, captions=captions)
    return ScenesSource(res, split=split) if captions else ShapesSource(res, split=split)


# ---- prompts -----------------------------------------------------------------------------------------------------------------

# What SANA's text encoder, a chat model, is told before every prompt (arXiv 2410.10629, Sec. 2.3). SANA was trained on what
# the encoder makes of prompts after these very words: another instruction gives other embeddings.
SANA_INSTRUCTION = "\n".join((
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. "
    "Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and "
    "concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, "
    "surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in "
    "colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:",
    "User Prompt: "))


def read_prompts(file) -> list[str]:
    """One prompt a line; empty lines and those that start with # are left out."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--prompts {file}: not a readable text file ({type(e).__name__})") from None
    if not (prompts := [line for line in lines if line and not line.startswith("#")]):
        raise ValueError(f"--prompts {file}: no prompts in it; write one on a line")
    return prompts


def _ids(tokenizer, prompt: str, length: int):
    """Token ids and mask, both (1,length): padded, and cut with a note if the prompt is longer than that."""
    if (n := len(tokenizer(prompt).input_ids)) > length:
        print(f"note: a prompt of {n} tokens is cut to {length}; its end is lost: ... {prompt[-40:]!r}")
    out = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


# Each reads one prompt -> {name: tensor with a first axis of 1}. `plain` marks a negative or the null prompt.

def _t5(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    ids, _ = _ids(tokenizer, prompt, length)
    return {"tokens": model(ids.to(model.device))[0]}                # 1 L 4096   FLUX was trained to see the padding too: no mask


def _clip(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    length = model.config.max_position_embeddings                    # 77; longer prompts are T5's to read
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return {"pooled": model(ids.to(model.device)).pooler_output}     # 1 768


def _gemma(tokenizer, model, prompt: str, length: int, plain: bool) -> dict[str, Tensor]:
    """The first token and the last length - 1 of the instruction and the prompt together (Sana's app/sana_pipeline.py): what
    is kept of the instruction is its start and its last words. A plain prompt goes without instruction."""
    tokenizer.padding_side = "right"
    prompt = prompt.strip()                                          # the case stays: diffusers lowers it, the authors do not
    total = length if plain else len(tokenizer.encode(SANA_INSTRUCTION)) + length - 2
    ids, mask = _ids(tokenizer, prompt if plain else SANA_INSTRUCTION + prompt, total)
    tokens = model(ids.to(model.device), attention_mask=mask.to(model.device))[0]
    keep = [0, *range(total - length + 1, total)]
    return {"tokens": tokens[:, keep], "mask": mask[:, keep].bool()}  # 1 L 2304, 1 L


# a family's encoders: two parts of a pipeline folder, the class in transformers, how it reads a prompt; millions of parameters
TEXT_ENCODERS = {
    "flux": (("text_encoder_2", "tokenizer_2", "T5EncoderModel", _t5, 4762), ("text_encoder", "tokenizer", "CLIPTextModel", _clip, 123)),
    "sana": (("text_encoder", "tokenizer", "Gemma2Model", _gemma, 2614),),
    "words": (),                                                      # encode_words: nothing to load
}


def text_parts(family: str) -> tuple[str, ...]:
    """The subfolders of a pipeline folder that hold this family's text encoders."""
    return tuple(part for model, tokenizer, *_ in TEXT_ENCODERS[family] for part in (model, tokenizer))


def files_print(*folders: Path) -> str:
    """A short hash of folders of files, without reading all of them: names, sizes, and samples along each."""
    h = hashlib.sha256()
    for file in (f for folder in folders for f in sorted(folder.iterdir()) if f.is_file()):
        size = file.stat().st_size
        h.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for at in range(0, size, max(2**16, size // 256)):
                f.seek(at)
                h.update(f.read(2**16 if size <= 2**24 else 2**12))
    return h.hexdigest()[:16]


def find_encoders(family: str, folder) -> list[tuple]:
    """A family's text encoders in a pipeline folder: (class in transformers, how it reads, its two folders, their print).
    ValueError if one is missing."""
    found, encoders = [], TEXT_ENCODERS[family]
    for model_part, tokenizer_part, cls, read, _ in encoders:
        folder = Path(folder)
        alone = len(encoders) == 1 and (folder / "config.json").is_file()       # a folder that is the encoder itself
        parts = [folder if alone else folder / part for part in (model_part, tokenizer_part)]
        if missing := [str(part) for part in parts if not part.is_dir()]:
            raise ValueError(f"{missing[0]}: no such folder; the text encoders are {', '.join(text_parts(family))} of a diffusers pipeline folder: "
                             "give one with --text-encoders DIR")
        found.append((cls, read, parts, files_print(*dict.fromkeys(parts))))
    return found


@torch.no_grad()
def encode_prompts(family: str, folder, prompts: list[str], length: int, plain: bool = False, cache="runs/cache",
                   dtype: torch.dtype = torch.float32, device="cpu") -> Text:
    """What the text encoders in a pipeline folder make of prompts -> a Text of len(prompts) rows and `length` tokens, on the CPU.

    Every prompt is read by itself and kept on disk under its encoder's hash, so it is the same whatever it is encoded with,
    and read once. The encoders (10 GB in FLUX) are loaded one after the other, only for prompts not yet kept, and freed.
    plain: negative and null prompts, which SANA reads without its instruction. ValueError if transformers or a part of the
    folder is missing."""
    if family == "words":
        return encode_words(prompts, length)
    rows = [{} for _ in prompts]
    for cls, read, parts, print_ in find_encoders(family, folder):
        what = f"{cls} {print_} {length} {plain} {dtype}"
        files = [Path(cache) / f"text-{hashlib.sha256(f'{what} {prompt}'.encode()).hexdigest()[:32]}.safetensors" for prompt in prompts]
        if any(not f.is_file() for f in files):
            tokenizer, model = _load_encoder(cls, *parts, dtype, device)
            for prompt, file in tqdm(list(zip(prompts, files)), desc=f"reading prompts ({cls})", leave=False, disable=len(prompts) < 4):
                if not file.is_file():
                    write_tensors(file, read(tokenizer, model, prompt, length, plain))
            del tokenizer, model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for row, file in zip(rows, files):
            row |= read_tensors(file)
    return Text(**{k: torch.cat([row[k] for row in rows]) if k in rows[0] else None for k in ("tokens", "mask", "pooled")}, guidance=None)


def null_prompt(family: str, folder, length: int, negative: str = "", **kw) -> Text:
    """The condition that stands for "no condition", one row, for `model.null`, in training and in sampling alike: the
    encoded empty prompt, or a negative prompt in its place. kw as in encode_prompts. The empty prompt has no mask and
    takes that of the prompt beside it: SANA's training dropped captions and kept their masks. (diffusers differs)"""
    null = encode_prompts(family, folder, [negative], length, plain=True, **kw)
    return null if negative else replace(null, mask=None)


def _load_encoder(cls: str, model_folder: Path, tokenizer_folder: Path, dtype: torch.dtype, device):
    """A tokenizer and a frozen text encoder, from local files only."""
    try:
        import transformers
    except ImportError:
        raise ValueError("prompts need text encoders: pip install transformers sentencepiece") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model = getattr(transformers, cls).from_pretrained(model_folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as e:                                           # a dozen kinds, for files missing, damaged, or of another class
        why = str(e).partition("\n")[0][:200]
        raise ValueError(f"{model_folder} and {tokenizer_folder.name} are not a whole {cls} with its tokenizer ({type(e).__name__}: {why})") from None
    return tokenizer, model.to(device).eval().requires_grad_(False)


# ---- the order of a run ------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=16)                                                # a batch may lie across an epoch's end
def _permutation(epoch: int, length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def order(step: int, batch: int, n: int, seed: int) -> Tensor:
    """The indices of training step `step` (batch,): every epoch a new permutation. A function of the step alone, so a
    resumed run reads what the killed one would have read, across an epoch's end too, on any number of processes."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epoch, place = places // n, places % n
    return torch.cat([_permutation(e, n, seed)[place[epoch == e]] for e in epoch.unique().tolist()])


class Cache:
    """Arrays of one length in a folder, filled from the front and read memory-mapped. The folder's name is a hash of what
    it holds; meta.json spells that out, and says how many rows are whole: a killed filling goes on there, to the same
    bytes. Anything missing, short or of another making is refused with the reason (ValueError)."""

    def __init__(self, root, kind: str, what: dict, length: int):
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        self.dir, self.what, self.length, self.done, self.names = Path(root) / f"{kind}-{key}", what, length, 0, []
        meta = self.dir / "meta.json"
        if meta.exists():
            try:
                said = json.loads(meta.read_text())
                self.done, self.names = said["rows"], said["arrays"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{meta} is damaged ({type(e).__name__}: {e}); delete the folder and run again") from None
            if said.get("what") != json.loads(json.dumps(what)):
                raise ValueError(f"{meta} tells of another making than its folder's name; delete the folder and run again")

    def array(self, name: str, mode: str = "r") -> np.ndarray:
        """One of the arrays; ValueError with the reason if it is missing or short."""
        file = self.dir / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode=mode)
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{file} is missing or not whole ({e}); delete the folder and run again") from None
        if len(array) != self.length:
            raise ValueError(f"{file} has {len(array)} rows instead of {self.length}; delete the folder and run again")
        return array

    def new(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array (length, *shape) to fill: what a killed filling left of it, or an empty one."""
        self.dir.mkdir(parents=True, exist_ok=True)
        return self.array(name, "r+") if self.done else np.lib.format.open_memmap(self.dir / f"{name}.npy", "w+", dtype, (self.length, *shape))

    def commit(self, arrays: dict[str, np.ndarray], rows: int):
        """So many rows are whole. The numbers reach the disk before the word that says so."""
        for array in arrays.values():
            array.flush()
        self.done, self.names = rows, sorted(arrays)
        write_json(self.dir / "meta.json", dict(what=self.what, rows=rows, arrays=self.names))


class LatentCache:
    """Latents of one source under one or more autoencoders, on disk (see Cache).

    Embedding alignment needs both autoencoders' latents of *the very same pixels*: two independent flips or crops ruin
    it with a finite loss. So a picture is drawn once, flipped or not, and goes through every encoder in one pass. With
    flip, row n + i is picture i mirrored. KL-VAE latents are stored as mean and standard deviation."""

    def __init__(self, root, source, autoencoders: list, n: int | None = None, flip: bool = False, batch: int | None = None, device="cpu"):
        n = min(n or len(source), len(source))
        drawn = [ae.cfg.name for ae in autoencoders if hasattr(ae.cfg, "quant_conv")]       # a KL-VAE's posterior
        made_by = lambda ae: {k: getattr(ae.cfg, k) for k in ("name", "f", "channels", "scale", "shift")} | dict(weights=fingerprint(ae))
        what = dict(layout=2, source=source.identity, n=n, flip=flip, dtype="float16", autoencoders=[made_by(ae) for ae in autoencoders])
        self.source, self.length = source, n * (2 if flip else 1)
        self.files = Cache(root, "latents", what, self.length)
        self.dir = self.files.dir
        if self.files.done < self.length:
            H, W = sides(source.size)
            self._fill(n, autoencoders, drawn, batch or max(1, min(32, 2**23 // (H * W))), device)   # 32 up to 512 px, 8 of 1K, 1 of 4K
        self.labels = torch.from_numpy(np.array(self.files.array("labels")))
        self.mean = {ae.cfg.name: self.files.array(ae.cfg.name) for ae in autoencoders}
        self.std = {k: self.files.array(f"{k}.std") for k in drawn}

    def _fill(self, n, autoencoders, drawn, batch, device):
        cache, source, (H, W) = self.files, self.source, sides(self.source.size)
        files = dict(labels=cache.new("labels", (), np.int64))
        for ae in autoencoders:
            name = ae.cfg.name
            for file in (name, f"{name}.std")[: 2 if name in drawn else 1]:
                files[file] = cache.new(file, (ae.cfg.channels, H // ae.cfg.f, W // ae.cfg.f), np.float16)
        for at in tqdm(range(cache.done, self.length, batch), desc=f"encoding {self.length} pictures", leave=False):
            rows = torch.arange(at, end := min(at + batch, self.length))
            images, labels = source.batch(rows % n)
            images = torch.where((rows >= n).view(-1, 1, 1, 1), images.flip(-1), images).to(device)
            files["labels"][at:end] = labels.numpy()
            for ae in autoencoders:
                with torch.no_grad():
                    mean, std = ae.posterior(images.to(memory_format=torch.channels_last))
                files[ae.cfg.name][at:end] = mean.float().cpu().numpy()
                if std is not None:
                    files[f"{ae.cfg.name}.std"][at:end] = std.float().cpu().numpy()
            if (at // batch) % 50 == 49 or end == self.length:
                for ae in autoencoders:                              # before meta.json says so: a second try must not pass
                    check_scale(ae.cfg, files[ae.cfg.name][:end], self.dir if end == self.length else None)
                cache.commit(files, end)

    def captions(self) -> list[str]:
        """Of all rows, in order."""
        return [self.source.caption(i) for i in self.labels.tolist()]

    def __len__(self):
        return self.length

    def batches(self, size: int) -> list[Tensor]:
        """All rows in order, so many at a time."""
        return list(torch.arange(self.length).split(size))

    def batch(self, indices: Tensor, generator=None) -> tuple[dict[str, Tensor], Tensor]:
        """{autoencoder: normalised latents (B,C,H,W)}, class (B,). A KL-VAE's latents are its means without a generator
        (alignment targets), draws from its posterior with one (training)."""
        rows = indices.numpy()
        z = {k: torch.from_numpy(m[rows].astype(np.float32)) for k, m in self.mean.items()}
        if generator is not None:
            for k, s in self.std.items():
                z[k] = z[k] + torch.from_numpy(s[rows].astype(np.float32)) * torch.randn(z[k].shape, generator=generator)
        return z, self.labels[indices]


class Buckets:
    """Caches of several sizes as one, rows one cache behind the other; `buckets` (n,) says whose, and `order` reads it: a
    batch is of one size."""

    def __init__(self, caches: list[LatentCache]):
        self.caches, sizes = caches, torch.tensor([len(c) for c in caches])
        self.buckets, self.starts = torch.arange(len(caches)).repeat_interleave(sizes), sizes.cumsum(0) - sizes
        self.labels = torch.cat([c.labels for c in caches])

    def __len__(self):
        return len(self.buckets)

    def batches(self, size: int) -> list[Tensor]:
        return [rows + start for cache, start in zip(self.caches, self.starts) for rows in cache.batches(size)]

    def captions(self) -> list[str]:
        return [text for cache in self.caches for text in cache.captions()]

    def batch(self, indices: Tensor, generator=None) -> tuple[dict[str, Tensor], Tensor]:
        k = self.buckets[indices]
        assert (k == k[0]).all(), "a batch of several sizes"
        return self.caches[k[0]].batch(indices - self.starts[k[0]], generator)


class TextCache:
    """Encoded prompts on disk (see Cache): cache[rows] is the Text of prompts[rows]; equal prompts are stored once. `null`
    is the null prompt as in null_prompt, one row.

    what: all that decides the numbers besides the prompts.   open_encoders() -> read(prompt, plain) -> {part of a Text: one row
    of it}; it is called only if something is missing, and what it loaded (10 GB in FLUX) is gone afterwards"""

    def __init__(self, root, prompts: list[str], what: str, open_encoders, negative: str = ""):
        distinct = list(dict.fromkeys(prompts))
        digest = hashlib.sha256("\0".join(distinct).encode()).hexdigest()
        self.files = Cache(root, "texts", dict(layout=1, what=what, prompts=digest, negative=negative), 1 + len(distinct))
        place = {prompt: 1 + i for i, prompt in enumerate(distinct)}  # row 0: the null prompt
        self.dir, self.places = self.files.dir, torch.tensor([place[p] for p in prompts])
        if self.files.done < self.files.length:
            self._fill([negative, *distinct], open_encoders)
        self.parts = {name: self.files.array(name) for name in self.files.names}
        null = self._text(torch.tensor([0]))
        self.null = null if negative else replace(null, mask=None)

    @torch.no_grad()
    def _fill(self, prompts: list[str], open_encoders):
        cache, arrays, read = self.files, {}, open_encoders()
        for i in tqdm(range(cache.done, len(prompts)), desc=f"reading {len(prompts)} prompts", leave=False):
            for name, row in read(prompts[i], i == 0).items():
                row = row[0].detach().cpu()
                row = (row.view(torch.uint16) if row.dtype == torch.bfloat16 else row).numpy()      # numpy has no bf16
                if name not in arrays:
                    arrays[name] = cache.new(name, row.shape, row.dtype)
                arrays[name][i] = row
            if i % 256 == 255 or i + 1 == len(prompts):
                cache.commit(arrays, i + 1)
        del read
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _text(self, rows: Tensor) -> Text:
        parts = {k: torch.from_numpy(a[rows.numpy()]) for k, a in self.parts.items()}
        return Text(**{k: v.view(torch.bfloat16) if v.dtype == torch.uint16 else v for k, v in parts.items()})

    def __len__(self):
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Text:
        return self._text(self.places[rows])


class Words:
    """A TextCache's interface over encode_words, which is faster than a disk."""

    def __init__(self, prompts: list[str], length: int, negative: str = ""):
        self.prompts, self.length, self.null = prompts, length, null_prompt("words", None, length, negative)

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Text:
        return encode_words([self.prompts[i] for i in rows.tolist()], self.length)


def cache_prompts(family: str, folder, prompts: list[str], length: int, negative: str = "", cache="runs/cache",
                  dtype: torch.dtype = torch.float32, device="cpu") -> TextCache | Words:
    """A TextCache of prompts and null prompt under the text encoders in a pipeline folder, `length` tokens each. The encoders
    are all loaded at once here, each prompt goes through them by itself; they are freed before this returns."""
    if family == "words":
        return Words(prompts, length, negative)
    found = find_encoders(family, folder)

    def open_encoders():
        loaded = [(read, *_load_encoder(cls, *parts, dtype, device)) for cls, read, parts, _ in found]
        return lambda prompt, plain: {k: v for read, *pair in loaded for k, v in read(*pair, prompt, length, plain).items()}

    what = f"{[(cls, print_) for cls, _, _, print_ in found]} {length} {dtype}"
    return TextCache(cache, prompts, what, open_encoders, negative)


def check_scale(cfg, latents: np.ndarray, report=None):
    """ValueError unless some of these latents (N,C,H,W) spread by about 1: a scale forgotten, doubled or of another
    autoencoder trains to a finite loss, and ruins the run."""
    z = latents[:: max(1, len(latents) // 2048)].astype(np.float32)
    if report:
        print(f"{cfg.name}: latents of mean {z.mean():+.3f}, standard deviation {z.std():.3f} -> {report}")
    if not 0.6 < z.std() < 1.6:
        raise ValueError(f"{cfg.name}: latents of standard deviation {z.std():.2f} where about 1 is expected; is its scale {cfg.scale} right for these weights?")


def text_folder(name: str, cfg, given: str | None, weights: str | None) -> Path | None:
    """Where a model's text encoders are: the folder given, the pipeline folder that the weights came from, or the hub;
    None for encoders without files."""
    if cfg.text_encoder is None or cfg.text_weights is None:
        return None
    parts = text_parts(cfg.text_encoder)
    if not given and weights and (Path(weights) / parts[0]).is_dir():
        return Path(weights)
    return find_weights(f"{name}'s text encoder", cfg.text_weights, given, parts, "--text-encoders")
