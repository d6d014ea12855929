"""One run in MLflow, from its opening to its end.

The driver opens the run (`open_run`; tracking_opening.py), sends its handle to rank 0, which logs (trackers.py), and
ends it (`finish`).
No global state of mlflow is used.
"""

import argparse
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from polyprompt import __version__
from polyprompt.config import RunConfig, TrackingConfig
from polyprompt.errors import TrackingError
from polyprompt.section import MASKED, home, mask
from polyprompt.tracking_opening import DataInput, RunHandle, create_or_reopen
from polyprompt.tracking_store import (
    MAX_METRICS_A_BATCH,
    MAX_TAG_CHARACTERS,
    client_of,
    now_ms,
    param_text,
    patience,
    quiet,
    reason,
    slug,
    store_errors,
)

LOGGER = logging.getLogger(__name__)
#: Tag of a run: JSON, task → digest of its rows (12 digits). Scores on equal rows compare.
ROWS = "polyprompt.rows"


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
    """Return the store's address: $MLFLOW_TRACKING_URI, else the config's, else mlflow.db in `home`. Paths become
    absolute.

    Ray changes its workers' folder, so a relative path would be another store there.
    Raises TrackingError for a sqlite store in memory, and for an address whose password was masked.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri or f"sqlite:///{home() / 'mlflow.db'}"
    if mask(uri) == uri and MASKED in uri:
        raise TrackingError(
            f"tracking.uri={uri} has lost its password: no file that a run writes holds one. Set MLFLOW_TRACKING_URI "
            "to the whole address, or give the password in MLFLOW_TRACKING_PASSWORD and leave it out of the address"
        )
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
    texts = {slug(key): param_text(value) for key, value in {**config.flat(), **(params or {})}.items()}
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

    with quiet("mlflow.system_metrics"):
        return SystemMetricsMonitor(handle.run_id, tracking_uri=handle.uri)


def tolerant(handle: RunHandle, what: str, act: Callable[[], None], *, timeout_seconds: int) -> bool:
    try:
        with patience(retries=1, timeout_seconds=timeout_seconds):
            act()
    except Exception as error:
        LOGGER.warning("MLflow at %s did not take %s. %s", mask(handle.uri), what, reason(error))
        return False
    return True


def read_rows(path: Path) -> list[Row]:
    try:
        return [Row.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(f"{path} is damaged ({reason(error)}); delete it to go on without its points") from None


def json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Send an unsent_metrics.jsonl to $MLFLOW_TRACKING_URI (or mlflow.db)."""
    parser = argparse.ArgumentParser(prog="python -m polyprompt.tracking", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("run_id")
    given = parser.parse_args(arguments)
    uri = resolve_uri(TrackingConfig())
    print(f"sent {resend(given.file, uri, given.run_id)} points to {mask(uri)}")


if __name__ == "__main__":
    main()
