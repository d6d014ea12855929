"""The skill tasks: what a small frozen T5 must have met before a prompt can steer it into the embedded suite's tasks.

Words are copied, ordered, counted and compared; passages are looked up; sentences are judged, completed and continued;
words are sorted by topic, meaning and praise; scales are walked along. Instructions, layouts and label words change
from row to row, so that they have to be read.

Not in any row, which tests/test_skills.py holds:

1. The templates of the embedded suite, GLUE, SuperGLUE and the extras ("sentiment:", "premise:", "choice1:" ...), and
   the suite's label sets as answers to the suite's questions. Its label words and its scores 0.0 to 5.0 do occur, as
   words without meaning: to be read off a list (codes, marks, follow_rule), added up, or, yes/no and True/False,
   as answers to other questions. A word that a model was never trained to write cannot be had from it by a prompt.
2. A row of the embedded suite, train or validation: no skill row, and no line of the grammar text, holds all texts of
   one (leaks.py). No benchmark's data are used at all.
3. The suite's question about the suite's sentences. Praise is judged of words, phrases and short sentences about other
   things, without a turn at "but"; agreement in sentences with other states and mostly other nouns, determiners and
   verbs, was and were among them, or as a gap to fill; three-way inference is about
   kinds, colours, numbers and places, never quantities; closeness is about two words, never sentences, on another
   scale; senses are named, never compared; facts are about other things and checked, not asked; synonymous sentences
   have other verbs, people and tenses; cause and effect are asked of other events.

On purpose the rows do teach the suite's words in other, simpler forms: which verbs are synonyms, which words share a
topic, the order of days, months, directions and quantities, which adjectives praise, the order of events in a chain.
A score on the embedded suite hence shows that a prompt finds and combines what the backbone knows.

Texts come from the works before each corpus file's held-out ones (book_text.py).
"""
