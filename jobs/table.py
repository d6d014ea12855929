"""Run a table of experiments, several seeds each, and write their mean and spread as Markdown and CSV.

    python jobs/table.py TABLE.yaml [key.sub=value …] --out DIR [--at-once N]

TABLE.yaml: `recipe`, `seeds`, and `rows`: a label and its overrides, where {out} is DIR and {seed} the seed: a row may
so build on a run of an earlier row, DIR/<label>/<seed>. What is finished in DIR is not run again, and what was stopped
goes on. SIGTERM is handed on to the runs under way. jobs/tables/ holds those behind docs/results.md.
"""

import argparse
import csv
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import track

from polyprompt import recipe
from polyprompt.command import exit_status
from polyprompt.errors import ConfigError, StoppedError, TrainingError
from polyprompt.result import RunResult, faults

MULTITASK = Path(__file__).with_name("multitask.py")
#: What a run that SIGTERM ended returns.
STOPPED = 128 + signal.SIGTERM
Results = dict[str, list[RunResult]]


class Experiments(BaseModel):
    """A table: each row is a recipe with overrides, run once for each seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Path
    seeds: list[int] = Field(min_length=1)
    rows: dict[str, list[str]] = Field(min_length=1)

    def overrides(self, label: str, seed: int, out: Path) -> list[str]:
        """Return those of a run."""
        return [text.replace("{out}", str(out)).replace("{seed}", str(seed)) for text in self.rows[label]]


class UnderWay:
    """The runs that train now. Inside its `with` block a SIGTERM to this process goes to each, and no other begins."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> "UnderWay":
        self._before = signal.signal(signal.SIGTERM, self._hand_on)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def run(self, command: Sequence[str], log: IO[str]) -> int | None:
        """Return a run's status when it ends; None if it was not begun."""
        if self.stopped:
            return None
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._processes.add(process)
        if self.stopped:  # meanwhile
            process.terminate()
        try:
            return process.wait()
        finally:
            self._processes.discard(process)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        for process in tuple(self._processes):
            process.terminate()


def read(path: Path) -> Experiments:
    """Read a table file. Raises ConfigError."""
    try:
        return Experiments.model_validate(recipe.read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {faults(error)}") from None


def run(table: Experiments, overrides: Sequence[str], out: Path, at_once: int) -> Results:
    """Run what is not finished yet, `at_once` runs side by side. Raises TrainingError naming the log of a failed run,
    and StoppedError after a SIGTERM, when the runs under way have left their last bundles.

    Every run's config is checked before the first one starts.
    """
    cells = [
        (label, seed, [*table.overrides(label, seed, out), *overrides, f"train.seed={seed}"])
        for label in table.rows
        for seed in table.seeds
    ]
    for _, _, arguments in cells:
        recipe.load([table.recipe], arguments)

    def one(cell: tuple[str, int, list[str]]) -> tuple[str, RunResult]:
        label, seed, arguments = cell
        folder = out / re.sub(r"[^A-Za-z0-9]+", "_", label).strip("_") / str(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        job_log = folder.with_suffix(".log")
        command = [
            sys.executable,
            str(MULTITASK),
            str(table.recipe),
            *arguments,
            "--out",
            str(folder),
        ]
        with job_log.open("a") as log:
            status = under_way.run(command, log)
        if status is None or (under_way.stopped and status == STOPPED):
            raise StoppedError("SIGTERM ended the table; the same command goes on")
        if status:
            raise TrainingError(f"{label}, seed {seed}, ended with status {status}; see {job_log}")
        return label, RunResult.read(folder / "result.json")

    results: Results = {label: [] for label in table.rows}
    with UnderWay() as under_way, ThreadPoolExecutor(at_once) as pool:
        console = Console(stderr=True)
        for label, result in track(pool.map(one, cells), "runs", total=len(cells), console=console):
            results[label].append(result)
    return results


def lines(results: Results) -> list[list[str]]:
    """Return the table's lines: headings, the majority baseline, each row's mean ± standard deviation (of a sample)."""
    first = next(iter(results.values()))[0]
    tasks = list(first.eval)
    floors = [first.majority[task] for task in tasks]
    body = [
        [
            "",
            "mean",
            *(task.rpartition("/")[2] for task in tasks),
            "trained parameters",
            "steps",
            "s/step",
            "memory, MiB",
        ]
    ]
    body.append(
        ["majority", _spread([statistics.fmean(floors)]), *(_spread([floor]) for floor in floors), "", "", "", ""]
    )
    for label, runs in results.items():
        scores = [_spread([run.eval[task]["score"] for run in runs]) for task in tasks]
        seconds = statistics.median(run.train_seconds / run.num_steps for run in runs)
        costs = [f"{runs[0].num_trained_parameters:,}", f"{runs[0].num_steps:,}", f"{seconds:.2f}"]
        costs.append(f"{max(run.peak_memory_bytes for run in runs) / 2**20:,.0f}")
        body.append([label, _spread([run.mean for run in runs]), *scores, *costs])
    return body


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def markdown(body: Sequence[Sequence[str]]) -> str:
    """Return the lines as a Markdown table."""
    rows = [f"| {' | '.join(row)} |" for row in body]
    return "\n".join([rows[0], "|---" * len(body[0]) + "|", *rows[1:]]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of every run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, table.md and table.csv")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (1)")
    options = parser.parse_intermixed_args()

    def act() -> int:
        body = lines(run(read(options.table), options.overrides, options.out, options.at_once))
        text = markdown(body)
        (options.out / "table.md").write_text(text)
        with (options.out / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows(body)
        print(text)
        return 0

    return exit_status(act, stopped="stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
