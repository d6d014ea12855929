"""The skill tasks by name."""

from collections.abc import Callable, Mapping
from random import Random

from skills import fact_tasks, meaning_tasks, scale_tasks, sentence_tasks, word_tasks
from skills.book_text import Books
from skills.frames import Draft

Make = Callable[[Random, Books], Draft]

_MAKERS: tuple[Make, ...] = (
    word_tasks.copy,
    word_tasks.reverse,
    word_tasks.alphabet,
    word_tasks.nth_word,
    word_tasks.count,
    word_tasks.missing_word,
    word_tasks.changed_word,
    word_tasks.unscramble,
    word_tasks.spelling,
    word_tasks.contains,
    word_tasks.same_words,
    word_tasks.follow_rule,
    word_tasks.word_forms,
    sentence_tasks.intact,
    sentence_tasks.better_of_two,
    sentence_tasks.agreement,
    sentence_tasks.agreement_cloze,
    sentence_tasks.cloze,
    sentence_tasks.continuation,
    sentence_tasks.joins,
    sentence_tasks.pronoun,
    fact_tasks.lookup,
    fact_tasks.codes,
    fact_tasks.claim,
    fact_tasks.follows,
    fact_tasks.owner,
    fact_tasks.belongs,
    meaning_tasks.topic,
    meaning_tasks.sense,
    meaning_tasks.odd_one_out,
    meaning_tasks.alike,
    meaning_tasks.synonym,
    meaning_tasks.same_meaning,
    meaning_tasks.same_event,
    meaning_tasks.opinion,
    meaning_tasks.kinder,
    meaning_tasks.turn_of_mind,
    meaning_tasks.cause_effect,
    meaning_tasks.story_order,
    scale_tasks.neighbour,
    scale_tasks.steps_between,
    scale_tasks.nearer,
    scale_tasks.closeness,
    scale_tasks.more_or_less,
    scale_tasks.change,
    scale_tasks.sums,
    scale_tasks.marks,
    scale_tasks.shared_words,
)
MAKERS: Mapping[str, Make] = {make.__name__: make for make in _MAKERS}
