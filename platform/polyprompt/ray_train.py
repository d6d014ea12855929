"""run(RunConfig) → RunResult: checks, starts the workers with Ray Train, survives their deaths, and records the run.

The only file that imports ray.train. How Ray is used and why (each was seen to bite):

- Our own bundles decide where a run goes on. Ray's run name is fresh at every start, and no checkpoint is reported to
  it, so Ray never resumes by itself.
- Ray starts workers once; lost ones are started again from here (`_train_with_ray`), after a pause, a bounded number of
  times, saying why. Ray itself restarts at once and in silence, and not at all if its controller is what died.
- `ray.train.report` is a barrier that takes one poll of the controller: the poll is set from 2 s to 0.1 s.
- The package travels to the workers as py_modules, so it need not be installed there.
- An error of ours (bad data, NaN) would be retried by Ray like a lost node; it is returned, not raised, and ends it.
- So would a mistake in code, and what does not fit into memory (LASTING): the worker leaves a note in the run folder
  and fails, which ends the others, who may be waiting for it; the note ends the run.
- Ray's own chatter stays in Ray's log files; what our workers have to say is in run.log and shown from there.
- Every path is absolute, because Ray changes the workers' working folder.
- What passes through Ray's controller (the job, the outcome) passes as bytes or by reference: unpickled there, it
  would import all of transformers, while the workers wait (9 of 17 CPU seconds of a start, and again at the end).
"""

import logging
import math
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import polyprompt
from polyprompt import checkpoint, placement, progress, recording, retry, run_folder, run_note, tracking
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError, LostWorkersError, PolypromptError, StoppedError, StorageError, TrainingError
from polyprompt.pack import Seat
from polyprompt.plan import Load, Plan, plan
from polyprompt.result import RunResult, write_whole
from polyprompt.router_health import describe
from polyprompt.run_folder import RunFolder
from polyprompt.stopping import STOP, on_sigterm
from polyprompt.study_tracking import PARENT
from polyprompt.worker import HANG, Job, Outcome, check_folder, train

PLACEMENT = "placement_group"
#: Why no restart can help, left by the worker that failed.
FATAL = "fatal"
LASTING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
    torch.OutOfMemoryError,
)


def run(
    config: RunConfig,
    *,
    out: Path | None = None,
    say: Callable[[str], None] = print,
    stop: Path | None = None,
    tags: Mapping[str, str] | None = None,
    seat: Seat | None = None,
    load: Load | None = None,
) -> RunResult:
    """Train one model on many tasks and leave a complete record of it.

    out: folder for result.json, tables and plots (None: runs/<name>). say: takes lines for the user. stop: a file whose
    appearance ends the run at its next logged step or bundle. tags: further tags of the tracking run. seat: the run's
    place among others that share its backbone, held by this thread. load: in place of backbone.load, in every
    process of the run.
    A run that was stopped goes on from its newest bundle; a finished one is returned as it is.
    Raises ConfigError, DataError, BundleError or TrackingError before training, TrainingError or StoppedError from it.
    """
    if seat is not None:
        seat.check(config)
    place = run_folder.choose(config, out)
    run_folder.check(place, config)
    if place.result.exists():
        say(f"Run {place.name} in {place.folder} has finished; this is its result. Another --out starts a new run.")
        return RunResult.read(place.result)
    if config.compute.use_gpu and config.compute.num_workers == 0 and not torch.cuda.is_available():
        raise ConfigError("compute.use_gpu=true, but torch sees no GPU here; set compute.use_gpu=false")
    checked = plan(config, checkpoint.newest(place.bundles), seat.pack.load if seat else load)
    with run_folder.claim(place):
        result = _run(config, place, checked, say, stop, tags or {}, seat, load)
    # A search registers its best run itself.
    if config.tracking.register_model and PARENT not in (tags or {}):
        recording.register(config, place, say)
    return result


