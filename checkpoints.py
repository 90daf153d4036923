"""Other people's names and files: key tables, safe reading, models and runs from files and to files, PEFT in and out."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import (BASES, Backbone, DiT, DiTConfig, FAMILIES, Flux, FluxConfig, Sampling, Sana, SanaConfig, to_deep_model)
from lora import LoRALinear, add_lora, lora_state, merge_lora
from autoencoder import Autoencoder, KLConfig, ae_config, build_autoencoder


HERE = Path(__file__).resolve().parent


# ---- weights: a layout is a table ------------------------------------------------------------------------------------
# A row is (theirs, ours[, turn]). `{}` stands for a number, `*` for any text, both the same and in order on the two
# sides; several names on their side are concatenated along the first axis; ours = None names what is left out, and why.
# Rows are tried from the top. Read from left to right a table loads a file, from right to left it writes one.

class KeyTransform(NamedTuple):
    """What changes besides the name: load makes our tensor of theirs, save theirs of ours; shares are the relative
    lengths of several names' parts (None: all alike)."""
    load: Callable[[Tensor], Tensor] = lambda x: x
    save: Callable[[Tensor], Tensor] = lambda x: x
    shares: tuple[int, ...] | None = None

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """The parts of what was concatenated of several."""
        shares = self.shares or (1,) * parts
        return x.split([len(x) * share // sum(shares) for share in shares]) if parts > 1 else (x,)


def _swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


SAME, SWAP = KeyTransform(), KeyTransform(_swap_halves, _swap_halves)                # diffusers' final modulation is (scale, shift)


OURS = [("*", "*")]


DIT_TABLES = {
    "ours": OURS,
    "original": [
        ("pos_embed", None),                                         # computed from the grid at hand
        ("*", "*"),
    ],
    "diffusers": [
        ("pos_embed.proj.*", "x_embedder.proj.*"),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.*", "y_embedder.embedding_table.*"),
        ("transformer_blocks.{}.norm1.emb.*", None),                 # every block repeats block 0's embedders
        ("transformer_blocks.{}.norm1.linear.*", "blocks.{}.adaLN_modulation.1.*"),
        (("transformer_blocks.{}.attn1.to_q.*", "transformer_blocks.{}.attn1.to_k.*", "transformer_blocks.{}.attn1.to_v.*"), "blocks.{}.attn.qkv.*"),
        ("transformer_blocks.{}.attn1.to_out.0.*", "blocks.{}.attn.proj.*"),
        ("transformer_blocks.{}.ff.net.0.proj.*", "blocks.{}.mlp.fc1.*"),
        ("transformer_blocks.{}.ff.net.2.*", "blocks.{}.mlp.fc2.*"),
        ("proj_out_1.*", "final_layer.adaLN_modulation.1.*"),
        ("proj_out_2.*", "final_layer.linear.*"),
    ],
}


def _flux_diffusers() -> list[tuple]:
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    rows = [("x_embedder.*", "img_in.*"), ("context_embedder.*", "txt_in.*"), ("proj_out.*", "final_layer.linear.*"),
            ("norm_out.linear.*", "final_layer.adaLN_modulation.1.*", SWAP)]
    for theirs, ours in (("timestep_embedder", "time_in"), ("guidance_embedder", "guidance_in"), ("text_embedder", "vector_in")):
        rows += [(f"time_text_embed.{theirs}.linear_1.*", f"{ours}.in_layer.*"), (f"time_text_embed.{theirs}.linear_2.*", f"{ours}.out_layer.*")]
    for stream, norm, qkv, out, qk, ff in (("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff"),
                                           ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_", "ff_context")):
        rows += [(f"{double}.{norm}.linear.*", f"double_blocks.{{}}.{stream}_mod.lin.*"),
                 (tuple(f"{double}.attn.{x}.*" for x in qkv), f"double_blocks.{{}}.{stream}_attn.qkv.*"),
                 (f"{double}.attn.{out}.*", f"double_blocks.{{}}.{stream}_attn.proj.*"),
                 (f"{double}.attn.{qk}q.weight", f"double_blocks.{{}}.{stream}_attn.norm.query_norm.scale"),
                 (f"{double}.attn.{qk}k.weight", f"double_blocks.{{}}.{stream}_attn.norm.key_norm.scale"),
                 (f"{double}.{ff}.net.0.proj.*", f"double_blocks.{{}}.{stream}_mlp.0.*"), (f"{double}.{ff}.net.2.*", f"double_blocks.{{}}.{stream}_mlp.2.*")]
    return rows + [
        (f"{single}.norm.linear.*", "single_blocks.{}.modulation.lin.*"),
        (tuple(f"{single}.{x}.*" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")), "single_blocks.{}.linear1.*", KeyTransform(shares=(1, 1, 1, 4))),
        (f"{single}.proj_out.*", "single_blocks.{}.linear2.*"),
        (f"{single}.attn.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"), (f"{single}.attn.norm_k.weight", "single_blocks.{}.norm.key_norm.scale")]


FLUX_TABLES = {"original": OURS, "diffusers": _flux_diffusers()}     # ours is the original's


SANA_TABLES = {
    "ours": OURS,
    "original": [
        ("pos_embed", None),                                         # in the file, not in SANA-1.5's forward
        ("y_embedder.y_embedding", None),                            # a null caption: here that is the encoded empty prompt
        *[(f"blocks.{{}}.mlp.{theirs}.conv.*", f"blocks.{{}}.mlp.{ours}.*")
          for theirs, ours in (("inverted_conv", "conv_inverted"), ("depth_conv", "conv_depth"), ("point_conv", "conv_point"))],
        ("*", "*"),
    ],
    "diffusers": [
        ("patch_embed.proj.*", "x_embedder.proj.*"), ("proj_out.*", "final_layer.linear.*"), ("scale_shift_table", "final_layer.scale_shift_table"),
        ("time_embed.emb.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"), ("time_embed.emb.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
        ("time_embed.linear.*", "t_block.1.*"), ("caption_norm.*", "attention_y_norm.*"),
        ("caption_projection.linear_1.*", "y_embedder.y_proj.fc1.*"), ("caption_projection.linear_2.*", "y_embedder.y_proj.fc2.*"),
        ("transformer_blocks.{}.scale_shift_table", "blocks.{}.scale_shift_table"),
        (tuple(f"transformer_blocks.{{}}.attn1.to_{x}.*" for x in "qkv"), "blocks.{}.attn.qkv.*"),
        ("transformer_blocks.{}.attn2.to_q.*", "blocks.{}.cross_attn.q_linear.*"),
        (tuple(f"transformer_blocks.{{}}.attn2.to_{x}.*" for x in "kv"), "blocks.{}.cross_attn.kv_linear.*"),
        *[(f"transformer_blocks.{{}}.{theirs}.{a}.*", f"blocks.{{}}.{ours}.{b}.*") for theirs, ours in (("attn1", "attn"), ("attn2", "cross_attn"))
          for a, b in (("to_out.0", "proj"), ("norm_q", "q_norm"), ("norm_k", "k_norm"))],
        ("transformer_blocks.{}.ff.*", "blocks.{}.mlp.*"),
    ],
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


TABLES = {DiT: DIT_TABLES, Flux: FLUX_TABLES, Sana: SANA_TABLES}


def detect_layout(keys) -> tuple[type, str]:
    """Family and layout of a state dict, from its names. ValueError if they are nobody's."""
    for sign, family, layout in LAYOUT_SIGNATURES:
        if sign in keys:
            return family, layout
    raise ValueError(f"these are not the weights of a DiT, FLUX or SANA in any known layout (the first names: {', '.join(list(keys)[:3])}); "
                     "an autoencoder goes to --ae-weights, a LoRA to its base")


@lru_cache(maxsize=None)
def _pattern(text: str) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)") + r"\Z")


def _fill(text: str, groups: tuple[str, ...]) -> str:
    it = iter(groups)
    return re.sub(r"\{\}|\*", lambda _: next(it), text)


def source_keys(key: str, table: list[tuple], theirs=None) -> tuple[list[str], KeyTransform] | None:
    """Their names of our tensor `key`, and the turn between: of the first row that knows it and, given `theirs`, finds all
    its names there. None if there is no such row."""
    for names, ours, *turn in table:
        if ours is None or not (match := _pattern(ours).match(key)):
            continue
        found = [_fill(n, match.groups()) for n in ((names,) if isinstance(names, str) else names)]
        if theirs is None or all(n in theirs for n in found):
            return found, turn[0] if turn else SAME
    return None


def map_keys(model: nn.Module, theirs: Mapping[str, Tensor], table: list[tuple]) -> dict[str, Tensor]:
    """A foreign state dict under our names, strictly: every source key used once, every target filled, shapes equal.
    Raises ValueError with the keys otherwise: half a checkpoint draws plausible rubbish."""
    wanted, mapped, used, missing = model.state_dict(), {}, set(), []
    for key in wanted:
        if not (found := source_keys(key, table, theirs)):
            missing.append(key)
            continue
        names, turn = found
        used.update(names)
        mapped[key] = turn.load(theirs[names[0]] if len(names) == 1 else torch.cat([theirs[n] for n in names]))
    dropped = [_pattern(row[0]) for row in table if row[1] is None]
    unused = [k for k in theirs if k not in used and not any(d.match(k) for d in dropped)]
    wrong = [f"{k}: file {tuple(v.shape)}, model {tuple(wanted[k].shape)}" for k, v in mapped.items() if v.shape != wanted[k].shape]
    problems = [f"{len(found)} {what}: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
                for what, found in (("missing", missing), ("unexpected", unused), ("of another shape", wrong)) if found]
    if problems:
        raise ValueError(f"these weights are not a {type(model).__name__} of this configuration; " + "; ".join(problems))
    return mapped


def unmap_keys(ours: Mapping[str, Tensor], table: list[tuple]) -> dict[str, Tensor]:
    """Our state dict under their names: the table read from right to left. What we fuse is split (views, no copies)."""
    out = {}
    for key, value in ours.items():
        if not (found := source_keys(key, table)):
            raise ValueError(f"{key} has no name in that layout")
        names, turn = found
        out |= zip(names, turn.split(turn.save(value), len(names)))
    return out


def load_weights(model: nn.Module, theirs: Mapping[str, Tensor], table: list[tuple], dtype: torch.dtype | None = None) -> nn.Module:
    """Fill a model (built on meta) with a file's tensors under any key table. What is neither fused nor converted stays the
    file's own memory map, and what is goes through one tensor at a time: there is never a second copy of the whole.
    Raises ValueError naming keys, see map_keys."""
    mapped = map_keys(model, theirs, table)
    for k, v in mapped.items() if dtype is not None else ():
        mapped[k] = v.to(dtype) if v.is_floating_point() else v
    model.load_state_dict(mapped, assign=True, strict=True)
    return model.requires_grad_(False)


# ---- weights: from files -------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class TensorFiles(Mapping):
    """The tensors of safetensors files by name. Each look-up maps that tensor's bytes and nothing else, so memory is used
    when they are read and given back when the tensor goes; writing to one does not touch the file."""

    def __init__(self, files: list[Path]):
        self.places = {}
        for file in files:
            try:
                with safe_open(file, "pt"):                          # its parser judges the file
                    pass
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({e}); download it again") from None
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            for key, v in header.items():
                if key != "__metadata__":
                    if v["dtype"] not in DTYPES:
                        raise ValueError(f"{file} holds {key} as {v['dtype']}, which is not read here; take a file in bf16 or fp32")
                    start, end = v["data_offsets"]
                    self.places[key] = (file, DTYPES[v["dtype"]], tuple(v["shape"]), 8 + size + start, end - start)

    def __getitem__(self, key: str) -> Tensor:
        file, dtype, shape, start, size = self.places[key]
        if not size:
            return torch.empty(shape, dtype=dtype)
        data = torch.from_numpy(np.memmap(file, np.uint8, "c", start, size))
        aligned = data.data_ptr() % dtype.itemsize == 0              # old writers padded their headers to nothing in particular
        return (data if aligned else data.clone()).view(dtype).reshape(shape)

    def __contains__(self, key) -> bool:
        return key in self.places

    def __iter__(self):
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def weight_files(path, part: str = "transformer") -> list[Path]:
    """The files in which a model is stored. path: a file, the index of a sharded one, or a folder that holds either,
    itself or under `part`, as the folder of a diffusers pipeline does. ValueError if there is none, or if it is not safe."""
    path = Path(path)
    if path.is_dir():
        folder = path / part if (path / part).is_dir() else path
        names = ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin"]
        path = next((folder / n for n in names if (folder / n).is_file()), None)
        if path is None:
            raise ValueError(f"{folder} holds no weights: expected one of {', '.join(names)}; finish the download, or name the file itself")
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    if (shard := re.search(r"-\d+-of-(\d+)\.\w+$", path.name)) and int(shard[1]) > 1:
        raise ValueError(f"{path} is one part of several ({int(shard[1])}); name their folder, or the index beside them")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        # an index is somebody else's text: it may not point anywhere but beside itself
        outside = [name for name in shards if re.search(r"[/\\:]|^\.", name) or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not an index of shards (JSON with a weight_map of file names); download it again") from None
    if outside:
        raise ValueError(f"{path} names {outside[0]!r} for a shard; only *.safetensors beside the index are read. It is damaged or hostile: download it again from its source")
    if lacking := [name for name in shards if not (path.parent / name).is_file()]:
        raise ValueError(f"{path.parent} lacks {len(lacking)} of the {len(shards)} shards that {path.name} lists: {', '.join(lacking[:3])}; finish the download")
    return [path.parent / name for name in shards]


# where trainers keep the weights in what they save, the first that is there counts: a moving average before the raw ones
WRAPPERS = ("ema", "ema_model_state_dict", "state_dict", "model_state_dict", "model")


PREFIXES = ("0.", "module.", "_orig_mod.", "model.diffusion_model.")


def unwrap(state, source) -> Mapping[str, Tensor]:
    """The tensors by name, out of the wrappers and prefixes of the known trainers. Averages of several decays lie side by
    side in the authors' checkpoints; the slowest one counts. ValueError if there is no state dict inside."""
    while isinstance(state, dict) and (inner := [state[w] for w in WRAPPERS if isinstance(state.get(w), dict) and state[w]]):
        state = inner[0]
        if state and all(isinstance(v, dict) and re.fullmatch(r"[\d.e-]+", str(k)) for k, v in state.items()):
            state = state[max(state, key=lambda k: float(str(k)))]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{source} does not hold a state dict, tensors by name, under any of the known wrappers; save it as one")
    for prefix in PREFIXES:
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): state[k] for k in state}
    return state


def read_tensors(path, part: str = "transformer") -> Mapping[str, Tensor]:
    """Weights as {key: tensor}, memory-mapped. path as for weight_files: .safetensors, or a .pt/.pth/.bin that torch loads
    with weights_only=True (nothing in it is executed). Wrappers of the known trainers are taken off. ValueError if a file
    is missing, truncated, a git-lfs pointer, or anything but tensors."""
    files = weight_files(path, part)
    for file in files:
        if file.open("rb").read(64).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} ({file.stat().st_size} bytes) is a git-lfs pointer, not the weights; run `git lfs pull` where it came from")
    if files[0].suffix == ".safetensors":
        return unwrap(TensorFiles(files), path)
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise ValueError(f"{files[0]} ({files[0].stat().st_size} bytes) does not load as plain tensors ({type(e).__name__}); it is damaged, or it holds "
                         "pickled code, which is never run here. Save its state dict as safetensors first") from None
    return unwrap(state, files[0])


def read_config(path) -> dict:
    """The configuration that our own files carry beside their tensors; {} for anybody else's."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as f:
        return json.loads((f.metadata() or {}).get("config", "{}"))


def folder_config(path, part: str = "transformer") -> dict:
    """The config.json beside a diffusers model's weights; {} if there is none. path as for weight_files."""
    file = weight_files(path, part)[0].parent / "config.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is not JSON; download it again") from None


# ---- weights: to files -----------------------------------------------------------------------------------------------------

@contextmanager
def atomic(path):
    """Write to a temporary neighbour, flush it to the disk, rename: a kill or a full disk leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)                                # some writers make private files
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_tensors(path, tensors: dict[str, Tensor], config: dict | None = None, metadata: dict[str, str] | None = None):
    """safetensors with the configuration, and whatever else is given, in its metadata; written atomically."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}   # no views, no shared storage
    with atomic(path) as tmp:
        save_file(plain, tmp, metadata={"format": "pt", "config": json.dumps(config or {}), **(metadata or {})})


# what a part of a pipeline folder is made of; the other precisions that some repositories keep beside it are left there
PART_FILES, OTHER_PRECISIONS = ("*.json", "*.safetensors", "*.model", "*.txt"), ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*")


def find_weights(name: str, spec: str | None, path: str | None = None, parts: tuple[str, ...] = ("transformer",), flag: str = "--weights") -> Path:
    """Where the weights of `name` are: the path given; the file shipped here; or the model hub's cache, downloading if
    need be (huggingface_hub, optional). A spec is "file", "repository::file" or "repository::folder/", a pipeline folder
    ("repository::" if that is the repository itself); of a folder only the named parts are fetched, and the folder comes back.
    A connection that breaks goes on at its byte, and no whole file is fetched twice; the environment's HF_TOKEN,
    HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME hold. Raises ValueError in two lines: what was wanted and where, what to do."""
    if path:
        if not Path(path).exists():
            raise ValueError(f"{flag} {path}: no such file")
        return Path(path)
    if spec is None:
        raise ValueError(f"{name} has no published weights; train it (finetune.py --init scratch) or give a file with {flag} PATH")
    if "::" not in spec:
        shipped = HERE / spec
        if not shipped.is_file():
            raise ValueError(f"{name}: {shipped} should come with this repository and is missing; restore it with git, or give {flag} PATH")
        return shipped
    repo, file = spec.split("::")
    folder = not file or file.endswith("/")
    wanted = f"{name} wants {file}{'{' + ','.join(parts) + '}' if folder else ''} of {repo}"
    local = f"With it at hand, give {flag} " + ("DIR (a folder with these parts)" if folder else "PATH (either published layout, .safetensors, .bin or .pt)")
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise ValueError(f"{wanted}, and downloading needs: pip install huggingface_hub\n{local}") from None
    try:
        if not folder:
            return Path(hub.hf_hub_download(repo, file))
        patterns = [f"{file}{part}/{files}" for part in parts for files in PART_FILES]
        found = Path(hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=list(OTHER_PRECISIONS))) / file
    except errors.GatedRepoError:
        raise ValueError(f"{wanted}, which its owners give to those who accept their licence: do that at {constants.ENDPOINT}/{repo}, "
                         f"and set HF_TOKEN to a token of that account\n{local}") from None
    except Exception as e:                                           # the hub's own errors are many and long; the type says which
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT}: {type(e).__name__}"
        raise ValueError(f"{wanted}; it is not in {constants.HF_HUB_CACHE} and could not be downloaded ({why})\n{local}") from None
    if missing := [part for part in parts if not (found / part).is_dir()]:
        raise ValueError(f"{wanted}; {constants.ENDPOINT}/{repo} and {constants.HF_HUB_CACHE} have no {', '.join(missing)}\n{local}")
    return found


# ---- models from files -----------------------------------------------------------------------------------------------------

# config.json's names of what no tensor's shape shows
STATED = {DiT: {"num_heads": "num_attention_heads"}, Flux: {"axes_dim": "axes_dims_rope"}, Sana: {"num_heads": "num_cross_attention_heads"}}


def config_from_shapes(family: type, table: list[tuple], theirs: Mapping[str, Tensor], stated: dict) -> dict:
    """What a weight file says of its model's configuration. Shapes say nearly all, and they cannot be wrong; `stated` (its
    config.json, or {}) adds what they do not show. token_channels is C p^2: a FLUX token does not show its C and p."""
    def has(key):
        return source_keys(key, table, theirs) is not None

    def shape(key):
        if not has(key):
            raise ValueError(f"{key} is missing, and every {family.__name__} has it: the file is not whole, or not of this family")
        return theirs[source_keys(key, table, theirs)[0][0]].shape        # of the first part, where several are fused

    def count(key):
        return next(i for i in range(10_000) if not has(key.format(i)))

    facts = {ours: tuple(stated[name]) if isinstance(stated[name], list) else stated[name] for ours, name in STATED[family].items() if name in stated}
    if family is Flux:
        hidden, tokens = shape("img_in.weight")
        return facts | dict(
            hidden_size=hidden, token_channels=tokens, depth=count("double_blocks.{}.img_mod.lin.bias"), depth_single=count("single_blocks.{}.modulation.lin.bias"),
            num_heads=hidden // shape("double_blocks.0.img_attn.norm.query_norm.scale")[0], context_in_dim=shape("txt_in.weight")[1],
            vec_in_dim=shape("vector_in.in_layer.weight")[1], guidance_embed=has("guidance_in.in_layer.bias"))
    hidden, channels, patch, _ = shape("x_embedder.proj.weight")
    facts |= dict(hidden_size=hidden, in_channels=channels, patch_size=patch, depth=count("blocks.{}.attn.proj.bias"))
    if family is Sana:
        return facts | dict(mlp_ratio=shape("blocks.0.mlp.conv_point.weight")[1] / hidden, caption_channels=shape("y_embedder.y_proj.fc1.weight")[1])
    variance = shape("final_layer.linear.bias")[0] != channels * patch**2
    return facts | dict(num_classes=shape("y_embedder.embedding_table.weight")[0] - 1, predict="epsilon" if variance else "velocity")


def match_config(cfg, family: type, facts: dict):
    """The configuration of a file with these facts. Given one, it must agree: a ValueError names the difference and the
    presets that would fit. Given None it is the first preset that agrees, or the family's first one with the facts put in:
    what they leave open stays as it is there (SANA's heads in the original layout), and a FLUX token of 64 numbers is taken
    for 16 channels in patches of 2x2, any other for one latent cell."""
    differs = lambda c: {k: v for k, v in facts.items() if getattr(c, k) != v} if FAMILIES[type(c)] is family else facts
    fitting = [name for name, c in BASES.items() if not differs(c)]
    if cfg is None:
        tokens = facts.get("token_channels")
        latent = {} if tokens is None else dict(in_channels=16, patch_size=2) if tokens == 64 else dict(in_channels=tokens, patch_size=1)
        first = next(c for c in BASES.values() if FAMILIES[type(c)] is family)
        return BASES[fitting[0]] if fitting else replace(first, weights=None, **{k: v for k, v in (facts | latent).items() if k != "token_channels"})
    if wrong := differs(cfg):
        told = ", ".join(f"{k} {v}" + (f" (not {getattr(cfg, k)})" if hasattr(cfg, k) else "") for k, v in wrong.items())
        raise ValueError(f"the weights of a {family.__name__} with {told}, where a {FAMILIES[type(cfg)].__name__} of another configuration was asked for; "
                         + (f"the preset that fits them is {' or '.join(fitting)}" if fitting else "no preset fits them"))
    return cfg


def build(cfg, weights=None, dtype: torch.dtype | None = torch.float32) -> Backbone:
    """A model of this configuration, filled from weights of any known layout (a file, an index, a diffusers folder), or
    freshly initialised (weights None). cfg None takes it from the file, see match_config. dtype None keeps the file's, and
    its memory map. ValueError if the weights are missing, damaged or another model's."""
    if weights is None:
        model = FAMILIES[type(cfg)](cfg).init_from_scratch()
        return model.to(dtype) if dtype else model
    tensors, own = read_tensors(weights), read_config(weights).get("model")
    try:
        family, layout = detect_layout(tensors)
        table = TABLES[family][layout]
        cfg = match_config(config_from_dict(own) if cfg is None and own else cfg, family, config_from_shapes(family, table, tensors, folder_config(weights)))
        if family is Sana and any(v.dtype == torch.float16 for k, v in tensors.items() if ".attn" in k):
            cfg = replace(cfg, clamp=True)                            # trained in fp16, counts on its limits
        with torch.device("meta"):
            model = family(cfg)
        return load_weights(model, tensors, table, dtype)
    except ValueError as e:
        raise ValueError(f"{weights}: {e}") from None


def config_dict(cfg) -> dict:
    return {"family": type(cfg).__name__, **asdict(cfg)}


def config_from_dict(plain: dict):
    """config_dict's inverse, also after JSON has made lists of tuples. ValueError for a config of an earlier version."""
    if "sampling" not in plain:
        raise ValueError("its configuration has no \"sampling\": it was written by an earlier version of this code; train it again")
    family = next(kind for kind in FAMILIES if kind.__name__ == plain["family"])
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "family"}
    return family(**settings | {"sampling": Sampling(**plain["sampling"])})


