"""Everything that is checked before anything expensive starts, and what a run will need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyprompt import backbone as backbones
from polyprompt import checkpoint, methods, source_prompts, starts
from polyprompt.batches import task_weights
from polyprompt.checkpoint import Bundle
from polyprompt.config import RunConfig
from polyprompt.costs import inference_flops, median_lengths
from polyprompt.data import AnyData, majority, prepare
from polyprompt.errors import ConfigError
from polyprompt.mixture import Mixture, rates
from polyprompt.model import PromptedModel, check_window, input_limit
from polyprompt.tasks import catalog
from polyprompt.tasks.records import TextTask


@dataclass(frozen=True)
class Plan:
    """A checked run. backbone: its identity. inference_flops: of one row of median length. memory_bytes: estimated,
    one worker's, by part. shares: of the mixture."""

    backbone: Mapping[str, Any]
    data: Sequence[AnyData]
    num_trained_parameters: int
    num_method_parameters: int
    num_backbone_parameters: int
    inference_flops: int
    memory_bytes: Mapping[str, int]
    shares: Mapping[str, float]
    majority: Mapping[str, Mapping[str, float]]


def build(config: RunConfig, bundle: Bundle | None = None) -> tuple[PromptedModel, Sequence[AnyData]]:
    """Build the model (CPU) and the tokenised data. The same on every process.

    bundle: of this run, to go on from: it holds all that the method was given and learned, so that no source or start
    is read again. None: initial weights from the seed.
    Raises ConfigError, DataError or BundleError naming what does not fit. Data in the cache is not read again.
    """
    tasks = catalog.resolve(config)
    model = model_of(config, len(tasks), bundle)
    backbone, method = model.backbone, model.method
    limit = input_limit(config, backbone, method)
    for task in tasks:
        if isinstance(task, TextTask):
            check_window(config, task, backbone, method)
    if bundle is None:
        starts.start(config.method, method, backbone, tasks)
    if not model.named_groups():
        raise ConfigError(
            f"nothing is trained: method.name={config.method.name} has no parameters at this length and the backbone "
            "is frozen. Raise the prompt's length, or set backbone.trainable=true"
        )
    _check_groups(config, model)
    data = prepare(config, tasks, backbone.tokenizer, max_input_tokens=limit)
    return model, data


def _check_groups(config: RunConfig, model: PromptedModel) -> None:
    groups = model.named_groups()
    for stranger in config.train.group_learning_rates.keys() - groups.keys():
        raise ConfigError(
            f"train.group_learning_rates: {stranger} is no group of what method.name={config.method.name} trains here; "
            f"its groups are {', '.join(groups)}. Drop {stranger}"
            + (", or set backbone.trainable=true" if stranger == "backbone" else "")
        )


def model_of(config: RunConfig, num_tasks: int, bundle: Bundle | None = None) -> PromptedModel:
    """Build the model (CPU), with what the bundle holds, or initial weights from the seed.

    Raises ConfigError naming what does not fit, BundleError for a bundle of another backbone.
    """
    backbone = backbones.load(
        config.backbone, train=config.train_backbone, precision=config.train.precision, seed=config.train.seed
    )
    if bundle is not None:
        checkpoint.check_backbone(bundle, backbone.identity())
    method = methods.build(
        config.method,
        backbone.dims(num_tasks),
        seed=config.train.seed,
        sources_JPH=source_prompts.read(config.method, backbone.identity(), bundle),
    )
    model = PromptedModel(backbone, method)
    if bundle is not None:
        model.load_trained_state(bundle.tensors)
    return model


def plan(config: RunConfig, bundle: Bundle | None = None) -> Plan:
    """Check everything that can be checked without training. bundle, errors: as of `build`."""
    model, data = build(config, bundle)
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
        shares=dict(zip(names, mixture.realised_shares(), strict=True)),
        majority={task.task.name: majority(task) for task in data},
    )


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
