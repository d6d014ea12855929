"""One run in MLflow, from its opening to its end. The only file that imports mlflow.

The driver opens the run (`open_run`), sends its handle to rank 0, which logs (trackers.py), and ends it (`finish`).
No global state of mlflow is used. It is imported inside functions: that takes seconds, and a run without tracking does
not need it.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from polyprompt import __version__
from polyprompt.config import RunConfig, TrackingConfig, shapes_result
from polyprompt.errors import PolypromptError, TrackingError
from polyprompt.tasks.records import FileSource, HubSource, Source, TextSource

LOGGER = logging.getLogger(__name__)
# MLflow's own limits (mlflow.utils.validation).
MAX_METRICS_A_BATCH, MAX_PARAMS_A_BATCH = 1000, 100
MAX_KEY_CHARACTERS, MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, MAX_DIGEST_CHARACTERS = 250, 6000, 8000, 36
LOCK_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class RunHandle:
    """A run in a tracking store; pickles. `uri` may hold a password, so it is not printed."""

    uri: str = field(repr=False)
    run_id: str
    experiment_id: str
    start_ms: int


@dataclass(frozen=True)
class DataInput:
    """A split that a run reads. digest: a hash of its rows (the first 36 characters count)."""

    name: str
    context: Literal["train", "validation"]
    digest: str
    num_examples: int
    source: Source | TextSource
    split: str


class Row(NamedTuple):
    """One point of one metric. The time is kept, so that a point sent twice is the same point to MLflow."""

    key: str
    value: float
    step: int
    timestamp_ms: int

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "value": json_number(self.value)}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> "Row":
        return Row(str(table["key"]), float(table["value"]), int(table["step"]), int(table["timestamp_ms"]))


def resolve_uri(config: TrackingConfig) -> str:
    """Return the store's address: $MLFLOW_TRACKING_URI, else the config's, else mlflow.db here. Paths become absolute.

    Ray changes its workers' folder, so a relative path would be another store there.
    Raises TrackingError for a sqlite store in memory.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri or "sqlite:///mlflow.db"
    if uri.startswith("sqlite"):
        path, question, query = uri.partition("?")
        scheme, _, file = path.partition(":///")
        if not file or file == ":memory:":
            raise TrackingError(f"tracking store {uri} lives in one process's memory; use sqlite:///FILE or a server")
        return f"{scheme}:///{Path(file).absolute()}{question}{query}"
    if "://" not in uri and not uri.startswith(("databricks", "file:")):
        return Path(uri).absolute().as_uri()
    return uri


def resolve_experiment(config: TrackingConfig) -> str:
    """Return the experiment's name: $MLFLOW_EXPERIMENT_NAME, else the config's."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.experiment


def open_run(
    config: RunConfig,
    *,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str] | None = None,
    datasets: Sequence[DataInput] = (),
    run_id: str | None = None,
) -> RunHandle:
    """Create the run, or open run_id again, and return its handle. Creates and migrates a new sqlite store.

    params: logged beside `config.flat()`. A run that is opened again must have the same data and the same params, but
    for those that do not shape its result, and those that the tag polyprompt.changing lists (JSON) as changing on the
    way: MLflow's params cannot change, so a changed one becomes a tag changed.<key>.
    Raises TrackingError when the store cannot be used within seconds, or the run is another one.
    """
    uri, experiment = resolve_uri(config.tracking), resolve_experiment(config.tracking)
    texts = {slug(key): _param(value) for key, value in {**config.flat(), **(params or {})}.items()}
    if "tracking.uri" in texts:
        texts["tracking.uri"] = mask(texts["tracking.uri"])
    tags = {
        "method": config.method.name,
        "backbone": config.backbone.name,
        "identity": config.identity(),
        "polyprompt_version": __version__,
        **{slug(key): str(value)[:MAX_TAG_CHARACTERS] for key, value in tags.items() if str(value)},
    }
    if "git_commit" in tags:
        tags["mlflow.source.git.commit"] = tags["git_commit"].removesuffix("-dirty")
    return create_or_reopen(uri, experiment, run_id, name, tags, texts, datasets)


def create_or_reopen(
    uri: str,
    experiment: str,
    run_id: str | None,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    datasets: Sequence[DataInput],
) -> RunHandle:
    """Create a run as it is described, or open run_id again; see `open_run`."""
    with store_errors(uri), patience(retries=1, timeout_seconds=5):
        _make_store(uri)
        client = client_of(uri)
        # Two runs that are the first to name a data set at the same moment break MLflow's unique keys.
        with _alone(_sqlite_file(uri)):
            if run_id is None:
                return _create(client, uri, experiment, name, tags, params, datasets)
            return _reopen(client, uri, run_id, tags, params, datasets)


def log_artifacts(handle: RunHandle, paths: Path | Iterable[Path], artifact_path: str | None = None) -> bool:
    """Upload a folder's content, or files, and return whether all arrived. A store that is gone only warns."""

    def upload() -> None:
        client = client_of(handle.uri)
        for path in [paths] if isinstance(paths, Path) else paths:
            send = client.log_artifacts if path.is_dir() else client.log_artifact
            send(handle.run_id, str(path), artifact_path)

    return tolerant(handle, "artifacts", upload, timeout_seconds=30)


