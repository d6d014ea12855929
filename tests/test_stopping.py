"""SIGTERM: a last bundle, a tracking run that was killed, and a run that goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_drill import newest, same

from polyprompt import checkpoint
from polyprompt.command import exit_status
from polyprompt.errors import ConfigError, StoppedError
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.stopping import STOP, on_sigterm
from polyprompt.worker import METRICS, PROGRESS, Job, check_folder

ROOT = Path(__file__).parents[1]
Table = dict[str, Any]


def go(table: Table, out: Path) -> RunResult:
    return run(check(table), out=out, say=lambda line: None)


def wait_for_step(out: Path, step: int) -> None:
    """Return once that step was logged. (metrics.jsonl gets it later: it is written every ten seconds.)"""
    file = out / PROGRESS
    while not (file.exists() and json.loads(file.read_text())["step"] >= step):
        time.sleep(0.01)


def last_logged(out: Path) -> int:
    return int(json.loads((out / METRICS).read_text().splitlines()[-1])["step"])


@pytest.fixture
def long_run(small_run: Table, store: Path) -> Table:
    """No bundle is due before the end."""
    small_run["train"] |= {"max_steps": 40, "save_steps": 1000}
    small_run["evaluate"] = {}
    small_run["tracking"] = {"system_metrics_interval_seconds": None}
    return small_run


def status_of(run_id: str, store: Path) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db").get_run(run_id).info.status)


@pytest.mark.faults
def test_a_terminated_run_leaves_a_bundle_and_goes_on_exactly(
    long_run: Table, store: Path, tmp_path: Path, drill: Callable[..., None]
) -> None:
    unbroken = go(long_run, tmp_path / "a")
    out = tmp_path / "b"

    def terminate() -> None:
        wait_for_step(out, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    with pytest.raises(StoppedError, match=r"SIGTERM ended the run at step \d+; .*goes on from .*step_"):
        go(long_run, out)
    thread.join()
    [bundle] = checkpoint.bundles(out / "bundles")
    checkpoint.verify(bundle)
    assert 3 <= int(bundle.name.removeprefix("step_")) < 40
    assert status_of(json.loads((out / "run.json").read_text())["run_id"], store) == "KILLED"
    assert not (out / STOP).exists()
    lost = last_logged(out) - newest(out)
    resumed = go(long_run, out)
    drill("SIGTERM, then the same command", lost=lost, equal=same(resumed, unbroken))
    assert lost == 0
    assert (resumed.loss_curve, resumed.sequence, resumed.eval) == (
        unbroken.loss_curve, unbroken.sequence, unbroken.eval,
    )  # fmt: skip
    assert status_of(resumed.run_id, store) == "FINISHED"


def test_the_second_signal_is_a_ctrl_c_and_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm(tmp_path) as listen:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init puts its own
        listen()
        signal.raise_signal(signal.SIGTERM)
        assert (tmp_path / STOP).exists()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert not (tmp_path / STOP).exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_does_not_stop_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT may be ignored, as in what a script starts with "&", or blocked, as in Ray's jobs."""
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0.1")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_sigterm(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                threading.Event().wait(60)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_file_of_a_killed_start_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / STOP).touch()
    with on_sigterm(tmp_path):
        assert not (tmp_path / STOP).exists()


def test_a_run_folder_that_a_machine_does_not_see_is_named(small_run: Table, tmp_path: Path) -> None:
    job = Job(check(small_run), tmp_path / "elsewhere", handle=None)
    with pytest.raises(ConfigError, match=r"run folder .*elsewhere is not there on .*POLYPROMPT_HOME"):
        check_folder(job)


def test_a_terminated_job_is_told_from_a_failed_one(capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        raise StoppedError("SIGTERM ended the run at step 3")

    assert exit_status(act, stopped="interrupted") == 143
    assert capsys.readouterr().err == "stopped: SIGTERM ended the run at step 3\n"


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_terminated_job_of_two_workers_leaves_a_bundle(
    long_run: Table, store: Path, tmp_path: Path, drill: Callable[..., None]
) -> None:
    """SIGTERM to the job's process, as a user's `kill`."""
    long_run["train"] |= {"max_steps": 5000, "logging_steps": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**long_run, "compute": {"num_workers": 2}}))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "jobs" / "multitask.py"), str(recipe), "--out", str(out)]
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_step(out, 2)
    job.terminate()
    _, said = job.communicate()
    assert job.returncode == 143, said
    assert "stopped: SIGTERM ended the run at step" in said
    [bundle] = checkpoint.bundles(out / "bundles")
    checkpoint.verify(bundle)
    drill("SIGTERM to a job of two workers", lost=last_logged(out) - newest(out), equal="not run on")
    assert last_logged(out) == newest(out)
    assert status_of(json.loads((out / "run.json").read_text())["run_id"], store) == "KILLED"
