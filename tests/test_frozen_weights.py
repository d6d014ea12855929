"""Trials in processes of their own read one copy of the frozen backbone, in Ray's object store."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from polyprompt import backbone as backbones
from polyprompt.ray_train import run
from polyprompt.recipe import check
from tuning import frozen_weights
from tuning.frozen_weights import FrozenWeights

Table = dict[str, Any]


def table_of(small_run: Table, **train: Any) -> Table:
    method = {"name": "smop", "num_prompts": 2, "length": 3}
    return {
        **small_run,
        "method": method,
        "train": {**small_run["train"], "max_steps": 2, "precision": "bf16", **train},
    }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_the_shared_copy_is_the_same_to_the_last_bit(small_run: Table, tmp_path: Path) -> None:
    """In a process of its own here, to which the weights' reference travels."""
    config = check({**table_of(small_run), "compute": {"num_workers": 0}})
    weights = frozen_weights.hold(config)
    assert weights.held is not None
    mine = run(config, out=tmp_path / "mine", say=lambda line: None)
    elsewhere = check({**table_of(small_run), "compute": {"num_workers": 1}})
    shared = run(elsewhere, out=tmp_path / "shared", say=lambda line: None, load=weights.load)
    assert (shared.loss_curve, shared.eval) == (mine.loss_curve, mine.eval)
    assert "those in Ray's object store" in (tmp_path / "shared" / "run.log").read_text()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_copy_is_used_in_place_and_cannot_be_written(small_run: Table, precision: Any) -> None:
    config = check(table_of(small_run, precision=precision))
    weights = frozen_weights.hold(config)
    stored = ray.get(weights.held)
    assert not any(array.flags.writeable for array in stored.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = weights.load(config.backbone, train=False, precision=precision, seed=0)
    assert {name: p.data_ptr() for name, p in loaded.named_parameters()} == {
        name: array.__array_interface__["data"][0] for name, array in ray.get(weights.held).items()
    }
    own = backbones.load(config.backbone, train=False, precision=precision, seed=0)
    for (name, ours), theirs in zip(loaded.named_parameters(), own.parameters(), strict=True):
        assert not ours.requires_grad
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    assert loaded.identity() == own.identity()


@pytest.mark.parametrize(
    ("train", "precision", "why"), [("layer_norms", "bf16", "it is trained"), (False, "fp32", "not that of")]
)
def test_another_backbone_is_loaded_for_the_trial_alone(
    small_run: Table, caplog: pytest.LogCaptureFixture, train: Any, precision: Any, why: str
) -> None:
    config = check(table_of(small_run))
    weights = FrozenWeights((config.backbone, "bf16", None), held="not asked for")
    loaded = weights.load(config.backbone, train=train, precision=precision, seed=0)
    assert why in caplog.text
    assert any(p.requires_grad for p in loaded.parameters()) == (train is not False)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_store_that_is_too_small_is_said_to_be(small_run: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_weights, "MAX_SHARE", 1e-6)
    weights = frozen_weights.hold(check(table_of(small_run)))
    assert weights.held is None
    assert "too many for an object store of" in weights.why_not


def test_a_trained_backbone_is_not_held(small_run: Table) -> None:
    config = check({**table_of(small_run), "backbone": {**small_run["backbone"], "trainable": True}})
    assert frozen_weights.hold(config).why_not == "it is trained"
