"""Soft prompts before the input."""

import torch
from torch import Tensor, nn

from polyprompt.config import PromptTuningConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts

NUM_COMMON_PIECES = 5000


class PromptTuning(Method):
    """Prepend P trained vectors to the input embeddings: one prompt for all tasks, or one for each.

    Shapes: prompt_GPH, G = K with `per_task`, else 1; inputs_BPH.
    Source: Lester, Al-Rfou, Constant 2021 (arXiv 2104.08691), section 2; "Prompt-Tuning" of He et al. 2022 is this
    with `per_task: true` and the whole backbone trained.
    Differs: `init: vocabulary` draws rows of the 5,000 most common pieces without replacement, one draw a task; a
    vocabulary is sorted by frequency, so these are the first 5,000 ordinary ids. The paper's start from class labels is
    left out.
    Parameters: G·P·H. A prompt of length 0 is the plain backbone.
    """

    def __init__(self, config: PromptTuningConfig, dims: Dims, *, seed: int) -> None:
        """Draw N(0, init_std²) from torch's global stream; `seed` is for the draw of pieces in `initialise`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.per_task and config.length > 0
        num_prompts = dims.num_tasks if config.per_task else 1
        self.prompt_GPH: nn.Parameter | None = None
        if config.length:
            self.prompt_GPH = nn.Parameter(torch.randn(num_prompts, config.length, dims.hidden) * config.init_std)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompt_GPH is None:
            return Prompts()
        row_B = task_B if self.config.per_task else torch.zeros_like(task_B)
        return Prompts(inputs_BPH=self.prompt_GPH[row_B].to(x_BTH.dtype))

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_GPH is not None and self.config.init == "vocabulary":
            start_from_vocabulary(self.prompt_GPH, embedding_VH, self.seed)


@torch.no_grad()
def start_from_vocabulary(prompt_GPH: Tensor, embedding_VH: Tensor, seed: int) -> None:
    """Set each prompt to embeddings of common pieces, drawn without replacement, one draw a prompt."""
    num_pieces = min(NUM_COMMON_PIECES, len(embedding_VH))
    generator = torch.Generator().manual_seed(seed)
    for prompt_PH in prompt_GPH:
        # A prompt longer than the vocabulary (tiny models) starts over with the first piece drawn.
        piece_P = torch.randperm(num_pieces, generator=generator)[torch.arange(len(prompt_PH)) % num_pieces]
        prompt_PH.copy_(embedding_VH[piece_P.to(embedding_VH.device)])
