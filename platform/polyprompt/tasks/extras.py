"""Classification data sets beside the benchmarks: SNLI, AG News and SST-5."""

from collections.abc import Iterator

from polyprompt.tasks.fields import text, word
from polyprompt.tasks.glue import Classification
from polyprompt.tasks.records import Example, HubSource, Row, Task

_NLI = ("entailment", "neutral", "contradiction")
_TOPICS = ("World", "Sports", "Business", "Technology")
_GRADES = ("terrible", "bad", "okay", "good", "great")
_snli = Classification("snli", (("hypothesis",), ("premise",)), _NLI)


def snli(row: Row, split: str) -> Iterator[Example]:
    """SNLI without the rows on which its annotators did not agree (label -1 or "-")."""
    if row.get("label") not in (-1, "-"):
        yield from _snli(row, split)


def ag_news(row: Row, split: str) -> Iterator[Example]:
    """The topic of a news item. The official files count topics from 1, the hub (field `text`) from 0."""
    if "text" in row:
        body, label = text(row, "text"), word(row, _TOPICS, split)
    else:
        body, label = f"{text(row, 'title')} {text(row, 'description')}", word(row, ("", *_TOPICS), split)
    yield Example(f"ag_news text: {body}", label, choices=_TOPICS)


EXTRAS: tuple[Task, ...] = (
    Task("extra/snli", HubSource("stanfordnlp/snli"), snli, ("accuracy",), _NLI),
    # There is no validation split.
    Task("extra/ag_news", HubSource("fancyzhx/ag_news"), ag_news, ("accuracy",), _TOPICS, validation_split="test"),
    Task(
        "extra/sst5",
        HubSource("SetFit/sst5"),
        Classification("sst5", (("sentence", "text"),), _GRADES),
        ("accuracy",),
        _GRADES,
    ),
)
