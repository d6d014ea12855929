"""The work of a trial: it trains, reports on its way, pauses, and says why it failed."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyprompt import checkpoint, run_folder, study_tracking
from polyprompt.errors import (
    BundleError,
    ConfigError,
    DataError,
    LostWorkersError,
    NotFiniteError,
    StoppedError,
    StorageError,
    TrackingError,
    TrainingError,
)
from polyprompt.tracking_opening import RunHandle
from tuning.spaces import Params
from tuning.study import Change
from tuning.trial import Ended, Trials, Values, metrics, newest_state, scores

if TYPE_CHECKING:
    from polyprompt.pack import Seat
    from tuning.frozen_weights import FrozenWeights

STEP = "step"
#: Tag of a trial's tracking run: the params that change on the way.
CHANGING = "polyprompt.changing"
POLL_SECONDS = 0.2
Report = Callable[[int, Values], None]
"""Takes a step, which grows over all seeds of a trial, and the scores of that step."""


class PausedError(Exception):
    """A trial's work has come to the step that it was to pause at. values: its step and score."""

    def __init__(self, values: Values) -> None:
        super().__init__(f"paused at step {values[STEP]:.0f}")
        self.values = values


@dataclass(frozen=True)
class TrainTrial:
    """The work of a trial: the same training run as jobs/multitask.py, once for each seed.

    parent: the study's tracking run. experiment: the driver's, whose environment the trials may lack. changing: their
    params change on the way. weights: the backbone that the trials' processes share.
    """

    trials: Trials
    parent: RunHandle | None = None
    experiment: str = ""
    changing: bool = False
    weights: "FrozenWeights | None" = None

    def __call__(
        self, number: int, params: Params, report: Report, until: int | None = None, seat: "Seat | None" = None
    ) -> Values:
        """seat: the trial's place among those that share its backbone."""
        # Imported here because it takes seconds that the driver need not pay.
        from polyprompt.ray_train import run

        if self.parent is not None:
            os.environ.update(MLFLOW_TRACKING_URI=self.parent.uri, MLFLOW_EXPERIMENT_NAME=self.experiment)
        trials, done, found = self.trials, 0, []
        for index, seed in enumerate(trials.seeds):
            config = trials.config(number, params, seed)
            place = trials.place(number, params, seed)
            # The very last evaluation is part of the trial's result.
            end: float = config.train.max_steps if index == len(trials.seeds) - 1 else math.inf
            begun = 0
            if until is not None:
                begun, end = newest_state(place).get("step", 0), min(until, end)
                pauses = until < config.train.max_steps
                trials.pause_at(number, place.bundles / checkpoint.folder_name(until) if pauses else None)
                if pauses and begun >= until:
                    raise PausedError(self._paused(place))
            try:
                with _follow(place, trials.score, done, (begun, end), report):
                    result = run(
                        config,
                        out=trials.out(number, seed),
                        say=lambda line: None,
                        stop=trials.stop_file(number),
                        tags=self._tags(number, params, seed),
                        seat=seat,
                        load=self.weights.load if self.weights else None,
                    )
            except StoppedError:
                if until is None or not trials.stop_file(number).is_symlink():
                    raise
                raise PausedError(self._paused(place)) from None
            done += config.train.max_steps
            found.append(metrics(result))
        mean = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
        return {STEP: done, **mean}

    def tell_to_stop(self, number: int) -> None:
        self.trials.tell_to_stop(number)

    def clone(self, number: int, source: int, params: Params) -> Change:
        return self.trials.clone(number, source, params)

    def _paused(self, place: run_folder.RunFolder) -> Values:
        evaluation = newest_state(place)["evaluations"][-1]
        return {STEP: evaluation["step"], self.trials.score: scores(evaluation)[self.trials.score]}

    def _tags(self, number: int, params: Params, seed: int) -> dict[str, str] | None:
        if self.parent is None:
            return None
        tags = study_tracking.child_tags(self.parent, trial=number, seed=seed)
        if self.changing:
            # As in RunConfig.flat: "section.key".
            tags[CHANGING] = json.dumps(sorted({".".join(key.split(".")[:2]) for key in params}))
        return tags


@contextmanager
def _follow(
    place: run_folder.RunFolder, score: str, offset: int, between: tuple[int, float], report: Report
) -> Iterator[None]:
    """Report each evaluation of a run once its bundle is there, of the steps above the first and below the second."""
    done, reported = threading.Event(), set[int]()

    def look() -> None:
        ended = False
        while not ended:
            ended = done.wait(POLL_SECONDS)  # once more after the end, for what came too fast to be seen on the way
            for evaluation in newest_state(place).get("evaluations", []):
                step = evaluation["step"]
                if step not in reported and between[0] < step < between[1]:
                    reported.add(step)
                    report(offset + step, {score: scores(evaluation)[score]})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def failure(error: BaseException) -> Ended:
    """Say why a trial failed, in one line that starts with the kind of the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, last = (lines[0], lines[-1]) if lines else (type(error).__name__, type(error).__name__)
    if any(mark in f"{type(error).__name__} {error}" for mark in ("OutOfMemory", "out of memory", "MemoryError")):
        return Ended("failed", f"out of memory: {last}")
    match error:
        case NotFiniteError():
            return Ended("failed", f"NaN: {first}")
        case ConfigError():
            return Ended("failed", f"bad combination: {first}")
        case DataError() | BundleError():
            return Ended("failed", f"bad data: {first}")
        case TrackingError():
            return Ended("failed", f"tracking: {first}", passing=True)
        case LostWorkersError():
            return Ended("failed", f"workers lost: {first}", passing=True)
        case StorageError():
            return Ended("failed", f"storage: {first}", passing=True)
        case TrainingError():
            return Ended("failed", f"mistake in code: {first}")
    return Ended("failed", f"{type(error).__name__}: {last}")
