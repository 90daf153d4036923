"""The diffusion transformers that DC-Gen moves to another latent space.

Every family here has the same three named stages, because they are what the method trains, one after the other:

    forward(x, t, cond) = head(trunk(embed(x)))

    embed  (B,C,H,W) -> (B,N,D)   the patch embedder, bound to one latent space       stage 1 trains it (Eq. 1)
    trunk  (B,N,D)   -> (B,N,D)   the blocks, the knowledge worth keeping             stage 3 adapts it by LoRA
    head   (B,N,D)   -> (B,C,H,W) the output head, bound to the latent space as well  stage 2 trains it

One clock for the whole project: t in [0,1] with 0 = noise and 1 = data, x_t = (1-t) x0 + t x1, and a model returns
the velocity v = x1 - x0 (arXiv 2509.25180, Eq. 2). A family with a clock of its own translates in its `forward`,
nowhere else. Reading order: configs, small layers, DiT, weights.
"""

import json
import math
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

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

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.predict == "epsilon" else 1)


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
}


def to_deep_latent(cfg, ae, predict: str = "velocity", pos_step: float = 1.0):
    """The paper's idea in one line: the same model, on the latents of a deeper autoencoder, one token per latent cell.
    ae: an autoencoder's config (autoencoder.AUTOENCODERS). DiT's old head came with a variance; the new one is trained
    with the flow loss and does without, unless predict="epsilon" keeps the DDPM objective. pos_step 1 counts the new grid by ones, as the
    authors do; 2 spreads a grid of half the side over the places that the base knows."""
    return replace(cfg, in_channels=ae.channels, patch_size=1, ae=ae.name, predict=predict, pos_step=pos_step, guided_channels=None, weights=None)


# ---- small layers ----------------------------------------------------------------------------------------------------

def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of a clock reading, cosines first. t (B,) on the scale the model was trained with -> (B,dim) float32.
    Always in float32: bf16 has 8 bits of mantissa and merges half of 1000 steps. (DiT models.py: exponent over dim/2)"""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


@lru_cache(maxsize=32)
def sincos_2d(dim: int, height: int, width: int, step: float = 1.0) -> Tensor:
    """Fixed 2-D position table of a grid -> (HW,dim) float32; the first half encodes the column, the second the row.
    Place i lies at step i + (step - 1) / 2: the middle of the `step` cells of a finer grid that it covers. Computed for
    the grid at hand and never loaded: a table of the old grid would fit by accident."""
    cpu = dict(dtype=torch.float64, device="cpu")                    # cached: never under whoever's `with torch.device`
    omega = 10000.0 ** (-torch.arange(dim // 4, **cpu) / (dim / 4))
    place = lambda n: step * torch.arange(n, **cpu) + (step - 1) / 2
    rows, cols = torch.meshgrid(place(height), place(width), indexing="ij")
    waves = lambda pos: torch.cat([(a := pos.reshape(-1, 1) * omega).sin(), a.cos()], dim=1)
    return torch.cat([waves(cols), waves(rows)], dim=1).float()


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


# ---- DiT -------------------------------------------------------------------------------------------------------------

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


class Mlp(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def adaln(hidden_size: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = adaln(hidden_size, 6)

    def forward(self, x, c):                                         # x (B,N,D), c (B,D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = adaln(hidden_size, 2)

    def features(self, x, c):
        """The input of the last linear map (B,N,D): with a frozen trunk the head's loss is least squares in it."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return modulate(self.norm_final(x), shift, scale)

    def forward(self, x, c):
        return self.linear(self.features(x, c))


