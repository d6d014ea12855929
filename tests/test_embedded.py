import hashlib
import importlib
import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import AutoConfig, AutoTokenizer, T5Config

from polyprompt.errors import DataError
from polyprompt.tasks import embedded_words as words
from polyprompt.tasks.embedded import NUM_ROWS, tasks
from polyprompt.tasks.metrics import check_names, compute
from polyprompt.tasks.records import Example, GeneratedSource, Row, Task

FOLDER = Path(__file__).parents[1] / "platform" / "polyprompt" / "embedded"
JOBS = Path(__file__).parents[1] / "jobs"
TASKS = tasks()
CLASSIFIED = [name for name, task in TASKS.items() if task.choices]
every_task = pytest.mark.parametrize("name", list(TASKS))

#: sha256 of all rows. A new grammar changes it on purpose: raise embedded.VERSION and renew docs/embedded.md too.
DIGEST = "dcf15588a01ca18bd91593827004533236f5ffcaeee233bd47498d9d44b190a2"

#: Bag-of-words accuracy (similarity: Pearson) must stay below these; trained models score at least 0.85 on each.
CEILINGS = {
    "embedded/sentiment": 0.72,
    "embedded/acceptability": 0.58,
    "embedded/nli": 0.72,
    "embedded/paraphrase": 0.58,
    "embedded/similarity": 0.55,
    "embedded/wic": 0.58,
    "embedded/boolq": 0.75,
    "embedded/copa": 0.58,
}


def rows(task: Task, split: str) -> Iterator[Row]:
    assert isinstance(task.source, GeneratedSource)
    return task.source.rows(split)


@cache
def examples(name: str, split: str) -> tuple[Example, ...]:
    return tuple(example for row in rows(TASKS[name], split) for example in TASKS[name].examples(row, split))


def inputs(name: str, split: str) -> list[str]:
    return [example.input for example in examples(name, split)]


def test_rows_are_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for name in TASKS:
        for split in NUM_ROWS:
            for e in examples(name, split):
                digest.update(json.dumps([name, split, e.input, e.target, e.value]).encode())
    assert digest.hexdigest() == DIGEST


def test_the_suite_is_eight_tasks_with_known_metrics() -> None:
    kinds = ("sentiment", "acceptability", "nli", "paraphrase", "similarity", "wic", "boolq", "copa")
    assert list(TASKS) == [f"embedded/{kind}" for kind in kinds]
    for name, task in TASKS.items():
        assert task.name == name
        check_names(task.metrics)


@every_task
def test_tasks_pickle(name: str) -> None:
    copy = pickle.loads(pickle.dumps(TASKS[name]))
    assert next(rows(copy, "train")) == next(rows(TASKS[name], "train"))


@every_task
def test_no_input_is_given_twice(name: str) -> None:
    train, validation = inputs(name, "train"), inputs(name, "validation")
    assert len(set(train)) == len(train) == NUM_ROWS["train"]
    assert len(set(validation)) == len(validation) == NUM_ROWS["validation"]
    assert not set(train) & set(validation)


@pytest.mark.parametrize("name", CLASSIFIED)
@pytest.mark.parametrize("split", list(NUM_ROWS))
def test_labels_are_balanced(name: str, split: str) -> None:
    counts = Counter(example.target for example in examples(name, split))
    assert set(counts) == set(TASKS[name].choices)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_similarity_targets_are_the_values_rounded_to_a_fifth() -> None:
    counts = Counter(example.target for example in examples("embedded/similarity", "train"))
    assert counts.most_common(1)[0][1] < 0.35 * NUM_ROWS["train"]
    for example in examples("embedded/similarity", "validation"):
        assert example.value is not None
        assert 0 <= example.value <= 5
        assert abs(float(example.target) - example.value) <= 0.1 + 1e-9
        assert round(float(example.target) * 5, 6).is_integer()


HELD_OUT: dict[str, Sequence[str]] = {
    "embedded/sentiment": words.half(words.THINGS, True),
    "embedded/nli": words.half(words.THINGS, True) + tuple(f"{p}s" for p in words.half(words.PEOPLE, True)),
    "embedded/paraphrase": words.half(words.PEOPLE, True),
    "embedded/similarity": words.half(words.NAMES, True) + words.half(words.THINGS, False),
    "embedded/copa": words.half(words.NAMES, False),
}


@pytest.mark.parametrize("name", list(HELD_OUT))
def test_held_out_words_are_unseen_in_training_but_seen_in_another_task(name: str) -> None:
    held_out = set(HELD_OUT[name])
    assert not held_out & set(" ".join(inputs(name, "train")).split())
    assert held_out <= set(" ".join(inputs(name, "validation")).split())
    assert held_out <= set(" ".join(" ".join(inputs(other, "train")) for other in TASKS if other != name).split())