def _run(
    config: RunConfig,
    place: RunFolder,
    checked: Plan,
    say: Callable[[str], None],
    stop: Path | None,
    tags: Mapping[str, str],
    seat: Seat | None,
    load: Load | None,
) -> RunResult:
    digests = {task.task.name: task.digest for task in checked.data}
    rows = {task.task.name: task.rows_digest for task in checked.data}
    run_folder.check_data(place, digests)
    newest = checkpoint.newest_whole(place.bundles)
    if newest is not None:
        say(f"Run {place.name} goes on from {newest}")
    # Recorded before the tracking store is asked, so that a start which fails there can be repeated.
    run_id = place.record().get("run_id", "")
    place.write_record(config, digests, run_id, rows)
    note, commit = run_note.opening(config, checked, place), checkpoint.git_commit()
    handle = recording.open_tracking(config, checked, run_id, commit, {run_note.NOTE: note, **tags})
    if handle is not None:
        place.write_record(config, digests, handle.run_id, rows)
    (place.out / "config.yaml").write_text(config.to_yaml())
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    closing: dict[str, float] = {}
    flags: dict[str, str] = {}
    try:
        job = Job(config=config, folder=place.folder, handle=handle, commit=commit, stop=stop, load=load)
        where = f"{config.compute.workers} Ray workers" if config.compute.num_workers else "this process"
        say(f"Run {place.name}: {config.method.name} on {config.backbone.name}, {len(config.tasks)} tasks, in {where}")
        with progress.show(place, config.train.max_steps), on_sigterm(place.folder) as listen:
            outcome = _train_with_ray(job, say, listen) if config.compute.num_workers else _train_here(job, seat)
        result = recording.result_of(config, place, checked, outcome, handle)
        try:
            recording.leave(result, place, handle)
        except OSError as error:
            raise StorageError(
                f"the run has been trained, but its results cannot be written to {place.out}: {error}. Make room there "
                "and start the same command again: it goes on from the last bundle"
            ) from error
        if handle is not None:
            recording.log_checkpoints(config, place, checked, outcome, handle)
        status = "FINISHED"
        closing = {"eval/best_mean": result.mean, **run_note.costs(result)}
        flags = {run_note.NOTE: run_note.closing(note, result)}
        if result.router_collapse:
            flags |= {"router.collapsed": describe(result.router_collapse)}
        return result
    except (KeyboardInterrupt, StoppedError):
        status = "KILLED"
        raise
    finally:
        if handle is not None:
            tracking.finish(handle, status, step=config.train.max_steps, metrics=closing, tags=flags)


def _train_here(job: Job, seat: Seat | None) -> Outcome:
    device = torch.device("cuda" if job.config.compute.use_gpu else "cpu")
    return train(job, device, lambda metrics, bundle: None, seat)


def _train_with_ray(job: Job, say: Callable[[str], None], listen: Callable[[], None]) -> Outcome:
    compute = job.config.compute
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    with cluster(compute.most_workers * compute.cpus_per_worker):
        listen()
        gpus = compute.fewest_workers * compute.gpus_per_worker
        if compute.use_gpu and not os.environ.get("RAY_ADDRESS") and ray.cluster_resources().get("GPU", 0) < gpus:
            raise ConfigError(
                f"compute.num_workers={compute.fewest_workers} workers of {compute.gpus_per_worker:g} GPUs need "
                f"{gpus:g}, this machine has {ray.cluster_resources().get('GPU', 0):g}. Lower compute.num_workers or "
                "compute.gpus_per_worker, set compute.use_gpu=false, or set RAY_ADDRESS to a cluster"
            )
        room = placement.Room(compute, machines(), growth())
        if not room.fits:
            say(f"Waiting for room. {room.text}")
        pauses = retry.pauses()
        for start in range(1, compute.max_failures + 2):
            try:
                answer = _start_workers(job)
                break
            except LostWorkersError as error:
                if start > compute.max_failures:
                    raise LostWorkersError(
                        f"the workers failed {start} times, at last with: {error}. Bundles in {job.bundles} are kept: "
                        "mend the cause and start the same command again to go on"
                    ) from error
                pause = next(pauses)
                newest = checkpoint.newest_whole(job.bundles)
                say(
                    f"The workers were lost: {error}. They start again in {pause:g} s ({start} of "
                    f"{compute.max_failures}: compute.max_failures) from {newest or 'the beginning'}"
                )
                time.sleep(pause)
            if (job.folder / STOP).exists():
                raise StoppedError("SIGTERM ended the run while its workers were lost; the same command goes on")
    if isinstance(answer, PolypromptError):
        raise answer
    assert isinstance(answer, Outcome)
    return answer


def _start_workers(job: Job) -> object:
    """Start the workers once and return what they return. Raises LostWorkersError, or TrainingError for good."""
    # Imported here because importing Ray Train takes seconds that an in-process run need not pay.
    from ray.exceptions import RayError
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    compute = job.config.compute
    # NCCL refuses two ranks on one GPU.
    backend = "nccl" if compute.use_gpu and compute.gpus_per_worker >= 1 else "gloo"
    storage = job.folder / "ray"
    release(job.folder)
    handler = signal.getsignal(signal.SIGINT)
    try:
        for left in (FATAL, HANG):
            (job.folder / left).unlink(missing_ok=True)
        trainer = TorchTrainer(
            partial(_on_worker, job),  # type: ignore[arg-type]
            # A hang is named before torch's own time-out ends it without a name.
            torch_config=TorchConfig(backend=backend, timeout_s=math.ceil(2 * compute.hang_timeout_seconds) + 60),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=compute.num_workers,  # type: ignore[arg-type]
                elastic_resize_monitor_interval_s=compute.resize_interval_seconds,
                use_gpu=compute.use_gpu,
                resources_per_worker=placement.worker(compute),
            ),
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=5),  # type: ignore[call-arg]
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        return pickle.loads(trainer.fit().return_value)  # type: ignore[attr-defined]
    except SystemExit:  # what Ray Train makes of Ctrl-C
        raise KeyboardInterrupt from None
    except (TrainingFailedError, RayError, OSError) as error:
        if (job.folder / FATAL).exists():
            raise TrainingError((job.folder / FATAL).read_text()) from error
        hang = job.folder / HANG
        raise LostWorkersError(hang.read_text() if hang.exists() else _cause(error)) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray Train puts none
            signal.signal(signal.SIGINT, handler)  # Ray Train puts its own and leaves it
        shutil.rmtree(storage, ignore_errors=True)  # nothing of ours
        release(job.folder)  # a controller that died has left them reserved
        for left in (PLACEMENT, FATAL, HANG):
            (job.folder / left).unlink(missing_ok=True)


