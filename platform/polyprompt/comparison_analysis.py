"""What a trained model does with its prompts, from its bundle and a few validation rows: the papers' analyses.

Letters: B rows (one at a time), T input tokens, S target tokens, P prompt tokens, L layers, N heads, D head size,
K tasks, R routed prompts, Q queries, X keys.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from polyprompt import checkpoint, token_store
from polyprompt.comparison_sources import Record
from polyprompt.config import RunConfig
from polyprompt.errors import DataError, PolypromptError
from polyprompt.model import PromptedModel, input_limit
from polyprompt.plan import model_of
from polyprompt.precision import autocast
from polyprompt.reading import read_rows
from polyprompt.tasks import catalog
from polyprompt.tasks.records import Example, Task

#: The methods that make keys and values, or route, and the one without prompts, against which their attention is seen.
METHODS = ("hyperprompt", "routed_hyperprompt", "prefix_tuning", "smop", "full")
STACKS = ("encoder", "decoder")
#: What is logged of a router beside the use of its prompts (docs/methods.md, Routers).
HEALTH = ("entropy", "margin", "dead_prompts")


@dataclass(frozen=True)
class Analysis:
    """Of one run. num_rows: looked at, of each task.

    similarity: stack → [K, K], cosines of the tasks' prompts, all keys and values of the stack as one vector.
    attention: stack → [K, L], the part of self-attention that falls on prompt keys, a mean over heads, queries, rows.
    even: stack → the same if every visible key had the same weight, over all tasks.
    entropy: stack → [K, L], of the self-attention over the text alone, without prompt keys, as a part of the highest
    there can be; a mean over heads, queries that see more than one token, and rows. Empty for prompts before the input.
    usage: [K, R], what each routed prompt is of the rows' prompts in prediction; None without a router.
    """

    tasks: tuple[str, ...]
    num_rows: int
    similarity: Mapping[str, np.ndarray]
    attention: Mapping[str, np.ndarray]
    even: Mapping[str, float]
    entropy: Mapping[str, np.ndarray]
    usage: np.ndarray | None


@dataclass
class _Seen:
    """Sums over one task's rows. prompts: stack → keys and values, flat. mass, entropy: stack → by layer."""

    prompts: dict[str, Tensor]
    mass: dict[str, Tensor]
    even: dict[str, float]
    entropy: dict[str, Tensor]
    usage: Tensor | None


def analyse(bundle: Path, num_rows: int) -> Analysis:
    """Look at up to so many validation rows of each task.

    Raises BundleError where the bundle is gone or damaged, DataError where the rows are, ConfigError where the backbone
    is.
    """
    opened = checkpoint.read(bundle)
    config = opened.config
    # Eager attention is the kind that hands out its weights.
    eager = config.model_copy(update={"backbone": config.backbone.model_copy(update={"attention": "eager"})})
    forms = catalog.forms(config)
    model = model_of(eager, len(forms), opened).eval()
    tasks = [(i, task) for i, task in enumerate(forms) if task is not None]
    if not tasks:
        raise DataError(f"{bundle} was trained on plain text alone, which has no rows to look at it with")
    seen = [_task(model, config, index, task, _examples(config, index, num_rows)) for index, task in tasks]
    stacks = [stack for stack in STACKS if stack in seen[0].prompts]
    usages = [own.usage for own in seen if own.usage is not None]
    return Analysis(
        tasks=tuple(task.name for _, task in tasks),
        num_rows=num_rows,
        similarity={stack: _cosines(torch.stack([own.prompts[stack] for own in seen])) for stack in stacks},
        attention={stack: torch.stack([own.mass[stack] for own in seen]).numpy() for stack in stacks},
        even={stack: float(np.mean([own.even[stack] for own in seen])) for stack in stacks},
        entropy={stack: torch.stack([own.entropy[stack] for own in seen]).numpy() for stack in seen[0].entropy},
        usage=torch.stack(usages).numpy() if usages else None,
    )


def attempt(bundle: Path, num_rows: int) -> Analysis | str:
    """Return the analysis, or why there can be none."""
    if not bundle.is_dir():
        return f"the bundle {bundle} is not on this machine any more"
    try:
        return analyse(bundle, num_rows)
    except PolypromptError as error:
        return str(error)


def _examples(config: RunConfig, index: int, num_rows: int) -> Sequence[Example]:
    task = catalog.of_split(config.tasks[index], config.data.root, "validation")  # type: ignore[arg-type]  # no text
    found = [example for _, _, made in islice(read_rows(task, "validation"), num_rows) for example in made][:num_rows]
    if not found:
        raise DataError(f"{task.name}: its validation split has no rows")
    return found


@torch.inference_mode()
def _task(model: PromptedModel, config: RunConfig, index: int, task: Task, examples: Sequence[Example]) -> _Seen:
    """Read the rows one by one: nothing is padded, so every query and every key that is looked at is real."""
    limit = input_limit(config, model.backbone, model.method)
    tokenizer = model.backbone.tokenizer
    writer = token_store.Writer(task, tokenizer, limit, config.data.max_target_tokens)
    total: _Seen | None = None
    for example in examples:
        (ids,), _ = writer.inputs([example.input])
        (target,) = token_store.tokens(tokenizer, [example.target])
        labels = [*target[: config.data.max_target_tokens - 1], tokenizer.eos_token_id]
        with autocast(config.train.precision, "cpu"):
            own = _row(model, torch.tensor([ids]), torch.tensor([labels]), torch.tensor([index]))
        total = own if total is None else _sum(total, own)
    assert total is not None
    n = len(examples)
    return _Seen(
        {stack: own / n for stack, own in total.prompts.items()},
        {stack: own / n for stack, own in total.mass.items()},
        {stack: own / n for stack, own in total.even.items()},
        {stack: own / n for stack, own in total.entropy.items()},
        None if total.usage is None else total.usage / n,
    )


