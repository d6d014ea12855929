"""Skills on meanings: kinds and topics, synonyms and opposites, praise and blame, causes and effects."""

from random import Random

from polyprompt.tasks import embedded_words as suite
from skills.book_text import Books
from skills.frames import Ask, Draft, article, judge, pick, place, two
from skills.lists import CATEGORIES, CHAINS, CREATURES, DONE, KIND, OPPOSITES, ROLES, SYNONYMS, UNKIND, WHERE

TOPICS = {name: tuple(words.split()) for name, words in suite.TOPICS.items()}
GROUPS = {**CATEGORIES, **TOPICS, "trade or post": suite.PEOPLE, "person's name": suite.NAMES}
ALL_SYNONYMS = {**SYNONYMS, "past verb": suite.SYNONYMS}
PRAISING = tuple(dict.fromkeys(KIND + suite.PRAISE))
BLAMING = tuple(dict.fromkeys(UNKIND + suite.BLAME))


def _group_names(rng: Random, count: int) -> list[str]:
    """Groups with no word in common; half of the rows keep to the topics, which are harder."""
    while True:
        names = rng.sample(sorted(TOPICS if rng.random() < 0.5 else GROUPS), count)
        words = [word for name in names for word in GROUPS[name]]
        if len(set(words)) == len(words) and not ({"animal", "building"} & set(names) and set(names) & set(CATEGORIES)):
            return names


def topic(rng: Random, books: Books) -> Draft:
    """Which topic or kind do one to three words belong to? Or which word belongs to the topic?"""
    right, *others = _group_names(rng, rng.randint(2, 4))
    if rng.random() < 0.5:
        words = rng.sample(GROUPS[right], rng.randint(1, 3))
        asks = ("which subject is this?", "what group is it?", "what does this belong to?", "name the subject")
        return pick(rng, rng.choice(asks), rng.choice((" , ", " and ", " ")).join(words), right, others)
    ask = rng.choice(("which word belongs to the group {}?", "which one has to do with {}?", "pick the word for {}"))
    return pick(rng, ask.format(right), "", rng.choice(GROUPS[right]), [rng.choice(GROUPS[other]) for other in others])


def sense(rng: Random, books: Books) -> Draft:
    """A word of two senses with words beside it: which topic is spoken of? Or which word fits a topic's sense?"""
    word = rng.choice(sorted(suite.AMBIGUOUS))
    right, wrong = two(rng, suite.AMBIGUOUS[word])
    near = rng.sample(TOPICS[right], rng.randint(1, 3))
    if rng.random() < 0.6:
        body = rng.choice(
            ("{1} : {0}", "{0} - {1}", "{0} , spoken of beside {1}", "they talked of {1} , then of a {0}")
        )
        asks = (f"what is {word} about here?", "which subject?", f"in which sense is {word} meant?")
        return pick(rng, rng.choice(asks), body.format(word, rng.choice((" , ", " and ")).join(near)), right, [wrong])
    ask = rng.choice(("which word goes with {} in the sense of {}?", "pick what fits {} as a matter of {}"))
    return pick(rng, ask.format(word, right), "", near[0], [rng.choice(TOPICS[wrong])])


def odd_one_out(rng: Random, books: Books) -> Draft:
    name, other = _group_names(rng, 2)
    words, odd = rng.sample(GROUPS[name], rng.randint(2, 4)), rng.choice(GROUPS[other])
    asks = ("which word does not belong?", "find the odd one", "which one is of another kind?", "name the stranger")
    return pick(rng, rng.choice(asks), "", odd, words)


def alike(rng: Random, books: Books) -> Draft:
    """Do two words, or two pairs of words, belong to one group?"""
    name, other = _group_names(rng, 2)
    label, size = rng.randrange(2), rng.randint(1, 2)
    words = rng.sample(GROUPS[name], 2 * size)
    left, right = words[:size], words[size:] if label else rng.sample(GROUPS[other], size)
    asks = (
        Ask("are they of one kind", ("no", "yes")),
        Ask("one group or two", ("two", "one")),
        Ask("do both sides share a subject", ("apart", "shared")),
    )
    conditions = (("they are of two kinds", "the subjects differ"), ("they are of one kind", "the subject is shared"))
    body = rng.choice(("{} / {}", "left : {} right : {}", "{} with {}", "{} - {}"))
    sides = [rng.choice((" , ", " and ", " ")).join(side) for side in (left, right)]
    if rng.random() < 0.4:  # the same words on both sides, which say nothing
        lead = rng.choice(books.words)
        sides = [rng.choice((f"{lead} , {side}", f"{lead} beside {side}", f"{side} , {lead}")) for side in sides]
    return judge(rng, body.format(*sides), label, asks, conditions, books.words)


