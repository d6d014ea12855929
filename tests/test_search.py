"""tuning/search.py: the whole path through Ray Tune, what it leaves, and what survives which death."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from polyprompt import checkpoint, ray_train, recipe
from polyprompt.config import ComputeConfig
from polyprompt.errors import (
    ConfigError,
    DataError,
    LostWorkersError,
    NotFiniteError,
    StoppedError,
    StorageError,
    TrackingError,
    TrainingError,
)
from polyprompt.result import RunResult
from tuning import schema
from tuning.capacity import capacity
from tuning.spaces import Params, Search
from tuning.study import SeedRun, Study, Trial
from tuning.trial import Trials, Values, metrics
from tuning.work import STEP, Report, failure

ROOT = Path(__file__).parents[1]
Table = dict[str, Any]


def search_of(base: Table, **search: Any) -> Search:
    return Search("test", base, schema.check(search))


def go(search: Search, folder: Path, **more: Any) -> Study:
    from tuning.search import run

    return run(search, folder, console=Console(file=(folder.parent / "console.txt").open("a")), **more)[0]


def loss_curve(run: SeedRun) -> list[list[float]]:
    return RunResult.read(Path(run.folder) / "result.json").loss_curve if run.state == "finished" else []


# --- without Ray


CPUS = ComputeConfig(num_workers=2, cpus_per_worker=3)


@pytest.mark.parametrize(
    ("nodes", "limit", "fits"),
    [
        ([{"CPU": 6}], None, 1),
        ([{"CPU": 5}, {"CPU": 4}], None, 1),  # a worker lies on one node: 1 + 1, not 9 // 6
        ([{"CPU": 12}, {"CPU": 7}], None, 3),
        ([{"CPU": 12}, {"CPU": 7}], 2, 2),
    ],
)
def test_concurrency_is_what_the_nodes_hold(nodes: list[dict[str, float]], limit: int | None, fits: int) -> None:
    assert capacity(CPUS, nodes, limit).num_concurrent == fits


def test_shares_of_a_gpu_add_up() -> None:
    compute = ComputeConfig(num_workers=1, use_gpu=True, gpus_per_worker=0.1)
    assert capacity(compute, [{"CPU": 64, "GPU": 1}], None).num_concurrent == 10
    assert capacity(compute, [{"CPU": 4, "GPU": 1}], None).num_concurrent == 4


def test_what_cannot_be_scheduled_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"a trial is 2 workers of 3 CPU; .* 5 CPU: 1; 1 // 2 = 0 trials at once"):
        capacity(CPUS, [{"CPU": 5}], None)
    with pytest.raises(ConfigError, match="a fixed number of workers each"):
        capacity(ComputeConfig(num_workers=(1, 2)), [{"CPU": 5}], None)


@pytest.mark.parametrize(
    ("error", "cause", "passing"),
    [
        (NotFiniteError("loss is nan at step 3"), "NaN: loss is nan at step 3", False),
        (ConfigError("method.reduction=64 must\nbe lower"), "bad combination: method.reduction=64 must", False),
        (DataError("row 3"), "bad data: row 3", False),
        (MemoryError(), "out of memory: MemoryError", False),
        (LostWorkersError("the workers failed 4 times, at last with: OutOfMemoryError: 3 G"), "out of memory: ", False),
        (LostWorkersError("the workers failed 4 times"), "workers lost: the workers failed 4 times", True),
        (
            StorageError("bundle step_00000004 cannot be written"),
            "storage: bundle step_00000004 cannot be written",
            True,
        ),
        (TrainingError("a worker failed in a way"), "mistake in code: a worker failed in a way", False),
        (TrackingError("no server"), "tracking: no server", True),
        (ValueError("what"), "ValueError: what", False),
    ],
)
def test_causes_of_failures(error: Exception, cause: str, passing: bool) -> None:
    ended = failure(error)
    assert ended.cause.startswith(cause)
    assert ended.passing is passing


def test_a_run_that_is_told_to_stop_can_go_on(small_run: Table, tmp_path: Path) -> None:
    config = recipe.check(small_run)
    whole = ray_train.run(config, out=tmp_path / "whole", say=lambda line: None)
    stop = tmp_path / "stop"

    def wait() -> None:
        while not checkpoint.bundles(tmp_path / "out" / "bundles"):
            time.sleep(0.002)
        stop.touch()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    with pytest.raises(StoppedError, match="asked the run to stop"):
        ray_train.run(config, out=tmp_path / "out", say=lambda line: None, stop=stop)
    thread.join()
    assert not (tmp_path / "out" / "result.json").exists()
    stop.unlink()
    assert ray_train.run(config, out=tmp_path / "out", say=lambda line: None, stop=stop).eval == whole.eval


# --- with a stand-in for the training


@dataclass(frozen=True)
class Quadratic:
    """Leaves a result with a score whose optimum, 1, is at (0.3, 0.7)."""

    trials: Trials

    def __call__(self, number: int, params: Params, report: Report, until: int | None = None) -> Values:
        score = quadratic(params)
        for step in (1, 2):
            report(step, {"eval/mean": score})
        tasks = {"embedded/nli": {"score": score}}
        result = RunResult(
            run_id="", name="toy", method="full", backbone="embedded", num_trained_parameters=1,
            num_method_parameters=0, num_backbone_parameters=1, num_steps=3, num_workers=0, train_seconds=1.0,
            examples_per_second=1.0, tokens_per_second=1.0, peak_memory_bytes=1, examples_seen={}, sequence="",
            loss_curve=[], eval=tasks, majority={}, best_task_steps={}, mean=score, best_step=3, bundle="",
            last_bundle="", stopped_early=False, inference_flops=1,
            evaluations=[{"step": step, "mean": score, "tasks": tasks} for step in (1, 2, 3)],
        )  # fmt: skip
        result.write(self.trials.place(number, params, self.trials.seeds[0]).result)
        return {STEP: 3, **metrics(result)}

    def tell_to_stop(self, number: int) -> None:
        """It is never at work for long."""


OPTIMUM = {"train.adam_beta1": 0.3, "train.adam_beta2": 0.7}


def quadratic(params: Params) -> float:
    return 1 - sum((float(params[key]) - best) ** 2 for key, best in OPTIMUM.items())  # type: ignore[arg-type]


def toy(small_run: Table, **search: Any) -> Search:
    return search_of(small_run, space={key: {"uniform": [0, 1]} for key in OPTIMUM}, **search)


def first_hit(configurations: list[Params]) -> int:
    """How many trials until one is within 0.08 of the optimum; one more than there are if none is."""
    for number, params in enumerate(configurations, 1):
        if quadratic(params) > 1 - 0.08**2:
            return number
    return len(configurations) + 1


@pytest.mark.slow  # imports Ray Tune
def test_tpe_needs_fewer_trials_than_random_search(small_run: Table) -> None:
    """The median of ten seeds. The same sampler on Ray: test_a_resumed_sampler_knows_what_was_learned.

    What a random search tries does not depend on what it sees, and is known before it starts.
    """
    from tuning import sampler

    hits: dict[str, list[int]] = {"tpe": [], "random": []}
    for seed in range(10):
        source, tried = sampler.source(toy(small_run, searcher="tpe", num_trials=40, seed=seed), []), []
        while (params := source.suggest(len(tried))) is not None:
            source.tell(len(tried), {"eval/mean": quadratic(params)}, failed=False)
            tried.append(params)
        assert len(tried) == 40
        hits["tpe"].append(first_hit(tried))
        drawn = toy(small_run, searcher="random", num_trials=40, seed=seed).enumerated
        assert drawn is not None
        assert len(drawn) == 40
        hits["random"].append(first_hit(drawn))
    assert statistics.median(hits["tpe"]) < statistics.median(hits["random"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
class TestOnRay:
    def test_a_resumed_sampler_knows_what_was_learned(self, small_run: Table, tmp_path: Path) -> None:
        search = toy(small_run, searcher="tpe", num_trials=15, max_concurrent_trials=1)
        work = Quadratic(Trials(tmp_path / "a" / "trials", "test", search.base, [42], "eval/mean"))
        first = go(search, tmp_path / "a", work=work, reuse=True)
        more = toy(small_run, searcher="tpe", num_trials=25, max_concurrent_trials=1)
        second = go(more, tmp_path / "a", work=work, reuse=True, resume=True)
        assert [t.number for t in second.trials] == list(range(25))
        assert [t.params for t in second.trials[:15]] == [t.params for t in first.trials]
        # Ten trials past the start-up phase; drawn at random, a quarter of them would be this near.
        near = [t.mean("eval/mean") > 1 - 0.08 for t in second.trials[15:]]
        assert sum(near) >= 6

    def test_a_search_leaves_everything(self, small_run: Table, tmp_path: Path) -> None:
        """ASHA; two methods, each with its own keys; MLflow; best.yaml; nothing left on the cluster."""
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        base = {**small_run, "tracking": {"uri": uri, "experiment": "test", "system_metrics_interval_seconds": None}}
        base["evaluate"] = {"steps": 4}
        base["train"] |= {"max_steps": 16}
        search = search_of(
            base,
            space={
                "method.name": {"choice": ["hyperprompt", "smop"]},
                "method.encoder_length": {"choice": [3], "when": {"method.name": "hyperprompt"}},
                "method.length": {"choice": [2], "when": {"method.name": "smop"}},
                "backbone.trainable": {"choice": [True]},
                "train.learning_rate": {"choice": [1e-2, 1e-6]},
            },
            searcher="grid",
            scheduler={"name": "asha", "reduction_factor": 100},
        )
        study = go(search, tmp_path / "out")
        assert [trial.params for trial in study.trials] == search.enumerated
        states = {trial.state for trial in study.trials}
        assert states <= {"finished", "stopped"}
        assert "finished" in states
        for trial in study.trials:
            assert ("method.encoder_length" in trial.params) == (trial.params["method.name"] == "hyperprompt")
            assert ("method.length" in trial.params) == (trial.params["method.name"] == "smop")
            if trial.state == "stopped":
                assert trial.num_steps < 16
                assert "asha at step" in trial.cause
            else:
                assert trial.num_steps == 16
                assert [step for step, _ in trial.runs[0].curve] == [4, 8, 12, 16]
        best = study.best()
        assert best is not None
        with (tmp_path / "out" / "leaderboard.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 4
        rerun = ray_train.run(
            recipe.load([tmp_path / "out" / "best.yaml"]), out=tmp_path / "again", say=lambda line: None
        )
        assert rerun.mean == best.mean("eval/mean")
        client = MlflowClient(uri)
        parent = client.get_run(study.parent_run_id)
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{study.parent_run_id}'"
        )
        assert {child.info.run_id for child in children} == {trial.runs[0].run_id for trial in study.trials}
        assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}
        assert parent.info.status == "FINISHED"
        for trial in study.trials:
            child = client.get_run(trial.runs[0].run_id)
            assert {key: child.data.params[key] for key in trial.params} == {
                key: value if isinstance(value, str) else json.dumps(value) for key, value in trial.params.items()
            }
        nothing_left()

    def test_failures_do_not_end_a_search(self, small_run: Table, tmp_path: Path) -> None:
        small_run["train"] |= {"max_grad_norm": None}
        search = search_of(
            small_run,
            space={"method.reduction": {"choice": [64, 4]}, "train.learning_rate": {"choice": [1e30, 1e-3]}},
            searcher="grid",
        )
        study = go(search, tmp_path / "out")
        states = [(trial.state, trial.cause.partition(":")[0]) for trial in study.trials]
        bad = ("failed", "bad combination")
        assert states == [bad, bad, ("failed", "NaN"), ("finished", "")]
        assert study.ranked()[0].number == 3

    def test_several_seeds_and_workers(self, small_run: Table, tmp_path: Path) -> None:
        base = {**small_run, "compute": {"num_workers": 2}}
        space = {"method.encoder_length": {"choice": [2]}}
        (trial,) = go(search_of(base, space=space, searcher="grid", seeds=[1, 2]), tmp_path / "out").trials
        assert trial.state == "finished"
        assert [run.seed for run in trial.runs] == [1, 2]
        alone = [RunResult.read(Path(run.folder) / "result.json").mean for run in trial.runs]
        assert trial.mean("eval/mean") == pytest.approx(statistics.fmean(alone))
        assert trial.std("eval/mean") == pytest.approx(statistics.stdev(alone))
        nothing_left()

    def test_a_killed_trial_leaves_no_places_reserved(self, small_run: Table, tmp_path: Path) -> None:
        """Three workers a trial on a cluster of four CPUs without a dashboard: a leak of one hangs the next start."""
        small_run["train"] |= {"max_steps": 60}
        base = {**small_run, "compute": {"num_workers": 3}}
        killed = threading.Event()

        def kill() -> None:
            """Kill the first trial's process once its workers have made a bundle."""
            while not list((tmp_path / "out").glob("trials/0000/seed_42/bundles/step_*")):
                time.sleep(0.02)
            lock = str(tmp_path / "out" / "trials" / "0000" / "seed_42" / ".lock")
            mine = psutil.Process().children(recursive=True)
            actors = [process for process in mine if lock in {file.path for file in process.open_files()}]
            actors[0].kill()
            killed.set()

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        search = search_of(base, space={"method.encoder_length": {"choice": [2]}}, searcher="grid")
        study = go(search, tmp_path / "out")
        assert killed.is_set()
        assert [trial.state for trial in study.trials] == ["finished"]
        nothing_left()

    def test_what_the_cluster_cannot_hold_is_refused(self, small_run: Table, tmp_path: Path) -> None:
        base = {**small_run, "compute": {"num_workers": 4, "cpus_per_worker": 2}}
        search = search_of(base, space={"method.encoder_length": {"choice": [2, 3]}}, searcher="grid")
        with pytest.raises(ConfigError, match=r"4 workers of 2 CPU; .*= 0 trials at once"):
            go(search, tmp_path / "out")
        assert not (tmp_path / "out" / "study.json").exists()


