"""Several runs on one frozen backbone: their micro-batches go through it together, as the rows of one batch.

Each run is the ordinary one (ray_train.run), in a thread. One thread at a time has the turn, so a run need not know of
the others: optimizer, schedule, mixture, evaluation, bundles and tracking are its own, and so is torch's global random
stream, which is put back whenever its turn comes again. It gives the turn away only where loop.fit needs a loss or its
gradient. Once all runs are there, one forward or backward pass of the backbone serves them all. Gradients need no
sorting: a row depends on its own run's parameters alone. A run may come and go at any time.

What a run draws for dropout in the backbone, and how far its attention reaches, is what it would be alone (Part): only
the matrix products see the rows of all runs.

Letters: B rows of a batch, L input tokens with the input prompts, S target tokens, H hidden size.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from polyprompt import backbone as backbones
from polyprompt import packable
from polyprompt.backbone import EncoderDecoder
from polyprompt.backbone_base import Backbone, with_input_prompts
from polyprompt.backbone_config import BackboneConfig
from polyprompt.collation import Batch
from polyprompt.config import RunConfig
from polyprompt.cpu_training import drop
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Part, Prompts, Stack
from polyprompt.model import IGNORED, Loss, PromptedModel

#: Runs share a batch while at most this part of it is padding between them.
MAX_PADDING = 0.25


class RandomStream:
    """torch's global random stream as its owner left it."""

    def __init__(self) -> None:
        self.keep()

    def keep(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def put_back(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from it while inside."""
        self.put_back()
        yield
        self.keep()


@dataclass(frozen=True)
class Rows:
    """What a run asks the loss of. x_BLH, mask_BL: its input prompts are joined already."""

    model: PromptedModel
    x_BLH: Tensor
    mask_BL: Tensor
    labels_BS: Tensor
    prompts: Prompts
    random: RandomStream
    autocast: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return len(self.x_BLH), self.x_BLH.shape[1] + self.labels_BS.shape[1]


class Seat:
    """A run's place in a pack; loop.fit's Together."""

    def __init__(self, pack: "Pack", turn: threading.Lock) -> None:
        self.pack = pack
        self.random = RandomStream()
        #: What the run waits for: the loss of these rows, or the gradient of this objective.
        self.request: Rows | Tensor | None = None
        self.answer: Tensor | BaseException | None = None
        self.answered = threading.Condition(turn)
        self.thread = threading.get_ident()

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raise ConfigError for a run that cannot be here."""
        packable.check(config)

    def hears(self, record: logging.LogRecord) -> bool:
        """A filter of messages: those of the other runs' threads are not this run's."""
        return all(other is self or other.thread != record.thread for other in list(self.pack.seats))

    def forward(self, model: PromptedModel, micro: Batch) -> Loss:
        """Return the loss of a micro-batch."""
        x_BTH, prompts = model.prompts(micro.input_ids_BT, micro.mask_BT, micro.task_B)
        if prompts.adapters:
            raise ConfigError(f"{type(model.method).__name__} gives adapters, which no pack of runs takes")
        if prompts.embeddings_BTH is not None:
            x_BTH = prompts.embeddings_BTH
        x_BLH, mask_BL = with_input_prompts(x_BTH, micro.mask_BT, prompts)
        mixed = torch.is_autocast_enabled(x_BLH.device.type)
        inside = Prompts(encoder=prompts.encoder, decoder=prompts.decoder)
        nll_B = self._ask(Rows(model, x_BLH, mask_BL, micro.labels_BS, inside, self.random, mixed))
        assert nll_B is not None
        return model.loss(micro.labels_BS, nll_B, prompts)

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of an objective to the run's own parameters."""
        self._ask(objective)

    def _ask(self, request: Rows | Tensor) -> Tensor | None:
        """Give the turn away until the request is answered."""
        self.random.keep()
        self.request = request
        self.pack.wake()
        self.answered.wait_for(lambda: self.request is None)
        self.random.put_back()
        answer, self.answer = self.answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Pack:
    """Runs that go through one frozen backbone together. A context manager; `seat` is for the thread of each run."""

    def __init__(self) -> None:
        turn = threading.Lock()
        self._turn = turn
        self._asked = threading.Condition(turn)
        self.seats: list[Seat] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="pack", daemon=True)
        self._loaded: tuple[object, Backbone] | None = None

    def __enter__(self) -> "Pack":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._closed = True
            self._asked.notify()
        self._thread.join()

    @contextmanager
    def seat(self) -> Iterator[Seat]:
        """Let this thread's run take part while inside. The others wait for it, from now on."""
        seat = Seat(self, self._turn)
        self.seats.append(seat)
        with self._turn:
            try:
                yield seat
            finally:
                self.seats.remove(seat)
                self._asked.notify()

    def wake(self) -> None:
        """Look whether all runs wait. The caller has the turn."""
        self._asked.notify()

    def load(
        self,
        config: BackboneConfig,
        *,
        train: bool | Literal["layer_norms"],
        precision: Literal["fp32", "bf16"],
        seed: int,
    ) -> Backbone:
        """Return the backbone that all runs share, in eval mode as backbone.load does. The first run's is loaded.

        Raises ConfigError for another one, one that is trained, or one of a kind that cannot be shared.
        """
        assert train is False, "packable.check"
        wanted = (config, precision, seed if config.init == "random" else None)
        if self._loaded is None:
            loaded = backbones.load(config, train=train, precision=precision, seed=seed)
            if not isinstance(loaded, EncoderDecoder):
                raise ConfigError(
                    f"backbone.name={config.name} is not of T5's family, whose backbones alone runs share. Choose a "
                    "T5, Flan-T5, mT5 or umT5 model, or let each trial have its own backbone"
                )
            self._loaded = (wanted, loaded)
        known, loaded = self._loaded
        if known != wanted:
            raise ConfigError(
                f"runs that share a backbone need the same one: {wanted} here, {known} there (config, precision, and "
                "the seed of weights that are drawn). Search no key of backbone.* nor train.precision; with drawn "
                "weights, use one seed"
            )
        return loaded.eval()

    def _serve(self) -> None:
        """Answer whenever all runs wait."""
        with self._turn:
            while True:
                self._asked.wait_for(lambda: self._closed or self._all_wait())
                if self._closed:
                    return
                seats = list(self.seats)
                # A run that has just come asks for a loss while the others are at their gradients.
                behind = [seat for seat in seats if isinstance(seat.request, Tensor)]
                if behind:
                    self._answer(behind, _gradients)
                    continue
                for group in groups([seat.request.size for seat in seats if isinstance(seat.request, Rows)]):
                    self._answer([seats[i] for i in group], _losses)

    def _all_wait(self) -> bool:
        seats = list(self.seats)
        return bool(seats) and all(seat.request is not None for seat in seats)

    @staticmethod
    def _answer(seats: Sequence[Seat], compute: Callable[[Sequence[Any]], Sequence[Tensor | None]]) -> None:
        answers: Sequence[Tensor | BaseException | None]
        try:
            answers = compute([seat.request for seat in seats])
        except BaseException as error:  # it is that of every run here, which raises it
            answers = [error] * len(seats)
        for seat, answer in zip(seats, answers, strict=True):
            seat.request, seat.answer = None, answer
            seat.answered.notify()


def groups(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Put runs of like length into a batch, so that at most MAX_PADDING of it is padding between them.

    sizes: rows and tokens of a row of each run. Returns the runs (indices into `sizes`) of each batch.
    """
    found: list[list[int]] = []
    num_rows = num_tokens = widest = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i)):
        rows, width = sizes[i]
        fits = num_tokens + rows * width >= (1 - MAX_PADDING) * widest * (num_rows + rows)
        if not found or not fits:
            found.append([])
            num_rows, num_tokens, widest = 0, 0, width
        found[-1].append(i)
        num_rows, num_tokens = num_rows + rows, num_tokens + rows * width
    return found


def _gradients(objectives: Sequence[Tensor]) -> Sequence[None]:
    torch.autograd.backward(list(objectives))
    return [None] * len(objectives)


def _losses(asked: Sequence[Rows]) -> Sequence[Tensor]:
    """Return nll_B of each run's rows."""
    model, device = asked[0].model, asked[0].x_BLH.device
    backbone = model.backbone.train()
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules())
    parts = [
        Part(
            num_rows=len(rows.x_BLH),
            lengths={"encoder": rows.x_BLH.shape[1], "decoder": rows.labels_BS.shape[1]},
            prompts=rows.prompts,
            own_random=rows.random.entered if drops else nullcontext,
        )
        for rows in asked
    ]
    x_BLH = _joined([rows.x_BLH for rows in asked], 0.0)
    mask_BL = _joined([rows.mask_BL for rows in asked], 0)
    labels_BS = _joined([rows.labels_BS for rows in asked], IGNORED)
    together = Prompts(parts=parts)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=asked[0].autocast),
        _own_dropout(backbone.model.encoder, "encoder", parts),
        _own_dropout(backbone.model.decoder, "decoder", parts),
    ):
        nll_B = model.nll(labels_BS, backbone.encode(x_BLH, mask_BL, together), together)
    return nll_B.split([part.num_rows for part in parts])


