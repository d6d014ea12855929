"""Search over any keys of the run config.

    python tuning/search.py RECIPE.yaml [more.yaml …] [key=value …] [--out DIR] [--resume] [--dry-run]

A search recipe is a run recipe with a section `search` (docs/search.md). DIR holds study.json, the leaderboard, plots,
best.yaml and the runs of all trials. Killed at any moment, it goes on with --resume.
"""

import io
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from polyprompt import command, run_folder
from polyprompt.errors import ConfigError
from polyprompt.result import write_whole
from tuning import spaces
from tuning.spaces import Search
from tuning.study import FILE, Study, Trial

if TYPE_CHECKING:
    from polyprompt.plan import Load
    from polyprompt.tracking_opening import RunHandle
    from tuning.board import Board
    from tuning.capacity import Capacity
    from tuning.execution import Stoppable
    from tuning.trial import Trials
    from tuning.work import TrainTrial

IDENTITY, LOCK, TRIALS = "search.json", ".lock", "trials"
#: What may be another at a resume: it changes no trial.
MAY_CHANGE = (
    "search.num_trials",
    "search.max_concurrent_trials",
    "search.max_failures",
    "search.trials_per_pack",
    "tracking.",
)
#: How long processes of a killed driver may take to end.
AFTERLIFE_SECONDS = 60.0
STOP_SECONDS = 0.5
MAX_DRY_ROWS = 24
#: Columns of what is not a terminal.
WIDTH = 160


def main() -> int:
    parser = command.recipe_parser(__doc__, out="folder for everything (runs/<name>)")
    parser.add_argument("--resume", action="store_true", help="finish the search in --out")
    options, recipes, overrides = command.read_arguments(parser, "tuning/recipes/embedded_smoke.yaml")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is read while the search runs
    console = Console(width=None if sys.stdout.isatty() else WIDTH)

    def act() -> int:
        search = spaces.load(recipes, overrides)
        folder = (options.out or run_folder.runs() / search.name).expanduser().absolute()
        if options.dry_run:
            dry_run(search, folder, resume=options.resume, console=console)
            return 0
        study, interrupted = run(search, folder, resume=options.resume, console=console)
        if interrupted:
            print("interrupted; the same command with --resume goes on", file=sys.stderr)
            return 130
        return 0 if study.finished else 1

    return command.exit_status(act, stopped="stopped; the same command with --resume goes on")


def run(
    search: Search,
    folder: Path,
    *,
    resume: bool = False,
    console: Console,
    work: "Stoppable | None" = None,
    reuse: bool = False,
) -> tuple[Study, bool]:
    """Run a search, and return its study and whether it was interrupted.

    work: what a trial does (None: trains); always None where trials share their backbone. reuse: one process may do
    several trials, one after the other.
    Raises ConfigError, DataError or TrackingError before any trial.
    """
    from tuning import study_report

    with _claim(folder):
        study, interrupted = _search(search, folder, resume, console, work, reuse)
    console.print(study_report.table(study))
    console.print(f"Everything about this study is in {folder}", highlight=False, soft_wrap=True)
    return study, interrupted


