"""How a question is worded: where the instruction stands, which words answer it, how the options are laid out.

No task has one template: in most rows the instruction stands before or behind the text, the label words are the
question's own or picked anew for the row and named in it, and options are answered by their text or by a mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from polyprompt.tasks.embedded import tasks
from skills.lists import SUITE_WORDS

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """One row: what is asked, the answer, and the answers to choose between (() for free text).

    wording: "own" where the question is put in its one usual way with its own label words, "signs" where it is with
    signs; "" otherwise.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    wording: str = ""


@dataclass(frozen=True)
class Ask:
    """One way to ask for a label. words: its answers, in the order of the labels."""

    question: str
    words: tuple[str, ...]


FIRST = (
    "{ask} : {body}",
    "{ask}: {body}",
    "{ask} : {body}",
    "{ask} - {body}",
    "{ask} . {body}",
    "{ask} here : {body}",
    "task : {ask} . given : {body}",
    "please {ask} : {body}",
    "now {ask} . this is it : {body}",
)
LAST = (
    "{body} . {ask}",
    "{body} - {ask}",
    "given : {body} . task : {ask}",
    "here is something : {body} . {ask} .",
    "{body} . now {ask}",
)
FIRST_ASKED = (
    "{ask}? {body}",
    "{ask}? {body}",
    "{ask} : {body}",
    "tell me , {ask}? {body}",
    "{ask}? here it is : {body}",
    "asked : {ask}? given : {body}",
)
LAST_ASKED = ("{body} . {ask}?", "{body} - {ask}?", "given : {body} . asked : {ask}?", "{body} . so , {ask}?")
MARKS = (
    ("A", "B", "C", "D", "E"),
    ("1", "2", "3", "4", "5"),
    ("one", "two", "three", "four", "five"),
    ("first", "second", "third", "fourth", "fifth"),
    ("a", "b", "c", "d", "e"),
    ("x", "y", "z", "v", "w"),
)
#: This share of a task's rows is worded in one way.
PLAIN = 0.75
#: These stand for a label that the row names, as does any common word of the books. The label words of benchmarks are
#: among them, each for any label of any task: a model can then say them and knows nothing of what they stand for.
SIGNS = SUITE_WORDS + tuple(
    """A B C X Y Z 1 2 3 4 5 one two red blue green up down left right this that first second high low in out east west
    true false not_entailment duplicate not_duplicate 0.0 1.0 2.0 3.0 4.0 5.0""".split()
)
SUITE_LABELS = {frozenset(task.choices) for task in tasks().values() if task.choices}
#: Words that may name or stand for anything, where no words of the books are at hand.
COMMON = tuple(
    """day hand house time way world heart word voice door night head place life mind thing room face work side friend
    money name nature number order part people point power reason road school sea ship street summer table town tree
    village water winter year fire earth air book road king queen""".split()
)


def place(rng: Random, ask: str, body: str) -> str:
    """Put the instruction (a question ends with "?") before the text, or in one row of four behind it."""
    asked, ask = ask.endswith("?"), ask.rstrip("?")
    if rng.random() < 0.75:
        pattern = rng.choice(FIRST_ASKED if asked else FIRST)
    else:
        pattern = rng.choice(LAST_ASKED if asked else LAST)
        if body[-1] in ".!?":
            pattern = pattern.replace("{body} .", "{body}")
    text = pattern.format(ask=ask, body=body)
    # What is to be copied keeps its case.
    return text[0].upper() + text[1:] if rng.random() < 0.3 and not pattern.startswith("{body}") else text


def quoted(rng: Random, text: str) -> str:
    return f'"{text}"' if rng.random() < 0.3 else text


def sign_words(rng: Random, words: Sequence[str], count: int) -> tuple[str, ...]:
    """Pick words that mean nothing here to stand for the labels of one row; never a suite's task's own label set."""
    picked: list[str] = []
    while len(picked) < count:
        word = rng.choice(SIGNS) if rng.random() < 0.6 else rng.choice(words)
        if word.lower() not in [p.lower() for p in picked]:
            picked.append(word)
    return sign_words(rng, words, count) if frozenset(picked) in SUITE_LABELS else tuple(picked)


