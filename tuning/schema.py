"""The schema of a search recipe's `search` section: every key, its type and its default are stated here only."""

import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from polyprompt.errors import ConfigError, hint
from polyprompt.section import Fraction, Section
from tuning.study import Mode, Objective, Scalar

#: Keys that may change while a trial trains: they shape neither its weights nor its data.
CHANGEABLE = (
    "train.learning_rate",
    "train.group_learning_rates.<group>",
    "train.weight_decay",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.max_grad_norm",
    "backbone.dropout",
)
#: Costs that can be objectives; every other objective is a score.
COSTS = ("num_trained_parameters", "inference_flops", "peak_memory_bytes", "step_seconds")


class Space(Section):
    """The values of one key: exactly one of the five kinds. `when`: other searched key → the value, or a list of the
    values, at which this one exists."""

    choice: Annotated[list[Scalar], Field(min_length=1)] | None = None
    #: [low, high]
    uniform: tuple[float, float] | None = None
    #: [low, high], low > 0: uniform in the logarithm.
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    #: [low, high]: whole numbers; as in Ray Tune, high is excluded.
    randint: tuple[int, int] | None = None
    #: [low, high, q]: low, low + q, … high; high - low is a multiple of q.
    quniform: tuple[int | float, int | float, int | float] | None = None
    when: dict[str, list[Scalar]] = Field(default_factory=dict)

    @field_validator("when", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return {k: v if isinstance(v, list) else [v] for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _one_kind(self) -> "Space":
        kinds = [k for k in ("choice", "uniform", "loguniform", "randint", "quniform") if getattr(self, k) is not None]
        if len(kinds) != 1:
            got = ", ".join(kinds) or "none"
            raise ValueError(f"give exactly one of choice, uniform, loguniform, randint, quniform (got {got})")
        if self.choice is not None:
            if len({repr(value) for value in self.choice}) < len(self.choice):
                raise ValueError(f"choice {self.choice} lists a value twice")
            return self
        low, high, *q = getattr(self, kinds[0])
        if low >= high:
            raise ValueError(f"{kinds[0]}: low {low} must be below high {high}")
        if q and (q[0] <= 0 or not math.isclose((high - low) / q[0], round((high - low) / q[0]))):
            raise ValueError(f"quniform: high - low = {high - low:g} must be a multiple of q = {q[0]:g} > 0")
        return self

    def values(self) -> list[Scalar] | None:
        """Return all values in order, or None where there is no end of them."""
        if self.choice is not None:
            return list(self.choice)
        if self.randint is not None:
            return list(range(*self.randint))
        if self.quniform is not None:
            low, high, q = self.quniform
            whole = all(isinstance(part, int) for part in self.quniform)
            steps = [low + i * q for i in range(round((high - low) / q) + 1)]
            return list(steps) if whole else [round(float(step), 12) for step in steps]
        return None

    def text(self) -> str:
        """Return the space in a recipe's words."""
        stated = self.model_dump(exclude_unset=True)
        return ", ".join(f"{k} {list(v) if isinstance(v, tuple) else v}" for k, v in stated.items())

    def draw(self, random: Random) -> Scalar:
        if (values := self.values()) is not None:
            return random.choice(values)
        low, high = self.uniform or self.loguniform or (0.0, 0.0)
        drawn = random.uniform(low, high) if self.uniform else math.exp(random.uniform(math.log(low), math.log(high)))
        return min(high, max(low, float(f"{drawn:.6g}")))


class NoScheduler(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class AshaScheduler(Section):
    """Asynchronous successive halving (Li et al. 2020): at each rung only the best 1/reduction_factor go on."""

    name: Literal["asha"] = "asha"
    #: First rung, in steps. None: the first evaluation.
    grace_steps: PositiveInt | None = None
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0


class MedianScheduler(Section):
    """Stop a trial whose best score is below the median of the others' running means (Golovin et al. 2017)."""

    name: Literal["median"] = "median"
    grace_steps: PositiveInt | None = None
    #: Trials that must have come as far before any is stopped.
    min_trials: PositiveInt = 3


class PbtScheduler(Section):
    """Population based training (Jaderberg et al. 2017): all trials meet at every perturbation step, where the worst go
    on from copies of the best under changed values of the searched keys."""

    name: Literal["pbt"] = "pbt"
    #: Steps between two meetings, a multiple of evaluate.steps. None: evaluate.steps.
    perturbation_steps: PositiveInt | None = None
    #: Share of the trials that are copied, and of those that take over a copy.
    quantile_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    #: How often a value is drawn anew; else it is multiplied by 0.8 or 1.2, or becomes a neighbour in its list.
    resample_probability: Fraction = 0.25


Scheduler = Annotated[NoScheduler | AshaScheduler | MedianScheduler | PbtScheduler, Field(discriminator="name")]


class ObjectiveConfig(Section):
    """A metric to search by. mode: None: scores up, costs down."""

    metric: str
    mode: Mode | None = None

    def objective(self) -> Objective:
        return Objective(self.metric, self.mode or ("min" if self.metric in COSTS else "max"))


class SearchConfig(Section):
    """A search."""

    #: Run recipes that this one starts from; paths are relative to this recipe's folder.
    base: list[str] = Field(default_factory=list)
    #: dotted config key → its values, or a list of them for several conditions.
    space: Annotated[dict[str, list[Space]], Field(min_length=1)]
    #: Conditions such as "method.num_prompts * method.length <= 100"; one that names an absent key holds.
    constraints: list[str] = Field(default_factory=list)
    #: grid: all configurations; random; tpe, nsga2: Optuna's samplers.
    searcher: Literal["grid", "random", "tpe", "nsga2"] = "random"
    #: Configurations to try; not for grid, which tries all.
    num_trials: PositiveInt | None = None
    #: Of tpe: configurations drawn at random before it starts to learn. Of nsga2: the size of a generation.
    num_startup_trials: PositiveInt = 10
    scheduler: Scheduler = NoScheduler()
    #: Metrics, the first one leads: it orders the leaderboard, and the first score among them drives the scheduler.
    objectives: list[ObjectiveConfig] = Field(default=[ObjectiveConfig(metric="eval/mean")], min_length=1)
    #: train.seed of each run of a configuration.
    seeds: list[NonNegativeInt] = Field(default=[42], min_length=1)
    #: Of the searcher's own draws.
    seed: NonNegativeInt = 0
    #: None: as many as the cluster holds.
    max_concurrent_trials: PositiveInt | None = None
    #: Times a trial is started again after its process or node died.
    max_failures: NonNegativeInt = 2
    #: Trials of one process train together, as rows of one batch over one frozen backbone.
    share_backbone: bool = Field(default=False, exclude_if=lambda value: not value)
    #: Of share_backbone: trials at most that train together.
    trials_per_pack: PositiveInt = 8

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        table = dict(data)
        if isinstance(table.get("base"), str):
            table["base"] = [table["base"]]
        if isinstance(table.get("scheduler"), str):
            table["scheduler"] = {"name": table["scheduler"]}
        if isinstance(table.get("space"), Mapping):
            table["space"] = {k: v if isinstance(v, list) else [v] for k, v in table["space"].items()}
        if isinstance(table.get("objectives"), str | Mapping):
            table["objectives"] = [table["objectives"]]
        if isinstance(table.get("objectives"), list):
            table["objectives"] = [{"metric": o} if isinstance(o, str) else o for o in table["objectives"]]
        return table

    @model_validator(mode="after")
    def _consistent(self) -> "SearchConfig":
        before: list[str] = []
        for key, spaces in self.space.items():
            for strange in sorted({k for space in spaces for k in space.when} - set(before)):
                raise ValueError(
                    f"space.{key}: when names {strange!r}, which is not a searched key listed before it."
                    f"{hint(strange, before)}"
                )
            before.append(key)
        if self.searcher == "grid":
            if self.num_trials is not None:
                raise ValueError("num_trials does not go with searcher=grid, which tries all; drop it, or use random")
            for key, spaces in self.space.items():
                if any(space.values() is None for space in spaces):
                    raise ValueError(f"space.{key} has no end of values, so searcher=grid cannot try all; use quniform")
        elif self.num_trials is None:
            raise ValueError(f"num_trials is required for searcher={self.searcher}")
        metrics = [objective.metric for objective in self.objectives]
        for name, values in (("seeds", self.seeds), ("objectives", metrics), ("constraints", self.constraints)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} lists one twice")
        if isinstance(self.scheduler, PbtScheduler):
            self._fits_pbt()
        if self.share_backbone:
            self._fits_packs(metrics)
        return self

    def _fits_packs(self, metrics: list[str]) -> None:
        if isinstance(self.scheduler, PbtScheduler):
            raise ValueError(
                "share_backbone=true does not go with scheduler=pbt, which ends and begins all runs at every meeting; "
                "use scheduler=asha, or drop share_backbone"
            )
        if shared := [metric for metric in metrics if metric in ("peak_memory_bytes", "step_seconds")]:
            raise ValueError(
                f"objectives: {', '.join(shared)} is that of all trials that train together with share_backbone=true; "
                "use num_trained_parameters or inference_flops, or drop share_backbone"
            )

    def _fits_pbt(self) -> None:
        for key, spaces in self.space.items():
            section, _, rest = key.rpartition(".")
            if key not in CHANGEABLE and not (section == "train.group_learning_rates" and rest):
                raise ValueError(
                    f"space.{key}: with scheduler=pbt every searched key changes while trials train, and this one may "
                    f"not: a trial could not go on from another's weights. Keys that may: {', '.join(CHANGEABLE)}. Set "
                    "it in the recipe, or use scheduler=asha"
                )
            if any(space.when for space in spaces):
                raise ValueError(
                    f"space.{key}: when does not go with scheduler=pbt, whose trials all have the same keys"
                )
        if self.searcher != "random":
            raise ValueError(
                f"searcher={self.searcher} does not go with scheduler=pbt, which finds the values itself; "
                "use searcher=random for those to begin with"
            )
        if self.num_trials == 1:
            raise ValueError("num_trials=1 does not go with scheduler=pbt: a trial needs others to go on from")
        if self.constraints:
            raise ValueError("constraints do not go with scheduler=pbt: changed values could break them")
        if len(self.seeds) > 1:
            raise ValueError(f"seeds {self.seeds}: scheduler=pbt needs a single one, as a trial is one run")
        metrics = [objective.metric for objective in self.objectives]
        if len(metrics) > 1 or metrics[0] in COSTS:
            raise ValueError(
                f"objectives {metrics}: scheduler=pbt needs a single one that is a score, such as eval/mean"
            )


def check(section: Mapping[str, Any]) -> SearchConfig:
    """Validate a plain `search` table. Raises ConfigError with one line for each fault."""
    try:
        return SearchConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(fault) for fault in error.errors()))) from None


def _explain(fault: Any) -> str:
    """Turn one pydantic fault into "search.key: what is wrong (got value). Did you mean …?"."""
    where = [str(part) for part in fault["loc"]]
    key = ".".join(["search", *where])
    match fault["type"]:
        case "extra_forbidden":
            model = Space if where[0] == "space" else ObjectiveConfig if where[0] == "objectives" else SearchConfig
            if where[0] == "scheduler":
                model = next(m for m in _SCHEDULERS if m.model_fields["name"].default == where[1])
            return f"{key}: unknown key.{hint(where[-1], model.model_fields)}"
        case "missing":
            return f"{key}: this key is required"
        case "union_tag_invalid" | "union_tag_not_found":
            names = [m.model_fields["name"].default for m in _SCHEDULERS]
            got = str(dict(fault["input"]).get("name"))
            return f"{key}.name: unknown scheduler {got!r}; known: {', '.join(names)}.{hint(got, names)}"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
    return f"{key}: {fault['msg']} (got {fault['input']!r})"


_SCHEDULERS: tuple[Any, ...] = (NoScheduler, AshaScheduler, MedianScheduler, PbtScheduler)
