"""Dropout and attention as a CPU computes them fastest while a model is trained.

torch draws a number of its own for every element that may be dropped, which takes longer than many of the matrix
products beside it; here one draw serves four. And where attention has dropout, or a position bias that is trained,
torch's sdpa has no kernel for the CPU and takes the general way: it adds bias and mask for each row and head apart,
scales twice, and looks for rows without a key. On other devices everything stays torch's.

Letters: B rows of a batch, N heads, Q queries, X keys, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

#: The values of the numbers that decide: p is rounded to a multiple of 1 / LEVELS.
LEVELS = 2**16
_Around = Callable[[], AbstractContextManager[Any]]
_ELSEWHERE: ContextVar[_Around | None] = ContextVar("elsewhere", default=None)


@contextmanager
def as_elsewhere(around: _Around) -> Iterator[None]:
    """While inside, tensors on the CPU are treated as those on other devices: for a plan of what a GPU needs.

    around: entered for each call of torch's attention.
    """
    token = _ELSEWHERE.set(around)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def _elsewhere() -> _Around | None:
    # No graph of torch.compile can hold a ContextVar's access, and what is compiled runs where it is.
    return None if torch.compiler.is_compiling() else _ELSEWHERE.get()


def _here(x: Tensor) -> bool:
    return x.device.type == "cpu" and _elsewhere() is None


def drop(x: Tensor, p: float) -> Tensor:
    """Return x with each element 0 with probability p, and the others times 1 / (1 - p).

    Draws from torch's global stream; on the CPU in one thread, so the number of threads changes nothing.
    """
    if not _here(x):
        return torch.dropout(x, p, train=True)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
    factor = (draws >= round(p * LEVELS) - LEVELS // 2).to(x.dtype).mul_(1 / (1 - p))
    return x * factor


class Dropout(nn.Dropout):
    """torch's, by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training and self.p > 0 else x


def replace_dropout(model: nn.Module) -> None:
    """Put Dropout in the place of torch's own everywhere in a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))


def trained_on_cpu(wrapped: Callable) -> Callable:
    """Return an attention function for transformers that calls the wrapped one where that has a kernel."""

    def attend(
        module: nn.Module,
        query_BNQD: Tensor,
        key_BNXD: Tensor,
        value_BNXD: Tensor,
        mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        trained_bias = position_bias is not None and position_bias.requires_grad
        if not _here(query_BNQD) or not (dropout > 0 or trained_bias):
            given = {} if position_bias is None else {"position_bias": position_bias}
            with (_elsewhere() or nullcontext)():
                return wrapped(
                    module, query_BNQD, key_BNXD, value_BNXD, mask,
                    dropout=dropout, scaling=scaling, is_causal=is_causal, **given, **kwargs,
                )  # fmt: skip
        repeats = query_BNQD.shape[1] // key_BNXD.shape[1]
        if repeats > 1:  # heads of queries that share those of keys and values
            key_BNXD, value_BNXD = (t.repeat_interleave(repeats, dim=1) for t in (key_BNXD, value_BNXD))
        causal = module.is_causal if is_causal is None else is_causal
        if mask is None and causal and query_BNQD.shape[2] > 1:
            mask = torch.ones(query_BNQD.shape[2], key_BNXD.shape[2], dtype=torch.bool).tril()
        scale = query_BNQD.shape[3] ** -0.5 if scaling is None else scaling
        weights_BNQX = _weights(query_BNQD, key_BNXD, mask, scale, position_bias).to(value_BNXD.dtype)
        if dropout > 0:
            weights_BNQX = drop(weights_BNQX, dropout)
        return (weights_BNQX @ value_BNXD).transpose(1, 2).contiguous(), None

    return attend


def _weights(
    query_BNQD: Tensor, key_BNXD: Tensor, mask: Tensor | None, scale: float, position_bias: Tensor | None
) -> Tensor:
    """Return the attention weights, in fp32 under autocast too, as torch's sdpa computes them.

    Neither the bias nor the mask is ever as large as the scores: each is added to them where they stand.
    """
    with torch.autocast("cpu", enabled=False):
        query_BNQD = query_BNQD.float() if scale == 1.0 else query_BNQD.float() * scale
        scores_BNQX = query_BNQD @ key_BNXD.float().transpose(2, 3)
        if position_bias is not None:
            scores_BNQX += position_bias
        if mask is not None:
            scores_BNQX += torch.where(mask, 0.0, torch.finfo(torch.float32).min) if mask.dtype == torch.bool else mask
        return scores_BNQX.softmax(dim=-1)
