"""MLflow and metrics.jsonl: one run, every point once, whatever dies in between. Stores are real sqlite files."""

import json
import logging
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from polyprompt import trackers, tracking
from polyprompt.config import RunConfig, TrackingConfig
from polyprompt.errors import TrackingError
from polyprompt.recipe import check
from polyprompt.section import mask
from polyprompt.tasks.records import FileSource, GeneratedSource, HubSource, Row, Source
from polyprompt.trackers import JsonlTracker, MlflowTracker, SystemMetrics, Trackers
from polyprompt.tracking import finish, log_artifacts, open_run, resend, resolve_uri
from polyprompt.tracking_opening import DataInput, RunHandle
from polyprompt.tracking_store import slug

PLATFORM = Path(tracking.__file__).parents[1]


def config(**tables: Any) -> RunConfig:
    return check({"tasks": ["embedded/nli"], "method": {"name": "smop"}, **tables})


def opened(run_id: str | None = None, **tables: Any) -> RunHandle:
    return open_run(config(**tables), name="trial", tags={"num_trained_parameters": "12"}, run_id=run_id)


def history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(tracking_uri=handle.uri).get_metric_history(handle.run_id, key)
    return sorted((p.step, p.value) for p in points)


def run_of(handle: RunHandle) -> Any:
    return MlflowClient(tracking_uri=handle.uri).get_run(handle.run_id)


def no_rows(split: str) -> Iterator[Row]:
    yield from ()


# --- addresses and names


