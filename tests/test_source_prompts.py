"""Source prompts: bundles of prompt_tuning runs, checked before anything is trained, and a run on top of them."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyprompt import checkpoint
from polyprompt.errors import BundleError, ConfigError
from polyprompt.plan import build
from polyprompt.recipe import check
from polyprompt.worker import Job, train


def finished(table: dict[str, Any], folder: Path, **method: Any) -> Path:
    """Train two steps and return the last bundle."""
    folder.mkdir()
    config = check({**table, "method": method, "evaluate": {}, "train": {**table["train"], "max_steps": 2}})
    return train(Job(config, folder, handle=None), torch.device("cpu"), lambda metrics, bundle: None).last_bundle


@pytest.fixture
def one_task(small_run: dict[str, Any]) -> dict[str, Any]:
    return {**small_run, "tasks": small_run["tasks"][:1]}


def test_every_prompt_of_every_bundle_is_a_source(one_task: dict[str, Any], tmp_path: Path) -> None:
    bundles = [finished(one_task, tmp_path / str(n), name="prompt_tuning", length=3, per_task=n == 0) for n in range(2)]
    method = {"name": "attempt", "length": 3, "sources": [str(b) for b in bundles], "bottleneck": 4}
    model, _ = build(check({**one_task, "method": method}))
    expected = torch.cat([checkpoint.read(bundle).tensors["method.prompt_GPH"] for bundle in bundles])
    assert torch.equal(model.method.get_buffer("sources_JPH"), expected)
    trained = checkpoint.read(finished(one_task, tmp_path / "attempt", **method)).tensors
    assert "method.prompt_GPH" in trained
    assert torch.equal(trained["method.sources_JPH"], expected)


def test_a_run_goes_on_with_the_sources_it_was_begun_with(one_task: dict[str, Any], tmp_path: Path) -> None:
    source = finished(one_task, tmp_path / "source", name="prompt_tuning", length=3)
    table = {**one_task, "method": {"name": "attempt", "length": 3, "sources": [str(source)], "bottleneck": 4}}

    def go(folder: str, max_steps: int) -> Mapping[str, Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = check({**table, "evaluate": {}, "train": {**table["train"], "max_steps": max_steps}})
        job = Job(config, tmp_path / folder, handle=None)
        return checkpoint.read(train(job, torch.device("cpu"), lambda metrics, bundle: None).last_bundle).tensors

    unbroken = go("unbroken", 4)
    go("stopped", 2)
    shutil.rmtree(source)
    other = {**one_task, "train": {**one_task["train"], "seed": 7}}
    finished(other, tmp_path / "other", name="prompt_tuning", length=3)
    shutil.copytree(tmp_path / "other" / "bundles" / source.name, source)
    resumed = go("stopped", 4)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


def test_a_bundle_without_its_sources_is_refused(one_task: dict[str, Any], tmp_path: Path) -> None:
    source = finished(one_task, tmp_path / "source", name="prompt_tuning", length=3)
    table = {**one_task, "method": {"name": "attempt", "length": 3, "sources": [str(source)], "bottleneck": 4}}
    bundle = checkpoint.read(finished(one_task, tmp_path / "attempt", **table["method"]))
    old = replace(bundle, tensors={name: t for name, t in bundle.tensors.items() if "sources" not in name})
    with pytest.raises(BundleError, match=r"lacks the source prompts it was trained with.*Start a new run"):
        build(check(table), old)


def test_sources_that_do_not_fit_are_refused_by_name(one_task: dict[str, Any], tmp_path: Path) -> None:
    tuned = finished(one_task, tmp_path / "tuned", name="prompt_tuning", length=3)
    smop = finished(one_task, tmp_path / "smop", name="smop", length=3)
    together = {**one_task, "backbone": {**one_task["backbone"], "trainable": True}}
    moved = finished(together, tmp_path / "moved", name="prompt_tuning", length=3)

    def attempt(source: Path, length: int = 3, **keys: Any) -> None:
        build(check({**one_task, "method": {"name": "attempt", "length": length, "sources": [str(source)]}, **keys}))

    attempt(tuned)
    with pytest.raises(ConfigError, match=r"prompts of length 3, expected method.length=4"):
        attempt(tuned, length=4)
    with pytest.raises(ConfigError, match=r"method.name=smop; expected prompt_tuning"):
        attempt(smop)
    with pytest.raises(ConfigError, match=r"trained together with its backbone"):
        attempt(moved)
    with pytest.raises(ConfigError, match=r"method.sources: .*nowhere is no bundle; expected a step_"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"was trained on backbone"):
        attempt(tuned, backbone={"name": "embedded", "init": "random"})
