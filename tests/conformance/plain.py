"""A transformers model, plain or wrapped by a library, as text-to-text: what most drivers are made of.

Pure transformers, of any version. Encoder-decoder models get input and labels; decoder-only models get them as one
sequence and are scored on the target.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conformance.driver import Batch, Choices, NotApplicable

NEW_TOKENS = 5
#: Captures the graph with its gradients, without a C++ compiler.
BACKEND = "aot_eager"
ONE_STREAM = "`generate` draws all rows from one random stream"
ONE_LENGTH = "one prompt length for all rows"
ABSOLUTE = "prompts before the input are tokens: they take the first of the model's absolute positions"
_FIRST = re.compile(
    r"(?:(encoder|decoder)\.)?(?:block\.0\.layer\.0\.SelfAttention|(?:h|layers)\.0\.(?:attn|self_attn))$"
)


@contextlib.contextmanager
def watched(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect by stack the attention weights [B, N, Q, X] of the first self-attention layer. Needs eager attention."""
    seen: dict[str, Tensor] = {}

    def keep(stack: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            for part in output:
                if isinstance(part, Tensor) and part.ndim == 4:
                    total = part.sum(dim=-1)
                    if torch.allclose(total, torch.ones_like(total), atol=1e-4):
                        seen[stack] = part.detach()

        return hook

    found = [(match, module) for name, module in model.named_modules() if (match := _FIRST.search(name))]
    handles = [module.register_forward_hook(keep(match[1] or "decoder")) for match, module in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def among_real(
    seen: dict[str, Tensor], batch: Batch, *, decoder_only: bool, aligned: Literal["left", "right"]
) -> dict[str, list[Tensor]]:
    """Cut the weights down to each row's real tokens, behind whatever stands before them.

    aligned: where a decoder-only model has a row's tokens; prompts stand before them or before the padding.
    """
    (num_rows, inputs), targets = batch.input_ids_BT.shape, batch.labels_BS.shape[1]
    num_words, num_targets = batch.mask_BT.sum(dim=1).tolist(), (batch.labels_BS != -100).sum(dim=1).tolist()

    def cut(weights: Tensor, row: int, width: int, start: int, end: int) -> Tensor:
        into, across = (size - width for size in weights.shape[2:])
        return weights[row, :, into + start : into + end, across + start : across + end]

    if not decoder_only:
        return {
            "encoder": [cut(seen["encoder"], row, inputs, 0, num_words[row]) for row in range(num_rows)],
            "decoder": [cut(seen["decoder"], row, targets, 0, num_targets[row]) for row in range(num_rows)],
        }
    width = inputs + targets - 1
    if aligned == "right":
        starts = [inputs - n for n in num_words]
        ends = [inputs + n - 1 for n in num_targets]
    else:
        starts = [0] * num_rows
        ends = [n + m - 1 for n, m in zip(num_words, num_targets, strict=True)]
    return {"decoder": [cut(seen["decoder"], row, width, starts[row], ends[row]) for row in range(num_rows)]}


class TextToText:
    """A model of transformers' interface. aligned: see `among_real`; on the right positions are given, as with padding
    in front; on the left they are the model's own."""

    def __init__(self, model: Any, *, aligned: Literal["left", "right"] = "left") -> None:
        self.model = model.eval()
        self.aligned = aligned
        self.decoder_only = not model.config.is_encoder_decoder

    def keywords(self, batch: Batch, *, num_beams: int = 1) -> dict[str, Any]:
        """Return what the library wants to know of the rows beside their ids."""
        return {}

    def nll(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._nll(batch)

    def loss(self, batch: Batch) -> Tensor:
        return self._nll(batch).sum()

    def scores(self, batch: Batch, choices: Choices) -> list[list[float]]:
        return [
            [-self.nll(batch.rows([row])._replace(labels_BS=torch.tensor([choice]))).item() for choice in own]
            for row, own in enumerate(choices)
        ]

    def generate(
        self, batch: Batch, *, num_beams: int = 1, use_cache: bool = True, seeds: list[int] | None = None
    ) -> Tensor:
        if seeds is not None:
            raise NotApplicable(ONE_STREAM)
        if batch.lengths_B is not None:
            raise NotApplicable(ONE_LENGTH)
        ids, mask = _on_the_right(batch) if self.decoder_only else (batch.input_ids_BT, batch.mask_BT)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                num_beams=num_beams,
                use_cache=use_cache,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=1,
                **self.keywords(batch, num_beams=num_beams),
            )
        return made[:, ids.shape[1] if self.decoder_only else 1 :]

    def attention(self, batch: Batch) -> dict[str, list[Tensor]]:
        with watched(self.model) as seen:
            self.nll(batch)
        return among_real(seen, batch, decoder_only=self.decoder_only, aligned=self.aligned)

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}

    def vectors(self) -> dict[str, Tensor]:
        return {}

    def training(self) -> None:
        self.model.train()

    def compile(self) -> None:
        self.model.compile(backend=BACKEND)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def _nll(self, batch: Batch) -> Tensor:
        if batch.lengths_B is not None:
            raise NotApplicable(ONE_LENGTH)
        logits_BSV = self._decoder_only(batch) if self.decoder_only else self._encoder_decoder(batch)
        labels_BS = batch.labels_BS
        nll = cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="none")
        return nll.view_as(labels_BS).sum(dim=1)

    def _encoder_decoder(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT, "labels": batch.labels_BS}
        logits = self.model(**inputs, **self.keywords(batch)).logits
        return logits[:, -batch.labels_BS.shape[1] :]  # behind prompts in the decoder

    def _decoder_only(self, batch: Batch) -> Tensor:
        targets, inputs = batch.labels_BS.clamp(min=0), batch.input_ids_BT.shape[1]
        width = inputs + targets.shape[1] - 1
        if self.aligned == "right":
            ids, mask = _on_the_right(batch)
            mask = torch.cat([mask, torch.ones_like(targets[:, 1:])], dim=1)
            logits = self.model(
                input_ids=torch.cat([ids, targets[:, :-1]], dim=1),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                **self.keywords(batch),
            ).logits
            return logits[:, inputs - 1 :]
        rows = [torch.cat([batch.words(row), targets[row, :-1]]) for row in range(len(targets))]
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
        logits = self.model(input_ids=ids, attention_mask=mask, **self.keywords(batch)).logits
        first = logits.shape[1] - width + batch.mask_BT.sum(dim=1) - 1
        return torch.stack([own[start : start + targets.shape[1]] for own, start in zip(logits, first, strict=True)])


def _on_the_right(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the inputs with their padding in front, and their mask."""
    order = batch.mask_BT.argsort(dim=1, stable=True)
    return batch.input_ids_BT.gather(1, order), batch.mask_BT.gather(1, order)
