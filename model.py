"""The diffusion transformers that DC-Gen moves to another latent space.

Every family here has the same three named stages, because they are what the method trains, one after the other:

    forward(x, t, cond) = head(trunk(embed(x)))

    embed  (B,C,H,W) -> (B,N,D)   the patch embedder, bound to one latent space       stage 1 trains it (Eq. 1)
    trunk  (B,N,D)   -> (B,N,D)   the blocks, the knowledge worth keeping             stage 3 adapts it by LoRA
    head   (B,N,D)   -> (B,C,H,W) the output head, bound to the latent space as well  stage 2 trains it

One clock for the whole project: t in [0,1] with 0 = noise and 1 = data, x_t = (1-t) x0 + t x1, and a model returns
the velocity v = x1 - x0 (arXiv 2509.25180, Eq. 2). A family with a clock of its own translates in its `own_clock` and
`velocity`, nowhere else.

    DiT    class labels; adaLN, softmax attention; DDPM's clock, epsilon         arXiv 2212.09748
    FLUX   text; two token streams that become one, rotary positions             black-forest-labs/flux
    SANA   text by cross-attention; linear attention, convolutions, no positions arXiv 2410.10629, 2501.18427

Reading order: configs, conditions, small layers, what the families share, DiT, FLUX, SANA, weights in, weights out.
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


def run(main):
    """A script's main with the user's errors as one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except ValueError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted", file=sys.stderr) or 130)


def fast_bf16(device) -> bool:
    """Whether bf16 matrix work is faster than fp32 on this device: yes on GPUs, on a CPU only with the instructions."""
    if torch.device(device).type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return True


# ---- configs: a model and its latent space are named together --------------------------------------------------------

@dataclass(frozen=True)
class DiTConfig:
    """Class-conditional DiT (arXiv 2212.09748) in one latent space.

    clock    what the trunk was trained to read as time: "flow" = 1000 t, "ddpm" = an integer step of the 1000-step
             linear-beta chain (step 0 = nearly data)
    predict  what the head puts out: "velocity" (C channels), or "epsilon" (2C: the noise and a learned variance)
    """
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    in_channels: int
    ae: str
    res: int                      # pixels a side it was trained at
    num_classes: int = 1000
    clock: str = "flow"
    predict: str = "velocity"
    weights: str | None = None    # shipped file, or "repository::file" on the model hub
    guided_channels: int | None = None   # classifier-free guidance acts on the first so many (None: all)
    pos_step: float = 1.0         # distance of neighbouring tokens in the position table

    encoders = None                # labels need nobody to read them

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.predict == "epsilon" else 1)


@dataclass(frozen=True)
class FluxConfig:
    """FLUX.1's MMDiT in one latent space: only what differs between the models of this family. Packing p x p cells into a
    token belongs to embed and head, so the latent and patch_size alone tell f8p2 from f32p1 and f64p1."""
    in_channels: int
    patch_size: int
    ae: str
    res: int = 1024
    hidden_size: int = 3072
    depth: int = 19                             # blocks with a stream each for image and text
    depth_single: int = 38                      # blocks in which both are one sequence
    num_heads: int = 24
    axes_dim: tuple[int, ...] = (16, 56, 56)    # of a head's numbers: how many turn with (nothing, row, column)
    theta: float = 10000.0
    context_in_dim: int = 4096                  # of a text token (T5-XXL)
    vec_in_dim: int = 768                       # of the pooled text (CLIP-L)
    guidance_embed: bool = True                 # distilled: reads the guidance as a number
    text_tokens: int = 512
    encoders: str = "flux"                      # who reads the prompts: data.TEXT_ENCODERS
    weights: str | None = None
    pos_step: float = 1.0                       # distance of neighbouring tokens

    clock, predict, guided_channels = "flow", "velocity", None

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def token_channels(self) -> int:            # numbers in one packed token: all that a weight file shows of the latent
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True)
class SanaConfig:
    """SANA-1.5. num_heads are those of cross-attention; linear attention has heads of 32.

    integer_time   cut the clock to a whole step of 1000 before it is embedded, as the official code does. Off: its own
                   training drew whole steps, but between two of them the model is smooth, and samplers ask for fractions
    clamp          cut the output of linear attention to fp16's range. Weights that were trained in fp16 count on it even
                   where the arithmetic is wider; `build` turns it on for files that hold fp16"""
    in_channels: int
    patch_size: int
    ae: str
    res: int = 1024
    hidden_size: int = 2240
    depth: int = 20
    num_heads: int = 20
    mlp_ratio: float = 2.5
    caption_channels: int = 2304                # of a text token (Gemma-2-2B)
    text_tokens: int = 300
    encoders: str = "sana"                      # as FLUX's
    caption_scale: float = 0.01                 # what the norm of the caption starts with: Gemma's features are large
    integer_time: bool = False
    clamp: bool = False
    weights: str | None = None

    clock, predict, guided_channels = "flow", "velocity", None

    @property
    def out_channels(self) -> int:
        return self.in_channels


def _dit(hidden_size, depth, num_heads, **kw):
    return DiTConfig(hidden_size, depth, num_heads, **{**dict(patch_size=2, in_channels=4, ae="sd-vae-f8c4", res=256, clock="ddpm", predict="epsilon", guided_channels=3), **kw})


