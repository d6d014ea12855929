"""Objectives for plain text: a window of tokens becomes an input and a target. Pure numpy; randomness is an argument.

Source: Raffel et al. 2020, sections 3.1.4 and 3.3.4 (span corruption), 3.2.1 (prefix language model), and the authors'
code (t5.data.preprocessors: random_spans_helper, random_spans_noise_mask, random_prefix_noise_mask); Lester et al.
2021, section 3 (prefix language model as adaptation before prompt tuning).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyprompt.errors import ConfigError
from polyprompt.tasks.records import TokenRow

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpanCorruption:
    """Spans of the window are cut out of the input; the target names them in order, each behind its sentinel.

    window: tokens that fill an input of `input_tokens`, sentinels and </s> counted. So every input is exactly that
    long and every target equally long: nothing is padded.
    """

    window: int
    num_noise_tokens: int
    num_spans: int
    sentinel_ids: tuple[int, ...]
    eos_id: int

    @staticmethod
    def fitting(
        input_tokens: int, noise_density: float, mean_span_length: float, sentinel_ids: Sequence[int], eos_id: int
    ) -> "SpanCorruption":
        """Find the longest window whose input has at most `input_tokens`. Raises ConfigError where none has."""
        fits = None
        window = 2
        while True:
            noise = min(max(round(window * noise_density), 1), window - 1)
            # No more spans than there are kept tokens to stand before them.
            spans = min(max(round(noise / mean_span_length), 1), window - noise)
            if window - noise + spans + 1 > input_tokens:
                break
            fits = (window, noise, spans)
            window += 1
        if fits is None or fits[2] > len(sentinel_ids):
            raise ConfigError(
                f"span corruption of inputs of {input_tokens} tokens needs {fits[2] if fits else 1} sentinels "
                f"(<extra_id_0> …), the tokenizer has {len(sentinel_ids)}. Lower input_tokens or noise_density, raise "
                "mean_span_length, or set objective=prefix_lm, which needs none"
            )
        return SpanCorruption(*fits, tuple(sentinel_ids[: fits[2]]), eos_id)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest input and the longest target, in tokens."""
        return self.window - self.num_noise_tokens + self.num_spans + 1, self.num_noise_tokens + self.num_spans + 1

    def sizes(self, rng: np.random.Generator) -> tuple[int, int]:
        """Return the lengths of the input and the target that `row` makes with an equal generator."""
        return self.longest

    def row(self, tokens: Tokens, rng: np.random.Generator) -> TokenRow:
        """Corrupt `window` tokens."""
        noise = _partition(self.num_noise_tokens, self.num_spans, rng)
        kept = _partition(self.window - self.num_noise_tokens, self.num_spans, rng)
        input_ids: list[int] = []
        target_ids: list[int] = []
        start = 0
        for sentinel, num_kept, num_noise in zip(self.sentinel_ids, kept.tolist(), noise.tolist(), strict=True):
            middle, end = start + num_kept, start + num_kept + num_noise
            input_ids += [*tokens[start:middle].tolist(), sentinel]
            target_ids += [sentinel, *tokens[middle:end].tolist()]
            start = end
        return TokenRow([*input_ids, self.eos_id], [*target_ids, self.eos_id])


@dataclass(frozen=True)
class PrefixLM:
    """The input is the first part of the window, the target the rest; the cut is uniform."""

    window: int
    eos_id: int

    @property
    def longest(self) -> tuple[int, int]:
        """The longest input and the longest target, in tokens."""
        return self.window, self.window

    def sizes(self, rng: np.random.Generator) -> tuple[int, int]:
        """Return the lengths of the input and the target that `row` makes with an equal generator."""
        cut = self._cut(rng)
        return cut + 1, self.window - cut + 1

    def row(self, tokens: Tokens, rng: np.random.Generator) -> TokenRow:
        """Cut `window` tokens in two."""
        cut = self._cut(rng)
        return TokenRow([*tokens[:cut].tolist(), self.eos_id], [*tokens[cut:].tolist(), self.eos_id])

    def _cut(self, rng: np.random.Generator) -> int:
        return int(rng.integers(1, self.window))


Objective = SpanCorruption | PrefixLM


def _partition(total: int, parts: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Cut `total` into `parts` positive lengths, every way equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
