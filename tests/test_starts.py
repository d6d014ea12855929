"""What input prompts start from: labels, a text, a file, another bundle, zero; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polyprompt.errors import BundleError, ConfigError
from polyprompt.plan import build
from polyprompt.recipe import check
from polyprompt.worker import Job, train

Table = dict[str, Any]


def started(table: Table, **method: Any) -> tuple[Tensor, Any]:
    model, _ = build(check({**table, "method": {"name": "prompt_tuning", "length": 6, **method}}))
    prompts = model.method.input_prompts()
    assert prompts is not None
    return prompts.detach(), model.backbone


def words(backbone: Any, text: str) -> Tensor:
    return backbone.model.get_input_embeddings().weight[backbone.tokenizer(text, add_special_tokens=False).input_ids]


def test_labels_come_first_and_vocabulary_fills_up(small_run: Table) -> None:
    small_run["tasks"] = small_run["tasks"][:2]
    prompts, backbone = started(small_run, init="labels")
    drawn, _ = started(small_run)
    assert torch.equal(prompts[0, 0], words(backbone, "no").mean(0))
    assert torch.equal(prompts[0, 1], words(backbone, "yes").mean(0))
    assert torch.equal(prompts[0, 2:], drawn[0, 2:])
    assert not torch.equal(prompts[1, :2], prompts[0, :2])


def test_labels_of_a_shared_prompt_are_those_of_all_tasks_once(small_run: Table) -> None:
    small_run["tasks"] = [small_run["tasks"][0], {**small_run["tasks"][0], "name": "my/again"}]
    prompts, backbone = started(small_run, init="labels", per_task=False)
    drawn, _ = started(small_run, per_task=False)
    assert torch.equal(prompts[0, 1], words(backbone, "yes").mean(0))
    assert torch.equal(prompts[0, 2:], drawn[0, 2:])


def test_labels_that_do_not_fit_are_refused(small_run: Table) -> None:
    with pytest.raises(ConfigError, match=r"method.length=1 is too short for \d choices.*raise method.length"):
        started({**small_run, "tasks": small_run["tasks"][:1]}, init="labels", length=1)
    with pytest.raises(ConfigError, match=r"but embedded/similarity have none; set method.init=vocabulary"):
        started(small_run, init="labels")


@pytest.mark.parametrize("name", ["prompt_tuning", "smop"])
def test_a_text_is_repeated_or_cut(small_run: Table, name: str) -> None:
    prompts, backbone = started(small_run, name=name, init="text", init_text="is it larger")
    vectors = words(backbone, "is it larger")
    assert all(torch.equal(prompt, torch.cat([vectors] * 6)[:6]) for prompt in prompts)
    texts = ["yes", "no", "yes or no", "it is"][: len(prompts)]
    prompts, _ = started(small_run, name=name, init="text", init_text=texts, length=1)
    assert all(torch.equal(p[0], words(backbone, text)[0]) for p, text in zip(prompts, texts, strict=True))
    with pytest.raises(ConfigError, match=r"has 2 texts for \d prompts"):
        started(small_run, name=name, init="text", init_text=["a", "b"])
    with pytest.raises(ConfigError, match="'' has no tokens"):
        started(small_run, name=name, init="text", init_text="")


@pytest.mark.parametrize("name", ["prompt_tuning", "smop"])
def test_zero_and_vocabulary(small_run: Table, name: str) -> None:
    assert not started(small_run, name=name, init="zero")[0].any()
    prompts, backbone = started(small_run, name=name, init="vocabulary")
    embedding = backbone.model.get_input_embeddings().weight
    assert all((embedding == vector).all(dim=1).any() for vector in prompts.flatten(0, 1))


@pytest.mark.parametrize(("name", "starts"), [("dept", 3), ("mpt", 1)])
def test_other_methods_with_input_prompts_start_alike(small_run: Table, tmp_path: Path, name: str, starts: int) -> None:
    prompts, backbone = started(small_run, name=name, init="text", init_text="is it larger")
    assert prompts.shape == (starts, 6, 32)
    assert all(torch.equal(prompt[:3], words(backbone, "is it larger")[:3]) for prompt in prompts)
    drawn, _ = started(small_run, init="vocabulary")
    assert torch.equal(started(small_run, name=name)[0], drawn[:starts])
    save_file({"any": torch.randn(6, 32)}, tmp_path / "one.safetensors")
    prompts, _ = started(small_run, name=name, init="file", init_file=str(tmp_path / "one.safetensors"))
    assert len(prompts.unique(dim=0)) == 1
    small_run["tasks"] = small_run["tasks"][:1]
    assert torch.equal(started(small_run, name=name, init="labels")[0][0, 1], words(backbone, "yes").mean(0))


def test_a_file_gives_every_prompt_or_one_for_all(small_run: Table, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    for shape in ((3, 6, 32), (1, 6, 32), (6, 32)):
        tensor = torch.randn(shape)
        save_file({"any": tensor}, file)
        assert torch.equal(started(small_run, init="file", init_file=str(file))[0], tensor.expand(3, 6, 32))
    save_file({"any": torch.randn(2, 6, 32)}, file)
    with pytest.raises(ConfigError, match=r"holds \[2, 6, 32\], expected \[3, 6, 32\]"):
        started(small_run, init="file", init_file=str(file))
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match="must hold one tensor of prompts, but has a, b"):
        started(small_run, init="file", init_file=str(file))
    file.write_text("no tensors")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        started(small_run, init="file", init_file=str(file))
    with pytest.raises(ConfigError, match="does not exist"):
        started(small_run, init="file", init_file=str(tmp_path / "none"))


def test_another_bundles_prompts_go_to_the_tasks_of_their_names(small_run: Table, tmp_path: Path) -> None:
    first = {**small_run, "method": {"name": "prompt_tuning", "length": 6}, "evaluate": {}}
    first["train"] = {**small_run["train"], "max_steps": 2}
    (tmp_path / "first").mkdir()
    bundle = train(
        Job(check(first), tmp_path / "first", handle=None), torch.device("cpu"), lambda m, b: None
    ).last_bundle
    learned = build_state(bundle)
    reversed_run = {**small_run, "tasks": small_run["tasks"][::-1]}
    prompts, _ = started(reversed_run, init="file", init_file=str(bundle))
    assert torch.equal(prompts, learned.flip(0))
    with pytest.raises(ConfigError, match=r"has no prompts of embedded/copa; its tasks are my/larger, embedded/nli"):
        started({**small_run, "tasks": ["embedded/copa"]}, init="file", init_file=str(bundle))


def test_the_prompt_of_a_bundle_of_one_task_starts_those_of_other_tasks(small_run: Table, tmp_path: Path) -> None:
    """Prompt transfer: Vu et al. 2022, SPoT."""
    first = {**small_run, "method": {"name": "prompt_tuning", "length": 6}, "evaluate": {}}
    first |= {"tasks": small_run["tasks"][:1], "train": {**small_run["train"], "max_steps": 2}}
    (tmp_path / "first").mkdir()
    job = Job(check(first), tmp_path / "first", handle=None)
    bundle = train(job, torch.device("cpu"), lambda metrics, folder: None).last_bundle
    prompts, _ = started({**small_run, "tasks": small_run["tasks"][1:]}, init="file", init_file=str(bundle))
    assert torch.equal(prompts, build_state(bundle).expand(2, 6, 32))


def build_state(bundle: Path) -> Tensor:
    from polyprompt import checkpoint

    return checkpoint.read(bundle).tensors["method.prompt_GPH"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"init": "text"}, "method.init=text needs method.init_text"),
        ({"init": "file"}, "method.init=file needs method.init_file"),
        ({"init_text": "a"}, "method.init_text needs method.init=text, not vocabulary"),
        ({"name": "smop", "init": "labels"}, "method.init: .*'vocabulary', 'text', 'file', 'zero' or 'normal'"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(method: Table, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check({"tasks": ["a/b"], "method": {"name": "prompt_tuning", **method}})


def tuned(table: Table, folder: Path, max_steps: int = 2, **method: Any) -> Path:
    """Train prompts of length 6, or go on where the folder's run was; return the last bundle."""
    folder.mkdir(exist_ok=True)
    own = {**table, "method": {"name": "prompt_tuning", "length": 6, **method}, "evaluate": {}}
    own["train"] = {**table["train"], "max_steps": max_steps}
    return train(Job(check(own), folder, handle=None), torch.device("cpu"), lambda metrics, bundle: None).last_bundle


