"""Answer a file of rows of any of a model's tasks.

    python jobs/predict.py --model SOURCE --input FILE --output FILE [--workers N]

SOURCE: a run's folder (its best bundle), a bundle, models:/NAME@ALIAS or models:/NAME/NUMBER. FILE: .jsonl, .jsonl.gz,
.csv or .parquet, any size. A row has `task`, and the task's own fields or `input`, the finished text. The output has
`task`, `input`, `prediction`, `score` (log-likelihood, nats), `choice_scores` and `error`, a line for each row, in the
input's order; a row that does not fit has its error there and stops nothing. The same command again goes on where a
stopped one was.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status, positive


def main() -> int:
    """Read the command line, answer, and say what came of it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="SOURCE")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--workers", type=int, default=0, help="processes on Ray (0: this process alone)")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each process")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--part-rows", type=positive, default=2000, help="rows that are answered and kept at a time")
    parser.add_argument("--mode", choices=("rank", "generate"), help="as evaluate.mode (the run's own)")
    parser.add_argument("--backbone", help="where the backbone is now, if not where it was in training")
    parser.add_argument("--uri", help="of the tracking store, for models:/…")
    options = parser.parse_args()
    if options.workers < 0:
        parser.error(f"--workers {options.workers}: expected 0 or more")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    def act() -> int:
        from polyprompt import registry

        with registry.opened(options.model, options.uri) as bundle:
            num_rows, num_failed = predict(bundle, options)
        failed = f"; {num_failed} of them have an error instead of an answer" if num_failed else ""
        print(f"{num_rows} rows are in {options.output}{failed}")
        return 0

    return exit_status(act, stopped="stopped; the same command goes on from what is answered")


def predict(bundle: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Answer the file; return how many rows there are and how many failed. Raises PolypromptError."""
    from polyprompt import batch_prediction

    work = batch_prediction.Work(
        bundle=bundle,
        input=options.input.absolute(),
        output=options.output.absolute(),
        mode=options.mode,
        part_rows=options.part_rows,
    )
    with batch_prediction.claim(work):
        return _answer_file(work, options)


def _answer_file(work: Any, options: argparse.Namespace) -> tuple[int, int]:
    from polyprompt import batch_prediction
    from polyprompt.report import Progress

    num_parts = batch_prediction.cut(work)
    parts = batch_prediction.missing(work, num_parts)
    settings = {
        "work": work,
        "batch_size": options.batch_size,
        "backbone": options.backbone,
        "device": "cuda" if options.gpu else "cpu",
    }
    answered, began = 0, time.monotonic()
    with Progress(num_parts, what="part") as progress, closing(_answers(settings, parts, options)) as answers:
        for done, num_rows in enumerate(answers, start=num_parts - len(parts) + 1):
            answered += num_rows
            progress.show(done, f"{answered / (time.monotonic() - began):.1f} rows/s")
    return batch_prediction.join(work, num_parts)


def _answers(settings: dict[str, Any], parts: list[int], options: argparse.Namespace) -> Iterator[int]:
    """Answer the parts; yield each one's number of rows as soon as it is there."""
    if not parts:
        return
    if options.workers == 0:
        answerer = Answerer(**settings)
        for part in parts:
            yield answerer({"part": [part]})["num_rows"][0]
        return
    from polyprompt.ray_train import cluster

    with cluster(options.workers):
        yield from _answers_of_workers(settings, parts, options)


def _answers_of_workers(settings: dict[str, Any], parts: list[int], options: argparse.Namespace) -> Iterator[int]:
    """Ray Data hands out the parts, restarts a process that dies, and never holds a row itself."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    answered = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        Answerer,
        fn_constructor_kwargs=settings,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(options.workers, len(parts))),
        num_cpus=1,
        num_gpus=1 if options.gpu else None,
    )
    for row in answered.iter_rows():
        yield int(row["num_rows"])


class Answerer:
    """A process with the model in it, which answers parts."""

    def __init__(self, work: Any, batch_size: int, backbone: str | None, device: str) -> None:
        from polyprompt.predictor import Predictor

        self.work, self.batch_size = work, batch_size
        self.predictor = Predictor(work.bundle, backbone=backbone, device=device)

    def __call__(self, parts: dict[str, Any]) -> dict[str, list[int]]:
        """Answer the parts of a batch of Ray Data."""
        from polyprompt.batch_prediction import answer

        return {"num_rows": [answer(self.work, int(part), self.predictor, self.batch_size) for part in parts["part"]]}


if __name__ == "__main__":
    sys.exit(main())
