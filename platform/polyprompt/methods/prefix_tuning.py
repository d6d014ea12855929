"""Trained keys and values for every self-attention layer."""

import torch
from torch import Tensor, nn

from polyprompt.config import PrefixTuningConfig
from polyprompt.methods.base import Dims, KeyValues, ParameterGroup, Prompts, StackDims
from polyprompt.methods.made import MadeByTask
from polyprompt.methods.stacks import prompted_stacks, stack_lengths

#: E[tanh(z)²] for z ~ N(0, 1).
TANH_VARIANCE = 0.394


class PrefixTuning(MadeByTask):
    """Prepend P trained keys and values in each layer: one prefix for all tasks, or one for each.

        [P_k ; P_v] of all layers = Θ_τ                        reparameterisation: none
                                  = tanh(Θ'_τ·W1 + b1)·W2 + b2  reparameterisation: mlp

    Shapes: prefix_GPW, G = K with `per_task`, else 1; W = 2·L·N·D: keys of all layers, then values. H before an MLP.
    Source: Li & Liang 2021 (arXiv 2101.00190), section 4.2 and, for the MLP, 4.3; without it P-tuning v2 (Liu et al.
    2022, arXiv 2110.07602), section 3.2.
    Differs: cross-attention has no prefix. Encoder and decoder have their own length and MLP; the MLP is shared by the
    tasks, whose Θ' differ (the papers train one task at a time). Nothing is started from activations of real words:
    keys and values start from N(0, init_std²), with the MLP too, for the reasons in docs/methods.md.
    Parameters of a stack (G prefixes of length P, e = mlp_hidden_size):
        none G·P·W        mlp G·P·H + (H + 1)·e + (e + 1)·W
    A stack with length 0, or left out by `stacks`, has none; with none at all this is the plain backbone.
    """

    def __init__(self, config: PrefixTuningConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream. ConfigError where the backbone has no such stack."""
        super().__init__()
        made = {name: StackPrefix(config, dims, *stack) for name, stack in prompted_stacks(config, dims).items()}
        self.encoder, self.decoder = made.get("encoder"), made.get("decoder")
        self.stack_lengths = stack_lengths(config, dims)
        self.per_task = config.per_task
        self.task_aware = config.per_task and bool(made)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        made, row_B = self.made(task_B)
        return Prompts(
            encoder=None if self.encoder is None else self.encoder.of_rows(made["encoder"], row_B, x_BTH.dtype),
            decoder=None if self.decoder is None else self.decoder.of_rows(made["decoder"], row_B, x_BTH.dtype),
        )

    def known(self, task_B: Tensor) -> Tensor:
        return task_B if self.per_task else torch.zeros_like(task_B)

    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack(task_U) for name, stack in stacks.items() if stack is not None}

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter.endswith("prefix_GPW") else "hypernetwork"


class StackPrefix(nn.Module):
    """The prefixes of one stack and, where there is one, the MLP that makes them."""

    def __init__(self, config: PrefixTuningConfig, dims: Dims, stack: StackDims, length: int) -> None:
        super().__init__()
        self.stack = stack
        num_prefixes = dims.num_tasks if config.per_task else 1
        width = 2 * stack.num_layers * stack.num_heads * stack.head_dim
        self.mlp: nn.Sequential | None = None
        if config.reparameterisation == "none":
            self.prefix_GPW = nn.Parameter(torch.randn(num_prefixes, length, width) * config.init_std)
        else:
            e = config.mlp_hidden_size
            self.prefix_GPW = nn.Parameter(torch.randn(num_prefixes, length, dims.hidden))
            into, out = nn.Linear(dims.hidden, e), nn.Linear(e, width)
            nn.init.normal_(into.weight, std=dims.hidden**-0.5)
            nn.init.normal_(out.weight, std=config.init_std / (TANH_VARIANCE * e) ** 0.5)
            for layer in (into, out):
                nn.init.zeros_(layer.bias)
            self.mlp = nn.Sequential(into, nn.Tanh(), out)

    def forward(self, task_U: Tensor) -> Tensor:
        """Return made_UPW, the keys and values of these prefixes."""
        prefix_UPW = self.prefix_GPW[task_U]
        return prefix_UPW if self.mlp is None else self.mlp(prefix_UPW)

    def of_rows(self, made_UPW: Tensor, row_B: Tensor, dtype: torch.dtype) -> KeyValues:
        """Return keys and values for the rows. row_B: each row's place among the prefixes."""
        made_UPCLND = made_UPW.unflatten(-1, (2, self.stack.num_layers, self.stack.num_heads, self.stack.head_dim))
        keys_LUNPD, values_LUNPD = made_UPCLND.permute(2, 3, 0, 4, 1, 5).to(dtype)
        return KeyValues(keys_LUNPD.index_select(1, row_B), values_LUNPD.index_select(1, row_B))
