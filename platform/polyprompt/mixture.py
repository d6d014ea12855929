"""Which (task, example) is in the global batch of step s: a pure function of (seed, s).

No state and no knowledge of workers: any number of workers, and any restart, see the same sequence. Position p of the
endless stream is found in constant time:

- the stream is cut into blocks of 1024 positions; each block holds a fixed number of positions for each task (the
  rates, rounded by largest remainder, at least one) in an order shuffled by (seed, block);
- the k-th draw of task i is entry k mod n_i of a permutation of its n_i examples made from (seed, i, k div n_i), so no
  example repeats inside an epoch of its task.

Rates: examples-proportional with cap and temperature as in Raffel et al. 2020, section 3.5.2:
r_i ~ min(n_i, cap)^(1/temperature). Differs: the realised rate of a task is a multiple of 1/1024 and at least that,
where T5 samples independently; so every block holds the exact proportions.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from polyprompt.config import MixtureConfig
from polyprompt.errors import ConfigError

BLOCK = 1024


def random_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on the key alone, the same on every machine and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rates(config: MixtureConfig, sizes: Sequence[int], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the wanted share of each task; they sum to 1, and are 0 where there is nothing to train on.

    sizes: training examples. weights: of the tasks.
    """
    if not any(sizes):
        raise ConfigError("tasks: none of them has a training example; give train files to one at least")
    share = np.where(np.asarray(sizes) > 0, np.asarray(weights, dtype=float), 0.0)
    if config.kind == "proportional":
        share = share * np.minimum(sizes, config.cap or np.inf).astype(float) ** (1.0 / config.temperature)
    return share / share.sum()


class Mixture:
    """The endless training stream over several tasks."""

    def __init__(self, shares: Sequence[float] | npt.NDArray[np.float64], sizes: Sequence[int], seed: int) -> None:
        """shares: wanted share of each task (see `rates`), 0 for a task that is never drawn. sizes: their examples."""
        if len(sizes) > BLOCK:
            raise ConfigError(f"a mixture holds at most {BLOCK} tasks, not {len(sizes)}")
        if any(share > 0 and size < 1 for share, size in zip(shares, sizes, strict=True)):
            raise ConfigError("a mixture needs at least one training example of every task that it draws from")
        self.sizes = list(sizes)
        self.seed = seed
        self.quota = _largest_remainder(np.asarray(shares, dtype=float), BLOCK)
        # Caches, not state: each entry is a pure function of its key. A task has at most two epochs open at once.
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._epoch = lru_cache(maxsize=2 * len(sizes))(self._make_epoch)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (task, example) at a position of the stream."""
        block, offset = divmod(position, BLOCK)
        tasks, ranks = self._block(block)
        task = int(tasks[offset])
        draw = block * int(self.quota[task]) + int(ranks[offset])
        epoch, entry = divmod(draw, self.sizes[task])
        return task, int(self._epoch(task, epoch)[entry])

    def batch(self, step: int, size: int) -> list[tuple[int, int]]:
        """Return the global batch of a step (the first is 1): `size` pairs (task, example)."""
        first = (step - 1) * size
        return [self[position] for position in range(first, first + size)]

    def realised_shares(self) -> list[float]:
        """Return the share of each task that every block holds exactly."""
        return [float(q) / BLOCK for q in self.quota]

    def _make_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        order = self._random("block", block).permutation(np.repeat(np.arange(len(self.sizes)), self.quota))
        ranks = np.empty(BLOCK, dtype=np.int64)
        for task in range(len(self.sizes)):
            where = np.flatnonzero(order == task)
            ranks[where] = np.arange(len(where))
        return order, ranks

    def _make_epoch(self, task: int, epoch: int) -> npt.NDArray[np.int64]:
        return self._random("epoch", task, epoch).permutation(self.sizes[task])

    def _random(self, *key: int | str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=random_seed("mixture", self.seed, *key)))


def _largest_remainder(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Round shares · total to integers that sum to total, none below one but for shares of 0."""
    exact = shares / shares.sum() * total
    counts = np.maximum(np.floor(exact).astype(np.int64), exact > 0)
    while counts.sum() > total:
        counts[np.argmax(counts - exact + (counts > 1) * total)] -= 1
    for task in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[task] += 1
    return counts


def cut(lengths: Sequence[int], num_shards: int) -> list[list[int]]:
    """Cut a batch into shards of near-equal padded size; return each shard's rows (indices into `lengths`).

    Rows are sorted by length and cut where the largest shard, counted as rows × its longest row, is smallest: long rows
    share a small shard, short rows a large one, and little is padded. Depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if not 1 <= num_shards <= len(order):
        raise ConfigError(f"a batch of {len(order)} rows cannot be cut into {num_shards} shards")
    low, high = 1, max(lengths) * len(order)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(order, lengths, middle)) <= num_shards:
            high = middle
        else:
            low = middle + 1
    shards = _fill(order, lengths, low)
    while len(shards) < num_shards:  # fewer were needed: halve those with the most rows
        largest = max(range(len(shards)), key=lambda s: len(shards[s]))
        rows = shards[largest]
        shards[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return shards


def _fill(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Fill shards in order, each up to `limit` padded tokens (a row longer than that gets its own)."""
    shards: list[list[int]] = []
    for row in order:
        # Rows come longest first, so the shard's first row is its width.
        if shards and lengths[shards[-1][0]] * (len(shards[-1]) + 1) <= limit:
            shards[-1].append(row)
        else:
            shards.append([row])
    return shards
