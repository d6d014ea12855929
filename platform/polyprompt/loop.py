"""The training loop: accumulate, clip, step, and when to log, evaluate, save and stop.

Knows neither Ray nor MLflow nor ranks: `Workers` adds up gradients, a `Reporter` takes what is to be seen or kept.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from polyprompt import diagnosis, router_health
from polyprompt.batches import Batches, GlobalBatch
from polyprompt.collation import Batch
from polyprompt.config import RunConfig
from polyprompt.errors import NotFiniteError
from polyprompt.methods.base import MadeOnce
from polyprompt.model import Loss, PromptedModel
from polyprompt.optim import Optim
from polyprompt.precision import autocast
from polyprompt.workers import Workers

Scores = Mapping[str, Mapping[str, float]]
"""task → metric → value, with the task's own "score"."""


@dataclass
class Window:
    """What was seen since the last logged step. nll, tokens, penalty: sums by task index; routes: those of
    router_health, task by task. seconds: of training alone."""

    steps: int = 0
    nll: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
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
    router: router_health.Watch = field(default_factory=router_health.Watch)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best_mean": self.best_mean if self.evaluations else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrainState":
        best = -math.inf if data["best_mean"] is None else data["best_mean"]
        parts = {"window": Window(**data["window"]), "router": router_health.Watch(**data.get("router", {}))}
        return cls(**{**data, **parts, "best_mean": best})

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


