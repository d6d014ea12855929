"""Prompts for every self-attention layer, made by hypernetworks."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from polyprompt.config import HyperPromptConfig, RoutedHyperPromptConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Dims, KeyValues, ParameterGroup, Prompts, StackDims
from polyprompt.methods.made import MadeByTask
from polyprompt.methods.routing import Routed
from polyprompt.methods.stacks import prompted_stacks, stack_lengths

#: Standard deviation of the generated keys and values at the start.
PROMPT_STD = 0.1


class HyperPrompt(MadeByTask):
    """A global prompt for each task, turned into keys and values of each layer by bottleneck hypernetworks.

        P_k[m,τ] = U_k[m,τ] · ReLU(D_k[m,τ] · P_τ)        likewise P_v; encoder and decoder have their own of everything

    variant share: D, U for each layer, shared by all tasks. sep: D, U for each layer and task.
    global: D[m,τ] = W_D · I[m,τ], U[m,τ] = W_U · I[m,τ] with I[m,τ] = MLP(concat(k_τ, z_m)).

    Letters: C = 2 (keys, values), M layers of the stack, E bottleneck = H // reduction, F = N·D, X = t the layer-task
    embedding, Y = t' the task and layer embeddings, Z = e the MLP's hidden size.
    Source: He et al. 2022 (arXiv 2203.00759), section 3 (HyperPrompt-Share, -Sep and -Global).
    Differs: U maps to N·D, which the paper takes to be H (T5-3B and T5-11B differ). No biases anywhere. The paper does
    not state the start; here D·P has unit variance, and U is scaled so that keys and values start from N(0, 0.1²)
    whatever the variant and the sizes. Keys near 0 give prompt columns a logit near 0, the least attention mass that
    random keys can have on average, and values near 0 add nothing: at the start the prompts only shrink a head's
    output, by the share of its mass that they take. U is not 0, or D and P would get no gradient at the first step.
    Parameters of a stack (K tasks, P = its prompt length):
        share  H·P·K + 2·M·E·(H + F)
        sep    H·P·K + 2·M·K·E·(H + F)
        global H·P·K + 2·E·t·(H + F) + K·t' + M·t' + (2·t' + t)·e
    A stack with length 0, or left out by `stacks`, has none; with none at all this is the plain backbone.
    """

    def __init__(self, config: HyperPromptConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream.

        Raises ConfigError where the bottleneck would be empty or the backbone has no such stack.
        """
        super().__init__()
        self.encoder, self.decoder = stack_prompts(config, dims, dims.num_tasks)
        self.stack_lengths = stack_lengths(config, dims)
        self.task_aware = self.encoder is not None or self.decoder is not None

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        made, row_B = self.made(task_B)
        return Prompts(
            encoder=None if self.encoder is None else self.encoder.of_rows(made["encoder"], row_B, x_BTH.dtype),
            decoder=None if self.decoder is None else self.decoder.of_rows(made["decoder"], row_B, x_BTH.dtype),
        )

    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack(task_U) for name, stack in stacks.items() if stack is not None}

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter.endswith("prompt_KPH") else "hypernetwork"


def stack_prompts(
    config: HyperPromptConfig | RoutedHyperPromptConfig, dims: Dims, num_prompts: int
) -> tuple["StackPrompts | None", "StackPrompts | None"]:
    """Return the encoder's and the decoder's, None where there are none. Raises ConfigError as HyperPrompt does."""
    if config.reduction > dims.hidden:
        raise ConfigError(
            f"method.reduction={config.reduction} must be between 1 and the backbone's hidden size {dims.hidden}: "
            "the bottleneck is hidden size / reduction and needs at least one unit. Lower method.reduction"
        )
    stacks = prompted_stacks(config, dims)
    made = {name: StackPrompts(config, dims, *stack, num_prompts) for name, stack in stacks.items()}
    return made.get("encoder"), made.get("decoder")