BASES = {
    "tiny":       _dit(192, 8, 6, ae="tiny-kl-f8c4", res=128, num_classes=8, clock="flow", predict="velocity", guided_channels=None, weights="weights/tiny-dit.safetensors"),
    "dit-xl":     _dit(1152, 28, 16, weights="facebook/DiT-XL-2-256::transformer/diffusion_pytorch_model.bin"),
    "dit-xl-512": _dit(1152, 28, 16, res=512, weights="facebook/DiT-XL-2-512::transformer/diffusion_pytorch_model.bin"),
    # never published as finished models; to train from scratch (finetune.py --init scratch) or to load from a file
    "dit-l":      _dit(1024, 24, 16, clock="flow", predict="velocity", guided_channels=None),
    "dit-b":      _dit(768, 12, 12, clock="flow", predict="velocity", guided_channels=None),
    "dit-s":      _dit(384, 12, 6, clock="flow", predict="velocity", guided_channels=None),

    "flux-krea":      FluxConfig(16, 2, "flux-vae-f8c16", weights="black-forest-labs/FLUX.1-Krea-dev::flux1-krea-dev.safetensors"),
    "flux-dev":       FluxConfig(16, 2, "flux-vae-f8c16", weights="black-forest-labs/FLUX.1-dev::flux1-dev.safetensors"),
    # the authors' own converted models: folders of a diffusers pipeline, autoencoder and its scale included
    "dc-gen-flux-1k": FluxConfig(32, 1, "dc-ae-f32c32-in-1.0", weights="nvidia/DC-Gen-FLUX.1-Krea-Dev::DC-Gen-FLUX.1-Krea-Dev-v1.0-Res1K/"),
    "dc-gen-flux-4k": FluxConfig(128, 1, "dc-ae-f64c128-1.5", res=4096, weights="nvidia/DC-Gen-FLUX.1-Krea-Dev::DC-Gen-FLUX.1-Krea-Dev-v1.0-Res4K/"),
    "sana-1.6b":      SanaConfig(32, 1, "dc-ae-f32c32-sana-1.1", weights="Efficient-Large-Model/SANA1.5_1.6B_1024px::checkpoints/SANA1.5_1.6B_1024px.pth"),
    "sana-4.8b":      SanaConfig(32, 1, "dc-ae-f32c32-sana-1.1", depth=60, weights="Efficient-Large-Model/SANA1.5_4.8B_1024px::checkpoints/SANA1.5_4.8B_1024px.pth"),
    # the same classes, small, on the procedural pictures with captions
    "tiny-flux": FluxConfig(4, 2, "tiny-kl-f8c4", 128, 192, depth=2, depth_single=4, num_heads=6, axes_dim=(8, 12, 12), context_in_dim=256, vec_in_dim=256,
                            text_tokens=16, encoders="words", weights="weights/tiny-flux.safetensors"),
    "tiny-sana": SanaConfig(4, 2, "tiny-kl-f8c4", 128, 192, depth=6, num_heads=6, caption_channels=256, text_tokens=16, encoders="words", caption_scale=1.0,
                            weights="weights/tiny-sana.safetensors"),
}


def to_deep_latent(cfg, ae, predict: str = "velocity", pos_step: float = 1.0):
    """The paper's idea in one line: the same model, on the latents of a deeper autoencoder, one token per latent cell.
    ae: an autoencoder's config (autoencoder.AUTOENCODERS). DiT's old head came with a variance; the new one is trained
    with the flow loss and does without, unless predict="epsilon" keeps the DDPM objective. pos_step 1 counts the new grid by ones, as the
    authors do; 2 spreads a grid of half the side over the places that the base knows (SANA has no positions)."""
    new = dict(in_channels=ae.channels, patch_size=1, ae=ae.name, weights=None)
    if isinstance(cfg, DiTConfig):
        return replace(cfg, **new, predict=predict, pos_step=pos_step, guided_channels=None)
    if predict != "velocity":
        raise ValueError(f"predict={predict!r} is DiT's; FLUX and SANA were trained to predict a velocity")
    return replace(cfg, **new, **(dict(pos_step=pos_step) if isinstance(cfg, FluxConfig) else {}))


# ---- conditions: class labels are a tensor (B,), prompts are a Text ---------------------------------------------------

@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts, what the text families take for a condition.
    tokens (B,L,D); mask (B,L) bool, True = a real token (SANA; FLUX reads its padding, as it was trained);
    pooled (B,P) one vector a prompt (FLUX); guidance (B,) the number that a distilled model is told (FLUX)"""
    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def map(self, f, *others: "Text") -> "Text":
        """f of every part; a part that any of them lacks is lacking in the result."""
        parts = ([getattr(text, field.name) for text in (self, *others)] for field in fields(self))
        return Text(*(None if any(p is None for p in part) else f(*part) for part in parts))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Text":
        return self.map(lambda part: part[rows])

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Text":
        """Moved; the dtype is that of tokens and pooled. The guidance stays float32: it is multiplied by 1000."""
        moved = self.map(lambda part: part.to(device))
        return moved if dtype is None else replace(moved, tokens=moved.tokens.to(dtype), pooled=None if moved.pooled is None else moved.pooled.to(dtype))


def cat_conditions(parts: list):
    """Conditions one behind the other along the batch, labels and Texts alike."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    lengths = {part.tokens.shape[1] for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"prompts of {' and '.join(map(str, sorted(lengths)))} tokens cannot share a batch; encode them to one length")
    return parts[0].map(lambda *same: torch.cat(same), *parts[1:])


def choose_conditions(rows: Tensor, a, b):
    """Row by row: a where rows (B,) is True, b elsewhere."""
    pick = lambda x, y: torch.where(rows.to(x.device).view(-1, *[1] * (x.ndim - 1)), x, y)
    return pick(a, b) if isinstance(a, Tensor) else a.map(pick, b)


