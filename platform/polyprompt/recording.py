"""What stays of a run: its place in the tracking store, its result, and what a person looks at."""

import json
import re
from collections.abc import Callable, Mapping

from polyprompt import checkpoint, logged_models, registry, report, run_folder, run_note, tracking
from polyprompt.config import RunConfig
from polyprompt.data import AnyData, Split
from polyprompt.errors import PolypromptError
from polyprompt.plan import Plan
from polyprompt.result import RunResult
from polyprompt.run_folder import RunFolder
from polyprompt.text_store import TextSplit
from polyprompt.tracking_opening import DataInput, RunHandle
from polyprompt.worker import Outcome


def open_tracking(
    config: RunConfig, checked: Plan, run_id: str, commit: str, tags: Mapping[str, str]
) -> RunHandle | None:
    """Open the run in the tracking store, or that of run_id again. None where tracking is off."""
    if not config.tracking.enabled:
        return None
    return tracking.open_run(
        config,
        name=run_note.title(config),
        tags={
            "backbone_sha256": str(checked.backbone["sha256"]),
            "git_commit": commit,
            "num_trained_parameters": str(checked.num_trained_parameters),
            tracking.ROWS: json.dumps({task.task.name: task.rows_digest[:12] for task in checked.data}),
            **tags,
        },
        datasets=[
            DataInput(
                name=task.task.name,
                context="train" if split is task.train else "validation",
                digest=_digest(task, split),
                num_examples=len(split),
                source=task.task.source,
                split=task.task.train_split if split is task.train else task.task.validation_split,
            )
            for task in checked.data
            for split in (task.train, task.validation)
            if len(split)
        ],
        run_id=run_id or None,
    )


def _digest(task: AnyData, split: Split | TextSplit) -> str:
    """Return a split's digest. MLflow takes equal name and digest for one data set."""
    return f"{task.digest}-{split.name}"


def result_of(
    config: RunConfig, place: RunFolder, checked: Plan, outcome: Outcome, handle: RunHandle | None
) -> RunResult:
    """Put together what the run says about itself."""
    state = outcome.state
    best = next(e for e in state.evaluations if e["step"] == state.best_step)
    rows = sum(state.examples_seen.values())
    return RunResult(
        run_id=handle.run_id if handle else "",
        name=place.name,
        method=config.method.name,
        backbone=config.backbone.name,
        num_trained_parameters=checked.num_trained_parameters,
        num_method_parameters=checked.num_method_parameters,
        num_backbone_parameters=checked.num_backbone_parameters,
        num_steps=state.step,
        num_workers=outcome.num_workers,
        train_seconds=state.train_seconds,
        examples_per_second=rows / state.train_seconds,
        tokens_per_second=state.input_tokens / state.train_seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        examples_seen=dict(state.examples_seen),
        sequence=state.sequence,
        loss_curve=state.loss_curve,
        eval=best["tasks"],
        majority={task: values["score"] for task, values in checked.majority.items()},
        best_task_steps={task: int(step) for task, (step, _) in state.best_tasks.items()},
        mean=best["mean"],
        best_step=state.best_step,
        bundle=str(place.bundles / checkpoint.folder_name(state.best_step)),
        last_bundle=str(outcome.last_bundle),
        stopped_early=state.stopped_early,
        evaluations=state.evaluations,
        inference_flops=checked.inference_flops,
        router_collapse=state.router.collapse,
    )


def log_checkpoints(config: RunConfig, place: RunFolder, checked: Plan, outcome: Outcome, handle: RunHandle) -> None:
    """Make a LoggedModel of each kept checkpoint, its scores tied to the data."""
    logged_models.log(
        handle,
        logged_models.kept(outcome.state, checkpoint.bundles(place.bundles)),
        {"method": config.method.name, "backbone": config.backbone.name},
        {task.task.name: _digest(task, task.validation) for task in checked.data},
    )


def register(config: RunConfig, place: RunFolder, say: Callable[[str], None]) -> None:
    """Make the finished run the candidate of its model. A run that cannot be registered is a finished run still."""
    given = config.tracking.register_model
    # What MLflow takes in the name of a model is less than in that of an experiment.
    name = given if isinstance(given, str) else re.sub("[/:]", "-", tracking.resolve_experiment(config.tracking))
    try:
        version = registry.register(place.folder, name, tracking.resolve_uri(config.tracking))
    except PolypromptError as error:
        say(
            f"Run {place.name} has finished, but was not registered: {error} Mend it, then: "
            f"python jobs/register.py {place.folder} --name {name!r}"
        )
    else:
        say(f"{version.uri} is the candidate: models:/{version.name}@{registry.CANDIDATE}")


def leave(result: RunResult, place: RunFolder, handle: RunHandle | None) -> None:
    """Write what a person looks at, in the output folder and in MLflow; result.json last, for it means finished."""
    files = [place.out / "config.yaml", place.out / "per_task.csv", *report.plots(result, place.out)]
    report.per_task_csv(result, place.out / "per_task.csv")
    for folder in {place.out, place.folder}:
        result.write(folder / run_folder.RESULT)
    if handle is not None:
        tracking.log_artifacts(handle, [*files, place.out / run_folder.RESULT])
