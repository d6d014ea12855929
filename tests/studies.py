"""Records of studies for tests, made up: no training behind them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuning.study import Objective, Scalar, SeedRun, State, Study, Trial

KEYS = [
    "method.name",
    "train.learning_rate",
    "method.num_prompts",
    "method.length",
    "method.reduction",
    "method.stacks",
]
RECIPE = {
    "name": "base",
    "tasks": ["embedded/nli"],
    "method": {"name": "hyperprompt", "variant": "share", "reduction": 8},
    "train": {"max_steps": 400, "seed": 42},
}


def smop(rate: float = 1e-3, num_prompts: int = 4, length: int = 5) -> dict[str, Scalar]:
    return {
        "method.name": "smop",
        "train.learning_rate": rate,
        "method.num_prompts": num_prompts,
        "method.length": length,
    }


def hyperprompt(rate: float = 1e-3, reduction: int = 8, stacks: str = "both") -> dict[str, Scalar]:
    return {
        "method.name": "hyperprompt",
        "train.learning_rate": rate,
        "method.reduction": reduction,
        "method.stacks": stacks,
    }


def trial(
    number: int,
    params: dict[str, Scalar],
    *scores: float | None,
    state: State = "finished",
    cause: str = "",
    cost: int = 1000,
    run_ids: Sequence[str] = (),
    folder: Path | None = None,
) -> Trial:
    """A trial with a run for each score, seeds 1, 2, …; None: a run that was never scored."""
    runs = []
    for place, score in enumerate(scores):
        costs: dict[str, float] = {"num_trained_parameters": float(cost), "inference_flops": 1e6 + 2.0 * cost}
        num_steps = 400 if state == "finished" else 100
        curve = [] if score is None else [(step, score * step / num_steps) for step in range(50, num_steps + 1, 50)]
        runs.append(
            SeedRun(
                seed=place + 1,
                run_id=run_ids[place] if run_ids else "",
                state=state,
                cause=cause,
                num_steps=num_steps,
                seconds=12.5,
                metrics=costs if score is None else {"eval/mean": score, **costs},
                curve=curve,
                folder=str(folder or ""),
            )
        )
    return Trial(number, params, runs)


def study(trials: Sequence[Trial], **changes: Any) -> Study:
    """A study that wants the highest mean score."""
    return Study(
        **{
            "name": "methods",
            "recipe": RECIPE,
            "keys": KEYS,
            "objectives": [Objective("eval/mean", "max")],
            "searcher": "random",
            "scheduler": "asha",
            "seed": 0,
            "trials": list(trials),
            **changes,
        }
    )


def mixed() -> Study:
    """Two methods; trial 2 is the best, 1 was stopped, 4 failed, 5 runs, 6 waits."""
    return study(
        [
            trial(0, smop(1e-4, 2, 1), 0.70, cost=2_000),
            trial(1, smop(3e-2, 20, 10), 0.30, state="stopped", cause="asha: step 100", cost=90_000),
            trial(2, hyperprompt(1e-3, 4), 0.90, cost=144_000),
            trial(3, hyperprompt(5e-3, 16, "encoder"), 0.80, cost=40_000),
            trial(4, hyperprompt(1e-2, 8), None, state="failed", cause="out of memory: [GPU 0] | 12 GiB"),
            trial(5, smop(2e-3, 4, 5), 0.60, state="running"),
            Trial(6, smop(2e-3, 4, 10), [SeedRun(seed=1)]),
            trial(7, smop(2e-3, 10, 5), 0.85, cost=50_000),
            trial(8, smop(4e-3, 10, 3), 0.75, cost=30_000),
            trial(9, smop(1e-3, 4, 3), 0.72, cost=12_000),
        ]
    )
