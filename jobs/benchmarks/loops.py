"""The loops in which a case computes its batches, each behind a meter."""

import multiprocessing
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.cases import Case
from benchmarks.meter import Meter, mixed_precision
from benchmarks.rows import Own, choices_of, micro_batches
from benchmarks.setting import Setting
from benchmarks.subjects import Subject, build
from polyprompt import tracking
from polyprompt.evaluate import evaluate
from polyprompt.loop import Reporter, Scores, TrainState, fit
from polyprompt.model import PromptedModel
from polyprompt.optim import Optim
from polyprompt.pack import Seat
from polyprompt.trackers import JsonlTracker, MlflowTracker, SystemMetrics, Trackers
from polyprompt.worker import LOG, METRICS, Job, RunReporter
from polyprompt.workers import Workers

#: New tokens of a generated answer, at most.
NEW_TOKENS = 8


class MeteredOptim(Optim):
    """An optimizer with something to do before and behind each step."""

    behind: Callable[[], None]
    before: Callable[[], None]

    def step(self) -> float:
        self.before()
        norm = super().step()
        self.behind()
        return norm


class Losses:
    """A reporter that keeps nothing but the losses."""

    def __init__(self, into: list[float]) -> None:
        self.into = into

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        self.into.append(loss)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def save(self, state: TrainState, model: PromptedModel, optim: Optim) -> None:
        raise AssertionError("an endless run saves nothing")

    def last_good(self) -> str:
        return "none"


def bare(subject: Subject, meter: Meter) -> None:
    """Forward, backward, clip, step, on batches that were made before."""
    config, parameters = subject.config, subject.trained
    train = config.train
    numbers = range(1, subject.batches.number + 1)
    made = [(batch := subject.batches[n], [m.to(meter.device) for m in micro_batches(batch)]) for n in numbers]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), weight_decay=0.0, fused=True
    )
    losses = meter.losses.setdefault(0, [])
    subject.module.train()
    meter.begin()
    while True:
        for batch, micros in made:
            total = torch.zeros((), device=meter.device)
            for shard, micro in zip(batch.shards, micros, strict=True):
                torch.manual_seed(shard.seed)
                with mixed_precision(meter.device, train.precision):
                    loss = subject.loss(micro) / batch.num_target_tokens
                loss.backward()
                total += loss.detach()
            if train.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            meter.before_optimizer()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(total))
            meter.arrived()


def fitted(
    subject: Subject,
    optim: MeteredOptim,
    reporter: Reporter,
    seat: Seat | None = None,
) -> None:
    """polyprompt's own loop, which makes its batches as it goes."""
    model, config = subject.model, subject.config
    assert model is not None
    workers = Workers(config.train.num_shards, config.compute.gradient_sum)
    fit(
        model,
        Own(subject.batches, workers.shards),  # type: ignore[arg-type]  # it asks for batches by number, no more
        optim,
        tasks=config.task_names,
        config=config,
        workers=workers,
        evaluate=_never,
        reporter=reporter,
        state=TrainState(),
        together=seat,
    )


def clocked(subject: Subject, meter: Meter, reporter: Reporter | None = None) -> None:
    """The same behind a meter. reporter: None: one that keeps the losses."""
    optim = metered(subject, meter.before_optimizer, meter.arrived)
    meter.begin()
    fitted(subject, optim, reporter or Losses(meter.losses.setdefault(0, [])))


