"""One training process: builds the model and data, finds the newest bundle, trains, and keeps what it earned.

The same code runs in-process and as a Ray Train worker; `announce` is how it tells whoever started it of a bundle.
"""

import errno
import json
import logging
import os
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyprompt import checkpoint, fingerprint, precision, retry, sharding
from polyprompt.batches import Batches
from polyprompt.config import RunConfig
from polyprompt.data import AnyData
from polyprompt.errors import ConfigError, PolypromptError, StoppedError, StorageError
from polyprompt.evaluate import evaluate
from polyprompt.loop import Scores, TrainState, fit
from polyprompt.model import PromptedModel
from polyprompt.optim import Optim
from polyprompt.pack import Seat
from polyprompt.plan import Load, build
from polyprompt.result import write_whole
from polyprompt.run_folder import BUNDLES, RUN
from polyprompt.stopping import STOP
from polyprompt.trackers import JsonlTracker, MlflowTracker, SystemMetrics, Tracker, Trackers
from polyprompt.tracking_opening import RunHandle
from polyprompt.workers import Workers

PROGRESS, METRICS, LOG = "progress.json", "metrics.jsonl", "run.log"
#: Which worker hung, left by one that waited for it.
HANG = "hang"
FLUSH_SECONDS, NOTE_SECONDS = 10.0, 10.0
Start = tuple[PromptedModel, Sequence[AnyData], Optim, Mapping[str, Any], TrainState, list[Any]]
Announce = Callable[[Mapping[str, float], Path], None]


@dataclass(frozen=True)
class Job:
    """What a process needs to train: nothing in it is heavier than text, so it travels anywhere."""

    config: RunConfig
    folder: Path
    handle: RunHandle | None
    commit: str = ""
    #: A file whose appearance ends the run.
    stop: Path | None = None
    #: As of plan.build.
    load: Load | None = None

    @property
    def bundles(self) -> Path:
        return self.folder / BUNDLES


@dataclass(frozen=True)
class Outcome:
    """What a finished process knows that the result needs."""

    state: TrainState
    peak_memory_bytes: int
    last_bundle: Path
    #: Ray workers at the end; 0: this process alone, without Ray.
    num_workers: int


