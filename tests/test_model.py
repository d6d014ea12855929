"""PromptedModel: loss, scoring of choices, generation, and what is trained."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from polyprompt import model as model_module
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import (
    FullConfig,
    HyperPromptConfig,
    MethodConfig,
    PromptTuningConfig,
    RunConfig,
    SMoPConfig,
)
from polyprompt.errors import BundleError, ConfigError
from polyprompt.model import Loss, PromptedModel, input_limit

HYPER = HyperPromptConfig(encoder_length=3, decoder_length=2, reduction=4)
CHOICES = [[[5, 1], [9, 10, 11, 1]], [[7, 1]], [], [[5, 1], [6, 7, 1], [8, 1]], [[5, 1]], [[9, 1], [30, 1]]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_loss_is_the_summed_negative_log_likelihood(family: str) -> None:
    input_ids, mask, labels, task = tiny.batch()
    loss = tiny.model(FullConfig(), family)(input_ids, mask, labels, task)
    logits = tiny.plain(family)(input_ids=input_ids, attention_mask=mask, labels=labels).logits
    for row in range(6):
        target = labels[row, labels[row] != -100]
        expected = -sum(logits[row, s].log_softmax(-1)[piece] for s, piece in enumerate(target))
        torch.testing.assert_close(loss.nll_B[row], expected, atol=1e-5, rtol=1e-5)
        assert loss.tokens_B[row] == len(target)
    torch.testing.assert_close(loss.total, loss.nll_B.sum())
    assert loss.total.dtype == torch.float32


@torch.no_grad()
def test_a_loss_in_one_thread_leaves_the_logits_of_another_whole() -> None:
    input_ids, mask, labels, task = tiny.batch()
    model = tiny.model(HYPER)
    whole = model.logits(input_ids, mask, labels, task)
    with model.backbone.logits_only_at(labels != -100), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(model.logits, input_ids, mask, labels, task).result(), whole)
        assert len(model.logits(input_ids, mask, labels, task)) == int((labels != -100).sum())


def test_loss_takes_labels_that_are_no_contiguous_memory() -> None:
    input_ids, mask, labels, task = tiny.batch()
    model = tiny.model(HYPER)
    strided = labels.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(model(input_ids, mask, strided, task).nll_B, model(input_ids, mask, labels, task).nll_B)


def test_a_row_without_targets_adds_nothing() -> None:
    input_ids, mask, labels, task = tiny.batch()
    labels[2] = -100
    loss = tiny.model(HYPER)(input_ids, mask, labels, task)
    assert loss.nll_B[2] == 0
    assert loss.tokens_B[2] == 0
    loss.total.backward()


def test_gradients_of_slices_add_up_to_the_whole_batch() -> None:
    whole, sliced = tiny.model(HYPER), tiny.model(HYPER)
    whole(*tiny.batch()).total.backward()
    for rows in ([0, 1, 2, 3], [4, 5]):
        sliced(*tiny.rows(tiny.batch(), rows)).total.backward()
    for (name, one), two in zip(whole.named_parameters(), sliced.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("config", [FullConfig(), HYPER, SMoPConfig(length=3), PromptTuningConfig(length=3)])
def test_choices_are_scored_by_their_log_likelihood(config: MethodConfig) -> None:
    model = tiny.model(config)
    scores = model.score_choices(*scored_rows(), CHOICES)
    assert [len(own) for own in scores] == [len(own) for own in CHOICES]
    check_scores_of_each_alone(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["umt5", "llama", "gpt2"])
def test_choices_side_by_side_score_as_if_each_stood_alone(family: str, attention: Literal["sdpa", "eager"]) -> None:
    check_scores_of_each_alone(tiny.model(tiny.fitting(HYPER, family), family, attention=attention))


def test_choices_side_by_side_see_no_further_than_a_sliding_window() -> None:
    model = tiny.model(FullConfig(), "qwen2")
    inner = model.backbone.model
    before = model.score_choices(*scored_rows(), CHOICES)
    inner.config.layer_types, inner.config.sliding_window = ["sliding_attention", "full_attention"], 3
    inner.model.has_sliding_layers = True
    check_scores_of_each_alone(model)
    assert model.score_choices(*scored_rows(), CHOICES) != before


def scored_rows() -> tuple[Tensor, Tensor, Tensor]:
    input_ids, mask, _, task = tiny.batch()
    return input_ids, mask, task


def check_scores_of_each_alone(model: PromptedModel) -> None:
    input_ids, mask, task = scored_rows()
    for row, scores in enumerate(model.score_choices(input_ids, mask, task, CHOICES)):
        for choice, score in zip(CHOICES[row], scores, strict=True):
            one = [input_ids[row : row + 1], mask[row : row + 1], torch.tensor([choice]), task[row : row + 1]]
            assert score == pytest.approx(-model(*one).total.item(), abs=1e-5, rel=1e-5)


def test_choices_in_slices_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(HYPER)
    input_ids, mask, _, task = tiny.batch()
    whole = model.score_choices(input_ids, mask, task, CHOICES)
    monkeypatch.setattr(model_module, "MAX_SCORED_LOGITS", 2 * 4 * tiny.VOCABULARY)
    sliced = model.score_choices(input_ids, mask, task, CHOICES)
    for own, expected in zip(sliced, whole, strict=True):
        assert own == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert model.score_choices(input_ids, mask, task, [[]] * 6) == [[]] * 6


def test_scoring_runs_the_encoder_once_for_each_row() -> None:
    model = tiny.model(HYPER)
    rows: list[int] = []
    model.backbone.model.encoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    input_ids, mask, _, task = tiny.batch()
    model.score_choices(input_ids, mask, task, CHOICES)
    assert rows == [6]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_without_prompts_is_transformers_own(family: str, num_beams: int) -> None:
    input_ids, mask, _, task = tiny.batch()
    made = tiny.model(FullConfig(), family).generate(input_ids, mask, task, max_new_tokens=7, num_beams=num_beams)
    expected = tiny.plain(family).generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=7, num_beams=num_beams, do_sample=False
    )
    assert torch.equal(made, expected[:, 1:])


def test_greedy_generation_takes_the_likeliest_piece_at_each_step() -> None:
    model = tiny.model(HYPER)
    input_ids, mask, _, task = tiny.batch()
    made = model.generate(input_ids, mask, task, max_new_tokens=4)
    for row in range(6):
        one = input_ids[row : row + 1], mask[row : row + 1], task[row : row + 1]
        written: list[int] = []
        while len(written) < made.shape[1] and 1 not in written:
            (scores,) = model.score_choices(*one, [[[*written, piece] for piece in range(tiny.VOCABULARY)]])
            written.append(max(range(tiny.VOCABULARY), key=scores.__getitem__))
        assert made[row].tolist() == written + [0] * (made.shape[1] - len(written))


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gpt2"])
def test_what_is_written_has_its_likelihood_from_one_reading(family: str) -> None:
    model = tiny.model(tiny.fitting(HYPER, family), family)
    if family == "t5":  # as it is, it writes padding alone
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.backbone.parameters():
                weight.normal_(0, 0.5, generator=generator)
    made = model.generate(*scored_rows(), max_new_tokens=5)
    # What some rows write and others do not is made the end token, so that they end early and late.
    end = next(int(piece) for piece in made[made > 2].unique() if 0 < (made == piece).any(dim=1).sum() < len(made))
    model.backbone.tokenizer.eos_token_id = model.backbone.model.generation_config.eos_token_id = end
    passes: list[int] = []
    model.backbone.model.register_forward_hook(lambda module, args, output: passes.append(1))
    rows = scored_rows()
    written = model.answer(*rows, [[]] * len(rows[0]), max_new_tokens=9)
    assert len(passes) == max(len(ids) for ids, _ in written)
    assert len({len(ids) for ids, _ in written}) > 1
    ended = model.generate(*scored_rows(), max_new_tokens=9).tolist()
    scores = model.score_choices(*scored_rows(), [[ids] for ids, _ in written])
    for (ids, score), whole, (expected,) in zip(written, ended, scores, strict=True):
        assert ids == whole[: len(ids)]
        assert set(whole[len(ids) :]) <= {model.backbone.tokenizer.pad_token_id}
        assert end not in ids[:-1]
        assert score == pytest.approx(expected, abs=1e-5, rel=1e-5)
    choices = [[[5, end], [7, 8, end]] if row % 2 else [] for row in range(len(rows[0]))]
    both = model.answer(*rows, choices, max_new_tokens=9)
    ranked = model.score_choices(*(part[1::2] for part in rows), choices[1::2])
    assert [answer.ids for answer in both[::2]] == [ids for ids, _ in written[::2]]
    for answer, wanted in zip(both[1::2], ranked, strict=True):
        assert answer == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "train", "groups"),
    [
        (FullConfig(), True, {"backbone"}),
        (PromptTuningConfig(), False, {"prompt"}),
        (SMoPConfig(), False, {"prompt", "router"}),
        (SMoPConfig(router="per_task"), True, {"prompt", "router", "backbone"}),
        (HYPER, True, {"prompt", "hypernetwork", "backbone"}),
        (HYPER, False, {"prompt", "hypernetwork"}),
    ],
)
def test_groups_hold_every_trained_parameter_once(config: MethodConfig, train: bool, groups: set[str]) -> None:
    model = tiny.model(config, train=train)
    found = model.named_groups()
    assert set(found) == groups
    names = [name for group in found.values() for name, _ in group]
    assert sorted(names) == sorted(model.trained_state())
    parameters = [p for group in found.values() for _, p in group]
    assert len({id(p) for p in parameters}) == len(parameters)
    assert all(name.startswith("backbone.") for name, _ in found.get("backbone", []))


def test_counts() -> None:
    for train in (True, False):
        counts = tiny.model(SMoPConfig(), train=train).num_parameters()
        assert counts.method == 4 * 5 * 16 + 16 * 4
        assert counts.backbone == sum(p.numel() for p in tiny.plain().parameters())
        assert counts.trained == counts.method + train * counts.backbone


def test_trained_state_that_does_not_fit_is_refused_by_name() -> None:
    model = tiny.model(SMoPConfig(), train=False)
    state = model.trained_state()
    assert set(state) == {"method.prompts_RPH", "method.router_GHR"}
    bad = {"method.prompts_RPH": torch.zeros(2, 5, 16), "method.more": torch.zeros(1)}
    with pytest.raises(BundleError) as caught:
        model.load_trained_state(bad)
    for part in ("missing method.router_GHR", "unexpected method.more", "[2, 5, 16], expected [4, 5, 16]"):
        assert part in str(caught.value)
    assert state["method.prompts_RPH"].any(), "a refused state changes nothing"


def test_input_and_prompt_beyond_the_models_limit_are_refused() -> None:
    def run(length: int, tokens: int | None) -> RunConfig:
        method = {"name": "prompt_tuning", "length": length}
        return RunConfig(
            tasks=["a/b"], backbone=BackboneConfig(name="t"), method=method, data={"max_input_tokens": tokens}
        )

    model = tiny.model(PromptTuningConfig(length=10))
    assert input_limit(run(10, tiny.LIMIT - 10), model.backbone, model.method) == tiny.LIMIT - 10
    assert input_limit(run(10, None), model.backbone, model.method) == tiny.LIMIT - 10
    with pytest.raises(ConfigError) as caught:
        input_limit(run(10, tiny.LIMIT - 9), model.backbone, model.method)
    for part in ("method.length=10", f"data.max_input_tokens={tiny.LIMIT - 9}", f"limit of {tiny.LIMIT}", "to 30"):
        assert part in str(caught.value)
    unlimited = tiny.model(PromptTuningConfig(length=10), "mt5")
    assert input_limit(run(10, 4000), unlimited.backbone, unlimited.method) == 4000
    assert input_limit(run(10, None), unlimited.backbone, unlimited.method) == 512 - 10


def test_keys_and_values_beyond_the_models_limit_are_refused() -> None:
    model = tiny.model(HyperPromptConfig(encoder_length=tiny.LIMIT, decoder_length=2, reduction=2))
    config = RunConfig(tasks=["a/b"], backbone=BackboneConfig(name="t"))
    with pytest.raises(ConfigError, match=f"method.encoder_length={tiny.LIMIT} .*limit of {tiny.LIMIT}"):
        input_limit(config, model.backbone, model.method)


@pytest.mark.parametrize("config", [FullConfig(), HYPER, SMoPConfig(length=3), PromptTuningConfig(length=3)])
def test_data_parallel_gives_the_same_gradients(config: MethodConfig, tmp_path: Path) -> None:
    def step(wrapped: torch.nn.Module, model: PromptedModel) -> dict[str, Tensor | None]:
        input_ids, mask, labels, task = tiny.batch()
        # A task is missing, and so are prompts that the router never picks: DDP still needs every gradient.
        loss: Loss = wrapped(input_ids, mask, labels, torch.zeros_like(task))
        loss.total.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    alone = tiny.model(config)
    expected = step(alone, alone)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny.model(config)
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            got = step(wrapped, model)
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], msg=name)
