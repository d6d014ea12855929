"""Train one model on many tasks.

    python jobs/multitask.py RECIPE.yaml [more.yaml …] [key.sub=value …] [--out DIR] [--dry-run]

Recipes are merged left to right, then the overrides. The same command again goes on where a stopped run was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from rich.console import Console

from polyprompt import plan_report, report
from polyprompt.config import RunConfig
from polyprompt.errors import PolypromptError
from polyprompt.plan import plan
from polyprompt.ray_train import run
from polyprompt.recipe import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE.yaml | key.sub=value")
    parser.add_argument("--out", type=Path, help="folder for result.json, tables, plots and bundles (runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show it, train nothing")
    options = parser.parse_intermixed_args()
    recipes = [Path(a) for a in options.arguments if "=" not in a]
    if not recipes:
        parser.error("name at least one recipe, for example jobs/recipes/embedded.yaml")
    try:
        config = load(recipes, [a for a in options.arguments if "=" in a])
        if options.dry_run:
            dry_run(config)
        else:
            result = run(config, out=options.out)
            Console().print(report.table(result))
            print(f"Everything about this run is in {options.out or Path(result.bundle).parents[1]}")
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def dry_run(config: RunConfig) -> None:
    """Check everything and show what would be trained on what."""
    checked = plan(config)
    print(config.to_yaml())
    for table in plan_report.tables(checked):
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
