"""Versions of trained models in a real MLflow store."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from polyprompt import checkpoint, registry, tracking, tracking_store
from polyprompt.errors import ConfigError
from polyprompt.predictor import Predictor, find_bundle
from polyprompt.pyfunc import Model
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.run_folder import RUN

NAME = "my-tasks"


@pytest.fixture
def uri(store: Path) -> str:
    return f"sqlite:///{store}/mlflow.db"


@pytest.fixture
def recorded(trained_run: Path, uri: str, tmp_path: Path) -> Path:
    """A finished run that has its record in the store."""
    folder = tmp_path / "recorded"
    shutil.copytree(trained_run, folder)
    return in_store(folder, uri)


def in_store(folder: Path, uri: str) -> Path:
    config = check({**checkpoint.read(find_bundle(folder)).config.model_dump(mode="json"), "tracking": {"uri": uri}})
    handle = tracking.open_run(config, name="recorded", tags={})
    tracking.finish(handle, "FINISHED")
    record = json.loads((folder / RUN).read_text())
    (folder / RUN).write_text(json.dumps({**record, "run_id": handle.run_id}))
    return folder


def scored(folder: Path, target: Path, change: float) -> Path:
    """The same run with other scores."""
    shutil.copytree(folder, target)
    result = json.loads((target / "result.json").read_text())
    for values in result["eval"].values():
        values["score"] += change
    (target / "result.json").write_text(json.dumps(result))
    return target


def test_a_registered_model_answers_as_the_bundle_does(
    recorded: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    version = registry.register(recorded, NAME, uri)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@candidate")
    rows: list[dict[str, Any]] = [
        {"task": "my/larger", "text": "3 and 5"},
        {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
        {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
        {"task": "my/larger", "fields": json.dumps({"text": "3 and 5"})},
        {"task": "nobody"},
    ]
    found = model.predict(pd.DataFrame(rows))
    plain = [{key: value for key, value in row.items() if key != "fields"} for row in rows]
    expected = Predictor(find_bundle(recorded)).predict([*plain[:3], plain[0], plain[4]])
    for (_, line), answer in zip(found.iterrows(), expected, strict=True):
        assert line["prediction"] == answer.prediction
        assert bool(line["error"]) == bool(answer.error)
        assert json.loads(line["choice_scores"]) == pytest.approx(dict(answer.choice_scores), abs=1e-4)
        assert answer.error or line["score"] == pytest.approx(answer.score, abs=1e-4)
    generated = model.predict(pd.DataFrame(rows[:1]), params={"mode": "generate"})
    assert json.loads(generated["choice_scores"][0]) == {}
    assert version.number == "1"


def test_a_version_says_what_it_is(recorded: Path, uri: str) -> None:
    version = registry.register(recorded, NAME, uri)
    client = tracking_store.client_of(uri)
    tags = client.get_model_version(NAME, version.number).tags
    backbone = checkpoint.read(find_bundle(recorded)).backbone
    assert tags["polyprompt.backbone_sha256"] == backbone["sha256"]
    result = json.loads((recorded / "result.json").read_text())
    assert json.loads(tags[registry.SCORES]) == {task: values["score"] for task, values in result["eval"].items()}
    assert client.get_registered_model(NAME).aliases == {"candidate": int(version.number)}
    (model,) = client.search_logged_models(
        [client.get_run(json.loads((recorded / RUN).read_text())["run_id"]).info.experiment_id]
    )
    assert {metric.dataset_name for metric in model.metrics} == set(result["eval"])


def test_the_optimizer_is_left_out(recorded: Path, tmp_path: Path) -> None:
    bundle = find_bundle(recorded)
    slim = checkpoint.without_optimizer(bundle, tmp_path / "slim")
    assert not (slim / checkpoint.OPTIMIZER).exists()
    assert checkpoint.read(slim).tensors.keys() == checkpoint.read(bundle).tensors.keys()


def test_rows_of_any_kind_of_frame_are_answered(recorded: Path) -> None:
    rows = [
        {"task": "my/larger", "text": "3 and 5", "choices": pd.NA},
        {"task": "embedded/similarity", "input": "x", "choices": np.array(["a", "b"])},
    ]
    frame = pd.DataFrame(rows).astype({"text": "string", "input": "string"})
    answers = Model(find_bundle(recorded)).predict(frame)
    assert answers["error"].tolist() == ["", ""]
    assert list(json.loads(answers["choice_scores"][1])) == ["a", "b"]


def test_a_version_is_a_source_of_bundles(recorded: Path, uri: str) -> None:
    version = registry.register(recorded, NAME, uri)
    for source in (f"models:/{NAME}@candidate", version.uri, str(recorded), str(find_bundle(recorded))):
        with registry.opened(source, uri) as bundle:
            assert checkpoint.read(bundle).weights == checkpoint.read(find_bundle(recorded)).weights


def test_versions_that_are_not_there_are_named(recorded: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="models:/nobody@candidate is not in the registry"):
        registry.promote("nobody", uri)
    registry.register(recorded, NAME, uri)
    with pytest.raises(ConfigError, match="models:/my-tasks/7 is not in the registry"):
        registry.promote(NAME, uri, "7")
    with pytest.raises(ConfigError, match="expected models:/NAME"):
        registry.promote(NAME, uri, "newest")


def test_a_run_of_before_rows_were_noted_is_registered(recorded: Path, uri: str) -> None:
    record = json.loads((recorded / RUN).read_text())
    del record["rows"]
    (recorded / RUN).write_text(json.dumps(record))
    version = registry.register(recorded, NAME, uri)
    tags = tracking_store.client_of(uri).get_model_version(NAME, version.number).tags
    assert json.loads(tags[registry.DATA]) == record["data"]


def test_a_worse_version_does_not_become_champion(recorded: Path, uri: str, tmp_path: Path) -> None:
    first = registry.register(recorded, NAME, uri)
    assert registry.promote(NAME, uri) == first
    worse = registry.register(scored(recorded, tmp_path / "worse", -0.01), NAME, uri)
    with pytest.raises(ConfigError, match=r"version 2 of my-tasks scores worse than the champion, version 1: mean"):
        registry.promote(NAME, uri)
    assert tracking_store.client_of(uri).get_registered_model(NAME).aliases == {"candidate": 2, "champion": 1}
    better = registry.register(scored(recorded, tmp_path / "better", 0.01), NAME, uri)
    assert registry.promote(NAME, uri) == better
    with pytest.raises(ConfigError, match="scores worse"):
        registry.promote(NAME, uri, worse.number)
    registry.register(scored(recorded, tmp_path / "nothing", math.nan), NAME, uri)
    with pytest.raises(ConfigError, match="scores worse"):
        registry.promote(NAME, uri)


def test_scores_on_other_rows_do_not_compare(recorded: Path, uri: str, tmp_path: Path) -> None:
    registry.register(recorded, NAME, uri)
    registry.promote(NAME, uri)
    other = scored(recorded, tmp_path / "other", 0.1)
    record = json.loads((other / RUN).read_text())
    record["rows"]["embedded/nli"] = "0" * 20
    (other / RUN).write_text(json.dumps(record))
    registry.register(other, NAME, uri)
    with pytest.raises(ConfigError, match="not scored on the same rows of embedded/nli"):
        registry.promote(NAME, uri)


def test_a_champion_that_learnt_one_more_task_is_promoted(recorded: Path, uri: str, tmp_path: Path) -> None:
    registry.register(recorded, NAME, uri)
    registry.promote(NAME, uri)
    base = find_bundle(recorded)
    table = checkpoint.read(base).config.model_dump(mode="json")
    table["train"] |= {"max_steps": 2}
    table |= {"tracking": {"uri": uri}, "init": {"from": str(base), "new_tasks": ["embedded/wic"]}}
    run(check(table), out=tmp_path / "more", say=lambda line: None)
    version = registry.register(tmp_path / "more", NAME, uri)
    assert registry.promote(NAME, uri) == version
    # The other way round a task would be lost.
    with pytest.raises(
        ConfigError, match="version 1 of my-tasks does not know embedded/wic, which the champion serves"
    ):
        registry.promote(NAME, uri, "1")


def test_runs_that_cannot_be_registered(trained_run: Path, recorded: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="trained with tracking off"):
        registry.register(trained_run, NAME, uri)
    with pytest.raises(ConfigError, match="cannot be called 'a/b'"):
        registry.register(recorded, "a/b", uri)
    (recorded / "result.json").unlink()
    with pytest.raises(ConfigError, match="not of a finished run"):
        registry.register(recorded, NAME, uri)
