"""The attention function that glues prompt keys and values on, in every self-attention module that carries a spot.

Prompts travel as the keyword `prompts` of the model's own forward down to its attention function, so nothing is stored
on a module: threads, gradient checkpointing and cached or beam generation need no care. A module's `prompt_spot` is
("encoder" or "decoder", layer).

Letters: B rows of a batch, P prompt tokens, L layers, N key-value heads, D head size, Q queries, X keys.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from polyprompt import flex
from polyprompt.cpu_training import trained_on_cpu
from polyprompt.methods.base import KeyValues, Part, Prompts


def attention_name(attention: str) -> str:
    """Return the name that transformers knows the prompted attention under. attention: sdpa, eager or flex."""
    return f"polyprompt_{attention}"


def register() -> None:
    """Make the prompted attention known to transformers, around each implementation with its own kind of mask."""
    sdpa = trained_on_cpu(sdpa_attention_forward)
    AttentionInterface.register(attention_name("sdpa"), prompted(sdpa))
    AttentionMaskInterface.register(attention_name("sdpa"), sdpa_mask)
    AttentionInterface.register(attention_name("eager"), prompted(_eager))
    AttentionMaskInterface.register(attention_name("eager"), eager_mask)
    AttentionInterface.register(attention_name("flex"), prompted(flex.flexed(sdpa), bias_by_distance=True))
    AttentionMaskInterface.register(attention_name("flex"), flex.mask)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call the eager attention of the module's own family, which its modelling file defines under this name."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def own_mask(seen_BXX: Tensor, model: Any) -> Tensor:
    """Return a mask [B, 1, X, X] of the kind that the model's attention takes. seen_BXX: true where a row sees."""
    mask = seen_BXX[:, None]
    if model.config._attn_implementation != attention_name("eager"):
        return mask
    return (~mask).to(model.dtype) * torch.finfo(model.dtype).min


def prompted(wrapped: Callable, *, bias_by_distance: bool = False) -> Callable:
    """Return an attention function that prepends a row's prompt keys and values and calls the wrapped one.

    Prompt columns have no position, neither bias nor rotation, and are visible from every query. Real tokens keep
    theirs. Without prompts the call goes through as is. bias_by_distance: a position bias is one of distances between
    real tokens (flex.py), and stays so.
    """

    def attend(
        module: nn.Module,
        query_BNQD: Tensor,
        key_BNXD: Tensor,
        value_BNXD: Tensor,
        mask: Tensor | None,
        *,
        prompts: Prompts | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Cross-attention has no spot.
        stack, layer = getattr(module, "prompt_spot", (None, 0))
        if prompts is not None and prompts.parts:
            bias = kwargs.pop("position_bias", None)
            own = partial(attend, module, **kwargs)
            return _part_by_part(own, stack, query_BNQD, key_BNXD, value_BNXD, mask, bias, prompts.parts), None
        made = getattr(prompts, stack) if prompts is not None and stack else None
        if made is None or made.keys_LBNPD.shape[3] == 0:
            return wrapped(module, query_BNQD, key_BNXD, value_BNXD, mask, **kwargs)
        num_prompts, num_queries, num_keys = made.keys_LBNPD.shape[3], query_BNQD.shape[2], key_BNXD.shape[2]
        if mask is None and module.is_causal and num_queries > 1:
            # transformers leaves the causal mask to sdpa's is_causal flag, which would hide prompt columns.
            causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BNQD.device)
            mask = causal.tril(num_keys - num_queries)[None, None]
        if mask is None and made.mask_BP is not None:
            mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query_BNQD.device)
        if mask is not None:
            mask = _with_prompt_columns(mask, made, len(query_BNQD))
        if "position_bias" in kwargs and not bias_by_distance:  # T5's kind
            kwargs["position_bias"] = pad(kwargs["position_bias"], (num_prompts, 0))
        return wrapped(
            module,
            query_BNQD,
            torch.cat([_for_rows(made.keys_LBNPD[layer], key_BNXD), key_BNXD], dim=2),
            torch.cat([_for_rows(made.values_LBNPD[layer], value_BNXD), value_BNXD], dim=2),
            mask,
            is_causal=False,
            **kwargs,
        )

    return attend


def _part_by_part(
    attend: Callable,
    stack: str | None,
    query_BNQD: Tensor,
    key_BNXD: Tensor,
    value_BNXD: Tensor,
    mask: Tensor | None,
    bias_1NQX: Tensor | None,
    parts: Sequence[Part],
) -> Tensor:
    """Attend within each part of a batch as if it were alone, at its own lengths, and return output_BQND.

    stack: that of self-attention; None: cross-attention. bias_1NQX: of T5's kind, the same for all rows.
    """
    rows = [part.num_rows for part in parts]
    masks = [None] * len(parts) if mask is None else mask.expand(len(query_BNQD), -1, -1, -1).split(rows)
    outputs = []
    for part, query, key, value, own in zip(
        parts, query_BNQD.split(rows), key_BNXD.split(rows), value_BNXD.split(rows), masks, strict=True
    ):
        num_queries = part.lengths["encoder" if stack == "encoder" else "decoder"]
        num_keys = part.lengths["decoder" if stack == "decoder" else "encoder"]
        bias = {} if bias_1NQX is None else {"position_bias": bias_1NQX[:, :, :num_queries, :num_keys]}
        with part.own_random():
            output_BQND, _ = attend(
                query[:, :, :num_queries],
                key[:, :, :num_keys],
                value[:, :, :num_keys],
                None if own is None else own[:, :, :num_queries, :num_keys],
                prompts=part.prompts,
                **bias,
            )
        outputs.append(pad(output_BQND, (0, 0, 0, 0, 0, query_BNQD.shape[2] - num_queries)))
    return torch.cat(outputs)


def _with_prompt_columns(mask: Tensor, made: KeyValues, num_rows: int) -> Tensor:
    """Return the mask [rows, 1, Q, X], of bool or added to logits, with columns for the prompts in front."""
    num_prompts, visible = made.keys_LBNPD.shape[3], mask.dtype == torch.bool
    if made.mask_BP is None:
        return pad(mask, (num_prompts, 0), value=True if visible else 0.0)
    real_BP = made.mask_BP.bool().repeat_interleave(num_rows // len(made.mask_BP), dim=0)
    columns = real_BP if visible else (~real_BP).to(mask.dtype) * torch.finfo(mask.dtype).min
    columns = columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    return torch.cat([columns, mask.expand(num_rows, -1, -1, -1)], dim=3)


def _for_rows(made_BNPD: Tensor, like_BNXD: Tensor) -> Tensor:
    """Repeat a row's prompts for its beams, which lie side by side, and follow the dtype of the layer."""
    beams = len(like_BNXD) // len(made_BNPD)
    return made_BNPD.to(like_BNXD.dtype).repeat_interleave(beams, dim=0) if beams > 1 else made_BNPD.to(like_BNXD.dtype)
