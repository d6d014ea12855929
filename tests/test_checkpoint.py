"""Bundles: whole or refused by name."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from polyprompt import checkpoint
from polyprompt.errors import BundleError
from polyprompt.recipe import check

CONFIG = check({"tasks": ["embedded/nli"]})
BACKBONE = {"name": "embedded", "revision": None, "sha256": "a" * 64}


def write(root: Path, step: int, value: float = 1.0) -> Path:
    return checkpoint.write(
        root,
        step=step,
        tensors={"method.p": torch.full((2, 3), value).T, "method.q": torch.ones(2, dtype=torch.bfloat16)},
        optimizer={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}},
        state={"step": step, "losses": [0.1, 1 / 3]},
        config=CONFIG,
        backbone=BACKBONE,
        commit="abc",
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    bundle = checkpoint.read(write(tmp_path, 7), backbone=BACKBONE)
    assert bundle.folder == tmp_path / "step_00000007"
    assert torch.equal(bundle.tensors["method.p"], torch.ones(3, 2))
    assert bundle.tensors["method.q"].dtype == torch.bfloat16
    assert bundle.state == {"step": 7, "losses": [0.1, 1 / 3]}
    assert bundle.config == CONFIG
    assert bundle.optimizer()["optimizer"]["state"][0]["step"] == 3
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_model.safetensors", "optimizer.pt", "state.json", "config.json"}
    assert manifest["versions"]["torch"] == version("torch")


def test_a_step_written_again_replaces_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path, 7, 1.0)
    assert checkpoint.read(write(tmp_path, 7, 2.0)).tensors["method.p"].max() == 2
    assert len(checkpoint.bundles(tmp_path)) == 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_bundle_is_refused_by_name_and_passed_over(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / name
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content[:-1] if damage == "truncated" else content)
    with pytest.raises(BundleError, match=f"step_00000002.*{name}"):
        checkpoint.read(bad)
    assert checkpoint.newest_whole(tmp_path) == good
    assert "step_00000002" in caplog.text


def test_a_bundle_without_a_manifest_is_damaged(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "manifest.json").write_text('{"format": 1')
    with pytest.raises(BundleError, match=r"no readable manifest\.json"):
        checkpoint.verify(tmp_path / "step_00000002")
    with pytest.raises(BundleError, match=r"all 1 bundles .* are damaged"):
        checkpoint.newest_whole(tmp_path)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    other = {"name": "t5-base", "revision": None, "sha256": "b" * 64}
    with pytest.raises(BundleError, match=r"trained on backbone 'embedded' .* not on 't5-base'"):
        checkpoint.read(write(tmp_path, 1), backbone=other)


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(BundleError, match="has format 99, this version reads 1"):
        checkpoint.verify(manifest.parent)


def test_a_process_killed_while_writing_leaves_no_bundle(tmp_path: Path) -> None:
    write(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        # Dies between the draft and its renaming, as SIGKILL would have it.
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        write(tmp_path, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert checkpoint.bundles(tmp_path) == [tmp_path / "step_00000001"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep={2}, newest=2)
    assert [b.name for b in checkpoint.bundles(tmp_path)] == ["step_00000002", "step_00000005", "step_00000006"]


def test_a_bundle_cannot_run_code(tmp_path: Path) -> None:
    """An optimizer file that pickles a call is refused by torch's weights_only reader."""
    folder = write(tmp_path, 1)

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, folder / "optimizer.pt")
    manifest = folder / "manifest.json"
    table = json.loads(manifest.read_text())
    table["files"]["optimizer.pt"] = checkpoint._sha256(folder / "optimizer.pt")
    manifest.write_text(json.dumps(table))
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.read(folder).optimizer()
    assert not (tmp_path / "ran").exists()
