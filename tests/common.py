"""What the tests share."""

import ast
import hashlib
import json
import math
import os
import multiprocessing
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from quant import FP8Linear, e4m3_rows, fp8_linears

import align
import autoencoder
import bench
import checkpoints
import data
import evaluate
import fast
import finetune
import lora
import model
import sample
import shapes
import train
import quant
from align import *
from autoencoder import *
from checkpoints import *
from data import *
from evaluate import *
from fast import *
from finetune import *
from lora import *
from model import *
from sample import *
from shapes import *
from train import *
from quant import *
from bench import SWITCHES, DiffusersDrawer, Drawer, init_random_, floor, ratios, sane, self_checks, shared, spread, workloads
import train
import evaluate
import sample
import finetune
import align
from experiments import train_autoencoder as training
from experiments.train_autoencoder import train_autoencoder, measure_scale, latent_alignment_loss, training_loss



HERE = Path(__file__).parent.parent


SHARED = HERE / "../shared"


def fixture(name):
    """(config, weights, inputs, outputs) of a stored case of official code."""
    if not (SHARED / f"parity/{name}.a.json").exists():
        pytest.skip("needs ../shared/parity, outputs of the official code that are not part of this repository")
    info = json.loads((SHARED / f"parity/{name}.a.json").read_text())
    tensors = load_file(SHARED / f"parity/{name}.a.safetensors")
    part = lambda prefix: {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
    return info["config"], part("w."), part("in."), part("out.")


def manifest(name):
    if not (SHARED / f"manifests/{name}.json").exists():
        pytest.skip("needs ../shared/manifests, key lists of the published files that are not part of this repository")
    return json.loads((SHARED / f"manifests/{name}.json").read_text())


def close(a, b, rel=1e-5):
    """a equals b within rel of b's largest absolute value."""
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    assert error <= rel, f"differs by {error:.2e} of the largest value, {rel:.0e} allowed"


def off(a, b):
    """Size of the difference relative to the size of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def scramble(module, seed=0):
    """Random values of a healthy size in every parameter and statistic: nothing stays zero, one or symmetric."""
    g = torch.Generator().manual_seed(seed)
    for k, v in module.state_dict().items():
        if not v.is_floating_point():
            continue
        noise = torch.randn(v.shape, generator=g, dtype=torch.float64)
        if v.dim() > 1:
            noise *= v[0].numel() ** -0.5
        elif k.endswith("running_var"):
            noise = 0.5 + noise.abs()
        else:
            noise = noise * 0.2 + (1 if k.endswith("weight") else 0)
        v.copy_(noise)
    return module.requires_grad_(False).eval()


def hash_of(tensors):
    h = hashlib.sha256()
    for k, v in sorted(tensors.items()):
        h.update(k.encode() + v.detach().contiguous().view(torch.uint8).numpy().tobytes() if v.dim() else str(v.item()).encode())
    return h.hexdigest()


def on_meta(cls, cfg):
    with torch.device("meta"):
        return cls(cfg)


TINY_DIT = DiTConfig(hidden_size=48, depth=3, num_heads=4, patch_size=2, in_channels=4, ae="tiny-kl-f8c4", res=64, num_classes=8)


OLD_DIT = replace(TINY_DIT, clock="ddpm", predict="epsilon")


def dit_of(config):
    """A model for the config of an official or a diffusers DiT."""
    if "hidden_size" in config:
        return DiT(replace(OLD_DIT, **{k: config[k] for k in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "num_classes")}))
    nh = config["num_attention_heads"]
    return DiT(replace(OLD_DIT, hidden_size=nh * config["attention_head_dim"], depth=config["num_layers"], num_heads=nh, patch_size=config["patch_size"],
                       in_channels=config["in_channels"], num_classes=config["num_embeds_ada_norm"]))


# FLUX and SANA: one model for the config of the official code or of diffusers
def flux_of(config, channels=None, patch=1):
    """config: BFL's params or a diffusers config; channels and patch of the latent, which neither states."""
    get = lambda bfl, diffusers: config[bfl] if bfl in config else config[diffusers]
    nh = get("num_heads", "num_attention_heads")
    return FluxConfig(channels or config["in_channels"], patch, "tiny-kl-f8c4", 64, config.get("hidden_size") or nh * config["attention_head_dim"], get("depth", "num_layers"),
                      get("depth_single_blocks", "num_single_layers"), nh, tuple(get("axes_dim", "axes_dims_rope")), 10000.0, get("context_in_dim", "joint_attention_dim"),
                      get("vec_in_dim", "pooled_projection_dim"), get("guidance_embed", "guidance_embeds"))


def sana_of(config):
    official = "hidden_size" in config
    return SanaConfig(config["in_channels"], config["patch_size"], "tiny-dc-ae-f32c32", 64, config["hidden_size"] if official else config["num_attention_heads"] * 32,
                      config["depth"] if official else config["num_layers"], config["num_heads" if official else "num_cross_attention_heads"], config["mlp_ratio"],
                      config["caption_channels"])


TINY_FLUX = FluxConfig(4, 2, "tiny-kl-f8c4", 64, 48, 2, 2, 3, (4, 6, 6), 10000.0, 24, 12)


TINY_SANA = SanaConfig(8, 1, "tiny-dc-ae-f32c32", 64, 64, 2, 4, 2.5, 24)


TINIES = {"dit": TINY_DIT, "flux": TINY_FLUX, "sana": TINY_SANA}


def prompts(cfg, n=2, length=5, seed=0):
    """Random encoded prompts of different lengths for a text model."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=g)
    if isinstance(cfg, FluxConfig):
        return Text(rand(n, length, cfg.context_in_dim), None, rand(n, cfg.vec_in_dim), 1.0 + torch.arange(n) * 2.5)
    return Text(rand(n, length, cfg.caption_channels), torch.arange(length) < torch.arange(length, length - n, -1)[:, None])


def condition_of(cfg, n=2):
    return torch.arange(n) if isinstance(cfg, DiTConfig) else prompts(cfg, n)


def diffusers_text(x):
    """The inputs of a stored FLUX case as a Text."""
    get = lambda a, b: x[a] if a in x else x[b]
    return Text(get("txt", "encoder_hidden_states"), None, get("y", "pooled_projections"), x["guidance"])


FULL_SIZE = {"flux1-krea-dev.original": "flux-krea", "flux1-krea-dev.diffusers": "flux-dev", "dc-gen-flux-1k.diffusers": "dc-gen-flux-1k", "dc-gen-flux-4k.diffusers": "dc-gen-flux-4k",
             **{f"sana1.5-{size}.{layout}": f"sana-{size}" for size in ("1.6b", "4.8b") for layout in ("original", "diffusers")}}


EPSILONS = {"DiT original": lambda: on_meta(DiT, OLD_DIT), "FLUX transformer original": lambda: on_meta(Flux, TINY_FLUX), "SANA original": lambda: on_meta(Sana, TINY_SANA),
            "AutoencoderKL diffusers": lambda: on_meta(KLVAE, AUTOENCODERS["sd-vae-f8c4"]),
            "DC-AE diffusers, in-1.0 style": lambda: on_meta(DCAE, AUTOENCODERS["dc-ae-f32c32-in-1.0"]),
            "DC-AE diffusers, sana style": lambda: on_meta(DCAE, AUTOENCODERS["dc-ae-f32c32-sana-1.1"])}


DIT_FILES = {f"dit-xl-2-{res}.{layout}": "dit-xl" if res == 256 else "dit-xl-512" for res in (256, 512) for layout in ("original", "diffusers")}


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def kl_of(config):
    """Our config for an AutoencoderKL of diffusers, or for Black Forest Labs' autoencoder."""
    if "ch_mult" in config:
        return KLConfig("test", config["z_channels"], config["scale_factor"], config["shift_factor"], tuple(config["ch"] * m for m in config["ch_mult"]), config["num_res_blocks"])
    return KLConfig("test", config["latent_channels"], widths=tuple(config["block_out_channels"]), depth=config["layers_per_block"], groups=config["norm_num_groups"],
                    quant_conv=config["use_quant_conv"])


def dc_of(config):
    """Our config for an AutoencoderDC of diffusers."""
    preset = DCAEConfig("test", config["latent_channels"], widths=tuple(config["encoder_block_out_channels"]))
    return replace(stated_config(preset, {**config, "_class_name": "AutoencoderDC"}), scale=1.0)


# the four kinds of published DC-AE, small: widths and depths differ everywhere, so that a mix-up shows
STYLES = {
    "in": DCAEConfig("test-in", 8, widths=(8, 16, 32, 64), encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 2), decoder_batch_norm=True),
    "sana": DCAEConfig("test-sana", 8, widths=(16, 32, 64), encoder_depths=(1, 2, 1), decoder_depths=(2, 1, 1), encoder_attention_from=2, decoder_attention_from=2,
                       multiscale=True, strided=True, interpolate=True),
    "lite": DCAEConfig("test-lite", 8, widths=(16, 32, 64), encoder_depths=(1, 1, 2), decoder_depths=(0, 2, 1), encoder_attention_from=2, decoder_attention_from=99,
                       multiscale=True, strided=True, out_act="silu"),
    "v15": DCAEConfig("test-v15", 16, widths=(16, 16, 32, 64), encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 1), encoder_attention_from=99, decoder_attention_from=99,
                      latent_shortcut=False, out_act="silu"),
}


