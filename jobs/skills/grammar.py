"""Plain text in the words and sentence forms of the embedded suite: true to its rules, nothing asked, nothing labelled.

It teaches a denoising model which words go together: agreement, quantities, active and passive, the order of days,
months and directions, things and states, words with their topics, praise with praise, events with what follows them.
"""

from collections.abc import Callable, Iterator
from random import Random

from polyprompt.tasks import embedded_words as suite
from skills.frames import article, two
from skills.leaks import leaks
from skills.lists import CYCLES, NUMBERS

OPPOSITE_STATES = (("wet", "dry"), ("clean", "dirty"), ("open", "closed"), ("warm", "cold"), ("new", "old"))
TOPICS = {name: words.split() for name, words in suite.TOPICS.items()}
CIRCLES = {name: words.split() for name, words in CYCLES.items()}
Sentence = Callable[[Random], str]


def agreement(rng: Random) -> str:
    plural = rng.random() < 0.5
    noun = rng.choice(suite.PEOPLE) + "s" * plural
    between = rng.choice(suite.PEOPLE) + "s" * (rng.random() < 0.5)
    middle = f"{rng.choice(suite.PREPOSITIONS)} the {between} " if rng.random() < 0.6 else ""
    verb = rng.choice((("was", "were"), ("was", "were"), ("is", "are")))[plural]
    one, other = two(rng, suite.QUALITIES)
    rest = rng.choice((one, one, f"{one} and {other}", f"not {one}", f"very {one}"))
    determiner = rng.choice((("this", "these"), ("this", "these"), ("the", "the"), ("that", "those")))[plural]
    return f"{determiner} {noun} {middle}{verb} {rest}"


def quantity(rng: Random) -> str:
    people, verb, thing = f"{rng.choice(suite.PEOPLE)}s", rng.choice(suite.ACTIONS), rng.choice(suite.THINGS)
    amount = rng.choice(("all", "most", "several", "some", "few", "no"))
    if rng.random() < 0.6:
        return f"{amount} {people} {verb} the {thing}"
    tail = {
        "all": "not one was left out",
        "most": "but not all",
        "several": "more than a few",
        "some": "others did not",
        "few": "the others did not",
        "no": "not even one",
    }[amount]
    return f"{amount} {people} {verb} the {thing} , {tail}"


def more_than(rng: Random) -> str:
    scale = "no few some several most all".split()
    low, high = sorted(rng.sample(range(6), 2))
    return rng.choice((f"{scale[high]} is more than {scale[low]}", f"{scale[low]} is less than {scale[high]}"))


def deed(rng: Random) -> str:
    agent, patient = two(rng, suite.PEOPLE)
    first, second = two(rng, rng.choice(suite.SYNONYMS))
    one = f"the {agent} {first} the {patient}"
    if rng.random() < 0.5:
        one = f"the {patient} was {first} by the {agent}"
    if rng.random() < 0.4:
        return one
    return f"{one} , in other words {second}" if rng.random() < 0.5 else f"{one} , or {second} , as one says"


def verbs(rng: Random) -> str:
    first, second = two(rng, rng.choice(suite.SYNONYMS))
    who, whom = two(rng, suite.NAMES)
    return rng.choice(
        (
            f"whoever is {first} is {second}",
            f"{first} means {second}",
            f"{who} {first} {whom} , yes , {second} {whom}",
            f"{first} and {second} are one and the same",
        )
    )


def moved(rng: Random) -> str:
    name, action, thing = rng.choice(suite.NAMES), rng.choice(suite.ACTIONS), rng.choice(suite.THINGS)
    circle = rng.choice(suite.CIRCLES)
    at = rng.randrange(len(circle))
    point, following = circle[at], circle[(at + 1) % len(circle)]
    if rng.random() < 0.5:
        return f"{name} {action} the {thing} {point}"
    other = rng.choice(suite.ACTIONS)
    return rng.choice(
        (
            f"{name} {action} the {thing} {point} and {other} it {following} , the next one",
            f"{name} {action} it {point} , not {circle[(at + len(circle) // 2) % len(circle)]}",
        )
    )


