"""What the skill tasks read from the books: plain sentences, neighbouring sentences, and the commonest words."""

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyprompt.errors import DataError
from polyprompt.task_configs import TextConfig

#: Share of a file's works, its last ones, that no skill task ever sees: what pre-training keeps back.
HELD_OUT: float = TextConfig.model_fields["held_out"].default
#: Fewer than these make the tasks repeat themselves.
MIN_SENTENCES, MIN_WORDS = 50, 100
_SENTENCE_END = re.compile(r"(?<=[a-z][.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<!Messrs\.) (?=[A-Z])")
_CLEAN = re.compile(r"[A-Z][A-Za-z,;:' -]*[.!?]")
#: Words of contempt for peoples, which the books have in plenty.
_CONTEMPT = re.compile(r"negro|nigger|darkey|darkie|heathen|half-breed|redskin", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w'-])[a-z]+(?![\w'-])")


@dataclass(frozen=True)
class Books:
    """sentences: 5 to 16 words each. pairs: two neighbours of one paragraph. words: the commonest first, lower case."""

    sentences: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    words: tuple[str, ...]


def held_out_works(num_works: int) -> int:
    """Return the index of the first work that is kept out; at least one is."""
    return min(int((1 - HELD_OUT) * num_works), num_works - 1)


def works(path: Path) -> list[list[str]]:
    """Return the paragraphs of each work of a .txt or .txt.gz file; an empty line ends a work. Raises DataError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            text = lines.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"corpus file {path} cannot be read as UTF-8 text: {error}") from error
    found = [work.split("\n") for work in re.split(r"\n\s*\n", text.strip())]
    if len(found) < 2:
        raise DataError(f"corpus file {path} has {len(found)} work; expected two or more, with empty lines in between")
    return found


def read_books(paths: Sequence[Path]) -> Books:
    """Return what the works before the held-out ones give. Raises DataError for too little text."""
    counts: Counter[str] = Counter()
    sentences: dict[str, None] = {}
    pairs: list[tuple[str, str]] = []
    for path in paths:
        all_works = works(path)
        for work in all_works[: held_out_works(len(all_works))]:
            for paragraph in work:
                counts.update(_WORD.findall(paragraph))
                before = ""
                for sentence in _sentences(paragraph):
                    if sentence:
                        sentences[sentence] = None
                    if before and sentence:
                        pairs.append((before, sentence))
                    before = sentence
    words = [w for w, n in counts.most_common(6000) if len(w) > 2 and n > 1 and not _CONTEMPT.search(w)][:4000]
    if len(sentences) < MIN_SENTENCES or len(words) < MIN_WORDS:
        names = ", ".join(str(path) for path in paths)
        raise DataError(
            f"{names}: {len(sentences)} plain sentences and {len(words)} common words; expected at least "
            f"{MIN_SENTENCES} and {MIN_WORDS}. Add text"
        )
    return Books(tuple(sentences), tuple(pairs), tuple(words))


def _sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentence, or "" for one that is no plain one (quotes, numbers, too long or too short)."""
    for part in _SENTENCE_END.split(paragraph):
        plain = _CLEAN.fullmatch(part) and "--" not in part and not _CONTEMPT.search(part)
        yield part if plain and 5 <= part.count(" ") + 1 <= 16 else ""


def plain(sentence: str) -> list[str]:
    """Return the words in lower case without punctuation."""
    return [word for word in (w.strip(",;:.!?'-").lower() for w in sentence.split()) if word]
