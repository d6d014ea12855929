"""result.json, the closing table, the plots, the CSV and the progress lines, read back and looked at."""

import csv
import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from polyprompt import report
from polyprompt.errors import DataError
from polyprompt.report import Progress
from polyprompt.result import RunResult, plain


def evaluation(step: int, nli: float, cola: float) -> dict[str, Any]:
    tasks = {
        "embedded/nli": {"accuracy": nli, "macro_f1": nli - 0.1, "score": nli - 0.05},
        "glue/cola": {"matthews": cola, "score": cola},
    }
    return {"step": step, "mean": (nli - 0.05 + cola) / 2, "tasks": tasks}


def made(num_evaluations: int = 3, **changes: Any) -> RunResult:
    evaluations = [evaluation(100 * k, 0.5 + 0.1 * k, 0.1 * k) for k in range(1, num_evaluations + 1)]
    last = evaluations[-1]
    result = RunResult(
        run_id="abc",
        name="trial",
        method="smop",
        backbone="embedded",
        num_trained_parameters=12_345,
        num_method_parameters=12_345,
        num_backbone_parameters=1_000_000,
        num_steps=100 * num_evaluations,
        num_workers=2,
        train_seconds=187.4,
        examples_per_second=123.4,
        tokens_per_second=4567.0,
        peak_memory_bytes=3 * 2**29,
        examples_seen={"embedded/nli": 60, "glue/cola": 40},
        sequence="5e9",
        loss_curve=[[step, 3.0 / step] for step in range(1, 101)],
        eval=last["tasks"],
        majority={"embedded/nli": 0.4, "glue/cola": 0.0},
        best_task_steps={"embedded/nli": 300, "glue/cola": 200},
        mean=last["mean"],
        best_step=last["step"],
        bundle="/runs/trial/step_300",
        last_bundle="/runs/trial/step_300",
        stopped_early=False,
        evaluations=evaluations,
        inference_flops=123_456,
    )
    return replace(result, **changes)


# --- result.json


def test_result_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    made().write(path)
    made(mean=0.5).write(path)
    assert RunResult.read(path) == made(mean=0.5)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    table = json.loads(path.read_text())
    assert table["eval"]["embedded/nli"]["score"] == pytest.approx(0.75)
    assert table["loss_curve"][0] == [1, 3.0]
    assert isinstance(RunResult.read(path).loss_curve[0][0], int)


def test_a_result_from_before_a_field_was_there_is_read(tmp_path: Path) -> None:
    table = asdict(made())
    del table["inference_flops"]
    (tmp_path / "result.json").write_text(json.dumps(table))
    assert RunResult.read(tmp_path / "result.json") == made(inference_flops=0)


def test_numbers_become_plain(tmp_path: Path) -> None:
    result = made(
        mean=np.float32(0.5),
        num_steps=np.int64(7),
        train_seconds=torch.tensor(0.25),
        bundle=Path("/runs/x"),
        stopped_early=np.bool_(True),
        loss_curve=[(np.int64(1), torch.tensor([2.0]))],
    )
    values = (result.mean, result.num_steps, result.train_seconds, result.bundle, result.stopped_early)
    assert [type(value) for value in values] == [float, int, float, str, bool]
    assert result.loss_curve == [[1, 2.0]]
    result.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == result


@pytest.mark.parametrize("value", [np.zeros(3), torch.zeros(2), object()])
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"eval\.embedded/nli\.score: (ndarray|Tensor|object) is not a plain number"):
        made(eval={"embedded/nli": {"score": value}})
    assert plain({"a": (1, None)}) == {"a": [1, None]}


def test_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    made(eval={"a/b": {"pearson": math.nan, "score": math.inf}}).write(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert all(math.isnan(v) for v in RunResult.read(path).eval["a/b"].values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "not a result of this version"),
        ({"num_steps": "many"}, "num_steps: Input should be a valid integer"),
        ({"eval": {"a/b": {"score": "high"}}}, r"eval\.a/b\.score: Input should be a valid number"),
        ({"extra": 1}, "extra: "),
    ],
)
def test_bad_result_files_are_named(tmp_path: Path, text: Any, message: str) -> None:
    path = tmp_path / "result.json"
    if isinstance(text, dict):
        text = json.dumps(asdict(made()) | text)
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        RunResult.read(path)
    assert str(path) in str(raised.value)


def test_every_field_is_required(tmp_path: Path) -> None:
    added_later = {"inference_flops", "router_collapse"}
    for field in (each for each in fields(RunResult) if each.name not in added_later):
        table = asdict(made())
        del table[field.name]
        (tmp_path / "result.json").write_text(json.dumps(table))
        with pytest.raises(DataError, match=f"{field.name}: "):
            RunResult.read(tmp_path / "result.json")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    made().write(path)
    bad = made(name="\ud800")
    with pytest.raises(UnicodeEncodeError):
        bad.write(path)
    assert RunResult.read(path) == made()
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


# --- the closing table and the CSV


