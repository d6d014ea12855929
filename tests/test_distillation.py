"""MPT's distillation: the loss row by row from its formula, who is taught by whom, and a run that is."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_source_prompts import finished
from torch import Tensor

from polyprompt import checkpoint
from polyprompt.config import MPTConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.mpt import MPT
from polyprompt.model import PromptedModel
from polyprompt.packable import check as check_pack
from polyprompt.plan import build
from polyprompt.recipe import check
from polyprompt.worker import Job, train

TAUGHT = MPTConfig(
    length=4, task_std=0.5, teachers=[Path("absent")], distillation_weight=0.7, distillation_temperature=2.0
)


def plain_states(family: str, prompt_PH: Tensor, words: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run transformers' own model on one row: logits and the decoder's last states at the targets; the encoder's."""
    plain = tiny.plain(family)
    x = torch.cat([prompt_PH, plain.get_input_embeddings()(words)])[None]
    if plain.config.is_encoder_decoder:
        inputs = torch.cat([target.new_tensor([plain.config.decoder_start_token_id]), target[:-1]])[None]
        out = plain(inputs_embeds=x, decoder_input_ids=inputs, output_hidden_states=True)
        return out.logits[0], out.encoder_last_hidden_state[0], out.decoder_hidden_states[-1][0]
    x = torch.cat([x, plain.get_input_embeddings()(target[:-1])[None]], dim=1)
    out = plain(inputs_embeds=x, output_hidden_states=True)
    return out.logits[0, -len(target) :], None, out.hidden_states[-1][0, -len(target) :]


def slow_penalty(family: str, model: PromptedModel, row: int) -> Tensor:
    """0.7·(KL + squared differences) of one row, from the formula."""
    input_ids, mask, labels, task = tiny.batch()
    words, target = input_ids[row][mask[row] == 1], labels[row][labels[row] != -100]
    if family in tiny.DECODERS:
        end = model.backbone.end_id
        words = torch.where(words == model.backbone.tokenizer.eos_token_id, end, words)
    method = model.method
    assert isinstance(method, MPT)
    assert method.prompt_PH is not None
    own_PH = method.prompt_PH * torch.outer(method.tokens_KP[task[row]], method.features_KH[task[row]])
    own, theirs = (plain_states(family, p, words, target) for p in (own_PH, method.sources_JPH[task[row]]))
    total = torch.zeros(())
    for ours, teachers in zip(own[0] / 2.0, theirs[0] / 2.0, strict=True):
        p, q = teachers.exp() / teachers.exp().sum(), ours.exp() / ours.exp().sum()
        total += (p * (p.log() - q.log())).sum() / len(target)
    for ours, teachers in zip(own[1:], theirs[1:], strict=True):
        if ours is not None and teachers is not None:
            total += ((ours - teachers) ** 2).mean()
    return 0.7 * total


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "bart", "llama", "gpt2"])
@torch.no_grad()
def test_the_loss_is_the_formula(family: str) -> None:
    model = tiny.model(TAUGHT, family)
    model.method.train()  # the backbone without dropout, as the plain model
    begin = getattr(model.backbone, "begin_id", None)
    assert begin is None, "the slow form has no token before a text"
    loss = model(*tiny.batch())
    for row in range(6):
        torch.testing.assert_close(loss.penalty_B[row], slow_penalty(family, model, row), atol=1e-5, rtol=1e-4)
    untaught = model.eval()(*tiny.batch())
    torch.testing.assert_close(loss.nll_B, untaught.nll_B, atol=1e-5, rtol=1e-5)
    assert not untaught.penalty_B.any()  # in prediction nobody teaches


def test_only_the_student_learns_and_one_like_its_teacher_is_left_alone() -> None:
    model = tiny.model(TAUGHT, train=False)
    method = model.method.train()
    assert isinstance(method, MPT)
    assert method.prompt_PH is not None
    before = method.sources_JPH.clone()
    model(*tiny.batch()).penalty_B.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert method.sources_JPH.grad is None
    with torch.no_grad():
        method.sources_JPH.copy_(method.prompt_PH.expand_as(before))
        method.tokens_KP.fill_(1.0)
        method.features_KH.fill_(1.0)
    torch.testing.assert_close(model(*tiny.batch()).penalty_B, torch.zeros(6), atol=1e-6, rtol=0)


def test_the_teacher_speaks_without_dropout_and_leaves_the_random_stream_alone() -> None:
    taught, alone = (tiny.model(config, train=False).train() for config in (TAUGHT, MPTConfig(length=4, task_std=0.5)))
    losses = []
    for model in (taught, alone):
        torch.manual_seed(0)
        losses.append(model(*tiny.batch()).nll_B)
    assert taught.backbone.training
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    assert not torch.allclose(taught(*tiny.batch()).nll_B, losses[0])  # there is dropout


def test_a_run_has_the_teachers_of_its_tasks_and_keeps_them(small_run: dict[str, Any], tmp_path: Path) -> None:
    first, second = "embedded/nli", "embedded/copa"
    both = finished({**small_run, "tasks": [first, second]}, tmp_path / "both", name="prompt_tuning", length=3)
    one = finished({**small_run, "tasks": [second]}, tmp_path / "one", name="prompt_tuning", length=3)
    table = {**small_run, "tasks": [second, first], "evaluate": {}}

    def taught(*teachers: Path) -> dict[str, Any]:
        return {**table, "method": {"name": "mpt", "length": 3, "teachers": [str(t) for t in teachers]}}

    prompts = checkpoint.read(both).tensors["method.prompt_GPH"]
    model, _ = build(check(taught(both)))
    assert torch.equal(model.method.get_buffer("sources_JPH"), prompts[[1, 0]])
    with pytest.raises(ConfigError, match=rf"second teacher of {second}; leave one of the two out"):
        build(check(taught(both, one)))
    with pytest.raises(ConfigError, match=rf"no prompt of {first}, only of {second}; add a bundle"):
        build(check(taught(one)))

    def go(folder: str, max_steps: int) -> dict[str, Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = check({**taught(both), "train": {**table["train"], "max_steps": max_steps}})
        outcome = train(Job(config, tmp_path / folder, handle=None), torch.device("cpu"), lambda metrics, bundle: None)
        return dict(checkpoint.read(outcome.last_bundle).tensors)

    unbroken = go("unbroken", 4)
    assert '"train/penalty"' in (tmp_path / "unbroken" / "metrics.jsonl").read_text()
    go("stopped", 2)
    both.rename(tmp_path / "gone")
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in go("stopped", 4).items())


def test_what_would_do_nothing_or_be_wrong_is_refused(small_run: dict[str, Any]) -> None:
    mpt = {"name": "mpt", "length": 3, "teachers": ["somewhere"]}
    with pytest.raises(ConfigError, match=r"distillation_weight=2.0 does nothing without method.teachers"):
        check({**small_run, "method": {"name": "mpt", "distillation_weight": 2.0}})
    with pytest.raises(ConfigError, match=r"teachers=.* does nothing without method.length above 0"):
        check({**small_run, "method": {**mpt, "length": 0}})
    with pytest.raises(ConfigError, match=r"sends each row through the backbone twice. Drop method.teachers"):
        check_pack(check({**small_run, "method": mpt}))
    dims = tiny.load().dims(tiny.NUM_TASKS + 1)
    with pytest.raises(ConfigError, match=r"4 tasks, but teachers of 3; .* Set method.teachers=\[\]"):
        MPT(TAUGHT, dims, torch.zeros(3, 4, dims.hidden), seed=0)
