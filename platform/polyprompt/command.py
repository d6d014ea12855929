"""The command line that training jobs share: recipes, overrides, --out, --dry-run, and what a failure looks like."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from polyprompt.config import RunConfig
from polyprompt.errors import PolypromptError, StoppedError
from polyprompt.recipe import load

Train = Callable[[RunConfig, Path | None], None]


def main(description: str | None, example: str, check: Callable[[RunConfig], None], train: Train) -> int:
    """Read the command line, check the config, then train or show what would be trained; return the exit status.

    example: a recipe to name in a usage error. check: raises ConfigError for a config that this job cannot take.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE.yaml | key.sub=value")
    parser.add_argument("--out", type=Path, help="folder for result.json, tables, plots and bundles (runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show it, train nothing")
    options = parser.parse_intermixed_args()
    recipes = [Path(a) for a in options.arguments if "=" not in a]
    if not recipes:
        parser.error(f"name at least one recipe, for example {example}")
    try:
        config = load(recipes, [a for a in options.arguments if "=" in a])
        check(config)
        # What follows imports torch and its kin, which takes seconds: a typing mistake is answered before.
        (dry_run if options.dry_run else train)(config, options.out)
    except StoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return 143
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest bundle", file=sys.stderr)
        return 130
    return 0


def dry_run(config: RunConfig, out: Path | None) -> None:
    """Check everything, the output folder too, and show what would be trained on what."""
    from rich.console import Console

    from polyprompt import plan_report, ray_train, run_folder
    from polyprompt.plan import plan

    run_folder.check(run_folder.choose(config, out), config)
    checked = plan(config)
    print(config.to_yaml())
    for table in plan_report.tables(checked):
        Console().print(table)
    print(f"Workers: {ray_train.where(config)}")
