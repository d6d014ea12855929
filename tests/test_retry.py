"""What may pass is tried again, a bounded time; what may not, once."""

import errno
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from polyprompt import retry
from polyprompt.errors import StorageError


def failing(times: int, number: int) -> tuple[Callable[[], None], list[int]]:
    calls: list[int] = []

    def write() -> None:
        calls.append(len(calls))
        if len(calls) <= times:
            raise OSError(number, "it failed")

    return write, calls


def test_pauses_grow_and_stay_bounded() -> None:
    assert list(islice(retry.pauses(), 7)) == [1, 2, 4, 8, 16, 30, 30]


def test_a_full_disk_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    write, calls = failing(2, errno.ENOSPC)
    retry.until_written(write, "bundle 7", tmp_path, 60)
    assert len(calls) == 3
    assert caplog.text.count(f"bundle 7 cannot be written to {tmp_path} (") == 2


def test_it_ends_after_the_time_out_naming_the_room_that_is_left(tmp_path: Path) -> None:
    write, calls = failing(9, errno.ENOSPC)
    with pytest.raises(StorageError, match=r"bundle 7 cannot be written to .* MB free\): .*it failed"):
        retry.until_written(write, "bundle 7", tmp_path, 0)
    assert len(calls) == 1


def test_what_does_not_pass_is_not_tried_again(tmp_path: Path) -> None:
    write, calls = failing(9, errno.EROFS)
    with pytest.raises(StorageError, match="it is not there"):
        retry.until_written(write, "bundle 7", tmp_path / "gone", 60)
    assert len(calls) == 1