TINY_KL = KLConfig("test-kl", 4, 0.5, 0.25, widths=(16, 32, 32), depth=1, groups=8)


AE_FILES = {"sd-vae-ft-ema.diffusers": "sd-vae-f8c4", "flux1-vae.original": "flux-vae-f8c16", "flux1-vae.diffusers": "flux-vae-f8c16",
            **{f"{name}.{layout}": name for name in AUTOENCODERS if name.startswith("dc-ae") and "mix" not in name for layout in ("original", "diffusers")}}


def use_every_key(cfg, file):
    ae = on_meta(ae_class(cfg), cfg)
    assert map_keys(ae, file, ae_table(cfg, file)).keys() == ae.state_dict().keys()


def strips_taken(ae, kind):
    """Counts the calls of every layer of this kind."""
    calls = {}
    for name, m in ae.named_modules():
        if isinstance(m, kind):
            m.register_forward_pre_hook(lambda m, args, name=name: calls.update({name: calls.get(name, 0) + 1}))
    return calls


class Memory(TorchDispatchMode):
    """Counts the numbers in the largest tensor, on the meta device without having it."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


class Colours:
    """A source of 40 flat pictures; it can be told to fail at the n-th batch, as if killed."""

    def __init__(self, fail_at=None):
        self.left = fail_at

    def __len__(self):
        return 40

    def batch(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return (index.view(-1, 1, 1, 1) / 20 - 1).expand(-1, 3, 16, 16).contiguous(), index % 8


# weights of whole folders, in and out
def tiny_of(name):
    cfg = TINIES[name]
    return scramble(FAMILIES[type(cfg)](cfg))


def run_of(net, n=2):
    """A forward pass with fixed inputs, on our clock."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, net.cfg.in_channels, 4, 6, generator=g)
    return net(x, torch.tensor([0.2, 0.7])[:n], condition_of(net.cfg, n))