def synonym(rng: Random, books: Books) -> Draft:
    """Which word means the same as this one, or the opposite?"""
    opposite = rng.random() < 0.4
    pairs = rng.choice(sorted((OPPOSITES if opposite else ALL_SYNONYMS).items()))[1]
    chosen = rng.sample(pairs, rng.randint(2, 4))
    word, right = two(rng, chosen[0])
    wrong = [rng.choice(pair) for pair in chosen[1:] if word not in pair and right not in pair]
    if not wrong or len({word, right, *wrong}) < len(wrong) + 2:
        return synonym(rng, books)
    same = ("another word for {}?", "which means the same as {}?", "which is nearly {}?", "what could stand for {}?")
    other = ("the opposite of {}?", "which is the contrary of {}?", "not {} , but what?", "pick the opposite of {}")
    return pick(rng, rng.choice(other if opposite else same).format(word), "", right, wrong)


_SAME = (
    Ask("do both say the same", ("no", "yes")),
    Ask("same or other meaning", ("other", "same")),
    Ask("are the two alike in sense", ("unlike", "alike")),
)
_SAME_IF = (
    ("they mean two things", "the sense differs", "one says something else"),
    ("they mean the same", "the sense is one", "both tell the same thing"),
)


def same_meaning(rng: Random, books: Books) -> Draft:
    """Do two words mean the same? The wrong ones are opposites or of another pair."""
    label = rng.randrange(2)
    pairs = rng.choice(sorted(ALL_SYNONYMS.items()))[1]
    chosen, other = two(rng, pairs)
    first, second = two(rng, chosen)
    if not label:
        second = rng.choice(other)
        if rng.random() < 0.3:
            first, second = two(rng, rng.choice(rng.choice(sorted(OPPOSITES.items()))[1]))
    if not label and any({first, second} <= set(pair) for group in ALL_SYNONYMS.values() for pair in group):
        return same_meaning(rng, books)
    body = rng.choice(("{} / {}", "{} and {}", "one : {} two : {}", "{} , {}")).format(first, second)
    return judge(rng, body, label, _SAME, _SAME_IF, books.words)


def same_event(rng: Random, books: Books) -> Draft:
    """Active or passive, the same verb or one like it: is the same told? Or have the two changed places?"""
    (agent, patient), (pair, other) = two(rng, CREATURES), two(rng, DONE)
    first, second = two(rng, pair)
    fault, where = rng.choice(("", "", "verb", "roles")), rng.choice(WHERE)
    if rng.random() < 0.4:
        second = first
    if fault == "verb":
        second = rng.choice(other)
    doer, done = (patient, agent) if fault == "roles" else (agent, patient)
    left = f"the {agent} had {first} the {patient} {where}"
    if rng.random() < 0.3:
        left = f"{where} the {patient} had been {first} by the {agent}"
    right = f"the {done} had been {second} by the {doer} {where}"
    if rng.random() < 0.4 and first != second:
        right = f"the {doer} had {second} the {done} {where}"
    body = rng.choice(("{} . {}", "{} / {}", "he wrote : {} . she wrote : {}", "old : {} ; new : {}"))
    return judge(rng, body.format(left, right), int(not fault), _SAME, _SAME_IF, books.words)


_FEELING = (
    Ask("kind or unkind", ("unkind", "kind")),
    Ask("nice or nasty", ("nasty", "nice")),
    Ask("is it praise", ("no", "yes")),
    Ask("would you be glad or sorry to hear it", ("sorry", "glad")),
    Ask("sun or rain", ("rain", "sun")),
    Ask("praise or blame", ("blame", "praise")),
    Ask("thumb up or down", ("down", "up")),
)
_FEELING_IF = (
    ("it is blame", "it is nasty", "it displeases", "it speaks ill"),
    ("it is praise", "it is nice", "it pleases", "it speaks well"),
)
_MORE = "very really quite so truly most rather".split()
_NOT = ("not", "not", "never", "not at all", "far from", "by no means", "not so", "hardly", "no longer")


def _opinion(rng: Random, kind: bool) -> str:
    """A word or phrase that praises or blames; a negation turns its word round."""
    negated = rng.random() < 0.4
    word = rng.choice(PRAISING if kind != negated else BLAMING)
    if negated:
        phrase, noun = f"{rng.choice(_NOT)} {word}", ""
        if rng.random() < 0.3:
            phrase, noun = f"not {article(word)}", rng.choice(ROLES)
    else:
        more = rng.random()
        phrase, noun = word if more < 0.4 else f"{rng.choice(_MORE)} {word}", ""
        if rng.random() < 0.3:
            phrase, noun = article(word), rng.choice(ROLES)
        elif rng.random() < 0.2:
            phrase = f"{word} and {rng.choice(PRAISING if kind else BLAMING)}"
    phrase = f"{phrase} {noun}".strip()
    if rng.random() < 0.5:
        subject = f"{rng.choice(('the', 'this', 'that', 'my', 'our'))} {rng.choice(ROLES)}"
        return f"{subject} {rng.choice(('is', 'seems', 'was', 'looked', 'has been'))} {phrase}"
    start = rng.choice(("", "", "it is ", "this seems ", "we found it ", "they call it ", "I think it "))
    return start + (phrase if start != "I think it " else f"is {phrase}")


