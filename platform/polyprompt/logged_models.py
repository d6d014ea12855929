"""A run's kept checkpoints as MLflow's LoggedModels, their scores tied to the data that they were measured on.

The weights stay where the run has them: a LoggedModel says what it is, where it lies and how good it is. registry.py
uploads one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyprompt.loop import Scores, TrainState
from polyprompt.tracking import tolerant
from polyprompt.tracking_opening import RunHandle
from polyprompt.tracking_store import MAX_DIGEST_CHARACTERS, MAX_METRICS_A_BATCH, client_of, now_ms, slug

BUNDLE, KEPT_AS = "polyprompt.bundle", "polyprompt.kept_as"
MODEL_TYPE = "text-to-text"


@dataclass(frozen=True)
class Checkpoint:
    """A kept bundle. kept_as: why, such as "best of glue/rte". scores: of its step; empty where it was not scored."""

    step: int
    bundle: Path
    kept_as: str
    scores: Scores


def kept(state: TrainState, bundles: Sequence[Path]) -> list[Checkpoint]:
    """Return the checkpoints that a finished run kept. bundles: their folders, oldest first."""
    scores = {evaluation["step"]: evaluation["tasks"] for evaluation in state.evaluations}
    found = []
    for bundle in bundles:
        step = int(bundle.name.removeprefix("step_"))
        reasons = ["best mean"] if step == state.best_step else []
        reasons += [f"best of {task}" for task, (best, _) in state.best_tasks.items() if int(best) == step]
        found.append(Checkpoint(step, bundle, ", ".join(reasons) or "newest", scores.get(step, {})))
    return found


def log(
    handle: RunHandle, checkpoints: Sequence[Checkpoint], params: Mapping[str, str], digests: Mapping[str, str]
) -> bool:
    """Make a LoggedModel of each checkpoint; return whether the store took them all. A store that is gone only warns.

    params: of all of them. digests: task → that of its validation data as the run names it (DataInput). Those that
    the run has already are left as they are.
    """

    def send() -> None:
        client = client_of(handle.uri)
        run = f"source_run_id = '{handle.run_id}'"
        there = {model.name for model in client.search_logged_models([handle.experiment_id], filter_string=run)}
        times = _Times(client, handle.run_id)
        for checkpoint in checkpoints:
            if checkpoint.bundle.name not in there:
                _create(client, handle, checkpoint, params, digests, times)

    return tolerant(handle, "the kept checkpoints", send, timeout_seconds=30)


class _Times:
    """When each point of the run's metrics was logged: a point sent again at its own time is no new point."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: dict[str, dict[int, int]] = {}

    def of(self, key: str, step: int) -> int:
        if key not in self._known:
            history = self._client.get_metric_history(self._run_id, key)
            self._known[key] = {point.step: point.timestamp for point in history}
        return self._known[key].get(step) or now_ms()


def _create(
    client: Any,
    handle: RunHandle,
    checkpoint: Checkpoint,
    params: Mapping[str, str],
    digests: Mapping[str, str],
    times: _Times,
) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    model = client.create_logged_model(
        handle.experiment_id,
        name=checkpoint.bundle.name,
        source_run_id=handle.run_id,
        tags={BUNDLE: str(checkpoint.bundle), KEPT_AS: checkpoint.kept_as, MLFLOW_MODEL_IS_EXTERNAL: "true"},
        params={**params, "step": str(checkpoint.step)},
        model_type=MODEL_TYPE,
    )
    metrics = [
        Metric(
            key,
            value,
            times.of(key, checkpoint.step),
            checkpoint.step,
            model_id=model.model_id,
            dataset_name=task,
            dataset_digest=digests[task][:MAX_DIGEST_CHARACTERS],
            run_id=handle.run_id,
        )
        for task, values in checkpoint.scores.items()
        for key, value in ((slug(f"eval/{task}/{metric}"), value) for metric, value in values.items())
    ]
    for start in range(0, len(metrics), MAX_METRICS_A_BATCH):
        client.log_batch(handle.run_id, metrics=metrics[start : start + MAX_METRICS_A_BATCH])
    client.finalize_logged_model(model.model_id, "READY")
