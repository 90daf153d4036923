"""The diffusion transformers that DC-Gen moves to another latent space: DiT, FLUX and SANA.

Every family has the same three stages, because they are what the method trains, one after the other:

    out = head(trunk(embed(x)))

    embed  (B,C,H,W) -> (B,N,D)    the patch embedder, bound to one latent space    stage 1 trains it (Eq. 1)
    trunk  (B,N,D)   -> (B,N,D)    the blocks, the knowledge worth keeping          stage 3 adapts it by LoRA
    head   (B,N,D)   -> (B,C,H,W)  the output head, bound to the latent space too   stage 2 trains it

The project has one clock: t in [0,1] with 0 = noise and 1 = data, x_t = (1-t) x0 + t x1, and a model returns
the velocity v = x1 - x0 (arXiv 2509.25180, Eq. 2). A family with a clock of its own translates in `to_native`
and `to_velocity`, nowhere else.

    DiT    class labels; adaLN, softmax attention; DDPM's clock, epsilon          arXiv 2212.09748
    FLUX   text; two token streams that become one, rotary positions              black-forest-labs/flux
    SANA   text by cross-attention; linear attention, convolutions, no positions  arXiv 2410.10629, 2501.18427

Usage (files are read in checkpoints.py):

    base, info = load_base("tiny")
    dc = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    v = dc(x, t, y)                # x (B,C,H,W) latent, t (B,) times, y (B,) classes -> (B,C,H,W)

Reading order: configs, conditions, small layers, what the families share, DiT, the move to a deep latent. The
method needs no more than that; FLUX and SANA follow. Blocks take the condition `c`; fast.py adds from outside
what makes them fast.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


# ---- configs: a model, its latent space and its sampling settings, named together ------------------

@dataclass(frozen=True)
class Sampling:
    """The sampling settings that a model's authors use; flags of sample.py override them."""
    num_steps: int = 25
    cfg_scale: float = 3.0              # classifier-free guidance in two passes; 1 = off
    guidance: float | None = None       # the number that a distilled model reads, in one pass
    sampler: str = "euler"              # one of sample.SOLVERS; "ddpm" and "ddim" need predicted epsilons
    shift: float | str = 1.0            # resolution shift of the clock: a number, or a rule of SHIFTS
    batch: int = 64


SHIFTS = ("mu", "flux2")


def resolve_shift(rule: str | float, channels: int, H: int, W: int, patch_size: int) -> float:
    """A published rule's shift r for a latent (C,H,W); a number is itself (SANA: 3 at every size).
    mu     exp(mu), mu on a line in the tokens through (256, 0.5) and (4096, 1.15)  (FLUX; DC-Gen-FLUX at 4K)
    flux2  sqrt(C H W / 4096)                                                       (DC-Gen-FLUX at 1K)
    ValueError lists the rules."""
    # the two rules that FLUX's authors and DC-Gen's trained with
    if rule == "mu":
        tokens = H * W / patch_size**2
        return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    if rule == "flux2":
        return math.sqrt(channels * H * W / 4096)
    try:
        shift = float(rule)
    except ValueError:
        shift = -1.0
    if not 0 < shift < math.inf:
        raise ValueError(f"--shift {rule}: give a positive number, or one of {', '.join(SHIFTS)}")
    return shift


FLUX_SAMPLING = Sampling(num_steps=20, cfg_scale=1.0, guidance=3.5, shift="flux2", batch=1)
SANA_SAMPLING = Sampling(num_steps=20, cfg_scale=4.5, sampler="dpm", shift=3.0, batch=1)


@dataclass(frozen=True)
class DiTConfig:
    """Class-conditional DiT (arXiv 2212.09748) in one latent space.

    clock    what the trunk was trained to read as time: "flow" = 1000 t, "ddpm" = an integer step of the
             1000-step linear-beta chain (step 0 = nearly data)
    predict  what the head returns: "velocity" (C channels), or "epsilon" (2C: the noise, a learned variance)
    """
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    in_channels: int
    ae: str                             # a name in autoencoder.AUTOENCODERS
    res: int                            # pixels a side in training
    num_classes: int = 1000
    clock: str = "flow"
    predict: str = "velocity"
    guided_channels: int | None = None  # classifier-free guidance acts on the first so many (None: all)
    pos_step: float = 1.0               # distance of neighbouring tokens in the position table
    weights: str | None = None          # a shipped file, or "repository::file" on the model hub
    recipe: str = "dit"                 # its row of Table 7: a name in align.RECIPES
    sampling: Sampling = Sampling()

    # no annotation, so no field: the same for every DiT
    text_encoder = None

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.predict == "epsilon" else self.in_channels


