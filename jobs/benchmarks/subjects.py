"""Who computes a batch: polyprompt's model, transformers' own, or PEFT's on it. All from the same weights.

Letters: B rows of a batch, T input tokens, S target tokens, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.cases import Case
from benchmarks.rows import Repeated, batches_of
from benchmarks.setting import Setting, config_of
from polyprompt import backbone as backbones
from polyprompt import checkpoint, folding, plan
from polyprompt.backbone_base import Backbone
from polyprompt.collation import IGNORED, Batch
from polyprompt.config import RunConfig
from polyprompt.data import AnyData, prepare
from polyprompt.errors import BundleError, ConfigError
from polyprompt.model import PromptedModel, input_limit
from polyprompt.tasks import catalog

#: What transformers' own classes are called here; ours know prompts.
PLAIN = {"t5": transformers.T5ForConditionalGeneration, "llama": transformers.LlamaForCausalLM}


@dataclass(frozen=True)
class Subject:
    """A model with its rows. loss: the summed negative log-likelihood of a micro-batch, in nats. backbone_bytes: of all
    weights that are there before a method comes. model: of ours alone."""

    module: nn.Module
    loss: Callable[[Batch], Tensor]
    config: RunConfig
    batches: Repeated
    data: Sequence[AnyData] | None
    backbone_bytes: int
    model: PromptedModel | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


def build(case: Case, setting: Setting, load: plan.Load | None = None) -> Subject:
    """Build what computes a case. load: of a backbone that trials share. Raises ConfigError, DataError."""
    config = config_of(case, setting)
    num_tasks, load = len(config.tasks), load or backbones.load
    loaded = _trained(setting) if case.trained else plan.model_of(config, num_tasks, load=load)
    data = _data(case, config, loaded)
    batches = batches_of(case, config, data, loaded.backbone.tokenizer.pad_token_id)
    if case.side == "ours":
        return _ours(case, config, loaded, batches, data, setting)
    module = _alternative(case, loaded.backbone).to(setting.device)
    nll = _seq2seq if loaded.backbone.dims(1).encoder is not None else _causal(loaded.backbone)
    return Subject(module, lambda micro: nll(module, micro), config, batches, data, _bytes(loaded.backbone))


def _data(case: Case, config: RunConfig, model: PromptedModel) -> Sequence[AnyData] | None:
    if isinstance(case.lengths, int):
        return None
    limit = input_limit(config, model.backbone, model.method)
    return prepare(config, catalog.resolve(config), model.backbone.tokenizer, max_input_tokens=limit)


def _trained(setting: Setting) -> PromptedModel:
    bundle = None if setting.trained is None else checkpoint.newest(setting.trained / "bundles")
    if bundle is None:
        raise BundleError(f"{setting.trained} holds no bundle: the benchmark trains one first; delete the folder")
    return plan.model_of(bundle.config, len(bundle.config.tasks), bundle)


def _ours(
    case: Case,
    config: RunConfig,
    model: PromptedModel,
    batches: Repeated,
    data: Sequence[AnyData] | None,
    setting: Setting,
) -> Subject:
    backbone_bytes = _bytes(model.backbone)
    if case.folded:
        dims = model.backbone.dims(len(config.tasks))
        tables, texts = folding.fold(model.method.eval(), len(config.tasks), dims.hidden, max_tokens=4)
        model = PromptedModel(model.backbone, folding.Folded(tables, texts))
    model = model.to(setting.device)

    def loss(micro: Batch) -> Tensor:
        return model(micro.input_ids_BT, micro.mask_BT, micro.labels_BS, micro.task_B).total

    return Subject(model, loss, config, batches, data, backbone_bytes, model)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _alternative(case: Case, backbone: Backbone) -> nn.Module:
    """Return a model that owes polyprompt nothing but its weights."""
    config = backbone.model.config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        plain = PLAIN[config.model_type](config)
    # assign: the very tensors, so that nothing is in memory twice.
    plain.load_state_dict(backbone.model.state_dict(), assign=True, strict=False)
    plain.tie_weights()
    for name, buffer in backbone.model.named_buffers():
        plain.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    plain.requires_grad_(case.side == "plain")
    return plain if case.side == "plain" else _peft(case, plain)


def _peft(case: Case, plain: nn.Module) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            f"{case.name!r} measures PEFT, which is not installed: pip install 'polyprompt[peft]', or leave it out"
        ) from None
    encoder = hasattr(plain, "encoder")
    kind: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM" if encoder else "CAUSAL_LM"}
    if case.side == "peft_prompt_tuning":
        # In T5 the prompt is before the encoder's input alone, as in Lester et al. 2021 and as ours.
        own = peft.PromptTuningConfig(num_virtual_tokens=100, num_transformer_submodules=1, **kind)
    elif case.side == "peft_prefix_tuning":
        own = peft.PrefixTuningConfig(num_virtual_tokens=16, **kind)
    else:
        own = peft.LoraConfig(r=8, lora_alpha=8, **kind)
    return peft.get_peft_model(plain, own)


def _seq2seq(module: nn.Module, micro: Batch) -> Tensor:
    output = module(input_ids=micro.input_ids_BT, attention_mask=micro.mask_BT, labels=micro.labels_BS)
    return output.loss * (micro.labels_BS != IGNORED).sum()


def _causal(backbone: Any) -> Callable[[nn.Module, Batch], Tensor]:
    """Input, its end, target in one sequence, padded on the right; only the target has a loss."""

    def nll(module: nn.Module, micro: Batch) -> Tensor:
        rows, targets = [], []
        for input_T, mask_T, label_S in zip(micro.input_ids_BT, micro.mask_BT, micro.labels_BS, strict=True):
            words = input_T[mask_T == 1].clone()
            words[-1] = backbone.end_id
            label = label_S[label_S != IGNORED]
            rows.append(torch.cat([words, label]))
            targets.append(torch.cat([torch.full_like(words, IGNORED), label]))
        ids_BX = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels_BX = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        mask_BX = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits_BXV = module(input_ids=ids_BX, attention_mask=mask_BX).logits
        # PEFT's prompts stand before the input.
        logits_BXV = logits_BXV[:, -ids_BX.shape[1] :]
        wanted_BX = labels_BX[:, 1:] != IGNORED
        return cross_entropy(logits_BXV[:, :-1][wanted_BX].float(), labels_BX[:, 1:][wanted_BX], reduction="sum")

    return nll
