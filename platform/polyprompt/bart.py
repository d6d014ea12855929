"""BART-like models: encoder and decoder with learned positions.

    encoder  [input prompts ; <s> where the tokenizer begins texts with it ; input ; </s>]
    decoder  [</s> ; <s> likewise ; target ; </s>]

Real tokens stand together from position 0 on, prompts first, so that a row depends neither on padding nor on
batch-mates; input prompts take the first positions, as in PEFT's prompt tuning, prompt keys and values take none.

Letters: B rows of a batch, T input tokens, S target tokens, H hidden size, V vocabulary.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from polyprompt import adapted
from polyprompt.backbone_base import INPUT, Backbone, Encoded, begin_token, begins, offsets, seen, with_input_prompts
from polyprompt.methods.base import Dims, Prompts, StackDims
from polyprompt.prompted_attention import own_mask
from polyprompt.sampling import LogitsProcessor


class Bart(Backbone):
    """A BART model."""

    ARCHITECTURE_KEYS = (
        "model_type", "vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
        "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "max_position_embeddings",
        "activation_function", "scale_embedding", "decoder_start_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    DROPOUT_KEYS = (
        "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop",
    )  # fmt: skip

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None) -> None:
        """Tag the self-attention modules for the attention function, and state how to generate."""
        for stack in ("encoder", "decoder"):
            for layer, block in enumerate(getattr(model.model, stack).layers):
                block.self_attn.prompt_spot = (stack, layer)
                adapted.tag(stack, layer, block.self_attn, block.fc2)
        config = model.config
        model.generation_config = GenerationConfig(
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        super().__init__(model, tokenizer, name=name, revision=revision)
        begin = begin_token(tokenizer)
        self.begin_ids = [] if begin is None else [begin]

    @property
    def max_input_tokens(self) -> int | None:
        """Positions of the encoder; input prompts and <s> take some of them."""
        return self.model.config.max_position_embeddings

    def blocks(self) -> list[Any]:
        return [*self.model.model.encoder.layers, *self.model.model.decoder.layers]

    def reserved_tokens(self, max_target_tokens: int) -> int:
        return len(self.begin_ids)

    def dims(self, num_tasks: int) -> Dims:
        config = self.model.config
        stacks = [
            StackDims(layers, heads, config.d_model // heads)
            for layers, heads in (
                (config.encoder_layers, config.encoder_attention_heads),
                (config.decoder_layers, config.decoder_attention_heads),
            )
        ]
        return Dims(hidden=config.d_model, encoder=stacks[0], decoder=stacks[1], num_tasks=num_tasks)

    def encode(self, x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> Encoded:
        """Run the encoder on [input prompts ; <s> ; x]."""
        if prompts.embeddings_BTH is not None:
            x_BTH = prompts.embeddings_BTH
        for begin in self.begin_ids:
            begin_H = self.embed(mask_BT.new_tensor([begin]))
            x_BTH = torch.cat([begin_H.to(x_BTH.dtype).expand(len(x_BTH), 1, -1), x_BTH], dim=1)
            mask_BT = torch.cat([mask_BT.new_ones(len(mask_BT), 1), mask_BT], dim=1)
        x_BTH, mask_BT = with_input_prompts(x_BTH, mask_BT, prompts)
        if prompts.mask_BP is not None:
            # Positions count from the left: what is absent of a prompt goes behind everything.
            order_BT = mask_BT.argsort(dim=1, stable=True, descending=True)
            x_BTH, mask_BT = x_BTH.gather(1, order_BT[:, :, None].expand_as(x_BTH)), mask_BT.gather(1, order_BT)
        output = self.model.get_encoder()(inputs_embeds=x_BTH, attention_mask=mask_BT, prompts=prompts)
        return Encoded(output.last_hidden_state, mask_BT)

    def logits(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor | None = None) -> Tensor:
        if owner_BS is not None:
            return self._logits_side_by_side(targets_BS, encoded, prompts, owner_BS)
        begin_BS = self._begin(targets_BS)
        # What stands after the end of a target has no influence on it: the decoder is causal.
        return self._decode(torch.cat([begin_BS, targets_BS[:, :-1]], dim=1), encoded, prompts, targets_BS.shape[1])

    def _decode(
        self, ids_BX: Tensor, encoded: Encoded, prompts: Prompts, num_targets: int, mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the last positions. mask: [B, 1, X, X], in place of the causal one."""
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_BTH),
            attention_mask=encoded.mask_BT,
            decoder_input_ids=ids_BX,
            decoder_attention_mask=mask,
            use_cache=False,
            prompts=prompts,
        ).logits
        # Inside `logits_only_at` they are of the kept positions already.
        return logits if logits.ndim == 2 else logits[:, -num_targets:]

    def _logits_side_by_side(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor) -> Tensor:
        """Each target begins from the last piece that all begin from; what is before that is theirs in common."""
        *common, last = self._begin(targets_BS)[0].tolist()
        begins_BS = begins(owner_BS)
        common_BC = targets_BS.new_tensor(common).expand(len(targets_BS), -1)
        place_BC = torch.arange(len(common), device=targets_BS.device).expand_as(common_BC)
        owner_BX = torch.cat([torch.full_like(common_BC, INPUT), owner_BS], dim=1)
        mask = own_mask(seen(owner_BX, torch.ones_like(owner_BX)), self.model)
        ids_BX = torch.cat([common_BC, targets_BS.roll(1, dims=1).masked_fill(begins_BS, last)], dim=1)
        with self._positions(torch.cat([place_BC, offsets(begins_BS) + len(common)], dim=1)):
            return self._decode(ids_BX, encoded, prompts, targets_BS.shape[1], mask)

    @contextmanager
    def _positions(self, position_BX: Tensor) -> Iterator[None]:
        """While inside, the decoder's pieces have these positions: its forward pass takes none from outside."""
        own = threading.get_ident()

        def place(module: Any, args: Any, made: Tensor) -> Tensor | None:
            return nn.Embedding.forward(module, position_BX + module.offset) if threading.get_ident() == own else None

        hook = self.model.model.decoder.embed_positions.register_forward_hook(place)
        try:
            yield
        finally:
            hook.remove()

    def generate(
        self,
        encoded: Encoded,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        num_beams: int,
        use_cache: bool,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Tensor:
        begin_BS = self._begin(encoded.mask_BT)
        ids_BS = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_BTH),
            attention_mask=encoded.mask_BT,
            decoder_input_ids=begin_BS,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
            logits_processor=LogitsProcessorList(processors),
        )
        return ids_BS[:, begin_BS.shape[1] :]

    def _begin(self, like_BT: Tensor) -> Tensor:
        """Return what every target starts from, for as many rows."""
        start = [self.model.config.decoder_start_token_id, *self.begin_ids]
        return torch.tensor([start], device=like_BT.device).expand(len(like_BT), -1)
