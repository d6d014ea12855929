"""Score a trained model on its tasks, and write what the GLUE and SuperGLUE servers take.

    python jobs/evaluate.py --model SOURCE [--tasks NAME …] [--split validation] [--root DIR] [--out DIR]
    python jobs/evaluate.py --model SOURCE --split test --root DIR --submission DIR

SOURCE: a run's folder (its best bundle), a bundle, models:/NAME@ALIAS or models:/NAME/NUMBER. Every row counts,
whatever limit the run had. --out gets scores.json; --submission a file for each task, in its server's form.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status, positive
from polyprompt.errors import ConfigError, hint

if TYPE_CHECKING:
    from polyprompt.predictor import Predictor
    from polyprompt.submission import Answered
    from polyprompt.tasks.records import Task

#: Rows that are answered at a time.
CHUNK = 2000


def main() -> int:
    """Read the command line, score, show a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="SOURCE")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="some of the model's tasks (all)")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--root", type=Path, help="as data.root (the run's own)")
    parser.add_argument("--limit", type=positive, help="only the first rows of each task")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--mode", choices=("rank", "generate"), help="as evaluate.mode (the run's own)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backbone", help="where the backbone is now, if not where it was in training")
    parser.add_argument("--uri", help="of the tracking store, for models:/…")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for scores.json")
    parser.add_argument("--submission", type=Path, metavar="DIR", help="for the servers' files")
    options = parser.parse_args()
    for name in ("out", "submission"):
        folder = getattr(options, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"--{name} {folder} is a file; name a folder")
    return exit_status(lambda: evaluate(options), stopped="stopped")


def evaluate(options: argparse.Namespace) -> int:
    """Score the tasks, leave what was asked for, return 0. Raises PolypromptError, where it can before predicting."""
    from rich.console import Console
    from rich.table import Table

    from polyprompt import registry, submission
    from polyprompt.predictor import Predictor
    from polyprompt.result import plain, write_whole
    from polyprompt.tasks import catalog, metrics

    with registry.opened(options.model, options.uri) as bundle:
        predictor = Predictor(bundle, backbone=options.backbone, device=options.device)
    root = options.root or predictor.config.data.root
    names = _asked(predictor, options)
    entries = [entry for entry in predictor.config.tasks if (entry if isinstance(entry, str) else entry.name) in names]
    tasks = [catalog.of_split(entry, root, options.split) for entry in entries]
    scores: dict[str, dict[str, float]] = {}
    table = Table("task", "rows", "score", "metrics", "rows/s")
    for task in tasks:
        began = time.monotonic()
        answered = _answered(task, predictor, options)
        examples = [example for _, own, _ in answered for example in own]
        said = [text for _, _, own in answered for text in own]
        if options.submission:
            submission.write(task.name, answered, options.submission)
        shown = ["-", "no labels"]
        if all(example.target for example in examples):
            scores[task.name] = plain(metrics.compute(task.metrics, said, examples))
            shown = [f"{scores[task.name]['score']:.3f}", _others(scores[task.name])]
        table.add_row(task.name, f"{len(examples):,}", *shown, f"{len(examples) / (time.monotonic() - began):.0f}")
    Console().print(table)
    if scores:
        print(f"mean score {statistics.fmean(own['score'] for own in scores.values()):.4f}")
    if options.out:
        write_whole(options.out / "scores.json", json.dumps(scores, indent=2).encode())
    return 0


def _asked(predictor: "Predictor", options: argparse.Namespace) -> Sequence[str]:
    """Return the names of the tasks to score. Raises ConfigError for one that the model does not know or no server."""
    from polyprompt import submission

    names = options.tasks or predictor.task_names
    for name in names:
        if name not in predictor.task_names:
            known = predictor.task_names
            raise ConfigError(f"--tasks {name}: the model knows {', '.join(known)}.{hint(name, known)}")
        if options.submission and name not in submission.FILES:
            raise ConfigError(
                f"--submission: {name} is on no benchmark server; leave it out of --tasks. There are files for "
                f"{', '.join(submission.FILES)}"
            )
    return names


def _answered(task: "Task", predictor: "Predictor", options: argparse.Namespace) -> list["Answered"]:
    """Return the rows of the split with their examples and predictions."""
    from rich.console import Console
    from rich.progress import track

    from polyprompt.errors import DataError
    from polyprompt.reading import read_rows

    rows = list(islice(read_rows(task, options.split), options.limit))
    if not rows:
        raise DataError(f"{task.name}: the {options.split} split has no rows")
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    found: list[Answered] = []
    for chunk in track(chunks, task.name, console=Console(stderr=True), transient=True):
        asked = [(task.name, example) for _, _, examples in chunk for example in examples]
        answers = iter(predictor.answer(asked, batch_size=options.batch_size, mode=options.mode))
        for origin, row, examples in chunk:
            own = [next(answers) for _ in examples]
            for answer in own:
                if answer.error:
                    raise DataError(f"{task.name}: {origin}: {answer.error}")
            found.append((row, examples, [answer.prediction for answer in own]))
    return found


def _others(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if name != "score")


if __name__ == "__main__":
    sys.exit(main())
