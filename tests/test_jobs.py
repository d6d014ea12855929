"""The command line, as a user types it, and every recipe that ships."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyprompt.ray_train import run
from polyprompt.recipe import load

ROOT = Path(__file__).parents[1]
JOB = ROOT / "jobs" / "multitask.py"
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
#: These read what jobs/make_skills.py writes, which takes minutes; tests/test_pretrain.py trains on text.
PRETRAINING = ("pretrain_embedded", "pretrain_embedded_first")
Table = dict[str, Any]


def job(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(JOB), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(small_run: Table, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem not in PRETRAINING], ids=lambda path: path.stem)
def test_every_recipe_takes_a_step(
    path: Path, tiny_t5: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # recipes name ../shared/data
    overrides = [
        f"backbone.name={tiny_t5}",
        f"data.root={shared_data}",
        f"data.cache_dir={tiny_t5.parent / 'cache'}",
        "data.max_input_tokens=48",
        "data.max_train_examples=8",
        "data.max_validation_examples=4",
        "train.max_steps=1",
        "train.batch_size=16",
        "compute.num_workers=0",
        "compute.use_gpu=false",
        "tracking.enabled=false",
    ]
    config = load([path], overrides)
    monkeypatch.chdir(tmp_path)
    result = run(config, say=lambda line: None)
    assert result.num_steps == 1
    assert set(result.eval) == set(config.task_names)
    assert sum(result.examples_seen.values()) == 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_as_it_stands(path: Path) -> None:
    assert load([path]).tracking.enabled


@pytest.mark.slow
def test_a_run_from_the_command_line(recipe: Path, tmp_path: Path) -> None:
    done = job(str(recipe), "train.max_steps=4", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("step 4/4", "examples/s", "my/larger", "macro_f1", "Majority", "mean", "trained parameters"):
        assert part in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["eval"]["my/larger"]["score"] >= 0
    again = job(str(recipe), "train.max_steps=4", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0
    assert "has finished" in again.stdout


@pytest.mark.slow
def test_a_dry_run_shows_everything_and_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    done = job(str(recipe), "--out", "out", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("encoder_length: 3", "my/larger", "Parameters", "trained", "Memory of one worker", "Workers: none"):
        assert part in done.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian.max_steps=3"], "trian: unknown key. Did you mean 'train'"),
        (["tasks=[super_glue/rteee]"], "Did you mean"),
        (["missing.yaml"], "recipe missing.yaml does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(recipe: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = job(str(recipe), *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
