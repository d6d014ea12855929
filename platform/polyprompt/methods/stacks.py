"""Which stacks of a backbone get prompt keys and values, for the methods that make them."""

from typing import NamedTuple

from polyprompt.errors import ConfigError
from polyprompt.method_configs import KeyValueConfig
from polyprompt.methods.base import Dims, Stack, StackDims


class PromptedStack(NamedTuple):
    """A stack of self-attention layers and the number of prompt tokens that each of its layers gets."""

    dims: StackDims
    length: int


def prompted_stacks(config: KeyValueConfig, dims: Dims) -> dict[Stack, PromptedStack]:
    """Return the stacks that the config asks prompts for; those of length 0 are left out.

    Raises ConfigError where the backbone has no such stack.
    """
    if dims.encoder is None and config.stacks != "decoder":
        raise ConfigError(
            f"method.stacks={config.stacks} asks for encoder prompts, but this backbone has no encoder. "
            "Expected decoder: set method.stacks=decoder"
        )
    found: dict[Stack, PromptedStack] = {}
    if dims.encoder is not None and config.stacks != "decoder" and config.encoder_length:
        found["encoder"] = PromptedStack(dims.encoder, config.encoder_length)
    if config.stacks != "encoder" and config.decoder_length:
        found["decoder"] = PromptedStack(dims.decoder, config.decoder_length)
    return found


def stack_lengths(config: KeyValueConfig, dims: Dims) -> dict[Stack, int]:
    """Return the number of prompt tokens of each stack that gets some."""
    return {name: stack.length for name, stack in prompted_stacks(config, dims).items()}
