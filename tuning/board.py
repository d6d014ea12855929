"""The state of a search while it runs: study.json after every event, and what a person sees of it."""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tuning import study_report
from tuning.spaces import Params
from tuning.study import FILE, Change, Study, Trial
from tuning.trial import Ended, Trials

MAX_LIVE_TRIALS = 12


class Board:
    """Keeps a study's record. `study` is always what study.json says."""

    def __init__(self, study: Study, folder: Path, trials: Trials, console: Console) -> None:
        """study: with the trials that are known already. trials: their folders."""
        self.study = study
        self.folder = folder
        self.trials = trials
        self.console = console
        self.live: set[int] = set()
        self.closed = threading.Event()
        self._params: dict[int, Params] = {trial.number: dict(trial.params) for trial in study.trials}
        self._trials: dict[int, Trial] = {trial.number: trial for trial in study.trials}
        self._seconds_before = study.seconds
        self._started = time.monotonic()
        self._screen: Live | None = None
        self._write()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show a live table on a terminal; elsewhere each event is a line."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, get_renderable=self._table, refresh_per_second=1) as self._screen:
            try:
                yield
            finally:
                self._screen.update(self._table(), refresh=True)
        self._screen = None

    def begun(self, number: int, params: Params) -> None:
        self.trials.begin(number, params)
        self._params[number] = params
        self.live.add(number)
        self._refresh(number, f"trial {number} starts: {', '.join(f'{k}={v}' for k, v in params.items())}")

    def reported(self, number: int, step: int, values: Mapping[str, float]) -> None:
        self._refresh(number, f"trial {number} step {step}: {_text(values)}")

    def changed(self, number: int, change: Change) -> None:
        self._params[number] = {**self._params[number], **change.after}
        self._refresh(number, f"trial {number} {study_report.change_text(change)}")

    def ended(self, number: int, ended: Ended | None) -> None:
        """ended: None: finished, or interrupted."""
        if ended is not None:
            self.trials.end(number, ended)
        self.live.discard(number)
        self._refresh(number, "")
        trial = self._trials[number]
        cause = f": {trial.cause}" if trial.cause else ""
        values = {o.metric: trial.mean(o.metric) for o in self.study.objectives}
        how = trial.state if ended or trial.state == "finished" else "interrupted; --resume goes on"
        self._say(f"trial {number} {how}{cause}; {trial.num_steps} steps; {_text(values)}")

    def run_folders(self, number: int) -> Sequence[Path]:
        return [self.trials.place(number, self._params[number], seed).folder for seed in self.trials.seeds]

    def close(self) -> Study:
        """Read all unfinished trials once more, now that their processes are gone."""
        self.closed.set()
        self.live.clear()
        for number, trial in self._trials.items():
            if trial.state != "finished":
                self._trials[number] = self.trials.read(number, self._params[number], live=False)
        self._write()
        return self.study

    def _refresh(self, number: int, line: str) -> None:
        self._trials[number] = self.trials.read(number, self._params[number], live=number in self.live)
        self._write()
        if line:
            self._say(line)

    def _write(self) -> None:
        trials = [self._trials[number] for number in sorted(self._trials)]
        seconds = self._seconds_before + time.monotonic() - self._started
        self.study = replace(self.study, trials=trials, seconds=seconds)
        self.study.write(self.folder / FILE)

    def _say(self, line: str) -> None:
        if self._screen is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        return study_report.table(self.study, max_trials=MAX_LIVE_TRIALS)


def _text(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value))
