"""Finished runs, read from MLflow or from their folders, as far as a comparison needs them."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyprompt import checkpoint, tracking, tracking_store
from polyprompt.errors import BundleError, ConfigError, DataError, hint
from polyprompt.result import RunResult
from polyprompt.run_folder import RESULT, RUN, best_bundle
from polyprompt.worker import METRICS

EXPERIMENT = "experiment="
ROUTER = "router/"
DIGITS = 12
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Record:
    """A finished run. config: flat, as MLflow's params are. rows: task → digest of its rows. histories: by metric, as
    MLflow names it. bundle: its best one, or the one that was asked for; it may be gone. finished_ms: when it ended."""

    name: str
    run_id: str
    config: Mapping[str, str]
    rows: Mapping[str, str]
    result: RunResult
    histories: Mapping[str, Points]
    bundle: Path
    finished_ms: int
    commit: str = ""

    @property
    def seed(self) -> int:
        return int(self.config["train.seed"])

    @property
    def identity(self) -> str:
        """What tells the run from any other: MLflow's id, else the place of its bundle."""
        return self.run_id or str(self.result.bundle)

    def history(self, metric: str) -> Points:
        return self.histories.get(tracking_store.slug(metric), [])


@dataclass(frozen=True)
class Absent:
    """A run that was asked for and cannot be compared, and why."""

    name: str
    reason: str


def read(sources: Sequence[str], uri: str) -> tuple[list[Record], list[Absent]]:
    """Read what was named: run ids, bundles, run folders, folders of runs, and experiment=NAME. Each run counts once.

    uri: of the tracking store, which is asked only where a source needs it. Raises ConfigError for a source that is
    none of these, DataError for a damaged folder, TrackingError where the store cannot be used.
    """
    records: dict[str, Record] = {}
    absent: dict[str, Absent] = {}
    for source in sources:
        for found in _found(source, uri):
            if isinstance(found, Absent):
                absent[found.name] = found
            else:
                records.setdefault(found.identity, found)
    return list(records.values()), list(absent.values())


def _found(source: str, uri: str) -> Iterator[Record | Absent]:
    path = Path(source).expanduser().absolute()
    if source.startswith(EXPERIMENT):
        yield from _experiment(source.removeprefix(EXPERIMENT), uri)
    elif (path / checkpoint.MANIFEST).is_file():
        folder = path.parents[1]
        if not (folder / RUN).is_file():
            raise BundleError(
                f"bundle {path} does not lie in its run's folder, which has its scores: {folder / RUN} is missing. "
                "Name the run's folder or its MLflow run id"
            )
        found = _of_folder(folder)
        yield replace(found, bundle=path) if isinstance(found, Record) else found
    elif path.is_dir():
        folders = [path] if (path / RUN).is_file() else sorted(file.parent for file in path.rglob(RUN))
        if not folders:
            raise ConfigError(
                f"{source} holds no run; expected a run's folder, one of its bundles, or a folder of runs"
            )
        yield from map(_of_folder, folders)
    elif "/" in source:
        raise ConfigError(f"{source} does not exist; expected a run's folder, one of its bundles, or a folder of runs")
    else:
        yield _of_id(source, uri)


def _of_folder(folder: Path) -> Record | Absent:
    """Read a run's folder, which has all that MLflow has and may be looked at without it."""
    try:
        record = json.loads((folder / RUN).read_text())
    except ValueError as error:
        raise DataError(f"{folder / RUN} is damaged ({error}); leave this run out, or train it again") from None
    if not (folder / RESULT).is_file():
        return Absent(f"{record['name']} ({folder})", "it has not finished")
    result = RunResult.read(folder / RESULT)
    return Record(
        name=record["name"],
        run_id=result.run_id,
        config={key: tracking_store.param_text(value) for key, value in record["config"].items()},
        rows=_digests(record.get("rows"), record["data"]),
        result=result,
        histories=_jsonl(folder / METRICS, result),
        bundle=best_bundle(folder, result),
        finished_ms=int((folder / RESULT).stat().st_mtime * 1000),
    )


def _jsonl(file: Path, result: RunResult) -> dict[str, Points]:
    found: dict[str, Points] = {}
    wanted = _losses(result)
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            table = json.loads(line)
            for key, value in table.items():
                name = tracking_store.slug(key)
                if name in wanted or name.startswith(ROUTER):
                    found.setdefault(name, []).append((int(table["step"]), float(value)))
    return found


def _losses(result: RunResult) -> set[str]:
    """Return the names of the tasks' training losses."""
    return {tracking_store.slug(f"train/{task}/loss") for task in result.eval}


def _experiment(name: str, uri: str) -> Iterator[Record | Absent]:
    """Read the runs of an experiment, the oldest first."""
    with tracking_store.store_errors(uri):
        client = tracking_store.client_of(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            known = [found.name for found in client.search_experiments()]
            raise ConfigError(
                f"experiment {name!r} is not in the tracking store; it has {', '.join(known)}.{hint(name, known)}"
            )
        runs, token = [], None
        while token != "":
            page = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"], page_token=token)
            runs += page
            token = page.token or ""
        for run in runs:
            yield _of_run(client, run)


def _of_id(run_id: str, uri: str) -> Record | Absent:
    with tracking_store.store_errors(uri):
        client = tracking_store.client_of(uri)
        try:
            run = client.get_run(run_id)
        except Exception as error:  # MLflow's own, which this file does not import
            if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ConfigError(
                f"{run_id!r} is neither a run in the tracking store nor a folder; expected an MLflow run id, "
                f"{EXPERIMENT}NAME, a run's folder or a bundle. Another store: --uri"
            ) from None
        return _of_run(client, run)


def _of_run(client: Any, run: Any) -> Record | Absent:
    run_id, name, params, tags = run.info.run_id, run.info.run_name, run.data.params, run.data.tags
    called = f"{name} ({run_id})"
    if "polyprompt.study" in tags:
        return Absent(called, "it is a search; its trials are runs of their own")
    if "train.seed" not in params:
        return Absent(called, "it is no training run of polyprompt")
    if not any(file.path == RESULT for file in client.list_artifacts(run_id)):
        state = run.info.status.lower()
        return Absent(
            called,
            f"it has no {RESULT}: its status is {state}"
            + (f", {tags['polyprompt.cause']}" if tags.get("polyprompt.cause") else ""),
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = RunResult.read(Path(client.download_artifacts(run_id, RESULT, folder)))
        except DataError as error:
            return Absent(called, str(error))
    losses = _losses(result)
    wanted = [key for key in run.data.metrics if key in losses or key.startswith(ROUTER)]
    seen = {
        i.dataset.name: i.dataset.digest
        for i in run.inputs.dataset_inputs
        for tag in i.tags
        if tag.value == "validation"
    }
    return Record(
        name=name,
        run_id=run_id,
        config=params,
        rows=_digests(json.loads(tags[tracking.ROWS]) if tracking.ROWS in tags else None, seen),
        result=result,
        histories={key: _history(client, run_id, key) for key in wanted},
        bundle=Path(result.bundle),
        finished_ms=int(run.info.end_time or run.info.start_time),
        commit=tags.get("git_commit", ""),
    )


def _history(client: Any, run_id: str, key: str) -> Points:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def _digests(rows: Mapping[str, str] | None, tokens: Mapping[str, str]) -> dict[str, str]:
    """Return what tells rows apart. A run of an older version has the digest of its tokens alone, which no other kind
    of digest equals."""
    if rows is not None:
        return {task: digest[:DIGITS] for task, digest in rows.items()}
    return {task: f"tokens {digest[:DIGITS]}" for task, digest in tokens.items()}
