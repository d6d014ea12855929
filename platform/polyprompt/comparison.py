"""Runs side by side: which of them compare, which are seeds of one setting, and what differs by more than chance."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from scipy import stats

from polyprompt.comparison_sources import Absent, Record
from polyprompt.config import shapes_result
from polyprompt.errors import ConfigError, hint

MEAN = "mean"
SEED = "train.seed"
#: A test of fewer seeds says nothing.
MIN_SEEDS = 3
#: Scores (fractions) that vary by less do not vary.
NO_SPREAD = 1e-9
#: A difference is marked at these chances of being one by chance.
LEVELS = (0.05, 0.01)
#: Which evaluation of a run counts: the best by mean, the last one, or of each task its own best (as HyperPrompt's
#: paper has it).
Select = Literal["mean", "last", "task"]


@dataclass(frozen=True)
class Test:
    """Of one score against the baseline's. name: "paired t" or "Welch t". p: NaN where nothing varies, so that the test
    knows no doubt: with scores of few rows that is no certainty."""

    name: str
    p: float


@dataclass(frozen=True)
class Setting:
    """A row of the table: runs that differ in nothing but the seed. scores: a line a run, a column a task and `mean`.
    tests: by column, where there are seeds enough. differing: its values of the keys in which settings differ."""

    label: str
    runs: tuple[Record, ...]
    scores: pd.DataFrame
    tests: Mapping[str, Test]
    differing: Mapping[str, str]

    @property
    def method(self) -> str:
        return self.runs[0].result.method

    @property
    def trained_parameters(self) -> int:
        return self.runs[0].result.num_trained_parameters

    @property
    def step_seconds(self) -> float:
        return statistics.median(run.result.train_seconds / run.result.num_steps for run in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        return max(run.result.peak_memory_bytes for run in self.runs)

    @property
    def inference_flops(self) -> int:
        return self.runs[0].result.inference_flops

    @property
    def num_steps(self) -> int:
        return max(run.result.num_steps for run in self.runs)

    def score(self, column: str = MEAN) -> float:
        """The mean over seeds; NaN where a seed has no score."""
        return float(self.scores[column].mean(skipna=False))

    def spread(self, column: str = MEAN) -> float:
        """The standard deviation of a sample; NaN for one seed."""
        return float(self.scores[column].std(skipna=False))


@dataclass(frozen=True)
class Comparison:
    """Settings that were scored on the same rows of the same tasks. unlike: why others are not among them.
    baseline: the label of the row that others are tested against, "" for none."""

    tasks: tuple[str, ...]
    settings: tuple[Setting, ...]
    majority: Mapping[str, float]
    baseline: str
    unlike: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.tasks, MEAN)

    def best(self, column: str) -> float:
        """The best of the settings' scores; NaN where they have none, or all the same."""
        scores = {score for setting in self.settings if not math.isnan(score := setting.score(column))}
        return max(scores) if len(scores) > 1 else math.nan

    @property
    def num_tests(self) -> int:
        return sum(not math.isnan(test.p) for setting in self.settings for test in setting.tests.values())


def compare(
    records: Sequence[Record], *, baseline: str | None = None, select: Select = "mean"
) -> tuple[list[Comparison], list[Absent]]:
    """Sort runs into comparisons, the largest first, and those that say nothing new, with the reason.

    baseline: a method, a row's label, or a run's id, name or folder. Raises ConfigError where no row is it.
    """
    alike: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        tasks = {task: record.rows.get(task, "unknown") for task in record.result.eval}
        alike.setdefault(tuple(sorted(tasks.items())), []).append(record)
    parts = sorted(alike.values(), key=len, reverse=True)
    repeated: list[Absent] = []
    made = [_comparison(part, parts[0][0], baseline, select, repeated) for part in parts]
    if baseline is not None and not any(comparison.baseline for comparison in made):
        labels = [setting.label for comparison in made for setting in comparison.settings]
        raise ConfigError(
            f"--baseline {baseline}: no row is it; expected a method that has one row, a run's id or name, or one of "
            f"the rows: {'; '.join(labels)}.{hint(baseline, labels)}"
        )
    return made, repeated


def _comparison(
    records: Sequence[Record], first: Record, baseline: str | None, select: Select, repeated: list[Absent]
) -> Comparison:
    groups: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: -r.finished_ms):
        seeds = groups.setdefault(_setting_key(record), {})
        if record.seed in seeds:  # the same numbers again: as a seed of its own it would feign certainty
            newer = seeds[record.seed]
            repeated.append(Absent(record.name, f"the same config and seed as {newer.name}, which is newer"))
        else:
            seeds[record.seed] = record
    groups = {key: groups[key] for key in dict.fromkeys(map(_setting_key, records))}
    runs = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in groups.values()]
    labels, differing = _labels([own[0] for own in runs])
    tasks = tuple(records[0].result.eval)
    scores = [_scores(own, tasks, select) for own in runs]
    base = _baseline(baseline, labels, runs)
    settings = [
        Setting(
            label=labels[i],
            runs=runs[i],
            scores=scores[i],
            tests={} if base in (None, i) else _tests(scores[i], scores[base or 0]),
            differing=differing[i],
        )
        for i in range(len(runs))
    ]
    named = labels[base] if base is not None else ""
    settings.sort(key=lambda s: (s.label != named, -s.score() if not math.isnan(s.score()) else math.inf))
    majority = records[0].result.majority
    return Comparison(tasks, tuple(settings), majority, named, _unlike(records[0], first))


