"""Skills on words as such: copying, order, counting, finding what changed, spelling, and following a named rule."""

from random import Random

from skills.book_text import Books, plain
from skills.frames import Ask, Draft, judge, pick, place, quoted, sign_words, two
from skills.lists import NUMBERS, PAST, PLURALS, SPELLED, SUITE_WORDS

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


def _words(rng: Random, books: Books, low: int, high: int) -> list[str]:
    """Different words: of one sentence, or at random."""
    count = rng.randint(low, high)
    if rng.random() < 0.4:
        words = list(dict.fromkeys(plain(rng.choice(books.sentences))))
        if len(words) >= low:
            return words[:count]
    return rng.sample(books.words, count)


def _listed(rng: Random, words: list[str]) -> str:
    return rng.choice((" ", " ", " , ", " ; ")).join(words)


def copy(rng: Random, books: Books) -> Draft:
    asks = ("repeat", "copy this", "write the same again", "say it once more", "write down what is given", "echo")
    text = rng.choice(books.sentences) if rng.random() < 0.5 else _listed(rng, _words(rng, books, 1, 7))
    return Draft(place(rng, rng.choice(asks), text), text)


def reverse(rng: Random, books: Books) -> Draft:
    asks = (
        "reverse the words",
        "write the words from last to first",
        "say the words backwards",
        "turn the order round",
    )
    words = _words(rng, books, 2, 6)
    return Draft(place(rng, rng.choice(asks), _listed(rng, words)), " ".join(words[::-1]))


def alphabet(rng: Random, books: Books) -> Draft:
    """Sort words, or say which comes first or last; the words of a row mostly start with different letters."""
    words = list({w[0]: w for w in rng.sample(books.words, rng.randint(2, 5))}.values())
    if len(words) < 2:
        return alphabet(rng, books)
    if rng.random() < 0.5:
        asks = ("sort by the alphabet", "put in order from a to z", "arrange the words alphabetically")
        return Draft(place(rng, rng.choice(asks), _listed(rng, words)), " ".join(sorted(words)))
    last = rng.random() < 0.5
    ask = rng.choice(("which word is {} in the alphabet?", "which comes {} in a dictionary?")).format(
        "last" if last else "first"
    )
    right = (max if last else min)(words)
    return pick(rng, ask, "", right, [w for w in words if w != right])


def nth_word(rng: Random, books: Books) -> Draft:
    words = _words(rng, books, 3, 7)
    at = rng.randrange(len(words))
    place_names = [f"the {ORDINALS[at]} word", f"word number {at + 1}"]
    if at == len(words) - 1:
        place_names = ["the last word", "the word at the end"]
    elif at == 0:
        place_names = ["the first word", "the word at the start", "the first word"]
    if at > 0:
        place_names.append(f"the word after {words[at - 1]}")
    if at < len(words) - 1:
        place_names.append(f"the word before {words[at + 1]}")
    ask = rng.choice(("write {}", "what is {}?", "give {}", "name {}")).format(rng.choice(place_names))
    return Draft(place(rng, ask, _listed(rng, words)), words[at])


def count(rng: Random, books: Books) -> Draft:
    """Count words, or how often one occurs; the answer is a figure or a number word, as asked."""
    figures = rng.random() < 0.5
    how = rng.choice(("in figures", "as a figure") if figures else ("in letters", "as a word"))
    if rng.random() < 0.5:
        words = _words(rng, books, 1, 8)
        number, ask = len(words), rng.choice(("how many words are there , {}?", "count the words , {}"))
    else:
        number = rng.randint(0, 4)
        word, *others = rng.sample(books.words, 6)
        words = [word] * number + rng.sample(others, rng.randint(1, 5))
        rng.shuffle(words)
        ask = rng.choice((f"how often is {word} said , {{}}?", f"count the word {word} , {{}}"))
    text = " ".join(words)
    return Draft(place(rng, ask.format(how), text), str(number) if figures else NUMBERS[number])


