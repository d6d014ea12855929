"""The methods by name: `build` makes one, `expected_parameters` counts it from its formula."""

from dataclasses import replace

import torch

from polyprompt.config import (
    FullConfig,
    HyperPromptConfig,
    MethodConfig,
    PromptTuningConfig,
    RoutedHyperPromptConfig,
    SMoPConfig,
)
from polyprompt.methods.base import Dims, Method, StackDims
from polyprompt.methods.full import Full
from polyprompt.methods.hyperprompt import HyperPrompt
from polyprompt.methods.prompt_tuning import PromptTuning
from polyprompt.methods.routed_hyperprompt import RoutedHyperPrompt
from polyprompt.methods.smop import SMoP


def build(config: MethodConfig, dims: Dims, *, seed: int) -> Method:
    """Return the method with starting values drawn under the seed; torch's global stream is left as it was.

    Raises ConfigError naming field, value and range where the config does not fit the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        match config:
            case FullConfig():
                return Full()
            case PromptTuningConfig():
                return PromptTuning(config, dims, seed=seed)
            case SMoPConfig():
                return SMoP(config, dims, seed=seed)
            case HyperPromptConfig():
                return HyperPrompt(config, dims)
            case RoutedHyperPromptConfig():
                return RoutedHyperPrompt(config, dims)


def expected_parameters(config: MethodConfig, dims: Dims) -> int:
    """Return the number of the method's own parameters by the formula of its docstring, without building it."""
    match config:
        case FullConfig():
            return 0
        case PromptTuningConfig(length=length):
            return (dims.num_tasks if config.per_task else 1) * length * dims.hidden
        case SMoPConfig(num_prompts=r, length=length):
            num_routers = dims.num_tasks if config.router == "per_task" else 1
            return (r * length * dims.hidden + num_routers * dims.hidden * r) if length else 0
        case HyperPromptConfig():
            return _both_stacks(config, dims, dims.num_tasks)
        case RoutedHyperPromptConfig(num_prompts=r):
            known = dims if config.hypernetworks_know_task else replace(dims, num_tasks=1)
            made = _both_stacks(config, known, r)
            num_routers = dims.num_tasks if config.router == "per_task" else 1
            return made + num_routers * dims.hidden * r if made else 0


def _both_stacks(config: HyperPromptConfig | RoutedHyperPromptConfig, dims: Dims, num_prompts: int) -> int:
    made = 0
    if config.stacks != "decoder":
        made += _hyperprompt(config, dims, dims.encoder, config.encoder_length, num_prompts)
    if config.stacks != "encoder":
        made += _hyperprompt(config, dims, dims.decoder, config.decoder_length, num_prompts)
    return made


def _hyperprompt(
    config: HyperPromptConfig | RoutedHyperPromptConfig,
    dims: Dims,
    stack: StackDims | None,
    length: int,
    num_prompts: int,
) -> int:
    if stack is None or length == 0:
        return 0
    h, k, m = dims.hidden, dims.num_tasks, stack.num_layers
    pair = 2 * (h // config.reduction) * (h + stack.num_heads * stack.head_dim)
    t, t_, e = config.layer_task_embedding_size, config.task_embedding_size, config.mlp_hidden_size
    match config.variant:
        case "share":
            return h * length * num_prompts + m * pair
        case "sep":
            return h * length * num_prompts + m * k * pair
        case "global":
            return h * length * num_prompts + t * pair + k * t_ + m * t_ + (2 * t_ + t) * e