def _setting_key(record: Record) -> str:
    return json.dumps({k: v for k, v in record.config.items() if shapes_result(k) and k != SEED}, sort_keys=True)


def _scores(runs: Sequence[Record], tasks: Sequence[str], select: Select) -> pd.DataFrame:
    rows = {}
    for run in runs:
        result = run.result
        match select:
            case "mean":
                scores = {task: result.eval[task]["score"] for task in tasks}
            case "last":
                scores = {task: result.evaluations[-1]["tasks"][task]["score"] for task in tasks}
            case "task":
                every = pd.DataFrame([{t: e["tasks"][t]["score"] for t in tasks} for e in result.evaluations])
                scores = every.max().to_dict()
        rows[run.seed] = {**scores, MEAN: statistics.fmean(scores.values())}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*tasks, MEAN])


def _tests(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, Test]:
    """Test each column: in pairs where both have the same seeds, and so the same order of rows; else Welch's."""
    if min(len(own), len(base)) < MIN_SEEDS:
        return {}
    paired = set(own.index) == set(base.index)
    found = {}
    for column in own.columns:
        a, b = own[column], base[column]
        p = math.nan
        if paired:
            if (a - b).std() > NO_SPREAD:  # pandas aligns the seeds
                p = stats.ttest_rel(a, b.loc[a.index]).pvalue
        elif a.std() + b.std() > NO_SPREAD:
            p = stats.ttest_ind(a, b, equal_var=False).pvalue
        found[column] = Test("paired t" if paired else "Welch t", float(p))
    return found


def _baseline(wanted: str | None, labels: Sequence[str], runs: Sequence[Sequence[Record]]) -> int | None:
    """Find the row that is meant. Raises ConfigError for a method that has several."""
    if wanted is None:
        return None
    if wanted in labels:
        return labels.index(wanted)
    for i, own in enumerate(runs):
        folders = {str(run.bundle.parents[1]) for run in own}
        if wanted in {name for run in own for name in (run.name, run.run_id)} | folders:
            return i
        if str(Path(wanted).absolute()) in folders:
            return i
    of_method = [i for i, own in enumerate(runs) if own[0].result.method == wanted]
    if len(of_method) > 1:
        names = "; ".join(labels[i] for i in of_method)
        raise ConfigError(f"--baseline {wanted}: {len(of_method)} rows are of this method; name one of them: {names}")
    return of_method[0] if of_method else None


def _labels(runs: Sequence[Record]) -> tuple[list[str], list[dict[str, str]]]:
    """Name each setting by its method and the values that tell it from others of the method; return beside that all
    its values of the keys, but the methods' own, in which the settings differ at all."""
    methods = [run.result.method for run in runs]
    own_keys = {
        method: differing_keys([r.config for r, m in zip(runs, methods, strict=True) if m == method])
        for method in methods
    }
    labels: list[str] = []
    for run, method in zip(runs, methods, strict=True):
        values = [f"{short(key)}={shown(key, run.config.get(key, '-'))}" for key in own_keys[method]]
        label = f"{method} ({', '.join(values)})" if values else method
        # Long values that are cut alike.
        labels.append(f"{label} #{1 + twins}" if (twins := sum(known.startswith(label) for known in labels)) else label)
    shared = [key for key in differing_keys([run.config for run in runs]) if not key.startswith("method.")]
    return labels, [{key: shown(key, run.config.get(key, "-")) for key in shared} for run in runs]


def differing_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys, but the seed, that shape results and do not have one value in all configs."""
    keys = dict.fromkeys(key for config in configs for key in config if shapes_result(key) and key != SEED)
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def short(key: str) -> str:
    """`method.length` → `length`; a section that has keys of the same kind stays."""
    return key.removeprefix("method.").removeprefix("train.")


def shown(key: str, value: str) -> str:
    text = Path(value).name if key in ("backbone.name", "data.root") else value
    return text if len(text) <= 60 else f"{text[:57]}…"


def _unlike(record: Record, first: Record) -> str:
    """Say why a run does not compare with the first."""
    own, other = set(record.result.eval), set(first.result.eval)
    parts = []
    if own - other:
        parts.append(f"also {', '.join(sorted(own - other))}")
    if other - own:
        parts.append(f"without {', '.join(sorted(other - own))}")
    rows = [task for task in sorted(own & other) if record.rows.get(task) != first.rows.get(task)]
    if rows:
        parts.append(f"other rows of {', '.join(rows)}")
    return "; ".join(parts)