def sana_original(net):
    """A state dict of ours as NVlabs publish it."""
    extra = {"pos_embed": torch.zeros(1, 4, 64), "y_embedder.y_embedding": torch.zeros(5, 24)}
    return extra | unmap_keys(net.state_dict(), [row for row in TABLES[Sana]["original"] if row[1]])


def save(pixels, path, mode=None, **kw):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels), mode).save(path, **kw) if not isinstance(pixels, Image.Image) else pixels.save(path, **kw)


def flat_folder(root, n, text=True):
    for i in range(n):
        save(np.full((20, 24, 3), 10 * i % 256, np.uint8), root / f"{i:03d}.png")
        if text:
            (root / f"{i:03d}.txt").write_text(f" a picture, grey {i}\n")
    return root


class Averages(nn.Module):
    """An autoencoder whose latents say where they are from: the mean colour of every cell."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.weight = cfg, nn.Parameter(torch.ones(()))

    def posterior(self, x):
        z = F.avg_pool2d(x, self.cfg.f) * self.cfg.scale
        return z, (0.1 * torch.ones_like(z) if hasattr(self.cfg, "quant_conv") else None)


def averages(f, scale=5.0):
    return Averages(SimpleNamespace(name=f"averages-f{f}", f=f, channels=3, scale=scale, shift=0.0))


def posterior(f, scale=5.0):
    return Averages(SimpleNamespace(name=f"posterior-f{f}", f=f, channels=3, scale=scale, shift=0.0, quant_conv=True))


def correlation(a, b):
    """Of two maps (B,C,H,W), over the pictures, one number per channel and cell."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def calibrated(cfg):
    """A scrambled autoencoder whose latents of small shapes spread by 1."""
    ae = scramble(ae_class(cfg)(cfg))
    ae.cfg = replace(cfg, scale=1 / ae.moments(shapes(torch.arange(64), 16)[0])[0].std().item(), shift=0.0)
    return ae


class Killed(ShapesSource):
    """Ends at its n-th batch, and counts them."""

    def __init__(self, size, left=10**6):
        super().__init__(size)
        self.left = self.start = left

    def batch(self, indices):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().batch(indices)


