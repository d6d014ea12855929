"""The driver of Hugging Face PEFT, on the same weights as ours."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
from tiny_batch import NUM_TASKS
from torch import Tensor

from conformance.driver import Batch, Model, NotApplicable
from conformance.plain import ABSOLUTE, TextToText

FAMILIES = ("t5", "t5_v1_1", "mt5", "flan", "llama", "qwen2", "qwen3", "gpt2")
_LENGTH = 4
#: Prefixes need heads of N·D = 12 in two layers, which PEFT would take from the hidden size and the encoder.
_SHAPE = {"token_dim": 12, "num_attention_heads": 3, "num_layers": 2}
_PROMPT = {"num_virtual_tokens": _LENGTH}
#: Adapters by task. A name of digits alone would do harm: `save_pretrained` strips it from names such as block.1 too.
_NAMES = ("default", *(f"task{number}" for number in range(1, NUM_TASKS)))
METHODS: dict[str, Callable[..., Any]] = {
    "prompt tuning": lambda **keys: peft.PromptTuningConfig(**{**_PROMPT, **keys}),
    "P-tuning": lambda **keys: peft.PromptEncoderConfig(**{**_PROMPT, "encoder_hidden_size": 7, **keys}),
    "prefix tuning": lambda **keys: peft.PrefixTuningConfig(**{**_PROMPT, **_SHAPE, **keys}),
    "prefix tuning, MLP": lambda **keys: peft.PrefixTuningConfig(
        **{**_PROMPT, **_SHAPE, "prefix_projection": True, "encoder_hidden_size": 7, **keys}
    ),
    "MPT": lambda **keys: peft.MultitaskPromptTuningConfig(
        **{**_PROMPT, "num_tasks": NUM_TASKS, "num_ranks": 1, **keys}
    ),
    "LoRA": lambda **keys: peft.LoraConfig(r=2, **keys),
    "LoRA, adapter_names": lambda **keys: peft.LoraConfig(r=2, **keys),
}


@dataclass(frozen=True)
class Peft:
    """A method of PEFT with its defaults, save the sizes."""

    method: str
    family: str
    library: str = "PEFT"

    @property
    def length(self) -> int:
        return 0 if self.method.startswith("LoRA") else _LENGTH

    @property
    def by_row(self) -> bool:
        return self.method in ("MPT", "LoRA, adapter_names")

    def build(
        self,
        *,
        empty: bool = False,
        attention: str = "sdpa",
        precision: str = "fp32",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> "PeftModel":
        base = tiny.plain(self.family, attention)
        if precision == "bf16":
            base = base.to(torch.bfloat16)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        task = "CAUSAL_LM" if self.family in tiny.DECODERS else "SEQ_2_SEQ_LM"
        keys = {"num_virtual_tokens": 0} if empty and self.length else {}
        config = METHODS[self.method](task_type=task, **keys)
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        if self.method.startswith("LoRA"):
            if self.by_row:
                for name in _NAMES[1:]:
                    model.add_adapter(name, METHODS[self.method](task_type=task))
                model.base_model.set_adapter(list(_NAMES))
            if not empty:  # an update starts at zero
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        torch.nn.init.normal_(weight, std=0.3)
        return PeftModel(model, self)

    def plain(self, attention: str) -> Model:
        return TextToText(tiny.plain(self.family, attention))

    def load(self, folder: Path) -> Model:
        model = peft.PeftModel.from_pretrained(tiny.plain(self.family), folder)
        for name in _NAMES[1:] if "adapter_names" in self.method else ():
            model.load_adapter(folder / name, name)
        return PeftModel(model, self)


class PeftModel(TextToText):
    """A model with one of PEFT's adapters on it, or one for each task."""

    def __init__(self, model: Any, subject: Peft) -> None:
        super().__init__(model)
        self.subject = subject

    def keywords(self, batch: Batch, *, num_beams: int = 1) -> dict[str, Any]:
        if self.subject.method == "MPT":
            return {"task_ids": batch.task_B}
        if self.subject.by_row:
            return {"adapter_names": [_NAMES[task] for task in batch.task_B.tolist()]}
        return {}

    def attention(self, batch: Batch) -> dict[str, list[Tensor]]:
        if not self.subject.length:
            raise NotApplicable("no prompt tokens")
        if self.subject.family == "gpt2" and not self.subject.method.startswith("prefix"):
            raise NotApplicable(ABSOLUTE)
        return super().attention(batch)

    def vectors(self) -> dict[str, Tensor]:
        tables = re.compile(r"prompt_encoder\.default\.embedding\.weight$")
        return {name: p for name, p in self.trained().items() if tables.search(name)}