class RunReporter:
    """Writes bundles and metrics of the first process; on the others only takes part in the announcement."""

    def __init__(
        self, job: Job, workers: Workers, tracker: Tracker, backbone: Mapping[str, Any], announce: Announce
    ) -> None:
        self.job = job
        self.workers = workers
        self.tracker = tracker
        self.flushed_at = time.monotonic()
        self.backbone = backbone
        self.announce = announce

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        if self.workers.first and self._folder_is_there():
            seen = {"step": step, "loss": loss, "examples_per_second": examples_per_second}
            with suppress(OSError):  # it is only looked at
                write_whole(self.job.folder / PROGRESS, json.dumps(seen).encode())
        self._obey()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(step, values)
        if time.monotonic() - self.flushed_at > FLUSH_SECONDS:
            with suppress(OSError):  # the lines are kept until the next bundle, which waits for the folder
                self._flush()

    def save(self, state: TrainState, model: PromptedModel, optim: Optim) -> None:
        folder = self.job.bundles / checkpoint.folder_name(state.step)
        fault = None
        whole = sharding.gather((model.trained_state(), optim.state_dict()), keep=self.workers.first)
        if self.workers.first:
            patience = self.job.config.compute.storage_timeout_seconds
            try:
                retry.until_written(
                    lambda: self._write(state, model, *whole), f"bundle {folder.name}", self.job.folder, patience
                )
            except StorageError as error:
                fault = StorageError(
                    f"{error}. Last good bundle: {self.last_good()}. Make room (fewer are kept with a lower train."
                    "save_total_limit) or bring the folder back, and start the same command again: it goes on"
                )
        # The others must end too, or they would wait for it for ever.
        for found in self.workers.gather(fault):
            if found is not None:
                raise found
        with self.workers.meeting():
            self.announce({"step": state.step, "loss": state.loss_curve[-1][1] if state.loss_curve else 0.0}, folder)
        if self.workers.stop and state.step < self.job.config.train.max_steps and not state.stopped_early:
            raise StoppedError(f"SIGTERM ended the run at step {state.step}; the same command goes on from {folder}")
        self._obey()

    def _write(
        self, state: TrainState, model: PromptedModel, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        if not self._folder_is_there():
            # Made anew, it would lie below the mount that is away.
            raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(self.job.folder))
        self._flush()
        kept = {} if model.fingerprint is None else {fingerprint.KEPT: model.fingerprint}
        checkpoint.write(
            self.job.bundles,
            step=state.step,
            tensors=tensors,
            optimizer=optimizer,
            state={"train": state.to_json(), "pending": self.tracker.pending(), **kept},
            config=self.job.config,
            backbone=self.backbone,
            commit=self.job.commit,
        )
        checkpoint.prune(self.job.bundles, state.kept_steps, self.job.config.train.save_total_limit)

    def _folder_is_there(self) -> bool:
        """The first process opened its log there as it started."""
        return (self.job.folder / LOG).is_file()

    def _obey(self) -> None:
        """End the run if it was told to stop; on all processes at once, whichever of them sees the file first."""
        if self.job.stop is not None and any(self.workers.gather(self.job.stop.exists())):
            raise StoppedError(f"{self.job.stop} asked the run to stop; last bundle: {self.last_good()}")

    def _flush(self) -> None:
        self.tracker.flush()
        self.flushed_at = time.monotonic()

    def last_good(self) -> str:
        found = checkpoint.newest_whole(self.job.bundles)
        return str(found) if found else "none yet"


def check_folder(job: Job) -> None:
    """Raise ConfigError on all processes, naming the machines, if one of them does not see the run's folder."""
    blind = None if (job.folder / RUN).is_file() else socket.gethostname()
    workers = Workers(job.config.train.num_shards, job.config.compute.summing)
    if machines := sorted({name for name in workers.gather(blind) if name is not None}):
        raise ConfigError(
            f"run folder {job.folder} is not there on {', '.join(machines)}, where the run has workers; bundles need "
            "a folder that all machines share (NFS, EFS …). Set compute.storage_path to one, or POLYPROMPT_HOME where "
            "Ray is started on the machine that jobs are submitted to"
        )


def train(job: Job, device: torch.device, announce: Announce, seat: Seat | None = None) -> Outcome:
    """Train to the end, from the newest whole bundle if there is one. All processes return the same state.

    announce: called on all processes with metrics and the folder of each new bundle. seat: the run's place in a pack.
    """
    config = job.config
    torch.set_num_threads(config.compute.cpus_per_worker)
    workers = Workers(config.train.num_shards, config.compute.summing, (job.folder / STOP).exists)
    with _log(job, workers, seat):
        return _train(job, device, workers, announce, seat)


def _train(job: Job, device: torch.device, workers: Workers, announce: Announce, seat: Seat | None) -> Outcome:
    config = job.config
    # A fault of one process (its disk, its cache) must end them all, or the others would wait for it for ever.
    start, error = None, None
    try:
        start = _start(job, device, workers, seat)
    except PolypromptError as found:
        error = found
    for fault in workers.gather(error):
        if fault is not None:
            raise fault
    assert start is not None
    model, data, optim, identity, state, pending = start
    with (
        _tracker(job, workers, state.step, pending) as tracker,
        workers.watched(config.compute.hang_timeout_seconds, partial(_end_of_a_hang, job)),
    ):
        fit(
            model,
            Batches(data, config, model.backbone.tokenizer.pad_token_id, workers.shards),
            optim,
            tasks=[task.task.name for task in data],
            config=config,
            workers=workers,
            evaluate=lambda: _evaluate(model, data, config, workers),
            reporter=RunReporter(job, workers, tracker, identity, announce),
            state=state,
            together=seat,
        )
    return Outcome(
        state=state,
        peak_memory_bytes=max(workers.gather(_peak_memory())),
        last_bundle=job.bundles / checkpoint.folder_name(state.step),
        num_workers=workers.num if config.compute.num_workers else 0,
    )