# ---- small layers ----------------------------------------------------------------------------------------------------

def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of a clock reading, cosines first. t (B,) on the scale the model was trained with -> (B,dim) float32.
    Always in float32: bf16 has 8 bits of mantissa and merges half of 1000 steps. (DiT models.py: exponent over dim/2)"""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


@lru_cache(maxsize=32)
def sincos_2d(dim: int, height: int, width: int, step: float = 1.0, device="cpu") -> Tensor:
    """Fixed 2-D position table of a grid -> (HW,dim) float32; the first half encodes the column, the second the row.
    Place i lies at step i + (step - 1) / 2: the middle of the `step` cells of a finer grid that it covers. Computed for
    the grid at hand and never loaded: a table of the old grid would fit by accident."""
    cpu = dict(dtype=torch.float64, device="cpu")                    # cached: never under whoever's `with torch.device`
    omega = 10000.0 ** (-torch.arange(dim // 4, **cpu) / (dim / 4))
    place = lambda n: step * torch.arange(n, **cpu) + (step - 1) / 2
    rows, cols = torch.meshgrid(place(height), place(width), indexing="ij")
    waves = lambda pos: torch.cat([(a := pos.reshape(-1, 1) * omega).sin(), a.cos()], dim=1)
    return torch.cat([waves(cols), waves(rows)], dim=1).float().to(device)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def full(x: Tensor) -> Tensor:
    """x in float32 (float64 stays): for the islands that are too delicate for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """ReLU linear attention, sum_j v_j (k_j . q_i) / sum_j (k_j . q_i): cost linear in N. (SANA, DC-AE)
    q, k, v (B,heads,d,N) -> (B,heads,d,N) in v's dtype. The core is float32 whatever autocast says: sums over thousands
    of tokens overflow fp16 and lose bf16 its digits, and eps = 1e-15 is zero in fp16."""
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        k, q = full(F.relu(k)), full(F.relu(q))
        state = full(v) @ k.transpose(-1, -2)                        # B nh d d   never N x N
        total = k.sum(dim=-1, keepdim=True).transpose(-1, -2)        # B nh 1 d
        return (state @ q).div(total @ q + eps).to(v.dtype)          # B nh d N


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q (B,N,heads,d), k, v (B,M,heads,d), mask (B,M) bool, True = look here -> (B,N,heads d)."""
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in float32, times a learned weight that goes by `name` in the official file."""

    def __init__(self, dim: int, eps: float, name: str = "weight"):
        super().__init__()
        self.name, self.eps = name, eps
        self.register_parameter(name, nn.Parameter(torch.ones(dim)))

    def forward(self, x):
        return F.rms_norm(full(x), x.shape[-1:], None, self.eps).to(x.dtype) * getattr(self, self.name).to(x.dtype)


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of an image (B,C,H,W) with weight and bias; every pixel by itself, so it is local."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(full(x.movedim(1, -1)), x.shape[1:2], None, self.eps).to(x.dtype)
        return (y * self.weight.to(x.dtype) + self.bias.to(x.dtype)).movedim(-1, 1)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck, 1x1 up, 3x3 depthwise, gate, 1x1 down. (SANA's Mix-FFN; DC-AE's local block, normed)
    (B,C,H,W) -> (B,C,H,W), without the residual."""

    def __init__(self, channels: int, expand: float = 4, norm: bool = False):
        super().__init__()
        hidden = int(expand * channels)
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels) if norm else nn.Identity()

    def forward(self, x):
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return self.norm(self.conv_point(x * F.silu(gate)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x)                                          # B C H W -> B D H/p W/p


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, freq_dim: int = 256):
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(nn.Linear(freq_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, clock):
        return self.mlp(timestep_embedding(clock, self.freq_dim).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, size_in: int, hidden: int, size_out: int):
        super().__init__()
        self.fc1 = nn.Linear(size_in, hidden)
        self.fc2 = nn.Linear(hidden, size_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(dim: int) -> nn.LayerNorm:
    """The norm before a modulation, which brings its own scale and shift."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def adaln(hidden_size: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = adaln(hidden_size, 2)

    def features(self, x, mod):
        """The input of the last linear map (B,N,D): with a frozen trunk the head's loss is least squares in it.
        mod (B,2D) = adaLN_modulation(c)"""
        shift, scale = mod.chunk(2, dim=1)
        return modulate(self.norm_final(x), shift, scale)


def compile_layers(layers, **options):
    """torch.compile layer by layer, for fixed shapes: the same speed as the whole model at once, and layers of one class and
    size share one program. A graph break is an error. options: torch.compile's."""
    import torch._dynamo
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)      # the programs of all layers lie in one cache
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, **options)


# ---- what the families share -------------------------------------------------------------------------------------------

class Condition(NamedTuple):
    """All that trunk and head read besides the tokens.
    mods     of every block in turn and last of the head, (B,chunks D): how clock and vectors modulate it. A step changes
             these and nothing else, so a sampler may compute those of all its steps at once (sample.Steps)
    context  the family's own: what stays the same for all steps of an image"""
    mods: list[Tensor]
    context: tuple