def circle(rng: Random) -> str:
    name, words = rng.choice(sorted(CIRCLES.items()))
    at, size = rng.randrange(len(words)), len(words)
    before, this, after = words[at - 1], words[at], words[(at + 1) % size]
    way = rng.randint(0, size // 2)
    there = words[(at + rng.choice((-1, 1)) * way) % size]
    steps = f"{NUMBERS[way]} step" + "s" * (way != 1)
    odd = " of the odd months" if name == "odd months" else ""
    return rng.choice(
        (
            f"{this} lies between {before} and {after}{odd}",
            f"after {this} comes {after}" if not odd else f"after {this} the next{odd} is {after}",
            f"{this} and {after} are near each other",
            f"from {this} to {there} it is {steps}{odd}",
            f"{there} is {steps}{odd} from {this}",
            " , ".join(words[(at + k) % size] for k in range(rng.randint(3, 5))),
            f"{words[(at + size // 2) % size]} is far from {this}",
        )
    )


def state(rng: Random) -> str:
    thing, (one, other) = rng.choice(suite.STATED), rng.choice(OPPOSITE_STATES)
    if rng.random() < 0.5:
        one, other = other, one
    return rng.choice(
        (
            f"the {thing} is {one}",
            f"the {thing} is not {one}",
            f"the {thing} is very {one}",
            f"the {thing} is {one} , not {other}",
            f"the {thing} is not {other} but {one}",
            f"it is true that the {thing} is {one}",
        )
    )


def company(rng: Random) -> str:
    name = rng.choice(sorted(TOPICS))
    one, two_, three = rng.sample(TOPICS[name], 3)
    return rng.choice(
        (
            f"{one} , {two_} and {three} have to do with {name}",
            f"where there is {one} there is {two_}",
            f"{one} and {two_} belong to {name}",
            f"{name} means {one} , {two_} and {three}",
            f"we talked of {one} and {two_}",
        )
    )


def sense(rng: Random) -> str:
    word = rng.choice(sorted(suite.AMBIGUOUS))
    name, other = two(rng, suite.AMBIGUOUS[word])
    one, also = rng.sample(TOPICS[name], 2)
    return rng.choice(
        (
            f"near {one} and {also} {article(word)} is a matter of {name}",
            f"{article(word)} , {one} and {also}",
            f"the {word} had to do with {name} : there was {one} and {also}",
            f"a word of {name} : {word} , like {one} or {also} , but with {rng.choice(TOPICS[other])} it is of {other}",
        )
    )


def opinion(rng: Random) -> str:
    kind = rng.random() < 0.5
    (one, also), against = two(rng, suite.PRAISE if kind else suite.BLAME), suite.BLAME if kind else suite.PRAISE
    thing, other = two(rng, suite.THINGS)
    name, contrary = rng.choice(suite.NAMES), rng.choice(against)
    like = rng.choice(("liked", "praised") if kind else ("disliked", "cursed"))
    return rng.choice(
        (
            f"the {thing} is {one} and {also}",
            f"{article(one)} {thing} , really {also}",
            f"{name} {like} the {thing} : it is {one}",
            f"the {thing} is {one} , not {contrary}",
            f"the {thing} is not {contrary} , it is {one}",
            f"the {thing} is never {contrary} and always {one}",
            f"the {thing} is {one} but the {other} is {contrary}",
            f"{name} {like} {article(one)} {thing}",
            f"{one} means something {'good' if kind else 'bad'} , so does {also}",
        )
    )


def story(rng: Random) -> str:
    name, (cause, event, effect) = rng.choice(suite.NAMES), rng.choice(suite.CHAINS)
    return rng.choice(
        (
            f"{name} {cause} , {event} and {effect}",
            f"{name} {cause} , then {event} , and so {effect}",
            f"first {name} {cause} and {event} , after that {name} {effect}",
            f"{name} {cause} and therefore {event} . then {name} {effect}",
        )
    )


_SENTENCES: tuple[Sentence, ...] = (
    *(agreement, quantity, deed, moved, state, company, sense, opinion, story) * 2,
    *(more_than, verbs, circle, circle),
)


def lines(seed: int, count: int) -> Iterator[str]:
    """Yield lines of 2 to 7 sentences, mostly of one or two kinds; none holds a row of the embedded suite."""
    rng = Random(f"{seed}/grammar")
    made = 0
    while made < count:
        kinds = rng.choices(_SENTENCES, k=rng.randint(1, 2) if rng.random() < 0.7 else 7)
        line = " . ".join(rng.choice(kinds)(rng) for _ in range(rng.randint(2, 7))) + " ."
        if not leaks(line):
            made += 1
            yield line
