"""Measure what polyprompt costs, against the machine's limit and against other ways to do the same.

    python jobs/benchmark.py [--cases NAME …] [--quick] [--out DIR] [--data DIR] [--page docs/performance.md]
    python jobs/benchmark.py --fit [fp32] [bf16] [--threads N]
    python jobs/benchmark.py --runs N
    python jobs/benchmark.py --list

Without --cases: the groups behind the ratios that must hold. --cases names cases or groups of these or of the grid
(kind/backbone/precision/lengths/method), * for any text. Each case has a process of its own; those of a group take
turns, and a ratio is the median over turns. What DIR holds already is not measured again; where the code or the machine
has changed, name another DIR.

--fit measures the rates that a dry run estimates a run's time with. --runs measures what a run of the main job costs
beside its steps.
"""

import argparse
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# jobs/ too: the server that starts the processes imports this file without its folder.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from benchmarks import cases, fitting, ratios, report, scaling, turns
from benchmarks.cases import Group
from benchmarks.results import Machine, Results
from benchmarks.setting import Setting, config_of
from rich.console import Console
from rich.progress import track

from polyprompt import step_time
from polyprompt.command import exit_status, positive
from polyprompt.errors import ConfigError, PolypromptError
from polyprompt.report import Progress

ROOT = Path(__file__).resolve().parents[1]
#: Steps that give the embedded backbone's prompts answers at all, for the cases that need some.
TRAINED_STEPS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", metavar="NAME", help="cases or groups; * for any text")
    what.add_argument("--fit", nargs="*", metavar="PRECISION", choices=["fp32", "bf16"], help="both unless named")
    what.add_argument("--runs", type=positive, metavar="N", help="whole runs of the main job, each N times")
    parser.add_argument("--list", action="store_true", help="show the names and measure nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes, two turns: to try it out, not for figures")
    parser.add_argument("--out", type=Path, help="runs/benchmark, with --quick runs/benchmark_quick")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real rows")
    parser.add_argument("--threads", type=positive, help="of each case; all CPUs, or 1 of a worker with --fit")
    parser.add_argument("--page", type=Path, help="a Markdown page to put the tables into")
    options = parser.parse_args()
    options.threads = options.threads or (1 if options.fit is not None else os.cpu_count())
    # So that the processes of the cases end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return exit_status(lambda: act(options), stopped="stopped; the same command goes on with the next group")


def act(options: argparse.Namespace) -> int:
    """Measure and show; raises PolypromptError."""
    groups = wanted(options)
    if options.list:
        for group in groups:
            print(group.name, *(f"    {case.name}" for case in group.cases), sep="\n")
        return 0
    faults = Benchmark(options).run(groups)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def wanted(options: argparse.Namespace) -> list[Group]:
    """Return the groups that the command line asks for."""
    if options.fit is not None:
        precisions = options.fit or ["fp32", "bf16"]
        return [g for p in precisions for g in fitting.groups(p, options.threads, os.cpu_count() or 1)]
    if options.runs:
        return []
    known = [*ratios.groups(options.quick), *([] if options.quick else scaling.groups())]
    if options.cases:
        return cases.chosen([*known, *cases.grid()], options.cases)
    return [*known, *(cases.grid() if options.list else [])]


class Benchmark:
    """One call of the command. Raises ConfigError where --out holds what this machine and code did not measure."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = (options.out or Path("runs") / ("benchmark_quick" if options.quick else "benchmark")).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        file, machine = self.out / "results.json", Machine.here(options.threads, device)
        self.results = Results.read(file) if file.exists() else Results(machine=machine, groups={}, tables={})
        if self.results.machine != machine:
            raise ConfigError(
                f"{file} was measured on another machine, with other threads or other code ({self.results.machine} "
                f"there, {machine} here), and figures of one file must compare. Give another --out"
            )
        self.setting = Setting(self.out, options.data.absolute(), options.threads, device)
        self.command = shlex.join(["python", "jobs/benchmark.py", *sys.argv[1:]])

    def run(self, groups: Sequence[Group]) -> list[PolypromptError]:
        """Measure what is left, write and show all; return what went wrong: the rest is measured all the same."""
        faults = self._groups([group for group in groups if not self.results.has(group)])
        if self.options.fit is not None and not faults:
            self._fit(groups)
        if self.options.runs:
            self._whole_runs()
        report.write(self.results, self.out, self.command)
        report.show(self.results, Console())
        if self.options.page:
            report.into_page(self.options.page, report.markdown(self.results, self.command))
        print(f"Everything is in {self.out}")
        return faults

    def _groups(self, left: Sequence[Group]) -> list[PolypromptError]:
        if any(case.trained for group in left for case in group.cases):
            self.setting = replace(self.setting, trained=trained(self.out, self.options.threads))
        faults: list[PolypromptError] = []
        parts = list(itertools.accumulate(map(turns.num_parts, left), initial=0))
        with Progress(parts[-1], what="part") as bar:
            for group, first in zip(left, parts, strict=False):
                steps = itertools.count(first + 1)
                try:
                    measured = turns.measure(group, self.setting, lambda what, s=steps: bar.show(next(s), what))
                except PolypromptError as fault:
                    faults.append(fault)
                    continue
                self.results = self.results.with_group(group, measured)
                report.write(self.results, self.out, self.command)
        return faults

    def _fit(self, groups: Sequence[Group]) -> None:
        fits = {}
        for precision in dict.fromkeys(group.cases[0].precision for group in groups):
            measured = [
                one for group in groups for one in self.results.groups[group.name][1] if one.case.precision == precision
            ]
            config = config_of(measured[0].case, self.setting)
            fitted = fitting.fit(measured, self.setting)
            fits[step_time.key(config)] = fitted
            title = f"Steps, estimated: {step_time.key(config)}"
            self.results = self.results.with_table(
                title, fitting.HEADINGS, fitting.rows(measured, self.setting, fitted)
            )
        fitting.keep(fits, self.results.machine)
        print(f"The rates are in {step_time.file()}; a dry run reads them there.")

    def _whole_runs(self) -> None:
        runs = [
            scaling.measure(name, self.out / "whole_runs", self.options.runs)
            for name in track(scaling.RUNS, "whole runs", console=Console(stderr=True))
        ]
        self.results = self.results.with_table("Whole runs", scaling.HEADINGS, scaling.rows(runs))


def trained(out: Path, threads: int) -> Path:
    """Train prompts for a moment, once; return the run's folder."""
    folder = out / "trained"
    process = multiprocessing.get_context("forkserver").Process(target=_train, args=(folder, threads), daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError(f"the weights for rank and generate could not be trained in {folder}; see above")
    return folder


def _train(folder: Path, threads: int) -> None:
    from benchmarks.setting import EMBEDDED_TASKS

    from polyprompt import ray_train, recipe

    overrides = [
        f"train.max_steps={TRAINED_STEPS}",
        "train.batch_size=32",
        f"tasks=[{','.join(EMBEDDED_TASKS)}]",
        "compute.num_workers=0",
        f"compute.cpus_per_worker={threads}",
        "tracking.enabled=false",
        "data.max_validation_examples=20",
        "evaluate.steps=null",
    ]
    config = recipe.load([ROOT / "jobs" / "recipes" / "embedded.yaml"], overrides)
    ray_train.run(config, out=folder, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(main())
