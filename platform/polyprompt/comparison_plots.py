"""The figures of a comparison, as inline SVG: what a score costs, how settings learned, what their prompts do.

Figures are made without pyplot; matplotlib's state is not touched.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from polyprompt.comparison import MEAN, Comparison, Setting
from polyprompt.report import COLOURS, GREY, MARKERS

#: More lines cannot be told apart.
MAX_LINES = 14
BLUES, DIVERGING = "Blues", "RdBu_r"


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element, the same for the same figure but for the names inside."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "<svg" + buffer.getvalue().partition("<svg")[2]


def front(comparison: Comparison) -> Figure:
    """The mean score against trained parameters and against step time, with the settings that none dominates."""
    shown = drawn(comparison)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_front(left, shown, lambda s: s.trained_parameters, "trained parameters")
    _draw_front(right, shown, lambda s: s.step_seconds, "seconds a step (median of runs)")
    left.set_ylabel("mean score × 100")
    _legend(figure, shown)
    return figure


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the (cost, score) points that no other beats in one and equals in the other, by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, kept = -math.inf, list[int]()
    for i in order:
        if points[i][1] > best or (kept and points[i] == points[kept[-1]]):
            kept.append(i)
            best = points[i][1]
    return kept


def _draw_front(axes: Axes, shown: Sequence[Setting], cost: Callable[[Setting], float], name: str) -> None:
    points = [(cost(setting), 100 * setting.score()) for setting in shown]
    best = [points[i] for i in undominated(points)]
    xs, ys = [x for x, _ in best], [y for _, y in best]
    axes.scatter(xs, ys, s=200, facecolors="none", edgecolors=GREY, linewidths=1.2)
    if len(best) > 1:
        axes.step(xs, ys, where="post", color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    for place, (setting, point) in enumerate(zip(shown, points, strict=True)):
        spread = 100 * setting.spread()
        bars = None if math.isnan(spread) else spread
        axes.errorbar(*point, yerr=bars, **look(place), markersize=8, linestyle="none", capsize=3, elinewidth=1)
    costs = [x for x, _ in points]
    if max(costs) > 3 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if min(costs) >= 1000:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    _plain(axes)
    axes.grid(alpha=0.3)


def curves(comparison: Comparison) -> Figure:
    """Each task's score over the steps, a line a setting: the mean over its seeds, with their lowest and highest."""
    shown = drawn(comparison)

    def points(setting: Setting, column: str) -> pd.DataFrame:
        runs = [
            {
                e["step"]: 100 * (e["mean"] if column == MEAN else e["tasks"][column]["score"])
                for e in r.result.evaluations
            }
            for r in setting.runs
        ]
        return pd.DataFrame(runs).T.sort_index()

    figure = _grid(shown, comparison.columns, points, "score × 100")
    for axes, task in zip(figure.axes, comparison.tasks, strict=False):
        if (majority := comparison.majority.get(task)) is not None:
            axes.axhline(100 * majority, color=GREY, linewidth=1, linestyle=":")
    return figure


def losses(comparison: Comparison) -> Figure:
    """Each task's training loss over the steps, a line a setting: the mean over its seeds."""

    def points(setting: Setting, column: str) -> pd.DataFrame:
        runs = [
            {int(step): loss for step, loss in r.result.loss_curve}
            if column == MEAN
            else dict(r.history(f"train/{column}/loss"))
            for r in setting.runs
        ]
        return pd.DataFrame(runs).T.sort_index()

    return _grid(drawn(comparison), comparison.columns, points, "nats a target token", means="all tasks")


