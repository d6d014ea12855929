"""compute.strategy=fsdp: each worker keeps a part of every parameter, its gradient and its moments (torch's FSDP2).

A layer is whole only while it runs: its parameters are gathered from all workers before, and its gradients are summed
and cut up behind. What is in no layer (embeddings, the method) is whole from the forward to the backward pass.
Bundles hold whole tensors, so that they are those of any strategy and any number of workers.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from polyprompt.model import PromptedModel

Precision = Literal["fp32", "bf16"]


def shard(model: PromptedModel, precision: Precision, device: torch.device, num_workers: int) -> None:
    """Cut up a model on the CPU, on all workers at once; what is left of it is on the device.

    Layers compute in the precision; what is around them stays as it is, so that prompts are made as precisely as ever.
    Gradients are summed in fp32.
    """
    mesh = init_device_mesh(device.type, (num_workers,))
    kind = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = model.backbone.blocks()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # What a layer and the method both hold (LoRA) has been cut up with the layer.
    inside = {parameter for block in blocks for parameter in block.parameters()}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=inside)
    # What is gathered next in a backward pass. Torch takes it from the forward passes since the last one, and of these
    # workers have different ones while they evaluate: their gathers would not match.
    parts: list[Any] = [model, *blocks, model]
    for earlier, later in pairwise(parts):
        later.set_modules_to_backward_prefetch([earlier])
    model.to(device)  # buffers


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While inside, every worker has all of the model, and uses it without the others: as often as it likes.

    All workers must come in and go out. Of a model that is not cut up nothing changes.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)
            part.reshard()


def gather(tree: Any, keep: bool) -> Any:
    """Return the tree with the parts of its tensors put together, on the CPU; None for them where not to be kept.

    All workers must call it. Tensors that are not cut up stay as they are.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        put_together = leaf.full_tensor()
        return put_together.cpu() if keep else None

    return tree_map(one, tree)


def cut(state: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """Return an optimizer's state with the moments cut up as the parameters are, which are given in its order."""

    def of(parameter: nn.Parameter | None, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    own = dict(enumerate(parameters))
    cut_up = {at: {key: of(own.get(at), value) for key, value in kept.items()} for at, kept in state["state"].items()}
    return {**state, "state": cut_up}


def number(value: Tensor) -> float:
    """Return a scalar that all workers have a part in."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def cast(model: PromptedModel, precision: Precision) -> None:
    """Give the layers the precision that they are gathered in."""
    if precision == "bf16":
        for module in (part for block in model.backbone.blocks() for part in block.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                kind = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad)
                module.register_parameter(name, kind)


def gathered_bytes(parameters: Iterable[Tensor], precision: Precision | None) -> int:
    """Return the bytes of whole parameters; precision: of a layer's."""
    return sum(p.numel() * (2 if precision == "bf16" else p.element_size()) for p in parameters)


def whole_bytes(model: PromptedModel, precision: Precision) -> int:
    """Return the bytes of the model inside `whole`."""
    inside = {p for block in model.backbone.blocks() for p in block.parameters()}
    root = [p for p in model.parameters() if p not in inside]
    return gathered_bytes(inside, precision) + gathered_bytes(root, None)
