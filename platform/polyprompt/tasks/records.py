"""What a task is: where its rows come from, how a row becomes text, and how predictions are scored.

Plain frozen values, so that a task pickles, compares and hashes the same everywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One row in the benchmark's own fields, as read from a file or the hub."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One text-to-text example.

    input: the text the model reads. target: the text it is trained to write.
    choices: the targets to choose between; () for free text. They may differ from row to row (ReCoRD's entities).
    answers: every text that counts as right (ReCoRD); () means just `target`.
    group: examples with the same group are scored together (MultiRC's question); "" for none.
    value: the exact number behind a regression target (STS-B's unrounded score); None for other tasks.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    group: str = ""
    value: float | None = None


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids, both ending in </s>."""

    input_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub, read from its parquet files (loading scripts no longer run)."""

    path: str
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {s: s for s in SPLITS})


@dataclass(frozen=True)
class FileSource:
    """One file (.jsonl, .csv or .parquet) for each split. Paths are absolute."""

    files: Mapping[str, Path]


@dataclass(frozen=True)
class GeneratedSource:
    """Rows made by a seeded generator: `rows(split)` yields them, the same ones on every machine."""

    rows: Callable[[str], Iterator[Row]]
    version: str


Source = HubSource | FileSource | GeneratedSource


@dataclass(frozen=True)
class TextSource:
    """Plain text in files, by split. Without validation files the last `held_out` of each file's documents are kept."""

    files: Mapping[str, tuple[Path, ...]]
    held_out: float


@dataclass(frozen=True)
class Task:
    """A task of the mixture.

    name: "group/name", unique in a run. `examples(row, split)` turns one row into its examples (MultiRC and ReCoRD rows
    hold several; some rows give none in training); it raises DataError naming the field for a row that does not fit.
    choices: the targets to choose between when all rows share them; () for free text or per-row choices.
    metrics: names of tasks/metrics.py; the task's score is their mean. weight: its rate under `mixture.kind: weights`.
    """

    name: str
    source: Source
    examples: Callable[[Row, str], Iterator[Example]]
    metrics: tuple[str, ...]
    choices: tuple[str, ...] = ()
    weight: float = 1.0
    train_split: str = "train"
    validation_split: str = "validation"


@dataclass(frozen=True)
class TextTask:
    """Plain text of the mixture. `validation` alone: evaluated on, never trained on. field: of rows that hold text.

    objective, noise_density and mean_span_length: see denoising.py. input_tokens: None for the run's own limit.
    """

    name: str
    source: TextSource | HubSource
    field: str
    objective: str
    input_tokens: int | None
    noise_density: float
    mean_span_length: float
    weight: float = 1.0
    train_split: str = "train"
    validation_split: str = "validation"

    @property
    def has_train(self) -> bool:
        """Is it trained on?"""
        return isinstance(self.source, HubSource) or self.train_split in self.source.files
