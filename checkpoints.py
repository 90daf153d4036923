"""Files in and out: weights of every published layout, the model hub, runs, and what diffusers and PEFT read.

A layout is a table. Its rows are (theirs, ours[, transform]): a name in the file, the name here, and what
changes besides the name. Read from left to right the table loads a file, from right to left it writes one:

    ("transformer_blocks.{}.attn1.to_{q,k,v}.*", "blocks.{}.attn.qkv.*")        three tensors <-> one

Loading is strict: every key of the file is used once, every tensor of the model is filled, all shapes are
equal. Reading is safe: safetensors, or torch.load(weights_only=True). Writing is atomic.

    build(cfg, file)         a model of a preset's configuration, from a file of any layout
    load_base(name)          a preset or a finished run: the model that a stage starts from
    load_run(folder)         the model that a stage trained
    load_autoencoder(name)   an autoencoder by preset
    export(model, ae, dir)   a pipeline of diffusers

Reading order: files, tables, strict loading, the hub, models, runs, export to diffusers, LoRA in the files of
diffusers and PEFT.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import get_origin

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import (
    BASES, FAMILIES, Backbone, DiT, DiTConfig, Flux, FluxConfig, Sampling, Sana, SanaConfig, resolve_shift,
    to_deep_model)
from lora import LoRALinear, add_lora, lora_layers, lora_state, merge_lora
from autoencoder import Autoencoder, KLConfig, ae_config, build_autoencoder


HERE = Path(__file__).resolve().parent


# ---- writing files: atomic ------------------------------------------------------------------------

# What a user can mend: the disk is full or broken, the place is not his, something else lies there. Any other
# error of a file is a mistake of this code.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
               errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


@contextmanager
def disk_errors(path):
    """Turn the disk's refusal of what is written inside into a ValueError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        # safetensors and shutil tell the number in their text only
        stated = re.search(r"(?:os error|Errno) (\d+)", str(e))
        number = int(stated[1]) if stated else None
        if number not in DISK_ERRORS:
            raise
        raise ValueError(f"{path} could not be written ({os.strerror(number)}); mend that, or name another "
                         "folder") from None


@contextmanager
def atomic(path):
    """Yield the path of a temporary neighbour; afterwards flush it to the disk and rename it to `path`.
    A kill or a full disk leaves the old file whole. ValueError if the disk refuses."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            with open(tmp, "rb+") as f:
                os.fsync(f.fileno())
            # some writers make private files: give it the permissions of a new file
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(tmp, 0o666 & ~umask)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def check_writable(path, flag="--out"):
    """ValueError if a file or a folder cannot be made at this path."""
    whole = Path(path).absolute()
    place = next(folder for folder in (whole, *whole.parents) if folder.exists())
    if place != whole and not place.is_dir():
        raise ValueError(f"{flag} {path}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{flag} {path}: {place} cannot be written to")


def write_json(path, value):
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1))


def write_tensors(
    path, tensors: dict[str, Tensor], config: dict | None = None, metadata: dict[str, str] | None = None
):
    """Write safetensors atomically, with the configuration and whatever else is given as metadata."""
    # the format has neither views nor shared storage
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = {"format": "pt", "config": json.dumps(config or {}), **(metadata or {})}
    with atomic(path) as tmp:
        save_file(plain, tmp, metadata=metadata)


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's weights: enough of every tensor to tell two trainings apart."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        start = value.detach().flatten()[:64].float().cpu()
        digest.update(f"{key}{tuple(value.shape)}".encode() + start.numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def code_version() -> str:
    """The commit of this code, "-dirty" if files differ from it; without git a hash of the files."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    # a folder without a repository of its own would give the commit of one around it
    if (HERE / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
    digest = hashlib.sha256()
    for file in sorted(HERE.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return f"files {digest.hexdigest()[:12]}"


# ---- reading files: nothing in them is executed, and nothing outside of them is read --------------

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
                "model.safetensors", "diffusion_pytorch_model.bin")


def weight_files(path, part: str = "transformer") -> list[Path]:
    """The files in which a model is stored. path: a file, the index of a sharded model, or a folder with
    either in it or in its subfolder `part`, as in a diffusers pipeline. ValueError if there is none."""
    path = Path(path)
    if path.is_dir():
        folder = path / part if (path / part).is_dir() else path
        found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not found:
            raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}; "
                             "finish the download, or name the file itself")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    if path.name.endswith(".index.json"):
        return shard_files(path)
    shard = re.search(r"-\d+-of-(\d+)\.\w+$", path.name)
    if shard and int(shard[1]) > 1:
        raise ValueError(f"{path} is one part of several ({int(shard[1])}); "
                         "name their folder, or the index beside them")
    return [path]


def shard_files(index: Path) -> list[Path]:
    """The files that the index of a sharded model lists. ValueError if one is missing, or lies elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # an index is somebody else's text: it may not point anywhere but beside itself
        outside = [name for name in names if not re.fullmatch(r"[^./\\:][^/\\:]*\.safetensors", name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of shards (JSON with a weight_map of file names); "
                         "download it again") from None
    if outside:
        raise ValueError(f"{index} names {outside[0]!r} for a shard; only *.safetensors beside the index are "
                         "read. It is damaged or hostile: download it again from its source")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {len(missing)} of the {len(names)} shards that {index.name} "
                         f"lists: {', '.join(missing[:3])}; finish the download")
    return [index.parent / name for name in names]


def aligned(x: Tensor) -> Tensor:
    """x, copied if it begins at an odd address: some writers do not pad their header."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def torch_load(file: Path):
    """What torch.save wrote, memory-mapped. ValueError if it is more than tensors and plain values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise ValueError(f"{file} ({file.stat().st_size} bytes) does not load as plain tensors "
                         f"({type(e).__name__}); it is damaged, or it holds pickled code, which is never run "
                         "here. Save its state dict as safetensors first") from None


# Where trainers keep the weights in what they save. The first that is there counts: averages before raw ones.
WRAPPERS = ("ema", "ema_model_state_dict", "state_dict", "model_state_dict", "model")
PREFIXES = ("0.", "module.", "_orig_mod.", "model.diffusion_model.")


def unwrap(state, source) -> dict[str, Tensor]:
    """The tensors by name, without the wrappers and prefixes of known trainers. ValueError if there are
    none."""
    while isinstance(state, dict):
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict) and state[key]]
        if not inner:
            break
        state = inner[0]
        # the authors' checkpoints hold averages of several decays side by side; the slowest one counts
        if all(isinstance(v, dict) and re.fullmatch(r"[\d.e-]+", str(key)) for key, v in state.items()):
            slowest = max(state, key=lambda decay: float(str(decay)))
            state = state[slowest]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source} does not hold a state dict, tensors by name, under any of the known "
                         "wrappers; save it as one")
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def read_tensors(path, part: str = "transformer") -> dict[str, Tensor]:
    """Weights by name, memory-mapped: they take memory when they are read, and writing to one leaves the
    file alone. path as for weight_files: .safetensors, or a .pt/.pth/.bin that torch loads with
    weights_only=True. Wrappers of known trainers are taken off. ValueError if a file is missing, truncated,
    a git-lfs pointer, or anything but tensors."""
    files = weight_files(path, part)
    tensors = {}
    for file in files:
        with open(file, "rb") as f:
            if f.read(64).startswith(b"version https://git-lfs"):
                raise ValueError(f"{file} is a git-lfs pointer, not the weights; "
                                 "run `git lfs pull` where it came from")
        if file.suffix != ".safetensors":
            return unwrap(torch_load(file), file)
        with opened(file) as f:
            tensors |= {key: aligned(f.get_tensor(key)) for key in f.keys()}
    return unwrap(tensors, path)


def read_config(path) -> dict:
    """The configuration that write_tensors put beside the tensors; {} for a file of anybody else."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        config = json.loads(read_metadata(path).get("config", "{}"))
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the configuration in it is damaged; get or write the file again")
    return config


def read_metadata(file) -> dict[str, str]:
    with opened(file) as f:
        return f.metadata() or {}


@contextmanager
def opened(file):
    """A safetensors file, opened. ValueError if it is not a whole one."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        size = Path(file).stat().st_size if Path(file).is_file() else 0
        raise ValueError(f"{file} ({size} bytes) is not a whole safetensors file ({e}); get or write it "
                         "again") from None


def folder_config(path, part: str = "transformer") -> dict:
    """The config.json beside a diffusers model; {} if there is none. path as for weight_files."""
    file = weight_files(path, part)[0].parent / "config.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} is not JSON; download it again") from None


# ---- tables: a layout is a list of rows (theirs, ours[, transform]) -------------------------------
# {} stands for a number and * for any text, both the same and in order on the two sides. {a,b} on their
# side are several tensors that are one here, concatenated along the first axis. ours = None: the key is
# left out. The first row that fits counts.

def same(x: Tensor) -> Tensor:
    return x


def swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([second, first])


def linear_weight(w: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of a linear map; anything else as it is."""
    return w.flatten(1) if w.dim() == 4 else w


def conv_weight(w: Tensor) -> Tensor:
    """The weight of a linear map (out,in) as that of a 1x1 convolution (out,in,1,1)."""
    return w[:, :, None, None]


