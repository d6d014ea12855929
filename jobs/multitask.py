"""Train one model on many tasks.

    python jobs/multitask.py RECIPE.yaml [more.yaml …] [key.sub=value …] [--out DIR] [--dry-run]

Recipes are merged left to right, then the overrides. The same command again goes on where a stopped run was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt import command
from polyprompt.config import RunConfig


def check(config: RunConfig) -> None:
    """Every config will do."""


def train(config: RunConfig, out: Path | None) -> None:
    """Train, and show the closing table."""
    from rich.console import Console

    from polyprompt import report
    from polyprompt.ray_train import run

    result = run(config, out=out)
    Console().print(report.table(result))
    print(f"Everything about this run is in {out or Path(result.bundle).parents[1]}")


if __name__ == "__main__":
    sys.exit(command.main(__doc__, "jobs/recipes/embedded.yaml", check, train))
