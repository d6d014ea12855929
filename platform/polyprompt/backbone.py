"""The pre-trained model: loads one of a known family, and runs those of T5's; the others: decoder_only.py, bart.py.

How prompt keys and values reach a model's attention is in prompted_attention.py.

Letters: B rows of a batch, T input tokens, S target tokens, P prompt tokens, H hidden size, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from polyprompt import adapted, decoder_only, flex, prompted_attention
from polyprompt.backbone_base import Backbone, Encoded, begins, seen, with_input_prompts
from polyprompt.backbone_config import BackboneConfig
from polyprompt.bart import Bart
from polyprompt.cpu_training import replace_dropout
from polyprompt.decoder_only import DecoderOnly
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, Prompts, StackDims
from polyprompt.sampling import LogitsProcessor

EMBEDDED = Path(__file__).parent / "embedded"


class _TakesPrompts:
    """`generate` refuses keywords that the model does not name in `prepare_inputs_for_generation`; this names ours."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, prompts: Prompts, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        return {**inputs, "prompts": prompts}


# They keep the names of their bases, which `save_pretrained` writes into config.json.
class T5ForConditionalGeneration(_TakesPrompts, transformers.T5ForConditionalGeneration):  # type: ignore[misc]
    """T5 v1.0, v1.1, LM-adapted, Flan."""


class MT5ForConditionalGeneration(_TakesPrompts, transformers.MT5ForConditionalGeneration):  # type: ignore[misc]
    """mT5."""


class UMT5ForConditionalGeneration(_TakesPrompts, transformers.UMT5ForConditionalGeneration):  # type: ignore[misc]
    """umT5: a position bias in every layer."""


class BartForConditionalGeneration(_TakesPrompts, transformers.BartForConditionalGeneration):  # type: ignore[misc]
    """BART."""


FAMILIES: dict[str, Any] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
    "bart": BartForConditionalGeneration,
}


class EncoderDecoder(Backbone):
    """A model of T5's family."""

    ARCHITECTURE_KEYS = (
        "model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
        "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
        "scale_decoder_outputs", "pad_token_id", "eos_token_id", "decoder_start_token_id",
    )  # fmt: skip
    DROPOUT_KEYS = ("dropout_rate",)

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None) -> None:
        """Tag the self-attention modules for the attention function, and state how to generate."""
        for stack in ("encoder", "decoder"):
            for layer, block in enumerate(getattr(model, stack).block):
                block.layer[0].SelfAttention.prompt_spot = (stack, layer)
                adapted.tag(stack, layer, block.layer[0].SelfAttention, block.layer[-1].DenseReluDense)
        if model.config._attn_implementation == prompted_attention.attention_name("flex"):
            for stack in (model.encoder, model.decoder):
                flex.tag(stack.block[0].layer[0].SelfAttention)
            flex.tag(model.decoder.block[0].layer[1].EncDecAttention)
        config = model.config
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
        model.generation_config = GenerationConfig(
            pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id, decoder_start_token_id=start
        )
        super().__init__(model, tokenizer, name=name, revision=revision)

    def blocks(self) -> list[Any]:
        return [*self.model.encoder.block, *self.model.decoder.block]

    @property
    def start_id(self) -> int:
        """The token that every target starts from; T5 uses its padding token."""
        return self.model.generation_config.decoder_start_token_id

    @property
    def max_input_tokens(self) -> int | None:
        """The length limit that the model states (T5 v1.0: 512), or None. T5's relative positions need none."""
        return getattr(self.model.config, "n_positions", None)

    def reserved_tokens(self, max_target_tokens: int) -> int:
        return 0

    def dims(self, num_tasks: int) -> Dims:
        config = self.model.config
        return Dims(
            hidden=config.d_model,
            encoder=StackDims(config.num_layers, config.num_heads, config.d_kv),
            decoder=StackDims(config.num_decoder_layers, config.num_heads, config.d_kv),
            num_tasks=num_tasks,
        )

    def encode(self, x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> Encoded:
        """Run the encoder on [input prompts ; x]. Relative positions between real tokens stay as they are."""
        if prompts.embeddings_BTH is not None:
            x_BTH = prompts.embeddings_BTH
        x_BTH, mask_BT = with_input_prompts(x_BTH, mask_BT, prompts)
        output = self.model.get_encoder()(inputs_embeds=x_BTH, attention_mask=mask_BT, prompts=prompts)
        return Encoded(output.last_hidden_state, mask_BT)

    def decode(
        self, decoder_input_ids_BS: Tensor, encoded: Encoded, prompts: Prompts, mask: Tensor | None = None
    ) -> Tensor:
        """Return logits_BSV. mask: [B, 1, S, S], in place of the causal one."""
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_BTH),
            attention_mask=encoded.mask_BT,
            decoder_input_ids=decoder_input_ids_BS,
            decoder_attention_mask=mask,
            use_cache=False,
            prompts=prompts,
        ).logits

    def logits(self, targets_BS: Tensor, encoded: Encoded, prompts: Prompts, owner_BS: Tensor | None = None) -> Tensor:
        start_B1 = targets_BS.new_full((len(targets_BS), 1), self.start_id)
        # What stands after the end of a target has no influence on it: the decoder is causal.
        before_BS = torch.cat([start_B1, targets_BS[:, :-1]], dim=1)
        if owner_BS is None:
            return self.decode(before_BS, encoded, prompts)
        # Positions are relative, so a target's own are what they are where it stands alone.
        before_BS = before_BS.masked_fill(begins(owner_BS), self.start_id)
        seen_BSS = seen(owner_BS, torch.ones_like(owner_BS))
        return self.decode(before_BS, encoded, prompts, prompted_attention.own_mask(seen_BSS, self.model))

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
        """Return generated ids_BS, padded, without the start token."""
        ids_BS = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_BTH),
            attention_mask=encoded.mask_BT,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=False,  # each worker has the whole model here, and its own number of answers
        )
        return ids_BS[:, 1:]


