"""Pre-train a T5 on plain text, from scratch or onwards, and leave a backbone folder to train prompts on.

    python jobs/pretrain.py RECIPE.yaml [more.yaml …] [key.sub=value …] [--out DIR] [--dry-run]

Adapts a T5 to the language model objective or to a domain of your own; docs/pretraining.md has recipes. It is the main
job's loop, mixture and bundles, so the same command again goes on where a stopped run was. At the end DIR/backbone
holds weights, tokenizer and a model card; `backbone.name=DIR/backbone` trains on it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt import command
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.task_configs import TextTaskConfig


def check(config: RunConfig) -> None:
    """Refuse a config that trains no backbone on text."""
    if config.method.name != "full":
        raise ConfigError(
            f"method.name={config.method.name}: pre-training trains the backbone itself; set method=full, and train "
            "prompts on the result with jobs/multitask.py"
        )
    if not any(isinstance(task, TextTaskConfig) and task.is_trained for task in config.tasks):
        raise ConfigError(
            "tasks: none of them is text to train on; add one such as {name: corpus/mine, text: {files: {train: "
            "[mine.txt.gz]}}}, or use jobs/multitask.py"
        )


def train(config: RunConfig, out: Path | None) -> None:
    """Train, show the closing table, and write the backbone folder."""
    from rich.console import Console

    from polyprompt import pretrained, report
    from polyprompt.ray_train import run

    result = run(config, out=out)
    Console().print(report.table(result))
    folder = pretrained.export(config, result, (out or Path(result.bundle).parents[1]) / "backbone")
    print(f"The backbone is in {folder}; train on it with backbone.name={folder}")


if __name__ == "__main__":
    sys.exit(command.main(__doc__, "jobs/recipes/pretrain_embedded.yaml", check, train))
