"""The steps that a machine's rates are fitted to, and the fit."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import METHODS, Case, Group
from benchmarks.results import Machine, Measured, Spread
from benchmarks.setting import Setting, config_of
from polyprompt import step_time
from polyprompt.step_time import Load, Rates, StepTime

SMOP, FULL, HYPERPROMPT = METHODS["smop"], METHODS["full"], METHODS["hyperprompt"]
#: Backbone, method, tokens, rows, workers. Sizes, lengths and what is trained vary apart from each other.
FITTED: list[tuple[Any, dict[str, Any], int, int, int]] = [
    ("embedded", SMOP, 64, 8, 1),
    ("embedded", SMOP, 256, 8, 1),
    ("embedded", FULL, 64, 8, 1),
    ("embedded", FULL, 256, 16, 1),
    ("embedded", FULL, 128, 8, 2),
    ("t5-small", SMOP, 64, 8, 1),
    ("t5-small", SMOP, 256, 4, 1),
    ("t5-small", FULL, 64, 4, 1),
    ("t5-small", FULL, 128, 8, 1),
    ("t5-small", FULL, 64, 4, 2),
    ("t5-base", SMOP, 64, 4, 1),
    ("t5-base", SMOP, 128, 4, 2),
    ("t5-base", FULL, 64, 2, 1),
]
HELD_OUT: list[tuple[Any, dict[str, Any], int, int, int]] = [
    ("embedded", HYPERPROMPT, 128, 16, 1),
    ("t5-small", HYPERPROMPT, 96, 8, 1),
    ("t5-small", SMOP, 128, 8, 2),
    ("t5-base", SMOP, 160, 4, 1),
]


KINDS = {True: "fitted", False: "held out"}
HEADINGS = ("Step", "Measured, s", "Estimated, s", "Error")


def groups(precision: Any, threads: int, num_cpus: int) -> list[Group]:
    """Return the steps of one precision, each alone; those of more workers than the machine holds are left out."""
    points = [(True, point) for point in FITTED] + [(False, point) for point in HELD_OUT]
    cases = [
        Case(
            name=f"{KINDS[fitted]}: {method['name']}, {backbone}, {rows} × {tokens}, workers {workers}",
            loop="fit", method=method, backbone=backbone, precision=precision, lengths=tokens, rows=rows,
            shards=2, workers=workers, threads=threads,
        )
        for fitted, (backbone, method, tokens, rows, workers) in points
        if workers * threads <= num_cpus
    ]  # fmt: skip
    return [Group(name=f"{precision}, {case.name}", cases=[case], turns=3) for case in cases]


def load_of(measured: Measured, setting: Setting) -> Load:
    """Return what a step of a case has to do, as a dry run would say it."""
    config, facts = config_of(measured.case, setting), measured.facts
    workers = config.compute.model_copy(update={"num_workers": measured.case.workers})
    return step_time.load(
        config.model_copy(update={"compute": workers}),
        flops_of_a_row=facts["closed_step_flops"] / facts["rows"],
        hidden=int(facts["hidden"]),
        num_trained_parameters=int(facts["trained_parameters"]),
    )


def fit(measured: Sequence[Measured], setting: Setting) -> StepTime:
    """Return the constants, with their error on what was held out."""
    parts: dict[bool, tuple[list[Load], list[float]]] = {True: ([], []), False: ([], [])}
    for one in measured:
        loads, seconds = parts[one.case.name.startswith(KINDS[True])]
        loads.append(load_of(one, setting))
        seconds.append(Spread.of(one.step_seconds).median)
    found = step_time.fit(*parts[True])
    return found.model_copy(update={"held_out_error": step_time.error(found, *parts[False])})


def rows(measured: Sequence[Measured], setting: Setting, fitted: StepTime) -> list[tuple[str, ...]]:
    """Return case, measured and estimated seconds, and the error."""
    found = []
    for one in measured:
        seconds, estimated = Spread.of(one.step_seconds).median, fitted.seconds(load_of(one, setting))
        found.append((one.case.name, f"{seconds:.3g}", f"{estimated:.3g}", f"{estimated / seconds - 1:+.0%}"))
    return found


def keep(fits: dict[str, StepTime], machine: Machine) -> Rates:
    """Add fits to the rates of this machine, and return them all. Those of another machine are replaced."""
    words = f"{machine.processor}, {machine.num_cpus} CPUs"
    known = step_time.read(step_time.file())
    rates = known if known is not None and known.machine == words else Rates(machine=words, fits={})
    rates = rates.with_fits(fits)
    step_time.write(step_time.file(), rates)
    return rates
