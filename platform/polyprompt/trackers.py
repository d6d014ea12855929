"""Where rank 0's metrics go: to MLflow and to metrics.jsonl in the run folder.

Training never waits for a tracking server and never ends because of one.
"""

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from polyprompt.result import write_whole
from polyprompt.section import mask
from polyprompt.tracking import Points, Row, json_number, read_rows, system_monitor
from polyprompt.tracking_opening import RunHandle
from polyprompt.tracking_store import MAX_METRICS_A_BATCH, now_ms, patience, reason, slug

LOGGER = logging.getLogger(__name__)
UNSENT_FILE = "unsent_metrics.jsonl"
FLUSH_SECONDS, CLOSE_SECONDS = 5.0, 60.0
FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS = 2.0, 60.0


class Tracker(Protocol):
    """Takes the metrics of rank 0. Flush before reading `pending`: a bundle keeps only what could not be sent."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def pending(self) -> list[dict[str, Any]]:
        """Return the points that were logged but not sent, ready for JSON."""

    def close(self) -> None: ...


class Trackers:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def pending(self) -> list[dict[str, Any]]:
        return [row for tracker in self.trackers for row in tracker.pending()]

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class JsonlTracker:
    """Appends a line {"step", "timestamp_ms", metric: value, …} a log call to a file, at each flush.

    resumed_step: the step of the bundle that a run goes on from (0: a fresh run). Later lines are dropped, since the
    run will log them again. A number that is not finite becomes "nan", "inf" or "-inf", so every line is JSON.
    """

    def __init__(self, path: Path, *, resumed_step: int = 0) -> None:
        self.path = path
        self._lines: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old = path.read_text(encoding="utf-8")
            kept = "".join(f"{line}\n" for line in old.splitlines() if _step_of(line) <= resumed_step)
            if kept != old:
                write_whole(path, kept.encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {key: json_number(float(value)) for key, value in values.items()}
        self._lines.append(json.dumps({"step": step, "timestamp_ms": now_ms(), **numbers}) + "\n")

    def flush(self) -> None:
        """Raises OSError, and keeps the lines for the next flush, if they cannot be written: all of them or none."""
        with self.path.open("ab", buffering=0) as file:
            before, data = file.tell(), "".join(self._lines).encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(before)
                raise
        self._lines.clear()

    def pending(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        # It ends a run that may be failing already: that cause is the one to be seen.
        try:
            self.flush()
        except OSError as error:
            LOGGER.warning("the last %d lines of %s could not be written: %s", len(self._lines), self.path, error)


class MlflowTracker:
    """Buffers points and sends them to one MLflow run, in batches, without ever raising for a store that is gone.

    pending: the points that the bundle a run goes on from had not sent; with those of an unsent file in run_folder they
    are sent first. A (metric, step) that the store holds is never sent again, so a replay leaves neither gaps nor
    duplicates. While the store is gone, points are kept and it is tried again after 2, 4, … 60 seconds; what is left at
    `close` goes to run_folder/unsent_metrics.jsonl. A flush blocks for about five seconds at most.
    Another rank that logs (its own system metrics) needs a tracker and a run_folder of its own.
    """

    def __init__(self, handle: RunHandle, *, pending: Sequence[Mapping[str, Any]] = (), run_folder: Path) -> None:
        self.handle = handle
        self._unsent = run_folder / UNSENT_FILE
        rows = [Row.from_json(row) for row in pending]
        rows += read_rows(self._unsent) if self._unsent.exists() else []
        self._rows = list({(row.key, row.step): row for row in reversed(rows)}.values())[::-1]
        self._inherited = {(row.key, row.step) for row in self._rows}
        self._points = Points(handle)
        self._lock = threading.Lock()  # system metrics are logged from their own thread
        self._gone = False
        self._retry_at = 0.0
        self._backoff_seconds = FIRST_BACKOFF_SECONDS

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = now_ms()
        rows = [Row(slug(key), float(value), step, now) for key, value in values.items()]
        with self._lock:
            self._rows += [row for row in rows if (row.key, row.step) not in self._inherited]

    def flush(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._send(FLUSH_SECONDS)

    def pending(self) -> list[dict[str, Any]]:
        with self._lock:
            return [row.to_json() for row in self._rows]

    def close(self) -> None:
        """Send what is left, or write it to the run folder with a warning that says how to send it."""
        self._send(CLOSE_SECONDS)
        rows = self.pending()
        if not rows:
            self._unsent.unlink(missing_ok=True)
            return
        uri = mask(self.handle.uri)
        try:
            write_whole(self._unsent, "".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:  # it ends a run that may be failing already: that cause is the one to be seen
            LOGGER.warning("%d metric points could neither be sent to %s nor kept: %s", len(rows), uri, error)
            return
        LOGGER.warning(
            "%d metric points could not be sent to %s and are kept in %s. Send them when it is back: "
            "PYTHONPATH=platform MLFLOW_TRACKING_URI='%s' python -m polyprompt.tracking '%s' %s",
            *(len(rows), uri, self._unsent, uri, self._unsent, self.handle.run_id),
        )

    def _send(self, budget_seconds: float) -> None:
        """Send batches until none is left, the time is up or the store fails."""
        deadline = time.monotonic() + budget_seconds
        while time.monotonic() < deadline:
            with self._lock:
                batch = self._rows[:MAX_METRICS_A_BATCH]
            if not batch:
                return
            try:
                with patience(retries=0, timeout_seconds=5):
                    self._points.send(batch)
            except Exception as error:
                self._retry_at = time.monotonic() + self._backoff_seconds
                self._backoff_seconds = min(2 * self._backoff_seconds, LAST_BACKOFF_SECONDS)
                if not self._gone:
                    LOGGER.warning(
                        "MLflow at %s does not answer; training goes on and its metrics are kept until it does. %s",
                        *(mask(self.handle.uri), reason(error)),
                    )
                self._gone = True
                return
            with self._lock:
                del self._rows[: len(batch)]
            if self._gone:
                LOGGER.warning("MLflow at %s answers again", mask(self.handle.uri))
            self._gone, self._backoff_seconds, self._retry_at = False, FIRST_BACKOFF_SECONDS, 0.0


class SystemMetrics:
    """Samples this machine's CPU, memory, disk, network and GPUs in a thread while its `with` block runs.

    Metrics: system/<node>/…. Step: whole seconds since the run began, so that it grows across restarts.
    Differs from MLflow's SystemMetricsMonitor, whose collectors it uses: that one stops for good when the server goes
    away once. GPUs need `nvidia-ml-py`.
    """

    def __init__(self, tracker: MlflowTracker, *, node: str, interval_seconds: float) -> None:
        self._tracker = tracker
        self._node = node
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._monitor = system_monitor(self._tracker.handle)
        self._monitor.collect_metrics()  # psutil's CPU rate counts from the call before
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            for part in self._monitor.monitors:
                part.clear_metrics()
            try:
                self._monitor.collect_metrics()
            except Exception as error:
                LOGGER.warning("system metrics end here: this machine's sensors failed. %s", reason(error))
                return
            values = {f"system/{self._node}/{key}": v for key, v in self._monitor.aggregate_metrics().items()}
            self._tracker.log((now_ms() - self._tracker.handle.start_ms) // 1000, values)


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for one torn by a crash, which is then dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
