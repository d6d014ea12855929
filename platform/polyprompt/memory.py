"""What one worker needs in memory while it trains, by part: counted where it follows from shapes, and for activations
found by running a step on tensors that have shapes and no data.

Such a step (torch's FakeTensorMode) goes through the very code of training: whichever backbone, method, precision or
checkpointing, what autograd keeps is what it would keep. Neither the weights nor the activations need to fit here.

Letters: B rows, T input tokens, S target tokens.
"""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from polyprompt import sharding
from polyprompt.config import RunConfig
from polyprompt.cpu_training import as_elsewhere
from polyprompt.data import AnyData, TaskData
from polyprompt.methods.base import MadeOnce
from polyprompt.model import PromptedModel
from polyprompt.precision import autocast

aten = torch.ops.aten
#: More rows at once do not keep a processor busier.
MOST_ROWS = 512
SOME_ROWS = 32
#: Of the free memory: kernels, batches and other processes want some, too.
EVALUATION_SHARE = 0.5


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. parts: the most of each, which not all have at the same time. at_once: the most of all."""

    parts: Mapping[str, int]
    at_once: int


def estimate(config: RunConfig, model: PromptedModel, data: Sequence[AnyData]) -> Memory:
    """Return what a worker, of as few as there may be, needs for the longest micro-batch: every row the longest.

    model: with weights, and then it stays as it is, or without (backbone.shapes), and then it is used up. Parts:
    weights, gradients, optimizer: by shape; of strategy fsdp one worker's shards.
    gradient sum: of compute.gradient_sum=exact, in float64.
    gathered: of fsdp what is whole for a while: the root, and of its blocks the one that runs and the next; see
    `_gathered`.
    activations: what the forward pass keeps for the backward pass, and what both make besides.
    weights whole: of fsdp, while the model is evaluated, when there are neither gradients nor activations.
    Not in it: the process itself, the batches of an evaluation, and what kernels and the network take inside.
    """
    compute, num_workers = config.compute, max(1, config.compute.fewest_workers)
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = compute.strategy == "fsdp"
    size: Callable[[Tensor], int] = (lambda p: _shard_bytes(p, num_workers)) if sharded else _bytes
    weights, gradients = sum(map(size, model.parameters())), sum(map(size, trained))
    states = (lambda p: 2 * size(p)) if config.train.optimizer == "adamw" else _adafactor_bytes
    parts = {"weights": weights, "gradients": gradients, "optimizer": sum(map(states, trained))}
    gathered = _gathered(config, model) if sharded else 0
    # Reduced gradients of fsdp are counted apart: what a pass makes of them is whole for one block at a time.
    step = _Step(config, model, data, keeps_gradients=not sharded and _keeps_gradients(config))
    if compute.summing == "exact":
        parts["gradient sum"] = 8 * (sum(p.numel() for p in trained) + step.num_made)
    standing = sum(parts.values()) - gradients
    at_once = [standing + gathered + (gradients + step.activations if sharded else step.most), standing + gradients]
    at_once[1] += _largest_update(config, trained) // (num_workers if sharded else 1)
    if sharded:
        parts["gathered"] = gathered
    parts["activations"] = step.activations
    if sharded:
        parts["weights whole"] = sharding.whole_bytes(model, config.train.precision)
        at_once.append(standing + parts["weights whole"])
    return Memory(parts, max(at_once))


def evaluation_rows(config: RunConfig, model: PromptedModel, data: Sequence[AnyData], free: int) -> int:
    """Return how many rows an evaluation may compute at once, each as long as the longest of the validation splits.

    free: bytes beside what stands already, of which EVALUATION_SHARE is taken. Found by inference on tensors without
    data for some rows and for twice as many; the keys and values that generation keeps are added. At least 1, at most
    MOST_ROWS.
    """
    dims, length, targets, written = model.backbone.dims(1), 1, 1, 0
    for task in data:
        length, target = max(length, task.validation.longest[0]), task.validation.longest[1]
        if isinstance(task, TaskData):
            choices = task.validation.longest_choices if config.evaluate.mode == "rank" else None
            target = choices or task.train.longest[1]
            written = max(written, 0 if choices else target)
        targets = max(targets, target)
    # So many that rows decide what is the most, and not what is made of tasks or copied of weights.
    few, many = (_inference(config, model, rows, length, targets) for rows in (SOME_ROWS, 2 * SOME_ROWS))
    kept = length + model.method.input_length + max(model.method.stack_lengths.values(), default=0) + written
    number = 2 if config.train.precision == "bf16" else 4
    cache = 2 * dims.decoder.num_layers * dims.decoder.num_heads * dims.decoder.head_dim * kept * number
    each = (many - few) // SOME_ROWS + (cache if written else 0)
    return min(MOST_ROWS, max(1, int(free * EVALUATION_SHARE - max(0, 2 * few - many)) // each))


def _inference(config: RunConfig, model: PromptedModel, rows: int, length: int, targets: int) -> int:
    """Return the most bytes at once of reading rows of this length with targets, beside the model."""
    fake, mode = _without_data(model)
    tally = _Tally([*fake.parameters(), *fake.buffers()], num_tasks=1)
    fake.eval()
    kernels = as_elsewhere(_EfficientAttention) if config.compute.use_gpu else nullcontext()
    with mode, tally, torch.no_grad(), kernels, autocast(config.train.precision, "cpu"):
        ids_BT, labels_BS = torch.ones(rows, length).long(), torch.ones(rows, targets).long()
        fake(ids_BT, torch.ones_like(ids_BT), labels_BS, torch.zeros(rows).long())
    return tally.most


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shard_bytes(parameter: Tensor, num_workers: int) -> int:
    """FSDP2 cuts the first dimension into equal pieces, padded."""
    return ceil(parameter.shape[0] / num_workers) * parameter[:1].numel() * parameter.element_size()


def _adafactor_bytes(parameter: Tensor) -> int:
    """Factored second moments: one row and one column (Shazeer & Stern 2018, section 3)."""
    if parameter.ndim < 2:
        return parameter.numel() * 4
    *lead, rows, columns = parameter.shape
    return int(torch.Size(lead).numel()) * (rows + columns) * 4


def _largest_update(config: RunConfig, trained: Sequence[Tensor]) -> int:
    """Adafactor makes the update, its square and the scaled update of one parameter after another; AdamW is fused."""
    return 3 * max(map(_bytes, trained)) if config.train.optimizer == "adafactor" else 0


def _keeps_gradients(config: RunConfig) -> bool:
    """Are there gradients of an earlier micro-batch while one is computed?"""
    if config.compute.summing == "exact":  # they go into the sum shard by shard
        return config.train.gradient_accumulation_steps > 1
    return True  # DistributedDataParallel holds them in its buckets throughout


def _gathered(config: RunConfig, model: PromptedModel) -> int:
    """Return the bytes of whole parameters and gradients that FSDP2 holds while a pass runs.

    The root stays whole from its forward to the end of the backward pass. Of a block: its whole parameters, those of
    the next one, which are gathered into a buffer first, and, where trained, its gradients and what is reduced.
    """
    blocks = model.backbone.blocks()
    inside = {p for block in blocks for p in block.parameters()}
    root = [p for p in model.parameters() if p not in inside]
    whole = sharding.gathered_bytes
    precision = config.train.precision
    largest = max(blocks, key=lambda block: whole(block.parameters(), precision))
    block = whole(largest.parameters(), precision)
    reduced = 4 * sum(p.numel() for p in largest.parameters() if p.requires_grad)
    return whole(root, None) + 4 * sum(p.numel() for p in root if p.requires_grad) + 3 * block + 2 * reduced


class _Step:
    """A forward and backward pass without data. most: bytes at once beside what stands before it. activations: of
    these, what are not gradients of parameters, at their own most. num_made: numbers that networks make of the tasks,
    whose gradients are summed as parameters' are."""

    def __init__(
        self, config: RunConfig, model: PromptedModel, data: Sequence[AnyData], *, keeps_gradients: bool
    ) -> None:
        rows = -(-config.train.batch_size // config.train.num_shards)
        rows = -(-rows // config.train.gradient_accumulation_steps)
        length, targets = (max(task.train.longest[part] for task in data) for part in (0, 1))
        fake, mode = _without_data(model)
        if config.compute.strategy == "fsdp":
            with mode:
                sharding.cast(fake, config.train.precision)
        trained = [p for p in fake.parameters() if p.requires_grad]
        tally = _Tally([*fake.parameters(), *fake.buffers()], num_tasks=len(data))
        fake.train()
        with mode, tally:
            for parameter in trained:
                if keeps_gradients:
                    parameter.grad = torch.zeros_like(parameter)
                    tally.gradients += _bytes(parameter)
                else:
                    parameter.register_post_accumulate_grad_hook(tally.take_gradient)
            ids_BT, labels_BS = torch.ones(rows, length).long(), torch.ones(rows, targets).long()
            with ExitStack() as around:
                # Around the backward pass too, in which checkpointing runs layers anew.
                if config.compute.use_gpu:
                    around.enter_context(as_elsewhere(_EfficientAttention))
                made = MadeOnce()
                with autocast(config.train.precision, "cpu"):
                    if config.compute.summing == "exact":
                        made = around.enter_context(fake.made_once(torch.arange(len(data))))
                    loss = fake(ids_BT, torch.ones_like(ids_BT), labels_BS, torch.zeros(rows).long())
                (loss.total + loss.penalty_B.sum()).backward()
            made.backward()
        self.most, self.activations = tally.most, tally.most_activations
        self.num_made = sum(held.numel() for held in made.held if held.requires_grad)


class _EfficientAttention(TorchFunctionMode):
    """Attends as GPUs do: with torch's memory-efficient kernel, which keeps no weights of queries by keys. The CPU's
    kernels are taken otherwise, which keep them where there is dropout or a trained position bias."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        attended, *_ = aten._scaled_dot_product_efficient_attention(
            query, key.to(query.dtype), value.to(query.dtype), attn_mask, True, dropout_p, is_causal, scale=scale
        )
        return attended


def _without_data(model: PromptedModel) -> tuple[PromptedModel, FakeTensorMode]:
    """Return a copy whose tensors have no data, or the model if it has none, and the mode that they belong to."""
    if isinstance(next(model.backbone.parameters()), FakeTensor):
        return model, mode_of(model.backbone)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return copy.deepcopy(model), mode


def mode_of(shapes: nn.Module) -> FakeTensorMode:
    """Return the mode that the tensors of a backbone without weights belong to: operations on them run inside it."""
    first = next(shapes.parameters())
    assert isinstance(first, FakeTensor)
    return first.fake_mode


class _Tally(TorchDispatchMode):
    """Counts the bytes of what operations make, for as long as it lives."""

    def __init__(self, standing: Sequence[Tensor], num_tasks: int) -> None:
        """standing: tensors that were there before. num_tasks: as many tasks a batch has at most."""
        super().__init__()
        self.num_tasks = num_tasks
        self.live = self.gradients = self.most = self.most_activations = 0
        self._known = weakref.WeakSet[torch.UntypedStorage](tensor.untyped_storage() for tensor in standing)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = self._run(func, args, kwargs or {})
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        return made

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; one whose output's shape depends on data, at the most that it can have."""
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            (kept,) = args[1]
            flat = args[0].flatten(0, kept.ndim - 1)
            return func(flat, [kept.new_zeros(kept.numel(), dtype=torch.long)])
        if func is aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is aten._unique2.default:
            tasks = args[0].new_zeros(min(args[0].numel(), self.num_tasks))
            return tasks, torch.zeros_like(args[0]), torch.zeros_like(tasks)
        return func(*args, **kwargs)

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._drop, size)
        self.live += size
        self._look()

    def _drop(self, size: int) -> None:
        self.live -= size

    def take_gradient(self, parameter: Tensor) -> None:
        """A hook: this parameter's gradient is there to stay."""
        assert parameter.grad is not None
        self.gradients += _bytes(parameter.grad)

    def _look(self) -> None:
        self.most = max(self.most, self.live)
        self.most_activations = max(self.most_activations, self.live - self.gradients)
