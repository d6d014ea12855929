"""Searches whose trials share a frozen backbone: what is refused, the packs' processes, and the whole path."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from test_search import Table, go, nothing_left, search_of

from polyprompt import ray_train, recipe
from polyprompt.config import ComputeConfig
from polyprompt.errors import ConfigError, StoppedError
from polyprompt.pack import Seat
from polyprompt.result import RunResult
from tuning.capacity import capacity
from tuning.spaces import Params
from tuning.trial import Ended, Trials, Values
from tuning.work import STEP, Report

SPACE = {"method.name": {"choice": ["smop", "prompt_tuning"]}, "method.length": {"choice": [2, 5]}}


def shared(base: Table, **search: Any) -> Any:
    return search_of(base, **{"space": SPACE, "searcher": "grid", "share_backbone": True, **search})


# --- without Ray


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {"method.name": {"choice": ["smop", "lora"]}}}, "method.name=lora is not a prompt beside a frozen"),
        ({"space": {"method.name": {"choice": ["hyperprompt"]}}}, "Set backbone.trainable=false"),
        ({"space": {**SPACE, "backbone.dropout": {"choice": [0.0, 0.1]}}}, r"search no key of backbone\.\*"),
        ({"space": {**SPACE, "train.precision": {"choice": ["fp32", "bf16"]}}}, r"nor train\.precision"),
        ({"scheduler": "pbt", "searcher": "random", "num_trials": 4, "space": {
            "train.learning_rate": {"uniform": [0, 1]}}}, "share_backbone=true does not go with scheduler=pbt"),
        ({"objectives": ["eval/mean", "step_seconds"]}, "step_seconds is that of all trials"),
    ],
)  # fmt: skip
def test_searches_that_cannot_share_are_refused(small_run: Table, search: Table, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shared(small_run, **search)


def test_workers_of_their_own_cannot_share(small_run: Table) -> None:
    with pytest.raises(ConfigError, match=r"Set compute\.num_workers=0"):
        shared({**small_run, "compute": {"num_workers": 2}})


def test_random_weights_go_with_one_seed(small_run: Table, tmp_path: Path) -> None:
    """Refused before Ray starts."""
    with pytest.raises(ConfigError, match="others with each seed"):
        go(
            shared({**small_run, "backbone": {"init": "random", **small_run["backbone"]}}, seeds=[1, 2]),
            tmp_path / "out",
        )


def test_a_dry_run_shows_the_packs(small_run: Table, tmp_path: Path) -> None:
    from tuning.search import dry_run

    console = Console(file=(tmp_path / "console.txt").open("w"), width=200)
    dry_run(shared(small_run, trials_per_pack=3), tmp_path / "out", resume=False, console=console)
    console.file.flush()
    assert "processes at once, each for 3 trials that share its backbone" in (tmp_path / "console.txt").read_text()


def test_packs_hold_several_trials_each() -> None:
    compute = ComputeConfig(cpus_per_worker=2)
    room = capacity(compute, [{"CPU": 5}], None, per_process=3)
    assert (room.num_processes, room.num_concurrent) == (2, 6)
    room = capacity(compute, [{"CPU": 5}], 1, per_process=3)
    assert (room.num_processes, room.num_concurrent) == (1, 1)


# --- with a stand-in for the training


@dataclass(frozen=True)
class Climb:
    """Its score is its number, which it reports after all with higher numbers. Trial 1 once kills its process."""

    folder: Path
    num_trials: int

    def __call__(self, number: int, params: Params, report: Report, *, seat: Seat) -> Values:
        weight = torch.ones(1, requires_grad=True)
        if number == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not (self.folder / "killed").exists():
            seat.backward(weight.sum())  # lets the others go on
        before = self.folder / f"reported {number + 1}"
        while number + 1 < self.num_trials and not before.exists():
            time.sleep(0.005)
            seat.backward(weight.sum())
        report(4, {"eval/mean": float(number)})
        (self.folder / f"reported {number}").touch()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.005)
            seat.backward(weight.sum())
            if (self.folder / f"stop {number}").exists():
                raise StoppedError("told to stop")
            if number == self.num_trials - 1 and (self.folder / "stop 0").exists():
                return {STEP: 8, "eval/mean": float(number)}
        raise AssertionError("nobody was stopped")

    def tell_to_stop(self, number: int) -> None:
        (self.folder / f"stop {number}").touch()


@dataclass
class Told:
    """Hears what happens."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def begun(self, number: int, params: Params) -> None:
        self.events.append(("begun", number))

    def reported(self, number: int, step: int, values: Mapping[str, float]) -> None:
        self.events.append(("reported", number))

    def changed(self, number: int, change: Any) -> None:
        raise AssertionError

    def ended(self, number: int, ended: Ended | None) -> None:
        self.events.append(("ended", number, ended and ended.cause))


