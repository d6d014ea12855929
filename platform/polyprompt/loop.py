"""The training loop: accumulate, clip, step, and when to log, evaluate, save and stop.

Knows neither Ray nor MLflow nor ranks: `Workers` adds up gradients, a `Reporter` takes what is to be seen or kept.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyprompt.batches import Batches, GlobalBatch
from polyprompt.config import RunConfig
from polyprompt.errors import NotFiniteError
from polyprompt.model import PromptedModel
from polyprompt.optim import Optim
from polyprompt.workers import Workers

Scores = Mapping[str, Mapping[str, float]]
"""task → metric → value, with the task's own "score"."""


@dataclass
class Window:
    """What was seen since the last logged step. nll, tokens: by task index. seconds: of training alone."""

    steps: int = 0
    nll: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    routes: list[float] = field(default_factory=list)
    rows: int = 0
    input_tokens: int = 0
    seconds: float = 0.0


@dataclass
class TrainState:
    """All of a run that is not a tensor. JSON-able; a run that reads it back goes on exactly.

    sequence: a running hash over the (task, example) pairs of all steps: equal means the same data in the same order.
    best_tasks: task → [step, score]. evaluations: [{step, mean, tasks}].
    """

    step: int = 0
    sequence: str = ""
    loss_curve: list[list[float]] = field(default_factory=list)
    window: Window = field(default_factory=Window)
    examples_seen: dict[str, int] = field(default_factory=dict)
    train_seconds: float = 0.0
    input_tokens: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_mean: float = -math.inf
    best_tasks: dict[str, list[float]] = field(default_factory=dict)
    stopped_early: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best_mean": self.best_mean if self.evaluations else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrainState":
        best = -math.inf if data["best_mean"] is None else data["best_mean"]
        return cls(**{**data, "best_mean": best, "window": Window(**data["window"])})

    @property
    def kept_steps(self) -> set[int]:
        """Steps whose bundles are worth keeping: the best by mean and the best of each task."""
        return {self.best_step, *(int(step) for step, _ in self.best_tasks.values())} if self.evaluations else set()

    def take_scores(self, scores: Scores) -> float:
        """Record an evaluation of the present step; return the mean score."""
        mean = sum(values["score"] for values in scores.values()) / len(scores)
        self.evaluations.append({"step": self.step, "mean": mean, "tasks": {t: dict(v) for t, v in scores.items()}})
        if mean > self.best_mean:
            self.best_mean, self.best_step = mean, self.step
        for task, values in scores.items():
            if task not in self.best_tasks or values["score"] > self.best_tasks[task][1]:
                self.best_tasks[task] = [self.step, values["score"]]
        return mean

    def evaluations_since_best(self) -> int:
        return sum(1 for evaluation in self.evaluations if evaluation["step"] > self.best_step)


class Reporter(Protocol):
    """Takes what the loop has to show. All processes call it at the same steps."""

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        """After every logged step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step."""

    def save(self, state: TrainState, model: PromptedModel, optim: Optim) -> None:
        """Keep everything, durably; returns when it is."""

    def last_good(self) -> str:
        """Name the newest bundle, for an error message."""


