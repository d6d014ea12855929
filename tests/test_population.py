"""Population based training: real Ray Tune with a stand-in for the training, and the training itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from mlflow import MlflowClient
from test_search import ROOT, go, nothing_left, search_of

from polyprompt import checkpoint
from polyprompt.result import RunResult
from tuning.spaces import Params, Search
from tuning.study import Change, SeedRun, Study, Trial
from tuning.study_report import best_recipe, leaderboard
from tuning.trial import Trials, Values, metrics
from tuning.work import STEP, PausedError, Report, TrainTrial

Table = dict[str, Any]
RATE = "train.learning_rate"


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A trial tells its process of the study's tracking store; here that process goes on with other tests."""
    with patch.dict(os.environ):
        yield


def changed() -> Study:
    """Trial 0 went on from 1 at step 8 and from 2 at step 12; 1 had gone on from 2 at step 4."""
    run = SeedRun(42, state="finished", num_steps=16, metrics={"eval/mean": 0.5}, curve=[(16, 0.5)])
    zero = [Change(8, 1, {RATE: 1e-3}, {RATE: 3e-3}), Change(12, 2, {RATE: 3e-3}, {RATE: 4e-3})]
    return Study(
        "test", {"tasks": ["embedded/nli"]}, [RATE], [search_of({"tasks": ["embedded/nli"]}, space={
            RATE: {"choice": [1]}}, searcher="grid").objectives[0]], "random", "pbt", 0,
        [
            Trial(0, {RATE: 4e-3}, [run], zero),
            Trial(1, {RATE: 2e-3}, [run], [Change(4, 2, {RATE: 1e-2}, {RATE: 2e-3})]),
            Trial(2, {RATE: 5e-3}, [run]),
        ],
    )  # fmt: skip


def test_the_schedule_of_a_trial_follows_its_weights() -> None:
    study = changed()
    zero, one, two = study.trials
    assert [(s.step, s.number, s.params[RATE]) for s in study.schedule(zero)] == [(0, 2, 5e-3), (12, 0, 4e-3)]
    assert [(s.step, s.number, s.params[RATE]) for s in study.schedule(one)] == [(0, 2, 5e-3), (4, 1, 2e-3)]
    assert [(s.step, s.number, s.params[RATE]) for s in study.schedule(two)] == [(0, 2, 5e-3)]
    assert [zero.params_after(n)[RATE] for n in range(3)] == [1e-3, 3e-3, 4e-3]


def test_changes_are_told() -> None:
    study = changed()
    row = leaderboard(study)[0]
    assert row["changes"] == (
        "went on from trial 1 at step 8: train.learning_rate 0.001 → 0.003; "
        "went on from trial 2 at step 12: train.learning_rate 0.003 → 0.004"
    )
    header = best_recipe(study).partition("python jobs")[0]
    assert "rerun they score something else" in header
    assert "from step 0 on trial 2: train.learning_rate=0.005" in header
    assert "from step 12 on trial 0: train.learning_rate=0.004" in header


# --- without Ray: what happens in the folders


def store(tmp_path: Path) -> Table:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return {"uri": uri, "experiment": "test", "system_metrics_interval_seconds": None}


