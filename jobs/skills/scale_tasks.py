"""Skills on scales and numbers: next and before, steps between, nearer, more and less, sums and marks."""

from random import Random

from skills.book_text import Books
from skills.frames import COMMON, Ask, Draft, judge, pick, place, two
from skills.lists import CATEGORIES, CREATURES, CYCLES, NUMBERS, SCALES

CIRCLES = {name: words.split() for name, words in CYCLES.items()}
LINES = {name: words.split() for name, words in SCALES.items()} | {"letters": list("abcdefghijklmnopqrstuvwxyz")}
GROUPS = CATEGORIES["animal"] + CATEGORIES["bird"]


def _steps(circle: list[str], first: str, second: str) -> int:
    """Steps the shorter way round."""
    way = abs(circle.index(first) - circle.index(second))
    return min(way, len(circle) - way)


def _apart(rng: Random, circle: list[str], way: int) -> tuple[str, str]:
    at = rng.randrange(len(circle))
    return circle[at], circle[(at + rng.choice((-1, 1)) * way) % len(circle)]


def neighbour(rng: Random, books: Books) -> Draft:
    """What comes next, before, in between or after some steps, on a circle or a line?"""
    name, words = rng.choice(sorted({**CIRCLES, **LINES}.items()))
    hint = rng.choice(("", f"{name} : ", f"among {name} : ")) if name != "odd months" else "every second month : "
    steps = 1 if rng.random() < 0.6 else rng.choice((-1, 2, -2))
    round_ = name in CIRCLES
    at = rng.randrange(len(words))
    if not round_ and not 0 <= at + steps < len(words):
        return neighbour(rng, books)
    target, start = words[(at + steps) % len(words)], words[at]
    if abs(steps) == 2 and rng.random() < 0.4:
        ask = rng.choice(("what lies between {} and {}?", "what comes between {} and {}?"))
        return Draft(place(rng, ask.format(start, target), hint + "one word"), words[(at + steps // 2) % len(words)])
    asks = {
        1: ("what comes after {}?", "what is next after {}?", "what follows {}?"),
        -1: ("what comes before {}?", "what is just before {}?"),
        2: ("what is two steps after {}?", "which is two further than {}?"),
        -2: ("what is two steps before {}?", "which is two before {}?"),
    }[steps]
    run = [words[(at + k) % len(words)] for k in range(-3, 1)]
    if steps == 1 and rng.random() < 0.4 and (round_ or at >= 3):
        return Draft(
            place(rng, rng.choice(("go on with the row", "what comes next?", "continue the row")), " ".join(run)),
            target,
        )
    others = [w for w in rng.sample(words, min(3, len(words))) if w not in (target, start)]
    if rng.random() < 0.5 and others:
        return pick(rng, rng.choice(asks).format(start), hint.strip(" :"), target, others)
    return Draft(place(rng, rng.choice(asks).format(start), hint + "one word"), target)


def steps_between(rng: Random, books: Books) -> Draft:
    """How many steps lie between two words of a circle (the shorter way) or of a line?"""
    name, words = rng.choice(sorted(CIRCLES.items()) * 3 + sorted(LINES.items()))
    first, second = rng.choice(words), rng.choice(words)
    way = _steps(words, first, second) if name in CIRCLES else abs(words.index(first) - words.index(second))
    if way > 8:
        return steps_between(rng, books)
    figures = rng.random() < 0.5
    ask = rng.choice(("how many steps from {} to {}", "count the steps between {} and {}", "from {} to {} , how far"))
    ask = ask.format(first, second) + (" , in figures?" if figures else " , as a word?")
    body = rng.choice((name, f"on the row of {name}", f"the shortest way , {name}"))
    return Draft(place(rng, ask, body), str(way) if figures else NUMBERS[way])


def nearer(rng: Random, books: Books) -> Draft:
    """Which of two or three words is the nearest to a given one, or the farthest?"""
    name, words = rng.choice(sorted(CIRCLES.items()) * 2 + sorted(LINES.items()))
    start, *others = rng.sample(words, min(len(words), rng.randint(3, 4)))
    way = {w: _steps(words, start, w) if name in CIRCLES else abs(words.index(start) - words.index(w)) for w in others}
    far = rng.random() < 0.4
    best = (max if far else min)(way.values())
    if list(way.values()).count(best) != 1:
        return nearer(rng, books)
    right = next(w for w in others if way[w] == best)
    ask = rng.choice(("which is the {} to {}?", "what is {} to {}?", "pick the one that is {} to {}")).format(
        "least near" if far else "nearest", start
    )
    return pick(rng, ask, "", right, [w for w in others if w != right])


_STEPS = tuple("none one two three four five six".split())


def closeness(rng: Random, books: Books) -> Draft:
    """How close are two words of a circle: how many steps apart, far or near, a mark out of ten? No sentences."""
    name, circle = rng.choice(sorted(CIRCLES.items()))
    furthest = len(circle) // 2
    way = rng.randint(0, furthest)
    first, second = _apart(rng, circle, way)
    lead = " ".join(rng.sample(COMMON, rng.randint(1, 3))) + " " if rng.random() < 0.4 else ""
    body = rng.choice(("{0}{1} and {0}{2}", "{0}{1} / {0}{2}", "from {0}{1} to {0}{2}", "{0}{1} , {0}{2}"))
    body = body.format(lead, first, second)
    if rng.random() < 0.15:
        ask = rng.choice(("how close are they , from 0 to 10?", "give 10 if same , 0 if opposite , else between"))
        return Draft(place(rng, ask, f"{name} : {body}"), str(round(10 * (1 - way / furthest))))
    if rng.random() < 0.15:
        # More than half of the furthest way is far.
        label = 2 if way == 0 else int(2 * way <= furthest)
        asks = (Ask("far , near or same", ("far", "near", "same")), Ask("wide or close", ("wide", "close", "one")))
        conditions = (("they are far apart",), ("they are near but not the same",), ("they are the same",))
        return judge(rng, body, label, asks, conditions, books.words)
    steps = _STEPS[: furthest + 1]
    asks = (Ask("how many steps apart", steps), Ask("how far apart are they", steps))
    return judge(rng, body, way, asks, [(f"the steps are {step}",) for step in steps], books.words)


def more_or_less(rng: Random, books: Books) -> Draft:
    """Which of two words of a scale is more, or less? Is a claim about it true?"""
    name, words = rng.choice([*sorted(SCALES.items()), *[("quantity", SCALES["quantity"])] * 4])
    line = words.split()
    first, second = two(rng, line)
    more = rng.random() < 0.5
    higher = line.index(first) > line.index(second)
    if rng.random() < 0.5:
        ask = rng.choice(("which is {}?", "pick the one that is {}", "name what is {}")).format(
            "more" if more else "less"
        )
        body = "" if rng.random() < 0.3 else f"by {name}"
        right = first if higher == more else second
        return pick(rng, ask, body, right, [second if right == first else first])
    body = f"{first} is {'more' if more else 'less'} than {second}"
    asks = (
        Ask("is this so", ("no", "yes")),
        Ask("true or not", ("False", "True")),
        Ask("correct or mistaken", ("mistaken", "correct")),
    )
    return judge(
        rng, body, int(higher == more), asks, (("it is not so", "it is a mistake"), ("it is so",)), books.words
    )


def change(rng: Random, books: Books) -> Draft:
    """Two sights of the same thing at two times: did the number rise, fall, or come to nothing?"""
    label, line = rng.randrange(3), SCALES["quantity"].split() if rng.random() < 0.6 else ["no", *NUMBERS[2:13]]
    low, high = sorted(rng.sample(range(int(label == 1), len(line)), 2))
    first, second = {0: (line[low], line[high]), 1: (line[high], line[low]), 2: (line[high], "no")}[label]
    beast, (then, now) = (
        rng.choice(GROUPS),
        rng.choice((("in May", "in June"), ("at dawn", "at dusk"), ("last year", "this year"))),
    )
    if beast in ("sheep", "deer", "goose", "fox", "wolf", "pony", "donkey", "monkey", "fly"):
        beast = "horse"
    seen = rng.choice(("{0} {1}s were there {2}", "{2} he saw {0} {1}s", "{2} {0} {1}s came"))
    text = f"{seen.format(first, beast, then)} . {seen.format(second, beast, now)}"
    if rng.random() < 0.4:
        text = rng.choice((f"from {first} to {second}", f"first {first} , then {second}", f"{first} became {second}"))
    asks = (
        Ask("rise , fall or nothing left", ("rise", "fall", "nothing left")),
        Ask("more , fewer or gone in the end", ("more", "fewer", "gone")),
    )
    conditions = (
        ("there are more in the end", "the number rises"),
        ("there are fewer but some are left", "the number falls but not to nothing"),
        ("none are left", "there are none in the end"),
    )
    return judge(rng, text, label, asks, conditions, books.words)


def sums(rng: Random, books: Books) -> Draft:
    """Small sums in figures, in number words and in fifths; or is a sum right?"""
    plus = rng.random() < 0.5
    a, b = rng.randint(0, 10), rng.randint(0, 9)
    if not plus:
        a, b = max(a, b), min(a, b)
    result, kind = a + b if plus else a - b, rng.randrange(4)
    if kind == 0:
        ask = rng.choice(("how much is it?", "work it out", "what is the sum?"))
        return Draft(place(rng, ask, f"{a} {'and' if plus else 'less'} {b}"), str(result))
    if kind == 1:
        story = f"{NUMBERS[a]} {rng.choice(CREATURES)}s , {NUMBERS[b]} {'more come' if plus else 'go away'}"
        return Draft(place(rng, "how many are there now , as a word?", story), NUMBERS[result])
    if kind == 2:
        first, second = (rng.randint(0, 12) for _ in range(2))
        ask = rng.choice(("add them", "how much together?", "what is the sum?"))
        return Draft(place(rng, ask, f"{first / 5:.1f} and {second / 5:.1f}"), f"{(first + second) / 5:.1f}")
    label = rng.randrange(2)
    said = result if label else result + rng.choice([d for d in (-2, -1, 1, 2) if result + d >= 0])
    asks = (Ask("right or wrong", ("wrong", "right")), Ask("true or not", ("False", "True")))
    body = f"{a} {'and' if plus else 'less'} {b} is {said}"
    return judge(rng, body, label, asks, (("the sum is wrong",), ("the sum is right",)), books.words)


def marks(rng: Random, books: Books) -> Draft:
    """Marks from 0.0 to 5.0 that are read off, compared or put in order; they grade nothing that is in the row."""
    count = rng.randint(2, 4)
    names = rng.sample(CREATURES, count)
    values = [f"{fifths / 5:.1f}" for fifths in rng.sample(range(26), count)]
    text = rng.choice((" , ", " ; ", " . ")).join(
        f"the {n} {rng.choice(('has', 'got'))} {v}" for n, v in zip(names, values, strict=True)
    )
    kind, at = rng.randrange(4), rng.randrange(count)
    if kind == 0:
        return Draft(place(rng, f"which mark has the {names[at]}?", text), values[at], tuple(values))
    if kind == 1:
        best = rng.random() < 0.5
        ask = rng.choice(("who has the {} mark?", "whose mark is the {}?")).format("highest" if best else "lowest")
        order = sorted(zip(map(float, values), names, strict=True), reverse=best)
        return Draft(place(rng, ask, text), order[0][1], tuple(names))
    if kind == 2:
        best = rng.random() < 0.5
        ask = rng.choice(("write the {} mark", "what is the {} mark?")).format("highest" if best else "lowest")
        return Draft(place(rng, ask, text), (max if best else min)(values, key=float), tuple(values))
    ask = rng.choice(("sort the marks , low to high", "write the marks from small to great"))
    return Draft(place(rng, ask, " ".join(values)), " ".join(sorted(values, key=float)))


def shared_words(rng: Random, books: Books) -> Draft:
    """How many words have two lists in common? A figure, or a part of one as a decimal."""
    size, shared = rng.choice((4, 5)), rng.randint(0, 4)
    words = rng.sample(books.words, 2 * size - shared)
    left, right = words[:size], words[:shared] + words[size:]
    rng.shuffle(left)
    rng.shuffle(right)
    body = rng.choice(("{} / {}", "left : {} right : {}", "{} . {}")).format(" ".join(left), " ".join(right))
    if rng.random() < 0.5:
        ask = rng.choice(("how many words are in both?", "count the shared words"))
        return Draft(place(rng, ask, body), str(shared))
    ask = rng.choice(("what part of the words is shared , as a decimal?", "give the overlap from 0.0 to 1.0"))
    return Draft(place(rng, ask, body), f"{shared / size:.2f}" if size == 4 else f"{shared / size:.1f}")