@pytest.mark.parametrize(("name", "kinds"), [("acceptability", "PEOPLE QUALITIES"), ("boolq", "STATED STATES")])
def test_held_out_pairs_are_unseen_in_training(name: str, kinds: str) -> None:
    """Each example asks about one pair: the head noun and the quality, the question's thing and its state."""
    first, second = (set(getattr(words, kind)) for kind in kinds.split())

    def pairs(split: str) -> set[tuple[str, str]]:
        found = set()
        for text in inputs(f"embedded/{name}", split):
            tokens = text.rpartition("question: ")[2].split()
            heads = [t.removesuffix("s") if t not in first else t for t in tokens]
            ends = [t for t in tokens if t in second]
            found.add((next(h for h in heads if h in first), ends[0]))
        return found

    train, validation = pairs("train"), pairs("validation")
    if name == "acceptability":  # a swap may put the other noun before the head
        assert len(validation - train) > 0.8 * len(validation)
    else:
        assert not train & validation


def test_contexts_of_wic_are_unseen_in_training() -> None:
    def contexts(split: str) -> set[frozenset[str]]:
        wic = rows(TASKS["embedded/wic"], split)
        return {frozenset(row[s].split()[3::2]) for row in wic for s in ("sentence1", "sentence2")}

    assert len(contexts("validation")) == 3 * len(words.TOPICS)
    assert not contexts("train") & contexts("validation")


@every_task
def test_a_bag_of_words_stays_low(name: str) -> None:
    """The floors of docs/embedded.md; print them with `pytest tests/test_embedded.py -k bag -s`."""
    train, validation = examples(name, "train"), examples(name, "validation")
    scores, metrics = [], []
    for vectorizer in (CountVectorizer, TfidfVectorizer):
        vectors = vectorizer(token_pattern=r"\S+", lowercase=False)
        x, z = vectors.fit_transform(inputs(name, "train")), vectors.transform(inputs(name, "validation"))
        if TASKS[name].choices:
            predicted = LogisticRegression(max_iter=1000).fit(x, [e.target for e in train]).predict(z)
            scores.append(float(np.mean(predicted == [e.target for e in validation])))
            metrics.append(compute(TASKS[name].metrics, list(predicted), validation))
        else:
            predicted = Ridge().fit(x, [e.value for e in train]).predict(z)
            scores.append(float(pearsonr(predicted, [e.value for e in validation])[0]))
            metrics.append(compute(TASKS[name].metrics, [f"{p:.3f}" for p in predicted], validation))
    best = max(metrics, key=lambda m: m["score"])
    print(f"\n{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in best.items()))
    assert max(scores) < CEILINGS[name]


def test_a_faulty_row_and_an_unknown_split_are_named() -> None:
    task = TASKS["embedded/nli"]
    with pytest.raises(
        DataError, match="embedded/nli: field 'hypothesis' is missing from a train row that has premise"
    ):
        list(task.examples({"premise": "x", "label": 0}, "train"))
    with pytest.raises(DataError, match="embedded/nli: no split 'test'"):
        list(rows(task, "test"))


def test_every_word_of_the_suite_is_one_piece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    texts = {part for n in TASKS for s in NUM_ROWS for e in examples(n, s) for part in f"{e.input} {e.target}".split()}
    texts |= {f"{tenths / 10:.1f}" for tenths in range(0, 51, 2)}
    assert {text: tokenizer.tokenize(text) for text in texts if len(tokenizer(text).input_ids) != 2} == {}


@pytest.mark.parametrize("text", ["Hello, world! It's 3.4", "naïve — 日本語 🙂", "a\n\tb  c", "Ñandú ﬁ ½ ①"])
def test_the_tokenizer_loses_no_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == text


def test_tokenizer_and_config_are_laid_out_as_t5s() -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(FOLDER), AutoConfig.from_pretrained(FOLDER)
    assert isinstance(config, T5Config)
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    assert [config.pad_token_id, config.eos_token_id, config.decoder_start_token_id] == [0, 1, 0]
    assert len(tokenizer) == config.vocab_size
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in (0, 99)] == [
        len(tokenizer) - 1,
        len(tokenizer) - 100,
    ]
    assert (FOLDER / "tokenizer.json").stat().st_size < 1_000_000


def test_the_tokenizer_script_runs(tmp_path: Path) -> None:
    sys.path.insert(0, str(JOBS))
    try:
        train_tokenizer = importlib.import_module("train_tokenizer")
    finally:
        sys.path.remove(str(JOBS))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(inputs("embedded/boolq", "train") + inputs("embedded/copa", "train")), encoding="utf-8")
    train_tokenizer.main(
        ["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "1200", "--fraction", "1"]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) <= 1200
    assert len(tokenizer("contradiction").input_ids) == 2
