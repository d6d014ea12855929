"""The processes that share a global batch, and how they add up its gradients.

Works with torch.distributed alone: whoever started the processes (Ray Train, torchrun, nobody) does not matter.

`exact`: every shard's fp32 gradient, rounded to a multiple of 2^-52, is added to a float64 buffer, the buffers are
summed over processes, and the sum is rounded to fp32 once. Multiples of 2^-52 add up without any rounding as long as
their sums stay within +-2, so the result does not depend on which process computed which shard, and runs on 1, 2, 3, …
processes stay equal, not merely close. Float64 alone would not do: a shard's 1e-20 beside another's 1e-4 is lost or
not, as the order has it, and decides ties of the last rounding. What is dropped, at most 1.1e-16 a shard, is beneath
the optimizers' own epsilon. An element of 2 and more has float64's 29 spare bits as its only protection.
Costs: 8 bytes a trained parameter, and no overlap of communication with the backward pass.
`ddp`: torch's DistributedDataParallel. It overlaps, and its rounding depends on the number of processes.
`fsdp`: torch's FSDP2, which has cut up the model (sharding.py) and sums behind each layer. A forward or backward pass
ends only when all processes do it, so all have equally many.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from polyprompt.watch import Watch

#: Numbers that are added at once: they stay in a processor's cache.
PIECE = 2**18
#: Adding and subtracting it rounds a float64 below 0.5 to a multiple of 2^-52. An fp32 number above is one already.
ROUNDING = 1.5


class Workers:
    """This process among its peers. `num` processes; `rank`: its number; `shards`: those computed here; `first`: does
    it report?"""

    def __init__(
        self,
        num_shards: int,
        summing: Literal["exact", "ddp", "fsdp"],
        wants_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """wants_to_stop: asked of this process at each step; see `stop`."""
        joined = dist.is_available() and dist.is_initialized()
        self.num = dist.get_world_size() if joined else 1
        rank = dist.get_rank() if joined else 0
        self.first = rank == 0
        self.shards: Sequence[int] = range(rank, num_shards, self.num)
        self.rank = rank
        self._summing = summing
        #: Are a shard's gradients there when its own passes are done, and not reduced while they run?
        self.exact = summing == "exact"
        self._parameters: list[nn.Parameter] = []
        self._summed: list[Tensor] = []
        #: For the sums of a step. Zeros between steps.
        self._room: Tensor | None = None
        self._wants_to_stop = wants_to_stop
        self._watch: Watch | None = None
        #: Did any process want to stop when the last step was finished? The same on all of them.
        self.stop = False

    def start(self, model: nn.Module, num_totals: int) -> nn.Module:
        """Make the trained parameters equal on all processes; return the module whose forward is to be called.

        num_totals: numbers that `finish` sums beside the gradients.
        """
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self._totals = torch.zeros(num_totals + 1, dtype=torch.float64, device=device)
        if self._summing == "fsdp":
            return model
        if not self.exact:
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.num > 1:
            with self.meeting():
                for parameter in self._parameters:
                    dist.broadcast(parameter.detach(), src=0)
        self.begin()
        return model

    def begin(self, made: Sequence[Tensor] = ()) -> None:
        """Before the shards of a step. made: tensors between parameters and losses, of equal sizes on all processes,
        whose gradients are summed as the parameters' are."""
        if not self.exact:
            return
        self._summed = [*self._parameters, *(tensor for tensor in made if tensor.requires_grad)]
        size = sum(tensor.numel() for tensor in self._summed) + len(self._totals)
        if self._room is None or len(self._room) < size:
            self._room = torch.zeros(size, dtype=torch.float64, device=self._totals.device)
        self._buffer = self._room[:size]

    @property
    def loss_scale(self) -> float:
        """Factor of the loss: DDP and FSDP average over processes where the global batch wants the sum."""
        return 1.0 if self.exact else float(self.num)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass; last: it is this process's last of the step."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def add_shard(self, totals: Tensor) -> None:
        """Take in a finished shard: its gradients, which are cleared, and its totals (float64, 1-D)."""
        if not self.exact:
            self._totals[:-1] += totals
            return
        offset = 0
        for tensor in self._summed:
            if tensor.grad is not None:
                _add(self._buffer[offset : offset + tensor.numel()], tensor.grad.reshape(-1))
                tensor.grad = None
            offset += tensor.numel()
        self._buffer[offset:-1] += totals

    def finish(self) -> Tensor:
        """Sum over processes; every parameter's gradient is then the global batch's, and so is that of what `begin`
        was given. Returns the summed totals."""
        summed = self._buffer if self.exact else self._totals
        # The wish to stop travels with the sums: asking for it apart would cost a round a step.
        summed[-1] = float(self._wants_to_stop())
        with self.meeting():
            if self.num > 1:
                dist.all_reduce(summed)
            self.stop = bool(summed[-1])  # on a GPU the sum is waited for here
        if not self.exact:
            totals = summed[:-1].clone()
            summed.zero_()
            return totals
        offset = 0
        for tensor in self._summed:
            end = offset + tensor.numel()
            tensor.grad = summed[offset:end].to(tensor.dtype).view_as(tensor)
            offset = end
        totals = summed[offset:-1].clone()
        summed.zero_()
        return totals

    def by_the_first(self, work: Callable[[], None], parameters: Sequence[nn.Parameter]) -> None:
        """Let the first process do what adds to these parameters' gradients, and take over what it has. Processors
        differ in the last bits: done on each, it would let their weights drift apart."""
        if self.first:
            work()
        if self.num > 1:
            with self.meeting():
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.broadcast(parameter.grad, src=0)

    def mine(self, pieces: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a list that all processes hold."""
        return pieces[self.rank :: self.num]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in order, on all processes."""
        if self.num == 1:
            return [value]
        values: list[Any] = [None] * self.num
        with self.meeting():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def watched(self, timeout_seconds: float, alarm: Callable[[str], None]) -> Iterator[None]:
        """While inside, a process that the others wait for longer than the time-out is named to `alarm` (watch.py)."""
        if self.num == 1:
            yield
            return
        # Ray and torchrun set it: where the first process is.
        host = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.first else None
        name = f"worker {self.rank} of {self.num} (machine {socket.gethostname()}, process {os.getpid()})"
        told = self.gather((name, store.port if store else 0))
        if store is None:
            store = dist.TCPStore(host, told[0][1], is_master=False, wait_for_workers=False)
        self._watch = Watch([name for name, _ in told], self.rank, store, timeout_seconds, alarm)
        try:
            yield
        finally:
            self._watch.end()
            self._watch = None

    def meeting(self) -> AbstractContextManager[None]:
        """Around what ends only when all processes have come to it."""
        return self._watch.meeting() if self._watch else nullcontext()


def _add(sums: Tensor, more: Tensor) -> None:
    """Add fp32 numbers to float64 sums, on their grid (see above).

    Piece by piece, converted first: torch's addition of two kinds is slow.
    """
    for own, part in zip(sums.split(PIECE), more.split(PIECE), strict=True):
        own += part.double().add_(ROUNDING).sub_(ROUNDING)
