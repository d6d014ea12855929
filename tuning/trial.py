"""One trial: its runs, one for each seed, and what its folder says about it.

    DIR/trials/<number>/trial.json      number, params and their changes, written before it starts and at each change
    DIR/trials/<number>/seed_<seed>/    one training run: a run folder like any other
    DIR/trials/<number>/generation_<n>/seed_<seed>/    the run after the nth change
    DIR/trials/<number>/ended.json      there once it was stopped by the scheduler, or failed
    DIR/trials/<number>/stop            there while its runs are told to stop; a link to the bundle that it pauses at

A run is its folder: started again it goes on from its newest bundle, and a finished one gives its result.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyprompt import checkpoint, run_folder, study_tracking
from polyprompt.config import RunConfig
from polyprompt.errors import (
    BundleError,
    ConfigError,
    DataError,
    NotFiniteError,
    StoppedError,
    TrackingError,
    TrainingError,
)
from polyprompt.result import RunResult, write_whole
from polyprompt.trackers import UNSENT_FILE
from polyprompt.tracking import RunHandle
from tuning.spaces import Params, configure
from tuning.study import Change, SeedRun, State, Trial

STEP = "step"
#: Tag of a trial's tracking run: the params that change on the way.
CHANGING = "polyprompt.changing"
POLL_SECONDS = 0.2
Values = dict[str, float]
Report = Callable[[int, Values], None]
"""Takes a step, which grows over all seeds of a trial, and the scores of that step."""


@dataclass(frozen=True)
class Ended:
    """Why a trial ended without a result. passing: the cause may be gone at the next try."""

    state: Literal["stopped", "failed"]
    cause: str
    passing: bool = False


class PausedError(Exception):
    """A trial's work has come to the step that it was to pause at. values: its step and score."""

    def __init__(self, values: Values) -> None:
        super().__init__(f"paused at step {values[STEP]:.0f}")
        self.values = values


