"""Measure what polyprompt costs, against the machine's limit and against other ways to do the same.

    python jobs/benchmark.py [--cases NAME …] [--quick] [--out DIR] [--data DIR] [--page docs/performance.md]
    python jobs/benchmark.py --list

Without --cases: the groups behind the ratios that must hold. --cases names cases or groups of these or of the grid
(kind/backbone/precision/lengths/method), * for any text. Each case has a process of its own; those of a group take turns,
and a ratio is the median over turns. What DIR holds already is not measured again, unless the code or the machine has
changed: then name another DIR.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from benchmarks import cases, ratios
from benchmarks.cases import Group
from polyprompt.command import exit_status, positive
from polyprompt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
#: Steps that give the embedded backbone's prompts answers at all, for the cases that need some.
TRAINED_STEPS = 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases or groups; * for any text")
    parser.add_argument("--quick", action="store_true", help="small shapes, two turns: to try it out, not for figures")
    parser.add_argument("--list", action="store_true", help="show the names and measure nothing")
    parser.add_argument("--out", type=Path, help="runs/benchmark, with --quick runs/benchmark_quick")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real rows")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of each case")
    parser.add_argument("--page", type=Path, help="a Markdown page to put the tables into")
    options = parser.parse_args()
    return exit_status(lambda: act(options), stopped="stopped; the same command goes on with the next group")


def act(options: argparse.Namespace) -> int:
    """Measure and show; raises PolypromptError."""
    known = ratios.groups(options.quick)
    if options.cases or options.list:
        known = [*known, *cases.grid()]
    groups = cases.chosen(known, options.cases) if options.cases else known
    if options.list:
        for group in groups:
            print(group.name, *(f"    {case.name}" for case in group.cases), sep="\n")
        return 0
    measure(groups, options)
    return 0


def measure(groups: Sequence[Group], options: argparse.Namespace) -> None:
    import torch
    from benchmarks import report, turns
    from benchmarks.results import Machine, Results
    from benchmarks.setting import Setting
    from rich.console import Console

    from polyprompt.report import Progress

    out = (options.out or Path("runs") / ("benchmark_quick" if options.quick else "benchmark")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file, machine = out / "results.json", Machine.here(options.threads, device)
    results = Results.read(file) if file.exists() else Results(machine=machine)
    if results.machine != machine:
        raise ConfigError(
            f"{file} was measured on another machine, with other threads or other code ({results.machine} there, "
            f"{machine} here), and figures of one file must compare. Give another --out"
        )
    setting = Setting(out, options.data.absolute(), options.threads, device)
    left = [group for group in groups if not results.has(group)]
    if any(case.trained for group in left for case in group.cases):
        setting = replace(setting, trained=trained(out, options.threads))
    command = shlex.join(["python", "jobs/benchmark.py", *sys.argv[1:]])
    done = 0
    with Progress(sum(map(turns.num_parts, left)), what="part") as bar:

        def passed(what: str) -> None:
            nonlocal done
            done += 1
            bar.show(done, what)

        for group in left:
            results = results.with_group(group, turns.measure(group, setting, passed))
            report.write(results, out, command)
    report.show(results, Console())
    if options.page:
        report.into_page(options.page, report.markdown(results, command))
    print(f"Everything is in {out}")


def trained(out: Path, threads: int) -> Path:
    """Train prompts for a moment, once; return the run's folder."""
    folder = out / "trained"
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(folder, threads))
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError(f"the weights for rank and generate could not be trained in {folder}; see above")
    return folder


def _train(folder: Path, threads: int) -> None:
    from benchmarks.setting import EMBEDDED_TASKS

    from polyprompt import ray_train, recipe

    overrides = [
        f"train.max_steps={TRAINED_STEPS}", "train.batch_size=32", f"tasks=[{','.join(EMBEDDED_TASKS)}]", "compute.num_workers=0", f"compute.cpus_per_worker={threads}",
        "tracking.enabled=false", "data.max_validation_examples=20", "evaluate.steps=null",
    ]  # fmt: skip
    config = recipe.load([ROOT / "jobs" / "recipes" / "embedded.yaml"], overrides)
    ray_train.run(config, out=folder, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(main())
