"""The plain record of a study: its trials, what they scored and cost, which is best. study.json is one of these."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from polyprompt.errors import DataError
from polyprompt.result import faults, write_whole

Scalar = bool | int | float | str | None
State = Literal["waiting", "running", "finished", "stopped", "failed"]
Mode = Literal["max", "min"]
FILE = "study.json"
_CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


@dataclass(frozen=True)
class Objective:
    """A metric of a run, and whether more of it is better."""

    metric: str
    mode: Mode

    def better(self, a: float, b: float) -> bool:
        return a > b if self.mode == "max" else a < b


@dataclass(frozen=True)
class SeedRun:
    """One training run of a trial, or what is left of it.

    run_id: MLflow's, "" without tracking. cause: why it failed or was stopped. metrics: `eval/mean`,
    `eval/<task>/score`, `num_trained_parameters`, `inference_flops`, `peak_memory_bytes`, `step_seconds`.
    curve: (step, the first objective) of every evaluation. folder: of the run.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CONFIG

    seed: int
    run_id: str = ""
    state: State = "waiting"
    cause: str = ""
    num_steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    folder: str = ""


@dataclass(frozen=True)
class Change:
    """A trial took over another's weights on its way. step: of those weights. source: number of the other trial.
    before, after: the trial's own values, of the keys that changed."""

    __pydantic_config__: ClassVar[ConfigDict] = _CONFIG

    step: int
    source: int
    before: dict[str, Scalar]
    after: dict[str, Scalar]


@dataclass(frozen=True)
class Stage:
    """Steps after `step` were trained by trial `number` with these values."""

    step: int
    number: int
    params: dict[str, Scalar]


@dataclass(frozen=True)
class Trial:
    """One configuration. params: dotted key of the run config → value, of the keys that exist for this trial; the
    last values where they changed on the way. changes: of population based training, in order."""

    __pydantic_config__: ClassVar[ConfigDict] = _CONFIG

    number: int
    params: dict[str, Scalar]
    runs: list[SeedRun]
    changes: list[Change] = field(default_factory=list)

    def params_after(self, num_changes: int) -> dict[str, Scalar]:
        """Return the values that it had after so many changes; 0: those it began with."""
        params = dict(self.params)
        for change in reversed(self.changes[num_changes:]):
            params |= change.before
        return params

    @property
    def state(self) -> State:
        """The first that holds: a seed failed; one was stopped; all are finished; all wait; else running."""
        states = {run.state for run in self.runs}
        if "failed" in states:
            return "failed"
        if "stopped" in states:
            return "stopped"
        if states in ({"finished"}, {"waiting"}):
            return states.pop()
        return "running"

    @property
    def cause(self) -> str:
        return next((run.cause for run in self.runs if run.cause), "")

    @property
    def num_steps(self) -> int:
        """Optimiser steps, over all seeds."""
        return sum(run.num_steps for run in self.runs)

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    def mean(self, metric: str) -> float:
        """Mean over the seeds that have the metric; NaN if none has."""
        values = self._values(metric)
        return statistics.fmean(values) if values else math.nan

    def std(self, metric: str) -> float:
        """Sample standard deviation over the seeds that have the metric; NaN with fewer than two."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def _values(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


@dataclass(frozen=True)
class Study:
    """A search, finished or not. recipe: the base run config as plain tables. keys: all searched keys."""

    __pydantic_config__: ClassVar[ConfigDict] = _CONFIG

    name: str
    recipe: dict[str, Any]
    keys: list[str]
    objectives: list[Objective]
    searcher: str
    scheduler: str
    seed: int
    trials: list[Trial]
    seconds: float = 0.0
    parent_run_id: str = ""

    @property
    def finished(self) -> list[Trial]:
        """The trials that ran to their end and have a finite value of every objective."""
        return [
            trial
            for trial in self.trials
            if trial.state == "finished" and all(math.isfinite(trial.mean(o.metric)) for o in self.objectives)
        ]

    def ranked(self) -> list[Trial]:
        """All trials: finished ones first, best first by the first objective, then the others by number."""
        first = self.objectives[0]
        sign = -1.0 if first.mode == "max" else 1.0
        done = sorted(self.finished, key=lambda trial: (sign * trial.mean(first.metric), trial.number))
        numbers = {trial.number for trial in done}
        return done + sorted((t for t in self.trials if t.number not in numbers), key=lambda trial: trial.number)

    def best(self) -> Trial | None:
        """The finished trial that is best by the first objective; the lower number of equals. None: none finished."""
        return self.ranked()[0] if self.finished else None

    def front(self) -> list[Trial]:
        """The finished trials that no other beats in one objective without losing in another, by number."""
        done = self.finished
        if len(self.objectives) == 1:
            best = self.best()
            return [best] if best else []
        return [trial for trial in done if not any(self._dominates(other, trial) for other in done)]

    def _dominates(self, a: Trial, b: Trial) -> bool:
        pairs = [(o, a.mean(o.metric), b.mean(o.metric)) for o in self.objectives]
        return not any(o.better(y, x) for o, x, y in pairs) and any(o.better(x, y) for o, x, y in pairs)

    def schedule(self, trial: Trial) -> list[Stage]:
        """Return which trial trained what became this trial's weights, and with which values, from step 0 on."""
        return self._stages(trial, len(trial.changes))

    def _stages(self, trial: Trial, num_changes: int) -> list[Stage]:
        params = trial.params_after(num_changes)
        if not num_changes:
            return [Stage(0, trial.number, params)]
        change = trial.changes[num_changes - 1]
        source = next(other for other in self.trials if other.number == change.source)
        earlier = sum(1 for other in source.changes if other.step < change.step)
        return [*self._stages(source, earlier), Stage(change.step, trial.number, params)]

    def write(self, path: Path) -> None:
        """Write the study as JSON, whole or not at all."""
        write_whole(path, TypeAdapter(Study).dump_json(self, indent=2) + b"\n")

    @staticmethod
    def read(path: Path) -> "Study":
        """Read what `write` wrote. Raises DataError naming the file and the field."""
        try:
            return TypeAdapter(Study).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; a search writes it, see tuning/search.py") from None
        except ValidationError as error:
            raise DataError(
                f"{path} is not a study of this version ({faults(error)}); search again into another --out"
            ) from None
