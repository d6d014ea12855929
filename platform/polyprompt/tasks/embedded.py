"""The embedded suite: eight tasks made by a seeded grammar, each like one task of GLUE or SuperGLUE. Needs no network.

Labels are balanced, and hang on word order, on negation or on which words go together, so that counting words does not
give them away. Train and validation use different words where the label does not hang on the word itself; what is held
out of one task is trained on in another. docs/embedded.md states each task's split rule and floors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from polyprompt.errors import DataError
from polyprompt.tasks import embedded_words as words
from polyprompt.tasks.embedded_words import half
from polyprompt.tasks.records import Example, GeneratedSource, Row, Task

VERSION = "2"
NUM_ROWS: Mapping[str, int] = {"train": 6000, "validation": 400}

Make = Callable[[Random, bool, int], dict[str, Any]]
"""(random stream, is it held out?, label) -> one row."""


def _two(rng: Random, choices: Sequence[str]) -> tuple[str, str]:
    first, second = rng.sample(choices, 2)
    return first, second


def _sentiment(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """A negation turns the adjective around; of two clauses the one behind "but" decides."""

    def clause(noun: str, praise: bool) -> str:
        negated = rng.random() < 0.3
        adjective = rng.choice(words.PRAISE if praise != negated else words.BLAME)
        return f"the {noun} was {rng.choice(words.NEGATIONS if negated else words.DEGREES)} {adjective}"

    main_noun, side_noun = _two(rng, half(words.THINGS, held_out))
    main = clause(main_noun, label == 1)
    if rng.random() < 0.3:
        main = f"{clause(side_noun, rng.random() < 0.5)} but {main}"
    return {"sentence": main, "label": label}


def _acceptability(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Verb and determiner agree with the head noun, not with the noun between; or the word order is wrong."""
    while True:
        head, quality = rng.randrange(len(words.PEOPLE)), rng.randrange(len(words.QUALITIES))
        if ((head + quality) % 4 == 0) == held_out:
            break
    plural, fault = rng.random() < 0.5, None if label else rng.choice(("verb", "verb", "determiner", "order"))
    noun = words.PEOPLE[head] + "s" * plural
    between = rng.choice(words.PEOPLE) + "s" * (rng.random() < 0.5)
    determiner = "these" if plural != (fault == "determiner") else "this"
    verb = "were" if plural != (fault == "verb") else "was"
    parts = [determiner, noun, rng.choice(words.PREPOSITIONS), "the", between, verb, words.QUALITIES[quality]]
    if rng.random() < 0.5:
        del parts[2:5]
    if fault == "order":
        at = rng.randrange(len(parts) - 1)
        parts[at], parts[at + 1] = parts[at + 1], parts[at]
    return {"sentence": " ".join(parts), "label": label}


