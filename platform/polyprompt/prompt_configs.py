"""The config sections of the prompt methods beside those of the two papers and their baselines: a part of config.py."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyprompt.section import AbsolutePath, Section


class PrefixTuningConfig(Section):
    """Trained keys and values for every self-attention layer (Li & Liang 2021; P-tuning v2, Liu et al. 2022)."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    stacks: Literal["both", "encoder", "decoder"] = "both"
    encoder_length: NonNegativeInt = 16
    decoder_length: NonNegativeInt = 6
    per_task: bool = True
    #: mlp: prefixes are made by a two-layer MLP from vectors of the hidden size; none: they are trained as they are.
    reparameterisation: Literal["none", "mlp"] = "none"
    mlp_hidden_size: PositiveInt = 512
    #: Standard deviation of the keys and values at the start.
    init_std: PositiveFloat = 0.1


class PTuningConfig(Section):
    """Soft prompts before the input, made by a prompt encoder (Liu et al. 2021)."""

    name: Literal["p_tuning"] = "p_tuning"
    length: NonNegativeInt = 20
    per_task: bool = True
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_size: PositiveInt = 128
    #: Layers of the LSTM (lstm only).
    lstm_layers: PositiveInt = 1


class DePTConfig(Section):
    """A short soft prompt and a low-rank update of the input embeddings (Shi & Lipani 2024)."""

    name: Literal["dept"] = "dept"
    length: NonNegativeInt = 60
    rank: NonNegativeInt = 30
    #: Tokens of an input whose embeddings are updated, from its first on.
    max_positions: PositiveInt = 256
    per_task: bool = True
    #: As for prompt_tuning.
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: PositiveFloat = 0.5


class AttemptConfig(Section):
    """Attention over frozen source prompts and a trained target prompt (Asai et al. 2022)."""

    name: Literal["attempt"] = "attempt"
    length: NonNegativeInt = 20
    #: Bundles (step_… folders) of prompt_tuning runs on this backbone: each of their prompts is a source. They are read
    #: whenever the model is built, so they have to stay.
    sources: list[AbsolutePath] = []
    #: Hidden size of the attention's sub-network.
    bottleneck: PositiveInt = 100
    #: None: hidden size times e.
    temperature: PositiveFloat | None = None
    per_task: bool = True
    #: As for prompt_tuning.
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: PositiveFloat = 0.5

    @model_validator(mode="after")
    def _has_sources(self) -> "AttemptConfig":
        if self.length and not self.sources:
            raise ValueError("method.sources=[] must name at least one bundle of a prompt_tuning run on this backbone")
        return self


class MPTConfig(Section):
    """A shared soft prompt times a rank-one matrix for each task (Wang et al. 2023)."""

    name: Literal["mpt"] = "mpt"
    length: NonNegativeInt = 20
    #: Standard deviation around 1 of the tasks' vectors at the start.
    task_std: PositiveFloat = 0.02
    #: Of the shared prompt, as for prompt_tuning.
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: PositiveFloat = 0.5
