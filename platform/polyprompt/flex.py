"""T5's attention on GPUs in memory that grows with the length, not with its square: torch's FlexAttention.

T5 writes its position bias out for queries × keys, transformers its mask for rows × queries × keys, and sdpa takes
their sum, for rows × heads × queries × keys. Here the bias stays one number for each head and distance, and the mask
one for each row and key; the kernel adds both to the scores as it computes them.

FlexAttention has no dropout, and no backward pass on the CPU. There, for single queries (cached generation) and under
masks of queries × keys (choices side by side), the bias is written out and sdpa computes the same.

Letters: B rows of a batch, N heads, D head size, Q queries, X keys, Z distances from keys to queries.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad

#: Families with a bias in the first layer alone, which hands it on; umT5 makes one in each.
FAMILIES = ("t5", "mt5")
#: With and without gradients, in either stack and across, one row or many: each is a kernel of its own.
MOST_KERNELS = 64


def tag(attention: nn.Module) -> None:
    """Let an attention module of T5's make its bias by distance: [1, N, 1, Z], from the last query to the first key
    up to the first query to the last key. Prompts are not in it."""
    attention.register_forward_pre_hook(_make_bias, with_kwargs=True)


def _make_bias(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook: what layers below the first are given stays."""
    if kwargs.get("position_bias") is not None:
        return None
    (hidden_BTH,) = args
    others_BTH, past = kwargs.get("key_value_states"), kwargs.get("past_key_values")
    num_queries = hidden_BTH.shape[1]
    if others_BTH is not None:  # cross-attention has no bias
        bias_1N1Z = hidden_BTH.new_zeros(1, module.n_heads, 1, num_queries + others_BTH.shape[1] - 1)
    else:
        num_keys = num_queries + (past.get_seq_length(module.layer_idx) if past is not None else 0)
        bias_1N1Z = module.compute_bias(1, num_queries + num_keys - 1, past_seen_tokens=num_keys - 1)
    return args, {**kwargs, "position_bias": bias_1N1Z}


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Return the mask [B, 1, 1, X] of keys that are no padding, for transformers; what is causal follows from the
    module."""
    if attention_mask is None:
        return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)
    return attention_mask[:, None, None, :kv_length].bool()


def flexed(wrapped: Callable) -> Callable:
    """Return an attention function for transformers that calls the wrapped one, sdpa's, where the kernel cannot go.

    A bias by distance covers the keys that are no prompts, which are the last; prompts have a bias of 0.
    """

    def attend(
        module: Any,
        query_BNQD: Tensor,
        key_BNXD: Tensor,
        value_BNXD: Tensor,
        mask: Tensor,
        *,
        position_bias: Tensor,
        scaling: float,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        num_queries, num_keys = query_BNQD.shape[2], key_BNXD.shape[2]
        num_own = position_bias.shape[3] - num_queries + 1
        key_X = torch.arange(num_own - num_keys, num_own, device=query_BNQD.device)  # below 0: a prompt
        # Where a query of number q finds the bias is place - q, at least 0; at 0 is that of prompts.
        place_X = torch.where(key_X < 0, 0, key_X + num_queries)
        bias_1N1Z = pad(position_bias, (1, 0))
        whole = mask.shape[2] == 1  # for all queries: padding alone
        if whole:
            first_X = key_X - (num_own - num_queries) if module.is_causal else torch.zeros_like(key_X)
            first_BX = torch.where(mask[:, 0, 0], first_X, num_queries)
        kernel = None if num_queries == 1 else kernel_on(query_BNQD.device)
        if whole and kernel is not None:
            output_BNQD = kernel(query_BNQD, key_BNXD, value_BNXD, bias_1N1Z[0, :, 0], place_X, first_BX, scaling)
            return output_BNQD.transpose(1, 2).contiguous(), None
        query_Q1 = torch.arange(num_queries, device=query_BNQD.device)[:, None]
        if whole:
            mask = first_BX[:, None, None] <= query_Q1
        bias_1NQX = bias_1N1Z[:, :, 0, (place_X - query_Q1).clamp(min=0)]
        return wrapped(
            module, query_BNQD, key_BNXD, value_BNXD, mask,
            position_bias=bias_1NQX, scaling=scaling, is_causal=False, **kwargs,
        )  # fmt: skip

    return attend


def kernel_on(device: torch.device) -> Callable[..., Tensor] | None:
    """Return `attended` as a kernel for the device; None: it cannot be trained there."""
    return _compiled() if device.type == "cuda" else None


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(attended, dynamic=True, recompile_limit=MOST_KERNELS)  # type: ignore[call-overload]


def attended(
    query_BNQD: Tensor,
    key_BNXD: Tensor,
    value_BNXD: Tensor,
    bias_NZ: Tensor,
    place_X: Tensor,
    first_BX: Tensor,
    scale: float,
) -> Tensor:
    """Return output_BNQD. place_X - q: where in the bias query q finds that of a key, at least 0. first_BX: the first
    query that sees a key."""

    # All that depends on lengths is in tensors: as numbers they would ask for a kernel of each length.
    def change(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        biased = score + bias_NZ[head, (place_X[key] - query).clamp(min=0)]
        return torch.where(query >= first_BX[row, key], biased, -torch.inf)

    return flex_attention(query_BNQD, key_BNXD, value_BNXD, score_mod=change, scale=scale)
