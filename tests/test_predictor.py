"""From a bundle to predictions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyprompt import checkpoint
from polyprompt.data import TaskData
from polyprompt.errors import BundleError
from polyprompt.plan import build
from polyprompt.predictor import Predictor, find_bundle
from polyprompt.tasks import metrics

Table = dict[str, Any]


@pytest.fixture(scope="module")
def predictor(trained_run: Path) -> Predictor:
    return Predictor(find_bundle(trained_run))


def asked(predictor: Predictor) -> tuple[list[Table], list[Any]]:
    """Every validation row of every task as text, tasks taking turns, and the examples behind them."""
    _, data = build(predictor.config)
    tasks = [task for task in data if isinstance(task, TaskData)]
    pairs = [
        ({"task": task.task.name, "input": example.input}, (task, example))
        for i in range(12)
        for task in tasks
        for example in task.validation.examples([i])
    ]
    return [row for row, _ in pairs], [pair for _, pair in pairs]


def test_scores_are_those_of_the_evaluation(predictor: Predictor, trained_run: Path) -> None:
    rows, examples = asked(predictor)
    answers = predictor.predict(rows, batch_size=7)
    assert not [answer.error for answer in answers if answer.error]
    result = json.loads((trained_run / "result.json").read_text())
    for name in ("my/larger", "embedded/nli"):
        own = [
            (answer, example)
            for answer, (task, example) in zip(answers, examples, strict=True)
            if task.task.name == name
        ]
        task = next(task.task for task, _ in examples if task.task.name == name)
        scored = metrics.compute(
            task.metrics, [answer.prediction for answer, _ in own], [example for _, example in own]
        )
        assert scored == pytest.approx(result["eval"][name])


def test_answers_do_not_depend_on_their_company(predictor: Predictor) -> None:
    rows, _ = asked(predictor)
    together = predictor.predict(rows)
    for row, answer in list(zip(rows, together, strict=True))[::5]:
        (alone,) = predictor.predict([row])
        assert alone.prediction == answer.prediction
        assert alone.score == pytest.approx(answer.score, abs=1e-4)


def test_a_choice_is_answered_with_every_choice_scored(predictor: Predictor) -> None:
    (answer,) = predictor.predict([{"task": "my/larger", "text": "3 and 5"}])
    assert answer.input == "compare: 3 and 5"
    assert list(answer.choice_scores) == ["no", "yes"]
    assert answer.prediction == max(answer.choice_scores, key=answer.choice_scores.__getitem__)
    assert answer.score == answer.choice_scores[answer.prediction] < 0


def test_free_text_has_its_likelihood(predictor: Predictor) -> None:
    (answer,) = predictor.predict([{"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"}])
    assert answer.choice_scores == {}
    assert math.isfinite(answer.score)
    assert answer.score < 0


def test_fields_and_text_give_the_same(predictor: Predictor) -> None:
    fields = {"premise": "all poets moved the helmet", "hypothesis": "some poets moved the helmet"}
    rows = [
        {"task": "embedded/nli", **fields},
        {"task": "embedded/nli", **fields, "label": 2},
        {"task": "embedded/nli", **fields, "label": -1},
        {"task": "embedded/nli", "input": "nli premise: {premise} hypothesis: {hypothesis}".format(**fields)},
    ]
    first, *others = predictor.predict(rows)
    assert not first.error
    for other in others:
        assert other.input == first.input
        assert other.score == pytest.approx(first.score, abs=1e-5)


def test_choices_may_be_generated(predictor: Predictor) -> None:
    (answer,) = predictor.predict([{"task": "my/larger", "text": "3 and 5"}], mode="generate")
    assert answer.choice_scores == {}
    assert math.isfinite(answer.score)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "1 and 2"}, "field 'task' is missing"),
        ({"task": "my/larg", "text": "1 and 2"}, "Did you mean 'my/larger'"),
        ({"task": "my/larger", "txt": "1 and 2"}, "field 'text' is missing; the row has txt"),
        ({"task": "my/larger", "text": None}, "field 'text' is null"),
        ({"task": "embedded/similarity", "input": "x", "choices": "yes"}, "expected a list of different texts"),
        ({"task": "embedded/similarity", "input": "x", "choices": ["a " * 200]}, "raise data.max_target_tokens"),
        ({"task": "embedded/similarity", "input": "x", "choices": 5}, "expected a list of different texts"),
        ({"task": "embedded/similarity", "input": "x", "choices": {"a": 1}}, "expected a list of different texts"),
        ({"task": "embedded/similarity", "input": "x\ud800"}, "half of a surrogate pair"),
        ({"task": ["my/larger"], "text": "1 and 2"}, "is not one of this model's"),
        ("my/larger", "a row must be a table of fields, not str"),
        ({"task": "embedded/nli", "premise": "a", "hypothesis": "b", "label": [1]}, "do not fit the task's format"),
    ],
)
def test_a_bad_row_has_its_error_and_the_others_their_answers(predictor: Predictor, row: Any, message: str) -> None:
    good = {"task": "my/larger", "text": "1 and 2"}
    answers = predictor.predict([good, row, good])
    assert message in answers[1].error
    assert math.isnan(answers[1].score)
    assert answers[0] == replace(answers[2], score=answers[0].score, choice_scores=answers[0].choice_scores)
    assert not answers[0].error


def test_a_bundle_needs_neither_its_data_nor_its_place(trained_run: Path, tmp_path: Path, tiny_t5: Path) -> None:
    moved, backbone = tmp_path / "moved", tmp_path / "backbone"
    shutil.copytree(trained_run, moved)
    shutil.copytree(tiny_t5, backbone)
    for file in moved.parent.glob("*.jsonl"):
        file.unlink()
    row = {"task": "my/larger", "text": "3 and 5"}
    there = Predictor(find_bundle(moved / "bundles" / find_bundle(trained_run).name), backbone=str(backbone))
    assert there.predict([row]) == Predictor(find_bundle(trained_run)).predict([row])


def test_another_backbone_is_refused(trained_run: Path) -> None:
    with pytest.raises(BundleError, match="was trained on backbone"):
        Predictor(find_bundle(trained_run), backbone="embedded")


def test_what_a_path_means(trained_run: Path, tmp_path: Path) -> None:
    best = find_bundle(trained_run)
    assert find_bundle(best) == best
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained_run, unfinished)
    (unfinished / "result.json").unlink()
    assert find_bundle(unfinished) == checkpoint.newest_whole(unfinished / "bundles")
    with pytest.raises(BundleError, match="holds no trained model"):
        find_bundle(tmp_path)
    # Another run may lie where a moved one was.
    moved = tmp_path / "moved"
    shutil.copytree(trained_run, moved)
    assert find_bundle(moved) == moved / "bundles" / best.name