# ---- models to files -----------------------------------------------------------------------------------------------------

def diffusers_config(cfg) -> dict:
    """The config.json with which the diffusers library builds this model."""
    heads = dict(num_attention_heads=cfg.num_heads, attention_head_dim=cfg.hidden_size // cfg.num_heads)
    latent = dict(in_channels=cfg.in_channels, out_channels=cfg.out_channels, patch_size=cfg.patch_size, num_layers=cfg.depth)
    # an autoencoder's name says how many pixels a latent cell is wide
    side = cfg.res // int(re.search(r"f(\d+)c\d+", cfg.ae)[1])
    match cfg:
        case FluxConfig():                                           # diffusers packs outside of the model
            return dict(_class_name="FluxTransformer2DModel", **heads, patch_size=1, in_channels=cfg.token_channels, out_channels=None, num_layers=cfg.depth,
                        num_single_layers=cfg.depth_single, joint_attention_dim=cfg.context_in_dim, pooled_projection_dim=cfg.vec_in_dim, guidance_embeds=cfg.guidance_embed,
                        axes_dims_rope=list(cfg.axes_dim))
        case SanaConfig():
            return dict(_class_name="SanaTransformer2DModel", **latent, num_attention_heads=cfg.hidden_size // 32, attention_head_dim=32, num_cross_attention_heads=cfg.num_heads,
                        cross_attention_head_dim=heads["attention_head_dim"], cross_attention_dim=cfg.hidden_size, caption_channels=cfg.caption_channels, mlp_ratio=cfg.mlp_ratio,
                        attention_bias=False, sample_size=side, norm_elementwise_affine=False, norm_eps=1e-6, interpolation_scale=None, qk_norm="rms_norm_across_heads")
        case DiTConfig():
            return dict(_class_name="DiTTransformer2DModel", **heads, **latent, num_embeds_ada_norm=cfg.num_classes, sample_size=side, norm_eps=1e-6, norm_type="ada_norm_zero",
                        activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False)


def export_diffusers(model: Backbone, folder, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9):
    """Write <folder>/transformer, which the diffusers library loads by itself: its FluxTransformer2DModel,
    SanaTransformer2DModel or DiTTransformer2DModel. dtype None keeps the model's. They compute the same network, with what
    is not in a file left to them: a FLUX is fed packed tokens and their places, diffusers' DiT has other timestep
    frequencies than its weights were trained with (the exponent over 127, not 128), and SANA is clamped in fp16 only.
    ValueError if a LoRA is not merged yet, if the folder is taken, or for spread positions."""
    cfg, state = model.cfg, model.state_dict()
    if any(k.endswith(".base.weight") for k in state):
        raise ValueError("this model carries a LoRA; merge it before the export (lora.merge_lora), or save it beside (lora.save_peft)")
    if (step := getattr(cfg, "pos_step", 1)) != 1:
        raise ValueError(f"diffusers counts a model's positions by ones, this one's go by {step:g}: it cannot be exported (align.py --pos-step 1 makes one that can)")
    theirs = unmap_keys(state, TABLES[type(model)]["diffusers"])
    if isinstance(cfg, DiTConfig):                                   # every block repeats block 0's embedders
        first = {k: v for k, v in theirs.items() if k.startswith("transformer_blocks.0.norm1.emb.")}
        theirs |= {k.replace("blocks.0", f"blocks.{i}"): v for i in range(cfg.depth) for k, v in first.items()}
    write_folder(Path(folder) / "transformer", theirs, diffusers_config(cfg), dtype, shard_bytes)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9):
    """A model's folder as diffusers has it: config.json and the tensors, in one file or in shards of at most so many bytes
    with their index. A shard at a time is in memory. The config comes last: a folder that has it is complete."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already; name another folder, or remove it")
    of = lambda v: dtype if dtype and v.is_floating_point() else v.dtype
    shards, room = [[]], shard_bytes
    for k, v in tensors.items():
        size = v.numel() * of(v).itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, []], shard_bytes
        shards[-1].append(k)
        room -= size
    name = "diffusion_pytorch_model{}.safetensors"
    files = [name.format("")] if len(shards) == 1 else [name.format(f"-{i + 1:05d}-of-{len(shards):05d}") for i in range(len(shards))]
    for file, keys in zip(files, shards):
        write_tensors(folder / file, {k: tensors[k].to(of(tensors[k])) for k in keys})
    text = {"config.json": config}
    if len(files) > 1:
        total = sum(v.numel() * of(v).itemsize for v in tensors.values())
        text = {name.format("") + ".index.json": {"metadata": {"total_size": total}, "weight_map": {k: file for file, keys in zip(files, shards) for k in keys}}} | text
    for file, content in text.items():
        with atomic(folder / file) as tmp:
            tmp.write_text(json.dumps(content, indent=1))


# ---- paired latents, cached on disk --------------------------------------------------------------------------------------------

def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights: enough of every tensor to tell two trainings of one architecture apart."""
    h = hashlib.sha256()
    for k, v in sorted(module.state_dict().items()):
        h.update(f"{k}{tuple(v.shape)}".encode() + v.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def write_json(path: Path, value):
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1))


