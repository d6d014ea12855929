"""Compare trained runs: one page with tables, statistics and figures, and the same as Markdown and CSV.

    python jobs/compare.py [RUN_ID | BUNDLE | FOLDER | experiment=NAME] … --out DIR [--baseline ROW]

RUN_ID: of MLflow. FOLDER: of a run, or of several. Runs that differ in nothing but the seed are one row. With
--baseline (a method, a row, a run) each score is tested against that row's. DIR gets compare.html, which needs no
network, compare.md and compare.csv. URI: as tracking.uri ($MLFLOW_TRACKING_URI, else mlflow.db in $POLYPROMPT_HOME or
here).
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status


def main() -> int:
    """Read the command line, compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="what to compare (experiment=polyprompt)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for compare.html, .md and .csv")
    parser.add_argument("--baseline", metavar="ROW", help="a method, a row's label, a run's id, name or folder")
    parser.add_argument(
        "--select",
        default="mean",
        choices=("mean", "task", "last"),
        help="whose scores count: of the best evaluation by mean, of each task's own best, of the last one",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="validation rows of each task that trained models are looked at with; 0: load no model (16)",
    )
    parser.add_argument("--uri", help="of the tracking store")
    options = parser.parse_intermixed_args()
    if options.rows < 0:
        parser.error(f"--rows {options.rows}: expected 0 or more")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; name a folder")
    return exit_status(lambda: compare(options), stopped="stopped")


def compare(options: argparse.Namespace) -> int:
    """Read, compare, write, show the table; return 0. Raises PolypromptError."""
    from rich.console import Console

    from polyprompt import comparison, comparison_page, comparison_sources, tracking
    from polyprompt.config import TrackingConfig
    from polyprompt.errors import DataError
    from polyprompt.section import mask

    tracked = TrackingConfig(uri=options.uri)
    uri = tracking.resolve_uri(tracked)
    sources = options.sources or [f"{comparison_sources.EXPERIMENT}{tracking.resolve_experiment(tracked)}"]
    records, absent = comparison_sources.read(sources, uri)
    if not records:
        reasons = "; ".join(f"{run.name}: {run.reason}" for run in absent) or "it has no runs"
        raise DataError(f"{', '.join(sources)}: no finished run to compare ({reasons}). Train one, or name others")
    comparisons, repeated = comparison.compare(records, baseline=options.baseline, select=options.select)
    page = comparison_page.write(
        comparisons,
        [*absent, *repeated],
        options.out,
        num_rows=options.rows,
        store=f"{', '.join(sources)} ({mask(uri)})",
        say=Console(stderr=True).print,
    )
    text = (options.out / comparison_page.MARKDOWN).read_text()
    # The tables; what the models do with their prompts is for the page.
    print(re.sub(r"\n##(# | The runs).*?(?=\n## (?!The runs)|\Z)", "", text, flags=re.DOTALL))
    print(f"The page is {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