def nothing_left() -> None:
    """No trial keeps anything of the cluster."""
    import ray
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    raise AssertionError(f"left on the cluster: {groups}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_search_ended_in_the_middle_is_finished_by_resume(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"max_steps": 40}
    table = {
        **small_run,
        "search": {
            "space": {"method.encoder_length": {"choice": [2, 3, 4]}, "train.adam_beta2": {"uniform": [0.9, 0.999]}},
            "searcher": "random",
            "num_trials": 3,
            "max_concurrent_trials": 1,
        },
    }
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(table))
    command = [sys.executable, str(ROOT / "tuning" / "search.py"), str(file), "--out"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([*command, *arguments], env=environment, cwd=tmp_path, start_new_session=True)

    search = search_of(small_run, **table["search"])
    trials, unbroken = Trials(tmp_path / "alone" / "trials", "test", search.base, [42], "eval/mean"), []
    for number, params in enumerate(search.enumerated or ()):
        alone = tmp_path / "alone" / str(number)
        run = ray_train.run(trials.config(number, params, 42), out=alone, say=lambda line: None)
        unbroken.append((number, params, "finished", run.mean, run.loss_curve))
    assert len(unbroken) == 3
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        out = tmp_path / how.name
        first = start(str(out))
        while not list(out.glob("trials/0001/seed_42/bundles/step_*")):
            assert first.poll() is None, "the search ended before it could be ended"
            time.sleep(0.02)
        os.kill(first.pid, how)
        assert first.wait() == code
        finished = out / "trials" / "0000" / "seed_42" / "result.json"
        before = finished.stat().st_mtime_ns
        if how == signal.SIGINT:
            assert start(str(out)).wait() == 1  # not without --resume
            assert [t.state for t in Study.read(out / "study.json").trials] == ["finished", "waiting"]
            assert (out / "leaderboard.csv").is_file()
        # The second trial goes on: its first point is older than the resume.
        points = out / "trials" / "0001" / "seed_42" / "metrics.jsonl"
        point = points.read_text().splitlines()[0]
        assert start(str(out), "--resume").wait() == 0
        assert finished.stat().st_mtime_ns == before
        assert points.read_text().splitlines()[0] == point
        resumed = Study.read(out / "study.json")
        assert [
            (t.number, t.params, t.state, t.mean("eval/mean"), loss_curve(t.runs[0])) for t in resumed.trials
        ] == unbroken
    with pytest.raises(ConfigError, match=r"another search \(.*train\.max_steps: 40 there, 41 here\)"):
        go(
            search_of({**small_run, "train": {**small_run["train"], "max_steps": 41}}, **table["search"]),
            out,
            resume=True,
        )


@pytest.mark.slow  # imports Ray Tune
def test_a_scheduler_is_told_of_the_trials_that_are_done(small_run: Table) -> None:
    from tuning.schedulers import scheduler

    def known(number: int, *curve: float) -> Trial:
        points = [(4 * i, value) for i, value in enumerate(curve, 1)]
        return Trial(number, {}, [SeedRun(42, state="finished", num_steps=points[-1][0], curve=points)])

    class New:
        trial_id = "new"

    class Nobody:
        @staticmethod
        def get_live_trials() -> list[Any]:
            return []

    new: Any = New()
    controller: Any = Nobody()
    done = [known(0, 0.5, 0.6), known(1, 0.6, 0.7), known(2, 0.7, 0.8)]
    space = {"method.encoder_length": {"choice": [2, 3]}}
    for name in ("asha", "median"):
        search = search_of({**small_run, "evaluate": {"steps": 4}}, space=space, searcher="grid", scheduler=name)
        for trials, verdict in ((done, "STOP"), ([], "CONTINUE")):
            made = scheduler(search, trials)
            made.on_trial_add(controller, new)
            assert made.on_trial_result(controller, new, {STEP: 4, "eval/mean": 0.1}) == verdict
