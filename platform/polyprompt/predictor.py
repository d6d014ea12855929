"""A trained model that answers rows of mixed tasks: from a bundle to predictions, with no training data at hand.

Letters: B rows of a batch, C choices of a row.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from polyprompt import backbone as backbones
from polyprompt import checkpoint, precision, token_store
from polyprompt.checkpoint import Bundle
from polyprompt.collation import collate, frugal_batches, length_batches
from polyprompt.errors import BundleError, DataError, hint
from polyprompt.model import Written, input_limit
from polyprompt.plan import Load, model_of
from polyprompt.precision import autocast
from polyprompt.result import RunResult
from polyprompt.run_folder import BUNDLES, RESULT, best_bundle
from polyprompt.tasks import catalog
from polyprompt.tasks.fields import get
from polyprompt.tasks.records import Example, Task, TokenRow

#: What a row says of itself beside the fields of its task.
TASK, INPUT, CHOICES = "task", "input", "choices"
#: What a batch costs on a CPU whatever its rows, in input tokens (of a small T5 in bf16: 8 ms, and 0.06 ms a token).
BATCH_COST = 150
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    score: the log-likelihood (nats) that the model gives to `prediction`, its end token included. choice_scores: the
    same of every choice; empty for free text. error: why there is no answer ("" if there is one); then nothing else is
    set.
    """

    task: str = ""
    input: str = ""
    prediction: str = ""
    score: float = float("nan")
    choice_scores: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class _Ask:
    """A row that has become text and tokens. choice_ids: of example.choices, each ending in </s>; [] for free text."""

    place: int
    task: int
    task_name: str
    example: Example
    tokens: TokenRow
    choice_ids: list[list[int]]


def find_bundle(source: Path) -> Path:
    """Return the bundle that a path means: itself, or of a run's folder the best one, of an unfinished run the newest.

    Raises BundleError where there is none.
    """
    if (source / checkpoint.MANIFEST).is_file():
        return source
    if (source / RESULT).is_file():
        return best_bundle(source, RunResult.read(source / RESULT))
    newest = checkpoint.newest_whole(source / BUNDLES) if (source / BUNDLES).is_dir() else None
    if newest is None:
        raise BundleError(
            f"{source} holds no trained model; give a run's folder (runs/NAME) or one of its bundles/step_…"
        )
    log.warning("%s is of an unfinished run; its newest bundle %s is used", source, newest.name)
    return newest