def missing_word(rng: Random, books: Books) -> Draft:
    """Two versions of a text: which word has the first one more?"""
    words = _words(rng, books, 3, 9)
    at = rng.randrange(len(words))
    texts = [" ".join(words), " ".join(words[:at] + words[at + 1 :])]
    if rng.random() < 0.5:
        texts.reverse()
    ask = rng.choice(
        (
            "which word is in one only?",
            "name the word that one text lacks",
            "which word was left out?",
            "what did one forget?",
        )
    )
    return Draft(place(rng, ask, rng.choice((" / ", " . ", " ; then ")).join(texts)), words[at])


def changed_word(rng: Random, books: Books) -> Draft:
    words = plain(rng.choice(books.sentences))[:10]
    at, new = rng.randrange(len(words)), rng.choice(books.words)
    if new in words:
        return changed_word(rng, books)
    texts = " ".join(words), " ".join([*words[:at], new, *words[at + 1 :]])
    body = rng.choice(("{} . {}", "old : {} . new : {}", "{} - {}", "before : {} ; after : {}")).format(*texts)
    kind = rng.randrange(3)
    if kind == 0:
        ask = rng.choice(
            ("which word was put in?", "name the new word of the second", "what stands in the second only?")
        )
        return Draft(place(rng, ask, body), new)
    if kind == 1:
        ask = rng.choice(("which word was taken out?", "name the word that the first alone has", "what was replaced?"))
        return Draft(place(rng, ask, body), words[at])
    ask = rng.choice(("write what was changed into what", "name the old word and the new one"))
    return Draft(place(rng, ask, body), f"{words[at]} {new}")


def unscramble(rng: Random, books: Books) -> Draft:
    words = min((plain(rng.choice(books.sentences)) for _ in range(4)), key=len)[:9]
    mixed = rng.sample(words, len(words)) if rng.random() < 0.5 else _swapped(rng, words)
    if mixed == words:
        return unscramble(rng, books)
    asks = ("put the words in the right order", "mend the order", "make a sentence of the words", "set it right")
    return Draft(place(rng, rng.choice(asks), " ".join(mixed)), " ".join(words))


def _swapped(rng: Random, words: list[str]) -> list[str]:
    at = rng.randrange(len(words) - 1)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def spelling(rng: Random, books: Books) -> Draft:
    """Letters to word and back, or the rightly spelled one of two."""
    word, kind = rng.choice(books.words), rng.randrange(3)
    if kind == 0:
        ask = rng.choice(("which word do the letters make?", "read the letters as one word", "join the letters"))
        return Draft(place(rng, ask, " ".join(word)), word)
    if kind == 1 and len(word) <= 8:
        return Draft(
            place(rng, rng.choice(("spell", "write the letters one by one", "spell out")), word), " ".join(word)
        )
    wrong = _misspelled(rng, word, set(books.words))
    if rng.random() < 0.5:
        return pick(rng, rng.choice(("which is spelled right?", "which of these is a word?")), "", word, [wrong])
    return pick(rng, rng.choice(("which is spelled wrong?", "which is no word?")), "", wrong, [word])


def _misspelled(rng: Random, word: str, known: set[str]) -> str:
    for _ in range(20):
        at, old = rng.randrange(len(word) - 1), rng.choice(SPELLED)
        if old in word and rng.random() < 0.5:
            wrong = word.replace(old, rng.choice((old[::-1], old[0], old + old[-1])), 1)
        else:
            wrong = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        if wrong not in known:
            return wrong
    return word + word[-1] + "t"


def contains(rng: Random, books: Books) -> Draft:
    """Is the word (or are both words, or either) in the list?"""
    words, label = _words(rng, books, 3, 9), rng.randrange(2)
    absent = rng.choice([w for w in rng.sample(books.words, 12) if w not in words])
    word = rng.choice(words) if label else absent
    ask = Ask(f"is {word} among these", ("no", "yes"))
    asks = (ask, Ask(f"does {word} occur", ("absent", "present")), Ask(f"can you find {word}", ("no", "yes")))
    conditions = (
        (f"{word} is not there", f"there is no {word}", f"{word} is missing"),
        (f"{word} is there", f"you see {word}", f"it has {word}"),
    )
    return judge(rng, _listed(rng, words), label, asks, conditions, books.words)


