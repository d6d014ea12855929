"""Load an endpoint and say what it took: one task against mixed traffic, four times too much, a replica killed.

    python jobs/load_test.py [--url http://127.0.0.1:8000] [--model NAME] [--rows FILE] [--seconds 10] [--out FILE]
    python jobs/load_test.py --kill PID                     # SIGKILL to a replica a third through a steady load

Rows come from FILE (as for jobs/predict.py, its rows of the model's tasks), or from the embedded suite. First each task
alone and all mixed, in turns, with --connections callers that ask again as soon as they are answered; then, whatever
comes back, four times as many requests a second as were answered; then the mixed load again. A request is lost when it
gets no answer.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status
from polyprompt.errors import ConfigError

Row = Mapping[str, Any]
MIXED = "mixed"
ROUNDS, OVERLOAD = 3, 4
#: Requests that the caller itself keeps open at most while it overloads the endpoint.
MAX_OPEN = 2000


@dataclass
class Load:
    """What came back. seconds: of each answered request. lost: requests without any answer, by their error. unsent:
    those that the caller had no room for."""

    statuses: Counter[int] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    seconds: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    passed: float = 0.0

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return len(self.seconds) / self.passed

    def milliseconds(self, percent: float) -> int:
        """A percentile of the answered requests; 0 where there are none."""
        return round(1000 * float(np.percentile(self.seconds, percent))) if self.seconds else 0

    def table(self) -> dict[str, Any]:
        return {
            "answered": len(self.seconds),
            "answered_per_second": round(self.rate, 1),
            "p50_ms": self.milliseconds(50),
            "p99_ms": self.milliseconds(99),
            "max_ms": self.milliseconds(100),
            "statuses": dict(sorted(self.statuses.items())),
            "lost": dict(self.lost),
            "unsent": self.unsent,
            "refused_without_retry_after": self.without_retry_after,
        }


class Caller:
    """Sends requests of one row each."""

    def __init__(self, session: Any, model: str | None) -> None:
        self._session, self._model = session, model

    async def ask(self, row: Row, load: Load) -> None:
        import aiohttp

        began = time.monotonic()
        try:
            async with self._session.post("/predict", json={"model": self._model, "rows": [row]}) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            load.lost[type(error).__name__] += 1
            return
        load.statuses[answer.status] += 1
        if answer.status == 200:
            load.seconds.append(time.monotonic() - began)
        elif answer.status in (429, 503) and "Retry-After" not in answer.headers:
            load.without_retry_after += 1

    async def steadily(self, rows: Sequence[Row], seconds: float, connections: int, load: Load) -> None:
        """Keep so many requests open for so long."""
        endless, began = itertools.cycle(rows), time.monotonic()

        async def one(rows: Iterator[Row]) -> None:
            while time.monotonic() - began < seconds:
                await self.ask(next(rows), load)

        await asyncio.gather(*(one(endless) for _ in range(connections)))
        load.passed += time.monotonic() - began

    async def at_rate(self, rows: Sequence[Row], seconds: float, per_second: float, load: Load) -> None:
        """Send so many requests a second, whatever comes back."""
        endless, began = itertools.cycle(rows), time.monotonic()
        asking: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            due = began + number / per_second
            if due - began > seconds:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(asking) >= MAX_OPEN:
                load.unsent += 1
                continue
            task = asyncio.create_task(self.ask(next(endless), load))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)
        load.passed += time.monotonic() - began


def main() -> int:
    """Read the command line, load, show; return 1 where a request was lost or the endpoint failed at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="which of the endpoint's models (the only one)")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=10, help="of each stage")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--kill", type=int, metavar="PID", help="of a replica on this machine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what was measured, as JSON")
    options = parser.parse_args()
    return exit_status(lambda: asyncio.run(load_test(options)), stopped="stopped")


