"""Costs: the closed form equals what torch counts."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from polyprompt.config import (
    AdapterConfig,
    AttemptConfig,
    DePTConfig,
    FullConfig,
    HyperFormerConfig,
    HyperPromptConfig,
    LoRAConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RoutedHyperPromptConfig,
    SMoPConfig,
)
from polyprompt.costs import inference_flops

METHODS: list[MethodConfig] = [
    FullConfig(),
    PromptTuningConfig(length=5, init="normal"),
    SMoPConfig(num_prompts=3, length=2),
    HyperPromptConfig(encoder_length=4, decoder_length=3, reduction=4),
    HyperPromptConfig(encoder_length=4, stacks="encoder", reduction=4),
    RoutedHyperPromptConfig(encoder_length=4, decoder_length=3, reduction=4),
    PrefixTuningConfig(encoder_length=4, decoder_length=3),
    PTuningConfig(length=5),
    DePTConfig(length=5, rank=2),
    AttemptConfig(length=5, sources=[Path("absent")], bottleneck=6),
    AdapterConfig(bottleneck=5),
    HyperFormerConfig(reduction=4),
    *([LoRAConfig(rank=3), LoRAConfig(rank=3, target_modules="all-linear")] if find_spec("peft") else []),
    AdapterConfig(bottleneck=5, variant="pfeiffer", per_task=False),
]


@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_closed_form_is_what_torch_counts(method: MethodConfig, family: str) -> None:
    model = tiny.model(method, family, attention="eager")  # the counter does not know sdpa's fused kernels on CPUs
    input_ids, mask, labels, task = (tensor[:1] for tensor in tiny.batch(1))
    prompts = FlopCounterMode(display=False)
    with torch.no_grad(), prompts:
        model.method.prompts(model.backbone.embed(input_ids), mask, task)
    whole = FlopCounterMode(display=False)
    with torch.no_grad(), whole:
        model(input_ids, mask, labels, task)
    router = 2 * 16 * model.method.num_routes + 2 * model.method.row_multiply_adds
    assert router <= prompts.get_total_flops()
    expected = whole.get_total_flops() - prompts.get_total_flops() + router
    assert inference_flops(model, input_ids.shape[1], labels.shape[1]) == expected
