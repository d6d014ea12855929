"""The config sections of the tasks: a part of config.py."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, Tag, model_validator

from polyprompt.section import AbsolutePath, Section


class HubConfig(Section):
    """A hub data set: `splits` maps train, validation and test to the data set's own split names."""

    path: str
    config: str | None = None
    revision: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] = {"train": "train", "validation": "validation"}


class TaskConfig(Section):
    """A user's own task. Exactly one of `files` and `hub`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$")]
    files: dict[Literal["train", "validation", "test"], AbsolutePath] | None = None
    hub: HubConfig | None = None
    #: Template of the model's input; {field} stands for the row's field, {field.sub} for a nested one.
    input: str
    #: Template of the target, or the name of a field.
    target: str
    #: Maps values of the target to words.
    labels: dict[str, str] | None = None
    choices: list[str] | None = None
    metrics: Annotated[list[str], Field(min_length=1)] = ["accuracy"]
    weight: PositiveFloat = 1.0

    @model_validator(mode="before")
    @classmethod
    def _labels_are_text(cls, data: Any) -> Any:
        """YAML reads `0:` as a number and `true` as a bool; a row's value is compared by its text."""
        if not isinstance(data, Mapping):
            return data
        table = dict(data)
        if isinstance(table.get("labels"), Mapping):
            table["labels"] = {str(k): str(v) for k, v in table["labels"].items()}
        if isinstance(table.get("choices"), list):
            table["choices"] = [str(c) for c in table["choices"]]
        return table

    @model_validator(mode="after")
    def _one_source(self) -> "TaskConfig":
        if (self.files is None) == (self.hub is None):
            raise ValueError("give exactly one of `files` and `hub`")
        return self


class TextConfig(Section):
    """Where plain text comes from: `files` for each split, or a hub data set. Exactly one of the two.

    .txt and .txt.gz: an empty line ends a document. .jsonl, .jsonl.gz, .parquet and hub: `field` of a row is one.
    """

    files: dict[Literal["train", "validation"], Annotated[list[AbsolutePath], Field(min_length=1)]] | None = None
    hub: HubConfig | None = None
    field: str = "text"
    #: Share of each training file's documents, its last ones, kept for validation where no validation file is given.
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05

    @model_validator(mode="after")
    def _one_source(self) -> "TextConfig":
        if (self.files is None) == (self.hub is None):
            raise ValueError("give exactly one of `files` and `hub`")
        if self.files is not None and not self.files:
            raise ValueError("files: give train, validation, or both")
        return self


class TextTaskConfig(Section):
    """Plain text as a task: the model learns to fill in or to go on (Raffel et al. 2020, Lester et al. 2021).

    With validation files alone it is only evaluated on.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$")]
    text: TextConfig
    #: span_corruption: spans are cut out and written down behind sentinels. prefix_lm: the text goes on.
    objective: Literal["span_corruption", "prefix_lm"] = "span_corruption"
    #: Tokens of an input, all of them used. None: data.max_input_tokens, else the model's own limit.
    input_tokens: Annotated[int, Field(ge=8)] | None = None
    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    mean_span_length: Annotated[float, Field(ge=1.0)] = 3.0
    weight: PositiveFloat = 1.0

    @property
    def is_trained(self) -> bool:
        return self.text.hub is not None or "train" in (self.text.files or {})


def _kind_of_task(entry: Any) -> str:
    if isinstance(entry, str):
        return "name"
    is_text = isinstance(entry, TextTaskConfig) or (isinstance(entry, Mapping) and "text" in entry)
    return "text" if is_text else "task"


TaskEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[TaskConfig, Tag("task")] | Annotated[TextTaskConfig, Tag("text")],
    Discriminator(_kind_of_task),
]
