"""What several test files share: stored cases of the official code, comparisons, small models and bases.

Stored cases lie outside of this repository, in ../shared/parity or in the folder DCGEN_PARITY. A case is a
pair of files <kind>.<letter>.json and .safetensors. Tests read every size from it; without it they skip.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder import AUTOENCODERS, DCAEConfig, KLConfig
from checkpoints import write_tensors
from lora import lora_state
from model import (BASES, FAMILIES, DiT, DiTConfig, Flux, FluxConfig, Sampling, SanaConfig, Text,
                   to_deep_latent, to_deep_model)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PARITY = Path(os.environ.get("DCGEN_PARITY", SHARED / "parity"))

NOT_INCLUDED = "which are not part of this repository"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- stored cases of the official code -----------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A stored case: its JSON, and weights, inputs and outputs by name; `rest` holds other tensors (LoRA)."""
    info: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rest: dict[str, Tensor]

    @property
    def config(self) -> dict:
        return self.info["config"]


def parity_cases(*kinds: str) -> list:
    """Names of all stored cases of these kinds, as ["dit.a", "dit.b", ...], for parametrize; a skipped entry
    if there are none."""
    found = []
    for kind in kinds:
        found += [file.stem for file in sorted(PARITY.glob(f"{kind}.*.json"))]
    if found:
        return found
    reason = f"needs stored outputs of the official code ({', '.join(kinds)}), {NOT_INCLUDED}"
    return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def parity(case: str) -> Case:
    """The stored case of this name; the test is skipped if it is not there."""
    file = PARITY / f"{case}.json"
    if not file.is_file():
        pytest.skip(f"needs {case} of the stored outputs of the official code, {NOT_INCLUDED}")
    info = json.loads(file.read_text())
    parts = {"w": {}, "in": {}, "out": {}}
    rest = {}
    # a case of numbers alone has no tensors
    tensors = file.with_suffix(".safetensors")
    if tensors.is_file():
        for key, value in load_file(tensors).items():
            prefix, _, name = key.partition(".")
            if prefix in parts:
                parts[prefix][name] = value
            else:
                rest[key] = value
    return Case(info, parts["w"], parts["in"], parts["out"], rest)


def manifest(name: str) -> dict:
    """Key names and shapes of a published file; the test is skipped if the manifests are not there."""
    file = SHARED / f"manifests/{name}.json"
    if not file.is_file():
        pytest.skip(f"needs ../shared/manifests, key lists of the published files, {NOT_INCLUDED}")
    return json.loads(file.read_text())


# ---- comparisons ---------------------------------------------------------------------------------

def assert_near(a: Tensor, b: Tensor, rel: float = 1e-5):
    """a equals b within rel of b's largest absolute value."""
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs().max()
    error = (difference / b.double().abs().max()).item()
    assert error <= rel, f"differs by {error:.2e} of the largest value, {rel:.0e} allowed"


