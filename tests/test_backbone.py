"""Loading, and the injection of prompts: against plain transformers and against loops written from the formula."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from polyprompt import backbone, prompted_attention
from polyprompt.backbone_config import BackboneConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import KeyValues, Prompts

ATTENTION = ("sdpa", "eager")


def key_values(num_layers: int, num_rows: int, length: int, seed: int = 0) -> KeyValues:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, num_layers, num_rows, 3, length, 4, generator=generator)
    return KeyValues(keys, values)


def logits(loaded: backbone.Backbone, prompts: Prompts) -> Tensor:
    input_ids, mask, labels, _ = tiny.batch()
    encoded = loaded.encode(loaded.embed(input_ids), mask, prompts)
    return loaded.decode(labels.clamp(min=0), encoded, prompts)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(),
        Prompts(torch.zeros(6, 0, 16), None, key_values(3, 6, 0), key_values(2, 6, 0)),
    ],
    ids=["none", "length 0"],
)
def test_no_prompt_is_the_plain_model_bit_for_bit(family: str, attention: str, prompts: Prompts) -> None:
    input_ids, mask, labels, _ = tiny.batch()
    with torch.no_grad():
        expected = tiny.plain(family, attention)(
            input_ids=input_ids, attention_mask=mask, decoder_input_ids=labels.clamp(min=0), use_cache=False
        ).logits
        assert torch.equal(logits(tiny.load(family, attention=attention), prompts), expected)


def slow_attention(module: Any, x_TH: Tensor, keys_NPD: Tensor, values_NPD: Tensor, bias_NTT: Tensor) -> Tensor:
    """Softmax(q·[P_k ; k] + bias)·[P_v ; v] by loops; prompt columns have no bias and are always visible."""
    num_tokens = len(x_TH)
    q, k, v = (getattr(module, name)(x_TH).view(num_tokens, 3, 4) for name in "qkv")
    out = torch.zeros(num_tokens, 3, 4)
    for n in range(3):
        for t in range(num_tokens):
            seen = range(t + 1) if module.is_causal else range(num_tokens)
            scores = [q[t, n] @ key for key in keys_NPD[n]] + [q[t, n] @ k[s, n] + bias_NTT[n, t, s] for s in seen]
            weights = torch.stack(scores).exp()
            columns = [*values_NPD[n], *(v[s, n] for s in seen)]
            for weight, column in zip(weights / weights.sum(), columns, strict=True):
                out[t, n] += weight * column
    return module.o(out.flatten(1))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@torch.no_grad()
def test_prompted_attention_is_the_formula(family: str, attention: str, stack: str) -> None:
    loaded = tiny.load(family, attention=attention)
    made = key_values(3, 2, 3)
    prompts = Prompts(**{stack: made})
    whole_stack = getattr(loaded.model, stack)
    x_BTH = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    seen: dict[str, Tensor] = {}

    def keep(module: Any, args: tuple, kwargs: dict, output: tuple) -> None:
        seen["x"], seen["out"] = args[0], output[0]

    module = whole_stack.block[1].layer[0].SelfAttention
    module.register_forward_hook(keep, with_kwargs=True)
    whole_stack(inputs_embeds=x_BTH, prompts=prompts)
    owner = module if family == "umt5" else whole_stack.block[0].layer[0].SelfAttention
    bias_NTT = owner.compute_bias(5, 5)[0]
    for row in range(2):
        expected = slow_attention(module, seen["x"][row], made.keys_LBNPD[1, row], made.values_LBNPD[1, row], bias_NTT)
        torch.testing.assert_close(seen["out"][row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_bias_of_real_tokens_is_unchanged_and_prompts_have_none(stack: str) -> None:
    seen: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs, mask=args[4])

    loaded = tiny.load()
    module = getattr(loaded.model, stack).block[1].layer[0].SelfAttention
    bias, x = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 5, 4)
    for mask in (torch.rand(2, 1, 5, 5) > 0.5, torch.randn(2, 1, 5, 5), None):
        prompted_attention.prompted(record)(
            module, x, x, x, mask, position_bias=bias, prompts=Prompts(**{stack: key_values(3, 2, 4)})
        )
        assert torch.equal(seen["position_bias"][..., 4:], bias)
        assert not seen["position_bias"][..., :4].any()
        if mask is not None:
            assert torch.equal(seen["mask"][..., 4:], mask)
            assert (seen["mask"][..., :4] == (1 if mask.dtype == torch.bool else 0)).all()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert seen["mask"] is None if stack == "encoder" else torch.equal(seen["mask"][0, 0, :, 4:], causal)


def test_cross_attention_sees_no_prompts() -> None:
    loaded = tiny.load()
    tagged = [name for name, module in loaded.model.named_modules() if hasattr(module, "prompt_spot")]
    assert len(tagged) == 5
    assert all("SelfAttention" in name for name in tagged)


@torch.no_grad()
def test_input_prompts_are_concatenated_embeddings() -> None:
    loaded = tiny.load()
    input_ids, mask, labels, _ = tiny.batch()
    prompt = torch.randn(6, 4, 16)
    encoded = loaded.encode(loaded.embed(input_ids), mask, Prompts(inputs_BPH=prompt))
    plain = tiny.plain()
    expected = plain(
        inputs_embeds=torch.cat([prompt, plain.shared(input_ids)], dim=1),
        attention_mask=torch.cat([torch.ones(6, 4, dtype=torch.long), mask], dim=1),
        decoder_input_ids=labels.clamp(min=0),
    ).logits
    torch.testing.assert_close(loaded.decode(labels.clamp(min=0), encoded, Prompts()), expected)


@torch.no_grad()
def test_masked_input_prompts_count_as_absent() -> None:
    loaded = tiny.load()
    prompt, absent = torch.randn(6, 4, 16), torch.zeros(6, 4, dtype=torch.long)
    # The absent prompts stand before the input, so that relative positions stay as they are.
    torch.testing.assert_close(logits(loaded, Prompts(prompt, absent)), logits(loaded, Prompts()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_every_prompt_value_gets_gradient(stack: str) -> None:
    loaded = tiny.load(train=False)
    made = key_values(3 if stack == "encoder" else 2, 6, 3)
    made.keys_LBNPD.requires_grad_()
    made.values_LBNPD.requires_grad_()
    logits(loaded, Prompts(**{stack: made})).sin().sum().backward()
    for tensor in (made.keys_LBNPD, made.values_LBNPD):
        assert tensor.grad is not None
        assert (tensor.grad != 0).all()


def test_v1_1_keeps_its_own_output_layer() -> None:
    loaded, plain = tiny.load("t5_v1_1"), tiny.plain("t5_v1_1")
    assert torch.equal(loaded.model.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(loaded.model.lm_head.weight, loaded.model.shared.weight)
    assert loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight
    tied = tiny.load("t5").model
    assert tied.lm_head.weight is tied.shared.weight


def test_storage_follows_precision_and_training() -> None:
    def dtypes(**keys: Any) -> set[torch.dtype]:
        return {p.dtype for p in tiny.load(**keys).parameters()}

    assert dtypes(train=False, precision="bf16") == {torch.bfloat16}
    assert dtypes(train=True, precision="bf16") == {torch.float32}
    assert dtypes(train=False, precision="fp32") == {torch.float32}
    assert not any(p.requires_grad for p in tiny.load(train=False).parameters())
    assert all(p.requires_grad for p in tiny.load(train=True).parameters())


def test_dropout_is_the_models_own_unless_set() -> None:
    def rates(loaded: backbone.Backbone) -> set[float]:
        modules = list(loaded.model.modules())
        attention = {m.dropout for m in modules if isinstance(getattr(m, "dropout", None), float)}
        return attention | {m.p for m in modules if isinstance(m, torch.nn.Dropout)}

    assert rates(tiny.load()) == {0.1}
    assert rates(tiny.load(dropout=0.0)) == {0.0}
    assert rates(tiny.load(dropout=0.3)) == {0.3}


def test_identity_follows_the_content_alone() -> None:
    identity = tiny.load().identity()
    assert identity["name"] == str(tiny.folder())
    assert identity == tiny.load(train=False, precision="bf16", dropout=0.5, attention="eager").identity()
    others = [family for family in tiny.FAMILIES if family != "flan"]  # of t5_v1_1's shape and weights
    assert len({tiny.load(f).identity()["sha256"] for f in others}) == len(others)
    assert tiny.load("flan").identity()["sha256"] == tiny.load("t5_v1_1").identity()["sha256"]


def test_identity_changes_with_one_weight(tmp_path: Path) -> None:
    copy = shutil.copytree(tiny.folder(), tmp_path / "copy")
    same = backbone.load(BackboneConfig(name=str(copy)), train=False, precision="fp32", seed=0)
    assert same.identity()["sha256"] == tiny.load().identity()["sha256"]
    model = tiny.plain()
    model.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] += 1e-3
    model.save_pretrained(copy)
    other = backbone.load(BackboneConfig(name=str(copy)), train=False, precision="fp32", seed=0)
    assert other.identity()["sha256"] != tiny.load().identity()["sha256"]


def test_dims_and_limits() -> None:
    dims = tiny.load().dims(5)
    assert (dims.hidden, dims.num_tasks) == (16, 5)
    assert dims.encoder is not None
    assert (dims.encoder.num_layers, dims.encoder.num_heads, dims.encoder.head_dim) == (3, 3, 4)
    assert dims.decoder.num_layers == 2
    assert tiny.load().max_input_tokens == tiny.LIMIT
    assert tiny.load("mt5").max_input_tokens is None


def test_ordinary_embeddings_leave_out_special_tokens() -> None:
    loaded = tiny.load()
    assert torch.equal(loaded.ordinary_embeddings(), loaded.model.shared.weight[3:60])


def test_loading_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    backbone.load(BackboneConfig(), train=True, precision="fp32", seed=9)
    tiny.load()
    assert torch.equal(torch.rand(4), expected)


def test_embedded_loads_and_its_tokenizer_fits() -> None:
    loaded = backbone.load(BackboneConfig(), train=True, precision="fp32", seed=1)
    again = backbone.load(BackboneConfig(), train=True, precision="fp32", seed=1)
    assert loaded.identity() == again.identity()
    ids = loaded.tokenizer("the film was great", return_tensors="pt").input_ids
    assert loaded.embed(ids).shape == (1, ids.shape[1], loaded.dims(1).hidden)


def test_untrained_weights_are_drawn_from_the_seed() -> None:
    config = BackboneConfig(name=str(tiny.folder()), init="random")
    first, same, other = (backbone.load(config, train=True, precision="fp32", seed=s).identity() for s in (1, 1, 2))
    assert first == same
    assert first["sha256"] != other["sha256"]


def fails(name: str | Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        backbone.load(BackboneConfig(name=str(name), **keys), train=False, precision="fp32", seed=0)
    return str(caught.value)


def test_bad_backbones_are_explained(tmp_path: Path) -> None:
    missing = fails(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in missing
    assert "does not exist" in missing

    marian = tmp_path / "marian"
    transformers.MarianConfig(d_model=16, vocab_size=64).save_pretrained(marian)
    assert "'marian' model; expected one of t5, mt5, umt5, bart" in fails(marian)

    weightless = shutil.copytree(tiny.folder(), tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "model.safetensors" in fails(weightless)

    foreign = shutil.copytree(tiny.folder(), tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"num_layers": 4}))
    assert "weights are missing or have the wrong shape" in fails(foreign)
    (foreign / "config.json").write_text(json.dumps(config | {"vocab_size": 32}))
    assert fails(foreign)

    (foreign / "config.json").write_text("{")
    assert "cannot be loaded" in fails(foreign)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder(), tmp_path / "more")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(10)])
    tokenizer.save_pretrained(folder)
    assert "tokenizer has 70 pieces, but the model only 64" in fails(folder)
