"""The run config's part `backbone`: the pre-trained model."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from polyprompt.section import Fraction, Section


def _address(name: str) -> str:
    """A local folder becomes absolute; a hub name stays."""
    is_path = name.startswith((".", "~", "/")) or Path(name).is_dir()
    return str(Path(name).expanduser().absolute()) if is_path else name


class BackboneConfig(Section):
    """The pre-trained model: `embedded`, a hub name or a local folder."""

    name: Annotated[str, AfterValidator(_address)] = "embedded"
    revision: str | None = None
    #: A GGUF file in the folder or repository: weights, config and tokenizer in one. Needs the package gguf.
    gguf_file: str | None = None
    #: random: untrained weights from train.seed in the shape of the backbone's config.json, with its tokenizer.
    init: Literal["pretrained", "random"] = "pretrained"
    #: Train the backbone too, or its layer normalisations alone. None: full and the hyperprompts: yes; the rest: no.
    trainable: bool | Literal["layer_norms"] | None = None
    #: None: the model's own rate.
    dropout: Fraction | None = None
    #: flex: of T5's kind, on GPUs, in memory that grows with the length and not with its square (flex.py).
    attention: Literal["sdpa", "eager", "flex"] = "sdpa"
    gradient_checkpointing: bool = False
    #: Train layers as torch.compile makes them. Slower on the CPU where it was measured (docs/performance.md), and
    #: compiling takes minutes. Evaluations run as without. Dropout draws other numbers, sums round differently.
    compile: bool = False
    trust_remote_code: bool = False
    #: Decoder-only models: the one token between input and target, as text. None: a newline.
    input_end: str | None = None

    @model_validator(mode="after")
    def _file_has_a_folder(self) -> "BackboneConfig":
        if self.gguf_file and self.name == "embedded":
            raise ValueError(
                f"backbone.gguf_file={self.gguf_file} needs backbone.name: the folder or hub repository that holds it"
            )
        return self

    @model_validator(mode="after")
    def _flex_drops_nothing(self) -> "BackboneConfig":
        if self.attention == "flex" and self.dropout != 0:
            rate = "null, the model's own" if self.dropout is None else self.dropout
            raise ValueError(
                f"backbone.attention=flex needs backbone.dropout=0, not {rate}: FlexAttention cannot drop attention "
                "weights. Set backbone.dropout=0, or backbone.attention=sdpa"
            )
        return self
