"""Prompts of earlier runs, for methods that build on them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyprompt import checkpoint
from polyprompt.checkpoint import Bundle
from polyprompt.config import AttemptConfig, MethodConfig, MPTConfig, PromptTuningConfig
from polyprompt.errors import BundleError, ConfigError

#: Under this name the bundle of a run keeps its sources.
KEPT = "method.sources_JPH"


def read(
    config: MethodConfig, tasks: Sequence[str], backbone: Mapping[str, Any], begun: Bundle | None = None
) -> Tensor | None:
    """Return sources_JPH; None for methods without any.

    ATTEMPT's: every prompt of every bundle in method.sources, in that order. MPT's: in the order of the tasks, the
    prompt of each out of method.teachers.

    backbone: the identity of the backbone that they are to be used with. begun: the bundle that the run goes on from;
    it holds the sources, and the other bundles are not read again. Raises BundleError where a bundle is damaged or of
    another backbone, ConfigError where there is none, it holds no prompts of method.length for the backbone as it
    was loaded, or a task has no teacher or two.
    """
    wanted = (isinstance(config, AttemptConfig) and config.length) or (
        isinstance(config, MPTConfig) and config.teachers
    )
    if begun is not None:
        if wanted and KEPT not in begun.tensors:
            raise BundleError(
                f"bundle {begun.folder} lacks the source prompts it was trained with: it was written by a version that "
                "did not keep them. Start a new run under another name, or use the version that wrote it"
            )
        return begun.tensors.get(KEPT)
    if not wanted:
        return None
    if isinstance(config, AttemptConfig):
        bundles = _prompts(config.sources, "method.sources", config.length, backbone)
        return torch.cat([prompts_GPH for _, prompts_GPH in bundles])
    assert isinstance(config, MPTConfig)
    teachers: dict[str, Tensor] = {}
    for bundle, prompts_GPH in _prompts(config.teachers, "method.teachers", config.length, backbone):
        for place, name in enumerate(bundle.config.task_names):
            if name in teachers and name in tasks:
                raise ConfigError(
                    f"method.teachers: {bundle.folder} is a second teacher of {name}; leave one of the two out"
                )
            teachers[name] = prompts_GPH[place if len(prompts_GPH) > 1 else 0]
    lacking = [name for name in tasks if name not in teachers]
    if lacking:
        raise ConfigError(
            f"method.teachers has no prompt of {', '.join(lacking)}, only of {', '.join(teachers)}; add a bundle of a "
            "prompt_tuning run on each of these tasks"
        )
    return torch.stack([teachers[name] for name in tasks])


def _prompts(
    folders: Sequence[Path], key: str, length: int, backbone: Mapping[str, Any]
) -> Iterator[tuple[Bundle, Tensor]]:
    """Yield each bundle with its prompts_GPH. key: of the config, for errors."""
    for folder in folders:
        if not (folder / checkpoint.MANIFEST).is_file():
            raise ConfigError(
                f"{key}: {folder} is no bundle; expected a step_… folder of a prompt_tuning run, such as "
                "runs/NAME/bundles/step_00001200"
            )
        bundle = checkpoint.read(folder)
        method = bundle.config.method
        if not isinstance(method, PromptTuningConfig):
            raise ConfigError(
                f"{key}: {folder} is a bundle of method.name={method.name}; expected prompt_tuning. Name a "
                "step_… folder of a prompt_tuning run"
            )
        checkpoint.check_prompts(bundle, backbone, key)
        if method.length != length:
            raise ConfigError(
                f"{key}: {folder} has prompts of length {method.length}, expected method.length={length}. "
                f"Set method.length={method.length}, or name others"
            )
        yield bundle, bundle.tensors["method.prompt_GPH"]
