"""The house rules that a machine can hold."""

import ast
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "polyprompt"
FILES = sorted(PACKAGE.rglob("*.py"))
TUNING = sorted((ROOT / "tuning").glob("*.py"))

#: Who may import what: module → files of the package.
ONLY = {
    "ray": {"ray_train.py", "serving.py"},
    "mlflow": {
        "tracking.py",
        "tracking_opening.py",
        "tracking_store.py",
        "study_tracking.py",
        "registry.py",
        "logged_models.py",
    },
    "datasets": {"data.py", "reading.py"},
    "peft": {"lora.py", "export.py"},
    "transformers": {"backbone.py", "bart.py", "decoder_only.py", "prompted_attention.py", "optim.py"},
}

#: The same of tuning/.
ONLY_TUNING = {
    "ray": {"execution.py", "frozen_weights.py", "packs.py", "population.py", "sampler.py", "schedulers.py"},
    "mlflow": set[str](),
    "optuna": {"sampler.py", "study_importances.py"},
}


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_platform_is_a_source_root_and_does_not_shadow_pythons_own() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), (
        "platform/__init__.py would shadow Python's platform module"
    )
    assert "platform" not in Path(platform.__file__).parent.name
    code = "import platform; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()


@pytest.mark.parametrize("module", ONLY)
def test_only_its_own_room_imports(module: str) -> None:
    assert {f.name for f in FILES if module in imports(f)} <= ONLY[module]


@pytest.mark.parametrize("module", ONLY_TUNING)
def test_only_its_own_room_of_tuning_imports(module: str) -> None:
    assert {f.name for f in TUNING if module in imports(f)} <= ONLY_TUNING[module]


def test_methods_are_pure_torch() -> None:
    allowed = {"torch", "polyprompt", "math", "dataclasses", "abc", "collections", "contextlib", "typing"}
    for file in (PACKAGE / "methods").glob("*.py"):
        own = {"peft"} if file.name == "lora.py" else set()
        assert imports(file) <= allowed | own, file


def test_files_stay_small_and_well_named() -> None:
    for file in FILES + TUNING:
        assert file.stem not in {"utils", "helpers", "misc", "common", "manager"}
        lines = len(file.read_text().splitlines())
        assert lines <= 520, f"{file} has {lines} lines: is it two rooms?"


def test_import_does_nothing(tmp_path: Path) -> None:
    """Importing the package opens no file for writing, logs nothing, prints nothing."""
    modules = [
        f"polyprompt.{'.'.join(f.relative_to(PACKAGE).with_suffix('').parts)}" for f in FILES if f.name != "__init__.py"
    ]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'platform')!r})\n" + "\n".join(f"import {m}" for m in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
