"""Recipes: YAML files merged left to right, then dotted overrides, then checked, each fault explained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from polyprompt.config import METHOD_NAMES, MethodConfig, RunConfig, long_form
from polyprompt.errors import ConfigError, hint
from polyprompt.task_configs import TaskConfig, TextTaskConfig


def load(recipes: Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read recipes, merge them left to right, apply "key.sub=value" overrides and check the result (see `merge`)."""
    return check(merge([read(path) for path in recipes], overrides))


def merge(tables: Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge tables left to right, then "key.sub=value" overrides, and resolve interpolations; nothing is checked.

    Lists are replaced, tables are merged. A layer that names another method starts afresh where the old method's keys
    do not fit it (`change_method`). Relative paths inside a recipe's task `files` belong to the working folder.
    Raises ConfigError naming the key, the value and the nearest known name.
    """
    layers = [long_form(table) for table in tables]
    if overrides:
        bad = [o for o in overrides if "=" not in o or o.startswith("-")]
        if bad:
            raise ConfigError(f"override {bad[0]!r} is not of the form key.sub=value")
        try:
            layers.append(_overrides(overrides))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"overrides {list(overrides)}: {error}") from error
    merged: dict[str, Any] = {}
    for layer in layers:
        old, new = merged.get("method"), layer.get("method")
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name"):
            change_method(merged, new["name"])
        try:
            merged = _table(OmegaConf.merge(merged, layer))
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"recipes cannot be merged: {error}") from error
    try:
        return _table(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe interpolation failed: {error}") from error


def change_method(table: dict[str, Any], name: str) -> None:
    """Take the old method's keys out of a table: `method`, and the learning rates of groups that the new one lacks."""
    table.pop("method", None)
    train, section = table.get("train"), _section_of(name)
    if section and isinstance(train, dict) and isinstance(rates := train.get("group_learning_rates"), dict):
        kept = {group: rate for group, rate in rates.items() if group in section.groups | {"backbone"}}
        table["train"] = {**train, "group_learning_rates": kept}


def _section_of(method: str) -> Any:
    sections = get_args(get_args(MethodConfig)[0])
    return next((section for section in sections if section.model_fields["name"].default == method), None)


def check(data: Mapping[str, Any]) -> RunConfig:
    """Validate a plain table. Raises ConfigError with one line for each fault."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(fault) for fault in error.errors()))) from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's booleans: true and false only, so that `labels: {0: no}` means the word "no"; and 1e-3 is a number."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def _overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn "key.sub=value" into a table; values are YAML, as in a recipe. `method=smop` means `method.name=smop`."""
    table = OmegaConf.create()
    for override in overrides:
        key, _, text = override.partition("=")
        value = yaml.load(text, Loader=_RecipeLoader)
        if key in ("method", "backbone") and isinstance(value, str):
            key = f"{key}.name"
        OmegaConf.update(table, key, value, merge=True)
    return _table(table)


def _table(config: Any, *, resolve: bool = False) -> dict[str, Any]:
    table = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(table, dict)
    return {str(key): value for key, value in table.items()}


def read(path: Path) -> dict[str, Any]:
    """Read one YAML file. Raises ConfigError if it is absent, no YAML, or no table."""
    if not path.is_file():
        near = hint(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"recipe {path} does not exist.{near}")
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"recipe {path} must be a table of keys, not {type(table).__name__}")
    return table


def _explain(fault: Any) -> str:
    """Turn one pydantic fault into "key: what is wrong (got value). Did you mean …?"."""
    # pydantic puts the tag of a union (a method's name, the kind of a task entry) into the path; a user's has none.
    loc = fault["loc"]
    where = [
        str(part)
        for i, part in enumerate(loc)
        if not (i == 1 and loc[0] == "method" and part in METHOD_NAMES) and not (i == 2 and loc[0] == "tasks")
    ]
    key = ".".join(where) or "config"
    match fault["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key.{hint(where[-1], _siblings(fault['loc']))}"
        case "missing":
            return f"{key}: this key is required"
        case "union_tag_invalid":
            got = fault["input"].get("name")
            return (
                f"{key}.name: unknown method {got!r}; known: {', '.join(METHOD_NAMES)}.{hint(str(got), METHOD_NAMES)}"
            )
        case "union_tag_not_found":
            return f"{key}.name: name the method; known: {', '.join(METHOD_NAMES)}"
        case "value_error":
            return str(fault["ctx"]["error"]) if key == "config" else f"{key}: {fault['ctx']['error']}"
    return f"{key}: {fault['msg']} (got {fault['input']!r})"


def _siblings(loc: Sequence[Any]) -> list[str]:
    """The known keys beside an unknown one."""
    model: Any = RunConfig
    for part in loc[:-1]:
        if model is RunConfig and part == "method":
            continue
        if part in METHOD_NAMES:
            model = _section_of(part)
        elif part in ("task", "text") and model is RunConfig:
            model = TaskConfig if part == "task" else TextTaskConfig
        elif isinstance(part, str) and part in getattr(model, "model_fields", {}):
            annotation = model.model_fields[part].annotation
            nested = [
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = nested[0] if nested else model
    return list(model.model_fields)