def finish(
    handle: RunHandle,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> bool:
    """End the run with its closing metrics and tags. Return whether the store took it; one that is gone only warns."""
    rows = [Row(slug(key), float(value), step, now_ms()) for key, value in (metrics or {}).items()]

    def end() -> None:
        Points(handle).send(rows)
        client = client_of(handle.uri)
        for key, value in (tags or {}).items():
            client.set_tag(handle.run_id, slug(key), str(value)[:MAX_TAG_CHARACTERS])
        client.set_terminated(handle.run_id, status)

    return tolerant(handle, f"the status {status}", end, timeout_seconds=10)


def resend(path: Path, uri: str, run_id: str) -> int:
    """Send an unsent_metrics.jsonl, delete it, and return how many points it held. Those that the run has are skipped.

    Raises TrackingError when the file is damaged or the store cannot be reached.
    """
    if not path.is_file():
        raise TrackingError(f"{path} does not exist; the warning at the end of the run names the file")
    rows = read_rows(path)
    points = Points(RunHandle(uri, run_id, "", 0))
    with store_errors(uri), patience(retries=1, timeout_seconds=30):
        for start in range(0, len(rows), MAX_METRICS_A_BATCH):
            points.send(rows[start : start + MAX_METRICS_A_BATCH])
    path.unlink()
    return len(rows)


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


def mask(text: str) -> str:
    """Hide user:password@ in the addresses of a text."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


class Points:
    """Sends points that a run lacks."""

    def __init__(self, handle: RunHandle) -> None:
        self._handle = handle
        self._known: dict[str, set[int] | None] | None = None

    def send(self, rows: Sequence[Row]) -> None:
        """Send at most 1,000 points, but for those whose (metric, step) an earlier life of the run has sent."""
        from mlflow.entities import Metric

        client = client_of(self._handle.uri)
        if self._known is None:
            # None: the run has points of that metric, and they were not looked at yet.
            self._known = dict.fromkeys(client.get_run(self._handle.run_id).data.metrics)
        for key in {row.key for row in rows} & self._known.keys():
            if self._known[key] is None:
                self._known[key] = {point.step for point in client.get_metric_history(self._handle.run_id, key)}
        lacking = [row for row in rows if row.step not in (self._known.get(row.key) or ())]
        metrics = [Metric(row.key, row.value, row.timestamp_ms, row.step) for row in lacking]
        if metrics:
            client.log_batch(self._handle.run_id, metrics=metrics)


def system_monitor(handle: RunHandle) -> Any:
    """Return MLflow's collectors of system metrics, of which only collecting is used: no thread, no sending."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    with _quiet("mlflow.system_metrics"):
        return SystemMetricsMonitor(handle.run_id, tracking_uri=handle.uri)


def client_of(uri: str, *, create: bool = False) -> Any:
    """Return a client of a store. Raises TrackingError for a sqlite file that is absent and must not be created."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    file = _sqlite_file(uri)
    if file is not None and not create and not file.exists():
        raise TrackingError(f"{file} is not on this machine; runs over several machines need an mlflow server")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _create(
    client: Any,
    uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    datasets: Sequence[DataInput],
) -> RunHandle:
    from mlflow.tracking.context.registry import resolve_tags

    run = client.create_run(_experiment_id(client, uri, experiment), run_name=name, tags=resolve_tags(dict(tags)))
    with contextlib.ExitStack() as half_made:
        # Whoever tries again creates another run, and this one would be shown as running for ever.
        half_made.callback(client.delete_run, run.info.run_id)
        _log_params(client, run.info.run_id, params)
        _log_datasets(client, run.info.run_id, datasets)
        half_made.pop_all()
    return RunHandle(uri, run.info.run_id, run.info.experiment_id, run.info.start_time)


def _reopen(
    client: Any,
    uri: str,
    run_id: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    datasets: Sequence[DataInput],
) -> RunHandle:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"tracking store {mask(uri)} has no run {run_id}, which this run goes on from; "
            "set MLFLOW_TRACKING_URI to the store it was started with, or give the run another name"
        ) from None
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back")
    old = run.data.params
    changed = {key: value for key, value in params.items() if key in old and old[key] != value}
    free = json.loads(tags.get("polyprompt.changing", "[]"))
    faults = [
        f"{key} was {old[key]}, now {value}" for key, value in changed.items() if shapes_result(key) and key not in free
    ]
    seen = {(i.dataset.name, tag.value): i.dataset.digest for i in run.inputs.dataset_inputs for tag in i.tags}
    for d in datasets:
        digest = seen.get((d.name, d.context), d.digest[:MAX_DIGEST_CHARACTERS])
        if digest != d.digest[:MAX_DIGEST_CHARACTERS]:
            faults.append(f"the {d.context} data of {d.name} had digest {digest}, now {d.digest}")
    if faults:
        raise TrackingError(
            f"run {run_id} ({run.info.run_name}) cannot go on as another run: {'; '.join(faults[:5])}. "
            "Set the old values again, or give the run another name"
        )
    _log_params(client, run_id, {key: value for key, value in params.items() if key not in old})
    _log_datasets(client, run_id, [d for d in datasets if (d.name, d.context) not in seen])
    for key, value in {**tags, **{f"changed.{key}": value for key, value in changed.items()}}.items():
        client.set_tag(run_id, key, value)
    client.update_run(run_id, status="RUNNING")
    return RunHandle(uri, run_id, run.info.experiment_id, run.info.start_time)


def _experiment_id(client: Any, uri: str, name: str) -> str:
    """Find or create an experiment. The artifacts of a sqlite store lie beside it; a server has its own place."""
    from mlflow.exceptions import MlflowException

    file = _sqlite_file(uri)
    try:
        if (found := client.get_experiment_by_name(name)) is None:
            return client.create_experiment(name, artifact_location=str(file.parent / "mlartifacts") if file else None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
            raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} was deleted; set another tracking.experiment, or bring it back: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), MAX_PARAMS_A_BATCH):
        client.log_batch(run_id, params=entries[start : start + MAX_PARAMS_A_BATCH])


def _log_datasets(client: Any, run_id: str, datasets: Sequence[DataInput]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for d in datasets:
        kind, source = _mlflow_source(d.source, d.split)
        profile = json.dumps({"num_rows": d.num_examples})
        dataset = Dataset(d.name, d.digest[:MAX_DIGEST_CHARACTERS], kind, json.dumps(source), profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", d.context)]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _mlflow_source(source: Source | TextSource, split: str) -> tuple[str, dict[str, Any]]:
    """Return a source in the fields that mlflow.data.get_source reads."""
    match source:
        case HubSource():
            where = {"path": source.path, "config_name": source.config, "revision": source.revision}
            return "hugging_face", {**where, "split": source.splits[split], "data_dir": None, "data_files": None}
        case FileSource():
            return "local", {"uri": str(source.files[split])}
        case TextSource():
            paths = source.files.get(split) or source.files["train"]  # held out of the training files
            return "local", {"uri": " ".join(map(str, paths))}
    generator = getattr(source.rows, "func", source.rows)  # a partial names its function
    return "code", {
        "tags": {"generator": f"{generator.__module__}.{generator.__qualname__}", "version": source.version}
    }


def _param(value: str) -> str:
    """Fit a value into a param: a long one is cut, and its hash still tells it from any other."""
    if len(value) <= MAX_PARAM_CHARACTERS:
        return value
    ending = f"… sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value[: MAX_PARAM_CHARACTERS - len(ending)] + ending


def _make_store(uri: str) -> None:
    """Create the tables of a new sqlite store, aside and in one process: half-made or made by two, it stays broken."""
    file = _sqlite_file(uri)
    if file is None or _is_made(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file), _quiet("mlflow.store.db.utils", "alembic"):
        if not _is_made(file):
            aside = file.with_name(f".{file.name}.new")
            aside.unlink(missing_ok=True)
            client_of(f"sqlite:///{aside}", create=True)
            os.replace(aside, file)


@contextlib.contextmanager
def _alone(file: Path | None) -> Iterator[None]:
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
        own = "Move the file away to start a new one" if _sqlite_file(uri) else "Start the server"
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
def _quiet(*names: str) -> Iterator[None]:
    """Silence loggers below WARNING (a first migration prints a line for each of its eighty steps)."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def tolerant(handle: RunHandle, what: str, act: Callable[[], None], *, timeout_seconds: int) -> bool:
    try:
        with patience(retries=1, timeout_seconds=timeout_seconds):
            act()
    except Exception as error:
        LOGGER.warning("MLflow at %s did not take %s. %s", mask(handle.uri), what, reason(error))
        return False
    return True


def reason(error: Exception) -> str:
    """Return the first line of an error, without passwords."""
    return textwrap.shorten(mask(f"{type(error).__name__}: {error}".splitlines()[0]), 240, placeholder=" …")


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.partition(":///")[2].partition("?")[0]) if urlsplit(uri).scheme.startswith("sqlite") else None


def read_rows(path: Path) -> list[Row]:
    try:
        return [Row.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(f"{path} is damaged ({reason(error)}); delete it to go on without its points") from None


def json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Send an unsent_metrics.jsonl to $MLFLOW_TRACKING_URI (or ./mlflow.db)."""
    parser = argparse.ArgumentParser(prog="python -m polyprompt.tracking", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("run_id")
    given = parser.parse_args(arguments)
    uri = resolve_uri(TrackingConfig())
    print(f"sent {resend(given.file, uri, given.run_id)} points to {mask(uri)}")


if __name__ == "__main__":
    main()
