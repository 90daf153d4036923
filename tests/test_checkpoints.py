"""Files in and out: published layouts, strict and safe loading, the hub, runs, export, LoRA of diffusers."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save

import checkpoints
from autoencoder import AUTOENCODERS, DCAE, KLVAE, KLConfig, build_autoencoder
from checkpoints import (
    TABLES, atomic, build, check_exportable, check_writable, code_version, config_dict, config_from_dict,
    config_from_shapes, detect_layout, diffusers_ae_config, export, export_autoencoder, export_diffusers,
    exportable, find_weights, load_autoencoder, load_base, load_part, load_peft, load_run, load_weights,
    lora_from_peft, lora_to_peft, map_keys, match_config, newest_run, read_base_config, read_config,
    read_tensors, run_file, save_peft, unmap_keys, write_json, write_tensors)
from helpers import (  # noqa: F401 (encoders and tiny_base are fixtures)
    DCAE_STYLES, DDPM_DIT, DEEP_DIT, TINIES, TINY_DIT, TINY_FLUX, TINY_KL, TINY_SANA, WORDS_BASE,
    assert_near, deep_model, digest, encoders, fixed_forward, manifest, on_meta, parity, parity_cases,
    random_condition, randomize_b, scramble, tiny_base, tiny_model)
from lora import add_lora, lora_layers, lora_state, merge_lora
from model import BASES, FAMILIES, DiT, Flux, Text, resolve_shift, to_deep_latent
from sample import START, DDPMChain, guided_velocity, integrate, time_grid, to_uint8
from shapes import encode_words


def one_line_error(error, *parts: str):
    """The error is one line that contains all of these."""
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_file_is_used_once_and_every_target_filled(name):
    info = manifest(name)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in info["tensors"].items()}
    cfg = BASES[PUBLISHED[name]]
    family, layout = detect_layout(tensors)
    assert (family, layout) == (FAMILIES[type(cfg)], name.split(".")[-1])
    table = TABLES[family][layout]
    model = on_meta(family, cfg)
    mapped = map_keys(model, tensors, table)
    assert mapped.keys() == model.state_dict().keys()
    # read backwards, the table gives the published names
    for key, value in unmap_keys(mapped, table).items():
        assert value.shape == tensors[key].shape, key
    # and the shapes tell the configuration
    found = config_from_shapes(family, table, tensors, info.get("config", {}))
    match_config(cfg, family, found)
    with pytest.raises(ValueError, match=rf"depth {cfg.depth} \(not 7\).*{PUBLISHED[name]}"):
        match_config(replace(cfg, depth=7), family, found)


# ---- strict loading --------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value, error", [
    ("blocks.1.attn.qkv.bias", None, "1 missing: blocks.1.attn.qkv.bias"),
    ("blocks.7.extra", torch.zeros(1), "1 unexpected: blocks.7.extra"),
    ("x_embedder.proj.bias", torch.zeros(47), "x_embedder.proj.bias: file (47,), model (48,)"),
])
def test_a_wrong_key_is_an_error_that_names_it(key, value, error):
    tensors = DiT(TINY_DIT).state_dict()
    tensors.pop(key, None)
    if value is not None:
        tensors[key] = value
    with pytest.raises(ValueError, match=re.escape(error)):
        load_weights(DiT(TINY_DIT), tensors, TABLES[DiT]["ours"])


@pytest.mark.parametrize("cfg, file, parts", [
    (TINY_FLUX, "sana", ("a Sana with", "a Flux of another", "the preset that fits them is fits")),
    (to_deep_latent(TINY_FLUX, DCAE_STYLES["in"]), "flux", ("token_channels 16 (not 8)", "no preset fits")),
    (TINY_FLUX, "ae", ("not the weights of a DiT, FLUX or SANA", "--ae-weights")),
    (TINY_FLUX, "headless", ("img_in.weight is missing, and every Flux has it",)),
])
def test_a_file_of_another_model_is_one_error_that_tells_what_it_is_and_what_fits(
        cfg, file, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(BASES, "fits", TINY_SANA)
    source = {"ae": KLVAE(TINY_KL), "sana": tiny_model("sana")}.get(file, tiny_model("flux"))
    tensors = source.state_dict()
    if file == "headless":
        tensors.pop("img_in.weight")
    write_tensors(tmp_path / f"{file}.safetensors", tensors)
    with pytest.raises(ValueError) as e:
        build(cfg, tmp_path / f"{file}.safetensors")
    one_line_error(e, f"{file}.safetensors: ", *parts)
    assert not re.search(r"(\S+) \(not \1\)", str(e.value)), "an equal value is no difference"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_built_model_is_float32_and_sana_trained_in_fp16_is_clamped(dtype, tmp_path):
    """bf16 parameters round small updates away; SANA's weights count on the limits of fp16."""
    write_tensors(tmp_path / "w.safetensors", tiny_model("sana").to(dtype).state_dict())
    model = build(TINY_SANA, tmp_path / "w.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.cfg.clamp == (dtype == torch.float16)


def test_a_configuration_survives_json():
    for cfg in (*BASES.values(), DEEP_DIT):
        assert config_from_dict(json.loads(json.dumps(config_dict(cfg)))) == cfg


# ---- safe reading, atomic writing ------------------------------------------------------------------

class Harmful:
    """Writes a file called executed when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("name, content, error", [
    ("none.safetensors", None, "no such weight file"),
    ("half.safetensors", save({"a": torch.zeros(9)})[:90], "not a whole safetensors file"),
    ("empty.safetensors", b"", "not a whole safetensors file"),
    ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("empty.pt", b"", "damaged"),
    ("harmful.pt", {"model": Harmful()}, "never run here"),
    ("list.pt", [torch.zeros(3)], "state dict"),
    ("model-00001-of-00002.safetensors", b"", "one part of several"),
])
def test_a_file_that_is_not_weights_is_one_clear_error(name, content, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        torch.save(content, name)
    with pytest.raises(ValueError) as e:
        read_tensors(name)
    one_line_error(e, name, error)
    assert not Path("executed").exists()


W = {"x": torch.ones(3)}
OTHER = {"x": torch.zeros(3)}


@pytest.mark.parametrize("state", [
    {"model": {"module.x": W["x"]}, "epoch": 3},
    {"model": OTHER, "ema": W, "opt": {}},
    {"state_dict": {"model.diffusion_model.x": W["x"]}},
    # DC-Gen's trainer: averages of several decays, the slowest of which counts
    {"model_state_dict": {"0.x": W["x"]}, "ema_model_state_dict": {}},
    {"model_state_dict": OTHER, "ema_model_state_dict": {"0.9": OTHER, 0.999: {"0.x": W["x"]}}},
])
def test_wrappers_of_known_trainers_are_taken_off(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    assert digest(read_tensors(tmp_path / "w.pt")) == digest(W)


def test_weights_with_an_odd_header_load(tmp_path):
    """Writers that do not pad their header leave the tensors at odd addresses."""
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}' + b" "
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + W["x"].numpy().tobytes())
    found = read_tensors(file)["a"]
    assert len(header) % 2
    assert torch.equal(found, W["x"])
    assert found.data_ptr() % 4 == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_what_is_loaded_as_it_is_stays_the_files_own_memory(tmp_path):
    """Twelve billion weights must not be in memory twice."""
    file = tmp_path / "w.safetensors"
    write_tensors(file, tiny_model("flux").bfloat16().state_dict())
    before = file.read_bytes()
    loaded = build(TINY_FLUX, file, dtype=None)
    spans = []
    for start, end in re.findall(rf"(\w+)-(\w+) .*{file.name}", Path("/proc/self/maps").read_text()):
        spans.append(range(int(start, 16), int(end, 16)))
    for key, value in loaded.state_dict().items():
        assert any(value.data_ptr() in span for span in spans), key
    loaded.img_in.weight.zero_()
    assert file.read_bytes() == before, "the map must be private"


SMALL_DISK = """
import resource, signal, sys
import torch
from checkpoints import atomic, write_json, write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda file: write_tensors(file, {"a": torch.zeros(100_000)}),
    lambda file: write_json(file, ["x" * 200_000]),
):
    try:
        write(sys.argv[1])
    except ValueError as e:
        print(e)
