"""Skills on sentences: intact or damaged, agreement, cloze, what comes next, who is meant."""

from random import Random

from polyprompt.tasks import embedded_words as suite
from skills.book_text import Books, plain
from skills.frames import Ask, Draft, judge, pick, place, quoted, two
from skills.lists import CATEGORIES, CREATURES, PLURALS, WHERE

#: A sentence with one of these words swapped for another of its group is mostly wrong.
GROUPS = tuple(
    tuple(group.split())
    for group in (
        "was were",
        "is are",
        "has have",
        "this these",
        "that those",
        "a an",
        "me I",
        "him he",
        "them they",
        "us we",
        "in of to for with by at from",
        "who which",
        "and but or",
        "do does",
        "can could cannot",
    )
)
GROUP_OF = {word: group for group in GROUPS for word in group}
AGREEING = ("was", "were", "is", "are", "has", "have", "this", "these")

INTACT = (
    Ask("is the sentence whole or damaged", ("damaged", "whole")),
    Ask("is it good English", ("no", "yes")),
    Ask("right or wrong", ("wrong", "right")),
    Ask("is something wrong here", ("yes", "no")),
    Ask("does it read well", ("badly", "well")),
    Ask("clean or broken", ("broken", "clean")),
)
INTACT_IF = (
    ("it is wrong", "a word is wrong", "it is broken", "it needs mending", "nobody would say it"),
    ("it is right", "all is well", "it is sound", "it needs no mending", "one would say it so"),
)


def _plain_or_not(rng: Random, sentence: str) -> str:
    return " ".join(plain(sentence)) if rng.random() < 0.6 else sentence


def damage(rng: Random, sentence: str, books: Books) -> str:
    """Break the sentence in one place, or mix up its words."""
    words = sentence.split()
    kind = rng.randrange(6)
    agreeing = [i for i, w in enumerate(words) if w.lower() in AGREEING]
    if kind < 3 and agreeing:
        at = rng.choice(agreeing)
        words[at] = next(w for w in GROUP_OF[words[at].lower()] if w != words[at].lower())
    elif kind == 3:
        at = rng.randrange(len(words) - 2)
        words[at], words[at + 1] = words[at + 1], words[at]
    elif kind == 4:
        at = rng.randrange(len(words) - 1)
        words[at] = rng.choice(books.words)
    elif kind == 5:
        end = words.pop()
        words = [*rng.sample(words, len(words)), end]
    else:
        at = rng.randrange(len(words) - 2)
        words[at], words[at + 2] = words[at + 2], words[at]
    return " ".join(words)


def intact(rng: Random, books: Books) -> Draft:
    sentence = _plain_or_not(rng, rng.choice(books.sentences))
    label = rng.randrange(2)
    broken = damage(rng, sentence, books)
    if broken == sentence:
        return intact(rng, books)
    return judge(rng, quoted(rng, sentence if label else broken), label, INTACT, INTACT_IF, books.words)


def better_of_two(rng: Random, books: Books) -> Draft:
    """Which of two versions is the sound one, or the damaged one?"""
    sentence = _plain_or_not(rng, rng.choice(books.sentences))
    broken = damage(rng, sentence, books)
    if broken == sentence:
        return better_of_two(rng, books)
    if rng.random() < 0.6:
        asks = ("which is good English?", "which reads well?", "pick the sound sentence", "which one would you say?")
        return pick(rng, rng.choice(asks), "", sentence, [broken])
    asks = ("which is damaged?", "pick the broken sentence", "which one has a fault?", "which reads badly?")
    return pick(rng, rng.choice(asks), "", broken, [sentence])


_NOUNS = tuple(
    (one, many)
    for one, many in (
        *((w, PLURALS[w]) for w in PLURALS if PLURALS[w] != w and w not in ("half", "day", "way", "life", "eye")),
        *((w, w + "s") for w in (*CREATURES, *suite.PEOPLE) if w[-1] not in "fy"),
        *((w, w + "s") for name in ("vehicle", "tool", "bird") for w in CATEGORIES[name] if w[-1] in "rtmknlebgw"),
    )
    if one not in ("goose", "cab", "knife", "dove")
)
_VERBS = "stand wait remain belong come go sink turn fall rest".split()
_STATES = "old new small large here there gone lost dear heavy useful strange ours yours".split()
_NEAR = "of under from at beyond like".split()


