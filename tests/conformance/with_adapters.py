"""The driver of AdapterHub's `adapters`, which pins an older transformers: it runs in an environment of its own.

    PYTHONPATH=tests python -m conformance.with_adapters JOB.json

JOB.json: `folders` (family → folder of a model), `methods`, `checks`, and what is `done`. Prints results, one line of
JSON each.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_batch import NUM_TASKS
from torch import Tensor

from conformance.driver import Batch, Model, NotApplicable
from conformance.plain import TextToText

#: Those that the library has an implementation of.
FAMILIES = ("t5", "t5_v1_1", "mt5", "flan", "llama", "gpt2")
_LENGTH = 4
METHODS = ("prefix tuning", "prefix tuning, flat", "LoRA", "adapter")
_NAMES = [f"task{number}" for number in range(NUM_TASKS)]


@dataclass(frozen=True)
class Adapters:
    """A method of the library with its defaults, save the sizes; an adapter for each task, joined by BatchSplit."""

    method: str
    family: str
    folder: str
    library: str = "adapters"

    @property
    def by_row(self) -> bool:
        return (self.method, self.family) != ("LoRA", "gpt2")  # it refuses BatchSplit there

    @property
    def length(self) -> int:
        return _LENGTH if self.method.startswith("prefix") else 0

    def build(
        self,
        *,
        empty: bool = False,
        attention: str = "sdpa",
        precision: str = "fp32",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> "AdaptersModel":
        model = self._with_adapters(attention)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(seed)
        for name in _NAMES:
            model.add_adapter(name, config=self._config(empty=empty))
        names = _NAMES if self.by_row else _NAMES[:1]
        model.train_adapter(names)
        if not empty:
            for weight in model.parameters():
                if weight.requires_grad:
                    torch.nn.init.normal_(weight, std=0.3)
        if precision == "bf16":
            model.to(torch.bfloat16)
        return AdaptersModel(model, self)

    def plain(self, attention: str) -> Model:
        return TextToText(self._plain(attention))

    def load(self, folder: Path) -> Model:
        model = self._with_adapters("sdpa")
        for name in _NAMES:
            model.load_adapter(str(folder / name))
        return AdaptersModel(model, self)

    def _config(self, *, empty: bool) -> Any:
        import adapters

        if self.method == "LoRA":
            return adapters.LoRAConfig(r=2)
        if self.method == "adapter":
            if empty:
                raise NotApplicable("no adapter of size 0")
            return adapters.SeqBnConfig(reduction_factor=4)
        flat = self.method.endswith("flat")
        return adapters.PrefixTuningConfig(flat=flat, prefix_length=0 if empty else _LENGTH, bottleneck_size=7)

    def _plain(self, attention: str) -> Any:
        """Return the random model of the family; Llama with heads of hidden size / heads, as the library expects."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.folder)
        config.output_attentions = attention == "eager"  # T5 keeps its weights to itself without
        causal = not config.is_encoder_decoder
        if self.family == "llama":
            config.hidden_size = config.num_attention_heads * config.head_dim
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
        torch.manual_seed(7)
        # T5 has eager attention only in this transformers.
        model = kind.from_config(config, attn_implementation=attention if causal else "eager")
        if not causal:
            for name, weight in model.named_parameters():
                if "relative_attention_bias" in name:
                    torch.nn.init.normal_(weight)
        return model.eval()

    def _with_adapters(self, attention: str) -> Any:
        import adapters

        model = self._plain(attention)
        adapters.init(model)
        return model


class AdaptersModel(TextToText):
    """A model with an adapter for each task."""

    def __init__(self, model: Any, subject: Adapters) -> None:
        super().__init__(model)
        self.subject = subject

    def generate(self, batch: Batch, **keys: Any) -> Tensor:
        order = batch.task_B.argsort(stable=True)
        self._activate(batch)
        return super().generate(batch.rows(order), **keys)[order.argsort()]

    def attention(self, batch: Batch) -> dict[str, list[Tensor]]:
        if not self.subject.length:
            raise NotApplicable("no prompt tokens")
        # The weights of rows in the order of their tasks, then back.
        order = batch.task_B.argsort(stable=True)
        found = super().attention(batch.rows(order))
        return {stack: [rows[i] for i in order.argsort().tolist()] for stack, rows in found.items()}

    def save(self, folder: Path) -> None:
        self.model.save_all_adapters(str(folder))

    def _nll(self, batch: Batch) -> Tensor:
        order = batch.task_B.argsort(stable=True)
        self._activate(batch)
        return super()._nll(batch.rows(order))[order.argsort()]

    def _activate(self, batch: Batch) -> None:
        """BatchSplit takes the rows of its adapters one adapter after the other."""
        from adapters.composition import BatchSplit

        if not self.subject.by_row:
            self.model.set_active_adapters(_NAMES[0])
            return
        counts = torch.bincount(batch.task_B, minlength=NUM_TASKS).tolist()
        own = [(name, count) for name, count in zip(_NAMES, counts, strict=True) if count]
        names, sizes = [name for name, _ in own], [count for _, count in own]
        self.model.set_active_adapters(names[0] if len(own) == 1 else BatchSplit(*names, batch_sizes=sizes))


def main() -> int:
    from conformance.results import hold

    job = json.loads(Path(sys.argv[1]).read_text())
    subjects = [
        Adapters(method, family, folder) for method in job["methods"] for family, folder in job["folders"].items()
    ]
    for result in hold(subjects, job["checks"], {tuple(key) for key in job["done"]}):
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
