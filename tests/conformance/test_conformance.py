"""The checks, held against every configuration of our methods; other libraries in the job (docs/conformance.md)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_methods
import tiny

from conformance import isolated, with_adapters
from conformance.checks import CHECKS
from conformance.driver import NotApplicable
from conformance.ours import FAMILIES, UNSIZED, Ours
from polyprompt.config import METHOD_NAMES

ROOT = Path(__file__).parents[2]
#: Compiling takes a minute: one of each way of gluing something on. The job does all.
COMPILED = {("smop", "t5"), ("hyperprompt", "t5"), ("hyperprompt", "gpt2"), ("adapter", "t5"), ("lora", "qwen3")}
#: Checks that may have no meaning for a method of ours.
OPTIONAL = {"positions", "unequal lengths"}
FIRST = [
    name
    for name, config in test_methods.CONFIGS.items()
    if name == next(n for n, c in test_methods.CONFIGS.items() if type(c) is type(config))
]


def cells() -> list[object]:
    """Every configuration on T5, one of each method on a rotary model and on GPT-2.

    Slow: every configuration on the rotary model, one of each method on all families, and compiled. The job does all.
    """
    found = []
    for family in FAMILIES:
        for name, config in test_methods.CONFIGS.items():
            if getattr(config, "stacks", None) == "encoder" and family in tiny.DECODERS:
                continue
            fast = family == "t5" or (family in ("qwen3", "gpt2") and name in FIRST)
            if not fast and name not in FIRST and family != "qwen3":
                continue
            for check in CHECKS:
                if check == "compile" and (name not in FIRST or (config.name, family) not in COMPILED):
                    continue
                marks = () if fast and check != "compile" else (pytest.mark.slow,)
                found.append(pytest.param(check, name, family, id=f"{check}-{name}-{family}", marks=marks))
    return found


@pytest.mark.parametrize(("check", "name", "family"), cells())
def test_ours(check: str, name: str, family: str) -> None:
    try:
        CHECKS[check](Ours(name, family))
    except NotApplicable:
        assert check in OPTIONAL or (check, test_methods.CONFIGS[name].name) in {
            ("length 0", method) for method in UNSIZED
        }


def test_every_registered_method_is_held_to_the_checks() -> None:
    assert {config.name for config in test_methods.CONFIGS.values()} == set(METHOD_NAMES)
    assert {config.name for config in test_methods.ZERO.values()} == set(METHOD_NAMES) - set(UNSIZED)


def job(out: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Run the job and return its results: method → check → status."""
    command = [sys.executable, str(ROOT / "jobs" / "conformance.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = {}
    for result in json.loads((out / "conformance.json").read_text())["results"]:
        found.setdefault(result["method"], {})[result["check"]] = result["status"]
        assert (result["status"] == "pass") == (result["reason"] == "")
    text = (out / "conformance.md").read_text()
    assert all(method in text and method in done.stdout for method in found)
    return found


@pytest.mark.slow
def test_the_job_tells_who_passes(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    checks = ("padding", "positions", "mixed loss")
    methods = ("prompt_tuning", "prompt tuning", "prefix tuning")
    found = job(
        tmp_path, "--libraries", "polyprompt", "PEFT", "--methods", *methods, "--checks", *checks, "--families", "gpt2"
    )
    assert found["prompt_tuning"] == {"padding": "pass", "positions": "n/a", "mixed loss": "pass"}
    assert found["prompt tuning"]["mixed loss"] == "n/a"
    # PEFT's prefix takes the first of GPT-2's positions.
    assert found["prefix tuning"]["positions"] == "fail"


@pytest.mark.slow
def test_the_job_refuses_names_that_it_does_not_know(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "conformance.py"), "--out", str(tmp_path), "--families", "gtp2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--families gtp2 is unknown" in done.stderr
    assert "Did you mean 'gpt2'" in done.stderr


@pytest.mark.slow
def test_adapters_runs_in_an_environment_of_its_own(tmp_path: Path) -> None:
    try:
        python = isolated.environment(tmp_path / "environment")
    except isolated.NoEnvironmentError as error:
        pytest.skip(f"the environment of `adapters` cannot be made: {error}")
    assert isolated.versions(python)["adapters"] == isolated.ADAPTERS
    checks = ("padding", "mixed greedy")
    results = list(isolated.results(python, {"gpt2": tiny.folder("gpt2")}, with_adapters.METHODS[:1], checks))
    assert [(r.library, r.method, r.family, r.check) for r in results] == [
        ("adapters", with_adapters.METHODS[0], "gpt2", check) for check in checks
    ]
    assert all((r.status == "pass") == (r.reason == "") for r in results)
