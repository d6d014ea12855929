"""Runs that share a frozen backbone while they train are, each, the run that trains alone."""

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mlflow import MlflowClient

from polyprompt import checkpoint, packable
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import METHOD_NAMES
from polyprompt.errors import ConfigError, NotFiniteError
from polyprompt.methods.base import Method
from polyprompt.methods.made import MadeByTask
from polyprompt.pack import Pack, groups
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.worker import Job, Outcome, train

Table = dict[str, Any]
Announce = Callable[[Mapping[str, float], Path], None]
CPU = torch.device("cpu")
#: Different in whatever a run has of its own. Dropout is on in the backbone.
RUNS: dict[str, Table] = {
    "smop": {"method": {"name": "smop", "num_prompts": 4, "length": 3}},
    "smop in pieces": {
        "method": {"name": "smop", "num_prompts": 2, "length": 1, "routing": "gumbel", "load_balance": 0.01},
        "train": {"seed": 7, "num_shards": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.1, "batch_size": 9},
    },
    "prompt": {
        "method": {"name": "prompt_tuning", "length": 2},
        "train": {"optimizer": "adafactor", "lr_scheduler_type": "linear", "warmup_ratio": 0.5},
    },
    "long prompt": {
        "method": {"name": "prompt_tuning", "length": 90, "per_task": True},
        "train": {"max_grad_norm": 0.1, "weight_decay": 0.1, "loss_reduction": "example"},
    },
    "prefix": {
        "method": {"name": "prefix_tuning", "encoder_length": 4, "decoder_length": 2},
        "mixture": {"kind": "weights", "weights": {"embedded/nli": 3.0}},
    },
    "dept": {"method": {"name": "dept", "length": 2, "rank": 2, "max_positions": 16}, "train": {"num_shards": 1}},
}


def table_of(small_run: Table, **changes: Table) -> Table:
    """small_run with sections changed; every step is logged, the last one evaluated."""
    table = deepcopy(small_run)
    table["evaluate"] = {}
    table["train"] |= {"max_steps": 4, "num_shards": 2, "learning_rate": 0.03}
    for section, values in changes.items():
        table[section] = values if section == "method" else {**table.get(section, {}), **values}
    return table


def train_run(
    table: Table, folder: Path, announce: Announce = lambda metrics, bundle: None, seat: Any = None
) -> Outcome:
    folder.mkdir(exist_ok=True)
    return train(Job(check(table), folder, handle=None), CPU, announce, seat)


def begin(threads: ThreadPoolExecutor, pack: Pack, work: Callable[..., Any], *args: Any) -> "Future[Any]":
    """Start a run in a pack."""

    def seated() -> Any:
        with pack.seat() as seat:
            return work(*args, seat=seat)

    return threads.submit(seated)


def tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    newest = checkpoint.newest_whole(folder / "bundles")
    assert newest is not None
    return checkpoint.read(newest).tensors


def same(first: Outcome, second: Outcome) -> None:
    """Losses to 1e-6; what is counted, exactly."""
    a, b = first.state, second.state
    assert [step for step, _ in a.loss_curve] == [step for step, _ in b.loss_curve]
    assert [loss for _, loss in a.loss_curve] == pytest.approx([loss for _, loss in b.loss_curve], rel=1e-6, abs=1e-6)
    assert a.sequence == b.sequence
    assert a.examples_seen == b.examples_seen
    assert a.best_mean == pytest.approx(b.best_mean)


def test_each_run_trains_as_if_alone(small_run: Table, tmp_path: Path) -> None:
    tables = {name: table_of(small_run, **changes) for name, changes in RUNS.items()}
    alone = {name: train_run(table, tmp_path / f"{name} alone") for name, table in tables.items()}
    num_rows: list[int] = []
    with Pack() as pack, ThreadPoolExecutor() as threads:
        config = check(tables["smop"])
        shared = pack.load(config.backbone, train=False, precision="fp32", seed=0)
        shared.model.encoder.block[0].register_forward_hook(
            lambda module, args, output: num_rows.append(len(args[0])) if module.training else None
        )
        runs = {name: begin(threads, pack, train_run, table, tmp_path / name) for name, table in tables.items()}
        outcomes = {name: run.result() for name, run in runs.items()}
    for name, outcome in outcomes.items():
        same(outcome, alone[name])
        before, after = tensors(tmp_path / f"{name} alone"), tensors(tmp_path / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)
    # A shard has six rows at most.
    assert max(num_rows) > 6
    pieces = [4 * check(t).train.num_shards * check(t).train.gradient_accumulation_steps for t in tables.values()]
    assert len(num_rows) < sum(pieces)


