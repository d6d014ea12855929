"""Predictions in the files that the GLUE and SuperGLUE servers take.

Sources: gluebenchmark.com/faq and super.gluebenchmark.com/faq; jiant's `write_preds`. GLUE: "<Task>.tsv" with the
columns index and prediction. SuperGLUE: "<Task>.jsonl" with a line {"idx": …, "label": …} for each row.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyprompt.errors import ConfigError, DataError
from polyprompt.result import write_whole
from polyprompt.tasks import metrics
from polyprompt.tasks.fields import get, number
from polyprompt.tasks.records import Example, Row

Answered = tuple[Row, Sequence[Example], Sequence[str]]
"""A row of the benchmark, what it asks, and what was predicted."""

Lines = Callable[[Iterable[Answered]], Iterator[str]]


def write(task: str, answered: Iterable[Answered], folder: Path) -> Path:
    """Write a task's file into the folder, whole or not at all, and return it. Raises ConfigError, DataError."""
    if task not in FILES:
        raise ConfigError(f"{task} is on no benchmark server; submission files exist for {', '.join(FILES)}")
    name, lines = FILES[task]
    write_whole(folder / name, "".join(f"{line}\n" for line in lines(answered)).encode())
    return folder / name


def _tsv(label: Callable[[str], Any]) -> Lines:
    def lines(answered: Iterable[Answered]) -> Iterator[str]:
        yield "index\tprediction"
        for number_, (_, _, (said,)) in enumerate(answered):
            yield f"{number_}\t{label(said)}"

    return lines


def _jsonl(label: Callable[[str], Any]) -> Lines:
    def lines(answered: Iterable[Answered]) -> Iterator[str]:
        for row, _, (said,) in answered:
            yield json.dumps({"idx": get(row, "idx"), "label": label(said)})

    return lines


def _one_of(words: Mapping[str, Any]) -> Callable[[str], Any]:
    """A text that is none of the words, which only generated answers can be, counts as the first one."""
    return lambda said: words.get(said, next(iter(words.values())))


def _same(*words: str) -> Callable[[str], Any]:
    return _one_of({word: word for word in words})


def _score(said: str) -> str:
    """STS-B: a number from 0 to 5; a text that is none counts as 0."""
    try:
        return f"{min(5.0, max(0.0, float(said))):.3f}"
    except ValueError:
        return "0.000"


def _multirc(answered: Iterable[Answered]) -> Iterator[str]:
    """The nested rows of the official files: a passage, its questions, their answers."""
    for row, _, said in answered:
        remaining = iter(said)
        if "passage" not in row:
            raise DataError("MultiRC's server takes the official, nested rows; give the official test.jsonl")
        questions = [
            {
                "idx": get(question, "idx"),
                "answers": [
                    {"idx": get(answer, "idx"), "label": int(next(remaining) == "True")}
                    for answer in get(question, "answers")
                ],
            }
            for question in get(row, "passage.questions")
        ]
        yield json.dumps({"idx": get(row, "idx"), "passage": {"questions": questions}})


def _record(answered: Iterable[Answered]) -> Iterator[str]:
    for row, examples, said in answered:
        queries = get(row, "qas") if "qas" in row else [row]
        for query, example, text in zip(queries, examples, said, strict=True):
            index = get(query, "idx")
            index = int(number(query, "idx.query")) if isinstance(index, dict) else index
            yield json.dumps({"idx": index, "label": text or example.choices[0]})


def _wsc(answered: Iterable[Answered]) -> Iterator[str]:
    """Whether the model named the row's candidate, by the rule of `metrics.wsc_accuracy`."""
    for row, (example,), (said,) in answered:
        yield json.dumps({"idx": get(row, "idx"), "label": str(metrics.names_candidate(said, example.target))})


_BINARY = _one_of({"not_entailment": "not_entailment", "entailment": "entailment"})
_NLI = _same("entailment", "neutral", "contradiction")
_TRUTH = _one_of({"False": "false", "True": "true"})

#: Task → the server's file name, and how its lines are made.
FILES: Mapping[str, tuple[str, Lines]] = {
    "glue/cola": ("CoLA.tsv", _tsv(_one_of({"unacceptable": 0, "acceptable": 1}))),
    "glue/sst2": ("SST-2.tsv", _tsv(_one_of({"negative": 0, "positive": 1}))),
    "glue/mrpc": ("MRPC.tsv", _tsv(_one_of({"not_equivalent": 0, "equivalent": 1}))),
    "glue/stsb": ("STS-B.tsv", _tsv(_score)),
    "glue/qqp": ("QQP.tsv", _tsv(_one_of({"not_duplicate": 0, "duplicate": 1}))),
    "glue/mnli": ("MNLI-m.tsv", _tsv(_NLI)),
    "glue/qnli": ("QNLI.tsv", _tsv(_BINARY)),
    "glue/rte": ("RTE.tsv", _tsv(_BINARY)),
    "glue/wnli": ("WNLI.tsv", _tsv(_one_of({"not_entailment": 0, "entailment": 1}))),
    "super_glue/boolq": ("BoolQ.jsonl", _jsonl(_TRUTH)),
    "super_glue/cb": ("CB.jsonl", _jsonl(_NLI)),
    "super_glue/copa": ("COPA.jsonl", _jsonl(_one_of({"choice1": 0, "choice2": 1}))),
    "super_glue/multirc": ("MultiRC.jsonl", _multirc),
    "super_glue/record": ("ReCoRD.jsonl", _record),
    "super_glue/rte": ("RTE.jsonl", _jsonl(_BINARY)),
    "super_glue/wic": ("WiC.jsonl", _jsonl(_TRUTH)),
    "super_glue/wsc": ("WSC.jsonl", _wsc),
}
