"""LoRA merges as its storage rounds, leaves the base as it was and adapts the trunk only."""

import re

import pytest
import torch
from torch import nn

from helpers import TINY_DIT, assert_near, digest, randomize_b, relative_error, scramble, tiny_model
from lora import LoRALinear, add_lora, lora_state, merge_lora
from model import DiT, to_deep_model


def with_lora(rank: int = 4, alpha: float | None = None):
    """A scrambled DiT, and one that shares its trunk and carries a LoRA."""
    base = scramble(DiT(TINY_DIT))
    tuned = to_deep_model(base, base.cfg)
    tuned.load_state_dict(base.state_dict(), assign=True)
    add_lora(tuned, rank, alpha)
    return base, randomize_b(tuned)


def test_merging_leaves_a_base_that_shares_the_weights_as_it_was():
    base, tuned = with_lora()
    before = digest(base.state_dict())
    names = {key.removesuffix(".A") for key in lora_state(tuned) if key.endswith(".A")}
    merged = merge_lora(tuned).state_dict()
    assert merged.keys() == base.state_dict().keys()
    assert digest(base.state_dict()) == before
    new = {key for key, value in base.state_dict().items() if merged[key].data_ptr() != value.data_ptr()}
    assert new == {f"{name}.weight" for name in names}


def test_merging_into_a_bf16_base_rounds_no_more_than_its_storage():
    """bf16 keeps 8 bits: a weight loses up to 8 % of a small delta, the output a fraction of a percent."""
    model = scramble(DiT(TINY_DIT)).bfloat16()
    add_lora(model, 4)
    assert {value.dtype for value in lora_state(model).values()} == {torch.float32}
    layer = randomize_b(model).blocks[0].mlp.fc1
    want = (layer.base.weight.float() + layer.delta()).bfloat16()
    assert torch.equal(merge_lora(model).blocks[0].mlp.fc1.weight, want)


def test_lora_runs_on_a_bf16_base_without_autocast():
    layer = LoRALinear(nn.Linear(6, 5).bfloat16(), 2, 2)
    layer.B.data.normal_()
    y = layer(torch.randn(3, 6).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.A.grad.dtype == torch.float32
    assert layer.A.grad.ne(0).any()
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("rank, alpha, scale", [
    (4, None, 1),
    (4, 1, 0.25),
    (2, 8, 4),
])
def test_lora_is_scaled_by_alpha_over_rank(rank, alpha, scale):
    layer = with_lora(rank, alpha)[1].blocks[0].attn.qkv
    assert layer.A.shape == (rank, 48)
    assert layer.B.shape == (144, rank)
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


@pytest.mark.parametrize("settings", [
    dict(kernel_size=3),
    dict(kernel_size=1, groups=2),
    dict(kernel_size=1, stride=2),
])
def test_lora_of_any_other_convolution_is_refused_as_a_whole(settings):
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, **settings))
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


@pytest.mark.parametrize("name, layers", [
    ("dit", 3 * 4),
    ("flux", 2 * 8 + 2 * 2),
    ("sana", 2 * 7),
])
def test_lora_adapts_attention_and_mlp_of_the_trunk_only(name, layers):
    model = tiny_model(name)
    names = add_lora(model, 4)
    assert len(names) == layers
    assert not re.search(r"mod|norm|img_in|txt_in|embedder|final|t_block", " ".join(names))
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.{matrix}" for name in names for matrix in "AB"]