def _nli(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Two quantities of the same thing: all entails some, no denies it, some leaves all open."""
    first, second = rng.choice(words.QUANTITIES[label])
    people, verb = rng.choice(half(words.PEOPLE, held_out)), rng.choice(words.ACTIONS)
    thing = rng.choice(half(words.THINGS, held_out))
    premise, hypothesis = (f"{quantity} {people}s {verb} the {thing}" for quantity in (first, second))
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _paraphrase(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """The second sentence says the same with another word, or something else of the same people; active or passive."""
    agent, patient = rng.sample(half(words.PEOPLE, held_out), 2)
    pair, other = rng.sample(words.SYNONYMS, 2)
    first, second = rng.sample(pair, 2)
    if not label:
        second = rng.choice(other)
    passive = rng.random() < 0.5
    sentence2 = f"the {patient} was {second} by the {agent}" if passive else f"the {agent} {second} the {patient}"
    return {"sentence1": f"the {agent} {first} the {patient}", "sentence2": sentence2, "label": label}


def _similarity(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Two points on one circle, such as the days of the week; the score falls with the way between them."""
    circle = rng.choice(words.CIRCLES)
    furthest = len(circle) // 2
    # A repeated word shows in the length of a TF-IDF vector, so that few pairs are the same.
    way = 0 if rng.random() < 0.1 else rng.randint(1, furthest)
    start = rng.randrange(len(circle))
    first, second = circle[start], circle[(start + rng.choice((-1, 1)) * way) % len(circle)]
    name, thing = rng.choice(half(words.NAMES, held_out)), rng.choice(half(words.THINGS, not held_out))
    action = rng.choice(words.ACTIONS)
    sentence1, sentence2 = (f"{name} {action} the {thing} {point}" for point in (first, second))
    return {"sentence1": sentence1, "sentence2": sentence2, "label": round(5 * (1 - way / furthest), 3)}


def _is_held_out(pair: Sequence[str]) -> bool:
    """Three of a topic's fifteen pairs of words, with no word in common, are kept for validation."""
    topic = next(t.split() for t in words.TOPICS.values() if pair[0] in t.split())
    return (topic.index(pair[0]) + topic.index(pair[1])) % 5 == 0


def _wic(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Do both sentences use the word in the sense that the company it keeps gives it?"""
    word = rng.choice(sorted(words.AMBIGUOUS))
    topics = rng.sample(words.AMBIGUOUS[word], 2)
    while True:
        first, second = (rng.sample(words.TOPICS[topic].split(), 2) for topic in (topics[0], topics[1 - label]))
        if not set(first) & set(second) and all(_is_held_out(pair) == held_out for pair in (first, second)):
            break
    sentence1, sentence2 = (f"the {word} with {near} and {by}" for near, by in (first, second))
    return {"word": word, "sentence1": sentence1, "sentence2": sentence2, "label": label}


def _boolq(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Three facts, some of them denied, and a question about one; the others are mostly the other way round."""
    asked, alike = rng.randrange(3), rng.random() < 0.4
    while True:
        things, states = rng.sample(words.STATED, 3), rng.sample(words.STATES, 3)
        if ((words.STATED.index(things[asked]) + words.STATES.index(states[asked])) % 5 == 0) == held_out:
            break
    denied = [(rng.random() < 0.5) if alike else label == 1 for _ in things]
    denied[asked] = label == 0
    facts = (
        f"the {what} is {'not' if no else 'very'} {how}" for what, no, how in zip(things, denied, states, strict=True)
    )
    return {"passage": " . ".join(facts), "question": f"is the {things[asked]} {states[asked]}", "label": label}


def _copa(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """An event of the same chain or of another; a cause where the cause is asked for, an effect where the effect is."""
    chain, other = rng.sample(words.CHAINS, 2)
    question = rng.choice(("cause", "effect"))
    step = -1 if question == "cause" else 1
    right = chain[1 + step]
    wrong = chain[1 - step] if rng.random() < 0.3 else other[1 + step]
    choice1, choice2 = (right, wrong) if label == 0 else (wrong, right)
    premise = f"{rng.choice(half(words.NAMES, not held_out))} {chain[1]}"
    return {"premise": premise, "choice1": choice1, "choice2": choice2, "question": question, "label": label}


def _rows(name: str, make: Make, num_labels: int, split: str) -> Iterator[Row]:
    """Yield the split's rows, all different; labels take turns."""
    if split not in NUM_ROWS:
        raise DataError(f"{name}: no split {split!r}; generated tasks have {', '.join(NUM_ROWS)}")
    rng, held_out = Random(f"{VERSION}/{name}/{split}"), split == "validation"
    seen: set[tuple[Any, ...]] = set()
    for _ in range(100 * NUM_ROWS[split]):
        if len(seen) == NUM_ROWS[split]:
            return
        row = make(rng, held_out, len(seen) % num_labels)
        if (key := tuple(row.values())) not in seen:
            seen.add(key)
            yield row
    raise AssertionError(f"{name}: the grammar has only {len(seen)} different {split} rows")


def _examples(name: str, template: str, choices: tuple[str, ...], row: Row, split: str) -> Iterator[Example]:
    """Yield the row as one example. Without choices the target is the score, rounded to 0.2, as T5 writes STS-B."""
    try:
        text = template.format_map(row)
        label = row.get("label", -1) if split == "test" else row["label"]
    except KeyError as missing:
        raise DataError(f"{name}: field {missing} is missing from a {split} row that has {', '.join(row)}") from None
    if label in (-1, None) and split == "test":
        yield Example(text, "", choices)
    elif choices:
        yield Example(text, choices[label], choices)
    else:
        yield Example(text, f"{round(label * 5) / 5:.1f}", value=float(label))


def _task(
    name: str, make: Make, template: str, choices: tuple[str, ...], metrics: tuple[str, ...], num_labels: int = 2
) -> Task:
    name = f"embedded/{name}"
    rows = GeneratedSource(partial(_rows, name, make, num_labels), VERSION)
    return Task(name, rows, partial(_examples, name, template, choices), metrics, choices)


def tasks() -> dict[str, Task]:
    """Return the eight tasks by name."""
    suite = (
        _task("sentiment", _sentiment, "sentiment: {sentence}", ("negative", "positive"), ("accuracy",)),
        _task(
            "acceptability",
            _acceptability,
            "acceptability: {sentence}",
            ("unacceptable", "acceptable"),
            ("matthews",),
        ),
        _task(
            "nli",
            _nli,
            "nli premise: {premise} hypothesis: {hypothesis}",
            ("entailment", "neutral", "contradiction"),
            ("accuracy", "macro_f1"),
            num_labels=3,
        ),
        _task(
            "paraphrase",
            _paraphrase,
            "paraphrase sentence1: {sentence1} sentence2: {sentence2}",
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
        ),
        _task(
            "similarity",
            _similarity,
            "similarity sentence1: {sentence1} sentence2: {sentence2}",
            (),
            ("pearson", "spearman"),
        ),
        _task(
            "wic",
            _wic,
            "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
            ("False", "True"),
            ("accuracy",),
        ),
        _task("boolq", _boolq, "boolq passage: {passage} question: {question}", ("no", "yes"), ("accuracy",)),
        _task(
            "copa",
            _copa,
            "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
            ("choice1", "choice2"),
            ("accuracy",),
        ),
    )
    return {task.name: task for task in suite}
