"""The batches of a case: real rows or made ones, by length or as drawn, a few of them over and over."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from benchmarks.cases import Case
from polyprompt.batches import Batches, GlobalBatch, Shard
from polyprompt.collation import Batch, collate
from polyprompt.config import RunConfig
from polyprompt.data import AnyData, Split
from polyprompt.mixture import random_seed

#: Target tokens, and choices of an example, where the rows are made.
TARGETS, CHOICES = 4, 2


class Numbered(Protocol):
    """Global batches by step; the first step is 1."""

    def __getitem__(self, step: int) -> GlobalBatch: ...


@dataclass(frozen=True)
class AsDrawn:
    """The same global batches, cut into shards in the order of their rows, each padded to its longest."""

    batches: Batches
    config: RunConfig

    def __getitem__(self, step: int) -> GlobalBatch:
        made, train, data = self.batches[step], self.config.train, self.batches.data
        pairs = self.batches.mixture.batch(step, train.batch_size)
        size = -(-len(pairs) // train.num_shards)
        shards = []
        for number, start in enumerate(range(0, len(pairs), size)):
            part = pairs[start : start + size]
            rows = [data[task].train.row(example, 0) for task, example in part]
            batch = collate(rows, [task for task, _ in part], self.batches.pad_id)
            seed = random_seed("shard", train.seed, step, number)
            shards.append(Shard(number, seed, (batch,), (tuple(example for _, example in part),)))
        return replace(made, shards=tuple(shards))


@dataclass(frozen=True)
class Made:
    """Rows of one length; tasks take turns."""

    case: Case
    seed: int
    vocabulary: int

    def __getitem__(self, step: int) -> GlobalBatch:
        random = torch.Generator().manual_seed(random_seed("made", self.seed, step))
        case, length = self.case, int(self.case.lengths)
        # 0 to 2 are special in the tokenizer.
        inputs = torch.randint(3, self.vocabulary, (case.rows, length), generator=random)
        labels = torch.randint(3, self.vocabulary, (case.rows, TARGETS), generator=random)
        inputs[:, -1] = labels[:, -1] = 1
        tasks = torch.arange(case.rows) % case.tasks
        shards = tuple(
            Shard(
                number,
                random_seed("shard", self.seed, step, number),
                (Batch(inputs[rows], torch.ones_like(inputs[rows]), labels[rows], tasks[rows]),),
                (tuple(rows.tolist()),),
            )
            for number, rows in enumerate(torch.arange(case.rows).tensor_split(case.shards))
        )
        return GlobalBatch(
            step=step,
            shards=shards,
            task_rows=Counter(tasks.tolist()),
            num_rows=case.rows,
            num_input_tokens=inputs.numel(),
            num_target_tokens=labels.numel(),
            digest=str(step),
        )


@dataclass(frozen=True)
class Repeated:
    """The first few batches of others, in turn: so that every turn of every case computes the same rows."""

    batches: Numbered
    number: int

    def __getitem__(self, step: int) -> GlobalBatch:
        return replace(self.batches[(step - 1) % self.number + 1], step=step)


@dataclass(frozen=True)
class Own:
    """A worker's shards of others' batches."""

    batches: Numbered
    shards: Sequence[int]

    def __getitem__(self, step: int) -> GlobalBatch:
        whole = self.batches[step]
        return replace(whole, shards=tuple(shard for shard in whole.shards if shard.number in self.shards))


def batches_of(case: Case, config: RunConfig, data: Sequence[AnyData] | None, pad_id: int) -> Repeated:
    """Return a case's batches. data: None where its rows are made."""
    if data is None:
        return Repeated(Made(case, config.train.seed, vocabulary=8192), case.batches)
    drawn = Batches(data, config, pad_id, range(config.train.num_shards))
    return Repeated(AsDrawn(drawn, config) if case.unsorted else drawn, case.batches)


def micro_batches(batch: GlobalBatch) -> list[Batch]:
    """Return what is computed one after another."""
    return [micro for shard in batch.shards for micro in shard.micro_batches]


def num_padded_tokens(batch: GlobalBatch) -> int:
    """Return input and target tokens, those of padding too."""
    return sum(micro.input_ids_BT.numel() + micro.labels_BS.numel() for micro in micro_batches(batch))


def choices_of(batch: GlobalBatch, data: Sequence[AnyData] | None) -> list[list[list[list[int]]]]:
    """Return the choices of every row of every micro-batch; the target alone for free text."""
    found = []
    for shard in batch.shards:
        for micro, examples in zip(shard.micro_batches, shard.examples, strict=True):
            own = []
            for row, (task, example) in enumerate(zip(micro.task_B.tolist(), examples, strict=True)):
                target = [token for token in micro.labels_BS[row].tolist() if token >= 0]
                split = None if data is None else data[task].train
                known = split.choice_ids(example) if isinstance(split, Split) else [target] * CHOICES
                own.append(known or [target])
            found.append(own)
    return found
