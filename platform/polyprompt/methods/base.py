"""The seam between what a prompt is (methods/) and how it is glued onto a backbone (backbone.py).

Letters: B rows of a batch, T input tokens, P prompt tokens, H hidden size, L layers, N heads, D head size, K tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from polyprompt.method_configs import ParameterGroup


@dataclass(frozen=True)
class StackDims:
    """One stack of self-attention layers. N * D need not equal the hidden size (T5-3B, T5-11B).

    num_heads: of keys and values; with grouped-query attention the queries have more.
    """

    num_layers: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class Dims:
    """What a method needs to know of a backbone. `encoder` is None for a decoder-only model."""

    hidden: int
    encoder: StackDims | None
    decoder: StackDims
    num_tasks: int


@dataclass(frozen=True)
class KeyValues:
    """Extra keys and values for every self-attention layer of one stack, row by row.

    mask_BP: which of them are real, where rows have different numbers of them (None: all).
    """

    keys_LBNPD: Tensor
    values_LBNPD: Tensor
    mask_BP: Tensor | None = None


@dataclass(frozen=True)
class Prompts:
    """What a method hands the backbone for one batch.

    inputs_BPH: prepended to the input embeddings. mask_BP: which of them are real, where rows have prompts of
    different length (None: all). embeddings_BTH: what the input embeddings become (None: they stay).
    encoder, decoder: prepended to the keys and values of self-attention.
    aux: statistics by name, detached, [B, routed prompts] each, rows adding up to 1. "router/probability": the router's
    softmax without noise; "router/share": what each prompt is of the row's prompt without noise, as in prediction;
    "router/load": the same as used here, noise and all.
    penalty_B: a further loss of each row; its mean over the rows of the global batch is added to the objective.
    """

    inputs_BPH: Tensor | None = None
    mask_BP: Tensor | None = None
    encoder: KeyValues | None = None
    decoder: KeyValues | None = None
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    penalty_B: Tensor | None = None
    embeddings_BTH: Tensor | None = None


class Method(nn.Module, ABC):
    """A way to condition one model on many tasks. Holds the method's own parameters and nothing of the backbone."""

    #: Do the task ids change the prompts?
    task_aware: bool
    #: Prompts of a router whose statistics are in Prompts.aux; 0 for none.
    num_routes: int = 0
    #: Prompt tokens prepended to the input embeddings at most; counts against the model's length limit.
    input_length: int = 0
    #: Multiply-adds that the method spends on each row, beside a router's; what the task alone decides costs none.
    row_multiply_adds: int = 0

    @abstractmethod
    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        """Return the prompts for a batch.

        x_BTH: input embeddings (before dropout). mask_BT: 1 for real tokens. task_B: task ids (int64).
        A row's prompts depend on that row alone, never on its batch-mates or on padding.
        """

    @abstractmethod
    def group_of(self, parameter: str) -> ParameterGroup:
        """Return the optimizer group of one of the method's own parameters, by its name."""

    def prompt_lengths(self) -> dict[str, int]:
        """Return config key → prompt tokens, for each kind of prompt of the method."""
        return {"method.length": self.input_length} if self.input_length else {}

    def input_prompts(self) -> Tensor | None:
        """Return the trained prompts [prompts, P, H] before the input that may start from given vectors, if any."""
        return None

    def initialise(self, embedding_VH: Tensor) -> None:
        """Set parameters that start from the backbone's vocabulary. Called once, before training.

        embedding_VH: embeddings of the V ordinary pieces (no special tokens), in the order of their ids.
        """