class StackPrompts(nn.Module):
    """The prompts and hypernetworks of one stack. Weights are stacked over layers and tasks, so that a batch that
    lacks a task gives zero gradients rather than none, as data parallel training needs."""

    def __init__(
        self,
        config: HyperPromptConfig | RoutedHyperPromptConfig,
        dims: Dims,
        stack: StackDims,
        length: int,
        num_prompts: int,
    ) -> None:
        super().__init__()
        self.variant: Literal["share", "sep", "global"] = config.variant
        self.stack = stack
        hidden, width = dims.hidden, stack.num_heads * stack.head_dim
        bottleneck = hidden // config.reduction
        # D·P has unit variance and ReLU halves the second moment, hence the 2.
        down_std, up_std = hidden**-0.5, PROMPT_STD * (2 / bottleneck) ** 0.5
        self.prompt_KPH = nn.Parameter(torch.randn(num_prompts, length, hidden))
        if config.variant == "global":
            x, y, z = config.layer_task_embedding_size, config.task_embedding_size, config.mlp_hidden_size
            self.task_KY = nn.Parameter(torch.randn(dims.num_tasks, y))
            self.layer_MY = nn.Parameter(torch.randn(stack.num_layers, y))
            self.mlp_in = nn.Parameter(torch.randn(2 * y, z) / math.sqrt(y))
            self.mlp_out = nn.Parameter(torch.randn(z, x) / math.sqrt(z))
            # The MLP keeps unit variance, so a generated D or U has the scale that share and sep start from.
            self.down_CXHE = nn.Parameter(torch.randn(2, x, hidden, bottleneck) * down_std / math.sqrt(x))
            self.up_CXEF = nn.Parameter(torch.randn(2, x, bottleneck, width) * up_std / math.sqrt(x))
        else:
            owners = 1 if config.variant == "share" else dims.num_tasks
            self.down_CMGHE = nn.Parameter(torch.randn(2, stack.num_layers, owners, hidden, bottleneck) * down_std)
            self.up_CMGEF = nn.Parameter(torch.randn(2, stack.num_layers, owners, bottleneck, width) * up_std)

    def forward(self, task_U: Tensor) -> Tensor:
        """Return made_CMUPF, the keys and values of these tasks."""
        down_CMUHE, up_CMUEF = self._hypernetworks(task_U)
        hidden_CMUPE = torch.einsum("uph,cmuhe->cmupe", self.prompt_KPH[task_U], down_CMUHE).relu()
        return torch.einsum("cmupe,cmuef->cmupf", hidden_CMUPE, up_CMUEF)

    def of_rows(self, made_CMUPF: Tensor, row_B: Tensor, dtype: torch.dtype) -> KeyValues:
        """Return keys and values for the rows. row_B: each row's place among the tasks."""
        made_CMUPND = made_CMUPF.unflatten(-1, (self.stack.num_heads, self.stack.head_dim))
        keys_LUNPD, values_LUNPD = made_CMUPND.transpose(3, 4).to(dtype)
        return KeyValues(keys_LUNPD.index_select(1, row_B), values_LUNPD.index_select(1, row_B))

    def of_each_prompt(self, task_U: Tensor) -> Tensor:
        """Return made_CMURPF: keys and values of each of a router's R prompts, which prompt_KPH then holds."""
        down_CMUHE, up_CMUEF = self._hypernetworks(task_U)
        hidden_CMURPE = torch.einsum("rph,cmuhe->cmurpe", self.prompt_KPH, down_CMUHE).relu()
        return torch.einsum("cmurpe,cmuef->cmurpf", hidden_CMURPE, up_CMUEF)

    def routed(self, made_CMURPF: Tensor, row_B: Tensor, routed: Routed, dtype: torch.dtype) -> KeyValues:
        """Return keys and values of the prompts that a router picks or mixes.

        What is made of a prompt is weighted, which at one prompt is the same as weighting the prompt: ReLU(w·x) =
        w·ReLU(x) for w >= 0.
        """
        made_CMVPF = made_CMURPF.flatten(2, 3)
        place_BC = row_B[:, None] * len(self.prompt_KPH) + routed.choice_BC
        # Only what a row gets is gathered: one prompt for most routings, all R for routing none and gumbel.
        rows_CMBPF = torch.stack(
            [
                made_CMVPF.index_select(2, place_B) * weight_B[:, None, None]
                for place_B, weight_B in zip(place_BC.T, routed.weight_BC.T, strict=True)
            ]
        ).sum(dim=0)
        rows_CMBPND = rows_CMBPF.unflatten(-1, (self.stack.num_heads, self.stack.head_dim))
        keys_LBNPD, values_LBNPD = rows_CMBPND.transpose(3, 4).to(dtype)
        return KeyValues(keys_LBNPD, values_LBNPD)

    def _hypernetworks(self, task_U: Tensor) -> tuple[Tensor, Tensor]:
        """Return D [C, M, U, H, E] and U [C, M, U, E, F] for the tasks of the batch."""
        match self.variant:
            case "share":
                size = (-1, -1, len(task_U), -1, -1)
                return self.down_CMGHE.expand(size), self.up_CMGEF.expand(size)
            case "sep":
                return self.down_CMGHE[:, :, task_U], self.up_CMGEF[:, :, task_U]
            case "global":
                num_layers, num_tasks = len(self.layer_MY), len(task_U)
                task_MUY = self.task_KY[task_U].expand(num_layers, -1, -1)
                layer_MUY = self.layer_MY[:, None].expand(-1, num_tasks, -1)
                joint_MUX = torch.cat([task_MUY, layer_MUY], dim=-1) @ self.mlp_in
                joint_MUX = joint_MUX.relu() @ self.mlp_out
                return (
                    torch.einsum("mux,cxhe->cmuhe", joint_MUX, self.down_CXHE),
                    torch.einsum("mux,cxef->cmuef", joint_MUX, self.up_CXEF),
                )
