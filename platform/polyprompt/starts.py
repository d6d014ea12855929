"""Input prompts that start from class labels, a text, a file or another bundle's prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polyprompt import checkpoint
from polyprompt.backbone import Backbone
from polyprompt.config import MethodConfig
from polyprompt.errors import ConfigError
from polyprompt.method_configs import PromptStartConfig, TaskPromptConfig
from polyprompt.methods.base import Method
from polyprompt.tasks.records import Task, TextTask

#: prompt_tuning, dept and attempt; smop; mpt.
BUNDLE_PROMPTS = ("method.prompt_GPH", "method.prompts_RPH", "method.prompt_PH")


@torch.no_grad()
def start(config: MethodConfig, method: Method, backbone: Backbone, tasks: Sequence[Task | TextTask]) -> None:
    """Set the method's input prompts as `method.init` says, where that takes more than noise or the vocabulary.

    Only at the start of a run: one that goes on has its prompts from its bundle.
    Raises ConfigError naming what does not fit, BundleError for a bundle that is damaged or of another backbone.
    """
    prompts_GPH = method.input_prompts()
    if prompts_GPH is None or not isinstance(config, PromptStartConfig):
        return
    match config.init:
        case "labels":
            _labels(prompts_GPH, backbone, tasks)
        case "text":
            assert config.init_text is not None
            _texts(prompts_GPH, backbone, config.init_text)
        case "file":
            own = [task.name for task in tasks] if isinstance(config, TaskPromptConfig) and config.per_task else None
            prompts_GPH.copy_(_read(config, tuple(prompts_GPH.shape), own, backbone.identity()))


def _labels(prompts_GPH: Tensor, backbone: Backbone, tasks: Sequence[Task | TextTask]) -> None:
    """Lester et al. 2021, section 2.1: a choice of several pieces is their mean; what is left over stays vocabulary."""
    choices = [task.choices if isinstance(task, Task) else () for task in tasks]
    lacking = [task.name for task, own in zip(tasks, choices, strict=True) if not own]
    if lacking:
        raise ConfigError(
            f"method.init=labels needs tasks with choices of their own, but {', '.join(lacking)} have none; "
            "set method.init=vocabulary or text"
        )
    groups = choices if len(prompts_GPH) == len(tasks) else [tuple(dict.fromkeys(c for own in choices for c in own))]
    longest, length = max(map(len, groups)), prompts_GPH.shape[1]
    if longest > length:
        raise ConfigError(
            f"method.length={length} is too short for {longest} choices (method.init=labels); raise method.length to "
            f"{longest}, or set method.init=vocabulary"
        )
    for prompt_PH, own in zip(prompts_GPH, groups, strict=True):
        prompt_PH[: len(own)] = torch.stack([_embed(backbone, choice).mean(dim=0) for choice in own])


def _texts(prompts_GPH: Tensor, backbone: Backbone, given: str | list[str]) -> None:
    texts = [given] * len(prompts_GPH) if isinstance(given, str) else given
    if len(texts) != len(prompts_GPH):
        raise ConfigError(
            f"method.init_text has {len(texts)} texts for {len(prompts_GPH)} prompts; give one for each, or one text"
        )
    for prompt_PH, text in zip(prompts_GPH, texts, strict=True):
        words_NH = _embed(backbone, text)
        prompt_PH.copy_(words_NH[torch.arange(len(prompt_PH)) % len(words_NH)])


def _embed(backbone: Backbone, text: str) -> Tensor:
    pieces = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not pieces:
        raise ConfigError(f"method.init: the text {text!r} has no tokens; give words that the tokenizer knows")
    return backbone.model.get_input_embeddings().weight[torch.tensor(pieces)]


def _read(
    config: PromptStartConfig, shape: tuple[int, ...], tasks: Sequence[str] | None, backbone: Mapping[str, Any]
) -> Tensor:
    """Return prompts of the shape. tasks: whose prompts these are, in order, where each has its own. backbone: its
    identity; a bundle must be of it, of a plain file nothing is known but the width."""
    path = config.init_file
    assert path is not None
    if not path.exists():
        raise ConfigError(f"method.init_file={path} does not exist; give a bundle's folder or a .safetensors file")
    if path.is_dir():
        bundle = checkpoint.read(path)
        checkpoint.check_prompts(bundle, backbone, "method.init_file")
        found = {name: tensor for name, tensor in bundle.tensors.items() if name in BUNDLE_PROMPTS}
        theirs = bundle.config.method
        per_task = isinstance(theirs, TaskPromptConfig) and theirs.per_task
        names = bundle.config.task_names if per_task else None
    else:
        try:
            found, names = load_file(path), None
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"method.init_file={path} is no safetensors file ({error})") from error
    if len(found) != 1:
        raise ConfigError(
            f"method.init_file={path} must hold one tensor of prompts, but has {', '.join(sorted(found)) or 'none'}; "
            "give a bundle of prompt_tuning, smop, dept, attempt or mpt, or a file with one tensor"
        )
    (given,) = found.values()
    prompts = given[None] if given.ndim == 2 else given
    # The prompt of a single task is there for any task to start from.
    if names is not None and len(names) > 1 and tasks is not None:
        lacking = [task for task in tasks if task not in names]
        if lacking:
            raise ConfigError(
                f"method.init_file={path} has no prompts of {', '.join(lacking)}; its tasks are {', '.join(names)}. "
                "Give a bundle that has them, or one of a single task, whose prompt all of them take"
            )
        prompts = prompts[[names.index(task) for task in tasks]]
    if prompts.ndim != 3 or prompts.shape[1:] != shape[1:] or len(prompts) not in (1, shape[0]):
        raise ConfigError(
            f"method.init_file={path} holds {list(given.shape)}, expected {list(shape)}, or {list(shape[1:])} for all: "
            "set method.length and the number of prompts to fit, and use the backbone they were trained with"
        )
    return prompts.expand(shape)