@dataclass(frozen=True)
class FluxConfig:
    """FLUX.1's MMDiT in one latent space. embed and head pack p x p cells into a token, so in_channels and
    patch_size alone distinguish f8 with p = 2 from f32 and f64 with p = 1."""
    in_channels: int
    patch_size: int
    ae: str
    res: int = 1024
    hidden_size: int = 3072
    depth: int = 19                     # blocks with separate streams for image and text
    depth_single: int = 38              # blocks in which both are one sequence
    num_heads: int = 24
    axes_dim: tuple[int, ...] = (16, 56, 56)    # numbers of a head that turn with (nothing, row, column)
    theta: float = 10000.0
    context_in_dim: int = 4096          # of a text token (T5-XXL)
    vec_in_dim: int = 768               # of the pooled text (CLIP-L)
    guidance_embed: bool = True         # distilled: reads the guidance as a number
    text_tokens: int = 512
    pos_step: float = 1.0               # distance of neighbouring tokens
    weights: str | None = None
    text_encoder: str = "flux"          # a kind in data.TEXT_ENCODERS
    text_weights: str | None = "black-forest-labs/FLUX.1-Krea-dev::"
    recipe: str = "flux"
    sampling: Sampling = FLUX_SAMPLING

    # no annotations, so no fields: the same for every FLUX
    clock = "flow"
    predict = "velocity"
    guided_channels = None

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def token_channels(self) -> int:
        """Numbers in one packed token: all that a weight file shows of the latent."""
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True)
class SanaConfig:
    """SANA-1.5 in one latent space. num_heads is that of cross-attention; linear attention has heads of 32.

    integer_time  truncate the clock to a whole step of 1000 before it is embedded, as the official code does.
                  Off by default: training drew whole steps, but the model is smooth between two of them, and
                  samplers use fractions
    clamp         clamp the output of linear attention to fp16's range. Weights that were trained in fp16 rely
                  on it even in wider arithmetic; checkpoints.build turns it on for files that hold fp16
    """
    in_channels: int
    patch_size: int
    ae: str
    res: int = 1024
    hidden_size: int = 2240
    depth: int = 20
    num_heads: int = 20
    mlp_ratio: float = 2.5
    caption_channels: int = 2304        # of a text token (Gemma-2-2B)
    caption_scale: float = 0.01         # initial weight of the caption's norm: Gemma's features are large
    text_tokens: int = 300
    integer_time: bool = False
    clamp: bool = False
    weights: str | None = None
    text_encoder: str = "sana"
    text_weights: str | None = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers::"
    recipe: str = "sana-1.6b"
    sampling: Sampling = SANA_SAMPLING

    # no annotations, so no fields: the same for every SANA
    clock = "flow"
    predict = "velocity"
    guided_channels = None

    @property
    def out_channels(self) -> int:
        return self.in_channels


# SD's latents in patches of 2, as all published DiTs have them
SD_LATENT = dict(patch_size=2, in_channels=4, ae="sd-vae-f8c4")
# the published DiTs read DDPM's clock, predict epsilon and a variance, and guide three of four channels
# to be drawn with otherwise: **PUBLISHED_DIT | dict(sampling=Sampling(...))
PUBLISHED_DIT = dict(clock="ddpm", predict="epsilon", guided_channels=3, sampling=Sampling(sampler="ddpm"))
DC_GEN_FLUX = "nvidia/DC-Gen-FLUX.1-Krea-Dev::DC-Gen-FLUX.1-Krea-Dev-v1.0-Res"
# captions of the procedural pictures: few words, encoded without a network
WORDS = dict(text_tokens=16, text_encoder="words", text_weights=None)

# Everything that distinguishes a base stands here: a new one needs an entry in this dict and, if its training
# settings are its own, a row of Table 7 in align.py.
BASES = {
    "tiny": DiTConfig(
        hidden_size=192, depth=8, num_heads=6, patch_size=2,
        in_channels=4, ae="tiny-kl-f8c4", res=128, num_classes=8,
        weights="weights/tiny-dit.safetensors",
        recipe="tiny"),
    "dit-xl": DiTConfig(
        hidden_size=1152, depth=28, num_heads=16, **SD_LATENT, res=256, **PUBLISHED_DIT,
        weights="facebook/DiT-XL-2-256::transformer/diffusion_pytorch_model.bin"),
    "dit-xl-512": DiTConfig(
        hidden_size=1152, depth=28, num_heads=16, **SD_LATENT, res=512, **PUBLISHED_DIT,
        weights="facebook/DiT-XL-2-512::transformer/diffusion_pytorch_model.bin",
        recipe="dit-512"),
    # never published as finished models: train them (finetune.py --init scratch), or load them from a file
    "dit-l": DiTConfig(hidden_size=1024, depth=24, num_heads=16, **SD_LATENT, res=256),
    "dit-b": DiTConfig(hidden_size=768, depth=12, num_heads=12, **SD_LATENT, res=256),
    "dit-s": DiTConfig(hidden_size=384, depth=12, num_heads=6, **SD_LATENT, res=256),

    "flux-krea": FluxConfig(
        in_channels=16, patch_size=2, ae="flux-vae-f8c16",
        weights="black-forest-labs/FLUX.1-Krea-dev::flux1-krea-dev.safetensors",
        sampling=replace(FLUX_SAMPLING, num_steps=28, guidance=4.5, shift="mu")),
    "flux-dev": FluxConfig(
        in_channels=16, patch_size=2, ae="flux-vae-f8c16",
        weights="black-forest-labs/FLUX.1-dev::flux1-dev.safetensors",
        text_weights="black-forest-labs/FLUX.1-dev::",
        sampling=replace(FLUX_SAMPLING, num_steps=50, shift="mu")),
    # the authors' own converted models: pipeline folders of diffusers, with autoencoder and text encoders
    "dc-gen-flux-1k": FluxConfig(
        in_channels=32, patch_size=1, ae="dc-ae-f32c32-in-1.0",
        weights=DC_GEN_FLUX + "1K/",
        text_weights=DC_GEN_FLUX + "1K/"),
    "dc-gen-flux-4k": FluxConfig(
        in_channels=128, patch_size=1, ae="dc-ae-f64c128-1.5", res=4096,
        weights=DC_GEN_FLUX + "4K/",
        text_weights=DC_GEN_FLUX + "4K/",
        sampling=replace(FLUX_SAMPLING, shift="mu")),

    "sana-1.6b": SanaConfig(
        in_channels=32, patch_size=1, ae="dc-ae-f32c32-sana-1.1",
        weights="Efficient-Large-Model/SANA1.5_1.6B_1024px::checkpoints/SANA1.5_1.6B_1024px.pth"),
    "sana-4.8b": SanaConfig(
        in_channels=32, patch_size=1, ae="dc-ae-f32c32-sana-1.1", depth=60,
        weights="Efficient-Large-Model/SANA1.5_4.8B_1024px::checkpoints/SANA1.5_4.8B_1024px.pth",
        recipe="sana-4.8b"),

    # the same classes, small, on the procedural pictures with captions
    "tiny-flux": FluxConfig(
        in_channels=4, patch_size=2, ae="tiny-kl-f8c4", res=128,
        hidden_size=192, depth=2, depth_single=4, num_heads=6, axes_dim=(8, 12, 12),
        context_in_dim=256, vec_in_dim=256, **WORDS,
        weights="weights/tiny-flux.safetensors",
        recipe="tiny-text",
        sampling=Sampling(cfg_scale=1.0, guidance=3.5)),
    "tiny-sana": SanaConfig(
        in_channels=4, patch_size=2, ae="tiny-kl-f8c4", res=128,
        hidden_size=192, depth=6, num_heads=6,
        caption_channels=256, caption_scale=1.0, **WORDS,
        weights="weights/tiny-sana.safetensors",
        recipe="tiny-text",
        sampling=Sampling(cfg_scale=4.5)),
}


