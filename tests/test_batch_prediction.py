"""Files of rows, answered part by part."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyprompt import batch_prediction
from polyprompt.batch_prediction import Work, answer, cut, join, missing
from polyprompt.errors import ConfigError, DataError
from polyprompt.predictor import Predictor, find_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def predictor(trained_run: Path) -> Predictor:
    return Predictor(find_bundle(trained_run))


def lines(count: int) -> list[str]:
    """Rows of three tasks in turns; each seventh is no JSON and each tenth of no known task."""
    rows: list[Any] = []
    for i in range(count):
        if i % 7 == 3:
            rows.append("{broken")
        elif i % 10 == 5:
            rows.append(json.dumps({"task": "nobody", "text": "x"}))
        elif i % 2:
            rows.append(json.dumps({"task": "my/larger", "text": f"{i % 9} and {i % 5}"}))
        else:
            rows.append(json.dumps({"task": "embedded/nli", "input": f"nli premise: {i} hypothesis: {i // 2}"}))
    return rows


@pytest.fixture
def work(trained_run: Path, tmp_path: Path) -> Work:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines(23)) + "\n")
    return Work(find_bundle(trained_run), source, tmp_path / "out.jsonl", part_rows=5)


def answer_all(work: Work, predictor: Predictor) -> tuple[int, int]:
    num_parts = cut(work)
    for part in reversed(missing(work, num_parts)):
        answer(work, part, predictor, batch_size=4)
    return join(work, num_parts)


def test_answers_come_in_the_rows_order_with_errors_in_their_places(work: Work, predictor: Predictor) -> None:
    assert answer_all(work, predictor) == (23, 5)
    answers = [json.loads(line) for line in work.output.read_text().splitlines()]
    for i, (given, found) in enumerate(zip(lines(23), answers, strict=True)):
        if i % 7 == 3:
            assert f"in.jsonl:{i + 1}: not valid JSON" in found["error"]
        elif i % 10 == 5:
            assert "task 'nobody' is not one of this model's" in found["error"]
        else:
            (alone,) = predictor.predict([json.loads(given)])
            assert (found["task"], found["input"]) == (alone.task, alone.input)
            assert found["score"] == pytest.approx(alone.score, abs=1e-4)
            assert found["choice_scores"] == pytest.approx(dict(alone.choice_scores), abs=1e-4)
        assert (found["score"] is None) == bool(found["error"])
    assert not work.folder.exists()


def test_what_is_answered_is_not_answered_again(work: Work, predictor: Predictor) -> None:
    num_parts = cut(work)
    answer(work, 2, predictor, batch_size=4)
    mark = work.answers(2).stat().st_mtime_ns
    assert cut(work) == num_parts
    assert missing(work, num_parts) == [0, 1, 3, 4]
    for part in missing(work, num_parts):
        answer(work, part, predictor, batch_size=4)
    assert work.answers(2).stat().st_mtime_ns == mark
    assert join(work, num_parts)[0] == 23


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_format_holds_the_same(work: Work, predictor: Predictor, suffix: str) -> None:
    answer_all(work, predictor)
    expected = [json.loads(line) for line in work.output.read_text().splitlines()]
    other = Work(work.bundle, work.input, work.output.with_suffix(suffix), part_rows=5)
    answer_all(other, predictor)
    if suffix == ".csv":
        with other.output.open(newline="") as file:
            found: list[dict[str, Any]] = list(csv.DictReader(file))
        for row in found:
            row["choice_scores"] = json.loads(row["choice_scores"])
            row["score"] = float(row["score"]) if row["score"] else None
    else:
        found = pq.read_table(other.output).to_pylist()
        for row in found:
            row["choice_scores"] = dict(row["choice_scores"])
    assert found == expected


def test_csv_and_parquet_are_read(work: Work, predictor: Predictor, tmp_path: Path) -> None:
    table = tmp_path / "in.csv"
    table.write_text("task,text\nmy/larger,3 and 5\nmy/larger,7 and 2\n")
    from_csv = Work(work.bundle, table, tmp_path / "a.jsonl")
    assert answer_all(from_csv, predictor) == (2, 0)
    from_parquet = Work(work.bundle, tmp_path / "in.parquet", tmp_path / "b.jsonl")
    import pyarrow.csv

    pq.write_table(pyarrow.csv.read_csv(table), from_parquet.input)
    assert answer_all(from_parquet, predictor) == (2, 0)
    assert from_csv.output.read_text() == from_parquet.output.read_text()


def test_columns_of_other_tasks_stay_empty(work: Work, predictor: Predictor, tmp_path: Path) -> None:
    table = tmp_path / "mixed.csv"
    table.write_text(
        "task,text,premise,hypothesis,input\n"
        "my/larger,3 and 5,,,\n"
        "embedded/nli,,all poets ran,some poets ran,\n"
        "embedded/nli,,,,nli premise: all poets ran hypothesis: some poets ran\n"
    )
    mixed = Work(work.bundle, table, tmp_path / "a.jsonl")
    assert answer_all(mixed, predictor) == (3, 0)
    _, fields, text = (json.loads(line) for line in mixed.output.read_text().splitlines())
    assert fields["input"] == text["input"]
    timed = Work(work.bundle, tmp_path / "timed.parquet", tmp_path / "b.jsonl")
    rows = [{"task": "my/larger", "text": "3 and 5", "seen": datetime(2026, 1, 2)}, {"task": None, "text": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), timed.input)
    assert answer_all(timed, predictor) == (2, 1)


def test_no_row_stops_the_others(work: Work, predictor: Predictor) -> None:
    """What a line can hold that JSON, tokenizers or files do not take."""
    good = {"task": "my/larger", "text": "3 and 5\u2028\x85\u2029"}
    rows = [
        json.dumps(good),
        json.dumps({"task": "my/larger", "text": "x\ud800"}),
        json.dumps({"task": ["my/larger"], "text": "1"}),
        json.dumps({"task": "embedded/similarity", "input": "x", "choices": 5}),
        json.dumps({"error": 5}),
        "[" * 100_000,
        '{"task": "my/larger", "text": %s}' % ("1" * 5000),
        json.dumps(good, ensure_ascii=False),
    ]
    work.input.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert answer_all(replace(work, output=work.output.with_suffix(suffix)), predictor) == (8, 6)
    with work.output.open(encoding="utf-8", newline="\n") as file:
        first, *others, last = map(json.loads, file)
    assert first["input"] == last["input"] == "compare: 3 and 5\u2028\x85\u2029"
    assert all(row["error"] for row in others)
    assert f"{work.input}:2: the row holds half of a surrogate pair" in others[0]["error"]


def test_other_work_in_the_same_place_is_refused(work: Work) -> None:
    cut(work)
    with pytest.raises(ConfigError, match=r"parts of another mode, part_rows than"):
        cut(Work(work.bundle, work.input, work.output, mode="generate", part_rows=6))
    work.input.write_text("{}\n")
    with pytest.raises(ConfigError, match="parts of another input than"):
        cut(work)


def test_bad_files_are_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.txt: unknown file type; expected one of \.jsonl, \.csv, \.parquet"):
        cut(Work(work.bundle, work.input, tmp_path / "out.txt"))
    with pytest.raises(ConfigError, match="is a folder or the input itself"):
        cut(Work(work.bundle, work.input, work.input))
    with pytest.raises(DataError, match="does not exist"):
        cut(Work(work.bundle, tmp_path / "absent.jsonl", work.output))
    work.input.write_text("")
    with pytest.raises(DataError, match="the file has no rows"):
        cut(work)


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), *arguments]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command(work: Work, trained_run: Path) -> None:
    arguments = ["--model", str(trained_run), "--input", str(work.input), "--output", str(work.output)]
    done = job(*arguments, "--part-rows", "5")
    assert done.returncode == 0, done.stderr
    assert "part 5/5" in done.stdout
    assert "23 rows are in" in done.stdout
    assert "5 of them have an error" in done.stdout


def test_mistakes_are_one_clear_line(work: Work, trained_run: Path, job_here: Callable[..., Any]) -> None:
    files = ["--input", str(work.input), "--output", str(work.output)]
    for arguments, expected, message in (
        (["--model", str(work.input.parent)], 1, "holds no trained model"),
        (["--model", "models:/nobody"], 1, "names no version"),
        (["--model", str(trained_run), "--part-rows", "0"], 2, "argument --part-rows: 0: expected at least 1"),
        (["--model", str(trained_run), "--workers", "-1"], 2, "--workers -1: expected 0 or more"),
    ):
        status, _, said = job_here("predict", *arguments, *files)
        assert (status, message in said) == (expected, True), said
    assert not work.folder.exists()


def test_two_do_not_answer_into_one_output(work: Work, trained_run: Path, job_here: Callable[..., Any]) -> None:
    arguments = ["--model", str(trained_run), "--input", str(work.input), "--output", str(work.output)]
    with batch_prediction.claim(work):
        status, _, said = job_here("predict", *arguments)
    assert (status, "another process answers into it now" in said) == (1, True), said
    assert not work.folder.exists()
    assert job_here("predict", *arguments)[0] == 0


@pytest.mark.ray
@pytest.mark.own_processes
def test_workers_give_the_same(work: Work, trained_run: Path, predictor: Predictor) -> None:
    answer_all(work, predictor)
    there = work.output.with_name("there.jsonl")
    arguments = ["--model", str(trained_run), "--input", str(work.input), "--output", str(there)]
    done = job(*arguments, "--part-rows", "5", "--workers", "2")
    assert done.returncode == 0, done.stderr
    here = [json.loads(line) for line in work.output.read_text().splitlines()]
    for row, other in zip(here, map(json.loads, there.read_text().splitlines()), strict=True):
        assert row["prediction"] == other["prediction"]
        assert row["score"] == other["score"] or row["score"] == pytest.approx(other["score"], abs=1e-4)
    assert not batch_prediction.Work(work.bundle, work.input, there).folder.exists()
