"""Batches for the tiny random backbones. Pure torch: they also serve where polyprompt is not installed."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64
NUM_TASKS = 3


def batch(num_rows: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input_ids_BT, mask_BT, labels_BS, task_B: rows of different length, every task in turn."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 60, (num_rows, 9), generator=generator)
    labels = torch.randint(3, 60, (num_rows, 4), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(num_rows):
        mask[row, 9 - row % 5 :] = 0
        end = 3 - row % 3
        labels[row, end] = 1
        labels[row, end + 1 :] = -100
    input_ids[mask == 0] = 0
    return input_ids, mask, labels, torch.arange(num_rows) % NUM_TASKS


def rows(tensors: tuple[Tensor, ...], which: Any) -> tuple[Tensor, ...]:
    return tuple(t[which] for t in tensors)