class Backbone(nn.Module):
    """The three stages in a row. A family has embed, modulations, context, trunk, head_features; its own_clock and velocity;
    and the names of what is bound to the latent space, EMBEDDER and HEAD, both of which end in one linear map (HEAD_TRAINED: with
    what else of the head keeps the base's weights but learns with it).

    grid, wherever it is asked for, is the latent's (H,W)."""

    EMBEDDER = HEAD = HEAD_TRAINED = ""
    null: Text | None = None                                         # the encoded empty prompt, one row; set by who encodes prompts

    def condition(self, clock: Tensor, cond, grid: tuple[int, int]) -> Condition:
        """A reading (B,) of the family's own clock, and classes (B,) or a Text."""
        return Condition(self.modulations(clock, cond), self.context(cond, grid))

    def head(self, h: Tensor, c: Condition, grid: tuple[int, int]) -> Tensor:
        """(B,N,D) -> (B,C_out,H,W)."""
        return self.unpatchify(self.head_linear(self.head_features(h, c)), grid)

    def network(self, x: Tensor, clock: Tensor, cond) -> Tensor:
        """The bare network on its own clock: what the official code calls forward. (B,C,H,W) -> (B,C_out,H,W)"""
        grid = x.shape[-2:]
        c = self.condition(clock, cond, grid)
        h = self.embed(x)                                            # B N D
        h = self.trunk(h, c)                                         # B N D
        return self.head(h, c, grid)                                 # B C_out H W

    def forward(self, x: Tensor, t: Tensor, cond) -> Tensor:
        """Velocity v = x1 - x0 at x_t. x (B,C,H,W), t (B,) in [0,1] with 0 = noise, cond classes (B,) or a Text."""
        x_in, clock = self.own_clock(x, t)
        return self.velocity(self.network(x_in, clock, cond), x, t)

    def null_condition(self, cond: Text) -> Text:
        """The condition that stands for "no condition", in training and in sampling alike: the encoded empty prompt, once
        for every row of cond and with its guidance. A null without a mask of its own takes cond's. ValueError if none is set."""
        if self.null is None:
            raise ValueError(f"this {type(self).__name__} does not know its null prompt yet: encode \"\" and set model.null")
        null = self.null.to(cond.device, cond.tokens.dtype).map(lambda part: part.expand(len(cond), *part.shape[1:]))
        return replace(null, mask=cond.mask if null.mask is None else null.mask, guidance=cond.guidance)

    def patchify(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,N,p p C), numbers of a token in the order of the head's outputs."""
        p = self.cfg.patch_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0] // p, p=p, q=p)

    def new_embedder_and_head(self):
        """Xavier-uniform weights and zero biases for what is bound to the latent space. The head is not zeroed here:
        a zero head passes no gradient to the embedder behind it."""
        for layer in (self.embed_linear, self.head_linear):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            nn.init.zeros_(layer.bias)
        return self

    def initialise(self):
        """For training from scratch: Xavier-uniform maps, zero biases; then what the family starts otherwise, and a zero
        head. Convolutions other than the embedder keep PyTorch's initialisation."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.initialise_own()
        self.new_embedder_and_head()
        nn.init.zeros_(self.head_linear.weight)
        return self


# ---- DiT -------------------------------------------------------------------------------------------------------------

class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)   # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, hidden_size)
        self.adaLN_modulation = adaln(hidden_size, 6)

    def forward(self, x, mod):                                       # x (B,N,D), mod (B,6D) = adaLN_modulation(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(Backbone):
    """DiT on any latent and any grid whose sides divide by the patch size. Module names are the official file's."""

    # What is bound to the latent space, and so new after a change of it. The final adaLN reads only (t, y): it keeps the
    # base's weights, and goes on learning with the new head.
    EMBEDDER, HEAD, HEAD_TRAINED = "x_embedder.", "final_layer.linear.", "final_layer."

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg = cfg
        D = cfg.hidden_size
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(cfg.num_classes, D)
        self.blocks = nn.ModuleList(DiTBlock(D, cfg.num_heads) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(D, cfg.patch_size, cfg.out_channels)

    def embed(self, x: Tensor) -> Tensor:
        """Latent (B,C,H,W) -> patch embeddings with their positions (B,N,D), N = HW/p^2."""
        h = self.x_embedder(x)                                       # B D H/p W/p
        # in the weights' type: under autocast the residual stream, which starts here, stays float32
        pos = sincos_2d(h.shape[1], *h.shape[-2:], self.cfg.pos_step, h.device).to(self.x_embedder.proj.weight.dtype)
        return rearrange(h, "b d h w -> b (h w) d") + pos

    def modulations(self, clock: Tensor, y: Tensor) -> list[Tensor]:
        """Clock reading (B,) and class (B,), num_classes = none: their sum modulates every block and the head."""
        c = self.t_embedder(clock) + self.y_embedder(y)
        return [layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)]

    def context(self, y: Tensor, grid: tuple[int, int]) -> tuple:
        return ()

    def trunk(self, h: Tensor, c: Condition, taps: list | None = None) -> Tensor:
        """(B,N,D) -> (B,N,D). taps, if a list, receives every block's output: the features of Fig. 4(a)."""
        for block, mod in zip(self.blocks, c.mods):
            h = block(h, mod)
            if taps is not None:
                taps.append(h)
        return h

    def head_features(self, h: Tensor, c: Condition) -> Tensor:
        """What the last linear map of the head reads (B,N,D): for the closed form of align.py."""
        return self.final_layer.features(h, c.mods[-1])

    @property
    def embed_linear(self) -> nn.Conv2d:
        return self.x_embedder.proj

    @property
    def head_linear(self) -> nn.Linear:
        return self.final_layer.linear

    # -- the one place where DiT's own clock is translated --

    def own_clock(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t in the project's clock -> the network's input and the reading of its own clock.

        A DDPM state is z = sqrt(ab) x1 + sqrt(1-ab) x0. Scaling x_t by 1 / sqrt(t^2 + (1-t)^2) gives exactly such a
        state, with the same signal-to-noise ratio t / (1-t) = sqrt(ab / (1-ab)). The step that has this ratio is looked
        up between the 1000 integers (the sinusoids do not mind fractions)."""
        if self.cfg.clock == "flow":
            return x, 1000.0 * t.float()
        t = t.float()
        norm = (t * t + (1 - t) ** 2).sqrt()
        return x / norm.view(-1, 1, 1, 1).to(x.dtype), self.ddpm_step(t)

    def ddpm_step(self, t: Tensor) -> Tensor:
        """t (B,) -> fractional step in [0,999]; times beyond either end of the chain read as that end."""
        rising = ddpm_times(t.device).flip(0)                        # step 999 first: t rises from noise to data
        hi = torch.searchsorted(rising, t.contiguous()).clamp(1, len(rising) - 1)
        frac = ((t - rising[hi - 1]) / (rising[hi] - rising[hi - 1])).clamp(0, 1)
        return len(rising) - hi - frac

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output -> v = x1 - x0. From epsilon = x0: x1 = (x_t - (1-t) x0) / t, so v = (x_t - x0) / t;
        t is kept off 0, where the chain itself ends (t = 0.006 at step 999)."""
        if self.cfg.predict == "velocity":
            return out
        eps = out[:, : self.cfg.in_channels]
        t = t.clamp(min=DDPM_T_MIN).view(-1, 1, 1, 1)
        return (x - eps) / t.to(x.dtype)

    def null_condition(self, y: Tensor) -> Tensor:
        """The condition that stands for "no condition", in training and in sampling alike."""
        return torch.full_like(y, self.cfg.num_classes)

    def initialise_own(self):
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        for block in [*self.blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)


def ddpm_alphas_cumprod(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear-beta chain of DDPM and DiT -> alpha-bar (steps,) float64."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), dim=0)


@lru_cache(maxsize=4)
def ddpm_times(device="cpu") -> Tensor:
    """The project's t of every DDPM step, by equal signal-to-noise ratio: t = sqrt(ab) / (sqrt(ab) + sqrt(1-ab))."""
    ab = ddpm_alphas_cumprod()
    return (ab.sqrt() / (ab.sqrt() + (1 - ab).sqrt())).float().to(device)


DDPM_T_MIN = float(ddpm_times()[-1])                                 # 0.0063: the chain's noisiest step


# ---- FLUX --------------------------------------------------------------------------------------------------------------
# Module names are those of black-forest-labs/flux.

@lru_cache(maxsize=32)
def rotary_table(axes_dim: tuple[int, ...], theta: float, text: int, height: int, width: int, step: float, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L+N,1,hd/2) float32 of the angles that turn q and k, text first. An axis of dim numbers turns its
    pair i by place * theta^(-2i/dim); the axes are (nothing, row, column), text stands at (0,0,0), and a grid of any
    shape counts its own tokens. Places as in sincos_2d. Computed in float64, once for a grid."""
    cpu = dict(dtype=torch.float64, device="cpu")
    place = lambda n: step * torch.arange(n, **cpu) + (step - 1) / 2
    rows, cols = torch.meshgrid(place(height), place(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).flatten(0, 1)
    places = torch.cat([torch.zeros(text, 3, **cpu), image])                                       # L+N 3
    angles = torch.cat([places[:, i : i + 1] * theta ** (-torch.arange(0, dim, 2, **cpu) / dim) for i, dim in enumerate(axes_dim)], dim=1)
    return angles.cos()[:, None].float().to(device), angles.sin()[:, None].float().to(device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair of neighbouring numbers of x (B,N,heads,d) by its angle. Real arithmetic in float32."""
    (cos, sin), (a, b) = rotary, full(x).unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, size_in: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(size_in, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Modulation(nn.Module):
    """(B,D) -> (B,chunks D), in threes of shift, scale and gate."""

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec):
        return self.lin(F.silu(vec))


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim, 1e-6, "scale")
        self.key_norm = RMSNorm(head_dim, 1e-6, "scale")

    def forward(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B,N,3D) -> q, k, v (B,N,heads,hd), q and k of length one."""
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads)
        return self.query_norm(q), self.key_norm(k), v


class JointAttention(nn.Module):
    """One stream's share of an attention over both."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        return self.norm(self.qkv(x), self.num_heads)


def _flux_mlp(D: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))


