"""The run config's part `train`: the optimisation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyprompt.method_configs import ParameterGroup
from polyprompt.section import Fraction, Section


class TrainConfig(Section):
    """The optimisation."""

    max_steps: PositiveInt = 1000
    #: Rows of the global batch, over all workers.
    batch_size: PositiveInt = 32
    #: The global batch is cut into this many shards, each with its own random stream; workers take shards.
    num_shards: PositiveInt = 4
    #: Micro-batches a shard is split into, to save memory.
    gradient_accumulation_steps: PositiveInt = 1
    #: What the loss is a mean over. token: all target tokens of the global batch, as T5's; a row with a long target,
    #: such as a corrupted text, then weighs as much as dozens with a label. example: each row weighs the same.
    loss_reduction: Literal["token", "example"] = "token"
    #: Left out, or null: the method's own, with its own rates of groups and scale_parameter where none are stated
    #: (training_defaults.py).
    learning_rate: PositiveFloat = 1e-3
    #: Learning rates of parameter groups that differ from `learning_rate`.
    group_learning_rates: dict[ParameterGroup, PositiveFloat] = {}
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    #: Steps grow with the size of each parameter (its root mean square): T5's weights differ in size a hundredfold, and
    #: one step size for all of them saturates attention. Adafactor: the rate times the size, at least 1e-3, as in T5's
    #: own training. AdamW: the rate times size / 0.1, at most the whole rate; see optim.py.
    scale_parameter: bool = False
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    #: Of AdamW; Adafactor has none.
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    lr_scheduler_type: Literal["constant", "linear", "inverse_sqrt"] = "constant"
    warmup_ratio: Fraction = 0.0
    #: Clip the norm of the whole gradient (None: no clipping).
    max_grad_norm: PositiveFloat | None = 1.0
    #: bf16: frozen weights are stored in bf16, trained ones stay fp32 and compute in bf16. fp16 overflows on T5.
    #: A recipe may say auto: bf16 on GPUs and on CPUs that have it, else fp32 (precision.py).
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: NonNegativeInt = 42
    logging_steps: PositiveInt = 10
    #: Write a bundle every so many steps, and whenever the model is evaluated. None: at least ten times a run.
    save_steps: PositiveInt | None = None
    #: Newest bundles to keep; the best by mean and the best of each task are kept beside them.
    save_total_limit: PositiveInt = 2

    @model_validator(mode="before")
    @classmethod
    def _no_fp16(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and str(data.get("precision")).lower() in ("fp16", "float16", "half"):
            raise ValueError(
                "train.precision=fp16 is refused: T5's activations overflow fp16 (they were trained in bf16). "
                "Use train.precision=bf16, or fp32"
            )
        return data

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.num_shards > self.batch_size:
            raise ValueError(
                f"train.num_shards={self.num_shards} must be at most train.batch_size={self.batch_size}: "
                "a shard needs at least one row"
            )
        return self