def test_address_is_absolute_and_the_environment_wins(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_uri(TrackingConfig()) == f"sqlite:///{store}/mlflow.db"
    assert resolve_uri(TrackingConfig(uri="sqlite:///sub/x.db?timeout=9")) == f"sqlite:///{store}/sub/x.db?timeout=9"
    assert resolve_uri(TrackingConfig(uri="http://host:5000")) == "http://host:5000"
    assert resolve_uri(TrackingConfig(uri="mlruns")) == f"file://{store}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "env")
    assert resolve_uri(TrackingConfig(uri="http://host:5000")) == f"sqlite:///{store}/env.db"
    assert tracking.resolve_experiment(TrackingConfig(experiment="config")) == "env"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_store_in_memory_is_refused(uri: str, store: Path) -> None:
    with pytest.raises(TrackingError, match="sqlite:///FILE"):
        resolve_uri(TrackingConfig(uri=uri))


NAMES = [
    *("train/loss", "eval/super_glue/rte/macro_f1", "router/glue/cola/p 0"),
    *("x@y", "ä", "ö", "a//b", "/a", "../a", "a/./b", "a/", ".", "..", "", "a:b"),
    *("n" * 300, "n" * 301, "a/../b", "...", "日本/score"),
]


def test_names_become_ones_that_mlflow_takes_and_stay_apart() -> None:
    slugs = [slug(name) for name in NAMES]
    assert slugs[:3] == NAMES[:3]
    assert len(set(slugs)) == len(NAMES)
    for name in slugs:
        _validate_metric_name(name)
        assert name.isascii()
        assert 0 < len(name) <= 250
        assert slug(name) == name


def test_passwords_are_hidden() -> None:
    handle = RunHandle("http://me:se@cret@host:5000/x", "r", "0", 0)
    assert mask(handle.uri) == "http://***@host:5000/x"
    assert "cret" not in repr(handle)
    assert pickle.loads(pickle.dumps(handle)) == handle


# --- opening a run


def test_run_is_opened_with_params_tags_and_data(store: Path) -> None:
    long = [f"group/task_{i:04d}" for i in range(600)]
    sources: dict[str, Source] = {
        "hub": HubSource("nyu-mll/glue", "rte", "main"),
        "file": FileSource({"train": store / "a.jsonl"}),
        "code": GeneratedSource(no_rows, "3"),
    }
    data = [DataInput(f"x/{k}", "train", f"{k}{'9' * 60}", 7, s, "train") for k, s in sources.items()]
    data.append(DataInput("x/hub", "validation", "v", 3, sources["hub"], "validation"))
    extra = {f"extra.{i}": str(i) for i in range(250)} | {"empty": ""}
    cfg = config(tasks=long, tracking={"uri": "sqlite:///mlflow.db"})
    tags = {"git_commit": "abc-dirty", "backbone_hash": "ff", "absent": ""}
    handle = open_run(cfg, name="trial", tags=tags, params=extra, datasets=data)
    run = run_of(handle)
    assert run.info.run_name == "trial"
    assert run.info.status == "RUNNING"
    assert run.info.artifact_uri.startswith(str(store / "mlartifacts"))
    assert {k: run.data.params[k] for k in ("method.num_prompts", "extra.249", "empty")} == {
        "method.num_prompts": "4",
        "extra.249": "249",
        "empty": "",
    }
    assert len(run.data.params["tasks"]) == 6000
    assert run.data.params["tasks"].startswith('["group/task_0000"')
    expected = {"method": "smop", "backbone": "embedded", "identity": cfg.identity(), "backbone_hash": "ff"}
    assert expected.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert "absent" not in run.data.tags
    inputs = {(i.dataset.name, i.tags[0].value): i for i in run.inputs.dataset_inputs}
    assert set(inputs) == {("x/hub", "train"), ("x/file", "train"), ("x/code", "train"), ("x/hub", "validation")}
    assert inputs["x/hub", "train"].dataset.digest == ("hub" + "9" * 60)[:36]
    assert mlflow.data.get_source(inputs["x/hub", "validation"]).to_dict()["split"] == "validation"
    assert mlflow.data.get_source(inputs["x/file", "train"]).to_dict() == {"uri": str(store / "a.jsonl")}
    assert mlflow.data.get_source(inputs["x/code", "train"]).to_dict()["tags"]["version"] == "3"


def test_run_is_opened_again(store: Path) -> None:
    first = opened(train={"learning_rate": 0.5})
    finish(first, "FAILED")
    again = opened(first.run_id, train={"learning_rate": 0.5, "logging_steps": 3}, compute={"num_workers": 2})
    assert again == first
    run = run_of(first)
    assert run.info.status == "RUNNING"
    assert run.data.params["compute.num_workers"] == "0"
    assert run.data.tags["changed.compute.num_workers"] == "2"
    assert run.data.tags["changed.train.logging_steps"] == "3"
    with pytest.raises(TrackingError, match=r"train.learning_rate was 0.5, now 0.25.*another name"):
        opened(first.run_id, train={"learning_rate": 0.25})


def test_long_params_are_told_apart_behind_the_cut(store: Path) -> None:
    tasks = [f"group/task_{i:04d}" for i in range(600)]
    first = opened(tasks=tasks)
    assert opened(first.run_id, tasks=tasks).run_id == first.run_id
    with pytest.raises(TrackingError, match="tasks was"):
        opened(first.run_id, tasks=[*tasks[:-1], "group/other"])


def test_other_data_are_another_run(store: Path) -> None:
    def start(digest: str, run_id: str | None = None) -> RunHandle:
        data = [DataInput("x/y", "train", digest, 7, GeneratedSource(no_rows, "1"), "train")]
        return open_run(config(), name="t", tags={}, datasets=data, run_id=run_id)

    first = start("aa")
    assert start("aa", first.run_id) == first
    assert len(run_of(first).inputs.dataset_inputs) == 1
    with pytest.raises(TrackingError, match="train data of x/y had digest aa, now bb"):
        start("bb", first.run_id)


def test_unknown_and_deleted_runs_and_experiments(store: Path) -> None:
    with pytest.raises(TrackingError, match=r"has no run 0{32}.*MLFLOW_TRACKING_URI"):
        opened("0" * 32)
    first = opened()
    client = MlflowClient(tracking_uri=first.uri)
    client.delete_run(first.run_id)
    with pytest.raises(TrackingError, match="mlflow runs restore"):
        opened(first.run_id)
    client.delete_experiment(first.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        opened()


def test_server_that_is_not_there_is_named_at_once(store: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127.0.0.1:9 cannot be used.*enabled=false") as raised:
        opened(tracking={"uri": "http://me:secret@127.0.0.1:9"})
    assert time.monotonic() - began < 10
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_old_store_is_refused_not_migrated(store: Path) -> None:
    with sqlite3.connect(store / "mlflow.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(TrackingError, match="out-of-date database schema"):
        opened()
    with sqlite3.connect(store / "mlflow.db") as db:
        assert db.execute("SELECT version_num FROM alembic_version").fetchall() == [("451aebb31d03",)]


def test_a_run_that_could_not_be_described_is_not_left_behind(store: Path) -> None:
    """Whoever tries again makes another one."""
    opened()
    with sqlite3.connect(store / "mlflow.db") as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON params BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(TrackingError, match="disk full"):
        opened()
    assert len(MlflowClient(f"sqlite:///{store / 'mlflow.db'}").search_runs(["1"])) == 1


START = """
import sys
from polyprompt.recipe import check
from polyprompt.tasks.records import GeneratedSource
from polyprompt.tracking import open_run
from polyprompt.tracking_opening import DataInput

data = [DataInput("x/y", "train", "aa", 7, GeneratedSource(lambda split: iter(()), "1"), "train")]
sys.stdin.readline()
open_run(check({"tasks": ["embedded/nli"]}), name="one of many", tags={}, datasets=data)
"""


@pytest.mark.slow
def test_runs_that_start_at_once_name_the_same_data(store: Path) -> None:
    command = [sys.executable, "-c", START]
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) for _ in range(4)]
    for run in runs:
        assert run.stdin is not None
        run.stdin.write(b"now\n")
        run.stdin.flush()
    assert [run.wait() for run in runs] == [0] * 4
    assert len(MlflowClient(f"sqlite:///{store / 'mlflow.db'}").search_runs(["1"])) == 4


def test_creation_that_was_killed_half_way_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".mlflow.db.new").write_bytes(b"half")
    (tmp_path / "mlflow.db").touch()
    assert run_of(opened()).info.status == "RUNNING"
    assert not (tmp_path / ".mlflow.db.new").exists()


@pytest.mark.slow
def test_three_drivers_start_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    code = (
        "from polyprompt.recipe import check; from polyprompt.tracking import open_run\n"
        "c = check({'tasks': ['embedded/nli']})\n"
        "print(open_run(c, name='x', tags={}).run_id)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"PYTHONPATH": str(PLATFORM)}
    drivers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    outputs = [driver.communicate(timeout=240) for driver in drivers]
    assert [d.returncode for d in drivers] == [0, 0, 0], outputs
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments(filter_string="name = 'polyprompt'")]
    found = {run.info.run_id for run in client.search_runs(experiments)}
    assert len(experiments) == 1
    assert found == {out.strip() for out, _ in outputs}
    assert len(found) == 3


# --- metrics.jsonl


def test_jsonl_keeps_the_past_and_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (10, 20, 30):
        tracker.log(step, {"train/loss": step / 10, "odd": float("nan")})
    tracker.flush()
    tracker.flush()
    with path.open("a") as file:
        file.write('{"step": 40, "tra')  # a crash in the middle of a write
    again = JsonlTracker(path, resumed_step=20)
    again.log(30, {"train/loss": 3.5})
    again.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(r["step"], r["train/loss"]) for r in rows] == [(10, 1.0), (20, 2.0), (30, 3.5)]
    assert rows[0]["odd"] == "nan"
    assert JsonlTracker(path).pending() == []
    assert path.read_text() == ""


