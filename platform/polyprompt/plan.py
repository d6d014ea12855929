"""Everything that is checked before anything expensive starts, and what a run will need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyprompt import backbone as backbones
from polyprompt import checkpoint, fingerprint, folding, later_tasks, methods, source_prompts, starts, step_time
from polyprompt.backbone_base import Backbone
from polyprompt.batches import task_weights
from polyprompt.checkpoint import Bundle
from polyprompt.config import RunConfig
from polyprompt.costs import inference_flops, median_lengths, training_flops
from polyprompt.data import AnyData, majority, prepare
from polyprompt.errors import BundleError, ConfigError
from polyprompt.methods.base import Method
from polyprompt.mixture import Mixture, rates
from polyprompt.model import PromptedModel, check_window, input_limit
from polyprompt.tasks import catalog
from polyprompt.tasks.records import Task, TextTask

#: `backbone.load`, or what stands in for it where a loaded backbone is at hand.
Load = Callable[..., Backbone]


@dataclass(frozen=True)
class Plan:
    """A checked run. backbone: its identity. inference_flops: of one row of median length. memory_bytes: estimated,
    one worker's, by part. step: what a training step of mean length has to do. shares: of the mixture."""

    backbone: Mapping[str, Any]
    data: Sequence[AnyData]
    num_trained_parameters: int
    num_method_parameters: int
    num_backbone_parameters: int
    inference_flops: int
    memory_bytes: Mapping[str, int]
    step: step_time.Load
    shares: Mapping[str, float]
    majority: Mapping[str, Mapping[str, float]]


def build(
    config: RunConfig, bundle: Bundle | None = None, load: Load | None = None
) -> tuple[PromptedModel, Sequence[AnyData]]:
    """Build the model (CPU) and the tokenised data. The same on every process.

    bundle: of this run, to go on from: it holds all that the method was given and learned, so that no source or start
    is read again. None: initial weights from the seed. load: None: backbone.load, as always
    for tasks that are added to an earlier bundle.
    Raises ConfigError, DataError or BundleError naming what does not fit. Data in the cache is not read again.
    """
    tasks = catalog.resolve(config)
    model = (
        _with_new_tasks(config, bundle, tasks)
        if config.init
        else model_of(config, len(config.tasks), bundle, load or backbones.load)
    )
    backbone, method = model.backbone, model.method
    limit = input_limit(config, backbone, method)
    for task in tasks:
        if isinstance(task, TextTask):
            check_window(config, task, backbone, method)
    if bundle is None and config.init is None:
        starts.start(config.method, method, backbone, tasks)
    if not model.named_groups():
        raise ConfigError(
            f"nothing is trained: method.name={config.method.name} has no parameters at this length and the backbone "
            "is frozen. Raise the prompt's length, or set backbone.trainable=true"
        )
    _check_groups(config, model)
    data = prepare(config, tasks, backbone.tokenizer, max_input_tokens=limit)
    return model, data


def _with_new_tasks(config: RunConfig, bundle: Bundle | None, tasks: Sequence[Task | TextTask]) -> PromptedModel:
    """Build the model of an earlier bundle with tasks added, of which alone anything is trained.

    tasks: the new ones. bundle: of this run, to go on from. Raises as `build` does, and BundleError should the old
    tasks' outputs differ by a bit.
    """
    num_old, names = config.num_old_tasks, config.task_names
    if bundle is not None:
        model = model_of(config, len(names), bundle)
        fewer = later_tasks.method_of(config, model.backbone.dims(num_old), bundle)
        later_tasks.freeze(model, later_tasks.task_axes(config, model.method, fewer), num_old)
        return model
    base = later_tasks.begun(config)
    old = model_of(config, num_old, base)
    method = later_tasks.method_of(config, old.backbone.dims(len(names)), base)
    axes = later_tasks.task_axes(config, method, old.method)
    taken = fingerprint.take(old, names[:num_old], config.train.precision)
    model = PromptedModel(old.backbone, method)
    starts.start(config.method, method, old.backbone, tasks, first=num_old)
    later_tasks.take_over(model, axes, base.tensors)
    if not fingerprint.check(model, taken, names, config.train.precision, f"init.from={base.folder}"):
        raise BundleError(
            f"init.from={base.folder}: with {', '.join(names[num_old:])} added, the old tasks' outputs are not equal "
            "to the last bit. This is a fault of polyprompt's: please report it with the recipe"
        )
    model.fingerprint = {
        **taken,
        fingerprint.OF: [base.weights, *base.state.get(fingerprint.KEPT, {}).get(fingerprint.OF, [])],
    }
    later_tasks.freeze(model, axes, num_old)
    return model


def _check_groups(config: RunConfig, model: PromptedModel) -> None:
    groups = model.named_groups()
    for stranger in config.train.group_learning_rates.keys() - groups.keys():
        raise ConfigError(
            f"train.group_learning_rates: {stranger} is no group of what method.name={config.method.name} trains here; "
            f"its groups are {', '.join(groups)}. Drop {stranger}"
            + (", or set backbone.trainable=true" if stranger == "backbone" else "")
        )