def described_folder(root, entries):
    """Pictures 000.png ... and a metadata.jsonl of these lines, dicts or as they are."""
    flat_folder(root, 24, text=False)
    (root / "metadata.jsonl").write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return root


class Encoder:
    """Counts what it is asked; ends at its n-th prompt."""

    def __init__(self, left=10**6):
        self.left = self.start = left

    def __call__(self):
        def read(prompt, plain):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            numbers = torch.frombuffer(hashlib.sha256(f"{prompt} {plain}".encode()).digest(), dtype=torch.uint8)[None].float()
            return {"tokens": numbers.view(1, 8, 4).bfloat16(), "mask": torch.ones(1, 8, dtype=torch.bool)}
        return read


def with_lora(rank=4, alpha=None, targets=None, **kw):
    """A scrambled tiny DiT and the same with a LoRA that does something."""
    base = scramble(DiT(replace(TINY_DIT, **kw)))
    tuned = to_deep_model(base, base.cfg)
    tuned.load_state_dict(base.state_dict(), assign=True)
    names = add_lora(tuned, rank, alpha, *([targets] if targets else []))
    return base, tuned, names


def draw_b(model):
    for k, v in lora_state(model).items():
        if k.endswith(".B"):
            v.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return model


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8]), torch.tensor([1, 8])


def flux_lora_case():
    config, weights, x, out = fixture("flux_lora")
    tensors = load_file(SHARED / "parity/flux_lora.a.safetensors")
    net = load_weights(on_meta(Flux, flux_of(config)), weights, TABLES[Flux]["diffusers"])
    run = lambda net: net.patchify(net.forward_native(net.unpatchify(x["hidden_states"], (4, 6)), x["timestep"], diffusers_text(x)))
    return net, {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}, run, out


class Toy(nn.Module):
    """Answers with its input, scaled by 1 + the class number: guidance is exact arithmetic."""

    def __init__(self, channels, out=None, guided_channels=None):
        super().__init__()
        self.cfg, self.calls = SimpleNamespace(in_channels=channels, guided_channels=guided_channels), []
        self.out = out or channels

    def null_condition(self, y):
        return torch.full_like(y, 9)

    def forward(self, x, t, y):
        self.calls.append((len(x), t.tolist(), y.tolist()))
        return x.repeat(1, self.out // x.shape[1], 1, 1) * (1 + y).view(-1, 1, 1, 1)


def official_dit(name):
    config, weights, x, out = fixture(name)
    net = load_weights(dit_of(config), weights, DIT_TABLES[detect_layout(weights)[1]])
    net.cfg = replace(net.cfg, guided_channels=3)
    return net.eval(), x, out, json.loads((SHARED / f"parity/{name}.a.json").read_text())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A scrambled base called "test" with a file of its own, and a working folder."""
    monkeypatch.chdir(tmp_path)
    base = scramble(DiT(TINY_DIT))
    write_tensors(tmp_path / "base.safetensors", base.state_dict())
    monkeypatch.setitem(BASES, "test", replace(TINY_DIT, weights=str(tmp_path / "base.safetensors")))
    return base


DEEP = to_deep_latent(TINY_DIT, AUTOENCODERS["tiny-dc-ae-f32c32"])


def write_run(folder, model, names, **info):
    """A run's file that holds the tensors of these names (a predicate)."""
    facts = dict(base="test", base_weights=None, kind="align", model=config_dict(model.cfg), classes=list(SHAPES), shift=1.0) | info
    write_tensors(Path("runs") / folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if names(k)}, facts)
    return Path("runs") / folder


def trained_part(k):
    return k.startswith((DiT.EMBEDDER, DiT.HEAD)) or k.endswith((".A", ".B"))


def deep(base, seed=1):
    """The base on deep latents, with another embedder and head for every seed; its trunk is the base's own."""
    model, g = to_deep_model(base, DEEP), torch.Generator().manual_seed(seed)
    for k, v in model.state_dict().items():
        if trained_part(k):
            v.normal_(std=0.2, generator=g)
    return model


Z = torch.randn(2, 32, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8]), torch.tensor([1, 8])


QUICK = ["--count", "16", "--num-steps", "1", "--device", "cpu", "--dtype", "fp32"]


def table_of(said):
    return {row["name"]: row for row in json.loads(Path("runs/evaluate.json").read_text())["rows"]}, said.splitlines()


