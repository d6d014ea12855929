"""Train one model on many tasks.

    python jobs/multitask.py RECIPE.yaml [more.yaml …] [key.sub=value …] [--out DIR] [--dry-run]

Recipes are merged left to right, then the overrides. The same command again goes on where a stopped run was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.config import RunConfig
from polyprompt.errors import PolypromptError
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
        # What follows imports torch and its kin, which takes seconds: a typing mistake is answered before.
        (dry_run if options.dry_run else train)(config, options.out)
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest bundle", file=sys.stderr)
        return 130
    return 0


def train(config: RunConfig, out: Path | None) -> None:
    """Train, and show the closing table."""
    from rich.console import Console

    from polyprompt import report
    from polyprompt.ray_train import run

    result = run(config, out=out)
    Console().print(report.table(result))
    print(f"Everything about this run is in {out or Path(result.bundle).parents[1]}")


def dry_run(config: RunConfig, out: Path | None) -> None:
    """Check everything, the output folder too, and show what would be trained on what."""
    from rich.console import Console

    from polyprompt import plan_report, run_folder
    from polyprompt.plan import plan

    run_folder.check(run_folder.choose(config, out), config)
    checked = plan(config)
    print(config.to_yaml())
    for table in plan_report.tables(checked):
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