class DiT(nn.Module):
    """DiT on any latent and any grid whose sides divide by the patch size. Module names are the official file's."""

    # what is bound to the latent space, and so new after a change of it; the final adaLN reads only (t, y) and stays
    EMBEDDER, HEAD = "x_embedder.", "final_layer.linear."

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
        pos = sincos_2d(h.shape[1], *h.shape[-2:], self.cfg.pos_step).to(h.device, self.x_embedder.proj.weight.dtype)
        return rearrange(h, "b d h w -> b (h w) d") + pos

    def condition(self, clock: Tensor, y: Tensor) -> Tensor:
        """Clock reading (B,) and class (B,) -> the vector that modulates every block (B,D)."""
        return self.t_embedder(clock) + self.y_embedder(y)

    def trunk(self, h: Tensor, c: Tensor, taps: list | None = None) -> Tensor:
        """(B,N,D) -> (B,N,D). taps, if a list, receives every block's output: the features of Fig. 4(a)."""
        for block in self.blocks:
            h = block(h, c)
            if taps is not None:
                taps.append(h)
        return h

    def head(self, h: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B,N,D) -> (B,C_out,H,W); grid = the latent's (H,W)."""
        return self.unpatchify(self.final_layer(h, c), grid)

    def head_features(self, h: Tensor, c: Tensor) -> Tensor:
        """What the last linear map of the head reads (B,N,D): for the closed form of align.py."""
        return self.final_layer.features(h, c)

    @property
    def embed_linear(self) -> nn.Conv2d:
        return self.x_embedder.proj

    @property
    def head_linear(self) -> nn.Linear:
        return self.final_layer.linear

    def patchify(self, x: Tensor) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.cfg.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0] // p, p=p, q=p)

    def network(self, x: Tensor, clock: Tensor, y: Tensor) -> Tensor:
        """The bare network on its own clock: what the official code calls forward. (B,C,H,W) -> (B,C_out,H,W)"""
        c = self.condition(clock, y)                                 # B D
        h = self.embed(x)                                            # B N D
        h = self.trunk(h, c)                                         # B N D
        return self.head(h, c, x.shape[-2:])                         # B C_out H W

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity v = x1 - x0 at x_t. x (B,C,H,W), t (B,) in [0,1] with 0 = noise, y (B,) class, num_classes = null."""
        x_in, clock = self.own_clock(x, t)
        return self.velocity(self.network(x_in, clock, y), x, t)

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
        rising = ddpm_times().flip(0).to(t.device)                   # step 999 first: t rises from noise to data
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

    def initialise(self) -> "DiT":
        """Initialisation for training from scratch, as DiT's: zero-gated blocks and a zero head."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        for block in [*self.blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        self.new_embedder_and_head()
        nn.init.zeros_(self.final_layer.linear.weight)
        return self

    def new_embedder_and_head(self) -> "DiT":
        """Xavier-uniform weights and zero biases for what is bound to the latent space. The head is not zeroed here:
        a zero head passes no gradient to the embedder behind it."""
        for layer in (self.x_embedder.proj, self.final_layer.linear):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            nn.init.zeros_(layer.bias)
        return self


def ddpm_alphas_cumprod(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear-beta chain of DDPM and DiT -> alpha-bar (steps,) float64."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), dim=0)


@lru_cache(maxsize=1)
def ddpm_times() -> Tensor:
    """The project's t of every DDPM step, by equal signal-to-noise ratio: t = sqrt(ab) / (sqrt(ab) + sqrt(1-ab))."""
    ab = ddpm_alphas_cumprod()
    return (ab.sqrt() / (ab.sqrt() + (1 - ab).sqrt())).float()


DDPM_T_MIN = float(ddpm_times()[-1])                                 # 0.0063: the chain's noisiest step


# ---- weights: a layout is a table ------------------------------------------------------------------------------------
# A row is (theirs, ours[, transform]). `{}` stands for a number, `*` for any text, both the same and in order on the two
# sides; several names on their side are concatenated along the first axis; ours = None names what is left out, and why.

DIT_TABLES = {
    "ours": [("*", "*")],
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


def dit_layout(keys) -> str:
    return "diffusers" if "pos_embed.proj.weight" in keys else "original" if "pos_embed" in keys else "ours"


def _pattern(text: str) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)") + r"\Z")


def _fill(text: str, groups: tuple[str, ...]) -> str:
    it = iter(groups)
    return re.sub(r"\{\}|\*", lambda _: next(it), text)


def map_keys(model: nn.Module, theirs: dict[str, Tensor], table: list[tuple]) -> dict[str, Tensor]:
    """A foreign state dict under our names, strictly: every source key used once, every target filled, shapes equal.
    Raises ValueError with the keys otherwise: half a checkpoint draws plausible rubbish."""
    wanted, mapped, used, missing = model.state_dict(), {}, set(), []
    rows = [(_pattern(row[1]), row) for row in table if row[1] is not None]
    for key, target in wanted.items():
        for pattern, (names, _, *transform) in rows:
            if not (match := pattern.match(key)):
                continue
            sources = [_fill(n, match.groups()) for n in ([names] if isinstance(names, str) else names)]
            if not all(s in theirs for s in sources):
                continue
            used.update(sources)
            value = theirs[sources[0]] if len(sources) == 1 else torch.cat([theirs[s] for s in sources])
            mapped[key] = transform[0](value) if transform else value
            break
        else:
            missing.append(key)
    dropped = [_pattern(row[0]) for row in table if row[1] is None]
    unused = [k for k in theirs if k not in used and not any(d.match(k) for d in dropped)]
    wrong = [f"{k}: file {tuple(v.shape)}, model {tuple(wanted[k].shape)}" for k, v in mapped.items() if v.shape != wanted[k].shape]
    problems = [f"{len(found)} {what}: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
                for what, found in (("missing", missing), ("unexpected", unused), ("of another shape", wrong)) if found]
    if problems:
        raise ValueError(f"these weights are not a {type(model).__name__} of this configuration; " + "; ".join(problems))
    return mapped


def load_weights(model: nn.Module, theirs: dict[str, Tensor], table: list[tuple], dtype: torch.dtype | None = None) -> nn.Module:
    """Fill a model (built on meta) with a file's tensors under any key table. No second copy is made unless dtype asks
    for a conversion. Raises ValueError naming keys, see map_keys."""
    mapped = map_keys(model, theirs, table)
    if dtype is not None:
        mapped = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mapped.items()}
    model.load_state_dict(mapped, assign=True, strict=True)
    return model.requires_grad_(False)


