"""Trained models in MLflow's registry: versions with all that is needed to serve them, and the aliases they go by.

A new version is the `candidate`. It becomes `champion` only where it scores no worse on the same data.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from polyprompt import __version__, checkpoint, fingerprint, section, tracking, tracking_store
from polyprompt.config import TrackingConfig
from polyprompt.errors import BundleError, ConfigError
from polyprompt.predictor import find_bundle
from polyprompt.pyfunc import FIELDS
from polyprompt.result import RunResult
from polyprompt.run_folder import RESULT, RUN
from polyprompt.tasks import catalog
from polyprompt.tasks.records import Task

CANDIDATE, CHAMPION = "candidate", "champion"
#: How addresses of versions start.
ADDRESS = "models:/"
#: Tags of a version: JSON, task → score and task → digest of its rows.
SCORES, DATA = "polyprompt.scores", "polyprompt.data"
#: The bundle's weights, and those of the bundles that tasks were added to on the way to it (JSON): sha256 each.
WEIGHTS, ADDED_TO = "polyprompt.weights_sha256", "polyprompt.added_to"
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

    for file in (RESULT, RUN):
        if not (run / file).is_file():
            raise ConfigError(f"{run} is not of a finished run: {file} is missing. Name the folder of one")
    if not name or set(name) & set("/:"):
        raise ConfigError(f"a registered model cannot be called {name!r}; expected a name without / and :")
    record, result = json.loads((run / RUN).read_text()), RunResult.read(run / RESULT)
    if not record["run_id"]:
        raise ConfigError(
            f"{run} was trained with tracking off, so it has no MLflow run. Train with tracking.enabled=true"
        )
    bundle = checkpoint.read(find_bundle(run))
    scores = {task: values["score"] for task, values in result.eval.items()}
    tasks = [task for task in catalog.forms(bundle.config) if task is not None]
    with tempfile.TemporaryDirectory() as folder, _store(uri):
        slim = checkpoint.without_optimizer(bundle.folder, Path(folder) / "bundle")
        client = tracking_store.client_of(uri)
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
            # Not "data": prompts of another length leave room for other inputs of the very same rows. A run of an older
            # version has nothing else, and compares with runs on equal tokens.
            DATA: json.dumps({task: record.get("rows", record["data"])[task] for task in scores}),
            WEIGHTS: bundle.weights,
            ADDED_TO: json.dumps(bundle.state.get(fingerprint.KEPT, {}).get(fingerprint.OF, [])),
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
                f"registered/{tracking_store.slug(task)}/score",
                score,
                step=int(result.best_step),
                model_id=info.model_id,
                dataset_name=task,
                dataset_digest=f"{record['data'][task]}-validation"[: tracking_store.MAX_DIGEST_CHARACTERS],
            )
        client.set_registered_model_alias(name, CANDIDATE, version.number)
    return version


def promote(name: str, uri: str, number: str | None = None) -> Version:
    """Make a version (the candidate) the champion, if it scores no worse than the present one on the same data.

    Raises ConfigError with the reason where it does, where they were not scored on the same data, and where there is no
    such version.
    """
    chosen = current(f"{ADDRESS}{name}/{number}" if number else f"{ADDRESS}{name}@{CANDIDATE}", uri)
    with _store(uri):
        client = tracking_store.client_of(uri)
        # MLflow's sqlite store gives numbers, its server texts.
        aliases = {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
        champion = aliases.get(CHAMPION)
        if champion is not None and champion != chosen.number:
            new, old = (client.get_model_version(name, each) for each in (chosen.number, champion))
            _check_no_worse(name, new, old)
        client.set_registered_model_alias(name, CHAMPION, chosen.number)
    return chosen


def parse(address: str) -> tuple[str, str]:
    """Return the name and the number or @alias of models:/NAME/NUMBER or models:/NAME@ALIAS. Raises ConfigError."""
    name, mark, rest = address.removeprefix(ADDRESS).rpartition("@" if "@" in address else "/")
    if not (name and rest) or (mark == "/" and not rest.isdigit()):
        raise ConfigError(f"{address} names no version; expected models:/NAME@ALIAS or models:/NAME/NUMBER")
    return name, f"@{rest}" if mark == "@" else rest


def current(address: str, uri: str) -> Version:
    """Return the version that an address means now.

    Raises ConfigError where the store has no such model, alias or number, TrackingError where it cannot be used.
    """
    from mlflow.exceptions import MlflowException

    name, which = parse(address)
    with tracking_store.store_errors(uri), tracking_store.patience(retries=1, timeout_seconds=10):
        client = tracking_store.client_of(uri)
        try:
            if which.startswith("@"):
                return Version(name, str(client.get_model_version_by_alias(name, which[1:]).version))
            return Version(name, str(client.get_model_version(name, which).version))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ConfigError(
                f"{address} is not in the registry of {section.mask(uri)}; `jobs/register.py` makes versions and moves "
                "the champion"
            ) from error


@contextlib.contextmanager
def opened(source: str, uri: str | None) -> Iterator[Path]:
    """Hand out the bundle that a source means: a run's folder, a bundle, or models:/… of a store, which is copied here
    meanwhile.

    uri: as tracking.uri. Raises BundleError, ConfigError, TrackingError.
    """
    if not source.startswith(ADDRESS):
        yield find_bundle(Path(source).absolute())
        return
    store = tracking.resolve_uri(TrackingConfig(uri=uri))
    with tempfile.TemporaryDirectory(prefix="polyprompt-") as folder:
        yield fetch(current(source, store), store, Path(folder))


def fetch(version: Version, uri: str, folder: Path) -> Path:
    """Copy a version's files into a folder, and return the bundle among them. Raises BundleError, TrackingError."""
    from mlflow.artifacts import download_artifacts

    with _store(uri):
        model = Path(download_artifacts(artifact_uri=version.uri, dst_path=str(folder), tracking_uri=uri))
    found = sorted(model.rglob(checkpoint.MANIFEST))
    if len(found) != 1:
        raise BundleError(f"{version.uri} holds {len(found)} bundles, expected one; register it with jobs/register.py")
    return found[0].parent


def _check_no_worse(name: str, new: Any, old: Any) -> None:
    """Compare the mean score over the tasks that both were scored on, on the same rows. Raises ConfigError.

    A model that tasks were added to answers the old ones as before to the last bit, so there is nothing to compare.
    """
    if old.tags.get(WEIGHTS) in json.loads(new.tags.get(ADDED_TO, "[]")):
        return
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
    if math.isnan(means[0]) or means[0] < means[1] - TOLERANCE:
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
    text = [ColSpec(DataType.string, field, required=False) for field in names if field not in ("task", "choices")]
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
    with tracking_store.store_errors(uri), tracking_store.patience(retries=1, timeout_seconds=30):
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it, which its annotation leaves out