@pytest.mark.slow
def test_a_trial_pauses_and_goes_on_from_another(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"max_steps": 12, "learning_rate": 1e-3}
    small_run["tracking"] = store(tmp_path)
    trials = Trials(tmp_path / "trials", "test", small_run, [42], "eval/mean")
    parent_params: Params = {RATE: 1e-2, "backbone.dropout": 0.0}
    from polyprompt import study_tracking, tracking
    from polyprompt.recipe import check

    search = pbt(small_run)
    study = Study("test", search.base, search.keys, search.objectives, "random", "pbt", 0, [])
    parent = study_tracking.open_study(check(small_run).tracking, study)
    work = TrainTrial(trials, parent, tracking.resolve_experiment(check(small_run).tracking), changing=True)
    own: dict[int, Params] = {0: {RATE: 1e-4, "backbone.dropout": 0.2}, 1: parent_params}
    reports: list[int] = []
    for number, params in own.items():
        trials.begin(number, params)
        with pytest.raises(PausedError) as paused:
            work(number, params, lambda step, _: reports.append(step), 8)
        assert paused.value.values[STEP] == 8
        assert checkpoint.bundles(trials.place(number, params, 42).bundles)[-1].name == checkpoint.folder_name(8)
    assert reports == [4, 4]
    with pytest.raises(PausedError) as paused:  # started again before it was heard: nothing is trained
        work(0, own[0], lambda step, _: reports.append(step), 8)
    assert reports == [4, 4]

    after: Params = {RATE: 8e-3, "backbone.dropout": 0.0}
    old = trials.place(0, own[0], 42)
    change = trials.clone(0, 1, after)
    assert change == Change(8, 1, own[0], after)
    new = trials.place(0, after, 42)
    assert new.folder != old.folder
    assert new.record()["run_id"] == old.record()["run_id"]
    assert (old.folder / "metrics.jsonl").is_file()
    assert trials.recorded()[0] == after
    newest = checkpoint.newest_whole(new.bundles)
    assert newest is not None
    bundle, source = checkpoint.read(newest), checkpoint.read(trials.place(1, own[1], 42).bundles / newest.name)
    assert bundle.config.train.learning_rate == 8e-3
    assert bundle.state["train"] == source.state["train"]

    ends = {}
    for number, params in ((0, after), (1, own[1])):
        ends[number] = work(number, params, lambda step, _: reports.append(step), 16)
        assert not trials.stop_file(number).is_symlink()
    assert reports == [4, 4]  # none twice; the last evaluation is the result
    assert ends[0][STEP] == 12
    first, second = (RunResult.read(trials.place(n, p, 42).result) for n, p in ((0, after), (1, own[1])))
    assert first.loss_curve[:8] == second.loss_curve[:8]
    assert first.loss_curve[8:] != second.loss_curve[8:]
    assert first.sequence == second.sequence
    assert Path(first.bundle).is_dir()

    client = MlflowClient(small_run["tracking"]["uri"])
    run = client.get_run(first.run_id)
    assert run.info.run_id == old.record()["run_id"]
    assert run.data.params[RATE] == "0.0001"
    assert run.data.tags["changed.train.learning_rate"] == "0.008"
    rates = client.get_metric_history(first.run_id, "train/learning_rate/backbone")
    assert {point.step: point.value for point in rates} == {s: 1e-4 if s <= 8 else 8e-3 for s in range(1, 13)}


@pytest.mark.slow
def test_what_a_killed_start_left_is_cleared(small_run: Table, tmp_path: Path) -> None:
    """A copy counts once trial.json names it."""
    trials = Trials(tmp_path / "trials", "test", small_run, [42], "eval/mean")
    for number, rate in enumerate((1e-4, 1e-2)):
        trials.begin(number, {RATE: rate})
        with pytest.raises(PausedError):
            TrainTrial(trials)(number, {RATE: rate}, lambda step, _: None, 4)
    left = trials.place(0, {RATE: 5e-3}, 42, 1).folder
    left.mkdir(parents=True)
    (left / "half").touch()
    assert trials.place(0, {RATE: 1e-4}, 42).folder.parent.name == "0000"
    trials.clone(0, 1, {RATE: 5e-3})
    assert not (left / "half").exists()
    trials.begin(0, {RATE: 5e-3})
    assert [change.source for change in trials.read(0, {RATE: 5e-3}, live=False).changes] == [1]
    assert trials.read(0, {RATE: 5e-3}, live=False).num_steps == 4


# --- what Tune's scheduler is made of

SPACES = {
    RATE: {"loguniform": [1e-4, 1e-1]},
    "backbone.dropout": {"uniform": [0.0, 0.3]},
    "train.weight_decay": {"choice": [0.1, 0, 0.01]},
    "train.max_grad_norm": {"choice": [1.0, None, 5.0]},
    "train.adam_beta2": {"quniform": [0.9, 0.98, 0.02]},
}


class Controller:
    """As much of Tune's controller as the scheduler asks."""

    def __init__(self, *trials: Any) -> None:
        self.trials = trials
        self.stopped: list[Any] = []

    def stop_trial(self, trial: Any) -> None:
        self.stopped.append(trial)

    def get_trials(self) -> tuple[Any, ...]:
        return self.trials


def population(search: Search, known: Sequence[Trial] = ()) -> Any:
    from tuning.population import Population

    return Population(
        search, known, clone=lambda number, source, params: None, num_concurrent=2, ending=threading.Event()
    )


def waiting(made: Any, number: int, params: Params) -> Any:
    from ray.tune.experiment import Trial as TuneTrial

    trial = TuneTrial("stub", config={"number": number, "params": params}, stub=True)
    made.on_trial_add(Controller(), trial)
    return trial