# ---- weights (rows as in model.py: theirs, ours[, turn]) -----------------------------------------------------------------

def _linear(w: Tensor) -> Tensor:                                     # a 1x1 convolution's weight as a linear map's
    return w.reshape(w.shape[0], -1) if w.dim() == 4 else w


def _conv1x1(w: Tensor) -> Tensor:
    return w[:, :, None, None]


LINEAR, CONV = KeyTransform(_linear), KeyTransform(_conv1x1, _linear)


KL_DIFFUSERS = [("*", "*")]


KL_DIFFUSERS_OLD = [                                                  # attention names before 2023: SD's published file
    *[(f"*.mid_block.attentions.0.{old}.*", f"*.mid_block.attentions.0.{new}.*", LINEAR)
      for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))],
    ("*", "*"),
]


def kl_original(levels: int) -> list[tuple]:
    """Black Forest Labs' and latent diffusion's names; their decoder counts its levels from the picture, so backwards."""
    rows = []
    for i in range(levels):
        for theirs, ours in ((f"encoder.down.{i}", f"encoder.down_blocks.{i}"), (f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}")):
            rows += [(f"{theirs}.block.{{}}.nin_shortcut.*", f"{ours}.resnets.{{}}.conv_shortcut.*"), (f"{theirs}.block.{{}}.*", f"{ours}.resnets.{{}}.*"),
                     (f"{theirs}.downsample.conv.*", f"{ours}.downsamplers.0.conv.*"), (f"{theirs}.upsample.conv.*", f"{ours}.upsamplers.0.conv.*")]
    for half in ("encoder", "decoder"):
        rows += [(f"{half}.mid.block_{i + 1}.*", f"{half}.mid_block.resnets.{i}.*") for i in (0, 1)]
        rows += [(f"{half}.mid.attn_1.norm.*", f"{half}.mid_block.attentions.0.group_norm.*")]
        rows += [(f"{half}.mid.attn_1.{a}.*", f"{half}.mid_block.attentions.0.{b}.*", LINEAR)
                 for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))]
        rows += [(f"{half}.norm_out.*", f"{half}.conv_norm_out.*")]
    return [*rows, ("*", "*")]


