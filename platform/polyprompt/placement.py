"""How many workers of which size fit where: arithmetic on what machines have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyprompt.config import ComputeConfig

Node = Mapping[str, float]
"""Resources of one machine: CPU, GPU."""


@dataclass(frozen=True)
class Group:
    """Machines that an autoscaler adds when they are asked for. num_nodes: at most; -1: without end."""

    name: str
    resources: Node
    num_nodes: int


@dataclass(frozen=True)
class Room:
    """The workers of one run on a cluster."""

    compute: ComputeConfig
    nodes: Sequence[Node]
    groups: Sequence[Group]

    @property
    def fits(self) -> bool:
        """Is there room for all workers, or the fewest, on the machines that are there, were they idle?"""
        return self._on_nodes >= self.compute.fewest_workers

    @property
    def text(self) -> str:
        need, workers, most = worker(self.compute), self.compute.fewest_workers, self.compute.most_workers
        asked = f"{self.compute.workers} worker{'s' if most > 1 else ''} of {amounts(need)}"
        there = "; ".join(f"{amounts(only(node, need))}: {holds(node, need)}" for node in self.nodes)
        lines = [f"{asked}. Machines and how many each holds: {there}"]
        for group in self.groups:
            count = "any number" if group.num_nodes < 0 else str(group.num_nodes)
            each = f"{amounts(only(group.resources, need))}: {holds(group.resources, need)} each"
            if group.num_nodes and holds(group.resources, need):
                lines.append(f"the autoscaler has {count} of {group.name!r}, {each}")
        if self.fits:
            lines.append(f"the run gets its {min(self._on_nodes, most)} at once where these are idle")
        elif self.groups and self._in_all < workers:
            lines.append(
                f"it never gets them: there are places for {self._in_all:g}. Lower compute.num_workers, "
                "compute.cpus_per_worker or compute.gpus_per_worker, or let the cluster grow further"
            )
        else:
            lines.append(f"{self._on_nodes} of {workers} fit now, and none trains before all are there")
        return "; ".join(lines)

    @property
    def _on_nodes(self) -> int:
        return sum(holds(node, worker(self.compute)) for node in self.nodes)

    @property
    def _in_all(self) -> float:
        """Places on the machines there are or may be. An autoscaler's groups count its present machines too."""
        grown = 0.0
        for group in self.groups:
            each = holds(group.resources, worker(self.compute))
            grown += math.inf if group.num_nodes < 0 and each else max(0, group.num_nodes) * each
        return max(grown, self._on_nodes)


def worker(compute: ComputeConfig) -> dict[str, float]:
    """Return what one worker needs."""
    need: dict[str, float] = {"CPU": float(compute.cpus_per_worker)}
    if compute.use_gpu:
        need["GPU"] = compute.gpus_per_worker
    return need


def holds(node: Node, need: Node) -> int:
    """Return how many workers a machine holds."""
    return math.floor(min(node.get(name, 0.0) / amount for name, amount in need.items()) + 1e-9)


def only(node: Node, need: Node) -> Node:
    """Return a machine's resources of the kinds that are needed."""
    return {name: node.get(name, 0.0) for name in need}


def amounts(resources: Node) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