def same_words(rng: Random, books: Books) -> Draft:
    """Are two texts the same, the same words in another order, or does one word differ?"""
    words, kind = _words(rng, books, 3, 8), rng.randrange(4)
    other, ordered = list(words), rng.random() < 0.5
    if kind == 1:
        other = _swapped(rng, words)
    elif kind >= 2:
        at = rng.randrange(len(words))
        other[at] = rng.choice([w for w in rng.sample(books.words, 12) if w not in words])
        if not ordered:
            rng.shuffle(other)
    if not ordered and kind < 2:
        rng.shuffle(other)
    body = rng.choice(("{} . {}", "left : {} right : {}", "{} / {}", "one : {} ; two : {}")).format(
        " ".join(words), " ".join(other)
    )
    if ordered:
        asks = (
            Ask("are they the same text", ("different", "same")),
            Ask("is it a true copy", ("bad copy", "true copy")),
        )
        conditions = (("they differ", "something differs"), ("nothing differs", "both are the same"))
        # Half of the rows are copies: those with kind 0, and as many of the others' draws again.
        label = int(words == other)
        if label == 0 and rng.random() < 2 / 3:
            return same_words(rng, books)
        return judge(rng, body, label, asks, conditions, books.words)
    asks = (
        Ask("do both have the same words in some order", ("no", "yes")),
        Ask("is one a shuffle of the other", ("other words", "shuffle")),
    )
    conditions = (("the words differ", "one word is new"), ("only the order differs", "the words are the same"))
    return judge(rng, body, int(kind < 2), asks, conditions, books.words)


def follow_rule(rng: Random, books: Books) -> Draft:
    """A rule made for the row: which word to say on which sight."""
    words = _words(rng, books, 3, 7)
    present = rng.choice(words)
    absent = rng.choice([w for w in rng.sample(books.words, 20) if w not in words])
    keys = [present, absent]
    rng.shuffle(keys)
    signs = sign_words(rng, books.words, 2) if rng.random() < 0.8 else two(rng, SUITE_WORDS)
    rule = rng.choice(
        (
            "if you see {0} say {2} , if you see {1} say {3}",
            "{0} stands for {2} and {1} for {3}",
            "on {0} write {2} , on {1} write {3}",
            "{2} for {0} , {3} for {1}",
        )
    ).format(*keys, *signs)
    return Draft(place(rng, rule, " ".join(words)), signs[keys.index(present)], signs)


def word_forms(rng: Random, books: Books) -> Draft:
    """Singular and plural, present and past."""
    kind = rng.randrange(4)
    if kind < 2:
        now, past = rng.choice(sorted(PAST.items()))
        asks: tuple[str, ...] = (
            ("say it of yesterday", "write the past form of the verb", "give the past"),
            ("say it of today", "write the present form of the verb", "give the present"),
        )[kind]
        given, target = (now, past) if kind == 0 else (past, now)
        others = [rng.choice(sorted(PAST.values() if kind == 0 else PAST))]
    else:
        one, many = rng.choice(sorted(PLURALS.items()))
        asks = (
            ("say it of many", "give the plural", "write the plural form", "make it more than one"),
            ("say it of one", "give the singular", "write the singular form", "make it only one"),
        )[kind - 2]
        given, target = (one, many) if kind == 2 else (many, one)
        others = [rng.choice(sorted(PLURALS.values() if kind == 2 else PLURALS))]
    if rng.random() < 0.3 and others[0] != target:
        return pick(rng, rng.choice(asks), given, target, others)
    group = [given] if rng.random() < 0.5 else [given, *rng.sample(books.words, 2)]
    if len(group) == 1:
        return Draft(place(rng, rng.choice(asks), quoted(rng, given)), target)
    first, second = two(rng, group[1:])
    ask = rng.choice(asks) + rng.choice((" , only of the first word", " , of the word before the comma"))
    return Draft(place(rng, ask, f"{given} , {first} {second}"), target)