def _agreeing(rng: Random, plural: bool) -> tuple[list[str], list[tuple[int, str]]]:
    """Return words that agree, and for each place that shows number the word that would not."""
    head, other = two(rng, _NOUNS)
    noun, between = head[plural], other[rng.random() < 0.5]
    determiner = rng.choice((("that", "those"), ("this", "these"), ("the", "the"), ("one", "many"), ("every", "all")))
    middle = [rng.choice(_NEAR), "the", between] if rng.random() < 0.5 else []
    kind = rng.randrange(6)
    if kind in (0, 4, 5):
        verb, rest = ("is", "are") if kind == 0 else ("was", "were"), [rng.choice(_STATES)]
    elif kind == 1:
        verb, rest = ("has", "have"), ["a", "name"] if rng.random() < 0.5 else ["been", rng.choice(_STATES[:7])]
    elif kind == 2:
        now = rng.choice(_VERBS)
        verb, rest = (now + ("es" if now == "go" else "s"), now), rng.choice(WHERE).split()
    else:
        verb, rest = ("does", "do"), ["not", rng.choice(_VERBS), *rng.choice(WHERE).split()]
    words = [determiner[plural], noun, *middle, verb[plural], *rest]
    faults = [(len(middle) + 2, verb[not plural])]
    if determiner[0] != determiner[1]:
        faults.append((0, determiner[not plural]))
    return words, faults


def agreement(rng: Random, books: Books) -> Draft:
    """Do noun, verb and determiner agree? In sentences with other states than the embedded suite's."""
    words, faults = _agreeing(rng, rng.random() < 0.5)
    at, wrong = rng.choice(faults)
    broken = [*words[:at], wrong, *words[at + 1 :]]
    if rng.random() < 0.25:
        swap = rng.randrange(len(words) - 2)
        broken = list(words)
        broken[swap], broken[swap + 1] = broken[swap + 1], broken[swap]
    if broken == words:
        return agreement(rng, books)
    kind, good, bad = rng.random(), " ".join(words), " ".join(broken)
    if kind < 0.75:
        label = rng.randrange(2)
        return judge(rng, good if label else bad, label, INTACT, INTACT_IF, books.words)
    if kind < 0.9:
        return pick(rng, rng.choice(("which is good English?", "which one is right?")), "", good, [bad])
    gap = " ".join([*words[:at], rng.choice(("___", "...", "_")), *words[at + 1 :]])
    return pick(rng, rng.choice(("fill the gap", "which word fits?", "what is missing?")), gap, words[at], [wrong])


def agreement_cloze(rng: Random, books: Books) -> Draft:
    """Fill in was/were, this/these in the embedded suite's own words: a gap to fill, nothing to judge."""
    plural = rng.random() < 0.5
    head, between = (w for w in rng.sample(suite.PEOPLE, 2))
    noun, determiner, verb = head + "s" * plural, ("this", "these")[plural], ("was", "were")[plural]
    middle = ["near", "the", between + "s" * (rng.random() < 0.5)]
    middle[0] = rng.choice(suite.PREPOSITIONS)
    words = [determiner, noun, *(middle if rng.random() < 0.6 else []), verb, rng.choice(suite.QUALITIES)]
    gap = rng.choice(("___", "...", "_"))
    which = rng.randrange(3)
    asks = rng.choice(("fill the gap", "which word fits?", "what is missing?", "complete the sentence"))
    if which == 0:
        words[0] = gap
        return pick(rng, asks, " ".join(words), determiner, [("these", "this")[plural]])
    if which == 1:
        words[words.index(verb)] = gap
        return pick(rng, asks, " ".join(words), verb, [("were", "was")[plural]])
    words[1] = gap
    return pick(rng, asks, " ".join(words), noun, [head + "s" * (not plural)])