class Predictor:
    """A model on a device, ready to answer. Not for several threads at once."""

    def __init__(
        self,
        bundle: Path | Bundle,
        *,
        backbone: str | None = None,
        device: str | torch.device = "cpu",
        load: Load = backbones.load,
    ) -> None:
        """Load the model of a bundle, which may be open already.

        backbone: where the backbone is now, if not where it was in training; its content must be the same.
        load: what loads the backbone. Raises BundleError for a damaged bundle or another backbone, ConfigError where
        the backbone cannot be loaded.
        """
        opened = bundle if isinstance(bundle, Bundle) else checkpoint.read(bundle)
        config = opened.config.with_backbone_at(backbone)
        self.config, self.bundle, self.device = config, opened.folder, torch.device(device)
        precision.warn_of_emulation(config.train.precision, self.device)
        self.tasks: tuple[Task | None, ...] = catalog.forms(config)
        self.model = model_of(config, len(self.tasks), opened, load)
        self.model.eval().to(self.device)
        self.max_input_tokens = input_limit(config, self.model.backbone, self.model.method)
        self._index = {task.name: i for i, task in enumerate(self.tasks) if task is not None}
        self._writers = {i: self._writer(task) for i, task in enumerate(self.tasks) if task is not None}
        self._choice_ids = {i: writer.task_choice_ids() for i, writer in self._writers.items()}

    @property
    def task_names(self) -> list[str]:
        """The tasks that it can be asked."""
        return list(self._index)

    @property
    def free_text_tasks(self) -> frozenset[str]:
        """Those without choices, unless a row has some."""
        return frozenset(task.name for task in self.tasks if task is not None and not task.choices)

    def predict(
        self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 64, mode: str | None = None
    ) -> list[Prediction]:
        """Answer rows of any tasks in any order; the answers come in the rows' order.

        A row has `task`, and either the task's own fields (a label is neither needed nor looked at) or `input`, the
        text as the task's format writes it, with `choices` where the task has none of its own. mode: "rank" or
        "generate", as `evaluate.mode`; the run's own by default. A row that does not fit has its error as the answer.
        """
        errors: dict[int, Prediction] = {}
        examples: dict[int, tuple[str, Example]] = {}
        for place, row in enumerate(rows):
            try:
                examples[place] = self._example(row)
            except DataError as error:
                errors[place] = Prediction(error=str(error))
        found = self.answer(list(examples.values()), batch_size=batch_size, mode=mode)
        answers = errors | dict(zip(examples, found, strict=True))
        return [answers[place] for place in range(len(rows))]

    def answer(
        self, examples: Sequence[tuple[str, Example]], *, batch_size: int = 64, mode: str | None = None
    ) -> list[Prediction]:
        """Answer examples, each with the name of its task; see `predict`. Targets are not looked at."""
        answers: dict[int, Prediction] = {}
        asks: list[_Ask] = []
        for place, (name, example) in enumerate(examples):
            try:
                asks.append(self._ask(place, name, example))
            except DataError as error:
                answers[place] = Prediction(error=str(error))
        rank = (mode or self.config.evaluate.mode) == "rank"
        for batch in self._batches(asks, batch_size):
            for ask, answer in zip(batch, self._answer(batch, rank), strict=True):
                answers[ask.place] = answer
        return [answers[place] for place in range(len(examples))]

    def _writer(self, task: Task) -> token_store.Writer:
        return token_store.Writer(
            task, self.model.backbone.tokenizer, self.max_input_tokens, self.config.data.max_target_tokens
        )

    def _example(self, row: Mapping[str, Any]) -> tuple[str, Example]:
        """Return the row's task and what its format makes of the row. Raises DataError naming what does not fit."""
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be a table of fields, not {type(row).__name__}")
        name = get(row, TASK)
        if not isinstance(name, str) or name not in self._index:
            known = self.task_names
            raise DataError(f"task {name!r} is not one of this model's: {', '.join(known)}.{hint(str(name), known)}")
        index = self._index[name]
        task = self.tasks[index]
        assert task is not None
        return task.name, _example(task, {key: value for key, value in row.items() if key != TASK})

    def _ask(self, place: int, name: str, example: Example) -> _Ask:
        """Raises DataError for what no tokenizer takes, and for a choice that is too long."""
        for text in (example.input, *example.choices):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError(f"{name}: a text holds half of a surrogate pair, which is no character") from None
        index = self._index[name]
        task, writer = self.tasks[index], self._writers[index]
        assert task is not None
        (tokens,), _ = writer.inputs([example.input])
        shared = example.choices == task.choices
        choice_ids = self._choice_ids[index] if shared else writer.choice_ids(example.choices, name)
        return _Ask(place, index, task.name, example, TokenRow(tokens, []), choice_ids)

    def _batches(self, asks: Sequence[_Ask], batch_size: int) -> Iterator[list[_Ask]]:
        """Rows of like length together."""
        lengths = [len(ask.tokens.input_ids) for ask in asks]
        # A GPU is not full of a part of a batch.
        frugal = self.device.type == "cpu"
        cuts = frugal_batches(lengths, batch_size, BATCH_COST) if frugal else length_batches(lengths, batch_size)
        for indices in cuts:
            yield [asks[i] for i in indices]

    @torch.inference_mode()
    def _answer(self, asks: Sequence[_Ask], rank: bool) -> Iterator[Prediction]:
        """rank: where a row has choices, the likeliest is its answer; else all write theirs."""
        tokenizer = self.model.backbone.tokenizer
        batch = collate([ask.tokens for ask in asks], [ask.task for ask in asks], tokenizer.pad_token_id).to(
            self.device
        )
        with autocast(self.config.train.precision, self.device.type):
            answers = self.model.answer(
                batch.input_ids_BT,
                batch.mask_BT,
                batch.task_B,
                [ask.choice_ids if rank else [] for ask in asks],
                max_new_tokens=self.config.data.max_target_tokens,
            )
        for ask, answer in zip(asks, answers, strict=True):
            if isinstance(answer, Written):
                text = tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
                yield Prediction(ask.task_name, ask.example.input, text, answer.score)
            else:
                best = max(range(len(answer)), key=answer.__getitem__)
                scores = dict(zip(ask.example.choices, answer, strict=True))
                choice = ask.example.choices[best]
                yield Prediction(ask.task_name, ask.example.input, choice, answer[best], scores)


def _example(task: Task, fields: Mapping[str, Any]) -> Example:
    """Return what the task's format makes of the fields, or the text `input` as it stands where they do not fit it."""
    try:
        made = _examples(task, fields)
    except DataError:
        if not isinstance(fields.get(INPUT), str):
            raise
        made = [Example(fields[INPUT], "", _choices(fields))]
    if len(made) != 1:
        raise DataError(f"{task.name}: the row holds {len(made)} questions; give each its own row")
    (example,) = made
    return example if example.choices else replace(example, choices=task.choices)


def _examples(task: Task, fields: Mapping[str, Any]) -> list[Example]:
    """Raises DataError, also where a field is of a kind that the task's format did not think of."""
    try:
        return list(task.examples(fields, "test"))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise DataError(
            f"{task.name}: the row's fields do not fit the task's format: {type(error).__name__}: {error}"
        ) from error


def _choices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    given = fields.get(CHOICES) or ()
    fits = isinstance(given, list | tuple) and all(isinstance(choice, str) for choice in given)
    if not fits or len(set(given)) < len(given):
        raise DataError(f"field {CHOICES!r} is {given!r}; expected a list of different texts")
    return tuple(given)
