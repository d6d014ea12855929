"""Reading fields of a row, with errors that name the field, its value and what the row holds instead."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyprompt.errors import DataError, hint
from polyprompt.tasks.records import Row


def get(row: Row, *names: str) -> Any:
    """Return the first of the named fields that the row has.

    A name may be dotted for a nested field. Raises DataError naming the first name and the row's fields.
    """
    for name in names:
        node: Any = row
        for part in [name] if name in row else name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                break
            node = node[part]
        else:
            return node
    raise DataError(f"field {names[0]!r} is missing; the row has {', '.join(row) or 'no fields'}.{hint(names[0], row)}")


def text(row: Row, *names: str) -> str:
    """Return a field that must be text."""
    value = get(row, *names)
    if not isinstance(value, str):
        raise DataError(f"field {names[0]!r} must be text, not {type(value).__name__} {value!r}")
    return value


def _parsed(value: Any) -> Any:
    """CSV holds text alone: read a number or a boolean where one is written."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        return value


def number(row: Row, *names: str) -> float:
    """Return a field that must be a number."""
    value = _parsed(get(row, *names))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"field {names[0]!r} must be a number, not {type(value).__name__} {value!r}")
    return float(value)


def word(row: Row, words: Sequence[str], split: str, name: str = "label") -> str:
    """Return the word of a class label.

    The label is the word itself, its position in `words` (the hub's integers), or a boolean. The unlabelled rows of a
    test split (no field, null or -1) give "".
    """
    if split == "test" and row.get(name, -1) in (-1, None):
        return ""
    value = get(row, name)
    if isinstance(value, str) and value in words:
        return value
    value = _parsed(value)
    if isinstance(value, bool | int) and 0 <= value < len(words):
        return words[int(value)]
    known = ", ".join(f"{i} or {w!r}" for i, w in enumerate(words))
    raise DataError(f"field {name!r} is {value!r}; expected one of {known}")
