"""polyprompt's own driver: every configuration of tests/test_methods.py on every family of tests/tiny.py."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import test_methods
import tiny
import torch
from torch import Tensor

from conformance.driver import Batch, Choices, Model, NotApplicable
from conformance.plain import ABSOLUTE, BACKEND, NEW_TOKENS, TextToText, among_real, watched
from polyprompt import checkpoint
from polyprompt.config import MethodConfig, RunConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import KeyValues, Prompts
from polyprompt.model import PromptedModel
from polyprompt.sampling import Sampling

#: Methods that cannot be made empty.
UNSIZED = ("hyperformer",)
#: Those that the checks run on.
FAMILIES = ("t5", "t5_v1_1", "mt5", "flan", "umt5", "bart", "llama", "qwen2", "qwen3", "gpt2")


@dataclass(frozen=True)
class Ours:
    """A configuration by its name in test_methods.CONFIGS. The backbone is frozen, unless it alone is trained."""

    method: str
    family: str
    library: str = "polyprompt"
    by_row: bool = True

    @property
    def config(self) -> MethodConfig:
        return tiny.fitting(test_methods.CONFIGS[self.method], self.family)

    @property
    def empty(self) -> MethodConfig:
        """The same method without prompts. Raises NotApplicable for one that has no such size."""
        if self.config.name in UNSIZED:
            raise NotApplicable(
                "it has no size 0; tests/test_methods.py shows that its neutral adapters change nothing"
            )
        own = [config for config in test_methods.ZERO.values() if type(config) is type(self.config)]
        return test_methods.ZERO.get(self.method, own[0])

    @property
    def length(self) -> int:
        config = self.config
        if not hasattr(config, "stacks"):
            return getattr(config, "length", 0)
        return max(
            [config.encoder_length] * (config.stacks != "decoder")
            + [config.decoder_length] * (config.stacks != "encoder")
        )

    def build(
        self,
        *,
        empty: bool = False,
        attention: str = "sdpa",
        precision: str = "fp32",
        checkpointing: bool = False,
        seed: int = 0,
    ) -> "OurModel":
        config = self.empty if empty else self.config
        keys: dict[str, Any] = {
            "attention": attention,
            "precision": precision,
            "gradient_checkpointing": checkpointing,
            "seed": seed,
            "train": self.method == "full",
        }
        try:
            model = test_methods.strong(tiny.fitting(config, self.family), family=self.family, **keys)
        except ConfigError as error:
            if "no encoder" not in str(error):
                raise
            raise NotApplicable("its prompts are in the encoder") from error
        return OurModel(model, self.config, bf16=precision == "bf16")

    def plain(self, attention: str) -> Model:
        return TextToText(tiny.plain(self.family, attention), aligned="right")

    def load(self, folder: Path) -> Model:
        made = self.build(seed=2)
        made.model.load_trained_state(checkpoint.read(folder / checkpoint.folder_name(1)).tensors)
        return made


class OurModel:
    """A PromptedModel as the kit's `Model`."""

    def __init__(self, model: PromptedModel, config: MethodConfig, *, bf16: bool) -> None:
        self.model = model
        self.config = config
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def nll(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self._of(batch):
            return self.model(*batch[:4]).nll_B

    def loss(self, batch: Batch) -> Tensor:
        with self._of(batch):
            return self.model(*batch[:4]).total

    def scores(self, batch: Batch, choices: Choices) -> list[list[float]]:
        with self._of(batch):
            return self.model.score_choices(batch.input_ids_BT, batch.mask_BT, batch.task_B, choices)

    def generate(
        self, batch: Batch, *, num_beams: int = 1, use_cache: bool = True, seeds: list[int] | None = None
    ) -> Tensor:
        with self._of(batch):
            return self.model.generate(
                batch.input_ids_BT,
                batch.mask_BT,
                batch.task_B,
                max_new_tokens=NEW_TOKENS,
                num_beams=num_beams,
                use_cache=use_cache,
                sampling=None if seeds is None else Sampling(seeds),
            )

    def attention(self, batch: Batch) -> dict[str, list[Tensor]]:
        made = self.prompts(batch)
        if made.inputs_BPH is None and made.encoder is None and made.decoder is None:
            raise NotApplicable("no prompt tokens")
        if made.embeddings_BTH is not None:
            raise NotApplicable("it changes the embeddings that queries and keys are made of")
        backbone = self.model.backbone
        decoder_only = backbone.dims(1).encoder is None
        if made.inputs_BPH is not None and backbone.model.config.model_type in ("gpt2", "bart"):
            raise NotApplicable(ABSOLUTE)
        with watched(backbone.model) as seen:
            self.nll(batch)
        return among_real(seen, batch, decoder_only=decoder_only, aligned="right")

    def prompts(self, batch: Batch) -> Prompts:
        x_BTH = self.model.backbone.embed(batch.input_ids_BT)
        return self.model.method.prompts(x_BTH, batch.mask_BT, batch.task_B)

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}

    def vectors(self) -> dict[str, Tensor]:
        if self.model.method.num_routes:  # a prompt that no row is sent to has no gradient
            return {}
        # Not P-tuning's: behind a ReLU that lets nothing of it through a vector has none either.
        names = ("prompt_", "prefix_")
        own = self.model.method.named_parameters()
        return {name: p for name, p in own if name.rpartition(".")[2].startswith(names)}

    def training(self) -> None:
        self.model.train()

    def compile(self) -> None:
        self.model.compile(backend=BACKEND)

    def save(self, folder: Path) -> None:
        checkpoint.write(
            folder,
            step=1,
            tensors=self.model.trained_state(),
            optimizer={},
            state={},
            config=RunConfig(tasks=["embedded/nli"], method=self.config),
            backbone=self.model.backbone.identity(),
            commit="",
        )

    @contextlib.contextmanager
    def _of(self, batch: Batch) -> Iterator[None]:
        """Let each row have as many of its prompt tokens as the batch says."""
        method, whole = self.model.method, self.model.method.prompts
        if batch.lengths_B is not None:
            lengths_B = batch.lengths_B
            object.__setattr__(method, "prompts", lambda *rows: _cut(whole(*rows), lengths_B))
        try:
            with self.autocast:
                yield
        finally:
            if batch.lengths_B is not None:
                object.__delattr__(method, "prompts")


def _cut(made: Prompts, lengths_B: Tensor) -> Prompts:
    """Keep the first tokens of each row's prompt: by a mask, or by cutting where all rows have equally many."""
    if len(lengths_B.unique()) == 1:
        n = int(lengths_B[0])
        own = {
            stack: KeyValues(kv.keys_LBNPD[..., :n, :], kv.values_LBNPD[..., :n, :])
            for stack in ("encoder", "decoder")
            if (kv := getattr(made, stack)) is not None
        }
        return replace(made, inputs_BPH=None if made.inputs_BPH is None else made.inputs_BPH[:, :n], **own)

    def mask(num_prompts: int) -> Tensor:
        return (torch.arange(num_prompts) < lengths_B[:, None]).long()

    own = {
        stack: replace(kv, mask_BP=mask(kv.keys_LBNPD.shape[3]))
        for stack in ("encoder", "decoder")
        if (kv := getattr(made, stack)) is not None
    }
    return replace(made, mask_BP=None if made.inputs_BPH is None else mask(made.inputs_BPH.shape[1]), **own)
