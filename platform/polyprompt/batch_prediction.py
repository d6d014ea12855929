"""Files of any size, answered part by part: cut, answered in any order by any number of processes, and joined.

    <output>.parts/job.json               what is asked of whom; other work in the same folder is refused
    <output>.parts/00000007.rows.jsonl    rows as read; of a row that could not be read the error, as text
    <output>.parts/00000007.answers.jsonl

A part is written whole or not at all, so what was answered before an interruption is not answered again. Who holds
.<output>.lock works on them; the file stays.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from polyprompt import checkpoint, sources
from polyprompt.errors import ConfigError, DataError
from polyprompt.predictor import Prediction, Predictor
from polyprompt.result import write_whole
from polyprompt.tasks.records import Row

FORMATS = (".jsonl", ".csv", ".parquet")
JOB, ROWS, ANSWERS = "job.json", "rows.jsonl", "answers.jsonl"
_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "input": pa.string(),
        "prediction": pa.string(),
        "score": pa.float64(),
        "choice_scores": pa.map_(pa.string(), pa.float64()),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class Work:
    """A file to answer. bundle: of the model. part_rows: rows of a part. mode: as of `Predictor.predict`."""

    bundle: Path
    input: Path
    output: Path
    mode: str | None = None
    part_rows: int = 2000

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    def rows(self, part: int) -> Path:
        return self.folder / f"{part:08d}.{ROWS}"

    def answers(self, part: int) -> Path:
        return self.folder / f"{part:08d}.{ANSWERS}"


@contextmanager
def claim(work: Work) -> Iterator[None]:
    """Hold the output for this process. Raises ConfigError if another process answers into it now."""
    try:
        lock = FileLock(work.output.with_name(f".{work.output.name}.lock"), timeout=0).acquire()
    except Timeout:
        raise ConfigError(
            f"--output {work.output} in use: another process answers into it now. Wait for it, or choose another "
            "--output"
        ) from None
    except OSError as error:
        raise ConfigError(f"--output {work.output} cannot be written: {error}") from error
    with lock:
        yield


def cut(work: Work) -> int:
    """Cut the input into parts, where that was not done before, and return their number.

    Raises DataError for a file that cannot be read or is empty, ConfigError for an output of an unknown kind, or one
    whose folder of parts is of other work.
    """
    if work.output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output {work.output}: unknown file type; expected one of {', '.join(FORMATS)}")
    if work.output.is_dir() or work.output.resolve() == work.input.resolve():
        raise ConfigError(f"--output {work.output} is a folder or the input itself; name another file")
    if not work.input.is_file():
        raise DataError(f"{work.input}: the file does not exist")
    job = work.folder / JOB
    asked = {
        "input": sources.content_hash(work.input),
        "model": sources.content_hash(work.bundle / checkpoint.MANIFEST),
        "mode": work.mode,
        "part_rows": work.part_rows,
    }
    if job.is_file():
        begun = json.loads(job.read_text())
        others = [key for key in asked if begun[key] != asked[key]]
        if others:
            raise ConfigError(
                f"{work.folder} holds parts of another {', '.join(others)} than is asked for now; delete it, or choose "
                "another --output"
            )
        return int(begun["num_parts"])
    shutil.rmtree(work.folder, ignore_errors=True)
    rows = sources.each_row(work.input)
    num_parts = 0
    while part := list(islice(rows, work.part_rows)):
        write_whole(work.rows(num_parts), b"".join(_line(origin, row) for origin, row in part))
        num_parts += 1
    if not num_parts:
        raise DataError(f"{work.input}: the file has no rows")
    write_whole(job, json.dumps({**asked, "num_parts": num_parts}).encode())
    return num_parts


def _line(origin: str, row: Row | DataError) -> bytes:
    """Return a row as a line, without what a column of another task left empty."""
    if isinstance(row, DataError):
        return _json(str(row))
    try:
        return _json({field: value for field, value in row.items() if value not in (None, "")})
    except UnicodeEncodeError:
        return _json(f"{origin}: the row holds half of a surrogate pair, which is no character")


def _json(value: Any) -> bytes:
    # Parquet has values that JSON has not, such as times.
    return f"{json.dumps(value, default=str, ensure_ascii=False)}\n".encode()


def missing(work: Work, num_parts: int) -> list[int]:
    """Return the parts that are not answered yet."""
    return [part for part in range(num_parts) if not work.answers(part).is_file()]


def answer(work: Work, part: int, predictor: Predictor, batch_size: int) -> int:
    """Answer a part and return how many rows it has."""
    rows = _lines(work.rows(part))
    readable = [place for place, row in enumerate(rows) if not isinstance(row, str)]
    answers = [Prediction(error=row if isinstance(row, str) else "") for row in rows]
    found = predictor.predict([rows[place] for place in readable], batch_size=batch_size, mode=work.mode)
    for place, prediction in zip(readable, found, strict=True):
        answers[place] = prediction
    write_whole(work.answers(part), b"".join(_json(_table(prediction)) for prediction in answers))
    return len(rows)


def join(work: Work, num_parts: int) -> tuple[int, int]:
    """Write the output in the input's order, whole or not at all; return how many rows it has, and how many failed.

    The parts are deleted then.
    """
    draft = work.output.with_name(f".{work.output.name}.tmp")
    counts = [0, 0]

    def tables() -> Iterator[dict[str, Any]]:
        for part in range(num_parts):
            for table in _lines(work.answers(part)):
                counts[0] += 1
                counts[1] += bool(table["error"])
                yield table

    match work.output.suffix.lower():
        case ".jsonl":
            with draft.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(table, ensure_ascii=False) + "\n" for table in tables())
        case ".csv":
            with draft.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, _SCHEMA.names)
                writer.writeheader()
                for table in tables():
                    writer.writerow({**table, "choice_scores": json.dumps(table["choice_scores"], ensure_ascii=False)})
        case ".parquet":
            remaining = tables()
            with pq.ParquetWriter(draft, _SCHEMA) as parquet:
                while some := list(islice(remaining, work.part_rows)):
                    rows = [{**table, "choice_scores": list(table["choice_scores"].items())} for table in some]
                    parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    os.replace(draft, work.output)
    shutil.rmtree(work.folder)
    return counts[0], counts[1]


def _lines(path: Path) -> list[Any]:
    # Not splitlines(): a text may hold other characters that it takes for the end of a line.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def _table(prediction: Prediction) -> dict[str, Any]:
    """JSON has no NaN: a row without an answer has the score null."""
    return {**asdict(prediction), "score": None if prediction.error else prediction.score}
