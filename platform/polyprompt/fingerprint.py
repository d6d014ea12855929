"""A fingerprint of a model's outputs: what it answers for some tasks on stored rows, to the last bit.

A bundle that tasks were added to holds the one of its old tasks, and whoever loads it asks it the same again. The rows
are drawn from the vocabulary, so that no one's text lies in a bundle.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from polyprompt.collation import IGNORED, collate
from polyprompt.errors import BundleError
from polyprompt.model import PromptedModel
from polyprompt.precision import autocast
from polyprompt.tasks.records import TokenRow

#: Tokens of the input and of the target of each row that a task is asked.
LENGTHS = ((9, 3), (5, 2))
#: By precision: other processors and versions round otherwise; what differs by more is another model.
RELATIVE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
#: Under this name the state of a bundle holds one.
KEPT = "fingerprint"
#: In it: the weights (Bundle.weights) of the bundle that it was taken of, and of those that it goes back to itself.
OF = "of"
log = logging.getLogger(__name__)


def take(model: PromptedModel, tasks: Sequence[str], precision: str) -> dict[str, Any]:
    """Return the fingerprint of the first tasks of a model on the CPU, as JSON: rows, scores and a hash of all logits.

    tasks: their names, in the model's order. precision: as of train.precision. A score is a row's log-likelihood.
    """
    ids, draw = model.backbone.ordinary_ids(), torch.Generator().manual_seed(0)
    rows = []
    for task in tasks:
        for num_input, num_target in LENGTHS:
            pieces = [ids[i] for i in torch.randint(len(ids), (num_input + num_target,), generator=draw).tolist()]
            rows.append({"task": task, "input_ids": pieces[:num_input], "target_ids": pieces[num_input:]})
    return {"precision": precision, "rows": rows, **_answers(model, rows, tasks, precision)}


def check(model: PromptedModel, taken: Mapping[str, Any], tasks: Sequence[str], precision: str, where: str) -> bool:
    """Ask a model on the CPU the same again; return whether its logits are equal to the last bit.

    tasks: the model's, in its order; those of the fingerprint may be some of them. Raises BundleError, naming `where`
    and the task, for answers that differ by more than rounding.
    """
    now = _answers(model, taken["rows"], tasks, precision)
    if now["logits_sha256"] == taken["logits_sha256"]:
        return True
    tolerance = RELATIVE_TOLERANCE["bf16" if "bf16" in (precision, taken["precision"]) else "fp32"]
    for row, old, new in zip(taken["rows"], taken["scores"], now["scores"], strict=True):
        if not math.isclose(old, new, rel_tol=tolerance):
            raise BundleError(
                f"{where}: task {row['task']} no longer answers as it did: a stored row scores {new:.6f}, expected "
                f"{old:.6f}. Use the versions that its manifest.json names, or a bundle made with the present ones"
            )
    log.info("%s: the old tasks answer as they did but for rounding, which is other on this machine", where)
    return False


@torch.inference_mode()
def _answers(
    model: PromptedModel, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], precision: str
) -> dict[str, Any]:
    digest, scores = hashlib.sha256(), []
    with _in_eval(model), autocast(precision, "cpu"):
        for task in dict.fromkeys(row["task"] for row in rows):
            own = [TokenRow(row["input_ids"], row["target_ids"]) for row in rows if row["task"] == task]
            batch = collate(own, [tasks.index(task)] * len(own), model.backbone.tokenizer.pad_token_id)
            logits_BSV = model.logits(batch.input_ids_BT, batch.mask_BT, batch.labels_BS, batch.task_B).float()
            digest.update(logits_BSV.contiguous().numpy().tobytes())
            nll = cross_entropy(
                logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORED, reduction="none"
            )
            scores += (-nll.view_as(batch.labels_BS).sum(dim=1)).tolist()
    return {"scores": scores, "logits_sha256": digest.hexdigest()}


@contextlib.contextmanager
def _in_eval(model: PromptedModel) -> Iterator[None]:
    """Evaluate on one thread: with more of them sums are added up in another order.

    What is in eval mode already is never taken out of it: another thread may be using the backbone.
    """
    training, num_threads = [module for module in model.modules() if module.training], torch.get_num_threads()
    model.eval()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        for module in training:
            module.training = True
