"""LoRA: a frozen linear map and a small trainable one beside it (arXiv 2106.09685).

        x ----------- W (frozen) -----------+---> y = W x + (alpha / rank) B A x
         \\                                  |
          '--- A (rank x in) --- B (out x rank)       B starts at zero: the first step sees the base model itself

Stage 3 of DC-Gen adapts the trunk this way, rank = alpha = 256 (paper, Sec. 4.1): a full fine-tuning drifts further from
what the base knows (Fig. 5). The new embedder and head train in full, and travel in the same file as A and B: in the new
latent space a LoRA without them means nothing.

`save_peft` and `load_peft` speak to others: the files of diffusers and PEFT.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from model import TABLES, read_tensors, sources, unmap_keys, write_tensors

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


# ---- the files of diffusers and PEFT ---------------------------------------------------------------------------------------
# transformer.<module>.lora_A.weight (rank,in) and lora_B (out,rank), under diffusers' names, where q, k and v have a LoRA
# each. alpha stands in <module>.alpha or in the file's metadata; where it is missing it is the rank.

PEFT_FILE, PARTS_FILE = "pytorch_lora_weights.safetensors", "embedder_and_head.safetensors"


def _block(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.block_diag(*matrices)


def lora_to_peft(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The model's LoRA -> {"<module>.lora_A.weight", "<module>.lora_B.weight"} and {module: alpha}, under diffusers' names.
    A fused matrix gives each of its parts the rows of B that are its own, and of A only what those rows use."""
    table, out, alphas = TABLES[type(model)]["diffusers"], {}, {}
    for name, m in model.named_modules():
        if not isinstance(m, LoRALinear):
            continue
        pointwise = (..., *[None] * (m.base.weight.ndim - 2))         # a 1x1 convolution's has two more axes
        for key, B in unmap_keys({f"{name}.weight": m.B.detach()}, table).items():
            used = B.ne(0).any(dim=0)
            used = used if used.any() else torch.ones_like(used)
            module = key.removesuffix(".weight")
            out[f"{module}.lora_A.weight"], out[f"{module}.lora_B.weight"] = m.A.detach()[used][pointwise], B[:, used][pointwise]
            alphas[module] = m.scale * int(used.sum())
    return out, alphas


def lora_from_peft(model: nn.Module, tensors: dict[str, Tensor], alphas: dict[str, float] | None = None) -> list[str]:
    """Put a LoRA under diffusers' names onto the model, exactly: the parts of what is fused here lie one beside the other
    in A and on the diagonal of B. Returns what was left out: a LoRA of an embedder or head that is bound to another latent
    space. ValueError for anything else that does not fit, and then the model is as before."""
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("this model carries a LoRA already; merge it first")
    theirs, alphas = {}, dict(alphas or {})
    for key, value in tensors.items():
        if not (match := re.fullmatch(r"(?:transformer\.|base_model\.model\.)?(.+?)\.(lora_[AB]|alpha)(?:\.default)?(?:\.weight)?", key)):
            raise ValueError(f"{key} is not a LoRA's tensor; expected names like transformer.<module>.lora_A.weight")
        module, part = match.groups()
        if part == "alpha":
            alphas[module] = float(value)
        else:
            theirs.setdefault(module, {})[part[-1]] = value.float().flatten(1)
    table, made, used, skipped = TABLES[type(model)]["diffusers"], {}, set(), []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not (found := sources(f"{name}.weight", table)):
            continue
        names, turn = [n.removesuffix(".weight") for n in found[0]], found[1]
        if not (here := [n for n in names if n in theirs]):
            continue
        used.update(here)
        rows, cin = [len(part) for part in turn.split(layer.weight, len(names))], layer.weight.flatten(1).shape[1]
        pairs = [(theirs[n].get("A"), theirs[n].get("B")) if n in theirs else (torch.zeros(0, cin), torch.zeros(r, 0)) for n, r in zip(names, rows)]
        if any(A is None or B is None or A.shape[1] != cin or B.shape != (r, len(A)) for (A, B), r in zip(pairs, rows)):
            if not name.startswith((model.EMBEDDER.rstrip("."), model.HEAD.rstrip("."))):
                raise ValueError(f"the LoRA of {', '.join(here)} does not fit {name} {tuple(layer.weight.shape)}: it is of another model")
            skipped += here
            continue
        scales = [alphas.get(n, len(theirs[n]["A"])) / len(theirs[n]["A"]) if n in theirs else None for n in names]
        scale = next(s for s in scales if s is not None)              # one for all, or B takes up the difference
        A = torch.cat([A for A, _ in pairs])
        made[name] = LoRALinear(layer, len(A), scale * len(A))
        made[name].A.data = A.to(layer.weight.device)
        made[name].B.data = turn.load(_block([B if s is None else B * (s / scale) for (_, B), s in zip(pairs, scales)])).to(layer.weight.device)
    if left := [n for n in theirs if n not in used]:
        raise ValueError(f"{len(left)} modules of this LoRA are not in a {type(model).__name__}: {', '.join(left[:3])}")
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return skipped


def save_peft(model: nn.Module, folder):
    """Write the LoRA as diffusers' loaders read it, and beside it, under diffusers' names too, the embedder and the head,
    without which it means nothing. FLUX's loader wants alphas as tensors, the others in the metadata; none takes both."""
    tensors, alphas = lora_to_peft(model)
    if not tensors:
        raise ValueError("this model carries no LoRA to save")
    if "single_transformer_blocks.0.proj_out" in alphas:
        tensors |= {f"{module}.alpha": torch.tensor(alpha) for module, alpha in alphas.items()}
        metadata = {}
    else:
        ranks = {module: len(tensors[f"{module}.lora_A.weight"]) for module in alphas}
        first = next(iter(alphas))
        settings = dict(r=ranks[first], lora_alpha=alphas[first], target_modules=sorted(alphas), rank_pattern=ranks, alpha_pattern=alphas)
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    write_tensors(Path(folder) / PEFT_FILE, {f"transformer.{k}": v for k, v in tensors.items()}, metadata=metadata)
    own = {k: v for k, v in model.state_dict().items() if k.startswith((model.EMBEDDER, model.HEAD))}
    write_tensors(Path(folder) / PARTS_FILE, unmap_keys(own, TABLES[type(model)]["diffusers"]))


def load_peft(model: nn.Module, path) -> list[str]:
    """Put the LoRA of a file, or of a folder that save_peft wrote (with its embedder and head), onto the model. Returns
    what was left out, see lora_from_peft. ValueError if the file does not fit."""
    path = Path(path)
    file, parts = (path / PEFT_FILE, path / PARTS_FILE) if path.is_dir() else (path, None)
    tensors, alphas = read_tensors(file), {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            stated = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
        stated = {k.removeprefix("transformer."): v for k, v in stated.items()}
        modules = {re.sub(r"^transformer\.|\.lora_[AB]\.weight$", "", k) for k in tensors if ".lora_" in k}
        alphas = {m: stated.get("alpha_pattern", {}).get(m, stated["lora_alpha"]) for m in modules} if "lora_alpha" in stated else {}
    try:
        skipped = lora_from_peft(model, tensors, alphas)
        if parts and parts.exists():
            found, own = read_tensors(parts), model.state_dict()
            for key in [k for k in own if k.startswith((model.EMBEDDER, model.HEAD))]:
                names, turn = sources(key, TABLES[type(model)]["diffusers"])
                own[key].copy_(turn.load(found[names[0]]))
        return skipped
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
