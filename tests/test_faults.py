"""What clusters do to runs, really done. Each ends with the unbroken run's curve, or at once and clearly, and tells its
line of the drill (`pytest -m faults`). More of it: test_run.py, test_loop.py, test_stopping.py."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from fault_drill import (
    LOST,
    Losses,
    Table,
    go,
    logged,
    meanwhile,
    newest,
    processes,
    same,
    steps_lost,
    train_workers,
    tried_again,
    until,
)

from polyprompt import checkpoint
from polyprompt.batches import Batches
from polyprompt.errors import NotFiniteError, StoppedError, StorageError
from polyprompt.plan import build
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.stopping import STOP
from polyprompt.worker import Job, train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.faults
Drill = Callable[..., None]


@pytest.fixture
def long_run(small_run: Table) -> Table:
    """A bundle each 5 of 60 steps: less than two seconds."""
    small_run["train"] |= {"max_steps": 60, "save_steps": 5, "save_total_limit": 3}
    small_run["evaluate"] = {}
    return small_run


# --- the folder of the run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk is mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave room for a few lines, not for a bundle."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(file.tell() - (1 << 17))
    return ballast


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_is_waited_for_and_ends_the_run_if_it_stays(
    long_run: Table, small_disk: Path, tmp_path: Path, drill: Drill
) -> None:
    long_run["train"]["save_total_limit"] = 100  # deleting an old bundle would make room for the next
    unbroken = go(long_run, tmp_path / "a")
    out = small_disk / "run"

    def fill_early() -> None:
        until(lambda: newest(out) >= 10)
        fill(small_disk)

    filling = meanwhile(fill_early)
    with pytest.raises(StorageError, match=r"bundle step_\d+ cannot be written .*Last good bundle: .*step_") as error:
        go(long_run, out, num_workers=2, storage_timeout_seconds=1)
    filling.join()
    lost = int(str(error.value).split("step_")[1][:8]) - newest(out)
    (small_disk / "ballast").unlink()
    here, tries = newest(out), tried_again(out)

    def fill_and_free() -> None:
        until(lambda: newest(out) > here)
        ballast = fill(small_disk)
        until(lambda: tried_again(out) > tries)
        ballast.unlink()

    filling = meanwhile(fill_and_free)
    resumed = go(long_run, out, storage_timeout_seconds=60)
    filling.join()
    equal = same(resumed, unbroken)
    drill(
        "the disk is full: ended clearly after 1 s (2 workers), started again, full for a while", lost=lost, equal=equal
    )
    assert lost <= 5
    assert equal


def test_a_folder_that_is_away_for_a_while_is_waited_for(long_run: Table, tmp_path: Path, drill: Drill) -> None:
    unbroken = go(long_run, tmp_path / "a")
    out, away = tmp_path / "b", tmp_path / "away"

    def take_away() -> None:
        until(lambda: newest(out) >= 10)
        out.rename(away)
        until(lambda: tried_again(away) > 0)
        assert not out.exists(), "nothing is written where the folder was"
        away.rename(out)

    moving = meanwhile(take_away)
    broken = go(long_run, out)
    moving.join()
    equal = same(broken, unbroken)
    drill("the run's folder vanishes and comes back", lost=0, equal=equal)
    assert equal
    assert tried_again(out)


# --- processes and machines


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
class TestProcesses:
    def test_a_worker_that_hangs_is_named_and_replaced(self, long_run: Table, tmp_path: Path, drill: Drill) -> None:
        unbroken = go(long_run, tmp_path / "a")
        out = tmp_path / "b"
        losses, stopped = Losses(out), []

        def stop_one() -> None:
            until(lambda: logged(out) >= 18)  # between two bundles
            stopped.append(train_workers()[-1])
            stopped[0].suspend()

        stopping = meanwhile(stop_one)
        broken = go(long_run, out, losses, num_workers=2, hang_timeout_seconds=10, storage_timeout_seconds=5)
        stopping.join()
        with suppress(Exception):
            stopped[0].kill()  # whatever Ray made of it
        equal = same(broken, unbroken)
        drill("a worker hangs (SIGSTOP), named after 10 s", lost=losses.steps[0], equal=equal)
        assert f"process {stopped[0].pid}) gives no sign of life" in losses.said[0]
        assert losses.steps[0] <= 5
        assert equal

    def test_a_killed_controller_costs_nothing(self, long_run: Table, tmp_path: Path, drill: Drill) -> None:
        unbroken = go(long_run, tmp_path / "a")
        out = tmp_path / "b"
        losses = Losses(out)

        def kill() -> None:
            until(lambda: logged(out) >= 18)  # between two bundles
            for process in processes("TrainController"):
                process.kill()

        killing = meanwhile(kill)
        broken = go(long_run, out, losses, num_workers=2)
        killing.join()
        equal = same(broken, unbroken)
        drill("SIGKILL to Ray's controller of the run", lost=losses.steps[0], equal=equal)
        assert losses.steps[0] <= 5
        assert equal

    def test_workers_come_and_go(self, long_run: Table, tmp_path: Path, drill: Drill) -> None:
        """Dropout on, fp32; 3 does not divide the 4 shards. The sum of gradients does not depend on who computes."""
        unbroken = go(long_run, tmp_path / "a")
        out = tmp_path / "b"
        for workers, step in ((1, 10), (2, 25), (4, 40)):

            def stop(step: int = step) -> None:
                until(lambda: newest(out) >= step)
                (out / STOP).touch()

            stopping = meanwhile(stop)
            with pytest.raises(StoppedError, match="ended the run at step"):
                go(long_run, out, num_workers=workers)
            stopping.join()
        broken = go(long_run, out, num_workers=3)
        assert broken.num_workers == 3
        equal = same(broken, unbroken)
        drill("1, 2, 4, then 3 workers, stopped at each change", lost=0, equal=equal)
        assert equal

    def test_what_is_not_finite_on_one_worker_is_traced(self, small_run: Table, tmp_path: Path, drill: Drill) -> None:
        """The prompt of one task rots in a bundle; at the next step one of two workers has a row of it."""
        small_run["train"] |= {"batch_size": 2, "num_shards": 2, "save_steps": 1, "save_total_limit": 100}
        small_run["evaluate"] = {}
        out, config = tmp_path / "out", check(small_run)
        go(small_run, out)
        (out / "result.json").unlink()  # as if it had been stopped
        task = 1
        model, data = build(config)
        batches = Batches(data, config, model.backbone.tokenizer.pad_token_id, range(2))
        shards = {}
        for step in range(2, 13):
            shards[step] = [s for s in batches[step].shards if task in s.micro_batches[0].task_B]
        step = next(step for step, found in shards.items() if len(found) == 1)
        for folder in checkpoint.bundles(out / "bundles")[step - 1 :]:
            shutil.rmtree(folder)
        rot(out / "bundles" / checkpoint.folder_name(step - 1), "method.encoder.prompt_KPH", task)
        with pytest.raises(NotFiniteError) as error:
            go(small_run, out, num_workers=2)
        shard, said = shards[step][0], str(error.value)
        drill("NaN on one worker: named with worker, task and example", lost=0, equal="ended at once")
        example = shard.examples[0][0]
        wanted = f"at step {step}: worker {shard.number} of 2: loss of embedded/nli, training example {example} (shard"
        assert wanted in said
        assert f"worker {1 - shard.number} of 2" not in said


def rot(bundle: Path, name: str, row: int) -> None:
    """Put NaN into a row of a tensor, as if it had been written so."""
    tensors = safetensors.torch.load_file(bundle / checkpoint.TENSORS)
    tensors[name][row] = torch.nan
    safetensors.torch.save_file(tensors, bundle / checkpoint.TENSORS, metadata={"format": "pt"})
    manifest = json.loads((bundle / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.TENSORS] = hashlib.sha256((bundle / checkpoint.TENSORS).read_bytes()).hexdigest()
    (bundle / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_killed_node_costs_nothing(long_run: Table, tmp_path: Path, drill: Drill) -> None:
    """Of two nodes with a worker each, the one that does not run the job dies; another joins."""
    long_run["train"]["max_steps"] = 150
    unbroken, out = go(long_run, tmp_path / "a"), tmp_path / "b"
    with on_nodes({**long_run, "compute": {"num_workers": 2}}, out) as (nodes, job):
        until(lambda: logged(out) >= 18 or job.poll() is not None)
        tell(nodes, "kill")
        assert job.stdout is not None
        lost = [steps_lost(out) for line in job.stdout if line.startswith(LOST)]
        assert job.wait() == 0
    broken = RunResult.read(out / "result.json")
    equal = same(broken, unbroken)
    drill("a node of two is killed, another joins", lost=sum(lost), equal=equal)
    assert len(lost) == 1
    assert lost[0] <= 5
    assert equal


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_node_that_joins_is_used(long_run: Table, tmp_path: Path, drill: Drill) -> None:
    """A run of one worker on the only node; it goes on with two. Held back, it is not over before the node is there."""
    long_run["train"] |= {"max_steps": 200, "batch_size": 4, "num_shards": 2}
    unbroken, out = go(long_run, tmp_path / "a"), tmp_path / "b"
    compute = {"num_workers": [1, 2], "resize_interval_seconds": 1}
    lost: list[int] = []
    with on_nodes({**long_run, "compute": compute}, out, "grow") as (nodes, job):
        until(lambda: logged(out) >= 18 or job.poll() is not None)
        (worker,) = train_workers()
        worker.suspend()
        tell(nodes, "join")
        assert nodes.stdout is not None
        assert nodes.stdout.readline() == "joined\n"
        seen = logged(out)
        while job.poll() is None:
            with suppress(psutil.NoSuchProcess):  # once it was ended for two others
                worker.resume()
                time.sleep(0.02)
                worker.suspend()
            now = logged(out)
            if 0 < now < seen:  # it went on from a bundle; at the end the file goes
                lost.append(seen - now + 1)
            seen = now
            time.sleep(0.1 if worker.is_running() else 0.01)
        assert job.wait() == 0
    broken = RunResult.read(out / "result.json")
    equal = same(broken, unbroken)
    drill("a node joins: 1 worker, then 2", lost=sum(lost), equal=equal)
    assert broken.num_workers == 2
    assert len(lost) <= 1  # none: it was stopped right behind a bundle
    assert sum(lost) <= 5
    assert equal


@contextmanager
def on_nodes(table: Table, out: Path, *how: str) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """Start a cluster (cluster_nodes.py) and a job on it; yield both processes."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(check(table).to_yaml())
    with (
        tempfile.TemporaryDirectory(prefix="pp", dir="/tmp", ignore_cleanup_errors=True) as sessions,
        ExitStack() as stack,
    ):
        environment = {**os.environ, "RAY_TMPDIR": sessions, "PYTHONUNBUFFERED": "1"}

        def start(*command: str, **more: str) -> subprocess.Popen[str]:
            started = subprocess.Popen(
                [sys.executable, *command], env={**environment, **more}, cwd=out.parent, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(started.wait)
            stack.callback(started.terminate)
            return started

        nodes = start(str(ROOT / "tests" / "cluster_nodes.py"), *how)
        assert nodes.stdout is not None
        address = next(line.strip() for line in nodes.stdout if line[0].isdigit())
        yield nodes, start(str(ROOT / "jobs" / "multitask.py"), str(recipe), "--out", str(out), RAY_ADDRESS=address)
        with suppress(BrokenPipeError):
            nodes.communicate("end\n", timeout=60)


def tell(nodes: subprocess.Popen[str], word: str) -> None:
    assert nodes.stdin is not None
    nodes.stdin.write(f"{word}\n")
    nodes.stdin.flush()


# --- the tracking server


@pytest.mark.slow
def test_a_tracking_server_that_goes_and_comes_leaves_no_gap(long_run: Table, store: Path, drill: Drill) -> None:
    """It is killed under the run, which is then stopped; both start again."""
    from mlflow import MlflowClient
    from test_tracking import server

    long_run["train"]["max_steps"] = 120
    unbroken = go(long_run, store / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    long_run["tracking"] = {"uri": uri, "system_metrics_interval_seconds": None}
    out = store / "b"
    with ExitStack() as stack:
        stack.enter_context(server(store, port))

        def kill() -> None:
            until(lambda: newest(out) >= 10)
            stack.close()
            here = newest(out)
            until(lambda: newest(out) >= here + 10)
            (out / STOP).touch()

        killing = meanwhile(kill)
        with pytest.raises(StoppedError):
            go(long_run, out)
        killing.join()
    with server(store, port):
        broken = go(long_run, out)
        points = MlflowClient(tracking_uri=uri).get_metric_history(broken.run_id, "train/loss")
    equal = same(broken, unbroken)
    drill("MLflow's server is killed, and started again later: each point there once", lost=0, equal=equal)
    assert sorted((p.step, p.value) for p in points) == [(int(s), v) for s, v in broken.loss_curve]
    assert equal


# --- how long it takes to go on


class AtStep(Exception):
    def __init__(self, step: float) -> None:
        self.step, self.at = int(step), time.perf_counter()


def first_step(table: Table, folder: Path) -> tuple[int, float]:
    """Start or go on; return the first step, and the seconds until its bundle was there."""

    def announce(metrics: Mapping[str, float], bundle: Path) -> None:
        raise AtStep(metrics["step"])

    began = time.perf_counter()
    with pytest.raises(AtStep) as found:
        train(Job(check(table), folder, handle=None), torch.device("cpu"), announce)
    return found.value.step, found.value.at - began


def test_going_on_takes_no_longer_the_further_a_run_is(small_run: Table, tmp_path: Path, drill: Drill) -> None:
    """The seconds are shown, not judged. The bundle of step 100,000 is one of step 10, put forward."""
    small_run["train"] |= {"max_steps": 1_000_000, "save_steps": 1, "logging_steps": 10}
    small_run["evaluate"] = {}
    folder, far = tmp_path / "run", tmp_path / "far"
    folder.mkdir()
    first_step({**small_run, "train": {**small_run["train"], "save_steps": 10}}, folder)
    (tmp_path / "fresh").mkdir()
    _, fresh = first_step(small_run, tmp_path / "fresh")
    shutil.copytree(folder, far)
    put_forward(far, 100_000)
    early, late = first_step(small_run, folder), first_step(small_run, far)
    told = f"{fresh:.2f} s from nothing, {early[1]:.2f} s from step 10, {late[1]:.2f} s from step 100,000"
    drill(f"start to first step: {told}", lost=0, equal="not compared")
    assert (early[0], late[0]) == (11, 100_001)


def put_forward(folder: Path, step: int) -> None:
    """Make the newest bundle one of a later step, with a point of the curve and a line of metrics each 10 steps."""
    old = checkpoint.bundles(folder / "bundles")[-1]
    bundle = checkpoint.read(old)
    state = json.loads((old / checkpoint.STATE).read_text())
    state["train"] |= {"step": step, "loss_curve": [[at, 1.0] for at in range(10, step + 1, 10)]}
    optimizer = bundle.optimizer()
    optimizer["schedule"]["last_epoch"] = step
    checkpoint.write(
        folder / "bundles",
        step=step,
        tensors=bundle.tensors,
        optimizer=optimizer,
        state=state,
        config=bundle.config,
        backbone=bundle.backbone,
        commit="",
    )
    line = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    lines = [json.dumps({**json.loads(line), "step": at}) for at in range(10, step + 1, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
