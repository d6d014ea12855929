"""Workers, and what a whole run costs beside its steps: starts, tracking, bundles."""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import METHODS, Case, Group
from polyprompt.errors import TrainingError
from polyprompt.result import RunResult
from polyprompt.section import Section

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "jobs" / "recipes" / "embedded_smop.yaml"
#: Steps, and examples to evaluate on, of a whole run.
COMMON = {
    "train.max_steps": 40, "train.batch_size": 64, "train.num_shards": 2, "train.save_steps": 40,
    "data.max_validation_examples": 20,
    "evaluate.steps": "null", "tracking.enabled": "false", "compute.num_workers": 0, "compute.cpus_per_worker": 1,
}  # fmt: skip
#: What each whole run has beside the first.
RUNS: dict[str, dict[str, Any]] = {
    "in this process": {},
    "with MLflow": {"tracking.enabled": "true"},
    "with ten bundles": {"train.save_steps": 4},
    "evaluated five times": {"evaluate.steps": 8},
    "one Ray worker": {"compute.num_workers": 1},
    "two Ray workers": {"compute.num_workers": 2},
}


def groups() -> list[Group]:
    """One and two workers of a thread each, on the same global batches."""
    made = []
    for label, method in (("SMoP", METHODS["smop"]), ("full tuning", METHODS["full"])):
        common: dict[str, Any] = {
            "loop": "fit", "backbone": "t5-small", "method": method, "lengths": 128, "rows": 8, "shards": 2,
            "threads": 1,
        }  # fmt: skip
        cases = [Case(name=f"{n} worker{'s'[: n - 1]}", workers=n, **common) for n in (1, 2)]
        made.append(Group(name=f"workers, {label}", cases=cases, turns=5))
    return made


class WholeRun(Section):
    """A command from its start to its end. seconds: of each repetition, in all; training: of its steps alone."""

    name: str
    seconds: list[float]
    training: list[float]

    @property
    def beside(self) -> float:
        """Median seconds that were no training."""
        return statistics.median(all_ - own for all_, own in zip(self.seconds, self.training, strict=True))


def measure(name: str, folder: Path, repetitions: int) -> WholeRun:
    """Run the main job as a user does. Raises TrainingError, with what it said, if it fails."""
    overrides = [f"{key}={value}" for key, value in (COMMON | RUNS[name]).items()]
    seconds, training = [], []
    for number in range(repetitions):
        # Another seed: a finished run would not train again.
        out = folder / f"{name.replace(' ', '_')}_{time.time_ns()}"
        command = [sys.executable, str(ROOT / "jobs" / "multitask.py"), str(RECIPE), *overrides, f"train.seed={number}"]
        command += [f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", "--out", str(out)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"whole run {name!r} failed with status {done.returncode}: {done.stderr[-2000:]}")
        seconds.append(time.monotonic() - began)
        training.append(RunResult.read(out / "result.json").train_seconds)
    return WholeRun(name=name, seconds=seconds, training=training)


HEADINGS = ("Run of 40 steps", "In all, s", "Training, s", "Beside it, s", "More than the first")


def rows(runs: list[WholeRun]) -> list[tuple[str, ...]]:
    """Return each run's seconds, of all, of training and beside it, and what it has beside the first run's."""
    base = runs[0].beside
    return [
        (
            run.name,
            f"{statistics.median(run.seconds):.1f}",
            f"{statistics.median(run.training):.1f}",
            f"{run.beside:.1f}",
            f"{run.beside - base:+.1f}",
        )
        for run in runs
    ]
