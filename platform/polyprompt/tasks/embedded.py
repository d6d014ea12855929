"""The embedded suite: eight tasks made by a seeded grammar, each like one task of GLUE or SuperGLUE. Needs no network.

Labels are balanced, and hang on word order, on negation or on which words match, so that counting words does not give
them away. Train and validation use different words where the label does not hang on the word itself; what is held out
of one task is trained on in another. docs/embedded.md states each task's split rule and floors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from polyprompt.errors import DataError
from polyprompt.tasks import embedded_words as words
from polyprompt.tasks.embedded_words import half
from polyprompt.tasks.records import Example, GeneratedSource, Row, Task

VERSION = "1"
NUM_ROWS: Mapping[str, int] = {"train": 6000, "validation": 400}

Make = Callable[[Random, bool, int], dict[str, Any]]
"""(random stream, is it held out?, label) -> one row."""


def _two(rng: Random, choices: Sequence[str]) -> tuple[str, str]:
    first, second = rng.sample(choices, 2)
    return first, second


def _sentiment(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """The main clause decides, and a negation turns its adjective around."""

    def clause(noun: str, praise: bool) -> str:
        negated = rng.random() < 0.35
        adjective = rng.choice(words.PRAISE if praise != negated else words.BLAME)
        return f"the {noun} was {rng.choice(words.NEGATIONS if negated else words.DEGREES)} {adjective}"

    main_noun, side_noun = _two(rng, half(words.THINGS, held_out))
    form = rng.choice(("{main}", "{main} and {side}", "{side} but {main}", "although {side} {main}"))
    side = clause(side_noun, (label == 1) == (" and " in form))
    return {"sentence": form.format(main=clause(main_noun, label == 1), side=side), "label": label}


def _acceptability(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Verb and determiner agree with the head noun, not with the noun between; or the word order is wrong."""
    while True:
        head, verb = rng.randrange(len(words.PEOPLE)), rng.randrange(len(words.VERBS))
        if ((head + verb) % 5 == 0) == held_out:
            break
    plural, fault = rng.random() < 0.5, None if label else rng.choice(("verb", "determiner", "order"))
    determiner = rng.choice(("these", "those") if plural != (fault == "determiner") else ("this", "that"))
    noun = words.PEOPLE[head] + "s" * plural
    between = rng.choice(words.PEOPLE) + "s" * (rng.random() < 0.5)
    verb_form = words.VERBS[verb] + "s" * (plural == (fault == "verb"))
    parts = [determiner, noun, rng.choice(words.PREPOSITIONS), "the", between, verb_form, rng.choice(words.ADVERBS)]
    if fault == "order":
        at = rng.randrange(len(parts) - 2)  # a verb and its adverb may stand either way
        parts[at], parts[at + 1] = parts[at + 1], parts[at]
    return {"sentence": " ".join(parts), "label": label}


