"""What a dry run shows: tasks and their shares, parameters, memory, time."""

from collections.abc import Iterator
from datetime import timedelta

from rich.table import Table

from polyprompt import step_time
from polyprompt.config import RunConfig
from polyprompt.memory import Memory
from polyprompt.plan import Plan


def tables(plan: Plan) -> Iterator[Table]:
    """Yield the tables of a checked run: its tasks, its parameters, and one worker's memory."""
    yield _tasks(plan)
    yield _parameters(plan)
    if plan.memory is not None:
        yield _memory(plan.memory)


def time_line(plan: Plan, config: RunConfig) -> str:
    """Say how long the training will take, by the rates measured on this machine, or how to measure them."""
    rates, wanted = step_time.read(step_time.file()), step_time.key(config)
    fitted = None if rates is None else rates.fits.get(wanted)
    if rates is None or fitted is None:
        known = "" if rates is None else f" (there are: {'; '.join(rates.fits)})"
        threads = "" if config.compute.use_gpu else f" --threads {config.compute.cpus_per_worker}"
        return (
            f"Time: not known: no rates were measured here for {wanted}{known}. Measure them: python jobs/benchmark.py "
            f"--fit{threads}"
        )
    seconds = fitted.seconds(plan.step)
    whole = timedelta(seconds=round(seconds * config.train.max_steps))
    error = "" if fitted.held_out_error is None else f", within {fitted.held_out_error:.0%} on steps held out"
    return (
        f"Time: about {whole} to train {config.train.max_steps} steps of {seconds:.3g} s, evaluation and padding not "
        f"counted (rates measured on {rates.machine}: {wanted}{error})"
    )


def _tasks(plan: Plan) -> Table:
    shown = Table(title="Tasks")
    for heading in ("Task", "Train", "Validation", "Share", "Majority", "Cut inputs"):
        shown.add_column(heading, justify="left" if heading == "Task" else "right", no_wrap=True)
    for data in plan.data:
        name = data.task.name
        sizes = (f"{len(data.train):,}", f"{len(data.validation):,}")
        cut = f"{data.train.num_cut_inputs:,}"
        shown.add_row(name, *sizes, f"{plan.shares[name]:.3f}", f"{plan.majority[name]['score']:.3f}", cut)
    return shown


def _parameters(plan: Plan) -> Table:
    shown = Table(title="Parameters")
    for heading in ("Part", "Parameters", "Of the backbone"):
        shown.add_column(heading, justify="left" if heading == "Part" else "right", no_wrap=True)
    backbone = plan.num_backbone_parameters
    for name, count in (
        ("backbone", backbone),
        ("method", plan.num_method_parameters),
        ("trained", plan.num_trained_parameters),
    ):
        shown.add_row(name, f"{count:,}", f"{count / backbone:.2%}")
    return shown


def _memory(memory: Memory) -> Table:
    shown = Table(title="Memory of one worker, estimated")
    shown.add_column("Part", no_wrap=True)
    shown.add_column("GiB at most", justify="right", no_wrap=True)
    for part, size in memory.parts.items():
        shown.add_row(part, f"{size / 2**30:.3f}")
    shown.add_section()
    shown.add_row("at once", f"{memory.at_once / 2**30:.3f}", style="bold")
    return shown
