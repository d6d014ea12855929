"""Runs the trials of a search with Ray Tune, each in a process of its own; packs.py: several in one.

How Ray Tune is used and why (each was seen to bite):

- A trial is an actor of ours whose thread does the work, so that it can be told to stop and end in order: its
  tracking run closed, its workers' places freed by Ray Train itself. Killed, it would leave them reserved for ever.
- Tune knows nothing of Ray Train's workers: a trial that starts some reserves next to nothing itself, and the number of
  concurrent trials comes from capacity.py.
- A failed trial is a result, not an error, which Tune would retry; only a cause that may pass is raised.
- Nothing of Tune's is resumed. A study is its folder: at a new start the trials that are not done are proposed again
  under their numbers, their runs go on from their bundles, and searcher and scheduler are told what is known.
"""

import logging
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from polyprompt import placement, ray_train
from polyprompt.errors import StoppedError
from polyprompt.run_folder import LOCK
from tuning.population import UNTIL, Population
from tuning.sampler import Source, Unstarted
from tuning.schedulers import scheduler
from tuning.schema import PbtScheduler
from tuning.spaces import Params, Search
from tuning.study import Change, Trial
from tuning.trial import Ended, Values
from tuning.work import STEP, PausedError, Report, failure

LOGGER = logging.getLogger(__name__)
OUTCOME, CAUSE, FINISHED, FAILED, INTERRUPTED = "outcome", "cause", "finished", "failed", "interrupted"
#: How long a stopped trial's run may take to end in order; it sees the order at its next logged step.
ENDING_SECONDS = 120.0
REAP_SECONDS = 5.0


class PassingError(Exception):
    """A trial failed from a cause that may pass: Tune starts it again."""


class Stoppable(Protocol):
    """The work of a trial: number, params, report → its metrics. Raises StoppedError after it was told to stop."""

    def __call__(self, number: int, params: Params, report: Report, until: int | None = None) -> Values:
        """until: raise PausedError at this step. Called again, go on."""

    def tell_to_stop(self, number: int) -> None: ...

    def clone(self, number: int, source: int, params: Params) -> Change:
        """Let a trial go on from another's state with these params. Called in the driver, while neither is at work."""


class Events(Protocol):
    """Hears what happens to the trials, in the driver."""

    def begun(self, number: int, params: Params) -> None:
        """Before the trial starts."""

    def reported(self, number: int, step: int, values: Mapping[str, float]) -> None: ...

    def changed(self, number: int, change: Change) -> None: ...

    def ended(self, number: int, ended: Ended | None) -> None:
        """ended: None: finished, or interrupted."""


class TrialActor(tune.Trainable):
    """A trial at work, in a process of its own."""

    def setup(self, config: dict[str, Any], work: Stoppable, reuse: bool) -> None:  # type: ignore[override]
        self.work = work
        self.reuse = reuse
        self._prepare(config)

    def _prepare(self, config: dict[str, Any]) -> None:
        self.number: int = config["number"]
        self.step_seen = 0
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.thread = threading.Thread(target=self._run, args=(config, self.results), daemon=True)

    def _run(self, config: dict[str, Any], results: "queue.Queue[dict[str, Any]]") -> None:
        def report(step: int, seen: Values) -> None:
            results.put({STEP: step, **seen})

        try:
            values = self.work(self.number, config["params"], report, config.get(UNTIL))
            results.put({**values, OUTCOME: FINISHED, "done": True})
        except PausedError as paused:
            results.put({**paused.values, UNTIL: config[UNTIL]})
        except StoppedError:
            results.put({OUTCOME: INTERRUPTED, "done": True})
        except BaseException as error:
            LOGGER.exception("trial %s failed", self.number)
            ended = failure(error)
            results.put({OUTCOME: FAILED, CAUSE: ended.cause, "passing": ended.passing, "done": True})

    def step(self) -> dict[str, Any]:
        # Not before: a process that Tune replaces by one that came free must never have touched the trial.
        if self.thread.ident is None:
            self.thread.start()
        result = self.results.get()
        if "done" in result or UNTIL in result:
            # Its last word. While the thread is still seen alive, cleanup would tell the trial's next start to stop.
            self.thread.join()
        self.step_seen = max(self.step_seen, result.get(STEP, 0))
        if result.get("passing"):
            raise PassingError(result[CAUSE])
        return {STEP: self.step_seen, **result}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial's state is its folder. PBT asks for this, at a time when the trial's run has ended."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The folder has it all."""

    def cleanup(self) -> None:
        if self.thread.is_alive():
            self.work.tell_to_stop(self.number)
            self.thread.join(ENDING_SECONDS)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        if not self.reuse or self.thread.is_alive():
            return False
        self._prepare(new_config)
        return True