# ---- conditions: class labels are a tensor (B,), prompts are a Text --------------------------------

@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts, the condition of the text families.
    tokens (B,L,D); mask (B,L) bool, True = a real token (SANA; FLUX reads its padding, as in its training);
    pooled (B,P) one vector a prompt (FLUX); guidance (B,) the number that a distilled model reads (FLUX)"""
    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def map(self, f, *others: "Text") -> "Text":
        """f applied to every part; a part that is None in any of the Texts is None in the result."""
        out = []
        for field in fields(self):
            parts = [getattr(text, field.name) for text in (self, *others)]
            missing = any(part is None for part in parts)
            out.append(None if missing else f(*parts))
        return Text(*out)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Text":
        return self.map(lambda part: part[rows])

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Text":
        """The Text on `device`, with tokens and pooled in `dtype`."""
        moved = self.map(lambda part: part.to(device))
        if dtype is None:
            return moved
        # the guidance stays float32: FLUX multiplies it by 1000
        pooled = None if moved.pooled is None else moved.pooled.to(dtype)
        return replace(moved, tokens=moved.tokens.to(dtype), pooled=pooled)


def cat_conditions(conditions: list):
    """Conditions concatenated along the batch, labels or Texts. ValueError for Texts of unequal lengths."""
    first = conditions[0]
    if isinstance(first, Tensor):
        return torch.cat(conditions)
    lengths = sorted({text.tokens.shape[1] for text in conditions})
    if len(lengths) > 1:
        raise ValueError(f"prompts of {' and '.join(map(str, lengths))} tokens cannot share a batch; "
                         "encode them to one length")
    return first.map(lambda *parts: torch.cat(parts), *conditions[1:])


def where_conditions(choose_a: Tensor, a, b):
    """The condition that has a's rows where choose_a (B,) is True and b's rows elsewhere."""
    def where(x, y):
        ones = [1] * (x.ndim - 1)
        rows = choose_a.to(x.device).view(-1, *ones)
        return torch.where(rows, x, y)

    return where(a, b) if isinstance(a, Tensor) else a.map(where, b)


# ---- small layers ----------------------------------------------------------------------------------

def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of a clock reading, cosines first. t (B,) on the scale of the training -> (B,dim) float32.
    Always in float32: bf16 has 8 bits of mantissa and merges half of 1000 steps. (DiT models.py)"""
    half = dim // 2
    index = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) * index / half)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def grid_positions(height: int, width: int, step: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid's cells, both (height,width) float64 on the CPU.
    Cell i lies at step i + (step - 1) / 2: the middle of the `step` cells of a finer grid that it covers."""
    # the tables made of these are cached, so the device of a caller's `with torch.device` must not enter them
    on_cpu = dict(dtype=torch.float64, device="cpu")
    rows = step * torch.arange(height, **on_cpu) + (step - 1) / 2
    cols = step * torch.arange(width, **on_cpu) + (step - 1) / 2
    return torch.meshgrid(rows, cols, indexing="ij")


@lru_cache(maxsize=32)
def sincos_2d(dim: int, height: int, width: int, step: float = 1.0, device="cpu") -> Tensor:
    """Fixed 2-D position table of a grid -> (HW,dim) float32: the first half encodes the column, the second
    the row. It is computed for the grid at hand, never loaded: another grid's table might fit by accident."""
    index = torch.arange(dim // 4, dtype=torch.float64, device="cpu")
    omega = 10000.0 ** (-index / (dim / 4))
    rows, cols = grid_positions(height, width, step)
    waves = []
    for position in (cols, rows):
        angles = position.reshape(-1, 1) * omega                     # HW dim/4
        waves += [angles.sin(), angles.cos()]
    return torch.cat(waves, dim=1).float().to(device)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B,N,D) scaled and shifted by one vector a sample, shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def to_float32(x: Tensor) -> Tensor:
    """x in float32 (float64 stays): for the few places that half precision would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """ReLU linear attention, sum_j v_j (k_j . q_i) / sum_j (k_j . q_i), at a cost linear in N. (SANA, DC-AE)
    q, k, v (B,heads,d,N) -> (B,heads,d,N) in v's dtype."""
    # float32 whatever autocast would choose: sums over thousands of tokens overflow fp16 and cost bf16 its
    # digits, and eps = 1e-15 is zero in fp16. Autocast does not know the device "meta".
    no_autocast = nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)
    with no_autocast:
        q = to_float32(F.relu(q))
        k = to_float32(F.relu(k))
        # a row of ones below v: the same two products hold the divisor
        v_and_ones = F.pad(to_float32(v), (0, 0, 0, 1), value=1.0)   # B nh d+1 N
        state = v_and_ones @ k.transpose(-1, -2)                     # B nh d+1 d   never N x N
        out = state @ q                                              # B nh d+1 N
        out = out[:, :, :-1] / (out[:, :, -1:] + eps)                # B nh d N
    return out.to(v.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q (B,N,nh,d), k, v (B,M,nh,d), mask (B,M) bool, True = attend -> (B,N,nh d)."""
    if mask is not None:
        mask = mask[:, None, None]                                   # B 1 1 M
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                 # B nh N d
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).flatten(2)                            # B N D


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in float32, times a learned weight, which official files call `name`."""

    def __init__(self, dim: int, eps: float, name: str = "weight"):
        super().__init__()
        self.name = name
        self.eps = eps
        self.register_parameter(name, nn.Parameter(torch.ones(dim)))

    def forward(self, x):
        weight = getattr(self, self.name).to(x.dtype)
        normed = F.rms_norm(to_float32(x), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * weight


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of an image (B,C,H,W) with weight and bias, every pixel by itself."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        y = to_float32(x.movedim(1, -1))                             # B H W C
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).to(x.dtype)
        y = y * self.weight.to(x.dtype) + self.bias.to(x.dtype)
        return y.movedim(-1, 1)                                      # B C H W


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck, (B,C,H,W) -> (B,C,H,W) without the residual: 1x1 up, 3x3 depthwise, gate,
    1x1 down. (SANA's Mix-FFN; DC-AE's local block, which has the norm)"""

    def __init__(self, channels: int, expand: float = 4, norm: bool = False):
        super().__init__()
        hidden = int(expand * channels)
        both = 2 * hidden                                            # values and gates
        self.conv_inverted = nn.Conv2d(channels, both, 1)
        self.conv_depth = nn.Conv2d(both, both, 3, padding=1, groups=both)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels) if norm else nn.Identity()

    def forward(self, x):
        x = self.conv_depth(F.silu(self.conv_inverted(x)))           # B 2hidden H W
        x, gate = x.chunk(2, dim=1)                                  # B hidden H W
        return self.norm(self.conv_point(x * F.silu(gate)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))               # B C H W -> B D H/p W/p


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, freq_dim: int = 256):
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(
            nn.Linear(freq_dim, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, step):
        sinusoids = timestep_embedding(step, self.freq_dim)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))      # B -> B D


class Mlp(nn.Module):
    def __init__(self, size_in: int, hidden: int, size_out: int):
        super().__init__()
        self.fc1 = nn.Linear(size_in, hidden)
        self.fc2 = nn.Linear(hidden, size_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(dim: int) -> nn.LayerNorm:
    """A norm without scale and shift of its own: the modulation that follows brings them."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def adaln(hidden_size: int, chunks: int) -> nn.Sequential:
    """A modulation layer (B,D) -> (B,chunks D): shifts, scales and gates computed from the condition c."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = adaln(hidden_size, 2)

    def forward(self, x, c):                                         # B N D, B D -> B N ppC
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---- what the families share -----------------------------------------------------------------------

class Backbone(nn.Module):
    """A model on the project's clock. A family defines forward_native, its network on its own clock, made of
    embed, trunk and head; and to_native and to_velocity, which translate.

    EMBEDDER, HEAD  names of the two linear maps that are bound to the latent space: new in a deep model
    HEAD_TRAINED    prefix of what learns with the new head; what it names beyond HEAD starts from the base"""

    EMBEDDER = "x_embedder.proj"
    HEAD = "final_layer.linear"
    HEAD_TRAINED = "final_layer.linear"
    null: Text | None = None                                         # the encoded empty prompt, one row

    def forward(self, x: Tensor, t: Tensor, y) -> Tensor:
        """Velocity v = x1 - x0 at x_t (B,C,H,W). t (B,) in [0,1] with 0 = noise, y classes (B,) or a Text."""
        x_in, step = self.to_native(x, t)                            # this family's clock and scale
        out = self.forward_native(x_in, step, y)                     # B C_out H W
        return self.to_velocity(out, x, t)                           # B C H W

    @property
    def embed_linear(self) -> nn.Module:
        return self.get_submodule(self.EMBEDDER)

    @property
    def head_linear(self) -> nn.Linear:
        return self.get_submodule(self.HEAD)

    def patchify(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,N,p p C); the numbers of a token are in the order of the head's outputs."""
        p = self.cfg.patch_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B,N,p p C) -> (B,C,H,W) with (H,W) = grid."""
        p = self.cfg.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0] // p, p=p, q=p)

    def null_condition(self, y: Text) -> Text:
        """The condition that stands for "no condition", in training and in sampling alike: the encoded empty
        prompt, repeated for every row of y, with y's guidance, and with y's mask if it has none of its own.
        ValueError if no null prompt is set."""
        if self.null is None:
            raise ValueError(f"this {type(self).__name__} does not know its null prompt yet: "
                             "encode \"\" and set model.null")
        # expand repeats the row without a copy
        null = self.null.to(y.device, y.tokens.dtype)
        null = null.map(lambda part: part.expand(len(y), *part.shape[1:]))
        mask = y.mask if null.mask is None else null.mask
        return replace(null, mask=mask, guidance=y.guidance)

    def init_embedder_and_head(self):
        """Xavier-uniform weights and zero biases in the two maps that are bound to the latent space."""
        # the head is not zeroed here: a zero head passes no gradient to the embedder behind it
        for layer in (self.embed_linear, self.head_linear):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            nn.init.zeros_(layer.bias)
        return self

    def init_from_scratch(self):
        """Xavier-uniform maps and zero biases, then the family's own values, then a zero head. Convolutions,
        except the embedder, keep PyTorch's initialisation."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.init_family()
        self.init_embedder_and_head()
        nn.init.zeros_(self.head_linear.weight)
        return self


