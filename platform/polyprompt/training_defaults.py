"""How each method is trained where a recipe states no learning rate: a part of config.py. For AdamW.

Where the numbers are from, and what was measured, is in docs/methods.md.
"""

from collections.abc import Mapping
from typing import Any

#: Of a backbone that is trained: T5's weights differ in size a hundredfold.
BACKBONE_RATE = 1e-3
WHOLE: Mapping[str, Any] = {"learning_rate": BACKBONE_RATE, "scale_parameter": True}
#: Methods that train the backbone unless told otherwise.
TRAIN_BACKBONE = ("full", "hyperprompt", "routed_hyperprompt")
#: method → keys of `train`.
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "full": WHOLE,
    "hyperprompt": WHOLE,
    "routed_hyperprompt": WHOLE,
    "prompt_tuning": {"learning_rate": 5e-2},
    "smop": {"learning_rate": 0.4, "group_learning_rates": {"router": 1e-2}},
    "p_tuning": {"learning_rate": 0.15, "group_learning_rates": {"hypernetwork": 3e-3}},
    "prefix_tuning": {"learning_rate": 0.1, "group_learning_rates": {"hypernetwork": 3e-3}},
    "dept": {"learning_rate": 5e-2, "group_learning_rates": {"embedding": 1e-3}},
    "attempt": {"learning_rate": 5e-2, "group_learning_rates": {"router": 1e-3}},
    "mpt": {"learning_rate": 0.5, "group_learning_rates": {"task": 0.1}},
    "adapter": {"learning_rate": 3e-3},
    "hyperformer": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 3e-3},
}


def of(method: str, train_backbone: bool) -> dict[str, Any]:
    """Return keys of `train`. train_backbone: is the backbone trained with the method?"""
    training = dict(TRAINING[method])
    if train_backbone and training["learning_rate"] != BACKBONE_RATE:
        rates = {**training.get("group_learning_rates", {}), "backbone": BACKBONE_RATE}
        training |= {"group_learning_rates": rates}
    return training | ({"scale_parameter": True} if train_backbone else {})


def filled(table: Mapping[str, Any], default_method: str) -> dict[str, Any]:
    """Return a config's table with what its section `train` leaves out; as it is where that states a learning rate."""
    method, train, backbone = (table.get(key, {}) for key in ("method", "train", "backbone"))
    if not all(isinstance(section, Mapping) for section in (method, train, backbone)):
        return dict(table)  # sections that are made already, or pydantic says what is wrong
    name, trainable = method.get("name", default_method), backbone.get("trainable")
    if name not in TRAINING or train.get("learning_rate") is not None:
        return dict(table)
    training = of(name, name in TRAIN_BACKBONE if trainable is None else bool(trainable))
    stated = {key: value for key, value in train.items() if value is not None}
    rates = {**training.get("group_learning_rates", {}), **stated.get("group_learning_rates", {})}
    return {**table, "train": {**training, **stated, "group_learning_rates": rates}}
