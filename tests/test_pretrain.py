"""The pre-training job, as a user runs it, and the backbone folder that it leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from polyprompt import backbone, checkpoint
from polyprompt.backbone_config import BackboneConfig
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult

ROOT = Path(__file__).parents[1]
Table = dict[str, Any]


@pytest.fixture
def short_run(text_run: Table) -> Table:
    text_run["train"] |= {"max_steps": 6, "save_steps": 2, "save_total_limit": 10, "precision": "bf16"}
    text_run["evaluate"] = {}
    return text_run


def job(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_job_leaves_a_backbone_that_everybody_can_load(short_run: Table, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(short_run))
    done = job("recipe.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("step 6/6", "corpus/spans", "perplexity", "backbone.name="):
        assert part in done.stdout
    folder = tmp_path / "out" / "backbone"
    result = RunResult.read(tmp_path / "out" / "result.json")
    trained = checkpoint.read(Path(result.last_bundle)).tensors
    ours = backbone.load(BackboneConfig(name=str(folder)), train=True, precision="fp32", seed=0)
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, trained[f"backbone.{name}"])
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("the lamp was <extra_id_0>", return_tensors="pt").input_ids
    start = torch.tensor([[0]])
    assert torch.equal(
        theirs(input_ids=ids, decoder_input_ids=start).logits,
        theirs.__class__.forward(ours.model, input_ids=ids, decoder_input_ids=start).logits,
    )
    text = (folder / "README.md").read_text()
    loss = result.evaluations[-1]["tasks"]["corpus/spans"]["loss"]
    for part in (
        f"{loss:.3f}",
        "| best unigram |",
        "books.txt.gz",
        "prefix lm",
        "5,760 tokens",
        "6 steps of 12 rows",
        "in bf16",
    ):
        assert part in text
    assert str(tmp_path) not in text
    again = job("recipe.yaml", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0
    assert "has finished" in again.stdout


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(short_run: Table, tmp_path: Path) -> None:
    config = check(short_run)
    unbroken = run(config, out=tmp_path / "a", say=lambda line: None)
    run(config, out=tmp_path / "b", say=lambda line: None)
    (tmp_path / "b" / "result.json").unlink()
    for folder in checkpoint.bundles(tmp_path / "b" / "bundles")[1:]:
        shutil.rmtree(folder)
    resumed = run(config, out=tmp_path / "b", say=lambda line: None)
    assert resumed.loss_curve == unbroken.loss_curve
    assert resumed.evaluations == unbroken.evaluations
    assert resumed.sequence == unbroken.sequence


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_curve_of_one_process(short_run: Table, tmp_path: Path) -> None:
    alone = run(check(short_run), out=tmp_path / "a", say=lambda line: None)
    shared = run(check({**short_run, "compute": {"num_workers": 2}}), out=tmp_path / "b", say=lambda line: None)
    assert shared.loss_curve == alone.loss_curve
    assert shared.evaluations == alone.evaluations


def test_random_weights_come_from_the_seed_and_not_from_the_folder(tiny_t5: Path) -> None:
    def weights(seed: int, init: Any) -> torch.Tensor:
        config = BackboneConfig(name=str(tiny_t5), init=init)
        return backbone.load(config, train=True, precision="fp32", seed=seed).model.shared.weight.detach()

    assert torch.equal(weights(0, "random"), weights(0, "random"))
    assert not torch.equal(weights(0, "random"), weights(1, "random"))
    assert torch.equal(weights(0, "pretrained"), weights(1, "pretrained"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "smop"}, "method.name=smop: pre-training trains the backbone itself; set method=full"),
        ({"tasks": ["embedded/nli"]}, "tasks: none of them is text to train on"),
    ],
)
def test_what_is_no_pretraining_is_refused_at_once(
    short_run: Table, tmp_path: Path, change: Table, message: str
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**short_run, **change}))
    done = job("recipe.json", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
