"""LoRA: a frozen linear map and a small trainable one beside it (arXiv 2106.09685).

        x ----------- W (frozen) -----------+---> y = W x + (alpha / rank) B A x
         \\                                  |
          '--- A (rank x in) --- B (out x rank)       B starts at zero: the first step sees the base model itself

Stage 3 of DC-Gen adapts the trunk this way, rank = alpha = 256 (paper, Sec. 4.1): a full fine-tuning drifts further from
what the base knows (Fig. 5). The new embedder and head train in full, and travel in the same file as A and B: in the new
latent space a LoRA without them means nothing.

`save_peft` and `load_peft` speak to others: the files of diffusers and PEFT.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# The maps of attention and MLP; not the modulations, not the embedders of time, class, text and guidance (the authors'
# choice). Where q, k, v are one matrix they share A.
TARGETS = "|".join((
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",                                                    # DiT
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])", r"single_blocks\.\d+\.linear[12]",    # FLUX
    r"blocks\.\d+\.(cross_attn\.(q_linear|kv_linear|proj)|mlp\.conv_(inverted|point))",               # SANA, besides attn
))


class LoRALinear(nn.Module):
    """A linear map or a 1x1 convolution with a low-rank one beside it. A and B are float32 whatever W is: their updates
    are too small for bf16."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        if isinstance(base, nn.Conv2d) and (base.kernel_size, base.stride, base.padding, base.groups) != ((1, 1), (1, 1), (0, 0), 1):
            raise ValueError(f"LoRA here is for linear layers and plain 1x1 convolutions, not {base}")
        cout, cin = base.weight.shape[:2]
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, cin, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(cout, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y, low = self.base(x), x.to(self.A.dtype)                    # a bf16 base needs no autocast
        if isinstance(self.base, nn.Conv2d):
            low = F.conv2d(F.conv2d(low, self.A[..., None, None]), self.B[..., None, None])
        else:
            low = F.linear(F.linear(low, self.A), self.B)
        return y + (self.scale * low).to(y.dtype)

    def delta(self) -> Tensor:
        """(alpha / rank) B A in the shape of the base's weight."""
        return (self.scale * self.B @ self.A).view(self.base.weight.shape)


def add_lora(model: nn.Module, rank: int = 256, alpha: float | None = None, targets: str = TARGETS) -> list[str]:
    """Put a LoRALinear in the place of every layer whose name matches `targets` in full; returns their names. alpha
    defaults to the rank. ValueError if nothing matches, or if there is a LoRA already."""
    alpha = rank if alpha is None else alpha
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("this model carries a LoRA already; merge it first")
    names = [n for n, m in model.named_modules() if re.fullmatch(targets, n) and isinstance(m, (nn.Linear, nn.Conv2d))]
    if not names:
        raise ValueError(f"no layer is called {targets!r}")
    for name, layer in [(n, LoRALinear(model.get_submodule(n), rank, alpha)) for n in names]:   # all, or none if one is refused
        model.set_submodule(name, layer)
    return names


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every LoRA to its layer and take it off, once and for all: there is no unmerging, subtraction would leave
    rounding behind. New tensors, so a base that shares the old ones does not change."""
    for name, m in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
        m.base.weight = nn.Parameter((m.base.weight.float() + m.delta()).to(m.base.weight.dtype), requires_grad=False)
        model.set_submodule(name, m.base)
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA's own tensors, by name."""
    return {k: v for k, v in model.state_dict().items() if k.endswith((".A", ".B"))}
