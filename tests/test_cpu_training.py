"""Dropout and attention while a model is trained on a CPU: what torch computes, in fewer passes."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from polyprompt.config import FullConfig
from polyprompt.cpu_training import Dropout, drop, trained_on_cpu

ROWS, HEADS, QUERIES, KEYS, SIZE = 3, 4, 5, 5, 6


def never(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise AssertionError("the wrapped attention was called")


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("kind", ["t5", "decoder_only"])
def test_attention_is_that_of_sdpa(kind: str, mask: str) -> None:
    """Output and gradients to 1e-6. A decoder-only model has a causal mask, a scale, and fewer heads of keys."""
    generator = torch.Generator().manual_seed(0)
    heads = HEADS if kind == "t5" else HEADS // 2
    sizes = [(ROWS, HEADS, QUERIES, SIZE), (ROWS, heads, KEYS, SIZE), (ROWS, heads, KEYS, SIZE)]
    given = [torch.randn(size, generator=generator) for size in sizes]
    bias = torch.randn(1, HEADS, QUERIES, KEYS, generator=generator)
    visible = torch.ones(ROWS, 1, QUERIES, KEYS, dtype=torch.bool).tril()
    visible[1, :, :, 2:4] = False
    masks = {"none": None, "bool": visible, "float": (~visible).float() * torch.finfo(torch.float32).min}
    module: Any = SimpleNamespace(is_causal=kind == "decoder_only", num_key_value_groups=HEADS // heads)
    results = []
    for attend in (trained_on_cpu(never), sdpa_attention_forward):
        leaves = [tensor.clone().requires_grad_() for tensor in (*given, bias)]
        own = {"scaling": 1.0 if kind == "t5" else SIZE**-0.5, "position_bias": leaves[3]}
        output, _ = attend(module, *leaves[:3], masks[mask], **own)
        output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_attention_without_dropout_or_a_trained_bias_is_left_to_torch() -> None:
    called = []
    attend = trained_on_cpu(lambda *args, **kwargs: called.append(kwargs))
    tensor = torch.zeros(1, 1, 1, 1)
    attend(nn.Module(), tensor, tensor, tensor, None, scaling=1.0, position_bias=tensor)
    assert called[0]["position_bias"] is tensor
    assert called[0]["scaling"] == 1.0


def test_weights_are_dropped_after_the_softmax() -> None:
    query, key, value = torch.randn(3, ROWS, HEADS, QUERIES, SIZE).unbind()
    module: Any = SimpleNamespace(is_causal=False)
    torch.manual_seed(1)
    output, _ = trained_on_cpu(never)(module, query, key, value, None, dropout=0.3, scaling=1.0)
    torch.manual_seed(1)
    weights = drop((query @ key.transpose(2, 3)).softmax(dim=-1), 0.3)
    torch.testing.assert_close(output, (weights @ value).transpose(1, 2))


@settings(max_examples=25, deadline=None)
@given(p=st.floats(0.01, 0.9), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_dropout_zeroes_or_scales_forwards_and_backwards(p: float, size: int, seed: int) -> None:
    x = torch.randn(size, 7).requires_grad_()
    torch.manual_seed(seed)
    y = drop(x, p)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p))
    torch.manual_seed(seed)
    assert torch.equal(drop(x, p), y)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_dropped_is_p_and_neighbours_are_independent(p: float) -> None:
    torch.manual_seed(0)
    zero = (drop(torch.ones(1_000_000, dtype=torch.bfloat16), p) == 0).float()
    assert zero.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    for distance in (1, 2, 3, 4):
        both = (zero[:-distance] * zero[distance:]).mean().item()
        assert both == pytest.approx(p * p, abs=2e-3)


def test_every_dropout_of_a_backbone_is_this_one() -> None:
    model = tiny.model(FullConfig()).train()
    found = [module for module in model.backbone.modules() if isinstance(module, nn.Dropout)]
    assert found
    assert all(isinstance(module, Dropout) and module.p == 0.1 for module in found)