def opinion(rng: Random, books: Books) -> Draft:
    """Praise or blame? Words and phrases, some with a negation."""
    label = rng.randrange(2)
    return judge(rng, _opinion(rng, label == 1), label, _FEELING, _FEELING_IF, books.words)


def kinder(rng: Random, books: Books) -> Draft:
    """Which of two to four words or phrases is the kind one, or the unkind one?"""
    kind = rng.random() < 0.5
    good, bad = ("the kind one", "the one that pleases", "the praise"), ("the unkind one", "the nasty one", "the blame")
    ask = rng.choice(("which is {}?", "pick {}", "find {}")).format(rng.choice(good if kind else bad))
    if rng.random() < 0.5:
        right, wrong = _opinion(rng, kind), [_opinion(rng, not kind)]
    else:
        right = rng.choice(PRAISING if kind else BLAMING)
        wrong = rng.sample(BLAMING if kind else PRAISING, rng.randint(1, 3))
    return pick(rng, ask, "", right, wrong)


def turn_of_mind(rng: Random, books: Books) -> Draft:
    """Two opinions, of which the question asks for one: how did it begin, how did it end, what counts in the end?"""
    label = rng.randrange(2)
    asked_last, turned = rng.random() < 0.6, rng.random() < 0.7
    word = rng.choice(PRAISING if label else BLAMING)
    other = rng.choice(PRAISING if bool(label) != turned else BLAMING)
    first, last = (other, word) if asked_last else (word, other)
    role = rng.choice(ROLES)
    forms = (
        f"{first} at first , {last} in the end",
        f"{article(role)} that begins {first} and ends {last}",
        f"yesterday {first} , today {last}",
        f"early on {first} , later {last}",
    )
    when = "at the end" if asked_last else "at the start"
    asks = tuple(Ask(f"{ask.question} {when}", ask.words) for ask in _FEELING if "hear" not in ask.question)
    conditions = tuple(tuple(f"{way} {when}" for way in ways) for ways in _FEELING_IF)
    return judge(rng, rng.choice(forms), label, asks, conditions, books.words)


def cause_effect(rng: Random, books: Books) -> Draft:
    """Why, or what came of it? Of events that the embedded suite does not have."""
    chain, other = two(rng, CHAINS)
    why, name = rng.random() < 0.5, rng.choice(suite.NAMES)
    step = -1 if why else 1
    right = chain[1 + step]
    wrong = chain[1 - step] if rng.random() < 0.4 else rng.choice(other)
    asks = (
        ("why was that?", "what was the reason?", "what brought it about?", "what had happened before?")
        if why
        else ("what came of it?", "what happened then?", "what did it lead to?", "and afterwards?")
    )
    if rng.random() < 0.4:  # the question stands behind the event
        which = rng.choice(("cause", "reason", "origin") if why else ("effect", "result", "outcome"))
        return pick(rng, "cause or effect?", f"{name} {chain[1]} : {which}", right, [wrong])
    return pick(rng, rng.choice(asks), f"{name} {chain[1]}", right, [wrong])


def story_order(rng: Random, books: Books) -> Draft:
    """Three mixed events in the order in which they must have happened, or the one that is missing in between."""
    chain = rng.choice(CHAINS + suite.CHAINS)
    name = rng.choice(suite.NAMES)
    if rng.random() < 0.4:
        asks = ("what happened in between?", "fill the gap", "what is missing?")
        return Draft(place(rng, rng.choice(asks), f"{name} {chain[0]} , ___ and {chain[2]}"), chain[1])
    events = rng.sample(chain, 3)
    listed = " ; ".join(events)
    if rng.random() < 0.5:
        asks = ("tell it in order", "put the events in order", "as a story")
        return Draft(
            place(rng, rng.choice(asks), f"{name} : {listed}"), f"{name} {chain[0]} , {chain[1]} and {chain[2]}"
        )
    at = rng.choice((0, 2))
    ask = rng.choice(("which came first?", "how did it begin?") if at == 0 else ("which came last?", "how did it end?"))
    return pick(rng, ask, f"of {name}", chain[at], [event for event in events if event != chain[at]])
