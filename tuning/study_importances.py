"""Which searched key matters: Optuna's fANOVA over the finished trials of a study, conditional keys apart."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from polyprompt.report import COLOURS, GREY
from tuning.study import Scalar, Study, Trial
from tuning.study_plots import is_log, is_numeric, label, plain_frame, show

#: Fewer finished trials say nothing about importances.
MIN_TRIALS = 4


@dataclass(frozen=True)
class Panel:
    """Trials with the same keys. weights: key → its share, 1 together. unweighed: key → why it has none."""

    title: str
    weights: dict[str, float] = field(default_factory=dict)
    unweighed: dict[str, str] = field(default_factory=dict)


def weigh(study: Study) -> list[Panel]:
    """Weigh the keys that all finished trials have among all of them, then each set of conditional keys among its own.

    The evaluator is seeded, so the same trials give the same weights. Keys without any finished trial come last.
    """
    trials = study.finished
    sets = list(dict.fromkeys(frozenset(trial.params) for trial in trials))
    shared = frozenset.intersection(*sets) if sets else frozenset()
    panels = [_weigh(study, f"all finished (n = {len(trials)})", trials, shared)] if shared else []
    for keys in sets:
        if keys != shared:
            members = [trial for trial in trials if frozenset(trial.params) == keys]
            # What sets the group apart has one value in it, and is weighed above.
            moving = {key for key in keys if key not in shared or len({t.params[key] for t in members}) > 1}
            title = f"{_condition(members, trials, keys - shared)} (n = {len(members)})"
            panels.append(_weigh(study, title, members, moving))
    absent = [key for key in study.keys if not any(key in keys for keys in sets)]
    if absent:
        panels.append(Panel("not weighed", unweighed=dict.fromkeys(absent, "no finished trial has it")))
    return panels


def importances(study: Study) -> Figure | None:
    """Draw the weights, a panel for each set of trials; a key without a weight says why."""
    panels = weigh(study) if study.trials else []
    if not panels:
        return None
    heights = [len(panel.weights) + len(panel.unweighed) + 1.0 for panel in panels]
    figure = Figure(figsize=(9, 1.0 + 0.36 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel)
    grid[-1].set_xlabel("importance: share of the variance that a key explains by itself (fANOVA, 1 together)")
    figure.suptitle(f"{study.name}: what moves the {label(study.objectives[0].metric)}")
    return figure


def _weigh(study: Study, title: str, trials: Sequence[Trial], among: Set[str]) -> Panel:
    metric, keys = study.objectives[0].metric, [key for key in study.keys if key in among]
    scores = [trial.mean(metric) for trial in trials]
    if len(trials) < MIN_TRIALS:
        return Panel(title, unweighed=dict.fromkeys(keys, f"needs {MIN_TRIALS} finished trials"))
    if len(set(scores)) == 1:
        return Panel(title, unweighed=dict.fromkeys(keys, "all scores are equal"))
    spaces = {key: _space([trial.params[key] for trial in trials]) for key in keys}
    unweighed = {key: "one value only" for key, space in spaces.items() if space.single()}
    spaces = {key: space for key, space in spaces.items() if key not in unweighed}
    if not spaces:
        return Panel(title, unweighed=unweighed)
    made = _quiet_study()
    for trial, score in zip(trials, scores, strict=True):
        params = {key: trial.params[key] for key in spaces}
        made.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=score))
    evaluator = FanovaImportanceEvaluator(seed=0)
    try:
        weights = get_param_importances(made, evaluator=evaluator, params=list(spaces))
    except RuntimeError as error:  # its trees found nothing to split
        return Panel(title, unweighed={**dict.fromkeys(spaces, str(error)), **unweighed})
    return Panel(title, dict(sorted(weights.items(), key=lambda item: -item[1])), unweighed)


def _quiet_study() -> optuna.Study:
    """An empty study in memory; Optuna announces each one with a line."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)


def _space(values: Sequence[Scalar]) -> BaseDistribution:
    """The distribution that the values span: a study does not keep its spaces."""
    if not is_numeric(values):
        return CategoricalDistribution(sorted(set(values), key=str))
    low, high = min(values), max(values)  # type: ignore[type-var]
    log = is_log([low, high])  # type: ignore[list-item]
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=log)  # type: ignore[arg-type]
    return FloatDistribution(low, high, log=log)  # type: ignore[arg-type]


def _condition(members: Sequence[Trial], trials: Sequence[Trial], own: frozenset[str]) -> str:
    """Name a group by what its members alone have in common, say method.name=smop."""
    first = members[0].params
    same = [key for key in first if len({trial.params[key] for trial in members}) == 1]
    telling = [
        f"{key}={show(first[key])}"
        for key in same
        if not any(t.params.get(key, first[key]) == first[key] for t in trials if t not in members)
    ]
    return " and ".join(telling) or f"trials with {', '.join(sorted(own)) or 'no conditional key'}"


def _draw(axes: Axes, panel: Panel) -> None:
    names = [*panel.weights, *panel.unweighed]
    axes.barh(range(len(panel.weights)), list(panel.weights.values()), height=0.6, color=COLOURS[0])
    for place, weight in enumerate(panel.weights.values()):
        axes.text(weight + 0.01, place, f"{weight:.2f}", va="center")
    for place, why in enumerate(panel.unweighed.values(), len(panel.weights)):
        axes.text(0.01, place, why, va="center", color=GREY, style="italic")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.1)
    axes.set_title(panel.title, loc="left", fontsize=10)
    plain_frame(axes)
