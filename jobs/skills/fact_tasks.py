"""Skills on small passages: look a thing up, check a claim, tell what follows, who has what, what belongs together."""

from random import Random

from polyprompt.tasks import embedded_words as suite
from skills.book_text import Books
from skills.frames import Ask, Draft, article, judge, place, two
from skills.lists import CATEGORIES, NUMBERS, SUITE_WORDS, WHERE

COLOURS = CATEGORIES["colour"][:10]
OBJECTS = tuple("cup stone box hat ribbon knife bowl key flag ball feather button brush shell lantern trunk".split())
ROOMS = tuple("kitchen cellar attic garden hall library stable barn parlour nursery".split())
PETS = CATEGORIES["animal"][:12]
SKILLS = tuple("swim ride sing dance read cook paint fish row climb".split())


def lookup(rng: Random, books: Books) -> Draft:
    """Two to five facts; name the value of a thing, or the thing of a value."""
    count = rng.randint(2, 5)
    keys, values, pattern, forward, backward = rng.choice(
        (
            (OBJECTS, COLOURS, "the {} is {}", "what colour is the {}?", "what is {}?"),
            (OBJECTS, ROOMS, "the {} is in the {}", "where is the {}?", "what is in the {}?"),
            (suite.NAMES, PETS, "{} has a {}", "which animal has {}?", "who has the {}?"),
            (suite.NAMES, SKILLS, "{} can {}", "what can {} do?", "who can {}?"),
            (suite.NAMES, suite.THINGS, "{} bought a {}", "what did {} buy?", "who bought the {}?"),
            (suite.NAMES, NUMBERS[1:], "{} is number {}", "which number is {}?", "who is number {}?"),
            (OBJECTS, NUMBERS[2:], "the {} costs {} pence", "how many pence is the {}?", "what costs {} pence?"),
        )
    )
    facts = list(zip(rng.sample(keys, count), rng.sample(values, count), strict=True))
    key, value = rng.choice(facts)
    text = rng.choice((" . ", " , ", " ; ", " and ")).join(pattern.format(*fact) for fact in facts)
    if rng.random() < 0.6:
        return Draft(place(rng, forward.format(key), text), value, tuple(v for _, v in facts))
    return Draft(place(rng, backward.format(value), text), key, tuple(k for k, _ in facts))


def codes(rng: Random, books: Books) -> Draft:
    """Pairs of words without sense, the suite's label words and scores among them: which goes with this one?"""
    count = rng.randint(2, 6)
    pool = rng.sample(books.words, 2 * count)
    keys, values = pool[:count], pool[count:]
    kind = rng.random()
    if kind < 0.25:
        values = rng.sample(SUITE_WORDS, count)
    elif kind < 0.45:
        values = [f"{fifths / 5:.1f}" for fifths in rng.sample(range(26), count)]
    elif kind < 0.55:
        values = [str(n) for n in rng.sample(range(100), count)]
    joint = rng.choice((" : ", " is ", " - ", " means ", " = ", " , "))
    pairs = list(zip(keys, values, strict=True))
    key, value = rng.choice(pairs)
    text = rng.choice((" ; ", " . ") if joint == " , " else (" , ", " ; ", " . ")).join(joint.join(p) for p in pairs)
    if rng.random() < 0.75:
        asks = (f"what goes with {key}?", f"{key}?", f"give the code of {key}", f"read what stands by {key}")
        return Draft(place(rng, rng.choice(asks), text), value, tuple(values))
    back = (f"what has the code {value}?", f"which one goes with {value}?", f"name what stands by {value}")
    return Draft(place(rng, rng.choice(back), text), key, tuple(keys))


_CLAIM_FORMS = (
    # (subjects, objects, affirmed, denied, claim)
    (suite.NAMES, PETS, "{} has a {}", "{} has no {}", "{} keeps a {}"),
    (suite.NAMES, SKILLS, "{} can {}", "{} cannot {}", "{} is able to {}"),
    (suite.NAMES, WHERE, "{} waits {}", "{} no longer waits {}", "one finds {} {}"),
    (OBJECTS, ROOMS, "the {} lies in the {}", "nobody keeps the {} in the {}", "look for the {} in the {}"),
    (suite.NAMES, suite.THINGS, "{} owns a {}", "{} owns no {}", "there is something of {} , a {}"),
    (suite.NAMES, suite.QUALITIES, "{} is {}", "{} is not {}", "{} feels {}"),
    (suite.NAMES, COLOURS, "{} likes {}", "{} does not like {}", "{} is fond of {}"),
)