@dataclass
class Proposals(Searcher):
    """Hands Tune the trials, and tells the source how they did."""

    unstarted: Unstarted
    events: Events
    metrics: Sequence[str]
    ending: threading.Event

    def __post_init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = None if self.ending.is_set() else self.unstarted.pop()
        if trial is None:
            return Searcher.FINISHED
        number, params = trial
        self.numbers[trial_id] = number
        self.events.begun(number, params)
        return {"number": number, "params": params}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        outcome = (result or {}).get(OUTCOME)
        if outcome == INTERRUPTED:
            return
        values = {key: value for key, value in (result or {}).items() if key in self.metrics}
        self.unstarted.source.tell(self.numbers[trial_id], values, failed=error or outcome == FAILED)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a pickle of everything for its own resume, which is not used

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The study's folder has it all."""

    def save(self, checkpoint_path: str) -> None:
        raise NotImplementedError

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class Listener(tune.Callback):
    """Passes Tune's events on, and frees what killed trials left."""

    def __init__(
        self, events: Events, scheduler: str, folders: Callable[[int], Sequence[Path]], *, stops: bool
    ) -> None:
        """folders: the run folders of a trial. stops: the scheduler ends trials early."""
        self.events = events
        self.scheduler = scheduler
        self.stops = stops
        self.folders = folders
        self._ended: set[int] = set()
        self._dead: set[Path] = set()
        self._looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if OUTCOME not in result:
            seen = {key: value for key, value in result.items() if key.startswith("eval/")}
            self.events.reported(trial.config["number"], result[STEP], seen)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last = trial.last_result
        outcome = last.get(OUTCOME)
        ended = None
        if outcome == FAILED:
            ended = Ended("failed", last[CAUSE])
        elif outcome is None and last and self.stops:
            ended = Ended("stopped", f"{self.scheduler} at step {last[STEP]}")
        self._end(trial.config["number"], ended)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config["number"], lost(trial.get_error()))

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if time.monotonic() - self._looked > REAP_SECONDS:
            self._looked = time.monotonic()
            self._reap()

    def _end(self, number: int, ended: Ended | None) -> None:
        self._ended.add(number)
        self.events.ended(number, ended)

    def _reap(self) -> None:
        """Free the places of runs whose process is gone; at the second look, when Ray Train's controller is too."""
        for number in list(self._ended):
            left = [folder for folder in self.folders(number) if (folder / ray_train.PLACEMENT).is_file()]
            if not left:
                self._ended.discard(number)
            for folder in left:
                if folder in self._dead:
                    ray_train.release(folder)
                elif _is_dead(folder):
                    self._dead.add(folder)


def execute(
    search: Search,
    work: Stoppable,
    *,
    source: Source,
    known: Sequence[Trial],
    events: Events,
    num_concurrent: int,
    folder: Path,
    folders: Callable[[int], Sequence[Path]],
    ending: threading.Event,
    reuse: bool = False,
) -> None:
    """Run all trials that are not done, on the Ray that this process is in. Returns when they are, or `ending` is set
    and those at work have ended.

    known: trials of earlier starts. folder: for Tune's own files, deleted at the end. folders: the run folders of a
    trial. reuse: let one process do several trials, one after the other; peak memory is then not a trial's own.
    """
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        RAY_AIR_NEW_OUTPUT="0",
    )
    # They name files that are deleted at once, warn of a busy machine, and miss files that nobody asked for.
    for chatter in ("ray.tune.tune", "ray.tune.utils.util", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(chatter).setLevel(logging.ERROR)
    config = search.config
    proposals = Proposals(
        unstarted=Unstarted(source, known),
        events=events,
        metrics=[objective.metric for objective in search.objectives],
        ending=ending,
    )

    def clone(number: int, source_number: int, params: Params) -> None:
        events.changed(number, work.clone(number, source_number, params))

    population = isinstance(config.scheduler, PbtScheduler)
    chosen: TrialScheduler
    if population:
        chosen = Population(search, known, clone=clone, num_concurrent=num_concurrent, ending=ending)
    else:
        chosen = scheduler(search, known)
    # A trial of a population begins anew after every meeting: a new process each time would cost more than it trains.
    reuse = reuse or population
    name = uuid.uuid4().hex
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialActor, work=work, reuse=reuse), _resources(search)),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=chosen,
            num_samples=-1,
            # A population is there from the start; it counts itself who is at work.
            max_concurrent_trials=None if population else num_concurrent,
            reuse_actors=reuse,
            trial_name_creator=lambda trial: f"trial_{trial.config['number']}",
            trial_dirname_creator=lambda trial: f"trial_{trial.config['number']}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Listener(events, config.scheduler.name, folders, stops=not population)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _resources(search: Search) -> tune.PlacementGroupFactory:
    """Return what Tune reserves: an in-process trial's CPUs and GPUs, or a driver's next to nothing."""
    compute = search.run.compute
    if compute.num_workers == 0:
        return tune.PlacementGroupFactory([placement.worker(compute)])
    # Not a share of a CPU: what it takes, the workers of a full cluster would lack. Something must be named.
    return tune.PlacementGroupFactory([{"memory": 1}])


def lost(error: BaseException | str | None) -> Ended:
    """Say why a trial's process was lost, or which passing cause did not pass. Tune gives some errors as text."""
    if error is None:
        return Ended("failed", "its process ended", passing=True)
    cause = failure(error if isinstance(error, BaseException) else PassingError(error)).cause
    return Ended("failed", cause.rpartition("PassingError: ")[2], passing=True)


def _is_dead(folder: Path) -> bool:
    """Does no process train in this run folder?"""
    try:
        FileLock(folder / LOCK, timeout=0).acquire().lock.release()
    except Timeout:
        return False
    return True
