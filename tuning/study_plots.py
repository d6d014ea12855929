"""The plots of a study: what a value does, what a score costs, which key matters, how the trials learned.

Figures are made without pyplot and saved with the Agg backend: matplotlib's state is not touched.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from polyprompt.report import COLOURS, GREY
from tuning.study import Objective, Scalar, Study, Trial

BLUE, ORANGE, GREEN = COLOURS[:3]
#: Positive values that span at least this factor are drawn, and weighed, on a logarithmic axis.
LOG_FACTOR = 10.0
LOOKS: dict[str, dict[str, Any]] = {
    "finished": {"color": BLUE, "marker": "o", "markersize": 6},
    "stopped": {"color": ORANGE, "marker": "x", "markersize": 7, "markeredgewidth": 2},
    "failed": {"color": COLOURS[3], "marker": "X", "markersize": 8},
    "running": {"color": GREEN, "marker": "D", "markersize": 5},
    "waiting": {"color": GREY, "marker": ".", "markersize": 5},
}
BEST_LOOK: dict[str, Any] = {
    "color": COLOURS[4], "marker": "*", "markersize": 15, "markeredgecolor": "#000000", "zorder": 4,
}  # fmt: skip
COSTS = {
    "num_trained_parameters": "trained parameters",
    "inference_flops": "inference FLOPs an example (estimate)",
    "peak_memory_bytes": "peak memory (bytes)",
    "step_seconds": "seconds a step",
}


# --- score against each searched key


def parameters(study: Study) -> Figure | None:
    """A small plot a key: each trial that has the key at its value; stopped trials where they were stopped."""
    first = study.objectives[0]
    scored = [t for t in study.trials if math.isfinite(t.mean(first.metric))]
    keys = [key for key in study.keys if any(key in t.params for t in scored)]
    if not keys:
        return None
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(1.2 + 4.0 * columns, 1.0 + 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, key in zip(grid.flat, keys, strict=False):
        _draw_key(axes, study, key, [t for t in scored if key in t.params])
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(label(first.metric))
    figure.suptitle(f"{study.name}: {label(first.metric)} against each searched key")
    figure.legend(handles=_marks(scored, study), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_key(axes: Axes, study: Study, key: str, trials: Sequence[Trial]) -> None:
    first, best = study.objectives[0].metric, study.best()
    place = _axis(axes, [t.params[key] for t in trials])
    for trial in trials:
        x, y, std = place(trial.params[key]), trial.mean(first), trial.std(first)
        if math.isfinite(std) and trial.state == "finished":
            axes.errorbar(x, y, yerr=std, color=BLUE, alpha=0.5, linewidth=1, capsize=2)
        axes.plot(x, y, **_mark(trial, best), linestyle="none")
    axes.set_xlabel(key)
    plain_frame(axes)


def _axis(axes: Axes, values: Sequence[Scalar]) -> Callable[[Scalar], float]:
    """Set up the x axis for the values of a key: categories, logarithmic or linear. Return where a value stands."""
    if not is_numeric(values):
        names = sorted({show(v) for v in values})
        axes.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 32 else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return lambda value: float(names.index(show(value)))
    distinct = sorted({float(v) for v in values if v is not None})
    if is_log(distinct):
        axes.set_xscale("log")
    axes.margins(x=0.08)
    if _spread_out(distinct):  # a grid: its own values are the ticks
        axes.set_xticks(distinct, [show(v) if v % 1 else str(int(v)) for v in distinct])
        axes.xaxis.set_minor_locator(NullLocator())
    elif is_log(distinct):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if distinct[-1] / distinct[0] < 200 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=all(v % 1 == 0 for v in distinct)))
    return lambda value: float(value)  # type: ignore[arg-type]


def _spread_out(values: Sequence[float]) -> bool:
    """Do at most six values stand so far apart on their axis that each can carry its label?"""
    places = [math.log(v) for v in values] if is_log(values) else values
    return len(values) <= 6 and all(b - a > 0.08 * (places[-1] - places[0]) for a, b in pairwise(places))


# --- score against cost


def front(study: Study, cost: str) -> Figure | None:
    """Every finished trial at its score and cost, the Pareto front of the two as a line, points labelled by number."""
    score = next((o for o in study.objectives if o.metric not in COSTS), None)
    if score is None:
        return None
    points = [(t.mean(cost), t.mean(score.metric), t) for t in study.finished if math.isfinite(t.mean(cost))]
    if not points:
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    best, kept = study.best(), pareto(points, score)
    axes.step([x for x, _, _ in kept], [y for _, y, _ in kept], where="post", color=GREEN, linewidth=1.8, zorder=1)
    if is_log([x for x, _, _ in points]):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    lines = [line for (a, b, _), (x, y, _) in pairwise(kept) for line in ((a, b, x, b), (x, b, x, y))]
    on, off = {**LOOKS["finished"], "color": GREEN}, {**LOOKS["finished"], "color": GREY}
    for point in points:
        x, y, trial = point
        std = trial.std(score.metric)
        if math.isfinite(std):
            axes.errorbar(x, y, yerr=std, color=GREY, alpha=0.5, linewidth=1, capsize=2, zorder=1)
            lines.append((x, y - std, x, y + std))
        axes.plot(x, y, **(BEST_LOOK if trial == best else on if point in kept else off), linestyle="none")
    axes.set(xlabel=COSTS[cost], ylabel=label(score.metric))
    axes.set_title(f"{study.name}: {label(score.metric)} against {COSTS[cost]} (numbers: trials)")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    plain_frame(axes)
    looks = {"on the front": on, "not on it": off}
    if any(trial == best for _, _, trial in points):
        looks[f"best {label(study.objectives[0].metric)}"] = BEST_LOOK
    handles = [Line2D([], [], **look, linestyle="none", label=text) for text, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    _name_points(axes, [(x, y, str(t.number)) for x, y, t in points], lines)
    return figure


def pareto(points: Sequence[tuple[float, float, Trial]], score: Objective) -> list[tuple[float, float, Trial]]:
    """Return the points (cost, score, trial) that no cheaper or equally cheap one reaches in score, by cost."""
    sign = -1.0 if score.mode == "max" else 1.0
    kept: list[tuple[float, float, Trial]] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1], p[2].number)):
        if not kept or score.better(point[1], kept[-1][1]):
            kept.append(point)
    return kept


def _name_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[tuple[float, float, float, float]]
) -> None:
    """Write each point's name beside it where nothing else stands; points that coincide share one name."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    taken = [Bbox(axes.transData.transform([(a, b), (x, y)])).padded(3) for a, b, x, y in lines]
    together: dict[tuple[int, int], list[str]] = {}
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        pixel = axes.transData.transform((x, y))
        taken.append(Bbox([pixel, pixel]).padded(9))
        together.setdefault((round(pixel[0] / 4), round(pixel[1] / 4)), []).append(name)
    for (x4, y4), names in together.items():
        text = ", ".join(names)
        for box in _places(4 * x4, 4 * y4, 7.5 * len(text), 13.0):
            if axes.get_window_extent().containsx(box.x1) and not box.count_overlaps(taken):
                taken.append(box)
                middle = axes.transData.inverted().transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
                axes.text(middle[0], middle[1], text, ha="center", va="center", fontsize=9, color="#333333")
                break  # where no place is free, the leaderboard still has the trial