def claim(rng: Random, books: Books) -> Draft:
    """Is a claim borne out by one of two to four facts, or denied?"""
    subjects, objects, affirmed, denied, said = rng.choice(_CLAIM_FORMS)
    count, label = rng.randint(2, 4), rng.randrange(2)
    pairs = list(zip(rng.sample(subjects, count), rng.sample(objects, count), strict=True))
    at = rng.randrange(count)
    # The other facts are affirmed or denied at random, so that counting denials tells nothing.
    holds = [rng.random() < 0.5 for _ in pairs]
    turned = rng.random() < 0.25
    holds[at] = bool(label) != turned
    facts = [(affirmed if yes else denied).format(*pair) for yes, pair in zip(holds, pairs, strict=True)]
    checked = (denied if turned else rng.choice((said, affirmed))).format(*pairs[at])
    order = rng.choice(("facts : {} . claim : {}", "we know : {} . someone says : {}", "claim : {1} . facts : {0}"))
    asks = (
        Ask("is the claim right", ("wrong", "right")),
        Ask("do the facts bear it out", ("untrue", "true")),
        Ask("is what is said so", ("not so", "so")),
        Ask("can it be believed", ("nay", "aye")),
    )
    conditions = (
        ("the claim is wrong", "the facts deny it", "it is not so"),
        ("the claim is right", "the facts say so", "it is so"),
    )
    return judge(rng, order.format(" . ".join(facts), checked), label, asks, conditions, books.words)


_SURE = (
    Ask("given the first , is the second sure , open or impossible", ("sure", "open", "impossible")),
    Ask("does the second follow : always , perhaps or never", ("always", "perhaps", "never")),
    Ask("must it be , may it be , or can it not be", ("must", "may", "cannot")),
)
_SURE_IF = (
    ("it must be so", "the second follows", "it is certain"),
    ("it may be so", "one cannot know", "it is left open"),
    ("it cannot be so", "the first denies it", "it is ruled out"),
)


def follows(rng: Random, books: Books) -> Draft:
    """Sure, open or impossible: from kinds, colours, numbers and places. No statement speaks of all, most or some.

    "no", "not" and "only" occur with every label, so that the second statement alone tells little.
    """
    label, name = rng.randrange(3), rng.choice(suite.NAMES)
    first, seconds = rng.choice((_kinds, _colours, _numbers, _places))(rng, name)
    body = rng.choice(
        ("{} . {}", "first : {} . second : {}", "{} . so : {}", "it is known that {} . what of this : {}")
    )
    return judge(rng, body.format(first, rng.choice(seconds[label])), label, _SURE, _SURE_IF, books.words)


Statements = tuple[str, tuple[tuple[str, ...], ...]]
"""What is known, and what is then sure, open and impossible."""


def _kinds(rng: Random, name: str) -> Statements:
    group, another = two(rng, ("animal", "flower", "tree", "tool", "vehicle", "piece of furniture"))
    one, other = two(rng, CATEGORIES[group])
    (how, contrary), (also, _) = two(rng, (("small", "large"), ("old", "new"), ("fine", "poor"), ("light", "heavy")))
    how, contrary = two(rng, (how, contrary))
    known, verb = rng.random() < 0.5, rng.choice(("found", "drew", "saw", "wanted"))
    exact, opposed = article(f"{how} {one}"), article(f"{contrary} {one}")
    sure = (article(group), f"no {other}", f"no {another}", article(one), *((exact, f"no {contrary} {one}") * known))
    open_ = (article(f"{also} {one}"), f"no {also} {one}", *((exact, opposed, f"no {how} {one}") * (not known)))
    false = (article(other), article(another), f"no {one}", article(f"{also} {other}"), *((opposed,) * 2 * known))
    return f"{name} {verb} {exact if known else article(one)} , nothing else", tuple(
        tuple(f"{name} {verb} {what}" for what in said) for said in (sure, open_, false)
    )


def _colours(rng: Random, name: str) -> Statements:
    (thing, other), (colour, another) = two(rng, OBJECTS), two(rng, COLOURS)
    known = rng.random() < 0.6
    same, unlike = (article(f"{c} {thing}") for c in (colour, another))
    sure = (article(thing), *((same, f"no {another} {thing}") * known))
    open_ = (
        article(other),
        f"no {other}",
        article(f"{colour} {other}"),
        *((same, f"no {colour} {thing}") * (not known)),
    )
    false = (f"no {thing}", f"neither {thing} nor {other}", *((unlike, f"no {colour} {thing}") * known))
    return f"{name} has one {thing}{f' , and it is {colour}' if known else ''}", tuple(
        tuple(f"{name} has {what}" for what in said) for said in (sure, open_, false)
    )


