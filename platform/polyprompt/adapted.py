"""Adapters: hooks behind the attention and the feed-forward of every layer, which apply what a row's Prompts hold.

Prompts travel as the keyword `prompts` of the model's own forward as far as a layer's self-attention; its feed-forward
gets no keywords. So the attention leaves them in a variable of the thread for the feed-forward of its own layer, which
runs behind it in the same thread, whether forward or when gradient checkpointing computes the layer anew. Nothing is
stored on a module.

Letters: B rows of a batch, T tokens, H hidden size, R bottleneck.
"""

from collections.abc import Callable, Mapping
from functools import partial
from threading import local
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu, silu

from polyprompt.method_configs import Activation
from polyprompt.methods.base import Adapters, Place, Prompts

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "relu": relu,
    "swish": silu,
}


class _Layer(local):
    """The layer that runs in this thread."""

    prompts: Prompts | None = None


#: Not a ContextVar, whose access no graph of torch.compile can hold.
_layer = _Layer()


def tag(stack: str, layer: int, attention: nn.Module, feed_forward: nn.Module) -> None:
    """Let adapters of this layer act behind the two modules. Their outputs are what is added to the residual."""
    attention.register_forward_pre_hook(_enter, with_kwargs=True)
    attention.register_forward_hook(partial(_adapt, stack, layer, "attention"))
    feed_forward.register_forward_hook(partial(_adapt, stack, layer, "feed_forward"))
    feed_forward.register_forward_hook(_leave)


def _enter(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    _layer.prompts = kwargs.get("prompts")


def _leave(module: nn.Module, args: tuple, output: Tensor) -> None:
    _layer.prompts = None


def _adapt(stack: str, layer: int, place: Place, module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook: None leaves the output as it is."""
    prompts = _layer.prompts
    adapters = None if prompts is None else prompts.adapters.get(stack)
    if adapters is None or place not in adapters.places:
        return None
    if isinstance(output, tuple):  # attention also returns its weights
        return (apply(adapters, layer, place, output[0]), *output[1:])
    return apply(adapters, layer, place, output)


def apply(adapters: Adapters, layer: int, place: Place, y_BTH: Tensor) -> Tensor:
    """Return the output of one part of a layer with its adapter's addition."""
    number = adapters.places.index(place)
    # A row's beams lie side by side.
    owner_B = adapters.owner_B.repeat_interleave(len(y_BTH) // len(adapters.owner_B))

    def own(weights_LJG: Tensor) -> Tensor:
        """Return the weights of each row, [B, 1, …] for vectors; of one set for all the weights themselves."""
        weights_G = weights_LJG[layer, number].to(y_BTH.dtype)
        if len(weights_G) == 1:
            return weights_G[0]
        weights_B = weights_G.index_select(0, owner_B)
        return weights_B[:, None] if weights_B.ndim == 2 else weights_B

    squeezed_BTR = ACTIVATIONS[adapters.activation](y_BTH @ own(adapters.down_LJGHR) + own(adapters.down_bias_LJGR))
    added_BTH = squeezed_BTR @ own(adapters.up_LJGRH) + own(adapters.up_bias_LJGH)
    if adapters.scale_LJGH is not None and adapters.shift_LJGH is not None:
        added_BTH = layer_norm(added_BTH, added_BTH.shape[-1:]) * own(adapters.scale_LJGH) + own(adapters.shift_LJGH)
    return y_BTH + added_BTH
