"""Tokenised examples on disk: one folder a task, written whole or not at all, so that processes can share it."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from rich.console import Console
from rich.progress import track

from polyprompt.errors import DataError
from polyprompt.tasks.records import Example, FileSource, Task

T = TypeVar("T")
Tokenizer = Any
"""A tokenizer of transformers, which this room does not import."""

#: Raise it when the files change their form or meaning.
FORMAT = 2
_CHUNK = 1000  # examples or lines
_TOKENS = pa.list_(pa.int32())
# choices and choice_ids are null where they are the task's own, which meta.json holds once.
_SCHEMA = pa.schema(
    {
        "input_ids": _TOKENS,
        "target_ids": _TOKENS,
        "input": pa.string(),
        "target": pa.string(),
        "choices": pa.list_(pa.string()),
        "choice_ids": pa.list_(_TOKENS),
        "answers": pa.list_(pa.string()),
        "group": pa.string(),
        "value": pa.float64(),
    }
)


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def is_whole(folder: Path) -> bool:
    """Does the folder hold everything that was written to it?"""
    try:
        splits = read_meta(folder)["splits"]
        return all((folder / split["file"]).stat().st_size == split["num_bytes"] for split in splits.values())
    except (OSError, ValueError, KeyError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the task's choices, their token ids, and for each split its counts."""
    return json.loads((folder / "meta.json").read_text())


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Hand out a folder aside, and rename it to `folder` once it is filled: no process ever sees half of it.

    It must get a meta.json with "splits": name → {"file", "num_bytes", …}. Raises DataError if the disk refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"data.cache_dir: cannot write to {folder.parent}: {error}; set another folder") from error
    try:
        yield aside
        _put(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Writer:
    """Tokenises a task. Inputs and targets that are too long are cut; a choice that is too long is refused."""

    task: Task
    tokenizer: Tokenizer
    max_input_tokens: int
    max_target_tokens: int

    def write(self, folder: Path, splits: Mapping[str, Iterable[tuple[str, Example]]]) -> None:
        """Write the folder. splits: for each name the examples with their origins.

        Raises DataError for a split without examples.
        """
        with writing(folder) as aside:
            choice_ids = self.task_choice_ids()
            counts = {name: self._write_split(aside / f"{name}.arrow", name, splits[name]) for name in splits}
            meta = {"choices": self.task.choices, "choice_ids": choice_ids, "splits": counts}
            (aside / "meta.json").write_text(json.dumps(meta))

    def inputs(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the tokens of each input, cut to the limit, its </s> included; and how many were cut."""
        whole, eos = tokens(self.tokenizer, texts), self.tokenizer.eos_token_id
        num_cut = sum(len(ids) >= self.max_input_tokens for ids in whole)
        return [[*ids[: self.max_input_tokens - 1], eos] for ids in whole], num_cut

    def task_choice_ids(self) -> list[list[int]]:
        """Return the target tokens of each of the task's choices. Raises DataError for two alike, or one too long."""
        ids = self.choice_ids(self.task.choices, self.task.name)
        if len(set(map(tuple, ids))) < len(ids):
            words = ", ".join(map(repr, self.task.choices))
            raise DataError(f"{self.task.name}: two of the choices {words} are the same to the tokenizer; rename one")
        return ids

    def choice_ids(self, choices: Sequence[str], origin: str) -> list[list[int]]:
        """Return the target tokens of each choice. Raises DataError, beginning with the origin, for one too long."""
        ids = [[*row, self.tokenizer.eos_token_id] for row in tokens(self.tokenizer, choices)]
        for choice, row in zip(choices, ids, strict=True):
            if len(row) > self.max_target_tokens:
                raise DataError(
                    f"{origin}: choice {choice!r} has {len(row)} tokens; "
                    f"raise data.max_target_tokens={self.max_target_tokens} so that it is not cut"
                )
        return ids

    def _write_split(self, path: Path, name: str, examples: Iterable[tuple[str, Example]]) -> dict[str, Any]:
        counts = {"num_examples": 0, "num_cut_inputs": 0, "num_cut_targets": 0}
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:
            for chunk in chunks(examples, f"{self.task.name} {name}"):
                columns = self._columns(chunk, counts)
                stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))
        if counts["num_examples"] == 0:
            files = self.task.source.files if isinstance(self.task.source, FileSource) else {}
            where = files.get(getattr(self.task, f"{name}_split"), "its source")
            raise DataError(
                f"{self.task.name}: the {name} split has no examples: {where} is empty. Expected one row or more"
            )
        return {**counts, "file": path.name, "num_bytes": path.stat().st_size}

    def _columns(self, chunk: Sequence[tuple[str, Example]], counts: dict[str, int]) -> dict[str, list[Any]]:
        examples = [example for _, example in chunk]
        inputs, num_cut = self.inputs([e.input for e in examples])
        targets = tokens(self.tokenizer, [e.target for e in examples])
        counts["num_examples"] += len(examples)
        counts["num_cut_inputs"] += num_cut
        counts["num_cut_targets"] += sum(len(ids) >= self.max_target_tokens for ids in targets)
        eos = self.tokenizer.eos_token_id
        own = [None if e.choices == self.task.choices else e.choices for e in examples]
        return {
            **{key: [getattr(e, key) for e in examples] for key in ("input", "target", "answers", "group", "value")},
            "input_ids": inputs,
            "target_ids": [[*ids[: self.max_target_tokens - 1], eos] for ids in targets],
            "choices": own,
            "choice_ids": [
                None if choices is None else self.choice_ids(choices, f"{self.task.name}: {origin}")
                for (origin, _), choices in zip(chunk, own, strict=True)
            ],
        }


def _put(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`, in place of a damaged one. A whole one made meanwhile by another process stays."""
    if folder.exists() and not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError as error:
        if not is_whole(folder):
            raise DataError(
                f"data.cache_dir: cannot write {folder}: {error}; remove it or set another folder"
            ) from error


def chunks(items: Iterable[T], description: str) -> Iterable[list[T]]:
    """Hand out what is to be tokenised in lists, and show that work goes on, where someone watches."""
    remaining = iter(items)
    lists = iter(lambda: list(islice(remaining, _CHUNK)), [])
    console = Console(stderr=True)
    return track(lists, f"tokenising {description}", console=console, transient=True, disable=not sys.stderr.isatty())