def shown(result: RunResult, width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(result))
    console.file.close()
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_table_holds_the_numbers() -> None:
    lines = shown(made(best_step=200, stopped_early=True))
    assert "trial: smop on embedded" in lines
    assert "embedded/nli accuracy 0.800 0.750 0.400 +0.350" in lines
    assert "macro_f1 0.700" in lines
    assert "glue/cola matthews 0.300 0.300 0.000 +0.300" in lines
    assert "mean 0.525 0.200 +0.325" in lines
    assert "12,345 trained parameters (1.23% of the backbone's 1,000,000)" in lines
    assert "300 steps (stopped early) in 3 min 07 s on 2 workers" in lines
    assert "123.4 examples/s, 1.50 GiB at most" in lines
    assert "scores of step 200, the best of 3 evaluations" in lines


def test_table_without_a_baseline_or_workers() -> None:
    lines = shown(made(1, majority={"embedded/nli": 0.9}, num_workers=0, num_backbone_parameters=0, train_seconds=7300))
    assert "embedded/nli accuracy 0.600 0.550 0.900 -0.350" in lines
    assert "glue/cola matthews 0.100 0.100 - -" in lines
    assert "mean 0.325 - -" in lines
    assert "12,345 trained parameters" in lines
    assert any("2 h 01 min in one process" in line for line in lines)
    assert not any("evaluations" in line for line in lines)


def test_csv_holds_every_metric_exactly(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tasks.csv"
    result = made()
    report.per_task_csv(result, path)
    with path.open(newline="") as file:
        rows = {row.pop("task"): row for row in csv.DictReader(file)}
    assert list(rows) == ["embedded/nli", "glue/cola", "mean"]
    for task, metrics in result.eval.items():
        assert {k: float(v) for k, v in rows[task].items() if k in metrics} == metrics
        assert float(rows[task]["lift"]) == metrics["score"] - result.majority[task]
    assert rows["glue/cola"]["accuracy"] == ""
    assert [rows[task]["best_step"] for task in rows] == ["300", "200", "300"]
    assert float(rows["mean"]["score"]) == result.mean


# --- plots


def colours_in(path: Path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*value) for value, count in zip(values, counts, strict=True) if count > 100}


def test_plots_are_drawn(tmp_path: Path) -> None:
    before = matplotlib.get_backend(auto_select=False)
    loss, scores = report.plots(made(), tmp_path / "plots")
    assert (loss.name, scores.name) == ("loss.png", "scores.png")
    assert imread(loss).shape == (540, 960, 4)
    assert imread(scores).shape == (480, 1680, 4)
    assert report.COLOURS[0] in colours_in(loss)
    assert {report.COLOURS[0], report.COLOURS[1], "#333333"} <= colours_in(scores)
    assert matplotlib.get_backend(auto_select=False) == before


def test_one_evaluation_is_drawn_as_bars_alone(tmp_path: Path) -> None:
    scores = report.plots(made(1), tmp_path)[1]
    assert imread(scores).shape == (480, 960, 4)
    assert {report.COLOURS[0], report.COLOURS[1]} <= colours_in(scores)
    report.plots(made(1, majority={}), tmp_path)
    assert report.COLOURS[1] not in colours_in(scores)


def test_picture_grows_with_the_tasks_and_takes_odd_scores(tmp_path: Path) -> None:
    tasks = {f"group/task_{i}": {"score": s} for i, s in enumerate([-0.4, math.nan, *[0.5] * 20])}
    evaluations = [{"step": step, "mean": 0.4, "tasks": tasks} for step in (1, 2)]
    scores = report.plots(made(eval=tasks, evaluations=evaluations, majority={}), tmp_path)[1]
    assert imread(scores).shape[0] > 1000


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert report.plots(made(loss_curve=[], eval={}, evaluations=[]), tmp_path) == []


# --- progress


def printed(path: Path, *, terminal: bool = False, every_seconds: float = 60, start: int = 1) -> str:
    with path.open("w") as file:
        console = Console(file=file, force_terminal=terminal, width=100)
        with Progress(300, console=console, every_seconds=every_seconds) as progress:
            for step in range(start, 301):
                progress.update(step, 2.0 / step, 64.0)
    return path.read_text()


def test_progress_without_a_terminal_is_few_plain_lines(tmp_path: Path) -> None:
    first, last = printed(tmp_path / "out").splitlines()
    assert first == "step 1/300  loss 2.0000  64.0 examples/s"
    assert last == "step 300/300  loss 0.0067  64.0 examples/s  0 s left"
    assert len(printed(tmp_path / "out", every_seconds=0).splitlines()) == 300


def test_progress_that_never_began_is_silent(tmp_path: Path) -> None:
    assert printed(tmp_path / "out", start=301) == ""


def test_time_left_is_reckoned_from_where_a_run_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 1000, 2))
    monkeypatch.setattr(report.time, "monotonic", lambda: float(next(clock)))
    lines = printed(tmp_path / "out", every_seconds=0, start=270).splitlines()
    assert lines[0] == "step 270/300  loss 0.0074  64.0 examples/s"
    assert lines[1].endswith("58 s left")  # 29 steps of 2 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (187.4, "3 min 07 s"), (7300, "2 h 01 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert report._duration(seconds) == text


def test_progress_in_a_terminal_is_a_bar(tmp_path: Path) -> None:
    text = printed(tmp_path / "out", terminal=True)
    assert "300/300" in text
    assert "loss 0.0067" in text
    assert "━" in text
