"""Write the skill tasks that the embedded backbone's second stage trains on, and plain text of the embedded grammar.

    python jobs/make_skills.py --corpus NOVELS.txt.gz BOOKS.txt.gz --out DIR [--rows 20000] [--seed 0] [--tasks NAME]

Writes DIR/<task>/{train,validation}.jsonl with rows {"input", "target", "choices" where the answer is one of a few},
DIR/<task>/{own,signs}.jsonl with those training rows that ask in the task's usual way, naming its own label words or
others (skills/frames.py), and DIR/grammar.txt.gz. The same arguments give the same bytes. jobs/skills/__init__.py says
what is kept out.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

PLATFORM = Path(__file__).resolve().parents[1] / "platform"
TOKENIZER = str(PLATFORM / "polyprompt" / "embedded" / "tokenizer.json")
sys.path[:0] = [str(PLATFORM), str(Path(__file__).resolve().parent)]

from rich.progress import track  # noqa: E402
from skills.book_text import Books, read_books  # noqa: E402
from skills.catalog import MAKERS, Make  # noqa: E402
from skills.frames import Draft  # noqa: E402
from skills.grammar import lines  # noqa: E402
from skills.leaks import leaks  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from polyprompt.errors import ConfigError, DataError, PolypromptError, hint  # noqa: E402

#: Of the embedded tokenizer, with </s>.
MAX_INPUT_TOKENS, MAX_TARGET_TOKENS = 160, 32
GRAMMAR_DOCUMENT = 50  # lines
#: Drafts for each row before a task is told to have too few different ones.
PATIENCE = 50


def fits(text: str, max_tokens: int, tokenizer: Tokenizer) -> bool:
    """Is the text short enough? One of fewer bytes than tokens needs no counting."""
    return len(text.encode()) < max_tokens or len(tokenizer.encode(text)) <= max_tokens


def drafts(name: str, make: Make, books: Books, count: int, seed: int) -> list[Draft]:
    """Return different rows of the task. Raises DataError where the task has too few."""
    rng, found, tokenizer = Random(f"{seed}/{name}"), dict[str, Draft](), Tokenizer.from_file(TOKENIZER)
    for _ in range(PATIENCE * count):
        draft = make(rng, books)
        if draft.input in found or leaks(f"{draft.input} {draft.target}"):
            continue
        if not fits(draft.input, MAX_INPUT_TOKENS, tokenizer) or not fits(draft.target, MAX_TARGET_TOKENS, tokenizer):
            continue
        found[draft.input] = draft
        if len(found) == count:
            return list(found.values())
    raise DataError(f"{name}: {len(found)} different rows; {count} are wanted. Lower --rows or add text")


def write_rows(path: Path, rows: Sequence[Draft]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = {"input": row.input, "target": row.target}
            file.write(json.dumps(fields | ({"choices": row.choices} if row.choices else {})) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="plain text, .txt or .txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rows", type=int, default=20000, help="training rows of each task")
    parser.add_argument("--validation-rows", type=int, default=200, help="validation rows of each task")
    parser.add_argument("--grammar-lines", type=int, default=16000, help="lines of grammar.txt.gz")
    parser.add_argument("--tasks", nargs="+", default=sorted(MAKERS), help="only these tasks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        for number in (args.rows, args.validation_rows):
            if number < 1:
                raise ConfigError(f"rows: {number} is out of range; expected at least 1")
        for name in args.tasks:
            if name not in MAKERS:
                raise ConfigError(f"--tasks: no task {name!r}; there are {', '.join(MAKERS)}.{hint(name, MAKERS)}")
        books = read_books(args.corpus)
        for name in track(args.tasks, description="tasks"):
            rows = drafts(name, MAKERS[name], books, args.rows + args.validation_rows, args.seed)
            training = rows[args.validation_rows :]
            write_rows(args.out / name / "train.jsonl", training)
            write_rows(args.out / name / "validation.jsonl", rows[: args.validation_rows])
            for wording in ("own", "signs"):
                if alike := [row for row in training if row.wording == wording]:
                    write_rows(args.out / name / f"{wording}.jsonl", alike)
        # No time in the header, so that the same text gives the same bytes.
        with (args.out / "grammar.txt.gz").open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as out:
            for number, line in enumerate(lines(args.seed, args.grammar_lines)):
                # An empty line ends a document, of which some are held out.
                out.write(f"{line}\n".encode() + b"\n" * (number % GRAMMAR_DOCUMENT == GRAMMAR_DOCUMENT - 1))
    except PolypromptError as error:
        sys.exit(f"{error}")
    print(f"{args.out}: {len(args.tasks)} tasks of {args.rows} rows")


if __name__ == "__main__":
    main()