def test_runs_come_go_fail_and_go_on(small_run: Table, tmp_path: Path) -> None:
    """One is added and one stopped on the way, one ends in NaN; the stopped one goes on in another pack."""
    train_keys = {"max_steps": 6, "save_steps": 1}
    long, late, stopped = (
        table_of(small_run, **{**RUNS[name], "train": {**RUNS[name].get("train", {}), **train_keys}})
        for name in ("smop", "prefix", "smop in pieces")
    )
    nan = table_of(small_run, **RUNS["prompt"])
    nan["train"] |= {"learning_rate": 1e39, "max_grad_norm": None, "optimizer": "adamw"}
    alone = [train_run(table, tmp_path / f"alone {i}") for i, table in enumerate((long, late, stopped))]

    class Stopped(Exception):
        """Stands for whatever ends a run."""

    added: list[Future[Any]] = []
    with Pack() as pack, ThreadPoolExecutor() as threads:

        def add(metrics: Mapping[str, float], bundle: Path) -> None:
            if metrics["step"] == 2:
                logging.getLogger("polyprompt").warning("said by one run")
                added.append(begin(threads, pack, train_run, late, tmp_path / "late"))

        def stop(metrics: Mapping[str, float], bundle: Path) -> None:
            if metrics["step"] == 3:
                raise Stopped

        first = begin(threads, pack, train_run, long, tmp_path / "long", add)
        second = begin(threads, pack, train_run, stopped, tmp_path / "stopped", stop)
        third = begin(threads, pack, train_run, nan, tmp_path / "nan")
        same(first.result(), alone[0])
        same(added[0].result(), alone[1])
        with pytest.raises(Stopped):
            second.result()
        with pytest.raises(NotFiniteError):
            third.result()
    said = {name: "said by one run" in (tmp_path / name / "run.log").read_text() for name in ("long", "stopped", "nan")}
    assert said == {"long": True, "stopped": False, "nan": False}
    with Pack() as pack, ThreadPoolExecutor() as threads:
        beside = begin(threads, pack, train_run, long, tmp_path / "beside")
        same(begin(threads, pack, train_run, stopped, tmp_path / "stopped").result(), alone[2])
        same(beside.result(), alone[0])


def test_a_packed_run_leaves_what_a_lone_one_does(small_run: Table, store: Path) -> None:
    """Files, result, metrics and the run in MLflow."""
    tracking = {"enabled": True, "experiment": "test", "system_metrics_interval_seconds": None}
    table = table_of(small_run, **RUNS["smop"], tracking=tracking)
    other = table_of(small_run, **RUNS["prompt"], tracking=tracking)
    lone = run(check(table), out=store / "lone", say=lambda line: None)

    def whole_run(table: Table, out: str, seat: Any) -> RunResult:
        return run(check(table), out=store / out, say=lambda line: None, seat=seat)

    with Pack() as pack, ThreadPoolExecutor() as threads:
        beside = begin(threads, pack, whole_run, other, "other")
        packed = begin(threads, pack, whole_run, table, "packed").result()
        beside.result()
    files = [{str(f.relative_to(store / out)) for f in (store / out).rglob("*")} for out in ("lone", "packed")]
    assert files[0] == files[1]
    assert (store / "lone" / "config.yaml").read_text() == (store / "packed" / "config.yaml").read_text()
    same_fields = ("method", "num_trained_parameters", "sequence", "examples_seen", "best_step", "inference_flops")
    assert {key: getattr(lone, key) for key in same_fields} == {key: getattr(packed, key) for key in same_fields}
    points = [
        [(point["step"], sorted(point)) for point in map(json.loads, (store / out / "metrics.jsonl").open())]
        for out in ("lone", "packed")
    ]
    assert points[0] == points[1]
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    records = [client.get_run(result.run_id) for result in (lone, packed)]
    assert records[0].data.params == records[1].data.params
    assert records[0].data.metrics.keys() == records[1].data.metrics.keys()
    assert records[1].info.status == "FINISHED"
    assert records[0].data.metrics["train/loss"] == pytest.approx(records[1].data.metrics["train/loss"], rel=1e-6)
    assert RunResult.read(store / "packed" / "result.json") == packed


def test_half_precision(small_run: Table, tmp_path: Path) -> None:
    tables = [table_of(small_run, **RUNS[name]) for name in ("smop", "prefix")]
    for table in tables:
        table["train"] |= {"precision": "bf16", "max_steps": 1}
    alone = [train_run(table, tmp_path / f"alone {i}").state.loss_curve for i, table in enumerate(tables)]
    with Pack() as pack, ThreadPoolExecutor() as threads:
        runs = [begin(threads, pack, train_run, table, tmp_path / f"packed {i}") for i, table in enumerate(tables)]
        for curve, packed in zip(alone, runs, strict=True):
            assert packed.result().state.loss_curve[0][1] == pytest.approx(curve[0][1], rel=5e-3)


