"""How a run introduces itself in MLflow: a name that people can read, and a note (Markdown) beside its numbers."""

from pathlib import Path

from polyprompt.config import RunConfig
from polyprompt.plan import Plan
from polyprompt.report import mean_majority
from polyprompt.result import RunResult
from polyprompt.router_health import describe
from polyprompt.run_folder import RunFolder

#: The tag that MLflow shows as a run's description.
NOTE = "mlflow.note.content"


def title(config: RunConfig) -> str:
    """Return the run's name in MLflow: its own, else what it is."""
    if config.name is not None:
        return config.name
    # MLflow's table shows some twenty characters: what differs most stands first.
    variant = getattr(config.method, "variant", "")
    parts = [config.method.name, f"seed {config.train.seed}", variant, Path(config.backbone.name).name, _tasks(config)]
    return f"{', '.join(part for part in parts if part)} ({config.identity()[:6]})"


def opening(config: RunConfig, plan: Plan, place: RunFolder) -> str:
    """Say what is trained on what, and where. `closing` takes its place when the run has finished."""
    train, trained = config.train, plan.num_trained_parameters
    variant = getattr(config.method, "variant", "")
    backbone = {True: "trained too", "layer_norms": "its layer normalisations trained", False: "frozen"}
    lines = [
        f"**{config.method.name}**{f' ({variant})' if variant else ''} on **{Path(config.backbone.name).name}** "
        f"({backbone[config.train_backbone]}), seed {train.seed}: {trained:,} trained parameters.",
        f"{_tasks(config)}: {', '.join(config.task_names)}.",
        f"At most {train.max_steps:,} steps of {train.batch_size:,} rows, {train.optimizer}, learning rate "
        f"{train.learning_rate:g}.",
        f"Run folder `{place.out}`, identity `{config.identity()}`.",
    ]
    return "\n\n".join(lines)


def closing(opened: str, result: RunResult) -> str:
    """Return the opening note with the scores, and what can be done next."""
    scores = ["| task | score | majority | lift |", "|---|---:|---:|---:|"]
    for task, values in result.eval.items():
        scores.append(_line(task, values["score"], result.majority.get(task)))
    scores.append(_line("**mean**", result.mean, mean_majority(result)))
    stopped = ", stopped early" if result.stopped_early else ""
    costs = (
        f"Step {result.best_step:,} of {result.num_steps:,}{stopped}, the best by mean. "
        f"{result.train_seconds / result.num_steps:.3g} s a step, {result.peak_memory_bytes / 2**30:.2f} GiB at most, "
        f"{result.inference_flops:.3g} FLOPs to answer a row of median length."
    )
    parts = [opened, "\n".join(scores), costs]
    if result.router_collapse:
        parts.append(f"**Warning**: {describe(result.router_collapse)}.")
    parts.append(
        f"Bundle `{result.bundle}`. Answer rows: `python jobs/predict.py --model {result.bundle} --input FILE --output "
        f"FILE`. Compare: `python jobs/compare.py {result.run_id} RUN_ID … --out DIR`."
    )
    return "\n\n".join(parts)


def costs(result: RunResult) -> dict[str, float]:
    """Return what a score is weighed against, as metrics: columns and charts of MLflow's page."""
    return {
        "cost/trained_parameters": result.num_trained_parameters,
        "cost/method_parameters": result.num_method_parameters,
        "cost/step_seconds": result.train_seconds / result.num_steps,
        "cost/train_seconds": result.train_seconds,
        "cost/peak_memory_bytes": result.peak_memory_bytes,
        "cost/inference_flops": result.inference_flops,
    }


def _tasks(config: RunConfig) -> str:
    return f"{len(config.tasks)} task{'s' if len(config.tasks) > 1 else ''}"


def _line(name: str, score: float, majority: float | None) -> str:
    if majority is None:
        return f"| {name} | {score:.3f} | | |"
    return f"| {name} | {score:.3f} | {majority:.3f} | {score - majority:+.3f} |"
