"""Parity with Hugging Face PEFT where it computes the same: loss and gradients of the same weights, within 1e-6.

PEFT knows one task, so prompts are shared.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from polyprompt.config import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from polyprompt.model import PromptedModel

peft = pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
KINDS = {"t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
both_kinds = pytest.mark.parametrize("family", KINDS)


def mean_loss(theirs: Any, family: str) -> Tensor:
    """PEFT's loss over `tiny.batch`, row by row, so that padding plays no part."""
    input_ids, mask, labels, _ = tiny.batch()
    total = torch.zeros(())
    for row in range(len(input_ids)):
        words, target = input_ids[row, mask[row] == 1], labels[row, labels[row] != -100]
        if family == "t5":
            loss = theirs(input_ids=words[None], labels=target[None]).loss
        else:
            unscored = torch.full_like(words, -100)
            loss = theirs(input_ids=torch.cat([words, target])[None], labels=torch.cat([unscored, target])[None]).loss
        total = total + loss * len(target)
    return total / (labels != -100).sum()


def compare(ours: PromptedModel, theirs: Any, family: str, pairs: dict[str, tuple[str, Any]]) -> None:
    """Hold loss and gradients against each other. pairs: PEFT's parameter → ours, and how ours is laid out there."""
    encoder, own = theirs.prompt_encoder["default"], dict(ours.method.named_parameters())
    assert sorted(name for name, _ in pairs.values()) == sorted(own)
    encoder.load_state_dict({key: layout(own[name].detach()) for key, (name, layout) in pairs.items()})
    loss = ours(*tiny.batch()).total / (tiny.batch()[2] != -100).sum()
    expected = mean_loss(theirs, family)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    for key, parameter in encoder.named_parameters():
        grad = own[pairs[key][0]].grad
        assert grad is not None
        assert parameter.grad is not None
        assert parameter.grad.any(), key
        torch.testing.assert_close(pairs[key][1](grad), parameter.grad, atol=1e-6, rtol=1e-6)


def theirs_with(config: Any, family: str) -> Any:
    return peft.get_peft_model(tiny.plain(family), config).eval()


def first(tensor: Tensor) -> Tensor:
    return tensor[0]


def same(tensor: Tensor) -> Tensor:
    return tensor


@both_kinds
def test_prompt_tuning(family: str) -> None:
    config = peft.PromptTuningConfig(task_type=KINDS[family], num_virtual_tokens=4, num_transformer_submodules=1)
    ours = tiny.model(PromptTuningConfig(length=4, per_task=False), family)
    compare(ours, theirs_with(config, family), family, {"embedding.weight": ("prompt_GPH", first)})


@both_kinds
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning(family: str, encoder: Any) -> None:
    config = peft.PromptEncoderConfig(
        task_type=KINDS[family], num_virtual_tokens=4, num_transformer_submodules=1, encoder_hidden_size=7,
        encoder_reparameterization_type=encoder.upper(), encoder_num_layers=2, encoder_dropout=0.0,
    )  # fmt: skip
    table = {"length": 4, "per_task": False, "encoder": encoder, "encoder_hidden_size": 7}
    if encoder == "lstm":
        table["lstm_layers"] = 2
    ours, theirs = tiny.model(PTuningConfig(**table), family), theirs_with(config, family)
    pairs: dict[str, tuple[str, Any]] = {
        key: (key.replace("mlp_head", "mlp").replace("lstm_head", "lstm"), same)
        for key in theirs.prompt_encoder["default"].state_dict()
    }
    compare(ours, theirs, family, {**pairs, "embedding.weight": ("tokens_GPH", first)})


@pytest.mark.parametrize("reparameterisation", ["none", "mlp"])
def test_prefix_tuning_of_a_decoder_only_model(reparameterisation: Any) -> None:
    """PEFT's prefix also takes the first positions; ours takes none (docs/backbones.md), so its positions are set."""
    mlp = reparameterisation == "mlp"
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=mlp, encoder_hidden_size=7
    )
    theirs = theirs_with(config, "gpt2")
    theirs.get_base_model().register_forward_pre_hook(
        lambda _, args, keys: (args, {**keys, "position_ids": torch.arange(keys["input_ids"].shape[1])[None]}),
        with_kwargs=True,
    )
    table = {"stacks": "decoder", "decoder_length": 3, "per_task": False}
    if mlp:
        table |= {"reparameterisation": "mlp", "mlp_hidden_size": 7}
    ours = tiny.model(PrefixTuningConfig(**table), "gpt2")

    def layer_by_layer(made: Tensor) -> Tensor:
        """Ours has the keys of all layers, then the values; PEFT has keys and values layer by layer."""
        return made.unflatten(0, (2, 2, 12)).transpose(0, 1).flatten(0, 2)

    def prefix(prefix_GPW: Tensor) -> Tensor:
        return torch.stack([layer_by_layer(vector) for vector in prefix_GPW[0]])

    if mlp:
        compare(ours, theirs, "gpt2", {
            "embedding.weight": ("decoder.prefix_GPW", first),
            "transform.0.weight": ("decoder.mlp.0.weight", same),
            "transform.0.bias": ("decoder.mlp.0.bias", same),
            "transform.2.weight": ("decoder.mlp.2.weight", layer_by_layer),
            "transform.2.bias": ("decoder.mlp.2.bias", layer_by_layer),
        })  # fmt: skip
    else:
        compare(ours, theirs, "gpt2", {"embedding.weight": ("decoder.prefix_GPW", prefix)})


@both_kinds
def test_lora(family: str) -> None:
    ours = tiny.model(LoRAConfig(rank=2, alpha=6), family)
    theirs = theirs_with(peft.LoraConfig(task_type=KINDS[family], r=2, lora_alpha=6), family)
    own = {name.replace("/", "."): layer for name, layer in ours.method.get_submodule("layers").named_children()}
    pairs = []
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            module, part = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".lora_")
            pairs.append((own[module].down.weight if part == "A" else own[module].up.weight, parameter))
    assert len(pairs) == 2 * len(own) == len(list(ours.method.parameters()))
    with torch.no_grad():
        for weight, parameter in pairs:
            parameter.copy_(weight.normal_(0, 0.1))
    loss = ours(*tiny.batch()).total / (tiny.batch()[2] != -100).sum()
    expected = mean_loss(theirs, family)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    for weight, parameter in pairs:
        assert weight.grad is not None
        assert parameter.grad.any()
        torch.testing.assert_close(weight.grad, parameter.grad, atol=1e-6, rtol=1e-6)
