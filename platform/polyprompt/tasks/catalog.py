"""The tasks that ship by name, and how a config's task list becomes tasks."""

import string
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError, DataError, hint
from polyprompt.task_configs import TaskConfig, TextTaskConfig
from polyprompt.tasks import embedded
from polyprompt.tasks.custom import TemplateExamples, task_of
from polyprompt.tasks.extras import EXTRAS
from polyprompt.tasks.glue import GLUE, Classification
from polyprompt.tasks.records import FileSource, Task, TextTask
from polyprompt.tasks.super_glue import SUPER_GLUE
from polyprompt.tasks.text import text_task_of

CATALOGUE: Mapping[str, Task] = {task.name: task for task in (*GLUE, *SUPER_GLUE, *EXTRAS)}

#: Kinds of files under `data.root`, the first that is there.
SUFFIXES = (".jsonl", ".csv", ".parquet")


def resolve(config: RunConfig) -> tuple[Task | TextTask, ...]:
    """Return the config's tasks, in its order.

    With `data.root`, catalogue tasks are read from its folders; generated and user tasks keep their own source.
    Raises ConfigError for an unknown name (with the nearest known ones), DataError for a missing folder or file.
    """
    return tuple(_task(entry, config.data.root) for entry in config.tasks)


def forms(config: RunConfig) -> tuple[Task | None, ...]:
    """Return what the config's tasks make of a row, wherever their data are; None for plain text."""
    found: list[Task | None] = []
    for entry in config.tasks:
        if isinstance(entry, TaskConfig):
            found.append(task_of(entry, with_source=False))
        else:
            found.append(None if isinstance(entry, TextTaskConfig) else cast(Task, _task(entry, None)))
    return tuple(found)


def fields(task: Task) -> tuple[str, ...]:
    """Return the fields of a row that the task's format reads, as far as it says so; () where it is a function."""
    match task.examples:
        case Classification():
            return tuple(names[0] for names in task.examples.fields)
        case TemplateExamples():
            return tuple(field.partition(".")[0] for _, field in task.examples.input.parts if field is not None)
        case partial(args=(_, str(template), _)):
            return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field)
    return ()


def _task(entry: str | TaskConfig | TextTaskConfig, root: Path | None) -> Task | TextTask:
    if isinstance(entry, TextTaskConfig):
        return text_task_of(entry)
    if isinstance(entry, TaskConfig):
        return task_of(entry)
    known = known_tasks()
    if entry not in known:
        raise ConfigError(f"tasks: unknown task {entry!r}; known: {', '.join(known)}.{hint(entry, known)}")
    task = known[entry]
    if root is None or entry not in CATALOGUE:
        return task
    return replace(task, source=_files(task, root, (task.train_split, task.validation_split)))


def of_split(entry: str | TaskConfig, root: Path | None, split: str) -> Task:
    """Return a task with the source of one split alone. Raises as `resolve` does."""
    if isinstance(entry, TaskConfig):
        return task_of(entry)
    task = cast(Task, _task(entry, None))
    return replace(task, source=_files(task, root, (split,))) if root is not None and entry in CATALOGUE else task


def known_tasks() -> Mapping[str, Task]:
    """Return every task that has a name: the generated suite and the catalogue."""
    return {**embedded.tasks(), **CATALOGUE}


def _files(task: Task, root: Path, splits: tuple[str, ...]) -> FileSource:
    """The task's files in `root`: <last part of its name>/<split>.jsonl, else .csv, else .parquet."""
    expected = f"data.root must hold {' and '.join(f'<task>/{split}.jsonl' for split in dict.fromkeys(splits))}"
    if not root.is_dir():
        raise DataError(f"data.root: folder {root} does not exist; {expected}")
    folder = root / task.name.rpartition("/")[2]
    if not folder.is_dir():
        near = hint(folder.name, [p.name for p in root.iterdir() if p.is_dir()])
        raise DataError(f"{task.name}: folder {folder} does not exist; {expected}.{near}")
    files = {}
    for split in dict.fromkeys(splits):
        found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
        if not found:
            raise DataError(f"{task.name}: file {folder / split}.jsonl does not exist; {expected} (or .csv, .parquet)")
        files[split] = found[0]
    return FileSource(files)
