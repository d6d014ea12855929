"""PromptedModel: a backbone conditioned by a method. Loss, generation, scoring of choices, and what is trained.

Letters: B rows of a batch, T input tokens, S target tokens, C choices of all rows, K tasks, H hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyprompt import distillation
from polyprompt.backbone_base import Backbone, Encoded, begins
from polyprompt.collation import IGNORED, padded
from polyprompt.config import RunConfig
from polyprompt.errors import BundleError, ConfigError
from polyprompt.methods.base import MadeOnce, Method, ParameterGroup, Prompts
from polyprompt.sampling import Likelihoods, Sampling
from polyprompt.tasks.records import TextTask

#: Choices are scored in slices whose logits hold at most this many numbers (512 MiB in fp32).
MAX_SCORED_LOGITS = 2**27
#: Input tokens, prompt included, of a model that states no limit: the length that T5 was pre-trained at.
DEFAULT_LIMIT = 512
#: Fewer input tokens hold no text.
MIN_INPUT = 4


class Loss(NamedTuple):
    """nll_B: negative log-likelihood in nats, summed over the row's target tokens (fp32). tokens_B: target tokens by
    row. aux: the method's statistics. penalty_B: the method's further loss by row, 0 for most methods."""

    nll_B: Tensor
    tokens_B: Tensor
    aux: dict[str, Tensor]
    penalty_B: Tensor

    @property
    def total(self) -> Tensor:
        """The negative log-likelihood of the batch."""
        return self.nll_B.sum()


class Counts(NamedTuple):
    """Numbers of parameters: those trained, all of the method's own, all of the backbone's."""

    trained: int
    method: int
    backbone: int


class Written(NamedTuple):
    """What greedy search wrote for a row, its end token included, and its log-likelihood."""

    ids: list[int]
    score: float


class PromptedModel(nn.Module):
    """A backbone with a method's prompts. The method: `methods.build(config, backbone.dims(num_tasks), seed=…)`."""

    def __init__(self, backbone: Backbone, method: Method) -> None:
        """Join the two; a method that starts from the vocabulary is given it here."""
        super().__init__()
        # First: a module that both hold is named, and counted, as the method's.
        self.method = method
        self.backbone = backbone
        method.join(backbone.model)
        method.initialise(backbone.ordinary_embeddings())
        state = method.state_dict(prefix="method.", keep_vars=True)
        buffers = [name for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)]
        #: What a bundle holds: all that may be trained here, though some of it may be frozen later, and buffers.
        self._kept_names = (*self._trained(), *buffers)
        #: The id of the task that callers call 0.
        self.first_task = 0
        #: Of the tasks whose outputs must stay as they are (fingerprint.py).
        self.fingerprint: Mapping[str, Any] | None = None

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor, labels_BS: Tensor, task_B: Tensor) -> Loss:
        """Return the loss of a batch. mask_BT: 1 for real tokens. labels_BS: target ids, -100 for no loss."""
        x_BTH, prompts = self.prompts(input_ids_BT, mask_BT, task_B)
        if prompts.teacher is None:
            nll_B = self.nll(labels_BS, self.backbone.encode(x_BTH, mask_BT, prompts), prompts)
            return self.loss(labels_BS, nll_B, prompts)
        teacher = prompts.teacher
        theirs = distillation.teach(self.backbone, x_BTH, mask_BT, labels_BS, teacher.prompts)
        own = distillation.say(self.backbone, x_BTH, mask_BT, labels_BS, prompts)
        penalty_B = teacher.weight * distillation.loss(own, theirs, labels_BS, teacher.temperature)
        if prompts.penalty_B is not None:
            penalty_B = penalty_B + prompts.penalty_B
        return self.loss(labels_BS, _nll(labels_BS, own.logits_NV), replace(prompts, penalty_B=penalty_B))

    def loss(self, labels_BS: Tensor, nll_B: Tensor, prompts: Prompts) -> Loss:
        tokens_B = (labels_BS != IGNORED).sum(dim=1)
        penalty_B = torch.zeros_like(nll_B) if prompts.penalty_B is None else prompts.penalty_B
        return Loss(nll_B, tokens_B, dict(prompts.aux), penalty_B)

    @torch.no_grad()
    def generate(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        task_B: Tensor,
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        use_cache: bool = True,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Return ids_BS by greedy search, beam search or sampling, padded, without the start token. Call in eval mode.

        A row depends on itself alone, and on its own seed where it is sampled: neither on its batch-mates nor on
        torch's random stream. Raises ConfigError where sampling has another number of seeds, or beams.
        """
        processors = [] if sampling is None else sampling.processors(len(input_ids_BT), num_beams)
        encoded, prompts = self._encode(input_ids_BT, mask_BT, task_B)
        return self.backbone.generate(
            encoded,
            prompts,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            use_cache=use_cache,
            processors=processors,
        )

    @torch.no_grad()
    def answer(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        task_B: Tensor,
        choices: Sequence[Sequence[Sequence[int]]],
        *,
        max_new_tokens: int,
    ) -> list[list[float] | Written]:
        """Return the log-likelihood of every choice of each row; of a row without choices, what greedy search writes.

        As of `score_choices` and `generate`, from one reading of the inputs of all. choices: as there; [] for none.
        """
        encoded, prompts = self._encode(input_ids_BT, mask_BT, task_B)
        answers: dict[int, list[float] | Written] = {}
        ranked, written = ([row for row, own in enumerate(choices) if bool(own) == has] for has in (True, False))
        if ranked:
            scores = self._rank(encoded, prompts, ranked, [choices[row] for row in ranked])
            answers |= zip(ranked, scores, strict=True)
        if written:
            answers |= zip(written, self._write(*_rows(encoded, prompts, written), max_new_tokens), strict=True)
        return [answers[row] for row in range(len(choices))]

    def _write(self, encoded: Encoded, prompts: Prompts, max_new_tokens: int) -> list[Written]:
        likelihoods = Likelihoods()
        ids_BS = self.backbone.generate(
            encoded, prompts, max_new_tokens=max_new_tokens, num_beams=1, use_cache=True, processors=[likelihoods]
        )
        ended_BS = (ids_BS == self.backbone.tokenizer.eos_token_id).long()
        real_BS = ended_BS.cumsum(dim=1) == ended_BS  # up to the first end token
        scores, lengths = likelihoods.total(real_BS).tolist(), real_BS.sum(dim=1).tolist()
        return [Written(ids[:end], score) for ids, end, score in zip(ids_BS.tolist(), lengths, scores, strict=True)]

    @torch.no_grad()
    def score_choices(
        self, input_ids_BT: Tensor, mask_BT: Tensor, task_B: Tensor, choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Return the total log-likelihood of every choice of each row. Rows may have different numbers of choices.

        choices: the target ids of each choice of each row, end token included. The input is read once for each row, and
        its choices stand side by side behind it.
        """
        return self._rank(*self._encode(input_ids_BT, mask_BT, task_B), range(len(choices)), choices)

    def _rank(
        self, encoded: Encoded, prompts: Prompts, rows: Sequence[int], choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Score the choices of these rows, in slices such that their logits fit."""
        longest = max(sum(map(len, own)) for own in choices)
        slice_rows = max(1, MAX_SCORED_LOGITS // max(1, longest * self.backbone.model.config.vocab_size))
        scores: list[list[float]] = []
        for first in range(0, len(rows), slice_rows):
            cut = slice(first, first + slice_rows)
            scores += self._score(*_rows(encoded, prompts, rows[cut]), choices[cut])
        return scores

    def _score(
        self, encoded: Encoded, prompts: Prompts, choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Return the log-likelihood of every choice of each row."""
        if not any(map(any, choices)):
            return [[0.0] * len(own) for own in choices]
        device, num_choices = encoded.hidden_BTH.device, max(map(len, choices))
        pieces = [[piece for choice in own for piece in choice] for own in choices]
        owners = [[number for number, choice in enumerate(own) for _ in choice] for own in choices]
        labels_BS, owner_BS = padded(pieces, IGNORED).to(device), padded(owners, num_choices).to(device)
        real_BS = labels_BS != IGNORED
        # All choices of a row begin from the same logits.
        again_BS = begins(owner_BS)
        again_BS[:, 0] = False
        kept_BS = real_BS & ~again_BS
        with self.backbone.logits_only_at(kept_BS):
            logits_NV = self.backbone.logits(labels_BS.clamp(min=0), encoded, prompts, owner_BS).float()
        place_BS = kept_BS.flatten().cumsum(dim=0).view_as(kept_BS) - 1
        place_M = torch.where(again_BS, place_BS[:, :1], place_BS)[real_BS]
        likelihood_M = logits_NV[place_M, labels_BS[real_BS]] - logits_NV.logsumexp(dim=1)[place_M]
        choice_BS = owner_BS + num_choices * torch.arange(len(choices), device=device)[:, None]
        total_C = likelihood_M.new_zeros(len(choices) * num_choices).index_add_(0, choice_BS[real_BS], likelihood_M)
        scores = total_C.view(-1, num_choices).tolist()
        return [row[: len(own)] for row, own in zip(scores, choices, strict=True)]

    def named_groups(self) -> dict[ParameterGroup, list[tuple[str, nn.Parameter]]]:
        """Return the trained parameters by optimizer group, each tied parameter once."""
        groups: dict[ParameterGroup, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self._trained().items():
            inner = name.removeprefix("method.")
            group = self.method.group_of(inner) if inner != name else "backbone"
            groups.setdefault(group, []).append((name, parameter))
        return groups

    def undecayed(self) -> set[str]:
        """Return the names of the parameters that weight decay spares beside those of one dimension."""
        return {f"method.{name}" for name in self.method.undecayed}

    def num_parameters(self) -> Counts:
        return Counts(
            trained=sum(p.numel() for p in self._trained().values()),
            method=sum(self._tensor(_whole(f"method.{name}")).numel() for name, _ in self.method.named_parameters()),
            backbone=sum(p.numel() for name, p in self.named_parameters() if name.startswith("backbone.")),
        )

    def trained_state(self) -> dict[str, Tensor]:
        """Return what a bundle must hold, by name ("method.…", "backbone.…"); tensors are shared with the model.

        What training changes, and what the method was given from outside: its buffers.
        """
        return {name: tensor.detach() for name, tensor in self._kept().items()}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `trained_state` returned; before any of it is frozen.

        Raises BundleError naming what is missing, unexpected or misshapen.
        """
        own = self._kept()
        faults = [f"missing {name}" for name in own if name not in state]
        faults += [f"unexpected {name}" for name in state if name not in own]
        faults += [
            f"{name} has shape {list(state[name].shape)}, expected {list(parameter.shape)}"
            for name, parameter in own.items()
            if name in state and state[name].shape != parameter.shape
        ]
        if faults:
            raise BundleError(
                f"the saved weights do not fit this model: {len(faults)} faults: {'; '.join(faults[:5])}. "
                "Use the config and backbone that they were trained with"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, the backbone's first."""
        trained = [(_whole(name), p) for name, p in self.named_parameters() if p.requires_grad]
        return dict(sorted(trained, key=lambda pair: pair[0].startswith("method.")))

    def _kept(self) -> dict[str, Tensor]:
        return {name: self._tensor(name) for name in self._kept_names}

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the model; of one that is trained for some tasks alone, the whole."""
        path, _, last = name.rpartition(".")
        return getattr(self.get_submodule(path), last)

    def prompts(self, input_ids_BT: Tensor, mask_BT: Tensor, task_B: Tensor) -> tuple[Tensor, Prompts]:
        """Return the input embeddings x_BTH, and what the method makes of them."""
        x_BTH = self.backbone.embed(input_ids_BT)
        return x_BTH, self.method.prompts(x_BTH, mask_BT, task_B + self.first_task)

    def made_once(self, task_B: Tensor) -> AbstractContextManager[MadeOnce]:
        """Around passes of rows of these tasks; see Method.made_once."""
        return self.method.made_once(task_B + self.first_task)

    def _encode(self, input_ids_BT: Tensor, mask_BT: Tensor, task_B: Tensor) -> tuple[Encoded, Prompts]:
        x_BTH, prompts = self.prompts(input_ids_BT, mask_BT, task_B)
        return self.backbone.encode(x_BTH, mask_BT, prompts), prompts

    @torch.no_grad()
    def logits(self, input_ids_BT: Tensor, mask_BT: Tensor, labels_BS: Tensor, task_B: Tensor) -> Tensor:
        """Return logits_BSV of a batch as `forward` takes it."""
        encoded, prompts = self._encode(input_ids_BT, mask_BT, task_B)
        return self.backbone.logits(labels_BS.clamp(min=0), encoded, prompts)

    def nll(self, labels_BS: Tensor, encoded: Encoded, prompts: Prompts) -> Tensor:
        """Return the summed negative log-likelihood of each row's target."""
        real_BS = labels_BS != IGNORED
        with self.backbone.logits_only_at(real_BS):
            logits_NV = self.backbone.logits(labels_BS.clamp(min=0), encoded, prompts)
        return _nll(labels_BS, logits_NV)


def _nll(labels_BS: Tensor, logits_NV: Tensor) -> Tensor:
    """Sum by row. logits_NV: of the target tokens alone."""
    real_BS = labels_BS != IGNORED
    nll_N = cross_entropy(logits_NV.float(), labels_BS[real_BS], reduction="none")
    return torch.zeros_like(labels_BS, dtype=nll_N.dtype).masked_scatter(real_BS, nll_N).sum(dim=1)


def _whole(name: str) -> str:
    """Return a parameter's name; that of the whole, for the part of it that is trained (torch's parametrizations)."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def input_limit(config: RunConfig, backbone: Backbone, method: Method) -> int:
    """Return how many tokens an input may have beside the prompt.

    As set in the config; else what the model's limit leaves. Raises ConfigError where prompt and input together exceed
    the limit that the model states, or prompt keys and values alone do.
    """
    limit = backbone.max_input_tokens
    wanted = config.data.max_input_tokens
    name = config.backbone.name
    reserved = backbone.reserved_tokens(config.data.max_target_tokens)
    if limit is not None and reserved:
        if reserved >= limit:
            raise ConfigError(
                f"data.max_target_tokens={config.data.max_target_tokens} leaves nothing of the {limit} tokens that "
                f"backbone.name={name} has for prompt, input and target. Lower data.max_target_tokens"
            )
        limit -= reserved
        name += f", the target's {reserved} taken off"
    if limit is not None:
        for key, length in method.prompt_lengths().items():
            if length >= limit:
                raise ConfigError(
                    f"{key}={length} prompt tokens exceed the limit of {limit} tokens of backbone.name={name}, which "
                    f"leaves no room for the input. Lower {key} below {limit}"
                )
        total = method.input_length + (wanted or 0)
        if total > limit:
            raise ConfigError(
                f"method.length={method.input_length} prompt tokens + data.max_input_tokens={wanted} = {total} exceed "
                f"the limit of {limit} tokens of backbone.name={name}. Lower data.max_input_tokens to "
                f"{limit - method.input_length}, or lower method.length"
            )
    left = wanted or (limit or DEFAULT_LIMIT) - method.input_length
    if left < MIN_INPUT:
        raise ConfigError(
            f"method.length={method.input_length} leaves {left} input tokens of backbone.name={name}; expected at "
            f"least {MIN_INPUT}. Lower method.length, or set data.max_input_tokens"
        )
    return left


def check_window(config: RunConfig, task: TextTask, backbone: Backbone, method: Method) -> None:
    """Refuse windows of text that a decoder-only model has no positions for. Raises ConfigError."""
    limit = backbone.max_input_tokens
    if backbone.dims(1).encoder is not None or limit is None or task.input_tokens is None:
        return
    # Input and target are cut from one window and each ends in one more token.
    room = limit - backbone.reserved_tokens(1) - method.input_length
    if task.input_tokens > room:
        raise ConfigError(
            f"tasks: {task.name}: input_tokens={task.input_tokens} exceeds the {room} tokens that method.length="
            f"{method.input_length} leaves of the {limit} of backbone.name={config.backbone.name}. Lower input_tokens"
        )


def _rows(encoded: Encoded, prompts: Prompts, rows: Sequence[int]) -> tuple[Encoded, Prompts]:
    """Return what the decoder needs of these rows."""
    row_C = torch.tensor(rows, device=encoded.mask_BT.device)
    made = prompts.decoder
    own = Prompts(
        decoder=made and made.of_rows(row_C),
        adapters={stack: own.of_rows(row_C) for stack, own in prompts.adapters.items() if stack == "decoder"},
    )
    return Encoded(encoded.hidden_BTH[row_C], encoded.mask_BT[row_C]), own
