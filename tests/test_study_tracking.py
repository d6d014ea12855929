"""A study in MLflow: two levels, nothing twice, the best one registered. Stores are real sqlite files."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
from mlflow import MlflowClient
from studies import KEYS, hyperprompt, smop, study, trial
from test_report import made as result

from polyprompt import study_tracking, tracking_store
from polyprompt.config import RunConfig, TrackingConfig
from polyprompt.errors import TrackingError
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.study_tracking import child_tags, close_study, model_name, open_study
from polyprompt.tracking import finish, open_run
from polyprompt.tracking_opening import RunHandle
from tuning import study_report
from tuning.study import Study, Trial

CONFIG = TrackingConfig()
PARAMS = [smop(1e-4, 2, 1), smop(3e-2, 10, 10), hyperprompt(1e-3, 4), hyperprompt(5e-3, 16, "encoder")]
SCORES = [0.7, 0.3, 0.9, 0.8]


def config_of(params: dict[str, Any]) -> RunConfig:
    table: dict[str, Any] = {"tasks": ["embedded/nli"]}
    for key, value in params.items():
        section, name = key.split(".")
        table.setdefault(section, {})[name] = value
    return check(table)


def run_folder(folder: Path, number: int, score: float) -> Path:
    """What a finished run leaves: result.json and the bundle that it names."""
    place = folder / f"trial_{number}"
    bundle = place / "bundles" / "step_00000400"
    bundle.mkdir(parents=True)
    (bundle / "adapter_model.safetensors").write_bytes(bytes([number] * 64))
    (bundle / "manifest.json").write_text("{}")
    result(mean=score, bundle=str(bundle)).write(place / "result.json")
    return place


def searched(store: Path, *, seeds: int = 1) -> tuple[RunHandle, Study]:
    """A study of four trials, the second stopped as its process was killed, in the store and in folders."""
    empty = study([])
    parent = open_study(CONFIG, empty)
    trials: list[Trial] = []
    for number, (params, score) in enumerate(zip(PARAMS, SCORES, strict=True)):
        handles = []
        for seed in range(1, seeds + 1):
            tags = child_tags(parent, trial=number, seed=seed)
            handles.append(open_run(config_of(params), name=f"trial_{number}", tags=tags))
            if number != 1:
                finish(handles[-1], "FINISHED", metrics={"eval/mean": score})
        state = "stopped" if number == 1 else "finished"
        ids = [handle.run_id for handle in handles]
        place = run_folder(store, number, score)
        scores = [score] * seeds
        cause = "asha" if state == "stopped" else ""
        trials.append(trial(number, params, *scores, state=state, cause=cause, run_ids=ids, folder=place))
    return parent, replace(empty, trials=trials, parent_run_id=parent.run_id)


def close(parent: RunHandle, made: Study, folder: Path, status: study_tracking.Status = "FINISHED") -> bool:
    """Close the study as a search does, with its report in a folder."""
    study_report.write(made, folder)
    made.write(folder / "study.json")
    return close_study(parent, made, folder, status)


def client_of(parent: RunHandle) -> MlflowClient:
    return MlflowClient(tracking_uri=parent.uri)


def children(parent: RunHandle) -> Sequence[Any]:
    where = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    return client_of(parent).search_runs([parent.experiment_id], where)


# --- the tree


def test_children_are_the_trials_with_their_searched_keys(store: Path) -> None:
    parent, made = searched(store)
    assert close(parent, made, store / "out")
    by_number = {int(run.data.tags["polyprompt.trial"]): run for run in children(parent)}
    assert sorted(by_number) == [0, 1, 2, 3]
    for number, params in enumerate(PARAMS):
        found = by_number[number].data.params
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
        assert {key: found[key] for key in KEYS if key in found} == texts
    assert by_number[1].info.status == "KILLED"
    assert by_number[1].data.tags["polyprompt.state"] == "stopped"
    assert by_number[1].data.tags["polyprompt.cause"] == "asha"
    assert {by_number[n].info.status for n in (0, 2, 3)} == {"FINISHED"}
    metrics = by_number[2].data.metrics
    assert (metrics["objective/eval/mean"], metrics["num_trained_parameters"]) == (0.9, 1000.0)
    assert metrics["inference_flops"] == 1e6 + 2000


def test_parent_holds_what_a_person_decides_from(store: Path) -> None:
    parent, made = searched(store)
    assert close(parent, made, store / "out")
    client, run = client_of(parent), client_of(parent).get_run(parent.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "methods")
    assert run.data.metrics == {"num_finished": 3, "num_stopped": 1, "num_failed": 0, "best/eval/mean": 0.9}
    assert json.loads(run.data.tags["polyprompt.keys"]) == KEYS
    assert "mlflow.parentRunId" not in run.data.tags
    assert "| 1 | 2 | finished | hyperprompt |" in run.data.tags["mlflow.note.content"]
    names = {file.path for file in client.list_artifacts(parent.run_id)}
    assert names == {"study.json", "leaderboard.csv", "leaderboard.md", "best.yaml", "plots"}
    plots = {Path(file.path).name for file in client.list_artifacts(parent.run_id, "plots")}
    assert plots == {
        f"{name}.png" for name in ("parameters", "front_parameters", "front_flops", "importances", "curves")
    }
    uri = f"{run.info.artifact_uri}/best.yaml"
    assert Path(mlflow.artifacts.download_artifacts(uri)).read_text() == (store / "out" / "best.yaml").read_text()


def test_several_seeds_stay_on_the_second_level(store: Path) -> None:
    parent, made = searched(store, seeds=2)
    assert close_study(parent, made, store / "out", "FINISHED")
    seen = sorted((run.data.tags["polyprompt.trial"], run.data.tags["polyprompt.seed"]) for run in children(parent))
    assert seen == [(str(number), str(seed)) for number in range(4) for seed in (1, 2)]


def test_a_key_inside_a_table_is_a_param_of_its_own(store: Path) -> None:
    parent, made = searched(store)
    inside = {**PARAMS[0], "train.group_learning_rates.prompt": 0.3}
    trials = [replace(made.trials[0], params=inside), *made.trials[1:]]
    assert close_study(parent, replace(made, trials=trials), store / "out", "FINISHED")
    params = {run.data.tags["polyprompt.trial"]: run.data.params for run in children(parent)}
    assert params["0"]["train.group_learning_rates.prompt"] == "0.3"
    assert "train.group_learning_rates.prompt" not in params["1"]


def test_a_deleted_child_does_not_hold_up_the_rest(store: Path) -> None:
    parent, made = searched(store)
    client_of(parent).delete_run(made.trials[0].runs[0].run_id)
    assert close_study(parent, made, store / "out", "FINISHED")
    assert len(children(parent)) == 3


def test_a_long_leaderboard_is_cut_in_the_note_only(store: Path) -> None:
    parent, made = searched(store)
    many = [trial(number, smop(), 0.1 + number / 1000) for number in range(4, 104)]
    assert close(parent, replace(made, trials=[*made.trials, *many]), store / "out")
    note = client_of(parent).get_run(parent.run_id).data.tags["mlflow.note.content"]
    assert len(note) <= tracking_store.MAX_TAG_CHARACTERS
    assert note.endswith("The artifact leaderboard.md has all trials.\n")
    assert "| 1 | 2 | finished" in note


# --- resume


def test_opened_again_it_is_the_same_run(store: Path) -> None:
    parent, made = searched(store)
    assert close_study(parent, made, store / "out", "KILLED")
    assert client_of(parent).get_run(parent.run_id).info.status == "KILLED"
    again = open_study(CONFIG, made)
    assert (again.run_id, again.experiment_id) == (parent.run_id, parent.experiment_id)
    assert client_of(parent).get_run(parent.run_id).info.status == "RUNNING"
    assert len(client_of(parent).search_runs([parent.experiment_id])) == 5


def test_closed_again_nothing_is_there_twice(store: Path) -> None:
    parent, made = searched(store)
    half = replace(made, trials=made.trials[:2])
    assert close_study(parent, half, store / "out", "KILLED")
    assert close_study(parent, made, store / "out", "FINISHED")
    assert close_study(parent, made, store / "out", "FINISHED")
    client = client_of(parent)
    assert client.get_run(parent.run_id).data.metrics["best/eval/mean"] == 0.9
    assert [point.value for point in client.get_metric_history(parent.run_id, "best/eval/mean")] == [0.7, 0.9]
    history = client.get_metric_history(made.trials[2].runs[0].run_id, "num_trained_parameters")
    assert len(history) == 1
    assert [(v.version, v.run_id) for v in versions(parent)] == [
        (version, made.trials[number].runs[0].run_id) for version, number in ((2, 2), (1, 0))
    ]


def test_a_lost_parent_is_named(store: Path) -> None:
    parent, made = searched(store)
    client_of(parent).delete_run(parent.run_id)
    with pytest.raises(TrackingError, match=f"run {parent.run_id} was deleted; `mlflow runs restore"):
        open_study(CONFIG, made)
    with pytest.raises(TrackingError, match="has no run 0123"):
        open_study(CONFIG, replace(made, parent_run_id="0123"))


def test_a_store_that_cannot_be_used_is_refused_at_once(store: Path) -> None:
    (store / "mlflow.db").write_text("no database")
    with pytest.raises(TrackingError, match="cannot be used"):
        open_study(CONFIG, study([]))


def test_a_store_that_is_gone_at_the_end_only_warns(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent, made = searched(store)
    (store / "mlflow.db").unlink()
    with caplog.at_level(logging.WARNING):
        assert not close(parent, made, store / "out")
    assert "did not take the study methods" in caplog.text
    assert (store / "out" / "leaderboard.csv").exists()


# --- the candidate


def versions(parent: RunHandle) -> list[Any]:
    return list(client_of(parent).search_model_versions("name = 'methods'"))


def test_the_best_bundle_is_the_candidate(store: Path) -> None:
    parent, made = searched(store)
    assert close_study(parent, made, store / "out", "FINISHED")
    version = client_of(parent).get_model_version_by_alias("methods", "candidate")
    best = made.trials[2].runs[0]
    assert version.run_id == best.run_id
    assert version.status == "READY"
    assert "eval/mean 0.9" in version.description
    got = Path(mlflow.artifacts.download_artifacts("models:/methods@candidate", tracking_uri=parent.uri))
    kept = Path(RunResult.read(Path(best.folder) / "result.json").bundle)
    assert {file.name: file.read_bytes() for file in got.iterdir()} == {f.name: f.read_bytes() for f in kept.iterdir()}


def test_the_alias_follows_a_better_trial_and_comes_back(store: Path) -> None:
    parent, made = searched(store)
    assert close_study(parent, replace(made, trials=made.trials[:1]), store / "out", "FINISHED")
    assert close_study(parent, made, store / "out", "FINISHED")
    client = client_of(parent)
    assert client.get_model_version_by_alias("methods", "candidate").run_id == made.trials[2].runs[0].run_id
    assert close_study(parent, replace(made, trials=made.trials[:1]), store / "out", "FINISHED")
    assert client.get_model_version_by_alias("methods", "candidate").run_id == made.trials[0].runs[0].run_id
    assert len(versions(parent)) == 2


def test_without_a_bundle_there_is_a_warning_and_no_candidate(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent, made = searched(store)
    shutil.rmtree(store / "trial_2" / "bundles")
    with caplog.at_level(logging.WARNING):
        assert close_study(parent, made, store / "out", "FINISHED")
    assert "trial 2, the best, is not registered as candidate: its bundle" in caplog.text
    assert versions(parent) == []
    assert client_of(parent).get_run(parent.run_id).info.status == "FINISHED"


def test_nothing_finished_nothing_registered(store: Path) -> None:
    parent, made = searched(store)
    assert close_study(parent, replace(made, trials=made.trials[1:2]), store / "out", "FAILED")
    assert client_of(parent).get_run(parent.run_id).info.status == "FAILED"
    assert client_of(parent).search_registered_models() == []


def test_model_names_are_what_mlflow_takes() -> None:
    assert model_name("smop/k:l 'x'") == "smop_k_l _x_"
    assert model_name("smop_prompts-2.1") == "smop_prompts-2.1"
