"""Put into a backbone's embeddings which pieces stand near which in a recipe's texts, to pre-train from.

    python jobs/make_embeddings.py RECIPE.yaml [more.yaml …] [key.sub=value …] --out DIR

The recipe is one of jobs/pretrain.py. Its training texts are counted; its backbone, trained or not, is saved with the
new embeddings. Then `jobs/pretrain.py RECIPE.yaml backbone.init=pretrained backbone.name=DIR` trains from there,
which trained weights need too: they knew other embeddings. How and why: platform/polyprompt/cooccurrence.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import pretrain

from polyprompt import command, recipe
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.task_configs import TextTaskConfig

if TYPE_CHECKING:
    from polyprompt.model import PromptedModel

EXAMPLE = "jobs/recipes/pretrain_embedded.yaml"


def check(config: RunConfig, out: Path) -> None:
    """Refuse what jobs/pretrain.py refuses, and a folder that holds something."""
    pretrain.check(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} is there already and not empty; name another folder, or delete it")


def read(config: RunConfig) -> "tuple[PromptedModel, list[Any]]":
    """Return the recipe's model and the tokens of each of its training texts, one row a text."""
    from polyprompt.data import TextData
    from polyprompt.plan import build

    texts = [task for task in config.tasks if isinstance(task, TextTaskConfig) and task.is_trained]
    model, data = build(config.model_copy(update={"tasks": texts}))
    # Two objectives may share one text.
    return model, list({d.train.folder: d.train.tokens for d in data if isinstance(d, TextData)}.values())


def save(model: "PromptedModel", out: Path, what: str) -> None:
    """Write the model's backbone as a folder that `backbone.name` takes, whole or not at all, and say what it is."""
    from polyprompt import checkpoint

    with checkpoint.filled(out) as draft:
        model.backbone.save(draft)
    print(f"{out}: {what}; pre-train with")
    print(f"backbone.init=pretrained backbone.name={out}")


def make(config: RunConfig, out: Path) -> None:
    """Count, and write the backbone with the new embeddings."""
    from polyprompt import cooccurrence

    model, texts = read(config)
    table = model.backbone.model.get_input_embeddings().weight
    told = cooccurrence.start_from(table, texts, config.train.seed)
    tokens = sum(len(text) for text in texts)
    save(model, out, f"embeddings of {told:,} of {len(table):,} pieces from {tokens:,} tokens of text")


def main(usage: str | None, make: Callable[[RunConfig, Path], None]) -> int:
    """Read the command line and write the folder; return the exit status."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE.yaml | key.sub=value")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options, recipes, overrides = command.read_arguments(parser, EXAMPLE)

    def act() -> int:
        config = recipe.load(recipes, overrides)
        check(config, options.out)
        make(config, options.out)
        return 0

    return command.exit_status(act, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main(__doc__, make))
