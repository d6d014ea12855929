"""Where a run lives, and whether it may: one folder, one run, one process at a time.

    <folder>/run.json      name, identity and config of the run, and its tracking id
    <folder>/bundles/      its bundles
    <folder>/result.json   there once it has finished

Ray Train by itself resumes whatever lies under a run's name, whatever its config; here another config is refused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polyprompt.config import RunConfig, shapes_result
from polyprompt.errors import ConfigError, DataError
from polyprompt.result import RunResult, write_whole
from polyprompt.section import home

RUN, RESULT, BUNDLES, LOCK = "run.json", "result.json", "bundles", ".lock"


@dataclass(frozen=True)
class RunFolder:
    """name: of the run. folder: holds the bundles, shared by all workers. out: where results are written."""

    name: str
    folder: Path
    out: Path

    @property
    def bundles(self) -> Path:
        return self.folder / BUNDLES

    @property
    def result(self) -> Path:
        """The finished run's result; a copy is in `out` where that is another folder."""
        return self.folder / RESULT

    def record(self) -> dict[str, Any]:
        """Return run.json, empty before the run has started."""
        file = self.folder / RUN
        return json.loads(file.read_text()) if file.is_file() else {}

    def write_record(self, config: RunConfig, data: Mapping[str, str], run_id: str, rows: Mapping[str, str]) -> None:
        """Write run.json. data: task → digest. rows: task → rows_digest. run_id: the tracking run's, "" for none."""
        table = {
            "name": self.name,
            "identity": config.identity(),
            "run_id": run_id,
            "out": str(self.out),
            "data": dict(data),
            "rows": dict(rows),
            "config": config.flat(),
        }
        write_whole(self.folder / RUN, json.dumps(table, indent=1).encode())


def best_bundle(folder: Path, result: RunResult) -> Path:
    """Return the best bundle of a finished run whose result lies in this folder.

    A run's folder may have been moved as a whole, and another run may lie where it was.
    """
    bundle = Path(result.bundle)
    own = folder / BUNDLES / bundle.name
    return own if own.is_dir() else bundle


def runs() -> Path:
    """Return the folder that runs and studies without a folder of their own go to."""
    return home() / "runs"


def choose(config: RunConfig, out: Path | None) -> RunFolder:
    """Find the run's name and folders.

    A named run, or one with an output folder, is found again under the same name or folder. A run with neither is new,
    unless one of the same config was left unfinished: that one goes on.
    """
    if out is not None:
        out = out.expanduser().absolute()
        mark = hashlib.sha256(str(out).encode()).hexdigest()[:6]
        name = config.name or f"{config.method.name}-{config.identity()}-{mark}"
    elif config.name is not None:
        name, out = config.name, runs() / config.name
    else:
        stem = f"{config.method.name}-{config.identity()}"
        root = config.compute.storage_path or runs()
        number = 1
        while (root / _numbered(stem, number) / RESULT).exists():
            number += 1
        name = _numbered(stem, number)
        out = runs() / name
    storage = config.compute.storage_path
    return RunFolder(name=name, folder=storage / name if storage else out, out=out)


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def check(run: RunFolder, config: RunConfig) -> None:
    """Raise ConfigError unless the folders are free, or hold this very run."""
    record = run.record()
    if record and record["identity"] != config.identity():
        raise ConfigError(
            f"run folder {run.folder} in use: it holds run {record['name']!r} of another config "
            f"({_difference(record['config'], config)}). Choose another name or --out, or delete the folder"
        )
    known = {run.folder, Path(record["out"])} if record else set()
    for folder in {run.folder, run.out} - known:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output folder {folder} is a file; choose another --out")
        if folder.is_dir() and any(file.name != LOCK for file in folder.iterdir()):
            raise ConfigError(
                f"output folder {folder} in use: it holds files that are not of this run. "
                "Choose another --out, or empty the folder"
            )
    # A key that the run's version did not have cannot have been set.
    now = {key: value for key, value in config.flat().items() if key.startswith("compute.")}
    if run.result.exists() and any(record["config"].get(key, value) != value for key, value in now.items()):
        raise ConfigError(
            f"output folder {run.folder} in use: it holds the finished run {run.name!r}, which had another `compute`. "
            "Choose another name or --out, or delete the folder"
        )


def check_data(run: RunFolder, data: Mapping[str, str]) -> None:
    """Raise DataError if a run that is to go on was begun on other rows. data: task → digest."""
    before = run.record().get("data", {})
    changed = [task for task, digest in data.items() if before.get(task, digest) != digest]
    if changed:
        raise DataError(
            f"run {run.name} in {run.folder} was begun on other rows of {', '.join(changed)}; restore the data, or "
            "start a new run under another name or --out"
        )


@contextmanager
def claim(run: RunFolder) -> Iterator[None]:
    """Hold the run's folder for this process. Raises ConfigError if another process trains in it now."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise ConfigError(
            f"output folder {run.folder} in use: another process is training run {run.name!r} in it now. "
            "Wait for it, or choose another name or --out"
        ) from None
    except OSError as error:
        raise ConfigError(f"output folder {run.out} or {run.folder} cannot be written: {error}") from error
    with lock:
        yield


def _difference(old: Mapping[str, str], config: RunConfig) -> str:
    """Name the first few keys in which a recorded config differs from this one."""
    new = config.flat()
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and shapes_result(k)]
    return "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in keys[:3])
