"""Embeddings from counts, and the job that puts them into a backbone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from polyprompt import backbone, cooccurrence
from polyprompt.backbone_config import BackboneConfig
from polyprompt.errors import DataError
from polyprompt.tasks import embedded_words as suite

ROOT = Path(__file__).parents[1]
Table = dict[str, Any]
some_texts = st.lists(st.lists(st.integers(0, 6), max_size=20).map(np.array), max_size=3)


def pairs(text: npt.NDArray[Any], table: npt.NDArray[np.float64]) -> None:
    """The definition, one pair after the other."""
    for i, left in enumerate(text):
        for j, right in enumerate(text):
            if 0 < abs(i - j) <= cooccurrence.WINDOW:
                table[left, right] += 1 / abs(i - j)


@given(texts=some_texts, chunk=st.integers(1, 8))
def test_each_pair_counts_by_its_distance(texts: list[npt.NDArray[Any]], chunk: int) -> None:
    expected = np.zeros((7, 7))
    for text in texts:
        pairs(text, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "CHUNK", chunk)
        found = cooccurrence.counts(texts, 7)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-12, atol=1e-12)


def test_mutual_information_is_the_formula() -> None:
    counted = np.array([[0.0, 8, 2], [8, 0, 0], [2, 0, 4]])
    context = counted.sum(axis=0) ** 0.75
    with np.errstate(divide="ignore"):
        expected = np.log(counted / counted.sum(axis=1, keepdims=True) / (context / context.sum()))
    found = cooccurrence.mutual_information(cooccurrence.sparse.csr_matrix(counted)).toarray()
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-12)
    assert (found > 0).any()
    assert (found == 0).any()


def alternating(length: int) -> npt.NDArray[Any]:
    """Pieces 0 to 19 at random, behind each its group's companion: 20 (of 0 to 9) or 21. 22 to 24 are never there."""
    drawn = np.random.default_rng(0).integers(20, size=length)
    return np.stack([drawn, 20 + drawn // 10], axis=1).ravel()


def cosines(table: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(table, dim=1)
    return unit @ unit.T


def test_pieces_in_the_same_company_are_near() -> None:
    table = torch.randn(25, 8, generator=torch.Generator().manual_seed(0))
    before = cosines(table)[:10, :20]
    assert cooccurrence.start_from(table, [alternating(20_000)], seed=0) == 22
    after = cosines(table)[:10, :20]
    others = ~torch.eye(10, dtype=torch.bool)
    assert after[:, :10][others].mean() > 0.3
    assert after[:, :10][others].mean() > after[:, 10:].mean() + 0.3
    assert abs(before[:, :10][others].mean() - before[:, 10:].mean()) < 0.1


def test_what_was_not_seen_stays_and_what_was_seen_little_stays_almost() -> None:
    drawn = torch.randn(25, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    drawn += torch.arange(8)  # a common part, as trained tables have
    table = drawn.clone()
    cooccurrence.start_from(table, [np.append(alternating(5_000), 22)], seed=0)
    assert torch.equal(table[23:], drawn[23:])
    torch.testing.assert_close(table.mean(dim=0), drawn.mean(dim=0), atol=0.25, rtol=0)
    kept = torch.nn.functional.cosine_similarity(table - table.mean(dim=0), drawn - drawn.mean(dim=0))
    assert kept[22] > 0.9 > kept[:20].max()
    assert table.std() == pytest.approx(float(drawn.std()), rel=0.2)
    again = drawn.clone()
    cooccurrence.start_from(again, [np.append(alternating(5_000), 22)], seed=0)
    torch.testing.assert_close(again, table)


def test_a_text_of_few_pieces_is_refused() -> None:
    with pytest.raises(DataError, match="3 different pieces, which make no embeddings of size 8"):
        cooccurrence.start_from(torch.randn(25, 8), [np.array([1, 2, 3, 1])], seed=0)


# -- the job


def job(table: Table, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(table))
    command = [sys.executable, str(ROOT / "jobs" / "make_embeddings.py"), "recipe.yaml", "--out", "out", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_job_fills_in_the_embeddings_and_nothing_else(text_run: Table, tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice([*suite.PEOPLE, *suite.THINGS], (40, 12))
    (tmp_path / "words.txt").write_text("\n\n".join(" ".join(line) for line in words))
    for task in text_run["tasks"][:2]:
        task["text"] = {"files": {"train": ["words.txt"]}, "held_out": 0.2}
    done = job(text_run, tmp_path, "backbone.init=random", "train.seed=3")
    assert done.returncode == 0, done.stderr
    assert "backbone.name=out" in done.stdout
    random = BackboneConfig(name=text_run["backbone"]["name"], init="random")
    untrained = backbone.load(random, train=True, precision="fp32", seed=3).model.state_dict()
    made = load_file(tmp_path / "out" / "model.safetensors")
    (told,) = (name for name, weight in made.items() if not torch.equal(weight, untrained[name]))
    assert told == "shared.weight"
    backbone.load(BackboneConfig(name=str(tmp_path / "out")), train=True, precision="fp32", seed=0)
    again = job(text_run, tmp_path, "backbone.init=random")
    assert again.returncode == 1
    assert "--out=out is there already and not empty" in again.stderr


def test_what_has_no_text_is_refused(text_run: Table, tmp_path: Path) -> None:
    done = job(text_run | {"tasks": [task for task in text_run["tasks"] if "text" not in task]}, tmp_path)
    assert done.returncode == 1
    assert "tasks: none of them is text to train on" in done.stderr
    assert not (tmp_path / "out").exists()
