"""The desk of the endpoint: which models are served in which version, which one a row is for, how many rows wait.

A request is bound to versions when it is taken, so a version that is replaced meanwhile still answers it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyprompt import registry
from polyprompt.errors import PolypromptError, hint
from polyprompt.serving_engine import Ask, Engines, Reply
from polyprompt.serving_limits import Limits, Refusal, Waiting
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_models import Loaded, Spec, locate
from polyprompt.serving_schema import Answer, ModelInfo

#: How often aliases are looked up.
WATCH_SECONDS = 0.3
#: A version that could not be loaded is tried again after so long: each try may copy gigabytes.
RETRY_SECONDS = 30.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A model that answers. error: why the version that its source means now does not."""

    spec: Spec
    loaded: Loaded
    error: str = ""

    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.spec.name,
            source=self.spec.source,
            version=self.spec.version,
            backbone_sha256=self.loaded.backbone_sha256,
            shared=self.loaded.shared,
            tasks=list(self.loaded.tasks),
            error=self.error,
        )


class Desk:
    """What the HTTP routes call. Lives in one event loop."""

    def __init__(self, engines: Engines, uri: str, limits: Limits, metrics: Metrics) -> None:
        """uri: of the tracking store, for sources models:/…."""
        self._engines, self._uri, self._limits, self._metrics = engines, uri, limits, metrics
        self._served: Mapping[str, Served] = {}
        self._changing = asyncio.Lock()
        #: Being loaded; not forgotten meanwhile.
        self._coming: Spec | None = None
        #: By model the version that its alias meant and that could not be loaded, and when.
        self._failed: dict[str, tuple[Spec, float]] = {}
        self.waiting = Waiting(limits.waiting_rows)
        metrics.waiting.set_function(lambda: self.waiting.rows)

    def models(self) -> list[ModelInfo]:
        return [served.info() for served in self._served.values()]

    async def put(self, name: str, source: str) -> ModelInfo:
        """Serve what a source means under a name, in place of what was served there.

        Raises Refusal (422) where it cannot be loaded; what was served goes on then.
        """
        async with self._changing:
            try:
                return await self._put(await asyncio.to_thread(locate, name, source, self._uri))
            except PolypromptError as error:
                self._metrics.loads.labels(name if name in self._served else "", "failed").inc()
                raise Refusal(422, "not_loadable", str(error)) from error

    async def drop(self, name: str) -> None:
        """Serve the model no more. Raises Refusal (404) where it is not served."""
        async with self._changing:
            self._find(name)
            self._served = {key: served for key, served in self._served.items() if key != name}
            self._metrics.loads.labels(name, "dropped").inc()

    async def watch(self) -> None:
        """Follow the aliases, for ever. A version that cannot be loaded leaves the old one in its place."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name, served in self._served.items():
                if served.spec.source.startswith(registry.ADDRESS) and "@" in served.spec.source:
                    await self._follow(name, served)

    async def ready(self) -> None:
        """Raises Refusal (503) where nothing can be answered now."""
        if not self._served:
            raise Refusal(503, "not_ready", "no model is served yet; PUT /admin/models/NAME loads one", retry_seconds=1)
        try:
            async with asyncio.timeout(5):
                await self._engines.check()
        except Exception as error:
            message = f"no replica answers: {type(error).__name__}; they are started anew, try again"
            raise Refusal(503, "not_ready", message, retry_seconds=5) from error

    async def ask(self, rows: Sequence[Mapping[str, Any]], model: str | None, mode: str | None) -> list[Answer]:
        """Answer rows, in order; a row that does not fit has its error.

        Raises Refusal: 404 for a model that is not served, 422 where no row fits, 503 for more rows than may wait, 504
        after the limit's time, 500 where a row could not be answered and it is not the row's fault.
        """
        if not self._served:
            raise Refusal(404, "no_model", "no model is served; PUT /admin/models/NAME loads one")
        if model is not None:
            self._find(model)
        chosen = [self._choose(str(row["task"]), model) for row in rows]
        asks = [Ask(one.spec, row, mode) for row, one in zip(rows, chosen, strict=True) if isinstance(one, Served)]
        with self.waiting.hold(len(rows)):
            try:
                async with asyncio.timeout(self._limits.timeout_seconds):
                    replies = iter(await self._engines.answer(asks, self._wanted()) if asks else [])
            except TimeoutError:
                raise Refusal(
                    504,
                    "timed_out",
                    f"no answer within {self._limits.timeout_seconds:g} seconds; send fewer rows at a time",
                    limit=self._limits.timeout_seconds,
                ) from None
        answers = [
            self._answer(one, next(replies)) if isinstance(one, Served) else _without_model(str(row["task"]), one)
            for row, one in zip(rows, chosen, strict=True)
        ]
        if all(answer.error for answer in answers):
            raise Refusal(422, "no_row_fits", f"rows[0]: {answers[0].error}")
        return answers

    async def _put(self, spec: Spec) -> ModelInfo:
        old = self._served.get(spec.name)
        if old is None or old.spec != spec:
            self._coming = spec
            try:
                # Everyone has it before anyone is asked for it.
                loaded = await self._engines.load(spec, self._wanted())
            finally:
                self._coming = None
            self._served = {**self._served, spec.name: Served(spec, loaded)}
            self._metrics.loads.labels(spec.name, "loaded").inc()
            log.warning("%s: version %s of %s is served", spec.name, spec.version, spec.source)
        return self._served[spec.name].info()

    def _wanted(self) -> frozenset[Spec]:
        coming = () if self._coming is None else (self._coming,)
        return frozenset((*(served.spec for served in self._served.values()), *coming))

    async def _follow(self, name: str, served: Served) -> None:
        try:
            spec = await asyncio.to_thread(locate, name, served.spec.source, self._uri)
            failed, when = self._failed.get(name, (None, 0.0))
            if spec == failed and time.monotonic() < when + RETRY_SECONDS:
                return
            if spec != served.spec:
                async with self._changing:
                    if self._served.get(name) is served:
                        await self._replace(name, spec)
            elif served.error:
                self._note(name, served, "")
        except Exception as error:  # whatever it is, the next look may find better
            said = error.message if isinstance(error, Refusal) else str(error)
            if said != served.error:
                log.warning("%s stays at version %s: %s", name, served.spec.version, said)
                self._metrics.loads.labels(name, "failed").inc()
                self._note(name, served, said)

    async def _replace(self, name: str, spec: Spec) -> None:
        try:
            await self._put(spec)
        except Exception:
            self._failed[name] = spec, time.monotonic()
            raise

    def _note(self, name: str, served: Served, error: str) -> None:
        if self._served.get(name) is served:
            self._served = {**self._served, name: replace(served, error=error)}

    def _find(self, name: str) -> Served:
        if name not in self._served:
            known = ", ".join(self._served) or "none"
            message = f"model {name!r} is not served; there is {known}.{hint(name, self._served)}"
            raise Refusal(404, "unknown_model", message)
        return self._served[name]

    def _choose(self, task: str, model: str | None) -> Served | str:
        """Return the model for a row, or the error that there is none, or more than one."""
        if model is not None:
            return self._served[model]
        if len(self._served) == 1:
            return next(iter(self._served.values()))
        known = {own.name: served for served in self._served.values() for own in served.loaded.tasks}
        counts = Counter(own.name for served in self._served.values() for own in served.loaded.tasks)
        if counts[task] == 1:
            return known[task]
        if not counts[task]:
            return f"task {task!r} is of none of the models; there is {', '.join(known)}.{hint(task, known)}"
        names = [name for name, one in self._served.items() if task in {own.name for own in one.loaded.tasks}]
        return f"task {task!r} is known to {' and '.join(names)}; say which is meant in `model`"

    def _answer(self, served: Served, reply: Reply) -> Answer:
        if reply.broken:
            raise Refusal(500, "broken", reply.error)
        name, version = served.spec.name, served.spec.version
        task = reply.task if not reply.error else ""
        outcome = "error" if reply.error else "answered"
        self._metrics.rows.labels(name, version, task, outcome).inc()
        self._metrics.batches.observe(reply.batch_rows)
        return Answer(
            task=reply.task,
            model=name,
            version=version,
            prediction=reply.prediction,
            score=reply.score,
            choice_scores=dict(reply.choice_scores),
            error=reply.error,
        )


def _without_model(task: str, error: str) -> Answer:
    return Answer(task=task, model="", version="", prediction="", score=None, choice_scores={}, error=error)
