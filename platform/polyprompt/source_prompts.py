"""Prompts of earlier runs, for methods that build on them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyprompt import checkpoint
from polyprompt.checkpoint import Bundle
from polyprompt.config import AttemptConfig, MethodConfig, PromptTuningConfig
from polyprompt.errors import BundleError, ConfigError

#: Under this name the bundle of a run keeps its sources.
KEPT = "method.sources_JPH"


def read(config: MethodConfig, backbone: Mapping[str, Any], begun: Bundle | None = None) -> Tensor | None:
    """Return sources_JPH: every prompt of every bundle in method.sources, in that order; None for other methods.

    backbone: the identity of the backbone that they are to be used with. begun: the bundle that the run goes on from;
    it holds the sources, and method.sources is not read again. Raises BundleError where a bundle is damaged or of
    another backbone, ConfigError where there is none or it holds no prompts of method.length for the backbone as it
    was loaded.
    """
    if not isinstance(config, AttemptConfig) or not config.length:
        return None
    if begun is not None:
        if KEPT not in begun.tensors:
            raise BundleError(
                f"bundle {begun.folder} lacks the source prompts it was trained with: it was written by a version that "
                "did not keep them. Start a new run under another name, or use the version that wrote it"
            )
        return begun.tensors[KEPT]
    found = []
    for folder in config.sources:
        if not (folder / checkpoint.MANIFEST).is_file():
            raise ConfigError(
                f"method.sources: {folder} is no bundle; expected a step_… folder of a prompt_tuning run, such as "
                "runs/NAME/bundles/step_00001200"
            )
        bundle = checkpoint.read(folder)
        method = bundle.config.method
        if not isinstance(method, PromptTuningConfig):
            raise ConfigError(
                f"method.sources: {folder} is a bundle of method.name={method.name}; expected prompt_tuning. Name a "
                "step_… folder of a prompt_tuning run"
            )
        checkpoint.check_prompts(bundle, backbone, "method.sources")
        if method.length != config.length:
            raise ConfigError(
                f"method.sources: {folder} has prompts of length {method.length}, expected method.length="
                f"{config.length}. Set method.length={method.length}, or name other sources"
            )
        found.append(bundle.tensors["method.prompt_GPH"])
    return torch.cat(found)
