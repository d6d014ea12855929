"""Heads that look for the same piece, and the job that makes them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from polyprompt import backbone, matching_heads
from polyprompt.backbone_base import Backbone
from polyprompt.backbone_config import BackboneConfig
from polyprompt.errors import ConfigError, DataError
from polyprompt.matching_heads import HEADS
from polyprompt.methods.base import Prompts

ROOT = Path(__file__).parents[1]
WINDOWS, PIECES, BETWEEN = 32, 12, 40
#: The matching heads of the embedded weights (stage 18 of their card).
OWN = [3, 4]


def embedded(init: str) -> Backbone:
    return backbone.load(BackboneConfig(init=init), train=False, precision="fp32", seed=0)


def windows() -> Tensor:
    """Each window says twelve pieces, then others, then the twelve again in another order."""
    drawn = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(WINDOWS):
        ids = 300 + torch.randperm(7000, generator=drawn)[: PIECES + BETWEEN]
        rows.append(torch.cat([ids, ids[torch.randperm(PIECES, generator=drawn)]]))
    return torch.stack(rows)


def attention(loaded: Backbone, windows_NT: Tensor) -> list[Tensor]:
    """Return each encoder layer's attention weights [N, head, T, T], from its queries, keys and position biases."""
    found: dict[tuple[int, str], Tensor] = {}
    for layer, block in enumerate(loaded.model.encoder.block):
        for name in ("q", "k"):
            getattr(block.layer[0].SelfAttention, name).register_forward_hook(
                lambda _module, _inputs, output, at=(layer, name): found.update({at: output})
            )
    embeddings = loaded.model.get_input_embeddings()(windows_NT)
    loaded.encode(embeddings, torch.ones_like(windows_NT), Prompts())
    length = windows_NT.shape[1]
    bias = loaded.model.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
    weights = []
    for layer in range(len(loaded.model.encoder.block)):
        query, key = (found[layer, name].unflatten(-1, (8, 32)).transpose(1, 2) for name in ("q", "k"))
        weights.append((query @ key.mT + bias).softmax(dim=-1))
    return weights


def found_again(weights: Tensor, windows_NT: Tensor) -> Tensor:
    """Return for each head the share of the repeated pieces that attend most to where they stand the other time."""
    twice = (windows_NT[:, :, None] == windows_NT[:, None]) & ~torch.eye(windows_NT.shape[1], dtype=torch.bool)
    repeated = twice.any(dim=-1)
    right = weights.argmax(dim=-1) == twice.long().argmax(dim=-1)[:, None]
    return right.transpose(1, 2)[repeated].double().mean(dim=0)


@pytest.mark.parametrize(("init", "there", "layers"), [("random", [], 2), ("pretrained", OWN, 4)])
@torch.no_grad()
def test_matching_heads_find_the_same_piece_and_others_do_not(init: str, there: list[int], layers: int) -> None:
    """Those that the embedded weights were trained with still do, from 0.99 in the first layer to a half in the last.

    An untrained network's layers write as much as they read: too much is taken away for those after the second.
    """
    loaded, read = embedded(init), windows()
    others = [head for head in range(8) if head not in there]
    for weights in attention(loaded, read):
        shares = found_again(weights, read)
        assert (shares[there] > 0.4).all()
        assert shares[others].max() < 0.2
    loaded = embedded(init)
    heads = matching_heads.start_from(loaded, read, seed=0)
    assert len(heads) == HEADS
    assert not set(heads) & set(there)
    others = [head for head in others if head not in heads]
    for layer, weights in enumerate(attention(loaded, read)):
        shares = found_again(weights, read)
        assert layer >= layers or shares[heads].min() > 0.8
        assert shares[others].max() < 0.2


@torch.no_grad()
def test_a_head_takes_away_part_of_what_it_finds() -> None:
    loaded = embedded("random")
    heads = matching_heads.start_from(loaded, windows(), seed=0)
    for block in loaded.model.encoder.block:
        layer = block.layer[0].SelfAttention
        for head in heads:
            rows = slice(head * 32, head * 32 + 32)
            written = layer.o.weight[:, rows] @ layer.v.weight[rows]
            strength = -float(written.trace()) / 32
            assert strength > 0
            torch.testing.assert_close(written @ written, -strength * written)


