"""A user's own task, written in YAML: templates over the fields of its rows."""

import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyprompt.errors import ConfigError, DataError, hint
from polyprompt.task_configs import TaskConfig
from polyprompt.tasks.fields import get
from polyprompt.tasks.metrics import check_names
from polyprompt.tasks.records import Example, FileSource, HubSource, Row, Source, Task

#: These read what only a catalogue task's examples carry (groups of answers, WSC's label).
_CATALOGUE_METRICS = ("multirc_f1a", "multirc_em", "wsc_accuracy")
_NUMBER_METRICS = ("pearson", "spearman")


@dataclass(frozen=True)
class Template:
    """Text with the row's fields put in: literal text and field names take turns, as (literal, field or None)."""

    parts: tuple[tuple[str, str | None], ...]

    def __call__(self, row: Row) -> str:
        return "".join(literal + ("" if field is None else _as_text(row, field)) for literal, field in self.parts)


@dataclass(frozen=True)
class TemplateExamples:
    """Turns a row into one example by its templates. `numeric`: the target must be a number, kept as its value."""

    input: Template
    target: Template
    labels: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    numeric: bool

    def __call__(self, row: Row, split: str) -> Iterator[Example]:
        if split == "test" and not self._has_target(row):
            yield Example(self.input(row), "", self.choices)
            return
        target = raw = self.target(row)
        if self.labels:
            known = dict(self.labels)
            if raw not in known:
                raise DataError(f"target {raw!r} is not in the task's labels; expected one of {', '.join(known)}")
            target = known[raw]
        if self.choices and target not in self.choices:
            choices = ", ".join(self.choices)
            raise DataError(f"target {target!r} is not among the choices {choices}.{hint(target, self.choices)}")
        yield Example(self.input(row), target, self.choices, value=_finite(raw) if self.numeric else None)

    def _has_target(self, row: Row) -> bool:
        try:
            return self.target(row) != "-1"
        except DataError:
            return False


def task_of(config: TaskConfig, *, with_source: bool = True) -> Task:
    """Build the task. Raises ConfigError naming the key that does not fit, DataError for a file that is not there.

    with_source: False for the form of its rows alone, wherever its files are.
    """
    where = f"tasks: {config.name}"
    labels = tuple((config.labels or {}).items())
    # A label map already lists everything that can be said.
    choices = tuple(dict.fromkeys(config.choices or [word for _, word in labels]))
    strange = [word for _, word in labels if word not in choices]
    if strange:
        raise ConfigError(f"{where}: labels give {strange[0]!r}, which is not among the choices {', '.join(choices)}")
    _check_metrics(config, choices)
    # A target without braces is the name of a field.
    target = template(config.target, f"{where}: target") if set("{}") & set(config.target) else _field(config.target)
    numeric = any(m in _NUMBER_METRICS for m in config.metrics)
    examples = TemplateExamples(template(config.input, f"{where}: input"), target, labels, choices, numeric)
    source = _source(config) if with_source else FileSource({})
    return Task(config.name, source, examples, tuple(config.metrics), choices, config.weight)


def template(pattern: str, where: str) -> Template:
    """Parse "{field}" and "{field.sub}"; {{ and }} are literal braces. Raises ConfigError starting with `where`."""
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ConfigError(f"{where}: template {pattern!r}: {error}; write {{{{ and }}}} for literal braces") from error
    for _, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise ConfigError(f"{where}: template {pattern!r}: only {{field}} and {{field.sub}} are understood")
    if all(field is None for _, field, _, _ in parsed):
        raise ConfigError(f"{where}: template {pattern!r} names no field of the row; write one as {{field}}")
    return Template(tuple((literal, field) for literal, field, _, _ in parsed))


def _field(name: str) -> Template:
    return Template((("", name),))


def _as_text(row: Row, field: str) -> str:
    value: Any = get(row, field)
    if value is None:
        raise DataError(f"field {field!r} is null; expected text or a number")
    if isinstance(value, Mapping):
        parts = ", ".join(f"{field}.{part}" for part in value)
        raise DataError(f"field {field!r} is a table; name one of its parts: {parts}")
    if not isinstance(value, str | bool | int | float):
        raise DataError(f"field {field!r} is a {type(value).__name__}; expected text or a number")
    return str(value)


def _finite(raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"target {raw!r} is not a number, which pearson and spearman need")
    return value


def _check_metrics(config: TaskConfig, choices: tuple[str, ...]) -> None:
    where = f"tasks: {config.name}"
    try:
        check_names(config.metrics)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for name in config.metrics:
        if name in _CATALOGUE_METRICS:
            raise ConfigError(f"{where}: metric {name!r} fits its benchmark task only; use accuracy, f1 or exact_match")
        if name == "f1" and not choices:
            raise ConfigError(f"{where}: metric 'f1' needs choices, the last of which is the positive class")


def _source(config: TaskConfig) -> Source:
    where = f"tasks: {config.name}"
    given = config.hub.splits if config.hub else config.files or {}
    for split in ("train", "validation"):
        if split not in given:
            raise ConfigError(f"{where}: the {split} split is not given; both train and validation are needed")
    if config.hub:
        splits = {str(split): name for split, name in config.hub.splits.items()}
        return HubSource(config.hub.path, config.hub.config, config.hub.revision, splits)
    files = {str(split): path for split, path in (config.files or {}).items()}
    for path in files.values():
        if not path.is_file():
            near = hint(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise DataError(f"{where}: file {path} does not exist.{near} Relative paths start at the working folder")
    return FileSource(files)
