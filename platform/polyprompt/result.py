"""What a finished run says about itself: `result.json`."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from polyprompt.errors import DataError

Scores = dict[str, dict[str, float]]
"""task → metric → value. Every task has the metric `score`. Scores are fractions of 1."""


@dataclass(frozen=True)
class RunResult:
    """The result of one training run. Numbers are made plain Python numbers on construction.

    run_id: MLflow's run id, or "" when tracking is off. eval, mean: of `best_step`, the best evaluation by mean,
    whose bundle is the folder `bundle`; last_bundle: the newest. best_task_steps: the step of each task's best bundle.
    majority: the score of always giving the commonest answer, for tasks that have one. loss_curve: [step, loss] pairs.
    sequence: hash of the (task, example) pairs of all steps; equal means the same data in the same order.
    evaluations: {"step", "mean", "tasks": task → metric → value} of each evaluation, in order.
    inference_flops: estimated, of one row of median length (costs.py); 0 in results from before it was there.
    router_collapse: {"step", "prompt", "share"} of a router that had collapsed at the end (router_health.py), else {}.
    Raises TypeError for a value that is no plain number, text, list or table, naming the field.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    run_id: str
    name: str
    method: str
    backbone: str
    num_trained_parameters: int
    num_method_parameters: int
    num_backbone_parameters: int
    num_steps: int
    num_workers: int
    train_seconds: float
    examples_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    examples_seen: dict[str, int]
    sequence: str
    loss_curve: list[list[int | float]]
    eval: Scores
    majority: dict[str, float]
    best_task_steps: dict[str, int]
    mean: float
    best_step: int
    bundle: str
    last_bundle: str
    stopped_early: bool
    evaluations: list[dict[str, Any]]
    inference_flops: int = 0
    router_collapse: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name), each.name))

    def write(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all. A number that is not finite becomes null."""
        text = json.dumps(_nan_to_null(asdict(self)), indent=2, allow_nan=False, ensure_ascii=False)
        write_whole(path, f"{text}\n".encode())

    @staticmethod
    def read(path: Path) -> "RunResult":
        """Read what `write` wrote; null becomes NaN. Raises DataError naming the file and the field."""
        try:
            return TypeAdapter(RunResult).validate_python(_null_to_nan(json.loads(path.read_text(encoding="utf-8"))))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; a finished run writes it") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not JSON ({error}); run the job again to write it anew") from None
        except ValidationError as error:
            raise DataError(
                f"{path} is not a result of this version ({faults(error)}); run the job again to write it anew"
            ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that others read, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(draft, 0o644)  # mkstemp's 0600 would hide it from the rest of a team
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def faults(error: ValidationError) -> str:
    """Return the first faults of a file, each with its field."""
    return "; ".join(f"{'.'.join(map(str, f['loc'])) or 'file'}: {f['msg']}" for f in error.errors()[:5])


def plain(value: Any, where: str = "value") -> Any:
    """Return a value with numpy scalars and one-element tensors as Python numbers, and paths as text.

    Works through tables and lists. Ray refuses to report anything else. Raises TypeError naming the place.
    """
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case Path():
            return str(value)
        case Mapping():
            return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        return plain(value.item(), where)
    raise TypeError(
        f"{where}: {type(value).__name__} is not a plain number or text; convert it first (.item(), .tolist())"
    )


def _nan_to_null(value: Any) -> Any:
    match value:
        case dict():
            return {key: _nan_to_null(item) for key, item in value.items()}
        case list():
            return [_nan_to_null(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _null_to_nan(value: Any) -> Any:
    match value:
        case dict():
            return {key: _null_to_nan(item) for key, item in value.items()}
        case list():
            return [_null_to_nan(item) for item in value]
        case None:
            return math.nan
    return value