def _on_worker(job: Job) -> bytes:
    """One Ray Train worker. Returns an Outcome or a PolypromptError, pickled."""
    import ray.train
    from ray.train.torch import get_device

    first = ray.train.get_context().get_world_rank() == 0
    group = ray.util.get_current_placement_group()
    if first and group is not None and job.folder.is_dir():
        write_whole(job.folder / PLACEMENT, group.id.hex().encode())

    def announce(metrics: Mapping[str, float], bundle: Path) -> None:
        ray.train.report(dict(metrics))

    try:
        check_folder(job)
        return pickle.dumps(train(job, get_device(), announce))
    except PolypromptError as error:
        return pickle.dumps(error)
    except LASTING as error:
        if not torch.distributed.is_initialized():
            raise  # Ray ends this worker, for the sake of one that died, and torch.distributed complains
        at = traceback.extract_tb(error.__traceback__)[-1]
        note = (
            f"a worker failed in a way that a restart cannot mend: {type(error).__name__}: {error} ({at.filename}:"
            f"{at.lineno}). Bundles in {job.bundles} are kept: mend the cause and start the same command again to go on"
        )
        write_whole(job.folder / FATAL, note.encode())
        raise


def release(folder: Path) -> None:
    """Free the workers' places on the cluster that a killed run in this folder left reserved.

    Ray Train's own cleaner finds out through the dashboard, and never where there is none: the next run would wait for
    those CPUs for ever. The caller must know that the run is dead.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    file = folder / PLACEMENT
    if not file.is_file() or not ray.is_initialized():
        return
    group = PlacementGroup(PlacementGroupID(bytes.fromhex(file.read_text())))
    # A group of another cluster is not known in this one.
    if placement_group_table(group).get("state") not in (None, "REMOVED"):
        remove_placement_group(group)
    file.unlink(missing_ok=True)


@contextmanager
def cluster(num_cpus: int, py_modules: Sequence[Path] = (), *, shared_bytes: int = 0) -> Iterator[None]:
    """Join the cluster of $RAY_ADDRESS, or the one this process is in, or start one on this machine and end it.

    num_cpus: that one started here has at least. py_modules: packages that the workers need beside this one.
    shared_bytes: what its object store has room for beside the little that passes through it.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    package = Path(polyprompt.__file__).parent
    shipped = [*(() if "site-packages" in package.parts else (package,)), *py_modules]
    environment: dict[str, Any] = {"py_modules": [str(path) for path in shipped]} if shipped else {}
    if address := os.environ.get("RAY_ADDRESS"):
        if "://" not in address and ":" in address:  # Ray Train's cleaner asks for the cluster by this variable
            environment["env_vars"] = {"RAY_ADDRESS": address}
        ray.init(runtime_env=environment, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=100 * 2**20 + shared_bytes,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def machines() -> list[placement.Node]:
    """Return the resources of each machine of the cluster: the one of $RAY_ADDRESS, the one this process is in, or this
    machine, on which none is started for that."""
    import ray

    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]
    with cluster(0):
        return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def growth() -> list[placement.Group]:
    """Return what the cluster's autoscaler may add, as far as it has said; this process must be in the cluster."""
    from ray._private.state import state

    told = state.get_cluster_config()
    groups = told.node_group_configs if told is not None else ()
    return [placement.Group(group.name, dict(group.resources), group.max_count) for group in groups]


def where(config: RunConfig) -> str:
    """Say how many workers of which size a run asks for, and what the cluster has and may get for them."""
    if config.compute.num_workers == 0:
        return "none, it trains in this process"
    if not os.environ.get("RAY_ADDRESS"):
        # The Ray that a run starts on this machine has as many CPUs as are asked for.
        cpus = max(os.cpu_count() or 1, config.compute.most_workers * config.compute.cpus_per_worker)
        here = {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}
        return placement.Room(config.compute, [here], ()).text
    with cluster(0):
        return placement.Room(config.compute, machines(), growth()).text


def _cause(error: BaseException) -> str:
    """The last line of each lost worker's error, or of this one: Ray fills them with tracebacks."""
    failures = getattr(error, "worker_failures", {})
    return "; ".join(f"worker {rank}: {_last(e)}" for rank, e in sorted(failures.items())) or _last(error)


def _last(error: BaseException) -> str:
    # Of a worker that Ray could not ask, what it says is only who did not answer.
    error = getattr(error, "health_check_failure", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
