"""The optimizer, its parameter groups and its learning-rate schedule, from the config."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor, get_scheduler

from polyprompt import sharding
from polyprompt.method_configs import ParameterGroup
from polyprompt.train_config import TrainConfig

#: AdamW's scale_parameter: weights of this size (root mean square) and above take the whole learning rate.
WHOLE_RATE = 0.1
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "inverse_sqrt": "inverse_sqrt"}


class Optim:
    """An optimizer and its schedule, stepped and saved together."""

    def __init__(
        self,
        config: TrainConfig,
        groups: Mapping[ParameterGroup, list[tuple[str, nn.Parameter]]],
        undecayed: Collection[str] = (),
    ) -> None:
        """groups: optimizer group (ParameterGroup) → named parameters. Empty ones are left out.

        Adafactor (Shazeer & Stern 2018) takes its learning rate from the config, never from the step. Its
        scale_parameter (section 8 there) is off as in SMoP's and prompt tuning's published set-ups; T5 was trained
        with it. For AdamW we take the same idea with two differences: the size is that of the weights as the run
        starts, and from WHOLE_RATE on the rate grows no further, since an embedding table (size 1) has a gradient in a
        few rows only and would be driven apart. Weight decay spares biases and layer norms (tensors of one dimension)
        and the parameters named `undecayed`.
        """
        self.config = config
        self.parameters = [parameter for members in groups.values() for _, parameter in members]
        tables = []
        for group, members in groups.items():
            rate = config.group_learning_rates.get(group, config.learning_rate)
            for decay, kind in ((config.weight_decay, True), (0.0, False)):
                parameters = [p for name, p in members if (p.ndim > 1 and name not in undecayed) == kind]
                for scale, scaled in self._by_scale(parameters):
                    own = {"group": group, "rate": rate, "scale": scale, "lr": rate * scale, "weight_decay": decay}
                    tables.append({"params": scaled, **own})
        self.optimizer = self._optimizer(tables)
        self.schedule: LambdaLR = get_scheduler(
            SCHEDULES[config.lr_scheduler_type],
            self.optimizer,
            num_warmup_steps=round(config.warmup_ratio * config.max_steps),
            num_training_steps=config.max_steps,
        )

    def _by_scale(self, parameters: list[nn.Parameter]) -> list[tuple[float, list[nn.Parameter]]]:
        """Split a group by the part of its learning rate that each parameter takes."""
        if not parameters or not self.config.scale_parameter or self.config.optimizer != "adamw":
            return [(1.0, parameters)] if parameters else []
        return [(min(1.0, max(1e-2, _size(parameter) / WHOLE_RATE)), [parameter]) for parameter in parameters]

    def _optimizer(self, tables: list[dict[str, Any]]) -> Optimizer:
        if self.config.optimizer == "adafactor":
            return Adafactor(
                tables, scale_parameter=self.config.scale_parameter, relative_step=False, warmup_init=False
            )
        return AdamW(tables, betas=(self.config.adam_beta1, self.config.adam_beta2), fused=True)

    def step(self) -> float:
        """Clip, step the optimizer and the schedule; return the gradient's norm before clipping (fp32, may be inf)."""
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else float("inf"))
        value = sharding.number(norm)
        if value < float("inf"):  # NaN compares false too: the weights stay as they are
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def learning_rates(self) -> dict[str, float]:
        """Return group → the learning rate of the next step."""
        return {table["group"]: float(table["lr"]) / table["scale"] for table in self.optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": {"last_epoch": self.schedule.last_epoch}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take moments and step count from a bundle; rates, betas and decays stay those of this config."""
        own = [{key: value for key, value in t.items() if key != "params"} for t in self.optimizer.param_groups]
        in_order = (p for table in self.optimizer.param_groups for p in table["params"])
        self.optimizer.load_state_dict(sharding.cut(state["optimizer"], in_order))
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
        for at, (table, settings, factor) in enumerate(zip(self.optimizer.param_groups, own, factors, strict=True)):
            # The size of the weights as the run started, not as it goes on.
            scale = table.get("scale", 1.0)
            base = self.schedule.base_lrs[at] = settings["rate"] * scale
            table.update(settings, lr=base * factor, initial_lr=base, scale=scale)
        self.schedule._last_lr = [table["lr"] for table in self.optimizer.param_groups]


@torch.no_grad()
def _size(parameter: nn.Parameter) -> float:
    """Root mean square."""
    return float(sharding.gather(parameter.detach(), keep=True).square().mean().sqrt())
