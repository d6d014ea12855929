"""BART, with learned positions in encoder and decoder: the contract and the checks of conformance/ on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import test_costs
import test_decoder_only
import test_methods
import tiny
import torch
import transformers
from conformance.checks import CHECKS
from conformance.driver import NotApplicable
from conformance.ours import Ours
from conformance.test_conformance import FIRST
from tokenizers.processors import TemplateProcessing

from polyprompt import backbone
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import FullConfig, MethodConfig, PromptTuningConfig, RunConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Prompts
from polyprompt.model import PromptedModel, input_limit

#: One of each way in which a method reaches the model.
WAYS = ("prompt_tuning", "dept", "hyperprompt global", "adapter", *(["lora"] if test_methods.HAS_PEFT else []))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_no_prompt_is_the_plain_model_bit_for_bit(attention: str) -> None:
    input_ids, mask, labels, _ = tiny.batch()
    expected = tiny.plain("bart", attention)(input_ids=input_ids, attention_mask=mask, labels=labels.clamp(min=0))
    loaded = tiny.load("bart", attention=attention)
    encoded = loaded.encode(loaded.embed(input_ids), mask, Prompts())
    assert torch.equal(loaded.logits(labels.clamp(min=0), encoded, Prompts()), expected.logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "compile"])
def test_the_checks(check: str, way: str) -> None:
    try:
        CHECKS[check](Ours(way, "bart"))
    except NotApplicable:
        assert check in ("positions", "unequal lengths")


@pytest.mark.parametrize("name", FIRST)
def test_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "default_family", "bart")
    for clause in test_decoder_only.CLAUSES:
        clause(name)


@pytest.mark.parametrize("method", test_costs.METHODS[::4], ids=lambda method: method.name)
def test_the_closed_form_of_costs_is_what_torch_counts(method: MethodConfig) -> None:
    test_costs.test_the_closed_form_is_what_torch_counts(method, "bart")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts <s> before texts, as BART's own does."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.plain("bart").save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder("bart"), bos_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_what_begins_texts_stands_before_input_and_target(begun: Path) -> None:
    loaded = backbone.load(BackboneConfig(name=str(begun)), train=False, precision="fp32", seed=0)
    model = PromptedModel(loaded, tiny.build(PromptTuningConfig(length=4), loaded.dims(tiny.NUM_TASKS), seed=0))
    input_ids, mask, labels, task = tiny.batch()
    nll = model(input_ids, mask, labels, task).nll_B
    made = model.generate(input_ids, mask, task, max_new_tokens=5, num_beams=2)
    plain = tiny.plain("bart")
    for row in range(len(task)):
        words, target = input_ids[row][mask[row] == 1], labels[row][labels[row] != -100]
        prompt = model.method.get_parameter("prompt_GPH")[task[row]]
        x = torch.cat([prompt, plain.get_input_embeddings()(torch.cat([torch.tensor([2]), words]))])[None]
        start = torch.tensor([[1, 2]])
        logits = plain(inputs_embeds=x, decoder_input_ids=torch.cat([start, target[None, :-1]], dim=1)).logits[0, 1:]
        expected = -logits.log_softmax(dim=1).gather(1, target[:, None]).sum()
        torch.testing.assert_close(nll[row], expected, atol=1e-4, rtol=1e-5)
        ids = plain.generate(
            inputs_embeds=x, decoder_input_ids=start, max_new_tokens=5, num_beams=2, pad_token_id=0, eos_token_id=1
        )[0, 2:]
        assert torch.equal(made[row][: len(ids)], ids)


def test_positions_limit_the_input(begun: Path) -> None:
    def limit(folder: Path, **data: Any) -> int:
        loaded = backbone.load(BackboneConfig(name=str(folder)), train=False, precision="fp32", seed=0)
        config = RunConfig(tasks=["a/b"], backbone=BackboneConfig(name=str(folder)), data=data)
        return input_limit(config, loaded, tiny.build(PromptTuningConfig(length=4), loaded.dims(1), seed=0))

    assert limit(tiny.folder("bart")) == tiny.LIMIT - 4
    assert limit(begun) == tiny.LIMIT - 5
    with pytest.raises(ConfigError, match=r"exceed the limit of 39 tokens"):
        limit(begun, max_input_tokens=36)


def test_it_shares_no_backbone_and_takes_no_input_end() -> None:
    with pytest.raises(ConfigError, match="input_end"):
        tiny.load("bart", input_end="\n")
    assert tiny.model(FullConfig(), "bart").backbone.identity()["sha256"] != tiny.load("t5").identity()["sha256"]


def test_choices_side_by_side_score_as_each_alone(begun: Path) -> None:
    """With <s> before each target, and rows whose choices differ in number and length."""
    loaded = backbone.load(BackboneConfig(name=str(begun)), train=False, precision="fp32", seed=0)
    model = PromptedModel(loaded, tiny.build(PromptTuningConfig(length=3), loaded.dims(2), seed=0)).eval()
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    row = (ids, (ids != 0).long(), torch.tensor([0, 1]))
    choices = [[[5, 1], [6, 7, 8, 1]], [[9, 1], [9, 5, 1], [4, 1]]]
    for number, scores in enumerate(model.score_choices(*row, choices)):
        for choice, score in zip(choices[number], scores, strict=True):
            labels = torch.tensor([choice])
            alone = model(*(part[number : number + 1] for part in row[:2]), labels, row[2][number : number + 1])
            assert -score == pytest.approx(alone.total.item(), abs=1e-5)