def _grid(
    shown: Sequence[Setting],
    columns: Sequence[str],
    points: Callable[[Setting, str], pd.DataFrame],
    unit: str,
    means: str = "mean of tasks",
) -> Figure:
    """A small plot a column. points: of a setting and a column, steps × runs."""
    wide = min(3, len(columns))
    high = math.ceil(len(columns) / wide)
    figure = Figure(figsize=(11, 0.6 + 2.5 * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False)
    for axes, column in zip(grid.flat, columns, strict=False):
        for place, setting in enumerate(shown):
            _draw_line(axes, points(setting, column), place)
        axes.set_title(means if column == MEAN else column, fontsize=10, fontweight="bold" if column == MEAN else None)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _plain(axes)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid.flat[len(columns) :]:
        axes.remove()
    figure.supylabel(unit, fontsize=10)
    for axes in figure.axes[-wide:]:
        axes.set_xlabel("optimiser step", fontsize=9)
    _legend(figure, shown)
    return figure


def _draw_line(axes: Axes, runs: pd.DataFrame, place: int) -> None:
    if runs.empty:
        return
    style, few = look(place), len(runs) <= 12
    axes.plot(runs.index, runs.mean(axis=1), **style, markersize=4 if few else 0, linewidth=1.5)
    if runs.shape[1] > 1:
        # The width is for a single point, whose area has none.
        width = 4 if len(runs) == 1 else 0
        lowest, highest = runs.min(axis=1), runs.max(axis=1)
        axes.fill_between(runs.index, lowest, highest, color=style["color"], alpha=0.12, linewidth=width)


def heat(
    tables: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    *,
    name: str,
    low: float,
    high: float,
    xlabel: str = "",
) -> Figure:
    """Draw tables side by side, with their numbers. tables: title → [rows, columns of that title]."""
    widths = [max(2.2, 0.52 * table.shape[1]) for table in tables.values()]
    size = (min(11.0, 2.2 + sum(widths) + 0.4 * len(widths)), 1.5 + 0.34 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(tables), sharey=True, width_ratios=widths, squeeze=False)[0]
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr,call-arg]
    colours = matplotlib.colormaps[DIVERGING if low < 0 else BLUES]
    for axes, (title, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.set_title(title, fontsize=10)
        turned = max(map(len, columns[title])) > 3
        axes.set_xticks(
            range(table.shape[1]), columns[title], rotation=45 if turned else 0, ha="right" if turned else "center"
        )
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(xlabel)
        axes.tick_params(length=0)
        if table.shape[1] <= 14:
            for (i, j), value in np.ndenumerate(table):
                dark = abs(value) > 0.6 * max(abs(low), abs(high))
                axes.text(
                    j, i, f"{value:z.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(grid), label=name, shrink=0.9)
    bar.outline.set_visible(False)
    return figure


def by_layer(
    tables: Mapping[str, Mapping[int, np.ndarray]],
    labels: Mapping[int, str],
    name: str,
    even: Mapping[str, float] | None = None,
) -> Figure:
    """Draw fractions of self-attention, a plot a stack. tables: stack → place of a line, as of `look` → its values by
    layer. labels: by place. even: stack → what even weights would give."""
    figure = Figure(figsize=(11 if len(tables) > 1 else 7, 3.6), layout="constrained")
    grid = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (stack, lines) in zip(grid, tables.items(), strict=True):
        for place, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, **look(place), markersize=5, linewidth=1.3)
        highest = max(float(values.max()) for values in lines.values())
        if even is not None:
            axes.axhline(even[stack], color=GREY, linestyle=":", linewidth=1.5)
            highest = max(highest, even[stack])
        axes.set(title=stack, xlabel="layer", ylim=(0, min(1.0, 1.15 * highest)))
        num_layers = max(map(len, lines.values()))
        if num_layers <= 12:
            axes.set_xticks(range(1, num_layers + 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        _plain(axes)
        axes.grid(axis="y", alpha=0.3)
    grid[0].set_ylabel(name)
    handles = _handles(labels)
    if even is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="even weights"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def drawn(comparison: Comparison) -> list[Setting]:
    """Return the settings that figures show: all, or the first of them where there are too many to tell apart."""
    return list(comparison.settings[:MAX_LINES])


def look(place: int) -> dict[str, Any]:
    """Colour and marker of the line of a place; no two of fewer than 49 are the same."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def _legend(figure: Figure, shown: Sequence[Setting]) -> None:
    handles = _handles({place: setting.label for place, setting in enumerate(shown)})
    longest = max(len(setting.label) for setting in shown)
    columns = max(1, min(4, 120 // (longest + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _handles(labels: Mapping[int, str]) -> list[Line2D]:
    # A "$" in a value of the config begins no formula.
    shown = {place: label.replace("$", r"\$") for place, label in labels.items()}
    return [Line2D([], [], **look(place), markersize=6, label=label) for place, label in shown.items()]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def amount(value: float) -> str:
    """Return a count in thousands, millions … with three digits."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