class DoubleBlock(nn.Module):
    """Image and text each have their own weights; they meet in attention only."""

    def __init__(self, D: int, num_heads: int):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(D, 6), Modulation(D, 6)
        self.img_norm1, self.txt_norm1 = layer_norm(D), layer_norm(D)
        self.img_attn, self.txt_attn = JointAttention(D, num_heads), JointAttention(D, num_heads)
        self.img_norm2, self.txt_norm2 = layer_norm(D), layer_norm(D)
        self.img_mlp, self.txt_mlp = _flux_mlp(D), _flux_mlp(D)

    def modulation(self, vec):
        return torch.cat([self.img_mod(vec), self.txt_mod(vec)], dim=-1)               # B 12D

    def forward(self, img, txt, mod, rotary):                        # B N D, B L D, B 12D
        shift1, scale1, gate1, shift2, scale2, gate2, tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = mod.chunk(12, dim=-1)
        of_img = self.img_attn(modulate(self.img_norm1(img), shift1, scale1))
        of_txt = self.txt_attn(modulate(self.txt_norm1(txt), tshift1, tscale1))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_txt, of_img))              # B L+N nh hd
        out = attention(rotate(q, rotary), rotate(k, rotary), v)                        # B L+N D
        L = txt.shape[1]
        img = img + gate1[:, None] * self.img_attn.proj(out[:, L:])
        txt = txt + tgate1[:, None] * self.txt_attn.proj(out[:, :L])
        img = img + gate2[:, None] * self.img_mlp(modulate(self.img_norm2(img), shift2, scale2))
        txt = txt + tgate2[:, None] * self.txt_mlp(modulate(self.txt_norm2(txt), tshift2, tscale2))
        return img, txt


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side, so that each needs one wide map in and out."""

    def __init__(self, D: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = nn.Linear(D, 3 * D + 4 * D)
        self.linear2 = nn.Linear(D + 4 * D, D)
        self.norm = QKNorm(D // num_heads)
        self.pre_norm = layer_norm(D)
        self.modulation = Modulation(D, 3)

    def forward(self, x, mod, rotary):                               # x (B,L+N,D), mod (B,3D) = modulation(vec)
        shift, scale, gate = mod.chunk(3, dim=-1)
        D = x.shape[-1]
        qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split([3 * D, 4 * D], dim=-1)
        q, k, v = self.norm(qkv, self.num_heads)
        out = attention(rotate(q, rotary), rotate(k, rotary), v)
        return x + gate[:, None] * self.linear2(torch.cat([out, F.gelu(mlp, approximate="tanh")], dim=-1))


class FluxContext(NamedTuple):
    txt: Tensor                                                      # (B,L,D)
    rotary: tuple[Tensor, Tensor]                                    # of text and grid


class Flux(Backbone):
    """FLUX.1 on any latent and any grid. At f8 it packs 2x2 cells into a token, deeper latents go one by one."""

    EMBEDDER, HEAD, HEAD_TRAINED = "img_in.", "final_layer.linear.", "final_layer.linear."   # the final adaLN stays the base's

    def __init__(self, cfg: FluxConfig):
        super().__init__()
        if sum(cfg.axes_dim) * cfg.num_heads != cfg.hidden_size:
            raise ValueError(f"axes_dim {cfg.axes_dim} must add up to the size of a head, {cfg.hidden_size // cfg.num_heads}")
        self.cfg = cfg
        D = cfg.hidden_size
        self.img_in = nn.Linear(cfg.token_channels, D)
        self.time_in = MLPEmbedder(256, D)
        self.vector_in = MLPEmbedder(cfg.vec_in_dim, D)
        if cfg.guidance_embed:
            self.guidance_in = MLPEmbedder(256, D)
        self.txt_in = nn.Linear(cfg.context_in_dim, D)
        self.double_blocks = nn.ModuleList(DoubleBlock(D, cfg.num_heads) for _ in range(cfg.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(D, cfg.num_heads) for _ in range(cfg.depth_single))
        self.final_layer = FinalLayer(D, cfg.patch_size, cfg.out_channels)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def embed(self, x: Tensor) -> Tensor:
        """Latent (B,C,H,W) -> (B,N,D), N = HW/p^2, without positions: those turn q and k in every block."""
        return self.img_in(self.patchify(x)).to(self.img_in.weight.dtype)         # under autocast the residual stream stays float32

    def modulations(self, clock: Tensor, cond: Text) -> list[Tensor]:
        """Its own clock (B,) in [0,1] with 1 = noise, and prompts: clock, guidance and pooled text modulate every block.
        Clock and guidance are multiplied by 1000 here, in float32, and nowhere else. ValueError for a prompt that lacks
        what this model reads."""
        cfg = self.cfg
        if cond.pooled is None or (cfg.guidance_embed and cond.guidance is None):
            raise ValueError("FLUX reads a pooled text vector, and the distilled models a guidance number, beside the text tokens")
        vec = self.time_in(timestep_embedding(1000.0 * clock.float(), 256))
        if cfg.guidance_embed:
            vec = vec + self.guidance_in(timestep_embedding(1000.0 * cond.guidance.float(), 256))
        vec = vec + self.vector_in(cond.pooled)
        return [block.modulation(vec) for block in self.blocks] + [self.final_layer.adaLN_modulation(vec)]

    def context(self, cond: Text, grid: tuple[int, int]) -> FluxContext:
        cfg, p = self.cfg, self.cfg.patch_size
        txt = self.txt_in(cond.tokens.to(self.txt_in.weight.dtype)).to(self.txt_in.weight.dtype)
        return FluxContext(txt, rotary_table(cfg.axes_dim, cfg.theta, txt.shape[1], grid[0] // p, grid[1] // p, cfg.pos_step, txt.device))

    def trunk(self, h: Tensor, c: Condition, taps: list | None = None) -> Tensor:
        """(B,N,D) -> (B,N,D). taps, if a list, receives the image tokens after every block."""
        (txt, rotary), mods = c.context, iter(c.mods)
        L = txt.shape[1]
        for block in self.double_blocks:
            h, txt = block(h, txt, next(mods), rotary)
            if taps is not None:
                taps.append(h)
        x = torch.cat([txt, h], dim=1)                               # B L+N D
        for block in self.single_blocks:
            x = block(x, next(mods), rotary)
            if taps is not None:
                taps.append(x[:, L:])
        return x[:, L:]

    def head_features(self, h: Tensor, c: Condition) -> Tensor:
        return self.final_layer.features(h, c.mods[-1])

    @property
    def embed_linear(self) -> nn.Linear:
        return self.img_in

    @property
    def head_linear(self) -> nn.Linear:
        return self.final_layer.linear

    def patchify(self, x: Tensor) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)       # the channel slowest: unlike DiT

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0] // p, p=p, q=p)

    # -- the one place where FLUX's own clock is translated: it puts noise at 1 and predicts noise - data --

    def own_clock(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, 1.0 - t.float()

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -out

    def initialise_own(self):
        for block in self.double_blocks:
            nn.init.zeros_(block.img_mod.lin.weight), nn.init.zeros_(block.txt_mod.lin.weight)
        for block in self.single_blocks:
            nn.init.zeros_(block.modulation.lin.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)


# ---- SANA --------------------------------------------------------------------------------------------------------------
# Module names are those of NVlabs/Sana, except in the Mix-FFN, which is DC-AE's.

class LinearAttention(nn.Module):
    """ReLU linear attention between the places of a picture, heads of 32, q and k normed over the full width."""

    def __init__(self, hidden_size: int, clamp: bool, head_dim: int = 32):
        super().__init__()
        self.head_dim, self.clamp, self.eps = head_dim, clamp, 1e-8
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(hidden_size, 1e-5), RMSNorm(hidden_size, 1e-5)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)                       # B N D each
        q, k, v = (rearrange(y, "b n (h d) -> b h d n", d=self.head_dim) for y in (self.q_norm(q), self.k_norm(k), v))
        out = self.proj(rearrange(linear_attention(q, k, v, self.eps), "b h d n -> b n (h d)"))
        return out.clamp(-65504, 65504) if self.clamp else out       # fp16's largest number


class CrossAttention(nn.Module):
    """The picture's tokens look at the text's, q and k normed over the full width."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm, self.k_norm = RMSNorm(hidden_size, 1e-6), RMSNorm(hidden_size, 1e-6)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, y, mask):                                   # B N D, B L D, B L or None
        k, v = self.kv_linear(y).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)) for z in (self.q_norm(self.q_linear(x)), self.k_norm(k), v))
        return self.proj(attention(q, k, v, mask))