class FakeInception:
    """Three features and two logits of a picture, in the place of the real network."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        assert features_list == ["2048", "logits_unbiased"]
        if feature_extractor_weights_path:
            torch.load(feature_extractor_weights_path, weights_only=True)

    def to(self, device):
        return self

    eval = lambda self: self

    def __call__(self, x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 16, 16)
        return x.float().mean(dim=(2, 3)), x.float().mean(dim=(2, 3))[:, :2]


class Hub(ThreadingHTTPServer):
    """Repositories {name: {path: bytes}} as the hub serves them, for one commit. A path in `cut` breaks off in the middle
    once, one in `short` always ends early, a repository in `gated` is closed to all but the holder of a token it knows."""
    commit = "c" * 40

    def __init__(self, repos, cut=(), short=(), gated=()):
        self.repos, self.cut, self.short, self.gated, self.asked = repos, set(cut), set(short), set(gated), []
        super().__init__(("127.0.0.1", 0), HubRequest)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown(), self.server_close()


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", sent=None, **headers):
        self.send_response(status)
        for k, v in ({"Content-Length": str(len(body)), "X-Repo-Commit": Hub.commit} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(k, v)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def do_GET(self):
        hub, where = self.server, unquote(urlparse(self.path).path)
        hub.asked.append((self.command, where, self.headers.get("Range"), self.headers.get("Authorization")))
        if match := re.match(r"/api/models/(\w+/\w+)/(revision|tree)/", where):
            files = hub.repos[match[1]]
            answer = dict(id=match[1], sha=hub.commit, siblings=[dict(rfilename=f) for f in files]) if match[2] == "revision" else \
                [dict(type="file", path=f, size=len(b), oid=hashlib.sha1(b).hexdigest()) for f, b in files.items()]
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        if not (match := re.match(r"/(\w+/\w+)/resolve/\w+/(.+)", where)):
            return self.answer(404)
        repo, file = match.groups()
        if repo in hub.gated and self.headers.get("Authorization") != "Bearer hf_member":
            return self.answer(403, X_Error_Code="GatedRepo")
        if file not in hub.repos.get(repo, {}):
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, start = hub.repos[repo][file], int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        tag = dict(ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        if file in hub.short and self.command == "GET":
            return self.answer(200, body[: len(body) // 2], **tag)
        sent = len(body) // 2 if file in hub.cut and self.command == "GET" else None
        hub.cut -= {file} if sent else set()
        if start:
            return self.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **tag)
        self.answer(200, body, sent, **tag)

    do_HEAD = do_GET


def ask_hub(tmp_path, endpoint, calls, **env):
    """find_weights with these arguments in a process of its own, because the hub's library reads its environment when it
    is imported -> what each gave: a path or an error; and all that the process said."""
    code = ("import json, sys\nfrom checkpoints import find_weights\n"
            "for args in json.loads(sys.argv[1]):\n"
            "    try: print('RESULT', json.dumps(str(find_weights(*args))))\n"
            "    except ValueError as e: print('RESULT', json.dumps('error: ' + str(e)))\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | \
        {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"} | env
    done = subprocess.run([sys.executable, "-c", code, json.dumps(calls)], cwd=checkpoints.HERE, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT")], done.stdout + done.stderr


PROMPTS = ["a red cat on a mat", "two blue squares, a ring and nothing else", ""]


def small_tokenizer(kind, folder):
    """A byte-level tokenizer trained here, with the special tokens and the ends of T5's, CLIP's or Gemma's."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pad, eos, ends, special = {"t5": ("<pad>", "</s>", "$A </s>", ["<pad>", "</s>"]), "gemma": ("<pad>", "<eos>", "<bos> $A", ["<pad>", "<eos>", "<bos>"]),
                               "clip": ("<end>", "<end>", "<start> $A <end>", ["<start>", "<end>"])}[kind]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(PROMPTS * 9, tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                                                        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = tokenizers.processors.TemplateProcessing(single=ends, special_tokens=[(s, tok.token_to_id(s)) for s in special])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=pad, eos_token=eos, model_max_length=24 if kind == "clip" else 10**6).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two pipeline folders, "flux" and "sana", with tiny random text encoders of the real classes and their tokenizers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    root, size = tmp_path_factory.mktemp("encoders"), dict(vocab_size=300, num_hidden_layers=2, num_attention_heads=4)
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size, hidden_size=64, intermediate_size=96, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    gemma = transformers.Gemma2Model(transformers.Gemma2Config(**size, hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=16))
    for k, (kind, net, part) in enumerate((("t5", t5, "flux/{}_2"), ("clip", clip, "flux/{}"), ("gemma", gemma, "sana/{}"))):
        scramble(net, seed=k).save_pretrained(root / part.format("text_encoder"))
        small_tokenizer(kind, root / part.format("tokenizer"))
    return root