def fit(
    model: PromptedModel,
    batches: Batches,
    optim: Optim,
    *,
    tasks: Sequence[str],
    config: RunConfig,
    workers: Workers,
    evaluate: Callable[[], Scores],
    reporter: Reporter,
    state: TrainState,
) -> TrainState:
    """Train until train.max_steps or an early stop, from wherever `state` says.

    Raises TrainingError, with the weights of the last good step, as soon as a loss or gradient is not finite.
    """
    every = config.evaluate.steps
    save_every = config.train.save_steps or max(1, config.train.max_steps // 10)
    for task in tasks:
        state.examples_seen.setdefault(task, 0)
    routes = model.method.num_routes
    module = workers.start(model, num_totals=len(tasks) * (2 + routes))
    model.train()
    while state.step < config.train.max_steps and not state.stopped_early:
        started = time.perf_counter()
        batch = batches[state.step + 1]
        totals = _gradients(module, batch, len(tasks), routes, config, workers)
        norm = _step(optim, totals, batch, tasks, reporter)
        _record(state, batch, totals, tasks, time.perf_counter() - started)
        last = state.step == config.train.max_steps
        if state.step % config.train.logging_steps == 0 or last:
            _log(state, tasks, optim, norm, reporter)
        due = last or bool(every and state.step % every == 0)
        if due:
            _evaluate(state, evaluate(), config, reporter)
        if state.stopped_early and state.window.steps:
            _log(state, tasks, optim, norm, reporter)
        if due or state.step % save_every == 0:
            reporter.save(state, model, optim)
    return state


def _gradients(
    module: nn.Module, batch: GlobalBatch, num_tasks: int, routes: int, config: RunConfig, workers: Workers
) -> Tensor:
    """Compute this process's shards; return the global totals: per task the loss sum, its tokens, rows by route."""
    for number, shard in enumerate(batch.shards):
        torch.manual_seed(shard.seed)  # dropout and router noise belong to the shard, not to the process
        totals: Tensor | None = None
        for piece, cpu_batch in enumerate(shard.micro_batches):
            last = number == len(batch.shards) - 1 and piece == len(shard.micro_batches) - 1
            device = next(module.parameters()).device
            micro = cpu_batch.to(device)
            with workers.accumulating(module, last):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                    loss = module(micro.input_ids_BT, micro.mask_BT, micro.labels_BS, micro.task_B)
                objective = loss.total / batch.num_target_tokens
                (objective * workers.loss_scale).backward()
            part = _totals(loss, micro.task_B, num_tasks, routes)
            totals = part if totals is None else totals + part
        assert totals is not None
        workers.add_shard(totals)
    return workers.finish()


def _totals(loss: Any, task_B: Tensor, num_tasks: int, routes: int) -> Tensor:
    """Sum by task: negative log-likelihood, target tokens, and rows that took each route. Float64, flat."""
    table_KX = torch.zeros(num_tasks, 2 + routes, dtype=torch.float64, device=task_B.device)
    table_KX[:, 0].index_add_(0, task_B, loss.nll_B.double())
    table_KX[:, 1].index_add_(0, task_B, loss.tokens_B.double())
    if routes:
        table_KX[:, 2:].index_add_(0, task_B, nn.functional.one_hot(loss.aux["router/choice"], routes).double())
    return table_KX.reshape(-1)


def _step(optim: Optim, totals: Tensor, batch: GlobalBatch, tasks: Sequence[str], reporter: Reporter) -> float:
    """Step the optimizer, or end the run if the loss or the gradient is not finite."""
    loss = float(totals.view(len(tasks), -1)[:, 0].sum()) / batch.num_target_tokens
    norm = optim.step() if math.isfinite(loss) else math.nan
    if math.isfinite(norm):
        return norm
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    in_batch = ", ".join(f"{tasks[task]} ({rows} rows)" for task, rows in sorted(batch.task_rows.items()))
    raise NotFiniteError(
        f"{what} at step {batch.step}; tasks in the batch: {in_batch}; last good bundle: {reporter.last_good()}. "
        "Lower train.learning_rate, lengthen train.warmup_ratio, or set train.precision=fp32, and start a new run"
    )


def _record(state: TrainState, batch: GlobalBatch, totals: Tensor, tasks: Sequence[str], seconds: float) -> None:
    state.step = batch.step
    state.sequence = hashlib.sha256((state.sequence + batch.digest).encode()).hexdigest()
    state.train_seconds += seconds
    state.input_tokens += batch.num_input_tokens
    for task, rows in batch.task_rows.items():
        state.examples_seen[tasks[task]] = state.examples_seen.get(tasks[task], 0) + rows
    table = totals.view(len(tasks), -1)
    window = state.window
    nll, tokens, routes = table[:, 0].tolist(), table[:, 1].tolist(), table[:, 2:].reshape(-1).tolist()
    window.nll = [a + b for a, b in zip(window.nll or [0.0] * len(nll), nll, strict=True)]
    window.tokens = [a + b for a, b in zip(window.tokens or [0.0] * len(tokens), tokens, strict=True)]
    window.routes = [a + b for a, b in zip(window.routes or [0.0] * len(routes), routes, strict=True)]
    window.steps += 1
    window.rows += batch.num_rows
    window.input_tokens += batch.num_input_tokens
    window.seconds += seconds


def _log(state: TrainState, tasks: Sequence[str], optim: Optim, norm: float, reporter: Reporter) -> None:
    """Close the window: one point of the loss curve (the token-weighted mean since the last one) and its metrics."""
    window = state.window
    loss = sum(window.nll) / sum(window.tokens)
    state.loss_curve.append([state.step, loss])
    rate = window.rows / window.seconds
    values = {
        "train/loss": loss,
        "train/grad_norm": norm,
        "perf/examples_per_second": rate,
        "perf/tokens_per_second": window.input_tokens / window.seconds,
        "perf/step_seconds": window.seconds / window.steps,
        **{f"train/learning_rate/{group}": value for group, value in optim.learning_rates().items()},
    }
    num_routes = len(window.routes) // len(tasks)
    for index, task in enumerate(tasks):
        if window.tokens[index]:
            values[f"train/{task}/loss"] = window.nll[index] / window.tokens[index]
        values[f"train/{task}/examples"] = float(state.examples_seen.get(task, 0))
        taken = window.routes[index * num_routes : (index + 1) * num_routes]
        for route, rows in enumerate(taken):
            if sum(taken):
                values[f"router/{task}/load_{route}"] = rows / sum(taken)
    state.window = Window()
    reporter.log(state.step, values)
    reporter.progress(state.step, loss, rate)


def _evaluate(state: TrainState, scores: Scores, config: RunConfig, reporter: Reporter) -> None:
    mean = state.take_scores(scores)
    values = {f"eval/{task}/{metric}": v for task, found in scores.items() for metric, v in found.items()}
    reporter.log(state.step, {**values, "eval/mean": mean})
    patience = config.evaluate.early_stopping_patience
    state.stopped_early = patience is not None and state.evaluations_since_best() >= patience