# ---- DDPM's clock: an integer step of a noising chain ----------------------------------------------

def ddpm_alphas_cumprod(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear-beta chain of DDPM and DiT -> alpha-bar (steps,) float64."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


@lru_cache(maxsize=4)
def ddpm_times(device="cpu") -> Tensor:
    """The project's t of every step, by equal signal-to-noise ratio: sqrt(ab) / (sqrt(ab) + sqrt(1-ab))."""
    ab = ddpm_alphas_cumprod()
    signal = ab.sqrt()
    noise = (1 - ab).sqrt()
    return (signal / (signal + noise)).float().to(device)


def ddpm_step(t: Tensor) -> Tensor:
    """t (B,) -> fractional step in [0,999]; times beyond either end of the chain read as that end."""
    rising = ddpm_times(t.device).flip(0)                            # step 999 first: from noise to data
    above = torch.searchsorted(rising, t.contiguous()).clamp(1, len(rising) - 1)
    low = rising[above - 1]
    fraction = (t - low) / (rising[above] - low)
    return len(rising) - above - fraction.clamp(0, 1)


DDPM_T_MIN = float(ddpm_times()[-1])                                 # 0.0063: the chain's noisiest step


# ---- DiT -------------------------------------------------------------------------------------------

class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)   # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)                               # B -> B D


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):                                            # B N D -> B N D
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, hidden_size)
        self.adaLN_modulation = adaln(hidden_size, 6)

    def forward(self, x, c):                                         # B N D, B D -> B N D
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attn(h)
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2[:, None] * self.mlp(h)


