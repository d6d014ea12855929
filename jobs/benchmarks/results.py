"""From clocks and counts to figures, and the file that keeps them."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from pydantic import ValidationError

from benchmarks.cases import Case, Group
from benchmarks.ratios import Ratio
from polyprompt import checkpoint
from polyprompt.errors import DataError
from polyprompt.result import faults, write_whole
from polyprompt.section import Section


class Spread(NamedTuple):
    """A median over turns, with the least and the most of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


class Measured(Section):
    """What was found of a case. seconds: of the steps of each turn. rates: of a GEMM, the best shape's operations per
    second in each turn. losses: of every step, by trial. facts: see child.facts and meter.Meter."""

    case: Case
    facts: dict[str, float]
    seconds: list[list[float]]
    rates: list[float]
    losses: list[list[float]]

    @property
    def step_seconds(self) -> list[float]:
        """Mean over the steps of each turn."""
        return [statistics.fmean(turn) for turn in self.seconds]

    @property
    def examples_per_second(self) -> list[float]:
        return [self.facts["rows"] / seconds for seconds in self.step_seconds]

    @property
    def flops_per_second(self) -> list[float]:
        """A GEMM's are its best shape's."""
        return self.rates or [self.facts["step_flops"] / seconds for seconds in self.step_seconds]

    @property
    def above_backbone_bytes(self) -> float:
        return self.facts["method_bytes"] + self.facts["peak_step_bytes"]


class Machine(Section):
    """Where and of what it was measured: figures of one file are of one machine and one state of the code."""

    processor: str
    num_cpus: int
    threads: int
    device: str
    memory_gib: float
    system: str
    torch: str
    transformers: str
    commit: str

    @classmethod
    def here(cls, threads: int, device: str) -> "Machine":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            processor=_processor(device),
            num_cpus=os.cpu_count() or 1,
            threads=threads,
            device=device,
            memory_gib=round(pages / 2**30, 1),
            system=platform.platform(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            commit=checkpoint.git_commit(),
        )


class Results(Section):
    """All that was measured. groups: by name, as they were and what was found. tables: by title, headings and rows."""

    machine: Machine
    groups: dict[str, tuple[Group, list[Measured]]]
    tables: dict[str, tuple[list[str], list[list[str]]]]

    def with_group(self, group: Group, measured: Sequence[Measured]) -> "Results":
        return self.model_copy(update={"groups": {**self.groups, group.name: (group, list(measured))}})

    def with_table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Results":
        return self.model_copy(update={"tables": {**self.tables, title: (list(headings), [list(row) for row in rows])}})

    def has(self, group: Group) -> bool:
        return group.name in self.groups and self.groups[group.name][0] == group

    def write(self, path: Path) -> None:
        write_whole(path, f"{json.dumps(self.model_dump(mode='json'), indent=1)}\n".encode())

    @staticmethod
    def read(path: Path) -> "Results":
        """Raises DataError for a file of another version."""
        try:
            return Results.model_validate_json(path.read_text())
        except ValidationError as error:
            raise DataError(f"{path} is not of this version ({faults(error)}); give another --out") from None


class Found(NamedTuple):
    """A ratio as it came out."""

    ratio: Ratio
    value: Spread

    @property
    def met(self) -> bool:
        bound = self.ratio.bound
        return self.value.median >= bound if self.ratio.direction == "at least" else self.value.median <= bound


def found(ratio: Ratio, groups: Mapping[str, tuple[Group, Sequence[Measured]]]) -> Found | None:
    """Compute a ratio; None where its cases were not measured."""
    by_name = {measured.case.name: measured for measured in groups.get(ratio.group, (None, []))[1]}
    if ratio.numerator not in by_name or ratio.denominator not in by_name:
        return None
    above, below = by_name[ratio.numerator], by_name[ratio.denominator]
    return Found(ratio, Spread.of(_quotients(ratio, above, below)))


def _quotients(ratio: Ratio, above: Measured, below: Measured) -> list[float]:
    match ratio.quantity:
        case "examples_per_second" | "step_seconds":
            pairs = zip(getattr(above, ratio.quantity), getattr(below, ratio.quantity), strict=True)
        case "utilisation":
            pairs = zip(above.flops_per_second, below.flops_per_second, strict=True)
        case "above_backbone_bytes":
            pairs = zip([above.above_backbone_bytes], [below.above_backbone_bytes], strict=True)
        case "total_bytes":
            pairs = zip([total_bytes(above)], [total_bytes(below)], strict=True)
        case "loss":
            return [difference(above.losses, below.losses)]
        case _:
            pairs = zip([above.facts[ratio.quantity]], [below.facts[ratio.quantity]], strict=True)
    return [one / other for one, other in pairs]


def total_bytes(measured: Measured) -> float:
    """All tensors at the peak."""
    return measured.facts["backbone_bytes"] + measured.above_backbone_bytes


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return the greatest relative difference of two sets of curves, over the steps that both have.

    Raises DataError where there is none.
    """
    pairs = [(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=False)]
    if not pairs:
        raise DataError("no step has a loss in both cases; take more turns")
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
