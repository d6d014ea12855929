"""Everything that is checked before anything expensive starts, and what a run will need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyprompt import backbone as backbones
from polyprompt import (
    checkpoint,
    fingerprint,
    folding,
    later_tasks,
    memory,
    methods,
    source_prompts,
    starts,
    step_time,
    training_defaults,
)
from polyprompt.backbone_base import Backbone
from polyprompt.batches import task_weights
from polyprompt.checkpoint import Bundle
from polyprompt.config import RunConfig
from polyprompt.costs import inference_flops, median_lengths, training_flops
from polyprompt.data import AnyData, majority, prepare
from polyprompt.errors import BundleError, ConfigError
from polyprompt.memory import Memory
from polyprompt.methods.base import Method
from polyprompt.mixture import Mixture, rates
from polyprompt.model import PromptedModel, check_window, input_limit
from polyprompt.tasks import catalog
from polyprompt.tasks.records import Task, TextTask

#: `backbone.load`, or what stands in for it where a loaded backbone is at hand.
Load = Callable[..., Backbone]


@dataclass(frozen=True)
class Plan:
    """A checked run. backbone: its identity. inference_flops: of one row of median length. memory: of one worker, where
    it was asked for. step: what a training step of mean length has to do. shares: of the mixture."""

    backbone: Mapping[str, Any]
    data: Sequence[AnyData]
    num_trained_parameters: int
    num_method_parameters: int
    num_backbone_parameters: int
    inference_flops: int
    memory: Memory | None
    #: Why only the shapes of the weights were there; None: the weights were.
    without_weights: str | None
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
    # A resolved config states the method's default for a group that it has under other settings.
    default = training_defaults.of(config.method.name, bool(config.train_backbone)).get("group_learning_rates", {})
    rates = config.train.group_learning_rates
    for stranger in sorted(group for group in rates.keys() - groups.keys() if rates[group] != default.get(group)):
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
            sources_JPH=source_prompts.read(config.method, config.task_names[:num_tasks], backbone.identity(), bundle),
        )
    model = PromptedModel(backbone, method)
    if bundle is not None:
        model.load_trained_state(bundle.tensors)
        model.fingerprint = bundle.state.get(fingerprint.KEPT)
        if model.fingerprint is not None:
            fingerprint.check(model, model.fingerprint, config.task_names, config.train.precision, str(bundle.folder))
    return model


def plan(
    config: RunConfig, bundle: Bundle | None = None, load: Load | None = None, *, with_memory: bool = False
) -> Plan:
    """Check everything that can be checked without training. bundle, load, errors: as of `build`.

    with_memory: find out what a worker needs, too, which takes seconds.
    """
    return _plan(config, *build(config, bundle, load), with_memory=with_memory)


def rehearse(config: RunConfig) -> Plan:
    """As `plan`, with memory, for a machine that may lack the weights or the room for them: then their shapes do.

    Raises ConfigError where the weights are lacking and the method starts from them or from what fits them alone.
    """
    shapes = backbones.shapes(
        config.backbone, train=config.train_backbone, precision=config.train.precision, seed=config.train.seed
    )
    # They are read in fp32, and held in that.
    lack = backbones.lack_of_weights(config.backbone, sum(4 * weight.numel() for weight in shapes.parameters()))
    if lack is None:
        return plan(config, with_memory=True)
    of_bundles = config.init, getattr(config.method, "sources", None), getattr(config.method, "init_file", None)
    if any(of_bundles):
        raise ConfigError(
            f"backbone.name={config.backbone.name}: its weights cannot be loaded here: {lack}. This run starts from "
            "bundles that fit them alone (init.from, method.sources or method.init=file): check it on a machine with "
            "the weights"
        )
    with memory.mode_of(shapes):
        model, data = build(config, load=lambda *args, **keys: shapes)
    return _plan(config, model, data, with_memory=True, without_weights=lack)


def _plan(
    config: RunConfig,
    model: PromptedModel,
    data: Sequence[AnyData],
    *,
    with_memory: bool,
    without_weights: str | None = None,
) -> Plan:
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
        memory=memory.estimate(config, model, data) if with_memory else None,
        without_weights=without_weights,
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