def test_prompts_of_another_backbone_are_refused(small_run: Table, tmp_path: Path) -> None:
    small_run["tasks"] = small_run["tasks"][:1]
    bundle = tuned(small_run, tmp_path / "first")
    assert torch.equal(started(small_run, init="file", init_file=str(bundle))[0], build_state(bundle))
    # As wide, of the same shape, but with other weights.
    other = {**small_run, "backbone": {**small_run["backbone"], "init": "random"}}
    with pytest.raises(BundleError, match=r"was trained on backbone .*; set backbone.name .* name another bundle"):
        started(other, init="file", init_file=str(bundle))
    together = {**small_run, "backbone": {**small_run["backbone"], "trainable": True}}
    moved = tuned(together, tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"method.init_file: .* was trained together with its backbone"):
        started(together, init="file", init_file=str(moved))


def test_a_run_that_goes_on_needs_its_start_no_more(small_run: Table, tmp_path: Path) -> None:
    small_run["tasks"] = small_run["tasks"][:1]
    file = tmp_path / "start.safetensors"
    save_file({"any": torch.randn(6, 32)}, file)
    start = {"init": "file", "init_file": str(file)}
    unbroken = build_state(tuned(small_run, tmp_path / "unbroken", 4, **start))
    tuned(small_run, tmp_path / "stopped", 2, **start)
    file.unlink()
    assert torch.equal(build_state(tuned(small_run, tmp_path / "stopped", 4, **start)), unbroken)
