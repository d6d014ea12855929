"""Tables of experiments and of floors, as a user makes them."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fault_drill import until

from polyprompt import checkpoint
from polyprompt.errors import ConfigError, TrainingError
from polyprompt.recipe import load
from polyprompt.result import RunResult

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "jobs" / "tables").glob("*.yaml"))
Table = dict[str, Any]


def script(name: str) -> ModuleType:
    """Import a job as a module; jobs/ is no package."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def experiments(small_run: Table, tmp_path: Path) -> Path:
    small_run["train"] |= {"max_steps": 2}
    small_run["evaluate"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_run))
    rows = {"HyperPrompt": [], "plain (full)": ["method=full"]}
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "seeds": [0, 1], "rows": rows}))
    return path


@pytest.mark.slow
def test_a_table_has_every_seed_and_runs_none_twice(experiments: Path, tmp_path: Path) -> None:
    done = job("table", str(experiments), "train.logging_steps=2", "--out", "out", "--at-once", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [
        [RunResult.read(tmp_path / "out" / label / str(seed) / "result.json") for seed in (0, 1)]
        for label in ("HyperPrompt", "plain_full")
    ]
    assert results[0][0].loss_curve != results[0][1].loss_curve
    with (tmp_path / "out" / "table.csv").open() as file:
        heading, majority, *rows = csv.reader(file)
    assert heading[:5] == ["", "mean", "larger", "nli", "similarity"]
    assert majority[0] == "majority"
    for row, runs in zip(rows, results, strict=True):
        mean, spread = (float(part) for part in row[1].split(" ± "))
        assert mean == pytest.approx((runs[0].mean + runs[1].mean) / 2, abs=6e-4)
        assert spread == pytest.approx(abs(runs[0].mean - runs[1].mean) / 2**0.5, abs=6e-4)
    assert (tmp_path / "out" / "table.md").read_text() in done.stdout
    written = (tmp_path / "out" / "plain_full" / "1" / "result.json").stat().st_mtime_ns
    again = job("table", str(experiments), "train.logging_steps=2", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "out" / "plain_full" / "1" / "result.json").stat().st_mtime_ns == written


def test_a_row_may_build_on_an_earlier_rows_run(experiments: Path) -> None:
    given = {**yaml.safe_load(experiments.read_text()), "rows": {"attempt": ["method.sources=[{out}/tuned/{seed}/x]"]}}
    table = script("table").Experiments.model_validate(given)
    assert table.overrides("attempt", 1, Path("build/t")) == ["method.sources=[build/t/tuned/1/x]"]


def test_a_faulty_row_is_refused_before_the_first_run(experiments: Path, tmp_path: Path) -> None:
    table = script("table")
    broken = yaml.safe_load(experiments.read_text())
    broken["rows"]["wrong"] = ["trian.max_steps=1"]
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        table.run(table.Experiments.model_validate(broken), [], tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    experiments.write_text("recipe: a.yaml\nseeds: []\nrow: {}\n")
    with pytest.raises(ConfigError, match=r"seeds: .*rows: .*row: "):
        table.read(experiments)


@pytest.mark.slow
def test_a_failed_run_names_its_log(experiments: Path, tmp_path: Path) -> None:
    table = script("table")
    overrides = ["train.learning_rate=1e30", "train.max_grad_norm=null"]
    with pytest.raises(TrainingError, match=r"HyperPrompt, seed 0, ended with status 1; see .*0\.log"):
        table.run(table.read(experiments), overrides, tmp_path / "out", 1)


@pytest.mark.slow
def test_sigterm_reaches_the_run_under_way(experiments: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "jobs" / "table.py"),
        str(experiments),
        "train.max_steps=100000",
        "--out",
        "out",
    ]
    table = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    run = tmp_path / "out" / "HyperPrompt" / "0"
    until(lambda: (run / "progress.json").exists() or table.poll() is not None)
    table.terminate()
    _, said = table.communicate()
    assert table.returncode == 143, said
    assert "SIGTERM ended the table; the same command goes on" in said
    [bundle] = checkpoint.bundles(run / "bundles")
    checkpoint.verify(bundle)
    assert not (tmp_path / "out" / "HyperPrompt" / "1").exists()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_that_ships_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = script("table").read(path)
    for label in table.rows:
        load([table.recipe], table.overrides(label, table.seeds[0], Path("out")))


def test_floors_are_those_of_the_run_and_of_a_linear_model(small_run: Table, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_run))
    done = job("floors", "recipe.yaml", "tasks=[embedded/boolq, embedded/copa]", "--zero-shot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split("│")[1].strip(): line.split("│")[2:5] for line in done.stdout.splitlines() if "│" in line}
    assert float(lines["embedded/boolq"][0]) == pytest.approx(0.5, abs=0.2)
    untrained = [float(lines[task][2]) for task in ("embedded/boolq", "embedded/copa", "mean")]
    assert sum(untrained[:2]) / 2 == pytest.approx(untrained[2], abs=1e-3)
    assert set(lines) == {"embedded/boolq", "embedded/copa", "mean"}
    wrong = job("floors", "recipe.yaml", "tasks=[embedded/bolq]", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "Did you mean 'embedded/boolq'" in wrong.stderr


def test_the_bag_of_words_learns_words_and_numbers() -> None:
    from polyprompt.tasks.records import Example

    floors = script("floors")
    texts = [f"the {word} day" for word in ("good", "bad", "fine", "poor")] * 4
    labels = [Example(text, "yes" if text.split()[1] in ("good", "fine") else "no") for text in texts]
    assert floors.bag_of_words(labels, labels) == [example.target for example in labels]
    numbers = [Example(text, "", value=float("good" in text)) for text in texts]
    predicted = [float(value) for value in floors.bag_of_words(numbers, numbers)]
    assert min(p for p, e in zip(predicted, numbers, strict=True) if e.value) > 0.5
