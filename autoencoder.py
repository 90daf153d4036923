"""The autoencoders, image <-> latent: the KL-VAEs that base models were trained on, the DC-AEs they move to.

    encode  (B,3,fH,fW) in [-1,1] -> z (B,C,H,W), already shifted and scaled: what a diffusion model sees
    decode  z -> (B,3,fH,fW)

The scale and the shift of a latent space are applied in these two and nowhere else in the project.
"Deeply compressed" means fewer tokens; DC-AE spends channels instead of places (arXiv 2410.10733):

    tokens at       512     1K      2K      4K
    f8  patch 2   1,024  4,096  16,384  65,536     SD-VAE, FLUX-VAE
    f32 patch 1     256  1,024   4,096  16,384     DC-AE f32
    f64 patch 1      64    256   1,024   4,096     DC-AE f64

    ae = checkpoints.load_autoencoder("dc-ae-f32c32-in-1.0")
    x = ae.decode(ae.encode(x))

Reading order: configs and AUTOENCODERS, what both kinds share, KL-VAE, DC-AE, then large pictures, in strips
(exact) and in tiles (close).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import ChannelRMSNorm, GLUMBConv, linear_attention


# ---- configs -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class KLConfig:
    """KL-VAE of latent diffusion. Its posterior is a Gaussian; z = (mean - shift) * scale."""
    name: str
    channels: int
    scale: float = 1.0
    shift: float = 0.0
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2                                # ResBlocks a level (one more in the decoder)
    groups: int = 32
    quant_conv: bool = False                      # 1x1 convolutions around the latent (SD yes, FLUX no)
    weights: str | None = None

    @property
    def f(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class DCAEConfig:
    """DC-AE. widths and depths by stage, the full-resolution stage first; depth 0 in stage 0 means that the
    picture is folded 2x straight into stage 1. Stages from `attention_from` on are EfficientViT blocks, the
    others ResBlocks."""
    name: str
    channels: int
    scale: float | None = 1.0                     # None: nobody published one; encode and decode refuse
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    encoder_attention_from: int = 3
    decoder_attention_from: int = 3
    multiscale: bool = False                      # a second set of q, k, v from a 5x5 neighbourhood
    strided: bool = False                         # down by a strided convolution instead of folding pixels
    interpolate: bool = False                     # up by nearest neighbour instead of unfolding pixels
    decoder_batch_norm: bool = False              # BatchNorm + ReLU in the decoder's ResBlocks
    latent_shortcut: bool = True                  # channel-averaging shortcut around the latent convolutions
    out_act: str = "relu"
    weights: str | None = None
    shift: float = 0.0                            # no DC-AE has one

    @property
    def f(self) -> int:
        return 2 ** (len(self.widths) - 1)


def dc_ae(name: str, channels: int, scale: float | None, owner="mit-han-lab", **settings) -> DCAEConfig:
    """A published DC-AE, in the repository that bears its name."""
    weights = f"{owner}/{name}::model.safetensors"
    return DCAEConfig(name, channels, scale, weights=weights, **settings)


# the kinds of DC-AE that have been published
NEVER = 99                                        # attention_from beyond the last stage: ResBlocks only
F32 = dict(decoder_batch_norm=True)
F64 = dict(
    widths=(128, 256, 512, 512, 1024, 1024, 2048),
    encoder_depths=(0, 4, 8, 2, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2, 2),
    decoder_batch_norm=True)
F128 = dict(
    widths=(128, 256, 512, 512, 1024, 1024, 2048, 2048),
    encoder_depths=(0, 4, 8, 2, 2, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2, 2, 2),
    decoder_batch_norm=True)
SANA = dict(
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    multiscale=True,
    strided=True,
    interpolate=True)
SANA_LITE = dict(
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(0, 3, 5, 4, 4, 4),
    decoder_attention_from=NEVER,
    multiscale=True,
    strided=True,
    out_act="silu")
V15 = dict(
    owner="dc-ai",
    encoder_attention_from=NEVER,
    decoder_attention_from=NEVER,
    latent_shortcut=False,
    out_act="silu")
V15_F32 = dict(
    **V15,
    encoder_depths=(0, 5, 10, 4, 4, 4),
    decoder_depths=(0, 5, 10, 4, 4, 4))
V15_F64 = dict(
    **V15,
    widths=(128, 256, 512, 512, 1024, 1024, 1024),
    encoder_depths=(0, 5, 10, 4, 4, 4, 4),
    decoder_depths=(0, 5, 10, 4, 4, 4, 4))

# Everything that there is to know of an autoencoder stands here: adding one touches this dict alone.
AUTOENCODERS = {cfg.name: cfg for cfg in (
    KLConfig(
        "tiny-kl-f8c4", 4, widths=(16, 32, 64, 96), depth=1, groups=8,
        weights="weights/tiny-kl-f8c4.safetensors"),
    KLConfig(
        "sd-vae-f8c4", 4, 0.18215, quant_conv=True,
        weights="stabilityai/sd-vae-ft-ema::diffusion_pytorch_model.safetensors"),
    KLConfig(
        "flux-vae-f8c16", 16, 0.3611, 0.1159, weights="black-forest-labs/FLUX.1-Krea-dev::ae.safetensors"),
    DCAEConfig(
        "tiny-dc-ae-f32c32", 32,
        widths=(32, 32, 64, 128, 128, 256),
        encoder_depths=(0, 1, 2, 2, 1, 1),
        decoder_depths=(0, 2, 2, 2, 1, 1),
        encoder_attention_from=5,
        decoder_attention_from=5,
        weights="weights/tiny-dc-ae-f32c32.safetensors"),
    dc_ae("dc-ae-f32c32-in-1.0", 32, 0.3189, **F32),
    dc_ae("dc-ae-f32c32-mix-1.0", 32, 0.4552, **F32),
    dc_ae("dc-ae-f64c128-in-1.0", 128, 0.2889, **F64),
    dc_ae("dc-ae-f64c128-mix-1.0", 128, 0.4538, **F64),
    dc_ae("dc-ae-f128c512-in-1.0", 512, 0.4883, **F128),
    dc_ae("dc-ae-f128c512-mix-1.0", 512, 0.3620, **F128),
    dc_ae("dc-ae-f32c32-sana-1.0", 32, 0.41407, **SANA),
    dc_ae("dc-ae-f32c32-sana-1.1", 32, 0.41407, **SANA),
    dc_ae("dc-ae-lite-f32c32-sana-1.1", 32, 0.41407, **SANA_LITE),
    dc_ae("dc-ae-f32c128-1.5", 128, None, **V15_F32),
    dc_ae("dc-ae-f64c128-1.5", 128, 0.5935, **V15_F64),
)}


def ae_config(name: str) -> KLConfig | DCAEConfig:
    """The config of this name. ValueError that lists the names otherwise."""
    if name not in AUTOENCODERS:
        raise ValueError(f"no autoencoder is called {name!r}; there are: {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]


def build_autoencoder(cfg: KLConfig | DCAEConfig) -> "Autoencoder":
    """The autoencoder of a config, with random weights."""
    return KLVAE(cfg) if isinstance(cfg, KLConfig) else DCAE(cfg)


# ---- what both kinds share -----------------------------------------------------------------------

class Autoencoder(nn.Module):
    """What both kinds share: outside, nothing but the normalised latent is seen.
    A kind brings `moments`, image -> raw mean and log variance or None, and `decode_raw`, the way back.

    max_elements   numbers in one tensor of a strip (DC-AE): 4 % more work at 4K, a third of the memory
    tile           latent cells a side of one tile (KL-VAE), where strips are not exact"""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.max_elements = 2**28
        self.tile = 128

    def train(self, mode: bool = True):
        # an autoencoder in use is frozen: BatchNorm in train mode would rewrite its statistics all the time
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image (B,3,H,W) in [-1,1] -> mean and standard deviation of its normalised latent (B,C,H/f,W/f); no
        deviation (None) for DC-AE, which is deterministic. H and W must divide by f (ValueError)."""
        f = self.cfg.f
        H, W = x.shape[-2:]
        if H % f or W % f:
            nearest_H, nearest_W = (max(f, round(side / f) * f) for side in (H, W))
            raise ValueError(f"a picture of {W}x{H}: {self.cfg.name} needs sides that divide by {f}; "
                             f"try {nearest_W}x{nearest_H}")
        mean, logvar = self.moments(x)
        scale = self.published_scale()
        std = None if logvar is None else (0.5 * logvar).exp() * scale
        return (mean - self.cfg.shift) * scale, std

    def encode(self, x: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Image -> normalised latent: the posterior's mean, or a draw from it."""
        mean, std = self.posterior(x)
        if not sample or std is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latent (B,C,H,W) -> image (B,3,fH,fW), nominally in [-1,1], not clamped."""
        return self.decode_raw(z / self.published_scale() + self.cfg.shift)

    def published_scale(self) -> float:
        if self.cfg.scale is None:
            raise ValueError(f"no scaling factor has been published for {self.cfg.name}; "
                             "measure one (1 / std of its raw latents) and set it in its config")
        return self.cfg.scale


def conv3x3(channels_in: int, channels_out: int, **settings) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **settings)


# ---- KL-VAE: module names are those of diffusers, the layout in which SD's was published ---------

def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class KLResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out, groups)
        self.conv2 = conv3x3(channels_out, channels_out)
        # a name that a checkpoint holds only where the widths differ
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class KLAttention(nn.Module):
    """One head over all places of the coarsest grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b 1 (h w) c -> b c h w", h=x.shape[-2])


class KLMid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(KLResBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([KLAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class KLDown(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                     # pads right and below only


class KLUp(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class KLLevel(nn.Module):
    """The ResBlocks of one resolution, and the step to the next: "down", "up", or None at the last level."""

    def __init__(self, channels_in: int, channels: int, depth: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(depth):
            self.resnets.append(KLResBlock(channels_in if i == 0 else channels, channels, groups))
        if resample == "down":
            self.downsamplers = nn.ModuleList([KLDown(channels)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([KLUp(channels)])

    def forward(self, x):
        for blocks in self.children():                               # resnets, then what resamples
            for block in blocks:
                x = block(x)
        return x


def kl_levels(widths: tuple[int, ...], depth: int, groups: int, resample: str) -> nn.ModuleList:
    """One level for each width; all but the last one resample."""
    levels = nn.ModuleList()
    for i, width in enumerate(widths):
        is_last = i == len(widths) - 1
        levels.append(KLLevel(widths[max(i - 1, 0)], width, depth, groups, None if is_last else resample))
    return levels


class KLEncoder(nn.Module):
    def __init__(self, cfg: KLConfig):
        super().__init__()
        widths = cfg.widths
        self.conv_in = conv3x3(3, widths[0])
        self.down_blocks = kl_levels(widths, cfg.depth, cfg.groups, "down")
        self.mid_block = KLMid(widths[-1], cfg.groups)
        self.conv_norm_out = group_norm(widths[-1], cfg.groups)
        self.conv_out = conv3x3(widths[-1], 2 * cfg.channels)        # mean and log variance

    def forward(self, x):                                            # B 3 fH fW
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # B 2C H W


class KLDecoder(nn.Module):
    def __init__(self, cfg: KLConfig):
        super().__init__()
        widths = cfg.widths[::-1]
        self.conv_in = conv3x3(cfg.channels, widths[0])
        self.mid_block = KLMid(widths[0], cfg.groups)
        self.up_blocks = kl_levels(widths, cfg.depth + 1, cfg.groups, "up")
        self.conv_norm_out = group_norm(widths[-1], cfg.groups)
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, z):                                            # B C H W
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # B 3 fH fW


class KLVAE(Autoencoder):
    def __init__(self, cfg: KLConfig):
        super().__init__(cfg)
        self.encoder = KLEncoder(cfg)
        self.decoder = KLDecoder(cfg)
        if cfg.quant_conv:
            self.quant_conv = nn.Conv2d(2 * cfg.channels, 2 * cfg.channels, 1)
            self.post_quant_conv = nn.Conv2d(cfg.channels, cfg.channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> raw posterior mean and log variance (B,C,H/f,W/f)."""
        f = self.cfg.f
        mean, logvar = in_tiles(self.encode_tile, x, self.tile * f, f, 1 / f).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode_raw(self, z: Tensor) -> Tensor:
        return in_tiles(self.decode_tile, z, self.tile, 1, self.cfg.f)

    def encode_tile(self, x):
        h = self.encoder(x)
        return self.quant_conv(h) if self.cfg.quant_conv else h

    def decode_tile(self, z):
        return self.decoder(self.post_quant_conv(z) if self.cfg.quant_conv else z)


# ---- DC-AE: module names are those of diffusers, except that q, k, v stay one matrix -------------

class ResBlock(nn.Module):
    def __init__(self, channels: int, batch_norm: bool = False):
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else ChannelRMSNorm(channels)
        self.act = F.relu if batch_norm else F.silu

    def forward(self, x):
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over the picture, heads of 32, optionally a second group of heads that reads 5x5
    means. The 3C channels of qkv form groups of 96 consecutive ones, each a head's q, k, v: a third is not
    "all queries"."""

    def __init__(self, channels: int, multiscale: bool, head_dim: int = 32):
        super().__init__()
        self.head_dim = head_dim
        width = 3 * channels
        self.qkv = nn.Conv2d(channels, width, 1, bias=False)
        self.multiscale = None
        if multiscale:
            self.multiscale = nn.Sequential(
                nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False),
                nn.Conv2d(width, width, 1, groups=width // head_dim, bias=False))
        self.proj = nn.Conv2d(2 * channels if multiscale else channels, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x):
        B, _, H, W = x.shape
        qkv = self.qkv(x)                                            # B 3C H W
        if self.multiscale is not None:
            qkv = torch.cat([qkv, self.multiscale(qkv)], dim=1)      # B 6C H W
        q, k, v = qkv.reshape(B, -1, 3 * self.head_dim, H * W).chunk(3, dim=2)        # B nh hd HW
        out = linear_attention(q, k, v, eps=1e-15)
        return self.norm(self.proj(out.reshape(B, -1, H, W)))


class EViTBlock(nn.Module):
    """A global block (linear attention) and a local one (gated depthwise convolution), both residual."""

    def __init__(self, channels: int, multiscale: bool):
        super().__init__()
        self.attn = MultiscaleAttention(channels, multiscale)
        self.conv_out = GLUMBConv(channels, norm=True)

    def forward(self, x, max_elements: float = math.inf):
        x = x + self.attn(x)
        return x + in_strips([self.conv_out], x, max_elements)


def average_groups(x: Tensor, group: int) -> Tensor:
    """The mean of every `group` consecutive channels. (B,C,H,W) -> (B,C/group,H,W)"""
    return x.unflatten(1, (-1, group)).mean(dim=2)


def repeat_channels(x: Tensor, times: int) -> Tensor:
    """Every channel so many times in a row. (B,C,H,W) -> (B,times C,H,W)"""
    # over the last axis, which keeps channels-last memory as it is: a sum of two layouts takes twice as long
    return x.movedim(1, -1).repeat_interleave(times, dim=-1).movedim(-1, 1)


class Down(nn.Module):
    """2x down: a convolution, plus the pixels folded into channels and averaged in groups (the shortcut)."""

    def __init__(self, channels_in: int, channels_out: int, strided: bool, shortcut: bool = True):
        super().__init__()
        self.strided = strided
        self.group = 4 * channels_in // channels_out if shortcut else 0
        if strided:
            self.conv = conv3x3(channels_in, channels_out, stride=2)
        else:
            self.conv = conv3x3(channels_in, channels_out // 4)

    def forward(self, x):
        y = self.conv(x)
        if not self.strided:
            y = F.pixel_unshuffle(y, 2)
        if self.group:
            y = y + average_groups(F.pixel_unshuffle(x, 2), self.group)
        return y


class Up(nn.Module):
    """2x up: a convolution, plus the channels repeated and unfolded into pixels."""

    def __init__(self, channels_in: int, channels_out: int, interpolate: bool, shortcut: bool = True):
        super().__init__()
        self.interpolate = interpolate
        self.repeats = 4 * channels_out // channels_in if shortcut else 0
        self.conv = conv3x3(channels_in, channels_out if interpolate else 4 * channels_out)

    def forward(self, x):
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        if self.repeats:
            y = y + F.pixel_shuffle(repeat_channels(x, self.repeats), 2)
        return y


class DCEncoder(nn.Module):
    def __init__(self, cfg: DCAEConfig):
        super().__init__()
        widths = cfg.widths
        depths = cfg.encoder_depths
        if depths[0]:
            self.conv_in = conv3x3(3, widths[0])
        else:
            self.conv_in = Down(3, widths[1], cfg.strided, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            # stages of depth 0 stay in the list, empty: checkpoints number the stages
            down = [Down(width, widths[i + 1], cfg.strided)] if depth and i + 1 < len(widths) else []
            if i >= cfg.encoder_attention_from:
                blocks = [EViTBlock(width, cfg.multiscale) for _ in range(depth)]
            else:
                blocks = [ResBlock(width) for _ in range(depth)]
            self.down_blocks.append(nn.Sequential(*blocks, *down))
        self.conv_out = conv3x3(widths[-1], cfg.channels)
        self.group = widths[-1] // cfg.channels if cfg.latent_shortcut else 0

    def forward(self, x, max_elements: float):                       # B 3 fH fW
        first, *deep = [stage for stage in self.down_blocks if len(stage)]
        # the way in goes with the first stage: apart, they would leave their largest tensor whole in memory
        x = in_strips([self.conv_in, *first], x, max_elements)
        for stage in deep:
            x = in_strips(stage, x, max_elements)
        z = self.conv_out(x)                                         # B C H W
        return z + average_groups(x, self.group) if self.group else z


class DCDecoder(nn.Module):
    def __init__(self, cfg: DCAEConfig):
        super().__init__()
        widths = cfg.widths
        depths = cfg.decoder_depths
        self.conv_in = conv3x3(cfg.channels, widths[-1])
        self.repeats = widths[-1] // cfg.channels if cfg.latent_shortcut else 0
        self.up_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            up = [Up(widths[i + 1], width, cfg.interpolate)] if depth and i + 1 < len(widths) else []
            if i >= cfg.decoder_attention_from:
                blocks = [EViTBlock(width, cfg.multiscale) for _ in range(depth)]
            else:
                blocks = [ResBlock(width, cfg.decoder_batch_norm) for _ in range(depth)]
            self.up_blocks.append(nn.Sequential(*up, *blocks))
        width = widths[0] if depths[0] else widths[1]
        self.norm_out = ChannelRMSNorm(width)
        self.act = nn.ReLU() if cfg.out_act == "relu" else nn.SiLU()
        if depths[0]:
            self.conv_out = conv3x3(width, 3)
        else:
            self.conv_out = Up(width, 3, cfg.interpolate, shortcut=False)

    def forward(self, z, max_elements: float):                       # B C H W
        x = self.conv_in(z)
        if self.repeats:
            x = x + repeat_channels(z, self.repeats)
        *deep, last = [stage for stage in reversed(self.up_blocks) if len(stage)]
        for stage in deep:
            x = in_strips(stage, x, max_elements)
        # the last stage goes with the way out, as the encoder's first with the way in
        return in_strips([*last, self.norm_out, self.act, self.conv_out], x, max_elements)    # B 3 fH fW


class DCAE(Autoencoder):
    def __init__(self, cfg: DCAEConfig):
        super().__init__(cfg)
        self.encoder = DCEncoder(cfg)
        self.decoder = DCDecoder(cfg)

    def moments(self, x: Tensor) -> tuple[Tensor, None]:
        """Image -> raw latent (B,C,H/f,W/f), and no variance: DC-AE is deterministic."""
        return self.encoder(x, self.strip_limit()), None

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(z, self.strip_limit())

    def strip_limit(self) -> float:
        # in training, BatchNorm must see the whole batch
        return math.inf if self.training else self.max_elements

    def with_channels(self, channels: int) -> "DCAE":
        """The same autoencoder on its first `channels` latent channels: DC-AE 1.5's structured latent space
        (arXiv 2508.00413). ValueError for other models, which were not trained for it."""
        if self.cfg.latent_shortcut or not 0 < channels <= self.cfg.channels:
            raise ValueError(f"{self.cfg.name} has no partial latent of {channels} channels; "
                             "only dc-ae-*-1.5 do, up to their full number")
        part = DCAE(replace(self.cfg, channels=channels, name=f"{self.cfg.name}-c{channels}"))
        # the first channels of the two convolutions that touch the latent; every other tensor is shared
        state = dict(self.state_dict())
        for key in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
            state[key] = state[key][:channels]
        state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :channels]
        part.load_state_dict(state, assign=True)
        return part.requires_grad_(False).eval()


# ---- large pictures in strips: DC-AE, exact ------------------------------------------------------

def in_strips(layers, x: Tensor, max_elements: float) -> Tensor:
    """The layers in turn, by picture and then by strips of rows where one of their tensors would hold more
    than max_elements numbers. x (B,C,H,W) -> (B,C',ratio H,ratio W).

    The same result as the whole, not an approximation: a strip carries a halo, every row that its output can
    see, and at the picture's own edges it pads as the whole does. Attention sees everything and runs whole;
    what is local in its block does not."""
    B, _, H, W = x.shape
    reach, ratio, width, fold = joint_extent(layers, x.shape[1])
    # with attention among them layer by layer, the local ones in strips of their own
    if reach == math.inf:
        for layer in layers:
            if isinstance(layer, EViTBlock):
                x = layer(x, max_elements)
            else:
                x = in_strips([layer], x, max_elements)
        return x
    # by picture first, as many at once as fit: they share no rows, so this costs nothing
    if B > 1 and B * width * H * W > max_elements:
        pictures = max(1, int(max_elements / (width * H * W)))
        return torch.cat([in_strips(layers, part, max_elements) for part in x.split(pictures)])
    # then by strips of as many rows as fit
    height = int(min(H, max_elements / (B * width * W)))
    out = None
    for start, stop, top, bottom in plan_strips(H, height, reach, fold):
        y = x[:, :, start:stop]
        for layer in layers:
            y = layer(y)
        if bottom - top == H:
            return y
        # channels last, because the convolutions that follow read it so on a GPU
        if out is None:
            shape = (B, y.shape[1], int(H * ratio), y.shape[3])
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
        inner = slice(int((top - start) * ratio), int((bottom - start) * ratio))      # y without its halo
        out[:, :, int(top * ratio) : int(bottom * ratio)] = y[:, :, inner]
    return out


def plan_strips(H: int, height: int, reach: float, fold: int) -> list[tuple[int, int, int, int]]:
    """The strips of a picture of H rows, each giving about `height` rows of the result -> (start, stop, top,
    bottom) of each: rows [start, stop) go in, rows [top, bottom) come out, all in rows of the picture. What
    goes in beyond what comes out is the halo. Every number is a multiple of `fold`."""
    def round_up(rows: float) -> int:
        return math.ceil(math.ceil(rows) / fold) * fold

    halo = round_up(reach)
    height = max(1, height // fold) * fold
    inner = H - 2 * halo                              # at the picture's edges a strip gives its halo as well
    if inner <= height:
        return [(0, H, 0, H)]
    # strips of one size, the last one shifted back: kernels are compiled and tuned for a shape
    height = round_up(inner / math.ceil(inner / height))
    rows = height + 2 * halo
    strips = []
    bottom = 0
    while bottom < H:
        top = bottom
        start = max(0, min(top - halo, H - rows))
        stop = start + rows
        bottom = H if stop == H else stop - halo
        strips.append((start, stop, top, bottom))
    return strips


def joint_extent(layers, channels: int) -> tuple[float, float, float, int]:
    """What strips have to know of several layers in turn, counted in rows of their common input:

    reach   rows that an output row depends on, on either side; inf = all of them
    ratio   rows out per row in
    width   channels of the largest tensor, at the size of the input
    fold    input rows that become one row: a strip has to start at a multiple"""
    reach = 0.0
    ratio = 1.0
    width = channels
    fold = 1
    for layer in layers:
        layer_reach, layer_ratio, layer_width = layer_extent(layer)
        # the layer's own rows are 1 / ratio as high as the input's, and its tensors ratio^2 as large
        reach += layer_reach / ratio
        width = max(width, layer_width * ratio**2)
        ratio *= layer_ratio
        fold = max(fold, int(1 / ratio))
    return reach, ratio, width, fold


def layer_extent(layer: nn.Module) -> tuple[float, float, int]:
    """Reach, ratio and width of one layer. TypeError for a layer of unknown reach."""
    convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
    width = max((max(conv.in_channels, conv.out_channels) for conv in convs), default=0)
    match layer:
        case EViTBlock():
            return math.inf, 1, width
        case ResBlock():
            return 2, 1, width
        case Up():
            return 1, 2, 4 * width if layer.interpolate else width
        case Down():
            return 1, 0.5, width
        case nn.Conv2d() | GLUMBConv():
            return 1, 1, width
        case ChannelRMSNorm() | nn.ReLU() | nn.SiLU():
            return 0, 1, 0
    raise TypeError(f"in_strips does not know how far a {type(layer).__name__} sees")


# ---- large pictures in tiles: KL-VAE, close ------------------------------------------------------

def in_tiles(fn, x: Tensor, tile: int, unit: int, ratio: float, overlap: float = 0.25) -> Tensor:
    """fn(x), in overlapping square tiles blended linearly if x is larger than one tile. For KL-VAEs, whose
    group norm and attention see the whole picture: close to the untiled result, not equal to it.

    unit    tiles start at its multiples (f pixels when encoding, 1 cell when decoding): on a latent cell
    ratio   size out / size in"""
    H, W = x.shape[-2:]
    if H <= tile and W <= tile:
        return fn(x)
    stride = max(unit, int(tile * (1 - overlap)) // unit * unit)

    def starts(size: int) -> list[int]:
        last = max(size - tile, 0)
        return sorted({*range(0, last, stride), last})

    def scaled(n: int) -> int:
        return int(n * ratio)

    def ramp(n: int, start: int, size: int) -> Tensor:
        """Weights of n rows of a tile's result: rising over the overlap, flat at the picture's edge."""
        place = torch.arange(n)
        rise = ((place + 1) / scaled(tile - stride)).clamp(max=1)
        fall = ((n - place) / scaled(tile - stride)).clamp(max=1)
        if start == 0:
            rise = torch.ones(n)
        if start + tile >= size:
            fall = torch.ones(n)
        return torch.minimum(rise, fall)

    # a weighted mean of the tiles that cover a place
    out = total = None
    for top in starts(H):
        for left in starts(W):
            y = fn(x[..., top : top + tile, left : left + tile])
            height, width = y.shape[-2:]
            weight = (ramp(height, top, H)[:, None] * ramp(width, left, W)).to(y)
            if out is None:
                out = y.new_zeros(*y.shape[:2], scaled(H), scaled(W))
                total = y.new_zeros(scaled(H), scaled(W))
            rows = slice(scaled(top), scaled(top) + height)
            cols = slice(scaled(left), scaled(left) + width)
            out[..., rows, cols] += y * weight
            total[rows, cols] += weight
    return out / total
