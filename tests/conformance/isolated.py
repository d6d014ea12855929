"""The environment of its own that `adapters` needs, and its driver run there."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from conformance.results import Key, Result

ADAPTERS = "1.3.0"
TESTS = Path(__file__).parents[1]


class NoEnvironmentError(Exception):
    """The environment cannot be made: the registry is out of reach, or pip fails. The message ends in pip's words."""


def environment(folder: Path) -> Path:
    """Make the environment, unless it is there, and return its Python. torch is of this environment's version."""
    python, stamp = folder / "bin" / "python", folder / f"adapters-{ADAPTERS}"
    if stamp.exists():
        return python
    torch = version("torch").partition("+")[0]
    install = [str(python), "-m", "pip", "install", "--quiet", f"adapters=={ADAPTERS}", f"torch=={torch}"]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoEnvironmentError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    stamp.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the libraries in that environment."""
    code = (
        "import json; from importlib.metadata import version as v;"
        "print(json.dumps({n: v(n) for n in ('adapters', 'transformers', 'torch')}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


def results(
    python: Path,
    folders: Mapping[str, Path],
    methods: Iterable[str],
    checks: Iterable[str],
    done: Iterable[Key] = (),
) -> Iterator[Result]:
    """Yield what comes of `adapters`, as it comes, but for what is done. folders: family → folder of a model.

    Raises RuntimeError with the driver's last words if it ends early.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, errors = Path(scratch) / "job.json", Path(scratch) / "stderr"
        table = {"methods": list(methods), "checks": list(checks), "done": list(done)}
        job.write_text(json.dumps({**table, "folders": {family: str(path) for family, path in folders.items()}}))
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [str(python), "-m", "conformance.with_adapters", str(job)],
                cwd=scratch,
                env={**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith("["):  # the library prints too
                        yield Result(*json.loads(line))
            finally:
                process.stdout.close()
                status = process.wait()
        if status:
            raise RuntimeError(f"the driver of adapters ended with status {status}: {errors.read_text()[-2000:]}")
