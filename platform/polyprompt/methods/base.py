"""The seam between what a prompt is (methods/) and how it is glued onto a backbone (backbone.py).

Letters: B rows of a batch, T input tokens, P prompt tokens, H hidden size, L layers, N heads, D head size, K tasks,
J places of a layer, G sets of adapters, R bottleneck.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyprompt.method_configs import Activation, ParameterGroup

#: Behind which part of a layer an adapter stands; never behind cross-attention.
Place = Literal["attention", "feed_forward"]

Stack = Literal["encoder", "decoder"]


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

    def of_rows(self, row_C: Tensor) -> "KeyValues":
        """Return those of these rows."""
        mask = None if self.mask_BP is None else self.mask_BP[row_C]
        return KeyValues(self.keys_LBNPD.index_select(1, row_C), self.values_LBNPD.index_select(1, row_C), mask)


@dataclass(frozen=True)
class Adapters:
    """Bottlenecks behind parts of every layer of one stack, in G sets; owner_B is the set of each row.

    A part's output y, before it is added to the residual, becomes y + norm(act(y·down + bias)·up + bias). norm is a
    layer normalisation with these scales and shifts, or nothing where there are none. places: what J stands for.
    """

    places: tuple[Place, ...]
    activation: Activation
    owner_B: Tensor
    down_LJGHR: Tensor
    down_bias_LJGR: Tensor
    up_LJGRH: Tensor
    up_bias_LJGH: Tensor
    scale_LJGH: Tensor | None = None
    shift_LJGH: Tensor | None = None

    def of_rows(self, row_C: Tensor) -> "Adapters":
        """Return those of these rows."""
        return replace(self, owner_B=self.owner_B[row_C])


@dataclass(frozen=True)
class Prompts:
    """What a method hands the backbone for one batch.

    inputs_BPH: prepended to the input embeddings. mask_BP: which of them are real, where rows have prompts of
    different length (None: all). embeddings_BTH: what the input embeddings become (None: they stay).
    encoder, decoder: prepended to the keys and values of self-attention. adapters: of each stack, by its name.
    aux: statistics by name, detached, [B, routed prompts] each, rows adding up to 1. "router/probability": the router's
    softmax without noise; "router/share": what each prompt is of the row's prompt without noise, as in prediction;
    "router/load": the same as used here, noise and all.
    penalty_B: a further loss of each row; its mean over the rows of the global batch is added to the objective.
    teacher: whom the model learns from beside the targets (None: nobody); only ever given in training.
    parts: where rows of several models lie side by side, those of each; all else is empty then. No method gives them.
    """

    inputs_BPH: Tensor | None = None
    mask_BP: Tensor | None = None
    encoder: KeyValues | None = None
    decoder: KeyValues | None = None
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    penalty_B: Tensor | None = None
    teacher: "Teacher | None" = None
    embeddings_BTH: Tensor | None = None
    adapters: Mapping[str, Adapters] = field(default_factory=dict)
    parts: Sequence["Part"] = ()


@dataclass(frozen=True)
class Teacher:
    """Other prompts for the same rows: the model is drawn to what it says under them (distillation.py).

    weight: of that loss, which is added to penalty_B. temperature: that both output distributions are softened by.
    """

    prompts: Prompts
    weight: float
    temperature: float


@dataclass(frozen=True)
class Part:
    """The rows of one of several models in a batch that goes through the backbone they share (pack.py).

    lengths: how wide the part is in each stack; what the batch has beyond it is padding. prompts: its keys and values.
    own_random: entered around whatever draws from torch's global stream for these rows.
    """

    num_rows: int
    lengths: Mapping[Stack, int]
    prompts: Prompts
    own_random: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class MadeOnce:
    """What networks made of tasks, for several passes.

    made: where the networks' backward pass begins. held: what the passes use in its place. It collects their gradients,
    in fp32 whatever the precision.
    """

    made: Sequence[Tensor] = ()
    held: Sequence[Tensor] = ()

    def backward(self) -> None:
        """Run the networks' backward pass, from the gradients that were collected."""
        used = [pair for pair in zip(self.made, self.held, strict=True) if pair[1].grad is not None]
        if used:
            torch.autograd.backward([made for made, _ in used], [held.grad for _, held in used])


class Method(nn.Module, ABC):
    """A way to condition one model on many tasks. Holds the method's own parameters and nothing of the backbone."""

    #: Do the task ids change the prompts?
    task_aware: bool
    #: Prompts of a router whose statistics are in Prompts.aux; 0 for none.
    num_routes: int = 0
    #: Prompt tokens prepended to the input embeddings at most; counts against the model's length limit.
    input_length: int = 0
    #: Prompt tokens of each stack whose self-attention gets keys and values.
    stack_lengths: Mapping[Stack, int] = {}
    #: Parameters, by name, that weight decay spares although they have more than one dimension: factors that mean
    #: "leave it as it is" at 1, not at 0.
    undecayed: frozenset[str] = frozenset()
    #: Multiply-adds that the method spends on each row, beside a router's; what the task alone decides costs none.
    row_multiply_adds: int = 0
    #: Multiply-adds that the method spends on each token in each layer.
    layer_multiply_adds: int = 0

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
        stacks = {f"method.{stack}_length": length for stack, length in self.stack_lengths.items()}
        return {"method.length": self.input_length, **stacks} if self.input_length else stacks

    def input_prompts(self) -> Tensor | None:
        """Return the trained prompts [prompts, P, H] before the input that may start from given vectors, if any."""
        return None

    def join(self, model: Any) -> None:
        """Put modules of the method's own into the backbone's model. Called once, before training."""

    def leave(self, model: Any) -> None:
        """Work what `join` put there into the model's own weights, and take it out again."""

    def made_once(self, task_B: Tensor) -> AbstractContextManager[MadeOnce]:
        """Around passes of rows of these tasks: networks that make something of the task alone run now and not within
        (made.py). Their gradients are there when `MadeOnce.backward` has run, behind all passes."""
        return nullcontext(MadeOnce())

    def module_multiply_adds(self) -> Mapping[str, int]:
        """Return the multiply-adds that `join` added to modules of the backbone, by name, for each token they read."""
        return {}

    def initialise(self, embedding_VH: Tensor) -> None:
        """Set parameters that start from the backbone's vocabulary. Called once, before training.

        embedding_VH: embeddings of the V ordinary pieces (no special tokens), in the order of their ids.
        """
