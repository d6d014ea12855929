"""Low-rank updates of the backbone's own linear maps, by Hugging Face PEFT."""

from typing import Any

import torch
from torch import Tensor, nn

from polyprompt.config import LoRAConfig
from polyprompt.errors import ConfigError
from polyprompt.methods.base import Method, ParameterGroup, Prompts

#: PEFT has its own choice for the other families.
TARGETS = {"umt5": ["q", "v"]}


class LoRA(Method):
    """Add a low-rank update to linear maps of the backbone: W·x + (alpha / rank)·B·A·dropout(x).

    There are no prompts: PEFT puts its layers into the backbone, once, when the two are joined (`join`). A and B are
    held by both, and are the method's: they train whether or not the backbone does, and a bundle has them under
    `method.`.
    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, as PEFT computes it. `target_modules` left out is PEFT's own
    choice for the family: q and v of all attention in T5, c_attn in GPT-2, q_proj and v_proj in Llama and Qwen.
    Differs: one update for all tasks.
    Parameters: rank·Σ(inputs + outputs) over the maps. A rank of 0 has none: the plain backbone.
    """

    task_aware = False

    def __init__(self, config: LoRAConfig, *, seed: int) -> None:
        """seed: for the starting values, drawn in `join`."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.layers = nn.ModuleDict()

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        return Prompts()

    def group_of(self, parameter: str) -> ParameterGroup:
        return "adapter"

    def join(self, model: Any) -> None:
        """Put PEFT's layers into the model. Raises ConfigError where it has no such modules."""
        if not self.config.rank:
            return
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        # PEFT freezes what is not its own.
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        targets = self.config.target_modules or TARGETS.get(model.config.model_type)
        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=targets,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(self.seed)
                inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ConfigError(
                f"method.target_modules={self.config.target_modules}: PEFT cannot put LoRA there: {error} Name linear "
                "modules of the backbone by the ends of their names, such as [q, v] for T5, or all-linear"
            ) from error
        for parameter, was in trained:
            parameter.requires_grad_(was)
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                maps = {"down": module.lora_A["default"], "up": module.lora_B["default"]}
                # PEFT follows the dtype of the map, which is bf16 where it is frozen.
                self.layers[name.replace(".", "/")] = nn.ModuleDict(maps).float()

    def module_multiply_adds(self) -> dict[str, int]:
        return {
            name.replace("/", "."): sum(weights.numel() for weights in layer.parameters())
            for name, layer in self.layers.items()
        }
