"""Trained models in MLflow's registry: versions with all that is needed to serve them, and the aliases they go by.

A new version is the `candidate`. It becomes `champion` only where it scores no worse on the same data.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from polyprompt import __version__, checkpoint, tracking
from polyprompt.errors import ConfigError
from polyprompt.predictor import find_bundle
from polyprompt.pyfunc import FIELDS
from polyprompt.result import RunResult
from polyprompt.run_folder import RESULT, RUN
from polyprompt.tasks import catalog
from polyprompt.tasks.records import Task

CANDIDATE, CHAMPION = "candidate", "champion"
#: Tags of a version: JSON, task → score and task → digest of its rows.
SCORES, DATA = "polyprompt.scores", "polyprompt.data"
#: A champion may lose this much on a task's score by rounding alone.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Version:
    """A version of a registered model. uri: what MLflow loads it by."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"


def register(run: Path, name: str, uri: str) -> Version:
    """Register a finished run's best bundle as a new version of the model `name`, and make it the candidate.

    run: the run's folder. uri: of the tracking store. Raises BundleError, ConfigError for a run without a record in
    that store, TrackingError where the store cannot be used.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    bundle = checkpoint.read(find_bundle(run))
    if not (run / RESULT).is_file():
        raise ConfigError(f"{run} is not of a finished run: {RESULT} is missing. Name the folder of one")
    record, result = json.loads((run / RUN).read_text()), RunResult.read(run / RESULT)
    if not record["run_id"]:
        raise ConfigError(
            f"{run} was trained with tracking off, so it has no MLflow run. Train with tracking.enabled=true"
        )
    scores = {task: values["score"] for task, values in result.eval.items()}
    tasks = [task for task in catalog.forms(bundle.config) if task is not None]
    with tempfile.TemporaryDirectory() as folder, _store(uri):
        slim = checkpoint.without_optimizer(bundle.folder, Path(folder) / "bundle")
        client = tracking.client_of(uri)
        logged = client.create_logged_model(
            client.get_run(record["run_id"]).info.experiment_id,
            name="model",
            source_run_id=record["run_id"],
            params={"method": bundle.config.method.name, "backbone": str(bundle.backbone["name"])},
            model_type="text-to-text",
        )
        info = Model.log(
            artifact_path=None,
            flavor=pyfunc,
            model_id=logged.model_id,
            run_id=record["run_id"],
            registered_model_name=name,
            loader_module="polyprompt.pyfunc",
            data_path=str(slim),
            signature=_signature(tasks),
            input_example=_example(tasks),
            pip_requirements=_requirements(),
            step=int(result.best_step),
            metadata={"backbone": dict(bundle.backbone), "tasks": [task.name for task in tasks]},
        )
        version = Version(name, str(info.registered_model_version))
        tags = {
            SCORES: json.dumps(scores),
            DATA: json.dumps({task: record["data"][task] for task in scores}),
            "polyprompt.mean": f"{result.mean:.6f}",
            "polyprompt.backbone": str(bundle.backbone["name"]),
            "polyprompt.backbone_revision": str(bundle.backbone["revision"] or ""),
            "polyprompt.backbone_sha256": str(bundle.backbone["sha256"]),
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, version.number, key, value)
        for task, score in scores.items():
            client.log_metric(
                record["run_id"],
                f"registered/{tracking.slug(task)}/score",
                score,
                step=int(result.best_step),
                model_id=info.model_id,
                dataset_name=task,
                dataset_digest=record["data"][task],
            )
        client.set_registered_model_alias(name, CANDIDATE, version.number)
    return version


def promote(name: str, uri: str, number: str | None = None) -> Version:
    """Make a version (the candidate) the champion, if it scores no worse than the present one on the same data.

    Raises ConfigError with the reason where it does, or where they were not scored on the same data.
    """
    with _store(uri):
        client = tracking.client_of(uri)
        # MLflow's sqlite store gives numbers, its server texts.
        aliases = {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
        chosen = number or aliases.get(CANDIDATE)
        if chosen is None:
            raise ConfigError(f"model {name} has no {CANDIDATE}; register a run, or name a version")
        champion = aliases.get(CHAMPION)
        if champion is not None and champion != chosen:
            _check_no_worse(name, client.get_model_version(name, chosen), client.get_model_version(name, champion))
        client.set_registered_model_alias(name, CHAMPION, chosen)
    return Version(name, chosen)


def _check_no_worse(name: str, new: Any, old: Any) -> None:
    """Compare the mean score over the tasks that both were scored on, on the same rows. Raises ConfigError."""
    new_scores, old_scores = json.loads(new.tags.get(SCORES, "{}")), json.loads(old.tags.get(SCORES, "{}"))
    new_data, old_data = json.loads(new.tags.get(DATA, "{}")), json.loads(old.tags.get(DATA, "{}"))
    lost = [task for task in old_scores if task not in new_scores]
    if lost:
        raise ConfigError(f"version {new.version} of {name} does not know {', '.join(lost)}, which the champion serves")
    other = [task for task in old_scores if new_data.get(task) != old_data.get(task)]
    if other or not old_scores:
        raise ConfigError(
            f"version {new.version} of {name} and the champion, version {old.version}, were not scored on the same "
            f"rows of {', '.join(other) or 'any task'}; train or score them on the same data first"
        )
    worse = [
        f"{task} {new_scores[task]:.4f} < {score:.4f}"
        for task, score in old_scores.items()
        if new_scores[task] < score - TOLERANCE
    ]
    means = [sum(scores[task] for task in old_scores) / len(old_scores) for scores in (new_scores, old_scores)]
    if means[0] < means[1] - TOLERANCE:
        raise ConfigError(
            f"version {new.version} of {name} scores worse than the champion, version {old.version}: mean "
            f"{means[0]:.4f} < {means[1]:.4f} ({'; '.join(worse)}). It stays the {CANDIDATE}"
        )


def _signature(tasks: Sequence[Task]) -> Any:
    """`task`, `input`, and every field that the tasks' formats are known to read; all but `task` may be absent."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    names = dict.fromkeys(["input", FIELDS, *(field for task in tasks for field in catalog.fields(task))])
    text = [ColSpec(DataType.string, field, required=False) for field in names]
    choices = ColSpec(Array(DataType.string), "choices", required=False)
    answers = ("prediction", DataType.string), ("score", DataType.double), ("choice_scores", DataType.string)
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "task"), *text, choices]),
        outputs=Schema([ColSpec(kind, field) for field, kind in (*answers, ("error", DataType.string))]),
        params=ParamSchema([ParamSpec("batch_size", DataType.long, 64), ParamSpec("mode", DataType.string, "")]),
    )


def _example(tasks: Sequence[Task]) -> pd.DataFrame:
    """Return a row for each task, in its own fields where its format names them."""
    return pd.DataFrame(
        [{"task": task.name, **dict.fromkeys(catalog.fields(task) or ("input",), "some text")} for task in tasks]
    )


def _requirements() -> list[str]:
    versions = checkpoint.versions()
    return [f"polyprompt=={__version__}", *(f"{package}=={versions[package]}" for package in ("torch", "transformers"))]


@contextlib.contextmanager
def _store(uri: str) -> Iterator[None]:
    """Point MLflow's module-level functions at the store, which saving a model has no other way to be told."""
    import mlflow

    # MLflow writes what it is told into this variable, where every later run of this process would find it.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with tracking.store_errors(uri), tracking.patience(retries=1, timeout_seconds=30):
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it, which its annotation leaves out
