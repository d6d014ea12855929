"""SuperGLUE as text-to-text, in T5's formats and with T5's label words.

Source: Raffel et al. 2020, section 2.4 and appendix D; T5's `glue`, `record` and `wsc_simple` preprocessors.
Rows come in the hub's flat fields or in the nested fields of the official files.
Differs: BoolQ names the question before the passage (T5's code sorts the fields), so that cutting a long input never
cuts the question.
"""

import re
import string
from collections.abc import Iterator
from typing import Any

from polyprompt.errors import DataError
from polyprompt.tasks.fields import get, number, text, word
from polyprompt.tasks.glue import Classification
from polyprompt.tasks.records import Example, HubSource, Row, Task

_TRUTH = ("False", "True")


def multirc(row: Row, split: str) -> Iterator[Example]:
    """One example for each answer of each question; the group is the question."""
    if "passage" not in row:
        yield _answer(row, text(row, "paragraph"), text(row, "question"), text(row, "answer"), _question_id(row), split)
        return
    passage = text(row, "passage.text")
    for question in _items(row, "passage.questions"):
        group = f"{get(row, 'idx')}.{get(question, 'idx')}"
        for answer in _items(question, "answers"):
            yield _answer(answer, passage, text(question, "question"), text(answer, "text"), group, split)


def _question_id(row: Row) -> str:
    return f"{get(row, 'idx.paragraph')}.{get(row, 'idx.question')}"


def _answer(labelled: Row, paragraph: str, question: str, answer: str, group: str, split: str) -> Example:
    body = f"multirc question: {question} answer: {answer} paragraph: {paragraph}"
    body = re.sub("</?b>", "", body.replace("<br>", " "))
    return Example(body, word(labelled, _TRUTH, split), choices=_TRUTH, group=group)


def record(row: Row, split: str) -> Iterator[Example]:
    """Training: one example for each right answer. Otherwise one for each query, with all answers that count.

    The choices are the passage's entities, which differ from row to row.
    """
    if isinstance(get(row, "passage"), str):
        entities, answers = _unique(_items(row, "entities")), _unique(_items(row, "answers"))
        yield from _query(text(row, "passage"), text(row, "query"), entities, answers, split)
        return
    passage = text(row, "passage.text")
    spans = [(int(number(e, "start")), int(number(e, "end"))) for e in _items(row, "passage.entities")]
    entities = _unique([passage[start : end + 1] for start, end in spans])
    for query in _items(row, "qas"):
        unlabelled = split == "test" and "answers" not in query
        answers = () if unlabelled else _unique([text(a, "text") for a in _items(query, "answers")])
        yield from _query(passage, text(query, "query"), entities, answers, split)


def _query(
    passage: str, query: str, entities: tuple[str, ...], answers: tuple[str, ...], split: str
) -> Iterator[Example]:
    # The summary's bullet points become sentences.
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage).replace("\n@highlight\n", ". ")
    body = f"record query: {query} entities: {', '.join(entities)} passage: {passage}"
    if not answers and split != "test":
        raise DataError("field 'answers' is empty; expected at least one answer")
    for target in answers if split == "train" else answers[:1] or ("",):
        yield Example(body, target, choices=entities, answers=answers)


def wsc(row: Row, split: str) -> Iterator[Example]:
    """The text with its pronoun between stars; the target is the candidate referent.

    Training rows whose candidate is wrong give no example, for what is right is then unknown. `Example.value` is 1.0
    where the candidate is the referent and 0.0 where it is not (see `wsc_accuracy`).
    """
    span = row["target"] if isinstance(row.get("target"), dict) else row
    referent = text(span, "span1_text")
    body = "wsc: " + _starred(text(row, "text"), text(span, "span2_text"), int(number(span, "span2_index")))
    label = word(row, _TRUTH, split)
    if split == "train" and label == "False":
        return
    yield Example(body, referent, value=None if label == "" else float(label == "True"))


def _starred(passage: str, pronoun: str, index: int) -> str:
    """Put stars around the pronoun: the word at `index`, or (the files have slips) up to two words away from it."""
    words = passage.split(" ")
    for i in sorted(range(max(0, index - 2), min(len(words), index + 3)), key=lambda i: abs(i - index)):
        bare = words[i].strip(string.punctuation)
        if bare.lower() == pronoun.strip(string.punctuation).lower():
            words[i] = words[i].replace(bare, f"*{bare}*", 1)
            return " ".join(words)
    raise DataError(f"field 'span2_text' is {pronoun!r}, which is not at word {index} of the text {passage!r}")


def _items(row: Row, name: str) -> list[Any]:
    items = get(row, name)
    if not isinstance(items, list):
        raise DataError(f"field {name!r} must be a list, not {type(items).__name__}")
    return items


def _unique(items: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _hub(config: str) -> HubSource:
    # The commit is pinned so that a run's data never change under it.
    return HubSource("aps/super_glue", config, "3de24cf8022e94f4ee4b9d55a6f539891524d646")


def _classes(
    name: str, fields: tuple[str, ...], words: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",)
) -> Task:
    examples = Classification(name, tuple((f,) for f in fields), words)
    return Task(f"super_glue/{name}", _hub(name), examples, metrics, words)


SUPER_GLUE: tuple[Task, ...] = (
    _classes("boolq", ("question", "passage"), _TRUTH),
    _classes("cb", ("hypothesis", "premise"), ("entailment", "contradiction", "neutral"), ("accuracy", "macro_f1")),
    _classes("copa", ("choice1", "choice2", "premise", "question"), ("choice1", "choice2")),
    Task("super_glue/multirc", _hub("multirc"), multirc, ("multirc_f1a", "multirc_em"), _TRUTH),
    Task("super_glue/record", _hub("record"), record, ("record_f1", "record_em")),
    _classes("rte", ("hypothesis", "premise"), ("entailment", "not_entailment")),
    _classes("wic", ("sentence1", "sentence2", "word"), _TRUTH),
    # wsc.fixed: the hub's copy with the word positions mended.
    Task("super_glue/wsc", _hub("wsc.fixed"), wsc, ("wsc_accuracy",)),
)
