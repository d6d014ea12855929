"""What goes over the wire; FastAPI makes the OpenAPI document of it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Row(BaseModel):
    """A row of one task: its own fields beside `task`, or `input`, the text as the task's format writes it."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"task": "embedded/nli", "premise": "all dogs ran", "hypothesis": "a dog ran"}]
        },
    )

    task: str
    input: str | None = None
    choices: list[str] | None = None

    def table(self) -> dict[str, Any]:
        """Return the row as the predictor takes it."""
        own = {key: value for key in ("input", "choices") if (value := getattr(self, key)) is not None}
        return {"task": self.task, **own, **(self.model_extra or {})}


class Question(BaseModel):
    """Rows of any tasks in any order. model: which one answers (the one that knows the row's task). mode: as
    `evaluate.mode` (the run's own)."""

    model_config = ConfigDict(extra="forbid")

    rows: list[Row] = Field(min_length=1)
    model: str | None = None
    mode: Literal["rank", "generate"] | None = None


class Answer(BaseModel):
    """The answer to one row. score: log-likelihood of the prediction, nats. choice_scores: the same of every choice,
    empty for free text. error: why there is none ("" if there is one); then score is null."""

    task: str
    model: str
    version: str
    prediction: str
    score: float | None
    choice_scores: dict[str, float]
    error: str


class Answers(BaseModel):
    """The answers, in the rows' order."""

    request_id: str
    answers: list[Answer]


class Fault(BaseModel):
    """code: for programs. message: what is wrong, what was expected, how to mend it. limit: what was exceeded."""

    code: str
    message: str
    limit: float | None = None


class Problem(BaseModel):
    """Every answer that is none."""

    request_id: str
    error: Fault


class TaskInfo(BaseModel):
    """fields: of a row, as far as the format says. choices: empty for free text, or where each row has its own."""

    name: str
    fields: list[str]
    choices: list[str]


class ModelInfo(BaseModel):
    """A model as it is served. source: as it was asked for. backbone_sha256: models of one share it in memory where
    shared is true. error: why the source's newest version is not served."""

    name: str
    source: str
    version: str
    backbone_sha256: str
    shared: bool
    tasks: list[TaskInfo]
    error: str = ""


class Models(BaseModel):
    models: list[ModelInfo]


class Source(BaseModel):
    """source: a run's folder, a bundle, models:/NAME@ALIAS or models:/NAME/NUMBER, as the server finds it."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(min_length=1, max_length=4096)


class Health(BaseModel):
    status: Literal["ok"] = "ok"
