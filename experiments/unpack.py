"""Pictures in one file -> class folders, which every command reads with --images.

    unpack(npz, names, folder)    folder/train/CLASS/*.webp, folder/unseen/CLASS/*.webp

Many small files are slow to copy, so sets of small pictures come as one: an npz file of `webp`, `offsets` and
`labels`, see open_npz. Pictures are not decoded: the folder holds the bytes of the file.
"""

import json
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path
from zipfile import BadZipFile

import numpy as np


def open_npz(file: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`webp` uint8, the pictures' files one behind the other; `offsets` (N+1,), picture i is
    webp[offsets[i]:offsets[i+1]]; `labels` (N,). ValueError if the file holds something else."""
    try:
        with np.load(file) as arrays:
            webp, offsets, labels = (arrays[name] for name in ("webp", "offsets", "labels"))
        whole = offsets[0] == 0 and offsets[-1] == len(webp) and len(offsets) == len(labels) + 1
    except (OSError, ValueError, KeyError, TypeError, IndexError, BadZipFile, zlib.error) as e:
        raise ValueError(f"--npz {file}: no npz file of webp, offsets and labels ({e})") from None
    if not whole or len(labels) == 0 or (np.diff(offsets) <= 0).any():
        raise ValueError(f"--npz {file}: its offsets do not cut {len(webp)} bytes into {len(labels)} "
                         "pictures; is the file whole?")
    return webp, offsets, labels


def read_names(npz: str, file: str | None) -> dict[int, str]:
    """{label: folder} by a JSON file {"classes": [{"label": 0, "name": "tench"}, ...]}; None = the only
    *classes.json beside the pictures. ValueError if it is not there, is another, or a name stands twice."""
    beside = list(Path(npz).parent.glob("*classes.json"))
    if file is None and len(beside) != 1:
        raise ValueError(f"--npz {npz}: {len(beside)} files *classes.json beside it; name one with --names")
    file = Path(file or beside[0])
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["classes"]
        # a folder's name must not be a path
        names = {int(entry["label"]): re.sub(r"[^\w-]+", "_", entry["name"]) for entry in classes}
    except (ValueError, KeyError, TypeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"--names {file}: no list \"classes\" of label and name ({reason})") from None
    if len(set(names.values())) < len(classes):
        raise ValueError(f"--names {file}: a label or a name stands there twice; give each class its own")
    return names


def unpack(npz: str, names_file: str | None, folder: Path):
    """Write the pictures, as they are, to folder/train/CLASS and folder/unseen/CLASS: every tenth of a class
    is unseen. ValueError for a label without a name."""
    webp, offsets, labels = open_npz(npz)
    names = read_names(npz, names_file)
    nameless = set(labels.tolist()) - set(names)
    if nameless:
        raise ValueError(f"--npz {npz}: label {min(nameless)} has no name; add it to the file of --names")
    # under another name until all are there: a folder of this name is whole
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    count = Counter()
    for i, label in enumerate(labels.tolist()):
        count[label] += 1
        split = "unseen" if count[label] % 10 == 0 else "train"
        file = partial / split / names[label] / f"{i:06d}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(webp[offsets[i] : offsets[i + 1]].tobytes())
    partial.rename(folder)
