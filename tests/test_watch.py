"""A worker that hangs is named. Real processes hang in test_faults.py; here workers are threads on one store."""

import threading

import torch.distributed as dist

from polyprompt.watch import Watch

NAMES = ["worker 0", "worker 1", "worker 2"]


def waits(store: dist.Store, rank: int, timeout_seconds: float) -> str:
    """Return what the watch of a worker says that waits in its first meeting."""
    said: list[str] = []
    rang = threading.Event()

    def alarm(text: str) -> None:
        said.append(text)
        rang.set()

    watch = Watch(NAMES, rank, store, timeout_seconds, alarm)
    with watch.meeting():
        assert rang.wait(60)
    watch.end()
    return said[0]


def test_who_has_not_come_is_named_with_the_line_where_it_is() -> None:
    store, over = dist.HashStore(), threading.Event()

    def stay_away() -> None:
        late = Watch(NAMES, 1, store, 3, print)
        over.wait(60)
        late.end()

    others = [threading.Thread(target=stay_away), threading.Thread(target=waits, args=(store, 2, 3))]
    for thread in others:
        thread.start()
    said = waits(store, 0, 3)
    over.set()
    for thread in others:
        thread.join()
    assert said.startswith(
        "the others have waited for 3 s (compute.hang_timeout_seconds) for a worker: worker 1 is at "
    )
    assert "worker 2" not in said


def test_who_says_nothing_is_named() -> None:
    assert waits(dist.HashStore(), 0, 0.5).endswith("worker 1 gives no sign of life; worker 2 gives no sign of life")