def cloze(rng: Random, books: Books) -> Draft:
    """A gap in a sentence of the books, with two to four options: function words, or words of any kind."""
    sentence = rng.choice(books.sentences)
    words = sentence.split()
    gap, ask = rng.choice(("___", "...", "_")), rng.choice(("fill the gap", "which word fits?", "what is missing?"))
    places = [i for i, w in enumerate(words) if w in GROUP_OF]
    if places and rng.random() < 0.6:
        at = rng.choice(places)
        others = [w for w in GROUP_OF[words[at]] if w != words[at]]
        wrong = rng.sample(others, min(len(others), rng.randint(1, 3)))
    else:
        at = rng.randrange(1, len(words) - 1)
        if not words[at].islower() or not words[at].isalpha():
            return cloze(rng, books)
        wrong = [w for w in rng.sample(books.words, rng.randint(1, 3)) if w != words[at]]
        if not wrong:
            return cloze(rng, books)
    return pick(rng, ask, " ".join([*words[:at], gap, *words[at + 1 :]]), words[at], wrong)


def continuation(rng: Random, books: Books) -> Draft:
    """Which of two texts goes on from this one: the next sentence of the book, or the end of the same sentence?"""
    if rng.random() < 0.4:
        before, right = rng.choice(books.pairs)
        wrong = rng.choice(books.pairs)[1]
    else:
        words = rng.choice(books.sentences).split()
        at = rng.randint(len(words) // 3, len(words) - 2)
        before, right = " ".join(words[:at]), " ".join(words[at:])
        other = rng.choice(books.sentences).split()
        wrong = " ".join(other[-max(2, len(words) - at) :])
    if right == wrong:
        return continuation(rng, books)
    asks = ("what comes next?", "which one follows?", "how does it go on?", "pick the continuation")
    return pick(rng, rng.choice(asks), before, right, [wrong])


def joins(rng: Random, books: Books) -> Draft:
    """Do two halves belong to one sentence of the books?"""
    words, other = (rng.choice(books.sentences).split() for _ in range(2))
    label, at = rng.randrange(2), rng.randint(2, len(words) - 2)
    end = words[at:] if label else other[-max(2, len(words) - at) :]
    if not label and end == words[at:]:
        return joins(rng, books)
    asks = (
        Ask("do the two parts belong together", ("no", "yes")),
        Ask("are these halves of one sentence", ("strangers", "one")),
        Ask("does the second part fit the first", ("no fit", "fit")),
    )
    conditions = (("they do not fit", "each is from elsewhere"), ("they fit", "both are of one sentence"))
    body = rng.choice(("{} / {}", "{} ... {}", "start : {} end : {}")).format(" ".join(words[:at]), " ".join(end))
    return judge(rng, body, label, asks, conditions, books.words)


_MEN = "king boy man father uncle brother prince son husband nephew".split()
_WOMEN = "queen girl woman mother aunt sister lady daughter wife niece".split()
_DID = "met saw called left found heard followed praised warned thanked".split()
_THEN = "smiled|ran home|began to laugh|sat down|fell asleep|went away|shook hands|said nothing".split("|")


def pronoun(rng: Random, books: Books) -> Draft:
    """Who is meant by he, she, it or they?"""
    first, second = rng.choice(_MEN), rng.choice(_WOMEN)
    words = {"he": f"the {first}", "she": f"the {second}"}
    if rng.random() < 0.5:
        one = rng.choice(sorted(words))
        words = {one: words[one], **rng.choice(({"they": f"the {rng.choice(('dogs', 'horses', 'boys', 'guests'))}"},))}
    items = list(words.items())
    rng.shuffle(items)
    said, meant = rng.choice(items)
    other = next(phrase for _, phrase in items if phrase != meant)
    joint = rng.choice((" and", " , and then", " , but", " because"))
    then = rng.choice(_THEN)
    if joint == " because":
        then = rng.choice(("had called", "had asked for help", "looked tired", "wanted to talk"))
    text = f"{items[0][1]} {rng.choice(_DID)} {items[1][1]} {rng.choice(WHERE)}{joint} {said} {then}"
    asks = (f'who is "{said}"?', f"who is meant by {said}?", f"whom does {said} stand for?", f"who {then}?")
    if rng.random() < 0.3:
        return Draft(place(rng, rng.choice(asks), text), meant, two(rng, (meant, other)))
    return pick(rng, rng.choice(asks), text, meant, [other])
