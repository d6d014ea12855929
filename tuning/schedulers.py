"""Ray Tune's schedulers that end trials early, told what earlier starts of a search have learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tuning.schema import AshaScheduler, MedianScheduler
from tuning.spaces import Search
from tuning.study import Objective, Trial
from tuning.work import STEP

#: More steps than any trial has: Tune never ends a trial by its length.
ENDLESS = 10**9


def scheduler(search: Search, known: Sequence[Trial]) -> TrialScheduler:
    """Return Tune's scheduler, told the curves of the trials that are done. Of a population: see population.py."""
    chosen, score, every = search.config.scheduler, search.score, search.run.evaluate.steps
    if not isinstance(chosen, AshaScheduler | MedianScheduler):
        return FIFOScheduler()
    assert score is not None
    assert every is not None
    shared: dict[str, Any] = {
        "time_attr": STEP,
        "metric": score.metric,
        "mode": score.mode,
        "grace_period": chosen.grace_steps or every,
    }
    made: TrialScheduler
    if isinstance(chosen, AshaScheduler):
        made = AsyncHyperBandScheduler(**shared, max_t=ENDLESS, reduction_factor=chosen.reduction_factor)
    else:
        # Never pause one trial for another.
        made = MedianStoppingRule(**shared, min_samples_required=chosen.min_trials, min_time_slice=ENDLESS)
    for trial in known:
        if trial.state in ("finished", "stopped"):
            _replay(made, trial, score)
    return made


@dataclass(frozen=True)
class StandIn:
    """All that a scheduler looks at of a trial that is not Tune's."""

    trial_id: str


class NoController:
    """No other trial is alive that one could be paused for."""

    @staticmethod
    def get_live_trials() -> list[Any]:
        return []


def _replay(made: TrialScheduler, trial: Trial, score: Objective) -> None:
    """Tell a scheduler of a trial that is done."""
    known: Any = StandIn(f"known_{trial.number}")
    controller: Any = NoController()
    results = [{STEP: step, score.metric: value} for step, value in _points(trial)]
    made.on_trial_add(controller, known)
    for result in results[:-1]:
        made.on_trial_result(controller, known, result)
    if results:
        made.on_trial_complete(controller, known, results[-1])


def _points(trial: Trial) -> list[tuple[int, float]]:
    """Return the curve over all seeds, with the step that grows over them, as the trial itself reports it."""
    points: list[tuple[int, float]] = []
    offset = 0
    for run in trial.runs:
        points += [(offset + step, value) for step, value in run.curve]
        offset += run.num_steps
    return points
