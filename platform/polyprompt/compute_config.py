"""The run config's part `compute`: workers, strategy, and where bundles go."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyprompt.section import AbsolutePath, Section


class ComputeConfig(Section):
    """Workers and where their bundles go."""

    #: 0: train in this process, without Ray. N: N Ray Train workers. [N, M]: as many as the cluster has room for, at
    #: least N and at most M; the run starts with fewer and goes on with more from its newest bundle.
    num_workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    #: How often a run of [N, M] workers looks whether there is room for more. A change costs a restart and the steps
    #: since the newest bundle.
    resize_interval_seconds: PositiveFloat = 60.0
    use_gpu: bool = False
    #: Torch threads and Ray CPUs of each worker, and torch threads of an in-process run.
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: PositiveFloat = 1.0
    #: ddp: every worker has the whole model. fsdp: each keeps a part of every parameter, gradient and moment (torch's
    #: FSDP2), for models too large for one; see sharding.py.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    #: Of strategy ddp; fsdp sums in fp32. exact: shard gradients are summed in float64, so the result does not depend
    #: on how workers share the shards; ddp: torch's DistributedDataParallel, which overlaps communication with the
    #: backward pass.
    gradient_sum: Literal["exact", "ddp"] = "exact"
    #: Folder, visible to every worker, whose <run name>/bundles holds the bundles. None: the run's output folder.
    storage_path: AbsolutePath | None = None
    #: Times a run is restarted from its newest bundle after a worker, a node or Ray's controller died or hung.
    max_failures: NonNegativeInt = 3
    #: How long workers wait for one that does not come before it is named and the run is restarted. Longer than any
    #: worker may take for its part of an evaluation.
    hang_timeout_seconds: PositiveFloat = 1800.0
    #: How long a bundle that cannot be written (a full disk, a folder that is away) is tried again.
    storage_timeout_seconds: NonNegativeFloat = 120.0

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers(self) -> str:
        """For people: "2", or "1 to 4"."""
        fewest, most = self.fewest_workers, self.most_workers
        return str(most) if isinstance(self.num_workers, int) else f"{fewest} to {most}"

    @property
    def summing(self) -> Literal["exact", "ddp", "fsdp"]:
        """How gradients are summed."""
        return "fsdp" if self.strategy == "fsdp" else self.gradient_sum

    @model_validator(mode="after")
    def _elastic(self) -> "ComputeConfig":
        if isinstance(self.num_workers, int):
            return self
        if self.fewest_workers >= self.most_workers:
            raise ValueError(
                f"compute.num_workers={list(self.num_workers)} must be [fewest, most], the first below the second. "
                "Give one number for a fixed count"
            )
        if self.use_gpu and self.gpus_per_worker % 1:
            raise ValueError(
                f"compute.num_workers={list(self.num_workers)} needs whole GPUs, not compute.gpus_per_worker="
                f"{self.gpus_per_worker:g}: Ray Train does not count parts of GPUs there. Give one number of workers"
            )
        return self

    @model_validator(mode="after")
    def _storage_is_no_hang(self) -> "ComputeConfig":
        if self.storage_timeout_seconds >= self.hang_timeout_seconds:
            raise ValueError(
                f"compute.storage_timeout_seconds={self.storage_timeout_seconds:g} must be below compute."
                f"hang_timeout_seconds={self.hang_timeout_seconds:g}: the others wait while one worker tries to write"
            )
        return self
