"""The command line that jobs share: recipes, overrides, --out, --dry-run, and what a failure looks like."""

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
    parser = recipe_parser(description, out="folder for result.json, tables, plots and bundles (runs/<name>)")
    options, recipes, overrides = read_arguments(parser, example)

    def act() -> int:
        config = load(recipes, overrides)
        check(config)
        # What follows imports torch and its kin, which takes seconds: a typing mistake is answered before.
        (dry_run if options.dry_run else train)(config, options.out)
        return 0

    return exit_status(act, stopped="stopped; the same command goes on from the newest bundle")


def recipe_parser(description: str | None, *, out: str) -> argparse.ArgumentParser:
    """Return a parser of recipes and overrides (`arguments`), --out and --dry-run. out: what --out is for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE.yaml | key.sub=value")
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--dry-run", action="store_true", help="check everything, show it, train nothing")
    return parser


def read_arguments(parser: argparse.ArgumentParser, example: str) -> tuple[argparse.Namespace, list[Path], list[str]]:
    """Return the options, the recipes and the overrides; without a recipe, exit naming the example."""
    options = parser.parse_intermixed_args()
    recipes = [Path(a) for a in options.arguments if "=" not in a]
    if not recipes:
        parser.error(f"name at least one recipe, for example {example}")
    return options, recipes, [a for a in options.arguments if "=" in a]


def positive(text: str) -> int:
    """Read an argument that is a whole number from 1 on: argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def exit_status(act: Callable[[], int], *, stopped: str) -> int:
    """Return what `act` returns; 1 for an error of ours, which is shown; 143 for a run that SIGTERM ended, which says
    where; 130 for an interrupt, which says `stopped`."""
    try:
        return act()
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 143
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def dry_run(config: RunConfig, out: Path | None) -> None:
    """Check everything, the output folder too, and show what would be trained on what."""
    from rich.console import Console

    from polyprompt import plan_report, ray_train, run_folder
    from polyprompt.plan import rehearse

    run_folder.check(run_folder.choose(config, out), config)
    checked = rehearse(config)
    print(config.to_yaml())
    for table in plan_report.tables(checked):
        Console().print(table)
    if checked.without_weights:
        print(f"Weights: not looked at, but for their shapes: {checked.without_weights}")
    print(plan_report.time_line(checked, config))
    print(f"Workers: {ray_train.where(config)}")
