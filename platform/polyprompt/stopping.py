"""SIGTERM ends a run at its next step, with a bundle. `ray job stop`, Kubernetes and `kill` send it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from polyprompt.section import is_submitted

#: In the run folder, which all workers see: end at the next step.
STOP = "stop"


@contextmanager
def on_sigterm(folder: Path) -> Iterator[Callable[[], None]]:
    """While inside, SIGTERM to this process puts the stop file into the run's folder. Yields what listens anew after
    someone else, `ray.init`, has put a handler of its own.

    A second SIGTERM, or the end of most of the time that the sender gives, is as a Ctrl-C: what was trained since the
    newest bundle is lost then. Does nothing where signals cannot be handled, in a thread of a search's trial.
    """
    file = folder / STOP
    file.unlink(missing_ok=True)  # of an earlier start, which was killed
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    too_late = threading.Timer(_grace_seconds(), os.kill, (os.getpid(), signal.SIGTERM))
    too_late.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if file.exists():
            # Not by SIGINT, which Ray blocks in its jobs and a shell ignores for what a script starts with "&".
            raise KeyboardInterrupt
        file.touch()
        too_late.start()
        # print() may be what was interrupted, and it cannot be entered twice.
        os.write(2, b"SIGTERM: the run ends at its next step, with a bundle; again to end at once\n")

    def listen() -> None:
        signal.signal(signal.SIGTERM, handle)

    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield listen
    finally:
        too_late.cancel()
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)


def _grace_seconds() -> float:
    """Three quarters of what comes before SIGKILL: the rest is for ending the workers and the tracking run."""
    # Ray's own default for jobs; elsewhere 30 seconds are usual.
    usual = "3" if is_submitted() else "30"
    return 0.75 * float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", usual))
