"""Holding subjects to the checks: what came of each, as values that cross processes as JSON."""

from collections.abc import Container, Iterable, Iterator
from typing import Literal, NamedTuple

from conformance.checks import CHECKS
from conformance.driver import Failed, NotApplicable, Subject

Status = Literal["pass", "fail", "n/a"]


class Result(NamedTuple):
    """reason: of a failure or n/a; "" otherwise."""

    library: str
    method: str
    family: str
    check: str
    status: Status
    reason: str


#: Library, method, family, check.
Key = tuple[str, str, str, str]


def hold(subjects: Iterable[Subject], checks: Iterable[str], done: Container[Key] = ()) -> Iterator[Result]:
    """Yield what comes of each check on each subject, but for those done.

    Whatever the library raises is a failure with that reason.
    """
    checks = list(checks)
    for subject in subjects:
        for check in checks:
            if (subject.library, subject.method, subject.family, check) in done:
                continue
            status: Status = "pass"
            reason = ""
            try:
                CHECKS[check](subject)
            except NotApplicable as error:
                status, reason = "n/a", str(error)
            except Failed as error:
                status, reason = "fail", str(error)
            except Exception as error:
                status, reason = "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            yield Result(subject.library, subject.method, subject.family, check, status, reason)