DCAE_DIFFUSERS = [
    (tuple(f"*.attn.to_{x}.weight" for x in "qkv"), "*.attn.qkv.weight", CONV),
    ("*.attn.to_qkv_multiscale.0.proj_in.weight", "*.attn.multiscale.0.weight"),
    ("*.attn.to_qkv_multiscale.0.proj_out.weight", "*.attn.multiscale.1.weight"),
    ("*.attn.to_out.weight", "*.attn.proj.weight", CONV),
    ("*.attn.norm_out.*", "*.attn.norm.*"),
    ("*", "*"),
]


def dcae_original() -> list[tuple]:
    rows = []
    for half, blocks in (("encoder", "encoder.down_blocks"), ("decoder", "decoder.up_blocks")):
        block = (f"{half}.stages.{{}}.op_list.{{}}", f"{blocks}.{{}}.{{}}")
        rows += [(f"{block[0]}.{theirs}.*", f"{block[1]}.{ours}.*") for theirs, ours in (
            ("main.conv1.conv", "conv1"), ("main.conv2.conv", "conv2"), ("main.conv2.norm", "norm"),
            ("main.conv.conv", "conv"), ("main.conv", "conv"),           # up and down: folding, interpolating; strided
            ("context_module.main.qkv.conv", "attn.qkv"), ("context_module.main.aggreg.0.0", "attn.multiscale.0"),
            ("context_module.main.aggreg.0.1", "attn.multiscale.1"), ("context_module.main.proj.conv", "attn.proj"),
            ("context_module.main.proj.norm", "attn.norm"), ("local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
            ("local_module.main.depth_conv.conv", "conv_out.conv_depth"), ("local_module.main.point_conv.conv", "conv_out.conv_point"),
            ("local_module.main.point_conv.norm", "conv_out.norm"))]
    return rows + [
        ("encoder.project_in.conv.conv.*", "encoder.conv_in.conv.*"), ("encoder.project_in.conv.*", "encoder.conv_in.*"),
        ("encoder.project_out.main.op_list.0.conv.*", "encoder.conv_out.*"), ("encoder.project_out.op_list.0.conv.*", "encoder.conv_out.*"),
        ("decoder.project_in.main.conv.*", "decoder.conv_in.*"), ("decoder.project_in.conv.*", "decoder.conv_in.*"),
        ("decoder.project_out.op_list.0.*", "decoder.norm_out.*"),
        ("decoder.project_out.op_list.2.conv.conv.*", "decoder.conv_out.conv.*"), ("decoder.project_out.op_list.2.conv.*", "decoder.conv_out.*"),
    ]


def ae_table(cfg, keys) -> list[tuple]:
    """The key table of the layout that these keys are in."""
    has = lambda part: any(part in k for k in keys)
    if isinstance(cfg, KLConfig):
        return kl_original(len(cfg.widths)) if has(".mid.block_1.") else KL_DIFFUSERS_OLD if has(".proj_attn.") else KL_DIFFUSERS
    return dcae_original() if has(".op_list.") else DCAE_DIFFUSERS


def stated_config(cfg, stated: dict):
    """A preset with what a diffusers config.json says in its place: the scale above all, and the architecture. {} changes
    nothing. ValueError if it is another latent space than the preset's."""
    known = lambda **names: {ours: stated[theirs] for ours, theirs in names.items() if stated.get(theirs) is not None}
    kind, as_tuple = stated.get("_class_name"), lambda v: tuple(v) if isinstance(v, list) else v
    if kind not in (None, "AutoencoderKL", "AutoencoderDC") or kind == ("AutoencoderDC" if isinstance(cfg, KLConfig) else "AutoencoderKL"):
        raise ValueError(f"its config.json says {kind}, and {cfg.name} is none")
    if kind == "AutoencoderKL":
        new = known(channels="latent_channels", scale="scaling_factor", shift="shift_factor", widths="block_out_channels", depth="layers_per_block", groups="norm_num_groups",
                    quant_conv="use_quant_conv")
    elif kind == "AutoencoderDC":
        new = known(channels="latent_channels", scale="scaling_factor", widths="encoder_block_out_channels", encoder_depths="encoder_layers_per_block",
                    decoder_depths="decoder_layers_per_block", latent_shortcut="encoder_out_shortcut", out_act="decoder_conv_act_fn")
        for half in ("encoder", "decoder"):
            types = stated.get(f"{half}_block_types", "ResBlock")
            stages = [types] if isinstance(types, str) else list(types)      # one name for all stages, or one each
            new[f"{half}_attention_from"] = [*stages, *["ResBlock"] * 99, "EfficientViTBlock"].index("EfficientViTBlock")
        new |= dict(multiscale=any(map(len, stated.get("encoder_qkv_multiscales", ()))), strided=stated.get("downsample_block_type") == "Conv",
                    interpolate=stated.get("upsample_block_type") == "interpolate", decoder_batch_norm="batch_norm" in stated.get("decoder_norm_types", ""))
    else:
        return cfg
    found = replace(cfg, **{k: as_tuple(v) for k, v in new.items()})
    if (found.f, found.channels) != (cfg.f, cfg.channels):
        raise ValueError(f"this is an autoencoder of f{found.f}c{found.channels}, and {cfg.name} is f{cfg.f}c{cfg.channels}")
    return found


def diffusers_ae_config(cfg) -> dict:
    """The config.json with which the diffusers library builds this autoencoder."""
    if isinstance(cfg, KLConfig):
        n = len(cfg.widths)
        return dict(_class_name="AutoencoderKL", latent_channels=cfg.channels, block_out_channels=list(cfg.widths), layers_per_block=cfg.depth, norm_num_groups=cfg.groups,
                    down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n, use_quant_conv=cfg.quant_conv, use_post_quant_conv=cfg.quant_conv,
                    scaling_factor=cfg.scale, shift_factor=cfg.shift)
    n, shared = len(cfg.widths), dict(_class_name="AutoencoderDC", latent_channels=cfg.channels, attention_head_dim=32, scaling_factor=cfg.scale or 1.0)
    for half, first in (("encoder", cfg.encoder_attention_from), ("decoder", cfg.decoder_attention_from)):
        sees = [i >= first for i in range(n)]
        shared |= {f"{half}_block_out_channels": list(cfg.widths), f"{half}_layers_per_block": list(getattr(cfg, f"{half}_depths")),
                   f"{half}_block_types": ["EfficientViTBlock" if s else "ResBlock" for s in sees],
                   f"{half}_qkv_multiscales": [[5] if s and cfg.multiscale else [] for s in sees]}
    plain = [cfg.decoder_batch_norm and i < cfg.decoder_attention_from for i in range(n)]
    return shared | dict(decoder_norm_types=["batch_norm" if b else "rms_norm" for b in plain], decoder_act_fns=["relu" if b else "silu" for b in plain],
                         downsample_block_type="Conv" if cfg.strided else "pixel_unshuffle", upsample_block_type="interpolate" if cfg.interpolate else "pixel_shuffle",
                         encoder_out_shortcut=cfg.latent_shortcut, decoder_in_shortcut=cfg.latent_shortcut, decoder_conv_act_fn=cfg.out_act)


def export_autoencoder(ae: Autoencoder, folder, dtype: torch.dtype | None = None):
    """Write <folder>/vae, which the diffusers library loads by itself as AutoencoderKL or AutoencoderDC."""
    table = KL_DIFFUSERS if isinstance(ae.cfg, KLConfig) else DCAE_DIFFUSERS
    write_folder(Path(folder) / "vae", unmap_keys(ae.state_dict(), table), diffusers_ae_config(ae.cfg), dtype)


def load_autoencoder(name: str, weights: str | None = None, dtype: torch.dtype | None = torch.float32, device="cpu") -> Autoencoder:
    """An autoencoder by preset name, from its shipped file, a local file or folder in any published layout (a diffusers
    pipeline's too), or the model hub. Frozen, in eval mode; dtype None keeps the file's. A file of ours or diffusers'
    config.json brings the configuration, the scale included. ValueError if it is missing, damaged or of another architecture."""
    cfg = ae_config(name)
    path = find_weights(name, cfg.weights, weights)
    tensors, own = read_tensors(path, "vae"), read_config(path)
    if own:
        cfg = replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k in asdict(cfg)})
    try:
        cfg = stated_config(cfg, folder_config(path, "vae"))
        with torch.device("meta"):
            model = build_autoencoder(cfg)
        load_weights(model, tensors, ae_table(cfg, tensors), dtype)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model.to(device, memory_format=torch.channels_last).eval()


