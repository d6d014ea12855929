"""A checked search: run recipe and space, the configurations drawn from it, and the run config of each.

A search recipe is a run recipe with one more section, `search` (schema.py).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from polyprompt import packable, recipe
from polyprompt.config import RunConfig, long_form, shapes_result
from polyprompt.errors import ConfigError, hint
from tuning import schema
from tuning.constraints import Constraint
from tuning.schema import COSTS, PbtScheduler, SearchConfig, Space
from tuning.study import Scalar

Params = dict[str, Scalar]
MAX_GRID = 10_000
#: Draws without a new or an allowed configuration before a space counts as exhausted.
MAX_DRAWS = 2_000


class Search:
    """A checked search: the run recipe's table, the space, and what is drawn from it."""

    def __init__(self, name: str, base: Mapping[str, Any], config: SearchConfig) -> None:
        """Raises ConfigError for keys, values or combinations that the run config refuses, naming them."""
        self.name = name
        self.config = config
        self.keys = list(config.space)
        self.objectives = [o.objective() for o in config.objectives]
        self.constraints = [Constraint(text) for text in config.constraints]
        self.run = recipe.check(base)
        # What the user stated, with paths made absolute: trials work in other folders.
        self.base: dict[str, Any] = self.run.model_dump(mode="json", exclude_unset=True)
        self.score = next((o for o in self.objectives if o.metric.startswith("eval/")), None)
        self._check_keys()
        self._check_objectives()
        self._check_samples()

    @property
    def enumerated(self) -> list[Params] | None:
        """All configurations in order for grid and random, which depend on the recipe alone; None for the others."""
        if self.config.searcher == "grid":
            return list(itertools.islice(self._grid(), MAX_GRID + 1))
        if self.config.searcher == "random":
            assert self.config.num_trials is not None
            return self._random(self.config.num_trials, Random(self.config.seed))
        return None

    def draw(self, pick: Callable[[str, Space], Scalar]) -> Params:
        """Draw a configuration key by key. pick: called with a name that is unique to the key and its condition."""
        params: Params = {}
        for key, spaces in self.config.space.items():
            for number, space in enumerate(spaces):
                if all(params.get(k, _ABSENT) in values for k, values in space.when.items()):
                    params[key] = pick(key if len(spaces) == 1 else f"{key}#{number}", space)
                    break
        return params

    def allows(self, params: Params) -> bool:
        """Do the constraints hold? Keys that are not searched have the run recipe's value."""
        fixed = {key: _lookup(self.run, key) for c in self.constraints for key in c.keys if key not in self.keys}
        return all(constraint.holds({**fixed, **params}) for constraint in self.constraints)

    def _grid(self) -> Iterator[Params]:
        """Walk through the space like an odometer whose wheels depend on each other: the last key turns fastest."""
        stack: list[list[Scalar]] = []
        depth = 0

        def pick(_: str, space: Space) -> Scalar:
            nonlocal depth
            if depth == len(stack):
                values = space.values()
                assert values is not None
                stack.append(values)
            depth += 1
            return stack[depth - 1][0]

        while True:
            depth = 0
            params = self.draw(pick)
            if self.allows(params):
                yield params
            while stack and len(stack[-1]) == 1:
                stack.pop()
            if not stack:
                return
            stack[-1] = stack[-1][1:]

    def _random(self, count: int, random: Random) -> list[Params]:
        """Draw different configurations; a longer list starts with the shorter one."""
        found: list[Params] = []
        seen: set[str] = set()
        failures = 0
        while len(found) < count and failures < MAX_DRAWS:
            params = self.draw(lambda _, space: space.draw(random))
            if repr(params) in seen or not self.allows(params):
                failures += 1
                continue
            failures = 0
            seen.add(repr(params))
            found.append(params)
        if len(found) < count:
            raise ConfigError(
                f"search.num_trials={count}, but the space holds only {len(found)} different configurations that the "
                "constraints allow. Lower search.num_trials, use searcher=grid, or widen the space"
            )
        return found

    def _check_keys(self) -> None:
        for key in self.keys:
            if key in ("name", "tasks", "train.seed") or key.startswith("tasks.") or not shapes_result(key):
                mend = "use search.seeds" if key == "train.seed" else "set it in the recipe"
                raise ConfigError(f"search.space.{key}: this key cannot be searched; {mend}")
        for constraint in self.constraints:
            for key in sorted(constraint.keys - set(self.keys)):
                if _lookup(self.run, key) is _ABSENT:
                    raise ConfigError(
                        f"search.constraints: {constraint.text!r} names {key}, which is neither searched nor a key of "
                        f"this run config.{hint(key, self.keys)}"
                    )

    def _check_objectives(self) -> None:
        known = ["eval/mean", *(f"eval/{task}/score" for task in self.run.task_names), *COSTS]
        for objective in self.objectives:
            if objective.metric not in known:
                raise ConfigError(
                    f"search.objectives: unknown metric {objective.metric!r}; known: {', '.join(known)}."
                    f"{hint(objective.metric, known)}"
                )
        if (name := self.config.scheduler.name) == "none":
            return
        if self.score is None:
            raise ConfigError(f"search.scheduler={name} compares scores; add eval/mean to search.objectives")
        if self.run.evaluate.steps is None:
            raise ConfigError(f"search.scheduler={name} compares trials on their way; set evaluate.steps")
        if self.perturbation_steps is not None:
            self._check_perturbation(self.perturbation_steps)

    @property
    def perturbation_steps(self) -> int | None:
        """Steps between two meetings of a population; None: there is none."""
        chosen = self.config.scheduler
        return chosen.perturbation_steps or self.run.evaluate.steps if isinstance(chosen, PbtScheduler) else None

    def _check_perturbation(self, steps: int) -> None:
        every, last = self.run.evaluate.steps, self.run.train.max_steps
        stated = f"search.scheduler.perturbation_steps={steps}"
        if every is None or steps % every:
            raise ConfigError(
                f"{stated} must be a multiple of evaluate.steps={every}: trials are compared by their scores"
            )
        if steps >= last:
            raise ConfigError(f"{stated} must be below train.max_steps={last}, or no trial ever changes")
        if self.run.evaluate.early_stopping_patience is not None:
            raise ConfigError(
                "evaluate.early_stopping_patience does not go with search.scheduler=pbt: the others would wait for a "
                "trial that stopped early. Drop it"
            )

    def _check_samples(self) -> None:
        """Let the run config see every configuration that can be listed, else a fixed sample of them."""
        listed = self.enumerated
        if listed is not None and len(listed) > MAX_GRID:
            raise ConfigError(f"search.space has more than {MAX_GRID} configurations; use searcher=random or tpe")
        samples = listed if listed is not None else self.samples(200)
        if not samples:
            raise ConfigError("search.constraints allow no configuration of search.space; loosen them")
        for params in samples:
            try:
                config = self.run_config(params)
                if self.config.share_backbone:
                    self._check_shared(config)
            except ConfigError as error:
                values = ", ".join(f"{key}={value}" for key, value in params.items())
                raise ConfigError(
                    f"search.space: the run config refuses {values}:\n{error}\n"
                    "Give the key a `when`, mend its values, or add a constraint that rules this out"
                ) from None

    def _check_shared(self, config: RunConfig) -> None:
        packable.check(config)
        first = self.run_config(self.samples(1)[0])
        if (config.backbone, config.train.precision) != (first.backbone, first.train.precision):
            raise ConfigError(
                "with search.share_backbone=true all trials have the same backbone at the same precision; search no "
                "key of backbone.* nor train.precision, or drop search.share_backbone"
            )

    def samples(self, count: int) -> list[Params]:
        """Return up to so many configurations that the constraints allow: always the same."""
        random = Random(0)
        drawn = (self.draw(lambda _, space: space.draw(random)) for _ in range(count * 10))
        return list(itertools.islice((params for params in drawn if self.allows(params)), count))

    def run_config(self, params: Params, *, seed: int | None = None, name: str | None = None) -> RunConfig:
        return configure(self.base, params, seed=self.config.seeds[0] if seed is None else seed, name=name)