class SanaContext(NamedTuple):
    y: Tensor                                                        # (B,L,D) the caption, normed
    mask: Tensor | None                                              # (B,L)
    rows: int                                                        # of the token grid: the convolution needs it


class SanaBlock(nn.Module):
    def __init__(self, cfg: SanaConfig):
        super().__init__()
        D = cfg.hidden_size
        self.norm1, self.norm2 = layer_norm(D), layer_norm(D)
        self.attn = LinearAttention(D, cfg.clamp)
        self.cross_attn = CrossAttention(D, cfg.num_heads)
        self.mlp = GLUMBConv(D, cfg.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)

    def forward(self, x, mod, c: SanaContext):                       # x (B,N,D), mod (B,6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + mod.unflatten(-1, (6, -1))).unbind(dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, c.y, c.mask)
        h = rearrange(modulate(self.norm2(x), shift2, scale2), "b (h w) d -> b d h w", h=c.rows)
        return x + gate2[:, None] * rearrange(self.mlp(h), "b d h w -> b (h w) d")


class CaptionEmbedder(nn.Module):
    def __init__(self, caption_channels: int, hidden_size: int):
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, y):
        return self.y_proj(y.to(self.y_proj.fc1.weight.dtype))


class SanaFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def features(self, x, t):
        shift, scale = (self.scale_shift_table + t[:, None]).unbind(dim=1)
        return modulate(self.norm_final(x), shift, scale)


