"""Decoder-only models as text-to-text: input and target are one sequence, and only the target has a loss.

    [input prompts ; <bos> where the tokenizer begins texts with it ; input ; input end ; target ; </s>]

Rows come with </s> behind input and target alike. Behind the input it would say that the text is over, so it is read as
the input end, one ordinary token (a newline unless `backbone.input_end` says otherwise). Everything before the target
is aligned on the right and positions count real tokens from 0, so a row depends neither on padding nor on batch-mates.
Input prompts take the first positions, as in PEFT's prompt tuning; prompt keys and values take none.

Letters: B rows of a batch, T input tokens, S target tokens, P prompt tokens, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from polyprompt import adapted
from polyprompt.backbone_base import INPUT, Backbone, Encoded, begin_token, begins, offsets, seen, with_input_prompts
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, Prompts, StackDims
from polyprompt.prompted_attention import own_mask
from polyprompt.sampling import LogitsProcessor

#: What stands between input and target, unless `backbone.input_end` says otherwise.
INPUT_END = "\n"


class _TakesPrompts:
    """`generate` refuses keywords that the model does not name in `prepare_inputs_for_generation`; this names ours."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        prompts: Prompts,
        inputs_embeds: Tensor,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is None:
            # Without a cache transformers would drop the embeddings behind the first step.
            written = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            inputs_embeds, is_first_iteration = torch.cat([inputs_embeds, written], dim=1), True
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            *args,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return {**inputs, "prompts": prompts}


