"""Plain text as tokens on disk: read as a stream, tokenised once, memory-mapped, and cut into full inputs.

The text of a split is one long row of tokens, documents joined end to end without a mark, as T5 packs them (Raffel et
al. 2020, section 2.3; t5.data.preprocessors.reduce_concat_tokens).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyprompt import sources, token_store
from polyprompt.denoising import Objective, PrefixLM, SpanCorruption
from polyprompt.errors import ConfigError, DataError
from polyprompt.tasks.records import TextSource, TextTask, TokenRow
from polyprompt.token_store import Tokenizer

#: Sentinels of T5's tokenizers.
MAX_SENTINELS = 100


def lines(source: TextSource, field: str) -> dict[str, Iterator[str]]:
    """Return the lines of each split, "" behind each document.

    Without validation files each training file keeps its last documents back: the share `held_out`, at least one.
    """
    train = source.files.get("train", ())
    if "validation" in source.files:
        given = source.files["validation"]
        return {"train": _all_lines(train, field), "validation": _all_lines(given, field)}
    return {
        "train": (line for path in train for line in _part(path, field, source.held_out, kept_back=False)),
        "validation": (line for path in train for line in _part(path, field, source.held_out, kept_back=True)),
    }


def _all_lines(paths: Iterable[Path], field: str) -> Iterator[str]:
    return (line for path in paths for line in sources.text_lines(path, field))


def _part(path: Path, field: str, held_out: float, *, kept_back: bool) -> Iterator[str]:
    num_documents = sum(line == "" for line in sources.text_lines(path, field))
    if num_documents < 2:
        raise DataError(
            f"{path}: {num_documents} document, so none can be kept for validation; set an empty line between "
            "documents, or give validation files"
        )
    first_kept_back = min(int((1 - held_out) * num_documents), num_documents - 1)
    document = 0
    for line in sources.text_lines(path, field):
        if (document >= first_kept_back) == kept_back:
            yield line
        document += line == ""


def write(folder: Path, name: str, splits: Mapping[str, Iterable[str]], tokenizer: Tokenizer) -> None:
    """Tokenise the lines of each split into `folder`, written whole or not at all. name: shown while it lasts."""
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    with token_store.writing(folder) as aside:
        counts = {}
        for split, text in splits.items():
            file = aside / f"{split}.tokens"
            num_tokens = 0
            with file.open("wb") as stream:
                for chunk in token_store.chunks((line for line in text if line), f"{name} {split}"):
                    ids = np.fromiter((i for row in token_store.tokens(tokenizer, chunk) for i in row), dtype=dtype)
                    stream.write(ids.tobytes())
                    num_tokens += len(ids)
            counts[split] = {"file": file.name, "num_bytes": file.stat().st_size, "num_tokens": num_tokens}
        (aside / "meta.json").write_text(json.dumps({"dtype": dtype, "splits": counts}))


def objective(task: TextTask, tokenizer: Tokenizer, input_tokens: int) -> Objective:
    """Return what makes rows of the task's text. Raises ConfigError where the tokenizer has too few sentinels."""
    if task.objective == "prefix_lm":
        # Input and target share the window, and each ends in </s>.
        return PrefixLM(input_tokens - 1, tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    sentinels = [vocabulary[s] for i in range(MAX_SENTINELS) if (s := f"<extra_id_{i}>") in vocabulary]
    try:
        return SpanCorruption.fitting(
            input_tokens, task.noise_density, task.mean_span_length, sentinels, tokenizer.eos_token_id
        )
    except ConfigError as error:
        raise ConfigError(f"tasks: {task.name}: {error}") from None


class TextSplit:
    """The windows of one split, made into rows by an objective. Pickles as its address, so it opens in any process."""

    num_cut_inputs = 0

    def __init__(self, folder: Path, name: str, objective: Objective, limit: int | None) -> None:
        """limit: use only the first windows (None: all)."""
        self.folder, self.name, self.objective, self.limit = folder, name, objective, limit

    def __reduce__(self) -> tuple[type["TextSplit"], tuple[Any, ...]]:
        return TextSplit, (self.folder, self.name, self.objective, self.limit)

    def __len__(self) -> int:
        # The last window is not counted: a window that is shifted ends in the next one.
        whole = max(0, len(self.tokens) // self.objective.window - 1)
        return whole if self.limit is None else min(whole, self.limit)

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The whole text of the split, whatever the limit."""
        meta = token_store.read_meta(self.folder)
        if not meta["splits"][self.name]["num_tokens"]:
            return np.empty(0, dtype=meta["dtype"])
        return np.memmap(self.folder / meta["splits"][self.name]["file"], dtype=meta["dtype"], mode="r")

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.tokens)

    @cached_property
    def input_lengths(self) -> npt.NDArray[np.int32]:
        """Input tokens of every held-out row (see `rows`)."""
        return np.array([self.objective.sizes(self._rng(i))[0] for i in range(len(self))], dtype=np.int32)

    @cached_property
    def target_lengths(self) -> npt.NDArray[np.int32]:
        """Target tokens of every held-out row (see `rows`)."""
        return np.array([self.objective.sizes(self._rng(i))[1] for i in range(len(self))], dtype=np.int32)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest input and the longest target, in tokens."""
        return self.objective.longest

    def size(self, index: int, seed: int) -> tuple[int, int]:
        """Return the input and target tokens of `row(index, seed)`."""
        rng = self._rng(seed)
        self._shift(rng)
        return self.objective.sizes(rng)

    def row(self, index: int, seed: int) -> TokenRow:
        """Return a window, shifted and corrupted as the seed says: other noise each time it is drawn."""
        rng = self._rng(seed)
        start = index * self.objective.window + self._shift(rng)
        return self._made(start, rng)

    def rows(self, indices: Iterable[int]) -> list[TokenRow]:
        """Return windows for evaluation: unshifted, each with the same noise every time."""
        return [self._made(int(i) * self.objective.window, self._rng(int(i))) for i in indices]

    @cached_property
    def target_counts(self) -> Counter[int]:
        """How often each token is a target of `rows`."""
        return Counter(token for row in self.rows(range(len(self))) for token in row.target_ids)

    def unigram_loss(self, fitted: Counter[int] | None = None, vocab_size: int = 0) -> float:
        """Return a unigram model's loss on the targets, in nats a token.

        fitted: what the model has counted; each count is raised by one, over the whole vocabulary. None: the targets
        themselves, so the loss is their entropy, and no unigram model comes below it.
        """
        counts = self.target_counts
        known = counts if fitted is None else {token: fitted[token] + 1 for token in counts}
        total = counts.total() if fitted is None else fitted.total() + vocab_size
        return sum(n * math.log(total / known[token]) for token, n in counts.items()) / counts.total()

    def _made(self, start: int, rng: np.random.Generator) -> TokenRow:
        return self.objective.row(self.tokens[start : start + self.objective.window].astype(np.int64), rng)

    def _shift(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.objective.window))

    @staticmethod
    def _rng(seed: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=seed))
