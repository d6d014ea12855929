"""How a router's logits become the prompts of each row: the choice, its weights, the statistics, the balance loss.

Letters: B rows, R prompts, C the prompts mixed for a row, G routers, H hidden size, T input tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from polyprompt.errors import ConfigError
from polyprompt.method_configs import RoutingConfig
from polyprompt.methods.base import Dims


class Routed(NamedTuple):
    """A row's prompt is Σ over C of weight_BC · prompt[choice_BC]. penalty_B: None without a load-balance loss."""

    choice_BC: Tensor
    weight_BC: Tensor
    aux: dict[str, Tensor]
    penalty_B: Tensor | None


def start_routers(config: RoutingConfig, dims: Dims) -> Tensor:
    """Draw orthogonal routers [G, H, R] from torch's global stream. Raises ConfigError where there can be none."""
    if config.num_prompts > dims.hidden:
        raise ConfigError(
            f"method.num_prompts={config.num_prompts} must be between 1 and the backbone's hidden size "
            f"{dims.hidden}: the router starts orthogonal. Lower method.num_prompts"
        )
    num_routers = dims.num_tasks if config.router == "per_task" else 1
    routers = [nn.init.orthogonal_(torch.empty(dims.hidden, config.num_prompts)) for _ in range(num_routers)]
    return torch.stack(routers)


def router_logits(config: RoutingConfig, router_GHR: Tensor, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Tensor:
    """Return μ·x̄ [B, R]; x̄ is the mean of the row's real input embeddings."""
    mask_BT1 = mask_BT[:, :, None].float()
    mean_BH = (x_BTH.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)
    router_BHR = router_GHR[task_B if config.router == "per_task" else torch.zeros_like(task_B)]
    return torch.einsum("bh,bhr->br", mean_BH, router_BHR)


def route(config: RoutingConfig, logits_BR: Tensor, *, training: bool) -> Routed:
    """Choose and weigh prompts, row by row. Noise is drawn from torch's global stream, in training only.

    Formulas (p = softmax of the logits, perturbed if asked):
        top_k       Σ of p_j·P_j over the top_k prompts          none        Σ of p_j·P_j over all
        gumbel      y = softmax((logits + Gumbel noise) / temperature), weight one-hot(argmax y) + y - stop(y)
        stochastic  p_c·P_c with c drawn from p
    Prediction has no noise: gumbel and stochastic take the likeliest prompt.
    Load-balance loss of a row: load_balance · R · Σ_j f_j·p_j, f_j the share of prompt j over the rows given here, a
    constant; its mean over the rows is Fedus et al. 2022 (arXiv 2101.03961), eq. 4.
    aux: see Prompts.
    """
    clean_BR = logits_BR.detach()
    if training and config.perturbed:
        logits_BR = logits_BR * (1 + torch.randn_like(logits_BR))
    probability_BR = logits_BR.softmax(dim=-1)
    match config.routing:
        case "top_k" | "none":
            weight_BC, choice_BC = probability_BR.topk(config.num_mixed, dim=-1)
        case "gumbel":
            weight_BC = _straight_through(logits_BR, config.gumbel_temperature, training)
            choice_BC = torch.arange(config.num_prompts, device=logits_BR.device).expand_as(weight_BC)
        case "stochastic":
            picked = torch.multinomial(probability_BR, 1) if training else probability_BR.argmax(dim=-1, keepdim=True)
            weight_BC, choice_BC = probability_BR.gather(1, picked), picked
    load_BR = torch.zeros_like(probability_BR).scatter_add(1, choice_BC, weight_BC.detach())
    load_BR = load_BR / load_BR.sum(dim=-1, keepdim=True)
    penalty_B = None
    if config.load_balance:
        penalty_B = config.load_balance * config.num_prompts * (probability_BR @ load_BR.mean(dim=0))
    return Routed(choice_BC, weight_BC, _statistics(config, clean_BR, load_BR), penalty_B)


def _straight_through(logits_BR: Tensor, temperature: float, training: bool) -> Tensor:
    if training:
        # An exponential's -log is Gumbel noise.
        logits_BR = logits_BR - torch.empty_like(logits_BR).exponential_().log()
    soft_BR = (logits_BR / temperature).softmax(dim=-1)
    hard_BR = one_hot(soft_BR.argmax(dim=-1), soft_BR.shape[1]).to(soft_BR.dtype)
    return hard_BR + (soft_BR - soft_BR.detach())


@torch.no_grad()
def _statistics(config: RoutingConfig, logits_BR: Tensor, load_BR: Tensor) -> dict[str, Tensor]:
    probability_BR = logits_BR.softmax(dim=-1)
    top_BC, choice_BC = probability_BR.topk(config.num_mixed, dim=-1)
    share_BR = torch.zeros_like(probability_BR).scatter(1, choice_BC, top_BC / top_BC.sum(dim=-1, keepdim=True))
    return {"router/probability": probability_BR, "router/load": load_BR, "router/share": share_BR}
