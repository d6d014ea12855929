"""Prompts that follow from the task alone: made once for all rows of a task, and for all passes of a step."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from polyprompt.methods.base import MadeOnce, Method


class MadeByTask(Method):
    """A method with a network that makes something of each task; U: the tasks of a batch."""

    _held: tuple[Tensor, Mapping[str, Tensor]] | None = None

    @abstractmethod
    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        """Return what the networks make of these tasks, by name."""

    def known(self, task_B: Tensor) -> Tensor:
        """Return the rows' tasks as far as the networks know them: one and the same where all tasks share all."""
        return task_B

    def made(self, task_B: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return what is made of the tasks of a batch, and each row's place among them, row_B."""
        known_B = self.known(task_B)
        if self._held is None:
            task_U, row_B = known_B.unique(return_inverse=True)
            return self.make(task_U), row_B
        task_U, made = self._held
        return made, torch.searchsorted(task_U, known_B)

    @contextmanager
    def made_once(self, task_B: Tensor) -> Iterator[MadeOnce]:
        task_U = self.known(task_B).unique()
        made = self.make(task_U)
        held = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in made.items()}
        self._held = task_U, held
        try:
            yield MadeOnce(tuple(made.values()), tuple(held.values()))
        finally:
            self._held = None