def official_pipeline(name, root):
    """diffusers' pipeline around the same encoders, nothing else in it."""
    import diffusers
    import transformers
    auto = lambda cls, part: getattr(transformers, cls).from_pretrained(root / name / part)
    if name == "sana":
        return diffusers.SanaPipeline(auto("AutoTokenizer", "tokenizer"), auto("Gemma2Model", "text_encoder"), None, None, None)
    return diffusers.FluxPipeline(None, None, auto("CLIPTextModel", "text_encoder"), auto("AutoTokenizer", "tokenizer"), auto("T5EncoderModel", "text_encoder_2"), auto("AutoTokenizer", "tokenizer_2"), None)


def stored_facts(name):
    file = SHARED / f"parity/{name}.a.json"
    if not file.exists():
        pytest.skip("needs ../shared/parity")
    return json.loads(file.read_text())


@pytest.fixture
def text_bases(encoders, tmp_path, monkeypatch):
    """Scrambled bases "test-flux" and "test-sana" with files of their own, in a working folder; the flags that draw little."""
    monkeypatch.chdir(tmp_path)
    for name, cls in (("flux", Flux), ("sana", Sana)):
        small = dict(depth_single=1, context_in_dim=64, vec_in_dim=64) if name == "flux" else dict(caption_channels=64)
        cfg = replace(BASES[f"tiny-{name}"], res=64, depth=1, text_tokens=32, encoders=name, weights=str(tmp_path / f"{name}.safetensors"), **small)
        write_tensors(cfg.weights, scramble(cls(cfg)).state_dict())
        monkeypatch.setitem(BASES, f"test-{name}", cfg)
    return lambda name: ["--base", f"test-{name}", "--text-encoders", str(encoders / name), "--num-steps", "2", "--device", "cpu", "--dtype", "fp32"]


def pictures(folder):
    from PIL import Image
    return {f.name: np.array(Image.open(f)) for f in sorted(Path(folder).iterdir())}


@pytest.fixture
def words_base(tmp_path, monkeypatch):
    """A scrambled distilled base "test-words" that reads words, in a working folder."""
    monkeypatch.chdir(tmp_path)
    cfg = replace(BASES["tiny-flux"], res=64, hidden_size=96, num_heads=3, depth=1, depth_single=1, weights=str(tmp_path / "words.safetensors"))
    write_tensors(cfg.weights, scramble(Flux(cfg)).state_dict())
    monkeypatch.setitem(BASES, "test-words", cfg)
    monkeypatch.setitem(sample.SETTINGS, "words", sample.SETTINGS["words"] | dict(num_steps=2))
    return cfg


def small_pair(seed=0, clock="flow"):
    """A small base on f8 latents with a live (not zero-gated) trunk, its conversion, and paired latents of 48 pictures."""
    torch.manual_seed(seed)
    predict = "epsilon" if clock == "ddpm" else "velocity"
    base = DiT(DiTConfig(32, 3, 4, 2, 4, "tiny-kl-f8c4", 64, num_classes=8, clock=clock, predict=predict)).init_from_scratch()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else None
    base.requires_grad_(False)
    model = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    g = torch.Generator().manual_seed(seed)
    z_base = torch.randn(48, 4, 16, 8, generator=g)
    mix = torch.randn(32, 4, generator=g)
    z_dc = torch.einsum("oc,bchw->bohw", mix, torch.nn.functional.avg_pool2d(z_base, 2)) * 0.5 + 0.3 * torch.randn(48, 32, 8, 4, generator=g)
    return base, model, z_dc, z_base, torch.arange(48) % 8


def run_train(out, seed=0, steps=12, loss=None, **kw):
    """A short run of the real loop on a small converted model; returns model, base, log."""
    base, model, z_dc, z_base, y = small_pair(seed)
    def flow(rows, g):
        return align.sample_loss(model, z_dc[rows], y[rows], g, objective="flow", t_sampling="logit-normal", shift=1.0, label_dropout=0.1)
    named = train.pick(model, (model.EMBEDDER, model.HEAD))
    log = train.train(out, model, named, (loss or (lambda f, m: f))(flow, model), 48, steps, **{**dict(batch=8, lr=1e-3, info={}, log_every=1, save_every=5), **kw})
    return model, base, log