# ---- the files of diffusers and PEFT ---------------------------------------------------------------------------------------
# transformer.<module>.lora_A.weight (rank,in) and lora_B (out,rank), under diffusers' names, where q, k and v have a LoRA
# each. alpha stands in <module>.alpha or in the file's metadata; where it is missing it is the rank.

PEFT_FILE, PARTS_FILE = "pytorch_lora_weights.safetensors", "embedder_and_head.safetensors"


def _block(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.block_diag(*matrices)


def lora_to_peft(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The model's LoRA -> {"<module>.lora_A.weight", "<module>.lora_B.weight"} and {module: alpha}, under diffusers' names.
    A fused matrix gives each of its parts the rows of B that are its own, and of A only what those rows use."""
    table, out, alphas = TABLES[type(model)]["diffusers"], {}, {}
    for name, m in model.named_modules():
        if not isinstance(m, LoRALinear):
            continue
        pointwise = (..., *[None] * (m.base.weight.ndim - 2))         # a 1x1 convolution's has two more axes
        for key, B in unmap_keys({f"{name}.weight": m.B.detach()}, table).items():
            used = B.ne(0).any(dim=0)
            used = used if used.any() else torch.ones_like(used)
            module = key.removesuffix(".weight")
            out[f"{module}.lora_A.weight"], out[f"{module}.lora_B.weight"] = m.A.detach()[used][pointwise], B[:, used][pointwise]
            alphas[module] = m.scale * int(used.sum())
    return out, alphas


def lora_from_peft(model: nn.Module, tensors: dict[str, Tensor], alphas: dict[str, float] | None = None) -> list[str]:
    """Put a LoRA under diffusers' names onto the model, exactly: the parts of what is fused here lie one beside the other
    in A and on the diagonal of B. Returns what was left out: a LoRA of an embedder or head that is bound to another latent
    space. ValueError for anything else that does not fit, and then the model is as before."""
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("this model carries a LoRA already; merge it first")
    theirs, alphas = {}, dict(alphas or {})
    for key, value in tensors.items():
        if not (match := re.fullmatch(r"(?:transformer\.|base_model\.model\.)?(.+?)\.(lora_[AB]|alpha)(?:\.default)?(?:\.weight)?", key)):
            raise ValueError(f"{key} is not a LoRA's tensor; expected names like transformer.<module>.lora_A.weight")
        module, part = match.groups()
        if part == "alpha":
            alphas[module] = float(value)
        else:
            theirs.setdefault(module, {})[part[-1]] = value.float().flatten(1)
    table, made, used, skipped = TABLES[type(model)]["diffusers"], {}, set(), []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not (found := source_keys(f"{name}.weight", table)):
            continue
        names, turn = [n.removesuffix(".weight") for n in found[0]], found[1]
        if not (here := [n for n in names if n in theirs]):
            continue
        used.update(here)
        rows, cin = [len(part) for part in turn.split(layer.weight, len(names))], layer.weight.flatten(1).shape[1]
        pairs = [(theirs[n].get("A"), theirs[n].get("B")) if n in theirs else (torch.zeros(0, cin), torch.zeros(r, 0)) for n, r in zip(names, rows)]
        if any(A is None or B is None or A.shape[1] != cin or B.shape != (r, len(A)) for (A, B), r in zip(pairs, rows)):
            if not name.startswith((model.EMBEDDER.rstrip("."), model.HEAD.rstrip("."))):
                raise ValueError(f"the LoRA of {', '.join(here)} does not fit {name} {tuple(layer.weight.shape)}: it is of another model")
            skipped += here
            continue
        scales = [alphas.get(n, len(theirs[n]["A"])) / len(theirs[n]["A"]) if n in theirs else None for n in names]
        scale = next(s for s in scales if s is not None)              # one for all, or B takes up the difference
        A = torch.cat([A for A, _ in pairs])
        made[name] = LoRALinear(layer, len(A), scale * len(A))
        made[name].A.data = A.to(layer.weight.device)
        made[name].B.data = turn.load(_block([B if s is None else B * (s / scale) for (_, B), s in zip(pairs, scales)])).to(layer.weight.device)
    if left := [n for n in theirs if n not in used]:
        raise ValueError(f"{len(left)} modules of this LoRA are not in a {type(model).__name__}: {', '.join(left[:3])}")
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return skipped


def save_peft(model: nn.Module, folder):
    """Write the LoRA as diffusers' loaders read it, and beside it, under diffusers' names too, the embedder and the head,
    without which it means nothing. FLUX's loader wants alphas as tensors, the others in the metadata; none takes both."""
    tensors, alphas = lora_to_peft(model)
    if not tensors:
        raise ValueError("this model carries no LoRA to save")
    if "single_transformer_blocks.0.proj_out" in alphas:
        tensors |= {f"{module}.alpha": torch.tensor(alpha) for module, alpha in alphas.items()}
        metadata = {}
    else:
        ranks = {module: len(tensors[f"{module}.lora_A.weight"]) for module in alphas}
        first = next(iter(alphas))
        settings = dict(r=ranks[first], lora_alpha=alphas[first], target_modules=sorted(alphas), rank_pattern=ranks, alpha_pattern=alphas)
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    write_tensors(Path(folder) / PEFT_FILE, {f"transformer.{k}": v for k, v in tensors.items()}, metadata=metadata)
    own = {k: v for k, v in model.state_dict().items() if k.startswith((model.EMBEDDER, model.HEAD))}
    write_tensors(Path(folder) / PARTS_FILE, unmap_keys(own, TABLES[type(model)]["diffusers"]))


def load_peft(model: nn.Module, path) -> list[str]:
    """Put the LoRA of a file, or of a folder that save_peft wrote (with its embedder and head), onto the model. Returns
    what was left out, see lora_from_peft. ValueError if the file does not fit."""
    path = Path(path)
    file, parts = (path / PEFT_FILE, path / PARTS_FILE) if path.is_dir() else (path, None)
    tensors, alphas = read_tensors(file), {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            stated = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
        stated = {k.removeprefix("transformer."): v for k, v in stated.items()}
        modules = {re.sub(r"^transformer\.|\.lora_[AB]\.weight$", "", k) for k in tensors if ".lora_" in k}
        alphas = {m: stated.get("alpha_pattern", {}).get(m, stated["lora_alpha"]) for m in modules} if "lora_alpha" in stated else {}
    try:
        skipped = lora_from_peft(model, tensors, alphas)
        if parts and parts.exists():
            found, own = read_tensors(parts), model.state_dict()
            for key in [k for k in own if k.startswith((model.EMBEDDER, model.HEAD))]:
                names, turn = source_keys(key, TABLES[type(model)]["diffusers"])
                own[key].copy_(turn.load(found[names[0]]))
        return skipped
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def read_base_config(name: str, ema: bool = True):
    """A preset's or a run's configuration and facts, without its weights. ValueError lists the presets."""
    if name in BASES:
        return BASES[name], {}
    if not Path(name).exists():
        raise ValueError(f"--base {name}: not a preset ({', '.join(BASES)}) and not the folder of a run")
    return read_run_config(run_file(name, ema))


def read_run_config(file: Path):
    """The configuration and the facts that a run's file carries. ValueError if it is not a run's."""
    if not file.is_file():
        raise ValueError(f"{file}: no such weight file")
    info = read_config(file)
    if "model" not in info:
        raise ValueError(f"{file} is not a run's file; an official weight file goes to --weights, with --base naming its model")
    try:
        return config_from_dict(info["model"]), info
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def load_base(name: str, weights: str | None = None, device="cpu", dtype: torch.dtype | None = torch.float32):
    """A preset, or a finished run (its LoRA merged) -> model in eval mode, what a run trained from it has to know.
    ValueError lists the names."""
    cfg, _ = read_base_config(name)
    if name in BASES:
        model, kept = build(cfg, find_weights(name, cfg.weights, weights), dtype), {}
    else:
        model, info = load_run(name, base_weights=weights)
        kept, weights = {k: info[k] for k in ("classes", "images", "ae_weights") if k in info}, None
        merge_lora(model)
    return model.to(device=device, dtype=dtype).eval(), {**kept, "base": name, "base_weights": weights, "base_print": fingerprint(model)}


def run_file(path, ema: bool = True) -> Path:
    """The weight file of a run: a file as given; of a folder the moving average if there is one and it is wanted."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / "ema.safetensors"] * ema + [path / "model.safetensors"]
    if not files[-1].exists():
        raise ValueError(f"{path} holds no finished run (no model.safetensors); an unfinished one goes on with --resume")
    return next(f for f in files if f.exists())


def load_run(path, device="cpu", ema: bool = True, base_weights: str | None = None, dtype: torch.dtype = torch.float32):
    """A run's folder or file -> model in eval mode (LoRA attached), the facts written with it. A run keeps what it
    trained; the rest comes from its base, which is loaded first unless everything was trained (base_weights: where its
    file is now). ValueError if this is not a run, or its base is another one than it was trained from."""
    path = run_file(path, ema)
    (cfg, info), tensors = read_run_config(path), read_tensors(path)
    if info.get("lora") or not any("blocks." in k for k in tensors):
        base, found = load_base(info["base"], base_weights or info["base_weights"], dtype=None)     # its print is of the file's own numbers
        if info.get("base_print", found["base_print"]) != found["base_print"]:
            raise ValueError(f"{path} was trained from another {info['base']} than the one found now; give that one's file with --weights")
        model = to_deep_model(base, cfg)
        if info.get("lora"):
            add_lora(model, **info["lora"])
        load_part(model, tensors, path)
    else:
        model = build(cfg, path)
    return model.requires_grad_(False).to(device, dtype).eval(), info | {"file": str(path)}


def load_part(model, tensors: dict[str, Tensor], source="the file"):
    """Put tensors in the place of a model's own of the same names, in the file's precision: a base in bf16 must not round
    what was trained in float32. What the file leaves out stays, as its base has it. ValueError
    for a name or a shape that the model does not have, and for a missing embedder, head or LoRA: no base has those."""
    own = model.state_dict()
    wrong = [k for k, v in tensors.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k not in tensors and (k.startswith((model.EMBEDDER, model.HEAD)) or k.endswith((".A", ".B")))]
    for what, keys in (("tensors that this model does not have in that shape", wrong), ("tensors missing that no base has", missing)):
        if keys:
            raise ValueError(f"{source}: {len(keys)} {what}: {', '.join(keys[:3])}")
    model.load_state_dict(own | dict(tensors), assign=True)


def newest_run(root="runs", kinds=("align", "finetune")) -> Path | None:
    """The newest finished run's folder of these kinds, or None. A kind is align, finetune, noalign or scratch, or one of
    one base: align-tiny. The files' own facts decide, not the folders' names: dit-xl is not dit-xl-512."""
    def fits(file):
        info = read_config(file)
        kind, base = info.get("kind", ""), Path(info.get("base", "")).name
        return kind in kinds or f"{kind}-{base}" in kinds
    files = [f for f in Path(root).glob("*/model.safetensors") if fits(f)]
    return max(files, key=lambda f: f.stat().st_mtime).parent if files else None


def export(model, ae, folder: Path):
    """Write what the diffusers library reads: transformer/ and vae/ with everything merged; a LoRA once more, by itself."""
    if lora_state(model):
        save_peft(model, folder / "lora")
    export_diffusers(merge_lora(model), folder)
    export_autoencoder(ae, folder)
    print(f"wrote {', '.join(str(d) + '/' for d in sorted(folder.iterdir()) if d.is_dir())}")


def ae_folder(base: str, weights: str | None) -> Path | None:
    """The pipeline folder that a preset came from, if it did: its own autoencoder lies there, with its scale."""
    spec = BASES[base].weights if base in BASES else None
    if weights and spec:
        return Path(weights) if (Path(weights) / "vae").is_dir() else None
    if spec and spec.endswith(("/", "::")):
        return find_weights(f"{base}'s autoencoder", spec, None, ("vae",), "--base-ae-weights")
