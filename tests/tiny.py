"""Tiny random backbones in temporary folders, and batches for them. N·D = 12 differs from H = 16 on purpose."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tiny_batch import NUM_TASKS as NUM_TASKS
from tiny_batch import VOCABULARY as VOCABULARY
from tiny_batch import batch as batch
from tiny_batch import rows as rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from polyprompt import backbone, methods
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import AttemptConfig, MethodConfig, MPTConfig
from polyprompt.methods.base import Dims, Method
from polyprompt.model import PromptedModel

LIMIT = 40
CLASSES = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, {"n_positions": LIMIT}),
    "t5_v1_1": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration, {}),
    "flan": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": LIMIT},
    ),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration, {}),
}
FAMILIES = tuple(CLASSES)
_ROTARY = {
    "hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4,
    "intermediate_size": 32, "max_position_embeddings": LIMIT, "attention_dropout": 0.1, "initializer_range": 0.3,
}  # fmt: skip
#: Four kinds of decoder-only models, with 3 heads of keys and values of 4 in 2 layers, as the T5 decoders here.
DECODER_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {**_ROTARY, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, _ROTARY),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, _ROTARY),
    "gpt2": (
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": LIMIT, "initializer_range": 0.3},
    ),
}
#: Learned positions in encoder and decoder.
BART = (
    transformers.BartConfig,
    transformers.BartForConditionalGeneration,
    {
        "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24, "max_position_embeddings": LIMIT,
        "dropout": 0.1, "init_std": 0.3, "forced_eos_token_id": None,
    },
)  # fmt: skip
#: Each family's own tokenizer, and how it spells a newline.
DECODER_TOKENIZERS = {
    "llama": (transformers.LlamaTokenizer, "<0x0A>"),
    "qwen2": (transformers.Qwen2Tokenizer, "Ċ"),
    "qwen3": (transformers.Qwen2Tokenizer, "Ċ"),
    "gpt2": (transformers.GPT2Tokenizer, "Ċ"),
}
DECODERS = tuple(DECODER_CLASSES)
#: The family of a model that names none. Tests of other families replace it.
default_family = "t5"
_WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 60)}}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="polyprompt_tiny_")


def folder(family: str | None = None) -> Path:
    """Return a folder with a random model of the family and a word-level tokenizer, both from `save_pretrained`."""
    family = family or default_family
    if family == "bart":
        return _bart_folder()
    return _decoder_folder(family) if family in DECODERS else _t5_folder(family)


@functools.cache
def _decoder_folder(family: str) -> Path:
    config_class, model_class, extra = DECODER_CLASSES[family]
    path = Path(_root().name) / family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(
            config_class(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=1, **extra)
        )
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.data.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer_class, newline = DECODER_TOKENIZERS[family]
    pieces = {**_WORDS, "x": 60, "▁": 61, newline: 62}
    names = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer_class(vocab=pieces, merges=[], **names).save_pretrained(path)
    return path


@functools.cache
def _t5_folder(family: str) -> Path:
    config_class, model_class, extra = CLASSES[family]
    config = config_class(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, num_heads=3, d_ff=32, num_layers=3, num_decoder_layers=2,
        decoder_start_token_id=0, dropout_rate=0.1, **extra,
    )  # fmt: skip
    path = Path(_root().name) / family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(config)
        if family in ("t5_v1_1", "flan"):
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 16))
        # A bias of 0.25 would hide mistakes in the bias behind rounding.
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.data.normal_()
    model.save_pretrained(path)
    _word_tokenizer().save_pretrained(path)
    return path


def _word_tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(_WORDS, unk_token="<unk>")),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


@functools.cache
def _bart_folder() -> Path:
    config_class, model_class, extra = BART
    path = Path(_root().name) / "bart"
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(config_class(vocab_size=VOCABULARY, **special, **extra))
    model.save_pretrained(path)
    _word_tokenizer().save_pretrained(path)
    return path


@functools.cache
def _plain(family: str, attention: str) -> Any:
    _, model_class, _ = (CLASSES | DECODER_CLASSES | {"bart": BART})[family]
    return model_class.from_pretrained(folder(family), attn_implementation=attention, dtype=torch.float32).eval()


def plain(family: str | None = None, attention: str = "sdpa") -> Any:
    """Return a fresh copy of transformers' own model of the folder, untouched by polyprompt."""
    return copy.deepcopy(_plain(family or default_family, attention))


@functools.cache
def _loaded(
    family: str, train: bool | Literal["layer_norms"], precision: Any, keys: tuple[tuple[str, Any], ...]
) -> backbone.Backbone:
    config = BackboneConfig(name=str(folder(family)), **dict(keys))
    return backbone.load(config, train=train, precision=precision, seed=0)


def load(
    family: str | None = None, *, train: bool | Literal["layer_norms"] = True, precision: Any = "fp32", **keys: Any
) -> backbone.Backbone:
    """Return a fresh copy of the tiny backbone; the keys are those of BackboneConfig."""
    return copy.deepcopy(_loaded(family or default_family, train, precision, tuple(sorted(keys.items()))))


def build(config: MethodConfig, dims: Dims, *, seed: int) -> Method:
    """Return the method; one that builds on source prompts gets random ones: two, or MPT's teacher for each task."""
    sources = None
    if isinstance(config, AttemptConfig) or (isinstance(config, MPTConfig) and config.teachers):
        num_sources = 2 if isinstance(config, AttemptConfig) else dims.num_tasks
        sources = torch.randn(num_sources, config.length, dims.hidden, generator=torch.Generator().manual_seed(3))
    return methods.build(config, dims, seed=seed, sources_JPH=sources)


def fitting(config: MethodConfig, family: str | None = None) -> MethodConfig:
    """Return the config, with prompts of the decoder stack where it has both and the family no encoder."""
    both = getattr(config, "stacks", None) == "both" and (family or default_family) in DECODERS
    if not both:
        return config
    # The length of a stack that is left out must be its default.
    unused = type(config).model_fields["encoder_length"].default
    return config.model_copy(update={"stacks": "decoder", "encoder_length": unused})


def model(
    config: MethodConfig,
    family: str | None = None,
    *,
    train: bool | Literal["layer_norms"] = True,
    precision: Any = "fp32",
    seed: int = 0,
    **keys: Any,
) -> PromptedModel:
    """Return a prompted model in eval mode with NUM_TASKS tasks."""
    loaded = load(family, train=train, precision=precision, **keys)
    return PromptedModel(loaded, build(config, loaded.dims(NUM_TASKS), seed=seed)).eval()
