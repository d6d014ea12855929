"""Objectives for plain text: nothing is lost, nothing is padded, and the noise is T5's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprompt.denoising import PrefixLM, SpanCorruption, _partition
from polyprompt.errors import ConfigError

EOS = 1
SENTINELS = tuple(range(1000, 900, -1))  # <extra_id_0> has the highest id


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spans(input_tokens: int = 64, density: float = 0.15, mean: float = 3.0) -> SpanCorruption:
    return SpanCorruption.fitting(input_tokens, density, mean, SENTINELS, EOS)


def restored(input_ids: list[int], target_ids: list[int]) -> list[int]:
    """Put the target's spans back where their sentinels stand."""
    filled: dict[int, list[int]] = {}
    for token in target_ids[:-1]:
        if token in SENTINELS:
            sentinel = token
            filled[sentinel] = []
        else:
            filled[sentinel].append(token)
    return [piece for token in input_ids[:-1] for piece in filled.get(token, [token])]


@given(
    input_tokens=st.integers(8, 200),
    density=st.floats(0.05, 0.5),
    mean=st.floats(2, 8),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_corrupted_row_holds_the_whole_window(input_tokens: int, density: float, mean: float, seed: int) -> None:
    objective = spans(input_tokens, density, mean)
    tokens = np.arange(100, 100 + objective.window) % 800
    row = objective.row(tokens, rng(seed))
    assert restored(row.input_ids, row.target_ids) == tokens.tolist()
    assert (len(row.input_ids), len(row.target_ids)) == objective.longest == objective.sizes(rng(seed))
    assert row.input_ids[-1] == row.target_ids[-1] == EOS
    assert [t for t in row.input_ids if t in SENTINELS] == list(SENTINELS[: objective.num_spans])
    # A span ends the window, as in T5: the target needs no closing sentinel.
    assert row.input_ids[-2] == SENTINELS[objective.num_spans - 1]


@given(input_tokens=st.integers(8, 600))
def test_an_input_is_as_long_as_it_may_be(input_tokens: int) -> None:
    objective = spans(input_tokens)
    assert objective.longest[0] in (input_tokens, input_tokens - 1)  # a window more would add a sentinel too


def test_the_lengths_are_those_of_t5() -> None:
    """t5.data.preprocessors.random_spans_helper(512, 0.15, 3.0): 568 tokens make inputs of 512 and targets of 114."""
    objective = spans(512)
    assert (objective.window, *objective.longest) == (568, 512, 114)


def test_the_noise_is_spread_evenly() -> None:
    objective = spans(64)
    tokens = np.arange(objective.window)
    cut_out = np.zeros(objective.window)
    for seed in range(4000):
        row = objective.row(tokens, rng(seed))
        cut_out[[t for t in row.target_ids[:-1] if t not in SENTINELS and t < objective.window]] += 1
    share = cut_out / 4000
    assert share.mean() == pytest.approx(objective.num_noise_tokens / objective.window)
    inner = share[8:-12]  # the first token is never cut out, the last always
    assert inner.min() > 0.08
    assert inner.max() < 0.25


def test_every_way_to_cut_is_equally_likely() -> None:
    random = rng()
    seen = [tuple(_partition(5, 3, random).tolist()) for _ in range(6000)]
    ways = {way: seen.count(way) / 6000 for way in set(seen)}
    assert len(ways) == 6  # choose 2 of 4 places
    assert all(share == pytest.approx(1 / 6, abs=0.03) for share in ways.values())


@given(window=st.integers(2, 300), seed=st.integers(0, 2**63 - 1))
def test_a_prefix_and_its_continuation_are_the_window(window: int, seed: int) -> None:
    objective = PrefixLM(window, EOS)
    tokens = np.arange(100, 100 + window)
    row = objective.row(tokens, rng(seed))
    assert [*row.input_ids[:-1], *row.target_ids[:-1]] == tokens.tolist()
    assert (len(row.input_ids), len(row.target_ids)) == objective.sizes(rng(seed))
    assert 1 < len(row.input_ids) <= objective.longest[0]
    assert 1 < len(row.target_ids) <= objective.longest[1]


def test_the_cut_is_uniform() -> None:
    objective = PrefixLM(11, EOS)
    cuts = [objective.sizes(rng(seed))[0] - 1 for seed in range(5000)]
    assert all(cuts.count(cut) / 5000 == pytest.approx(0.1, abs=0.02) for cut in range(1, 11))


def test_too_few_sentinels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inputs of 512 tokens needs 28 sentinels .* has 20.*prefix_lm"):
        SpanCorruption.fitting(512, 0.15, 3.0, SENTINELS[:20], EOS)
    with pytest.raises(ConfigError, match="prefix_lm"):
        SpanCorruption.fitting(64, 0.15, 3.0, (), EOS)
