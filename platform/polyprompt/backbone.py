"""The pre-trained model: loads T5-like models and glues prompts onto them; only this file imports transformers' models.

Prompts travel as the keyword `prompts` of the model's own forward down to its attention function, so nothing is stored
on a module: threads, gradient checkpointing and cached or beam generation need no care. One attention function,
registered with transformers, prepends a row's prompt keys and values in the self-attention modules that `load` tagged.

Letters: B rows of a batch, T input tokens, S target tokens, P prompt tokens, H hidden size, L layers, N heads, D head
size, V vocabulary, Q queries, X keys.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoTokenizer, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import eager_attention_forward

from polyprompt.config import BackboneConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, Prompts, StackDims

EMBEDDED = Path(__file__).parent / "embedded"
#: The entries of a model's config that shape what it computes; the rest is bookkeeping and may change with versions.
ARCHITECTURE_KEYS = (
    "model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
    "scale_decoder_outputs", "pad_token_id", "eos_token_id", "decoder_start_token_id",
)  # fmt: skip


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


FAMILIES: dict[str, Any] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
}


class Encoded(NamedTuple):
    """The encoder's output, input prompts included. T counts them too."""

    hidden_BTH: Tensor
    mask_BT: Tensor


class Backbone(nn.Module):
    """A loaded encoder-decoder model and its tokenizer. Make one with `load`."""

    model: Any
    tokenizer: Any

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._identity = {"name": name, "revision": revision, "sha256": _content_hash(model, tokenizer)}

    @property
    def start_id(self) -> int:
        """The token that every target starts from; T5 uses its padding token."""
        return self.model.generation_config.decoder_start_token_id

    @property
    def max_input_tokens(self) -> int | None:
        """The length limit that the model states (T5 v1.0: 512), or None. T5's relative positions need none."""
        return getattr(self.model.config, "n_positions", None)

    def dims(self, num_tasks: int) -> Dims:
        config = self.model.config
        return Dims(
            hidden=config.d_model,
            encoder=StackDims(config.num_layers, config.num_heads, config.d_kv),
            decoder=StackDims(config.num_decoder_layers, config.num_heads, config.d_kv),
            num_tasks=num_tasks,
        )

    def identity(self) -> dict[str, str | None]:
        """Return name, revision and sha256 of architecture, vocabulary and weights as they were loaded (in fp32)."""
        return dict(self._identity)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` and transformers' AutoModelForSeq2SeqLM and AutoTokenizer can read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """Return x_BTH."""
        return self.model.get_input_embeddings()(input_ids_BT)

    def ordinary_embeddings(self) -> Tensor:
        """Return the embeddings of the pieces that are no special tokens, in the order of their ids."""
        special = set(self.tokenizer.all_special_ids)
        ordinary = [i for i in range(len(self.tokenizer)) if i not in special]
        return self.model.get_input_embeddings().weight[torch.tensor(ordinary)].detach()

    def encode(self, x_BTH: Tensor, mask_BT: Tensor, prompts: Prompts) -> Encoded:
        """Run the encoder on [input prompts ; x]. Relative positions between real tokens stay as they are."""
        if prompts.embeddings_BTH is not None:
            x_BTH = prompts.embeddings_BTH
        if prompts.inputs_BPH is not None:
            x_BTH = torch.cat([prompts.inputs_BPH.to(x_BTH.dtype), x_BTH], dim=1)
            mask_BP = mask_BT.new_ones(prompts.inputs_BPH.shape[:2]) if prompts.mask_BP is None else prompts.mask_BP
            mask_BT = torch.cat([mask_BP.to(mask_BT.dtype), mask_BT], dim=1)
        output = self.model.get_encoder()(inputs_embeds=x_BTH, attention_mask=mask_BT, prompts=prompts)
        return Encoded(output.last_hidden_state, mask_BT)

    def decode(self, decoder_input_ids_BS: Tensor, encoded: Encoded, prompts: Prompts) -> Tensor:
        """Return logits_BSV."""
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_BTH),
            attention_mask=encoded.mask_BT,
            decoder_input_ids=decoder_input_ids_BS,
            use_cache=False,
            prompts=prompts,
        ).logits

    def generate(
        self, encoded: Encoded, prompts: Prompts, *, max_new_tokens: int, num_beams: int, use_cache: bool
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
        )
        return ids_BS[:, 1:]


def load(config: BackboneConfig, *, train: bool, precision: Literal["fp32", "bf16"], seed: int) -> Backbone:
    """Load the backbone on the CPU, in eval mode; the seed is for `embedded` while it ships without weights.

    A frozen backbone is stored in bf16 under that precision; a trained one stays fp32 and computes under autocast.
    Raises ConfigError naming the backbone, the cause and the mend.
    """
    _register()
    embedded = config.name == "embedded"
    source = str(EMBEDDED) if embedded else config.name
    origin = {"revision": config.revision} if config.revision and not embedded else {}
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **origin)
        _check_family(config.name, model_config)
        if config.dropout is not None:
            model_config.dropout_rate = config.dropout
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **origin)
        if config.init == "random" or (embedded and not (EMBEDDED / "model.safetensors").exists()):
            model = _random_model(model_config, config.attention, seed)
        else:
            model = _load_model(config, source, model_config, origin)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(_explain(config, error)) from error
    if len(tokenizer) > model_config.vocab_size:
        raise ConfigError(
            f"backbone.name={config.name}: its tokenizer has {len(tokenizer)} pieces, but the model only "
            f"{model_config.vocab_size}; they do not belong together. Put the model's own tokenizer files beside it"
        )
    _prepare(model)
    backbone = Backbone(model, tokenizer, name=config.name, revision=config.revision)
    backbone.requires_grad_(train)
    if precision == "bf16" and not train:
        backbone.to(torch.bfloat16)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return backbone.eval()


def _check_family(name: str, model_config: Any) -> None:
    if model_config.model_type not in FAMILIES or not model_config.is_encoder_decoder:
        raise ConfigError(
            f"backbone.name={name} is a {model_config.model_type!r} model; expected one of {', '.join(FAMILIES)} with "
            "encoder and decoder. Choose a T5, Flan-T5, mT5 or umT5 model"
        )


def _random_model(model_config: Any, attention: str, seed: int) -> Any:
    """Build an untrained model under the seed; torch's global stream is left as it was."""
    model_config._attn_implementation = _attention_name(attention)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = FAMILIES[model_config.model_type](model_config)
        _spread_position_biases(model)
        return model


@torch.no_grad()
def _spread_position_biases(model: Any) -> None:
    """Start the position biases from N(0, 2²), so that heads look at different neighbours from the first step on.

    From T5's own start a model this small needs twice the examples before it compares two words at all.
    """
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(0, 2)


def _load_model(config: BackboneConfig, source: str, model_config: Any, origin: dict[str, str]) -> Any:
    model, info = FAMILIES[model_config.model_type].from_pretrained(
        source,
        config=model_config,
        dtype=torch.float32,
        attn_implementation=_attention_name(config.attention),
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


def _prepare(model: Any) -> None:
    """Tag the self-attention modules for the attention function, and state how to generate."""
    for stack in ("encoder", "decoder"):
        for layer, block in enumerate(getattr(model, stack).block):
            block.layer[0].SelfAttention.prompt_spot = (stack, layer)
    config = model.config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id, decoder_start_token_id=start
    )


def _explain(config: BackboneConfig, error: Exception) -> str:
    what = f"backbone.name={config.name}" + (f", backbone.revision={config.revision}" if config.revision else "")
    if Path(config.name).is_dir():
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


def _content_hash(model: Any, tokenizer: Any) -> str:
    """Hash what the model computes with: architecture, vocabulary, and every weight once."""
    config = model.config.to_dict()
    digest = hashlib.sha256(json.dumps({k: config.get(k) for k in ARCHITECTURE_KEYS}, sort_keys=True).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(memoryview(weight.detach().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _attention_name(attention: str) -> str:
    return f"polyprompt_{attention}"


def _register() -> None:
    """Make the prompted attention known to transformers, around each implementation with its own kind of mask."""
    AttentionInterface.register(_attention_name("sdpa"), _prompted(sdpa_attention_forward))
    AttentionMaskInterface.register(_attention_name("sdpa"), sdpa_mask)
    AttentionInterface.register(_attention_name("eager"), _prompted(eager_attention_forward))
    AttentionMaskInterface.register(_attention_name("eager"), eager_mask)


def _prompted(wrapped: Callable) -> Callable:
    """Return an attention function that prepends a row's prompt keys and values and calls the wrapped one.

    Prompt columns have no position bias and are visible from every query. Without prompts the call goes through as is.
    """

    def attend(
        module: nn.Module,
        query_BNQD: Tensor,
        key_BNXD: Tensor,
        value_BNXD: Tensor,
        mask: Tensor | None,
        *,
        position_bias: Tensor,
        prompts: Prompts | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Cross-attention has no spot.
        stack, layer = getattr(module, "prompt_spot", (None, 0))
        made = getattr(prompts, stack) if prompts is not None and stack else None
        if made is None or made.keys_LBNPD.shape[3] == 0:
            return wrapped(module, query_BNQD, key_BNXD, value_BNXD, mask, position_bias=position_bias, **kwargs)
        num_prompts, num_queries, num_keys = made.keys_LBNPD.shape[3], query_BNQD.shape[2], key_BNXD.shape[2]
        if mask is None and module.is_causal and num_queries > 1:
            # transformers leaves the causal mask to sdpa's is_causal flag, which would hide prompt columns.
            causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BNQD.device)
            mask = causal.tril(num_keys - num_queries)[None, None]
        if mask is not None:
            mask = pad(mask, (num_prompts, 0), value=True if mask.dtype == torch.bool else 0.0)
        return wrapped(
            module,
            query_BNQD,
            torch.cat([_for_rows(made.keys_LBNPD[layer], key_BNXD), key_BNXD], dim=2),
            torch.cat([_for_rows(made.values_LBNPD[layer], value_BNXD), value_BNXD], dim=2),
            mask,
            position_bias=pad(position_bias, (num_prompts, 0)),
            is_causal=False,
            **kwargs,
        )

    return attend


def _for_rows(made_BNPD: Tensor, like_BNXD: Tensor) -> Tensor:
    """Repeat a row's prompts for its beams, which lie side by side, and follow the dtype of the layer."""
    beams = len(like_BNXD) // len(made_BNPD)
    return made_BNPD.to(like_BNXD.dtype).repeat_interleave(beams, dim=0) if beams > 1 else made_BNPD.to(like_BNXD.dtype)
