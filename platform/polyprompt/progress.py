"""What is seen of a run while it trains, wherever its first worker is."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from polyprompt import report
from polyprompt.run_folder import RunFolder
from polyprompt.worker import LOG, PROGRESS


@contextmanager
def show(place: RunFolder, max_steps: int) -> Iterator[None]:
    """Show the progress and the messages that the first worker, wherever it runs, leaves in the run folder."""
    file, done = place.folder / PROGRESS, threading.Event()
    file.unlink(missing_ok=True)

    def follow(bar: report.Progress) -> None:
        shown, log = None, place.folder / LOG
        log.touch()
        messages = log.open()
        messages.seek(0, os.SEEK_END)
        while True:
            ending = done.wait(0.25)
            for line in messages:
                bar.say(line.rstrip())
            with suppress(OSError):  # none yet, or the folder is away
                seen = json.loads(file.read_text())
                if seen != shown:
                    bar.update(seen["step"], seen["loss"], seen["examples_per_second"])
                shown = seen
            if ending:
                messages.close()
                return

    with report.Progress(max_steps) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            file.unlink(missing_ok=True)
