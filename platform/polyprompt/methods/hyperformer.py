"""Adapters for every layer, made by one hypernetwork for each stack."""

import torch
from torch import Tensor, nn

from polyprompt.config import HyperFormerConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Adapters, Dims, ParameterGroup, Place, Prompts, StackDims
from polyprompt.methods.made import MadeByTask

PLACES: tuple[Place, ...] = ("attention", "feed_forward")
#: What is made for a layer's places, in the order of `Adapters`.
PARTS = ("down_LJGHR", "down_bias_LJGR", "up_LJGRH", "up_bias_LJGH", "scale_LJGH", "shift_LJGH")
#: Standard deviation of all linear maps at the start, as in the authors' code.
WEIGHT_STD = 0.01


class HyperFormer(MadeByTask):
    """HyperFormer++: adapters behind self-attention and feed-forward, made from task, layer and position.

        I[τ,m,p] = LN(MLP(concat(k_τ, z_m, s_p)))       two layers 3t' → e → t, ReLU
        D, b_D, U, b_U, γ, β = one linear map each of I[τ,m,p]
        y + LN_γ,β(act(y·D + b_D)·U + b_U)              y: the output of a part of a layer, before the residual

    Shapes: task_KY (k), and of each stack layer_MY (z), place_JY (s); R = H // reduction, X = t, Y = t'.
    Source: Mahabadi et al. 2021 (arXiv 2106.04489), sections 2.2 and 2.3; embeddings start from N(0, 1), linear maps
    from N(0, 0.01²) with zero biases, as in the authors' code. Encoder and decoder share the task embeddings and
    nothing else, as there. γ and β then start near 0 and the model near the plain backbone.
    Differs: I is normalised and all maps have biases, as in the code. The backbone's own layer normalisations are
    trained too in the paper: `backbone.trainable=layer_norms`.
    Parameters: K·t' + for each stack (M layers)
        M·t' + 2·t' + (3·t' + 1)·e + (e + 1)·t + 2·t + (t + 1)·(2·H·R + R + 3·H)
    """

    task_aware = True

    def __init__(self, config: HyperFormerConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream. ConfigError where the bottleneck would be empty."""
        super().__init__()
        if config.reduction > dims.hidden:
            raise ConfigError(
                f"method.reduction={config.reduction} must be between 1 and the backbone's hidden size {dims.hidden}: "
                "the bottleneck is hidden size / reduction and needs at least one unit. Lower method.reduction"
            )
        self.activation = config.activation
        self.task_KY = nn.Parameter(torch.randn(dims.num_tasks, config.task_embedding_size))
        stacks: dict[str, StackDims | None] = {"encoder": dims.encoder, "decoder": dims.decoder}
        self.stacks = nn.ModuleDict(
            {name: StackHypernetwork(config, dims, stack) for name, stack in stacks.items() if stack}
        )
        self.layer_multiply_adds = len(PLACES) * 2 * dims.hidden * (dims.hidden // config.reduction)

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        made, owner_B = self.made(task_B)
        adapters = {}
        for stack in self.stacks:
            parts = {name: made[f"{stack}.{name}"].to(x_BTH.dtype) for name in PARTS}
            adapters[stack] = Adapters(PLACES, self.activation, owner_B, **parts)
        return Prompts(adapters=adapters)

    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        task_GY = self.task_KY[task_U]
        made = {stack: network(task_GY) for stack, network in self.stacks.items()}
        return {f"{stack}.{name}": tensor for stack, parts in made.items() for name, tensor in parts.items()}

    def group_of(self, parameter: str) -> ParameterGroup:
        return "hypernetwork"


class StackHypernetwork(nn.Module):
    """The hypernetwork of one stack, its layer and its position embeddings."""

    def __init__(self, config: HyperFormerConfig, dims: Dims, stack: StackDims) -> None:
        super().__init__()
        hidden, bottleneck = dims.hidden, dims.hidden // config.reduction
        x, y, e = config.projected_embedding_size, config.task_embedding_size, config.mlp_hidden_size
        self.layer_MY = nn.Parameter(torch.randn(stack.num_layers, y))
        self.place_JY = nn.Parameter(torch.randn(len(PLACES), y))
        self.mlp = nn.Sequential(_linear(3 * y, e), nn.ReLU(), _linear(e, x), nn.LayerNorm(x, eps=1e-6))
        self.down, self.down_bias = _linear(x, hidden * bottleneck), _linear(x, bottleneck)
        self.up, self.up_bias = _linear(x, bottleneck * hidden), _linear(x, hidden)
        self.scale, self.shift = _linear(x, hidden), _linear(x, hidden)

    def forward(self, task_GY: Tensor) -> dict[str, Tensor]:
        """Return the PARTS of the adapters of the tasks with these embeddings."""
        lead = (len(self.layer_MY), len(self.place_JY), len(task_GY), -1)
        of_task, of_layer, of_place = task_GY, self.layer_MY[:, None, None], self.place_JY[:, None]
        joint_LJGX = self.mlp(torch.cat([part.expand(lead) for part in (of_task, of_layer, of_place)], dim=-1))
        bottleneck = self.down_bias.out_features
        made = (
            self.down(joint_LJGX).unflatten(-1, (-1, bottleneck)),
            self.down_bias(joint_LJGX),
            self.up(joint_LJGX).unflatten(-1, (bottleneck, -1)),
            self.up_bias(joint_LJGX),
            self.scale(joint_LJGX),
            self.shift(joint_LJGX),
        )
        return dict(zip(PARTS, made, strict=True))


def _linear(into: int, out: int) -> nn.Linear:
    linear = nn.Linear(into, out)
    nn.init.normal_(linear.weight, std=WEIGHT_STD)
    nn.init.zeros_(linear.bias)
    return linear
