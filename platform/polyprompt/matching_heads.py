"""Attention heads that look for the same piece elsewhere in the input, to pre-train a T5 from.

Whether a word of one text stands in another is what paraphrase, entailment and question answering begin with, and a
small network hardly finds it: the head has to know a piece by its keys before any row tells that this is of use.

Source: Trockman & Kolter 2023, Mimetic initialization of self-attention layers, section 4: trained models have heads
whose queries times keys are near a multiple of the identity, and whose values times outputs are near a negative one;
starting from such ones, small models learn from less data. Where we differ:

- Only some heads, of a trained network too: those that it uses least. A head's own place is shut out while all others
  look alike to it (position bias), else each token finds itself.
- Keys are drawn so that their products tell pieces apart, whatever they mean: what a layer reads has most of its
  variance in few directions, which like pieces share, so it is whitened first, and its mean taken out.
- Nothing is added to the multiples of the identity, and they have the rank of a head.

N: windows, T: tokens of a window, M: all tokens of the windows, U: their different pieces, H: hidden size, K: size of a
head.
"""

import torch
from torch import Tensor, nn

from polyprompt.backbone_base import Backbone
from polyprompt.errors import ConfigError, DataError
from polyprompt.methods.base import Prompts

#: So many heads of each encoder layer.
HEADS = 2
#: By so much, in nats, the same piece's logit stands above another's, in the mean.
MATCH = 9.0
#: The position bias of a token's own place.
OWN_PLACE = -8.0
#: Variance that is added to each direction before whitening, in parts of the mean one.
RIDGE = 0.02
#: Their one table of position biases stands in the first layer.
FAMILIES = ("t5", "mt5")


@torch.no_grad()
def start_from(backbone: Backbone, windows_NT: Tensor, seed: int) -> list[int]:
    """Make HEADS heads of each encoder layer, the least used ones, look for equal pieces, in place; return which.

    They are the same in each layer, for layers share a table of position biases. A head looks for the piece it stands
    at and takes away part of what it finds. Keys, values and outputs keep the size that the layer's have.

    windows_NT: ids of tokens; what each layer reads of them is what its keys are made for.
    Raises ConfigError for a model without T5's position biases, DataError where no piece stands twice.
    """
    model = backbone.model
    if model.config.model_type not in FAMILIES:
        raise ConfigError(
            f"backbone.name is a {model.config.model_type!r} model; matching heads are for {' and '.join(FAMILIES)}, "
            "whose position biases stand in one table"
        )
    ids_M = windows_NT.flatten()
    if len(ids_M.unique()) == len(ids_M):
        raise DataError(f"no piece stands twice in the {len(ids_M)} tokens to measure keys on; give more text")
    generator = torch.Generator().manual_seed(seed)
    heads = sorted(use(backbone, windows_NT).argsort(stable=True)[:HEADS].tolist())
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # buckets × heads
    bias[:, heads] = 0
    bias[0, heads] = OWN_PLACE
    for block in model.encoder.block:
        x_MH = _read(backbone, block.layer[0].layer_norm, windows_NT).flatten(0, 1)
        attention = block.layer[0].SelfAttention
        size, white_HH = attention.key_value_proj_dim, whitening(x_MH, ids_M)
        key, value, output = (_rms(getattr(attention, name).weight) for name in "kvo")
        for head in heads:
            rows = slice(head * size, (head + 1) * size)
            drawn_KH = nn.init.orthogonal_(torch.empty(size, len(white_HH)), generator=generator) @ white_HH
            key_KH = drawn_KH * (key / _rms(drawn_KH))
            attention.k.weight[rows] = key_KH
            attention.q.weight[rows] = key_KH * (MATCH / gap(x_MH @ key_KH.T, ids_M))
            value_KH = nn.init.orthogonal_(torch.empty(size, len(white_HH)), generator=generator)
            attention.v.weight[rows] = value_KH * (value / _rms(value_KH))
            attention.o.weight[:, rows] = -value_KH.T * (output / _rms(value_KH))
    return heads


@torch.no_grad()
def use(backbone: Backbone, windows_NT: Tensor) -> Tensor:
    """Return how much the encoder's output changes without each head, all layers' at once, in parts of the output."""
    attentions = [block.layer[0].SelfAttention for block in backbone.model.encoder.block]
    final = backbone.model.encoder.final_layer_norm
    whole_NTH, changes = _read(backbone, final, windows_NT), []
    size = attentions[0].key_value_proj_dim
    outputs = [attention.o.weight.clone() for attention in attentions]
    for head in range(attentions[0].n_heads):
        for attention in attentions:
            attention.o.weight[:, head * size : (head + 1) * size] = 0
        changes.append((_read(backbone, final, windows_NT) - whole_NTH).norm() / whole_NTH.norm())
        for attention, output in zip(attentions, outputs, strict=True):
            attention.o.weight.copy_(output)
    return torch.stack(changes)


def whitening(x_MH: Tensor, ids_M: Tensor) -> Tensor:
    """Return the map after which pieces differ alike in all directions but their mean's, which it takes out: H × H.

    Each different piece counts once, by the mean of its tokens.
    """
    _, piece_M = ids_M.unique(return_inverse=True)
    sums_UH = x_MH.new_zeros(int(piece_M.max()) + 1, x_MH.shape[1]).index_add_(0, piece_M, x_MH)
    x_UH = sums_UH / piece_M.bincount()[:, None]
    mean_H = x_UH.mean(dim=0)
    values_H, directions_HH = torch.linalg.eigh((x_UH - mean_H).T @ (x_UH - mean_H) / len(x_UH))
    white_HH = directions_HH * (values_H + RIDGE * values_H.mean()).rsqrt() @ directions_HH.T
    unit_H = nn.functional.normalize(mean_H, dim=0)
    return white_HH - (white_HH @ unit_H)[:, None] * unit_H


def gap(keys_MK: Tensor, ids_M: Tensor) -> Tensor:
    """Return by how much the product of two tokens' keys is larger, in the mean, where their pieces are the same."""
    products = keys_MK @ keys_MK.T
    same = ids_M[:, None] == ids_M
    others = ~torch.eye(len(ids_M), dtype=torch.bool)
    return products[same & others].mean() - products[~same].mean()


def _rms(weight: Tensor) -> Tensor:
    return weight.square().mean().sqrt()


def _read(backbone: Backbone, module: nn.Module, windows_NT: Tensor) -> Tensor:
    """Return what the module puts out while the encoder reads the windows."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        embeddings = backbone.model.get_input_embeddings()(windows_NT)
        backbone.encode(embeddings, torch.ones_like(windows_NT), Prompts())
    finally:
        handle.remove()
    return seen[0]
