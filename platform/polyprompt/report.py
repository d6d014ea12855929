"""What a person sees of a run: progress while it trains, the closing table, plots and a per-task CSV."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from polyprompt.result import RunResult
from polyprompt.router_health import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette without its yellow, which vanishes on white: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"


def table(result: RunResult) -> Table:
    """Return the closing table: a line a task (metrics, score, majority baseline, lift), their mean, and the costs."""
    shown = Table(title=f"{result.name}: {result.method} on {result.backbone}", caption=_caption(result))
    shown.add_column("Task", overflow="fold")
    shown.add_column("Metrics", no_wrap=True)
    for heading in ("Score", "Majority", "Lift"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for task, metrics in result.eval.items():
        values = "\n".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "score")
        shown.add_row(task, values, *_scores(metrics["score"], result.majority.get(task)))
    shown.add_section()
    shown.add_row("mean", "", *_scores(result.mean, _mean_majority(result)), style="bold")
    return shown


def per_task_csv(result: RunResult, path: Path) -> None:
    """Write a line a task, and their mean: score, majority, lift, best_step and every metric of the run."""
    names = list(dict.fromkeys(n for metrics in result.eval.values() for n in metrics if n != "score"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["task", "score", "majority", "lift", "best_step", *names])
        writer.writeheader()
        for task, metrics in result.eval.items():
            majority = result.majority.get(task)
            lift = None if majority is None else metrics["score"] - majority
            best = result.best_task_steps.get(task)
            writer.writerow({**metrics, "task": task, "majority": majority, "lift": lift, "best_step": best})
        majority = _mean_majority(result)
        lift = None if majority is None else result.mean - majority
        step = result.best_step
        writer.writerow({"task": "mean", "score": result.mean, "majority": majority, "lift": lift, "best_step": step})


def plots(result: RunResult, folder: Path) -> list[Path]:
    """Draw loss.png and scores.png into a folder and return their paths; what has no data is not drawn.

    Matplotlib's state is not touched: figures are made without pyplot and saved with the Agg backend.
    """
    # A worker imports this file for Progress alone; matplotlib would cost it a second, and a font cache the first time.
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if result.loss_curve:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        _draw_loss(figure.subplots(), result)
        paths.append(folder / "loss.png")
        figure.savefig(paths[-1], dpi=120)
    if result.eval:
        several = len(result.evaluations) > 1
        height = max(4.0, 1.8 + 0.38 * (len(result.eval) + 1))
        figure = Figure(figsize=(14 if several else 8, height), layout="constrained")
        axes = figure.subplots(1, 1 + several, squeeze=False)[0]
        figure.suptitle(f"{result.name}: {result.method} on {result.backbone}")
        _draw_bars(axes[0], result)
        if several:
            _draw_scores(axes[1], result)
        paths.append(folder / "scores.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


class Progress:
    """Shows steps done, numbers and time left: a bar in a terminal, else a plain line every `every_seconds`.

    The time left is reckoned from the first update on, since a resumed run does not begin at 0. A context manager.
    """

    def __init__(
        self, num_steps: int, *, what: str = "step", console: Console | None = None, every_seconds: float = 10.0
    ) -> None:
        self._num_steps = num_steps
        self._what = what
        self._first: tuple[int, float] | None = None
        self._console = console or Console()
        self._every_seconds = every_seconds
        self._bar: Bar | None = None
        self._bar_task = TaskID(0)

    def __enter__(self) -> "Progress":
        self._next_line = 0.0  # the first update shows at once that training has begun
        self._line = ""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
            self._bar_task = self._bar.add_task(self._what, total=self._num_steps, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._line:
            self._print()

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        """Show the state after a training step."""
        self.show(step, f"loss {loss:.4f}  {examples_per_second:.1f} examples/s")

    def show(self, step: int, numbers: str) -> None:
        """Show how far the work is, and numbers about it."""
        if self._bar is not None:
            if self._first is None:
                self._bar.reset(self._bar_task, completed=step)
            self._first = (step, 0.0)
            self._bar.update(self._bar_task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        self._first = first_step, began = self._first or (step, now)
        self._line = f"{self._what} {step}/{self._num_steps}  {numbers}"
        if step > first_step:
            self._line += f"  {_duration((now - began) / (step - first_step) * (self._num_steps - step))} left"
        if now >= self._next_line:
            self._print()
            self._next_line = now + self._every_seconds

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print(self) -> None:
        self.say(self._line)
        self._line = ""


def _draw_loss(axes: "Axes", result: RunResult) -> None:
    steps, losses = [point[0] for point in result.loss_curve], [point[1] for point in result.loss_curve]
    many = len(losses) >= 50
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.35 if many else 1.0, linewidth=1.2, label="logged")
    if many:
        window = len(losses) // 25
        axes.plot(steps, _trailing_mean(losses, window), color=COLOURS[0], linewidth=2.2, label=f"mean of {window}")
        axes.legend(frameon=False)
    axes.set(title=f"{result.name}: training loss", xlabel="optimiser step", ylabel="loss a target token")
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _plain_frame(axes)
    axes.grid(axis="y", alpha=0.3)


def _draw_bars(axes: "Axes", result: RunResult) -> None:
    """A bar a task and one for their mean, with a mark at the majority baseline."""
    names = [*result.eval, "mean"]
    scores = [*(metrics["score"] for metrics in result.eval.values()), result.mean]
    baselines = [*(result.majority.get(task) for task in result.eval), _mean_majority(result)]
    places = list(range(len(names)))
    colours = [COLOURS[0]] * len(result.eval) + ["#333333"]
    axes.barh(places, scores, height=0.62, color=colours)
    marks = [(place, base) for place, base in zip(places, baselines, strict=True) if base is not None]
    if marks:
        at, bases = [place for place, _ in marks], [base for _, base in marks]
        axes.scatter(bases, at, s=300, marker="|", linewidths=3, color=COLOURS[1], zorder=3, label="majority baseline")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for place, score, base in zip(places, scores, baselines, strict=True):
        axes.text(max(score, base or 0.0) + 0.015, place, f"{score:.3f}", va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    # Room for the numbers to the right of the bars; Matthews and the correlations may be below zero.
    axes.set_xlim(min(0.0, *scores, *(base for _, base in marks)) * 1.1, 1.12)
    axes.set_xticks([tick / 10 for tick in range(0, 11, 2)])
    axes.set_xlabel(f"score at step {result.best_step}")
    _plain_frame(axes)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_scores(axes: "Axes", result: RunResult) -> None:
    """A line a task over the evaluations, the mean in bold, and the best step; the legend stands in final order."""
    lines = []
    steps = [evaluation["step"] for evaluation in result.evaluations]
    for i, task in enumerate(result.eval):
        scores = [evaluation["tasks"][task]["score"] for evaluation in result.evaluations]
        style = ("-", "--", ":")[i // len(COLOURS) % 3]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        look = axes.plot(steps, scores, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.3)
        lines.append((scores[-1], look[0], task))
    means = [evaluation["mean"] for evaluation in result.evaluations]
    lines.append((means[-1], axes.plot(steps, means, color="#333333", linewidth=3.5)[0], "mean"))
    axes.axvline(result.best_step, color=GREY, linestyle=":", linewidth=1.5)
    axes.annotate(
        f"best mean {result.mean:.3f}, step {result.best_step}",
        (result.best_step, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right" if result.best_step > (steps[0] + steps[-1]) / 2 else "left",
        color=GREY,
    )
    lines.sort(key=lambda line: -line[0])
    handles, names = [line[1] for line in lines], [line[2] for line in lines]
    axes.legend(handles, names, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="optimiser step", ylabel="score")
    axes.set_ylim(top=1.02)
    _plain_frame(axes)
    axes.grid(axis="y", alpha=0.3)


def _plain_frame(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _trailing_mean(values: Sequence[float], window: int) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _scores(score: float, majority: float | None) -> tuple[str, str, str]:
    if majority is None:
        return f"{score:.3f}", "-", "-"
    return f"{score:.3f}", f"{majority:.3f}", f"{score - majority:+.3f}"


def _mean_majority(result: RunResult) -> float | None:
    """The mean of the baselines; None unless every task has one, since it would not compare with the mean score."""
    baselines = [result.majority.get(task) for task in result.eval]
    known = [base for base in baselines if base is not None]
    return sum(known) / len(known) if known and len(known) == len(baselines) else None


def _caption(result: RunResult) -> str:
    trained, backbone = result.num_trained_parameters, result.num_backbone_parameters
    share = f" ({trained / backbone:.2%} of the backbone's {backbone:,})" if backbone else ""
    n = result.num_workers
    where = "in one process" if n == 0 else f"on {n} worker{'s' if n > 1 else ''}"
    lines = [
        f"{trained:,} trained parameters{share}",
        f"{result.num_steps:,} steps{' (stopped early)' if result.stopped_early else ''}"
        f" in {_duration(result.train_seconds)} {where}",
        f"{result.examples_per_second:,.1f} examples/s, {result.peak_memory_bytes / 2**30:.2f} GiB at most",
    ]
    if len(result.evaluations) > 1:
        lines.append(f"scores of step {result.best_step:,}, the best of {len(result.evaluations)} evaluations")
    if result.router_collapse:
        lines.append(f"WARNING: {describe(result.router_collapse)}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
