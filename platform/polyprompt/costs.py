"""What one row costs: floating-point operations of a forward pass, or of a training step, in closed form.

Letters: T input tokens with the input prompt, S target tokens, P prompt keys of a self-attention layer, H hidden size,
A = heads times head size, F feed-forward size, V vocabulary, L layers, R routed prompts. f = 3 matrices in a gated
feed-forward block, else 2, and f·H·F has Method.layer_multiply_adds (adapters) added. In multiply-adds:

    encoder layer  4·H·A·T + 2·A·T·(T + P) + f·H·F·T
    decoder layer  4·H·A·S + 2·A·S·(S + P) + 2·H·A·S + 2·H·A·T + 2·A·S·T + f·H·F·S
    total          L_enc · encoder layer + L_dec · decoder layer + H·V·S + H·R + Method.row_multiply_adds

A decoder-only model has one sequence of X = T + S - 1 tokens, <bos> too where there is one: the last target is not
read. With grouped-query attention its keys and values have a smaller A', heads of keys times head size:

    layer          (2·H·A + 2·H·A' + f·H·F)·X + 2·A·X·(X + P)

LoRA adds rank times (inputs + outputs) of a map for each token that the map reads; it is counted as it is trained,
beside the map, though it could be merged into it.

One multiply-add is two operations. Norms, activations, softmax and embedding look-ups are left out, and so are
hypernetworks: what they make depends on the task alone, so it is computed once, not for each prediction.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from polyprompt.data import AnyData
from polyprompt.model import PromptedModel


def inference_flops(model: PromptedModel, num_input_tokens: int, num_target_tokens: int) -> int:
    """Return the operations of one row. num_input_tokens: without the prompt."""
    lengths, input_length = model.method.prompt_lengths(), model.method.input_length
    hidden, vocabulary = model.backbone.dims(1).hidden, model.backbone.model.config.vocab_size
    layers = _encoder_decoder if model.backbone.dims(1).encoder is not None else _decoder_only
    head = hidden * vocabulary * num_target_tokens + hidden * model.method.num_routes + model.method.row_multiply_adds
    return 2 * (layers(model, num_input_tokens + input_length, num_target_tokens, lengths) + head)


def training_flops(model: PromptedModel, num_input_tokens: int, num_target_tokens: int, *, whole: bool) -> int:
    """Return the operations of one row's forward and backward pass; whole: the backbone is trained too.

    A product costs as much again for the gradient of what it read, and once more for that of its weights where these
    are trained. Attention, which reads two things and has no weights, is taken for one of the products: a few percent
    too little where the backbone is frozen.
    """
    return inference_flops(model, num_input_tokens, num_target_tokens) * (3 if whole else 2)


def _encoder_decoder(model: PromptedModel, inputs: int, targets: int, lengths: Mapping[str, int]) -> int:
    """Return the multiply-adds of all layers."""
    config, dims = model.backbone.model.config, model.backbone.dims(1)
    assert dims.encoder is not None
    hidden, inner = dims.hidden, dims.encoder.num_heads * dims.encoder.head_dim
    projection = hidden * inner
    # What is reserved beside no target is BART's <s>, before inputs and targets alike.
    inputs, targets = (tokens + model.backbone.reserved_tokens(0) for tokens in (inputs, targets))
    if config.model_type == "bart":
        into, out_of = (2 * hidden * size for size in (config.encoder_ffn_dim, config.decoder_ffn_dim))
    else:
        into = out_of = (3 if "gated" in config.feed_forward_proj else 2) * hidden * config.d_ff
    into, out_of = (feed_forward + model.method.layer_multiply_adds for feed_forward in (into, out_of))
    encoder = inputs * (4 * projection + 2 * inner * (inputs + lengths.get("method.encoder_length", 0)) + into)
    own = targets * (4 * projection + 2 * inner * (targets + lengths.get("method.decoder_length", 0)) + out_of)
    cross = 2 * projection * (targets + inputs) + 2 * inner * targets * inputs
    # Cross-attention makes its keys and values of the input.
    of_input = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    joined = sum(
        cost * (inputs if "encoder." in name or name.endswith(of_input) else targets)
        for name, cost in model.method.module_multiply_adds().items()
    )
    return dims.encoder.num_layers * encoder + dims.decoder.num_layers * (own + cross) + joined


def _decoder_only(model: PromptedModel, inputs: int, targets: int, lengths: Mapping[str, int]) -> int:
    """Return the multiply-adds of all layers."""
    config, stack = model.backbone.model.config, model.backbone.dims(1).decoder
    # What is reserved beside no target is <bos>.
    hidden, tokens = config.hidden_size, inputs + targets - 1 + model.backbone.reserved_tokens(0)
    inner, narrow = (n * stack.head_dim for n in (model.backbone.num_query_heads, stack.num_heads))
    if config.model_type == "gpt2":
        feed_forward = 2 * hidden * (config.n_inner or 4 * hidden)
    else:
        feed_forward = 3 * hidden * config.intermediate_size
    feed_forward += model.method.layer_multiply_adds
    attention = 2 * inner * (tokens + lengths.get("method.decoder_length", 0))
    layer = 2 * hidden * (inner + narrow) + attention + feed_forward
    return tokens * (stack.num_layers * layer + sum(model.method.module_multiply_adds().values()))


def median_lengths(data: Sequence[AnyData]) -> tuple[int, int]:
    """Return the median input and target tokens over the validation rows of all tasks."""
    inputs = np.concatenate([task.validation.input_lengths for task in data])
    targets = np.concatenate([task.validation.target_lengths for task in data])
    return int(np.median(inputs)), int(np.median(targets))
