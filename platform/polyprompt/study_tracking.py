"""A study in MLflow: one parent run, every training run its child, the best one registered as candidate.

Two levels, no more: the runs of all seeds of all trials are children of the study.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from polyprompt import tracking, tracking_store
from polyprompt.config import TrackingConfig
from polyprompt.errors import PolypromptError, TrackingError
from polyprompt.result import RunResult
from polyprompt.run_folder import RESULT
from polyprompt.tracking_opening import RunHandle, create_or_reopen
from polyprompt.tracking_store import MAX_KEY_CHARACTERS, MAX_TAG_CHARACTERS

LOGGER = logging.getLogger(__name__)
PARENT = "mlflow.parentRunId"
CANDIDATE = "candidate"
BUNDLE = "bundle"
#: What the study's folder holds for people; the runs' own folders in it are not uploaded twice.
ARTIFACTS = ("study.json", "leaderboard.csv", "leaderboard.md", "best.yaml")
Status = Literal["FINISHED", "KILLED", "FAILED"]
# What a child ends as that was cut off before it could end itself.
_ENDINGS: dict[str, Status] = {"finished": "FINISHED", "failed": "FAILED"}


class SeedRun(Protocol):
    """tuning/study.py's SeedRun, as far as it is recorded; `platform` imports nothing of `tuning`."""

    @property
    def seed(self) -> int: ...
    @property
    def run_id(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def cause(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def folder(self) -> str: ...


class Trial(Protocol):
    """tuning/study.py's Trial."""

    @property
    def number(self) -> int: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def runs(self) -> Sequence[SeedRun]: ...
    @property
    def state(self) -> str: ...
    def mean(self, metric: str) -> float: ...


class Objective(Protocol):
    """tuning/study.py's Objective."""

    @property
    def metric(self) -> str: ...
    @property
    def mode(self) -> str: ...


class Study(Protocol):
    """tuning/study.py's Study."""

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def objectives(self) -> Sequence[Objective]: ...
    @property
    def searcher(self) -> str: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def trials(self) -> Sequence[Trial]: ...
    @property
    def parent_run_id(self) -> str: ...
    def best(self) -> Trial | None: ...


def open_study(config: TrackingConfig, study: Study) -> RunHandle:
    """Create the study's parent run, or open `study.parent_run_id` again. Creates and migrates a new sqlite store.

    To be called before the first trial: trials that open a new store at once would break it.
    Raises TrackingError when the store cannot be used within seconds, or lacks the run.
    """
    uri, experiment = tracking.resolve_uri(config), tracking.resolve_experiment(config)
    tags = {
        "polyprompt.study": study.name,
        "polyprompt.keys": json.dumps(list(study.keys)),
        "polyprompt.objectives": json.dumps([f"{o.mode} {o.metric}" for o in study.objectives]),
        "polyprompt.searcher": study.searcher,
        "polyprompt.scheduler": study.scheduler,
        "polyprompt.seed": str(study.seed),
    }
    tags = {key: value[:MAX_TAG_CHARACTERS] for key, value in tags.items()}
    return create_or_reopen(uri, experiment, study.parent_run_id or None, study.name, tags, {}, ())


def child_tags(parent: RunHandle, *, trial: int, seed: int) -> dict[str, str]:
    """Return the tags that make a new run a child of the study."""
    return {PARENT: parent.run_id, "polyprompt.trial": str(trial), "polyprompt.seed": str(seed)}


def close_study(parent: RunHandle, study: Study, folder: Path, status: Status) -> bool:
    """End the study with what is there: children, artifacts from its folder, metrics, status, candidate.

    May be called again, also after a resume: nothing is there twice. Return whether the store took everything; one that
    is gone only warns, since the results are on disk.
    """

    def close() -> None:
        client = tracking_store.client_of(parent.uri)
        children = _children(client, parent)
        for trial in study.trials:
            for run in trial.runs:
                if run.run_id in children:
                    _close_child(client, children[run.run_id], study, trial, run)
        for path in (folder / name for name in ARTIFACTS):
            if path.is_file():
                client.log_artifact(parent.run_id, str(path))
        if (folder / "plots").is_dir():
            client.log_artifacts(parent.run_id, str(folder / "plots"), "plots")
        if (folder / "leaderboard.md").is_file():
            client.set_tag(parent.run_id, "mlflow.note.content", _note((folder / "leaderboard.md").read_text()))
        _log_changed(client, client.get_run(parent.run_id), _totals(study))
        client.set_terminated(parent.run_id, status)

    def register() -> None:
        _register(tracking_store.client_of(parent.uri), study)

    closed = tracking.tolerant(parent, f"the study {study.name}", close, timeout_seconds=30)
    return closed and tracking.tolerant(parent, "the candidate", register, timeout_seconds=30)


def _children(client: Any, parent: RunHandle) -> dict[str, Any]:
    """Return the runs of the study that were not deleted, by id."""
    found: dict[str, Any] = {}
    experiment, token = client.get_run(parent.run_id).info.experiment_id, None
    while token != "":
        page = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent.run_id}'", page_token=token)
        found.update({run.info.run_id: run for run in page})
        token = page.token or ""
    return found


def _close_child(client: Any, child: Any, study: Study, trial: Trial, run: SeedRun) -> None:
    """Give a child what only the study knows of it, and end it if nobody could: a stopped trial's process is killed."""
    from mlflow.entities import Param, RunTag

    tags = {"polyprompt.trial": str(trial.number), "polyprompt.seed": str(run.seed), "polyprompt.state": run.state}
    if run.cause or "polyprompt.cause" in child.data.tags:
        tags["polyprompt.cause"] = run.cause
    new = {key: value for key, value in tags.items() if child.data.tags.get(key) != value}
    # The run's own params hold every searched key but those inside a table, which are one JSON param there.
    params = {tracking_store.slug(key): _text(value) for key, value in trial.params.items()}
    client.log_batch(
        child.info.run_id,
        params=[Param(key, value) for key, value in params.items() if key not in child.data.params],
        tags=[RunTag(key, value[:MAX_TAG_CHARACTERS]) for key, value in new.items()],
    )
    objectives = {f"objective/{o.metric}": run.metrics[o.metric] for o in study.objectives if o.metric in run.metrics}
    costs = {key: value for key, value in run.metrics.items() if not key.startswith("eval/")}
    _log_changed(client, child, {**objectives, **costs})
    if child.info.status == "RUNNING":
        client.set_terminated(child.info.run_id, _ENDINGS.get(run.state, "KILLED"))


def _log_changed(client: Any, run: Any, metrics: Mapping[str, float]) -> None:
    """Log the values that the run does not have yet. The time orders values of a step: a changed one is the latest."""
    from mlflow.entities import Metric

    now, have = tracking_store.now_ms(), run.data.metrics
    slugged = {tracking_store.slug(key): float(value) for key, value in metrics.items() if math.isfinite(value)}
    changed = [Metric(key, value, now, 0) for key, value in slugged.items() if have.get(key) != value]
    if changed:
        client.log_batch(run.info.run_id, metrics=changed)


def _totals(study: Study) -> dict[str, float]:
    """Return the parent's metrics: how many trials ended how, and the best trial's objectives."""
    best, states = study.best(), [trial.state for trial in study.trials]
    scores = {f"best/{o.metric}": best.mean(o.metric) for o in study.objectives} if best is not None else {}
    return scores | {f"num_{state}": float(states.count(state)) for state in ("finished", "stopped", "failed")}


def _register(client: Any, study: Study) -> None:
    """Register the bundle of the best trial's first run as the alias `candidate` of the model named as the study."""
    from mlflow.exceptions import MlflowException

    best = study.best()
    if best is None or not best.runs[0].run_id:
        return
    run, name = best.runs[0], model_name(study.name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((v.version for v in versions if v.run_id == run.run_id), None)
    if version is None:
        try:
            bundle = Path(RunResult.read(Path(run.folder) / RESULT).bundle)
            if not bundle.is_dir():
                raise TrackingError(f"its bundle {bundle} is not on this machine")
        except PolypromptError as error:
            LOGGER.warning("trial %d, the best, is not registered as candidate: %s", best.number, error)
            return
        client.log_artifacts(run.run_id, str(bundle), BUNDLE)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        scores = ", ".join(f"{o.metric} {best.mean(o.metric):.6g}" for o in study.objectives)
        version = client.create_model_version(
            name,
            source=f"{client.get_run(run.run_id).info.artifact_uri}/{BUNDLE}",
            run_id=run.run_id,
            tags={"polyprompt.trial": str(best.number), "polyprompt.seed": str(run.seed)},
            description=f"Trial {best.number} of the study {study.name}: {scores}",
            await_creation_for=0,
        ).version
    client.set_registered_model_alias(name, CANDIDATE, version)


def model_name(study: str) -> str:
    """Return the registered model's name: MLflow takes no slash and no colon in one, and quotes end its filters."""
    return "".join("_" if character in "/:'\"%" else character for character in study)[:MAX_KEY_CHARACTERS]


def _note(markdown: str) -> str:
    """Cut a leaderboard to what a tag holds, by whole lines."""
    if len(markdown) <= MAX_TAG_CHARACTERS:
        return markdown
    ending = "\n\nThe artifact leaderboard.md has all trials.\n"
    return markdown[: MAX_TAG_CHARACTERS - len(ending)].rpartition("\n")[0] + ending


def _text(value: Any) -> str:
    """Write a value as `RunConfig.flat` does."""
    return value if isinstance(value, str) else json.dumps(value)