def _places(x: float, y: float, width: float, height: float) -> Iterator[Bbox]:
    """Boxes of a size around a point, in pixels, near ones first."""
    for gap in (7, 13, 20, 30):
        for dx, dy in ((0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left, bottom = x + dx * (gap + width / 2) - width / 2, y + dy * (gap + height / 2) - height / 2
            yield Bbox.from_bounds(left, bottom, width, height)


# --- learning curves


def curves(study: Study) -> Figure | None:
    """The first objective over the steps of every run, best trial in bold; stopped and failed ones end in a mark."""
    first, best = study.objectives[0], study.best()
    runs = [(trial, run) for trial in study.trials for run in trial.runs if run.curve]
    if not runs:
        return None
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots()
    for trial, run in sorted(runs, key=lambda pair: pair[0] == best):
        steps, values = zip(*run.curve, strict=True)
        look = LOOKS[run.state]
        bold = trial == best
        width, alpha = (2.6, 1.0) if bold else (1.2, 0.55)
        axes.plot(steps, values, color="#000000" if bold else look["color"], linewidth=width, alpha=alpha)
        if len(steps) == 1 or run.state in ("stopped", "failed"):
            axes.plot(steps[-1], values[-1], **look, linestyle="none", zorder=3)
    axes.set(xlabel="optimiser step", ylabel=label(first.metric), title=f"{study.name}: learning curves")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    plain_frame(axes)
    handles = [
        Line2D([], [], color=look["color"], label=state)
        for state, look in LOOKS.items()
        if state not in ("stopped", "failed") and any(run.state == state for _, run in runs)
    ]
    handles += [
        Line2D([], [], **LOOKS[state], label=text)
        for state, text in (("stopped", "stopped here"), ("failed", "failed after this"))
        if any(run.state == state for _, run in runs)
    ]
    if best is not None:
        handles.append(Line2D([], [], color="#000000", linewidth=2.6, label=f"best: trial {best.number}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


# --- shared


def label(metric: str) -> str:
    """Return what an axis says of a metric."""
    return COSTS.get(metric, "mean score" if metric == "eval/mean" else metric)


def is_numeric(values: Sequence[Scalar]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def is_log(values: Sequence[float]) -> bool:
    """Do the values want a logarithmic axis? A study does not keep its spaces, so their span decides."""
    return min(values) > 0 and max(values) >= LOG_FACTOR * min(values)


def _mark(trial: Trial, best: Trial | None) -> dict[str, Any]:
    return BEST_LOOK if trial == best else LOOKS[trial.state]


def _marks(trials: Sequence[Trial], study: Study) -> list[Line2D]:
    """The legend of the states that occur."""
    found = [
        Line2D([], [], **look, linestyle="none", label=state)
        for state, look in LOOKS.items()
        if any(t.state == state for t in trials)
    ]
    best = study.best()
    if best is not None:
        found.append(Line2D([], [], **BEST_LOOK, linestyle="none", label=f"best: trial {best.number}"))
    return found


def plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return each key's last part, or the whole key where two end alike; `method` for method.name, as in a recipe."""
    ends = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def show(value: Scalar) -> str:
    """Return a value as a person reads it: floats to four digits, null for None."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.4g}"
    return str(value)


def quantity(value: float) -> str:
    """Return a large number in thousands (k), millions (M), billions (G): 144.0k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