def _nli(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Who has a poodle has a dog, who never has a dog never has a poodle. Labels: entailment, neutral, contradiction."""
    names, verbs = half(words.NAMES, held_out), words.SEEN
    (name, other), (verb, other_verb) = _two(rng, names), _two(rng, verbs)
    kind = rng.choice(sorted(words.KINDS))
    member = rng.choice(words.KINDS[kind].split())
    # (premise negated, premise noun, hypothesis negated, hypothesis noun, same name, same verb)
    entailed = [(False, member, False, kind), (True, kind, True, member)]
    neutral = [(False, kind, False, member), (True, member, True, kind), (False, kind, True, member)]
    denied = [(False, member, True, kind), (True, kind, False, member)]
    facts = rng.choice((entailed, neutral, denied)[label])
    name2, verb2 = name, verb
    if label == 1 and rng.random() < 0.5:
        facts = rng.choice(entailed + denied)
        name2, verb2 = rng.choice(((other, verb), (name, other_verb)))

    def say(who: str, negated: bool, did: str, what: str) -> str:
        return f"{who} {'never' if negated else 'once'} {did} a {what}"

    premise, hypothesis = say(name, facts[0], verb, facts[1]), say(name2, facts[2], verb2, facts[3])
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _paraphrase(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Active and passive, and synonyms; what differs is who did it to whom, or one word."""
    agent, patient, third = rng.sample(half(words.PEOPLE, held_out), 3)
    pair, other_pair = rng.sample(words.SYNONYMS, 2)

    def say(who: str, verb: str, whom: str) -> str:
        return f"the {who} {verb} the {whom}" if rng.random() < 0.5 else f"the {whom} was {verb} by the {who}"

    first = say(agent, rng.choice(pair), patient)
    if label == 0:
        match rng.choice(("roles", "roles", "roles", "who", "verb")):
            case "roles":
                agent, patient = patient, agent
            case "who":
                agent, patient = rng.choice(((third, patient), (agent, third)))
            case "verb":
                pair = other_pair
    return {"sentence1": first, "sentence2": say(agent, rng.choice(pair), patient), "label": label}


SLOT_WEIGHTS = (1.2, 0.9, 0.6, 1.3, 1.0)
"""What each shared slot of a similarity pair adds: name, action, colour, thing, city. They sum to 5."""


def _similarity(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """The weighted share of the five slots on which two sentences agree; `label` has a bit for each slot."""
    slots = (
        half(words.NAMES, held_out),
        words.ACTIONS,
        words.COLOURS,
        half(words.THINGS, not held_out),
        half(words.CITIES, held_out),
    )
    first, second, score = [], [], 0.0
    for place, (choices, weight) in enumerate(zip(slots, SLOT_WEIGHTS, strict=True)):
        word, other = _two(rng, choices)
        shared = bool(label >> place & 1)
        first.append(word)
        second.append(word if shared else other)
        score += weight * shared

    def say(name: str, action: str, colour: str, thing: str, city: str) -> str:
        return f"{name} {action} the {colour} {thing} in {city}"

    return {"sentence1": say(*first), "sentence2": say(*second), "label": round(score, 3)}


def _company(rng: Random, word: str, near: str) -> str:
    return rng.choice((f"the {word} and the {near}", f"the {near} by the {word}"))


def _wic(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """Do both sentences use the word in the sense that the company it keeps gives it?"""
    word = rng.choice(sorted(words.AMBIGUOUS))
    topics = rng.sample(words.AMBIGUOUS[word], 2)
    while True:
        first, second = (rng.choice(words.TOPICS[topic].split()) for topic in (topics[0], topics[1 - label]))
        if first != second and (sum(map(ord, first + second)) % 6 == 0) == held_out:
            break
    return {
        "word": word,
        "sentence1": _company(rng, word, first),
        "sentence2": _company(rng, word, second),
        "label": label,
    }


def _boolq(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """The passage tells of three people; a false question gives one of them a city that another visited, or nobody."""
    people = rng.sample(half(words.NAMES, not held_out), 3)
    *cities, nowhere = rng.sample(half(words.CITIES, not held_out), 4)
    passage = " . ".join(f"{who} visited {city}" for who, city in zip(people, cities, strict=True))
    asked = rng.randrange(3)
    wrong = cities[(asked + rng.randint(1, 2)) % 3] if rng.random() < 0.7 else nowhere
    return {
        "passage": passage,
        "question": f"did {people[asked]} visit {cities[asked] if label else wrong}",
        "label": label,
    }


def _copa(rng: Random, held_out: bool, label: int) -> dict[str, Any]:
    """A cause and an effect of one event, or the same kind of event in another chain: which one is asked for?"""
    chain, other = rng.sample(words.CHAINS, 2)
    question = rng.choice(("cause", "effect"))
    step = -1 if question == "cause" else 1
    if rng.random() < 0.5:
        event, right, wrong = chain[1], chain[1 + step], chain[1 - step]
    else:
        at = rng.choice((1, 2) if question == "cause" else (0, 1))
        event, right, wrong = chain[at], chain[at + step], other[at + step]
    choice1, choice2 = (right, wrong) if label == 0 else (wrong, right)
    premise = f"{rng.choice(half(words.NAMES, held_out))} {event}"
    return {"premise": premise, "choice1": choice1, "choice2": choice2, "question": question, "label": label}


def _rows(name: str, make: Make, num_labels: int, split: str) -> Iterator[Row]:
    """Yield the split's rows, all different; labels take turns."""
    if split not in NUM_ROWS:
        raise DataError(f"{name}: no split {split!r}; generated tasks have {', '.join(NUM_ROWS)}")
    rng = Random(f"{VERSION}/{name}/{split}")
    seen: set[tuple[Any, ...]] = set()
    while len(seen) < NUM_ROWS[split]:
        row = make(rng, split != "train", len(seen) % num_labels)
        if (key := tuple(row.values())) not in seen:
            seen.add(key)
            yield row


def _examples(name: str, template: str, choices: tuple[str, ...], row: Row, split: str) -> Iterator[Example]:
    """Yield the row as one example. Without choices the target is the score, rounded to 0.2, as T5 writes STS-B."""
    try:
        text, label = template.format_map(row), row["label"]
    except KeyError as missing:
        raise DataError(f"{name}: field {missing} is missing from a {split} row that has {', '.join(row)}") from None
    if choices:
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
            num_labels=2 ** len(SLOT_WEIGHTS),
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
