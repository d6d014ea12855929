"""A short soft prompt beside a low-rank update of the input embeddings."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from polyprompt.config import DePTConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts
from polyprompt.methods.prompt_tuning import draw_prompts, start_prompts


class DePT(Method):
    """Decompose a long prompt into P short prompt vectors and a rank-R update of the embeddings, place by place.

        inputs = [P_τ ; x + ΔE_τ]        ΔE_τ = A_τ·B_τ, row i added to the i-th token of the input

    Letters: S = max_positions, R = rank. Shapes: prompt_GPH, down_GSR (A), up_GRH (B), G = K with `per_task`, else 1;
    inputs_BPH, embeddings_BTH.
    Source: Shi & Lipani 2024 (arXiv 2309.05173), section 2.2; A, B and their start (A uniform within ±1/√R, B zero) as
    in the authors' code. Two learning rates: `train.group_learning_rates`, groups prompt (P) and embedding (A, B).
    Differs: tokens behind place S keep their embeddings (the authors cut and pad every input to S). ΔE is not scaled,
    as in the paper; the authors' code multiplies it with alpha / √R. Prompts per task beside shared ones.
    Parameters: G·(P·H + R·(S + H)). With length 0 and rank 0 this is the plain backbone.
    """

    def __init__(self, config: DePTConfig, dims: Dims, *, seed: int) -> None:
        """Draw starting values from torch's global stream; `seed` is for the draw of pieces in `initialise`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.per_task and (config.length > 0 or config.rank > 0)
        num_updates = dims.num_tasks if config.per_task else 1
        self.prompt_GPH = draw_prompts(config, dims)
        self.down_GSR: nn.Parameter | None = None
        if config.rank:
            uniform = torch.rand(num_updates, config.max_positions, config.rank) * 2 - 1
            self.down_GSR = nn.Parameter(uniform / config.rank**0.5)
            self.up_GRH = nn.Parameter(torch.zeros(num_updates, config.rank, dims.hidden))

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        row_B = task_B if self.config.per_task else torch.zeros_like(task_B)
        inputs_BPH = None if self.prompt_GPH is None else self.prompt_GPH[row_B].to(x_BTH.dtype)
        return Prompts(inputs_BPH=inputs_BPH, embeddings_BTH=self._updated(x_BTH, row_B))

    def _updated(self, x_BTH: Tensor, row_B: Tensor) -> Tensor | None:
        if self.down_GSR is None:
            return None
        update_GTH = self.down_GSR[:, : x_BTH.shape[1]] @ self.up_GRH
        update_GTH = pad(update_GTH, (0, 0, 0, x_BTH.shape[1] - update_GTH.shape[1]))
        return x_BTH + update_GTH[row_B].to(x_BTH.dtype)

    def input_prompts(self) -> nn.Parameter | None:
        return self.prompt_GPH

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter == "prompt_GPH" else "embedding"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_GPH is not None:
            start_prompts(self.prompt_GPH, self.config.init, embedding_VH, seed=self.seed)