def load(
    config: BackboneConfig,
    *,
    train: bool | Literal["layer_norms"],
    precision: Literal["fp32", "bf16"],
    seed: int,
    frozen: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """Load the backbone on the CPU, in eval mode; the seed is for `init: random`.

    Frozen weights are stored in bf16 under that precision; trained ones stay fp32 and compute under autocast.
    frozen: the frozen weights as an earlier load stored them, by name; they are used, not copied.
    Raises ConfigError naming the backbone, the cause and the mend.
    """

    def make(source: str, model_config: Any, origin: dict[str, str]) -> Any:
        if config.init == "random":
            return _random_model(model_config, config.attention, seed)
        return _load_model(config, source, model_config, origin)

    return _backbone(config, make, train=train, precision=precision, frozen=frozen)


def shapes(
    config: BackboneConfig, *, train: bool | Literal["layer_norms"], precision: Literal["fp32", "bf16"], seed: int
) -> Backbone:
    """As `load`, but for the weights, which are not read: tensors have shapes and no data (torch's FakeTensor), so that
    a model of any size takes no memory. Its identity is that of architecture and vocabulary."""

    def make(source: str, model_config: Any, origin: dict[str, str]) -> Any:
        return _random_model(model_config, config.attention, seed)

    with FakeTensorMode(allow_non_fake_inputs=True):
        return _backbone(config, make, train=train, precision=precision)


def lack_of_weights(config: BackboneConfig, num_bytes: int) -> str | None:
    """Say why the weights of a model of this size cannot be loaded on this machine; None if they can, or may be."""
    folder = Path(config.name)
    if (
        config.init == "pretrained"
        and folder.is_dir()
        and not config.gguf_file
        and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    ):
        return f"there are none in {folder}"
    free = psutil.virtual_memory().available
    if num_bytes > free:
        return f"they take {num_bytes / 2**30:.1f} GiB, this machine has {free / 2**30:.1f} GiB free"
    return None


def _backbone(
    config: BackboneConfig,
    make: Callable[[str, Any, dict[str, str]], Any],
    *,
    train: bool | Literal["layer_norms"],
    precision: Literal["fp32", "bf16"],
    frozen: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """make: (folder or hub name, the model's config, revision and the like) → the model."""
    prompted_attention.register()
    embedded = config.name == "embedded"
    source = str(EMBEDDED) if embedded else config.name
    origin = {"revision": config.revision} if config.revision and not embedded else {}
    if config.gguf_file:
        origin["gguf_file"] = config.gguf_file
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **origin)
        kind = _kind(config, model_config)
        if config.dropout is not None:
            for key in kind.DROPOUT_KEYS:
                if hasattr(model_config, key):
                    setattr(model_config, key, config.dropout)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **origin)
        model = make(source, model_config, origin)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(_explain(config, error)) from error
    if len(tokenizer) > model_config.vocab_size:
        raise ConfigError(
            f"backbone.name={config.name}: its tokenizer has {len(tokenizer)} pieces, but the model only "
            f"{model_config.vocab_size}; they do not belong together. Put the model's own tokenizer files beside it"
        )
    name, revision = config.name, config.revision
    backbone: Backbone
    if kind is DecoderOnly:
        backbone = DecoderOnly(model, tokenizer, name=name, revision=revision, input_end=config.input_end)
    else:
        backbone = (Bart if kind is Bart else EncoderDecoder)(model, tokenizer, name=name, revision=revision)
    replace_dropout(model)
    backbone.requires_grad_(train is True)
    if train == "layer_norms":
        for norm in backbone.layer_norms():
            norm.requires_grad_()
    # Not the buffers: rotary frequencies in bf16 would turn far tokens by the wrong angles.
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad and frozen is not None:
            parameter.data = frozen[name]
        elif not parameter.requires_grad and precision == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return backbone.eval()


