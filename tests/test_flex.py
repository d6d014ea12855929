"""FlexAttention with T5's bias: equal to sdpa. On a CPU its kernel is computed by torch's own slow definition of it."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import scaled_dot_product_attention

from polyprompt import backbone, flex, methods, packable
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import HyperPromptConfig, RunConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import KeyValues, Prompts
from polyprompt.model import PromptedModel

METHOD = HyperPromptConfig(encoder_length=5, decoder_length=3, reduction=2)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The kernel is used here too, forward alone. Returns the shapes of its outputs as they are made."""
    made: list[torch.Size] = []

    def attended(*args: Any) -> Tensor:
        output_BNQD = flex.attended(*args)
        made.append(output_BNQD.shape)
        return output_BNQD

    monkeypatch.setattr(flex, "kernel_on", lambda device: attended)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return made


def pair(family: str = "t5") -> list[PromptedModel]:
    """Return the same model with either attention, sdpa first."""
    return [tiny.model(METHOD, family, attention=kind, dropout=0.0) for kind in ("sdpa", "flex")]


def uneven(model: PromptedModel, prompts: Prompts) -> Prompts:
    """Return the prompts with a number of keys of its own for each row, 0 among them."""

    def cut(made: KeyValues | None) -> KeyValues | None:
        if made is None:
            return None
        _, num_rows, _, most, _ = made.keys_LBNPD.shape
        return replace(made, mask_BP=torch.arange(most) < torch.arange(num_rows)[:, None] % (most + 1))

    return replace(prompts, encoder=cut(prompts.encoder), decoder=cut(prompts.decoder))


def logits(model: PromptedModel, lengths: Callable[[PromptedModel, Prompts], Prompts]) -> Tensor:
    ids_BT, mask_BT, labels_BS, task_B = tiny.batch()
    x_BTH, prompts = model.prompts(ids_BT, mask_BT, task_B)
    prompts = lengths(model, prompts)
    return model.backbone.logits(labels_BS.clamp(min=0), model.backbone.encode(x_BTH, mask_BT, prompts), prompts)


@pytest.mark.parametrize("lengths", [lambda model, prompts: prompts, uneven, lambda model, prompts: Prompts()])
@pytest.mark.parametrize("family", ["t5", "mt5"])
@torch.no_grad()
def test_the_kernel_equals_sdpa(kernel: list[torch.Size], family: str, lengths: Any) -> None:
    """Encoder and decoder, prompts in both, padding; all rows with the same prompts, with other numbers, without."""
    sdpa, own = pair(family)
    torch.testing.assert_close(logits(own, lengths), logits(sdpa, lengths), atol=1e-5, rtol=1e-5)
    # 3 layers of the encoder, 2 of the decoder with its cross-attention.
    assert kernel == [(6, 3, 9, 4)] * 3 + [(6, 3, 4, 4)] * 4


