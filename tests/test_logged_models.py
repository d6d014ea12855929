"""Kept checkpoints as LoggedModels with scores tied to data, and runs that register themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from polyprompt import checkpoint, logged_models
from polyprompt.errors import ConfigError
from polyprompt.loop import TrainState
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.run_folder import RESULT
from polyprompt.study_tracking import PARENT

Table = dict[str, Any]


@pytest.fixture
def tracked(small_run: Table, store: Path) -> Table:
    small_run["tracking"] = {"uri": f"sqlite:///{store}/mlflow.db", "experiment": "support: all/1"}
    return small_run


def models(client: MlflowClient, run_id: str) -> list[Any]:
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"))


def test_each_kept_checkpoint_is_a_model_with_scores_on_its_data(tracked: Table, tmp_path: Path) -> None:
    result = run(check(tracked), out=tmp_path / "out", say=lambda line: None)
    client = MlflowClient(tracked["tracking"]["uri"])
    found = models(client, result.run_id)
    bundles = checkpoint.bundles(tmp_path / "out" / "bundles")
    assert sorted(model.name for model in found) == [bundle.name for bundle in bundles]
    evaluations = {checkpoint.folder_name(e["step"]): e["tasks"] for e in result.evaluations}
    inputs = client.get_run(result.run_id).inputs.dataset_inputs
    rows = {(i.dataset.name, i.dataset.digest) for i in inputs if i.tags[0].value == "validation"}
    for model in found:
        assert model.status == "READY"
        assert Path(model.tags[logged_models.BUNDLE]).name == model.name
        values = {(metric.dataset_name, metric.key): metric.value for metric in model.metrics or ()}
        assert values == {
            (task, f"eval/{task}/{name}"): pytest.approx(value)
            for task, scores in evaluations.get(model.name, {}).items()
            for name, value in scores.items()
        }
        linked = {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics or ()}
        assert linked == (rows if model.name in evaluations else set())
    (best,) = (model for model in found if "best mean" in model.tags[logged_models.KEPT_AS])
    assert best.name == Path(result.bundle).name
    # The run's own curves have no point twice.
    steps = [point.step for point in client.get_metric_history(result.run_id, "eval/my/larger/score")]
    assert steps == [4, 8, 12]


def test_a_run_registers_itself_as_the_candidate(tracked: Table, tmp_path: Path) -> None:
    tracked["tracking"]["register"] = True
    said: list[str] = []
    result = run(check(tracked), out=tmp_path / "out", say=said.append)
    client = MlflowClient(tracked["tracking"]["uri"])
    version = client.get_model_version_by_alias("support- all-1", "candidate")
    assert version.run_id == result.run_id
    assert said[-1] == "models:/support- all-1/1 is the candidate: models:/support- all-1@candidate"
    # A search registers its best run itself.
    tracked["train"]["seed"] = 1
    run(check(tracked), out=tmp_path / "trial", say=said.append, tags={PARENT: result.run_id})
    assert len(client.search_model_versions("name = 'support- all-1'")) == 1


def test_a_run_that_cannot_be_registered_is_finished_still(tracked: Table, tmp_path: Path) -> None:
    tracked["tracking"]["register"] = "support"
    (tmp_path / "mlartifacts").write_text("a file where the artifacts' folder would be")
    said: list[str] = []
    result = run(check(tracked), out=tmp_path / "out", say=said.append)
    assert (tmp_path / "out" / RESULT).is_file()
    client = MlflowClient(tracked["tracking"]["uri"])
    assert client.get_run(result.run_id).info.status == "FINISHED"
    assert "has finished, but was not registered: tracking store" in said[-1]
    assert f"python jobs/register.py {tmp_path / 'out'} --name 'support'" in said[-1]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        ({"register": True, "enabled": False}, r"tracking\.register=True needs tracking\.enabled=true"),
        ({"register": "a/b"}, r"tracking\.register"),
    ],
    ids=["off", "name"],
)
def test_what_cannot_be_registered_is_refused_at_once(tracking: Table, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check({"tasks": ["embedded/nli"], "tracking": tracking})


def test_a_checkpoint_says_why_it_is_kept() -> None:
    state = TrainState(step=6)
    for step, one, other in ((2, 0.9, 0.1), (4, 0.5, 0.8), (6, 0.4, 0.6)):
        state.step = step
        state.take_scores({"a": {"score": one}, "b": {"score": other}})
    folders = [Path(checkpoint.folder_name(step)) for step in (2, 4, 5, 6)]
    found = logged_models.kept(state, folders)
    assert [c.kept_as for c in found] == ["best of a", "best mean, best of b", "newest", "newest"]
    assert found[2].scores == {}
    assert json.loads(json.dumps(found[1].scores)) == {"a": {"score": 0.5}, "b": {"score": 0.8}}
