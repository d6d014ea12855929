"""compute.strategy=fsdp on two processes, without Ray: as exact as it claims, and its bundles are those of any run."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import test_memory
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from polyprompt import checkpoint, memory
from polyprompt.config import RunConfig
from polyprompt.recipe import check
from polyprompt.worker import Job, Outcome, train


def alone(config: RunConfig, folder: Path) -> Outcome:
    folder.mkdir(exist_ok=True)
    return train(Job(config, folder, handle=None), torch.device("cpu"), lambda metrics, bundle: None)


def _process(rank: int, port: int, runs: list[tuple[RunConfig, Path]], counted: list[tuple[RunConfig, Path]]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for config, folder in runs:
        alone(config, folder)
    for config, file in counted:
        found = test_memory.measured(config, test_memory.built(config))
        if rank == 0:
            file.write_text(str(found))
    dist.destroy_process_group()


def in_two(runs: list[tuple[RunConfig, Path]], counted: list[tuple[RunConfig, Path]]) -> None:
    """Run two processes that train, and count the memory of a step, which the first leaves in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, runs, counted), nprocs=2)


def memory_tables(root: Path) -> list[tuple[RunConfig, Path]]:
    backbone = test_memory.made(root)["t5"]
    table: dict[str, Any] = {
        "tasks": ["embedded/nli"],
        "train": {"batch_size": 4 * test_memory.ROWS, "num_shards": 4},
        "compute": {"num_workers": 2, "strategy": "fsdp"},
    }
    trained = {"backbone": str(backbone), "method": test_memory.METHODS["hyperprompt"]}
    frozen = {"backbone": str(backbone), "method": test_memory.METHODS["smop"]}
    half = {**table, "train": {**table["train"], "precision": "bf16"}}
    configs = {"trained": {**table, **trained}, "trained_half": {**half, **trained}, "frozen_half": {**half, **frozen}}
    return [(check(config), root / f"{name}.bytes") for name, config in configs.items()]


def copied(run: Path, step: int, to: Path) -> Path:
    """Return a folder of a run that has come to this step."""
    shutil.copytree(run / "bundles" / checkpoint.folder_name(step), to / "bundles" / checkpoint.folder_name(step))
    return to


def curve(folder: Path) -> tuple[list[float], Any, str]:
    state = checkpoint.read(checkpoint.bundles(folder / "bundles")[-1]).state["train"]
    return [loss for _, loss in state["loss_curve"]], state["evaluations"], state["sequence"]


def same(folder: Path, other: Path, tolerance: float) -> None:
    (losses, scores, sequence), (expected, expected_scores, expected_sequence) = curve(folder), curve(other)
    assert sequence == expected_sequence
    assert losses == pytest.approx(expected, abs=tolerance)
    assert len(losses) == 6
    for found, wanted in zip(scores, expected_scores, strict=True):
        assert found["step"] == wanted["step"]
        assert found["mean"] == pytest.approx(wanted["mean"], abs=0.05)  # one answer of 16 may tip over


@pytest.mark.slow
def test_bundles_are_those_of_any_strategy_and_number_of_workers(small_run: dict[str, Any], tmp_path: Path) -> None:
    """In-process to step 2, two workers with shards to step 4, in-process to the end; and other kinds of runs."""
    small_run["train"] |= {"max_steps": 6, "save_steps": 2, "save_total_limit": 9, "weight_decay": 0.01}
    fsdp = {"num_workers": 2, "strategy": "fsdp"}
    trained = small_run | {"backbone": {**small_run["backbone"], "gradient_checkpointing": True}}
    frozen = small_run | {
        "method": {"name": "smop", "length": 3, "load_balance": 0.1},
        "train": {**small_run["train"], "precision": "bf16"},
        "evaluate": {"steps": 4, "mode": "generate"},
    }
    lora = small_run | {"method": {"name": "lora", "rank": 2}}
    tables = {"trained": trained, "frozen": frozen, "lora": lora}
    for name, table in tables.items():
        alone(check(table), tmp_path / name)
    runs = {name: (check({**table, "compute": fsdp}), tmp_path / f"{name}_fsdp") for name, table in tables.items()}
    copied(tmp_path / "trained", 2, tmp_path / "trained_fsdp")
    counted = memory_tables(tmp_path)
    in_two(list(runs.values()), counted)
    for config, file in counted:
        planned = memory.estimate(config, test_memory.built(config), test_memory.DATA)
        assert planned.at_once == pytest.approx(int(file.read_text()), rel=0.15), (file, planned)
    same(tmp_path / "trained_fsdp", tmp_path / "trained", 1e-4)
    same(tmp_path / "lora_fsdp", tmp_path / "lora", 1e-4)
    same(tmp_path / "frozen_fsdp", tmp_path / "frozen", 1e-2)
    back = copied(tmp_path / "trained_fsdp", 4, tmp_path / "back")
    alone(check(trained), back)
    same(back, tmp_path / "trained", 1e-4)
