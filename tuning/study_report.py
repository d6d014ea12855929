"""What a person decides from: the leaderboard, the best trial as a recipe, the live and closing table.

The plots are drawn by study_plots.py.
"""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from tuning import study_plots
from tuning.spaces import configure
from tuning.study import Change, Study, Trial
from tuning.study_importances import importances
from tuning.study_plots import quantity, short_names, show

LEADERBOARD_CSV, LEADERBOARD_MD, BEST, PLOTS = "leaderboard.csv", "leaderboard.md", "best.yaml", "plots"
COSTS = ("num_trained_parameters", "inference_flops")
COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "cyan", "waiting": "dim"}
#: More searched keys than this share one column of the terminal's table.
MAX_KEY_COLUMNS = 5


def write(study: Study, folder: Path) -> None:
    """Write leaderboard.csv, leaderboard.md, best.yaml and plots/*.png. Without a finished trial there is no best."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = leaderboard(study)
    with (folder / LEADERBOARD_CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(study))
        writer.writeheader()
        writer.writerows(rows)
    (folder / LEADERBOARD_MD).write_text(_markdown(study, rows), encoding="utf-8")
    if study.best() is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        (folder / BEST).write_text(best_recipe(study), encoding="utf-8")
    draw(study, folder / PLOTS)


def draw(study: Study, folder: Path) -> list[Path]:
    """Draw what there is data for into folder/*.png and return the paths. Plots of an earlier state go."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Study], Figure | None]] = {
        "parameters": study_plots.parameters,
        "front_parameters": lambda study: study_plots.front(study, "num_trained_parameters"),
        "front_flops": lambda study: study_plots.front(study, "inference_flops"),
        "importances": importances,
        "curves": study_plots.curves,
    }
    paths = []
    for name, plot in plots.items():
        path, figure = folder / f"{name}.png", plot(study)
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def leaderboard(study: Study) -> list[dict[str, Any]]:
    """Return a row a trial, best first; the trials without a rank follow by number. A value that is not there is None.

    With several objectives `front` says whether a trial is on the Pareto front; `rank` is by the first objective.
    """
    done, front = {t.number for t in study.finished}, {t.number for t in study.front()}
    rows = []
    for rank, trial in enumerate(study.ranked(), 1):
        row: dict[str, Any] = {
            **dict.fromkeys(_columns(study)),
            **trial.params,
            "rank": rank if trial.number in done else None,
            "number": trial.number,
            "state": trial.state,
            "num_steps": trial.num_steps,
            "seconds": round(trial.seconds, 1),
            "seeds": " ".join(str(run.seed) for run in trial.runs),
            "cause": trial.cause,
            "changes": "; ".join(change_text(change) for change in trial.changes),
        }
        for metric in (o.metric for o in study.objectives):
            row[metric] = _finite(trial.mean(metric))
            if metric not in COSTS:
                row[f"{metric} std"] = _finite(trial.std(metric))
        for cost in COSTS:
            mean = _finite(trial.mean(cost))
            row[cost] = None if mean is None else round(mean)
        if "front" in row:
            row["front"] = trial.number in front
        rows.append(row)
    return rows


def best_recipe(study: Study) -> str:
    """Return the best trial as a complete recipe for jobs/multitask.py, with the first seed. There must be one."""
    best = study.best()
    assert best is not None
    metric, run = study.objectives[0].metric, best.runs[0]
    scores = f"{metric} {_spread(best, metric)}"
    if len(best.runs) > 1:
        scores += f" over {len(best.runs)} seeds, {run.metrics[metric]:.4g} with this one"
    config = configure(study.recipe, best.params, seed=run.seed)
    head = f"# The best of {len(study.trials)} trials of the study {study.name}: trial {best.number}, {scores}.\n"
    if best.changes:
        head += "# Its values changed while it trained; these are the last ones, and rerun they score something else:\n"
        head += "".join(f"#   {line}\n" for line in schedule_lines(study, best))
    return f"{head}#     python jobs/multitask.py {BEST}\n{config.to_yaml()}"


def change_text(change: Change) -> str:
    """Say in a line what changed when a trial took over another's weights."""
    values = ", ".join(f"{key} {show(change.before[key])} → {show(change.after[key])}" for key in change.after)
    return f"went on from trial {change.source} at step {change.step}" + (f": {values}" if values else "")


def schedule_lines(study: Study, trial: Trial) -> list[str]:
    """Say which trial trained what became this one's weights, with which values."""
    return [
        f"from step {stage.step} on trial {stage.number}: "
        + ", ".join(f"{key}={show(value)}" for key, value in stage.params.items())
        for stage in study.schedule(trial)
    ]


def table(study: Study, *, max_trials: int | None = None) -> Table:
    """Return the table that is shown live and at the end, best trial first.

    max_trials: show the best so many, and those that run now; the caption counts the rest.
    """
    done = {trial.number for trial in study.finished}
    order = study.ranked()
    shown = [t for i, t in enumerate(order) if max_trials is None or i < max_trials or t.state == "running"]
    made = Table(title=f"{study.name}: {study.searcher}, {study.scheduler}", caption=_caption(study, len(shown)))
    for heading in ("Rank", "Trial"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("State", no_wrap=True)
    names = short_names(study.keys)
    columns = list(study.keys) if len(study.keys) <= MAX_KEY_COLUMNS else []
    for key in columns:
        made.add_column(names[key], justify="right", overflow="fold")
    if not columns:
        made.add_column("Values", overflow="fold")
    metrics = list(dict.fromkeys([*(o.metric for o in study.objectives), "num_trained_parameters"]))
    for heading in (*("trained" if metric == "num_trained_parameters" else metric for metric in metrics), "steps"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("s", justify="right", no_wrap=True)
    changes = any(trial.changes for trial in shown)
    if changes:
        made.add_column("From trial@step", overflow="fold")
    causes = any(trial.cause for trial in shown)
    if causes:
        made.add_column("Cause", overflow="fold", max_width=40)
    ranks = {trial.number: rank for rank, trial in enumerate(order, 1)}
    for trial in shown:
        rank = ranks[trial.number]
        values = [show(trial.params[key]) if key in trial.params else "" for key in columns]
        together = ", ".join(f"{names[key]} {show(trial.params[key])}" for key in study.keys if key in trial.params)
        made.add_row(
            str(rank) if trial.number in done else "",
            str(trial.number),
            f"[{COLOURS[trial.state]}]{trial.state}[/]",
            *map(escape, values or [together]),
            *(_spread(trial, metric) for metric in metrics),
            f"{trial.num_steps:,}",
            f"{trial.seconds:,.0f}",
            *([" ".join(f"{c.source}@{c.step}" for c in trial.changes)] if changes else []),
            *([escape(trial.cause)] if causes else []),
            style="bold" if rank == 1 and trial.number in done else None,
        )
    return made


def _columns(study: Study) -> list[str]:
    objectives = [o.metric for o in study.objectives]
    scores = [column for metric in objectives if metric not in COSTS for column in (metric, f"{metric} std")]
    front = ["front"] if len(objectives) > 1 else []
    start = ["rank", "number", "state", *front]
    return [*start, *study.keys, *scores, *COSTS, "num_steps", "seconds", "seeds", "cause", "changes"]


def _markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as a table of GitHub's Markdown."""

    def cell(value: Any) -> str:
        shown = "" if value is None else f"{value:,}" if type(value) is int and value >= 10_000 else show(value)
        return " ".join(shown.replace("|", r"\|").split())

    best = study.best()
    lines = [f"# {study.name}", "", *_summary(study, best), ""]
    if rows:
        kept = [key for key in rows[0] if key == "state" or any(row[key] not in (None, "") for row in rows)]
        lines += [f"| {' | '.join(kept)} |", f"|{' --- |' * len(kept)}"]
        lines += [f"| {' | '.join(cell(row[key]) for key in kept)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _summary(study: Study, best: Trial | None) -> list[str]:
    goals = " and ".join(f"{'highest' if o.mode == 'max' else 'lowest'} `{o.metric}`" for o in study.objectives)
    lines = [
        f"{_counts(study)}; {study.searcher} search, {study.scheduler} scheduler, seed {study.seed}; wanted: {goals}."
    ]
    if best is None:
        return [*lines, "No trial has finished, so there is no best one."]
    values = ", ".join(f"`{key}={show(value)}`" for key, value in best.params.items())
    lines.append(f"Best: trial {best.number} ({values}): {_spread(best, study.objectives[0].metric)}.")
    if best.changes:
        lines += ["Its values changed on the way, so no single config reruns it:", ""]
        lines += [f"* {line}" for line in schedule_lines(study, best)]
    return lines


def _counts(study: Study) -> str:
    states = [trial.state for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)
    return f"{len(states)} trials" + (f" ({counts})" if counts else "")


def _caption(study: Study, num_shown: int) -> str:
    hidden = len(study.trials) - num_shown
    return _counts(study) + (f"; {hidden} not shown" if hidden else "")


def _spread(trial: Trial, metric: str) -> str:
    """The mean over the seeds, with ± the standard deviation where there are several; "" where there is no value."""
    mean, std = trial.mean(metric), trial.std(metric)
    if math.isnan(mean):
        return ""
    if metric in COSTS or metric == "peak_memory_bytes":
        return quantity(mean)
    return f"{mean:.4g}" + (f" ± {std:.2g}" if math.isfinite(std) else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
