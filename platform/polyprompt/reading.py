"""Rows and examples of a task's splits, from files, generators or the hub, and what identifies their content.

Beside data.py, which opens what was prepared, the only file that imports `datasets`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets

from polyprompt import sources, text_store
from polyprompt.errors import DataError
from polyprompt.tasks.records import Example, HubSource, Row, Task, TextTask


def read_examples(task: Task, split: str) -> Iterator[tuple[sources.Origin, Example]]:
    """Yield the examples of a split with the origin of their row. Raises DataError naming file, line and field."""
    for origin, _, examples in read_rows(task, split):
        for example in examples:
            yield origin, example


def read_rows(task: Task, split: str) -> Iterator[tuple[sources.Origin, Row, list[Example]]]:
    """Yield the rows of a split, each with its origin and its examples. Raises DataError as `read_examples` does."""
    for origin, row in _rows(task, split):
        try:
            made = [e if e.choices else replace(e, choices=task.choices) for e in task.examples(row, split)]
        except DataError as error:
            raise DataError(f"{task.name}: {origin}: {error}") from error
        yield origin, row, made


def _rows(task: Task, split: str) -> Iterator[tuple[sources.Origin, Row]]:
    if not isinstance(task.source, HubSource):
        yield from sources.rows(task.source, split)
        return
    yield from _hub_rows(task.source, split)


def _hub_rows(source: HubSource, split: str) -> Iterator[tuple[sources.Origin, Row]]:
    for number, row in enumerate(_load(source, split), start=1):
        yield f"{source.path} {source.config or ''} {split} row {number}", row


def _load(source: HubSource, split: str) -> datasets.Dataset:
    address = f"data set {source.path!r} (config {source.config!r}, revision {source.revision!r}, split {split!r})"
    if split not in source.splits:
        raise DataError(f"{address}: this split is not mapped; hub.splits has {', '.join(source.splits)}")
    try:
        return datasets.load_dataset(source.path, source.config, revision=source.revision, split=source.splits[split])
    # Whatever the hub, the network or the hub's cache raises means the same here; the cause is kept.
    except Exception as error:
        raise DataError(
            f"{address} cannot be loaded: {type(error).__name__}: {error}\nCheck the address and the network "
            f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}; when set, only cached data are used), or "
            "read files: data.root=DIR with DIR/<task>/train.jsonl and validation.jsonl, or the task's own `files`"
        ) from error


def source_identity(task: Task) -> str:
    """Return what identifies the content of the splits that are trained and evaluated on."""
    splits = (task.train_split, task.validation_split)
    if not isinstance(task.source, HubSource):
        return sources.fingerprint(task.source, splits)
    return _hub_identity(task.source, splits)


def _hub_identity(source: HubSource, splits: Sequence[str]) -> str:
    content = hashlib.sha256()
    for split in splits:
        for batch in _load(source, split).data.to_batches():
            content.update(batch.serialize())
    return content.hexdigest()


def text_of(task: TextTask) -> dict[str, Iterator[str]]:
    """Return the lines of each split, "" behind each document."""
    if not isinstance(task.source, HubSource):
        return text_store.lines(task.source, task.field)
    return {
        split: sources.row_lines(_hub_rows(task.source, split), task.field)
        for split in (task.train_split, task.validation_split)
    }


def text_identity(task: TextTask) -> str:
    """Return what identifies the text of both splits."""
    if isinstance(task.source, HubSource):
        return f"{task.field} {_hub_identity(task.source, (task.train_split, task.validation_split))}"
    files = {name: [sources.content_hash(p) for p in paths] for name, paths in sorted(task.source.files.items())}
    return f"{task.field} {task.source.held_out} {files}"
