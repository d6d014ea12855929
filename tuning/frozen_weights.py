"""One copy of a search's frozen backbone for each node: its weights lie in Ray's object store, where every trial's
process reads them in place.

Without it, each process has pages of its own for what it does not keep as the file has it: weights in bf16 of a file in
fp32 (from a file of safetensors in the same precision they are the system's pages, which processes share anyway).
"""

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from polyprompt import backbone as backbones
from polyprompt.backbone_base import Backbone
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import RunConfig

#: Of the object store; the rest is for what Ray itself sends.
MAX_SHARE = 0.8
#: Takes part in run.log, as polyprompt's own do.
LOGGER = logging.getLogger("polyprompt.frozen_weights")
Array = npt.NDArray[Any]
Wanted = tuple[BackboneConfig, str, int | None]


@dataclass(frozen=True)
class FrozenWeights:
    """Loads backbones for trials, in place of backbone.load.

    wanted: config, precision, and the seed of drawn weights, of the backbone that is held. held: Ray's reference to its
    weights, name → array. why_not: why none are held ("" where they are).
    """

    wanted: Wanted
    held: Any = None
    why_not: str = ""

    def load(
        self,
        config: BackboneConfig,
        *,
        train: bool | Literal["layer_norms"],
        precision: Literal["fp32", "bf16"],
        seed: int,
    ) -> Backbone:
        """Return the backbone as backbone.load does, on the node's copy of its weights where there is one for it. The
        log says which."""
        why_not = self.why_not
        if not why_not and train is not False:
            why_not = "it is trained"
        if not why_not and _wanted(config, precision, seed) != self.wanted:
            why_not = "it is not that of the search's recipe"
        if why_not:
            LOGGER.warning("the backbone is loaded for this trial alone: %s", why_not)
            return backbones.load(config, train=train, precision=precision, seed=seed)
        frozen = {name: _tensor(array) for name, array in ray.get(self.held).items()}
        LOGGER.warning(
            "the backbone's weights are those in Ray's object store, one copy for all trials of this machine"
        )
        return backbones.load(config, train=False, precision=precision, seed=seed, frozen=frozen)


def room(run: RunConfig, num_parameters: int) -> int:
    """Return the bytes that an object store needs more for the weights of a run's backbone of so many parameters."""
    if run.train_backbone is not False:
        return 0
    return math.ceil(num_parameters * (2 if run.train.precision == "bf16" else 4) / MAX_SHARE)


def hold(run: RunConfig) -> FrozenWeights:
    """Put the weights of a run's backbone into Ray's object store, if it is frozen and they fit there. The caller, in
    Ray, keeps what is returned as long as trials start."""
    config, precision, seed = run.backbone, run.train.precision, run.train.seed
    wanted = _wanted(config, precision, seed)
    if run.train_backbone is not False:
        return FrozenWeights(wanted, why_not="it is trained")
    loaded = backbones.load(config, train=False, precision=precision, seed=seed)
    arrays = {name: _array(parameter.data) for name, parameter in loaded.named_parameters()}
    size = sum(array.nbytes for array in arrays.values())
    smallest = min(int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["Alive"])
    if size > MAX_SHARE * smallest:
        return FrozenWeights(
            wanted,
            why_not=f"its weights have {size:,} bytes, too many for an object store of {smallest:,} (ray start "
            "--object-store-memory)",
        )
    return FrozenWeights(wanted, held=ray.put(arrays))


def _wanted(config: BackboneConfig, precision: str, seed: int) -> Wanted:
    return config, precision, seed if config.init == "random" else None


def _array(weights: Tensor) -> Array:
    """numpy has no bf16: its bits go as whole numbers."""
    return (weights.view(torch.int16) if weights.dtype == torch.bfloat16 else weights).numpy()


def _tensor(array: Array) -> Tensor:
    with warnings.catch_warnings():
        # That it cannot be written is as it should be: nothing writes to frozen weights.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
