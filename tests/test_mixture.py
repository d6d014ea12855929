"""The mixture: a pure function of (seed, step), exact in its proportions, without repetition inside an epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprompt.config import MixtureConfig
from polyprompt.errors import ConfigError
from polyprompt.mixture import BLOCK, Mixture, cut, random_seed, rates

SIZES = [100, 1000, 70_000]


def mixture(seed: int = 3) -> Mixture:
    return Mixture(rates(MixtureConfig(temperature=2.0, cap=50_000), SIZES, [1] * 3), SIZES, seed)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    ahead = mixture()
    ahead.batch(5000, 32)  # what ran before must not matter
    assert ahead.batch(7, 32) == mixture().batch(7, 32)
    assert mixture(3).batch(7, 32) != mixture(4).batch(7, 32)


def test_batches_are_consecutive_pieces_of_one_stream() -> None:
    stream = mixture()
    assert [pair for step in (1, 2, 3) for pair in stream.batch(step, 8)] == [stream[p] for p in range(24)]


def test_the_stream_is_the_same_on_every_machine() -> None:
    assert random_seed("a", 1) == 5566339428396816726
    assert mixture().batch(1, 6) == [(2, 57397), (2, 56761), (2, 8925), (2, 24272), (2, 37896), (2, 6970)]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_no_example_repeats_inside_its_epoch(sizes: list[int], seed: int) -> None:
    stream = Mixture([1.0] * len(sizes), sizes, seed)
    drawn: dict[int, list[int]] = {}
    for position in range(2 * BLOCK):
        task, example = stream[position]
        drawn.setdefault(task, []).append(example)
    for task, examples in drawn.items():
        size = sizes[task]
        for start in range(0, len(examples) - size + 1, size):
            assert sorted(examples[start : start + size]) == list(range(size))


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    temperature=st.floats(1, 10),
    cap=st.none() | st.integers(1, 10**6),
)
def test_every_block_holds_the_exact_quota(sizes: list[int], temperature: float, cap: int | None) -> None:
    shares = rates(MixtureConfig(temperature=temperature, cap=cap), sizes, [1] * len(sizes))
    assert shares.sum() == pytest.approx(1)
    stream = Mixture(shares, [min(n, 50) for n in sizes], 0)
    assert stream.quota.sum() == BLOCK
    assert stream.quota.min() >= 1
    assert np.abs(stream.quota - shares * BLOCK)[shares * BLOCK >= 1].max(initial=0) <= len(sizes)
    assert Counter(stream[p][0] for p in range(BLOCK, 2 * BLOCK)) == dict(enumerate(stream.quota.tolist()))


def test_rates_follow_their_definitions() -> None:
    assert rates(MixtureConfig(), [100, 300], [1, 1]) == pytest.approx([0.25, 0.75])
    assert rates(MixtureConfig(cap=100), [100, 300], [1, 1]) == pytest.approx([0.5, 0.5])
    assert rates(MixtureConfig(temperature=2), [100, 400], [1, 1]) == pytest.approx([1 / 3, 2 / 3])
    assert rates(MixtureConfig(kind="uniform"), [100, 300], [1, 1]) == pytest.approx([0.5, 0.5])
    assert rates(MixtureConfig(kind="weights"), [100, 300], [3, 1]) == pytest.approx([0.75, 0.25])
    assert rates(MixtureConfig(), [100, 300], [3, 1]) == pytest.approx([0.5, 0.5])  # weights multiply


@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=64), data=st.data())
def test_shards_hold_every_row_once_and_depend_on_lengths_alone(lengths: list[int], data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, len(lengths)))
    shards = cut(lengths, num_shards)
    assert len(shards) == num_shards
    assert all(shards)
    assert sorted(row for shard in shards for row in shard) == list(range(len(lengths)))
    assert shards == cut(lengths, num_shards)


@given(lengths=st.lists(st.integers(1, 512), min_size=8, max_size=64))
def test_shards_are_balanced_no_worse_than_equal_counts(lengths: list[int]) -> None:
    def worst(shards: list[list[int]]) -> int:
        return max(len(shard) * max(lengths[row] for row in shard) for shard in shards)

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    equal = [list(piece) for piece in np.array_split(order, 4)]
    assert worst(cut(lengths, 4)) <= worst(equal)


def test_more_shards_than_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut into 3 shards"):
        cut([4, 4], 3)


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one training example"):
        Mixture([0.5, 0.5], [3, 0], 0)
    with pytest.raises(ConfigError, match="none of them has a training example"):
        rates(MixtureConfig(), [0, 0], [1, 1])


@pytest.mark.parametrize("kind", ["proportional", "uniform", "weights"])
def test_a_task_that_is_only_evaluated_on_is_never_drawn(kind: str) -> None:
    shares = rates(MixtureConfig(kind=kind), [100, 0, 300], [1, 5, 1])
    stream = Mixture(shares, [100, 0, 300], 0)
    assert shares[1] == stream.quota[1] == 0
    assert {stream[p][0] for p in range(2 * BLOCK)} == {0, 2}
