"""Files in and out: published layouts, strict and safe loading, the hub, runs, export, LoRA of diffusers."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch

import checkpoints
from autoencoder import AUTOENCODERS, DCAE, KLVAE, DCAEConfig, KLConfig, build_autoencoder
from checkpoints import (
    TABLES, build, config_dict, config_from_dict, config_from_shapes, detect_layout, diffusers_ae_config,
    export, export_autoencoder, export_diffusers, find_weights, load_autoencoder, load_base, load_part,
    load_peft, load_run, load_weights, lora_from_peft, lora_to_peft, map_keys, match_config, newest_run,
    read_base_config, read_config, read_tensors, save_peft, unmap_keys, write_tensors)
from helpers import (  # noqa: F401 (tiny_base is a fixture)
    DCAE_STYLES, DEEP_DIT, TINIES, TINY_DIT, TINY_FLUX, TINY_KL, TINY_SANA, assert_near, deep_model, digest,
    fixed_forward, manifest, on_meta, parity, parity_cases, random_condition, relative_error, scramble,
    tiny_base, tiny_model)
from lora import add_lora, lora_layers, lora_state, merge_lora
from model import BASES, FAMILIES, DiT, Flux, FluxConfig, Sana, Text, to_deep_latent, to_deep_model


def below(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin so, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def one_line_error(error, *parts: str):
    """The error is one line that contains all of these."""
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def randomize_b(model):
    """Random B, which starts at zero: the LoRA does something."""
    g = torch.Generator().manual_seed(1)
    for key, value in lora_state(model).items():
        if key.endswith(".B"):
            value.normal_(std=0.05, generator=g)
    return model


def sana_original(model) -> dict:
    """A state dict of ours as NVlabs publish it."""
    left_out = {"pos_embed": torch.zeros(1, 4, 64), "y_embedder.y_embedding": torch.zeros(5, 24)}
    return left_out | unmap_keys(model.state_dict(), TABLES[Sana]["original"])


# ---- published files, by the lists of their keys ---------------------------------------------------

PUBLISHED = {
    "dit-xl-2-256.original": "dit-xl",
    "dit-xl-2-256.diffusers": "dit-xl",
    "dit-xl-2-512.original": "dit-xl-512",
    "dit-xl-2-512.diffusers": "dit-xl-512",
    "flux1-krea-dev.original": "flux-krea",
    "flux1-krea-dev.diffusers": "flux-dev",
    "dc-gen-flux-1k.diffusers": "dc-gen-flux-1k",
    "dc-gen-flux-4k.diffusers": "dc-gen-flux-4k",
    "sana1.5-1.6b.original": "sana-1.6b",
    "sana1.5-1.6b.diffusers": "sana-1.6b",
    "sana1.5-4.8b.original": "sana-4.8b",
    "sana1.5-4.8b.diffusers": "sana-4.8b",
}


def published(name: str):
    """A published file of empty tensors -> its tensors, its config.json, the configuration that fits it."""
    info = manifest(name)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in info["tensors"].items()}
    return tensors, info.get("config", {}), BASES[PUBLISHED[name]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_file_is_used_once_and_every_target_filled(name):
    tensors, stated, cfg = published(name)
    family, layout = detect_layout(tensors)
    assert (family, layout) == (FAMILIES[type(cfg)], name.split(".")[-1])
    table = TABLES[family][layout]
    model = on_meta(family, cfg)
    assert map_keys(model, tensors, table).keys() == model.state_dict().keys()
    # and its shapes tell the configuration
    found = config_from_shapes(family, table, tensors, stated if layout == "diffusers" else {})
    match_config(cfg, family, found)
    with pytest.raises(ValueError, match=rf"depth {cfg.depth} \(not 7\).*{PUBLISHED[name]}"):
        match_config(replace(cfg, depth=7), family, found)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("diffusers")])
def test_a_table_read_backwards_gives_the_published_names(name):
    tensors, _, cfg = published(name)
    family, _ = detect_layout(tensors)
    table = TABLES[family]["diffusers"]
    back = unmap_keys(map_keys(on_meta(family, cfg), tensors, table), table)
    repeated = r"transformer_blocks\.([1-9]|\d\d)\.norm1\.emb\..*"      # DiT: the embedders of block 0
    want = {key: value.shape for key, value in tensors.items() if not re.fullmatch(repeated, key)}
    assert {key: value.shape for key, value in back.items()} == want


# ---- strict loading --------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value, error", [
    ("blocks.1.attn.qkv.bias", None, "1 missing: blocks.1.attn.qkv.bias"),
    ("blocks.7.extra", torch.zeros(1), "1 unexpected: blocks.7.extra"),
    ("x_embedder.proj.bias", torch.zeros(47), "x_embedder.proj.bias: file (47,), model (48,)"),
    ("pos_embed", torch.zeros(1, 16, 48), "1 unexpected: pos_embed"),
])
def test_a_wrong_key_is_an_error_that_names_it(key, value, error):
    tensors = DiT(TINY_DIT).state_dict()
    load_weights(DiT(TINY_DIT), tensors, TABLES[DiT]["ours"])
    tensors.pop(key, None)
    if value is not None:
        tensors[key] = value
    with pytest.raises(ValueError, match=re.escape(error)):
        load_weights(DiT(TINY_DIT), tensors, TABLES[DiT]["ours"])


def test_the_old_grids_positions_are_left_out_in_the_layout_that_has_them():
    tensors = DiT(TINY_DIT).state_dict() | {"pos_embed": torch.zeros(1, 16, 48)}
    load_weights(DiT(TINY_DIT), tensors, TABLES[DiT][detect_layout(tensors)[1]])


@pytest.mark.parametrize("cfg, file, parts", [
    (TINY_FLUX, "sana", ("a Sana with", "a Flux of another", "the preset that fits them is fits")),
    (replace(TINY_SANA, depth=3), "sana", ("depth 2 (not 3)", "fits")),
    (to_deep_latent(TINY_FLUX, DCAE_STYLES["in"]), "flux", ("token_channels 16 (not 8)", "no preset fits")),
    (TINY_DIT, "flux", ("a Flux with hidden_size 48",)),
    (TINY_FLUX, "ae", ("not the weights of a DiT, FLUX or SANA", "--ae-weights")),
    (TINY_FLUX, "part", ("1 missing: double_blocks.1.txt_attn.norm.key_norm.scale",)),
    (TINY_FLUX, "headless", ("img_in.weight is missing, and every Flux has it",)),
])
def test_a_file_of_another_model_is_one_error_that_tells_what_it_is_and_what_fits(
        cfg, file, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(BASES, "fits", TINY_SANA)
    tensors = tiny_model("flux").state_dict()
    if file == "sana":
        tensors = sana_original(tiny_model("sana"))
    elif file == "ae":
        tensors = KLVAE(TINY_KL).state_dict()
    elif file == "part":
        tensors.pop("double_blocks.1.txt_attn.norm.key_norm.scale")
    elif file == "headless":
        tensors.pop("img_in.weight")
    write_tensors(tmp_path / f"{file}.safetensors", tensors)
    with pytest.raises(ValueError) as e:
        build(cfg, tmp_path / f"{file}.safetensors")
    one_line_error(e, f"{file}.safetensors: ", *parts)


def test_a_built_model_is_float32_whatever_the_file_holds(tmp_path):
    """bf16 parameters round small updates away; the shipped files are bf16."""
    write_tensors(tmp_path / "w.safetensors", DiT(TINY_DIT).bfloat16().state_dict())
    assert {p.dtype for p in build(TINY_DIT, tmp_path / "w.safetensors").parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype, clamp", [
    (torch.float16, True),
    (torch.bfloat16, False),
    (torch.float32, False),
])
def test_sana_trained_in_fp16_is_cut_to_its_range_and_others_are_not(dtype, clamp, tmp_path):
    """Its activations pass 65504, and the weights count on the cut whatever the arithmetic is now."""
    write_tensors(tmp_path / "w.safetensors", tiny_model("sana").to(dtype).state_dict())
    model = build(TINY_SANA, tmp_path / "w.safetensors")
    model.blocks[0].attn.proj.weight.mul_(1e6)
    assert model.cfg.clamp == clamp
    assert (model.blocks[0].attn(torch.randn(1, 6, 64)).abs().max() <= 65504) == clamp


def test_a_configuration_survives_json():
    for cfg in (*BASES.values(), DEEP_DIT):
        assert config_from_dict(json.loads(json.dumps(config_dict(cfg)))) == cfg


# ---- safe reading, atomic writing ------------------------------------------------------------------

class Harmful:
    """Writes a file called executed when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.mark.parametrize("name, content, error", [
    ("none.safetensors", None, "no such weight file"),
    ("half.safetensors", "half", "not a whole safetensors file"),
    ("empty.safetensors", b"", "not a whole safetensors file"),
    ("huge.safetensors", b"\xff" * 16, "not a whole safetensors file"),
    ("pointer.safetensors", POINTER, "git lfs pull"),
    ("pointer.bin", POINTER, "git lfs pull"),
    ("empty.pt", b"", "damaged"),
    ("harmful.pt", saved({"model": Harmful()}), "never run here"),
    ("pickle.bin", pickle.dumps(Harmful()), "never run here"),
    ("list.pt", saved([torch.zeros(3)]), "state dict"),
    ("model-00001-of-00002.safetensors", b"", "one part of several"),
])
def test_a_file_that_is_not_weights_is_one_clear_error(name, content, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "half":
        write_tensors(name, {"a": torch.randn(100, 100)})
        content = Path(name).read_bytes()[:2000]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        read_tensors(name)
    one_line_error(e, name, error)
    assert not Path("executed").exists()


W = {"x": torch.arange(3.0)}
OTHER = {"x": torch.zeros(3)}


@pytest.mark.parametrize("state", [
    W,
    {"state_dict": W, "epoch": 3},
    {"model_state_dict": W, "step": 3},
    {"model": OTHER, "ema": W, "opt": {}},
    {"module.x": W["x"]},
    {"state_dict": {"model.diffusion_model.x": W["x"]}},
    # DC-Gen's trainer: averages of several decays, the slowest of which counts
    {"model_state_dict": {"0.x": W["x"]}, "ema_model_state_dict": {}},
    {"model_state_dict": OTHER, "ema_model_state_dict": {0.9: OTHER, 0.999: {"0.x": W["x"]}}},
    {"model_state_dict": OTHER, "ema": {"0.999": {"0.x": W["x"]}}, "optimizer_state_dict": {"state": {}}},
])
def test_wrappers_of_known_trainers_are_taken_off(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    assert read_tensors(tmp_path / "w.pt")["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("pad", range(4))
def test_weights_with_an_odd_header_load(pad, tmp_path):
    """Writers that do not pad their header leave the tensors at odd addresses."""
    values = torch.arange(6, dtype=torch.float32)
    header = b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}' + b" " * pad
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    found = read_tensors(file)["a"]
    assert torch.equal(found, values.view(2, 3)) and found.data_ptr() % 4 == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_what_is_loaded_as_it_is_stays_the_files_own_memory(tmp_path):
    """Twelve billion weights must not be in memory twice."""
    model = tiny_model("flux").bfloat16()
    file = tmp_path / "w.safetensors"
    write_tensors(file, model.state_dict())
    before = file.read_bytes()
    loaded = build(TINY_FLUX, file, dtype=None)
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if file.name in line:
            start, end = line.split()[0].split("-")
            spans.append(range(int(start, 16), int(end, 16)))
    assert all(any(value.data_ptr() in span for span in spans) for value in loaded.state_dict().values())
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    loaded.img_in.weight.zero_()
    assert file.read_bytes() == before, "the map must be private"


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    shared = torch.randn(4, 6)
    tensors = {"a": shared, "view": shared[1:], "turned": shared.t()}
    write_tensors(file, tensors, {"scale": 0.5})
    assert read_config(file) == {"scale": 0.5} and digest(read_tensors(file)) == digest(tensors)
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError):
        write_tensors(file, {"a": torch.zeros(1)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# ---- shards and their index ------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path):
    """A FLUX in several shards -> its folder, the name of the first shard, the text of the index."""
    export_diffusers(tiny_model("flux"), tmp_path, shard_bytes=100_000)
    folder = tmp_path / "transformer"
    index = (folder / INDEX).read_text()
    return SimpleNamespace(folder=folder, index=index, first=min(json.loads(index)["weight_map"].values()))


@pytest.mark.parametrize("bait", [
    "../{}", "{folder}/../{}", r"..\\{}", "C:{}", "./{}", "config.json", ".hidden.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(bait, shards):
    outside = shards.folder.parent / shards.first
    outside.write_bytes((shards.folder / shards.first).read_bytes())
    bait = bait.format(shards.first, folder=shards.folder)
    (shards.folder / INDEX).write_text(shards.index.replace(shards.first, bait, 1))
    with pytest.raises(ValueError, match="beside the index"):
        read_tensors(shards.folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_is_none_is_one_clear_error(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="not an index"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("content, error", [
    ("half", "not a whole safetensors"),
    (POINTER, "git lfs pull"),
    (None, "lacks 1 of the"),
])
def test_a_damaged_or_missing_shard_is_one_clear_error(content, error, shards):
    file = shards.folder / shards.first
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:9000] if content == "half" else content)
    with pytest.raises(ValueError) as e:
        build(TINY_FLUX, shards.folder.parent)
    one_line_error(e, shards.first, error)


def test_a_folder_without_weights_or_with_a_broken_config_is_one_clear_error(shards, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        build(TINY_FLUX, tmp_path / "none")
    with pytest.raises(ValueError, match="one part of several"):
        build(TINY_FLUX, shards.folder / shards.first)
    (shards.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        build(TINY_FLUX, tmp_path)


# ---- the hub: a stand-in server on the loopback ----------------------------------------------------

def blob(seed: int, size: int = 999) -> bytes:
    return np.random.default_rng(seed).bytes(size)


COMMIT = "c" * 40
REPOS = {
    "a/b": {
        "w.safetensors": blob(0),
        "cut.safetensors": blob(1, 24 * 10**6),                      # the client writes 10**7 bytes at a time
        "short.safetensors": blob(2),
    },
    "a/gated": {"w.safetensors": b"w"},
    "a/pipe": {
        "sub/transformer/config.json": b"{}",
        "sub/transformer/model-00001-of-00002.safetensors": blob(3),
        "sub/transformer/model.fp16.safetensors": b"no",
        "sub/transformer/model.bin": b"no",
        "sub/vae/config.json": b"{}",
        "sub/scheduler/scheduler_config.json": b"no",
        "sub/tokenizer/spiece.model": b"s",
        "other.safetensors": b"no",
    },
}
CALLS = {
    "whole": ("m", "a/b::w.safetensors"),
    "cut": ("m", "a/b::cut.safetensors"),
    "none": ("m", "a/b::none.safetensors"),
    "short": ("m", "a/b::short.safetensors"),
    "gated": ("m", "a/gated::w.safetensors"),
    "folder": ("m", "a/pipe::sub/", None, ["transformer", "tokenizer"]),
    "part": ("m", "a/pipe::sub/", None, ["unet"]),
    "new": ("m", "new/repo::", None, ["vae"]),
}
FIND = """
import json, sys
from checkpoints import find_weights
for args in json.loads(sys.argv[1]):
    try:
        print("RESULT", json.dumps(str(find_weights(*args))))
    except ValueError as e:
        print("RESULT", json.dumps(f"error: {e}"))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves REPOS as the hub does. cut.safetensors breaks off in the middle once, short.safetensors always
    ends early, a/gated is open to the token hf_member only. `requests` lists method, path, headers."""
    protocol_version = "HTTP/1.1"
    requests = []

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", sent=None, **headers):
        """sent: only so many bytes of the body, then the connection breaks."""
        self.send_response(status)
        for key, value in dict(Content_Length=len(body), X_Repo_Commit=COMMIT, **headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def do_GET(self):
        where = unquote(urlparse(self.path).path)
        gets_before = [path for method, path, _ in self.requests if method == "GET"]
        self.requests.append((self.command, where, self.headers))
        listing = re.match(r"/api/models/(\w+/\w+)/(revision|tree)/", where)
        if listing:
            files = REPOS[listing[1]]
            answer = [dict(type="file", path=name, size=len(files[name]), oid="0" * 40) for name in files]
            if listing[2] == "revision":
                answer = dict(id=listing[1], sha=COMMIT, siblings=[dict(rfilename=name) for name in files])
            return self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        repo, file = re.match(r"/(\w+/\w+)/(?:resolve/\w+/)?(.+)", where).groups()
        body = REPOS.get(repo, {}).get(file)
        tag = f'"{file.split("/")[-1]}"'
        if repo == "a/gated" and self.headers["Authorization"] != "Bearer hf_member":
            self.reply(403, X_Error_Code="GatedRepo")
        elif body is None:
            self.reply(404, X_Error_Code="EntryNotFound")
        elif "short" in file and self.command == "GET":
            self.reply(200, body[:500], ETag=tag)
        elif "cut" in file and self.command == "GET" and where not in gets_before:
            self.reply(200, body, len(body) // 2, ETag=tag)
        else:
            start = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
            part = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206 if start else 200, body[start:], Content_Range=part, ETag=tag)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What find_weights gave for CALLS: as a stranger, then as a member, offline, and with a dead hub."""
    pytest.importorskip("huggingface_hub")
    home = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    usual = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    usual |= {"HF_HOME": str(home), "HF_ENDPOINT": url}
    usual |= {"HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}

    def find(*names, **env):
        """In a process of its own: the hub's library reads its environment when it is imported."""
        Hub.requests.clear()
        calls = json.dumps([CALLS[name] for name in names])
        done = subprocess.run(
            [sys.executable, "-c", FIND, calls], cwd=checkpoints.HERE, env=usual | env, capture_output=True,
            text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
        output = done.stdout + done.stderr
        return SimpleNamespace(results=dict(zip(names, found)), output=output, requests=[*Hub.requests])

    try:
        stranger = find("whole", "cut", "none", "short", "gated", "folder", "part", HF_TOKEN="hf_secret")
        member = find("whole", "cut", "gated", "folder", HF_TOKEN="hf_member")
        offline = find("whole", "none", "folder", "new", HF_HUB_OFFLINE="1")
    finally:
        server.shutdown()
        server.server_close()
    dead = find("whole", "new")
    return SimpleNamespace(home=home, url=url, stranger=stranger, member=member, offline=offline, dead=dead)


def test_a_file_of_the_hub_is_fetched_whole_and_a_broken_download_goes_on_at_its_byte(hub):
    for name in ("whole", "cut"):
        file = Path(hub.stranger.results[name])
        assert file.read_bytes() == REPOS["a/b"][file.name]
    gets = [headers for method, path, headers in hub.stranger.requests if method == "GET" and "cut" in path]
    ranges = [headers["Range"] for headers in gets]
    assert len(ranges) == 2 and ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 12 * 10**6


@pytest.mark.parametrize("name, parts", [
    ("none", ("error: m wants none.safetensors of a/b; it is not in ", "({url}: RemoteEntryNotFoundError)\n",
              "\nWith it at hand, give --weights PATH")),
    ("short", ("could not be downloaded", "OSError")),
    ("gated", ("accept their licence: do that at {url}/a/gated, and set HF_TOKEN",)),
    ("part", ("have no unet\nWith it at hand, give --weights DIR",)),
])
def test_what_the_hub_does_not_give_is_an_error_of_two_lines(name, parts, hub):
    error = hub.stranger.results[name]
    assert error.count("\n") == 1
    for part in parts:
        assert part.format(url=hub.url) in error


def test_a_short_download_is_not_kept(hub):
    assert {file.suffix for file in hub.home.rglob("*short*")} <= {".lock"}


def test_of_a_folder_only_the_named_parts_are_fetched_in_one_precision(hub):
    folder = Path(hub.stranger.results["folder"])
    assert folder.name == "sub"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "tokenizer/spiece.model", "transformer/config.json", "transformer/model-00001-of-00002.safetensors"]


def test_the_token_is_sent_and_never_printed(hub):
    tokens = {headers["Authorization"] for _, path, headers in hub.stranger.requests if "a/" in path}
    assert tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in hub.stranger.output


def test_a_member_gets_a_gated_file_and_nothing_is_fetched_twice(hub):
    again = hub.member.results
    assert Path(again["gated"]).read_bytes() == b"w"
    assert all(again[name] == hub.stranger.results[name] for name in ("whole", "cut", "folder"))
    fetched = [path for method, path, _ in hub.member.requests if method == "GET" and "/resolve/" in path]
    assert [path for path in fetched if "gated" not in path] == []


def test_offline_the_cache_is_used_and_nothing_is_requested(hub):
    for name in ("whole", "folder"):
        assert hub.offline.results[name] == hub.stranger.results[name]
    for name in ("none", "new"):
        assert "(HF_HUB_OFFLINE is set)\n" in hub.offline.results[name]
    assert hub.offline.requests == []


def test_without_a_network_the_cache_is_used_and_the_rest_is_an_error(hub):
    assert hub.dead.results["whole"] == hub.stranger.results["whole"]
    assert (f"m wants {{vae}} of new/repo; it is not in {hub.home / 'hub'} and could not be downloaded "
            f"({hub.url}: LocalEntryNotFoundError)\nWith it") in hub.dead.results["new"]


def test_without_the_hubs_package_the_error_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = (r"m wants x/\{transformer,vae\} of a/b, and downloading needs: pip install huggingface_hub\n"
             "With it at hand, give --weights DIR")
    with pytest.raises(ValueError, match=error):
        find_weights("m", "a/b::x/", parts=("transformer", "vae"))


@pytest.mark.parametrize("args, error", [
    (("dit-s", None), "has no published weights"),
    (("tiny", "weights/none.safetensors"), "should come with this repository"),
    (("dit-xl", "a::b", "gone/none"), "--weights gone/none: no such file"),
])
def test_weights_that_cannot_be_found_are_one_clear_error(args, error):
    with pytest.raises(ValueError) as e:
        find_weights(*args)
    one_line_error(e, error)


# ---- export to diffusers ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", TINIES)
def test_an_exported_model_loads_again(name, tmp_path):
    model = tiny_model(name)
    export_diffusers(model, tmp_path, shard_bytes=100_000)
    folder = tmp_path / "transformer"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    for place in (tmp_path, folder, folder / INDEX):
        assert digest(build(model.cfg, place).state_dict()) == digest(model.state_dict())


def test_the_config_of_a_folder_tells_what_no_shape_shows(tmp_path):
    export_diffusers(tiny_model("dit"), tmp_path)
    with pytest.raises(ValueError, match=r"num_heads 4 \(not 8\)"):
        build(replace(TINY_DIT, num_heads=8), tmp_path)


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = tiny_model("dit")
    export_diffusers(model, tmp_path)
    with pytest.raises(ValueError, match="holds a model already"):
        export_diffusers(model, tmp_path)
    with pytest.raises(ValueError, match="positions by ones, this one's go by 2"):
        export_diffusers(DiT(replace(TINY_DIT, pos_step=2.0)), tmp_path / "spread")
    add_lora(model, 2)
    with pytest.raises(ValueError, match="merge it before the export"):
        export_diffusers(model, tmp_path / "lora")


def test_a_model_with_a_lora_is_exported_merged_and_its_lora_by_itself(tmp_path, capsys):
    model = tiny_model("flux")
    add_lora(model, 2)
    want = fixed_forward(randomize_b(model))
    export(model, KLVAE(TINY_KL), tmp_path)
    assert capsys.readouterr().out == f"wrote {tmp_path}/lora/, {tmp_path}/transformer/, {tmp_path}/vae/\n"
    assert_near(fixed_forward(build(TINY_FLUX, tmp_path)), want)
    again = tiny_model("flux")
    load_peft(again, tmp_path / "lora")
    assert_near(fixed_forward(again), want)


def diffusers_class(diffusers, cfg):
    names = {
        "DiTConfig": "DiTTransformer2DModel",
        "FluxConfig": "FluxTransformer2DModel",
        "SanaConfig": "SanaTransformer2DModel",
        "KLConfig": "AutoencoderKL",
        "DCAEConfig": "AutoencoderDC",
    }
    return getattr(diffusers, names[type(cfg).__name__])


def load_in_diffusers(diffusers, cfg, folder: Path, part: str):
    """The model that stock diffusers loads from an exported folder, every key used."""
    cls = diffusers_class(diffusers, cfg)
    model, info = cls.from_pretrained(folder, subfolder=part, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("channels, patch", [(4, 2), (12, 1)])
@pytest.mark.parametrize("name", TINIES)
def test_stock_diffusers_loads_an_exported_model_with_equal_outputs(name, channels, patch, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(TINIES[name], in_channels=channels, patch_size=patch)
    model = scramble(FAMILIES[type(cfg)](cfg))
    export_diffusers(model, tmp_path, shard_bytes=200_000)
    theirs = load_in_diffusers(diffusers, cfg, tmp_path, "transformer")
    x = torch.randn(2, channels, 8, 8)
    y = random_condition(cfg)
    tolerance = 1e-5
    if name == "flux":
        step = torch.tensor([0.25, 0.875])
        side = torch.arange(8.0 / patch)
        ids = torch.cartesian_prod(torch.zeros(1), side, side)
        out = theirs(model.patchify(x), y.tokens, y.pooled, step, ids, torch.zeros(5, 3), y.guidance).sample
        want = model.unpatchify(out, (8, 8))
    elif name == "sana":
        step = torch.tensor([250.0, 875.0])
        want = theirs(x, y.tokens, step, encoder_attention_mask=y.mask).sample
        tolerance = 2e-5                                             # another epsilon in cross-attention
    else:
        step = torch.tensor([250, 875])                              # diffusers' DiT wants whole steps
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0       # 128, as trained
        want = theirs(x, timestep=step, class_labels=y).sample
    assert_near(model.forward_native(x, step, y), want, tolerance)


ALL_AUTOENCODERS = [TINY_KL, replace(TINY_KL, name="test-kl-quant", quant_conv=True), *DCAE_STYLES.values()]


@pytest.mark.parametrize("cfg", ALL_AUTOENCODERS, ids=[cfg.name for cfg in ALL_AUTOENCODERS])
def test_stock_diffusers_loads_an_exported_autoencoder_with_equal_outputs(cfg, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(cfg, scale=0.61)
    ae = scramble(build_autoencoder(cfg))
    export_autoencoder(ae, tmp_path)
    theirs = load_in_diffusers(diffusers, cfg, tmp_path, "vae")
    assert theirs.config.scaling_factor == 0.61
    x = torch.randn(1, 3, 4 * cfg.f, 2 * cfg.f)
    z = torch.randn(1, cfg.channels, 2, 3)
    encoded = theirs.encode(x)
    latent = encoded.latent_dist.mean if isinstance(cfg, KLConfig) else encoded.latent
    assert_near(ae.moments(x)[0], latent)
    assert_near(ae.decode_raw(z), theirs.decode(z).sample)
    # and back: the folder's config.json counts; DC-Gen's releases state their scale nowhere else
    monkeypatch.setitem(AUTOENCODERS, cfg.name, replace(cfg, scale=99.0))
    again = load_autoencoder(cfg.name, tmp_path)
    assert diffusers_ae_config(again.cfg) == diffusers_ae_config(cfg)
    assert digest(again.state_dict()) == digest(ae.state_dict())


@pytest.mark.parametrize("other, error", [
    (replace(DCAE_STYLES["in"], channels=16), "f8c8, and preset is f8c16"),
    (TINY_KL, "AutoencoderDC, and"),
])
def test_an_autoencoder_of_another_latent_space_is_refused(other, error, tmp_path, monkeypatch):
    export_autoencoder(DCAE(DCAE_STYLES["in"]), tmp_path)
    monkeypatch.setitem(AUTOENCODERS, "preset", replace(other, name="preset"))
    with pytest.raises(ValueError, match=error):
        load_autoencoder("preset", tmp_path)


def flux_config(config: dict) -> FluxConfig:
    """Our configuration for one of diffusers', one cell a token."""
    heads = config["num_attention_heads"]
    return replace(
        TINY_FLUX,
        in_channels=config["in_channels"],
        patch_size=1,
        hidden_size=heads * config["attention_head_dim"],
        depth=config["num_layers"],
        depth_single=config["num_single_layers"],
        num_heads=heads,
        axes_dim=tuple(config["axes_dims_rope"]),
        context_in_dim=config["joint_attention_dim"],
        vec_in_dim=config["pooled_projection_dim"],
        guidance_embed=config["guidance_embeds"])


@pytest.mark.parametrize("schedule", ["flowmatch", "flux2"])
@pytest.mark.parametrize("case", parity_cases("dcgen_pipeline"))
def test_a_dc_gen_pipeline_folder_draws_what_the_authors_draw(case, schedule, tmp_path, monkeypatch):
    """Transformer and autoencoder from one diffusers folder, each with its config.json."""
    case = parity(case)
    for part, name in (("transformer", "FluxTransformer2DModel"), ("vae", "AutoencoderDC")):
        write_tensors(tmp_path / part / "model.safetensors", below(case.weights, part + "."))
        (tmp_path / part / "config.json").write_text(json.dumps({**case.config[part], "_class_name": name}))
    vae = case.config["vae"]
    preset = DCAEConfig("any", vae["latent_channels"], None, tuple(vae["encoder_block_out_channels"]))
    monkeypatch.setitem(AUTOENCODERS, "any", preset)
    model = build(flux_config(case.config["transformer"]), tmp_path)
    ae = load_autoencoder("any", tmp_path)

    x = case.inputs["noise"]
    guidance = torch.full((len(x),), case.config["guidance_scale"])
    text = Text(case.inputs["prompt_embeds"], None, case.inputs["pooled_prompt_embeds"], guidance)
    times = 1 - case.outputs[f"{schedule}_sigmas"].double()
    steps = []
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:]):
            x = x + (t_next - t).float() * model(x, t.expand(len(x)), text)
            steps.append(model.patchify(x))
        assert_near(torch.stack(steps), case.outputs[f"{schedule}_steps"], 1e-4)
        image = (ae.decode(x) / 2 + 0.5).clamp(0, 1)
    assert_near(image, case.outputs[f"{schedule}_image"], 1e-4)


# ---- runs ------------------------------------------------------------------------------------------

Z = torch.randn(2, 32, 2, 2, generator=torch.Generator().manual_seed(0))
Z_INPUTS = (Z, torch.tensor([0.3, 0.8]), torch.tensor([1, 8]))
CLASSES = ["circle", "square"]


def is_trained(key: str) -> bool:
    return key.startswith((DiT.EMBEDDER, DiT.HEAD)) or key.endswith((".A", ".B"))


def write_run(folder: str, net, keys=None, **info) -> Path:
    """Write a run's file with these tensors, by default what stages 1 and 2 train and the LoRA."""
    state = net.state_dict()
    keys = [key for key in state if is_trained(key)] if keys is None else keys
    usual = dict(base="test", base_weights=None, kind="align", model=config_dict(net.cfg), classes=CLASSES)
    run = Path("runs") / folder
    write_tensors(run / "model.safetensors", {key: state[key] for key in keys}, usual | info)
    return run


def tuned_model(base):
    model = deep_model(base, 2)
    add_lora(model, rank=2, alpha=3)
    return randomize_b(model)


LORA = dict(kind="finetune", lora=dict(rank=2, alpha=3))


@pytest.mark.parametrize("kind", ["aligned", "lora", "full"])
def test_a_run_loads_as_the_model_that_was_saved(kind, tiny_base):
    if kind == "aligned":
        model = deep_model(tiny_base)
        run = write_run("align-test-1", model)
    elif kind == "lora":
        model = tuned_model(tiny_base)
        run = write_run("finetune-test-1", model, **LORA)
    else:
        model = scramble(DiT(DEEP_DIT), seed=5)
        run = write_run("finetune-test-2", model, [*model.state_dict()], kind="finetune")
    found, info = load_run(run)
    assert digest(found.state_dict()) == digest(model.state_dict())
    assert found.cfg == model.cfg and not found.training
    assert info["base"] == "test" and info["file"] == str(run / "model.safetensors")
    # memory of another alignment may round differently
    assert_near(found(*Z_INPUTS), model(*Z_INPUTS), 1e-6)


def test_a_finished_run_is_a_base_with_its_lora_merged(tiny_base):
    tuned = tuned_model(tiny_base)
    run = write_run("finetune-test-1", tuned, **LORA)
    base, info = load_base(str(run))
    assert_near(base(*Z_INPUTS), tuned(*Z_INPUTS), 1e-5)
    assert not lora_state(base)
    assert info == dict(classes=CLASSES, base=str(run), base_weights=None, base_print=info["base_print"])
    again = write_run("align-next-1", deep_model(base, 9), **info)   # and the next stage starts from it
    assert relative_error(load_run(again)[0](*Z_INPUTS), tuned(*Z_INPUTS)) > 1e-3


def test_a_run_keeps_how_it_is_drawn_with(tiny_base):
    cfg = replace(DEEP_DIT, sampling=replace(DEEP_DIT.sampling, num_steps=7, shift="flux2"))
    model = to_deep_model(tiny_base, cfg)
    run = write_run("align-test-1", model)
    assert read_base_config(str(run))[0].sampling == cfg.sampling
    assert load_base(str(run))[0].cfg == cfg


def test_the_moving_average_is_taken_unless_it_is_not_wanted(tiny_base):
    run = write_run("align-test-1", deep_model(tiny_base, 1))
    state = deep_model(tiny_base, 2).state_dict()
    average = {key: value for key, value in state.items() if is_trained(key)}
    write_tensors(run / "ema.safetensors", average, read_config(run / "model.safetensors"))

    def embedder(path=run, **settings):
        return load_run(path, **settings)[0].x_embedder.proj.weight

    assert torch.equal(embedder(), average["x_embedder.proj.weight"])
    assert not torch.equal(embedder(ema=False), embedder())
    assert torch.equal(embedder(run / "model.safetensors"), embedder(ema=False))


@pytest.mark.parametrize("key, value, error", [
    ("x_embedder.proj.bias", None, "1 tensors missing that no base has: x_embedder.proj.bias"),
    ("final_layer.linear.weight", None, "1 tensors missing that no base has: final_layer.linear.weight"),
    ("blocks.1.mlp.fc2.B", None, "1 tensors missing that no base has: blocks.1.mlp.fc2.B"),
    ("blocks.0.attn.qkv.A", None, "1 tensors missing that no base has: blocks.0.attn.qkv.A"),
    ("blocks.9.x", torch.zeros(1), "does not have in that shape: blocks.9.x"),
    ("x_embedder.proj.bias", torch.zeros(3), "does not have in that shape: x_embedder.proj.bias"),
])
def test_a_part_of_a_model_is_loaded_strictly(key, value, error):
    """A LoRA without its embedder and head means nothing in the new latent space, and draws rubbish."""
    model = tuned_model(tiny_model("dit"))
    part = {name: tensor for name, tensor in model.state_dict().items() if is_trained(name)}
    load_part(model, part)
    part.pop(key, None)
    if value is not None:
        part[key] = value
    with pytest.raises(ValueError, match=error):
        load_part(model, part)


def test_a_run_finds_its_base_and_refuses_another(tiny_base, tmp_path):
    _, info = load_base("test")
    run = write_run("align-test-1", to_deep_model(tiny_base, DEEP_DIT), **info)
    load_run(run)
    load_run(run, dtype=torch.bfloat16)                              # base_print is of the file's own numbers
    moved = tmp_path / "elsewhere.safetensors"
    Path("base.safetensors").rename(moved)
    with pytest.raises(ValueError, match="should come with this repository"):
        load_run(run)
    load_run(run, base_weights=str(moved))
    write_tensors("base.safetensors", scramble(DiT(TINY_DIT), seed=3).state_dict())
    with pytest.raises(ValueError, match="was trained from another test than the one found now"):
        load_run(run)


@pytest.mark.parametrize("load, path, error", [
    (load_base, "dit-xll", "--base dit-xll: not a preset .tiny, dit-xl, .*not the folder of a run"),
    (load_run, "runs/align-test-9", "align-test-9 holds no finished run"),
    (load_run, "runs/gone", "gone: no such weight file"),
    (load_run, "base.safetensors", "is not a run's file; an official weight file goes to --weights"),
])
def test_a_model_that_cannot_be_found_is_one_clear_error(load, path, error, tiny_base):
    Path("runs/align-test-9").mkdir(parents=True)
    with pytest.raises(ValueError, match=error):
        load(path)


def test_a_run_of_an_earlier_version_is_one_clear_error(tiny_base):
    model = deep_model(tiny_base)
    old = config_dict(model.cfg)
    del old["sampling"]
    run = write_run("align-test-1", model, model=old)
    for load in (load_run, load_base, read_base_config):
        with pytest.raises(ValueError) as e:
            load(str(run))
        one_line_error(e, "model.safetensors: ", "earlier version of this code; train it again")


def test_the_newest_run_is_found_by_what_its_file_tells(tiny_base):
    """dit-xl-512 is a base of its own, and no run of dit-xl: the folder names of the two look alike."""
    model = deep_model(tiny_base)
    assert newest_run() is None
    runs = {
        "align-test-1": {},
        "mine": dict(kind="finetune"),
        "align-test-512-1": dict(base="test-512"),
        "noalign-test-1": dict(kind="noalign"),
    }
    for i, (folder, info) in enumerate(runs.items()):
        file = write_run(folder, model, **info) / "model.safetensors"
        os.utime(file, (1e9 + i, 1e9 + i))
    Path("runs/align-test-7").mkdir()                                # unfinished
    assert newest_run().name == "align-test-512-1"
    newest = {"align-test": "align-test-1", "align": "align-test-512-1", "finetune-test": "mine"}
    for kind, folder in newest.items():
        assert newest_run(kinds=(kind,)).name == folder
    assert newest_run(kinds=("scratch",)) is None
    os.utime("runs/align-test-1/model.safetensors", (2e9, 2e9))
    assert newest_run().name == "align-test-1"


# ---- LoRA of diffusers and PEFT --------------------------------------------------------------------

@pytest.fixture(params=parity_cases("flux_lora"))
def flux_lora(request):
    """diffusers' FLUX and a LoRA -> the stored case, the model, the LoRA, a function that runs the model."""
    case = parity(request.param)
    model = load_weights(on_meta(Flux, flux_config(case.config)), case.weights, TABLES[Flux]["diffusers"])
    x = case.inputs
    grid = (case.config["grid_height"], case.config["grid_width"])

    def run():
        text = Text(x["encoder_hidden_states"], None, x["pooled_projections"], x["guidance"])
        z = model.unpatchify(x["hidden_states"], grid)
        return model.patchify(model.forward_native(z, x["timestep"], text))

    return SimpleNamespace(case=case, model=model, lora=below(case.rest, "lora."), run=run, out=case.outputs)


def test_a_lora_of_diffusers_loads_at_its_strength_and_merges_to_the_same_weights(flux_lora):
    config = flux_lora.case.config
    assert_near(flux_lora.run(), flux_lora.out["base"])
    assert lora_from_peft(flux_lora.model, flux_lora.lora) == []
    assert flux_lora.model.single_blocks[0].linear1.scale == config["alpha"] / config["rank"]
    assert_near(flux_lora.run(), flux_lora.out["with_alpha"])
    # written back it is what it was
    back, alphas = lora_to_peft(flux_lora.model)
    want = below(flux_lora.lora, "transformer.")
    assert set(alphas.values()) == {config["alpha"]}
    assert digest(back) == digest({key: value for key, value in want.items() if not key.endswith("alpha")})

    merge_lora(flux_lora.model)
    assert_near(flux_lora.run(), flux_lora.out["with_alpha_merged"])
    merged = unmap_keys(flux_lora.model.state_dict(), TABLES[Flux]["diffusers"])
    stored = below(flux_lora.out, "merged.")
    assert stored
    for key, value in stored.items():
        assert_near(merged[key], value, 1e-6)


@pytest.mark.parametrize("factor, want", [(None, "without_alpha"), (0.5, "with_alpha_scale_half")])
def test_the_alpha_of_a_lora_counts(factor, want, flux_lora):
    lora = {key: value for key, value in flux_lora.lora.items() if not key.endswith("alpha")}
    if factor is not None:
        lora |= {key: factor * value for key, value in flux_lora.lora.items() if key.endswith("alpha")}
    lora_from_peft(flux_lora.model, lora)
    assert_near(flux_lora.run(), flux_lora.out[want])


@pytest.mark.parametrize("name, layers", [("dit", 3 * 4), ("flux", 2 * 8 + 2 * 2), ("sana", 2 * 7)])
def test_a_saved_lora_brings_its_embedder_and_head_and_draws_the_same(name, layers, tmp_path):
    base = tiny_model(name)
    tuned = deep_model(base, 1)
    names = add_lora(tuned, 4, 6)
    assert len(names) == layers
    assert not re.search(r"mod|norm|img_in|txt_in|embedder|final|t_block", " ".join(names))
    want = fixed_forward(randomize_b(tuned))
    save_peft(tuned, tmp_path)
    again = deep_model(base, 2)
    assert load_peft(again, tmp_path) == []
    assert_near(fixed_forward(again), want, 1e-6)
    assert {lora.scale for lora in lora_layers(again).values()} == {1.5}
    with pytest.raises(ValueError, match="already"):
        load_peft(again, tmp_path)
    with pytest.raises(ValueError, match="no LoRA"):
        save_peft(base, tmp_path / "other")


ENDS = r"img_in|final_layer\.linear|final_layer\.adaLN_modulation\.1|double_blocks\.0\.img_attn\.qkv"


@pytest.fixture
def base_lora():
    """A FLUX with a LoRA of its ends and of one q, k, v, and that LoRA in diffusers' names."""
    base = tiny_model("flux")
    add_lora(base, 3, targets=ENDS)
    tensors, alphas = lora_to_peft(randomize_b(base))
    return base, tensors, alphas


def test_a_lora_of_the_base_loads_onto_the_deep_model_without_what_is_bound_to_the_old_latent(base_lora):
    base, tensors, alphas = base_lora
    tensors = {f"base_model.model.{key}": value for key, value in tensors.items() if "to_k" not in key}
    deep = deep_model(tiny_model("flux"))
    before = deep.double_blocks[0].img_attn.qkv.weight.clone()
    assert sorted(lora_from_peft(deep, tensors, alphas)) == ["proj_out", "x_embedder"]
    # its halves are swapped twice
    modulation = deep.final_layer.adaLN_modulation[1]
    assert_near(modulation.delta(), base.final_layer.adaLN_modulation[1].delta(), 1e-6)
    # trainers often leave a part out, here k
    qkv = deep.double_blocks[0].img_attn.qkv
    assert torch.equal(qkv.base.weight, before)
    q, k, v = qkv.delta().chunk(3)
    want_q, _, want_v = base.double_blocks[0].img_attn.qkv.delta().chunk(3)
    assert_near(q, want_q, 1e-6)
    assert_near(v, want_v, 1e-6)
    assert not k.any()


def test_a_lora_of_the_embedder_is_saved_beside_the_embedder_itself(base_lora, tmp_path):
    """It was saved as a part of it, under a name that nothing loads."""
    base, _, _ = base_lora
    save_peft(base, tmp_path)
    again = Flux(TINY_FLUX)
    again.load_state_dict(tiny_model("flux", seed=4).state_dict())
    load_peft(again.requires_grad_(False), tmp_path)
    assert torch.equal(again.img_in.base.weight, base.img_in.base.weight)
    assert_near(again.img_in.delta(), base.img_in.delta(), 1e-6)


@pytest.mark.parametrize("kind, error", [
    ("another block", "transformer_blocks.7"),
    ("another name", "not a LoRA's tensor"),
    ("another shape", "it is of another model"),
    ("half", "it is of another model"),
])
def test_a_lora_that_does_not_fit_leaves_the_model_as_it_was(kind, error, base_lora):
    _, tensors, alphas = base_lora
    q = "transformer_blocks.0.attn.to_q.lora_A.weight"
    if kind == "another block":
        for key in [key for key in tensors if "to_q" in key]:
            tensors[key.replace("blocks.0", "blocks.7")] = tensors[key]
    elif kind == "another name":
        tensors["transformer.x.diff"] = torch.zeros(1)
    elif kind == "another shape":
        tensors[q] = tensors[q][:, :20]
    else:
        del tensors[q]
    model = tiny_model("flux")
    with pytest.raises(ValueError, match=error):
        lora_from_peft(model, tensors, alphas)
    assert not lora_layers(model)


def test_parts_of_different_strength_add_up_in_one_matrix():
    g = torch.Generator().manual_seed(3)
    parts = {"to_q": (slice(0, 48), 2, 1), "to_v": (slice(96, 144), 5, 3)}          # rows, rank, scale
    lora = {"transformer_blocks.0.attn.to_v.alpha": torch.tensor(15.0)}
    want = torch.zeros(144, 48)
    for part, (rows, rank, scale) in parts.items():
        A = torch.randn(rank, 48, generator=g)
        B = torch.randn(48, rank, generator=g)
        name = f"transformer_blocks.0.attn.{part}"
        lora |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        want[rows] = scale * B @ A
    model = tiny_model("flux")
    lora_from_peft(model, lora)
    assert_near(model.double_blocks[0].img_attn.qkv.delta(), want, 1e-5)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_stock_diffusers_loads_a_saved_lora_at_its_strength(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    model = tiny_model(name)
    export_diffusers(model, tmp_path)
    add_lora(model, 4, 10)
    save_peft(randomize_b(model), tmp_path / "lora")
    theirs = load_in_diffusers(diffusers, model.cfg, tmp_path, "transformer")
    parts = dict(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=theirs)
    if name == "flux":
        pipeline = diffusers.FluxPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipeline = diffusers.SanaPipeline(**parts)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = unmap_keys(merge_lora(model).state_dict(), TABLES[type(model)]["diffusers"])
    fused = theirs.state_dict()
    assert fused.keys() == merged.keys()
    for key, value in merged.items():
        assert_near(fused[key], value, 1e-5)
