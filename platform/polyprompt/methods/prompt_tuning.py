"""Soft prompts before the input."""

import torch
from torch import Tensor, nn

from polyprompt.config import PromptTuningConfig
from polyprompt.method_configs import TaskPromptConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts

NUM_COMMON_PIECES = 5000


class PromptTuning(Method):
    """Prepend P trained vectors to the input embeddings: one prompt for all tasks, or one for each.

    Shapes: prompt_GPH, G = K with `per_task`, else 1; inputs_BPH.
    Source: Lester, Al-Rfou, Constant 2021 (arXiv 2104.08691), section 2; "Prompt-Tuning" of He et al. 2022 is this
    with `per_task: true` and the whole backbone trained.
    Differs: `init: vocabulary` draws rows of the 5,000 most common pieces without replacement, one draw a task; a
    vocabulary is sorted by frequency, so these are the first 5,000 ordinary ids. The other starts
    are in starts.py.
    Parameters: G·P·H. A prompt of length 0 is the plain backbone.
    """

    def __init__(self, config: PromptTuningConfig, dims: Dims, *, seed: int) -> None:
        """Draw N(0, init_std²) from torch's global stream; `seed` is for the draw of pieces in `initialise`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.per_task and config.length > 0
        self.prompt_GPH = draw_prompts(config, dims)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompt_GPH is None:
            return Prompts()
        row_B = task_B if self.config.per_task else torch.zeros_like(task_B)
        return Prompts(inputs_BPH=self.prompt_GPH[row_B].to(x_BTH.dtype))

    def input_prompts(self) -> nn.Parameter | None:
        return self.prompt_GPH

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_GPH is not None:
            start_prompts(self.prompt_GPH, self.config.init, embedding_VH, seed=self.seed)


def draw_prompts(config: TaskPromptConfig, dims: Dims) -> nn.Parameter | None:
    """Draw prompt_GPH from N(0, init_std²), G = K with `per_task`, else 1; None at length 0."""
    if not config.length:
        return None
    num_prompts = dims.num_tasks if config.per_task else 1
    return nn.Parameter(torch.randn(num_prompts, config.length, dims.hidden) * config.init_std)


@torch.no_grad()
def start_prompts(prompts_GPH: Tensor, init: str, embedding_VH: Tensor, *, seed: int) -> None:
    """Set prompts that start from common pieces or from zero; labels are later laid over common pieces."""
    if init == "zero":
        prompts_GPH.zero_()
    if init not in ("vocabulary", "labels"):
        return
    num_pieces = min(NUM_COMMON_PIECES, len(embedding_VH))
    generator = torch.Generator().manual_seed(seed)
    for prompt_PH in prompts_GPH:
        # A prompt longer than the vocabulary (tiny models) starts over with the first piece drawn.
        piece_P = torch.randperm(num_pieces, generator=generator)[torch.arange(len(prompt_PH)) % num_pieces]
        prompt_PH.copy_(embedding_VH[piece_P.to(embedding_VH.device)])