def model_of(
    config: RunConfig, num_tasks: int, bundle: Bundle | None = None, load: Load = backbones.load
) -> PromptedModel:
    """Build the model (CPU), with what the bundle holds, or initial weights from the seed.

    Raises ConfigError naming what does not fit, BundleError for a bundle of another backbone.
    """
    backbone = load(
        config.backbone, train=config.train_backbone, precision=config.train.precision, seed=config.train.seed
    )
    if bundle is not None:
        checkpoint.check_backbone(bundle, backbone.identity())
    method: Method
    if bundle is not None and bundle.folded is not None:
        tables = folding.tables_of(bundle.tensors, bundle.folded["names"])
        method = folding.Folded(tables, bundle.folded["texts"])
    else:
        method = methods.build(
            config.method,
            backbone.dims(num_tasks),
            seed=config.train.seed,
            sources_JPH=source_prompts.read(config.method, backbone.identity(), bundle),
        )
    model = PromptedModel(backbone, method)
    if bundle is not None:
        model.load_trained_state(bundle.tensors)
        model.fingerprint = bundle.state.get(fingerprint.KEPT)
        if model.fingerprint is not None:
            fingerprint.check(model, model.fingerprint, config.task_names, config.train.precision, str(bundle.folder))
    return model


def plan(config: RunConfig, bundle: Bundle | None = None, load: Load | None = None) -> Plan:
    """Check everything that can be checked without training. bundle, load, errors: as of `build`."""
    model, data = build(config, bundle, load)
    counts = model.num_parameters()
    sizes = [len(task.train) for task in data]
    mixture = Mixture(rates(config.mixture, sizes, task_weights(config, data)), sizes, config.train.seed)
    names = [task.task.name for task in data]
    return Plan(
        backbone=model.backbone.identity(),
        data=data,
        num_trained_parameters=counts.trained,
        num_method_parameters=counts.method,
        num_backbone_parameters=counts.backbone,
        inference_flops=inference_flops(model, *median_lengths(data)),
        memory_bytes=memory(config, model, data),
        step=_step(config, model, data, mixture.realised_shares()),
        shares=dict(zip(names, mixture.realised_shares(), strict=True)),
        majority={task.task.name: majority(task) for task in data},
    )


def _step(config: RunConfig, model: PromptedModel, data: Sequence[AnyData], shares: Sequence[float]) -> step_time.Load:
    """Return the load of a step: each task's rows at their mean length, padding left out."""
    whole = config.train_backbone is True
    flops = sum(
        share * training_flops(model, *_mean_lengths(task), whole=whole)
        for task, share in zip(data, shares, strict=True)
        if share > 0
    )
    trained = sum(p.numel() for members in model.named_groups().values() for _, p in members)
    return step_time.load(
        config, flops_of_a_row=flops, hidden=model.backbone.dims(1).hidden, num_trained_parameters=trained
    )


def _mean_lengths(task: AnyData) -> tuple[int, int]:
    inputs, targets = task.train.input_lengths, task.train.target_lengths
    return round(float(inputs.mean())), round(float(targets.mean()))


def memory(config: RunConfig, model: PromptedModel, data: Sequence[AnyData]) -> dict[str, int]:
    """Estimate the bytes one worker needs while training, by part.

    Activations: 34·tokens·H + 5·N·tokens² bytes a layer in half precision (Korthikanti et al. 2022, "Reducing
    activation recomputation in large transformer models", eq. 2), twice that in fp32, for the longest micro-batch that
    the data allow; with gradient checkpointing 2·tokens·H a layer and one whole layer. A coarse upper bound: real
    batches are shorter than the longest row.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    elements = sum(p.numel() for p in trained)
    moments = elements * 8 if config.train.optimizer == "adamw" else sum(_adafactor_bytes(p) for p in trained)
    rows = -(-config.train.batch_size // config.train.num_shards)
    rows = -(-rows // config.train.gradient_accumulation_steps)
    length = max(task.train.longest[0] for task in data) + model.method.input_length
    dims = model.backbone.dims(len(data))
    targets = max(task.train.longest[1] for task in data)
    half = 0
    for stack, tokens in (
        (dims.encoder, length),
        # A decoder-only model has input and target in one sequence.
        (dims.decoder, targets if dims.encoder is not None else length + targets),
    ):
        if stack is not None:
            layer = 34 * tokens * dims.hidden + 5 * model.backbone.num_query_heads * tokens**2
            kept = 2 * tokens * dims.hidden
            layers = stack.num_layers
            half += rows * (kept * layers + layer if config.backbone.gradient_checkpointing else layer * layers)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": moments,
        "gradient sum": elements * 8 if config.compute.gradient_sum == "exact" else 0,
        "activations": half * (1 if config.train.precision == "bf16" else 2),
    }


def _adafactor_bytes(parameter: torch.Tensor) -> int:
    """Factored second moments: one row and one column (Shazeer & Stern 2018, section 3)."""
    if parameter.ndim < 2:
        return parameter.numel() * 4
    *lead, rows, columns = parameter.shape
    return int(torch.Size(lead).numel()) * (rows + columns) * 4
