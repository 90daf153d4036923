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

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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


FAMILIES = {DiTConfig: DiT, FluxConfig: Flux, SanaConfig: Sana}


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
