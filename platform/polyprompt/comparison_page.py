"""A comparison as files: a page that needs no network, Markdown and CSV."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from polyprompt import comparison_plots as plots
from polyprompt.comparison import LEVELS, MEAN, MIN_SEEDS, Comparison, Setting, Test, shown
from polyprompt.comparison_parts import Part, Say, parts
from polyprompt.comparison_sources import Absent
from polyprompt.result import write_whole

PAGE, MARKDOWN, TABLE = "compare.html", "compare.md", "compare.csv"


@dataclass(frozen=True)
class Cell:
    """A number of the table. mark: how it differs from the baseline's by more than chance. tip: shown on hover."""

    text: str
    spread: str = ""
    mark: str = ""
    best: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table. colour: of the setting in the figures."""

    label: str
    seeds: str
    cells: Sequence[Cell]
    costs: Sequence[str]
    colour: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class Section:
    """All about one comparison."""

    heading: str
    unlike: str
    headings: Sequence[tuple[str, str]]
    lines: Sequence[Line]
    notes: Sequence[str]
    differing: Sequence[Sequence[str]]
    parts: Sequence[Part] = field(default_factory=tuple)


def write(
    comparisons: Sequence[Comparison], absent: Sequence[Absent], out: Path, *, num_rows: int, store: str, say: Say
) -> Path:
    """Write compare.html, compare.md and compare.csv into a folder and return the first.

    num_rows: validation rows of each task that models are shown for the analyses; 0: no model is loaded. store: where
    the runs come from, in words without a password. say: takes lines for the user.
    """
    sections = [_section(comparison, i, len(comparisons), num_rows, say) for i, comparison in enumerate(comparisons)]
    templates = Environment(
        loader=PackageLoader("polyprompt", "templates"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = {
        "sections": sections,
        "absent": absent,
        "store": store,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "num_runs": sum(len(setting.runs) for comparison in comparisons for setting in comparison.settings),
        "runs": _runs(comparisons),
        "tasks": sorted({task for comparison in comparisons for task in comparison.tasks}),
    }
    for name in (PAGE, MARKDOWN):
        write_whole(out / name, templates.get_template(f"{name}.j2").render(facts).encode())
    write_whole(out / TABLE, frame(comparisons).to_csv(index=False).encode())
    return out / PAGE


def frame(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Return a line a setting: for each task and the mean the score (a fraction), std and p; then the costs."""
    lines = []
    for number, comparison in enumerate(comparisons, start=1):
        for setting in comparison.settings:
            line: dict[str, object] = {
                "comparison": number,
                "setting": setting.label,
                "method": setting.method,
                "num_seeds": len(setting.runs),
                "is_baseline": setting.label == comparison.baseline,
            }
            for column in (MEAN, *comparison.tasks):
                test = setting.tests.get(column)
                line |= {column: setting.score(column), f"{column} std": setting.spread(column)}
                line[f"{column} p"] = test.p if test else None
            line |= {
                "test": next((test.name for test in setting.tests.values()), None),
                "trained_parameters": setting.trained_parameters,
                "step_seconds": setting.step_seconds,
                "peak_memory_bytes": setting.peak_memory_bytes,
                "inference_flops": setting.inference_flops or None,
                "num_steps": setting.num_steps,
                "runs": " ".join(run.run_id or run.name for run in setting.runs),
            }
            lines.append(line)
    return pd.DataFrame(lines)


# --- the table


def _section(comparison: Comparison, place: int, count: int, num_rows: int, say: Say) -> Section:
    tasks = f"{len(comparison.tasks)} task{'s' if len(comparison.tasks) > 1 else ''}"
    settings = f"{len(comparison.settings)} setting{'s' if len(comparison.settings) > 1 else ''}"
    names = [task.rpartition("/")[2] for task in comparison.tasks]
    columns = [n if names.count(n) == 1 else t for n, t in zip(names, comparison.tasks, strict=True)]
    keys = list(comparison.settings[0].differing)
    differing = [["setting", *keys], *([s.label, *s.differing.values()] for s in comparison.settings)] if keys else []
    return Section(
        heading=(f"{place + 1}. " if count > 1 else "") + f"{settings} on {tasks}",
        unlike=comparison.unlike,
        headings=[*zip(columns, comparison.tasks, strict=True), (MEAN, "mean of the tasks")],
        lines=[_line(comparison, setting, i) for i, setting in enumerate(comparison.settings)] + _majority(comparison),
        notes=list(_notes(comparison)),
        differing=differing,
        parts=list(parts(comparison, num_rows, say)),
    )


