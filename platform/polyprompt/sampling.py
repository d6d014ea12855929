"""What is done to the logits of a greedy search: sampling by row, and keeping the likelihood of what is written.

Each row is drawn from a random stream of its own: the likeliest of logits + Gumbel noise is a draw from their softmax,
so greedy search over noisy logits samples.

Letters: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyprompt.errors import ConfigError

#: (ids written so far, logits_BV) → logits_BV.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Likelihoods:
    """A processor that changes nothing and keeps, of each step of a greedy search, the log-likelihood of what it
    writes: of the logits themselves there would be a vocabulary for every piece."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, ids: Tensor, logits_BV: Tensor) -> Tensor:
        scores_BV = logits_BV.float()
        self._steps.append(scores_BV.amax(dim=1) - scores_BV.logsumexp(dim=1))
        return logits_BV

    def total(self, real_BS: Tensor) -> Tensor:
        """Return the sum of each row. real_BS: which pieces are of its text; the others came behind its end."""
        return torch.stack(self._steps, dim=1).where(real_BS, 0).sum(dim=1)


@dataclass(frozen=True)
class Sampling:
    """How to draw. seeds: one for each row; a row's text follows from its input, its task and its seed alone.

    temperature: above 0. top_k: only the k likeliest pieces. top_p: only the likeliest pieces that together have at
    least this probability. None: all pieces.
    """

    seeds: Sequence[int]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for key, value, fits, expected in (
            ("temperature", self.temperature, self.temperature > 0, "above 0; greedy search is sampling=None"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or None for all pieces"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None for all pieces"),
        ):
            if not fits:
                raise ConfigError(f"sampling: {key}={value} must be {expected}")

    def processors(self, num_rows: int, num_beams: int) -> list[LogitsProcessor]:
        """Return what makes a greedy search draw; fresh streams each time. Raises ConfigError where it does not fit."""
        if len(self.seeds) != num_rows:
            raise ConfigError(f"sampling: {len(self.seeds)} seeds for {num_rows} rows; give one seed for each row")
        if num_beams != 1:
            raise ConfigError(f"sampling: num_beams={num_beams} must be 1; repeat a row under other seeds for more")
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

        def draw(ids: Tensor, logits_BV: Tensor) -> Tensor:
            logits_BV = self._kept(logits_BV.float() / self.temperature)
            noise = torch.stack([torch.empty(logits_BV.shape[1]).exponential_(generator=g) for g in generators])
            return logits_BV - noise.log().to(logits_BV.device)

        return [draw]

    def _kept(self, logits_BV: Tensor) -> Tensor:
        """Return the logits with those of pieces that may not be drawn at minus infinity."""
        if self.top_k is not None:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p is not None:
            sorted_BV, order_BV = logits_BV.sort(descending=True)
            probability_BV = sorted_BV.softmax(dim=-1)
            before_BV = probability_BV.cumsum(dim=-1) - probability_BV
            cut_BV = (before_BV >= self.top_p).scatter(1, order_BV, before_BV >= self.top_p)
            logits_BV = logits_BV.masked_fill(cut_BV, -torch.inf)
        return logits_BV
