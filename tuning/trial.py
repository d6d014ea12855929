"""One trial: its runs, one for each seed, and what its folder says about it. What it does is in work.py.

    DIR/trials/<number>/trial.json      number, params and their changes, written before it starts and at each change
    DIR/trials/<number>/seed_<seed>/    one training run: a run folder like any other
    DIR/trials/<number>/generation_<n>/seed_<seed>/    the run after the nth change
    DIR/trials/<number>/ended.json      there once it was stopped by the scheduler, or failed
    DIR/trials/<number>/stop            there while its runs are told to stop; a link to the bundle that it pauses at

A run is its folder: started again it goes on from its newest bundle, and a finished one gives its result.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyprompt import checkpoint, run_folder
from polyprompt.config import RunConfig
from polyprompt.errors import BundleError
from polyprompt.result import RunResult, write_whole
from polyprompt.trackers import UNSENT_FILE
from tuning.spaces import Params, configure
from tuning.study import Change, SeedRun, State, Trial

Values = dict[str, float]


@dataclass(frozen=True)
class Ended:
    """Why a trial ended without a result. passing: the cause may be gone at the next try."""

    state: Literal["stopped", "failed"]
    cause: str
    passing: bool = False


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
