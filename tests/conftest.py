"""Fixtures that several rooms share: a tiny T5 in a folder, small task files, one Ray cluster for the session."""

import gzip
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prose import document

# Before anything imports Ray or MLflow. Tests never write into the user's home.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # it is 15: beside tests without Ray its workers got hardly any time
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S="5",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    OMP_NUM_THREADS="1",
)
for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS", "POLYPROMPT_HOME"):
    os.environ.pop(variable, None)

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real GLUE and SuperGLUE rows."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent: it holds real benchmark rows, which are not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 v1.1 of 2+2 layers in a local folder, with the project's tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from polyprompt.backbone import EMBEDDED

    folder = tmp_path_factory.mktemp("backbones") / "tiny_t5"
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=json.loads((EMBEDDED / "config.json").read_text())["vocab_size"],
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=48,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        n_positions=512,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    for file in EMBEDDED.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """Train and validation files of a two-choice task: is the first number the larger one?"""
    random, files = Random(0), {}
    for split, count in (("train", 64), ("validation", 24)):
        files[split] = tmp_path / f"{split}.jsonl"
        pairs = [random.sample(range(10), 2) for _ in range(count)]
        lines = [json.dumps({"text": f"{a} and {b}", "label": int(a > b)}) for a, b in pairs]
        files[split].write_text("\n".join(lines) + "\n")
    return files


@pytest.fixture
def small_run(tmp_path: Path, tiny_t5: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config table of a run that takes seconds: an own task and two embedded ones, dropout on, no tracking."""
    monkeypatch.chdir(tmp_path)
    own = {
        "name": "my/larger",
        "files": {split: str(path) for split, path in rows.items()},
        "input": "compare: {text}",
        "target": "label",
        "labels": {0: "no", 1: "yes"},
        "choices": ["no", "yes"],
        "metrics": ["accuracy", "macro_f1"],
    }
    return {
        "backbone": {"name": str(tiny_t5)},
        "method": {"name": "hyperprompt", "encoder_length": 3, "decoder_length": 2, "reduction": 4},
        "tasks": [own, "embedded/nli", "embedded/similarity"],
        "data": {
            "max_input_tokens": 64,
            "max_train_examples": 64,
            "max_validation_examples": 16,
            "cache_dir": str(tiny_t5.parent / "cache"),
        },
        "mixture": {"kind": "uniform"},
        "train": {"learning_rate": 1e-3, "max_steps": 12, "batch_size": 12, "num_shards": 4, "logging_steps": 1},
        "evaluate": {"steps": 4},
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    """The folder of a finished run on an own task, a choice task and a free-text one."""
    from polyprompt.ray_train import run
    from polyprompt.recipe import check

    root = tmp_path_factory.mktemp("trained")
    files = {}
    for split, count in (("train", 40), ("validation", 12)):
        pairs = [(a, b) for a in range(8) for b in range(8) if a != b][:count]
        files[split] = root / f"{split}.jsonl"
        files[split].write_text(
            "".join(json.dumps({"text": f"{a} and {b}", "label": int(a > b)}) + "\n" for a, b in pairs)
        )
    table = {
        "backbone": {"name": str(tiny_t5), "trainable": True},
        "method": {"name": "hyperprompt", "encoder_length": 3, "decoder_length": 2, "reduction": 4},
        "tasks": [
            {
                "name": "my/larger",
                "files": {split: str(path) for split, path in files.items()},
                "input": "compare: {text}",
                "target": "label",
                "labels": {0: "no", 1: "yes"},
                "metrics": ["accuracy"],
            },
            "embedded/nli",
            "embedded/similarity",
        ],
        "data": {
            "max_input_tokens": 48,
            "max_train_examples": 32,
            "max_validation_examples": 12,
            "cache_dir": str(root),
        },
        "train": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 12, "num_shards": 2},
        "tracking": {"enabled": False},
    }
    out = root / "run"
    run(check(table), out=out, say=lambda line: None)
    return out


@pytest.fixture
def job_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a job's command line in this process, which saves its imports: name, arguments → status, stdout, stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        path = ROOT / "jobs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"job_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            status = module.main()
        except SystemExit as ended:  # argparse
            status = ended.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Twenty documents in one gzipped file."""
    path = tmp_path / "books.txt.gz"
    path.write_bytes(gzip.compress("\n\n".join("\n".join(document(i)) for i in range(20)).encode()))
    return path


@pytest.fixture
def text_run(small_run: dict[str, Any], books: Path) -> dict[str, Any]:
    """Span corruption, a prefix language model and a supervised task in one mixture."""
    text = {"files": {"train": [str(books)]}, "held_out": 0.2}
    small_run["tasks"] = [
        {"name": "corpus/spans", "text": text, "input_tokens": 32},
        {"name": "corpus/prefix", "text": text, "objective": "prefix_lm", "input_tokens": 24},
        small_run["tasks"][0],
    ]
    small_run["method"] = "full"
    del small_run["data"]["max_train_examples"]
    return small_run


@pytest.fixture(scope="session")
def migrated_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made; migrating one takes seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")
    return file


@pytest.fixture
def store(tmp_path: Path, migrated_db: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a store in the default place."""
    shutil.copy(migrated_db, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray on this machine for the whole session."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"py_modules": [str(ROOT / "platform" / "polyprompt")]},
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    yield
    ray.shutdown()


@pytest.fixture
def shipped(ray_cluster: None, request: pytest.FixtureRequest) -> None:
    """Send what the test's module defines to the workers by value: they have no tests folder."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(request.module)


@pytest.fixture
def drill(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Takes the line of a fault: what was done, the steps that had to be trained again, is the curve the unbroken
    run's? They are shown as a table at the end."""

    def tell(done: str, *, lost: int | str, equal: bool | str) -> None:
        curve = ("equal" if equal else "NOT EQUAL") if isinstance(equal, bool) else equal
        record_property("drill", (done, str(lost), curve))

    return tell


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("faults"):
        item.user_properties.append(("fault", item.nodeid))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome) if r.when == "call"]
    lines = []
    for report in reports:
        kind = {"drill"} if report.passed else {"drill", "fault"}
        told = [value for key, value in report.user_properties if key in kind]
        lines += [(value, "?", "FAILED") if isinstance(value, str) else value for value in told]
    if lines:
        terminalreporter.section("faults: what was done | steps lost | loss curve and scores against the unbroken run")
        for line in lines:
            terminalreporter.write_line(" | ".join(line))