class DiT(Backbone):
    """DiT on any latent and any grid whose sides divide by the patch size, with the official module names."""

    HEAD_TRAINED = "final_layer"                                     # adaLN too, as in the authors' code

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        if cfg.hidden_size % cfg.num_heads or cfg.hidden_size % 4:
            raise ValueError(f"a width of {cfg.hidden_size} does not divide into {cfg.num_heads} heads and "
                             "the 4 parts of the position table")
        self.cfg = cfg
        D = cfg.hidden_size
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(cfg.num_classes, D)
        self.blocks = nn.ModuleList(DiTBlock(D, cfg.num_heads) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(D, cfg.patch_size, cfg.out_channels)

    def forward_native(self, x: Tensor, step: Tensor, y: Tensor) -> Tensor:
        """The network on its own clock: what the official code calls forward.
        x (B,C,H,W), step (B,), y (B,) with num_classes = no class -> (B,C_out,H,W)"""
        c = self.condition(step, y)                                  # B D
        h = self.embed(x)                                            # B N D        stage 1    N = HW / p^2
        h = self.trunk(h, c)                                         # B N D        stage 3
        return self.head(h, c, grid=x.shape[-2:])                    # B C_out H W  stage 2

    def condition(self, step: Tensor, y: Tensor) -> Tensor:
        return self.t_embedder(step) + self.y_embedder(y)            # B D

    def embed(self, x: Tensor) -> Tensor:
        h = self.x_embedder(x)                                       # B D H/p W/p
        D, height, width = h.shape[1:]
        pos = sincos_2d(D, height, width, self.cfg.pos_step, h.device)
        # in the weights' type: under autocast the residual stream, which starts here, stays float32
        pos = pos.to(self.x_embedder.proj.weight.dtype)
        h = rearrange(h, "b d h w -> b (h w) d").contiguous()        # see Sana.embed
        return h + pos                                               # B N D

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)                                          # B N D
        return h

    def head(self, h: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.unpatchify(self.final_layer(h, c), grid)         # B C_out H W

    # -- the one place where DiT's clock is translated --

    def to_native(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t on the project's clock -> the network's input and the reading of its own clock.

        A DDPM state is z = sqrt(ab) x1 + sqrt(1-ab) x0. Scaling x_t by 1 / sqrt(t^2 + (1-t)^2) gives exactly
        such a state, with the same signal-to-noise ratio t / (1-t) = sqrt(ab / (1-ab)). ddpm_step finds the
        step of this ratio between the 1000 integers (the sinusoids accept fractions)."""
        t = t.float()
        if self.cfg.clock == "flow":
            return x, 1000.0 * t
        norm = (t * t + (1 - t) ** 2).sqrt().view(-1, 1, 1, 1)
        return x / norm.to(x.dtype), ddpm_step(t)

    def to_velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output -> v = x1 - x0.

        From epsilon = x0: x1 = (x_t - (1-t) x0) / t, so v = (x_t - x0) / t. t is clamped to the time of the
        chain's last step (0.006), because the ratio diverges at 0."""
        if self.cfg.predict == "velocity":
            return out
        eps = out[:, : self.cfg.in_channels]                         # without the variance
        t = t.clamp(min=DDPM_T_MIN).view(-1, 1, 1, 1)
        return (x - eps) / t.to(x.dtype)

    def null_condition(self, y: Tensor) -> Tensor:
        """The condition that stands for "no condition", in training and in sampling alike."""
        return torch.full_like(y, self.cfg.num_classes)

    def init_family(self):
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        # adaLN-Zero: with all gates at zero every block starts as the identity
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)


# ---- the move to a deep latent ---------------------------------------------------------------------

def to_deep_latent(cfg, ae, pos_step: float = 1.0, shift: float | str | None = None):
    """The config of the same model on a deeper autoencoder's latents, one token per latent cell. This is the
    paper's idea in one line.

    ae        the autoencoder's config (autoencoder.AUTOENCODERS)
    pos_step  1 counts the new grid by ones, as the authors do; 2 spreads a grid of half the side over the
              positions that the base was trained on
    shift     of the sampling times in the new space (None: the base's)"""
    sampling = cfg.sampling if shift is None else replace(cfg.sampling, shift=shift)
    deep = replace(cfg, in_channels=ae.channels, patch_size=1, ae=ae.name, weights=None)
    deep = replace(deep, sampling=sampling)
    # SANA has no positions
    if hasattr(cfg, "pos_step"):
        deep = replace(deep, pos_step=pos_step)
    # a new head predicts a velocity, without a variance: DDPM's samplers need the epsilon of the old one
    if cfg.predict == "epsilon":
        sampling = replace(sampling, sampler="euler")
        deep = replace(deep, predict="velocity", guided_channels=None, sampling=sampling)
    return deep


def to_deep_model(base: Backbone, cfg) -> Backbone:
    """The base's trunk between a new embedder and head, the parts that bind to a latent space (Sec. 3.1.1).
    The trunk's tensors are the base's own; what else learns with the head is a copy. Everything is frozen."""
    # names and shapes only: no memory is spent on a second trunk
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](cfg)
    of_base = base.state_dict()
    bound = (base.EMBEDDER, base.HEAD)

    def trunk_shapes(state):
        return {(name, tuple(value.shape)) for name, value in state.items() if not name.startswith(bound)}

    differing = sorted(trunk_shapes(model.state_dict()) ^ trunk_shapes(of_base))
    if differing:
        name, shape = differing[0]
        raise ValueError(f"its trunk is not that of its base: only one of them has {name} of shape {shape}")
    device = next(base.parameters()).device
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(bound):
            state[name] = torch.empty(value.shape, dtype=torch.float32, device=device)
        elif name.startswith(base.HEAD_TRAINED):
            state[name] = of_base[name].clone()
        else:
            state[name] = of_base[name]
    # assign: the parameters become these very tensors, so base and deep model hold the trunk once
    model.load_state_dict(state, assign=True)
    model.null = base.null
    return model.requires_grad_(False).init_embedder_and_head()


