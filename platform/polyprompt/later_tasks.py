"""Tasks added to a trained bundle: their own parameters are trained, everything else stays as it is, bit for bit.

What belongs to a task shows in the shapes: a parameter's tasks lie along the dimension in which a method of fewer tasks
is smaller. A parameter without such a dimension is shared, and frozen.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polyprompt import checkpoint, methods, source_prompts
from polyprompt.checkpoint import Bundle
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, Method
from polyprompt.model import PromptedModel
from polyprompt.task_configs import TaskConfig, TaskEntry

#: Keys that decide what a model answers, beside those of the sections backbone and method.
ANSWERING = ("data.max_input_tokens", "data.max_target_tokens", "train.precision", "evaluate.mode")
#: Keys of these sections that do not: where the backbone is (its content is compared), and how parameters start.
FREE = {
    *(f"backbone.{key}" for key in ("name", "revision", "gguf_file", "dropout", "gradient_checkpointing")),
    *(f"method.{key}" for key in ("init", "init_std", "init_text", "init_file", "task_std", "sources", "teachers")),
    *(f"method.distillation_{key}" for key in ("weight", "temperature")),
}


def begun(config: RunConfig) -> Bundle:
    """Open the bundle that the config adds tasks to.

    Raises ConfigError where there is none, or it is of another method, other old tasks or another form of answer;
    BundleError where it is damaged.
    """
    assert config.init is not None
    folder = config.init.bundle
    if not (folder / checkpoint.MANIFEST).is_file():
        raise ConfigError(f"init.from={folder} is no bundle; expected a step_… folder, runs/NAME/bundles/step_00001200")
    bundle = checkpoint.read(folder)
    if bundle.folded is not None:
        raise ConfigError(f"init.from={folder} is folded; name the bundle that it was made of")
    theirs, ours = bundle.config.flat(), config.flat()
    keys = [key for key in sorted(theirs.keys() | ours.keys()) if _decides(key) and theirs.get(key) != ours.get(key)]
    if keys:
        told = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys[:4])
        raise ConfigError(f"init.from={folder} was trained otherwise ({told}). Set the values that it was trained with")
    old = config.tasks[: config.num_old_tasks]
    if [_form(task) for task in old] != [_form(task) for task in bundle.config.tasks]:
        raise ConfigError(
            f"tasks: those before init.new_tasks must be the tasks of init.from, in its order and as they were: "
            f"{', '.join(bundle.config.task_names)}; they are {', '.join(config.task_names[: len(old)])}"
        )
    return bundle


def _decides(key: str) -> bool:
    return key in ANSWERING or (key.startswith(("backbone.", "method.")) and key not in FREE)


def _form(entry: TaskEntry) -> object:
    """Return what the model sees of a task; its data may be elsewhere now, or nowhere."""
    if isinstance(entry, TaskConfig):
        return entry.name, entry.input, entry.target, entry.labels, entry.choices
    return entry if isinstance(entry, str) else entry.name


def task_axes(config: RunConfig, method: Method, fewer: Method) -> dict[str, int]:
    """Return each parameter of the method that has a part for each task → the dimension of the tasks.

    fewer: the same method for fewer tasks. Raises ConfigError for a method that has no such parameter.
    """
    smaller = {name: parameter.shape for name, parameter in fewer.named_parameters()}
    axes = {}
    for name, parameter in method.named_parameters():
        pairs = zip(parameter.shape, smaller.get(name, parameter.shape), strict=True)
        differing = [axis for axis, (all_tasks, old_tasks) in enumerate(pairs) if all_tasks != old_tasks]
        if differing:
            (axes[name],) = differing
    if not axes:
        raise ConfigError(
            f"init.new_tasks: method.name={config.method.name}, as it is set here, has no parameters that belong to "
            "one task alone, so that training any of them would change the old tasks. Train on old and new tasks "
            "together (without init), or begin with a run whose method has such: hyperprompt, hyperformer, mpt; "
            "prompt_tuning, prefix_tuning, p_tuning, dept, attempt, adapter with method.per_task=true; smop, "
            "routed_hyperprompt with method.router=per_task"
        )
    return axes


def method_of(config: RunConfig, dims: Dims, known: Bundle) -> Method:
    """Return the config's method with starting values. known: a bundle of the run, or the one that it begins with."""
    return methods.build(
        config.method, dims, seed=config.train.seed, sources_JPH=known.tensors.get(source_prompts.KEPT)
    )


@torch.no_grad()
def take_over(model: PromptedModel, axes: Mapping[str, int], learned: Mapping[str, Tensor]) -> None:
    """Set the method as the bundle's tensors say, but for the new tasks' parts, which stay as they start."""
    for name, tensor in model.method.state_dict(keep_vars=True).items():
        old = learned[f"method.{name}"]
        part = tensor.narrow(axes[name], 0, old.shape[axes[name]]) if name in axes else tensor
        part.copy_(old)


def freeze(model: PromptedModel, axes: Mapping[str, int], num_old: int) -> None:
    """Leave nothing to train but the parts of the tasks behind the first `num_old`, which callers then call 0, 1, …"""
    model.requires_grad_(False)
    for name, axis in axes.items():
        path, _, last = name.rpartition(".")
        module = model.method.get_submodule(path)
        behind = _Behind(getattr(module, last), axis, num_old)
        parametrize.register_parametrization(module, last, behind)
        module.get_parameter(f"parametrizations.{last}.original").requires_grad_()
    model.first_task = num_old


class _Behind(nn.Module):
    """The old tasks' part, fixed, and behind it the new tasks', which alone is a parameter."""

    old: Tensor

    def __init__(self, whole: Tensor, axis: int, num_old: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("old", whole.detach().narrow(axis, 0, num_old).clone(), persistent=False)

    def forward(self, new: Tensor) -> Tensor:
        return torch.cat([self.old, new], dim=self.axis)

    def right_inverse(self, whole: Tensor) -> Tensor:
        num_old = self.old.shape[self.axis]
        return whole.detach().narrow(self.axis, num_old, whole.shape[self.axis] - num_old).clone()
