"""A method whose prompts hang on the task alone, computed once and for all: plain tables, one row of them a task.

Hypernetworks, re-parameterisations and shared factors are gone; what is left is what the backbone is handed. A method
that reads the input (a router, attention over prompts) cannot be folded.

Letters as in methods/base.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from polyprompt.errors import ConfigError
from polyprompt.methods.base import Adapters, KeyValues, Method, Prompts, Stack

#: Of Adapters: what is no tensor, and so is kept as text beside the tensors.
_TEXTS = ("places", "activation")
_STACKS: tuple[Stack, ...] = get_args(Stack)


class Folded(Method):
    """Tables of prompts by task. Shapes: as in Prompts, tasks in the place of rows; update_KSH is added to the input's
    first S embeddings. Nothing of it is trained."""

    task_aware = True

    def __init__(self, tables: Mapping[str, Tensor], texts: Mapping[str, Any]) -> None:
        """tables, texts: as `fold` or `tables_of` returned them."""
        super().__init__()
        self.names = sorted(tables)
        self.texts = {name: tuple(value) if isinstance(value, list) else value for name, value in texts.items()}
        for name in self.names:
            self.register_buffer(_attribute(name), tables[name])
        inputs = self._table("inputs_KPH")
        self.input_length = 0 if inputs is None else inputs.shape[1]

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        inputs, update = self._table("inputs_KPH"), self._table("update_KSH")
        made: dict[str, Any] = {}
        for stack in _STACKS:
            keys, values = self._table(f"{stack}.keys_LKNPD"), self._table(f"{stack}.values_LKNPD")
            if keys is not None and values is not None:
                made[stack] = KeyValues(keys, values).of_rows(task_B)
        return Prompts(
            inputs_BPH=None if inputs is None else inputs[task_B].to(x_BTH.dtype),
            embeddings_BTH=None if update is None else _updated(x_BTH, update[task_B].to(x_BTH.dtype)),
            adapters={stack: own for stack in _STACKS if (own := self._adapters(stack, task_B)) is not None},
            **made,
        )

    def group_of(self, parameter: str) -> NoReturn:
        """Nothing is trained."""
        raise KeyError(parameter)

    def _table(self, name: str) -> Tensor | None:
        return getattr(self, _attribute(name)) if name in self.names else None

    def _adapters(self, stack: Stack, task_B: Tensor) -> Adapters | None:
        start = f"adapters.{stack}."
        own = {name.removeprefix(start): self._table(name) for name in self.names if name.startswith(start)}
        if not own:
            return None
        owner_K = own.pop("owner_K")
        assert owner_K is not None
        texts: dict[str, Any] = {key: self.texts[start + key] for key in _TEXTS}
        return Adapters(**texts, owner_B=owner_K[task_B], **own)  # type: ignore[arg-type]  # names of its fields


def tables_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tables of these names among a bundle's tensors."""
    return {name: tensors[f"method.{_attribute(name)}"] for name in names}


@torch.no_grad()
def fold(method: Method, num_tasks: int, hidden: int, max_tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tables of a method in eval mode, and the texts that belong to them.

    max_tokens: of an input, for methods that change its embeddings. Raises ConfigError for a method that cannot be
    folded.
    """
    shape = (num_tasks, max_tokens, hidden)
    task_K, mask_KT = torch.arange(num_tasks), torch.ones(num_tasks, max_tokens, dtype=torch.long)
    first, second = (
        _tables(method.prompts(x, mask_KT, task_K), x)
        for x in (torch.zeros(shape), torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    )
    differing = [name for name, table in first[0].items() if not torch.allclose(table, second[0][name], atol=1e-6)]
    if method.num_routes or differing:
        raise ConfigError(
            f"{type(method).__name__}'s prompts hang on the input, so they cannot be folded into tables; export the "
            "bundle as it is"
        )
    return first


def _tables(made: Prompts, x_KTH: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tables: dict[str, Tensor] = {}
    texts: dict[str, Any] = {}
    if made.inputs_BPH is not None:
        tables["inputs_KPH"] = made.inputs_BPH
    if made.embeddings_BTH is not None:
        tables["update_KSH"] = made.embeddings_BTH - x_KTH
    for stack in _STACKS:
        own: KeyValues | None = getattr(made, stack)
        if own is not None:
            tables[f"{stack}.keys_LKNPD"], tables[f"{stack}.values_LKNPD"] = own.keys_LBNPD, own.values_LBNPD
    for stack_name, adapters in made.adapters.items():
        for field in dataclasses.fields(adapters):
            value, name = getattr(adapters, field.name), f"adapters.{stack_name}.{field.name}"
            if field.name in _TEXTS:
                texts[name] = value
            elif value is not None:
                tables[name.replace("owner_B", "owner_K")] = value
    return {name: table.detach().clone().contiguous() for name, table in tables.items()}, texts


def _updated(x_BTH: Tensor, update_BSH: Tensor) -> Tensor:
    length = min(x_BTH.shape[1], update_BSH.shape[1])
    return torch.cat([x_BTH[:, :length] + update_BSH[:, :length], x_BTH[:, length:]], dim=1)


def _attribute(name: str) -> str:
    return "table_" + name.replace(".", "_")