class Distilled:
    """An exact guidance-distilled model: told g, it says g v(c) - (g - 1) v(null) of two given fields (Eq. 4)."""
    cfg = SimpleNamespace(in_channels=3)

    def __init__(self):
        self.w, self.told, self.rows = torch.tensor(2.0, requires_grad=True), [], []

    def null_condition(self, y):
        return replace(y, tokens=torch.zeros_like(y.tokens))

    def of(self, xt, t, y):                                           # v(c), and v(null) where the tokens are zero
        c = y.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return self.w * xt * (1 + c) + c * t.view(-1, 1, 1, 1) - 1

    def __call__(self, xt, t, y):
        g = y.guidance.view(-1, 1, 1, 1)
        self.told.append(y.guidance.clone()), self.rows.append(len(xt))
        return g * self.of(xt, t, y) - (g - 1) * self.of(xt, t, self.null_condition(y))


def distilled_inputs(n=6):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g)
    return rand(n, 3, 4, 4), torch.rand(n, generator=g), Text(rand(n, 5, 8), guidance=torch.linspace(1, 14, n)), rand(n, 3, 4, 4)


def in_process(rank, count, port, answers, job, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TQDM_DISABLE="1")
    torch.set_num_threads(1)
    try:
        answers.put((rank, job(*args)))
        train.leave()
    except BaseException as e:
        answers.put((rank, RuntimeError(f"process {rank}: {e!r}")))


def together(job, *args, count=2):
    """What job(*args) returns in each of so many processes. They come from a server that has only imported: a fork of a
    process whose threads have worked may hang."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_dcgen"])
    answers, found = context.SimpleQueue(), {}
    parts = [context.Process(target=in_process, args=(rank, count, port, answers, job, *args), daemon=True) for rank in range(count)]
    for p in parts:
        p.start()
    while len(found) < count:
        rank, answer = answers.get()
        found[rank] = answer
        if isinstance(found[rank], Exception):
            for p in parts:                                          # who waits for one that failed waits for ever
                p.kill()
            raise found[rank]
    return [found[rank] for rank in range(count)]


def small_flux(seed=0):
    """As small_pair, of a guidance-distilled FLUX with LoRA: model, latents, prompts."""
    torch.manual_seed(seed)
    base = scramble(Flux(TINY_FLUX))
    net = to_deep_model(base, to_deep_latent(TINY_FLUX, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    scramble(net.final_layer.linear)
    net.null = prompts(TINY_FLUX, 1)
    add_lora(net, 4)
    return net, torch.randn(48, 32, 2, 3, generator=torch.Generator().manual_seed(seed)), replace(prompts(TINY_FLUX, 48), guidance=None)


def job(out, name, how, steps, accumulate=1, log_every=1, dies=None):
    """A short training -> its log, its final weights, what this process was given and what it wrote. Of DiT all parameters;
    of FLUX as finetune.py trains 12B: LoRA in float32 on blocks in bf16, which run again in the backward pass."""
    device, seen, wrote = train.join("cpu"), [], []
    sys.addaudithook(lambda event, args: wrote.append(Path(args[0]).name) if event == "open" and isinstance(args[0], (str, os.PathLike)) and str(out) in str(args[0])
                     and isinstance(args[1], str) and set(args[1]) & set("wax+") else None)
    net, z, y = small_flux() if name == "flux" else [small_pair()[i] for i in (1, 2, 4)]
    objective = dict(objective="guided" if name == "flux" else "flow", t_sampling="logit-normal", shift=1.0, label_dropout=0.1, limits=(1.0, 5.0) if name == "flux" else None)
    if how == "ddp" and os.environ.get("RANK") == "1":
        scramble(net)                                                # what it begins with, apart from the first process, is of no account
    names, dtype = [k for k, _ in finetune.trainable(net, "lora" if name == "flux" else "full")], torch.bfloat16 if name == "flux" else torch.float32
    now = train.settle(net, names, device, dtype, recompute=name == "flux", shard=how == "fsdp")

    def loss(rows, g):
        seen.append((rows.tolist(), g.initial_seed()))
        if len(seen) == dies:
            raise KeyboardInterrupt
        return align.sample_loss(net, z[rows], y[rows], g, **objective)

    def watch(step, *_):
        val = align.guided_loss if name == "flux" else align.flow_matching_loss
        return dict(val_loss=align.validation_loss(net, z[:16], y[torch.arange(16)], dtype=dtype, loss=val, limits=objective["limits"]))
    log = train.train(Path(out), net, [(k, now[k]) for k in names], loss, 48, steps, batch=8, lr=1e-3, info={}, log_every=log_every, save_every=4, ema=0.9, accumulate=accumulate,
                      watch=watch, watch_every=3, dtype=dtype)
    weights = {k: train.whole(now[k]).numpy() for k in names}
    for k in weights:                                                # softmax does not see a key's bias: its gradient is rounding alone, made large by Adam
        if name == "dit" and k.endswith("attn.qkv.bias"):
            weights[k] = weights[k].reshape(3, -1)[[0, 2]]
    return log, weights, seen, wrote


def numbers(log):
    return [[r[k] for k in ("step", "loss", "grad_norm", "val_loss") if k in r] for r in log]


def two_jobs(root, name, how):
    """Four steps, four more that resume them, and four that resume what one process has left."""
    job(root / "two", name, how, 4)
    if os.environ["RANK"] == "0":
        shutil.copytree(root / "two", root / "then")
    return *job(root / "two", name, how, 8), job(root / "first", name, how, 8)[0]


def broken_job(out):
    """Killed at its sixth step: the row of the log that was being made, of steps 4 to 6, has one step in the state."""
    with pytest.raises(KeyboardInterrupt):
        job(out, "dit", "ddp", 8, log_every=3, dies=6)
    return job(out, "dit", "ddp", 8, log_every=3)[0]


def small_words(root):
    """As the fixture, for a process of its own."""
    os.chdir(root)
    BASES["test-words"] = replace(BASES["tiny-flux"], res=64, hidden_size=96, num_heads=3, depth=1, depth_single=1, weights=str(root / "words.safetensors"))
    sample.SETTINGS["words"]["num_steps"] = 2


WORDS = ["--base", "test-words", "--ae", "tiny-dc-ae-f32c32", "--pictures", "32", "--batch", "8", "--shift", "1", "--device", "cpu", "--dtype", "fp32"]


def align_job(root, out):
    small_words(root)
    align.main([*WORDS, "--stage2-steps", "3", "--head-samples", "32", "--count", "0", "--out", out])


def finetune_job(root, out, *more):
    small_words(root)
    finetune.main([*WORDS, "--init", "runs/align", "--train-steps", "3", "--rank", "4", "--ema", "0.9", "--out", out, *more])


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The embedded base, aligned in a hurry by the script itself."""
    import os
    root, here = tmp_path_factory.mktemp("project"), os.getcwd()
    os.chdir(root)
    try:
        align.main(["--pictures", "64", "--stage2-steps", "3", "--batch", "8", "--head-samples", "64", "--count", "8", "--device", "cpu"])
    finally:
        os.chdir(here)
    return root


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


