"""A registered model where nothing but the package is installed, and behind MLflow's own server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_packaging import wheel_of
from test_registry import in_store

from polyprompt import registry
from polyprompt.predictor import Prediction, Predictor, find_bundle

ROOT = Path(__file__).parents[1]
NAME = "my-tasks"
#: Starting a server, or the imports of a fresh environment, on a machine that does much else.
PATIENCE_SECONDS = 300
ROWS: list[dict[str, Any]] = [
    {"task": "my/larger", "text": "3 and 5"},
    {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
    {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
    {"task": "nobody"},
]
_PREDICT = """
import json, sys
import mlflow, pandas, polyprompt
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
found = model.predict(pandas.DataFrame(json.loads(sys.argv[3])))
print("ANSWERS " + json.dumps({"file": polyprompt.__file__, "answers": found.to_dict("records")}))
"""


@pytest.fixture
def registered(trained_run: Path, store: Path) -> tuple[str, Path]:
    """The address of the store and the run that it holds a version of."""
    uri = f"sqlite:///{store}/mlflow.db"
    folder = store / "recorded"
    shutil.copytree(trained_run, folder)
    registry.register(in_store(folder, uri), NAME, uri)
    return uri, folder


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more


def same(found: list[dict[str, Any]], run: Path) -> None:
    expected: list[Prediction] = Predictor(find_bundle(run)).predict(ROWS)
    for line, answer in zip(found, expected, strict=True):
        assert line["prediction"] == answer.prediction
        assert bool(line["error"]) == bool(answer.error)
        assert answer.error or line["score"] == pytest.approx(answer.score, abs=1e-5)
        assert json.loads(line["choice_scores"]) == pytest.approx(dict(answer.choice_scores), abs=1e-5)
    assert "'nobody' is not one of this model's" in found[-1]["error"]


@pytest.mark.slow
@pytest.mark.own_processes
def test_it_answers_where_only_the_package_is_installed(registered: tuple[str, Path], tmp_path: Path) -> None:
    uri, run = registered
    python = tmp_path / "fresh" / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    for command in (
        [sys.executable, "-m", "venv", str(tmp_path / "fresh")],
        [str(python), "-m", "pip", "install", "--quiet", *constraints, str(wheel_of(tmp_path / "build"))],
    ):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(python), "-c", _PREDICT, uri, f"models:/{NAME}@candidate", json.dumps(ROWS)],
        cwd=tmp_path / "build",
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    told = json.loads(line.removeprefix("ANSWERS "))
    assert Path(told["file"]).is_relative_to(tmp_path / "fresh")
    same(told["answers"], run)


@pytest.mark.slow
@pytest.mark.own_processes
def test_mlflow_serves_rows_of_mixed_tasks(registered: tuple[str, Path], tmp_path: Path) -> None:
    uri, run = registered
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    # MLflow calls uvicorn by its name, as an activated environment has it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--model-uri", f"models:/{NAME}@candidate"],
            cwd=tmp_path,
            env=environment(MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(ROOT / "platform"), PATH=path),
            stdout=output,
            stderr=output,
        )
    try:
        await_health(server, f"http://127.0.0.1:{port}/health", log)
        body = json.dumps({"dataframe_records": ROWS}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            same(json.load(response)["predictions"], run)
    finally:
        end(server)


def await_health(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end_at:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer from {address} within {PATIENCE_SECONDS} s: {log.read_text()}")


def end(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started, by their ids."""
    if server.poll() is not None:
        return
    parent = psutil.Process(server.pid)
    processes = [*parent.children(recursive=True), parent]
    for process in processes:
        process.terminate()
    server.wait(timeout=60)
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
