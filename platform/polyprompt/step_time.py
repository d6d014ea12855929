"""How long a training step takes on a machine: a small model, fitted to steps that were measured there.

    seconds = a · F/W + b · F/(H·W) + c · passes + d · bytes + e · bytes · (W - 1)/W

F: operations of the global batch, forward and backward; W: workers; H: hidden size of the backbone; passes: forward and
backward passes of one worker, its shards times their micro-batches; bytes: of the trained parameters. So a is one over
the rate of large matrix products; b adds what grows with the activations, which are read and written once for about H
operations each; c is what a pass costs however small it is; d the optimizer and the sum of the gradients; e their way
between workers. The constants are those of one precision, device and number of threads a worker.

`jobs/benchmark.py --fit` measures and fits them, and keeps them in `file()`; a dry run reads them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeFloat, ValidationError
from scipy.optimize import nnls

from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError, DataError
from polyprompt.result import faults, write_whole
from polyprompt.section import Section, cache


class Load(NamedTuple):
    """What a step has to do; see the module's formula. trained_bytes: in fp32, as they are trained."""

    flops: float
    hidden: int
    passes: int
    trained_bytes: int
    workers: int

    @property
    def terms(self) -> tuple[float, ...]:
        """What the constants are multiplied by, in their order."""
        own = self.flops / self.workers
        sent = self.trained_bytes * (self.workers - 1) / self.workers
        return own, own / self.hidden, self.passes, self.trained_bytes, sent


def load(config: RunConfig, *, flops_of_a_row: float, hidden: int, num_trained_parameters: int) -> Load:
    """Return what a step of a run has to do. flops_of_a_row: forward and backward, a mean."""
    workers = max(1, config.compute.fewest_workers)
    return Load(
        flops=flops_of_a_row * config.train.batch_size,
        hidden=hidden,
        passes=-(-config.train.num_shards // workers) * config.train.gradient_accumulation_steps,
        trained_bytes=4 * num_trained_parameters,
        workers=workers,
    )


class StepTime(Section):
    """The constants, in seconds. Each is at least 0."""

    per_flop: NonNegativeFloat
    per_flop_by_hidden: NonNegativeFloat
    per_pass: NonNegativeFloat
    per_trained_byte: NonNegativeFloat
    per_sent_byte: NonNegativeFloat
    #: Greatest relative error on steps that the fit had not seen.
    held_out_error: NonNegativeFloat | None = None

    def seconds(self, load: Load) -> float:
        """Estimate a step."""
        constants = (
            self.per_flop, self.per_flop_by_hidden, self.per_pass, self.per_trained_byte, self.per_sent_byte,
        )  # fmt: skip
        return sum(constant * term for constant, term in zip(constants, load.terms, strict=True))


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> StepTime:
    """Return the constants of least squared relative error. Raises ConfigError for fewer steps than constants.

    What the loads do not tell apart (such as sending, where all have one worker) is 0.
    """
    terms = np.array([load.terms for load in loads], dtype=float)
    if len(terms) < 5 or len(terms) != len(seconds):
        raise ConfigError(f"a fit of 5 constants needs at least 5 measured steps, not {len(terms)} of {len(seconds)}")
    relative = terms / np.asarray(seconds)[:, None]
    # The constants differ by many orders of magnitude.
    size = np.linalg.norm(relative, axis=0)
    size[size == 0] = 1.0
    found, _ = nnls(relative / size, np.ones(len(terms)))
    return StepTime(**dict(zip(StepTime.model_fields, map(float, found / size), strict=False)))


def error(fitted: StepTime, loads: Sequence[Load], seconds: Sequence[float]) -> float:
    """Return the greatest relative error."""
    return max(abs(fitted.seconds(load) / measured - 1) for load, measured in zip(loads, seconds, strict=True))


class Rates(Section):
    """What was fitted on one machine. fits: by `key`. machine: in words."""

    machine: str
    fits: dict[str, StepTime]

    def with_fits(self, fits: Mapping[str, StepTime]) -> "Rates":
        return self.model_copy(update={"fits": {**self.fits, **fits}})


def key(config: RunConfig) -> str:
    """Return the name of the fit that a run needs: on a GPU the threads of the host do not matter."""
    threads = config.compute.cpus_per_worker
    where = "GPU" if config.compute.use_gpu else "1 thread" if threads == 1 else f"{threads} threads"
    return f"{config.train.precision}, {where}"


def file() -> Path:
    """Return where the rates of this machine are kept."""
    return cache() / "step_time.json"


def read(path: Path) -> Rates | None:
    """Return the rates, None where there are none yet. Raises DataError for a file that is no such."""
    if not path.exists():
        return None
    try:
        return Rates.model_validate(json.loads(path.read_text()))
    except (ValidationError, json.JSONDecodeError) as found:
        what = faults(found) if isinstance(found, ValidationError) else str(found)
        raise DataError(
            f"{path} holds no measured rates ({what}); write it anew: python jobs/benchmark.py --fit"
        ) from None


def write(path: Path, rates: Rates) -> None:
    write_whole(path, f"{json.dumps(rates.model_dump(), indent=1)}\n".encode())
