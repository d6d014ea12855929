"""One soft prompt shared by all tasks, scaled for each task by a rank-one matrix."""

import torch
from torch import Tensor, nn

from polyprompt.config import MPTConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts, Teacher
from polyprompt.methods.prompt_tuning import start_prompts


class MPT(Method):
    """Prepend the shared prompt, each number of it multiplied with the task's rank-one matrix.

        P_τ = P* ∘ (u_τ ⊗ v_τ)        inputs = [P_τ ; x]

    With `teachers`, a prompt tuned for each task alone, it is trained on

        L = L_task + λ·(L_logits + L_hidden)

    L_logits: Kullback-Leibler divergence from the output distribution under the task's teacher to that under P_τ;
    L_hidden: squared difference of the hidden states under the two (distillation.py). The teachers stay as they are.

    Shapes: prompt_PH (P*), tokens_KP (u), features_KH (v), sources_JPH (teachers, J = K, frozen); inputs_BPH.
    Source: Wang et al. 2023 (arXiv 2303.02861), section 3.1, prompt decomposition, and 3.2, prompt distillation; its
    two learning rates are `train.group_learning_rates` of the groups prompt (P*) and task (u, v). Without teachers it
    is the paper's ablation. Its target stage is another run on the target tasks with `init: file` from the bundle of
    this one, which takes P*.
    Differs: all tasks are in the mixture, where the paper draws a number of tasks for each batch. In the target stage
    u and v start anew. We know of no value of λ in the paper's text; ours is 1.
    u and v start from N(1, task_std²), so every task starts near P*; the paper does not say, and PEFT's
    N(0, 0.02²) starts every prompt near zero. Weight decay spares u and v, as it spares a layer norm's gains: it would
    pull them from 1 towards 0 and every prompt with them, three times over. We know of no
    decay in the paper's set-up; PEFT's example decays all three (torch's AdamW as it comes), from a start where u and v
    are near 0 anyway.
    Parameters: P·H + K·(P + H). Teachers are not trained and not counted, but kept in the bundle. A prompt of length 0
    has none: the plain backbone.
    """

    undecayed = frozenset({"tokens_KP", "features_KH"})

    sources_JPH: Tensor

    def __init__(self, config: MPTConfig, dims: Dims, sources_JPH: Tensor | None = None, *, seed: int) -> None:
        """Draw starting values from torch's global stream; `seed` is for the draw of pieces in `initialise`.

        sources_JPH: the tasks' teachers, in their order. Raises ConfigError where they are not as many as the tasks.
        """
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
        if sources_JPH is not None:
            self.register_buffer("sources_JPH", sources_JPH.detach().float())
        if config.teachers and (sources_JPH is None or len(sources_JPH) != dims.num_tasks):
            found = 0 if sources_JPH is None else len(sources_JPH)
            raise ConfigError(
                f"method.teachers: {dims.num_tasks} tasks, but teachers of {found}; a task that is added later has "
                "none. Set method.teachers=[] to train it on its own loss"
            )

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompt_PH is None:
            return Prompts()
        scale_BPH = self.tokens_KP[task_B][:, :, None] * self.features_KH[task_B][:, None]
        inputs_BPH = (self.prompt_PH * scale_BPH).to(x_BTH.dtype)
        if not self.training or not self.config.teachers:
            return Prompts(inputs_BPH=inputs_BPH)
        config, theirs = self.config, Prompts(inputs_BPH=self.sources_JPH[task_B].to(x_BTH.dtype))
        teacher = Teacher(theirs, weight=config.distillation_weight, temperature=config.distillation_temperature)
        return Prompts(inputs_BPH=inputs_BPH, teacher=teacher)

    def input_prompts(self) -> Tensor | None:
        return None if self.prompt_PH is None else self.prompt_PH[None]

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter == "prompt_PH" else "task"

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompt_PH is not None:
            start_prompts(self.prompt_PH[None], self.config.init, embedding_VH, seed=self.seed)
