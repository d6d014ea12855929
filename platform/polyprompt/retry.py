"""Trying again what may pass, with growing pauses and a bound; ending at once where waiting mends nothing."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from polyprompt.errors import StorageError

FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 1.0, 30.0
#: A folder that may not be written now may not be written in a minute either.
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG)
log = logging.getLogger(__name__)


def pauses() -> Iterator[float]:
    """Yield seconds to wait before each further try: 1, 2, 4 … 30, 30."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LAST_PAUSE_SECONDS)


def until_written(write: Callable[[], None], what: str, folder: Path, timeout_seconds: float) -> None:
    """Call `write` until it raises no OSError. what, folder: of which the log and the error speak.

    Raises StorageError after timeout_seconds, and at once for what does not pass.
    """
    deadline = time.monotonic() + timeout_seconds
    for pause in pauses():
        try:
            write()
            return
        except OSError as error:
            cause = f"{what} cannot be written to {folder}{_free(folder)}: {error}"
            left = deadline - time.monotonic()
            if error.errno in LASTING or left <= 0:
                raise StorageError(cause) from error
            log.warning("%s. Tried again in %.0f s, for %.0f s at most", cause, min(pause, left), left)
            time.sleep(min(pause, left))


def _free(folder: Path) -> str:
    """Say how much room there is: torch does not name a full disk as the cause."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
    except OSError:
        return " (it is not there)"
