"""From a finished pre-training run to a backbone folder: weights, tokenizer and a model card."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyprompt import checkpoint
from polyprompt.backbone_base import Backbone
from polyprompt.config import RunConfig
from polyprompt.data import AnyData, TextData, majority
from polyprompt.evaluate import evaluate
from polyprompt.loop import Scores
from polyprompt.plan import build
from polyprompt.result import RunResult
from polyprompt.task_configs import TextConfig, TextTaskConfig
from polyprompt.text_store import TextSplit
from polyprompt.workers import Workers

#: Points of the loss curve in a card.
CURVE_POINTS = 12
#: Training rows that a unigram model is fitted to.
UNIGRAM_ROWS = 20_000


def export(config: RunConfig, result: RunResult, folder: Path) -> Path:
    """Write the run's last weights as a folder that `backbone.name` takes, whole or not at all; return it.

    The card states each text's loss before and after training; so the starting model is evaluated here.
    """
    model, data = build(config)
    before = evaluate(model, data, config, Workers(config.train.num_shards, config.compute.summing))
    model.load_trained_state(dict(checkpoint.read(Path(result.last_bundle)).tensors))
    with checkpoint.filled(folder) as draft:
        model.backbone.save(draft)
        (draft / "README.md").write_text(card(config, result, model.backbone, data, before), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
    return folder


def card(config: RunConfig, result: RunResult, backbone: Backbone, data: Sequence[AnyData], before: Scores) -> str:
    """Return the model card (Markdown): what it was trained on and how, its scores and its loss curve."""
    parts = (
        _head(config, result, backbone),
        _corpus(config, result, data),
        _texts(result, data, before, len(backbone.tokenizer)),
        _scores(result, data, before),
        _curve(result),
    )
    return "\n\n".join(filter(None, ("\n".join(part) for part in parts))) + "\n"


def _head(config: RunConfig, result: RunResult, backbone: Backbone) -> Iterator[str]:
    train = config.train
    kind, tag = "An encoder-decoder", "text2text-generation"
    if backbone.dims(1).encoder is None:
        kind, tag = "A decoder-only model", "text-generation"
    start = "untrained weights in the shape" if config.backbone.init == "random" else "the weights"
    yield f"---\nlibrary_name: transformers\npipeline_tag: {tag}\n---\n"
    yield f"# {result.name}\n"
    yield (
        f"{kind} of {result.num_backbone_parameters:,} parameters, trained by polyprompt's "
        f"`jobs/pretrain.py` from {start} of `{Path(config.backbone.name).name}`: {result.num_steps:,} steps of "
        f"{train.batch_size} rows, {round(result.tokens_per_second * result.train_seconds / 1e6):,} million input "
        f"tokens, in {train.precision}; {train.optimizer}, learning rate {train.learning_rate:g} "
        f"({train.lr_scheduler_type}, warm-up {train.warmup_ratio:.0%}), seed {train.seed}; "
        f"{result.train_seconds / 60:.0f} minutes of training on {max(result.num_workers, 1)} process(es)."
    )


def _corpus(config: RunConfig, result: RunResult, data: Sequence[AnyData]) -> Iterator[str]:
    yield "## Trained on\n"
    yield "| task | what | examples seen |"
    yield "|---|---|---|"
    configs = {task.name: task.text for task in config.tasks if isinstance(task, TextTaskConfig)}
    for task in data:
        if len(task.train):
            what = _text(task, configs[task.task.name]) if isinstance(task, TextData) else "supervised"
            yield f"| {task.task.name} | {what} | {result.examples_seen[task.task.name]:,} |"


def _text(data: TextData, config: TextConfig) -> str:
    where = [config.hub.path] if config.hub else [path.name for path in (config.files or {})["train"]]
    objective = data.task.objective.replace("_", " ")
    return f"{objective}; {data.train.num_tokens:,} tokens of {', '.join(f'`{name}`' for name in where)}"


def _texts(result: RunResult, data: Sequence[AnyData], before: Scores, vocab_size: int) -> Iterator[str]:
    texts = [task for task in data if isinstance(task, TextData)]
    if not texts:
        return
    last = result.evaluations[-1]["tasks"]
    yield "## Losses on held-out text\n"
    yield (
        "Nats a target token. Unigram: fitted to training targets, counts raised by one. Best unigram: fitted to these "
        "very targets, so no unigram model comes below it.\n"
    )
    yield "| text | unigram | best unigram | before | after |"
    yield "|---|---|---|---|---|"
    for text in texts:
        held_out, name = text.validation, text.task.name
        sources = [text] if len(text.train) else [other for other in texts if len(other.train)]
        fitted: Counter[int] = sum(
            (TextSplit(s.train.folder, s.train.name, held_out.objective, UNIGRAM_ROWS).target_counts for s in sources),
            Counter(),
        )
        values = (
            held_out.unigram_loss(fitted, vocab_size),
            held_out.unigram_loss(),
            before[name]["loss"],
            last[name]["loss"],
        )
        yield f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |"


def _scores(result: RunResult, data: Sequence[AnyData], before: Scores) -> Iterator[str]:
    tasks = [task for task in data if not isinstance(task, TextData)]
    if not tasks:
        return
    last = result.evaluations[-1]["tasks"]
    yield "## Scores on held-out examples\n"
    yield "Majority: always the most frequent answer.\n"
    yield "| task | majority | before | after |"
    yield "|---|---|---|---|"
    for task in tasks:
        name = task.task.name
        values = (majority(task)["score"], before[name]["score"], last[name]["score"])
        yield f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |"


def _curve(result: RunResult) -> Iterator[str]:
    yield "## Training loss\n"
    yield "| step | loss |"
    yield "|---|---|"
    curve = result.loss_curve
    wanted = sorted({round(i * (len(curve) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
    for step, loss in (curve[i] for i in wanted):
        yield f"| {int(step):,} | {loss:.3f} |"