"""


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    pytest.importorskip("resource")
    file = tmp_path / "new/w.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(file)], cwd=checkpoints.HERE, capture_output=True, text=True,
        check=True)
    assert done.stdout.splitlines() == 2 * [
        f"{file} could not be written (File too large); mend that, or name another folder"]
    assert not list(file.parent.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_a_disk_refuses_is_told_with_the_files_name(number, tmp_path):
    with pytest.raises(ValueError) as e, atomic(tmp_path / "x"):
        raise OSError(number, os.strerror(number), "elsewhere")
    one_line_error(e, f"{tmp_path / 'x'} could not be written ({os.strerror(number)})")
    # a mistake of the code stays one
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x"):
        open(tmp_path / "none")


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        check_writable(tmp_path / "file/run", "--out")
    with pytest.raises(ValueError, match="could not be written .Not a directory"):
        write_json(tmp_path / "file/run/x.json", {})
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user can write anywhere")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_writable(tmp_path / "a/b", "--out")
    with pytest.raises(ValueError, match="could not be written .Permission denied"):
        write_json(tmp_path / "a/b.json", {})


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    shared = torch.randn(4, 6)
    tensors = {"a": shared, "view": shared[1:], "turned": shared.t()}
    write_tensors(file, tensors, {"scale": 0.5})

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(ValueError, match="w.safetensors could not be written .No space left on device"):
        write_tensors(file, W)
    assert read_config(file) == {"scale": 0.5}
    assert digest(read_tensors(file)) == digest(tensors)
    assert list(tmp_path.iterdir()) == [file]


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("weight_map, error", [
    ([1], "not an index"),
    ({"a": 1}, "not an index"),
    ({"a": "../x.safetensors"}, "beside the index"),
    ({"a": "/x.safetensors"}, "beside the index"),
    ({"a": "C:x.safetensors"}, "beside the index"),
    ({"a": r"..\x.safetensors"}, "beside the index"),
    ({"a": "x.bin"}, "beside the index"),
    ({"a": "x.safetensors"}, "lacks 1 of the 1 shards"),
])
def test_an_index_is_read_only_if_it_lists_files_beside_it(weight_map, error, tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        read_tensors(tmp_path)
    for text, wrong in (("{", "not an index"), (json.dumps({"weight_map": weight_map}), error)):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=wrong):
            read_tensors(tmp_path)


# ---- the hub: a stand-in server on the loopback ----------------------------------------------------

REPOS = {
    "a/open": {
        "w.safetensors": b"w",
        "sub/transformer/model-00001-of-00002.safetensors": b"t",
        "sub/transformer/model.fp16.safetensors": b"no",
        "sub/transformer/model.bin": b"no",
        "sub/tokenizer/spiece.model": b"s",
        "sub/vae/config.json": b"no",
    },
    "a/gated": {},
}
CALLS = {
    "file": ("m", "a/open::w.safetensors"),
    "none": ("m", "a/open::none.safetensors"),
    "gated": ("m", "a/gated::w.safetensors"),
    "folder": ("m", "a/open::sub/", None, ["transformer", "tokenizer"]),
    "part": ("m", "a/open::sub/", None, ["unet"]),
}
FIND = """
import json, sys
from checkpoints import find_weights
found = {}
for name, args in json.loads(sys.argv[1]).items():
    try:
        found[name] = str(find_weights(*args))
    except ValueError as e:
        found[name] = str(e)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves REPOS as the hub does, a/gated to nobody."""
    tokens = set()

    def log_message(self, *_):
        pass

    def do_GET(self):
        where = re.match(r"(?:/api/models)?/(\w+/\w+)/(\w+)/\w+/?(.*)", urlparse(self.path).path)
        if not where:
            return self.send_error(404)
        self.tokens.add(self.headers["Authorization"])
        repo, kind, file = where.groups()
        files = REPOS[repo]
        body = files.get(file, b"")
        headers = {}
        if repo == "a/gated":
            headers["X-Error-Code"] = "GatedRepo"
        elif kind == "revision":
            siblings = [dict(rfilename=name) for name in files]
            body = json.dumps(dict(id=repo, sha="c" * 40, siblings=siblings)).encode()
        elif kind == "tree":
            entries = [dict(type="file", path=name, size=len(files[name]), oid="0" * 40) for name in files]
            body = json.dumps(entries).encode()
        elif file not in files:
            headers["X-Error-Code"] = "EntryNotFound"
        self.send_response(404 if headers else 200)
        headers |= {"Content-Length": len(body), "X-Repo-Commit": "c" * 40, "ETag": f'"{Path(file).name}"'}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What find_weights gave for CALLS, and again offline, in processes of their own: the hub's library reads
    its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"

    def find(offline):
        cache = str(tmp_path_factory.getbasetemp() / "hub")
        env = dict(HF_HUB_CACHE=cache, HF_ENDPOINT=url, HF_TOKEN="hf_secret", HF_HUB_OFFLINE=offline)
        patience = dict(HF_HUB_ETAG_TIMEOUT="100", HF_HUB_DOWNLOAD_TIMEOUT="100")
        done = subprocess.run(
            [sys.executable, "-c", FIND, json.dumps(CALLS)], cwd=checkpoints.HERE, capture_output=True,
            env=os.environ | env | patience, text=True, timeout=900, check=True)
        assert "hf_secret" not in done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    try:
        yield SimpleNamespace(url=url, online=find("0"), offline=find("1"))
    finally:
        server.shutdown()
        server.server_close()


def test_of_the_hub_only_what_is_named_is_fetched_with_the_users_token_and_kept(hub):
    assert Hub.tokens == {"Bearer hf_secret"}
    assert Path(hub.online["file"]).read_bytes() == b"w"
    folder = Path(hub.online["folder"])
    assert folder.name == "sub"
    fetched = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert fetched == {"spiece.model": b"s", "model-00001-of-00002.safetensors": b"t"}
    for name in ("file", "folder"):
        assert hub.offline[name] == hub.online[name]


@pytest.mark.parametrize("when, name, parts", [
    ("online", "none", ("m wants none.safetensors of a/open; it is not in ",
                        "({url}: RemoteEntryNotFoundError)\nWith it at hand, give --weights PATH")),
    ("online", "gated", ("accept their licence: do that at {url}/a/gated, and set HF_TOKEN",)),
    ("online", "part", ("have no unet\nWith it at hand, give --weights DIR",)),
    ("offline", "none", ("(HF_HUB_OFFLINE is set)\n",)),
])
def test_what_the_hub_does_not_give_is_an_error_of_two_lines(when, name, parts, hub):
    error = getattr(hub, when)[name]
    assert error.count("\n") == 1
    for part in parts:
        assert part.format(url=hub.url) in error


def test_without_the_hubs_package_the_error_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = r"m wants x/\{transformer,vae\} of a/b, .*pip install huggingface_hub\n.* give --weights DIR"
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
def test_an_exported_model_loads_again_if_its_config_fits(name, tmp_path):
    model = tiny_model(name)
    export_diffusers(model, tmp_path, shard_bytes=100_000)
    folder = tmp_path / "transformer"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    for place in (tmp_path, folder / INDEX):
        assert digest(build(model.cfg, place).state_dict()) == digest(model.state_dict())
    # what no shape shows
    with pytest.raises(ValueError, match=r"num_heads \d \(not 2\)"):
        build(replace(model.cfg, num_heads=2), tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        build(model.cfg, tmp_path)


@pytest.mark.parametrize("cfg, error", [
    (replace(TINY_FLUX, theta=2000.0), "positions turn by theta = 2000"),
    (replace(TINY_FLUX, patch_size=4), "its tokens hold 4 x 4 cells"),
    (replace(TINY_DIT, predict="epsilon"), "epsilon on the flow clock"),
])
def test_a_model_that_diffusers_cannot_compute_is_refused_by_its_configuration(cfg, error, tmp_path):
    assert error in exportable(cfg)
    with pytest.raises(ValueError, match=f"--export: diffusers cannot draw with this model: .*{error}"):
        check_exportable(cfg, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    assert not any(exportable(fine) for fine in (*BASES.values(), DEEP_DIT))


def test_an_export_goes_to_a_new_folder_only(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder in ("new", "empty", "deep/er"):
        check_exportable(TINY_DIT, tmp_path / folder)
    with pytest.raises(ValueError, match="it is not empty; name another folder"):
        check_exportable(TINY_DIT, tmp_path)
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        check_exportable(TINY_DIT, tmp_path / "file/new")
    model = tiny_model("dit")
    add_lora(model, 2)
    with pytest.raises(ValueError, match="merge it before the export"):
        export_diffusers(model, tmp_path / "lora")


def test_of_a_failed_export_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "export_readme", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tiny_model("dit"), KLVAE(TINY_KL), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_lora_is_exported_merged_and_its_lora_by_itself(tmp_path):
    model = tiny_model("flux")
    add_lora(model, 2)
    want = fixed_forward(randomize_b(model))
    folder = tmp_path / "x"
    export(model, KLVAE(TINY_KL), folder)
    assert_near(fixed_forward(build(TINY_FLUX, folder)), want)
    again = tiny_model("flux")
    load_peft(again, folder / "lora")
    assert_near(fixed_forward(again), want)


def load_in_diffusers(diffusers, folder: Path):
    """The model that stock diffusers loads from an exported folder, every key used."""
    cls = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("name", TINIES)
def test_stock_diffusers_loads_an_exported_model_with_equal_outputs(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = tiny_model(name)
    export_diffusers(model, tmp_path)
    theirs = load_in_diffusers(diffusers, tmp_path / "transformer")
    x = torch.randn(2, model.cfg.in_channels, 8, 8)
    y = random_condition(model.cfg)
    step = torch.tensor([250, 875])                                  # diffusers' DiT wants whole steps
    if name == "flux":
        step = step / 1000
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        out = theirs(model.patchify(x), y.tokens, y.pooled, step, ids, torch.zeros(5, 3), y.guidance).sample
        want = model.unpatchify(out, (8, 8))
    elif name == "sana":
        want = theirs(x, y.tokens, step, encoder_attention_mask=y.mask).sample
    else:
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0       # 128, as trained
        want = theirs(x, timestep=step, class_labels=y).sample
    # SANA's cross-attention has another epsilon there
    assert_near(model.forward_native(x, step.float(), y), want, 2e-5)


STEPS = 3
SHORT = dict(num_steps=STEPS, shift=2.0)
FLOW_DIT = replace(TINY_DIT, num_classes=1000, sampling=replace(TINY_DIT.sampling, **SHORT))
WORDS_FLUX = replace(WORDS_BASE, sampling=replace(WORDS_BASE.sampling, **SHORT))
WORDS_SANA = replace(
    BASES["tiny-sana"], res=64, hidden_size=64, depth=2, num_heads=4,
    sampling=replace(BASES["tiny-sana"].sampling, **SHORT))
SANA_DPM = replace(WORDS_SANA, integer_time=True, sampling=replace(WORDS_SANA.sampling, sampler="dpm"))
BASE_AE = "tiny-kl-f8c4"
DEEP_AE = "tiny-dc-ae-f32c32"


def deep(cfg, pos_step=1.0, shift=None):
    return replace(to_deep_latent(cfg, AUTOENCODERS[DEEP_AE], pos_step, shift), res=128)


def run_example(folder: Path, monkeypatch) -> dict:
    """Execute the lines of an export's README; what they leave, with the noise that they drew."""
    readme = (folder / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    space = {}
    randn = torch.randn

    def remembered(*shape, **settings):
        drawn = randn(*shape, **settings)
        # weights are initialised too, before the latent
        if drawn.ndim == 4:
            space["noise"] = drawn
        return drawn

    monkeypatch.setattr(torch, "randn", remembered)
    exec(lines, space)
    return space


@pytest.mark.parametrize("cfg", [
    pytest.param(FLOW_DIT, id="dit"),
    pytest.param(deep(FLOW_DIT, 2.0), id="deep-dit"),
    pytest.param(deep(replace(FLOW_DIT, clock="ddpm"), 2.0), id="deep-dit-ddpm"),
    pytest.param(WORDS_FLUX, id="flux"),
    pytest.param(deep(WORDS_FLUX, 1.0, "mu"), id="deep-flux-mu"),
    pytest.param(deep(WORDS_FLUX, 2.0, "flux2"), id="deep-flux"),
    pytest.param(WORDS_SANA, id="sana"),
    pytest.param(deep(WORDS_SANA), id="deep-sana"),
    pytest.param(deep(SANA_DPM), id="deep-sana-dpm"),
])
def test_the_example_of_an_exported_run_draws_with_diffusers_what_we_draw(cfg, tmp_path, monkeypatch):
    """The lines as they stand in README.md: positions, clock, guidance and shift are ours."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    model = scramble(FAMILIES[type(cfg)](cfg))
    ae = load_autoencoder(cfg.ae)
    export(model, ae, "out")
    space = run_example(Path("out"), monkeypatch)

    noise = space["noise"]
    y = torch.arange(4)
    if cfg.text_encoder:
        y = replace(space["text"], guidance=torch.tensor([3.5]))
        model.null = replace(encode_words([""], cfg.text_tokens), mask=None)
    if isinstance(model, Flux):
        # as FluxPipeline packs it
        tokens = noise.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        noise = model.unpatchify(tokens.flatten(1, 2), (cfg.res // ae.cfg.f, cfg.res // ae.cfg.f))
    scale = cfg.sampling.cfg_scale
    shift = resolve_shift(cfg.sampling.shift, *noise.shape[1:], cfg.patch_size)
    times = time_grid(STEPS, shift, START.get(cfg.sampling.sampler, 0.0))
    z = integrate(lambda x, t: guided_velocity(model, x, t, y, scale), noise, times, cfg.sampling.sampler)
    assert_near(space["z"], z, 1e-4)
    assert_near(space["pictures"], ae.decode(z), 1e-4)
    assert Path("picture.png").is_file()


def test_the_example_of_a_published_dit_draws_by_its_chain(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    cfg = replace(DDPM_DIT, num_classes=1000)
    model = scramble(DiT(cfg))
    ae = load_autoencoder(BASE_AE)
    ae.cfg = replace(ae.cfg, shift=0.0)                              # DiTPipeline knows none; SD's has none
    export(model, ae, "out")
    noise = run_example(Path("out"), monkeypatch)["noise"]

    def network(x, step):
        def call(x, step, y):
            return model.forward_native(x, step, y)
        return guided_velocity(model, x, step, torch.tensor([207]), cfg.sampling.cfg_scale, call=call)

    z = DDPMChain.spaced(50, ddim=True).sample(network, noise, ddim=True)
    want = to_uint8(ae.decode(z))[0]
    with Image.open("picture.png") as drawn:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(want).astype(int)).mean() < 0.5


@pytest.mark.parametrize("name, sizes", [
    ("flux", dict(context_in_dim=64, vec_in_dim=64, text_tokens=20)),
    ("sana", dict(caption_channels=64, in_channels=4, patch_size=2, ae=BASE_AE)),
])
def test_text_encoders_are_copied_into_the_pipeline(name, sizes, encoders, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    cfg = deep(replace(TINIES[name], **sizes), shift="flux2")
    cfg = replace(cfg, sampling=replace(cfg.sampling, num_steps=2))
    ae = load_autoencoder(cfg.ae)
    export(scramble(FAMILIES[type(cfg)](cfg)), ae, "whole", encoders / name)
    pictures = run_example(Path("whole"), monkeypatch)["pictures"]
    assert pictures.shape == (1, 3, 128, 128)
    assert pictures.isfinite().all()
    # without them it is told what to give
    export(scramble(FAMILIES[type(cfg)](cfg)), ae, "alone")
    parts = "text_encoder, tokenizer, text_encoder_2" if name == "flux" else "text_encoder, tokenizer."
    source = cfg.text_weights.removesuffix("::")
    readme = Path("alone/README.md").read_text()
    assert f"not in this folder: give those of {source} to `from_pretrained`, as {parts}" in readme
    assert "not in this folder" not in Path("whole/README.md").read_text()


ALL_AUTOENCODERS = [TINY_KL, replace(TINY_KL, name="test-kl-quant", quant_conv=True), *DCAE_STYLES.values()]


@pytest.mark.parametrize("cfg", ALL_AUTOENCODERS, ids=[cfg.name for cfg in ALL_AUTOENCODERS])
def test_stock_diffusers_loads_an_exported_autoencoder_with_equal_outputs(cfg, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(cfg, scale=0.61)
    ae = scramble(build_autoencoder(cfg))
    export_autoencoder(ae, tmp_path)
    theirs = load_in_diffusers(diffusers, tmp_path / "vae")
    assert theirs.config.scaling_factor == 0.61
    x = torch.randn(1, 3, 4 * cfg.f, 2 * cfg.f)
    encoded = theirs.encode(x)
    z = encoded.latent_dist.mean if isinstance(cfg, KLConfig) else encoded.latent
    assert_near(ae.moments(x)[0], z)
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


# ---- runs ------------------------------------------------------------------------------------------

def trained_part(net) -> dict:
    """What stages 1 and 2 train, and the LoRA."""
    state = net.state_dict()
    ends = {key: value for key, value in state.items() if key.startswith((DiT.EMBEDDER, DiT.HEAD))}
    return ends | lora_state(net)


def write_run(folder: str, net, tensors=None, **info) -> Path:
    """Write a run's file with these tensors, by default what was trained."""
    usual = dict(base="test", base_weights=None, kind="align", model=config_dict(net.cfg), classes=["circle"])
    run = Path("runs") / folder
    write_tensors(run / "model.safetensors", tensors or trained_part(net), usual | info)
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
        run = write_run("a", model)
    elif kind == "lora":
        model = tuned_model(tiny_base)
        run = write_run("a", model, **LORA)
    else:
        cfg = replace(DEEP_DIT, sampling=replace(DEEP_DIT.sampling, num_steps=7, shift="flux2"))
        model = scramble(DiT(cfg), seed=5)
        run = write_run("a", model, model.state_dict())
    found, info = load_run(run)
    assert digest(found.state_dict()) == digest(model.state_dict())
    assert found.cfg == read_base_config(str(run))[0] == model.cfg
    assert not found.training
    assert info["file"] == str(run / "model.safetensors")
    assert_near(fixed_forward(found), fixed_forward(model), 1e-6)


def test_a_finished_run_is_a_base_with_its_lora_merged(tiny_base):
    tuned = tuned_model(tiny_base)
    run = write_run("a", tuned, **LORA)
    base, info = load_base(str(run))
    assert_near(fixed_forward(base), fixed_forward(tuned))
    assert not lora_state(base)
    assert info == dict(classes=["circle"], base=str(run), base_weights=None, base_print=info["base_print"])
    load_run(write_run("b", deep_model(base, 9), **info))


def test_the_moving_average_is_taken_unless_it_is_not_wanted(tiny_base):
    raw = deep_model(tiny_base, 1)
    average = deep_model(tiny_base, 2)
    run = write_run("a", raw)
    write_tensors(run / "ema.safetensors", trained_part(average), read_config(run / "model.safetensors"))
    assert digest(load_run(run)[0].state_dict()) == digest(average.state_dict())
    for found, _ in (load_run(run, ema=False), load_run(run / "model.safetensors")):
        assert digest(found.state_dict()) == digest(raw.state_dict())


@pytest.mark.parametrize("key, value, error", [
    ("x_embedder.proj.bias", None, "1 tensors missing that no base has"),
    ("final_layer.linear.weight", None, "1 tensors missing that no base has"),
    ("blocks.1.mlp.fc2.B", None, "1 tensors missing that no base has"),
    ("blocks.9.x", torch.zeros(1), "does not have in that shape"),
    ("x_embedder.proj.bias", torch.zeros(3), "does not have in that shape"),
])
def test_a_part_of_a_model_is_loaded_strictly(key, value, error):
    """A LoRA without its embedder and head means nothing in the new latent space, and draws rubbish."""
    model = tuned_model(tiny_model("dit"))
    part = trained_part(model)
    part.pop(key, None)
    if value is not None:
        part[key] = value
    with pytest.raises(ValueError, match=f"{error}: {key}"):
        load_part(model, part)


def test_a_run_finds_its_base_and_refuses_another(tiny_base):
    base, info = load_base("test")
    run = write_run("a", deep_model(base), **info)
    load_run(run, dtype=torch.bfloat16)                              # base_print is of the file's own numbers
    Path("base.safetensors").rename("moved.safetensors")
    with pytest.raises(ValueError, match="should come with this repository"):
        load_run(run)
    load_run(run, base_weights="moved.safetensors")
    write_tensors("base.safetensors", tiny_model("dit", seed=3).state_dict())
    with pytest.raises(ValueError, match="was trained from another test than the one found now"):
        load_run(run)


@pytest.mark.parametrize("load, path, error", [
    (load_base, "dit-xll", "--base dit-xll: not a preset .tiny, dit-xl, .*not the folder of a run"),
    (load_run, "unfinished", "unfinished holds no finished run"),
    (load_run, "gone", "gone: no such run or weight file"),
    (load_run, "base.safetensors", "is not a run's file; an official weight file goes to --weights"),
    (load_run, "runs/old", "model.safetensors: .*earlier version of this code; train it again"),
])
def test_a_model_that_cannot_be_found_is_one_clear_error(load, path, error, tiny_base):
    Path("unfinished").mkdir()
    old = config_dict(DEEP_DIT)
    del old["sampling"]
    write_run("old", deep_model(tiny_base), model=old)
    with pytest.raises(ValueError, match=error):
        load(path)


@pytest.mark.parametrize("key, value", [
    ("hidden_size", 10**9),
    ("hidden_size", 10**400),
    ("hidden_size", 0),
    ("hidden_size", 47),                                             # not in 4 heads
    ("hidden_size", 96),                                             # another trunk than the base's
    ("depth", 10**6),
    ("depth", 2),
    ("num_heads", 0),
    ("num_heads", "4"),
    ("num_heads", None),
    ("in_channels", 10**9),
    ("pos_step", float("nan")),
    ("ae", ["tiny"]),
    ("sampling", {"num_steps": -1}),
    ("sampling", {"steps": 3}),
    ("sampling", 5),
    ("family", "DiT"),
    ("colour", "red"),                                               # of a later version
])
def test_a_run_that_names_an_impossible_model_is_one_error_with_its_name(key, value, tiny_base):
    """Before anything is allocated: 10^9 wide would end the process."""
    model = deep_model(tiny_base)
    run = write_run("a", model, model={**config_dict(model.cfg), key: value})
    with pytest.raises(ValueError) as e:
        load_run(run)
    one_line_error(e, "runs/a/model.safetensors: ")
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("info, error", [
    (dict(base="nope"), "was trained from 'nope', which is neither a preset"),
    (dict(base=None), "was trained from 'None'"),
    (dict(lora=dict(rank=10**9, alpha=3)), "tensors are of rank .2., its settings are"),
    (dict(lora=[2]), "its settings are"),
    (dict(model=3), "is not a run's file"),
])
def test_a_run_with_damaged_facts_is_one_error_with_its_name(info, error, tiny_base):
    run = write_run("a", tuned_model(tiny_base), **{**LORA, **info})
    with pytest.raises(ValueError, match=f"runs/a/model.safetensors.*{error}") as e:
        load_run(run)
    one_line_error(e)


@pytest.mark.parametrize("damage, error", [
    (lambda data: data[: len(data) // 2], r"model.safetensors .\d+ bytes. is not a whole safetensors file"),
    (lambda data: b"", "model.safetensors .0 bytes. is not a whole safetensors file"),
    (lambda data: data.replace(b'"config":"{', b'"config":"!'), "the configuration in it is damaged"),
])
def test_a_damaged_run_is_one_error_wherever_it_is_read(damage, error, tiny_base):
    file = write_run("a", deep_model(tiny_base)) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for read in (load_run, read_base_config, lambda path: newest_run()):
        with pytest.raises(ValueError, match=error):
            read(str(file.parent))


def test_a_run_is_named_by_its_folder_or_by_any_of_its_files(tiny_base):
    run = write_run("a", deep_model(tiny_base))
    weights = run / "model.safetensors"
    state = run / "stage3.state.safetensors"
    state.write_bytes(b"")
    (run / "config.json").write_text(json.dumps(dict(script="finetune")))
    for path in (run, weights, state, run / "config.json", run / "metrics.jsonl"):
        assert run_file(path) == weights
    weights.unlink()
    with pytest.raises(ValueError) as e:
        run_file(state)
    one_line_error(e, "runs/a holds no finished run (no model.safetensors); an unfinished one goes on with: "
                   "python finetune.py --resume --out runs/a")


def test_the_flag_in_a_message_is_that_of_the_autoencoder():
    with pytest.raises(ValueError, match="^--ae-weights none: no such file"):
        load_autoencoder(DEEP_AE, "none")
    with pytest.raises(ValueError, match="^--base-ae-weights none: no such file"):
        load_autoencoder(BASE_AE, "none", flag="--base-ae-weights")


def test_the_version_of_the_code_is_a_commit_or_a_hash_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(checkpoints, "HERE", tmp_path)
    versions = []
    for text in ("1", "2"):
        (tmp_path / "a.py").write_text(text)
        code_version.cache_clear()
        versions.append(code_version())
    code_version.cache_clear()
    assert versions[0] != versions[1]
    assert re.fullmatch("files [0-9a-f]{12}", versions[0])
    monkeypatch.undo()
    if (checkpoints.HERE / ".git").exists():
        assert re.fullmatch(r"\S+", code_version())


def test_the_newest_run_is_found_by_what_its_file_tells(tiny_base):
    """dit-xl-512 is a base of its own, and no run of dit-xl: the folder names of the two look alike."""
    assert newest_run() is None
    runs = {
        "mine": dict(kind="finetune"),
        "z-align-test": {},
        "align-test-512-1": dict(base="test-512"),
        "noalign-test-1": dict(kind="noalign"),
    }
    for seconds, (folder, info) in enumerate(runs.items()):
        file = write_run(folder, tiny_base, **info) / "model.safetensors"
        os.utime(file, (seconds, seconds))
    Path("runs/align-test-7").mkdir()                                # unfinished
    assert newest_run().name == "align-test-512-1"
    newest = {"align-test": "z-align-test", "align": "align-test-512-1", "finetune-test": "mine"}
    for kind, folder in newest.items():
        assert newest_run(kinds=(kind,)).name == folder
    assert newest_run(kinds=("scratch",)) is None


# ---- LoRA of diffusers and PEFT --------------------------------------------------------------------

@pytest.mark.parametrize("name", parity_cases("flux_lora"))
@pytest.mark.parametrize("factor, want", [
    (1, "with_alpha"),
    (0.5, "with_alpha_scale_half"),
    (None, "without_alpha"),
])
def test_a_lora_of_diffusers_loads_at_its_strength_and_merges(name, factor, want):
    case = parity(name)
    table = TABLES[Flux]["diffusers"]
    found = config_from_shapes(Flux, table, case.weights, case.config)
    cfg = replace(TINY_FLUX, patch_size=1, in_channels=found.pop("token_channels"), **found)
    model = load_weights(on_meta(Flux, cfg), case.weights, table)
    lora = {}
    for key, value in case.rest.items():
        is_alpha = key.endswith("alpha")
        if factor or not is_alpha:
            lora[key.removeprefix("lora.")] = factor * value if is_alpha else value
    assert lora_from_peft(model, lora) == []
    # written back it is what it was
    back = {f"transformer.{key}": value for key, value in lora_to_peft(model)[0].items()}
    assert digest(back) == digest({key: value for key, value in lora.items() if "alpha" not in key})

    x = case.inputs
    text = Text(x["encoder_hidden_states"], None, x["pooled_projections"], x["guidance"])
    z = model.unpatchify(x["hidden_states"], (case.config["grid_height"], case.config["grid_width"]))
    for net in (model, merge_lora(model)):
        assert_near(net.patchify(net.forward_native(z, x["timestep"], text)), case.outputs[want])


@pytest.mark.parametrize("name", TINIES)
def test_a_saved_lora_brings_its_embedder_and_head_and_draws_the_same(name, tmp_path):
    base = tiny_model(name)
    tuned = deep_model(base, 1)
    add_lora(tuned, 4, 6)
    want = fixed_forward(randomize_b(tuned))
    save_peft(tuned, tmp_path)
    again = deep_model(base, 2)
    assert load_peft(again, tmp_path) == []
    assert_near(fixed_forward(again), want, 1e-6)
    with pytest.raises(ValueError, match="already"):
        load_peft(again, tmp_path)
    with pytest.raises(ValueError, match="no LoRA"):
        save_peft(base, tmp_path / "other")


@pytest.fixture
def base_lora():
    """A FLUX with a LoRA of its ends and of one q, k, v, and that LoRA in diffusers' names."""
    base = tiny_model("flux")
    add_lora(base, 3, targets=r"img_in|final_layer\..*|double_blocks\.0\.img_attn\.qkv")
    tensors, alphas = lora_to_peft(randomize_b(base))
    return base, tensors, alphas


def test_a_lora_of_the_base_loads_onto_the_deep_model_without_what_is_bound_to_the_old_latent(base_lora):
    base, tensors, alphas = base_lora
    tensors = {f"base_model.model.{key}": value for key, value in tensors.items() if "to_k" not in key}
    deep = deep_model(tiny_model("flux"))
    assert sorted(lora_from_peft(deep, tensors, alphas)) == ["proj_out", "x_embedder"]
    # its halves are swapped twice
    modulation = deep.final_layer.adaLN_modulation[1]
    assert_near(modulation.delta(), base.final_layer.adaLN_modulation[1].delta(), 1e-6)
    # trainers often leave a part out, here k
    want = base.double_blocks[0].img_attn.qkv.delta()
    want[48:96] = 0
    assert_near(deep.double_blocks[0].img_attn.qkv.delta(), want, 1e-6)


def test_a_lora_of_the_embedder_is_saved_beside_the_embedder_itself(base_lora, tmp_path):
    """It was saved as a part of it, under a name that nothing loads."""
    base, _, _ = base_lora
    save_peft(base, tmp_path)
    again = tiny_model("flux", seed=4)
    load_peft(again, tmp_path)
    assert torch.equal(again.img_in.base.weight, base.img_in.base.weight)
    assert_near(again.img_in.delta(), base.img_in.delta(), 1e-6)


@pytest.mark.parametrize("old, new, error", [
    ("transformer_blocks.0", "transformer_blocks.7", "transformer_blocks.7"),
    ("lora_A.weight", "diff", "not a LoRA's tensor"),
    ("to_q.lora_A", "to_v.lora_A", "it is of another model"),        # q has half a LoRA
    ("x_embedder", "context_embedder", "it is of another model"),    # another shape
])
def test_a_lora_that_does_not_fit_leaves_the_model_as_it_was(old, new, error, base_lora):
    _, tensors, alphas = base_lora
    model = tiny_model("flux")
    with pytest.raises(ValueError, match=error):
        lora_from_peft(model, {key.replace(old, new): value for key, value in tensors.items()}, alphas)
    assert not lora_layers(model)


def test_parts_of_different_strength_add_up_in_one_matrix():
    g = torch.Generator().manual_seed(3)
    lora = {"transformer_blocks.0.attn.to_v.alpha": torch.tensor(15.0)}
    want = torch.zeros(3, 48, 48)
    for part, name, rank, scale in ((0, "to_q", 2, 1), (2, "to_v", 5, 3)):
        A = torch.randn(rank, 48, generator=g)
        B = torch.randn(48, rank, generator=g)
        lora[f"transformer_blocks.0.attn.{name}.lora_A.weight"] = A
        lora[f"transformer_blocks.0.attn.{name}.lora_B.weight"] = B
        want[part] = scale * B @ A
    model = tiny_model("flux")
    lora_from_peft(model, lora)
    assert_near(model.double_blocks[0].img_attn.qkv.delta(), want.view(144, 48))


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_stock_diffusers_loads_a_saved_lora_at_its_strength(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    model = tiny_model(name)
    export_diffusers(model, tmp_path)
    add_lora(model, 4, 10)
    save_peft(randomize_b(model), tmp_path)
    theirs = load_in_diffusers(diffusers, tmp_path / "transformer")
    parts = dict(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=theirs)
    if name == "flux":
        pipeline = diffusers.FluxPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipeline = diffusers.SanaPipeline(**parts)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = unmap_keys(merge_lora(model).state_dict(), TABLES[type(model)]["diffusers"])
    fused = theirs.state_dict()
    for key, value in merged.items():
        assert_near(fused[key], value)
