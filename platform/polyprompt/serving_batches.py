"""One dynamic batch for all who ask: whatever waits while the model is busy is answered together next."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Reply = TypeVar("Reply")


class Batcher(Generic[Ask, Reply]):
    """Answers what is asked from many coroutines of one event loop, in order, in one thread."""

    def __init__(
        self, work: Callable[[Sequence[Ask]], Sequence[Reply]], *, max_rows: int, gather_seconds: float = 0.002
    ) -> None:
        """work: answers a batch of at most max_rows; it runs in the thread. gather_seconds: an idle model waits so long
        for company to the first that asks."""
        self._work, self._max_rows, self._gather_seconds = work, max_rows, gather_seconds
        self._waiting: deque[tuple[Ask, asyncio.Future[Reply]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def answer(self, asks: Sequence[Ask]) -> list[Reply]:
        """Return the replies, in order. What is asked by a caller that is cancelled is not worked on, if it still
        waits. An error of `work` comes to everyone in its batch."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in asks]
        self._waiting.extend(zip(asks, futures, strict=True))
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
        batch: list[tuple[Ask, asyncio.Future[Reply]]] = []
        while self._waiting and len(batch) < self._max_rows:
            ask, future = self._waiting.popleft()
            if not future.done():
                batch.append((ask, future))
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
