"""Where configurations come from: a list that the recipe alone determines, or Optuna, which learns from the scores.

The only file that imports Optuna, as Ray Tune's OptunaSearch.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import optuna
from ray.tune.search.optuna import OptunaSearch

from polyprompt.errors import ConfigError
from tuning.schema import Space
from tuning.spaces import MAX_DRAWS, Params, Search
from tuning.study import Scalar, Trial


class Source(Protocol):
    """Gives configurations by number, and hears how they did."""

    def suggest(self, number: int) -> Params | None:
        """Return the configuration of a new trial; None: there are no more."""

    def tell(self, number: int, values: Mapping[str, float], *, failed: bool) -> None:
        """values: what is known of the objectives; those of a stopped trial may lack some."""


class Listed:
    """Grid and random: the same list at every start."""

    def __init__(self, configurations: Sequence[Params]) -> None:
        self.configurations = configurations

    def suggest(self, number: int) -> Params | None:
        return self.configurations[number] if number < len(self.configurations) else None

    def tell(self, number: int, values: Mapping[str, float], *, failed: bool) -> None:
        """Nothing is learned."""


class Learned:
    """Optuna's TPE and NSGA-II through OptunaSearch, with conditions as a define-by-run space.

    Nothing of it is stored: a resumed search asks a new OptunaSearch for the known trials' very configurations, in
    order, and tells it their scores.
    """

    def __init__(self, search: Search, known: Sequence[Trial]) -> None:
        """known: in the order of their numbers, finished or not."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config = search.config
        assert config.num_trials is not None
        self.search = search
        self.num_trials = config.num_trials
        self.metrics = [objective.metric for objective in search.objectives]
        modes: list[str] = [objective.mode for objective in search.objectives]
        one = len(self.metrics) == 1
        # The same seed would draw the known trials' random numbers again.
        seed = config.seed + 1000 * len(known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: optuna.samplers.BaseSampler
            if config.searcher == "tpe":
                sampler = optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=config.num_startup_trials, multivariate=True, group=True,
                )  # fmt: skip
            else:
                sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=config.num_startup_trials)
        self.optuna = OptunaSearch(
            space=self._define,
            metric=self.metrics[0] if one else self.metrics,
            mode=modes[0] if one else modes,
            sampler=sampler,
            points_to_evaluate=[self._names(trial.params) for trial in known],
        )
        self._ids: dict[int, str] = {}
        for trial in known:
            self._ids[trial.number] = str(trial.number)
            self.optuna.suggest(str(trial.number))
            if trial.state in ("finished", "stopped", "failed"):
                values = {metric: trial.mean(metric) for metric in self.metrics}
                self.tell(trial.number, values, failed=trial.state == "failed")

    def suggest(self, number: int) -> Params | None:
        if number >= self.num_trials:
            return None
        for attempt in range(MAX_DRAWS):
            identity = f"{number}.{attempt}"
            suggested = self.optuna.suggest(identity)
            assert suggested is not None
            params: Params = {name.partition("#")[0]: value for name, value in suggested.items()}
            if self.search.allows(params):
                self._ids[number] = identity
                return params
            self.optuna.on_trial_complete(identity, error=True)  # Optuna leaves failed ones out
        raise ConfigError(
            f"search.constraints: none of {MAX_DRAWS} draws of {self.search.config.searcher} is allowed; loosen the "
            "constraints, or narrow the space to what they allow"
        )

    def tell(self, number: int, values: Mapping[str, float], *, failed: bool) -> None:
        known = {metric: values.get(metric, math.nan) for metric in self.metrics}
        whole = all(math.isfinite(value) for value in known.values())
        # Without all values it counts as pruned: worse than the finished ones.
        self.optuna.on_trial_complete(self._ids[number], known if whole and not failed else None, error=failed)

    def _define(self, trial: optuna.Trial) -> None:
        self.search.draw(lambda name, space: _suggest(trial, name, space))

    def _names(self, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return a configuration by the names that Optuna knows the values by."""
        names: dict[str, Scalar] = {}

        def pick(name: str, _: Space) -> Scalar:
            names[name] = params[name.partition("#")[0]]
            return names[name]

        self.search.draw(pick)
        return names


def source(search: Search, known: Sequence[Trial]) -> Source:
    """Return where the search's configurations come from. known: trials of an earlier start, in order."""
    listed = search.enumerated
    return Listed(listed) if listed is not None else Learned(search, known)


class Unstarted:
    """The trials to start: first those that an earlier start left unfinished, then the source's new ones."""

    def __init__(self, source: Source, known: Sequence[Trial]) -> None:
        """known: trials of earlier starts."""
        self.source = source
        self.unfinished = [(t.number, dict(t.params)) for t in known if t.state in ("running", "waiting")]
        self.next_number = max((t.number for t in known), default=-1) + 1

    def pop(self) -> tuple[int, Params] | None:
        """Return the next one's number and configuration; None: there are no more now."""
        if self.unfinished:
            return self.unfinished.pop(0)
        params = self.source.suggest(self.next_number)
        if params is None:
            return None
        self.next_number += 1
        return self.next_number - 1, params


def _suggest(trial: optuna.Trial, name: str, space: Space) -> Any:
    if space.choice is not None:
        return trial.suggest_categorical(name, space.choice)
    if space.uniform is not None:
        return trial.suggest_float(name, *space.uniform)
    if space.loguniform is not None:
        return trial.suggest_float(name, *space.loguniform, log=True)
    if space.randint is not None:
        return trial.suggest_int(name, space.randint[0], space.randint[1] - 1)
    assert space.quniform is not None
    low, high, q = space.quniform
    if all(isinstance(part, int) for part in space.quniform):
        return trial.suggest_int(name, int(low), int(high), step=int(q))
    return trial.suggest_float(name, low, high, step=q)
