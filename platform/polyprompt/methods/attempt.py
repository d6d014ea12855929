"""Attention over frozen source prompts and a trained target prompt."""

import math

import torch
from torch import Tensor, nn

from polyprompt.config import AttemptConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts
from polyprompt.methods.prompt_tuning import draw_prompts, start_prompts


class Attempt(Method):
    """Mix J frozen prompts of other tasks and the task's own prompt, with weights from attention to the row's input.

        x̂ = max over the row's real input embeddings         P̂_j = max over the vectors of P_j
        h = LayerNorm(W_up·SiLU(W_down·x̂))                   a = softmax_j(P̂_j·h / temperature)     j = 1 … J, τ
        inputs = [P_τ + Σ_j a_j·P_j + a_τ·P_τ ; x]

    Shapes: sources_JPH, frozen; prompt_GPH (P_τ), G = K with `per_task`, else 1; inputs_BPH.
    Source: Asai et al. 2022 (arXiv 2205.11961), section 3.2; temperature H·e, SiLU and bottleneck 100 as there.
    Differs: the max over the input leaves out padding, which the authors' code counts. W_down, W_up and LayerNorm are
    shared by the tasks (the paper's multi-task setting). They start as torch starts them; the paper does not say.
    Parameters: G·P·H + 2·H·m + 2·H, m = bottleneck. Sources are not trained and not counted, but kept in the bundle.
    With length 0 this is the plain backbone.
    """

    sources_JPH: Tensor

    def __init__(self, config: AttemptConfig, dims: Dims, sources_JPH: Tensor | None, *, seed: int) -> None:
        """Draw starting values from torch's global stream; `seed` is for the draw of pieces in `initialise`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.per_task and config.length > 0
        self.prompt_GPH = draw_prompts(config, dims)
        if not config.length:
            return
        assert sources_JPH is not None, "source_prompts.read gives them"
        assert sources_JPH.shape[1:] == (config.length, dims.hidden)
        self.temperature = config.temperature or dims.hidden * math.e
        self.register_buffer("sources_JPH", sources_JPH.detach().float())
        self.attention = nn.Sequential(
            nn.Linear(dims.hidden, config.bottleneck, bias=False),
            nn.SiLU(),
            nn.Linear(config.bottleneck, dims.hidden, bias=False),
            nn.LayerNorm(dims.hidden),
        )
        num_sources = len(sources_JPH)
        self.row_multiply_adds = dims.hidden * (2 * config.bottleneck + num_sources + 1 + num_sources * config.length)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompt_GPH is None:
            return Prompts()
        own_BPH = self.prompt_GPH[task_B if self.config.per_task else torch.zeros_like(task_B)]
        with torch.autocast(x_BTH.device.type, enabled=False):  # a softmax over near ties, as SMoP's router
            weight_BJ = self._weights(x_BTH.float(), mask_BT, own_BPH)
            mixed_BPH = torch.einsum("bj,jph->bph", weight_BJ[:, :-1], self.sources_JPH)
            inputs_BPH = own_BPH + mixed_BPH + weight_BJ[:, -1, None, None] * own_BPH
        return Prompts(inputs_BPH=inputs_BPH.to(x_BTH.dtype))

    def _weights(self, x_BTH: Tensor, mask_BT: Tensor, own_BPH: Tensor) -> Tensor:
        """Return the attention to each source and, last, to the task's own prompt."""
        padding_BT = mask_BT == 0
        largest_BH = x_BTH.masked_fill(padding_BT[:, :, None], -math.inf).amax(dim=1)
        largest_BH = largest_BH.masked_fill(padding_BT.all(dim=1, keepdim=True), 0.0)
        query_BH = self.attention(largest_BH)
        sources_BJ = query_BH @ self.sources_JPH.amax(dim=1).T
        own_B1 = torch.einsum("bh,bh->b", query_BH, own_BPH.amax(dim=1))[:, None]
        return (torch.cat([sources_BJ, own_B1], dim=1) / self.temperature).softmax(dim=1)

    def input_prompts(self) -> nn.Parameter | None:
        return self.prompt_GPH

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter == "prompt_GPH" else "router"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_GPH is not None:
            start_prompts(self.prompt_GPH, self.config.init, embedding_VH, seed=self.seed)