# They keep the names of their bases, which `save_pretrained` writes into config.json.
class GPT2LMHeadModel(_TakesPrompts, transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2: learned positions."""


class LlamaForCausalLM(_TakesPrompts, transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Llama, SmolLM: rotary positions, grouped-query attention."""


class Qwen2ForCausalLM(_TakesPrompts, transformers.Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2, Qwen2.5: as Llama, with biases."""


class Qwen3ForCausalLM(_TakesPrompts, transformers.Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3: as Llama, with normalised queries and keys."""


FAMILIES: dict[str, Any] = {
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}


class DecoderOnly(Backbone):
    """A decoder-only model. A method that asks for encoder prompts cannot be built on it."""

    ARCHITECTURE_KEYS = (
        "model_type", "vocab_size", "tie_word_embeddings",
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
        "use_sliding_window", "sliding_window", "layer_types",
        "n_embd", "n_inner", "n_layer", "n_head", "n_positions", "activation_function", "layer_norm_epsilon",
        "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
    )  # fmt: skip
    DROPOUT_KEYS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None, input_end: str | None) -> None:
        """Raises ConfigError where the tokenizer has no </s>, or the input end is not one token."""
        super().__init__(model, tokenizer, name=name, revision=revision)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"backbone.name={name}: its tokenizer has no eos_token, which must end every target. "
                "Name one in tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            # Padding is always masked, so any piece will do.
            tokenizer.pad_token = tokenizer.eos_token
        self.end_id = _input_end(tokenizer, name, INPUT_END if input_end is None else input_end)
        self.begin_id = begin_token(tokenizer)
        for layer, block in enumerate(self.blocks()):
            attention = block.attn if model.config.model_type == "gpt2" else block.self_attn
            attention.prompt_spot = ("decoder", layer)
            adapted.tag("decoder", layer, attention, block.mlp)
        model.generation_config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )

    def blocks(self) -> list[Any]:
        return list(self.model.transformer.h if self.model.config.model_type == "gpt2" else self.model.model.layers)

    @property
    def max_input_tokens(self) -> int | None:
        """Prompt, input and target share it; see `reserved_tokens`."""
        return self.model.config.max_position_embeddings

    def reserved_tokens(self, max_target_tokens: int) -> int:
        return max_target_tokens + (self.begin_id is not None)

    def dims(self, num_tasks: int) -> Dims:
        config = self.model.config
        heads = config.num_attention_heads
        stack = StackDims(
            num_layers=config.num_hidden_layers,
            num_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        return Dims(hidden=config.hidden_size, encoder=None, decoder=stack, num_tasks=num_tasks)

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """Return x_BTH, with the input end in place of </s>."""
        return super().embed(input_ids_BT.masked_fill(input_ids_BT == self.tokenizer.eos_token_id, self.end_id))

    def encode(self, x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> Encoded:
        """Return the embeddings of [input prompts ; <bos> ; x], aligned on the right. The model itself does not run."""
        if prompts.embeddings_BTH is not None:
            x_BTH = prompts.embeddings_BTH
        if self.begin_id is not None:
            begin_H = self.model.get_input_embeddings().weight[self.begin_id]
            x_BTH = torch.cat([begin_H.to(x_BTH.dtype).expand(len(x_BTH), 1, -1), x_BTH], dim=1)
            mask_BT = torch.cat([mask_BT.new_ones(len(mask_BT), 1), mask_BT], dim=1)
        x_BTH, mask_BT = with_input_prompts(x_BTH, mask_BT, prompts)
        order_BT = mask_BT.argsort(dim=1, stable=True)
        return Encoded(x_BTH.gather(1, order_BT[:, :, None].expand_as(x_BTH)), mask_BT.gather(1, order_BT))

    def logits(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor | None = None) -> Tensor:
        if owner_BS is not None:
            return self._logits_side_by_side(targets_BS, encoded, prompts, owner_BS)
        # What stands after the end of a target has no influence on it: the model is causal.
        before_BSH = super().embed(targets_BS[:, :-1]).to(encoded.hidden_BTH.dtype)
        mask_BT = torch.cat([encoded.mask_BT, encoded.mask_BT.new_ones(before_BSH.shape[:2])], dim=1)
        return self.model(
            inputs_embeds=torch.cat([encoded.hidden_BTH, before_BSH], dim=1),
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=targets_BS.shape[1],
            prompts=prompts,
        ).logits

    def _logits_side_by_side(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor) -> Tensor:
        """Read the input once for all targets. Each begins from the input's last token, which is theirs then."""
        hidden_BTH, mask_BT = encoded.hidden_BTH[:, :-1], encoded.mask_BT[:, :-1]
        begins_BS = begins(owner_BS)
        before_BSH = super().embed(targets_BS.roll(1, dims=1)).to(hidden_BTH.dtype)
        before_BSH = torch.where(begins_BS[:, :, None], encoded.hidden_BTH[:, -1:], before_BSH)
        position_BX = torch.cat(
            [(mask_BT.cumsum(dim=1) - 1).clamp(min=0), mask_BT.sum(1, True) + offsets(begins_BS)], dim=1
        )
        owner_BX = torch.cat([torch.full_like(mask_BT, INPUT), owner_BS], dim=1)
        seen_BXX = seen(owner_BX, torch.cat([mask_BT, torch.ones_like(owner_BS)], dim=1))
        mask: Any = own_mask(seen_BXX, self.model)
        if "sliding_attention" in (getattr(self.model.config, "layer_types", None) or ()):
            near_BXX = position_BX[:, :, None] - position_BX[:, None] < self.model.config.sliding_window
            mask = {"full_attention": mask, "sliding_attention": own_mask(seen_BXX & near_BXX, self.model)}
        return self.model(
            inputs_embeds=torch.cat([hidden_BTH, before_BSH], dim=1),
            attention_mask=mask,
            position_ids=position_BX,
            use_cache=False,
            logits_to_keep=targets_BS.shape[1],
            prompts=prompts,
        ).logits

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
        return self.model.generate(
            inputs_embeds=encoded.hidden_BTH,
            attention_mask=encoded.mask_BT,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=False,  # each worker has the whole model here, and its own number of answers
        )


def _input_end(tokenizer: Any, name: str, text: str) -> int:
    """Return the one token that the text adds behind another."""
    before, after = (tokenizer(t, add_special_tokens=False).input_ids for t in ("x", "x" + text))
    added = after[len(before) :]
    # GPT-2's unknown piece is its end of texts, which may be asked for by its name.
    unknown = [tokenizer.unk_token_id] if text != tokenizer.unk_token else []
    if after[: len(before)] != before or len(added) != 1 or added[0] in unknown:
        raise ConfigError(
            f"backbone.input_end={text!r} is not one token of backbone.name={name}: it becomes "
            f"{tokenizer.convert_ids_to_tokens(added)}. Choose a text that is, such as {tokenizer.eos_token!r}"
        )
    return added[0]
