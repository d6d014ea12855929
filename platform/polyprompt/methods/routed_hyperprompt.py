"""HyperPrompt whose global prompts are picked by a router instead of by the task."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from polyprompt.config import RoutedHyperPromptConfig
from polyprompt.methods.base import Dims, ParameterGroup, Prompts
from polyprompt.methods.hyperprompt import stack_prompts
from polyprompt.methods.made import MadeByTask
from polyprompt.methods.routing import route, router_logits, start_routers
from polyprompt.methods.stacks import stack_lengths


class RoutedHyperPrompt(MadeByTask):
    """R global prompts; a router picks one (or mixes some) for each row, hypernetworks make keys and values of it.

        p = softmax(μ·x̄), c = argmax_j p_j                           as SMoP; other routings in routing.py
        P_k[m,τ] = p_c · U_k[m,τ] · ReLU(D_k[m,τ] · P_c)              likewise P_v; several prompts are summed

    The choice is one for the whole model; encoder and decoder have their own prompts and hypernetworks, as HyperPrompt.
    variant share: D, U for each layer. global: D, U from the layer embedding z_m and k_τ, with `task_embedding` one k_τ
    a task, else one k for all. `router: per_task` lets the router know the task too.
    Source: ours; SMoP (Choi et al. 2023) for the router, HyperPrompt (He et al. 2022) for the rest.
    With R = 1 and no task embedding p_c is 1, and this is HyperPrompt with one global prompt for all tasks.
    Parameters, with K' = K tasks with the task embedding, else 1, and letters as of HyperPrompt: G·H·R for the router
    (G = K with `router: per_task`, else 1), and for each stack
        share  H·P·R + 2·M·E·(H + F)
        global H·P·R + 2·E·t·(H + F) + K'·t' + M·t' + (2·t' + t)·e
    Without any prompts there is no router either: the plain backbone.
    """

    def __init__(self, config: RoutedHyperPromptConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream. ConfigError as of HyperPrompt and of routers."""
        super().__init__()
        self.config = config
        known = dims if config.hypernetworks_know_task else replace(dims, num_tasks=1)
        self.encoder, self.decoder = stack_prompts(config, known, config.num_prompts)
        self.stack_lengths = stack_lengths(config, dims)
        self.task_aware = False
        if self.encoder is not None or self.decoder is not None:
            self.num_routes = config.num_prompts
            self.task_aware = config.router == "per_task" or config.hypernetworks_know_task
            self.router_GHR = nn.Parameter(start_routers(config, dims))

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if not self.num_routes:
            return Prompts()
        # As in SMoP, the choice must not flip with bf16's rounding.
        with torch.autocast(x_BTH.device.type, enabled=False):
            logits_BR = router_logits(self.config, self.router_GHR, x_BTH, mask_BT, task_B)
            routed = route(self.config, logits_BR, training=self.training)
        made, row_B = self.made(task_B)
        return Prompts(
            encoder=None if self.encoder is None else self.encoder.routed(made["encoder"], row_B, routed, x_BTH.dtype),
            decoder=None if self.decoder is None else self.decoder.routed(made["decoder"], row_B, routed, x_BTH.dtype),
            aux=routed.aux,
            penalty_B=routed.penalty_B,
        )

    def known(self, task_B: Tensor) -> Tensor:
        return task_B if self.config.hypernetworks_know_task else torch.zeros_like(task_B)

    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack.of_each_prompt(task_U) for name, stack in stacks.items() if stack is not None}

    def group_of(self, parameter: str) -> ParameterGroup:
        if parameter == "router_GHR":
            return "router"
        return "prompt" if parameter.endswith("prompt_KPH") else "hypernetwork"
