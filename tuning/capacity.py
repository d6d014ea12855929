"""How many trials a cluster holds at once, by arithmetic, before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from polyprompt.config import ComputeConfig
from polyprompt.errors import ConfigError
from polyprompt.placement import Node, amounts, holds, only, worker


@dataclass(frozen=True)
class Capacity:
    """num_concurrent: trials that run at once. text: the arithmetic, for people. num_processes: that they are in, or
    whose workers are."""

    num_concurrent: int
    text: str
    num_processes: int


def capacity(compute: ComputeConfig, nodes: Sequence[Node], limit: int | None, per_process: int = 1) -> Capacity:
    """Return how many trials run at once on these nodes, at most `limit`. per_process: trials that share a process.

    A worker lies on one node; the workers of a trial may lie on several. Raises ConfigError, with the arithmetic, if
    not even one trial fits.
    """
    if compute.fewest_workers < compute.most_workers:
        raise ConfigError(
            f"compute.num_workers=[{compute.fewest_workers}, {compute.most_workers}]: the trials of a search have a "
            "fixed number of workers each, or one would take the room of the next. Give one number"
        )
    need, workers = worker(compute), max(1, compute.most_workers)
    room = [holds(node, need) for node in nodes]
    fits = sum(room) // workers
    per_worker = amounts(need)
    trial = (
        f"a trial is {workers} worker{'s' if workers > 1 else ''} of {per_worker}"
        if compute.num_workers
        else (f"a trial is one process of {per_worker}")
    )
    places = "; ".join(f"{amounts(only(node, need))}: {count}" for node, count in zip(nodes, room, strict=True))
    what = "trials" if per_process == 1 else "processes"
    text = f"{trial}; nodes and how many they hold: {places}; {sum(room)} // {workers} = {fits} {what} at once"
    if fits == 0:
        raise ConfigError(
            f"this search cannot be scheduled: {text}. Lower compute.num_workers, compute.cpus_per_worker or "
            "compute.gpus_per_worker, or set RAY_ADDRESS to a larger cluster"
        )
    trials = fits * per_process
    if per_process > 1:
        text += f", each for {per_process} trials that share its backbone: {trials}"
    if limit is not None and limit < trials:
        used = f"{text}, of which search.max_concurrent_trials={limit} are used"
        return Capacity(limit, used, min(fits, limit))
    return Capacity(trials, text, fits)
