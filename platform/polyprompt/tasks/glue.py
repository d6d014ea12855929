"""GLUE as text-to-text, in T5's formats and with T5's label words.

Source: Raffel et al. 2020, section 2.4 and appendix D; the `glue` and `stsb` preprocessors of T5's code.
Rows come in the hub's fields (integer labels) or with the label words themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from polyprompt.errors import DataError
from polyprompt.tasks.fields import number, text, word
from polyprompt.tasks.records import Example, HubSource, Row, Task


@dataclass(frozen=True)
class Classification:
    """Turns a row into "prefix name: text name: text ..." with a label word as the target.

    fields: for each part its name, then other names that the row's field may have. words: the target of each integer
    label, in order; the last one is the positive class of a binary F1.
    """

    prefix: str
    fields: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]

    def __call__(self, row: Row, split: str) -> Iterator[Example]:
        parts = [f"{names[0]}: {text(row, *names)}" for names in self.fields]
        yield Example(" ".join([self.prefix, *parts]), word(row, self.words, split), choices=self.words)


def similarity(row: Row, split: str) -> Iterator[Example]:
    """STS-B: the similarity (0 to 5) as text, rounded to the nearest 0.2. `Example.value` keeps the exact number."""
    body = f"stsb sentence1: {text(row, 'sentence1')} sentence2: {text(row, 'sentence2')}"
    if split == "test" and row.get("label", -1) in (-1, None):
        yield Example(body, "")
        return
    label = number(row, "label")
    if not 0.0 <= label <= 5.0:
        raise DataError(f"field 'label' is {label!r}; expected a similarity from 0 to 5")
    yield Example(body, f"{round(label * 5) / 5:.1f}", value=label)


def _hub(config: str, validation: str = "validation", test: str = "test") -> HubSource:
    splits = {"train": "train", "validation": validation, "test": test}
    # The commit is pinned so that a run's data never change under it.
    return HubSource("nyu-mll/glue", config, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", splits)


def _classes(
    name: str, fields: tuple[tuple[str, ...], ...], words: tuple[str, ...], metrics: tuple[str, ...], source: HubSource
) -> Task:
    return Task(f"glue/{name}", source, Classification(name, fields, words), metrics, words)


_SENTENCE = (("sentence",),)
_PAIR = (("sentence1",), ("sentence2",))

GLUE: tuple[Task, ...] = (
    _classes("cola", _SENTENCE, ("unacceptable", "acceptable"), ("matthews",), _hub("cola")),
    _classes("sst2", _SENTENCE, ("negative", "positive"), ("accuracy",), _hub("sst2")),
    _classes("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), _hub("mrpc")),
    Task("glue/stsb", _hub("stsb"), similarity, ("pearson", "spearman")),
    _classes("qqp", (("question1",), ("question2",)), ("not_duplicate", "duplicate"), ("accuracy", "f1"), _hub("qqp")),
    _classes(
        "mnli",
        (("hypothesis",), ("premise",)),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        _hub("mnli", "validation_matched", "test_matched"),
    ),
    _classes("qnli", (("question",), ("sentence",)), ("entailment", "not_entailment"), ("accuracy",), _hub("qnli")),
    # SuperGLUE's files call the same two sentences premise and hypothesis.
    _classes(
        "rte",
        (("sentence1", "premise"), ("sentence2", "hypothesis")),
        ("entailment", "not_entailment"),
        ("accuracy",),
        _hub("rte"),
    ),
    _classes("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), _hub("wnli")),
)
