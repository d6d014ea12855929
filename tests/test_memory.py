"""What a worker needs in memory, against what torch's allocator counts in a real step on real tensors."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from polyprompt import backbone as loading
from polyprompt import memory, methods, sharding
from polyprompt.batches import GlobalBatch, Shard
from polyprompt.collation import Batch
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.evaluate import evaluate
from polyprompt.loop import _gradients
from polyprompt.model import PromptedModel
from polyprompt.optim import Optim
from polyprompt.plan import build, plan, rehearse
from polyprompt.recipe import check
from polyprompt.router_health import num_columns
from polyprompt.workers import Workers

LENGTH, TARGETS, ROWS, TASKS = 96, 24, 8, 3
ALONE = Workers(4, "exact")
#: All of the data that is asked for.
DATA: Any = [SimpleNamespace(train=SimpleNamespace(longest=(LENGTH, TARGETS)))] * TASKS


def made(root: Path, vocab_size: int = 512, tokenizer: Path | None = None) -> dict[str, Path]:
    """Leave models of some MiB, so that it matters what is kept of weights and of activations."""
    size: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_layers": 3,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_heads": 4,
    }
    t5 = transformers.T5Config(**size, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    llama = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, attention_dropout=0.1,
    )  # fmt: skip
    folders = {}
    for name, model_class, config in (
        ("t5", transformers.T5ForConditionalGeneration, t5),
        ("llama", transformers.LlamaForCausalLM, llama),
    ):
        folders[name] = root / name
        model_class(config).save_pretrained(folders[name])
        transformers.AutoTokenizer.from_pretrained(tokenizer or tiny.folder(name)).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As backbones, with a tokenizer that knows words."""
    vocab_size = json.loads((loading.EMBEDDED / "config.json").read_text())["vocab_size"]
    return made(tmp_path_factory.mktemp("readers"), vocab_size, loading.EMBEDDED)


def built(config: RunConfig) -> PromptedModel:
    loaded = loading.load(
        config.backbone, train=config.train_backbone, precision=config.train.precision, seed=config.train.seed
    )
    return PromptedModel(loaded, methods.build(config.method, loaded.dims(TASKS), seed=0))


def allocations(tree: Any) -> Iterator[tuple[int, int]]:
    for event in tree:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measured(config: RunConfig, model: PromptedModel) -> int:
    """Take a step, then count the second: moments are there then."""
    workers = Workers(config.train.num_shards, config.compute.summing)
    if config.compute.strategy == "fsdp":
        sharding.shard(model, config.train.precision, torch.device("cpu"), workers.num)
    optim = Optim(config.train, model.named_groups(), model.undecayed())
    rows = -(-config.train.batch_size // config.train.num_shards // config.train.gradient_accumulation_steps)
    micro = Batch(
        torch.randint(3, 60, (rows, LENGTH)), torch.ones(rows, LENGTH, dtype=torch.long),
        torch.randint(3, 60, (rows, TARGETS)), torch.arange(rows) % TASKS,
    )  # fmt: skip
    passes = (micro,) * config.train.gradient_accumulation_steps
    shards = tuple(Shard(i, i, passes, ()) for i in workers.shards)
    batch = GlobalBatch(
        1, shards, dict.fromkeys(range(TASKS), 1), config.train.batch_size, 1, config.train.batch_size * TARGETS, ""
    )
    module = workers.start(model, num_totals=TASKS * (3 + num_columns(model.method.num_routes)))
    model.train()
    _gradients(module, batch, TASKS, config, workers)
    optim.step()
    state = [t for kept in optim.optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor)]
    standing = sum(own(t).nbytes for t in [*model.parameters(), *state])
    standing += workers._buffer.nbytes if config.compute.summing == "exact" else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _gradients(module, batch, TASKS, config, workers)
        optim.step()
    return standing + peak(seen)


def peak(seen: profile) -> int:
    """Return the most bytes at once of what was allocated meanwhile."""
    live, most = 0, 0
    for _, size in sorted(allocations(seen.profiler.kineto_results.experimental_event_tree())):
        live += size
        most = max(most, live)
    return most


METHODS: dict[str, dict[str, Any]] = {
    "hyperprompt": {"name": "hyperprompt", "encoder_length": 5, "decoder_length": 3, "reduction": 8},
    "hyperprompt_decoder": {"name": "hyperprompt", "stacks": "decoder", "decoder_length": 3, "reduction": 8},
    "smop": {"name": "smop", "length": 5},
    "full": {"name": "full"},
}


