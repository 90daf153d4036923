"""LoRA: a frozen linear map and a small trainable one beside it (arXiv 2106.09685).

    x ------------ W (frozen) ------------+---> y = W x + (alpha / rank) B A x
     \\                                    |
      '--- A (rank x in) --- B (out x rank)     B starts at zero: the first step sees the base model itself

Stage 3 of DC-Gen adapts the trunk this way, rank = alpha = 256 (paper, Sec. 4.1): a full fine-tuning drifts
further from what the base knows (Fig. 5). The new embedder and head train in full and are saved in the same
file as A and B: in the new latent space a LoRA without them means nothing.

    names = add_lora(model, rank=16)     every layer that TARGETS names becomes a LoRALinear
    lora_state(model)                    A and B alone, to save them
    merge_lora(model)                    W + (alpha / rank) B A in the place of W; no LoRA is left

The files of diffusers and PEFT are read and written in checkpoints.py.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# The maps of attention and MLP; not the modulations, not the embedders of time, class, text and guidance (the
# authors' choice). Where q, k and v are one matrix they share A.
TARGETS = "|".join((
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",                                     # DiT
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])",                      # FLUX, two streams
    r"single_blocks\.\d+\.linear[12]",                                                  # FLUX, one stream
    r"blocks\.\d+\.(cross_attn\.(q_linear|kv_linear|proj)|mlp\.conv_(inverted|point))", # SANA, as well
))


class LoRALinear(nn.Module):
    """A linear map or a 1x1 convolution with a low-rank one beside it. A and B are float32 whatever W is:
    bf16 would round their updates away. ValueError for any other convolution."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        if isinstance(base, nn.Conv2d) and not is_pointwise(base):
            raise ValueError(f"LoRA here is for linear layers and plain 1x1 convolutions, not {base}")
        size_out, size_in = base.weight.shape[:2]
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, size_in, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(size_out, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))             # as nn.Linear starts

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = x.to(self.A.dtype)                                     # so a bf16 base needs no autocast
        if isinstance(self.base, nn.Conv2d):
            low = F.conv2d(low, self.A[..., None, None])             # B rank H W
            low = F.conv2d(low, self.B[..., None, None])             # B out H W
        else:
            low = F.linear(low, self.A)                              # B N rank
            low = F.linear(low, self.B)                              # B N out
        return y + (self.scale * low).to(y.dtype)

    def delta(self) -> Tensor:
        """(alpha / rank) B A in the shape of the base's weight."""
        return (self.scale * self.B @ self.A).view(self.base.weight.shape)


def is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def add_lora(
    model: nn.Module, rank: int = 256, alpha: float | None = None, targets: str = TARGETS
) -> list[str]:
    """Put a LoRALinear in the place of every layer whose whole name matches `targets`; return their names.
    alpha defaults to the rank. ValueError if no layer matches, or if the model carries a LoRA already."""
    if lora_layers(model):
        raise ValueError("this model carries a LoRA already; merge it first")
    names = []
    for name, layer in model.named_modules():
        if re.fullmatch(targets, name) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            names.append(name)
    if not names:
        raise ValueError(f"no layer is called {targets!r}")

    # all are made before the first is set: if one is refused, the model stays as it was
    alpha = rank if alpha is None else alpha
    layers = {name: LoRALinear(model.get_submodule(name), rank, alpha) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add every LoRA to its layer and remove it, for good: subtracting it again would leave rounding behind.
    The weights are new tensors, so a base that shares the old ones does not change."""
    for name, lora in lora_layers(model).items():
        weight = lora.base.weight
        merged = (weight.float() + lora.delta()).to(weight.dtype)
        lora.base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, lora.base)
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the LoRA, by name."""
    return {key: value for key, value in model.state_dict().items() if key.endswith((".A", ".B"))}
