"""One dynamic batch for all who ask: whatever waits while the model is busy is answered together next."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

#: How often others may go before a kind that waits, but for those that have waited longer.
PATIENCE = 3
Ask = TypeVar("Ask")
Reply = TypeVar("Reply")
Lane = tuple[Hashable, bool]
"""A kind, and whether it is the slow part of it."""


class Batcher(Generic[Ask, Reply]):
    """Answers what is asked from many coroutines of one event loop, in one thread, each kind in batches of its own.

    The kind of which most waits goes next, so that rare ones gather too; after it was passed over PATIENCE times, the
    one that was passed over most often. What is slow waits as a kind of its own, and takes others of its kind along.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Ask]], Sequence[Reply]],
        kind: Callable[[Ask], Hashable],
        *,
        max_rows: int,
        slow: Callable[[Ask], bool] = lambda ask: False,
        gather_seconds: float = 0.002,
    ) -> None:
        """work: answers a batch of one kind and at most max_rows; it runs in the thread. slow: does an ask hold up its
        batch, about as much as many of its like would? gather_seconds: an idle model waits so long for company to the
        first that asks."""
        self._work, self._max_rows, self._gather_seconds = work, max_rows, gather_seconds
        self._lane = lambda ask: (kind(ask), slow(ask))
        self._waiting: dict[Lane, deque[tuple[Ask, asyncio.Future[Reply]]]] = {}
        self._passed: dict[Lane, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def answer(self, asks: Sequence[Ask]) -> list[Reply]:
        """Return the replies, in order. What is asked by a caller that is cancelled is not worked on, if it still
        waits. An error of `work` comes to everyone in its batch."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in asks]
        for ask, future in zip(asks, futures, strict=True):
            self._waiting.setdefault(self._lane(ask), deque()).append((ask, future))
        if self._task is None:
            self._task = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        """Work until nothing waits."""
        try:
            await asyncio.sleep(self._gather_seconds)
            while self._waiting:
                batch = self._next()
                if batch:
                    await self._reply(batch)
        finally:
            self._task = None

    def _next(self) -> list[tuple[Ask, asyncio.Future[Reply]]]:
        chosen = max(self._waiting, key=lambda lane: self._passed.get(lane, 0))
        if self._passed.get(chosen, 0) < PATIENCE:
            chosen = max(self._waiting, key=lambda lane: len(self._waiting[lane]))
        kind, slow = chosen
        lanes = [lane for lane in (chosen, (kind, False)) if lane in self._waiting] if slow else [chosen]
        self._passed = {lane: self._passed.get(lane, 0) + 1 for lane in self._waiting if lane not in lanes}
        batch: list[tuple[Ask, asyncio.Future[Reply]]] = []
        for lane in lanes:
            queue = self._waiting[lane]
            while queue and len(batch) < self._max_rows:
                ask, future = queue.popleft()
                if not future.done():
                    batch.append((ask, future))
            if not queue:
                del self._waiting[lane]
        return batch

    async def _reply(self, batch: Sequence[tuple[Ask, asyncio.Future[Reply]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            replies = await loop.run_in_executor(self._thread, self._work, [ask for ask, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), reply in zip(batch, replies, strict=True):
            if not future.done():
                future.set_result(reply)
