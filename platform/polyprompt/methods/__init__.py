"""The methods by name: `build` makes one, `expected_parameters` counts it from its formula."""

import torch
from torch import Tensor

from polyprompt.config import (
    AttemptConfig,
    DePTConfig,
    FullConfig,
    HyperPromptConfig,
    MethodConfig,
    MPTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SMoPConfig,
)
from polyprompt.methods.attempt import Attempt
from polyprompt.methods.base import Dims, Method, StackDims
from polyprompt.methods.dept import DePT
from polyprompt.methods.full import Full
from polyprompt.methods.hyperprompt import HyperPrompt
from polyprompt.methods.mpt import MPT
from polyprompt.methods.p_tuning import PTuning
from polyprompt.methods.prefix_tuning import PrefixTuning
from polyprompt.methods.prompt_tuning import PromptTuning
from polyprompt.methods.smop import SMoP


def build(config: MethodConfig, dims: Dims, *, seed: int, sources_JPH: Tensor | None = None) -> Method:
    """Return the method with starting values drawn under the seed; torch's global stream is left as it was.

    sources_JPH: prompts of earlier runs, for the methods that build on them (see source_prompts.read).
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
                return SMoP(config, dims)
            case HyperPromptConfig():
                return HyperPrompt(config, dims)
            case PrefixTuningConfig():
                return PrefixTuning(config, dims)
            case PTuningConfig():
                return PTuning(config, dims)
            case DePTConfig():
                return DePT(config, dims, seed=seed)
            case AttemptConfig():
                return Attempt(config, dims, sources_JPH, seed=seed)
            case MPTConfig():
                return MPT(config, dims, seed=seed)


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
            encoder = (
                0 if config.stacks == "decoder" else _hyperprompt(config, dims, dims.encoder, config.encoder_length)
            )
            decoder = (
                0 if config.stacks == "encoder" else _hyperprompt(config, dims, dims.decoder, config.decoder_length)
            )
            return encoder + decoder
        case PrefixTuningConfig(stacks=stacks):
            return sum(
                _prefix_tuning(config, dims, stack, length)
                for stack, length, left_out in (
                    (dims.encoder, config.encoder_length, stacks == "decoder"),
                    (dims.decoder, config.decoder_length, stacks == "encoder"),
                )
                if not left_out
            )
        case PTuningConfig(length=length, encoder_hidden_size=e, lstm_layers=n):
            h = dims.hidden
            lstm = 8 * e * (h + e + 2) + (n - 1) * 8 * e * (3 * e + 2) + (2 * e + 1) * 2 * e + (2 * e + 1) * h
            mlp = (h + 1) * e + (e + 1) * e + (e + 1) * h
            tokens = (dims.num_tasks if config.per_task else 1) * length * h
            return tokens + (lstm if config.encoder == "lstm" else mlp) if length else 0
        case DePTConfig(length=length, rank=r, max_positions=s):
            return (dims.num_tasks if config.per_task else 1) * (length * dims.hidden + r * (s + dims.hidden))
        case AttemptConfig(length=length, bottleneck=m):
            prompts = (dims.num_tasks if config.per_task else 1) * length * dims.hidden
            return prompts + 2 * dims.hidden * m + 2 * dims.hidden if length else 0
        case MPTConfig(length=length):
            return length * dims.hidden + dims.num_tasks * (length + dims.hidden) if length else 0


def _hyperprompt(config: HyperPromptConfig, dims: Dims, stack: StackDims | None, length: int) -> int:
    if stack is None or length == 0:
        return 0
    h, k, m = dims.hidden, dims.num_tasks, stack.num_layers
    pair = 2 * (h // config.reduction) * (h + stack.num_heads * stack.head_dim)
    t, t_, e = config.layer_task_embedding_size, config.task_embedding_size, config.mlp_hidden_size
    match config.variant:
        case "share":
            return h * length * k + m * pair
        case "sep":
            return h * length * k + m * k * pair
        case "global":
            return h * length * k + t * pair + k * t_ + m * t_ + (2 * t_ + t) * e


def _prefix_tuning(config: PrefixTuningConfig, dims: Dims, stack: StackDims | None, length: int) -> int:
    if stack is None or length == 0:
        return 0
    rows = (dims.num_tasks if config.per_task else 1) * length
    width = 2 * stack.num_layers * stack.num_heads * stack.head_dim
    h, e = dims.hidden, config.mlp_hidden_size
    return rows * width if config.reparameterisation == "none" else rows * h + (h + 1) * e + (e + 1) * width
