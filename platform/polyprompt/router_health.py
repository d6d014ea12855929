"""How a router fares: what the loop adds up of it, the metrics made from that, and the watch for a collapse."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: A collapse is looked for at every so many steps, over the rows of those steps.
WATCH_STEPS = 50
#: One prompt makes up at least so much of what prediction would use over all tasks: collapsed.
COLLAPSED_SHARE = 0.9
#: A prompt with less than this part of its fair share is dead.
DEAD_SHARE = 0.01
log = logging.getLogger(__name__)


def num_columns(routes: int) -> int:
    """Return how many sums `rows` gives for a router over so many prompts."""
    return 2 * routes + 2 if routes else 0


def rows(aux: Mapping[str, Tensor]) -> Tensor:
    """Return what is summed over rows (float64): load by prompt, share by prompt, entropy in nats, margin."""
    probability_BR = aux["router/probability"].double()
    entropy_B = torch.special.entr(probability_BR).sum(dim=-1)
    best_B2 = probability_BR.topk(min(2, probability_BR.shape[1]), dim=-1).values
    margin_B = best_B2[:, 0] - (best_B2[:, 1] if best_B2.shape[1] == 2 else 0)
    return torch.cat([aux["router/load"], aux["router/share"], entropy_B[:, None], margin_B[:, None]], dim=1)


def shares(sums_X: Tensor) -> list[float]:
    """Return the share by prompt out of sums."""
    routes = (len(sums_X) - 2) // 2
    return [float(share) for share in sums_X[routes : 2 * routes]]


def metrics(sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one task from its sums over rows; {} if it had no rows.

    utilisation_<prompt>: load / fair share, as trained, noise and all. The others are of the router without noise.
    entropy: mean over rows, as a fraction of log R. margin: mean lead of the likeliest prompt's probability over the
    second. dead_prompts: how many prompts prediction would hardly ever use.
    """
    routes = (len(sums) - 2) // 2
    num_rows = sum(sums[:routes])
    if not num_rows:
        return {}
    values = {f"utilisation_{route}": load * routes / num_rows for route, load in enumerate(sums[:routes])}
    return values | {
        "entropy": sums[-2] / num_rows / math.log(routes) if routes > 1 else 0.0,
        "margin": sums[-1] / num_rows,
        "dead_prompts": float(sum(share * routes / num_rows < DEAD_SHARE for share in sums[routes : 2 * routes])),
    }


@dataclass
class Watch:
    """Looks for a collapse. shares: by prompt, over the steps since the last look.

    collapse: {"step", "prompt", "share"}: found at which step, which prompt, its share at the last look; {} if healthy.
    """

    steps: int = 0
    shares: list[float] = field(default_factory=list)
    collapse: dict[str, float] = field(default_factory=dict)

    def take(self, step: int, shares: Sequence[float]) -> None:
        """Add a step's shares, over all tasks, and look when it is time. A change is said in the log."""
        self.shares = [a + b for a, b in zip(self.shares or [0.0] * len(shares), shares, strict=True)]
        self.steps += 1
        if self.steps < WATCH_STEPS:
            return
        prompt = max(range(len(shares)), key=self.shares.__getitem__)
        share = self.shares[prompt] / sum(self.shares)
        before, self.steps, self.shares, self.collapse = self.collapse, 0, [], {}
        if share >= COLLAPSED_SHARE and len(shares) > 1:
            self.collapse = {"step": before.get("step", step), "prompt": prompt, "share": share}
        if self.collapse and not before:
            log.warning("%s (docs/methods.md, Routers)", describe(self.collapse))
        elif before and not self.collapse:
            log.info("the router has recovered by step %d", step)


def describe(collapse: Mapping[str, float]) -> str:
    """Return a collapse in words, "" for none."""
    if not collapse:
        return ""
    return (
        f"router collapsed by step {collapse['step']:,.0f}: prompt {collapse['prompt']:.0f} makes up "
        f"{collapse['share']:.0%} of what the rows of all tasks get"
    )
