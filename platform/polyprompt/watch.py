"""A worker that hangs is named; its peers would wait for it without a word.

A thread of each worker tells the others, through a store in the first worker's process, how many meetings (sums,
gathers) its training has come to and at which line it is. Who has waited in a meeting for longer than the time-out
looks who has not come to it, or tells nothing any more.
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store

PACKAGE = str(Path(__file__).parent)
#: How often a worker tells where it is: so many times in a time-out, and at least every so many seconds.
BEATS, SLOWEST_BEAT_SECONDS = 10, 30.0


class Watch:
    """This worker's part. Made in the thread that trains."""

    def __init__(
        self,
        names: Sequence[str],
        rank: int,
        store: Store,
        timeout_seconds: float,
        alarm: Callable[[str], None],
    ) -> None:
        """names: of all workers, by rank. alarm: is called once, from another thread, with what to say."""
        self._names, self._rank, self._store, self._timeout = names, rank, store, timeout_seconds
        self._alarm = alarm
        self._beat = min(timeout_seconds / BEATS, SLOWEST_BEAT_SECONDS)
        store.set_timeout(timedelta(seconds=max(self._beat, 1.0)))
        self._trains = threading.get_ident()
        self._meetings = 0
        self._waits_since: float | None = None
        self._done = threading.Event()
        #: rank → what it told last, and when that was new.
        self._told: dict[int, tuple[str, float]] = {}
        self._heard = time.monotonic()
        # Two threads: whoever asks a store whose process is stopped may wait for long.
        for act in (self._tell, self._look):
            threading.Thread(target=act, name="watch", daemon=True).start()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what ends only when all workers have come to it."""
        self._meetings += 1
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def end(self) -> None:
        self._done.set()

    def _tell(self) -> None:
        beat = 0
        while not self._done.wait(self._beat):
            beat += 1
            # A RuntimeError of torch's store: the first worker, which has it, is gone or hangs. `_heard` grows old.
            with suppress(RuntimeError):
                self._exchange(beat)
                self._heard = time.monotonic()

    def _look(self) -> None:
        while not self._done.wait(self._beat):
            since = self._waits_since
            if since is not None and time.monotonic() - since > self._timeout:
                self._alarm(self._say())
                return

    def _exchange(self, beat: int) -> None:
        self._store.set(str(self._rank), json.dumps([beat, self._meetings, _line(self._trains)]))
        for rank in range(len(self._names)):
            # Asked for before the other has told anything, the store would wait.
            if rank != self._rank and self._store.check([str(rank)]):
                told = self._store.get(str(rank)).decode()
                if self._told.get(rank, ("", 0.0))[0] != told:
                    self._told[rank] = (told, time.monotonic())

    def _silent(self) -> list[int]:
        old = time.monotonic() - self._timeout / 2
        if self._heard < old:
            return [0]
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        return [rank for rank in others if rank not in self._told or self._told[rank][1] < old]

    def _say(self) -> str:
        late = dict.fromkeys(self._silent(), "gives no sign of life")
        if not late:
            for rank, (told, _) in self._told.items():
                _, meetings, line = json.loads(told)
                if meetings < self._meetings:
                    late[rank] = f"is at {line}"
        if not late:
            return (
                f"all workers have waited for each other for {self._timeout:g} s (compute.hang_timeout_seconds): "
                "the network between their machines may be down"
            )
        who = "; ".join(f"{self._names[rank]} {doing}" for rank, doing in late.items())
        return f"the others have waited for {self._timeout:g} s (compute.hang_timeout_seconds) for a worker: {who}"


def _line(thread: int) -> str:
    """The innermost line of this package that a thread is at."""
    frames = traceback.extract_stack(sys._current_frames().get(thread))
    ours = [at for at in frames if at.filename.startswith(PACKAGE)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else "its end"