# ====================================================================================================
# The method needs no more than this. What follows are the two text families on the same frame.
# ====================================================================================================


# ---- FLUX: module names are those of black-forest-labs/flux ----------------------------------------

@lru_cache(maxsize=32)
def rotary_table(
    axes_dim: tuple[int, ...],
    theta: float,
    text_tokens: int,
    height: int,
    width: int,
    step: float,
    device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L+N,1,hd) float32 that turn q and k, text first; see rotate.

    An axis of dim numbers turns its pair i by position * theta^(-2i/dim); the axes are (nothing, row, col).
    Text stands at (0,0,0); a grid of any shape counts its own tokens. Computed in float64, once a grid."""
    rows, cols = grid_positions(height, width, step)
    image = torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).flatten(0, 1)    # N 3
    text = torch.zeros(text_tokens, 3, dtype=torch.float64, device="cpu")              # L 3
    positions = torch.cat([text, image])                                               # L+N 3
    angles = []
    for i, dim in enumerate(axes_dim):
        index = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
        freqs = theta ** (-index / dim)
        angles.append(positions[:, i : i + 1] * freqs)
    angles = torch.cat(angles, dim=1)[:, None]                                         # L+N 1 hd/2
    cos = angles.cos()
    sin = angles.sin()
    # both numbers of a pair: (cos, cos) and (-sin, sin)
    cos = torch.stack([cos, cos], dim=-1).flatten(-2)                                  # L+N 1 hd
    sin = torch.stack([-sin, sin], dim=-1).flatten(-2)                                 # L+N 1 hd
    return cos.float().to(device), sin.float().to(device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B,N,heads,d) with every pair (a, b) of neighbouring numbers turned by its angle, in float32:
    (a cos - b sin, b cos + a sin)."""
    cos, sin = rotary
    wide = to_float32(x)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)       # (b, a)
    return (wide * cos + swapped * sin).to(x.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, size_in: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(size_in, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        x = x.to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """(B,D) -> (B,chunks D), in threes of shift, scale and gate."""

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, c):
        return self.lin(F.silu(c))


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim, 1e-6, "scale")
        self.key_norm = RMSNorm(head_dim, 1e-6, "scale")

    def forward(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B,N,3D) -> q, k, v (B,N,heads,hd), with q and k normed per head."""
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads)
        return self.query_norm(q), self.key_norm(k), v


class JointAttention(nn.Module):
    """One stream's layers of an attention over both: forward returns q, k, v; `proj` maps the result."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        return self.norm(self.qkv(x), self.num_heads)                # three of B N nh hd


def flux_mlp(D: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(D, 4 * D),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * D, D),
    )


