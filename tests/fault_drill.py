"""What the drills of faults share: waiting for a run to come somewhere, and what it lost."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from polyprompt import checkpoint
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.worker import LOG, METRICS, PROGRESS

Table = dict[str, Any]
LOST = "The workers were lost: "


def go(table: Table, out: Path, say: Callable[[str], None] = lambda line: None, **compute: Any) -> RunResult:
    return run(check({**table, "compute": compute}), out=out, say=say)


def same(one: RunResult, other: RunResult) -> bool:
    """Not merely near: equal."""
    return (one.sequence, one.loss_curve, one.eval) == (other.sequence, other.loss_curve, other.eval)


def newest(out: Path) -> int:
    """The step of the newest bundle; 0 for none."""
    folders = checkpoint.bundles(out / "bundles")
    return int(folders[-1].name.removeprefix("step_")) if folders else 0


def logged(out: Path) -> int:
    """The last step that was logged; 0 for none."""
    file = out / PROGRESS
    return int(json.loads(file.read_text())["step"]) if file.exists() else 0


def steps_lost(out: Path) -> int:
    """Steps that were logged after the newest bundle, while no worker runs."""
    return max(0, logged(out) - newest(out))


class Losses:
    """Takes a run's lines, and the steps lost each time that its workers are. at: when they were."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = 0.0
        self.at: list[float] = []
        self.said: list[str] = []
        self.steps: list[int] = []

    def __call__(self, line: str) -> None:
        self.began = self.began or time.time()
        if line.startswith(LOST):
            self.at.append(time.time())
            self.said.append(line)
            self.steps.append(steps_lost(self.out))

    def seconds(self) -> str:
        """For people: how long the run took from its start to its first step, and from its first loss to the next."""
        lines = [json.loads(line) for line in (self.out / METRICS).read_text().splitlines()]
        steps = [line["timestamp_ms"] / 1000 for line in lines if "train/loss" in line]
        again = next(step for step in steps if step > self.at[0])
        return f"{steps[0] - self.began:.1f} s from start to step, {again - self.at[0]:.1f} s from the loss to one"


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def tried_again(folder: Path) -> int:
    """How often the run's log says that a bundle could not be written."""
    return len(re.findall("cannot be written .* Tried again", (folder / LOG).read_text()))


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    """Do something while the test trains; join it to know that it was done."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def processes(name: str) -> list[psutil.Process]:
    """Those of Ray's actors below this process whose class has this in its name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def train_workers() -> list[psutil.Process]:
    return processes("RayTrainWorker")
