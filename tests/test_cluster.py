"""From nothing to a run on a real cluster of two nodes: a head that trains nothing, a node that does, tokens, a server
of MLflow, and jobs that come with their code through `ray job submit`. Everything binds to this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.util import get_node_ip_address

from polyprompt import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.own_processes, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SHIPPED = "0.0.0+shipped"
#: Of the embedded recipe, so that a run takes seconds.
SMALL = [
    "data.max_train_examples=64",
    "data.max_validation_examples=8",
    "train.batch_size=8",
    "train.logging_steps=1",
    "evaluate.steps=null",
]


@dataclass(frozen=True)
class Cluster:
    """code: what is submitted. home: the nodes' shared folder. environment: of who submits."""

    code: Path
    home: Path
    address: str
    mlflow: str
    environment: dict[str, str]

    def ray(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), *arguments]
        return subprocess.run(
            command, cwd=self.code, env=environment or self.environment, capture_output=True, text=True, check=False
        )

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Submit as the README says, wait for the end unless the options say otherwise, and return the log."""
        job = ("python", "jobs/multitask.py", "jobs/recipes/embedded.yaml", *SMALL, *arguments)
        done = self.ray("job", "submit", "--address", self.address, *options, "--working-dir", ".", "--", *job)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def runs(self) -> dict[str, str]:
        """Return the name and status of every run in the tracking store."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.mlflow)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return {run.info.run_name: run.info.status for run in client.search_runs(experiments)}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with all its children, each by its pid."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield started
        finally:
            family = [psutil.Process(started.pid)] if psutil.pid_exists(started.pid) else []
            family += [child for parent in list(family) for child in parent.children(recursive=True)]
            started.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for one in alive:
                with suppress(psutil.NoSuchProcess):  # it may end while the others are ended
                    one.kill()
            started.wait()


def wait(what: str, is_there: Callable[[], bool], started: subprocess.Popen[bytes], log: Path) -> None:
    while not is_there():
        assert started.poll() is None, f"{what} ended:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    tmp = tmp_path_factory.mktemp("cluster")
    code, home, token = tmp / "code", tmp / "home", tmp / "token"
    home.mkdir()
    for folder in ("platform", "jobs", "tuning"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, code)
    version = code / "platform" / "polyprompt" / "__init__.py"
    version.write_text(f'{version.read_text()}\n__version__ = "{SHIPPED}"\n')
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    client = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "COLUMNS": "120"}
    gcs, dashboard, mlflow_port, *rest = free_ports(13)
    node = {
        **client,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the nodes' own
        "POLYPROMPT_HOME": str(home),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "XDG_CACHE_HOME": str(tmp / "cache"),
    }
    # Sockets' paths are short.
    with ExitStack() as stack:
        sessions = stack.enter_context(tempfile.TemporaryDirectory(prefix="pp", dir="/tmp", ignore_cleanup_errors=True))
        store = f"sqlite:///{home}/mlflow.db"
        server = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1"]
        server += ["--backend-store-uri", store, "--artifacts-destination", str(home / "mlartifacts")]
        log = tmp / "mlflow.log"
        started = stack.enter_context(process(server, node, log))
        wait("mlflow server", lambda: answers(f"http://127.0.0.1:{mlflow_port}/health"), started, log)

        def start(name: str, *options: str, ports: list[int]) -> subprocess.Popen[bytes]:
            kinds = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
            kinds += ("metrics-export-port",)
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000"]
            command += ["--min-worker-port=0", "--max-worker-port=0"]  # any that is free
            command += [f"--{kind}={port}" for kind, port in zip(kinds, ports, strict=True)]
            return stack.enter_context(process([*command, *options], node, tmp / f"{name}.log"))

        where = [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        where += [f"--ray-client-server-port={rest[8]}", f"--temp-dir={sessions}"]
        address = f"http://127.0.0.1:{dashboard}"
        head = start("head", "--head", "--num-cpus=0", *where, ports=rest[:4])
        found = Cluster(code, home, address, node["MLFLOW_TRACKING_URI"], client)
        list_jobs = ("job", "list", "--address", address)
        wait("head", lambda: found.ray(*list_jobs).returncode == 0, head, tmp / "head.log")
        second = start("second", f"--address={get_node_ip_address()}:{gcs}", "--num-cpus=2", ports=rest[4:8])
        wait("second", lambda: "Ray runtime started" in (tmp / "second.log").read_text(), second, tmp / "second.log")
        yield found


def test_a_job_is_submitted_with_no_further_flag(cluster: Cluster) -> None:
    log = cluster.submit("name=submitted", "train.max_steps=6")
    assert "step 6/6" in log
    assert "succeeded" in log
    steps = [line for line in log.splitlines() if "step " in line]
    assert not any("\x1b" in line or "\r" in line for line in steps)  # no bar in a log file
    folder = cluster.home / "runs" / "submitted"
    assert f"Everything about this run is in {folder}" in log
    newest = checkpoint.newest_whole(folder / "bundles")
    assert newest is not None
    # What the workers ran is what was submitted, not what may be installed.
    assert checkpoint.verify(newest)["versions"]["polyprompt"] == SHIPPED
    assert json.loads((folder / "result.json").read_text())["num_workers"] == 2
    assert cluster.runs()["submitted"] == "FINISHED"
    # A job's working folder goes with it.
    assert not (cluster.code / "runs").exists()


def test_a_dry_run_says_what_the_run_gets(cluster: Cluster) -> None:
    log = cluster.submit("name=dry", "--dry-run")
    assert "2 workers of 1 CPU" in log
    assert "0 CPU: 0" in log  # the head
    assert "2 CPU: 2" in log
    assert not (cluster.home / "runs" / "dry").exists()


def test_a_stopped_job_leaves_a_bundle_and_goes_on(cluster: Cluster) -> None:
    long = ("name=stopped", "train.max_steps=100000", "train.save_steps=100000")
    folder = cluster.home / "runs" / "stopped"
    cluster.submit(*long, options=("--no-wait", "--submission-id", "stopped"))
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    done = cluster.ray("job", "stop", "--address", cluster.address, "stopped")
    assert done.returncode == 0, done.stderr
    [bundle] = checkpoint.bundles(folder / "bundles")
    checkpoint.verify(bundle)
    assert cluster.runs()["stopped"] == "KILLED"
    logs = cluster.ray("job", "logs", "--address", cluster.address, "stopped").stdout
    assert "stopped: SIGTERM ended the run at step" in logs
    cluster.submit(*long, options=("--no-wait", "--submission-id", "again"))
    while f"goes on from {bundle}" not in cluster.ray("job", "logs", "--address", cluster.address, "again").stdout:
        time.sleep(1)
    assert cluster.ray("job", "stop", "--address", cluster.address, "again").returncode == 0


def test_without_the_token_nobody_submits(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(os.urandom(32).hex())
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(other)}
    done = cluster.ray("job", "list", "--address", cluster.address, environment=stranger)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
