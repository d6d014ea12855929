"""One soft prompt shared by all tasks, scaled for each task by a rank-one matrix."""

import torch
from torch import Tensor, nn

from polyprompt.config import MPTConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts
from polyprompt.methods.prompt_tuning import start_prompts


class MPT(Method):
    """Prepend the shared prompt, each number of it multiplied with the task's rank-one matrix.

        P_τ = P* ∘ (u_τ ⊗ v_τ)        inputs = [P_τ ; x]

    Shapes: prompt_PH (P*), tokens_KP (u), features_KH (v); inputs_BPH.
    Source: Wang et al. 2023 (arXiv 2303.02861), section 3.1, prompt decomposition; its two learning rates are
    `train.group_learning_rates` of the groups prompt (P*) and task (u, v).
    Differs: P* is learnt from the tasks' own loss, the paper's ablation without distillation from single-task prompts.
    u and v start from N(1, task_std²), so every task starts near P*; the paper does not say, and PEFT's
    N(0, 0.02²) starts every prompt near zero. Weight decay spares u and v, as it spares a layer norm's gains: it would
    pull them from 1 towards 0 and every prompt with them, three times over. We know of no
    decay in the paper's set-up; PEFT's example decays all three (torch's AdamW as it comes), from a start where u and v
    are near 0 anyway.
    Parameters: P·H + K·(P + H). A prompt of length 0 has none: the plain backbone.
    """

    undecayed = frozenset({"tokens_KP", "features_KH"})

    def __init__(self, config: MPTConfig, dims: Dims, *, seed: int) -> None:
        """Draw starting values from torch's global stream; `seed` is for the draw of pieces in `initialise`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.length > 0
        self.prompt_PH: nn.Parameter | None = None
        if config.length:
            self.prompt_PH = nn.Parameter(torch.randn(config.length, dims.hidden) * config.init_std)
            self.tokens_KP = nn.Parameter(1 + torch.randn(dims.num_tasks, config.length) * config.task_std)
            self.features_KH = nn.Parameter(1 + torch.randn(dims.num_tasks, dims.hidden) * config.task_std)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompt_PH is None:
            return Prompts()
        scale_BPH = self.tokens_KP[task_B][:, :, None] * self.features_KH[task_B][:, None]
        return Prompts(inputs_BPH=(self.prompt_PH * scale_BPH).to(x_BTH.dtype))

    def input_prompts(self) -> Tensor | None:
        return None if self.prompt_PH is None else self.prompt_PH[None]

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter == "prompt_PH" else "task"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_PH is not None:
            start_prompts(self.prompt_PH[None], self.config.init, embedding_VH, seed=self.seed)