class DoubleBlock(nn.Module):
    """A block with separate weights for image and text; the two streams meet in attention only."""

    def __init__(self, D: int, num_heads: int):
        super().__init__()
        # image and text in turn: the order of these lines decides which weights a seed draws
        self.img_mod = Modulation(D, 6)
        self.txt_mod = Modulation(D, 6)
        self.img_norm1 = layer_norm(D)
        self.txt_norm1 = layer_norm(D)
        self.img_attn = JointAttention(D, num_heads)
        self.txt_attn = JointAttention(D, num_heads)
        self.img_norm2 = layer_norm(D)
        self.txt_norm2 = layer_norm(D)
        self.img_mlp = flux_mlp(D)
        self.txt_mlp = flux_mlp(D)

    def forward(self, img, txt, c, rotary):                          # B N D, B L D, B D -> B N D, B L D
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(c).chunk(6, -1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(c).chunk(6, -1)

        # one attention over both streams, text first as in rotary; each stream is turned before they are
        # joined, which saves a compiler a pass over both
        lengths = [txt.shape[1], img.shape[1]]
        txt_rotary, img_rotary = zip(*(table.split(lengths) for table in rotary))
        img_q, img_k, img_v = self.img_attn(modulate(self.img_norm1(img), img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1))
        q = torch.cat([rotate(txt_q, txt_rotary), rotate(img_q, img_rotary)], dim=1)    # B L+N nh hd
        k = torch.cat([rotate(txt_k, txt_rotary), rotate(img_k, img_rotary)], dim=1)
        v = torch.cat([txt_v, img_v], dim=1)
        txt_out, img_out = attention(q, k, v).split(lengths, dim=1)                     # B L D, B N D

        img = img + img_gate1[:, None] * self.img_attn.proj(img_out)
        h = modulate(self.img_norm2(img), img_shift2, img_scale2)
        img = img + img_gate2[:, None] * self.img_mlp(h)

        txt = txt + txt_gate1[:, None] * self.txt_attn.proj(txt_out)
        h = modulate(self.txt_norm2(txt), txt_shift2, txt_scale2)
        txt = txt + txt_gate2[:, None] * self.txt_mlp(h)
        return img, txt


class SingleBlock(nn.Module):
    """A block over text and image as one sequence. Attention and MLP run side by side on one input, so that
    one wide map serves both on the way in, and another on the way out."""

    def __init__(self, D: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = nn.Linear(D, 3 * D + 4 * D)
        self.linear2 = nn.Linear(D + 4 * D, D)
        self.norm = QKNorm(D // num_heads)
        self.pre_norm = layer_norm(D)
        self.modulation = Modulation(D, 3)

    def forward(self, x, c, rotary):                                 # B L+N D, B D -> B L+N D
        D = x.shape[-1]
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        h = self.linear1(modulate(self.pre_norm(x), shift, scale))   # B L+N 7D
        qkv, mlp = h.split([3 * D, 4 * D], dim=-1)
        q, k, v = self.norm(qkv, self.num_heads)                     # B L+N nh hd
        out = attention(rotate(q, rotary), rotate(k, rotary), v)     # B L+N D
        out = torch.cat([out, F.gelu(mlp, approximate="tanh")], dim=-1)
        return x + gate[:, None] * self.linear2(out)


class Flux(Backbone):
    """FLUX.1 on any latent and any grid. On f8 latents a token holds 2x2 cells, on deeper ones one cell."""

    EMBEDDER = "img_in"

    def __init__(self, cfg: FluxConfig):
        super().__init__()
        if sum(cfg.axes_dim) * cfg.num_heads != cfg.hidden_size:
            raise ValueError(f"axes_dim {cfg.axes_dim} must add up to the size of a head, "
                             f"{cfg.hidden_size // cfg.num_heads}")
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

    def forward_native(self, x: Tensor, step: Tensor, text: Text) -> Tensor:
        """x (B,C,H,W), step (B,) in [0,1] with 1 = noise -> (B,C,H,W), noise - data"""
        c = self.condition(step, text)                               # B D
        txt = self.read_text(text)                                   # B L D
        rotary = self.positions(txt.shape[1], x.shape[-2:])
        h = self.embed(x)                                            # B N D        stage 1    N = HW / p^2
        h = self.trunk(h, c, txt, rotary)                            # B N D        stage 3
        return self.head(h, c, grid=x.shape[-2:])                    # B C H W      stage 2

    def condition(self, step: Tensor, text: Text) -> Tensor:
        """Clock, guidance and pooled text as one vector (B,D). Clock and guidance are multiplied by 1000 here
        in float32 and nowhere else. ValueError for a Text that lacks what this model reads."""
        if text.pooled is None or (self.cfg.guidance_embed and text.guidance is None):
            raise ValueError("FLUX reads a pooled text vector, and the distilled models a guidance number, "
                             "beside the text tokens")
        c = self.time_in(timestep_embedding(1000.0 * step.float(), 256))
        if self.cfg.guidance_embed:
            c = c + self.guidance_in(timestep_embedding(1000.0 * text.guidance.float(), 256))
        return c + self.vector_in(text.pooled)

    def read_text(self, text: Text) -> Tensor:
        """The text tokens (B,L,D) that enter the trunk."""
        dtype = self.txt_in.weight.dtype
        return self.txt_in(text.tokens.to(dtype)).to(dtype)

    def positions(self, text_tokens: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The rotary table of a text of this length and a latent of this grid."""
        cfg = self.cfg
        height, width = (side // cfg.patch_size for side in grid)
        device = self.img_in.weight.device
        return rotary_table(cfg.axes_dim, cfg.theta, text_tokens, height, width, cfg.pos_step, device)

    def embed(self, x: Tensor) -> Tensor:
        """Latent (B,C,H,W) -> tokens (B,N,D). Positions are not added: they turn q and k in every block."""
        # in the weights' type: under autocast the residual stream, which starts here, stays float32
        dtype = self.img_in.weight.dtype
        return self.img_in(self.patchify(x).to(dtype)).to(dtype)

    def trunk(self, h: Tensor, c: Tensor, txt: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        for block in self.double_blocks:
            h, txt = block(h, txt, c, rotary)                        # B N D, B L D
        x = torch.cat([txt, h], dim=1)                               # B L+N D
        for block in self.single_blocks:
            x = block(x, c, rotary)                                  # B L+N D
        return x[:, txt.shape[1]:]                                   # B N D

    def head(self, h: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.unpatchify(self.final_layer(h, c), grid)         # B C H W

    # in a token of FLUX the channel varies slowest, in one of DiT and SANA fastest

    def patchify(self, x: Tensor) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0] // p, p=p, q=p)

    # -- the one place where FLUX's clock is translated: it puts noise at 1 and predicts noise - data --

    def to_native(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, 1.0 - t.float()

    def to_velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -out

    def init_family(self):
        # all gates at zero, so that every block starts as the identity
        modulations = [m.lin for m in self.modules() if isinstance(m, Modulation)]
        for linear in (*modulations, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)


# ---- SANA: module names are those of NVlabs/Sana; in the Mix-FFN, those of DC-AE -------------------

FP16_MAX = 65504


class LinearAttention(nn.Module):
    """ReLU linear attention between the cells of a picture, heads of 32; q and k normed over all heads."""

    def __init__(self, hidden_size: int, clamp: bool, head_dim: int = 32):
        super().__init__()
        self.head_dim = head_dim
        self.clamp = clamp
        self.eps = 1e-8
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size, 1e-5)
        self.k_norm = RMSNorm(hidden_size, 1e-5)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h d n", d=self.head_dim)

    def forward(self, x):                                            # B N D -> B N D
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = self.split_heads(self.q_norm(q))                         # B nh hd N
        k = self.split_heads(self.k_norm(k))
        v = self.split_heads(v)
        out = linear_attention(q, k, v, self.eps)                    # B nh hd N
        out = self.proj(rearrange(out, "b h d n -> b n (h d)"))
        return out.clamp(-FP16_MAX, FP16_MAX) if self.clamp else out


class CrossAttention(nn.Module):
    """Softmax attention of the picture's tokens to the text's. q and k are normed over all heads."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = RMSNorm(hidden_size, 1e-6)
        self.k_norm = RMSNorm(hidden_size, 1e-6)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x, y, mask):                                   # B N D, B L D, B L or None -> B N D
        k, v = self.kv_linear(y).chunk(2, dim=-1)
        q = self.split_heads(self.q_norm(self.q_linear(x)))          # B N nh hd
        k = self.split_heads(self.k_norm(k))                         # B L nh hd
        v = self.split_heads(v)
        return self.proj(attention(q, k, v, mask))


class SanaBlock(nn.Module):
    def __init__(self, cfg: SanaConfig):
        super().__init__()
        D = cfg.hidden_size
        self.norm1 = layer_norm(D)
        self.attn = LinearAttention(D, cfg.clamp)
        self.cross_attn = CrossAttention(D, cfg.num_heads)
        self.norm2 = layer_norm(D)
        self.mlp = GLUMBConv(D, cfg.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)

    def forward(self, x, c, y, mask, height):                        # B N D, B 6D, B L D, B L, token rows
        modulation = self.scale_shift_table + c.unflatten(-1, (6, -1))            # B 6 D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attn(h)
        x = x + self.cross_attn(x, y, mask)
        # the Mix-FFN is a convolution: tokens become a picture and tokens again
        h = modulate(self.norm2(x), shift2, scale2)
        h = self.mlp(rearrange(h, "b (h w) d -> b d h w", h=height))
        return x + gate2[:, None] * rearrange(h, "b d h w -> b (h w) d")


class CaptionEmbedder(nn.Module):
    def __init__(self, caption_channels: int, hidden_size: int):
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, y):
        return self.y_proj(y.to(self.y_proj.fc1.weight.dtype))       # B L D_text -> B L D


class SanaFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x, c):                                         # B N D, B D -> B N ppC
        shift, scale = (self.scale_shift_table + c[:, None]).unbind(dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Sana(Backbone):
    """SANA-1.5 on any latent and any grid. It has no positions: the zero padding of its convolutions
    marks the borders."""

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        if cfg.hidden_size % cfg.num_heads or cfg.hidden_size % 32:
            raise ValueError(f"a width of {cfg.hidden_size} does not divide into {cfg.num_heads} heads of "
                             "cross-attention and heads of 32")
        self.cfg = cfg
        D = cfg.hidden_size
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = adaln(D, 6)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, D)
        self.attention_y_norm = RMSNorm(D, 1e-5)
        self.blocks = nn.ModuleList(SanaBlock(cfg) for _ in range(cfg.depth))
        self.final_layer = SanaFinalLayer(D, cfg.patch_size, cfg.out_channels)

    def forward_native(self, x: Tensor, step: Tensor, text: Text) -> Tensor:
        """x (B,C,H,W), step (B,) in [0,1000] with 1000 = noise -> (B,C,H,W), noise - data"""
        c = self.condition(step, text)                               # B D
        caption = self.read_text(text)                               # B L D
        height = x.shape[-2] // self.cfg.patch_size                  # rows of the token grid
        h = self.embed(x)                                            # B N D        stage 1    N = HW / p^2
        h = self.trunk(h, c, caption, text.mask, height)             # B N D        stage 3
        return self.head(h, c, grid=x.shape[-2:])                    # B C H W      stage 2

    def condition(self, step: Tensor, text: Text) -> Tensor:
        """The clock alone as a vector (B,D): the text enters by cross-attention."""
        if self.cfg.integer_time:
            step = step.trunc()
        return self.t_embedder(step)

    def read_text(self, text: Text) -> Tensor:
        """The text tokens (B,L,D) that cross-attention reads."""
        return self.attention_y_norm(self.y_embedder(text.tokens))

    def embed(self, x: Tensor) -> Tensor:
        # a view of the convolution's output would give its order of axes to the whole residual stream, and a
        # compiled block on a CPU gives NaN for that (torch 2.13)
        h = rearrange(self.x_embedder(x), "b d h w -> b (h w) d").contiguous()       # B N D
        # in the weights' type: under autocast the residual stream, which starts here, stays float32
        return h.to(self.x_embedder.proj.weight.dtype)

    def trunk(self, h: Tensor, c: Tensor, caption: Tensor, mask: Tensor | None, height: int) -> Tensor:
        c = self.t_block(c)                                          # B 6D   each block adds its own table
        for block in self.blocks:
            h = block(h, c, caption, mask, height)                   # B N D
        return h

    def head(self, h: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.unpatchify(self.final_layer(h, c), grid)         # B C H W

    # -- the one place where SANA's clock is translated: it puts noise at 1000 and predicts noise - data --

    def to_native(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, 1000.0 * (1.0 - t.float())

    def to_velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -out

    def init_family(self):
        t_mlp = self.t_embedder.mlp
        y_mlp = self.y_embedder.y_proj
        for layer in (t_mlp[0], t_mlp[2], self.t_block[1], y_mlp.fc1, y_mlp.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.constant_(self.attention_y_norm.weight, self.cfg.caption_scale)
        # cross-attention has no gate: its output map starts at zero instead
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)


FAMILIES = {DiTConfig: DiT, FluxConfig: Flux, SanaConfig: Sana}
