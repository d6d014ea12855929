"""A teacher's part in the loss: the model is drawn to what it says, and holds inside, under the teacher's prompts.

Letters: B rows of a batch, T input tokens, S target tokens, N target tokens of all rows, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from polyprompt.backbone_base import Backbone
from polyprompt.collation import IGNORED
from polyprompt.methods.base import Prompts


class Said(NamedTuple):
    """What a model makes of a batch. logits_NV and decoder_NH (the decoder's last states): at each target token.
    encoder_BTH: the encoder's last states, input prompts included, and which are real; None of a decoder-only model."""

    logits_NV: Tensor
    decoder_NH: Tensor
    encoder_BTH: Tensor | None
    mask_BT: Tensor


def say(backbone: Backbone, x_BTH: Tensor, mask_BT: Tensor, labels_BS: Tensor, prompts: Prompts) -> Said:
    """Run the model on a batch. labels_BS: target ids, -100 for no loss."""
    real_BS = labels_BS != IGNORED
    encoded = backbone.encode(x_BTH, mask_BT, prompts)
    with _last_states(backbone.model.get_decoder()) as states, backbone.logits_only_at(real_BS):
        logits_NV = backbone.logits(labels_BS.clamp(min=0), encoded, prompts)
    # A decoder-only model's sequence ends in the targets.
    decoder_NH = states[0][:, -labels_BS.shape[1] :][real_BS]
    encoder_BTH = encoded.hidden_BTH if backbone.dims(1).encoder is not None else None
    return Said(logits_NV, decoder_NH, encoder_BTH, encoded.mask_BT)


@torch.no_grad()
def teach(backbone: Backbone, x_BTH: Tensor, mask_BT: Tensor, labels_BS: Tensor, prompts: Prompts) -> Said:
    """Run the model as `say` does, without dropout and without a gradient."""
    was_training = backbone.training
    backbone.eval()
    try:
        return say(backbone, x_BTH, mask_BT, labels_BS, prompts)
    finally:
        backbone.train(was_training)


def loss(own: Said, teacher: Said, labels_BS: Tensor, temperature: float) -> Tensor:
    """Return L_logits + L_hidden of each row (fp32), as Wang et al. 2023, section 3.2, for the rows of a batch.

    L_logits: KL(softmax(teacher / temperature), softmax(own / temperature)), a mean over the row's target tokens.
    L_hidden: squared difference of the last states of the encoder, a mean over the row's real tokens (prompt included)
    and H, plus the decoder's over its target tokens. The paper writes sums over rows, leaves the scale of both open,
    and which layers' states are meant; means make λ independent of lengths and widths.
    """
    real_BS = labels_BS != IGNORED
    own_NV, teacher_NV = ((said.logits_NV.float() / temperature).log_softmax(dim=1) for said in (own, teacher))
    each_N = kl_div(own_NV, teacher_NV, reduction="none", log_target=True).sum(dim=1)
    each_N = each_N + (own.decoder_NH.float() - teacher.decoder_NH.float()).square().mean(dim=1)
    each_BS = torch.zeros_like(labels_BS, dtype=each_N.dtype).masked_scatter(real_BS, each_N)
    loss_B = each_BS.sum(dim=1) / real_BS.sum(dim=1)
    if own.encoder_BTH is not None and teacher.encoder_BTH is not None:
        square_BT = (own.encoder_BTH.float() - teacher.encoder_BTH.float()).square().mean(dim=2)
        loss_B = loss_B + (square_BT * own.mask_BT).sum(dim=1) / own.mask_BT.sum(dim=1)
    return loss_B


@contextmanager
def _last_states(stack: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the stack gives out while inside."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output.last_hidden_state)

    hook = stack.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()