class Listed:
    """Four trials."""

    def __init__(self) -> None:
        self.told: dict[int, Mapping[str, float]] = {}

    def suggest(self, number: int) -> Params | None:
        return {} if number < 4 else None

    def tell(self, number: int, values: Mapping[str, float], *, failed: bool) -> None:
        self.told[number] = {"failed": 1.0} if failed else values


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
class TestOnRay:
    def test_trials_are_stopped_and_survive_their_process(self, small_run: Table, tmp_path: Path) -> None:
        from tuning import packs

        small_run["evaluate"] = {"steps": 4}
        small_run["train"] |= {"max_steps": 8}
        search = shared(small_run, scheduler={"name": "asha", "reduction_factor": 2}, trials_per_pack=4)
        room = capacity(search.run.compute, [{"CPU": 1}], None, 4)
        told, source = Told(), Listed()
        packs.execute(
            search, Climb(tmp_path, 4), source=source, known=[], events=told, room=room, ending=threading.Event()
        )
        assert (tmp_path / "killed").exists()
        assert [e for e in told.events if e[0] == "begun"] == [("begun", number) for number in range(4)]
        stopped = {("ended", number, "asha at step 4") for number in range(3)}
        assert {e for e in told.events if e[0] == "ended"} == {("ended", 3, None), *stopped}
        assert source.told == {number: {"eval/mean": float(number)} for number in range(4)}
        nothing_left()

    def test_a_search_shares_backbones(self, small_run: Table, tmp_path: Path) -> None:
        """Two packs of two trials; every trial's run is the run that trains alone."""
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        base = {
            **small_run,
            "method": {"name": "smop"},
            "train": {**small_run["train"], "max_steps": 8},
            "compute": {"cpus_per_worker": 2},
            "tracking": {"uri": uri, "experiment": "test", "system_metrics_interval_seconds": None},
        }
        study = go(shared(base, trials_per_pack=2), tmp_path / "out")
        assert [trial.state for trial in study.trials] == ["finished"] * 4
        trials = Trials(tmp_path / "out" / "trials", "test", study.recipe, [42], "eval/mean")
        for trial in study.trials:
            assert [step for step, _ in trial.runs[0].curve] == [4, 8]
            packed = RunResult.read(Path(trial.runs[0].folder) / "result.json")
            config = trials.config(trial.number, dict(trial.params), 42)
            lone = ray_train.run(config, out=tmp_path / f"lone {trial.number}", say=lambda line: None)
            assert packed.sequence == lone.sequence
            for (_, loss), (_, expected) in zip(packed.loss_curve, lone.loss_curve, strict=True):
                assert loss == pytest.approx(expected, rel=1e-6)
        best = study.best()
        assert best is not None
        rerun = ray_train.run(
            recipe.load([tmp_path / "out" / "best.yaml"]), out=tmp_path / "again", say=lambda line: None
        )
        assert rerun.mean == pytest.approx(best.mean("eval/mean"))
        client = MlflowClient(uri)
        parent = client.get_run(study.parent_run_id)
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{study.parent_run_id}'"
        )
        assert {child.info.run_id for child in children} == {trial.runs[0].run_id for trial in study.trials}
        assert {child.info.status for child in children} == {"FINISHED"}
        nothing_left()
