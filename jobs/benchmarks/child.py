"""One case in a process of its own, which computes when it is told to and waits otherwise."""

import gc
import json
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import loops, subjects
from benchmarks.cases import Case
from benchmarks.meter import Done, Meter, count_flops, mixed_precision
from benchmarks.rows import micro_batches, num_padded_tokens
from benchmarks.setting import SHAPES, Setting
from benchmarks.trials import Trials
from polyprompt import costs
from polyprompt.backbone import EMBEDDED
from polyprompt.collation import Batch
from polyprompt.errors import PolypromptError

#: Products large enough to be as fast as any.
LARGE = ((2048, 2048, 2048), (4096, 2048, 2048))


def work(connection: Connection, case: Case, setting: Setting) -> None:
    """The process. Sends facts, then seconds for each number of steps that it receives, and at the end the losses.

    A fault is sent as {"error": text}.
    """
    torch.set_num_threads(case.threads or setting.threads)
    logging.disable_progress_bar()
    meter = Meter(connection, setting.device, {}, memory=case.loop not in ("pack", "in_turn"))
    try:
        _work(case, setting, meter)
    except Done:
        connection.send({"losses": [meter.losses[number] for number in sorted(meter.losses)]})
    except PolypromptError as error:
        connection.send({"error": str(error)})
    except BaseException:
        connection.send({"error": traceback.format_exc()})
    finally:
        connection.close()


def _work(case: Case, setting: Setting, meter: Meter) -> None:
    if case.kind == "gemm":
        loops.gemm(case, [*_shapes(case), *LARGE], meter)
        return
    if case.loop in ("pack", "in_turn"):
        meter.facts |= {"rows": case.rows * case.trials}
        Trials(case, setting, meter).run()
        return
    subject = subjects.build(case, setting)
    if case.kind.startswith("evaluate_"):
        assert subject.data is not None
        splits = [task.validation for task in subject.data]
        tokens = sum(int(split.input_lengths.sum()) for split in splits)
        meter.facts |= {"rows": sum(map(len, splits)), "real_tokens": tokens, "backbone_bytes": subject.backbone_bytes}
        loops.evaluation(case, subject, meter)
        return
    meter.facts |= facts(case, subject, setting.device)
    if case.compiled:
        assert subject.model is not None
        subject.model.backbone.compile_blocks()
    gc.collect()
    if case.kind != "train":
        loops.inference(case, subject, meter)
    elif case.loop == "bare":
        loops.bare(subject, meter)
    elif case.workers > 1:
        loops.shared(case, subject, setting, meter)
    elif case.loop == "fit":
        loops.clocked(subject, meter)
    else:
        loops.tracked(subject, meter, Path(setting.out) / "tracked" / case.name.replace("/", "_"))


def facts(case: Case, subject: subjects.Subject, device: str) -> dict[str, Any]:
    """Return what a case's batches hold and what they cost, counted."""
    made = [subject.batches[number] for number in range(1, subject.batches.number + 1)]
    counted = [micro.to(device) for batch in made for micro in micro_batches(batch)]
    rows = sum(batch.num_rows for batch in made)
    subject.module.eval()

    def forward() -> None:
        with torch.no_grad(), mixed_precision(device, case.precision):
            for micro in counted:
                subject.loss(micro)

    found = {
        "rows": rows / len(made),
        "real_tokens": sum(batch.num_input_tokens + batch.num_target_tokens for batch in made) / len(made),
        "padded_tokens": sum(map(num_padded_tokens, made)) / len(made),
        "inference_flops": count_flops(forward) / rows,
        "backbone_bytes": subject.backbone_bytes,
        "method_bytes": sum(p.numel() * p.element_size() for p in subject.module.parameters()) - subject.backbone_bytes,
        "trained_parameters": sum(p.numel() for p in subject.trained),
    }
    if subject.model is not None:
        shapes = [(len(m.task_B), m.input_ids_BT.shape[1], m.labels_BS.shape[1]) for m in counted]
        whole = subject.config.train_backbone is True
        inference = sum(n * costs.inference_flops(subject.model, *lengths) for n, *lengths in shapes)
        step = sum(n * costs.training_flops(subject.model, *lengths, whole=whole) for n, *lengths in shapes)
        found |= {"closed_inference_flops": inference / rows, "closed_step_flops": step / len(made)}
        found["hidden"] = subject.model.backbone.dims(1).hidden
    if case.kind == "train":
        found["step_flops"] = training_flops(case, subject, counted, device) / len(made)
    return found


def training_flops(case: Case, subject: subjects.Subject, micros: Sequence[Batch], device: str) -> int:
    """Return the operations of the forward and backward passes of micro-batches. No gradient is left."""

    def step() -> None:
        for micro in micros:
            with mixed_precision(device, case.precision):
                loss = subject.loss(micro)
            loss.backward()

    subject.module.train()
    counted = count_flops(step)
    subject.module.zero_grad(set_to_none=True)
    return counted


def _shapes(case: Case) -> list[tuple[int, int, int]]:
    """Return m, k, n of the products that such a model is made of, at the tokens of a shard."""
    shape = SHAPES.get(case.backbone) or _embedded_shape()
    tokens = case.rows // case.shards * (case.lengths if isinstance(case.lengths, int) else 128)
    hidden = shape.get("d_model") or shape["hidden_size"]
    inner = shape.get("d_ff") or shape["intermediate_size"]
    return [(tokens, hidden, hidden), (tokens, hidden, inner), (tokens, inner, hidden)]


def _embedded_shape() -> dict[str, Any]:
    return json.loads((EMBEDDED / "config.json").read_text())
