"""FP8: linear maps in 8-bit floating point, for GPUs that multiply it (Hopper, Ada and later).

    y = W x + b   ->   y = s_x s_w (Q_w q_x) + b,   q_x = e4m3(x / s_x),   Q_w = e4m3(W / s_w)

e4m3 has 4 bits of exponent and 3 of mantissa: steps of 1/16 to 1/8 of a value, up to 448. One scale a row of
the weight and, computed anew at every call, one a token: no calibration, and an outlier spoils its own token
only. The sums are wider.

What reads or writes latents, time, text and modulation stays as it is: it is a percent of the work, and the
part of a transformer that 8 bits hurt (everything in FP8: LPIPS 0.74 to the picture in bf16, otherwise 0.07;
vllm-omni PR 2795). The order is fixed: merge a LoRA first, then quantise. A delta of a LoRA is smaller than
e4m3's steps.
"""

import re

import torch
import torch.nn as nn
from torch import Tensor


E4M3_MAX = 448.0

# every linear map of attention and MLP in a block; not a block's modulation
TARGETS = r"(?:double_|single_)?blocks\.\d+\.(?!.*(?:mod\.|modulation))(?:.*)"


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M,K) -> codes (M,K) in e4m3 and the scales (M,1) float32 that they have to be multiplied by again.
    Written plainly: a compiler puts it into the kernel that makes x, where the maximum costs nothing."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


class FP8Linear(nn.Module):
    """A linear map with weight and input in e4m3, output in the input's type (multiplied out in bf16)."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        codes, scale = e4m3_rows(layer.weight.detach())
        self.register_buffer("weight", codes)                        # N K, multiplied transposed
        self.register_buffer("scale", scale.t().contiguous())        # 1 N
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        # row by row in memory: another order is refused on a GPU
        codes, scale = e4m3_rows(x.flatten(0, -2).contiguous())
        # a bias in bf16 enters the product; one in float32 is refused there, and added afterwards
        inside = self.bias if self.bias is not None and self.bias.dtype == torch.bfloat16 else None
        # the fast accumulation keeps 22 bits of a sum, plenty beside 4 of the factors
        y = torch._scaled_mm(codes, self.weight.t(), scale, self.scale, bias=inside, out_dtype=torch.bfloat16,
                             use_fast_accum=True)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is inside else y + self.bias.to(y.dtype)

    def dequantised(self) -> Tensor:
        """The weight that is multiplied with, float32 (N,K)."""
        return self.weight.float() * self.scale.t()


def fp8_linears(model: nn.Module, targets: str = TARGETS, made: dict | None = None) -> list[str]:
    """Put an FP8Linear in the place of every linear map whose name matches; returns the names. Sizes must
    divide by 16, as the hardware wants. made: FP8Linears by the address of their weight, for models that
    share a trunk. ValueError if there is a LoRA, if nothing matches, or if the GPU has no FP8."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not multiply FP8; that takes compute "
                         "capability 8.9 or more (Ada, Hopper)")
    if any(key.endswith(".base.weight") for key in model.state_dict()):
        raise ValueError("this model carries a LoRA; merge it before it is quantised (lora.merge_lora)")
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
            layers[name] = layer
    if not layers:
        raise ValueError(f"no linear map is called {targets!r}")
    for name, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise ValueError(f"FP8 needs sizes that divide by 16; {name} is {layer}")
    made = {} if made is None else made
    for name, layer in layers.items():
        address = layer.weight.data_ptr()
        if address not in made:
            made[address] = FP8Linear(layer)
        model.set_submodule(name, made[address])
    return list(layers)
