"""Keeps the embedded suite's own rows and templates out of the skill tasks."""

import re
from collections.abc import Iterator
from functools import cache

from polyprompt.tasks.embedded import tasks
from polyprompt.tasks.records import GeneratedSource

_WORD = re.compile(r"[a-z0-9']+")
#: Prefixes and field names of the templates of the embedded suite, GLUE, SuperGLUE and the extras.
MARKERS = re.compile(
    r"\b(sentiment|acceptability|nli|paraphrase|similarity|wic|boolq|copa|cola|sst2|sst5|mrpc|stsb|qqp|mnli|qnli|rte|wnli|"
    r"cb|multirc|record|wsc|snli|ag_news|sentence[12]?|premise|hypothesis|choice[12]|question[12]?|passage|paragraph|"
    r"query|entities|answer|word|text)\s?:",
    re.IGNORECASE,
)
#: What a row of the suite consists of; all of these parts together are one leaked row.
_FIELDS = ("sentence", "sentence1", "sentence2", "premise", "hypothesis", "passage", "question", "choice1", "choice2")
#: Rows are looked up by this many first words of their longest text, which none falls short of.
_KEY = 3


def normalised(text: str) -> str:
    """Return the words in lower case, one space before, between and after, without punctuation."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def suite_parts() -> Iterator[tuple[str, ...]]:
    """Yield the normalised parts of every train and validation row of the eight tasks."""
    for task in tasks().values():
        assert isinstance(task.source, GeneratedSource)
        for split in (task.train_split, task.validation_split):
            for row in task.source.rows(split):
                # "cause" and "effect" are COPA's question, not a text.
                texts = (row[f] for f in _FIELDS if f in row and row[f] not in ("cause", "effect"))
                yield tuple(normalised(text) for text in texts)


@cache
def _index() -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    index: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for parts in suite_parts():
        longest = max(parts, key=lambda part: len(part.split()))
        index.setdefault(tuple(longest.split()[:_KEY]), []).append((longest, *(p for p in parts if p != longest)))
    return {key: tuple(dict.fromkeys(rows)) for key, rows in index.items()}


def leaks(text: str) -> bool:
    """Does the text hold all parts of a row of the embedded suite, or a marker of a benchmark template?"""
    if MARKERS.search(text):
        return True
    index, body = _index(), normalised(text)
    words = body.split()
    keys = {tuple(words[i : i + _KEY]) for i in range(len(words))}
    return any(all(part in body for part in row) for key in keys if key in index for row in index[key])