@torch.no_grad()
def test_the_heads_whose_absence_changes_least_are_taken_and_measuring_changes_nothing() -> None:
    loaded, before = embedded("random"), embedded("random").model.state_dict()
    for block in loaded.model.encoder.block:
        block.layer[0].SelfAttention.o.weight[:, 5 * 32 : 6 * 32] = 0
        block.layer[0].SelfAttention.o.weight[:, 2 * 32 : 3 * 32] *= 0.5
        block.layer[0].SelfAttention.o.weight[:, 6 * 32 : 7 * 32] *= 2
    made = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    used = matching_heads.use(loaded, windows())
    assert used[5] == 0
    assert int(used.argmax()) == 6
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in made.items())
    assert matching_heads.start_from(loaded, windows(), seed=0) == [2, 5]


def test_all_else_stays() -> None:
    loaded, before = embedded("pretrained"), embedded("pretrained").model.state_dict()
    heads = matching_heads.start_from(loaded, windows(), seed=0)
    after = loaded.model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    made = {f"encoder.block.{layer}.layer.0.SelfAttention.{name}.weight" for layer in range(4) for name in "qkvo"}
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert changed == {*made, table}
    others = [head for head in range(8) if head not in heads]
    for name in made:
        was, now = (weight.T if ".o." in name else weight for weight in (before[name], after[name]))
        was, now = was.unflatten(0, (8, 32)), now.unflatten(0, (8, 32))
        assert torch.equal(was[others], now[others])
        if ".q." not in name:
            sizes = now[heads].square().mean(dim=(1, 2)).sqrt()
            torch.testing.assert_close(sizes, was.square().mean().sqrt().expand(HEADS))
    assert torch.equal(before[table][:, others], after[table][:, others])


@given(ids=st.lists(st.integers(0, 3), min_size=6, max_size=10), seed=st.integers(0, 99))
def test_the_gap_is_that_of_all_pairs(ids: list[int], seed: int) -> None:
    keys = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = [(i, j) for i in range(len(ids)) for j in range(len(ids)) if i != j]
    same = [float(keys[i] @ keys[j]) for i, j in pairs if ids[i] == ids[j]]
    others = [float(keys[i] @ keys[j]) for i, j in pairs if ids[i] != ids[j]]
    if others:
        expected = sum(same) / len(same) - sum(others) / len(others)
        assert float(matching_heads.gap(keys, torch.tensor(ids))) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["bart", "gpt2", "umt5"])
def test_a_model_without_t5s_table_of_positions_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=f"is a '{family}' model; matching heads are for t5 and mt5"):
        matching_heads.start_from(tiny.load(family), torch.tensor([[3, 4, 3, 5]]), seed=0)


@pytest.mark.parametrize("ids", [[], [[3, 4, 5, 6]]])
def test_a_text_that_repeats_nothing_is_refused(ids: list[list[int]]) -> None:
    with pytest.raises(DataError, match=f"no piece stands twice in the {4 * len(ids)} tokens"):
        matching_heads.start_from(tiny.load("t5"), torch.tensor(ids, dtype=torch.long), seed=0)


@pytest.mark.slow
def test_the_job_makes_the_heads_and_nothing_else(text_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text_run))
    command = [sys.executable, str(ROOT / "jobs" / "make_matching_heads.py"), "recipe.yaml", "--out", "out"]
    done = subprocess.run(
        [*command, "backbone.init=random", "train.seed=3"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "backbone.name=out" in done.stdout
    shape = BackboneConfig(name=text_run["backbone"]["name"], init="random")
    before = backbone.load(shape, train=True, precision="fp32", seed=3).model.state_dict()
    made = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.split(".")[-2] for name, weight in made.items() if not torch.equal(weight, before[name])}
    assert changed == {"q", "k", "v", "o", "relative_attention_bias"}
    backbone.load(BackboneConfig(name=str(tmp_path / "out")), train=True, precision="fp32", seed=0)
