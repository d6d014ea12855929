"""The global batch of a step, cut into shards with their own random streams.

Who computes a shard changes nothing in it: its rows, its padding and its dropout follow from (seed, step, shard).
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from polyprompt.collation import Batch, collate
from polyprompt.config import RunConfig
from polyprompt.data import AnyData
from polyprompt.mixture import Mixture, cut, random_seed, rates


class Draw(NamedTuple):
    """An example of a task. seed: of the noise that plain text gets, other each time the example is drawn."""

    task: int
    example: int
    seed: int


@dataclass(frozen=True)
class Shard:
    """A fixed part of the global batch. number: among its shards. seed: of its random stream. micro_batches: computed
    one after another. examples: of each of their rows, the number in its task's training split."""

    number: int
    seed: int
    micro_batches: tuple[Batch, ...]
    examples: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GlobalBatch:
    """The shards of this process, and what is true of the whole batch on every process.

    task_rows: task index → rows. num_target_tokens normalises the loss. digest: of the (task, example) pairs.
    """

    step: int
    shards: tuple[Shard, ...]
    task_rows: Mapping[int, int]
    num_rows: int
    num_input_tokens: int
    num_target_tokens: int
    digest: str


def task_weights(config: RunConfig, data: Sequence[AnyData]) -> list[float]:
    """Return each task's weight: `mixture.weights` by name, else the task's own."""
    return [config.mixture.weights.get(task.task.name, task.task.weight) for task in data]


class Batches:
    """Global batches by step: `batches[step]`, the first step is 1. Holds no state."""

    def __init__(self, data: Sequence[AnyData], config: RunConfig, pad_id: int, shards: Sequence[int]) -> None:
        """shards: the numbers of the shards (of train.num_shards) that this process computes."""
        self.data = data
        self.train = config.train
        self.pad_id = pad_id
        self.shards = shards
        sizes = [len(task.train) for task in data]
        shares = rates(config.mixture, sizes, task_weights(config, data))
        self.mixture = Mixture(shares, sizes, config.train.seed)

    def __getitem__(self, step: int) -> GlobalBatch:
        pairs = self.mixture.batch(step, self.train.batch_size)
        draws = [
            Draw(task, example, random_seed("noise", self.train.seed, step, row))
            for row, (task, example) in enumerate(pairs)
        ]
        sizes = [self.data[draw.task].train.size(draw.example, draw.seed) for draw in draws]
        lengths = [num_input + num_target for num_input, num_target in sizes]
        parts = cut(lengths, self.train.num_shards)
        return GlobalBatch(
            step=step,
            shards=tuple(self._shard(step, index, parts[index], draws, lengths) for index in self.shards),
            task_rows=Counter(task for task, _ in pairs),
            num_rows=len(pairs),
            num_input_tokens=sum(num_input for num_input, _ in sizes),
            num_target_tokens=sum(num_target for _, num_target in sizes),
            digest=hashlib.sha256(repr(pairs).encode()).hexdigest(),
        )

    def _shard(
        self, step: int, index: int, rows: Sequence[int], draws: Sequence[Draw], lengths: Sequence[int]
    ) -> Shard:
        # Pieces of equal padded size pad less than pieces of equal rows, and the largest needs less memory.
        pieces = min(self.train.gradient_accumulation_steps, len(rows))
        parts = [[draws[rows[i]] for i in piece] for piece in cut([lengths[row] for row in rows], pieces)]
        return Shard(
            number=index,
            seed=random_seed("shard", self.train.seed, step, index),
            micro_batches=tuple(map(self._collate, parts)),
            examples=tuple(tuple(draw.example for draw in part) for part in parts),
        )

    def _collate(self, draws: Sequence[Draw]) -> Batch:
        rows = [self.data[draw.task].train.row(draw.example, draw.seed) for draw in draws]
        return collate(rows, [draw.task for draw in draws], self.pad_id)
