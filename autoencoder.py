"""The autoencoders: image <-> latent, the KL-VAEs that base models were trained on and the DC-AEs they are moved to.

    encode  (B,3,fH,fW) in [-1,1] -> z (B,C,H,W), already shifted and scaled: what a diffusion model sees
    decode  z -> (B,3,fH,fW)

The scale and the shift of a latent space are applied in these two and nowhere else in the project.
"Deeply compressed" means fewer tokens; DC-AE spends channels instead of places (arXiv 2410.10733):

    tokens at       512     1K      2K      4K
    f8  patch 2   1,024  4,096  16,384  65,536     SD-VAE, FLUX-VAE
    f32 patch 1     256  1,024   4,096  16,384     DC-AE f32
    f64 patch 1      64    256   1,024   4,096     DC-AE f64

Reading order: configs, KL-VAE, DC-AE, large pictures, weights, a training loop for small ones, main.
    python autoencoder.py --ae tiny-dc-ae-f32c32                 reconstructions of procedural pictures, PSNR and SSIM
    python autoencoder.py --ae sd-vae-f8c4 --images DIR          the same of your own pictures
    python autoencoder.py --ae tiny-kl-f8c4 --train              train one of the small ones from scratch
    python autoencoder.py --ae tiny-dc-ae-f32c32 --train --init weights/tiny-dc-ae-f32c32.safetensors --align-to tiny-kl-f8c4    A.9
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import ChannelRMSNorm, GLUMBConv, linear_attention


# ---- configs -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class KLConfig:
    """KL-VAE of latent diffusion. Its posterior is a Gaussian; scale and shift: z = (mean - shift) * scale."""
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
    """DC-AE. widths and depths by stage, the full-resolution stage first; depth 0 in stage 0 means that the picture is
    folded 2x straight into stage 1. Stages from `attention_from` on are EfficientViT blocks, the others ResBlocks."""
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


_f64 = dict(channels=128, widths=(128, 256, 512, 512, 1024, 1024, 2048), encoder_depths=(0, 4, 8, 2, 2, 2, 2), decoder_depths=(0, 5, 10, 2, 2, 2, 2), decoder_batch_norm=True)


_f128 = dict(channels=512, widths=(128, 256, 512, 512, 1024, 1024, 2048, 2048), encoder_depths=(0, 4, 8, 2, 2, 2, 2, 2), decoder_depths=(0, 5, 10, 2, 2, 2, 2, 2), decoder_batch_norm=True)


_sana = dict(channels=32, scale=0.41407, encoder_depths=(2, 2, 2, 3, 3, 3), decoder_depths=(3, 3, 3, 3, 3, 3), multiscale=True, strided=True, interpolate=True)


_v15 = dict(channels=128, encoder_attention_from=99, decoder_attention_from=99, latent_shortcut=False, out_act="silu")


_tiny = dict(channels=32, widths=(32, 32, 64, 128, 128, 256), encoder_depths=(0, 1, 2, 2, 1, 1), decoder_depths=(0, 2, 2, 2, 1, 1), encoder_attention_from=5, decoder_attention_from=5)


AUTOENCODERS = {c.name: c for c in (
    KLConfig("tiny-kl-f8c4", 4, widths=(16, 32, 64, 96), depth=1, groups=8, weights="weights/tiny-kl-f8c4.safetensors"),
    KLConfig("sd-vae-f8c4", 4, 0.18215, quant_conv=True, weights="stabilityai/sd-vae-ft-ema::diffusion_pytorch_model.safetensors"),
    KLConfig("flux-vae-f8c16", 16, 0.3611, 0.1159, weights="black-forest-labs/FLUX.1-Krea-dev::ae.safetensors"),
    DCAEConfig("tiny-dc-ae-f32c32", **_tiny, weights="weights/tiny-dc-ae-f32c32.safetensors"),
    DCAEConfig("dc-ae-f32c32-in-1.0", 32, 0.3189, decoder_batch_norm=True, weights="mit-han-lab/dc-ae-f32c32-in-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f32c32-mix-1.0", 32, 0.4552, decoder_batch_norm=True, weights="mit-han-lab/dc-ae-f32c32-mix-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f64c128-in-1.0", scale=0.2889, **_f64, weights="mit-han-lab/dc-ae-f64c128-in-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f64c128-mix-1.0", scale=0.4538, **_f64, weights="mit-han-lab/dc-ae-f64c128-mix-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f128c512-in-1.0", scale=0.4883, **_f128, weights="mit-han-lab/dc-ae-f128c512-in-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f128c512-mix-1.0", scale=0.3620, **_f128, weights="mit-han-lab/dc-ae-f128c512-mix-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f32c32-sana-1.0", **_sana, weights="mit-han-lab/dc-ae-f32c32-sana-1.0::model.safetensors"),
    DCAEConfig("dc-ae-f32c32-sana-1.1", **_sana, weights="mit-han-lab/dc-ae-f32c32-sana-1.1::model.safetensors"),
    DCAEConfig("dc-ae-lite-f32c32-sana-1.1", **{**_sana, "decoder_depths": (0, 3, 5, 4, 4, 4), "decoder_attention_from": 99, "interpolate": False, "out_act": "silu"},
               weights="mit-han-lab/dc-ae-lite-f32c32-sana-1.1::model.safetensors"),
    DCAEConfig("dc-ae-f32c128-1.5", scale=None, encoder_depths=(0, 5, 10, 4, 4, 4), decoder_depths=(0, 5, 10, 4, 4, 4), **_v15, weights="dc-ai/dc-ae-f32c128-1.5::model.safetensors"),
    DCAEConfig("dc-ae-f64c128-1.5", scale=0.5935, widths=(128, 256, 512, 512, 1024, 1024, 1024), encoder_depths=(0, 5, 10, 4, 4, 4, 4), decoder_depths=(0, 5, 10, 4, 4, 4, 4),
               **_v15, weights="dc-ai/dc-ae-f64c128-1.5::model.safetensors"),
)}


class Autoencoder(nn.Module):
    """What both kinds share: the normalised latent, and nothing but it, is seen outside."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.max_elements = 2**28        # numbers in one tensor of a strip: 4 % more work at 4K, a third of the memory
        self.tile = 128                  # latent cells a side of one tile, where strips are not exact

    def train(self, mode: bool = True):
        # an autoencoder in use is frozen, and BatchNorm in train mode would rewrite its statistics at every picture
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image (B,3,H,W) in [-1,1] -> mean and standard deviation of its normalised latent (B,C,H/f,W/f); no deviation
        (None) for DC-AE, which is deterministic. H and W must divide by f (ValueError)."""
        f, (H, W) = self.cfg.f, x.shape[-2:]
        if H % f or W % f:
            raise ValueError(f"a picture of {W}x{H}: {self.cfg.name} needs sides that divide by {f}; "
                             f"try {max(f, round(W / f) * f)}x{max(f, round(H / f) * f)}")
        mean, logvar = self.moments(x)
        return (mean - self.cfg.shift) * self._scale(), None if logvar is None else (0.5 * logvar).exp() * self._scale()

    def encode(self, x: Tensor, sample: bool = False, generator=None) -> Tensor:
        """Image -> normalised latent: the posterior's mean, or a draw from it."""
        mean, std = self.posterior(x)
        if not sample or std is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latent (B,C,H,W) -> image (B,3,fH,fW), nominally in [-1,1], not clamped."""
        return self.decode_raw(z / self._scale() + self.cfg.shift)

    def _scale(self) -> float:
        if self.cfg.scale is None:
            raise ValueError(f"no scaling factor has been published for {self.cfg.name}; measure one (1 / std of its raw latents) and set it in its config")
        return self.cfg.scale


# ---- KL-VAE --------------------------------------------------------------------------------------------------------------
# Module names are those of diffusers, the layout in which SD's was published.

class KLResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin, eps=1e-6), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout, eps=1e-6), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class KLAttention(nn.Module):
    """One head over all places of the coarsest grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]   # B 1 HW C
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).reshape(x.shape)


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
        return self.conv(F.pad(x, (0, 1, 0, 1)))                     # the padding of latent diffusion: right and below only