@dataclass(frozen=True)
class Trials:
    """The folders of a study's trials, and how each becomes a run. base: the run recipe's table. score: the metric that
    is reported on the way."""

    folder: Path
    study: str
    base: Mapping[str, Any]
    seeds: Sequence[int]
    score: str

    def of(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def stop_file(self, number: int) -> Path:
        return self.of(number) / "stop"

    def changes(self, number: int) -> list[Change]:
        """Return the changes of its params on the way, in order."""
        file = self.of(number) / "trial.json"
        table = json.loads(file.read_text()) if file.is_file() else {}
        return [Change(**change) for change in table.get("changes", [])]

    def out(self, number: int, seed: int, generation: int | None = None) -> Path:
        """generation: None: the present one."""
        generation = len(self.changes(number)) if generation is None else generation
        folder = self.of(number) / f"generation_{generation}" if generation else self.of(number)
        return folder / f"seed_{seed}"

    def config(self, number: int, params: Params, seed: int, generation: int | None = None) -> RunConfig:
        generation = len(self.changes(number)) if generation is None else generation
        name = f"{self.study}-{number:04d}" + (f"-seed_{seed}" if len(self.seeds) > 1 else "")
        name += f"-generation_{generation}" if generation else ""
        return configure(self.base, params, seed=seed, name=name)

    def place(self, number: int, params: Params, seed: int, generation: int | None = None) -> run_folder.RunFolder:
        return run_folder.choose(self.config(number, params, seed, generation), self.out(number, seed, generation))

    def begin(self, number: int, params: Params) -> None:
        """Record a trial before it starts, and take back what an earlier start told its runs."""
        self.of(number).mkdir(parents=True, exist_ok=True)
        self._record(number, params, self.changes(number))
        self.stop_file(number).unlink(missing_ok=True)
        (self.of(number) / "ended.json").unlink(missing_ok=True)

    def _record(self, number: int, params: Params, changes: Sequence[Change]) -> None:
        table = {"number": number, "params": params, "changes": [vars(change) for change in changes]}
        write_whole(self.of(number) / "trial.json", json.dumps(table).encode())

    def tell_to_stop(self, number: int) -> None:
        write_whole(self.stop_file(number), b"")

    def pause_at(self, number: int, bundle: Path | None) -> None:
        """Let the trial's run end once this bundle is there, unless it was told to stop. None: run to the end."""
        stop = self.stop_file(number)
        if stop.exists() and not stop.is_symlink():
            return
        stop.unlink(missing_ok=True)
        if bundle is not None:
            stop.symlink_to(bundle)

    def clone(self, number: int, source: int, params: Params) -> Change:
        """Let a trial go on from another's newest bundle with these params. Neither may be at work now.

        It gets a run folder of its own, whose tracking run is the trial's as before; the old one stays, without its
        bundles. Whole or not at all: what counts is trial.json. Raises BundleError or OSError.
        """
        [seed] = self.seeds
        recorded, changes = self.recorded(), self.changes(number)
        generation = len(changes) + 1
        config = self.config(number, params, seed, generation)
        old, new = self.place(number, recorded[number], seed), self.place(number, params, seed, generation)
        for left in {new.folder, new.out}:  # of a start that was cut off here
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir(parents=True)
        step = _copy_bundles(self.place(source, recorded[source], seed).bundles, new.bundles, config)
        new.write_record(config, old.record()["data"], old.record()["run_id"])
        if (old.folder / UNSENT_FILE).is_file():
            shutil.copy(old.folder / UNSENT_FILE, new.folder)
        changed = {key: value for key, value in recorded[number].items() if params[key] != value}
        change = Change(step, source, changed, {key: params[key] for key in changed})
        self._record(number, params, [*changes, change])
        shutil.rmtree(old.bundles, ignore_errors=True)
        return change

    def end(self, number: int, ended: Ended) -> None:
        write_whole(self.of(number) / "ended.json", json.dumps(vars(ended)).encode())

    def ended(self, number: int) -> Ended | None:
        file = self.of(number) / "ended.json"
        return Ended(**json.loads(file.read_text())) if file.is_file() else None

    def recorded(self) -> dict[int, Params]:
        """Return number → params of all trials that were ever begun."""
        tables = [json.loads(file.read_text()) for file in sorted(self.folder.glob("*/trial.json"))]
        return {table["number"]: table["params"] for table in tables}

    def read(self, number: int, params: Params, *, live: bool) -> Trial:
        """Read what the folders say. live: its process is at work now."""
        ended = self.ended(number)
        runs = [self._read_run(number, params, seed, live, ended) for seed in self.seeds]
        return Trial(number, dict(params), runs, self.changes(number))

    def _read_run(self, number: int, params: Params, seed: int, live: bool, ended: Ended | None) -> SeedRun:
        place = self.place(number, params, seed)
        run_id = str(place.record().get("run_id", ""))
        if place.result.is_file():
            return finished(RunResult.read(place.result), seed, self.score, place.folder)
        begun = bool(place.record())
        earlier = self.seeds[: list(self.seeds).index(seed)]
        # Seeds run in turn: the trial's end is the end of the first one without a result.
        turn = all(self.place(number, params, other).result.is_file() for other in earlier)
        state: State = "running" if live and (begun or turn) else "waiting"
        cause = ""
        if ended is not None and not live and turn:
            state, cause = ended.state, ended.cause
        train = newest_state(place)
        evaluations = train.get("evaluations", [])
        return SeedRun(
            seed=seed,
            run_id=run_id,
            state=state,
            cause=cause,
            num_steps=train.get("step", 0),
            seconds=train.get("train_seconds", 0.0),
            metrics=scores(evaluations[-1]) if evaluations else {},
            curve=[(e["step"], scores(e)[self.score]) for e in evaluations],
            folder=str(place.folder),
        )


def finished(result: RunResult, seed: int, score: str, folder: Path) -> SeedRun:
    """Return the record of a finished run."""
    return SeedRun(
        seed=seed,
        run_id=result.run_id,
        state="finished",
        num_steps=result.num_steps,
        seconds=result.train_seconds,
        metrics=metrics(result),
        curve=[(e["step"], scores(e)[score]) for e in result.evaluations],
        folder=str(folder),
    )


def metrics(result: RunResult) -> Values:
    """Return all that can be an objective."""
    return {
        **scores({"mean": result.mean, "tasks": result.eval}),
        "num_trained_parameters": float(result.num_trained_parameters),
        "inference_flops": float(result.inference_flops),
        "peak_memory_bytes": float(result.peak_memory_bytes),
        "step_seconds": result.train_seconds / result.num_steps,
    }


def scores(evaluation: Mapping[str, Any]) -> Values:
    """Return eval/mean and eval/<task>/score of one evaluation."""
    tasks = {f"eval/{task}/score": values["score"] for task, values in evaluation["tasks"].items()}
    return {"eval/mean": evaluation["mean"], **tasks}


def _copy_bundles(source: Path, target: Path, config: RunConfig) -> int:
    """Copy the newest bundle, and those of its best scores, as bundles of a run of this config; return its step."""
    from polyprompt.loop import TrainState

    newest = checkpoint.newest_whole(source)
    if newest is None:
        raise BundleError(f"{source} holds no bundle")
    train = checkpoint.read(newest).state["train"]
    kept = {train["step"], *TrainState.from_json(train).kept_steps}
    for step in sorted(kept):
        bundle = checkpoint.read(source / checkpoint.folder_name(step))
        checkpoint.write(
            target,
            step=step,
            tensors=bundle.tensors,
            optimizer=bundle.optimizer(),
            state={**bundle.state, "pending": []},  # points of the source's tracking run
            config=config,
            backbone=bundle.backbone,
            commit=checkpoint.git_commit(),
        )
    return train["step"]


def newest_state(place: run_folder.RunFolder) -> dict[str, Any]:
    """Return the training state in the newest bundle, empty without one. A bundle that is there is whole."""
    for bundle in sorted(place.bundles.glob("step_*"), reverse=True):
        with suppress(FileNotFoundError, NotADirectoryError):  # deleted meanwhile, for a newer one
            return json.loads((bundle / "state.json").read_text())["train"]
    return {}


@dataclass(frozen=True)
class TrainTrial:
    """The work of a trial: the same training run as jobs/multitask.py, once for each seed.

    parent: the study's tracking run. experiment: the driver's, whose environment the trials may lack. changing: their
    params change on the way.
    """

    trials: Trials
    parent: RunHandle | None = None
    experiment: str = ""
    changing: bool = False

    def __call__(self, number: int, params: Params, report: Report, until: int | None = None) -> Values:
        # Imported here because it takes seconds that the driver need not pay.
        from polyprompt.ray_train import run

        if self.parent is not None:
            os.environ.update(MLFLOW_TRACKING_URI=self.parent.uri, MLFLOW_EXPERIMENT_NAME=self.experiment)
        trials, done, found = self.trials, 0, []
        for index, seed in enumerate(trials.seeds):
            config = trials.config(number, params, seed)
            place = trials.place(number, params, seed)
            # The very last evaluation is part of the trial's result.
            end: float = config.train.max_steps if index == len(trials.seeds) - 1 else math.inf
            begun = 0
            if until is not None:
                begun, end = newest_state(place).get("step", 0), min(until, end)
                pauses = until < config.train.max_steps
                trials.pause_at(number, place.bundles / checkpoint.folder_name(until) if pauses else None)
                if pauses and begun >= until:
                    raise PausedError(self._paused(place))
            try:
                with _follow(place, trials.score, done, (begun, end), report):
                    result = run(
                        config,
                        out=trials.out(number, seed),
                        say=lambda line: None,
                        stop=trials.stop_file(number),
                        tags=self._tags(number, params, seed),
                    )
            except StoppedError:
                if until is None or not trials.stop_file(number).is_symlink():
                    raise
                raise PausedError(self._paused(place)) from None
            done += config.train.max_steps
            found.append(metrics(result))
        mean = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
        return {STEP: done, **mean}

    def tell_to_stop(self, number: int) -> None:
        self.trials.tell_to_stop(number)

    def clone(self, number: int, source: int, params: Params) -> Change:
        return self.trials.clone(number, source, params)

    def _paused(self, place: run_folder.RunFolder) -> Values:
        evaluation = newest_state(place)["evaluations"][-1]
        return {STEP: evaluation["step"], self.trials.score: scores(evaluation)[self.trials.score]}

    def _tags(self, number: int, params: Params, seed: int) -> dict[str, str] | None:
        if self.parent is None:
            return None
        tags = study_tracking.child_tags(self.parent, trial=number, seed=seed)
        if self.changing:
            # As in RunConfig.flat: "section.key".
            tags[CHANGING] = json.dumps(sorted({".".join(key.split(".")[:2]) for key in params}))
        return tags


@contextmanager
def _follow(
    place: run_folder.RunFolder, score: str, offset: int, between: tuple[int, float], report: Report
) -> Iterator[None]:
    """Report each evaluation of a run once its bundle is there, of the steps above the first and below the second."""
    done, reported = threading.Event(), set[int]()

    def look() -> None:
        ended = False
        while not ended:
            ended = done.wait(POLL_SECONDS)  # once more after the end, for what came too fast to be seen on the way
            for evaluation in newest_state(place).get("evaluations", []):
                step = evaluation["step"]
                if step not in reported and between[0] < step < between[1]:
                    reported.add(step)
                    report(offset + step, {score: scores(evaluation)[score]})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def failure(error: BaseException) -> Ended:
    """Say why a trial failed, in one line that starts with the kind of the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, last = (lines[0], lines[-1]) if lines else (type(error).__name__, type(error).__name__)
    if any(mark in f"{type(error).__name__} {error}" for mark in ("OutOfMemory", "out of memory", "MemoryError")):
        return Ended("failed", f"out of memory: {last}")
    match error:
        case NotFiniteError():
            return Ended("failed", f"NaN: {first}")
        case ConfigError():
            return Ended("failed", f"bad combination: {first}")
        case DataError() | BundleError():
            return Ended("failed", f"bad data: {first}")
        case TrackingError():
            return Ended("failed", f"tracking: {first}", passing=True)
        case TrainingError():
            return Ended("failed", f"workers lost: {first}", passing=True)
    return Ended("failed", f"{type(error).__name__}: {last}")