def configure(
    base: Mapping[str, Any], params: Mapping[str, Scalar], *, seed: int | None = None, name: str | None = None
) -> RunConfig:
    """Set dotted keys in a run recipe's table. Another method than the table's starts afresh (recipe.change_method).

    Raises ConfigError for what the run config refuses.
    """
    table = deepcopy(long_form(base))
    method = params.get("method.name")
    if method is not None and table.get("method", {}).get("name") != method:
        recipe.change_method(table, str(method))
        table["method"] = {}
    elif any(key.startswith("method.") for key in params):
        table.setdefault("method", {"name": RunConfig.model_fields["method"].default.name})
    changes: dict[str, Scalar] = dict(params)
    if seed is not None:
        changes["train.seed"] = seed
    table["name"] = name
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"search.space.{key}: {section} is no table of the run config")
        place[last] = value
    return recipe.check(table)


def load(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Search:
    """Read search recipes, merge them left to right over their base recipes, apply overrides, and check everything.

    Raises ConfigError naming the key, the value and the nearest known name.
    """
    tables = [_long_form(recipe.read(path)) for path in paths]
    bases: list[dict[str, Any]] = []
    for path, table in zip(paths, tables, strict=True):
        section = table.get("search")
        stated = section.get("base", []) if isinstance(section, dict) else []
        bases += [recipe.read(path.parent / base) for base in ([stated] if isinstance(stated, str) else stated)]
    merged = recipe.merge([*bases, *tables], overrides)
    section = merged.pop("search", None)
    if not isinstance(section, dict):
        raise ConfigError(
            f"{paths[0]} has no `search` section, so there is nothing to search; see tuning/recipes, or train it with "
            "jobs/multitask.py"
        )
    name = merged.pop("name", None) or paths[-1].stem
    return Search(str(name), merged, schema.check(section))


def _long_form(table: Mapping[str, Any]) -> dict[str, Any]:
    """Write out `search.scheduler: asha`, so that an override can set the scheduler's other keys."""
    section = table.get("search")
    if isinstance(section, Mapping) and isinstance(section.get("scheduler"), str):
        return {**table, "search": {**section, "scheduler": {"name": section["scheduler"]}}}
    return dict(table)


_ABSENT: Any = object()


def _lookup(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key, or _ABSENT."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, Mapping):
            value = value.get(part, _ABSENT)
        else:
            value = getattr(value, part, _ABSENT) if part in getattr(type(value), "model_fields", {}) else _ABSENT
    return value
