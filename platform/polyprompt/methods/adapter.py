"""Bottlenecks behind the parts of each layer."""

import torch
from torch import Tensor, nn

from polyprompt.config import AdapterConfig
from polyprompt.methods.base import Adapters, Dims, Method, ParameterGroup, Place, Prompts, StackDims

PLACES: dict[str, tuple[Place, ...]] = {"houlsby": ("attention", "feed_forward"), "pfeiffer": ("feed_forward",)}


class Adapter(Method):
    """Add a small two-layer network's answer to the output of self-attention and feed-forward.

        y + act(y·D + b_D)·U + b_U        y: the output of a part of a layer, before it is added to the residual

    variant houlsby: behind self-attention and feed-forward. pfeiffer: behind the feed-forward alone.
    Shapes: down_LJGHR (D), up_LJGRH (U), their biases; G = K with `per_task`, else 1; R = `bottleneck`.
    Source: Houlsby et al. 2019 (arXiv 1902.00751), section 2.1; Pfeiffer et al. 2021 (arXiv 2005.00247), section 3.2.
    There is no layer normalisation within, as in both; the backbone's own are trained too, as in both papers, where
    `backbone.trainable=layer_norms` says so, and then shared by the tasks.
    Differs: cross-attention has none. In T5 the adapter stands before the part's dropout, as in HyperFormer's; in GPT-2
    behind it, as in Houlsby's. Houlsby trains one task at a time.
    It starts near the plain backbone: weights from N(0, init_std²) cut off at 2·init_std, biases 0.
    Parameters: G·J·M·(2·H·R + R + H), M layers of all stacks, J = 2 places (houlsby) or 1. A bottleneck of 0 has none:
    the plain backbone.
    """

    def __init__(self, config: AdapterConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream."""
        super().__init__()
        self.config = config
        self.task_aware = config.per_task and config.bottleneck > 0
        stacks: dict[str, StackDims | None] = {"encoder": dims.encoder, "decoder": dims.decoder}
        self.stacks = nn.ModuleDict(
            {name: StackAdapters(config, dims, stack) for name, stack in stacks.items() if stack and config.bottleneck}
        )
        self.layer_multiply_adds = len(PLACES[config.variant]) * 2 * dims.hidden * config.bottleneck

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        owner_B = task_B if self.config.per_task else torch.zeros_like(task_B)
        return Prompts(adapters={name: stack(owner_B, x_BTH.dtype) for name, stack in self.stacks.items()})

    def group_of(self, parameter: str) -> ParameterGroup:
        return "adapter"


class StackAdapters(nn.Module):
    """The adapters of one stack, stacked over layers, places and tasks."""

    def __init__(self, config: AdapterConfig, dims: Dims, stack: StackDims) -> None:
        super().__init__()
        self.config = config
        lead = (stack.num_layers, len(PLACES[config.variant]), dims.num_tasks if config.per_task else 1)
        hidden, bottleneck = dims.hidden, config.bottleneck
        self.down_LJGHR = nn.Parameter(torch.empty(*lead, hidden, bottleneck))
        self.up_LJGRH = nn.Parameter(torch.empty(*lead, bottleneck, hidden))
        for weights in (self.down_LJGHR, self.up_LJGRH):
            nn.init.trunc_normal_(weights, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
        self.down_bias_LJGR = nn.Parameter(torch.zeros(*lead, bottleneck))
        self.up_bias_LJGH = nn.Parameter(torch.zeros(*lead, hidden))

    def forward(self, owner_B: Tensor, dtype: torch.dtype) -> Adapters:
        """Return the adapters of the rows. owner_B: each row's place among the sets."""
        return Adapters(
            places=PLACES[self.config.variant],
            activation=self.config.activation,
            owner_B=owner_B,
            down_LJGHR=self.down_LJGHR.to(dtype),
            down_bias_LJGR=self.down_bias_LJGR.to(dtype),
            up_LJGRH=self.up_LJGRH.to(dtype),
            up_bias_LJGH=self.up_bias_LJGH.to(dtype),
        )
