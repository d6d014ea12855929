"""From a task's source to its prepared splits: examples as tokens, made once and kept on disk."""

import hashlib
import inspect
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from polyprompt import reading, section, text_store, token_store
from polyprompt.config import DataConfig, RunConfig
from polyprompt.errors import DataError
from polyprompt.tasks.metrics import compute
from polyprompt.tasks.records import Example, Task, TextTask, TokenRow
from polyprompt.text_store import TextSplit
from polyprompt.token_store import Tokenizer

logger = logging.getLogger(__name__)


class Split:
    """The tokenised examples of one split, memory-mapped. Pickles as its address, so it opens in any process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __reduce__(self) -> tuple[type["Split"], tuple[Path, str]]:
        return Split, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def _table(self) -> datasets.Dataset:
        if not token_store.is_whole(self.folder):
            raise DataError(f"{self.folder}: no whole cache of tokenised data on this machine; call prepare() on it")
        return datasets.Dataset.from_file(str(self.folder / f"{self.name}.arrow"))

    @cached_property
    def _texts(self) -> datasets.Dataset:
        return self._table.select_columns(["input", "target", "choices", "answers", "group", "value"])

    @cached_property
    def _meta(self) -> dict[str, Any]:
        return token_store.read_meta(self.folder)

    @cached_property
    def input_lengths(self) -> npt.NDArray[np.int32]:
        """Input tokens of every example."""
        return self._lengths("input_ids")

    @cached_property
    def target_lengths(self) -> npt.NDArray[np.int32]:
        """Target tokens of every example."""
        return self._lengths("target_ids")

    @property
    def longest(self) -> tuple[int, int]:
        """The longest input and the longest target, in tokens."""
        return int(self.input_lengths.max()), int(self.target_lengths.max())

    def _lengths(self, column: str) -> npt.NDArray[np.int32]:
        return pc.list_value_length(self._table.data.column(column)).to_numpy().astype(np.int32)

    @property
    def num_cut_inputs(self) -> int:
        """How many inputs were longer than the limit."""
        return int(self._meta["splits"][self.name]["num_cut_inputs"])

    @property
    def num_cut_targets(self) -> int:
        """How many targets were longer than the limit."""
        return int(self._meta["splits"][self.name]["num_cut_targets"])

    def size(self, index: int, seed: int) -> tuple[int, int]:
        """Return the input and target tokens of an example; the seed shapes none."""
        return int(self.input_lengths[index]), int(self.target_lengths[index])

    def row(self, index: int, seed: int) -> TokenRow:
        """Return the token ids of an example; the seed shapes none."""
        return self.rows([index])[0]

    def rows(self, indices: Iterable[int]) -> list[TokenRow]:
        """Return the token ids of the examples."""
        # Straight from Arrow: the library's own indexing costs a fifth of a millisecond a call.
        inputs, targets = (self._table.data.column(name) for name in ("input_ids", "target_ids"))
        return [TokenRow(_ids(inputs[int(i)]), _ids(targets[int(i)])) for i in indices]

    def examples(self, indices: Iterable[int]) -> list[Example]:
        """Return the examples as text."""
        columns = self._texts[[int(i) for i in indices]]
        shared = tuple(self._meta["choices"])
        columns["choices"] = [shared if own is None else tuple(own) for own in columns["choices"]]
        columns["answers"] = [tuple(answers) for answers in columns["answers"]]
        return [Example(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def choice_ids(self, index: int) -> list[list[int]]:
        """Return the token ids of every choice of an example, each ending in </s>; [] for free text."""
        own = self._choice_ids[int(index)]["choice_ids"]
        return self._meta["choice_ids"] if own is None else own

    @cached_property
    def _choice_ids(self) -> datasets.Dataset:
        return self._table.select_columns(["choice_ids"])

    @cached_property
    def longest_choices(self) -> int | None:
        """The tokens of all choices of an example together, at most; None where an example has no choices."""
        own = self._choice_ids.data.column("choice_ids").combine_chunks()
        shared = sum(map(len, self._meta["choice_ids"]))
        totals = np.full(len(own), shared)
        has_own = own.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(pc.list_flatten(own)).to_numpy()
        totals[has_own] = np.bincount(pc.list_parent_indices(own), weights=lengths, minlength=len(own))[has_own]
        return int(totals.max()) if totals.min() > 0 else None

    def targets(self) -> list[str]:
        """Return the target text of every example."""
        return self._table.data.column("target").to_pylist()


def _ids(tokens: Any) -> list[int]:
    return tokens.values.to_numpy().tolist()


@dataclass(frozen=True)
class TaskData:
    """A task with its two splits. digest (20 hex digits): same digest, same token ids in the same order. rows_digest:
    of the same rows, formats and limits, whatever their tokens: scores on them compare."""

    task: Task
    train: Split
    validation: Split
    digest: str
    rows_digest: str


@dataclass(frozen=True)
class TextData:
    """Plain text with its two splits; one that is only evaluated on has an empty `train`."""

    task: TextTask
    train: TextSplit
    validation: TextSplit
    digest: str

    @property
    def rows_digest(self) -> str:
        """The digest: a loss by token compares between equal tokens alone."""
        return self.digest


AnyData = TaskData | TextData


def prepare(
    config: RunConfig, tasks: Sequence[Task | TextTask], tokenizer: Tokenizer, *, max_input_tokens: int
) -> tuple[AnyData, ...]:
    """Read and tokenise every task, or open what an earlier run left in `data.cache_dir`.

    Inputs longer than max_input_tokens and targets longer than `data.max_target_tokens` are cut and keep their </s>.
    Raises DataError naming file, line and field for a bad row, and for an empty split or a choice that would be cut.
    """
    return tuple(
        _prepare_text(config.data, task, tokenizer, max_input_tokens)
        if isinstance(task, TextTask)
        else _prepare(config.data, task, tokenizer, max_input_tokens)
        for task in tasks
    )


def _prepare(config: DataConfig, task: Task, tokenizer: Tokenizer, max_input_tokens: int) -> TaskData:
    limits = {"train": config.max_train_examples, "validation": config.max_validation_examples}
    rows = {
        "task": task.name,
        "source": reading.source_identity(task),
        "examples": _identity(task.examples),
        "choices": task.choices,
        "limits": limits,
    }
    identity = {
        **rows,
        "format": token_store.FORMAT,
        "tokenizer": _tokenizer_identity(tokenizer),
        "max_tokens": [max_input_tokens, config.max_target_tokens],
    }
    digest = _digest(identity)
    folder = _cache_folder(config) / digest
    if not token_store.is_whole(folder):
        read = {
            "train": reading.read_examples(task, task.train_split),
            "validation": reading.read_examples(task, task.validation_split),
        }
        splits = {name: islice(examples, limits[name]) for name, examples in read.items()}
        token_store.Writer(task, tokenizer, max_input_tokens, config.max_target_tokens).write(folder, splits)
    data = TaskData(task, Split(folder, "train"), Split(folder, "validation"), digest, _digest(rows))
    for split in (data.train, data.validation):
        if split.num_cut_targets:
            counts = f"{split.num_cut_targets} of {len(split)} {split.name} targets"
            logger.warning("%s: %s were cut to data.max_target_tokens=%d", task.name, counts, config.max_target_tokens)
    return data


def _prepare_text(config: DataConfig, task: TextTask, tokenizer: Tokenizer, max_input_tokens: int) -> TextData:
    identity = {
        "format": token_store.FORMAT,
        "source": reading.text_identity(task),
        "tokenizer": _tokenizer_identity(tokenizer),
    }
    text = _digest(identity)
    folder = _cache_folder(config) / text
    if not token_store.is_whole(folder):
        text_store.write(folder, task.name, reading.text_of(task), tokenizer)
    objective = text_store.objective(task, tokenizer, task.input_tokens or max_input_tokens)
    limits = {"train": config.max_train_examples, "validation": config.max_validation_examples}
    train, validation = (TextSplit(folder, name, objective, limits[name]) for name in ("train", "validation"))
    if (task.has_train and not len(train)) or not len(validation):
        short = "validation" if len(train) or not task.has_train else "train"
        raise DataError(
            f"{task.name}: the {short} text is shorter than two windows of {objective.window} tokens. Give more "
            "text, lower its input_tokens, or raise held_out"
        )
    return TextData(task, train, validation, _digest([text, repr(objective), limits]))


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _cache_folder(config: DataConfig) -> Path:
    return config.cache_dir or section.cache()


def majority(data: AnyData) -> dict[str, float]:
    """Return the task's validation metrics of always saying the most frequent training target.

    Of text: those of the best unigram model there can be, the one fitted to the validation targets themselves.
    """
    if isinstance(data, TextData):
        return text_metrics(data.validation.unigram_loss())
    target, _ = Counter(data.train.targets()).most_common(1)[0]
    references = data.validation.examples(range(len(data.validation)))
    return compute(data.task.metrics, [target] * len(references), references)


def text_metrics(loss: float) -> dict[str, float]:
    """Return the metrics of text. loss: mean negative log-likelihood of a target token, in nats.

    The score is 1/perplexity, the (geometric) mean probability that the model gives to the right token.
    """
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "score": math.exp(-loss)}


def _identity(value: Any) -> str:
    """What identifies a callable from one process to the next: the source file that defines it, and its settings."""
    if isinstance(value, partial):
        return " ".join(map(_identity, (value.func, *value.args, *value.keywords, *value.keywords.values())))
    if not callable(value):
        return repr(value)
    kind = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    settings = [] if kind is value else [repr(value)]
    closure = [_identity(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
    file = Path(inspect.getfile(kind))
    # A notebook's cell is no file.
    code = file.read_bytes() if file.is_file() else inspect.getsource(kind).encode()
    return " ".join([kind.__module__, kind.__qualname__, hashlib.sha256(code).hexdigest(), *settings, *closure])


def _tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Hash the whole of a fast tokenizer, or the vocabulary of a slow one."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two only tell how it was last called.
        content.update(truncation=None, padding=None)
    else:
        content = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    content["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