def read_tensors(path) -> dict[str, Tensor]:
    """A weight file as {key: tensor}, memory-mapped. .safetensors, or a .pt/.pth/.bin that torch loads with
    weights_only=True (nothing in it is executed). Wrappers of the known trainers are taken off. ValueError if the file is
    missing, truncated, a git-lfs pointer, or anything but tensors."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    head = path.open("rb").read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is a git-lfs pointer, not the weights; run `git lfs pull` where it came from")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as e:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({e}); download it again") from None
    except Exception as e:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) does not load as plain tensors ({type(e).__name__}); it is damaged, or it holds "
                         "pickled code, which is never run here. Save its state dict as safetensors first") from None
    for wrapper in ("ema", "state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a state dict, tensors by name, under any of the known wrappers; save it as one")
    return state


def read_config(path) -> dict:
    """The configuration that our own files carry beside their tensors; {} for anybody else's."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as f:
        return json.loads((f.metadata() or {}).get("config", "{}"))


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


def write_tensors(path, tensors: dict[str, Tensor], config: dict | None = None):
    """safetensors with the configuration in its metadata, written atomically."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}   # no views, no shared storage
    with atomic(path) as tmp:
        save_file(plain, tmp, metadata={"config": json.dumps(config or {})})


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
    wanted = f"{name} wants {f'{file}{{{chr(44).join(parts)}}}' if folder else file} of {repo}"
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


def build(cfg: DiTConfig, weights=None, dtype: torch.dtype | None = torch.float32) -> DiT:
    """A model of this configuration, filled from a weight file of any known layout, or freshly initialised (None).
    dtype None keeps the file's. ValueError if the file is missing, damaged or of another architecture."""
    if weights is None:
        model = DiT(cfg).initialise()
        return model.to(dtype) if dtype else model
    with torch.device("meta"):
        model = DiT(cfg)
    tensors = read_tensors(weights)
    try:
        return load_weights(model, tensors, DIT_TABLES[dit_layout(tensors)], dtype)
    except ValueError as e:
        raise ValueError(f"{weights}: {e}") from None


def deepen(base: DiT, cfg: DiTConfig) -> DiT:
    """The base's trunk under a new embedder and head (Sec. 3.1.1: the two parts that bind to a latent space). Shares
    the trunk's tensors with the base; only the new parts are new."""
    with torch.device("meta"):
        model = DiT(cfg)
    own = lambda k: k.startswith((DiT.EMBEDDER, DiT.HEAD))
    state = {k: v for k, v in base.state_dict().items() if not own(k)}
    state |= {k: torch.empty(v.shape, dtype=torch.float32, device=next(iter(base.parameters())).device) for k, v in model.state_dict().items() if own(k)}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).new_embedder_and_head()


def config_dict(cfg) -> dict:
    return {"family": type(cfg).__name__, **asdict(cfg)}
