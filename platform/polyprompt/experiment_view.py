"""What MLflow's page of an experiment shows at once: a saved view with the columns that runs are chosen by, and a note.

The format of a view is that of MLflow 3.17's page; another version that does not know it leaves it out.
"""

import json

#: Of the link to the view: …/experiments/ID/runs?viewStateShareKey=polyprompt.
VIEW = "polyprompt"
PARAMS = ("method.name", "train.seed", "train.learning_rate", "train.max_steps")
METRICS = (
    "eval/best_mean",
    "eval/mean",
    "train/loss",
    "cost/trained_parameters",
    "cost/step_seconds",
    "cost/peak_memory_bytes",
    "cost/inference_flops",
)


def tags(created_ms: int) -> dict[str, str]:
    """Return the tags of a new experiment."""
    metrics, params = [f"metrics.`{name}`" for name in METRICS], [f"params.`{name}`" for name in PARAMS]
    state = {
        "selectedColumns": [*metrics, *params],
        "orderByKey": "metrics.`eval/best_mean`",
        "orderByAsc": False,
        "hideEmptyCharts": True,
    }
    view = {
        "name": "polyprompt: scores and costs",
        "createdAt": created_ms,
        "updatedAt": created_ms,
        "state": json.dumps(state),
    }
    return {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
        "mlflow.note.content": (
            "Training runs of polyprompt. *Views*, above the table, has their scores and costs as columns; the charts "
            "are grouped by prefix: `eval/<task>/…`, `train/<task>/…`, `router/<task>/…`, `perf/…`, `cost/…`. Runs "
            "side by side, with statistics over seeds: `python jobs/compare.py experiment=NAME --out DIR`."
        ),
    }
