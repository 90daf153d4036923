"""LoRA starts as the identity, merges to the same outputs and adapts the trunk only."""

import pytest
import torch
from torch import nn

from helpers import TINY_DIT, assert_near, digest, relative_error, scramble
from lora import LoRALinear, add_lora, lora_state, merge_lora
from model import DiT, to_deep_model

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
INPUTS = (X, torch.tensor([0.3, 0.8]), torch.tensor([1, 8]))


def with_lora(rank: int = 4, alpha: float | None = None):
    """A scrambled DiT, and one that shares its trunk and carries a LoRA."""
    base = scramble(DiT(TINY_DIT))
    tuned = to_deep_model(base, base.cfg)
    tuned.load_state_dict(base.state_dict(), assign=True)
    add_lora(tuned, rank, alpha)
    return base, tuned


def randomize_b(model: nn.Module) -> nn.Module:
    """Random B, which starts at zero: the LoRA does something."""
    g = torch.Generator().manual_seed(1)
    for key, value in lora_state(model).items():
        if key.endswith(".B"):
            value.normal_(std=0.05, generator=g)
    return model


def test_lora_starts_as_identity():
    base, tuned = with_lora()
    assert torch.equal(tuned(*INPUTS), base(*INPUTS))
    assert all(value.eq(0).all() == key.endswith(".B") for key, value in lora_state(tuned).items())
    assert relative_error(randomize_b(tuned)(*INPUTS), base(*INPUTS)) > 1e-3


def test_merged_equals_unmerged():
    base, tuned = with_lora(rank=4, alpha=6)
    y = randomize_b(tuned)(*INPUTS)
    merged = merge_lora(tuned)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not lora_state(merged)
    assert_near(merged(*INPUTS), y, 1e-6)


def test_merging_leaves_a_base_that_shares_the_weights_as_it_was():
    base, tuned = with_lora()
    before = digest(base.state_dict())
    names = {key.removesuffix(".A") for key in lora_state(tuned) if key.endswith(".A")}
    merged = merge_lora(randomize_b(tuned)).state_dict()
    assert digest(base.state_dict()) == before
    new = {key for key, value in base.state_dict().items() if merged[key].data_ptr() != value.data_ptr()}
    assert new == {f"{name}.weight" for name in names}


def test_merging_into_a_bf16_base_rounds_no_more_than_its_storage():
    """bf16 keeps 8 bits: a weight loses up to 8 % of a small delta, the output a fraction of a percent."""
    _, tuned = with_lora()
    for module in tuned.modules():
        if not isinstance(module, LoRALinear):
            for p in module.parameters(recurse=False):
                p.data = p.data.bfloat16()
    assert {value.dtype for value in lora_state(tuned).values()} == {torch.float32}
    x, t, y = INPUTS
    with torch.autocast("cpu", torch.bfloat16):
        unmerged = randomize_b(tuned)(x.bfloat16(), t, y)
    layer = tuned.blocks[0].mlp.fc1
    want = (layer.base.weight.float() + layer.delta()).bfloat16()
    merge_lora(tuned)
    assert torch.equal(tuned.blocks[0].mlp.fc1.weight, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(tuned(x.bfloat16(), t, y), unmerged) < 0.01


def test_lora_runs_on_a_bf16_base_without_autocast():
    layer = LoRALinear(nn.Linear(6, 5).bfloat16(), 2, 2)
    layer.B.data.normal_()
    y = layer(torch.randn(3, 6).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.A.grad.dtype == torch.float32 and layer.A.grad.ne(0).any()
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("rank, alpha, scale", [(4, None, 1), (4, 8, 2), (4, 1, 0.25), (2, 8, 4)])
def test_lora_is_scaled_by_alpha_over_rank(rank, alpha, scale):
    layer = randomize_b(with_lora(rank, alpha)[1]).blocks[0].attn.qkv
    assert layer.scale == scale
    assert layer.A.shape == (rank, 48) and layer.B.shape == (144, rank)
    assert_near(layer.delta(), scale * (layer.B @ layer.A), 1e-6)
    x = torch.randn(2, 48)
    assert_near(layer(x) - layer.base(x), scale * x @ layer.A.T @ layer.B.T, 1e-4)


def test_lora_adapts_a_pointwise_convolution():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1)).requires_grad_(False)
    x = torch.randn(2, 3, 6, 7)
    before = net(x)
    assert add_lora(net, 2, 3, targets="0") == ["0"]
    y = randomize_b(net)(x)
    assert relative_error(y, before) > 1e-3
    assert_near(merge_lora(net)(x), y, 1e-6)


@pytest.mark.parametrize("conv", [
    nn.Conv2d(4, 4, 3),
    nn.Conv2d(4, 4, 1, groups=2),
    nn.Conv2d(4, 4, 1, stride=2),
], ids=["3x3", "grouped", "strided"])
def test_lora_of_any_other_convolution_is_refused_as_a_whole(conv):
    net = nn.Sequential(nn.Linear(4, 4), conv)
    with pytest.raises(ValueError, match="plain 1x1 convolutions"):
        add_lora(net, 2, targets=r"\d")
    assert not lora_state(net)


def test_lora_is_refused_twice_and_nowhere():
    _, tuned = with_lora()
    with pytest.raises(ValueError, match="carries a LoRA already"):
        add_lora(tuned, 2)
    add_lora(merge_lora(tuned), 2)                                   # merged, it has room for the next
    with pytest.raises(ValueError, match="no layer is called 'transformer"):
        add_lora(DiT(TINY_DIT), targets="transformer.*")


def test_lora_adapts_attention_and_mlp_of_the_trunk_only():
    model = DiT(TINY_DIT).requires_grad_(False)
    names = add_lora(model, 4)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == [f"blocks.{i}.{layer}" for i in range(3) for layer in layers]
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.{matrix}" for name in names for matrix in "AB"]
