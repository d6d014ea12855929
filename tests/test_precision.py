"""Which precision a run computes in where its recipe leaves it to the machine."""

import logging
from typing import Any

import pytest
import torch

from polyprompt.precision import cpu_has_bf16, warn_of_emulation
from polyprompt.recipe import check, merge

TABLE: dict[str, Any] = {"tasks": ["embedded/nli"], "train": {"precision": "auto"}}


@pytest.fixture(params=["avx512_bf16", "amx_bf16", "bf16", None])
def has(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with one way to compute in bf16, or with none."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, request.param: True})
    return request.param is not None


def test_this_machine_is_known() -> None:
    """Where this fails, torch names its capabilities otherwise than we do."""
    capabilities = torch.cpu.get_capabilities()
    assert {"avx512_bf16", "amx_bf16"} <= capabilities.keys() or "bf16" in capabilities
    assert check(TABLE).train.precision == ("bf16" if cpu_has_bf16() else "fp32")


def test_auto_is_what_the_machine_has(has: bool) -> None:
    assert check(TABLE).train.precision == ("bf16" if has else "fp32")
    assert check({**TABLE, "compute": {"use_gpu": True}}).train.precision == "bf16"
    assert check(merge([{"tasks": ["embedded/nli"]}], ["train.precision=auto"])).train.learning_rate == 1e-3


def test_what_is_stated_is_kept(has: bool) -> None:
    for stated in ("fp32", "bf16"):
        assert check({**TABLE, "train": {"precision": stated}}).train.precision == stated
    assert check({"tasks": ["embedded/nli"]}).train.precision == "fp32"


def test_emulation_is_warned_of(has: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "polyprompt"):
        warn_of_emulation("fp32", torch.device("cpu"))
        warn_of_emulation("bf16", torch.device("cuda"))
        assert not caplog.records
        warn_of_emulation("bf16", torch.device("cpu"))
    assert len(caplog.records) == (0 if has else 1)