def judge(
    rng: Random, body: str, label: int, asks: Sequence[Ask], conditions: Sequence[Sequence[str]], words: Sequence[str]
) -> Draft:
    """Ask which label fits the text. conditions: for each label ways to complete "say x if ...".

    Most rows put the first question in the same words, in front, and name the answers in the order of the labels: its
    own, or signs picked for the row, which are then known by their place alone. So the question and the words that
    answer it can be steered apart from each other. Of the others four in nine ask with a question's own answers; the
    rest say which word stands for which label, mostly words that have nothing to do with it.
    """
    if rng.random() < PLAIN:
        own = rng.random() < 0.5
        named = asks[0].words if own else sign_words(rng, words, len(conditions))
        if rng.random() < 0.5:  # a name that tells nothing, so that one before the text does no harm
            body = f"{rng.choice(COMMON)} : {body}"
        question = f"{asks[0].question} , {' or '.join(named)} : {body}"
        return Draft(question, named[label], tuple(named), "own" if own else "signs")
    style, ask = rng.random(), rng.choice(asks)
    if style < 0.25:
        return Draft(place(rng, ask.question + "?", body), ask.words[label], ask.words)
    if style < 0.45:
        options = _listed(rng, rng.sample(ask.words, len(ask.words)))
        return Draft(place(rng, f"{ask.question} , {options}?", body), ask.words[label], ask.words)
    signs = ask.words if style < 0.6 else sign_words(rng, words, len(conditions))
    rules = [(sign, rng.choice(ways)) for sign, ways in zip(signs, conditions, strict=True)]
    rng.shuffle(rules)
    return Draft(place(rng, _rule(rng, rules), body), signs[label], signs)


def _rule(rng: Random, rules: Sequence[tuple[str, str]]) -> str:
    (sign, way), *others = rules
    style = rng.randrange(5)
    if style == 0:
        return " , ".join(f"say {s} if {w}" for s, w in rules)
    if style == 1:
        return " , ".join(f"if {w} answer {s}" for s, w in rules)
    if style == 2:
        return "write " + " , ".join(f"{s} when {w}" for s, w in rules)
    if style == 3 and len(others) == 1:
        return f"write {sign} if {way} , otherwise {others[0][0]}"
    return "answer " + " or ".join(f"{s} ( {w} )" for s, w in rules)


def pick(rng: Random, ask: str, body: str, right: str, wrong: Sequence[str]) -> Draft:
    """Ask for one of several options, by its text or by a mark; body may be ""."""
    options = [right, *wrong]
    rng.shuffle(options)
    if rng.random() < PLAIN:
        ask = ask.rstrip("?")
        if rng.random() < 0.5:
            parts = (ask, body, " , ".join(options))
            return Draft(" : ".join(part for part in parts if part), right, tuple(options))
        # As in judge: the signs stand for the options by their order.
        signs = sign_words(rng, COMMON, len(options))
        given = _fields(rng, [*options, body] if rng.random() < 0.5 else [body, *options])
        return Draft(f"{ask} , {' or '.join(signs)} : {given}", signs[options.index(right)], signs)
    if rng.random() < 0.5:
        return Draft(_with_options(rng, ask, body, _listed(rng, options)), right, tuple(options))
    marks = rng.choice(MARKS)[: len(options)]
    layout = rng.choice(("{m} : {o}", "{m} ) {o}", "( {m} ) {o}", "{m} {o}", "{m} is {o}"))
    listed = rng.choice((" , ", " ; ", " . ")).join(
        layout.format(m=m, o=o.rstrip(".")) for m, o in zip(marks, options, strict=True)
    )
    return Draft(_with_options(rng, ask, body, listed), marks[options.index(right)], marks)


def _fields(rng: Random, parts: Sequence[str]) -> str:
    """Join the parts, each behind a name that tells nothing, or none."""
    parts = [part for part in parts if part]
    if rng.random() < 0.3:
        return " / ".join(parts)
    return " ".join(f"{name} : {part}" for name, part in zip(sign_words(rng, COMMON, len(parts)), parts, strict=True))


def _with_options(rng: Random, ask: str, body: str, options: str) -> str:
    if not body:
        return place(rng, ask, options)
    body, style = body.rstrip(), rng.random()
    if style < 0.4:
        return place(rng, ask, f"{body} - {options}")
    if style < 0.8:
        return place(rng, ask, f"{body} . options : {options}".replace(". .", "."))
    return place(rng, ask, f"{options} - {body}")


def _listed(rng: Random, options: Sequence[str]) -> str:
    pattern = rng.choice(("{}", "( {} )", "{}"))
    last = rng.choice((" or ", " , ", " or ") if len(options) > 2 else (" or ", " or ", " , ", " / "))
    return pattern.format(" , ".join(options[:-1]) + last + options[-1])


def article(word: str) -> str:
    """Return the word behind "a" or "an"."""
    silent = word.startswith(("hon", "hour", "heir"))
    you = word.startswith(("use", "uni", "ewe", "eu", "one"))
    return f"an {word}" if (word[0] in "aeiou" and not you) or silent else f"a {word}"


def two(rng: Random, items: Sequence[T]) -> tuple[T, T]:
    first, second = rng.sample(items, 2)
    return first, second
