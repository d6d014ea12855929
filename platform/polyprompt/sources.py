"""Rows from files and generators, each with its origin ("file:line"), in the order in which they stand there."""

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from polyprompt.errors import DataError
from polyprompt.tasks.fields import get
from polyprompt.tasks.records import FileSource, GeneratedSource, Row

FORMATS = (".jsonl", ".csv", ".parquet")

Origin = str
"""Where a row stands: "file:line" (Parquet: "file:row", from 1)."""


def rows(source: FileSource | GeneratedSource, split: str) -> Iterator[tuple[Origin, Row]]:
    """Yield the rows of a split. Raises DataError naming file and line for one that cannot be read."""
    match source:
        case GeneratedSource():
            for number, row in enumerate(source.rows(split), start=1):
                yield f"generated {split} row {number}", row
        case FileSource():
            yield from _file_rows(source, split)


def fingerprint(source: FileSource | GeneratedSource, splits: tuple[str, ...]) -> str:
    """Return what identifies the content of the splits: the files' hashes, or the generator's version."""
    if isinstance(source, GeneratedSource):
        return f"generated {source.version}"
    return " ".join(content_hash(_path(source, split)) for split in splits)


def text_lines(path: Path, field: str) -> Iterator[str]:
    """Yield the lines of a file's documents, "" behind each document.

    .txt and .txt.gz: an empty line ends a document. .jsonl, .jsonl.gz and .parquet: the field of a row is one.
    Raises DataError naming file and line for text that cannot be read.
    """
    if path.name.lower().endswith((".txt", ".txt.gz")):
        yield from _plain_lines(path)
    else:
        yield from row_lines(_rows(path), field)


def row_lines(rows: Iterator[tuple[Origin, Row]], field: str) -> Iterator[str]:
    """Yield the lines of each row's text, "" behind it. Raises DataError for a field that is missing or no text."""
    for origin, row in rows:
        try:
            text = get(row, field)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if not isinstance(text, str):
            raise DataError(f"{origin}: field {field!r} is a {type(text).__name__}; expected text")
        yield from (line for line in text.splitlines() if line.strip())
        yield ""


def _plain_lines(path: Path) -> Iterator[str]:
    inside = False
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 text: {error}") from error
                if text or inside:
                    yield text
                inside = bool(text)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if inside:
        yield ""


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _path(source: FileSource, split: str) -> Path:
    if split not in source.files:
        raise DataError(f"no file is given for the {split} split; there are files for {', '.join(source.files)}")
    path = source.files[split]
    if not path.is_file():
        raise DataError(f"{path}: the file does not exist; it should hold the {split} split")
    return path


def content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_rows(source: FileSource, split: str) -> Iterator[tuple[Origin, Row]]:
    return _rows(_path(source, split))


def _rows(path: Path) -> Iterator[tuple[Origin, Row]]:
    for origin, row in each_row(path):
        if isinstance(row, DataError):
            raise row
        yield origin, row


def each_row(path: Path) -> Iterator[tuple[Origin, Row | DataError]]:
    """Yield every row of a file, or the error in its place where it cannot be read and those behind it can.

    Raises DataError where nothing more can be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: the file does not exist")
    match path.suffix.lower():
        case ".gz" if path.name.lower().endswith(".jsonl.gz"):
            return _jsonl(path)
        case ".jsonl":
            return _jsonl(path)
        case ".csv":
            return _csv(path)
        case ".parquet":
            return _parquet(path)
    raise DataError(f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(FORMATS)}")


def _jsonl(path: Path) -> Iterator[tuple[Origin, Row | DataError]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            origin = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                # A byte-order mark may stand at the start of the file.
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield origin, DataError(f"{origin}: not UTF-8 text: {error}")
            except (ValueError, RecursionError) as error:  # also for numbers too long, and lists too deep
                yield origin, DataError(f"{origin}: not valid JSON: {error}")
            else:
                if isinstance(row, dict):
                    yield origin, row
                else:
                    kind = type(row).__name__
                    yield origin, DataError(f"{origin}: expected an object {{...}} on each line, not {kind}")


def _csv(path: Path) -> Iterator[tuple[Origin, Row | DataError]]:
    """Rows by the names in the header; every value is text."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or ())
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: the header names a column twice: {', '.join(header)}")
            for row in reader:
                origin = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    columns = f"the header's {len(header)} columns: {', '.join(header)}"
                    yield origin, DataError(f"{origin}: expected {columns}")
                else:
                    yield origin, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not CSV in UTF-8: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[Origin, Row | DataError]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                values: list[dict[str, Any]] = batch.to_pylist()
                for row in values:
                    number += 1
                    yield f"{path}:{number}", row
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