def relative_error(a: Tensor, b: Tensor) -> float:
    """|| a - b || / || b ||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of all bytes of all tensors."""
    h = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        flat = value.detach().contiguous().reshape(-1)
        h.update(key.encode())
        h.update(flat.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


# ---- small models --------------------------------------------------------------------------------

def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random values of a healthy size in every parameter and statistic, frozen, in eval mode:
    nothing stays zero, one or symmetric."""
    g = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=g, dtype=torch.float64)
        if value.dim() > 1:
            noise *= value[0].numel() ** -0.5
        elif key.endswith("running_var"):
            noise = 0.5 + noise.abs()
        else:
            noise = 0.2 * noise + float(key.endswith("weight"))
        value.copy_(noise)
    return module.requires_grad_(False).eval()


def on_meta(cls, cfg) -> nn.Module:
    with torch.device("meta"):
        return cls(cfg)


TINY_DIT = DiTConfig(
    hidden_size=48, depth=3, num_heads=4,
    patch_size=2, in_channels=4, ae="tiny-kl-f8c4", res=64, num_classes=8)
DDPM_DIT = replace(TINY_DIT, clock="ddpm", predict="epsilon", sampling=Sampling(sampler="ddpm"))
TINY_FLUX = FluxConfig(
    in_channels=4, patch_size=2, ae="tiny-kl-f8c4", res=64,
    hidden_size=48, depth=2, depth_single=2, num_heads=3,
    axes_dim=(4, 6, 6), context_in_dim=24, vec_in_dim=12)
TINY_SANA = SanaConfig(
    in_channels=8, patch_size=1, ae="tiny-dc-ae-f32c32", res=64,
    hidden_size=64, depth=2, num_heads=4, caption_channels=24)
TINIES = {"dit": TINY_DIT, "flux": TINY_FLUX, "sana": TINY_SANA}
EVERY = {**TINIES, "ddpm": DDPM_DIT}

TINY_KL = KLConfig("test-kl", 4, 0.5, 0.25, widths=(16, 32, 32), depth=1, groups=8)
# the four kinds of published DC-AE, small: widths and depths differ everywhere, so that a mix-up shows
DCAE_STYLES = {
    "in": DCAEConfig(
        "test-in", 8, widths=(8, 16, 32, 64),
        encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 2),
        decoder_batch_norm=True),
    "sana": DCAEConfig(
        "test-sana", 8, widths=(16, 32, 64),
        encoder_depths=(1, 2, 1), decoder_depths=(2, 1, 1),
        encoder_attention_from=2, decoder_attention_from=2,
        multiscale=True, strided=True, interpolate=True),
    "lite": DCAEConfig(
        "test-lite", 8, widths=(16, 32, 64),
        encoder_depths=(1, 1, 2), decoder_depths=(0, 2, 1),
        encoder_attention_from=2, decoder_attention_from=99,
        multiscale=True, strided=True, out_act="silu"),
    "v15": DCAEConfig(
        "test-v15", 16, widths=(16, 16, 32, 64),
        encoder_depths=(0, 1, 2, 1), decoder_depths=(0, 2, 1, 1),
        encoder_attention_from=99, decoder_attention_from=99,
        latent_shortcut=False, out_act="silu"),
}


def random_text(cfg, n: int = 2, length: int = 5, seed: int = 0) -> Text:
    """Random encoded prompts for a text model; SANA's mask gives each a length of its own."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(cfg, FluxConfig):
        tokens = torch.randn(n, length, cfg.context_in_dim, generator=g)
        pooled = torch.randn(n, cfg.vec_in_dim, generator=g)
        return Text(tokens, None, pooled, 1.0 + 2.5 * torch.arange(n))
    tokens = torch.randn(n, length, cfg.caption_channels, generator=g)
    lengths = length - torch.arange(n) % length                      # never 0: attention to nothing is nan
    return Text(tokens, torch.arange(length) < lengths[:, None])


def random_condition(cfg, n: int = 2):
    """Classes 0, 1, ... for a class model, random_text for a text model."""
    return torch.arange(n) if isinstance(cfg, DiTConfig) else random_text(cfg, n)


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """A scrambled small model of EVERY; a text model has its null prompt."""
    cfg = EVERY[name]
    net = scramble(FAMILIES[type(cfg)](cfg), seed)
    if cfg.text_encoder:
        net.null = random_text(cfg, 1, seed=9)
    return net


def fixed_forward(net: nn.Module, n: int = 2) -> Tensor:
    """A forward pass with fixed inputs, on the project's clock."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, net.cfg.in_channels, 4, 6, generator=g)
    t = torch.tensor([0.2, 0.7])[:n]
    return net(x, t, random_condition(net.cfg, n))


DEEP_DIT = to_deep_latent(TINY_DIT, AUTOENCODERS["tiny-dc-ae-f32c32"])


def deep_model(base: nn.Module, seed: int = 1) -> nn.Module:
    """The base on deep latents with another embedder and head for every seed; its trunk is the base's own."""
    model = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    g = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.startswith((model.EMBEDDER, model.HEAD)):
            value.normal_(std=0.2, generator=g)
    return model


def randomize_b(model: nn.Module) -> nn.Module:
    """Random B, which starts at zero: the LoRA does something."""
    g = torch.Generator().manual_seed(1)
    for key, value in lora_state(model).items():
        if key.endswith(".B"):
            value.normal_(std=0.05, generator=g)
    return model


# ---- small worlds: bases with files of their own, in a working folder ----------------------------

@pytest.fixture
def tiny_base(tmp_path, monkeypatch):
    """A scrambled class base; BASES names its file "test", and the test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    base = scramble(DiT(TINY_DIT))
    file = tmp_path / "base.safetensors"
    write_tensors(file, base.state_dict())
    monkeypatch.setitem(BASES, "test", replace(TINY_DIT, weights=str(file)))
    return base


WORDS_BASE = replace(
    BASES["tiny-flux"], res=64,
    hidden_size=96, num_heads=3, depth=1, depth_single=1,
    sampling=replace(BASES["tiny-flux"].sampling, num_steps=2))
WORDS_FLAGS = [
    "--base", "test-words", "--ae", "tiny-dc-ae-f32c32", "--pictures", "32", "--batch", "8", "--shift", "1",
    "--device", "cpu", "--dtype", "fp32",
]


def make_words_base(root: Path):
    """Add a scrambled distilled base "test-words", which reads words, to BASES; its file is in root."""
    cfg = replace(WORDS_BASE, weights=str(root / "words.safetensors"))
    if not Path(cfg.weights).exists():
        write_tensors(cfg.weights, scramble(Flux(cfg)).state_dict())
    BASES["test-words"] = cfg
    return cfg


@pytest.fixture
def words_base(tmp_path, monkeypatch):
    """The config of make_words_base's base, in a folder of its own; BASES is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BASES, "test-words", None)
    return make_words_base(tmp_path)


@pytest.fixture
def fresh_compiler():
    """The counters of torch.compile, with nothing compiled before or after the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# ---- tiny text encoders of the real classes ------------------------------------------------------

PROMPTS = ["a red cat on a mat", "two blue squares, a ring and nothing else", ""]


def small_tokenizer(kind: str, folder: Path):
    """Write a byte-level tokenizer, trained here, with the special tokens and ends of T5, CLIP or Gemma."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pad, eos, ends, special = {
        "t5": ("<pad>", "</s>", "$A </s>", ["<pad>", "</s>"]),
        "gemma": ("<pad>", "<eos>", "<bos> $A", ["<pad>", "<eos>", "<bos>"]),
        "clip": ("<end>", "<end>", "<start> $A <end>", ["<start>", "<end>"]),
    }[kind]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(PROMPTS * 9, trainer)
    ids = [(token, tok.token_to_id(token)) for token in special]
    tok.post_processor = tokenizers.processors.TemplateProcessing(single=ends, special_tokens=ids)
    longest = 24 if kind == "clip" else 10**6
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token=pad, eos_token=eos, model_max_length=longest)
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    """A folder of two pipelines, "flux" and "sana", with tiny random text encoders of the real classes and
    their tokenizers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("encoders")
    size = dict(
        vocab_size=300, num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=96)
    t5 = transformers.T5Config(
        vocab_size=300, num_layers=2, num_heads=4,
        d_model=64, d_kv=16, d_ff=96, feed_forward_proj="gated-gelu")
    clip = transformers.CLIPTextConfig(
        **size, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    gemma = transformers.Gemma2Config(**size, num_key_value_heads=2, head_dim=16)
    networks = [
        ("t5", transformers.T5EncoderModel(t5), "flux/{}_2"),
        ("clip", transformers.CLIPTextModel(clip), "flux/{}"),
        ("gemma", transformers.Gemma2Model(gemma), "sana/{}"),
    ]
    for seed, (kind, net, part) in enumerate(networks):
        scramble(net, seed).save_pretrained(root / part.format("text_encoder"))
        small_tokenizer(kind, root / part.format("tokenizer"))
    return root
