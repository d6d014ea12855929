"""backbone.compile: layers as torch.compile makes them, in training alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from polyprompt import packable
from polyprompt.errors import ConfigError
from polyprompt.loop import TrainState
from polyprompt.recipe import check
from polyprompt.worker import Job, train


def trained(table: dict[str, Any], folder: Path) -> TrainState:
    folder.mkdir()
    job = Job(check(table), folder, handle=None)
    return train(job, torch.device("cpu"), lambda metrics, bundle: None).state


@pytest.mark.slow
@pytest.mark.compiled
def test_the_curve_and_the_scores_are_as_without(small_run: dict[str, Any], tmp_path: Path) -> None:
    """Dropout off: its draws differ. Every layer is whole in one graph, blocks of any size run in it."""
    small_run["backbone"] |= {"dropout": 0.0}
    small_run["train"] |= {"max_steps": 6}
    small_run["evaluate"] = {"steps": 3}
    plain = trained(small_run, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    small_run["backbone"] |= {"compile": True}
    found = trained(small_run, tmp_path / "compiled")
    assert not counters["graph_break"]
    # Two stacks of two layers, each with padding in the block and without.
    assert 4 <= counters["stats"]["unique_graphs"] <= 8
    torch.testing.assert_close(torch.tensor(found.loss_curve), torch.tensor(plain.loss_curve), atol=1e-4, rtol=0)
    assert found.evaluations == plain.evaluations


def test_it_is_refused_where_it_cannot_be(small_run: dict[str, Any]) -> None:
    small_run["backbone"] |= {"compile": True}
    both = {"compute": {"strategy": "fsdp", "num_workers": 2}}
    with pytest.raises(ConfigError, match=r"backbone\.compile=true with compute\.strategy=fsdp .* Use one of the two"):
        check(small_run | both)
    frozen = {"method": {"name": "smop"}}
    with pytest.raises(ConfigError, match=r"Set backbone\.compile=false"):
        packable.check(check(small_run | frozen))


def test_a_missing_compiler_is_named_before_any_training(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    small_run["backbone"] |= {"compile": True}
    with pytest.raises(ConfigError, match=r"backbone\.compile=true needs a C\+\+ compiler, and no-such-compiler is"):
        trained(small_run, tmp_path / "run")
