"""A run in MLflow is made, as it is described, or opened again, if it is the same one."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from polyprompt import experiment_view
from polyprompt.config import shapes_result
from polyprompt.errors import TrackingError
from polyprompt.section import mask
from polyprompt.tasks.records import FileSource, HubSource, Source, TextSource
from polyprompt.tracking_store import (
    MAX_DIGEST_CHARACTERS,
    MAX_PARAMS_A_BATCH,
    alone,
    client_of,
    make_store,
    now_ms,
    patience,
    sqlite_file,
    store_errors,
)


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


def create_or_reopen(
    uri: str,
    experiment: str,
    run_id: str | None,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    datasets: Sequence[DataInput],
) -> RunHandle:
    """Create a run as it is described, or open run_id again; see tracking.open_run."""
    with store_errors(uri), patience(retries=1, timeout_seconds=5):
        make_store(uri)
        client = client_of(uri)
        # Two runs that are the first to name a data set at the same moment break MLflow's unique keys.
        with alone(sqlite_file(uri)):
            if run_id is None:
                return _create(client, uri, experiment, name, tags, params, datasets)
            return _reopen(client, uri, run_id, tags, params, datasets)


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

    file = sqlite_file(uri)
    try:
        if (found := client.get_experiment_by_name(name)) is None:
            place = str(file.parent / "mlartifacts") if file else None
            return client.create_experiment(name, artifact_location=place, tags=experiment_view.tags(now_ms()))
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
