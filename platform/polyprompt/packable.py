"""Which runs may share one frozen backbone with others (pack.py), said before anything heavy is loaded."""

from polyprompt.config import MPTConfig, RunConfig
from polyprompt.errors import ConfigError

#: Methods that act inside the backbone's layers, or train nothing of their own.
INSIDE = ("full", "lora", "adapter", "hyperformer")


def check(config: RunConfig) -> None:
    """Raise ConfigError, with what to change, for a run that cannot share its backbone while it trains."""
    method = f"method.name={config.method.name}"
    if config.method.name in INSIDE:
        mend = f"{method} is not a prompt beside a frozen backbone, but works inside it. Choose a method of prompts"
    elif isinstance(config.method, MPTConfig) and config.method.teachers:
        mend = "method.teachers sends each row through the backbone twice. Drop method.teachers"
    elif config.train_backbone:
        mend = f"{method} trains the backbone here. Set backbone.trainable=false"
    elif config.backbone.gradient_checkpointing:
        mend = "it would compute the others' rows anew too. Set backbone.gradient_checkpointing=false"
    elif config.backbone.attention == "flex":
        mend = "its attention is computed part by part, which flex cannot. Set backbone.attention=sdpa"
    elif config.backbone.compile:
        mend = "layers compiled for one run would be compiled anew for each set of runs. Set backbone.compile=false"
    elif config.compute.num_workers:
        mend = (
            f"compute.num_workers={config.compute.num_workers} trains in processes of its own. Set "
            "compute.num_workers=0, and compute.cpus_per_worker to the threads of a pack"
        )
    elif config.init is not None:
        mend = "init.from adds tasks to an earlier bundle and freezes parts of its parameters. Drop init"
    else:
        return
    raise ConfigError(f"a run that shares its backbone with others: {mend}, or let each trial have its own backbone")
