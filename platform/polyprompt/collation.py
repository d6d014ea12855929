"""Rows of token ids as padded tensors.

Letters: B rows of a batch, T input tokens, S target tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyprompt.tasks.records import TokenRow

IGNORED = -100
"""The label of padding: the loss passes over it."""


@dataclass(frozen=True)
class Batch:
    """Padded rows, all int64. mask_BT: 1 for real tokens. labels_BS: IGNORED where padded. task_B: task ids."""

    input_ids_BT: Tensor
    mask_BT: Tensor
    labels_BS: Tensor
    task_B: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(t.to(device) for t in (self.input_ids_BT, self.mask_BT, self.labels_BS, self.task_B)))

    @property
    def num_target_tokens(self) -> int:
        """Target tokens that count in the loss."""
        return int((self.labels_BS != IGNORED).sum())


def collate(rows: Sequence[TokenRow], task_ids: Sequence[int], pad_id: int) -> Batch:
    """Pad rows to the longest input and the longest target among them."""
    if len(rows) != len(task_ids):
        raise ValueError(f"{len(rows)} rows but {len(task_ids)} task ids")
    inputs, targets = [r.input_ids for r in rows], [r.target_ids for r in rows]
    mask_BT = padded([[1] * len(ids) for ids in inputs], 0)
    return Batch(padded(inputs, pad_id), mask_BT, padded(targets, IGNORED), torch.tensor(task_ids, dtype=torch.int64))


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return the rows under each other (int64), filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


def length_batches(lengths: Sequence[int] | npt.NDArray[np.int32], batch_size: int) -> list[list[int]]:
    """Cut the indices into batches of like length, longest first: less padding, and too little memory shows at once."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def frugal_batches(lengths: Sequence[int], batch_size: int, batch_cost: int) -> list[list[int]]:
    """As `length_batches`, but cut further where that saves more padding than another batch costs.

    batch_cost: of a batch whatever its rows, in tokens. The cuts are the best there are (dynamic programming).
    """
    return [cut for batch in length_batches(lengths, batch_size) for cut in _cut(batch, lengths, batch_cost)]


def _cut(batch: Sequence[int], lengths: Sequence[int], batch_cost: int) -> list[list[int]]:
    """batch: indices, the longest first, so that a cut's first row says how long all of it are."""
    # best[i]: the cost of the first i rows, and where the last cut of them starts.
    best, starts = [(0, 0)], []
    for end in range(1, len(batch) + 1):
        if end == 1 or lengths[batch[end - 1]] < lengths[batch[end - 2]]:
            starts.append(end - 1)
        best.append(min((best[i][0] + batch_cost + (end - i) * lengths[batch[i]], i) for i in starts))
    cuts, end = [], len(batch)
    while end:
        start = best[end][1]
        cuts.append(list(batch[start:end]))
        end = start
    return cuts[::-1]