def _row(model: PromptedModel, ids_BT: Tensor, labels_BS: Tensor, task_B: Tensor) -> _Seen:
    mask_BT = torch.ones_like(ids_BT)
    x_BTH = model.backbone.embed(ids_BT)
    prompts = model.method.prompts(x_BTH, mask_BT, task_B)
    share_BR = prompts.aux.get("router/share")
    made = {stack: own for stack in STACKS if (own := getattr(prompts, stack)) is not None and own.keys_LBNPD.shape[3]}
    lengths = {stack: own.keys_LBNPD.shape[3] for stack, own in made.items()}
    with _watched(model, lengths) as watch:
        # Prompts before the input are neither text nor keys of their own.
        if not model.method.input_length:
            model.backbone.logits(labels_BS, model.backbone.encode(x_BTH, mask_BT, prompts), prompts)
    return _Seen(
        prompts={s: torch.cat([own.keys_LBNPD, own.values_LBNPD]).float().flatten() for s, own in made.items()},
        mass={stack: _by_layer(watch.mass[stack]) for stack in made},
        even={stack: float(np.mean(watch.even[stack])) for stack in made},
        entropy={stack: _by_layer(watch.entropy[stack]) for stack in STACKS if watch.entropy[stack]},
        usage=None if share_BR is None else share_BR[0].double(),
    )


@dataclass
class _Watch:
    """Of one row, stack → layer → value; even: stack → by layer."""

    mass: dict[str, dict[int, float]]
    even: dict[str, list[float]]
    entropy: dict[str, dict[int, float]]


@contextmanager
def _watched(model: PromptedModel, lengths: Mapping[str, int]) -> Iterator[_Watch]:
    """Note of each self-attention layer how much of its weights prompt keys take meanwhile, and how the rest spreads.

    lengths: stack → prompt keys.
    """
    mass: dict[str, dict[int, float]] = {stack: {} for stack in STACKS}
    watch = _Watch(mass, even={stack: [] for stack in STACKS}, entropy={stack: {} for stack in STACKS})

    def look(module: Any, _: Any, output: tuple[Any, ...]) -> None:
        stack, layer = module.prompt_spot
        weights_BNQX = output[-1].float()
        num_prompts, num_queries = lengths.get(stack, 0), weights_BNQX.shape[2]
        watch.mass[stack][layer] = float(weights_BNQX[..., :num_prompts].sum(-1).mean())
        # The decoder sees what was before: its first query one token, its last one all.
        others = weights_BNQX.shape[3] - num_prompts
        visible_Q = torch.full([num_queries], others)
        if stack == "decoder":
            visible_Q -= torch.arange(num_queries - 1, -1, -1)
        watch.even[stack].append(float((num_prompts / (num_prompts + visible_Q)).mean()))
        watch.entropy[stack][layer] = _entropy(weights_BNQX[..., num_prompts:], visible_Q)

    spots = [module for module in model.modules() if hasattr(module, "prompt_spot")]
    hooks = [module.register_forward_hook(look) for module in spots]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _entropy(weights_BNQT: Tensor, visible_Q: Tensor) -> float:
    """The mean entropy of attention over text, as a part of the highest; 0 where no query has a choice."""
    several_Q = visible_Q > 1
    if not several_Q.any():
        return 0.0
    share_BNQT = weights_BNQT / weights_BNQT.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy_BNQ = torch.special.entr(share_BNQT).sum(-1)[..., several_Q]
    return float((entropy_BNQ / visible_Q[several_Q].log()).mean())


def _by_layer(values: Mapping[int, float]) -> Tensor:
    return torch.tensor([values[layer] for layer in sorted(values)])


def _sum(a: _Seen, b: _Seen) -> _Seen:
    return _Seen(
        {stack: a.prompts[stack] + b.prompts[stack] for stack in a.prompts},
        {stack: a.mass[stack] + b.mass[stack] for stack in a.mass},
        {stack: a.even[stack] + b.even[stack] for stack in a.even},
        {stack: a.entropy[stack] + b.entropy[stack] for stack in a.entropy},
        None if a.usage is None or b.usage is None else a.usage + b.usage,
    )


def _cosines(prompts_KX: Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(prompts_KX.double(), dim=1)
    return (unit @ unit.T).numpy()


@dataclass(frozen=True)
class Routing:
    """What a run logged of its router at its end. usage: [K, R], the part of a task's rows that each prompt got as
    trained, noise and all. health: a line a task, the columns HEALTH. num_points: logged points that were averaged."""

    tasks: tuple[str, ...]
    usage: np.ndarray
    health: pd.DataFrame
    num_points: int


def routing(record: Record) -> Routing | None:
    """Average the last tenth of what was logged of a router; None for a run that has none."""
    tasks = [task for task in record.result.eval if record.history(f"router/{task}/entropy")]
    if not tasks:
        return None
    num_points = max(1, len(record.history(f"router/{tasks[0]}/entropy")) // 10)

    def last(metric: str) -> float:
        return float(np.mean([value for _, value in record.history(metric)[-num_points:]]))

    routes = next(r for r in itertools.count() if not record.history(f"router/{tasks[0]}/utilisation_{r}"))
    usage = [[last(f"router/{task}/utilisation_{r}") / routes for r in range(routes)] for task in tasks]
    health = [{name: last(f"router/{task}/{name}") for name in HEALTH} for task in tasks]
    return Routing(tuple(tasks), np.array(usage), pd.DataFrame(health, index=tasks), num_points)