def _line(comparison: Comparison, setting: Setting, place: int) -> Line:
    return Line(
        label=setting.label,
        seeds=str(len(setting.runs)),
        cells=[cell(comparison, setting, column) for column in comparison.columns],
        costs=[
            plots.amount(setting.trained_parameters),
            f"{setting.step_seconds:.3g}",
            f"{setting.peak_memory_bytes / 2**30:.2f}",
            plots.amount(setting.inference_flops) if setting.inference_flops else "–",
        ],
        colour=plots.look(place)["color"] if place < plots.MAX_LINES else "",
        is_baseline=setting.label == comparison.baseline,
    )


def cell(comparison: Comparison, setting: Setting, column: str) -> Cell:
    """Return what the table shows of a setting in a column."""
    score, spread, test = setting.score(column), setting.spread(column), setting.tests.get(column)
    if math.isnan(score):
        return Cell("–")
    seeds = ", ".join(f"seed {seed}: {100 * value:.2f}" for seed, value in setting.scores[column].items())
    mark = ""
    if test is not None:
        level = sum(test.p < limit for limit in LEVELS)
        base = next(s for s in comparison.settings if s.label == comparison.baseline)
        mark = ("▲" if score > base.score(column) else "▼") * level
    return Cell(
        text=f"{100 * score:.1f}",
        spread="" if math.isnan(spread) else f"{100 * spread:.1f}",
        mark=mark,
        best=f"{100 * score:.1f}" == f"{100 * comparison.best(column):.1f}",
        tip=seeds + _tested(test),
    )


def _tested(test: Test | None) -> str:
    if test is None:
        return ""
    return f"; {test.name}, p = {test.p:.3g}" if not math.isnan(test.p) else "; not tested: no spread"


def _majority(comparison: Comparison) -> list[Line]:
    known = [comparison.majority.get(task) for task in comparison.tasks]
    if not any(score is not None for score in known):
        return []
    cells = [Cell("" if score is None else f"{100 * score:.1f}") for score in known]
    scores = [score for score in known if score is not None]
    whole = len(scores) == len(known)
    return [Line("majority", "", [*cells, Cell(f"{100 * sum(scores) / len(scores):.1f}" if whole else "")], [""] * 4)]


def _notes(comparison: Comparison) -> Iterator[str]:
    yield (
        "Scores × 100, the mean over seeds and in brackets their standard deviation (of a sample; none for one seed). "
        "Runs of a row differ in nothing but the seed. Bold: the best of a column, as it is printed."
    )
    names = sorted({test.name for setting in comparison.settings for test in setting.tests.values()})
    few = [s.label for s in comparison.settings if not s.tests and s.label != comparison.baseline]
    if not comparison.baseline:
        yield "No marks of significance: --baseline names no row of this table."
    elif names:
        yield (
            f"▲ better, ▼ worse than {comparison.baseline} at p < {LEVELS[0]}, twice at p < {LEVELS[1]}: two-sided "
            f"{' or '.join(names)} test over seeds (paired where both have the same seeds). {comparison.num_tests} "
            f"tests, not corrected: about {LEVELS[0] * comparison.num_tests:.1f} of them would be marked by chance."
        )
    if comparison.baseline and few:
        yield f"No test below {MIN_SEEDS} seeds on either side: {'; '.join(few)}."
    yield (
        "Costs: trained parameters; seconds a step (median of runs, as fast as their machines were); peak memory of a "
        "process (GiB, the highest of the runs); estimated operations to answer one row of median length."
    )
    commits = {run.commit for setting in comparison.settings for run in setting.runs if run.commit}
    if len(commits) > 1:
        yield f"The runs were made by {len(commits)} commits of the code."
    if len(comparison.settings) > plots.MAX_LINES:
        yield f"Figures show the first {plots.MAX_LINES} of {len(comparison.settings)} settings."


# --- the runs behind it


def _runs(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Return the runs behind the numbers: name, MLflow's id, row, seed, mean score, step, backbone, bundle."""
    return [
        [
            run.name,
            run.run_id or "-",
            setting.label,
            str(run.seed),
            f"{run.result.mean:.4f}",
            f"{run.result.best_step:,}",
            shown("backbone.name", run.result.backbone),
            str(run.bundle) + ("" if run.bundle.is_dir() else " (gone)"),
        ]
        for comparison in comparisons
        for setting in comparison.settings
        for run in setting.runs
    ]
