"""Where a run lives, and whether it may: one folder, one run, one process at a time.

    <folder>/run.json      name, identity and config of the run, and its tracking id
    <folder>/bundles/      its bundles
    <folder>/result.json   there once it has finished

Ray Train by itself resumes whatever lies under a run's name, whatever its config; here another config is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError

RUN, RESULT, BUNDLES = "run.json", "result.json", "bundles"


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

    def write_record(self, config: RunConfig, run_id: str) -> None:
        table = {
            "name": self.name,
            "identity": config.identity(),
            "run_id": run_id,
            "config": config.model_dump(mode="json"),
        }
        draft = self.folder / f".{RUN}.tmp"
        draft.write_text(json.dumps(table, indent=1))
        os.replace(draft, self.folder / RUN)


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
        name, out = config.name, Path("runs").absolute() / config.name
    else:
        stem = f"{config.method.name}-{config.identity()}"
        root = config.compute.storage_path or Path("runs").absolute()
        number = 1
        while (root / _numbered(stem, number) / RESULT).exists():
            number += 1
        name = _numbered(stem, number)
        out = Path("runs").absolute() / name
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
    for folder in {run.folder, run.out}:
        foreign = folder.is_dir() and not (folder / RUN).exists() and any(folder.iterdir())
        if foreign and not (folder == run.out != run.folder and record):
            raise ConfigError(
                f"output folder {folder} in use: it holds files that no polyprompt run wrote. "
                "Choose another --out, or empty the folder"
            )
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output folder {folder} is a file; choose another --out")
    if run.result.exists() and record and record["config"]["compute"] != config.model_dump(mode="json")["compute"]:
        raise ConfigError(
            f"output folder {run.folder} in use: it holds the finished run {run.name!r}, which had another `compute`. "
            "Choose another name or --out, or delete the folder"
        )


@contextmanager
def claim(run: RunFolder) -> Iterator[None]:
    """Hold the run's folder for this process. Raises ConfigError if another process trains in it now."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"output folder {run.folder} in use: another process is training run {run.name!r} in it now. "
            "Wait for it, or choose another name or --out"
        ) from None


def _difference(before: Any, config: RunConfig) -> str:
    """Name the first few keys in which a recorded config differs from this one."""
    old, new = RunConfig.model_validate(before).flat(), config.flat()
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    shaping = [k for k in keys if not k.startswith(("name", "compute.", "tracking."))]
    return "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in shaping[:3])
