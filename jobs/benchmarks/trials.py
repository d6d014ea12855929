"""Several trials on one backbone: beside each other in a pack, or one after another."""

import threading
import time
from dataclasses import replace

from benchmarks.cases import Case
from benchmarks.loops import Losses, fitted, metered, nothing
from benchmarks.meter import Done, Meter
from benchmarks.setting import Setting
from benchmarks.subjects import Subject, build
from polyprompt.pack import Pack, Seat


class Trials:
    """A step is one of each trial. In a pack the first trial's steps are clocked: the others' are the same. One after
    another, each is in a thread that has the baton for a step, and the last one's are clocked."""

    def __init__(self, case: Case, setting: Setting, meter: Meter) -> None:
        self.meter = meter
        self.packed = case.loop == "pack"
        self.clocked = 0 if self.packed else case.trials - 1
        self.pack = Pack()
        self.subjects = [_trial(case, setting, self.pack, number) for number in range(case.trials)]
        self.batons = [threading.Semaphore(0) for _ in self.subjects]
        self.errors: list[BaseException] = []

    def run(self) -> None:
        """Train until the meter is over. Raises Done, or what a trial raised."""
        self.meter.begin()
        self.batons[0].release()
        threads = [threading.Thread(target=self._train, args=(number,)) for number in range(len(self.subjects))]
        with self.pack:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        raise self.errors[0] if self.errors else Done

    def _train(self, number: int) -> None:
        try:
            if self.packed:
                with self.pack.seat() as seat:
                    # A seat is there before its turn is. Who began earlier would be steps ahead of the others.
                    while len(self.pack.seats) < len(self.subjects):
                        time.sleep(0.01)
                    self._fit(number, seat)
            else:
                self.batons[number].acquire()
                self._fit(number, None)
        except Done:
            pass
        except BaseException as error:
            self.errors.append(error)
            self.meter.over = True
        finally:
            for baton in self.batons:
                baton.release()

    def _fit(self, number: int, seat: Seat | None) -> None:
        losses = self.meter.losses.setdefault(number, [])
        before = self.meter.before_optimizer if number == self.clocked else nothing
        optim = metered(self.subjects[number], before, lambda: self._behind(number))
        fitted(self.subjects[number], optim, Losses(losses), seat)

    def _behind(self, number: int) -> None:
        """Behind each step of a trial."""
        if number == self.clocked:
            self.meter.arrived()
        if not self.packed and not self.meter.over:
            self.batons[(number + 1) % len(self.batons)].release()
            self.batons[number].acquire()
        if self.meter.over:
            raise Done


def _trial(case: Case, setting: Setting, pack: Pack, number: int) -> Subject:
    subject = build(case, setting, pack.load)
    train = subject.config.train.model_copy(update={"learning_rate": 1e-3 * 2**number})
    return replace(subject, config=subject.config.model_copy(update={"train": train}))
