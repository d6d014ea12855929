"""A tracking store of MLflow: how it is reached and made, what it takes as a name, and what its failures are called.

mlflow is imported inside functions: that takes seconds, and a run without tracking does not need it.
"""

import contextlib
import hashlib
import logging
import os
import posixpath
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from polyprompt.errors import PolypromptError, TrackingError
from polyprompt.section import mask

# MLflow's own limits (mlflow.utils.validation).
MAX_METRICS_A_BATCH, MAX_PARAMS_A_BATCH = 1000, 100
MAX_KEY_CHARACTERS, MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, MAX_DIGEST_CHARACTERS = 250, 6000, 8000, 36
LOCK_TIMEOUT_SECONDS = 120.0


def slug(name: str) -> str:
    """Return the metric or param name that MLflow accepts on every system, for a name that it may refuse.

    A changed name ends with a hash of the old one, so that two names never become one.
    """
    clean = re.sub(r"[^A-Za-z0-9_.\-/ ]", "_", name)
    path_like = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
    if clean == name and path_like and len(name) <= MAX_KEY_CHARACTERS:
        return name
    parts = [part for part in clean.split("/") if part.strip(".")]
    return "/".join(parts)[: MAX_KEY_CHARACTERS - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


def param_text(value: str) -> str:
    """Fit a value into a param: a long one is cut, and its hash still tells it from any other."""
    if len(value) <= MAX_PARAM_CHARACTERS:
        return value
    ending = f"… sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value[: MAX_PARAM_CHARACTERS - len(ending)] + ending


def client_of(uri: str, *, create: bool = False) -> Any:
    """Return a client of a store. Raises TrackingError for a sqlite file that is absent and must not be created."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    file = sqlite_file(uri)
    if file is not None and not create and not file.exists():
        raise TrackingError(f"{file} is not on this machine; runs over several machines need an mlflow server")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def make_store(uri: str) -> None:
    """Create the tables of a new sqlite store, aside and in one process: half-made or made by two, it stays broken."""
    file = sqlite_file(uri)
    if file is None or _is_made(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with alone(file), quiet("mlflow.store.db.utils", "alembic"):
        if not _is_made(file):
            aside = file.with_name(f".{file.name}.new")
            aside.unlink(missing_ok=True)
            client_of(f"sqlite:///{aside}", create=True)
            os.replace(aside, file)


@contextlib.contextmanager
def alone(file: Path | None) -> Iterator[None]:
    """Keep other processes from making anything in a sqlite store meanwhile. None: a server, which sees to that."""
    if file is None:
        yield
        return
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except Timeout:
        raise TrackingError(f"{file}.lock stays locked by another process; end that one") from None
    try:
        yield
    finally:
        lock.release()


def _is_made(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn any failure of a store into a TrackingError that says how to mend it, and shows no password."""
    try:
        yield
    except PolypromptError:
        raise
    except Exception as error:
        own = "Move the file away to start a new one" if sqlite_file(uri) else "Start the server"
        mend = f"{own}, set MLFLOW_TRACKING_URI to a store that works, or train without one: tracking.enabled=false"
        raise TrackingError(f"tracking store {mask(uri)} cannot be used: {reason(error)}. {mend}") from None


@contextlib.contextmanager
def patience(*, retries: int, timeout_seconds: int) -> Iterator[None]:
    """Bound how long MLflow's client tries a server, where the user has not; its own bounds add up to minutes."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds)}
    mine = [key for key in wanted if key not in os.environ]
    os.environ.update({key: wanted[key] for key in mine})
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence loggers below WARNING (a first migration prints a line for each of its eighty steps)."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def reason(error: Exception) -> str:
    """Return the first line of an error, without passwords."""
    return textwrap.shorten(mask(f"{type(error).__name__}: {error}".splitlines()[0]), 240, placeholder=" …")


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, None for a server."""
    return Path(uri.partition(":///")[2].partition("?")[0]) if urlsplit(uri).scheme.startswith("sqlite") else None


def now_ms() -> int:
    """Return the time as MLflow counts it."""
    return time.time_ns() // 1_000_000
