"""Each check fails on a driver, or a platform, that is broken on purpose in what the check is there to see."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import ours
from conformance.checks import CHECKS
from conformance.driver import Batch, Failed, Model
from conformance.ours import OurModel, Ours
from polyprompt import prompted_attention
from polyprompt.sampling import LogitsProcessor, Sampling

INPUTS, KEYS_AND_VALUES = Ours("prompt_tuning", "t5"), Ours("hyperprompt global", "t5")
#: Its text follows the prompt most.
DECODER = Ours("prompt_tuning", "gpt2")
Mutation = Callable[[pytest.MonkeyPatch], None]
nll, loss, generate, build = OurModel.nll, OurModel.loss, OurModel.generate, Ours.build


def patched(owner: Any, name: str, broken: Any) -> Mutation:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, broken)


def of_the_first(batch: Batch) -> Batch:
    return batch._replace(task_B=batch.task_B[:1].expand(len(batch.task_B)))


def of_the_next(batch: Batch) -> Batch:
    return batch._replace(task_B=(batch.task_B + 1) % 3)


def unmasked(self: OurModel, batch: Batch) -> Tensor:
    return nll(self, batch._replace(mask_BT=torch.ones_like(batch.mask_BT)))


def two_of_four_vectors(self: OurModel, batch: Batch) -> Tensor:
    return loss(self, batch._replace(lengths_B=torch.full((len(batch.task_B),), 2)))


def detached(self: OurModel, batch: Batch) -> Tensor:
    whole = loss(self, batch)
    return whole.detach() + sum(p.sum() for p in self.trained().values()) * 0


def frozen_trained_too(self: OurModel, batch: Batch) -> Tensor:
    self.model.backbone.requires_grad_(True)
    frozen = {name: p for name, p in self.model.named_parameters() if name.startswith("backbone.")}
    self.frozen = lambda: frozen  # type: ignore[method-assign]
    return loss(self, batch)


def bias_moved(tensor: Tensor, sides: tuple[int, int], **keys: Any) -> Tensor:
    return torch.nn.functional.pad(tensor, sides[::-1], **keys)


def another_prompt_without_cache(self: OurModel, batch: Batch, *, use_cache: bool = True, **keys: Any) -> Tensor:
    return generate(self, batch if use_cache else of_the_next(batch), use_cache=use_cache, **keys)


def another_prompt(self: OurModel, batch: Batch, **keys: Any) -> Tensor:
    return generate(self, of_the_next(batch), **keys)


def one_prompt(self: OurModel, batch: Batch, **keys: Any) -> Tensor:
    return generate(self, of_the_first(batch), **keys)


def beams_out_of_order(made: Tensor, like: Tensor) -> Tensor:
    return made.repeat(len(like) // len(made), 1, 1, 1)


def one_stream(self: Sampling, num_rows: int, num_beams: int) -> list[LogitsProcessor]:
    stream = torch.Generator().manual_seed(self.seeds[0])
    return [lambda ids, logits: logits - torch.empty_like(logits).exponential_(generator=stream).log()]


def no_noise(self: Sampling, num_rows: int, num_beams: int) -> list[LogitsProcessor]:
    return [lambda ids, logits: logits]


def all_visible(mask: Tensor, made: Any, num_rows: int) -> Tensor:
    shown = True if mask.dtype == torch.bool else 0.0
    return torch.nn.functional.pad(mask, (made.keys_LBNPD.shape[3], 0), value=shown)


def other_weights(self: Ours, *, checkpointing: bool = False, **keys: Any) -> OurModel:
    return build(self, checkpointing=checkpointing, **keys, **({"seed": 5} if checkpointing else {}))


def changed(self: OurModel) -> None:
    with torch.no_grad():
        next(iter(self.trained().values())).add_(0.1)


def unloaded(self: Ours, folder: Any) -> Model:
    return self.build(seed=2)


def tenth_off(self: OurModel, batch: Batch) -> Tensor:
    return nll(self, batch) * (1.1 if next(self.model.backbone.parameters()).dtype == torch.bfloat16 else 1)


def only_fp32(self: Ours, *, precision: str = "fp32", **keys: Any) -> OurModel:
    return build(self, **keys)


MUTATIONS: dict[str, Sequence[tuple[Ours, Mutation]]] = {
    "length 0": [(INPUTS, patched(OurModel, "nll", lambda self, batch: nll(self, batch) * (1 + 1e-6)))],
    "gradient": [
        (INPUTS, patched(OurModel, "loss", two_of_four_vectors)),
        (KEYS_AND_VALUES, patched(OurModel, "loss", detached)),
        (INPUTS, patched(OurModel, "loss", frozen_trained_too)),
    ],
    "positions": [(KEYS_AND_VALUES, patched(prompted_attention, "pad", bias_moved))],
    "padding": [(INPUTS, patched(OurModel, "nll", unmasked))],
    "cached decoding": [
        (DECODER, patched(OurModel, "generate", another_prompt_without_cache)),
        (
            DECODER,
            patched(OurModel, "generate", another_prompt),
        ),
    ],
    "mixed loss": [(INPUTS, patched(OurModel, "nll", lambda self, batch: nll(self, of_the_first(batch))))],
    "mixed greedy": [
        (
            DECODER,
            patched(OurModel, "generate", one_prompt),
        )
    ],
    "mixed beams": [(KEYS_AND_VALUES, patched(prompted_attention, "_for_rows", beams_out_of_order))],
    "mixed sampling": [
        (INPUTS, patched(Sampling, "processors", one_stream)),
        (INPUTS, patched(Sampling, "processors", no_noise)),
    ],
    "unequal lengths": [
        (KEYS_AND_VALUES, patched(prompted_attention, "_with_prompt_columns", all_visible)),
        (INPUTS, patched(ours, "_cut", lambda made, lengths: made)),
    ],
    "checkpointing": [(INPUTS, patched(Ours, "build", other_weights))],
    "compile": [(INPUTS, patched(OurModel, "compile", changed))],
    "save, load": [(INPUTS, patched(Ours, "load", unloaded))],
    "bf16": [(INPUTS, patched(OurModel, "nll", tenth_off)), (INPUTS, patched(Ours, "build", only_fp32))],
}


@pytest.mark.parametrize(
    ("check", "number"), [(check, number) for check, own in MUTATIONS.items() for number in range(len(own))]
)
def test_a_broken_one_fails(check: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, mutation = MUTATIONS[check][number]
    mutation(monkeypatch)
    with pytest.raises(Failed):
        CHECKS[check](subject)


def test_every_check_is_shown_to_fail() -> None:
    assert list(MUTATIONS) == list(CHECKS)