@pytest.mark.slow  # imports Ray Tune
def test_changed_values_stay_in_the_space(small_run: Table) -> None:
    search = pbt(small_run, SPACES)
    made = population(search)
    begun = search.enumerated
    assert begun is not None
    first, second = (waiting(made, number, begun[number]) for number in range(2))
    seen: dict[str, set[Any]] = {key: set() for key in SPACES}
    for _ in range(300):
        config, _ = made._get_new_config(first, second)
        assert config["number"] == 0
        for key, value in config["params"].items():
            space = search.config.space[key][0]
            values = space.values()
            low, high = space.uniform or space.loguniform or (0, 0)
            assert value in values if values is not None else low <= value <= high
            seen[key].add(value)
        second.set_config({**second.config, "params": config["params"]})
    assert seen["train.weight_decay"] == {0.1, 0, 0.01}
    assert seen["train.max_grad_norm"] == {1.0, None, 5.0}
    assert len(seen["train.adam_beta2"]) == 5
    assert len(seen[RATE]) > 100


@pytest.mark.slow  # imports Ray Tune
def test_a_population_waits_for_all_but_not_for_the_dead(small_run: Table) -> None:
    made = population(pbt(small_run, num_trials=3))
    trials = [waiting(made, number, {RATE: 1e-3}) for number in range(3)]
    controller = Controller(*trials)
    for trial in trials[:2]:
        assert made.choose_trial_to_run(controller) is trial
        assert trial.config["until"] == 4
        trial.set_status("RUNNING")
    assert made.choose_trial_to_run(controller) is None  # two at once
    for trial in trials[:2]:
        made._trial_state[trial].last_train_time = 4
        trial.set_status("PAUSED")
    assert made.choose_trial_to_run(controller) is trials[2]
    trials[2].set_status("RUNNING")
    assert made.choose_trial_to_run(controller) is None
    trials[2].set_status("ERROR")
    assert made.choose_trial_to_run(controller) is trials[0]
    assert trials[0].config["until"] == 8
    trials[0].set_status("RUNNING")
    made.ending.set()
    assert made.choose_trial_to_run(controller) is None
    assert controller.stopped == [trials[1]]  # who waits; the work at hand is told elsewhere


@pytest.mark.slow  # imports Ray Tune
def test_a_resumed_population_meets_where_the_last_one_is(small_run: Table) -> None:
    def at(*steps: int) -> list[Trial]:
        return [Trial(n, {}, [SeedRun(42, state="running", num_steps=step)]) for n, step in enumerate(steps)]

    search = pbt(small_run, num_trials=3)
    for steps, until in (((4, 6, 8), 8), ((8, 8, 8), 12), ((5, 8), 4)):
        made = population(search, at(*steps))
        waiting_one = waiting(made, 0, {RATE: 1e-3})
        assert made.choose_trial_to_run(Controller(waiting_one)).config["until"] == until


# --- on Ray


def pbt(base: Table, space: Table | None = None, **search: Any) -> Search:
    chosen = {"name": "pbt", **search.pop("scheduler", {})}
    rate = {RATE: {"loguniform": [1e-4, 1e-1]}}
    return search_of(base, space=space or rate, searcher="random", scheduler=chosen, **{"num_trials": 4, **search})