def _start(job: Job, device: torch.device, workers: Workers, seat: Seat | None) -> Start:
    """Build everything and put it where the newest whole bundle says."""
    precision.warn_of_emulation(job.config.train.precision, device)
    if job.config.backbone.compile:
        _check_compiler()
    bundle = checkpoint.newest(job.bundles)
    model, data = build(job.config, bundle, seat.pack.load if seat else job.load)
    identity = model.backbone.identity()  # of the weights before any training
    if job.config.compute.strategy == "fsdp":
        sharding.shard(model, job.config.train.precision, device, workers.num)
    else:
        model.to(device)
    if job.config.backbone.compile:
        model.backbone.compile_blocks()
    optim = Optim(job.config.train, model.named_groups(), model.undecayed())
    if bundle is None:
        return model, data, optim, identity, TrainState(), []
    optim.load_state_dict(bundle.optimizer())
    state = TrainState.from_json(bundle.state["train"])
    return model, data, optim, identity, state, bundle.state["pending"]


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"backbone.compile=true needs a C++ compiler, and {compiler} is not there on {socket.gethostname()}. "
            "Install g++, name another in the environment variable CXX, or set backbone.compile=false"
        )


def _evaluate(model: PromptedModel, data: Sequence[AnyData], config: RunConfig, workers: Workers) -> Scores:
    # What is compiled is compiled for training; caches that grow would ask for code of their own.
    eager = torch.compiler.set_stance("force_eager") if config.backbone.compile else nullcontext()
    # Under FSDP workers have different numbers of batches, and answers of different lengths.
    with eager, sharding.whole(model):
        return evaluate(model, data, config, workers)


def _end_of_a_hang(job: Job, said: str) -> None:
    """End this process, which waits inside torch and cannot be called back: whoever started it starts all anew."""
    too_late = threading.Timer(NOTE_SECONDS, os._exit, (1,))  # the folder may be what hangs
    too_late.daemon = True
    too_late.start()
    try:
        if not (job.folder / HANG).exists():  # whoever was first saw it best: now that one is missing too
            write_whole(job.folder / HANG, said.encode())
    finally:
        os._exit(1)


@contextmanager
def _log(job: Job, workers: Workers, seat: Seat | None) -> Iterator[None]:
    """The first process's messages go to run.log, which whoever started the run shows; it may be on another machine."""
    logger = logging.getLogger("polyprompt")
    handler = logging.FileHandler(job.folder / LOG) if workers.first else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if seat is not None:
        handler.addFilter(seat.hears)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _tracker(job: Job, workers: Workers, resumed_step: int, pending: Sequence[Mapping[str, Any]]) -> Iterator[Tracker]:
    """The first process's metrics go to metrics.jsonl and MLflow; the others' nowhere, for they are the same."""
    interval = job.config.tracking.system_metrics_interval_seconds
    with ExitStack() as stack:
        if not workers.first:
            yield Trackers()
            return
        jsonl = JsonlTracker(job.folder / METRICS, resumed_step=resumed_step)
        stack.callback(jsonl.close)
        if job.handle is None:
            yield jsonl
            return
        mlflow = MlflowTracker(job.handle, pending=pending, run_folder=job.folder)
        stack.callback(mlflow.close)
        if interval is not None:
            stack.enter_context(SystemMetrics(mlflow, node="rank0", interval_seconds=interval))
        yield Trackers(jsonl, mlflow)


def _peak_memory() -> int:
    """Peak bytes of this process: CUDA's where it is used, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
