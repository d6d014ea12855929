"""What a run can be handed on as."""

import json
from pathlib import Path
from typing import Any

import pytest
import test_methods
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from polyprompt import checkpoint, export, folding
from polyprompt.errors import ConfigError
from polyprompt.folding import Folded
from polyprompt.model import PromptedModel
from polyprompt.predictor import Predictor, find_bundle
from polyprompt.ray_train import run
from polyprompt.recipe import check

#: Those whose prompts hang on the input, and the one that has none.
UNFOLDED = ("smop", "routed_hyperprompt", "attempt", "lora")
FOLDABLE = [name for name, config in test_methods.CONFIGS.items() if config.name not in UNFOLDED]
Table = dict[str, Any]


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("family", ["t5", "qwen3"])
@torch.no_grad()
def test_folded_tables_give_the_same_logits(name: str, family: str) -> None:
    config = test_methods.CONFIGS[name]
    if getattr(config, "stacks", None) == "encoder" and family == "qwen3":
        pytest.skip("its prompts are in the encoder")
    model = test_methods.strong(tiny.fitting(config, family), family=family).eval()
    tables, texts = folding.fold(model.method, tiny.NUM_TASKS, model.backbone.dims(1).hidden, 16)
    plain = PromptedModel(model.backbone, Folded(tables, json.loads(json.dumps(texts))))
    batch = tiny.batch()
    torch.testing.assert_close(plain(*batch).nll_B, model(*batch).nll_B, rtol=1e-6, atol=1e-6)
    generated = [m.generate(batch[0], batch[1], batch[3], max_new_tokens=4) for m in (plain, model)]
    assert torch.equal(generated[0], generated[1])
    assert not list(plain.method.parameters())


@pytest.mark.parametrize("name", [n for n, c in test_methods.CONFIGS.items() if c.name in UNFOLDED[:3]])
def test_prompts_that_hang_on_the_input_are_not_folded(name: str) -> None:
    model = test_methods.strong(test_methods.CONFIGS[name]).eval()
    with pytest.raises(ConfigError, match=r"hang on the input, so they cannot be folded"):
        folding.fold(model.method, tiny.NUM_TASKS, model.backbone.dims(1).hidden, 16)


ROWS: list[Table] = [
    {"task": "my/larger", "text": "3 and 5"},
    {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
    {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
]


def same_answers(first: Predictor, second: Predictor) -> None:
    for one, other in zip(first.predict(ROWS), second.predict(ROWS), strict=True):
        assert one.prediction == other.prediction
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert dict(one.choice_scores) == pytest.approx(dict(other.choice_scores), abs=1e-5)


def test_a_folded_bundle_answers_as_the_run_does(trained_run: Path, tmp_path: Path) -> None:
    out = export.folded(find_bundle(trained_run), tmp_path / "folded")
    same_answers(Predictor(out), Predictor(find_bundle(trained_run)))
    names = checkpoint.read(out).tensors
    assert not [name for name in names if "hyper" in name]
    assert "| my/larger |" in (out / "README.md").read_text()
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        export.folded(find_bundle(trained_run), out)
    with pytest.raises(ConfigError, match="is folded already"):
        export.hub_folder(out, tmp_path / "again")


def test_a_trained_network_is_a_folder_of_transformers(trained_run: Path, tmp_path: Path) -> None:
    out = export.hub_folder(find_bundle(trained_run), tmp_path / "hf")
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    tensors = checkpoint.read(find_bundle(trained_run)).tensors
    for name, weight in model.named_parameters():
        if f"backbone.model.{name}" in tensors:
            assert torch.equal(weight, tensors[f"backbone.model.{name}"])
    assert AutoTokenizer.from_pretrained(out)("3 and 5").input_ids
    names = json.loads((out / "prompts.json").read_text())
    assert names["tasks"] == ["my/larger", "embedded/nli", "embedded/similarity"]
    assert set(load_file(out / "prompts.safetensors")) == set(names["names"])


def frozen(trained_run: Path, out: Path, method: Table) -> Path:
    """A run of two steps on the same tasks with a frozen backbone."""
    table = checkpoint.read(find_bundle(trained_run)).config.model_dump(mode="json")
    table |= {"method": method, "backbone": {"name": table["backbone"]["name"]}}
    table["train"] |= {"max_steps": 2, "group_learning_rates": {}, "learning_rate": 0.5}
    run(check(table), out=out, say=lambda line: None)
    return find_bundle(out)


def test_a_frozen_backbone_is_not_exported_again(trained_run: Path, tmp_path: Path) -> None:
    bundle = frozen(trained_run, tmp_path / "run", {"name": "prompt_tuning", "length": 3})
    with pytest.raises(ConfigError, match=r"trained prompts on a frozen backbone.*--format folded"):
        export.hub_folder(bundle, tmp_path / "hf")
    same_answers(Predictor(export.folded(bundle, tmp_path / "folded")), Predictor(bundle))


def test_lora_is_merged_into_the_weights(trained_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    bundle = frozen(trained_run, tmp_path / "run", {"name": "lora", "rank": 2})
    with pytest.raises(ConfigError, match="--format hf"):
        export.folded(bundle, tmp_path / "folded")
    out = export.hub_folder(bundle, tmp_path / "hf")
    merged = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    tuned = Predictor(bundle).model
    ids, start = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[0, 9]])
    with torch.no_grad():
        expected = tuned.backbone.model(input_ids=ids, decoder_input_ids=start).logits
        got = merged(input_ids=ids, decoder_input_ids=start).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prompt_tuning", "length": 3},
        {"name": "p_tuning", "length": 3, "encoder_hidden_size": 8},
        {"name": "mpt", "length": 3},
        {"name": "lora", "rank": 2},
    ],
    ids=lambda method: method["name"],
)
def test_peft_loads_it_with_equal_logits(trained_run: Path, tmp_path: Path, method: Table) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    bundle = frozen(trained_run, tmp_path / "run", method)
    out = export.peft_folder(bundle, tmp_path / "peft")
    ours = Predictor(bundle)
    for index, task in enumerate(ours.task_names):
        plain = AutoModelForSeq2SeqLM.from_pretrained(ours.config.backbone.name)
        folder = out if method["name"] == "lora" else out / task.replace("/", "_")
        theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
        ids, labels = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[9, 1]])
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            nll = ours.model(ids, torch.ones_like(ids), labels, torch.tensor([index])).total / 2
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_what_peft_cannot_compute_is_refused(trained_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    with pytest.raises(ConfigError, match="trained the backbone too"):
        export.peft_folder(find_bundle(trained_run), tmp_path / "peft")
    bundle = frozen(trained_run, tmp_path / "run", {"name": "prefix_tuning", "encoder_length": 2, "decoder_length": 2})
    with pytest.raises(ConfigError, match="PEFT has nothing that computes it"):
        export.peft_folder(bundle, tmp_path / "peft")
