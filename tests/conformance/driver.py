"""What a library must offer to be checked, and how its answers are compared. Pure torch: it also runs beside another
transformers.

Letters: B rows of a batch, T input tokens, S target tokens, P prompt tokens, N heads, X tokens of a row.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tiny_batch
import torch
from torch import Tensor

#: A choice: target ids, end token included.
Choices = list[list[list[int]]]


class NotApplicable(Exception):
    """The check has no meaning for this subject, or the library offers no such thing. The message says which."""


class Failed(AssertionError):
    """The check's claim does not hold. The message says what was seen."""


class Batch(NamedTuple):
    """Rows. mask_BT: 1 for real tokens, which stand on the left. labels_BS: -100 for no loss.

    lengths_B: how many of its prompt tokens each row has (None: all of them).
    """

    input_ids_BT: Tensor
    mask_BT: Tensor
    labels_BS: Tensor
    task_B: Tensor
    lengths_B: Tensor | None = None

    def rows(self, which: Any) -> "Batch":
        return Batch(*(None if t is None else t[which] for t in self))

    def words(self, row: int) -> Tensor:
        """Return the real input ids of a row."""
        return self.input_ids_BT[row, self.mask_BT[row] == 1]


def batch(num_rows: int = 6) -> Batch:
    return Batch(*tiny_batch.batch(num_rows))


class Model(Protocol):
    """A backbone with one method on it, in eval mode."""

    def nll(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of each row's target [B], in nats."""

    def loss(self, batch: Batch) -> Tensor:
        """Return their sum, with its graph."""

    def scores(self, batch: Batch, choices: Choices) -> list[list[float]]:
        """Return the log-likelihood of every choice of each row."""

    def generate(
        self, batch: Batch, *, num_beams: int = 1, use_cache: bool = True, seeds: list[int] | None = None
    ) -> Tensor:
        """Return up to 5 new tokens of each row, padded with 0. seeds: draw each row from a stream of its own."""

    def attention(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Return by stack the weights [N, X, X] among each row's real tokens in its first self-attention layer."""

    def trained(self) -> dict[str, Tensor]:
        """Return what training changes, by name."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the other parameters."""

    def vectors(self) -> dict[str, Tensor]:
        """Return those trained parameters whose every vector (last dimension) is used by every batch of all tasks."""

    def training(self) -> None:
        """Turn dropout on."""

    def compile(self) -> None:
        """Compile what `nll` and `loss` run."""

    def save(self, folder: Path) -> None:
        """Write what was trained, the library's own way."""


class Subject(Protocol):
    """A method of a library on one kind of backbone."""

    library: str
    method: str
    family: str
    #: Prompt tokens that a row has at most; 0: the method has none.
    length: int
    #: Does the library take a task, or an adapter, for each row?
    by_row: bool

    def build(
        self,
        *,
        empty: bool = False,
        attention: str = "sdpa",
        precision: str = "fp32",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> Model:
        """Return a model with random prompts large enough that a mistake shows; empty: with none at all."""

    def plain(self, attention: str) -> Model:
        """Return transformers' own model of the same weights."""

    def load(self, folder: Path) -> Model:
        """Return a model of what `Model.save` wrote."""


def same(got: Tensor, expected: Tensor, what: str, *, tolerance: float = 0.0) -> None:
    """Raise Failed unless both agree within the tolerance, absolute and relative; 0: bit for bit."""
    if got.shape != expected.shape:
        raise Failed(f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
    exact = torch.equal(got, expected)
    if not exact and (not tolerance or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance)):
        if got.dtype == torch.long:
            rows = [row for row in range(len(got)) if not torch.equal(got[row], expected[row])]
            raise Failed(
                f"{what}: rows {rows} differ, the first is {got[rows[0]].tolist()} not {expected[rows[0]].tolist()}"
            )
        raise Failed(f"{what}: off by up to {(got - expected).abs().max().item():.1e}")


#: The end token of every tiny model.
END = 1


def same_text(got_BS: Tensor, expected_BS: Tensor, what: str) -> None:
    """Raise Failed unless the ids are the same up to the end token; transformers pads with it where the pad id is 0."""
    width = max(got_BS.shape[1], expected_BS.shape[1])
    wide = [torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in (got_BS, expected_BS)]
    ended = [(ids == END).int().cumsum(dim=1) - (ids == END).int() > 0 for ids in wide]
    same(*(ids.masked_fill(behind, 0) for ids, behind in zip(wide, ended, strict=True)), what)
