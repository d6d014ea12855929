"""Scores of a bundle on whole splits, and the files of the benchmark servers."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyprompt import submission
from polyprompt.errors import ConfigError, DataError
from polyprompt.reading import read_rows
from polyprompt.tasks import catalog

ROOT = Path(__file__).parents[1]


def answered(name: str, split: str, root: Path, say: Any) -> list[submission.Answered]:
    """Rows of real data with what `say(example)` says of each example."""
    task = catalog.of_split(name, root, split)
    return [(row, examples, [say(e) for e in examples]) for _, row, examples in read_rows(task, split)]


def written(name: str, rows: list[submission.Answered], folder: Path) -> list[Any]:
    path = submission.write(name, rows, folder)
    assert path.name == submission.FILES[name][0]
    if path.suffix == ".tsv":
        with path.open(newline="") as file:
            return list(csv.reader(file, delimiter="\t"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_choice(example: Any) -> str:
    return example.choices[-1]


@pytest.mark.parametrize(
    ("name", "split", "label"),
    [
        ("super_glue/cb", "test", "neutral"),
        ("super_glue/copa", "test", 1),
        ("super_glue/wic", "test", "true"),
        ("super_glue/boolq", "validation", "true"),
        ("super_glue/rte", "validation", "not_entailment"),
    ],
)
def test_superglue_files_have_index_and_label(
    shared_data: Path, tmp_path: Path, name: str, split: str, label: Any
) -> None:
    rows = answered(name, split, shared_data, last_choice)
    found = written(name, rows, tmp_path)
    assert [row["idx"] for row in found] == [row["idx"] for row, _, _ in rows]
    assert {json.dumps(row["label"]) for row in found} == {json.dumps(label)}


@pytest.mark.parametrize(
    ("name", "label"), [("glue/sst2", "1"), ("glue/mrpc", "1"), ("glue/stsb", "2.600")], ids=lambda x: str(x)
)
def test_glue_files_have_a_header_and_numbered_rows(shared_data: Path, tmp_path: Path, name: str, label: str) -> None:
    say = (lambda example: "2.6") if name == "glue/stsb" else last_choice
    rows = answered(name, "test", shared_data, say)
    header, *found = written(name, rows, tmp_path)
    assert header == ["index", "prediction"]
    assert [int(number) for number, _ in found] == list(range(len(rows)))
    assert {said for _, said in found} == {label}


def test_wsc_says_whether_the_candidate_was_named(shared_data: Path, tmp_path: Path) -> None:
    for say, expected in (
        (lambda e: e.target, {"True"}),
        (lambda e: "nobody at all", {"False"}),
        (lambda e: "", {"False"}),
    ):
        rows = answered("super_glue/wsc", "test", shared_data, say)
        assert {row["label"] for row in written("super_glue/wsc", rows, tmp_path)} == expected


def test_multirc_is_nested_as_its_rows_are(shared_data: Path, tmp_path: Path) -> None:
    rows = answered("super_glue/multirc", "validation", shared_data, lambda e: e.target)
    for (row, _, _), found in zip(rows, written("super_glue/multirc", rows, tmp_path), strict=True):
        assert found["idx"] == row["idx"]
        for question, mine in zip(row["passage"]["questions"], found["passage"]["questions"], strict=True):
            assert mine["idx"] == question["idx"]
            assert mine["answers"] == [{"idx": a["idx"], "label": a["label"]} for a in question["answers"]]


def test_record_has_one_answer_for_each_query(shared_data: Path, tmp_path: Path) -> None:
    rows = answered("super_glue/record", "validation", shared_data, lambda e: e.target)
    found = written("super_glue/record", rows, tmp_path)
    queries = [query for row, _, _ in rows for query in row["qas"]]
    assert [row["idx"] for row in found] == [query["idx"] for query in queries]
    for row, query in zip(found, queries, strict=True):
        assert row["label"] in {answer["text"] for answer in query["answers"]}


def test_what_no_server_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="my/task is on no benchmark server"):
        submission.write("my/task", [], tmp_path)
    flat = ({"paragraph": "p", "idx": {"paragraph": 0, "question": 0, "answer": 0}}, [], ["True"])
    with pytest.raises(DataError, match="nested rows"):
        submission.write("super_glue/multirc", [flat], tmp_path)
    assert not list(tmp_path.iterdir())


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *arguments]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_gives_the_runs_own_scores(trained_run: Path, tmp_path: Path) -> None:
    tasks = ["my/larger", "embedded/nli"]
    done = job("--model", str(trained_run), "--tasks", *tasks, "--limit", "12", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    result = json.loads((trained_run / "result.json").read_text())
    assert scores == {task: pytest.approx(result["eval"][task]) for task in tasks}
    for task in tasks:
        assert task in done.stdout
    assert "mean score" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "my/large"), "Did you mean 'my/larger'"),
        (("--submission", "out"), "my/larger is on no benchmark server"),
        (("--tasks", "embedded/nli", "--split", "test"), "no split 'test'"),
    ],
)
def test_bad_arguments_are_refused(
    trained_run: Path, more: tuple[str, ...], message: str, job_here: Callable[..., Any]
) -> None:
    status, _, said = job_here("evaluate", "--model", str(trained_run), *more)
    assert status == 1
    assert message in said