EVERY = {**TINIES, "ddpm": OLD_DIT}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def fast_case(name, seed=0, dtype=torch.float32):
    """A scrambled model with its null prompt, a condition of two rows, and noise."""
    cfg = EVERY[name]
    net, g = scramble(FAMILIES[type(cfg)](cfg), seed).to(dtype), torch.Generator().manual_seed(seed + 1)
    cond = condition_of(cfg)
    if isinstance(cond, Text):
        net.null, cond = prompts(cfg, 1, seed=9).to(dtype=dtype), cond.to(dtype=dtype)
    return net, cond, torch.randn(2, cfg.in_channels, 4, 6, generator=g)



# counted by others, in TFLOPs: tokens of text and image, linear maps and attention of a step, decoding one picture
COUNTS = {("flux-krea", 1024): ((4608, 59.51, 14.87, 10.47), (1536, 19.85, 1.65, 11.08)), ("flux-krea", 2048): ((16896, 218.2, 200.0, 48.5), (1536, 19.85, 1.65, 47.6)),
          ("flux-krea", 4096): ((66048, 852.8, 3055, 299.5), (4608, 59.52, 14.87, 190.4))}


FORWARDS = {("sana-1.6b", 1024): ((1024, 2.967, 8.37), (256, 0.837, 11.9)), ("dit-xl", 256): ((256, 0.2372, 0.62), (64, 0.0581, 0.69)), ("dit-xl", 512): ((1024, 1.0491, 2.51), (256, 0.2373, 2.77))}


class Played:
    """Stands in for a Drawer: draws in no time, and may fail at its n-th step."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.work, self.model, self.ae, self.device = SimpleNamespace(name="it"), nn.Linear(1, 1), nn.Linear(1, 1), torch.device("cpu")
        self.calls, self.fails_at, self.seconds, self.times = [], fails_at, seconds, time_grid(20)

    def noise(self, generator):
        return torch.randn(64, generator=generator)

    def denoise(self, x0, steps=None):
        self.calls.append(steps)
        time.sleep(self.seconds * (20 if steps is None else steps))
        if len(self.calls) == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ...")
        return x0

    def decode(self, z):
        return z

    def to_host(self, x):
        return x
