"""A task added to a trained bundle: the old tasks answer as ever, to the last bit."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_methods
import tiny
import torch
from test_source_prompts import finished
from torch import Tensor

from polyprompt import checkpoint, fingerprint, later_tasks
from polyprompt.config import MethodConfig
from polyprompt.errors import BundleError, ConfigError
from polyprompt.methods.base import Method
from polyprompt.model import PromptedModel
from polyprompt.plan import build, plan
from polyprompt.predictor import Predictor
from polyprompt.ray_train import run
from polyprompt.recipe import check, load
from polyprompt.worker import Job, train

Table = dict[str, Any]
TASKS = [f"task{i}" for i in range(tiny.NUM_TASKS + 1)]
#: As in tests/test_golden.py, on three tasks.
OWN = {
    "prompt_tuning": {"length": 4},
    "smop": {"length": 2, "router": "per_task"},
    "hyperprompt": {"encoder_length": 3, "decoder_length": 2, "reduction": 4},
    "p_tuning": {"length": 4, "encoder_hidden_size": 16},
    "adapter": {"bottleneck": 4, "init_std": 0.1},
    "attempt": {"length": 3, "bottleneck": 4},
}


def has_parts(config: MethodConfig) -> bool:
    """Does a task have parameters of its own?"""
    return config.name != "full" and config.name != "lora" and sizes(config, 2) != sizes(config, 3)


def sizes(config: MethodConfig, num_tasks: int) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in method_of(config, num_tasks).named_parameters()}


def method_of(config: MethodConfig, num_tasks: int, seed: int = 0) -> Method:
    return tiny.build(config, tiny.load(train=False).dims(num_tasks), seed=seed)


PARTED = [name for name, config in test_methods.CONFIGS.items() if has_parts(config)]


def run_config(config: MethodConfig) -> Any:
    table = {"method": config.model_dump(mode="json"), "tasks": ["embedded/nli"]}
    return check({**table, "init": {"from": "/absent", "new_tasks": ["embedded/wic"]}})


def extended(config: MethodConfig, old: PromptedModel) -> PromptedModel:
    """The model with a task added, which has other starting values, all else frozen."""
    method = method_of(config, tiny.NUM_TASKS + 1, seed=9)
    axes = later_tasks.task_axes(run_config(config), method, old.method)
    model = PromptedModel(copy.deepcopy(old.backbone), method).eval()
    later_tasks.take_over(model, axes, {f"method.{n}": t for n, t in old.method.state_dict().items()})
    later_tasks.freeze(model, axes, tiny.NUM_TASKS)
    return model


@pytest.mark.parametrize("name", PARTED)
def test_old_tasks_answer_as_before_to_the_last_bit_after_the_new_one_is_trained(name: str) -> None:
    config = test_methods.CONFIGS[name]
    old = test_methods.strong(config)
    taken = fingerprint.take(old, TASKS[:-1], "fp32")
    before = {name: tensor.clone() for name, tensor in old.trained_state().items()}
    model = extended(config, old)
    ids, mask, labels, _ = tiny.batch()
    new = torch.zeros(len(ids), dtype=torch.int64)  # its number among the tasks that are trained
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    start = model(ids, mask, labels, new).total.item()
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, mask, labels, new).total.backward()
        optimizer.step()
    assert model(ids, mask, labels, new).total.item() != start
    model.first_task = 0
    assert fingerprint.check(model, taken, TASKS, "fp32", "here")
    # A batch of all old tasks, and of the new one beside them.
    batch = tiny.batch()
    assert torch.equal(model.logits(*batch), old.logits(*batch))
    state = model.trained_state()
    assert set(state) >= {f"method.{name}" for name in dict(old.method.named_parameters())}
    for key, tensor in before.items():
        assert torch.equal(old_part(state[key], tensor), tensor), key


def old_part(now: Tensor, before: Tensor) -> Tensor:
    for axis, size in enumerate(before.shape):
        now = now.narrow(axis, 0, size)
    return now


@pytest.mark.parametrize("name", PARTED)
def test_only_what_belongs_to_the_new_task_is_trained_and_counted(name: str) -> None:
    config = test_methods.CONFIGS[name]
    model = extended(config, test_methods.strong(config))
    counts = model.num_parameters()
    own = sum(p.numel() for p in method_of(config, tiny.NUM_TASKS + 1).parameters())
    fewer = sum(p.numel() for p in method_of(config, tiny.NUM_TASKS).parameters())
    assert counts.trained == own - fewer > 0
    assert counts.method == own
    groups = model.named_groups()
    assert {name for members in groups.values() for name, _ in members} <= set(model.trained_state())
    assert "backbone" not in groups


@pytest.mark.parametrize("name", [name for name in test_methods.CONFIGS if name not in PARTED])
def test_a_method_without_parts_of_a_task_is_refused(name: str) -> None:
    config = test_methods.CONFIGS[name]
    with pytest.raises(ConfigError, match=r"has no parameters that belong to one task alone.*Train on old and new"):
        later_tasks.task_axes(run_config(config), method_of(config, 3), method_of(config, 2))


def test_a_backbone_in_use_is_not_taken_out_of_eval_mode() -> None:
    """A model is built in training mode, on a backbone that other threads may be using."""
    model = test_methods.strong("hyperprompt sep")
    model.training = True
    model.method.train()
    fingerprint.take(model, TASKS[:-1], "fp32")
    assert model.training
    assert model.method.training
    assert not any(module.training for module in model.backbone.modules())


def test_an_output_that_changed_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = test_methods.strong("hyperprompt sep")
    taken = json.loads(json.dumps(fingerprint.take(model, TASKS[:-1], "fp32")))
    assert fingerprint.check(model, taken, TASKS, "fp32", "here")
    weight = model.backbone.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(1 + 1e-7)
        caplog.set_level(logging.INFO)
        assert not fingerprint.check(model, taken, TASKS, "fp32", "here")
        assert "here: the old tasks answer as they did but for rounding" in caplog.text
        weight.mul_(1.1)
    with pytest.raises(BundleError, match="here: task task0 no longer answers as it did"):
        fingerprint.check(model, taken, TASKS, "fp32", "here")


def begin(table: Table, folder: Path, method: Table) -> tuple[Path, Table]:
    """Train on two tasks; return the bundle and the table of a run that adds the third."""
    own, nli, similarity = table["tasks"]
    table = {**table, "tasks": [nli, own], "method": method}
    bundle = finished(table, folder, **method)
    return bundle, {**table, "init": {"from": str(bundle), "new_tasks": [similarity]}}


ROWS: list[Table] = [
    {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
    {"task": "my/larger", "text": "3 and 5"},
    {"task": "embedded/nli", "input": "nli premise: the cat sat hypothesis: a dog sat"},
]
NEW_ROW = {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"}


@pytest.mark.parametrize("name", OWN)
def test_a_run_adds_a_task(small_run: Table, tmp_path: Path, name: str) -> None:
    method: Table = {"name": name, **OWN[name]}
    if name == "attempt":
        source = finished(
            {**small_run, "tasks": small_run["tasks"][:1]}, tmp_path / "s", name="prompt_tuning", length=3
        )
        method["sources"] = [str(source)]
    if name == "hyperprompt":
        small_run["backbone"]["trainable"] = True
    bundle, table = begin(small_run, tmp_path / "old", method)
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()  # the old tasks' rows are not read again
    table["train"] = {**table["train"], "max_steps": 4, "learning_rate": 0.05}
    result = run(check(table), out=tmp_path / "new", say=lambda line: None)
    assert set(result.eval) == {"embedded/similarity"}
    assert result.num_trained_parameters < result.num_method_parameters
    assert checkpoint.read(Path(result.bundle)).state[fingerprint.KEPT]["rows"]
    before, after = Predictor(bundle), Predictor(Path(result.last_bundle))
    assert after.task_names == ["embedded/nli", "my/larger", "embedded/similarity"]
    assert after.predict(ROWS, batch_size=1) == before.predict(ROWS, batch_size=1)
    (answer,) = after.predict([NEW_ROW])
    assert answer.score == answer.score
    taken = checkpoint.read(Path(result.last_bundle)).state[fingerprint.KEPT]
    assert fingerprint.check(after.model, taken, after.task_names, "fp32", "here")


def test_it_goes_on_where_it_was_stopped_without_the_first_bundle(small_run: Table, tmp_path: Path) -> None:
    bundle, table = begin(small_run, tmp_path / "old", {"name": "hyperprompt", **OWN["hyperprompt"]})
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()

    def go(folder: str, max_steps: int) -> checkpoint.Bundle:
        config = check({**table, "evaluate": {}, "train": {**table["train"], "max_steps": max_steps}})
        job = Job(config, tmp_path / folder, handle=None)
        return checkpoint.read(train(job, torch.device("cpu"), lambda metrics, folder: None).last_bundle)

    whole = go("whole", 6)
    go("parts", 3)
    shutil.rmtree(bundle)
    parts = go("parts", 6)
    assert parts.state[fingerprint.KEPT] == whole.state[fingerprint.KEPT]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name]), name


def test_a_task_is_added_to_what_was_added_to(small_run: Table, tmp_path: Path) -> None:
    first, table = begin(small_run, tmp_path / "old", {"name": "prompt_tuning", "length": 3})
    (tmp_path / "second").mkdir()
    second = train(Job(check(table), tmp_path / "second", None), torch.device("cpu"), lambda m, b: None).last_bundle
    tasks = [*table["tasks"], "embedded/similarity"]
    config = check({**table, "tasks": tasks, "init": {"from": str(second), "new_tasks": ["embedded/wic"]}})
    checked = plan(config)
    assert checked.num_trained_parameters == 3 * 32
    assert checked.num_method_parameters == 4 * 3 * 32
    model, _ = build(config)
    assert model.fingerprint is not None
    assert {row["task"] for row in model.fingerprint["rows"]} == {"embedded/nli", "my/larger", "embedded/similarity"}
    assert first.is_dir()


def test_new_tasks_are_given_on_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks: [glue/rte, embedded/nli]\n")
    config = load([recipe], [f"init.from={tmp_path}", "init.new_tasks=[glue/cola]"])
    assert config.task_names == ["glue/rte", "embedded/nli", "glue/cola"]
    assert config.num_old_tasks == 2
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load([again]) == config
    assert "init" not in load([recipe]).model_dump(mode="json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "prompt_tuning", "length": 4}}, r"method\.length: 3 there, 4 here.*Set the values that"),
        ({"evaluate": {"mode": "generate"}}, r"evaluate\.mode: rank there, generate here"),
        ({"tasks": ["embedded/nli"]}, r"must be the tasks of init\.from, in its order.*embedded/nli, my/larger; they"),
        ({"init": {"from": "absent", "new_tasks": ["embedded/wic"]}}, r"absent is no bundle; expected a step_"),
    ],
    ids=["method", "mode", "tasks", "absent"],
)
def test_what_does_not_fit_the_bundle_is_refused(small_run: Table, tmp_path: Path, change: Table, message: str) -> None:
    _, table = begin(small_run, tmp_path / "old", {"name": "prompt_tuning", "length": 3})
    with pytest.raises(ConfigError, match=message):
        build(check({**table, **change}))


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"init\.new_tasks=\['glue/rte'\] must be the last of the tasks"):
        check({"tasks": ["glue/rte", "glue/cola"], "init": {"from": "x", "new_tasks": ["glue/rte"]}})
    with pytest.raises(ConfigError, match=r"init\.new_tasks=\['glue/rte'\] must be the last of the tasks"):
        check({"tasks": ["glue/rte"], "init": {"from": "x", "new_tasks": ["glue/rte"]}})
    with pytest.raises(ConfigError, match=r"init\.from: this key is required"):
        check({"tasks": ["glue/rte"], "init": {"new_tasks": ["glue/cola"]}})
    with pytest.raises(ConfigError, match=r"init\.form: unknown key\. Did you mean 'from'"):
        check({"tasks": ["glue/rte"], "init": {"form": "x", "from": "x", "new_tasks": ["glue/cola"]}})


def test_full_tuning_is_refused_before_any_data_is_read(small_run: Table, tmp_path: Path) -> None:
    _, table = begin(small_run, tmp_path / "old", {"name": "full"})
    with pytest.raises(
        ConfigError, match=r"method\.name=full, as it is set here, has no parameters that belong to one"
    ):
        build(check(table))