def _numbers(rng: Random, name: str) -> Statements:
    number, beasts = rng.randint(3, 9), rng.choice(("guests", "dogs", "boys", "letters", "ships"))
    more, fewer = NUMBERS[number + rng.randint(1, 5)], NUMBERS[number - rng.randint(1, 2)]
    if rng.random() < 0.5:
        first = f"at least {NUMBERS[number]} {beasts} came to {name}"
        sure: tuple[str, ...] = ("more than {1}", "not just {1}", "at least {1}")
        open_, false = ("at least {0}", "only {0}", "not just {0}"), ("just {1}", "only {1}", "no")
    else:
        first = f"just {NUMBERS[number]} {beasts} came to {name}"
        sure = ("more than {1}", "not just {1}", "no more than {0}", "at least {1}")
        open_, false = ("{2} unasked", "no early", "{2} late"), ("at least {0}", "just {1}", "only {0}")
    return first, tuple(
        tuple(_came(pattern.format(more, fewer, NUMBERS[number]), beasts) for pattern in patterns)
        for patterns in (sure, open_, false)
    )


def _came(amount: str, beasts: str) -> str:
    """Put the guests behind the amount; what is said of their coming stays last."""
    *count, last = amount.split()
    if last in ("early", "late", "unasked"):
        return f"{' '.join(count)} {beasts} came {last}"
    return f"{amount} {beasts} came"


def _places(rng: Random, name: str) -> Statements:
    here, there = two(rng, ROOMS)
    someone = rng.choice([n for n in rng.sample(suite.NAMES, 2) if n != name])
    (state, contrary), (other, another) = two(rng, (("awake", "asleep"), ("alone", "in company"), ("well", "ill")))
    state, contrary = two(rng, (state, contrary))
    known = rng.random() < 0.5
    states = (f"{name} is {state}", f"{name} is not {contrary}"), (f"{name} is {contrary}", f"{name} is not {state}")
    sure = (f"the {here} is not empty", f"{name} is not in the {there}", f"someone is in the {here}")
    open_ = (f"{name} is {other}", f"{name} is not {another}", f"{someone} is not in the {here}")
    false = (f"the {here} is empty", f"{name} is not in the {here}", f"{name} is in the {there}")
    first = f"{name} is in the {here}{f' and is {state}' if known else ''}"
    if known:
        return first, (sure + states[0] * 2, open_, false + states[1] * 2)
    return first, (sure, open_ + states[0] + states[1], false)


def owner(rng: Random, books: Books) -> Draft:
    """Things change hands once or twice; who has them now, or who had them first?"""
    people = rng.sample(suite.NAMES, 4)
    thing, other = two(rng, suite.THINGS)
    steps = [f"{people[0]} had the {thing}", f"{people[0]} gave it to {people[1]}"]
    now = people[1]
    if rng.random() < 0.5:
        steps.append(f"{people[1]} sold it to {people[2]}")
        now = people[2]
    steps.insert(rng.choice((0, len(steps))), f"{people[3]} had the {other}")
    asks = (
        (f"who has the {thing} now?", now),
        (f"who had the {thing} first?", people[0]),
        (f"who has the {other}?", people[3]),
    )
    ask, answer = rng.choice(asks)
    choices = tuple(rng.sample(people, len(people)))
    return Draft(place(rng, ask, rng.choice((" . ", " . then ")).join(steps)), answer, choices)


def belongs(rng: Random, books: Books) -> Draft:
    """Which pair of the list is spoken of: is it there as given, or with another partner?"""
    count, label = rng.randint(2, 4), rng.randrange(2)
    people, partners = rng.sample(suite.NAMES, count), rng.sample(suite.PEOPLE, count)
    at = rng.randrange(count)
    asked = partners[at] if label else rng.choice([p for i, p in enumerate(partners) if i != at])
    form = rng.choice(("{} works as the {}", "{} married the {}", "{} serves the {}", "{} : {}"))
    text = rng.choice((" . ", " ; ")).join(form.format(*pair) for pair in zip(people, partners, strict=True))
    asks = (
        Ask(f"does {people[at]} go with {asked}", ("no match", "match")),
        Ask(f"are {people[at]} and {asked} a pair", ("apart", "together")),
        Ask(f"is {asked} beside the name {people[at]}", ("elsewhere", "there")),
    )
    conditions = (
        (f"{people[at]} goes with another", f"{asked} goes with another name"),
        (f"{people[at]} goes with {asked}", f"{asked} belongs to {people[at]}"),
    )
    return judge(rng, text, label, asks, conditions, books.words)
