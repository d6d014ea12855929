"""Runs the trials of a search in packs: processes whose trials share one frozen backbone (polyprompt/pack.py).

A trial is no process here, so Tune's controller has nothing to manage: this is a loop that hands each proposal to the
pack with the fewest trials, asks Tune's scheduler about every report, and frees a place when a trial's run has ended.
What trials leave, how they are told to stop and how a search goes on are as in execution.py.
"""

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.tune.schedulers import TrialScheduler

from polyprompt import placement
from polyprompt.errors import StoppedError
from polyprompt.pack import Pack, Seat
from tuning.capacity import Capacity
from tuning.execution import Events, lost
from tuning.sampler import Source, Unstarted
from tuning.schedulers import NoController, StandIn, scheduler
from tuning.spaces import Params, Search
from tuning.study import Trial
from tuning.trial import Ended, Values
from tuning.work import STEP, Report, failure

LOGGER = logging.getLogger(__name__)
WAIT_SECONDS = 0.5


class Work(Protocol):
    """The work of a trial, as execution.Stoppable; seat: its place in the pack."""

    def __call__(self, number: int, params: Params, report: Report, *, seat: Seat) -> Values: ...

    def tell_to_stop(self, number: int) -> None: ...


class PackProcess:
    """An actor: trials at work on one backbone, each a call of `train` in a thread of its own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.reports: queue.SimpleQueue[tuple[int, int, Values]] = queue.SimpleQueue()
        self.pack = Pack().__enter__()

    def train(self, number: int, params: Params) -> Values | Ended | None:
        """Return the trial's metrics, why it failed, or None if it was told to stop."""

        def report(step: int, seen: Values) -> None:
            self.reports.put((number, step, seen))

        try:
            with self.pack.seat() as seat:
                return self.work(number, params, report, seat=seat)
        except StoppedError:
            return None
        except BaseException as error:
            LOGGER.exception("trial %s failed", number)
            return failure(error)

    def news(self) -> list[tuple[int, int, Values]]:
        """Return number, step and scores of what was reported since the last call."""
        return [self.reports.get() for _ in range(self.reports.qsize())]


@dataclass
class Live:
    """A trial at work. pack: its process. stopped: why the scheduler told it to stop. seen: its newest scores."""

    number: int
    params: Params
    pack: Any = None
    failures: int = 0
    stopped: str = ""
    seen: Mapping[str, float] = field(default_factory=dict)

    @property
    def stand_in(self) -> Any:
        return StandIn(str(self.number))


@dataclass
class Packs:
    """All packs of a search and the trials in them. trials: by Ray's reference to the end of their work."""

    search: Search
    work: Work
    unstarted: Unstarted
    events: Events
    room: Capacity
    ending: threading.Event
    scheduler: TrialScheduler
    packs: list[Any] = field(default_factory=list)
    trials: dict[Any, Live] = field(default_factory=dict)

    def run(self) -> None:
        while True:
            while not self.ending.is_set() and len(self.trials) < self.room.num_concurrent:
                proposed = self._propose()
                if proposed is None:
                    break
                self._start(proposed)
            if not self.trials:
                return
            done, _ = ray.wait(list(self.trials), timeout=WAIT_SECONDS)
            self._hear()  # before an end is heard: what was reported comes first
            for reference in done:
                self._end(self.trials.pop(reference), reference)

    def close(self) -> None:
        for pack in self.packs:
            ray.kill(pack)

    def _propose(self) -> Live | None:
        """Begin a trial, if there is one."""
        proposed = self.unstarted.pop()
        if proposed is None:
            return None
        trial = Live(*proposed)
        self.events.begun(trial.number, trial.params)
        self.scheduler.on_trial_add(_NOBODY, trial.stand_in)
        return trial

    def _start(self, trial: Live) -> None:
        """Let a trial work in the pack with the fewest trials; packs come first where there is room for one more."""
        held = [sum(other.pack is pack for other in self.trials.values()) for pack in self.packs]
        if len(self.packs) < self.room.num_processes and all(held):
            self.packs.append(self._open())
            held.append(0)
        trial.pack = self.packs[held.index(min(held))]
        self.trials[trial.pack.train.remote(trial.number, trial.params)] = trial

    def _open(self) -> Any:
        need = placement.worker(self.search.run.compute)
        # One thread more, for `news`.
        threads = self.search.config.trials_per_pack + 1
        actor = ray.remote(PackProcess).options(
            num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_concurrency=threads
        )
        return actor.remote(self.work)

    def _hear(self) -> None:
        """Take in what the trials reported, and tell those to stop that the scheduler gives up."""
        live = {trial.number: trial for trial in self.trials.values()}
        for pack in self.packs:
            try:
                news = ray.get(pack.news.remote())
            except RayActorError:  # the ends of its trials say so
                continue
            for number, step, seen in news:
                trial = live[number]
                if trial.stopped:
                    continue
                trial.seen = seen
                self.events.reported(number, step, seen)
                decision = self.scheduler.on_trial_result(_NOBODY, trial.stand_in, {STEP: step, **seen})
                if decision == TrialScheduler.STOP:
                    trial.stopped = f"{self.search.config.scheduler.name} at step {step}"
                    self.work.tell_to_stop(number)

    def _end(self, trial: Live, reference: Any) -> None:
        try:
            outcome = ray.get(reference)
        except RayActorError as error:
            outcome = lost(error)
            self.packs = [pack for pack in self.packs if pack is not trial.pack]
        if outcome is None and not trial.stopped:
            self.events.ended(trial.number, None)  # interrupted
            return
        if isinstance(outcome, Ended):
            if outcome.passing and trial.failures < self.search.config.max_failures and not self.ending.is_set():
                trial.failures += 1
                self._start(trial)
                return
            self.unstarted.source.tell(trial.number, {}, failed=True)
            self.events.ended(trial.number, outcome)
            return
        values = trial.seen if outcome is None else outcome
        if outcome is not None:
            self.scheduler.on_trial_complete(_NOBODY, trial.stand_in, outcome)
        metrics = {objective.metric for objective in self.search.objectives}
        known = {key: value for key, value in values.items() if key in metrics}
        self.unstarted.source.tell(trial.number, known, failed=False)
        self.events.ended(trial.number, None if outcome is not None else Ended("stopped", trial.stopped))


_NOBODY: Any = NoController()


def execute(
    search: Search,
    work: Work,
    *,
    source: Source,
    known: Sequence[Trial],
    events: Events,
    room: Capacity,
    ending: threading.Event,
) -> None:
    """Run all trials that are not done, on the Ray that this process is in. Returns when they are, or `ending` is set
    and those at work have ended.

    known: trials of earlier starts. room: how many packs and trials there are at once.
    """
    packs = Packs(
        search=search,
        work=work,
        unstarted=Unstarted(source, known),
        events=events,
        room=room,
        ending=ending,
        scheduler=scheduler(search, known),
    )
    try:
        packs.run()
    finally:
        packs.close()
