"""Lets the cases of a group take turns: A B C, A B C, each in a process of its own that waits while others compute."""

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks import child
from benchmarks.cases import Case, Group
from benchmarks.results import Measured
from benchmarks.setting import Setting
from polyprompt.errors import PolypromptError

END_SECONDS = 30


class CaseError(PolypromptError):
    """A case could not be measured."""


class Process:
    """A case's process. A context manager that ends it."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case = case
        # Imports are done once, in a server that has computed nothing: torch's threads do not survive a fork.
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=child.work, args=(theirs, case, setting))
        # One with workers starts processes itself, which a daemon may not.
        self.process.daemon = case.workers == 1
        self.process.start()
        theirs.close()
        self.seconds: list[list[float]] = []
        self.rates: list[float] = []
        self.facts: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Wait until it is ready for its turns."""
        self.facts = self._receive()
        self.facts.pop("rates")

    def turn(self, steps: int) -> None:
        self.connection.send(steps)
        answer = self._receive()
        self.seconds.append(answer["seconds"])
        self.rates += answer["rates"]

    def measured(self) -> Measured:
        """End it, and return what was found."""
        self.connection.send(None)
        losses = self._receive()["losses"]
        return Measured(case=self.case, facts=self.facts, seconds=self.seconds, rates=self.rates, losses=losses)

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join(END_SECONDS)
            raise CaseError(
                f"{self.case.name!r}: its process ended with status {self.process.exitcode} (-9: the system ran out of "
                "memory). Leave the case out with --cases, or lower its rows"
            ) from None
        if "error" in answer:
            raise CaseError(f"{self.case.name!r}: {answer['error']}")
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(END_SECONDS if self.process.exitcode is None and self.seconds else 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def measure(group: Group, setting: Setting, passed: Callable[[str], None]) -> Sequence[Measured]:
    """Measure a group. passed: called with what was done, once for each warm-up and each turn of a case.

    Raises CaseError naming the case that failed.
    """
    with ExitStack() as stack:
        processes: list[Process] = []
        # One after another, so that no one's memory or first steps are disturbed.
        for case in group.cases:
            processes.append(stack.enter_context(Process(case, setting)))
            processes[-1].warm_up()
            passed(f"{group.name}: {case.name} is warm")
        for number in range(group.turns):
            for process in processes:
                process.turn(process.case.batches if process.case.kind == "train" else 1)
                passed(f"{group.name}: {process.case.name}, turn {number + 1} of {group.turns}")
        return [process.measured() for process in processes]


def num_parts(group: Group) -> int:
    """Return how often `measure` calls `passed`."""
    return len(group.cases) * (1 + group.turns)