def shared(case: Case, subject: Subject, setting: Setting, meter: Meter) -> None:
    """The same in several processes that share the global batch, as Ray's workers do; this one is the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    peers = [
        context.Process(target=_peer, args=(case, setting, rank, address), daemon=True)
        for rank in range(1, case.workers)
    ]
    for peer in peers:
        peer.start()
    try:
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=case.workers)

        def behind() -> None:
            meter.arrived()
            dist.barrier()

        optim = metered(subject, meter.before_optimizer, behind)
        meter.begin()
        fitted(subject, optim, Losses(meter.losses.setdefault(0, [])))
    finally:
        for peer in peers:
            peer.kill()
            peer.join()


def _peer(case: Case, setting: Setting, rank: int, address: str) -> None:
    torch.set_num_threads(case.threads or setting.threads)
    subject = build(case, setting)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=case.workers)
    # It waits behind each step until the first worker goes on, so that it computes nothing in another case's turn.
    fitted(subject, metered(subject, nothing, dist.barrier), Losses([]))


def metered(subject: Subject, before: Callable[[], None], behind: Callable[[], None]) -> MeteredOptim:
    assert subject.model is not None
    optim = MeteredOptim(subject.config.train, subject.model.named_groups(), subject.model.undecayed())
    optim.before, optim.behind = before, behind
    return optim


def nothing() -> None:
    """Where only another's steps are watched."""


def _never() -> Scores:
    raise AssertionError("an endless run evaluates nothing")


def tracked(subject: Subject, meter: Meter, folder: Path) -> None:
    """The loop with all that a run records at its steps: metrics to a file and to MLflow, progress, system metrics."""
    assert subject.model is not None
    config = subject.config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).touch()
    handle = tracking.open_run(config, name="benchmark", tags={}, datasets=[])
    job = Job(config=config, folder=folder, handle=handle, stop=folder / "stop")
    jsonl, mlflow = JsonlTracker(folder / METRICS), MlflowTracker(handle, run_folder=folder)
    workers = Workers(config.train.num_shards, config.compute.gradient_sum)
    reporter = RunReporter(job, workers, Trackers(jsonl, mlflow), {}, lambda metrics, bundle: None)
    interval = config.tracking.system_metrics_interval_seconds
    assert interval is not None
    try:
        with SystemMetrics(mlflow, node="rank0", interval_seconds=interval):
            clocked(subject, meter, reporter)
    finally:
        jsonl.close()
        mlflow.close()


@torch.inference_mode()
def inference(case: Case, subject: Subject, meter: Meter) -> None:
    """Predict the batches, over and over: the loss, the choices' likelihoods, or greedy answers."""
    model = subject.module.eval()
    batch = subject.batches[1]
    micros = [micro.to(meter.device) for micro in micro_batches(batch)]
    choices = choices_of(batch, subject.data)
    meter.begin()
    while True:
        with mixed_precision(meter.device, case.precision):
            for micro, own in zip(micros, choices, strict=True):
                inputs = (micro.input_ids_BT, micro.mask_BT, micro.task_B)
                if case.kind == "forward":
                    subject.loss(micro)
                elif case.kind == "rank":
                    model.score_choices(*inputs, own)
                else:
                    model.generate(*inputs, max_new_tokens=NEW_TOKENS)
        meter.arrived()


def evaluation(case: Case, subject: Subject, meter: Meter) -> None:
    """polyprompt's evaluation of the validation rows; a step is the whole of it."""
    assert subject.model is not None
    assert subject.data is not None
    mode = case.kind.removeprefix("evaluate_")
    own = subject.config.evaluate.model_copy(update={"mode": mode})
    config = subject.config.model_copy(update={"evaluate": own})
    workers = Workers(1, "exact")
    meter.begin()
    while True:
        scores = evaluate(subject.model, subject.data, config, workers)
        meter.facts["score"] = sum(task["score"] for task in scores.values()) / len(scores)
        meter.arrived()


def gemm(case: Case, shapes: Sequence[tuple[int, int, int]], meter: Meter) -> None:
    """The matrix products alone, as a linear layer does them. Rates: the best of the shapes, operations a second."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    pairs = [
        (torch.randn(m, k, device=meter.device, dtype=dtype), torch.randn(n, k, device=meter.device, dtype=dtype))
        for m, k, n in shapes
    ]
    meter.begin()
    while True:
        best = 0.0
        for a_MK, b_NK in pairs:
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                nn.functional.linear(a_MK, b_NK)
                if meter.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            best = max(best, 2 * a_MK.numel() * len(b_NK) / sorted(seconds)[2])
        meter.rates.append(best)
        meter.arrived()