@dataclass(frozen=True)
class KeyTransform:
    """What changes besides the name. load makes our tensor of theirs, save theirs of ours; shares are the
    relative lengths of the tensors that are one here (None: all alike)."""
    load: Callable[[Tensor], Tensor] = same
    save: Callable[[Tensor], Tensor] = same
    shares: tuple[int, ...] | None = None

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        shares = self.shares or (1,) * parts
        return x.split([len(x) * share // sum(shares) for share in shares]) if parts > 1 else (x,)


SAME = KeyTransform()
SWAP = KeyTransform(swap_halves, swap_halves)       # diffusers' last modulation is (scale, shift)
QKV_MLP = KeyTransform(shares=(1, 1, 1, 4))
LINEAR = KeyTransform(linear_weight)
CONV = KeyTransform(conv_weight, linear_weight)

SAME_NAMES = [("*", "*")]

DIT_ORIGINAL = [
    ("pos_embed", None),                                             # computed from the grid at hand
    ("*", "*"),
]

DIT_DIFFUSERS = [
    ("pos_embed.proj.*", "x_embedder.proj.*"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
    ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.*", "y_embedder.embedding_table.*"),
    ("transformer_blocks.{}.norm1.emb.*", None),                     # each block repeats those of block 0
    ("transformer_blocks.{}.norm1.linear.*", "blocks.{}.adaLN_modulation.1.*"),
    ("transformer_blocks.{}.attn1.to_{q,k,v}.*", "blocks.{}.attn.qkv.*"),
    ("transformer_blocks.{}.attn1.to_out.0.*", "blocks.{}.attn.proj.*"),
    ("transformer_blocks.{}.ff.net.0.proj.*", "blocks.{}.mlp.fc1.*"),
    ("transformer_blocks.{}.ff.net.2.*", "blocks.{}.mlp.fc2.*"),
    ("proj_out_1.*", "final_layer.adaLN_modulation.1.*"),
    ("proj_out_2.*", "final_layer.linear.*"),
]

FLUX_DIFFUSERS = [
    ("x_embedder.*", "img_in.*"),
    ("context_embedder.*", "txt_in.*"),
    ("time_text_embed.timestep_embedder.linear_1.*", "time_in.in_layer.*"),
    ("time_text_embed.timestep_embedder.linear_2.*", "time_in.out_layer.*"),
    ("time_text_embed.guidance_embedder.linear_1.*", "guidance_in.in_layer.*"),
    ("time_text_embed.guidance_embedder.linear_2.*", "guidance_in.out_layer.*"),
    ("time_text_embed.text_embedder.linear_1.*", "vector_in.in_layer.*"),
    ("time_text_embed.text_embedder.linear_2.*", "vector_in.out_layer.*"),
    # blocks of two streams, the image's
    ("transformer_blocks.{}.norm1.linear.*", "double_blocks.{}.img_mod.lin.*"),
    ("transformer_blocks.{}.attn.to_{q,k,v}.*", "double_blocks.{}.img_attn.qkv.*"),
    ("transformer_blocks.{}.attn.norm_q.weight", "double_blocks.{}.img_attn.norm.query_norm.scale"),
    ("transformer_blocks.{}.attn.norm_k.weight", "double_blocks.{}.img_attn.norm.key_norm.scale"),
    ("transformer_blocks.{}.attn.to_out.0.*", "double_blocks.{}.img_attn.proj.*"),
    ("transformer_blocks.{}.ff.net.0.proj.*", "double_blocks.{}.img_mlp.0.*"),
    ("transformer_blocks.{}.ff.net.2.*", "double_blocks.{}.img_mlp.2.*"),
    # and the text's
    ("transformer_blocks.{}.norm1_context.linear.*", "double_blocks.{}.txt_mod.lin.*"),
    ("transformer_blocks.{}.attn.add_{q,k,v}_proj.*", "double_blocks.{}.txt_attn.qkv.*"),
    ("transformer_blocks.{}.attn.norm_added_q.weight", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
    ("transformer_blocks.{}.attn.norm_added_k.weight", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
    ("transformer_blocks.{}.attn.to_add_out.*", "double_blocks.{}.txt_attn.proj.*"),
    ("transformer_blocks.{}.ff_context.net.0.proj.*", "double_blocks.{}.txt_mlp.0.*"),
    ("transformer_blocks.{}.ff_context.net.2.*", "double_blocks.{}.txt_mlp.2.*"),
    # blocks of one stream
    ("single_transformer_blocks.{}.norm.linear.*", "single_blocks.{}.modulation.lin.*"),
    ("single_transformer_blocks.{}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}.*",
     "single_blocks.{}.linear1.*", QKV_MLP),
    ("single_transformer_blocks.{}.attn.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"),
    ("single_transformer_blocks.{}.attn.norm_k.weight", "single_blocks.{}.norm.key_norm.scale"),
    ("single_transformer_blocks.{}.proj_out.*", "single_blocks.{}.linear2.*"),
    ("norm_out.linear.*", "final_layer.adaLN_modulation.1.*", SWAP),
    ("proj_out.*", "final_layer.linear.*"),
]

SANA_ORIGINAL = [
    ("pos_embed", None),                                             # in the file, not in SANA-1.5's forward
    ("y_embedder.y_embedding", None),                                # here the encoded empty prompt
    ("blocks.{}.mlp.inverted_conv.conv.*", "blocks.{}.mlp.conv_inverted.*"),
    ("blocks.{}.mlp.depth_conv.conv.*", "blocks.{}.mlp.conv_depth.*"),
    ("blocks.{}.mlp.point_conv.conv.*", "blocks.{}.mlp.conv_point.*"),
    ("*", "*"),
]

SANA_DIFFUSERS = [
    ("patch_embed.proj.*", "x_embedder.proj.*"),
    ("time_embed.emb.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
    ("time_embed.emb.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
    ("time_embed.linear.*", "t_block.1.*"),
    ("caption_norm.*", "attention_y_norm.*"),
    ("caption_projection.linear_1.*", "y_embedder.y_proj.fc1.*"),
    ("caption_projection.linear_2.*", "y_embedder.y_proj.fc2.*"),
    ("transformer_blocks.{}.scale_shift_table", "blocks.{}.scale_shift_table"),
    ("transformer_blocks.{}.attn1.to_{q,k,v}.*", "blocks.{}.attn.qkv.*"),
    ("transformer_blocks.{}.attn1.norm_q.*", "blocks.{}.attn.q_norm.*"),
    ("transformer_blocks.{}.attn1.norm_k.*", "blocks.{}.attn.k_norm.*"),
    ("transformer_blocks.{}.attn1.to_out.0.*", "blocks.{}.attn.proj.*"),
    ("transformer_blocks.{}.attn2.to_q.*", "blocks.{}.cross_attn.q_linear.*"),
    ("transformer_blocks.{}.attn2.to_{k,v}.*", "blocks.{}.cross_attn.kv_linear.*"),
    ("transformer_blocks.{}.attn2.norm_q.*", "blocks.{}.cross_attn.q_norm.*"),
    ("transformer_blocks.{}.attn2.norm_k.*", "blocks.{}.cross_attn.k_norm.*"),
    ("transformer_blocks.{}.attn2.to_out.0.*", "blocks.{}.cross_attn.proj.*"),
    ("transformer_blocks.{}.ff.*", "blocks.{}.mlp.*"),
    ("scale_shift_table", "final_layer.scale_shift_table"),
    ("proj_out.*", "final_layer.linear.*"),
]

TABLES = {
    DiT: {"ours": SAME_NAMES, "original": DIT_ORIGINAL, "diffusers": DIT_DIFFUSERS},
    Flux: {"original": SAME_NAMES, "diffusers": FLUX_DIFFUSERS},
    Sana: {"ours": SAME_NAMES, "original": SANA_ORIGINAL, "diffusers": SANA_DIFFUSERS},
}

# A name that only this layout of this family has. Where two layouts have it, the first row that fits counts.
LAYOUT_SIGNATURES = [
    ("double_blocks.0.img_attn.qkv.weight", Flux, "original"),
    ("transformer_blocks.0.attn.add_q_proj.weight", Flux, "diffusers"),
    ("blocks.0.mlp.inverted_conv.conv.weight", Sana, "original"),
    ("blocks.0.mlp.conv_inverted.weight", Sana, "ours"),
    ("transformer_blocks.0.ff.conv_inverted.weight", Sana, "diffusers"),
    ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", DiT, "diffusers"),
    ("pos_embed", DiT, "original"),
    ("y_embedder.embedding_table.weight", DiT, "ours"),
]


def detect_layout(keys) -> tuple[type, str]:
    """Family and layout of a state dict, by its names. ValueError if none has them."""
    for signature, family, layout in LAYOUT_SIGNATURES:
        if signature in keys:
            return family, layout
    raise ValueError("these are not the weights of a DiT, FLUX or SANA in any known layout (the first names: "
                     f"{', '.join(list(keys)[:3])}); an autoencoder goes to --ae-weights, a LoRA to its base")


# KL-VAEs have the names of diffusers here, which SD's and FLUX's are published in; DC-AEs have names of
# their own
KL_DIFFUSERS = SAME_NAMES

KL_DIFFUSERS_OLD = [                                                 # before 2023, as SD's published file
    ("*.mid_block.attentions.0.query.*", "*.mid_block.attentions.0.to_q.*", LINEAR),
    ("*.mid_block.attentions.0.key.*", "*.mid_block.attentions.0.to_k.*", LINEAR),
    ("*.mid_block.attentions.0.value.*", "*.mid_block.attentions.0.to_v.*", LINEAR),
    ("*.mid_block.attentions.0.proj_attn.*", "*.mid_block.attentions.0.to_out.0.*", LINEAR),
    ("*", "*"),
]


def kl_original(levels: int) -> list[tuple]:
    """The table of Black Forest Labs' and latent diffusion's names."""
    pairs = []
    for i in range(levels):
        pairs.append((f"encoder.down.{i}", f"encoder.down_blocks.{i}"))
        # their decoder counts its levels from the picture, so backwards
        pairs.append((f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"))
    rows = []
    for theirs, ours in pairs:
        rows.append((theirs + ".block.{}.nin_shortcut.*", ours + ".resnets.{}.conv_shortcut.*"))
        rows.append((theirs + ".block.{}.*", ours + ".resnets.{}.*"))
        rows.append((theirs + ".downsample.conv.*", ours + ".downsamplers.0.conv.*"))
        rows.append((theirs + ".upsample.conv.*", ours + ".upsamplers.0.conv.*"))
    return rows + [
        ("*.mid.block_1.*", "*.mid_block.resnets.0.*"),
        ("*.mid.block_2.*", "*.mid_block.resnets.1.*"),
        ("*.mid.attn_1.norm.*", "*.mid_block.attentions.0.group_norm.*"),
        ("*.mid.attn_1.q.*", "*.mid_block.attentions.0.to_q.*", LINEAR),
        ("*.mid.attn_1.k.*", "*.mid_block.attentions.0.to_k.*", LINEAR),
        ("*.mid.attn_1.v.*", "*.mid_block.attentions.0.to_v.*", LINEAR),
        ("*.mid.attn_1.proj_out.*", "*.mid_block.attentions.0.to_out.0.*", LINEAR),
        ("*.norm_out.*", "*.conv_norm_out.*"),
        ("*", "*"),
    ]


DCAE_DIFFUSERS = [
    ("*.attn.to_{q,k,v}.weight", "*.attn.qkv.weight", CONV),
    ("*.attn.to_qkv_multiscale.0.proj_in.weight", "*.attn.multiscale.0.weight"),
    ("*.attn.to_qkv_multiscale.0.proj_out.weight", "*.attn.multiscale.1.weight"),
    ("*.attn.to_out.weight", "*.attn.proj.weight", CONV),
    ("*.attn.norm_out.*", "*.attn.norm.*"),
    ("*", "*"),
]

DCAE_ORIGINAL_BLOCK = [                                              # in encoder and decoder alike
    ("main.conv1.conv.*", "conv1.*"),
    ("main.conv2.conv.*", "conv2.*"),
    ("main.conv2.norm.*", "norm.*"),
    ("main.conv.conv.*", "conv.*"),                                  # up and down: folding, interpolating
    ("main.conv.*", "conv.*"),                                       # strided
    ("context_module.main.qkv.conv.*", "attn.qkv.*"),
    ("context_module.main.aggreg.0.0.*", "attn.multiscale.0.*"),
    ("context_module.main.aggreg.0.1.*", "attn.multiscale.1.*"),
    ("context_module.main.proj.conv.*", "attn.proj.*"),
    ("context_module.main.proj.norm.*", "attn.norm.*"),
    ("local_module.main.inverted_conv.conv.*", "conv_out.conv_inverted.*"),
    ("local_module.main.depth_conv.conv.*", "conv_out.conv_depth.*"),
    ("local_module.main.point_conv.conv.*", "conv_out.conv_point.*"),
    ("local_module.main.point_conv.norm.*", "conv_out.norm.*"),
]

DCAE_ORIGINAL = [
    *[("encoder.stages.{}.op_list.{}." + theirs, "encoder.down_blocks.{}.{}." + ours)
      for theirs, ours in DCAE_ORIGINAL_BLOCK],
    *[("decoder.stages.{}.op_list.{}." + theirs, "decoder.up_blocks.{}.{}." + ours)
      for theirs, ours in DCAE_ORIGINAL_BLOCK],
    ("encoder.project_in.conv.conv.*", "encoder.conv_in.conv.*"),
    ("encoder.project_in.conv.*", "encoder.conv_in.*"),
    ("encoder.project_out.main.op_list.0.conv.*", "encoder.conv_out.*"),
    ("encoder.project_out.op_list.0.conv.*", "encoder.conv_out.*"),
    ("decoder.project_in.main.conv.*", "decoder.conv_in.*"),
    ("decoder.project_in.conv.*", "decoder.conv_in.*"),
    ("decoder.project_out.op_list.0.*", "decoder.norm_out.*"),
    ("decoder.project_out.op_list.2.conv.conv.*", "decoder.conv_out.conv.*"),
    ("decoder.project_out.op_list.2.conv.*", "decoder.conv_out.*"),
]


def ae_table(cfg, keys) -> list[tuple]:
    """The table of an autoencoder's layout, by the names in its file."""
    def any_with(part):
        return any(part in key for key in keys)

    if not isinstance(cfg, KLConfig):
        return DCAE_ORIGINAL if any_with(".op_list.") else DCAE_DIFFUSERS
    if any_with(".mid.block_1."):
        return kl_original(len(cfg.widths))
    return KL_DIFFUSERS_OLD if any_with(".proj_attn.") else KL_DIFFUSERS


# ---- strict loading -------------------------------------------------------------------------------

def expand_names(row: str) -> list[str]:
    """"to_{q,k}.*" -> ["to_q.*", "to_k.*"]"""
    several = re.search(r"\{([^{}]+)\}", row)
    return [row.replace(several[0], part) for part in several[1].split(",")] if several else [row]


@lru_cache(maxsize=None)
def key_pattern(row: str) -> re.Pattern:
    return re.compile(re.escape(row).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)"))


def fill_pattern(row: str, matched: tuple[str, ...]) -> str:
    """The key that this side of a row stands for, given what the other side's {} and * matched."""
    left = iter(matched)
    return re.sub(r"\{\}|\*", lambda _: next(left), row)


def source_keys(key: str, table: list[tuple], theirs=None) -> tuple[list[str], KeyTransform] | None:
    """Names in the other layout of our tensor `key`, and the transform between: by the first row that has
    it and, given `theirs`, whose names are all in there. None if there is no such row."""
    for names, ours, *transform in table:
        match = key_pattern(ours).fullmatch(key) if ours else None
        if not match:
            continue
        found = [fill_pattern(name, match.groups()) for name in expand_names(names)]
        if theirs is None or all(name in theirs for name in found):
            return found, transform[0] if transform else SAME
    return None


def first_of(names: list[str], n: int) -> str:
    return ", ".join(names[:n]) + (" ..." if len(names) > n else "")


def map_keys(model: nn.Module, theirs: dict[str, Tensor], table: list[tuple]) -> dict[str, Tensor]:
    """A state dict of another layout under our names, strictly: every source key used once, every target
    filled, shapes equal. Raises ValueError with the keys otherwise: half a checkpoint draws plausible
    rubbish."""
    wanted = model.state_dict()
    mapped = {}
    used = set()
    # fill every target, and remember what was read for it
    for key in wanted:
        found = source_keys(key, table, theirs)
        if found:
            names, transform = found
            used.update(names)
            parts = [theirs[name] for name in names]
            mapped[key] = transform.load(parts[0] if len(parts) == 1 else torch.cat(parts))

    # what this layout leaves out may be in the file
    left_out = [key_pattern(names) for names, ours, *_ in table if ours is None]
    for row in left_out:
        used.update(key for key in theirs if row.fullmatch(key))
    wrong = []
    for key, value in mapped.items():
        if value.shape != wanted[key].shape:
            wrong.append(f"{key}: file {tuple(value.shape)}, model {tuple(wanted[key].shape)}")
    problems = {
        "missing": [key for key in wanted if key not in mapped],
        "unexpected": [key for key in theirs if key not in used],
        "of another shape": wrong,
    }
    found = "; ".join(f"{len(keys)} {what}: {first_of(keys, 4)}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"these weights are not a {type(model).__name__} of this configuration; {found}")
    return mapped


def unmap_keys(ours: dict[str, Tensor], table: list[tuple]) -> dict[str, Tensor]:
    """Our state dict under the names of another layout: the table read from right to left. What is one
    tensor here is split (views, no copies)."""
    theirs = {}
    for key, value in ours.items():
        found = source_keys(key, table)
        if found is None:
            raise ValueError(f"{key} has no name in that layout")
        names, transform = found
        theirs |= zip(names, transform.split(transform.save(value), len(names)))
    return theirs


def load_weights(
    model: nn.Module, theirs: dict[str, Tensor], table: list[tuple], dtype: torch.dtype | None = None
) -> nn.Module:
    """Fill a model (built on meta) with tensors of any layout and freeze it. dtype None keeps theirs. What
    is neither fused nor converted stays the file's own memory map, and what is goes through one tensor at a
    time: there is never a second copy of the whole. Raises ValueError naming keys, see map_keys."""
    mapped = map_keys(model, theirs, table)
    # replaced one by one, so that each old tensor is freed before the next is made
    if dtype is not None:
        for key, value in mapped.items():
            mapped[key] = value.to(dtype) if value.is_floating_point() else value
    model.load_state_dict(mapped, assign=True, strict=True)
    return model.requires_grad_(False)


# ---- the hub --------------------------------------------------------------------------------------

# What a part of a pipeline folder is made of. Other precisions, which some repositories add, are not fetched.
PART_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
OTHER_PRECISIONS = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"]


def find_weights(
    name: str, spec: str | None, path: str | None = None,
    parts: tuple[str, ...] = ("transformer",), flag: str = "--weights",
) -> Path:
    """Where the weights of `name` are: the path given; the file shipped here; or the model hub's cache,
    filled if need be. A spec is "file", "repository::file" or "repository::folder/", a pipeline folder
    ("repository::" if that is the repository itself); of a folder only the named parts are fetched, and the
    folder is returned. Raises ValueError: what was wanted and where, what to do."""
    if path:
        if not Path(path).exists():
            raise ValueError(f"{flag} {path}: no such file")
        return Path(path)
    if spec is None:
        raise ValueError(f"{name} has no published weights; train it (finetune.py --init scratch) or give a "
                         f"file with {flag} PATH")
    if "::" in spec:
        repo, file = spec.split("::")
        return download(name, repo, file, parts, flag)
    shipped = HERE / spec
    if not shipped.is_file():
        raise ValueError(f"{name}: {shipped} should come with this repository and is missing; restore it "
                         f"with git, or give {flag} PATH")
    return shipped


def download(name: str, repo: str, file: str, parts: tuple[str, ...], flag: str) -> Path:
    """A file, or parts of a folder, of a repository on the model hub, from the hub's cache if they are
    there (huggingface_hub, optional). A connection that breaks goes on at its byte, and no whole file is
    fetched twice; the environment's HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME hold. ValueError in
    two lines."""
    is_folder = not file or file.endswith("/")
    if is_folder:
        wanted = f"{name} wants {file}{{{','.join(parts)}}} of {repo}"
        local = f"With it at hand, give {flag} DIR (a folder with these parts)"
    else:
        wanted = f"{name} wants {file} of {repo}"
        local = f"With it at hand, give {flag} PATH (either published layout, .safetensors, .bin or .pt)"
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise ValueError(f"{wanted}, and downloading needs: pip install huggingface_hub\n{local}") from None
    try:
        if not is_folder:
            return Path(hub.hf_hub_download(repo, file))
        patterns = [f"{file}{part}/{files}" for part in parts for files in PART_FILES]
        root = hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=OTHER_PRECISIONS)
    except errors.GatedRepoError:
        raise ValueError(f"{wanted}, which its owners give to those who accept their licence: do that at "
                         f"{constants.ENDPOINT}/{repo}, and set HF_TOKEN to a token of that account\n"
                         f"{local}") from None
    except Exception as e:
        # the hub's own errors are many and long; the type says which
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT}: {type(e).__name__}"
        raise ValueError(f"{wanted}; it is not in {constants.HF_HUB_CACHE} and could not be downloaded "
                         f"({why})\n{local}") from None
    folder = Path(root) / file
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"{wanted}; {constants.ENDPOINT}/{repo} and {constants.HF_HUB_CACHE} have no "
                         f"{', '.join(missing)}\n{local}")
    return folder


# ---- models from files ----------------------------------------------------------------------------

def build(cfg, weights=None, dtype: torch.dtype | None = torch.float32) -> Backbone:
    """A model of this configuration, filled from weights of any known layout (a file, an index, a diffusers
    folder), or freshly initialised (weights None). dtype None keeps the file's, and its memory map.
    ValueError if the weights are missing, damaged or another model's."""
    if weights is None:
        model = FAMILIES[type(cfg)](cfg).init_from_scratch()
        return model.to(dtype) if dtype else model
    tensors = read_tensors(weights)
    # the file tells its family, layout and sizes; they have to be those of the configuration
    try:
        family, layout = detect_layout(tensors)
        table = TABLES[family][layout]
        match_config(cfg, family, config_from_shapes(family, table, tensors, folder_config(weights)))
        # trained in fp16, SANA relies on that format's limits in any arithmetic
        in_fp16 = [key for key, value in tensors.items() if value.dtype == torch.float16]
        if family is Sana and any(".attn" in key for key in in_fp16):
            cfg = replace(cfg, clamp=True)
        with torch.device("meta"):
            model = family(cfg)
        return load_weights(model, tensors, table, dtype)
    except ValueError as e:
        raise ValueError(f"{weights}: {e}") from None


def as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


# What no tensor's shape shows: our name, and that in the config.json of diffusers
STATED = {
    DiT: ("num_heads", "num_attention_heads"),
    Flux: ("axes_dim", "axes_dims_rope"),
    Sana: ("num_heads", "num_cross_attention_heads"),
}


def config_from_shapes(family: type, table: list[tuple], theirs: dict[str, Tensor], stated: dict) -> dict:
    """What a weight file shows of its model's configuration: the shapes nearly all, and they cannot be
    wrong; `stated`, its config.json or {}, the rest. token_channels is C p^2: a FLUX token does not show
    its C and p."""
    def has(key):
        return source_keys(key, table, theirs) is not None

    def shape(key):
        if not has(key):
            raise ValueError(f"{key} is missing, and every {family.__name__} has it: the file is not whole, "
                             "or not of this family")
        names, _ = source_keys(key, table, theirs)
        return theirs[names[0]].shape                                # the first part's, if several are fused

    def count(key):
        return next(i for i in range(10_000) if not has(key.format(i)))

    # a model from its own repository has no config.json: what is not stated is not compared
    ours, name = STATED[family]
    found = {ours: as_tuple(stated[name])} if name in stated else {}
    if family is Flux:
        hidden_size, token_channels = shape("img_in.weight")
        return found | dict(
            hidden_size=hidden_size,
            token_channels=token_channels,
            depth=count("double_blocks.{}.img_mod.lin.bias"),
            depth_single=count("single_blocks.{}.modulation.lin.bias"),
            num_heads=hidden_size // shape("double_blocks.0.img_attn.norm.query_norm.scale")[0],
            context_in_dim=shape("txt_in.weight")[1],
            vec_in_dim=shape("vector_in.in_layer.weight")[1],
            guidance_embed=has("guidance_in.in_layer.bias"))
    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight")
    found |= dict(
        hidden_size=hidden_size,
        in_channels=in_channels,
        patch_size=patch_size,
        depth=count("blocks.{}.attn.proj.bias"))
    if family is Sana:
        return found | dict(
            mlp_ratio=shape("blocks.0.mlp.conv_point.weight")[1] / hidden_size,
            caption_channels=shape("y_embedder.y_proj.fc1.weight")[1])
    # DiT with a learned variance has twice the outputs
    has_variance = shape("final_layer.linear.bias")[0] != in_channels * patch_size**2
    return found | dict(
        num_classes=shape("y_embedder.embedding_table.weight")[0] - 1,
        predict="epsilon" if has_variance else "velocity")


def match_config(cfg, family: type, found: dict):
    """Raise ValueError if a file with this family and these values does not fit the configuration: it names
    what differs, and the presets that would fit."""
    def differences(config):
        if FAMILIES[type(config)] is not family:
            return found
        return {key: value for key, value in found.items() if getattr(config, key) != value}

    wrong = differences(cfg)
    if not wrong:
        return
    described = []
    for key, value in wrong.items():
        # of another family everything is told, also what is the same by chance
        asked = getattr(cfg, key, value)
        described.append(f"{key} {value}" + (f" (not {asked})" if asked != value else ""))
    fitting = [name for name, preset in BASES.items() if not differences(preset)]
    remedy = f"the preset that fits them is {' or '.join(fitting)}" if fitting else "no preset fits them"
    raise ValueError(f"the weights of a {family.__name__} with {', '.join(described)}, where a "
                     f"{FAMILIES[type(cfg)].__name__} of another configuration was asked for; {remedy}")


def config_dict(cfg) -> dict:
    """A configuration as plain values, for JSON."""
    return {"family": type(cfg).__name__, **asdict(cfg)}


def config_from_dict(plain: dict):
    """config_dict's inverse, also after JSON has made lists of tuples. ValueError if it is too old, or no
    model can be like that: sizes are checked before anything is made of them."""
    if "sampling" not in plain:
        raise ValueError('its configuration has no "sampling", so it was written by an earlier version of '
                         "this code; train it again")
    families = {kind.__name__: kind for kind in FAMILIES}
    if plain.get("family") not in families:
        raise ValueError(f"its model is of an unknown family, {plain.get('family')!r}")
    values = {key: as_tuple(value) for key, value in plain.items() if key != "family"}
    values["sampling"] = checked_config(Sampling, values["sampling"])
    return checked_config(families[plain["family"]], values)


# far above every model that there is
LARGEST = {"depth": 1000, "depth_single": 1000, "in_channels": 2**14}
LARGEST_OTHER = 2**20


def checked_config(cls: type, values: dict):
    """cls(**values). ValueError for a name that it does not have, and for a value of another type or size."""
    try:
        config = cls(**values)
    except TypeError as e:
        raise ValueError(f"its configuration is of another version of this code ({e})") from None
    for field in fields(cls):
        value = getattr(config, field.name)
        if not is_sane(value, field.type, LARGEST.get(field.name, LARGEST_OTHER)):
            raise ValueError(f"its configuration says {field.name} = {value!r:.40}, which no model can have")
    return config


def is_sane(value, kind, largest: int) -> bool:
    """Whether a value is of the annotated kind; whole numbers lie in 1 .. largest, others are finite."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_sane(part, int, largest) for part in value)
    # a whole number may stand for a fraction
    if isinstance(value, int) and isinstance(0.5, kind):
        return abs(value) < 2**53
    if not isinstance(value, kind):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or isinstance(value, bool) or 1 <= value <= largest


def load_autoencoder(
    name: str, weights: str | None = None, dtype: torch.dtype | None = torch.float32, device="cpu",
    flag: str = "--ae-weights",
) -> Autoencoder:
    """An autoencoder by preset name, from its shipped file, a local file or folder in any published layout
    (a diffusers pipeline's too), or the model hub. Frozen, in eval mode; dtype None keeps the file's. A
    file of ours or a config.json of diffusers brings the configuration, the scale included. flag: the one
    that names the file, in messages. ValueError if it is missing, damaged or of another architecture."""
    cfg = ae_config(name)
    path = find_weights(name, cfg.weights, weights, flag=flag)
    tensors = read_tensors(path, "vae")
    # a file of ours brings its configuration, the scale included, in its metadata
    own = read_config(path)
    own = {key: as_tuple(value) for key, value in own.items() if key in asdict(cfg) and key != "name"}
    try:
        cfg = same_latent(cfg, replace(cfg, **own))
        cfg = stated_config(cfg, folder_config(path, "vae"))
        with torch.device("meta"):
            model = build_autoencoder(cfg)
        load_weights(model, tensors, ae_table(cfg, tensors), dtype)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model.to(device, memory_format=torch.channels_last).eval()


# Names of our settings in the config.json of diffusers; read to load, written to export
KL_SETTINGS = {
    "channels": "latent_channels",
    "scale": "scaling_factor",
    "shift": "shift_factor",
    "widths": "block_out_channels",
    "depth": "layers_per_block",
    "groups": "norm_num_groups",
    "quant_conv": "use_quant_conv",
}
DCAE_SETTINGS = {
    "channels": "latent_channels",
    "scale": "scaling_factor",
    "widths": "encoder_block_out_channels",
    "encoder_depths": "encoder_layers_per_block",
    "decoder_depths": "decoder_layers_per_block",
    "latent_shortcut": "encoder_out_shortcut",
    "out_act": "decoder_conv_act_fn",
}


def stated_config(cfg, stated: dict):
    """An autoencoder's configuration with the values of a config.json of diffusers: the scale above all, and
    the architecture. {} changes nothing. ValueError if it is another latent space than the preset's."""
    kind = stated.get("_class_name")
    if kind is None:
        return cfg
    if kind != ("AutoencoderKL" if isinstance(cfg, KLConfig) else "AutoencoderDC"):
        raise ValueError(f"its config.json says {kind}, and {cfg.name} is none")
    settings = KL_SETTINGS if kind == "AutoencoderKL" else DCAE_SETTINGS
    new = {ours: as_tuple(stated[name]) for ours, name in settings.items() if stated.get(name) is not None}
    if kind == "AutoencoderDC":
        new |= stated_dcae_stages(stated)
    return same_latent(cfg, replace(cfg, **new))


def same_latent(cfg, found):
    """`found`; ValueError if it is of another latent space than the preset's."""
    if (found.f, found.channels) != (cfg.f, cfg.channels):
        raise ValueError(f"this is an autoencoder of f{found.f}c{found.channels}, and {cfg.name} is "
                         f"f{cfg.f}c{cfg.channels}")
    return found


def stated_dcae_stages(stated: dict) -> dict:
    """Our settings of a DC-AE that diffusers states stage by stage."""
    new = {}
    for half in ("encoder", "decoder"):
        types = stated.get(f"{half}_block_types", "ResBlock")        # one name for all stages, or one each
        stages = [types] if isinstance(types, str) else list(types)
        stages = [*stages, *["ResBlock"] * (99 - len(stages)), "EfficientViTBlock"]      # 99: none of them
        new[f"{half}_attention_from"] = stages.index("EfficientViTBlock")
    return new | dict(
        multiscale=any(len(scales) > 0 for scales in stated.get("encoder_qkv_multiscales", ())),
        strided=stated.get("downsample_block_type") == "Conv",
        interpolate=stated.get("upsample_block_type") == "interpolate",
        decoder_batch_norm="batch_norm" in stated.get("decoder_norm_types", ""))


def ae_folder(base: str, weights: str | None) -> Path | None:
    """The pipeline folder that a preset comes from, or None: its autoencoder lies there, with its scale."""
    spec = BASES[base].weights if base in BASES else None
    if weights and spec:
        return Path(weights) if (Path(weights) / "vae").is_dir() else None
    if spec and spec.endswith(("/", "::")):
        return find_weights(f"{base}'s autoencoder", spec, None, ("vae",), "--base-ae-weights")
    return None


# ---- bases and runs -------------------------------------------------------------------------------
# The file of a run holds what was trained, and in its metadata the configuration of the model and where it
# comes from: base, base_weights, base_print, kind, model, lora, classes, ...

def load_base(
    name: str, weights: str | None = None, device="cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[Backbone, dict]:
    """A preset, or a finished run with its LoRA merged -> model in eval mode, and what the file of a run
    that starts from it has to hold. ValueError lists the names."""
    cfg, _ = read_base_config(name)
    kept = {}
    if name in BASES:
        model = build(cfg, find_weights(name, cfg.weights, weights), dtype)
    else:
        model, info = load_run(name, base_weights=weights)
        merge_lora(model)
        kept = {key: info[key] for key in ("classes", "images", "ae_weights") if key in info}
        weights = None
    info = {**kept, "base": name, "base_weights": weights, "base_print": fingerprint(model)}
    return model.to(device=device, dtype=dtype).eval(), info


def read_base_config(name: str, ema: bool = True) -> tuple:
    """Configuration and info of a preset or a run, without its weights. ValueError lists the presets."""
    if name in BASES:
        return BASES[name], {}
    if not Path(name).exists():
        raise ValueError(f"--base {name}: not a preset ({', '.join(BASES)}) and not the folder of a run")
    return read_run_config(run_file(name, ema))


def load_run(
    path, device="cpu", ema: bool = True, base_weights: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Backbone, dict]:
    """The folder or file of a run -> model in eval mode (LoRA attached), the info in its file. A run keeps
    what it trained; the rest comes from its base, which is loaded first unless everything was trained
    (base_weights: where its file is now). ValueError if this is not a run, or its base is another one than
    it was trained from."""
    file = run_file(path, ema)
    cfg, info = read_run_config(file)
    if info.get("quantised"):
        raise ValueError(f"{file} is a quantised model: sample.py draws with it (python sample.py {path}); "
                         f"for all else give what it was made from, {info.get('base')}")
    tensors = read_tensors(file)
    # without a LoRA, blocks in the file are all of them
    trained_all = not info.get("lora") and any("blocks." in key for key in tensors)
    if trained_all:
        model = build(cfg, file)
    else:
        base = load_base_of_run(file, info, base_weights)
        try:
            model = to_deep_model(base, cfg)
            if info.get("lora"):
                add_lora(model, **checked_lora(info["lora"], tensors))
            load_part(model, tensors)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
    return model.requires_grad_(False).to(device, dtype).eval(), info | {"file": str(file)}


def load_base_of_run(file: Path, info: dict, weights: str | None) -> Backbone:
    """The base that a run was trained from. ValueError if it is not here, or another one now."""
    name = str(info.get("base"))
    if name not in BASES and not Path(name).exists():
        raise ValueError(f"{file} was trained from {name!r}, which is neither a preset ({', '.join(BASES)}) "
                         "nor the folder of a run seen from here")
    # in the file's own numbers, of which base_print is
    base, now = load_base(name, weights or info.get("base_weights"), dtype=None)
    if info.get("base_print", now["base_print"]) != now["base_print"]:
        raise ValueError(f"{file} was trained from another {name} than the one found now; give that one's "
                         "file with --weights")
    return base


def checked_lora(settings: dict, tensors: dict[str, Tensor]) -> dict:
    """The settings of a LoRA. ValueError if they are not those of the tensors in the file."""
    ranks = {len(value) for key, value in tensors.items() if key.endswith(".A")}
    if not isinstance(settings, dict) or ranks != {settings.get("rank")}:
        raise ValueError(f"its LoRA's tensors are of rank {sorted(ranks)}, its settings are {settings}")
    return {key: settings[key] for key in ("rank", "alpha", "targets") if key in settings}


def load_part(model: nn.Module, tensors: dict[str, Tensor]):
    """Put tensors in the place of a model's own of the same names, in the file's precision: a base in bf16
    must not round what was trained in float32. What the file leaves out stays, as its base has it.
    ValueError for a name or a shape that the model does not have, and for a missing embedder, head or LoRA:
    no base has those."""
    own = model.state_dict()
    wrong = [key for key, value in tensors.items() if key not in own or own[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors that this model does not have in that shape: "
                         f"{first_of(wrong, 3)}")
    new = [key for key in own if key.startswith((model.EMBEDDER, model.HEAD))]
    missing = [key for key in [*new, *lora_state(model)] if key not in tensors]
    if missing:
        raise ValueError(f"{len(missing)} tensors missing that no base has: {first_of(missing, 3)}")
    model.load_state_dict(own | tensors, assign=True)


def run_file(path, ema: bool = True) -> Path:
    """The weight file of a run that is named by its folder or by a file in it: weights as given, otherwise
    the moving average if there is one and `ema`. ValueError if there are none."""
    path = Path(path)
    # its settings, its log and its states name a run too
    if path.name in ("config.json", "metrics.jsonl") or path.name.endswith(".state.safetensors"):
        path = path.parent
    if not path.is_dir():
        return path
    average = path / "ema.safetensors"
    raw = path / "model.safetensors"
    if not raw.is_file():
        raise ValueError(f"{path} holds no finished run (no {raw.name}){unfinished_hint(path)}")
    return average if ema and average.is_file() else raw


def unfinished_hint(folder: Path) -> str:
    """How an unfinished run goes on; empty if this is none."""
    try:
        script = json.loads((folder / "config.json").read_text())["script"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"; an unfinished one goes on with: python {script}.py --resume --out {folder}"


def read_run_config(file: Path) -> tuple:
    """Configuration and info in the file of a run. ValueError if it is not a run's, or too old."""
    if not file.is_file():
        raise ValueError(f"{file}: no such run or weight file")
    info = read_config(file)
    if not isinstance(info.get("model"), dict):
        raise ValueError(f"{file} is not a run's file; an official weight file goes to --weights, with "
                         "--base naming its model")
    try:
        return config_from_dict(info["model"]), info
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def newest_run(root="runs", kinds=("align", "finetune")) -> Path | None:
    """The folder of the newest finished run of these kinds, or None. A kind is align, finetune, noalign or
    scratch, or one of one base: align-tiny. The info in the files decides, not the names of the folders:
    dit-xl is not dit-xl-512."""
    fitting = []
    for file in Path(root).glob("*/model.safetensors"):
        info = read_config(file)
        kind = info.get("kind", "")
        base = Path(info.get("base", "")).name
        if kind in kinds or f"{kind}-{base}" in kinds:
            fitting.append(file)
    fitting.sort(key=lambda file: file.stat().st_mtime)
    return fitting[-1].parent if fitting else None


# ---- export to diffusers --------------------------------------------------------------------------
# What DiffusionPipeline.from_pretrained reads: transformer/, vae/, scheduler/ and text encoders, named in
# model_index.json. README.md beside them has lines that draw.

PIPELINES = {DiTConfig: "DiTPipeline", FluxConfig: "FluxPipeline", SanaConfig: "SanaPipeline"}
# what a pipeline holds besides: text encoders and their tokenizers
TEXT_PARTS = {
    DiTConfig: (),
    FluxConfig: ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    SanaConfig: ("text_encoder", "tokenizer"),
}


def exportable(cfg) -> str | None:
    """Why the diffusers library cannot compute this model; None if it can."""
    if getattr(cfg, "theta", 10000.0) != 10000.0:
        return f"its positions turn by theta = {cfg.theta:g}, and those of diffusers by 10000"
    if cfg.predict == "epsilon" and cfg.clock == "flow":
        return "it predicts epsilon on the flow clock, and no scheduler of diffusers draws with that"
    if isinstance(cfg, FluxConfig) and cfg.patch_size > 2:
        return f"its tokens hold {cfg.patch_size} x {cfg.patch_size} cells, those of diffusers 1 or 2 x 2"
    return None


def check_exportable(cfg, folder):
    """ValueError if the model cannot be exported, or not into this folder: it has to be new, or empty. Reads
    no weights and writes nothing."""
    reason = exportable(cfg)
    if reason:
        raise ValueError(f"--export: diffusers cannot draw with this model: {reason}")
    check_writable(folder, "--export")
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ValueError(f"--export {folder}: it is not empty; name another folder, or remove it")


def export(model: Backbone, ae: Autoencoder, folder, text_encoders=None):
    """Write the folder of a diffusers pipeline, a LoRA merged and also by itself. text_encoders: a pipeline
    folder whose text encoders and tokenizers are copied in; without it they have to be given to
    `from_pretrained`. ValueError as check_exportable; of a failed export nothing is left."""
    folder = Path(folder)
    check_exportable(model.cfg, folder)
    try:
        if lora_layers(model):
            save_peft(model, folder / "lora")
        export_diffusers(merge_lora(model), folder)
        export_autoencoder(ae, folder, stated_for_pipeline(model.cfg, ae.cfg))
        export_pipeline(model.cfg, ae.cfg, folder, text_encoders)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    parts = [f"{part.name}/" for part in sorted(folder.iterdir()) if part.is_dir()]
    print(f"wrote {', '.join(parts)} in {folder}; README.md there has the lines that draw")


def export_pipeline(cfg, ae_cfg, folder: Path, text_encoders=None):
    """Write what makes a pipeline of <folder>/transformer and <folder>/vae."""
    scheduler = scheduler_config(cfg)
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    index = dict(
        _class_name=PIPELINES[type(cfg)],
        transformer=["diffusers", diffusers_config(cfg)["_class_name"]],
        vae=["diffusers", diffusers_ae_config(ae_cfg)["_class_name"]],
        scheduler=["diffusers", scheduler["_class_name"]])
    for part in TEXT_PARTS[type(cfg)]:
        index[part] = [None, None]
        if text_encoders:
            with disk_errors(folder / part):
                shutil.copytree(Path(text_encoders) / part, folder / part)
            index[part] = ["transformers", class_in_folder(folder / part)]
    write_json(folder / "model_index.json", index)
    with atomic(folder / "README.md") as tmp:
        tmp.write_text(export_readme(cfg, ae_cfg, folder, bool(text_encoders)))


def class_in_folder(part: Path) -> str:
    """The class in transformers of a text encoder or a tokenizer, as its folder states it."""
    stated = {}
    for name in ("tokenizer_config.json", "config.json"):
        if (part / name).is_file():
            stated |= json.loads((part / name).read_text())
    return stated["architectures"][0] if "architectures" in stated else stated["tokenizer_class"]


def stated_for_pipeline(cfg, ae_cfg) -> dict:
    """What a pipeline reads in the config.json of an autoencoder that is not of its usual kind: a list whose
    length tells it the pixels a side of a latent cell. FluxPipeline takes tokens for 2 x 2 cells, so that
    half of a cell of one token counts there."""
    if isinstance(cfg, FluxConfig) and cfg.patch_size == 1:
        return {"block_out_channels": ae_cfg.widths[1:]}
    if isinstance(cfg, SanaConfig) and isinstance(ae_cfg, KLConfig):
        return {"encoder_block_out_channels": ae_cfg.widths}
    return {}


def latent_side(cfg) -> int:
    """Latent cells a side, at the model's own size."""
    # pixels a latent cell, by the name of the autoencoder
    return cfg.res // int(re.search(r"f(\d+)c\d+", cfg.ae)[1])


def scheduler_config(cfg) -> dict:
    """The scheduler_config.json with which the diffusers library draws as we do."""
    sampling = cfg.sampling
    if cfg.predict == "epsilon":
        return dict(
            _class_name="DDIMScheduler",
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
            prediction_type="epsilon", clip_sample=False)
    # the pipeline of FLUX follows the rule itself, whatever the size
    if isinstance(cfg, FluxConfig) and sampling.shift == "mu":
        return dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    side = latent_side(cfg)
    shift = resolve_shift(sampling.shift, cfg.in_channels, side, side, cfg.patch_size)
    # it reads our times cut to whole steps of 1000
    if isinstance(cfg, SanaConfig) and sampling.sampler == "dpm":
        return dict(
            _class_name="DPMSolverMultistepScheduler",
            use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    # our clock, and DiT's, runs from noise at 0 to data at 1
    inverted = isinstance(cfg, DiTConfig)
    return dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=shift, invert_sigmas=inverted)


def export_diffusers(model: Backbone, folder, shard_bytes: int = 5 * 10**9):
    """Write <folder>/transformer, which the diffusers library loads by itself: its FluxTransformer2DModel,
    SanaTransformer2DModel or DiTTransformer2DModel. They compute the same network; what is in no file is
    left to them, and README's example sets it: a FLUX is fed packed tokens and their places; diffusers' DiT
    has other timestep frequencies than its weights were trained with (the exponent over 127, not 128), and
    counts positions by ones; SANA is clamped in fp16 only. ValueError if a LoRA is not merged yet, or if the
    folder is taken."""
    cfg = model.cfg
    if lora_layers(model):
        raise ValueError("this model carries a LoRA; merge it before the export (lora.merge_lora), or save "
                         "it beside (checkpoints.save_peft)")
    write_folder(Path(folder) / "transformer", diffusers_state(model), diffusers_config(cfg), shard_bytes)


def diffusers_state(model: Backbone) -> dict[str, Tensor]:
    """The model's tensors under the names of the diffusers library's class for it."""
    theirs = unmap_keys(model.state_dict(), TABLES[type(model)]["diffusers"])
    if isinstance(model.cfg, DiTConfig):
        # every block repeats the embedders of block 0
        embedders = [key for key in theirs if key.startswith("transformer_blocks.0.norm1.emb.")]
        for i in range(1, model.cfg.depth):
            theirs |= {key.replace("blocks.0", f"blocks.{i}"): theirs[key] for key in embedders}
    return theirs


def export_autoencoder(ae: Autoencoder, folder, stated: dict | None = None):
    """Write <folder>/vae, which the diffusers library loads by itself as AutoencoderKL or AutoencoderDC.
    stated: more for its config.json."""
    table = KL_DIFFUSERS if isinstance(ae.cfg, KLConfig) else DCAE_DIFFUSERS
    config = diffusers_ae_config(ae.cfg) | (stated or {})
    write_folder(Path(folder) / "vae", unmap_keys(ae.state_dict(), table), config)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, shard_bytes: int = 5 * 10**9):
    """Write a model's folder as diffusers has it: config.json and the tensors, in one file or in shards of
    at most so many bytes with their index. One shard at a time is in memory. ValueError if there is a model
    already."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already; name another folder, or remove it")
    # keys by shard, filled in order
    shards = [[]]
    room = shard_bytes
    for key, value in tensors.items():
        if value.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= value.nbytes

    name = "diffusion_pytorch_model{}.safetensors"
    weight_map = {}
    for i, keys in enumerate(shards, start=1):
        file = name.format(f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else "")
        write_tensors(folder / file, {key: tensors[key] for key in keys})
        weight_map |= dict.fromkeys(keys, file)
    if len(shards) > 1:
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / (name.format("") + ".index.json"), index)
    # the last file: a folder that has it is complete
    write_json(folder / "config.json", config)


def diffusers_config(cfg) -> dict:
    """The config.json with which the diffusers library builds this model."""
    head_dim = cfg.hidden_size // cfg.num_heads
    if isinstance(cfg, FluxConfig):
        return dict(
            _class_name="FluxTransformer2DModel",
            patch_size=1,                                            # diffusers packs outside of the model
            in_channels=cfg.token_channels,
            out_channels=None,
            num_layers=cfg.depth,
            num_single_layers=cfg.depth_single,
            num_attention_heads=cfg.num_heads,
            attention_head_dim=head_dim,
            joint_attention_dim=cfg.context_in_dim,
            pooled_projection_dim=cfg.vec_in_dim,
            guidance_embeds=cfg.guidance_embed,
            axes_dims_rope=list(cfg.axes_dim))
    shared = dict(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        patch_size=cfg.patch_size,
        num_layers=cfg.depth,
        sample_size=latent_side(cfg),
        norm_elementwise_affine=False,
        norm_eps=1e-6)
    if isinstance(cfg, DiTConfig):
        return shared | dict(
            _class_name="DiTTransformer2DModel",
            num_attention_heads=cfg.num_heads,
            attention_head_dim=head_dim,
            num_embeds_ada_norm=cfg.num_classes,
            norm_type="ada_norm_zero",
            activation_fn="gelu-approximate",
            attention_bias=True)
    return shared | dict(
        _class_name="SanaTransformer2DModel",
        num_attention_heads=cfg.hidden_size // 32,                   # of linear attention
        attention_head_dim=32,
        num_cross_attention_heads=cfg.num_heads,
        cross_attention_head_dim=head_dim,
        cross_attention_dim=cfg.hidden_size,
        caption_channels=cfg.caption_channels,
        mlp_ratio=cfg.mlp_ratio,
        attention_bias=False,
        interpolation_scale=None,
        qk_norm="rms_norm_across_heads")


def diffusers_ae_config(cfg) -> dict:
    """The config.json with which the diffusers library builds this autoencoder."""
    stages = len(cfg.widths)
    if isinstance(cfg, KLConfig):
        stated = {name: getattr(cfg, ours) for ours, name in KL_SETTINGS.items()}
        return stated | dict(
            _class_name="AutoencoderKL",
            use_post_quant_conv=cfg.quant_conv,
            down_block_types=["DownEncoderBlock2D"] * stages,
            up_block_types=["UpDecoderBlock2D"] * stages)
    stated = {name: getattr(cfg, ours) for ours, name in DCAE_SETTINGS.items()}
    for half, first in (("encoder", cfg.encoder_attention_from), ("decoder", cfg.decoder_attention_from)):
        types = ["EfficientViTBlock" if i >= first else "ResBlock" for i in range(stages)]
        multiscales = [[5] if i >= first and cfg.multiscale else [] for i in range(stages)]
        stated |= {f"{half}_block_types": types, f"{half}_qkv_multiscales": multiscales}
    batch_norm = [cfg.decoder_batch_norm and i < cfg.decoder_attention_from for i in range(stages)]
    return stated | dict(
        _class_name="AutoencoderDC",
        attention_head_dim=32,
        scaling_factor=cfg.scale or 1.0,
        decoder_block_out_channels=cfg.widths,
        decoder_norm_types=["batch_norm" if b else "rms_norm" for b in batch_norm],
        decoder_act_fns=["relu" if b else "silu" for b in batch_norm],
        decoder_in_shortcut=cfg.latent_shortcut,
        downsample_block_type="Conv" if cfg.strided else "pixel_unshuffle",
        upsample_block_type="interpolate" if cfg.interpolate else "pixel_shuffle")


# ---- the example of an export ---------------------------------------------------------------------
# README.md of an exported folder: lines that draw with diffusers as this code does, put together from these.

README = """\
# {family} on {ae}, a pipeline of diffusers

```python
{example}```
{note}"""
LOAD = """\
import torch
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained("{folder}"{absent})
"""
DECODE = """\
with torch.inference_mode():
    pictures = pipe.vae.decode(z / pipe.vae.config.scaling_factor{shift}).sample
VaeImageProcessor().postprocess(pictures)[0].save("picture.png")
"""

# the pipelines of text models stop at the latent: FluxPipeline would unpack 2 x 2 cells a token for the
# autoencoder, and SanaPipeline knows no shift
TEXT = """\
z = pipe(
    {prompt},
    {settings},
    height={res}, width={res}, output_type="latent").images
"""
FLUX_POSITIONS = """\
ids = pipe._prepare_latent_image_ids       # tokens lie {step:g} positions apart
first = torch.tensor([0, {first:g}, {first:g}])
pipe._prepare_latent_image_ids = lambda *size: {step:g} * ids(*size) + first.to(size[3])
"""
FLUX_UNPACK = {
    1: "z = z.mT.unflatten(2, ({side}, {side}))       # a token is a latent cell\n",
    2: "z = pipe._unpack_latents(z, {res}, {res}, pipe.vae_scale_factor)\n",
}

DIT_FREQUENCIES = """\
for block in pipe.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0       # the clock's frequencies as in training
"""
DIT_POSITIONS = """\
places = {step:g} * torch.arange({places}) + {first:g}       # tokens lie {step:g} positions apart
places = torch.stack(torch.meshgrid(places, places, indexing="xy"))
table = get_2d_sincos_pos_embed_from_grid({width}, places, output_type="pt")
pipe.transformer.pos_embed.pos_embed.copy_(table)
"""
# a trunk with DDPM's clock reads the step of that chain which has the same signal-to-noise ratio
DDPM_TIMES = """\
kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
times = kept**0.5 / (kept**0.5 + (1 - kept) ** 0.5)       # of DDPM's steps; 0 = noise, 1 = data
"""
DIT_START = """\
here = pipe.device
labels = torch.tensor([0, 1, 2, 3] + 4 * [{null}], device=here)       # four classes, and no class for each
z = torch.randn(4, {channels}, {side}, {side}, device=here)
pipe.scheduler.set_timesteps(sigmas=[1 - i / {steps} for i in range({steps})], device=here)
for time in pipe.scheduler.timesteps:
"""
DIT_CLOCK = {
    "flow": "    x, step = z, time\n",
    "ddpm": """\
    t = time.item() / 1000
    x = z / (t**2 + (1 - t) ** 2) ** 0.5
    step = torch.tensor(np.interp(t, times[::-1], np.arange(999.0, -1, -1)), device=here)
""",
}
DIT_STEP = """\
    with torch.inference_mode():
        v = pipe.transformer(torch.cat([x, x]), step.expand(8), labels).sample
    v, without = v.chunk(2)
    z = pipe.scheduler.step(without + {scale:g} * (v - without), time, z).prev_sample
"""
DIT_CHAIN = """\
pipe([207], guidance_scale={scale:g}, num_inference_steps=50).images[0].save("picture.png")
"""

# the notes below the lines
DIT_NOTE = """
Draw by this loop: the call of DiTPipeline itself is made for DDPM's epsilons, and fails with velocities. The
lines above it mend what diffusers computes in another way than this model was trained.
"""
SHIFT_NOTE = """
The shift in scheduler/ is that of {res} x {res} pixels; another size has another one.
"""
TEXT_NOTE = """
The text encoders are not in this folder: give those of {source} to `from_pretrained`, as {parts}.
"""
GPU_NOTE = """
On a GPU: `torch_dtype=torch.bfloat16` in `from_pretrained`, and `pipe.to("cuda")`.
"""


def export_readme(cfg, ae_cfg, folder: Path, has_text: bool) -> str:
    """README.md of an export. has_text: the text encoders are in the folder."""
    side = latent_side(cfg)
    step = getattr(cfg, "pos_step", 1.0)
    slots = dict(
        family=type(cfg).__name__.removesuffix("Config"), ae=cfg.ae, folder=folder.as_posix(), absent="",
        res=cfg.res, side=side, places=side // cfg.patch_size, channels=cfg.in_channels,
        width=cfg.hidden_size, step=step, first=(step - 1) / 2, steps=cfg.sampling.num_steps,
        scale=cfg.sampling.cfg_scale, shift=" + pipe.vae.config.shift_factor" if ae_cfg.shift else "")
    imports = ["from diffusers.image_processor import VaeImageProcessor"]
    if isinstance(cfg, DiTConfig):
        slots["null"] = cfg.num_classes
        pieces, notes = dit_pieces(cfg, imports)
    else:
        slots |= text_slots(cfg, imports)
        pieces, notes = text_pieces(cfg, has_text)
    slots["imports"] = "".join(line + "\n" for line in imports)
    slots["example"] = "".join([LOAD, *pieces]).format(**slots)
    slots["note"] = "".join(notes).format(**slots)
    return README.format(**slots)


def dit_pieces(cfg, imports: list[str]) -> tuple[list[str], list[str]]:
    """The pieces of a DiT's example after LOAD, and its notes; what they need is added to the imports."""
    if cfg.predict == "epsilon":
        imports.clear()
        return [DIT_FREQUENCIES, DIT_CHAIN], []
    pieces = [DIT_FREQUENCIES, DIT_START, DIT_CLOCK[cfg.clock], DIT_STEP, DECODE]
    if cfg.clock == "ddpm":
        imports.append("import numpy as np")
        pieces.insert(1, DDPM_TIMES)
    if cfg.pos_step != 1:
        imports.append("from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid")
        pieces.insert(1, DIT_POSITIONS)
    return pieces, [DIT_NOTE]


def text_pieces(cfg, has_text: bool) -> tuple[list[str], list[str]]:
    """The pieces of a text model's example after LOAD, and its notes."""
    pieces = [TEXT, DECODE]
    notes = []
    if isinstance(cfg, FluxConfig):
        pieces = [FLUX_POSITIONS if cfg.pos_step != 1 else "", TEXT, FLUX_UNPACK[cfg.patch_size], DECODE]
    if cfg.sampling.shift == "flux2":
        notes.append(SHIFT_NOTE)
    if cfg.text_encoder != "words":
        notes += [GPU_NOTE] if has_text else [TEXT_NOTE, GPU_NOTE]
    return pieces, notes


def text_slots(cfg, imports: list[str]) -> dict:
    """What fills the slots of a text model's pieces; what the prompt needs is added to the imports."""
    sampling = cfg.sampling
    n = sampling.num_steps
    parts = TEXT_PARTS[type(cfg)]
    slots = dict(prompt='"a lighthouse at dusk"', parts=", ".join(parts))
    if cfg.text_encoder == "words":
        imports += ["from shapes import encode_words       # run this in dcgen's folder",
                    "", f'text = encode_words(["a small red ring on blue"], {cfg.text_tokens})']
        slots["absent"] = "".join(f",\n    {part}=None" for part in parts)
        slots["prompt"] = "prompt_embeds=text.tokens, pooled_prompt_embeds=text.pooled"
        # the empty prompt takes the mask of the prompt beside it, as in training
        if isinstance(cfg, SanaConfig):
            imports.append(f'null = encode_words([""], {cfg.text_tokens})')
            slots["prompt"] = (
                "prompt_embeds=text.tokens, prompt_attention_mask=text.mask, negative_prompt=None,\n"
                "    negative_prompt_embeds=null.tokens, negative_prompt_attention_mask=text.mask")
    else:
        slots["source"] = cfg.text_weights.replace("::", "/").rstrip("/")
    settings = f"guidance_scale={sampling.guidance}, num_inference_steps={n}"
    if isinstance(cfg, SanaConfig):
        # Euler's own grid in diffusers spends a step on the last thousandth of the way
        euler = f"sigmas=[1 - i / {n} for i in range({n})]"
        steps = f"num_inference_steps={n}" if sampling.sampler == "dpm" else euler
        settings = f"guidance_scale={sampling.cfg_scale}, {steps}, use_resolution_binning=False"
    slots["settings"] = f"{settings}, max_sequence_length={cfg.text_tokens}"
    return slots


# ---- LoRA in the files of diffusers and PEFT ------------------------------------------------------
# transformer.<module>.lora_A.weight (rank,in) and lora_B (out,rank), under diffusers' names, where q, k and
# v have a LoRA each. alpha is in <module>.alpha or in the file's metadata; where it is missing it is the
# rank.

PEFT_FILE = "pytorch_lora_weights.safetensors"
PARTS_FILE = "embedder_and_head.safetensors"


def save_peft(model: Backbone, folder):
    """Write the LoRA as diffusers' loaders read it, and beside it, under diffusers' names too, the embedder
    and the head, without which it means nothing. ValueError if there is no LoRA."""
    tensors, alphas = lora_to_peft(model)
    if not tensors:
        raise ValueError("this model carries no LoRA to save")
    file = {f"transformer.{key}": value for key, value in tensors.items()}
    metadata = {}
    # FLUX's loader reads alphas as tensors, the others in the metadata; none takes both
    if isinstance(model, Flux):
        file |= {f"transformer.{module}.alpha": torch.tensor(alpha) for module, alpha in alphas.items()}
    else:
        ranks = {module: len(tensors[f"{module}.lora_A.weight"]) for module in alphas}
        first = next(iter(alphas))
        settings = {
            "transformer.r": ranks[first],
            "transformer.lora_alpha": alphas[first],
            "transformer.target_modules": sorted(alphas),
            "transformer.rank_pattern": ranks,
            "transformer.alpha_pattern": alphas,
        }
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    write_tensors(Path(folder) / PEFT_FILE, file, metadata=metadata)
    parts = unmap_keys(latent_tensors(model), TABLES[type(model)]["diffusers"])
    write_tensors(Path(folder) / PARTS_FILE, parts)


def latent_tensors(model: Backbone) -> dict[str, Tensor]:
    """The model's own tensors of the embedder and the head, without a LoRA of theirs."""
    tensors = {}
    for name in (model.EMBEDDER, model.HEAD):
        layer = model.get_submodule(name)
        layer = layer.base if isinstance(layer, LoRALinear) else layer
        tensors |= {f"{name}.weight": layer.weight.data, f"{name}.bias": layer.bias.data}
    return tensors


def load_peft(model: Backbone, path) -> list[str]:
    """Put the LoRA of a file, or of a folder that save_peft wrote (with its embedder and head), onto the
    model. Returns what was left out, see lora_from_peft. ValueError if the file does not fit."""
    path = Path(path)
    file = path / PEFT_FILE if path.is_dir() else path
    tensors = read_tensors(file)
    # new values of the embedder and head, checked before the model is changed
    new = []
    try:
        if path.is_dir() and (path / PARTS_FILE).exists():
            theirs = read_tensors(path / PARTS_FILE)
            for key, ours in latent_tensors(model).items():
                (name,), transform = source_keys(key, TABLES[type(model)]["diffusers"])
                if name not in theirs or theirs[name].shape != ours.shape:
                    shape = tuple(ours.shape)
                    raise ValueError(f"{PARTS_FILE} has no {name} of shape {shape}: it is of another model")
                new.append((ours, transform.load(theirs[name])))
        left_out = lora_from_peft(model, tensors, peft_alphas(file, tensors))
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    for ours, value in new:
        ours.copy_(value)
    return left_out


def peft_alphas(file: Path, tensors: dict[str, Tensor]) -> dict[str, float]:
    """alpha by module, from the metadata of a file; {} if it states none."""
    if file.suffix != ".safetensors":
        return {}
    stated = json.loads(read_metadata(file).get("lora_adapter_metadata", "{}"))
    stated = {key.removeprefix("transformer."): value for key, value in stated.items()}
    if "lora_alpha" not in stated:
        return {}
    modules = {re.sub(r"^transformer\.|\.lora_[AB]\.weight$", "", key) for key in tensors if ".lora_" in key}
    return {module: stated.get("alpha_pattern", {}).get(module, stated["lora_alpha"]) for module in modules}


def lora_to_peft(model: Backbone) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The model's LoRA -> {"<module>.lora_A.weight", "<module>.lora_B.weight"} and {module: alpha}, under
    diffusers' names. A fused matrix gives each of its parts the rows of B that are its own, and of A only
    what those rows use."""
    tensors = {}
    alphas = {}
    for name, lora in lora_layers(model).items():
        parts = unmap_keys({f"{name}.weight": lora.B.detach()}, TABLES[type(model)]["diffusers"])
        for key, B in parts.items():
            # a part of a matrix that was fused from several LoRAs uses its own rows of A only
            used = B.ne(0).any(dim=0)
            if not used.any():
                used[:] = True                                       # B is zero, as it starts
            A = lora.A.detach()[used]
            B = B[:, used]
            if lora.base.weight.ndim == 4:                           # a 1x1 convolution's have two more axes
                A = conv_weight(A)
                B = conv_weight(B)
            module = key.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = A
            tensors[f"{module}.lora_B.weight"] = B
            alphas[module] = lora.scale * len(A)
    return tensors, alphas


def lora_from_peft(
    model: Backbone, tensors: dict[str, Tensor], alphas: dict[str, float] | None = None
) -> list[str]:
    """Put a LoRA under diffusers' names onto the model, exactly. Returns what was left out: a LoRA of an
    embedder or head that is bound to another latent space. ValueError for anything else that does not fit,
    and then the model is as before."""
    if lora_layers(model):
        raise ValueError("this model carries a LoRA already; merge it first")
    theirs = read_peft_names(tensors, alphas or {})
    table = TABLES[type(model)]["diffusers"]
    # all are made before the first is set: if one is refused, the model stays as it was
    layers = {}
    used = set()
    left_out = []
    for name, layer in model.named_modules():
        found = source_keys(f"{name}.weight", table) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if found is None:
            continue
        modules = [key.removesuffix(".weight") for key in found[0]]
        here = [module for module in modules if module in theirs]
        used.update(here)
        if not here:
            continue
        fused = fuse_lora(layer, [theirs.get(module) for module in modules], found[1])
        if fused is not None:
            layers[name] = fused
        elif name in (model.EMBEDDER, model.HEAD):
            left_out += here
        else:
            shape = tuple(layer.weight.shape)
            raise ValueError(f"the LoRA of {', '.join(here)} does not fit {name} {shape}: it is of another "
                             "model")
    unknown = [module for module in theirs if module not in used]
    if unknown:
        raise ValueError(f"{len(unknown)} modules of this LoRA are not in a {type(model).__name__}: "
                         f"{first_of(unknown, 3)}")
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return left_out


def read_peft_names(tensors: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, dict]:
    """The tensors of a LoRA by module: {module: {"A", "B", "scale"}}, scale = alpha / rank."""
    alphas = dict(alphas)
    modules = {}
    prefix = r"(?:transformer\.|base_model\.model\.)?"
    for key, value in tensors.items():
        match = re.fullmatch(prefix + r"(.+?)\.(lora_[AB]|alpha)(?:\.default)?(?:\.weight)?", key)
        if not match:
            raise ValueError(f"{key} is not a LoRA's tensor; "
                             "expected names like transformer.<module>.lora_A.weight")
        module, kind = match.groups()
        if kind == "alpha":
            alphas[module] = float(value)
        else:
            modules.setdefault(module, {})[kind[-1]] = value.float().flatten(1)
    for module, part in modules.items():
        if "A" in part:
            rank = len(part["A"])
            part["scale"] = alphas.get(module, rank) / rank
    return modules


def fuse_lora(layer: nn.Module, parts: list[dict | None], transform: KeyTransform) -> LoRALinear | None:
    """One LoRALinear of the LoRAs of the parts of a fused matrix (None: a part without one): their A one
    above the other, their B on the diagonal. None if a shape does not fit."""
    size_in = layer.weight.flatten(1).shape[1]
    scale = next((part["scale"] for part in parts if part and "scale" in part), None)
    As = []
    Bs = []
    for part, rows in zip(parts, transform.split(layer.weight, len(parts))):
        if part is None:
            A = torch.zeros(0, size_in)
            B = torch.zeros(len(rows), 0)
        elif {"A", "B"} - part.keys():
            return None
        else:
            A = part["A"]
            # one scale for all: B takes up the difference
            B = part["B"] * (part["scale"] / scale)
        if A.shape[1] != size_in or B.shape != (len(rows), len(A)):
            return None
        As.append(A)
        Bs.append(B)
    rank = sum(len(A) for A in As)
    lora = LoRALinear(layer, rank, scale * rank)
    lora.A.data = torch.cat(As).to(layer.weight.device)
    lora.B.data = transform.load(torch.block_diag(*Bs)).to(layer.weight.device)
    return lora