def _kind(config: BackboneConfig, model_config: Any) -> type[Backbone]:
    """Return the kind of backbone that the model's config describes."""
    if config.attention == "flex" and model_config.model_type not in flex.FAMILIES:
        raise ConfigError(
            f"backbone.attention=flex computes the position bias of {' and '.join(flex.FAMILIES)}, but backbone.name="
            f"{config.name} is a {model_config.model_type!r} model. Use backbone.attention=sdpa"
        )
    if model_config.model_type in decoder_only.FAMILIES:
        return DecoderOnly
    if model_config.model_type not in FAMILIES or not model_config.is_encoder_decoder:
        raise ConfigError(
            f"backbone.name={config.name} is a {model_config.model_type!r} model; expected one of "
            f"{', '.join(FAMILIES)} with encoder and decoder, or of {', '.join(decoder_only.FAMILIES)}. Choose a T5, "
            "Flan-T5, mT5, umT5, BART, GPT-2, Llama, SmolLM or Qwen model"
        )
    if config.input_end is not None:
        raise ConfigError(
            f"backbone.input_end={config.input_end!r} is for decoder-only models; backbone.name={config.name} has an "
            "encoder, whose inputs end in </s>. Drop backbone.input_end"
        )
    return Bart if model_config.model_type == "bart" else EncoderDecoder


def _model_class(model_config: Any) -> Any:
    return (FAMILIES | decoder_only.FAMILIES)[model_config.model_type]


def _random_model(model_config: Any, attention: str, seed: int) -> Any:
    """Build an untrained model under the seed; torch's global stream is left as it was."""
    model_config._attn_implementation = prompted_attention.attention_name(attention)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = _model_class(model_config)(model_config)
        _spread_position_biases(model)
        return model


@torch.no_grad()
def _spread_position_biases(model: Any) -> None:
    """Start the position biases from N(0, 2²), so that heads look at different neighbours from the first step on.

    From T5's own start a small model needs twice the examples before it compares two words at all (measured on one of
    3 + 1 layers of size 64 on the embedded suite).
    """
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(0, 2)


def _load_model(config: BackboneConfig, source: str, model_config: Any, origin: dict[str, str]) -> Any:
    model, info = _model_class(model_config).from_pretrained(
        source,
        config=model_config,
        dtype=torch.float32,
        attn_implementation=prompted_attention.attention_name(config.attention),
        output_loading_info=True,
        **origin,
    )
    missing = sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"backbone.name={config.name}: {len(missing)} weights are missing or have the wrong shape, the first is "
            f"{missing[0]}. Expected a whole model; fetch it again or save it with save_pretrained"
        )
    return model


def _explain(config: BackboneConfig, error: Exception) -> str:
    what = f"backbone.name={config.name}" + (f", backbone.revision={config.revision}" if config.revision else "")
    if "trust_remote_code" in str(error):
        mend = (
            "It comes with Python code of its own, which is not run: backbone.trust_remote_code is off. If you read "
            "that code first, set backbone.trust_remote_code=true, and backbone.revision to the commit that you read"
        )
    elif config.gguf_file:
        what += f", backbone.gguf_file={config.gguf_file}"
        mend = "Expected this GGUF file of a Llama, Qwen or GPT-2 kind there, and the package gguf (pip install gguf)"
    elif Path(config.name).is_dir():
        mend = "Expected config.json, tokenizer files and model.safetensors in this folder"
    elif config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        mend = "The folder does not exist; give an existing folder, a hub name or `embedded`"
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        mend = (
            "HF_HUB_OFFLINE is set and the model is not in the cache (HF_HOME): fetch it once online, or use `embedded`"
        )
    else:
        mend = "Check the name and the network; without network give a local folder or use `embedded`"
    cause = (str(error).strip().splitlines() or [""])[0]
    return f"{what} cannot be loaded: {type(error).__name__}: {cause}\n{mend}"