class Together(Protocol):
    """Computes a run's micro-batches beside those of other runs."""

    def forward(self, model: PromptedModel, micro: Batch) -> Loss:
        """As of the model itself."""

    def backward(self, objective: Tensor) -> None:
        """Of what `forward` returned last."""


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
    together: Together | None = None,
) -> TrainState:
    """Train until train.max_steps or an early stop, from wherever `state` says. together: None: this run is alone.

    Raises NotFiniteError, with the weights of the last good step, as soon as a loss or gradient is not finite; it names
    the workers, tasks and examples that it came from.
    """
    every = config.evaluate.steps
    save_every = config.train.save_steps or max(1, config.train.max_steps // 10)
    for task in tasks:
        state.examples_seen.setdefault(task, 0)
    module = workers.start(model, num_totals=len(tasks) * (3 + router_health.num_columns(model.method.num_routes)))
    model.train()
    while state.step < config.train.max_steps and not state.stopped_early:
        started = time.perf_counter()
        batch = batches[state.step + 1]
        totals = _gradients(module, batch, len(tasks), config, workers, together)
        norm = _step(optim, totals, len(tasks))
        if math.isnan(norm):
            with workers.accumulating(module, last=False):
                found = diagnosis.find(module, batch, tasks, partial(_forward, module, batch=batch, config=config))
            raise NotFiniteError(diagnosis.explain(workers.gather(found), batch, tasks, reporter.last_good()))
        _record(state, batch, totals, tasks, time.perf_counter() - started)
        last = state.step == config.train.max_steps
        if state.step % config.train.logging_steps == 0 or last:
            _log(state, tasks, optim, norm, reporter)
        due = last or bool(every and state.step % every == 0)
        if due:
            _evaluate(state, evaluate(), config, reporter)
        if state.stopped_early and state.window.steps:
            _log(state, tasks, optim, norm, reporter)
        if due or state.step % save_every == 0 or workers.stop:
            reporter.save(state, model, optim)
    return state


def _gradients(
    module: Any,
    batch: GlobalBatch,
    num_tasks: int,
    config: RunConfig,
    workers: Workers,
    together: Together | None = None,
) -> Tensor:
    """Compute this process's shards; return the global totals (see `_totals`).

    Networks that make something of the task alone run forwards before the shards, on each process, and backwards
    behind the sum over all processes, on one: a row's loss knows what they made, not who made it.
    """
    with _made_once(module, batch, config) if workers.exact else nullcontext(MadeOnce()) as made:
        workers.begin(made.held)
        for number, shard in enumerate(batch.shards):
            torch.manual_seed(shard.seed)  # dropout and router noise belong to the shard, not to the process
            totals: Tensor | None = None
            for piece, micro in enumerate(shard.micro_batches):
                last = number == len(batch.shards) - 1 and piece == len(shard.micro_batches) - 1
                with workers.accumulating(module, last):
                    loss, objective = _forward(module, micro, batch, config, together)
                    objective = objective * workers.loss_scale
                    if together is None:
                        objective.backward()
                    else:
                        together.backward(objective)
                part = _totals(loss, micro.task_B.to(loss.nll_B.device), num_tasks)
                totals = part if totals is None else totals + part
            assert totals is not None
            workers.add_shard(totals)
    summed = workers.finish()
    if made.held:
        workers.by_the_first(made.backward, list(module.method.parameters()))
    return summed


@contextmanager
def _made_once(model: PromptedModel, batch: GlobalBatch, config: RunConfig) -> Iterator[MadeOnce]:
    """Let networks run once a step for all tasks of the global batch.

    Not under DDP and FSDP, which take parameters' gradients as they come in the last backward pass.
    """
    device = next(model.parameters()).device
    with ExitStack() as held:
        with autocast(config.train.precision, device.type):
            made = held.enter_context(model.made_once(torch.tensor(sorted(batch.task_rows), device=device)))
        yield made


def _forward(
    module: Any, micro: Batch, batch: GlobalBatch, config: RunConfig, together: Together | None = None
) -> tuple[Loss, Tensor]:
    """Return a micro-batch's loss, and what is to be minimised: its share of the global batch's."""
    device = next(module.parameters()).device
    micro = micro.to(device)
    with autocast(config.train.precision, device.type):
        loss = (
            module(micro.input_ids_BT, micro.mask_BT, micro.labels_BS, micro.task_B)
            if together is None
            else together.forward(module, micro)
        )
    return loss, _objective(loss, batch, config) + loss.penalty_B.sum() / batch.num_rows


def _objective(loss: Loss, batch: GlobalBatch, config: RunConfig) -> Tensor:
    """This micro-batch's share of the global batch's loss; the shares add up to it, however the batch is cut."""
    if config.train.loss_reduction == "token":
        return loss.total / batch.num_target_tokens
    return (loss.nll_B / loss.tokens_B).sum() / batch.num_rows


def _totals(loss: Loss, task_B: Tensor, num_tasks: int) -> Tensor:
    """Sum by task: negative log-likelihood, target tokens, penalty, and what router_health wants. Float64, flat."""
    columns_BX = torch.stack([loss.nll_B.detach(), loss.tokens_B, loss.penalty_B.detach()], dim=1).double()
    if "router/load" in loss.aux:
        columns_BX = torch.cat([columns_BX, router_health.rows(loss.aux)], dim=1)
    table_KX = columns_BX.new_zeros(num_tasks, columns_BX.shape[1])
    return table_KX.index_add_(0, task_B, columns_BX).reshape(-1)


def _step(optim: Optim, totals: Tensor, num_tasks: int) -> float:
    """Step the optimizer and return the gradient's norm. Nothing moves if the norm or the loss is not finite: NaN."""
    loss = float(totals.view(num_tasks, -1)[:, 0].sum())
    norm = optim.step() if math.isfinite(loss) else math.nan
    return norm if math.isfinite(norm) else math.nan


def _record(state: TrainState, batch: GlobalBatch, totals: Tensor, tasks: Sequence[str], seconds: float) -> None:
    state.step = batch.step
    state.sequence = hashlib.sha256((state.sequence + batch.digest).encode()).hexdigest()
    state.train_seconds += seconds
    state.input_tokens += batch.num_input_tokens
    for task, rows in batch.task_rows.items():
        state.examples_seen[tasks[task]] = state.examples_seen.get(tasks[task], 0) + rows
    table = totals.view(len(tasks), -1)
    window = state.window
    nll, tokens, penalty, routes = *table[:, :3].T.tolist(), table[:, 3:].reshape(-1).tolist()
    window.nll = [a + b for a, b in zip(window.nll or [0.0] * len(nll), nll, strict=True)]
    window.tokens = [a + b for a, b in zip(window.tokens or [0.0] * len(tokens), tokens, strict=True)]
    window.penalty = [a + b for a, b in zip(window.penalty or [0.0] * len(penalty), penalty, strict=True)]
    window.routes = [a + b for a, b in zip(window.routes or [0.0] * len(routes), routes, strict=True)]
    if routes:
        state.router.take(state.step, router_health.shares(table[:, 3:].sum(dim=0)))
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
    if any(window.penalty):
        values["train/penalty"] = sum(window.penalty) / window.rows
    num_columns = len(window.routes) // len(tasks)
    if num_columns:
        values["router/collapsed"] = float(bool(state.router.collapse))
    for index, task in enumerate(tasks):
        if window.tokens[index]:
            values[f"train/{task}/loss"] = window.nll[index] / window.tokens[index]
        values[f"train/{task}/examples"] = float(state.examples_seen.get(task, 0))
        if num_columns:
            health = router_health.metrics(window.routes[index * num_columns : (index + 1) * num_columns])
            values |= {f"router/{task}/{name}": value for name, value in health.items()}
    state.window = Window()
    reporter.log(state.step, values)
    reporter.progress(state.step, loss, rate)


def _evaluate(state: TrainState, scores: Scores, config: RunConfig, reporter: Reporter) -> None:
    mean = state.take_scores(scores)
    values = {f"eval/{task}/{metric}": v for task, found in scores.items() for metric, v in found.items()}
    reporter.log(state.step, {**values, "eval/mean": mean})
    patience = config.evaluate.early_stopping_patience
    state.stopped_early = patience is not None and state.evaluations_since_best() >= patience