# --- MLflow: every point once


def test_points_arrive_in_batches_with_the_time_they_were_logged(store: Path) -> None:
    handle = opened()
    tracker = MlflowTracker(handle, run_folder=store)
    before = time.time_ns() // 1_000_000
    for step in range(1, 1301):
        tracker.log(step, {"train/loss": float(step), "größe": 1.0} if step == 1 else {"train/loss": float(step)})
    tracker.log(1301, {"train/loss": float("nan"), "inf": float("inf")})
    after = time.time_ns() // 1_000_000
    assert len(tracker.pending()) == 1303
    json.dumps(tracker.pending(), allow_nan=False)
    tracker.flush()
    assert tracker.pending() == []
    points = MlflowClient(tracking_uri=handle.uri).get_metric_history(handle.run_id, "train/loss")
    assert sorted(p.step for p in points) == list(range(1, 1302))
    assert all(before <= p.timestamp <= after for p in points)
    assert [p.value != p.value for p in points if p.step == 1301] == [True]
    assert history(handle, "inf")[0][1] > 1e300
    assert history(handle, slug("größe")) == [(1, 1.0)]


@pytest.mark.parametrize("crash", ["before_flush", "after_flush"])
def test_crash_and_replay_leave_neither_gaps_nor_duplicates(store: Path, crash: str) -> None:
    """Step 4's bundle kept points 3 and 4 as pending; the run then went on to step 6 and died."""
    handle = opened()
    tracker = MlflowTracker(handle, run_folder=store)
    for step in (1, 2):
        tracker.log(step, {"train/loss": step / 8})
    tracker.flush()
    for step in (3, 4):
        tracker.log(step, {"train/loss": step / 8, "train/x/loss": float("inf")})
    pending = json.loads(json.dumps(tracker.pending()))
    for step in (5, 6):
        tracker.log(step, {"train/loss": step / 8})
    if crash == "after_flush":
        tracker.flush()

    again = MlflowTracker(handle, pending=pending, run_folder=store)
    for step in (5, 6, 7):
        again.log(step, {"train/loss": step / 8, "new": 1.0})
    again.flush()
    again.close()
    assert history(handle, "train/loss") == [(s, s / 8) for s in range(1, 8)]
    assert [s for s, _ in history(handle, "train/x/loss")] == [3, 4]
    assert [s for s, _ in history(handle, "new")] == [5, 6, 7]