@dataclass(frozen=True)
class Moving:
    """Weights that grow by how near the learning rate is to the best one: 1e-1 until step 12, then 1e-4."""

    trials: Trials

    def __call__(self, number: int, params: Params, report: Report, until: int | None = None) -> Values:
        assert until is not None
        place = self.trials.place(number, params, 42)
        file = self.trials.of(number) / "state.json"
        table = json.loads(file.read_text()) if file.is_file() else {"step": 0, "weight": 0.0, "rates": []}
        import math

        while table["step"] < min(until, 24):
            best = -1 if table["step"] < 12 else -4
            table["weight"] += 1 - abs(math.log10(float(params[RATE])) - best) / 3  # type: ignore[arg-type]
            table["step"] += 1
            table["rates"].append(params[RATE])
        file.write_text(json.dumps(table))
        score = table["weight"] / 24
        if until < 24:
            raise PausedError({STEP: until, "eval/mean": score})
        tasks = {"embedded/nli": {"score": score}}
        result = RunResult(
            run_id="", name="toy", method="full", backbone="embedded", num_trained_parameters=1,
            num_method_parameters=0, num_backbone_parameters=1, num_steps=24, num_workers=0, train_seconds=1.0,
            examples_per_second=1.0, tokens_per_second=1.0, peak_memory_bytes=1, examples_seen={}, sequence="",
            loss_curve=[], eval=tasks, majority={}, best_task_steps={}, mean=score, best_step=24, bundle="",
            last_bundle="", stopped_early=False, inference_flops=1,
            evaluations=[{"step": 24, "mean": score, "tasks": tasks}],
        )  # fmt: skip
        result.write(place.result)
        return {STEP: 24, **metrics(result)}

    def tell_to_stop(self, number: int) -> None:
        """It is never at work for long."""

    def clone(self, number: int, source: int, params: Params) -> Change:
        before = self.trials.recorded()
        there = (self.trials.of(source) / "state.json").read_text()
        (self.trials.of(number) / "state.json").write_text(there)
        change = Change(json.loads(there)["step"], source, before[number], params)
        self.trials._record(number, params, [*self.trials.changes(number), change])
        return change


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
class TestOnRay:
    def test_values_follow_an_optimum_that_moves(self, small_run: Table, tmp_path: Path) -> None:
        """Four trials, six meetings, two slots: turns are taken, and the same seed gives the same study."""
        small_run["train"] |= {"max_steps": 24}
        search = pbt(small_run, max_concurrent_trials=2)
        studies = []
        for name in ("a", "b"):
            work = Moving(Trials(tmp_path / name / "trials", "test", search.base, [42], "eval/mean"))
            studies.append(go(search, tmp_path / name, work=work, reuse=True))
        study = studies[0]
        assert [(t.number, t.state) for t in study.trials] == [(n, "finished") for n in range(4)]
        assert [(t.params, t.changes) for t in study.trials] == [(t.params, t.changes) for t in studies[1].trials]
        changes = [(trial.number, change) for trial in study.trials for change in trial.changes]
        assert len(changes) == 5  # the worst of four at each meeting
        for number, change in changes:
            assert change.source != number
            assert change.step in (4, 8, 12, 16, 20)
            assert 1e-4 <= float(change.after[RATE]) <= 1e-1  # type: ignore[arg-type]
        begun = search.enumerated
        assert begun is not None
        assert [trial.params_after(0) for trial in study.trials] == begun
        for trial in study.trials:
            # The rates that its weights were trained with are those of the study's record.
            rates = json.loads((tmp_path / "a" / "trials" / f"{trial.number:04d}" / "state.json").read_text())["rates"]
            stages = study.schedule(trial)
            told = [next(s.params[RATE] for s in reversed(stages) if s.step <= step) for step in range(24)]
            assert rates == told
        nothing_left()

    def test_training(self, small_run: Table, tmp_path: Path) -> None:
        small_run["train"] |= {"max_steps": 12}
        small_run["tracking"] = store(tmp_path)
        space = {RATE: {"choice": [1e-7, 1e-6, 1e-3, 1e-2]}, "train.group_learning_rates.prompt": {"choice": [1e-3]}}
        study = go(pbt(small_run, space, max_concurrent_trials=2), tmp_path / "out")
        assert [trial.state for trial in study.trials] == ["finished"] * 4
        changed = [trial for trial in study.trials if trial.changes]
        assert changed
        curves = [RunResult.read(Path(trial.runs[0].folder) / "result.json").loss_curve for trial in study.trials]
        for trial in changed:
            change = trial.changes[-1]
            assert curves[trial.number][: change.step] == curves[change.source][: change.step]
            assert [step for step, _ in trial.runs[0].curve] == [4, 8, 12]
        client = MlflowClient(small_run["tracking"]["uri"])
        parent = client.get_run(study.parent_run_id)
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
        by_number = {int(child.data.tags["polyprompt.trial"]): child for child in children}
        assert len(children) == len(by_number) == 4
        for trial in study.trials:
            child = by_number[trial.number]
            assert child.info.run_id == trial.runs[0].run_id
            assert child.info.status == "FINISHED"
            for key, value in trial.params_after(0).items():
                assert json.loads(child.data.params[key]) == value
        nothing_left()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_killed_population_is_finished_by_resume(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"max_steps": 12}
    search = {
        "space": {RATE: {"choice": [1e-7, 1e-3, 1e-2]}},
        "searcher": "random",
        "num_trials": 2,
        "max_concurrent_trials": 1,
        "scheduler": "pbt",
    }
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump({**small_run, "search": search}))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tuning" / "search.py"), str(file), "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    while not list(out.glob("trials/*/generation_1/seed_42/metrics.jsonl")):
        assert first.poll() is None, "the search ended before it could be ended"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/trial.json")}
    assert subprocess.run([*command, "--resume"], env=environment, cwd=tmp_path, check=False).returncode == 0
    study = Study.read(out / "study.json")
    assert [(t.number, t.state, t.num_steps) for t in study.trials] == [(n, "finished", 12) for n in range(2)]
    for trial in study.trials:
        changes = [vars(change) for change in trial.changes]
        known = before[f"{trial.number:04d}"]["changes"]
        assert changes[: len(known)] == known
    assert any(trial.changes for trial in study.trials)