@torch.no_grad()
def test_it_answers_and_scores_as_sdpa_does(kernel: list[torch.Size]) -> None:
    """With and without a cache, with beams, and choices side by side."""
    sdpa, own = pair()
    ids_BT, mask_BT, _, task_B = tiny.batch()
    for keys in ({"use_cache": False}, {"num_beams": 3}):
        answers = [m.generate(ids_BT, mask_BT, task_B, max_new_tokens=5, **keys) for m in (own, sdpa)]
        assert answers[0].tolist() == answers[1].tolist()
    choices = [[[5, 6, 1], [7, 1]]] * len(ids_BT)
    scores = [torch.tensor(m.score_choices(ids_BT, mask_BT, task_B, choices)) for m in (own, sdpa)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_the_kernel_gradients_equal_those_of_sdpa(checkpointing: bool) -> None:
    """Those of the bias by distance among them, through which they reach T5's table."""
    results = []
    for model in pair():
        model.train()
        if checkpointing:
            model.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(*tiny.batch()).total.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def operands(num_queries: int, num_keys: int, device: str = "cpu", size: int = 4) -> list[Tensor]:
    """Return query, key, value, a bias by distance with that of prompts, places and first queries, of 2 prompts."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, num_own = 2, 3, num_keys - 2
    sizes = [(rows, heads, num, size) for num in (num_queries, num_keys, num_keys)]
    made = [torch.randn(s, generator=generator) for s in (*sizes, (heads, num_queries + num_own))]
    key_X = torch.arange(-2, num_own)
    first_BX = key_X.expand(rows, -1).clone()
    first_BX[1, -1] = num_queries
    given = [*made, torch.where(key_X < 0, 0, key_X + num_queries), first_BX]
    return [tensor.to(device) for tensor in given]


def test_the_kernels_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has none for a CPU and says so; its definition of them has, once it is let through."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    query, key, value, bias, place_X, first_BX = operands(5, 7)
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]
    own = torch.autograd.grad(flex.attended(*leaves, place_X, first_BX, 1.0).square().sum(), leaves)
    query_Q1 = torch.arange(5)[:, None]
    written = bias[:, (place_X - query_Q1).clamp(min=0)]
    seen = torch.where(first_BX[:, None, None] <= query_Q1, written, -torch.inf)
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=1.0)
    torch.testing.assert_close(own, torch.autograd.grad(output.square().sum(), leaves), atol=1e-5, rtol=1e-5)


def test_neither_bias_nor_mask_is_of_queries_by_keys() -> None:
    model = tiny.load("t5", attention="flex", dropout=0.0).model
    seen: list[tuple[torch.Size, torch.Size]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((kwargs["mask"].shape, kwargs["position_bias"].shape))

    for attention in (model.encoder.block[1].layer[0].SelfAttention, model.decoder.block[1].layer[0].SelfAttention,
                      model.decoder.block[1].layer[1].EncDecAttention):  # fmt: skip
        attention.register_forward_pre_hook(look, with_kwargs=True)
    ids_BT, mask_BT, labels_BS, _ = tiny.batch()
    model(input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=labels_BS.clamp(min=0), use_cache=False)
    assert seen == [((6, 1, 1, 9), (1, 3, 1, 17)), ((6, 1, 1, 4), (1, 3, 1, 7)), ((6, 1, 1, 9), (1, 3, 1, 12))]


def test_where_it_cannot_be_used_the_mend_is_named() -> None:
    with pytest.raises(ValueError, match=r"Set backbone\.dropout=0"):
        BackboneConfig(attention="flex")
    flexed = BackboneConfig(attention="flex", dropout=0.0)
    with pytest.raises(ValueError, match=r"Set compute\.use_gpu=true, or backbone\.attention=sdpa"):
        RunConfig(backbone=flexed, tasks=["embedded/nli"])
    run = RunConfig(backbone=flexed, method={"name": "smop"}, tasks=["embedded/nli"], compute={"use_gpu": True})
    with pytest.raises(ConfigError, match=r"Set backbone\.attention=sdpa"):
        packable.check(run)
    for family in ("umt5", "llama", "bart"):
        with pytest.raises(ConfigError, match=r"t5 and mt5.*Use backbone\.attention=sdpa"):
            tiny.load(family, attention="flex", dropout=0.0)


@pytest.mark.gpu
def test_on_a_gpu_loss_and_gradients_equal_those_of_sdpa() -> None:
    results = []
    kinds: tuple[Literal["sdpa", "flex"], ...] = ("sdpa", "flex")
    for kind in kinds:
        loaded = backbone.load(BackboneConfig(attention=kind, dropout=0.0), train=True, precision="fp32", seed=0)
        method = methods.build(METHOD, loaded.dims(tiny.NUM_TASKS), seed=0)
        model = PromptedModel(loaded, method).cuda().train()
        loss = model(*(t.cuda() for t in tiny.batch())).total
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)


def never(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise AssertionError("sdpa was called")


@pytest.mark.gpu
def test_on_a_gpu_memory_grows_with_the_length() -> None:
    """Four times the length takes four times the memory, forward and backward; written out it would be sixteen."""
    peaks = []
    for length in (2048, 8192):
        given = operands(length, length + 2, "cuda", size=32)
        leaves = [t.requires_grad_() for t in given[:4]]
        module: Any = SimpleNamespace(is_causal=False)
        visible = torch.ones(2, 1, 1, length + 2, dtype=torch.bool, device="cuda")
        bias_1N1Z = leaves[3][None, :, None, 1:]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, _ = flex.flexed(never)(module, *leaves[:3], visible, position_bias=bias_1N1Z, scaling=1.0)
        output.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]
