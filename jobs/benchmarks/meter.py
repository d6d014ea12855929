"""Counts and clocks of one case, inside its process.

Memory. A resident set holds much that no model asked for: libraries, pools of the allocator, what the operating system
has not taken back. So what a case needs is summed from torch's own allocator: every byte that a tensor takes or gives
back after the model is there, and the highest sum of two steps (the second has the optimizer's state too). On a GPU it
is torch.cuda.max_memory_allocated, which is the same sum. Scratch space inside a kernel (oneDNN's) is in neither. The
resident peak of the process is given beside it.
"""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

#: Steps before anything is timed.
WARM_STEPS = 2


class Done(Exception):
    """No more steps are wanted."""


@dataclass
class Meter:
    """Stands behind each step of a loop: clocks it, and waits there while other cases have their turn.

    facts: what is known of the case once it is warm. rates: a GEMM's, of the steps of a turn. losses: of every step, by
    trial; sent when all is over.
    """

    connection: Connection
    device: str
    facts: dict[str, Any]
    memory: bool = True
    rates: list[float] = field(default_factory=list)
    losses: dict[int, list[float]] = field(default_factory=dict)
    over: bool = False
    _warm: int = 0
    _wanted: int = 0
    _seconds: list[float] = field(default_factory=list)
    _since: float = 0.0
    _profile: Any = None

    def begin(self) -> None:
        """Call where the model is there and the first step is next."""
        reset_resident_peak()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif self.memory:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            with _without_stderr():
                self._profile.__enter__()

    def before_optimizer(self) -> None:
        """Call where gradients are there and activations are gone."""
        if self._warm == WARM_STEPS - 1:
            self.facts["held_bytes"] = live_tensor_bytes()

    def arrived(self) -> None:
        """Call after each step. Raises Done when no more are wanted."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._since)
        if self._warm < WARM_STEPS:
            self._warm += 1
            if self._warm < WARM_STEPS:
                return
            self._finish_memory()
            self._send(self.facts)
        elif len(self._seconds) < self._wanted:
            self._since = time.perf_counter()
            return
        else:
            self._send({"seconds": self._seconds})
        self._wait()

    def _wait(self) -> None:
        wanted = self.connection.recv()
        if wanted is None:
            self.over = True
            raise Done
        self._wanted, self._seconds = wanted, []
        self._since = time.perf_counter()

    def _send(self, what: dict[str, Any]) -> None:
        self.connection.send({**what, "rates": list(self.rates)})
        self.rates.clear()

    def _finish_memory(self) -> None:
        if self.device == "cuda":
            self.facts["peak_step_bytes"] = torch.cuda.max_memory_allocated() - self._before
        elif self._profile is not None:
            with _without_stderr():
                self._profile.__exit__(None, None, None)
            self.facts["peak_step_bytes"] = _peak(self._profile)
            self._profile = None
        self.facts["peak_resident_bytes"] = resident_peak()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """torch's profiler writes a line there at each start and stop, whatever its log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak(profiled: profile) -> int:
    """Return the highest sum of what was taken and not yet given back."""
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def live_tensor_bytes() -> int:
    """Return the bytes of all tensors that Python knows of and their gradients, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        # Not isinstance, which asks objects for their __class__: some warn. The tensors of a trace have no data.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), (FakeTensor, FunctionalTensor)):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def reset_resident_peak() -> None:
    """Begin the resident peak anew (Linux; elsewhere it is that of the whole life of the process)."""
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def resident_peak() -> int:
    """Return the highest resident set in bytes."""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_flops(act: Callable[[], object]) -> int:
    """Return the floating-point operations of a call, by torch's counter.

    The counter does not know the fused attention of CPUs, so its formulas are given here: two products forward, four
    backward. What a kernel computes anew in the backward pass is not counted: it is no work of the model.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    with counter:
        act()
    return counter.get_total_flops()


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    *rows, queries, size = query
    return 2 * _product(rows) * queries * key[-2] * (size + value[-1])


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)


def _product(numbers: Any) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def mixed_precision(device: str, precision: str) -> Iterator[None]:
    """Compute as a run of that train.precision does."""
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        yield
