"""What the endpoint takes at most, and how it says no: what, which limit, how to mend it, and when to come back."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Levels of lists and objects in a field of a row.
MAX_DEPTH = 8
#: Whole numbers beyond it are not the same number to every reader of JSON.
MAX_WHOLE = 2**53


@dataclass(frozen=True)
class Limits:
    """rows: of a request. characters, choices: of a row. body_bytes: of a request. held_bytes: of all requests that are
    read or answered. requests_per_second: of all callers together (0: any). waiting_rows: taken and not yet answered;
    more than that would only wait longer. timeout_seconds: until a request is given up.
    """

    rows: int = 64
    characters: int = 20_000
    choices: int = 100
    body_bytes: int = 4 * 2**20
    held_bytes: int = 256 * 2**20
    requests_per_second: float = 0
    waiting_rows: int = 256
    timeout_seconds: float = 30


class Refusal(Exception):
    """A request that is not answered. status: of HTTP. code: for programs. message: what is wrong, with the limit and
    the mend. limit: the number that was exceeded. retry_seconds: when to come back."""

    def __init__(
        self, status: int, code: str, message: str, *, limit: float | None = None, retry_seconds: float | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.limit, self.retry_seconds = limit, retry_seconds

    @property
    def headers(self) -> dict[str, str]:
        """Return those that HTTP wants beside the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_seconds is None else {"Retry-After": str(max(1, math.ceil(self.retry_seconds)))}


class Rate:
    """So many requests a second, of which those of the last second may come at once."""

    def __init__(self, requests_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = requests_per_second, clock
        self._room, self._then = max(1.0, requests_per_second), clock()

    def take(self) -> None:
        """Count a request. Raises Refusal (429) for one too many."""
        if not self._rate:
            return
        now = self._clock()
        self._room = min(max(1.0, self._rate), self._room + (now - self._then) * self._rate)
        self._then = now
        if self._room < 1:
            raise Refusal(
                429,
                "too_many_requests",
                f"more than {self._rate:g} requests a second; put more rows into one request, or send fewer",
                limit=self._rate,
                retry_seconds=(1 - self._room) / self._rate,
            )
        self._room -= 1


class Waiting:
    """The rows that are taken and not yet answered, and how fast they are."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows, self._limit, self._clock = 0, limit, clock
        #: Rows that were answered in the present stretch of work, which began when the first of them came in.
        self._answered, self._began = 0, clock()

    def check(self, more: int) -> None:
        """Raises Refusal (503) where so many more rows have no room."""
        if self.rows + more > self._limit:
            raise Refusal(
                503,
                "overloaded",
                f"{self.rows} rows are waiting for an answer and at most {self._limit} may; try again later",
                limit=self._limit,
                retry_seconds=self.seconds(),
            )

    @contextmanager
    def hold(self, rows: int) -> Iterator[None]:
        """Count rows while inside. Raises Refusal (503) where they have no room."""
        self.check(rows)
        if not self.rows:
            self._answered, self._began = 0, self._clock()
        self.rows += rows
        try:
            yield
            self._answered += rows  # not those that are given up: they say nothing of the speed
        finally:
            self.rows -= rows

    def seconds(self) -> float:
        """Return about how long the waiting rows will take."""
        passed = self._clock() - self._began
        return self.rows * passed / self._answered if self._answered else 1.0


def check_rows(rows: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    """Raises Refusal for too many rows, and for a row that is too long, too deep or holds what is no text or number."""
    if len(rows) > limits.rows:
        raise Refusal(
            413,
            "too_many_rows",
            f"{len(rows)} rows in one request; at most {limits.rows} are taken. Send the rest in others",
            limit=limits.rows,
        )
    for place, row in enumerate(rows):
        characters = _characters(row, f"rows[{place}]", 0)
        if characters > limits.characters:
            raise Refusal(
                413,
                "row_too_long",
                f"rows[{place}] has {characters:,} characters; at most {limits.characters:,} are taken. Shorten its "
                "text: the model reads no more than its first few hundred words",
                limit=limits.characters,
            )
        choices = row.get("choices")
        if isinstance(choices, list) and len(choices) > limits.choices:
            raise Refusal(
                413,
                "too_many_choices",
                f"rows[{place}] has {len(choices)} choices; at most {limits.choices} are taken",
                limit=limits.choices,
            )


def _characters(value: Any, where: str, depth: int) -> int:
    """Count the characters of all texts within."""
    if depth > MAX_DEPTH:
        raise Refusal(
            422, "row_too_deep", f"{where} is nested more than {MAX_DEPTH} levels deep; flatten it", limit=MAX_DEPTH
        )
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                half = f"{where} holds half of a surrogate pair, which is no character"
                raise Refusal(422, "not_text", half) from None
            return len(value)
        case Mapping():
            return sum(
                _characters(key, where, depth + 1) + _characters(own, where, depth + 1) for key, own in value.items()
            )
        case list() | tuple():
            return sum(1 + _characters(own, where, depth + 1) for own in value)
        case bool() | None:
            return 1
        case float() if not math.isfinite(value):
            raise Refusal(422, "not_a_number", f"{where} holds {value}; expected a finite number")
        case int() if abs(value) > MAX_WHOLE:
            raise Refusal(422, "not_a_number", f"{where} holds a whole number beyond 2**53; send it as text")
    return len(str(value))
