"""Make the embedded backbone's tokenizer from plain text and from the embedded suite.

    python jobs/train_tokenizer.py --corpus BOOKS.txt.gz NOVELS.txt.gz [--out DIR] [--vocab-size 8192]

A Unigram tokenizer laid out as T5's: <pad>=0, </s>=1, <unk>=2, byte pieces (no text is lost), pieces, and 100
sentinels at the end, <extra_id_0> last. Every word of the suite is made one piece. Writes tokenizer.json and
tokenizer_config.json. The shipped one was made from public-domain English novels, 19 MB of gzipped text.
"""

import argparse
import gzip
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PLATFORM = Path(__file__).resolve().parents[1] / "platform"
sys.path.insert(0, str(PLATFORM))

from polyprompt.tasks.embedded import tasks  # noqa: E402

SPECIAL = ["<pad>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]
SPACE = "▁"
#: Score of a piece that the model does not have.
UNKNOWN = -20.0
Vocabulary = list[tuple[str, float]]


def suite_words() -> Counter[str]:
    """Count the words of the suite's texts and targets, train and validation."""
    words: Counter[str] = Counter()
    for task in tasks().values():
        for split in (task.train_split, task.validation_split):
            for row in task.source.rows(split):  # type: ignore[union-attr]
                for example in task.examples(row, split):
                    words.update(f"{example.input} {example.target}".split())
    words.update(word for task in tasks().values() for word in task.choices)
    words.update(f"{tenths / 10:.1f}" for tenths in range(0, 51, 2))
    return words


def corpus_lines(files: list[Path], fraction: float, seed: int) -> Iterator[str]:
    """Yield a random share of the lines of gzipped or plain text files."""
    rng = random.Random(seed)
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from (line.strip() for line in lines if rng.random() < fraction)


def train_pieces(lines: Iterator[str], size: int) -> Vocabulary:
    """Return (piece, log-probability) of a Unigram model, most likely first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(SPACE), pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(True)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", max_piece_length=16, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return sorted(((p, s) for p, s in vocabulary if p != "<unk>"), key=lambda item: -item[1])


def with_words(pieces: Vocabulary, words: Counter[str], size: int) -> Vocabulary:
    """Return `size` pieces that hold every word whole; the least likely pieces make room.

    A word that the model would cut gets a score just above that of its best cut, so that other text keeps its cuts.
    """
    scores = dict(pieces)
    wanted = {SPACE + word for word in words}
    for word in sorted(wanted, key=lambda w: (len(w), w)):
        scores[word] = max(scores.get(word, -math.inf), best_cut(word, scores) + 1e-3)
    kept = {p for p in scores if p in wanted or len(p) == 1}
    rest = sorted((p for p in scores if p not in kept), key=lambda p: -scores[p])
    return sorted(((p, scores[p]) for p in [*kept, *rest[: size - len(kept)]]), key=lambda item: (-item[1], item[0]))


def best_cut(word: str, scores: Mapping[str, float]) -> float:
    """Return the score of the likeliest way to cut the word into two pieces or more."""
    best = [0.0]
    for end in range(1, len(word) + 1):
        starts = range(1 if end == len(word) else 0, end)
        cuts = (best[start] + scores.get(word[start:end], UNKNOWN) for start in starts)
        best.append(max(cuts, default=UNKNOWN))
    return best[-1]


def assemble(pieces: Vocabulary) -> Tokenizer:
    """Return the tokenizer that cuts at spaces only, falls back to bytes, and ends every text with </s>."""
    worst = min(s for _, s in pieces) - 10.0
    vocabulary = [(s, 0.0) for s in SPECIAL] + [(b, worst) for b in BYTES] + pieces + [(s, 0.0) for s in SENTINELS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL + SENTINELS])
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="plain text, .txt or .txt.gz")
    parser.add_argument("--out", type=Path, default=PLATFORM / "polyprompt" / "embedded", help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=8192, help="all pieces, special ones and sentinels included")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the corpus lines to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    size = args.vocab_size - len(SPECIAL) - len(BYTES) - len(SENTINELS)
    pieces = train_pieces(corpus_lines(args.corpus, args.fraction, args.seed), size)
    tokenizer = assemble(with_words(pieces, suite_words(), size))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": SENTINELS[::-1],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    main()