def test_every_run_has_a_random_stream_of_its_own() -> None:
    """Also a run that draws between two requests."""
    drawn: dict[int, list[float]] = {}
    both = threading.Barrier(2)

    def draw(seed: int, pack: Pack) -> None:
        both.wait()
        with pack.seat() as seat:
            torch.manual_seed(seed)
            weight = torch.ones(1, requires_grad=True)
            drawn[seed] = []
            for _ in range(3):
                drawn[seed].append(torch.rand(1).item())
                seat.backward(weight.sum())

    with Pack() as pack, ThreadPoolExecutor() as threads:
        list(threads.map(draw, (1, 2), (pack, pack)))
    for seed, values in drawn.items():
        torch.manual_seed(seed)
        assert values == [torch.rand(1).item() for _ in range(3)]


def test_a_failure_of_the_backbone_is_every_runs() -> None:
    with Pack() as pack, ThreadPoolExecutor() as threads:

        def ask() -> None:
            with pack.seat() as seat, pytest.raises(RuntimeError, match="does not require grad"):
                seat.backward(torch.ones(1))

        for future in [threads.submit(ask) for _ in range(2)]:
            future.result()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(4, 10), (4, 10)], [[0, 1]]),
        ([(4, 10), (4, 100), (4, 90)], [[1, 2], [0]]),
        ([(1, 10), (9, 100)], [[1, 0]]),  # ten rows of 100 tokens hold 910 real ones
        ([(4, 60), (4, 100)], [[1, 0]]),
        ([(4, 40), (4, 100)], [[1], [0]]),
    ],
)
def test_runs_of_like_length_share_a_batch(sizes: list[tuple[int, int]], expected: list[list[int]]) -> None:
    assert groups(sizes) == expected


# --- what cannot be packed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "hyperprompt"}}, "method.name=hyperprompt trains the backbone here. Set backbone.traina"),
        ({"method": {"name": "lora"}}, "works inside it"),
        ({"backbone": {"trainable": "layer_norms"}}, "Set backbone.trainable=false"),
        ({"backbone": {"gradient_checkpointing": True}}, "Set backbone.gradient_checkpointing=false"),
        ({"compute": {"num_workers": 1}}, "Set compute.num_workers=0"),
    ],
)
def test_what_cannot_share_is_refused(small_run: Table, changes: Table, message: str) -> None:
    table = table_of(small_run, **{"method": {"name": "smop"}, **changes})
    with pytest.raises(ConfigError, match=message):
        packable.check(check(table))


def test_methods_inside_the_backbone_are_known() -> None:
    """A method that joins the backbone, or gives adapters, must be named in packable.INSIDE."""
    prefix = "polyprompt.methods."
    every = [*Method.__subclasses__(), *MadeByTask.__subclasses__()]
    trained = [method for method in every if method.__module__.startswith(prefix)]
    inside = {
        method.__module__.removeprefix(prefix)
        for method in trained
        if method.join is not Method.join or hasattr(sys.modules[method.__module__], "Adapters")
    }
    assert {*inside, "full"} == set(packable.INSIDE)
    assert set(packable.INSIDE) < set(METHOD_NAMES)


def test_all_runs_have_the_same_backbone() -> None:
    pack = Pack()
    config = BackboneConfig(name=str(tiny.folder()))
    loaded = pack.load(config, train=False, precision="fp32", seed=1)
    assert pack.load(config, train=False, precision="fp32", seed=2) is loaded
    other = config.model_copy(update={"dropout": 0.0})
    for stranger, precision, seed in ((other, "fp32", 1), (config, "bf16", 1)):
        with pytest.raises(ConfigError, match="need the same one"):
            pack.load(stranger, train=False, precision=precision, seed=seed)  # type: ignore[arg-type]
    drawn = config.model_copy(update={"init": "random"})
    pack = Pack()
    pack.load(drawn, train=False, precision="fp32", seed=1)
    with pytest.raises(ConfigError, match="use one seed"):
        pack.load(drawn, train=False, precision="fp32", seed=2)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_only_backbones_of_t5s_family_are_shared(family: str) -> None:
    config = BackboneConfig(name=str(tiny.folder(family)))
    with pytest.raises(ConfigError, match="not of T5's family"):
        Pack().load(config, train=False, precision="fp32", seed=0)