async def load_test(options: argparse.Namespace) -> int:
    """Run the stages. Raises ConfigError where the endpoint is not there, or there are no rows for it."""
    import aiohttp

    session = aiohttp.ClientSession(
        options.url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
    )
    async with session:
        try:
            offered = (await (await session.get("/models")).json())["models"]
        except aiohttp.ClientError as error:
            raise ConfigError(f"--url {options.url}: {error}; start jobs/serve.py first") from error
        test = Test(Caller(session, options.model), _rows(options, offered), options.seconds, options.connections)
        await (test.kill(options.kill) if options.kill else test.run())
    if options.out:
        options.out.write_text(json.dumps({name: load.table() for name, load in test.found.items()}, indent=1))
    lost = sum(load.lost.total() for load in test.found.values())
    broken = sum(n for load in test.found.values() for status, n in load.statuses.items() if status in (500, 502, 504))
    return 1 if lost or broken else 0


@dataclass
class Test:
    """Stages of load."""

    caller: Caller
    rows: Mapping[str, Sequence[Row]]
    seconds: float
    connections: int
    found: dict[str, Load] = field(default_factory=dict)

    async def run(self) -> None:
        """Each task alone and all mixed, in turns; too much of it; and the same as before."""
        mixed = self._mixed()
        await self.caller.steadily(mixed, self.seconds / 4, self.connections, Load())  # warm
        stages = {**self.rows, MIXED: mixed}
        # A machine that others use too is not the same from minute to minute.
        for _ in range(ROUNDS):
            for name, rows in stages.items():
                await self._steadily(name, rows, self.seconds / ROUNDS)
        for name in stages:
            self._show(name)
        # The same number of rows of each task, one task after the other, would take the mean of their times.
        idle = [name for name in stages if not self.found[name].rate]
        if idle:
            raise ConfigError(f"no request of {', '.join(idle)} was answered; the lines above say what came back")
        alone = statistics.harmonic_mean([self.found[task].rate for task in self.rows])
        capacity = self.found[MIXED].rate
        print(f"mixed / single-task throughput: {capacity / alone:.3f}")
        load = self.found["overload"] = Load()
        await self.caller.at_rate(mixed, self.seconds, OVERLOAD * capacity, load)
        self._show("overload")
        await self._steadily("after", mixed, self.seconds)
        self._show("after")
        print(f"throughput after / before the overload: {self.found['after'].rate / capacity:.3f}")

    async def kill(self, pid: int) -> None:
        """A steady mixed load, through which a process is killed."""
        loading = asyncio.create_task(self._steadily("a replica killed", self._mixed(), self.seconds))
        await asyncio.sleep(self.seconds / 3)
        os.kill(pid, signal.SIGKILL)
        await loading
        self._show("a replica killed")

    def _mixed(self) -> list[Row]:
        """A thousand rows of each task, taking turns."""
        endless = [itertools.cycle(rows) for rows in self.rows.values()]
        return [next(rows) for _ in range(1000) for rows in endless]

    async def _steadily(self, name: str, rows: Sequence[Row], seconds: float) -> None:
        load = self.found.setdefault(name, Load())
        await self.caller.steadily(rows, seconds, self.connections, load)

    def _show(self, name: str) -> None:
        shown = ", ".join(f"{key} {value}" for key, value in self.found[name].table().items() if value)
        print(f"{name}: {shown}", flush=True)


def _rows(options: argparse.Namespace, offered: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Return task → rows to ask. Raises ConfigError where there are none."""
    from polyprompt import sources
    from polyprompt.errors import DataError
    from polyprompt.reading import read_rows
    from polyprompt.tasks import catalog

    models = [model for model in offered if options.model in (None, model["name"])]
    tasks = {task["name"] for model in models for task in model["tasks"]}
    found: dict[str, list[Row]] = {}
    if options.rows:
        for _, row in sources.each_row(options.rows):
            if not isinstance(row, DataError) and row.get("task") in tasks:
                found.setdefault(row["task"], []).append(row)
    else:
        for task in sorted(task for task in tasks if task.startswith("embedded/")):
            rows = itertools.islice(read_rows(catalog.of_split(task, None, "validation"), "validation"), 200)
            found[task] = [{**row, "task": task} for _, row, _ in rows]
    if not found:
        raise ConfigError(f"no rows for the endpoint's tasks {', '.join(sorted(tasks))}; name a file of them: --rows")
    return found


if __name__ == "__main__":
    sys.exit(main())