def test_store_that_goes_away_and_comes_back(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    handle = opened()
    tracker = MlflowTracker(handle, run_folder=store)
    tracker.log(1, {"train/loss": 1.0})
    tracker.flush()
    os.rename("mlflow.db", "away.db")
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            tracker.log(step, {"train/loss": float(step)})
            tracker.flush()
            tracker._retry_at = 0.0
            tracker.flush()
    assert sum("training goes on" in r.message for r in caplog.records) == 1
    assert not Path("mlflow.db").exists()
    assert [row["step"] for row in tracker.pending()] == [2, 3]
    assert log_artifacts(handle, store / "away.db") is False
    assert finish(handle, "FINISHED") is False
    os.rename("away.db", "mlflow.db")
    tracker.flush()
    assert history(handle, "train/loss") == [(1, 1.0)], "a flush inside the back-off must not try"
    tracker._retry_at = 0.0
    tracker.flush()
    assert history(handle, "train/loss") == [(s, float(s)) for s in (1, 2, 3)]


def test_what_is_not_sent_at_the_end_is_kept_and_sent_later(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    handle = opened()
    folder = store / "runs" / "trial"
    tracker = MlflowTracker(handle, run_folder=folder)
    tracker.log(1, {"train/loss": 1.0})
    tracker.flush()
    os.rename("mlflow.db", "away.db")
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": float("nan"), "b": 2.0})
    tracker.close()
    unsent = folder / "unsent_metrics.jsonl"
    assert f"python -m polyprompt.tracking '{unsent}' {handle.run_id}" in caplog.text
    assert len(unsent.read_text().splitlines()) == 3
    with pytest.raises(TrackingError, match="not on this machine"):
        resend(unsent, handle.uri, handle.run_id)
    os.rename("away.db", "mlflow.db")
    env = os.environ | {"PYTHONPATH": str(PLATFORM), "MLFLOW_TRACKING_URI": handle.uri}
    command = [sys.executable, "-m", "polyprompt.tracking", str(unsent), handle.run_id]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "sent 3 points" in done.stdout
    assert not unsent.exists()
    assert [s for s, _ in history(handle, "train/loss")] == [1, 2]
    assert history(handle, "b") == [(2, 2.0)]
    with pytest.raises(TrackingError, match="does not exist"):
        resend(unsent, handle.uri, handle.run_id)


def test_next_life_of_the_run_sends_what_the_last_one_kept(store: Path) -> None:
    handle = opened()
    os.rename("mlflow.db", "away.db")
    tracker = MlflowTracker(handle, run_folder=store)
    for step in (1, 2):
        tracker.log(step, {"train/loss": float(step)})
    bundle = tracker.pending()
    tracker.log(3, {"train/loss": 3.0})
    tracker.close()
    os.rename("away.db", "mlflow.db")
    again = MlflowTracker(handle, pending=bundle, run_folder=store)
    for step in (3, 4):
        again.log(step, {"train/loss": float(step)})
    again.close()
    assert history(handle, "train/loss") == [(s, float(s)) for s in (1, 2, 3, 4)]
    assert not (store / "unsent_metrics.jsonl").exists()


def test_damaged_unsent_file_is_named(store: Path) -> None:
    (store / "unsent_metrics.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(TrackingError, match=r"unsent_metrics.jsonl is damaged"):
        MlflowTracker(RunHandle("sqlite:///x.db", "r", "0", 0), run_folder=store)


def test_trackers_act_as_one(store: Path) -> None:
    handle = opened()
    both = Trackers(JsonlTracker(store / "metrics.jsonl"), MlflowTracker(handle, run_folder=store))
    both.log(5, {"train/loss": 0.5})
    assert [row["key"] for row in both.pending()] == ["train/loss"]
    both.flush()
    assert both.pending() == []
    both.close()
    assert history(handle, "train/loss") == [(5, 0.5)]
    assert json.loads((store / "metrics.jsonl").read_text())["train/loss"] == 0.5


# --- system metrics, artifacts, endings


def test_system_metrics_are_sampled_sent_and_end(store: Path) -> None:
    handle = opened()
    tracker = MlflowTracker(handle, run_folder=store)
    with SystemMetrics(tracker, node="rank0", interval_seconds=0.1):
        eventually(lambda: len(tracker.pending()) > 10)
        os.rename("mlflow.db", "away.db")
        tracker.flush()
        seen = len(tracker.pending())
        eventually(lambda: len(tracker.pending()) > seen)
        os.rename("away.db", "mlflow.db")
    assert not [t for t in threading.enumerate() if t.name == "system-metrics"]
    tracker.close()
    metrics = run_of(handle).data.metrics
    assert 0 < metrics["system/rank0/system_memory_usage_percentage"] < 100
    assert "system/rank0/cpu_utilization_percentage" in metrics


def test_artifacts_and_ending(store: Path) -> None:
    handle = opened()
    (store / "plots").mkdir()
    (store / "plots" / "loss.png").write_bytes(b"png")
    (store / "result.json").write_text("{}")
    assert log_artifacts(handle, [store / "result.json"])
    assert log_artifacts(handle, store / "plots", "plots")
    assert (store / "mlartifacts" / handle.run_id / "artifacts" / "plots" / "loss.png").read_bytes() == b"png"
    for _ in range(2):
        assert finish(handle, "FINISHED", step=7, metrics={"final/mean": 0.5}, tags={"stopped_early": "false"})
    assert history(handle, "final/mean") == [(7, 0.5)]
    run = run_of(handle)
    assert run.info.status == "FINISHED"
    assert run.info.end_time
    assert run.data.tags["stopped_early"] == "false"
    names = {f.path for f in MlflowClient(tracking_uri=handle.uri).list_artifacts(handle.run_id)}
    assert names == {"plots", "result.json"}


def test_folder_with_a_space(tmp_path: Path, migrated_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(migrated_db, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    handle = opened()
    (folder / "a.txt").write_text("a")
    assert log_artifacts(handle, folder / "a.txt")
    assert (folder / "mlartifacts" / handle.run_id / "artifacts" / "a.txt").exists()


# --- a real server


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        eventually(lambda: process.poll() is not None or answers(port), seconds=120)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def flushed(tracker: MlflowTracker) -> bool:
    tracker.flush()
    return not any(row["key"] == "train/loss" for row in tracker.pending())


def eventually(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_server_is_killed_and_started_again(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with server(store, port):
        handle = opened(tracking={"uri": f"http://127.0.0.1:{port}"})
        tracker = MlflowTracker(handle, run_folder=store)
        tracker.log(1, {"train/loss": 1.0})
        tracker.flush()
        assert tracker.pending() == []
    with SystemMetrics(tracker, node="rank0", interval_seconds=0.2):
        for step in (2, 3):
            tracker.log(step, {"train/loss": float(step)})
            began = time.monotonic()
            tracker.flush()
            assert time.monotonic() - began < trackers.FLUSH_SECONDS + 1
        assert finish(handle, "FAILED") is False
        with server(store, port):
            tracker.log(4, {"train/loss": 4.0})
            eventually(lambda: flushed(tracker))
            (store / "result.json").write_text("{}")
            assert log_artifacts(handle, store / "result.json")
            tracker.close()
            assert finish(handle, "FINISHED")
            points = MlflowClient(tracking_uri=handle.uri).get_metric_history(handle.run_id, "train/loss")
    assert [(p.step, p.value) for p in points] == [(s, float(s)) for s in (1, 2, 3, 4)]
    assert "answers again" in caplog.text
    assert list((store / "art").rglob("result.json"))
