"""Sparse mixture of prompts: a router picks one short prompt for each row."""

import torch
from torch import Tensor, nn

from polyprompt.config import SMoPConfig
from polyprompt.methods.base import Dims, Method, ParameterGroup, Prompts
from polyprompt.methods.prompt_tuning import start_prompts
from polyprompt.methods.routing import route, router_logits, start_routers


class SMoP(Method):
    """R short soft prompts and a linear router that picks one (or mixes the top few) for each row.

        x̄ = mean of the row's real input embeddings         p = softmax(μ·x̄)         c = argmax_j p_j
        inputs = [p_c · P_c ; x]                              training: logits μ·x̄ times (1 + ε), ε ~ N(0, 1)

    Shapes: prompts_RPH; router_GHR, G = K with `router: per_task`, else 1; inputs_BPH.
    `routing` other than top_k: formulas in routing.py.
    Source: Choi et al. 2023 (EMNLP main 884), section 2. Orthogonal router and N(0, 1) prompts as in the authors' code.
    Differs: `top_k` > 1 is Σ p_j·P_j over the top_k prompts with p as it is, not renormalised, so that top_k = 1 is the
    paper's formula; `router: per_task` gives every task its own router over the shared prompts (the paper trains one
    task at a time). ε is a constant factor to the gradient too; the authors' code adds ε times the detached logit,
    which has the same value but lets the gradient pass with factor 1.
    `gate: batch_sum` is what the authors' code computes at top-1 through a broadcast: p_c times the SUM of the prompts
    chosen by all rows of the batch. A row then depends on its batch-mates; it is there to measure the difference.
    Parameters: R·P·H + G·H·R. Prompts of length 0 have neither prompts nor router: the plain backbone.
    """

    def __init__(self, config: SMoPConfig, dims: Dims, *, seed: int) -> None:
        """Draw the starting values from torch's global stream. ConfigError where an orthogonal router cannot exist."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.input_length = config.length
        self.task_aware = config.router == "per_task" and config.length > 0
        self.prompts_RPH: nn.Parameter | None = None
        if config.length:
            self.num_routes = config.num_prompts
            self.prompts_RPH = nn.Parameter(
                torch.randn(config.num_prompts, config.length, dims.hidden) * config.init_std
            )
            self.router_GHR = nn.Parameter(start_routers(config, dims))

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.prompts_RPH is None:
            return Prompts()
        # The choice must not flip with bf16's rounding, so the router computes in fp32, under autocast too.
        with torch.autocast(x_BTH.device.type, enabled=False):
            logits_BR = router_logits(self.config, self.router_GHR, x_BTH, mask_BT, task_B)
            routed = route(self.config, logits_BR, training=self.training)
            chosen_BCPH = self.prompts_RPH[routed.choice_BC]
            if self.config.gate == "batch_sum":
                chosen_BCPH = chosen_BCPH.sum(dim=0, keepdim=True)
            inputs_BPH = (routed.weight_BC[:, :, None, None] * chosen_BCPH).sum(dim=1)
        return Prompts(inputs_BPH=inputs_BPH.to(x_BTH.dtype), aux=routed.aux, penalty_B=routed.penalty_B)

    def input_prompts(self) -> nn.Parameter | None:
        return self.prompts_RPH

    def initialise(self, embedding_VH: Tensor) -> None:
        if self.prompts_RPH is not None:
            start_prompts(self.prompts_RPH, self.config.init, embedding_VH, seed=self.seed)

    def group_of(self, parameter: str) -> ParameterGroup:
        return "router" if parameter == "router_GHR" else "prompt"
