"""Attention heads that look for the same piece elsewhere in the input, to pre-train a T5 from.

Whether a word of one text stands in another is what paraphrase, entailment and question answering begin with, and a
small network hardly finds it: the head has to know a piece by its keys before any row tells that this is of use.

Source: Trockman & Kolter 2023, Mimetic initialization of self-attention layers, section 4: trained models have heads
whose queries times keys are near a multiple of the identity; starting from such ones, small models learn from less
data. Where we differ: only some heads; the keys stay as they are, trained or not, and the queries become a multiple of
them; a head's own place is shut out and the others look alike to it (position bias), else each token finds itself.

N: windows, T: tokens of a window, M: all tokens of the windows, H: hidden size, K: size of a head.
"""

from typing import Any

import torch
from torch import Tensor

from polyprompt.backbone_base import Backbone
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Prompts

#: So many heads of each encoder layer, the first ones.
HEADS = 2
#: By so much, in nats, the same piece's logit stands above another's, in the mean.
MATCH = 7.0
#: The position bias of a token's own place.
OWN_PLACE = -8.0
#: Their one table of position biases stands in the first layer.
FAMILIES = ("t5", "mt5")


@torch.no_grad()
def start_from(backbone: Backbone, windows_NT: Tensor) -> None:
    """Make the first HEADS heads of each encoder layer look for equal pieces, in place.

    windows_NT: ids of tokens to measure keys on: those of a layer are scaled by what its input really is.
    Raises ConfigError for a model without T5's position biases.
    """
    model = backbone.model
    if model.config.model_type not in FAMILIES:
        raise ConfigError(
            f"backbone.name is a {model.config.model_type!r} model; matching heads are for {' and '.join(FAMILIES)}, "
            "whose position biases stand in one table"
        )
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # buckets × heads
    bias[:, :HEADS] = 0
    bias[0, :HEADS] = OWN_PLACE
    for block in model.encoder.block:
        x_MH = _read(backbone, block.layer[0].layer_norm, windows_NT).flatten(0, 1)
        attention = block.layer[0].SelfAttention
        size = attention.key_value_proj_dim
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            key_KH = attention.k.weight[rows]
            attention.q.weight[rows] = key_KH * (MATCH / gap(x_MH @ key_KH.T, windows_NT.flatten()))


def gap(keys_MK: Tensor, ids_M: Tensor) -> Tensor:
    """Return by how much the product of two tokens' keys is larger, in the mean, where their pieces are the same."""
    products = keys_MK @ keys_MK.T
    same = ids_M[:, None] == ids_M
    others = ~torch.eye(len(ids_M), dtype=torch.bool)
    return products[same & others].mean() - products[~same].mean()


def _read(backbone: Backbone, module: Any, windows_NT: Tensor) -> Tensor:
    """Return what the module puts out while the encoder reads the windows."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        embeddings = backbone.model.get_input_embeddings()(windows_NT)
        backbone.encode(embeddings, torch.ones_like(windows_NT), Prompts())
    finally:
        handle.remove()
    return seen[0]