def _case(
    backbone: str, method: str, trainable: bool, precision: str, checkpointing: bool = False, **train: Any
) -> Any:
    name = "-".join([backbone, method, "trained" if trainable else "frozen", precision, *map(str, train.values())])
    return pytest.param(
        backbone, method, trainable, {"precision": precision, **train}, checkpointing,
        id=name + "-checkpointing" * checkpointing,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "method", "trainable", "train", "checkpointing"),
    [
        _case("t5", "hyperprompt", True, "fp32"),
        _case("t5", "hyperprompt", True, "bf16"),
        _case("t5", "hyperprompt", False, "fp32"),
        _case("t5", "hyperprompt", True, "fp32", True),
        _case("t5", "smop", False, "bf16"),
        _case("t5", "smop", False, "fp32", True),
        _case("t5", "smop", True, "fp32", gradient_accumulation_steps=2),
        _case("t5", "full", True, "fp32", optimizer="adafactor"),
        _case("llama", "hyperprompt_decoder", True, "fp32"),
        _case("llama", "smop", False, "bf16"),
    ],
)
def test_memory_is_within_15_percent_of_what_a_step_takes(
    backbones: dict[str, Path],
    backbone: str,
    method: str,
    trainable: bool,
    train: dict[str, Any],
    checkpointing: bool,
) -> None:
    passes = train.get("gradient_accumulation_steps", 1)
    config = check(
        {
            "backbone": {
                "name": str(backbones[backbone]),
                "trainable": trainable,
                "gradient_checkpointing": checkpointing,
            },
            "method": METHODS[method],
            "tasks": ["embedded/nli"],
            "train": {"batch_size": 2 * ROWS * passes, "num_shards": 2, **train},
        }
    )
    model = built(config)
    planned = memory.estimate(config, model, DATA).at_once
    assert planned == pytest.approx(measured(config, model), rel=0.15)


@pytest.mark.parametrize(
    ("backbone", "method", "mode", "precision"),
    [
        ("t5", "smop", "rank", "fp32"),
        ("t5", "hyperprompt", "rank", "fp32"),
        ("t5", "full", "generate", "bf16"),
        ("llama", "smop", "rank", "fp32"),
        ("llama", "hyperprompt_decoder", "generate", "fp32"),
    ],
)
def test_an_evaluation_takes_the_rows_that_its_memory_holds(
    readers: dict[str, Path], backbone: str, method: str, mode: str, precision: str
) -> None:
    """At most the memory that it may have, and not much less; the scores are those of any other batch size."""
    free = 2 * 10**7
    table = {
        "backbone": {"name": str(readers[backbone])},
        "method": METHODS[method],
        "tasks": ["embedded/nli", "embedded/copa"],
        "data": {"max_train_examples": 50, "max_validation_examples": 400},
        "train": {"precision": precision},
        "evaluate": {"mode": mode},
    }
    model, data = build(check(table))
    rows = memory.evaluation_rows(check(table), model, data, free)
    assert 1 < rows < memory.MOST_ROWS
    assert memory.evaluation_rows(check(table), model, data, 10 * free) > 2 * rows
    assert memory.evaluation_rows(check(table), model, data, 0) == 1
    scores = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        scores.append(evaluate(model, data, check({**table, "evaluate": {"mode": mode, "batch_size": rows}}), ALONE))
    assert 0.3 < peak(seen) / (free * memory.EVALUATION_SHARE) < 1
    scores.append(evaluate(model, data, check({**table, "evaluate": {"mode": mode, "batch_size": None}}), ALONE))
    assert scores[0] == scores[1]


def test_a_backbone_without_weights_is_planned_by_its_shapes(
    small_run: dict[str, Any], tiny_t5: Path, tmp_path: Path
) -> None:
    """On two workers a shard is a half; what is whole for a while is a part of the model."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_t5, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    table = {**small_run, "backbone": {"name": str(bare)}, "train": {**small_run["train"], "num_shards": 4}}
    with pytest.raises(ConfigError, match="cannot be loaded"):
        plan(check(table))
    compute = {"num_workers": 2, "gradient_sum": "ddp"}
    with_weights = rehearse(check({**table, "backbone": {"name": str(tiny_t5)}, "compute": compute}))
    ddp, fsdp = (
        rehearse(check({**table, "compute": {**compute, "strategy": strategy}})) for strategy in ("ddp", "fsdp")
    )
    assert with_weights.without_weights is None
    assert ddp.without_weights == f"there are none in {bare}"
    assert ddp.memory is not None
    assert fsdp.memory is not None
    assert with_weights.memory is not None
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert with_weights.memory.parts[part] == ddp.memory.parts[part]
    for part in ("weights", "gradients", "optimizer"):
        assert fsdp.memory.parts[part] == pytest.approx(ddp.memory.parts[part] / 2, rel=0.1)  # small ones are padded
    assert fsdp.memory.at_once < ddp.memory.at_once
    light = {"name": str(bare), "gradient_checkpointing": True}
    on_gpu = rehearse(check({**table, "backbone": light, "compute": {"num_workers": 1, "use_gpu": True}}))
    assert on_gpu.memory is not None
    assert on_gpu.memory.parts["activations"] < ddp.memory.parts["activations"]
    sources = {**table, "method": {"name": "smop", "init": "file", "init_file": str(tmp_path / "prompts.safetensors")}}
    with pytest.raises(ConfigError, match="check it on a machine with the weights"):
        rehearse(check(sources))
