"""The methods by name: `build` makes one, `expected_parameters` counts it from its formula."""

from dataclasses import replace

import torch
from torch import Tensor

from polyprompt.config import (
    AdapterConfig,
    AttemptConfig,
    DePTConfig,
    FullConfig,
    HyperFormerConfig,
    HyperPromptConfig,
    LoRAConfig,
    MethodConfig,
    MPTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RoutedHyperPromptConfig,
    SMoPConfig,
)
from polyprompt.method_configs import RoutingConfig
from polyprompt.methods.adapter import Adapter
from polyprompt.methods.attempt import Attempt
from polyprompt.methods.base import Dims, Method, StackDims
from polyprompt.methods.dept import DePT
from polyprompt.methods.full import Full
from polyprompt.methods.hyperformer import HyperFormer
from polyprompt.methods.hyperprompt import HyperPrompt
from polyprompt.methods.lora import LoRA
from polyprompt.methods.mpt import MPT
from polyprompt.methods.p_tuning import PTuning
from polyprompt.methods.prefix_tuning import PrefixTuning
from polyprompt.methods.prompt_tuning import PromptTuning
from polyprompt.methods.routed_hyperprompt import RoutedHyperPrompt
from polyprompt.methods.smop import SMoP
from polyprompt.methods.stacks import PromptedStack, prompted_stacks


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
                return SMoP(config, dims, seed=seed)
            case HyperPromptConfig():
                return HyperPrompt(config, dims)
            case RoutedHyperPromptConfig():
                return RoutedHyperPrompt(config, dims)
            case PrefixTuningConfig():
                return PrefixTuning(config, dims)
            case PTuningConfig():
                return PTuning(config, dims)
            case DePTConfig():
                return DePT(config, dims, seed=seed)
            case AttemptConfig():
                return Attempt(config, dims, sources_JPH, seed=seed)
            case MPTConfig():
                return MPT(config, dims, sources_JPH, seed=seed)
            case AdapterConfig():
                return Adapter(config, dims)
            case HyperFormerConfig():
                return HyperFormer(config, dims)
            case LoRAConfig():
                return LoRA(config, seed=seed)


def expected_parameters(config: MethodConfig, dims: Dims) -> int:
    """Return the number of the method's own parameters by the formula of its docstring, without building it."""
    h, num_tasks = dims.hidden, dims.num_tasks
    match config:
        case FullConfig():
            return 0
        case PromptTuningConfig(length=length):
            return (num_tasks if config.per_task else 1) * length * h
        case SMoPConfig(num_prompts=r, length=length):
            return r * length * h + _routers(config, dims) if length else 0
        case HyperPromptConfig():
            return sum(_hyperprompt(config, dims, stack, num_tasks) for stack in prompted_stacks(config, dims).values())
        case RoutedHyperPromptConfig(num_prompts=r):
            known = dims if config.hypernetworks_know_task else replace(dims, num_tasks=1)
            made = sum(_hyperprompt(config, known, stack, r) for stack in prompted_stacks(config, dims).values())
            return made + _routers(config, dims) if made else 0
        case PrefixTuningConfig():
            return sum(_prefix_tuning(config, dims, stack) for stack in prompted_stacks(config, dims).values())
        case PTuningConfig(length=length, encoder_hidden_size=e, lstm_layers=n):
            lstm = 8 * e * (h + e + 2) + (n - 1) * 8 * e * (3 * e + 2) + (2 * e + 1) * 2 * e + (2 * e + 1) * h
            mlp = (h + 1) * e + (e + 1) * e + (e + 1) * h
            tokens = (num_tasks if config.per_task else 1) * length * h
            return tokens + (lstm if config.encoder == "lstm" else mlp) if length else 0
        case DePTConfig(length=length, rank=r, max_positions=s):
            return (num_tasks if config.per_task else 1) * (length * h + r * (s + h))
        case AttemptConfig(length=length, bottleneck=m):
            return (num_tasks if config.per_task else 1) * length * h + 2 * h * m + 2 * h if length else 0
        case MPTConfig(length=length):
            return length * h + num_tasks * (length + h) if length else 0
        case AdapterConfig(bottleneck=r):
            layers = sum(stack.num_layers for stack in (dims.encoder, dims.decoder) if stack is not None)
            places = 2 if config.variant == "houlsby" else 1
            return (num_tasks if config.per_task else 1) * layers * places * (2 * h * r + r + h) if r else 0
        case HyperFormerConfig():
            stacks = [stack for stack in (dims.encoder, dims.decoder) if stack is not None]
            return num_tasks * config.task_embedding_size + sum(_hyperformer(config, dims, stack) for stack in stacks)
        case LoRAConfig():
            return 0  # it gets its parameters where it is joined to a backbone, by the backbone's modules


def _routers(config: RoutingConfig, dims: Dims) -> int:
    return (dims.num_tasks if config.router == "per_task" else 1) * dims.hidden * config.num_prompts


def _hyperprompt(
    config: HyperPromptConfig | RoutedHyperPromptConfig, dims: Dims, prompted: PromptedStack, num_prompts: int
) -> int:
    stack, length = prompted
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


def _prefix_tuning(config: PrefixTuningConfig, dims: Dims, prompted: PromptedStack) -> int:
    stack, length = prompted
    rows = (dims.num_tasks if config.per_task else 1) * length
    width = 2 * stack.num_layers * stack.num_heads * stack.head_dim
    h, e = dims.hidden, config.mlp_hidden_size
    return rows * width if config.reparameterisation == "none" else rows * h + (h + 1) * e + (e + 1) * width


def _hyperformer(config: HyperFormerConfig, dims: Dims, stack: StackDims) -> int:
    t, t_, e = config.projected_embedding_size, config.task_embedding_size, config.mlp_hidden_size
    h, r = dims.hidden, dims.hidden // config.reduction
    joint = (stack.num_layers + 2) * t_ + (3 * t_ + 1) * e + (e + 1) * t + 2 * t
    return joint + (t + 1) * (2 * h * r + r + 3 * h)