class Sana(Backbone):
    """SANA-1.5 on any latent and any grid: no positions anywhere, the depthwise convolutions see the borders."""

    EMBEDDER, HEAD, HEAD_TRAINED = "x_embedder.", "final_layer.linear.", "final_layer.linear."   # the final scale_shift_table stays the base's

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        if cfg.hidden_size % cfg.num_heads or cfg.hidden_size % 32:
            raise ValueError(f"a width of {cfg.hidden_size} does not divide into {cfg.num_heads} heads of cross-attention and heads of 32")
        self.cfg = cfg
        D = cfg.hidden_size
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = adaln(D, 6)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, D)
        self.attention_y_norm = RMSNorm(D, 1e-5)
        self.blocks = nn.ModuleList(SanaBlock(cfg) for _ in range(cfg.depth))
        self.final_layer = SanaFinalLayer(D, cfg.patch_size, cfg.out_channels)

    def embed(self, x: Tensor) -> Tensor:
        """Latent (B,C,H,W) -> (B,N,D), N = HW/p^2."""
        return rearrange(self.x_embedder(x), "b d h w -> b (h w) d").to(self.x_embedder.proj.weight.dtype)      # as FLUX's

    def modulations(self, clock: Tensor, cond: Text) -> list[Tensor]:
        """Its own clock (B,) in [0,1000] with 1000 = noise: one for all blocks, each adds a table of its own."""
        t = self.t_embedder(clock.trunc() if self.cfg.integer_time else clock)
        return [self.t_block(t), t]

    def context(self, cond: Text, grid: tuple[int, int]) -> SanaContext:
        y = self.attention_y_norm(self.y_embedder(cond.tokens))
        return SanaContext(y, cond.mask, grid[0] // self.cfg.patch_size)

    def trunk(self, h: Tensor, c: Condition, taps: list | None = None) -> Tensor:
        """(B,N,D) -> (B,N,D). taps, if a list, receives every block's output."""
        for block in self.blocks:
            h = block(h, c.mods[0], c.context)
            if taps is not None:
                taps.append(h)
        return h

    def head_features(self, h: Tensor, c: Condition) -> Tensor:
        return self.final_layer.features(h, c.mods[-1])

    @property
    def embed_linear(self) -> nn.Conv2d:
        return self.x_embedder.proj

    @property
    def head_linear(self) -> nn.Linear:
        return self.final_layer.linear

    # -- the one place where SANA's own clock is translated: it puts noise at 1000 and predicts noise - data --

    def own_clock(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, 1000.0 * (1.0 - t.float())

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -out

    def initialise_own(self):
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1], self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.constant_(self.attention_y_norm.weight, self.cfg.caption_scale)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)


