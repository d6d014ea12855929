"""Router health: the numbers, the watch for a collapse, and a forced collapse from the loop to the closing table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polyprompt import report, router_health
from polyprompt.config import SMoPConfig
from polyprompt.methods.routing import route
from polyprompt.methods.smop import SMoP
from polyprompt.model import PromptedModel
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.router_health import Watch
from polyprompt.tracking import resolve_uri


def test_metrics_are_what_they_say() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -9.0], [0.0, 2.0, 1.0, -9.0], [4.0, 0.0, 0.0, -9.0]])
    aux = route(SMoPConfig(), logits, training=False).aux
    sums = router_health.rows(aux).sum(dim=0).tolist()
    assert len(sums) == router_health.num_columns(4)
    found = router_health.metrics(sums)
    p = logits.double().softmax(-1)
    best = p.sort(dim=-1, descending=True).values
    assert [found[f"utilisation_{i}"] for i in range(4)] == pytest.approx([8 / 3, 4 / 3, 0, 0])
    assert found["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()) / math.log(4), abs=1e-6)
    assert found["margin"] == pytest.approx(float((best[:, 0] - best[:, 1]).mean()), abs=1e-6)
    assert found["dead_prompts"] == 2
    assert router_health.metrics([0.0] * 10) == {}


def test_one_prompt_has_no_router_to_speak_of() -> None:
    aux = route(SMoPConfig(num_prompts=1), torch.zeros(3, 1), training=False).aux
    found = router_health.metrics(router_health.rows(aux).sum(dim=0).tolist())
    assert found == {"utilisation_0": 1.0, "entropy": 0.0, "margin": 1.0, "dead_prompts": 0.0}
    watch = Watch()
    for step in range(200):
        watch.take(step, [8.0])
    assert watch.collapse == {}


def test_a_mixture_of_all_is_no_collapse_though_one_prompt_leads_everywhere() -> None:
    aux = route(SMoPConfig(routing="none"), torch.tensor([[0.3, 0.2, 0.1, 0.0]] * 5), training=False).aux
    watch = Watch()
    for step in range(1, 101):
        watch.take(step, router_health.shares(router_health.rows(aux).sum(dim=0)))
    assert watch.collapse == {}


def test_the_watch_flags_within_100_steps_and_takes_it_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for begin in (1, 20, 49, 51):
        watch, flagged = Watch(), None
        for step in range(1, 300):
            watch.take(step, [0.0, 32.0, 0.0] if step >= begin else [11.0, 11.0, 10.0])
            flagged = flagged or (step if watch.collapse else None)
        assert flagged is not None
        assert flagged - begin < 100
        assert watch.collapse == {"step": flagged, "prompt": 1, "share": 1.0}
    assert "router collapsed by step 50: prompt 1 makes up 100%" in caplog.text
    for step in range(300, 400):
        watch.take(step, [11.0, 11.0, 10.0])
    assert watch.collapse == {}
    assert "recovered" in caplog.text


@pytest.fixture
def smop_run(small_run: dict[str, Any]) -> dict[str, Any]:
    small_run["method"] = {"name": "smop", "length": 2, "perturbation": True}
    small_run["train"] |= {"max_steps": 60, "batch_size": 8, "num_shards": 2, "logging_steps": 20}
    small_run["evaluate"] = {}
    return small_run


def collapse(model: PromptedModel) -> None:
    """Make the router prefer prompt 2 for every row: all embeddings share a direction, and it points there."""
    assert isinstance(model.method, SMoP)
    with torch.no_grad():
        embedding = model.backbone.model.get_input_embeddings().weight
        embedding[:, 0] = 5.0
        model.method.router_GHR[:, 0] = torch.tensor([0.0, 0.0, 5.0, 0.0])


def test_a_forced_collapse_is_flagged_in_the_tags_and_the_closing_table(
    smop_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    start = PromptedModel.__init__

    def collapsed_start(self: PromptedModel, *args: Any) -> None:
        start(self, *args)
        collapse(self)

    monkeypatch.setattr(PromptedModel, "__init__", collapsed_start)
    smop_run["tracking"] = {
        "enabled": True,
        "uri": f"sqlite:///{tmp_path}/m.db",
        "system_metrics_interval_seconds": None,
    }
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = check(smop_run)
    result = run(config, out=tmp_path / "run", say=lambda line: None)
    assert result.router_collapse == {"step": 50, "prompt": 2, "share": 1.0}
    assert RunResult.read(tmp_path / "run" / "result.json").router_collapse == result.router_collapse
    words = "router collapsed by step 50: prompt 2 makes up 100% of what the rows of all tasks get"
    assert f"WARNING: {words}" in str(report.table(result).caption)
    tracked = MlflowClient(resolve_uri(config.tracking)).get_run(result.run_id).data
    assert tracked.tags["router.collapsed"] == words
    assert tracked.metrics["router/collapsed"] == 1.0
    assert tracked.metrics["router/my/larger/dead_prompts"] == 3.0
    assert words in (tmp_path / "run" / "run.log").read_text()


def test_a_healthy_run_is_not_flagged(smop_run: dict[str, Any], tmp_path: Path) -> None:
    smop_run["method"]["load_balance"] = 0.01
    smop_run["train"]["learning_rate"] = 1e-6
    result = run(check(smop_run), out=tmp_path / "run", say=lambda line: None)
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [point for point in points if "train/loss" in point]
    assert [point["router/collapsed"] for point in logged] == [0.0] * 3
    assert result.router_collapse == {}
    assert "WARNING" not in str(report.table(result).caption)
    # 0.01 of perfect balance, at most R = 4 times that.
    assert all(0.009 < point["train/penalty"] < 0.04 for point in logged)
    for task in ("my/larger", "embedded/nli", "embedded/similarity"):
        used = [logged[-1][f"router/{task}/utilisation_{prompt}"] for prompt in range(4)]
        assert sum(used) == pytest.approx(4)
        assert 0 <= logged[-1][f"router/{task}/entropy"] <= 1