def _joined(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Put the runs' rows under each other, filled up on the right to the width of the longest."""
    width = max(tensor.shape[1] for tensor in tensors)
    tails = [(0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]) for tensor in tensors]
    return torch.cat([pad(tensor, tail, value=value) for tensor, tail in zip(tensors, tails, strict=True)])


@contextmanager
def _own_dropout(stack: nn.Module, name: Stack, parts: Sequence[Part]) -> Iterator[None]:
    """Let a stack's dropout outside of attention draw for each part of the batch as if it were alone."""
    modules = [module for module in stack.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    with ExitStack() as hooks:
        for module in modules:
            module.eval()  # the hook does its work
            hooks.callback(module.register_forward_hook(partial(_drop, name, parts)).remove)
        yield


def _drop(name: Stack, parts: Sequence[Part], module: nn.Dropout, args: tuple[Tensor], output_BLH: Tensor) -> Tensor:
    dropped = []
    for part, own_BLH in zip(parts, output_BLH.split([part.num_rows for part in parts]), strict=True):
        with part.own_random():
            kept_BLH = drop(own_BLH[:, : part.lengths[name]], module.p)
        dropped.append(pad(kept_BLH, (0, 0, 0, output_BLH.shape[1] - kept_BLH.shape[1])))
    return torch.cat(dropped)
