"""Scores a model on the validation splits: predictions, then each task's official metrics, then their mean."""

import math
import socket
from collections.abc import Sequence

import psutil
import torch

from polyprompt import memory
from polyprompt.collation import collate, length_batches
from polyprompt.config import RunConfig
from polyprompt.data import AnyData, Split, TaskData, TextData, text_metrics
from polyprompt.loop import Scores
from polyprompt.model import PromptedModel
from polyprompt.precision import autocast
from polyprompt.tasks import metrics
from polyprompt.workers import Workers


@torch.inference_mode()
def evaluate(model: PromptedModel, data: Sequence[AnyData], config: RunConfig, workers: Workers) -> Scores:
    """Score every task. The batches are the same for any number of workers, which take turns at them."""
    was_training = model.training
    model.eval()
    batch_size = config.evaluate.batch_size or _rows_that_fit(model, data, config, workers)
    scores = {
        task.task.name: _text_scores(model, index, task, config, workers, batch_size)
        if isinstance(task, TextData)
        else _task_scores(model, index, task, config, workers, batch_size)
        for index, task in enumerate(data)
    }
    model.train(was_training)
    return scores


def _rows_that_fit(model: PromptedModel, data: Sequence[AnyData], config: RunConfig, workers: Workers) -> int:
    """Return the largest batch that every worker has memory for: batches are the same on all."""
    device, machine = next(model.parameters()).device, socket.gethostname()
    neighbours = workers.gather(machine).count(machine)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = psutil.virtual_memory().available // neighbours
    return min(workers.gather(memory.evaluation_rows(config, model, data, free)))


def _task_scores(
    model: PromptedModel, index: int, data: TaskData, config: RunConfig, workers: Workers, batch_size: int
) -> dict[str, float]:
    split = data.validation
    predicted: dict[int, str] = {}
    longest_target = data.train.longest[1]
    for rows in workers.mine(length_batches(split.input_lengths, batch_size)):
        predicted.update(zip(rows, _predict(model, index, split, rows, config, longest_target), strict=True))
    everywhere: dict[int, str] = {}
    for part in workers.gather(predicted):
        everywhere.update(part)
    order = range(len(split))
    return metrics.compute(data.task.metrics, [everywhere[i] for i in order], split.examples(order))


def _text_scores(
    model: PromptedModel, index: int, data: TextData, config: RunConfig, workers: Workers, batch_size: int
) -> dict[str, float]:
    """Return the loss of the held-out text, a mean over its target tokens."""
    split, device = data.validation, next(model.parameters()).device
    parts: list[tuple[int, float]] = []
    for rows in workers.mine(length_batches(split.input_lengths, batch_size)):
        batch = collate(split.rows(rows), [index] * len(rows), model.backbone.tokenizer.pad_token_id).to(device)
        with autocast(config.train.precision, device.type):
            loss = model(batch.input_ids_BT, batch.mask_BT, batch.labels_BS, batch.task_B)
        parts += zip(rows, loss.nll_B.tolist(), strict=True)
    # Summed in the order of the rows, whichever process scored them.
    everywhere = dict(pair for part in workers.gather(parts) for pair in part)
    return text_metrics(math.fsum(everywhere.values()) / int(split.target_lengths.sum()))


def _predict(
    model: PromptedModel, task: int, split: Split, rows: Sequence[int], config: RunConfig, longest_target: int
) -> list[str]:
    """Predict the texts of some rows of one task.

    Rank: the choice with the highest log-likelihood of its whole token sequence, end token included, as in Sanh et al.
    2022 (T0), section 5.2. Generate: greedy, at most as long as the longest training target.
    """
    device = next(model.parameters()).device
    batch = collate(split.rows(rows), [task] * len(rows), model.backbone.tokenizer.pad_token_id).to(device)
    examples = split.examples(rows)
    with autocast(config.train.precision, device.type):
        if config.evaluate.mode == "rank" and all(example.choices for example in examples):
            choices = [split.choice_ids(row) for row in rows]
            scores = model.score_choices(batch.input_ids_BT, batch.mask_BT, batch.task_B, choices)
            best = [max(range(len(row)), key=row.__getitem__) for row in scores]
            return [example.choices[choice] for example, choice in zip(examples, best, strict=True)]
        ids = model.generate(batch.input_ids_BT, batch.mask_BT, batch.task_B, max_new_tokens=longest_target)
    return [text.strip() for text in model.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]
