"""What every backbone offers, whatever its kind, and how it is identified.

Letters: B rows of a batch, T input tokens, S target tokens, P prompt tokens, H hidden size, V vocabulary.
"""

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from polyprompt.methods.base import Dims, Prompts
from polyprompt.sampling import LogitsProcessor

INPUT = -1
"""The owner of what belongs to all targets that stand side by side."""


class Encoded(NamedTuple):
    """The input, made ready once for all its targets; input prompts included. T counts them too.

    hidden_BTH: of an encoder-decoder model the encoder's output, of a decoder-only model its input embeddings.
    """

    hidden_BTH: Tensor
    mask_BT: Tensor


class Backbone(nn.Module, ABC):
    """A loaded model and its tokenizer. Make one with `backbone.load`."""

    #: The entries of a model's config that shape what it computes; the rest is bookkeeping and changes with versions.
    ARCHITECTURE_KEYS: ClassVar[tuple[str, ...]]
    #: The entries of a model's config that hold a dropout rate.
    DROPOUT_KEYS: ClassVar[tuple[str, ...]]

    model: Any
    tokenizer: Any

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        sha256 = _content_hash(self.ARCHITECTURE_KEYS, model, tokenizer)
        self._identity = {"name": name, "revision": revision, "sha256": sha256}

    @property
    @abstractmethod
    def max_input_tokens(self) -> int | None:
        """The length limit that the model states, or None."""

    @property
    def num_query_heads(self) -> int:
        """Heads of a self-attention layer; `dims` states those of keys and values, which may be fewer."""
        return self.model.config.num_attention_heads

    @abstractmethod
    def blocks(self) -> list[Any]:
        """Return the layers, of all stacks in the order in which they run."""

    def compile_blocks(self) -> None:
        """Let torch.compile translate each layer when it first runs, for blocks of any size.

        Each has code of its own: it knows its number, which its prompts are found by.
        """
        for block in self.blocks():
            block.compile(dynamic=True, isolate_recompiles=True)

    @abstractmethod
    def reserved_tokens(self, max_target_tokens: int) -> int:
        """Return how much of `max_input_tokens` neither prompt nor input can have."""

    @abstractmethod
    def dims(self, num_tasks: int) -> Dims:
        """Return what a method needs to know."""

    @abstractmethod
    def encode(self, x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> Encoded:
        """Make [input prompts ; x] ready. x_BTH: from `embed`, padded on the right."""

    @abstractmethod
    def logits(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor | None = None) -> Tensor:
        """Return logits_BSV: those at s are of target s, given the input and the targets before s.

        owner_BS: where several targets of a row stand side by side, the number of the one that each piece is of, 0 and
        up. Each is read as if it stood alone.
        """

    @contextmanager
    def logits_only_at(self, kept_BS: Tensor) -> Iterator[None]:
        """While inside, `logits` returns logits_NV of the N kept positions alone, row by row.

        Targets of a mixture differ in length; where one row is a corrupted text and the others are labels, most of the
        padded block would cost the whole vocabulary for nothing. Other threads that use the model get all theirs.
        """
        own = threading.get_ident()

        def keep(module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
            # What a target starts from may stand before it.
            return inputs[0][:, -kept_BS.shape[1] :][kept_BS] if threading.get_ident() == own else None

        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @abstractmethod
    def generate(
        self,
        encoded: Encoded,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        num_beams: int,
        use_cache: bool,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Tensor:
        """Return the likeliest ids_BS, padded, the target alone. processors: what is done to the logits before."""

    def identity(self) -> dict[str, str | None]:
        """Return name, revision and sha256 of architecture, vocabulary and weights as they were loaded (in fp32)."""
        return dict(self._identity)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` and transformers' own classes can read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """Return x_BTH."""
        return self.model.get_input_embeddings()(input_ids_BT)

    def layer_norms(self) -> list[nn.Module]:
        """Return the layer normalisations, of whatever kind."""
        return [m for m in self.model.modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]

    def ordinary_ids(self) -> list[int]:
        """Return the ids of the pieces that are no special tokens."""
        special = set(self.tokenizer.all_special_ids)
        return [i for i in range(len(self.tokenizer)) if i not in special]

    def ordinary_embeddings(self) -> Tensor:
        """Return the embeddings of the pieces that are no special tokens, in the order of their ids."""
        return self.model.get_input_embeddings().weight[torch.tensor(self.ordinary_ids())].detach()


def begin_token(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts before a text, if it does."""
    first = tokenizer("x").input_ids[0]
    return first if first == tokenizer.bos_token_id else None


def with_input_prompts(x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Return [input prompts ; x] and its mask."""
    if prompts.inputs_BPH is None:
        return x_BTH, mask_BT
    inputs_BPH, mask_BP = prompts.inputs_BPH, prompts.mask_BP
    if mask_BP is None:
        mask_BP = mask_BT.new_ones(inputs_BPH.shape[:2])
    else:
        # What is absent stands first: the distance from the prompt to the input is that of a shorter prompt.
        order_BP = mask_BP.argsort(dim=1, stable=True)
        inputs_BPH = inputs_BPH.gather(1, order_BP[:, :, None].expand_as(inputs_BPH))
        mask_BP = mask_BP.gather(1, order_BP)
    joined_BTH = torch.cat([inputs_BPH.to(x_BTH.dtype), x_BTH], dim=1)
    return joined_BTH, torch.cat([mask_BP.to(mask_BT.dtype), mask_BT], dim=1)


def begins(owner_BS: Tensor) -> Tensor:
    """Return where a target begins, of those that stand side by side."""
    return torch.cat([torch.ones_like(owner_BS[:, :1], dtype=torch.bool), owner_BS[:, 1:] != owner_BS[:, :-1]], dim=1)


def offsets(begins_BS: Tensor) -> Tensor:
    """Return how far each piece is from the beginning of its target."""
    place_S = torch.arange(begins_BS.shape[1], device=begins_BS.device)
    return place_S - torch.where(begins_BS, place_S, 0).cummax(dim=1).values


def seen(owner_BX: Tensor, real_BX: Tensor) -> Tensor:
    """Return [B, X, X], true where a position (the row) sees another (the column) of targets side by side.

    It sees what is before it, of its own target and of the INPUT. real_BX: false for padding, which sees itself alone.
    """
    own_BXX = (owner_BX[:, :, None] == owner_BX[:, None]) | (owner_BX == INPUT)[:, None]
    itself_XX = torch.eye(owner_BX.shape[1], dtype=torch.bool, device=owner_BX.device)
    return (own_BXX & real_BX.bool()[:, None]).tril() | itself_XX


def _content_hash(keys: tuple[str, ...], model: Any, tokenizer: Any) -> str:
    """Hash what the model computes with: architecture, vocabulary, and every weight once; of shapes alone no weight."""
    config = model.config.to_dict()
    digest = hashlib.sha256(json.dumps({k: config.get(k) for k in keys}, sort_keys=True).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        if isinstance(weight, FakeTensor):
            continue
        digest.update(memoryview(weight.detach().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