class KLUp(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class KLLevel(nn.Module):
    def __init__(self, cin: int, cout: int, depth: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(KLResBlock(cin if i == 0 else cout, cout, groups) for i in range(depth))
        if resample == "down":
            self.downsamplers = nn.ModuleList([KLDown(cout)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([KLUp(cout)])

    def forward(self, x):
        for block in [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = block(x)
        return x


class KLEncoder(nn.Module):
    def __init__(self, cfg: KLConfig):
        super().__init__()
        w = cfg.widths
        self.conv_in = nn.Conv2d(3, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            KLLevel(w[max(i - 1, 0)], w[i], cfg.depth, cfg.groups, "down" if i < len(w) - 1 else None) for i in range(len(w)))
        self.mid_block = KLMid(w[-1], cfg.groups)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * cfg.channels, 3, padding=1)   # mean and log variance

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class KLDecoder(nn.Module):
    def __init__(self, cfg: KLConfig):
        super().__init__()
        w = cfg.widths[::-1]
        self.conv_in = nn.Conv2d(cfg.channels, w[0], 3, padding=1)
        self.mid_block = KLMid(w[0], cfg.groups)
        self.up_blocks = nn.ModuleList(
            KLLevel(w[max(i - 1, 0)], w[i], cfg.depth + 1, cfg.groups, "up" if i < len(w) - 1 else None) for i in range(len(w)))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class KLVAE(Autoencoder):
    def __init__(self, cfg: KLConfig):
        super().__init__(cfg)
        self.encoder, self.decoder = KLEncoder(cfg), KLDecoder(cfg)
        if cfg.quant_conv:
            self.quant_conv = nn.Conv2d(2 * cfg.channels, 2 * cfg.channels, 1)
            self.post_quant_conv = nn.Conv2d(cfg.channels, cfg.channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> raw posterior mean and log variance (B,C,H/f,W/f)."""
        mean, logvar = in_tiles(self._encode, x, self.tile * self.cfg.f, self.cfg.f, 1 / self.cfg.f).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode_raw(self, z: Tensor) -> Tensor:
        return in_tiles(self._decode, z, self.tile, 1, self.cfg.f)

    def _encode(self, x):
        h = self.encoder(x)
        return self.quant_conv(h) if self.cfg.quant_conv else h

    def _decode(self, z):
        return self.decoder(self.post_quant_conv(z) if self.cfg.quant_conv else z)


# ---- DC-AE ---------------------------------------------------------------------------------------------------------------
# Module names are those of diffusers, except that q, k, v stay one matrix.

class ResBlock(nn.Module):
    def __init__(self, channels: int, batch_norm: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else ChannelRMSNorm(channels)
        self.act = F.relu if batch_norm else F.silu

    def forward(self, x):
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over the picture, heads of 32, optionally a second group of heads that reads 5x5 means.
    The 3C channels of qkv form groups of 96 consecutive ones, each a head's q, k, v: a third is not "all queries"."""

    def __init__(self, channels: int, multiscale: bool, head_dim: int = 32):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.multiscale = nn.Sequential(
            nn.Conv2d(3 * channels, 3 * channels, 5, padding=2, groups=3 * channels, bias=False),
            nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * channels // head_dim, bias=False)) if multiscale else None
        self.proj = nn.Conv2d(2 * channels if multiscale else channels, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x):
        B, _, H, W = x.shape
        qkv = self.qkv(x)
        if self.multiscale is not None:
            qkv = torch.cat([qkv, self.multiscale(qkv)], dim=1)
        q, k, v = qkv.reshape(B, -1, 3 * self.head_dim, H * W).chunk(3, dim=2)      # B nh hd HW each
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


class Down(nn.Module):
    """2x down: a convolution, plus the pixels folded into channels and averaged in groups (DC-AE's residual trick)."""

    def __init__(self, cin: int, cout: int, strided: bool, shortcut: bool = True):
        super().__init__()
        self.strided, self.group = strided, 4 * cin // cout if shortcut else 0
        self.conv = nn.Conv2d(cin, cout if strided else cout // 4, 3, stride=2 if strided else 1, padding=1)

    def forward(self, x):
        y = self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), 2)
        if self.group:
            y = y + F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(dim=2)
        return y


class Up(nn.Module):
    """2x up: a convolution, plus the channels repeated and unfolded into pixels."""

    def __init__(self, cin: int, cout: int, interpolate: bool, shortcut: bool = True):
        super().__init__()
        self.interpolate, self.repeats = interpolate, 4 * cout // cin if shortcut else 0
        self.conv = nn.Conv2d(cin, cout if interpolate else 4 * cout, 3, padding=1)

    def forward(self, x):
        y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest")) if self.interpolate else F.pixel_shuffle(self.conv(x), 2)
        if self.repeats:
            y = y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return y


class DCEncoder(nn.Module):
    def __init__(self, cfg: DCAEConfig):
        super().__init__()
        w, d, last = cfg.widths, cfg.encoder_depths, len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(3, w[0], 3, padding=1) if d[0] else Down(3, w[1], cfg.strided, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i in range(len(w)):
            block = (lambda: EViTBlock(w[i], cfg.multiscale)) if i >= cfg.encoder_attention_from else (lambda: ResBlock(w[i]))
            down = [Down(w[i], w[i + 1], cfg.strided)] if i < last and d[i] else []
            self.down_blocks.append(nn.Sequential(*[block() for _ in range(d[i])], *down))
        self.conv_out = nn.Conv2d(w[-1], cfg.channels, 3, padding=1)
        self.group = w[-1] // cfg.channels if cfg.latent_shortcut else 0

    def out(self, x):
        z = self.conv_out(x)
        return z + x.unflatten(1, (-1, self.group)).mean(dim=2) if self.group else z

    def forward(self, x, max_elements: float):
        first, *deep = [stage for stage in self.down_blocks if len(stage)]
        # the way in and the first stage go together: apart, they would leave their largest tensor whole in memory
        x = in_strips([self.conv_in, *first], x, max_elements)
        for stage in deep:
            x = in_strips(stage, x, max_elements)
        return self.out(x)


class DCDecoder(nn.Module):
    def __init__(self, cfg: DCAEConfig):
        super().__init__()
        w, d, last = cfg.widths, cfg.decoder_depths, len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(cfg.channels, w[-1], 3, padding=1)
        self.repeats = w[-1] // cfg.channels if cfg.latent_shortcut else 0
        self.up_blocks = nn.ModuleList()
        for i in range(len(w)):
            block = (lambda: EViTBlock(w[i], cfg.multiscale)) if i >= cfg.decoder_attention_from else (lambda: ResBlock(w[i], cfg.decoder_batch_norm))
            up = [Up(w[i + 1], w[i], cfg.interpolate)] if i < last and d[i] else []
            self.up_blocks.append(nn.Sequential(*up, *[block() for _ in range(d[i])]))
        width = w[0] if d[0] else w[1]
        self.norm_out, self.act = ChannelRMSNorm(width), nn.ReLU() if cfg.out_act == "relu" else nn.SiLU()
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1) if d[0] else Up(width, 3, cfg.interpolate, shortcut=False)

    def forward(self, z, max_elements: float):
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, dim=1)
        *deep, last = [stage for stage in reversed(self.up_blocks) if len(stage)]
        for stage in deep:
            x = in_strips(stage, x, max_elements)
        # and so do the last stage and the way out
        return in_strips([*last, self.norm_out, self.act, self.conv_out], x, max_elements)


class DCAE(Autoencoder):
    def __init__(self, cfg: DCAEConfig):
        super().__init__(cfg)
        self.encoder, self.decoder = DCEncoder(cfg), DCDecoder(cfg)

    def moments(self, x: Tensor) -> tuple[Tensor, None]:
        return self.encoder(x, self._limit), None                    # deterministic

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(z, self._limit)

    @property
    def _limit(self) -> float:
        return math.inf if self.training else self.max_elements      # in training, BatchNorm must see the whole batch

    def with_channels(self, channels: int) -> "DCAE":
        """DC-AE 1.5's partial latents: the same autoencoder on its first `channels` latent channels (structured latent
        space, arXiv 2508.00413). Only the 1.5 models were trained for it (ValueError for the others)."""
        if self.cfg.latent_shortcut or not 0 < channels <= self.cfg.channels:
            raise ValueError(f"{self.cfg.name} has no partial latent of {channels} channels; only dc-ae-*-1.5 do, up to their full number")
        part = DCAE(replace(self.cfg, channels=channels, name=f"{self.cfg.name}-c{channels}"))
        state = dict(self.state_dict())
        for k in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
            state[k] = state[k][:channels]
        state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :channels]
        part.load_state_dict(state, assign=True)
        return part.requires_grad_(False).eval()


# ---- large pictures ------------------------------------------------------------------------------------------------------

def _sees(layer: nn.Module) -> tuple[float, float, int]:
    """Of one layer: how many rows of its input an output row sees on either side, rows out per row in, and how many
    channels its largest tensor would have at the size of its input."""
    width = max((max(m.in_channels, m.out_channels) for m in layer.modules() if isinstance(m, nn.Conv2d)), default=0)
    match layer:
        case EViTBlock(): return math.inf, 1, width
        case ResBlock(): return 2, 1, width
        case Up(): return 1, 2, 4 * width if layer.interpolate else width
        case Down(): return 1, 0.5, width
        case nn.Conv2d() | GLUMBConv(): return 1, 1, width
        case ChannelRMSNorm() | nn.ReLU() | nn.SiLU(): return 0, 1, 0
    raise TypeError(f"in_strips does not know how far a {type(layer).__name__} sees")


def in_strips(layers, x: Tensor, max_elements: float) -> Tensor:
    """The layers in turn, by picture and then by strips of rows where one of their tensors would hold more than
    max_elements numbers. The same result as the whole, not an approximation: a strip carries every row that its output
    can see, and at the picture's own edges it pads as the whole does. Attention sees everything and runs whole; what
    is local in its block does not."""
    reach, ratio, width, fold = 0.0, 1.0, x.shape[1], 1
    for layer in layers:
        rows, up, w = _sees(layer)
        reach, width, ratio = reach + rows / ratio, max(width, w * ratio**2), ratio * up
        fold = max(fold, int(1 / ratio))                              # strips start where folding does
    B, _, H, W = x.shape
    if reach == math.inf:
        for layer in layers:
            x = layer(x, max_elements) if isinstance(layer, EViTBlock) else in_strips([layer], x, max_elements)
        return x
    if B > 1 and B * width * H * W > max_elements:
        return torch.cat([in_strips(layers, part, max_elements) for part in x.split(max(1, int(max_elements / (width * H * W))))])
    up_to = lambda rows, unit: -(-math.ceil(rows) // unit) * unit
    step, halo = max(1, int(min(H, max_elements / (B * width * W))) // fold) * fold, up_to(reach, fold)
    inner = H - 2 * halo                                              # a strip gives `step` rows, at the picture's edges its halo as well
    step = up_to(inner / math.ceil(inner / step), fold) if inner > step else H
    rows, top, out = step + 2 * halo, 0, None                         # alike in every strip: kernels are compiled and tuned for a shape
    while top < H:
        start = max(0, min(top - halo, H - rows))
        bottom = H if start + rows >= H else start + rows - halo
        y = x[:, :, start : start + rows]
        for layer in layers:
            y = layer(y)
        if bottom - top == H:
            return y
        if out is None:
            out = torch.empty(B, y.shape[1], int(H * ratio), y.shape[3], dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
        out[:, :, int(top * ratio) : int(bottom * ratio)] = y[:, :, int((top - start) * ratio) : int((bottom - start) * ratio)]
        top = bottom
    return out


def in_tiles(fn, x: Tensor, tile: int, unit: int, ratio: float, overlap: float = 0.25) -> Tensor:
    """fn(x), in overlapping square tiles blended linearly if x is larger than one tile. For KL-VAEs, whose group norm
    and attention see the whole picture: close to the untiled result, not equal to it. Places are multiples of `unit`
    (f pixels when encoding, 1 cell when decoding), so every tile starts on a latent cell; ratio = size out / size in."""
    H, W = x.shape[-2:]
    if H <= tile and W <= tile:
        return fn(x)
    stride = max(unit, int(tile * (1 - overlap)) // unit * unit)
    starts = lambda size: sorted({*range(0, max(size - tile, 0), stride), max(size - tile, 0)})
    scaled = lambda n: int(n * ratio)
    out = weight = None
    for top in starts(H):
        for left in starts(W):
            part = x[..., top : top + tile, left : left + tile]
            y = fn(part)
            ramp = lambda n, at, size: torch.minimum(                # rises over the overlap, flat at the picture's edge
                torch.ones(n) if at == 0 else ((torch.arange(n) + 1) / scaled(tile - stride)).clamp(max=1),
                torch.ones(n) if at + tile >= size else ((n - torch.arange(n)) / scaled(tile - stride)).clamp(max=1))
            w = (ramp(y.shape[-2], top, H)[:, None] * ramp(y.shape[-1], left, W)).to(y)
            if out is None:
                out = y.new_zeros(*y.shape[:2], scaled(H), scaled(W))
                weight = y.new_zeros(scaled(H), scaled(W))
            rows, cols = slice(scaled(top), scaled(top) + y.shape[-2]), slice(scaled(left), scaled(left) + y.shape[-1])
            out[..., rows, cols] += y * w
            weight[rows, cols] += w
    return out / weight


def ae_class(cfg):
    return KLVAE if isinstance(cfg, KLConfig) else DCAE


def build_autoencoder(cfg) -> Autoencoder:
    """The autoencoder of a config, with random weights."""
    return ae_class(cfg)(cfg)


def ae_config(name: str):
    """Exact lookup in AUTOENCODERS; ValueError listing the names otherwise."""
    if name not in AUTOENCODERS:
        raise ValueError(f"no autoencoder is called {name!r}; there are: {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]
