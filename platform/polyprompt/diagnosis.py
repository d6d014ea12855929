"""Where a loss or a gradient that is not finite came from: which worker, task and examples."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from polyprompt import sharding
from polyprompt.batches import GlobalBatch
from polyprompt.collation import Batch
from polyprompt.model import Loss

MOST_NAMED = 5


def find(
    module: nn.Module, batch: GlobalBatch, tasks: Sequence[str], forward: Callable[[Batch], tuple[Loss, Tensor]]
) -> list[str]:
    """Compute this process's shards once more, with the same weights and random numbers; name the rows whose loss is
    not finite, or, where all are, the micro-batches whose gradient is not. Leaves no gradients.

    forward: micro-batch → loss, and what is minimised.
    """
    found = []
    parameters = [p for p in module.parameters() if p.requires_grad]
    for shard in batch.shards:
        torch.manual_seed(shard.seed)
        for micro, examples in zip(shard.micro_batches, shard.examples, strict=True):
            module.zero_grad()
            loss, objective = forward(micro)
            objective.backward()
            rows, what = (~(loss.nll_B + loss.penalty_B).isfinite()).nonzero().flatten().tolist(), "loss"
            # Asked for in any case: of fsdp every worker must come to the sum, which is over all their micro-batches.
            wrong = sum(sharding.number((~p.grad.isfinite()).sum()) for p in parameters if p.grad is not None)
            if not rows and wrong:
                rows, what = list(range(len(examples))), "gradient"
            by_task: dict[str, list[int]] = {}
            for row in rows:
                by_task.setdefault(tasks[int(micro.task_B[row])], []).append(examples[row])
            found += [
                f"{what} of {task}, training example {_some(sorted(numbers), ', ')} (shard {shard.number})"
                for task, numbers in sorted(by_task.items())
            ]
    module.zero_grad()
    return found


def explain(found: Sequence[Sequence[str]], batch: GlobalBatch, tasks: Sequence[str], last_good: str) -> str:
    """Return the error's message. found: by process, what `find` returned."""
    places = [
        f"worker {rank} of {len(found)}: {text}" if len(found) > 1 else text
        for rank, texts in enumerate(found)
        for text in texts
    ]
    none = "they were when the step was computed once more, so the machine may be at fault"
    in_batch = ", ".join(f"{tasks[task]} ({rows} rows)" for task, rows in sorted(batch.task_rows.items()))
    return (
        f"loss or gradient not finite at step {batch.step}: {_some(places, '; ') or none}; tasks in the batch: "
        f"{in_batch}; last good bundle: {last_good}. Look at the examples (the first is 0), lower train.learning_rate, "
        "lengthen train.warmup_ratio, or set train.precision=fp32, and start a new run"
    )


def _some(things: Sequence[object], between: str) -> str:
    more = f" and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
    return between.join(map(str, things[:MOST_NAMED])) + more
