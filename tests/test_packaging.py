"""What an installed package must bring along."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from polyprompt.backbone import EMBEDDED

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_embedded_backbone(tmp_path: Path) -> None:
    # Setuptools leaves its build folders beside the sources: build a copy.
    shutil.copytree(
        ROOT / "platform", tmp_path / "platform", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    files = {f"polyprompt/embedded/{file.name}": file.stat().st_size for file in EMBEDDED.iterdir()}
    assert files.items() <= sizes.items()