# ---- weights: a layout is a table ------------------------------------------------------------------------------------
# A row is (theirs, ours[, turn]). `{}` stands for a number, `*` for any text, both the same and in order on the two
# sides; several names on their side are concatenated along the first axis; ours = None names what is left out, and why.
# Rows are tried from the top. Read from left to right a table loads a file, from right to left it writes one.

class Turn(NamedTuple):
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


SAME, SWAP = Turn(), Turn(_swap_halves, _swap_halves)                # diffusers' final modulation is (scale, shift)

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
        (tuple(f"{single}.{x}.*" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")), "single_blocks.{}.linear1.*", Turn(shares=(1, 1, 1, 4))),
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
SIGNS = [
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
FAMILIES = {DiTConfig: DiT, FluxConfig: Flux, SanaConfig: Sana}


def recognise(keys) -> tuple[type, str]:
    """Family and layout of a state dict, from its names. ValueError if they are nobody's."""
    for sign, family, layout in SIGNS:
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


def sources(key: str, table: list[tuple], theirs=None) -> tuple[list[str], Turn] | None:
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
        if not (found := sources(key, table, theirs)):
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
        if not (found := sources(key, table)):
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


def config_facts(family: type, table: list[tuple], theirs: Mapping[str, Tensor], stated: dict) -> dict:
    """What a weight file says of its model's configuration. Shapes say nearly all, and they cannot be wrong; `stated` (its
    config.json, or {}) adds what they do not show. token_channels is C p^2: a FLUX token does not show its C and p."""
    def has(key):
        return sources(key, table, theirs) is not None

    def shape(key):
        if not has(key):
            raise ValueError(f"{key} is missing, and every {family.__name__} has it: the file is not whole, or not of this family")
        return theirs[sources(key, table, theirs)[0][0]].shape        # of the first part, where several are fused

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


def fit_config(cfg, family: type, facts: dict):
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
    freshly initialised (weights None). cfg None takes it from the file, see fit_config. dtype None keeps the file's, and
    its memory map. ValueError if the weights are missing, damaged or another model's."""
    if weights is None:
        model = FAMILIES[type(cfg)](cfg).initialise()
        return model.to(dtype) if dtype else model
    tensors, own = read_tensors(weights), read_config(weights).get("model")
    try:
        family, layout = recognise(tensors)
        table = TABLES[family][layout]
        cfg = fit_config(config_of(own) if cfg is None and own else cfg, family, config_facts(family, table, tensors, folder_config(weights)))
        if family is Sana and any(v.dtype == torch.float16 for k, v in tensors.items() if ".attn" in k):
            cfg = replace(cfg, clamp=True)                            # trained in fp16, counts on its limits
        with torch.device("meta"):
            model = family(cfg)
        return load_weights(model, tensors, table, dtype)
    except ValueError as e:
        raise ValueError(f"{weights}: {e}") from None


def deepen(base: Backbone, cfg) -> Backbone:
    """The base's trunk under a new embedder and head (Sec. 3.1.1: the two parts that bind to a latent space). Shares
    the trunk's tensors with the base; the rest of the head is a copy, for it will learn too."""
    with torch.device("meta"):
        model = type(base)(cfg)
    own = lambda k: k.startswith((base.EMBEDDER, base.HEAD))
    state = {k: v.clone() if k.startswith(base.HEAD_TRAINED) else v for k, v in base.state_dict().items() if not own(k)}
    state |= {k: torch.empty(v.shape, dtype=torch.float32, device=next(iter(base.parameters())).device) for k, v in model.state_dict().items() if own(k)}
    model.load_state_dict(state, assign=True)
    model.null = base.null
    return model.requires_grad_(False).new_embedder_and_head()


def with_guidance_embed(teacher: Flux) -> Flux:
    """A FLUX that reads its guidance as a number, before its distillation: a copy of the teacher's weights, and an embedder of
    the number that starts at zero, so that whatever it is told it speaks as the teacher does without guidance."""
    if not isinstance(teacher, Flux) or teacher.cfg.guidance_embed:
        raise ValueError("guidance is distilled into a FLUX that does not read it yet" + ("" if isinstance(teacher, Flux) else f", not into a {type(teacher).__name__}"))
    student = Flux(replace(teacher.cfg, guidance_embed=True)).initialise()
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    state = student.state_dict() | {k: v.clone() for k, v in teacher.state_dict().items()}
    student.load_state_dict(state, assign=True)
    student.null = teacher.null
    return student


def config_dict(cfg) -> dict:
    return {"family": type(cfg).__name__, **asdict(cfg)}


def config_of(plain: dict):
    """config_dict's inverse, also after JSON has made lists of tuples."""
    kind = next(k for k in FAMILIES if k.__name__ == plain.get("family", "DiTConfig"))
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "family"})


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