def dry_run(search: Search, folder: Path, *, resume: bool, console: Console) -> None:
    """Show the space, the scheduling arithmetic, and the configurations with their costs."""
    from polyprompt.plan import plan

    _check_identity(search, folder, resume)
    config = search.config
    room, load = _room(search), _load(search)
    listed = search.enumerated
    samples = listed if listed is not None else search.samples(8)
    num_trials = len(listed) if listed is not None else config.num_trials
    seeds = f" with {len(config.seeds)} seeds each" if len(config.seeds) > 1 else ""
    lines = [
        f"{search.name}: {num_trials} configurations{seeds}, {config.searcher}, scheduler {config.scheduler.name}",
        f"objectives: {', '.join(f'{o.mode} {o.metric}' for o in search.objectives)}",
        *(f"{key}: {space.text()}" for key, spaces in config.space.items() for space in spaces),
        *(f"constraint: {constraint.text}" for constraint in search.constraints),
        room.text,
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table(title="configurations" if listed is not None else "configurations such as")
    for heading in ("Trial", *search.keys, "trained", "FLOPs a row"):
        table.add_column(heading, justify="right", overflow="fold")
    for number, params in enumerate(samples[:MAX_DRY_ROWS]):
        checked = plan(search.run_config(params), load=load)
        values = [str(params.get(key, "")) for key in search.keys]
        costs = [f"{checked.num_trained_parameters:,}", f"{checked.inference_flops:.3g}"]
        table.add_row(str(number) if listed is not None else "", *values, *costs)
    if len(samples) > MAX_DRY_ROWS:
        table.caption = f"and {len(samples) - MAX_DRY_ROWS} more"
    console.print(table)


def _search(
    search: Search, folder: Path, resume: bool, console: Console, work: "Stoppable | None", reuse: bool
) -> tuple[Study, bool]:
    # Imported here because Ray, torch and MLflow take seconds: a typing mistake is answered before.
    from polyprompt import ray_train, study_tracking
    from polyprompt.plan import plan
    from tuning import execution, frozen_weights, packs, sampler, study_report
    from tuning.board import Board
    from tuning.trial import Trials

    config = search.config
    _check_identity(search, folder, resume)
    _room(search)
    first = search.run_config(search.samples(1)[0])
    checked = plan(first, load=_load(search))
    shared_bytes = 0 if config.share_backbone or work else frozen_weights.room(first, checked.num_backbone_parameters)
    score = search.score or search.objectives[0]
    trials = Trials(folder / TRIALS, search.name, search.base, config.seeds, score.metric)
    known = _known(trials)
    write_whole(folder / IDENTITY, json.dumps(_identity(search), indent=1).encode())
    with ray_train.cluster(0, [Path(__file__).resolve().parent], shared_bytes=shared_bytes), _interruptible() as ending:
        room = _room(search)
        console.print(f"{search.name}: {room.text}", highlight=False, soft_wrap=True)
        study = _study(search, folder, known)
        parent = study_tracking.open_study(search.run.tracking, study) if search.run.tracking.enabled else None
        if parent is not None:
            study = replace(study, parent_run_id=parent.run_id)
        board = Board(study, folder, trials, console)
        threading.Thread(target=_stop_all, args=(ending, board), daemon=True).start()
        status: study_tracking.Status = "FAILED"
        try:
            training, source = _training(search, trials, parent), sampler.source(search, known)
            if not config.share_backbone and work is None:
                training = replace(training, weights=frozen_weights.hold(first))
            with board.shown():
                if config.share_backbone:
                    assert work is None
                    packs.execute(search, training, source=source, known=known, events=board, room=room, ending=ending)
                else:
                    execution.execute(
                        search,
                        work or training,
                        source=source,
                        known=known,
                        events=board,
                        num_concurrent=room.num_concurrent,
                        folder=folder / "tune",
                        folders=board.run_folders,
                        ending=ending,
                        reuse=reuse,
                    )
            status = "KILLED" if ending.is_set() else "FINISHED"
        finally:
            study = board.close()
            study_report.write(study, folder)
            if parent is not None:
                # MLflow's params cannot change: a child has those that its trial began with.
                begun = [replace(trial, params=trial.params_after(0)) for trial in study.trials]
                study_tracking.close_study(parent, replace(study, trials=begun), folder, status)
        return study, ending.is_set()


def _room(search: Search) -> "Capacity":
    from polyprompt import ray_train
    from tuning.capacity import capacity

    config = search.config
    per_process = config.trials_per_pack if config.share_backbone else 1
    return capacity(search.run.compute, ray_train.machines(), config.max_concurrent_trials, per_process)


def _load(search: Search) -> "Load | None":
    """Return what loads the backbone of a plan: the one that all trials share, None: each its own.

    Raises ConfigError where trials cannot share one.
    """
    from polyprompt.pack import Pack

    config = search.config
    if not config.share_backbone:
        return None
    if len(config.seeds) > 1 and search.run.backbone.init == "random":
        raise ConfigError(
            f"search.seeds={config.seeds}: backbone.name={search.run.backbone.name} has random weights, others with "
            "each seed, so search.share_backbone=true needs a single one. Use one seed, or a pre-trained backbone"
        )
    return Pack().load


def _training(search: Search, trials: "Trials", parent: "RunHandle | None") -> "TrainTrial":
    from polyprompt import tracking
    from tuning.work import TrainTrial

    experiment = tracking.resolve_experiment(search.run.tracking)
    return TrainTrial(trials, parent, experiment, changing=search.perturbation_steps is not None)


def _study(search: Search, folder: Path, known: Sequence[Trial]) -> Study:
    """Return the study as far as it is known: of an earlier start, if there was one."""
    file = folder / FILE
    before = Study.read(file) if file.is_file() else None
    return Study(
        name=search.name,
        recipe=search.base,
        keys=search.keys,
        objectives=search.objectives,
        searcher=search.config.searcher,
        scheduler=search.config.scheduler.name,
        seed=search.config.seed,
        trials=list(known),
        seconds=before.seconds if before else 0.0,
        parent_run_id=before.parent_run_id if before else "",
    )


def _known(trials: "Trials") -> list[Trial]:
    """Read the trials of earlier starts; those that failed from a cause that may pass count as unfinished."""
    known = []
    for number, params in sorted(trials.recorded().items()):
        ended = trials.ended(number)
        if ended is not None and ended.passing:
            trials.begin(number, params)
        trial = trials.read(number, params, live=False)
        if trial.state == "waiting":
            for seed in trials.seeds:
                _wait_for(trials.place(number, params, seed).folder)
        known.append(trial)
    return known


def _wait_for(run: Path) -> None:
    """Wait until no process of a killed driver works in a run's folder."""
    if not run.is_dir():
        return
    try:
        with FileLock(run / run_folder.LOCK, timeout=AFTERLIFE_SECONDS):
            pass
    except Timeout:
        raise ConfigError(
            f"run folder {run} in use: a process of an earlier start still trains in it. End that one, or wait for it"
        ) from None


def _stop_all(ending: threading.Event, board: "Board") -> None:
    """Once the search is to end, tell all trials at work, also one that starts just then."""
    while not board.closed.wait(STOP_SECONDS):
        if ending.is_set():
            for number in tuple(board.live):
                board.trials.tell_to_stop(number)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yield what the first Ctrl-C or SIGTERM sets; the second one ends at once."""
    ending = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if ending.is_set():
            raise KeyboardInterrupt
        ending.set()
        print("ending: trials at work stop at their next logged step; again to end at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Hold the study's folder for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise ConfigError(
            f"study folder {folder} in use: another search runs in it now. Choose another --out"
        ) from None
    except OSError as error:
        raise ConfigError(f"study folder {folder} cannot be written: {error}; choose another --out") from None
    with lock:
        yield


def _check_identity(search: Search, folder: Path, resume: bool) -> None:
    """Raise ConfigError unless the folder is free, or holds this very search and is to go on."""
    file = folder / IDENTITY
    if not file.is_file():
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise ConfigError(f"study folder {folder} in use: it holds files of something else; choose another --out")
        return
    if not resume:
        raise ConfigError(f"study folder {folder} holds a study; add --resume to finish it, or choose another --out")
    old, new = (dict(_flat("", table)) for table in (json.loads(file.read_text()), _identity(search)))
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"study folder {folder} holds another search ({'; '.join(changed[:3])}). Set the old values, or choose "
            "another --out"
        )


def _identity(search: Search) -> dict[str, Any]:
    return {**search.base, "name": search.name, "search": search.config.model_dump(mode="json", exclude={"base"})}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, part)
    else:
        yield prefix, json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
