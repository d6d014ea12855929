"""The run config: every key, its type, its range and its default are stated here, or beside it: those of `backbone` in
backbone_config, of `method` in method_configs, of `tasks` in task_configs, of `train` in train_config, of `compute` in
compute_config.

recipe.py reads one from YAML files and overrides. It is frozen, pickles, and round-trips through YAML.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    model_validator,
)

from polyprompt import precision, training_defaults
from polyprompt.backbone_config import BackboneConfig
from polyprompt.compute_config import ComputeConfig
from polyprompt.method_configs import (
    AdapterConfig,
    AttemptConfig,
    DePTConfig,
    FullConfig,
    HyperFormerConfig,
    HyperPromptConfig,
    LoRAConfig,
    MPTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RoutedHyperPromptConfig,
    SMoPConfig,
)
from polyprompt.section import AbsolutePath, Section, mask
from polyprompt.task_configs import TaskEntry
from polyprompt.train_config import TrainConfig

MethodConfig = Annotated[
    FullConfig
    | PromptTuningConfig
    | SMoPConfig
    | HyperPromptConfig
    | RoutedHyperPromptConfig
    | PrefixTuningConfig
    | PTuningConfig
    | DePTConfig
    | AttemptConfig
    | MPTConfig
    | AdapterConfig
    | HyperFormerConfig
    | LoRAConfig,
    Field(discriminator="name"),
]
METHOD_NAMES: tuple[str, ...] = tuple(
    get_args(c.model_fields["name"].annotation)[0] for c in get_args(get_args(MethodConfig)[0])
)


class DataConfig(Section):
    """Where rows come from and how long texts may be."""

    #: Folder with <task>/{train,validation,test}.jsonl in the official fields, instead of the hub.
    root: AbsolutePath | None = None
    #: Longer inputs are cut. None: the model's own limit less the prompt's tokens; 512 less them if it states none.
    max_input_tokens: PositiveInt | None = None
    max_target_tokens: PositiveInt = 32
    #: Use only the first examples of each split (None: all). A limit is for trying things out, never for results.
    max_train_examples: PositiveInt | None = None
    max_validation_examples: PositiveInt | None = None
    #: Tokenised data is kept here. None: $XDG_CACHE_HOME/polyprompt or ~/.cache/polyprompt.
    cache_dir: AbsolutePath | None = None


class MixtureConfig(Section):
    """How often each task is drawn."""

    #: proportional: min(n, cap)^(1/temperature); uniform: equal; weights: the tasks' weights alone. The first two are
    #: multiplied by the tasks' weights.
    kind: Literal["proportional", "uniform", "weights"] = "proportional"
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    #: Artificial limit on the examples of a task (T5's K). None: no limit.
    cap: PositiveInt | None = None
    #: task name → weight, in place of the one that the task states itself, which is 1 where nothing is said.
    weights: dict[str, PositiveFloat] = {}


class EvaluateConfig(Section):
    """When and how the model is scored on the validation splits."""

    #: Evaluate every so many steps; the last step is always evaluated. None: only the last.
    steps: PositiveInt | None = None
    #: rank: the choice with the highest log-likelihood; generate: greedy decoding and exact match.
    #: Tasks without choices are always generated.
    mode: Literal["rank", "generate"] = "rank"
    #: Rows that are computed at once. None: as many as half of the free memory holds, at most 512.
    batch_size: PositiveInt | None = 64
    #: Stop after so many evaluations without a better mean score (None: never).
    early_stopping_patience: PositiveInt | None = None


class TrackingConfig(Section):
    """MLflow."""

    model_config = ConfigDict(serialize_by_alias=True)
    enabled: bool = True
    #: None: $MLFLOW_TRACKING_URI, which always wins, or mlflow.db in $POLYPROMPT_HOME, or in the working folder.
    #: A password in it is written to no file.
    uri: str | None = Field(default=None, repr=False)
    #: $MLFLOW_EXPERIMENT_NAME wins.
    experiment: str = "polyprompt"
    #: Register the best bundle of the finished run as the candidate of this model in MLflow's registry. true: of the
    #: model named as the experiment. A search registers its best run itself.
    register_model: bool | Annotated[str, Field(pattern=r"^[^/:]+$")] = Field(default=False, alias="register")
    #: Sample CPU, memory and GPU use every so many seconds (None: never).
    system_metrics_interval_seconds: PositiveFloat | None = 10.0

    @model_validator(mode="after")
    def _has_a_store(self) -> "TrackingConfig":
        if self.register_model and not self.enabled:
            raise ValueError(
                f"tracking.register={self.register_model} needs tracking.enabled=true: a version is of a run in MLflow"
            )
        return self

    @field_serializer("uri")
    def _without_password(self, uri: str | None) -> str | None:
        return uri and mask(uri)


class InitConfig(Section):
    """Tasks added later: what an earlier bundle knows stays as it is; only what belongs to the new tasks is trained.

    The config is that of the bundle's run but for how it trains; new tasks that `tasks` lacks are added behind them.
    """

    model_config = ConfigDict(serialize_by_alias=True)
    #: A step_… folder of a run of this method on this backbone and the other tasks.
    bundle: AbsolutePath = Field(alias="from")
    #: As in `tasks`; kept are their names.
    new_tasks: Annotated[list[str], Field(min_length=1)]


class RunConfig(Section):
    """One training run."""

    #: Runs of the same name in the same place (`compute.storage_path`, else --out, else runs/ in $POLYPROMPT_HOME or
    #: the working folder) are the same run:
    #: started again, it goes on from its newest bundle. None: <method>-<hash of the config>.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")] | None = None
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = HyperPromptConfig()
    tasks: Annotated[list[TaskEntry], Field(min_length=1)]
    data: DataConfig = DataConfig()
    mixture: MixtureConfig = MixtureConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    #: Left out where there is none, so that configs are written, and runs found again, as ever.
    init: InitConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        table = precision.resolved(_with_new_tasks(long_form(data)))
        return training_defaults.filled(table, cls.model_fields["method"].default.name)

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        names = self.task_names
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(twice)} listed more than once; list each task once")
        strangers = sorted(self.mixture.weights.keys() - set(names))
        if strangers:
            raise ValueError(
                f"mixture.weights: {', '.join(strangers)} not among the tasks; the tasks are {', '.join(names)}"
            )
        if self.init is not None and (self.num_old_tasks < 1 or names[self.num_old_tasks :] != self.init.new_tasks):
            raise ValueError(
                f"init.new_tasks={self.init.new_tasks} must be the last of the tasks, behind those of init.from; the "
                f"tasks are {', '.join(names)}. Leave the new ones out of `tasks`, which adds them there"
            )
        if self.method.name == "full" and self.backbone.trainable is False:
            raise ValueError("method.name=full trains the backbone, but backbone.trainable=false; drop one of the two")
        if self.compute.most_workers > self.train.num_shards:
            raise ValueError(
                f"compute.num_workers={self.compute.most_workers} must be at most train.num_shards="
                f"{self.train.num_shards}: a worker without a shard would idle. Raise train.num_shards"
            )
        if self.backbone.attention == "flex" and not self.compute.use_gpu:
            raise ValueError(
                "backbone.attention=flex needs compute.use_gpu=true: FlexAttention cannot train on a CPU. "
                "Set compute.use_gpu=true, or backbone.attention=sdpa"
            )
        if self.compute.strategy == "fsdp":
            self._check_fsdp()
        if self.compute.gradient_sum == "ddp" and self.compute.num_workers == 0:
            raise ValueError("compute.gradient_sum=ddp needs compute.num_workers >= 1; use exact in-process")
        if self.evaluate.early_stopping_patience is not None and self.evaluate.steps is None:
            raise ValueError(
                "evaluate.early_stopping_patience needs evaluate.steps: without it only the last step is scored"
            )
        return self

    def _check_fsdp(self) -> None:
        """Every forward pass of FSDP is one of all workers, so all must have equally many in a step."""
        train, compute = self.train, self.compute
        if compute.num_workers == 0:
            raise ValueError("compute.strategy=fsdp needs compute.num_workers >= 1; use ddp in-process")
        if train.gradient_accumulation_steps > 1:
            raise ValueError(
                f"compute.strategy=fsdp needs train.gradient_accumulation_steps=1, not "
                f"{train.gradient_accumulation_steps}: a short shard has fewer micro-batches. Raise train.num_shards "
                f"from {train.num_shards} to {train.num_shards * train.gradient_accumulation_steps} instead: a worker "
                "computes its shards one after another"
            )
        uneven = [n for n in range(compute.fewest_workers, compute.most_workers + 1) if train.num_shards % n]
        if uneven:
            raise ValueError(
                f"compute.strategy=fsdp: compute.num_workers={uneven[0]} must divide train.num_shards="
                f"{train.num_shards}, so that all workers have equally many shards. Change one of the two"
            )
        if compute.use_gpu and compute.gpus_per_worker % 1:
            raise ValueError(
                f"compute.strategy=fsdp needs whole GPUs, not compute.gpus_per_worker={compute.gpus_per_worker:g}: "
                "NCCL refuses two workers on one. Use compute.strategy=ddp"
            )
        if train.optimizer == "adafactor":
            raise ValueError(
                "compute.strategy=fsdp needs train.optimizer=adamw: Adafactor's moments of rows and columns are those "
                "of whole parameters. Use adamw, or compute.strategy=ddp"
            )
        if self.evaluate.batch_size is None:
            raise ValueError(
                "compute.strategy=fsdp needs a number for evaluate.batch_size: what a row takes is found on a copy "
                "without data, which a model that is cut up has not. Set evaluate.batch_size"
            )
        if self.backbone.compile:
            raise ValueError(
                "backbone.compile=true with compute.strategy=fsdp is not supported: layers are compiled with whole "
                "weights. Use one of the two"
            )
        if self.init is not None:
            raise ValueError(
                "compute.strategy=fsdp cannot train parts of parameters, which init.from does. Use compute.strategy=ddp"
            )

    @property
    def task_names(self) -> list[str]:
        return [t if isinstance(t, str) else t.name for t in self.tasks]

    @property
    def num_old_tasks(self) -> int:
        """How many of the tasks, the first, are the bundle's that new ones are added to; 0 without such."""
        return len(self.tasks) - len(self.init.new_tasks) if self.init is not None else 0

    @property
    def trained_tasks(self) -> list[TaskEntry]:
        """The tasks that are trained on: all, or those added to a bundle's."""
        return self.tasks[self.num_old_tasks :]

    def with_backbone_at(self, name: str | None) -> Self:
        """Return this config with its backbone in another place (None: where it was)."""
        if name is None:
            return self
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"name": name})})

    @property
    def train_backbone(self) -> bool | Literal["layer_norms"]:
        """Is the backbone trained, or its layer normalisations alone? As set, or as the method does by default."""
        if self.backbone.trainable is not None:
            return self.backbone.trainable
        return self.method.name in training_defaults.TRAIN_BACKBONE

    def identity(self) -> str:
        """Return the hash (12 hex digits) of everything that shapes the result (see `shapes_result`)."""
        shaping = {key: value for key, value in self.flat().items() if shapes_result(key)}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """Return the resolved config as a recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, str]:
        """Return "section.key" → value as text, for tracking. Lists and tables of values become JSON."""

        def walk(prefix: str, value: Any) -> dict[str, str]:
            if isinstance(value, dict) and value and prefix.count(".") < 1:
                return {
                    k: v
                    for key, sub in value.items()
                    for k, v in walk(f"{prefix}.{key}" if prefix else key, sub).items()
                }
            return {prefix: value if isinstance(value, str) else json.dumps(value)}

        return walk("", self.model_dump(mode="json"))


def shapes_result(key: str) -> bool:
    """Does a flat key shape the result? Not: names, places of storage and tracking, how many workers share the work."""
    section, _, rest = key.partition(".")
    if section == "train":
        return rest not in ("logging_steps", "save_steps", "save_total_limit")
    return section not in ("name", "compute", "tracking") and key != "data.cache_dir"


def long_form(table: Mapping[str, Any]) -> dict[str, Any]:
    """Write out the short forms: `backbone: embedded` and `method: smop` mean their `name`."""
    return {k: {"name": v} if k in ("backbone", "method") and isinstance(v, str) else v for k, v in table.items()}


def _with_new_tasks(table: dict[str, Any]) -> dict[str, Any]:
    """Put the tasks of `init.new_tasks` behind `tasks`, where they are not there yet, and leave their names."""
    init, tasks = table.get("init"), table.get("tasks")
    new = init.get("new_tasks") if isinstance(init, Mapping) else None
    if not isinstance(init, Mapping) or not isinstance(new, list) or not isinstance(tasks, list):
        return table  # pydantic says what is wrong
    known = [_name(entry) for entry in tasks]
    added = [entry for entry in new if _name(entry) not in known]
    return {**table, "tasks": [*tasks, *added], "init": {**init, "new_tasks": [_name(entry) for entry in new]}}


def _name(entry: Any) -> Any:
    return entry.get("name") if isinstance(entry, Mapping) else getattr(entry, "name", entry)
