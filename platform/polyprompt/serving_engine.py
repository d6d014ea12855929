"""What answers: models in one process, and the thread that works off the rows of everyone who asks."""

import asyncio
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from polyprompt.predictor import Prediction, Predictor
from polyprompt.serving_batches import Batcher
from polyprompt.serving_models import Loaded, Shelf, Spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """A row for one version of a model. mode: as of `Predictor.predict`."""

    spec: Spec
    row: Mapping[str, Any]
    mode: str | None = None


@dataclass(frozen=True)
class Reply:
    """batch_rows: rows that were answered together with this one. broken: an error that is not the row's fault."""

    task: str
    prediction: str
    score: float | None
    choice_scores: Mapping[str, float]
    error: str
    batch_rows: int
    broken: bool = False


class Engines(Protocol):
    """One engine or many of them."""

    async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
        """Make everyone ready to answer for the model. wanted: as of `answer`, this one too.

        Raises BundleError, ConfigError, TrackingError.
        """

    async def answer(self, asks: Sequence[Ask], wanted: frozenset[Spec]) -> list[Reply]:
        """Answer rows, in order. wanted: the models that will be asked from now on; others may be forgotten."""

    async def check(self) -> None:
        """Raises an error where nobody can answer."""


class Engine:
    """Models in this process."""

    def __init__(self, *, backbone: str | None = None, device: str = "cpu", batch_rows: int = 64) -> None:
        """backbone, device: of `Predictor`. batch_rows: answered together at most."""
        self._shelf, self._batch_rows = Shelf(backbone=backbone, device=device), batch_rows
        self._batcher = Batcher[tuple[Predictor, Ask], Reply](self._work, _kind, slow=_writes, max_rows=batch_rows)

    async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
        self._shelf.keep(wanted)
        return await asyncio.to_thread(self._shelf.describe, spec)

    async def answer(self, asks: Sequence[Ask], wanted: frozenset[Spec]) -> list[Reply]:
        self._shelf.keep(wanted)
        found = {
            # A process that was started anew has not been told to load; that must not keep others waiting.
            spec: self._shelf.get(spec) if self._shelf.holds(spec) else await asyncio.to_thread(self._shelf.get, spec)
            for spec in {ask.spec for ask in asks}
        }
        return await self._batcher.answer([(found[ask.spec], ask) for ask in asks])

    async def check(self) -> None:
        """This process answers, and that is all there is to check."""

    def _work(self, batch: Sequence[tuple[Predictor, Ask]]) -> list[Reply]:
        """Answer a batch of one model and mode."""
        predictor, first = batch[0]
        found = self._predict(predictor, [ask.row for _, ask in batch], first.mode)
        return [_reply(one, ask, len(batch)) for one, (_, ask) in zip(found, batch, strict=True)]

    def _predict(
        self, predictor: Predictor, rows: Sequence[Mapping[str, Any]], mode: str | None
    ) -> Sequence[Prediction | Exception]:
        """Answer rows of one model; where that breaks, one by one, so that only the row that breaks it goes without."""
        try:
            return predictor.predict(rows, batch_size=self._batch_rows, mode=mode)
        except Exception as error:
            log.exception("a batch of %d rows of %s broke", len(rows), predictor.bundle)
            if len(rows) == 1:
                return [error]
            return [found for row in rows for found in self._predict(predictor, [row], mode)]


def _kind(asked: tuple[Predictor, Ask]) -> Hashable:
    """Rows that can be answered together: of one model and mode."""
    predictor, ask = asked
    return id(predictor), ask.mode


def _writes(asked: tuple[Predictor, Ask]) -> bool:
    """As far as it can be told beforehand: is this row written, piece by piece, beside others that are ranked?"""
    predictor, ask = asked
    return "choices" not in ask.row and ask.row["task"] in predictor.free_text_tasks


def _reply(found: Prediction | Exception, ask: Ask, batch_rows: int) -> Reply:
    if isinstance(found, Exception):
        error = f"the row could not be answered ({type(found).__name__}); the server's log says why"
        return Reply(str(ask.row["task"]), "", None, {}, error, batch_rows, broken=True)
    table = asdict(found)
    del table["input"]
    task = found.task or str(ask.row["task"])
    score = None if found.error else found.score
    return Reply(**{**table, "task": task, "score": score}, batch_rows=batch_rows)
