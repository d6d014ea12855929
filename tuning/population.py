"""Population based training: Ray Tune's synchronous PBT over trials whose state is their folders.

How it is used and why:

- All trials run to the same step, end their runs there in order, and wait. Ray Tune then decides who goes on from whom
  under which values; nobody is at work, so a copy is exact, and with a fixed seed so is the whole study.
- What Tune saves and restores is empty. A copy is made from folder to folder, here, in the driver.
- Tune would start every new trial at once where trials reserve nothing: new ones wait as paused ones do, so that only
  `choose_trial_to_run` starts any.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining

from polyprompt.errors import PolypromptError
from tuning.schema import PbtScheduler, Space
from tuning.spaces import Params, Search
from tuning.study import Scalar, Trial

LOGGER = logging.getLogger(__name__)
UNTIL = "until"
Clone = Callable[[int, int, Params], None]
"""Takes the numbers of a trial and of the one that it goes on from, and its new params."""


class Population(PopulationBasedTraining):
    """Tune's scheduler. A trial's config: its number, its params, and the step until which it runs."""

    def __init__(
        self, search: Search, known: Sequence[Trial], *, clone: Clone, num_concurrent: int, ending: threading.Event
    ) -> None:
        """known: trials of earlier starts. ending: end the trials that wait."""
        chosen, score, steps = search.config.scheduler, search.score, search.perturbation_steps
        assert isinstance(chosen, PbtScheduler)
        assert score is not None
        assert steps is not None
        self.search = search
        self.spaces = {key: space for key, [space] in search.config.space.items()}
        self.clone = clone
        self.num_concurrent = num_concurrent
        self.ending = ending
        super().__init__(
            time_attr=UNTIL,
            metric=score.metric,
            mode=score.mode,
            perturbation_interval=steps,
            hyperparam_mutations={"params": {key: _mutation(space) for key, space in self.spaces.items()}},
            quantile_fraction=chosen.quantile_fraction,
            resample_probability=chosen.resample_probability,
            custom_explore_fn=self._inside,
            log_config=False,
            synch=True,
        )
        # Nobody of an unbroken population is two meetings apart: the next one is that of the trial furthest behind.
        unfinished = [trial.num_steps for trial in known if trial.state in ("running", "waiting")]
        behind = min(unfinished) if unfinished and len(known) == search.config.num_trials else 0
        self._next_perturbation_sync = (behind // steps + 1) * steps

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a pickle of everything for its own resume, which is not used

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        if trial in self._trial_state:  # started again after a failure
            return

        class NoSearch:
            """Tune refuses searchers with PBT, as they would learn from values that changed. Ours do not learn."""

            search_alg = None

        without: Any = NoSearch()
        super().on_trial_add(without, trial)
        trial.set_status(TuneTrial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if UNTIL not in result:  # an evaluation on the way
            return self.CONTINUE
        if result[UNTIL] < self._next_perturbation_sync:  # its process was started for an earlier meeting
            return self.PAUSE
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if self.ending.is_set():
            for trial in live:
                if trial.status == TuneTrial.PAUSED:
                    tune_controller.stop_trial(trial)
            return None
        if live and not any(map(self._is_behind, live)):
            # The last one that they waited for has ended instead.
            self._next_perturbation_sync += self._perturbation_interval
        if sum(trial.status != TuneTrial.PAUSED for trial in live) >= self.num_concurrent:
            return None
        for trial in live:
            if trial.status == TuneTrial.PAUSED and self._is_behind(trial):
                trial.set_config({**trial.config, UNTIL: self._next_perturbation_sync})
                return trial
        return None

    def _is_behind(self, trial: TuneTrial) -> bool:
        return self._trial_state[trial].last_train_time < self._next_perturbation_sync

    def _checkpoint_or_exploit(self, trial: TuneTrial, *others: Any) -> None:
        """Draw from the search's seed, whoever else drew from the module's generator, which Tune's PBT uses."""
        state = random.getstate()
        random.seed(f"{self.search.config.seed} {trial.config['number']} {self._next_perturbation_sync}")
        try:
            super()._checkpoint_or_exploit(trial, *others)
        finally:
            random.setstate(state)

    def _exploit(self, tune_controller: Any, trial: TuneTrial, trial_to_clone: TuneTrial) -> None:
        before = trial.config
        super()._exploit(tune_controller, trial, trial_to_clone)
        number, source = before["number"], trial_to_clone.config["number"]
        try:
            self.clone(number, source, trial.config["params"])
        except (PolypromptError, OSError) as error:
            LOGGER.warning("trial %d does not go on from trial %d, but from itself: %s", number, source, error)
            trial.set_config(before)

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "number": trial.config["number"]}, operations

    def _inside(self, config: dict[str, Any]) -> dict[str, Any]:
        """Bring values back into the space."""
        params = {key: _inside(self.spaces[key], value) for key, value in config["params"].items()}
        return {**config, "params": params}


def _mutation(space: Space) -> list[Scalar] | Callable[[], Scalar]:
    """Return the values in order, of which Tune takes neighbours, or what draws one where there is no end of them."""
    values = space.values()
    if values is None:
        return lambda: space.draw(random)  # type: ignore[arg-type]
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else values  # type: ignore[type-var]


def _inside(space: Space, value: Scalar) -> Scalar:
    if (bounds := space.uniform or space.loguniform) is None:
        return value
    assert isinstance(value, int | float)
    return min(bounds[1], max(bounds[0], float(f"{value:.6g}")))
