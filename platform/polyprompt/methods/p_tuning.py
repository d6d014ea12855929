"""Soft prompts before the input, made by a prompt encoder."""

import torch
from torch import Tensor, nn

from polyprompt.config import PTuningConfig
from polyprompt.methods.base import Dims, ParameterGroup, Prompts
from polyprompt.methods.made import MadeByTask


class PTuning(MadeByTask):
    """Prepend P vectors that an MLP or a bidirectional LSTM makes from P trained virtual-token embeddings.

        encoder mlp   P_τ = W3·ReLU(W2·ReLU(W1·E_τ + b1) + b2) + b3         each token by itself: H → e → e → H
        encoder lstm  P_τ = W2·ReLU(W1·BiLSTM(E_τ) + b1) + b2               H → 2e → 2e → H

    Shapes: tokens_GPH (E), G = K with `per_task`, else 1; inputs_BPH.
    Source: Liu et al. 2021, "GPT Understands, Too" (arXiv 2103.10385), section 3.2, for the LSTM; the MLP is that of
    PEFT and NVIDIA NeMo, whose torch layers and starts these are (E from N(0, 1), the rest as torch starts them).
    Differs: the virtual tokens stand before the input and not at places of a template. The prompt encoder is shared by
    the tasks, whose E differ (the paper trains one task at a time). No dropout in the LSTM.
    Parameters: G·P·H and, e = encoder_hidden_size, n = lstm_layers,
        mlp   (H + 1)·e + (e + 1)·e + (e + 1)·H
        lstm  8e·(H + e + 2) + (n - 1)·8e·(3e + 2) + (2e + 1)·2e + (2e + 1)·H
    A prompt of length 0 has neither tokens nor encoder: the plain backbone.
    """

    def __init__(self, config: PTuningConfig, dims: Dims) -> None:
        """Draw the starting values from torch's global stream."""
        super().__init__()
        self.per_task = config.per_task
        self.input_length = config.length
        self.task_aware = config.per_task and config.length > 0
        self.tokens_GPH: nn.Parameter | None = None
        self.lstm: nn.LSTM | None = None
        if not config.length:
            return
        hidden, e = dims.hidden, config.encoder_hidden_size
        self.tokens_GPH = nn.Parameter(torch.randn(dims.num_tasks if config.per_task else 1, config.length, hidden))
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(hidden, e, config.lstm_layers, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * e, 2 * e), nn.ReLU(), nn.Linear(2 * e, hidden))
        else:
            self.mlp = nn.Sequential(nn.Linear(hidden, e), nn.ReLU(), nn.Linear(e, e), nn.ReLU(), nn.Linear(e, hidden))

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        if self.tokens_GPH is None:
            return Prompts()
        made, row_B = self.made(task_B)
        return Prompts(inputs_BPH=made["inputs"][row_B].to(x_BTH.dtype))

    def known(self, task_B: Tensor) -> Tensor:
        return task_B if self.per_task else torch.zeros_like(task_B)

    def make(self, task_U: Tensor) -> dict[str, Tensor]:
        if self.tokens_GPH is None:
            return {}
        tokens_UPH = self.tokens_GPH[task_U]
        # A few tokens: fp32 costs nothing, and not every processor has a bf16 LSTM.
        with torch.autocast(tokens_UPH.device.type, enabled=False):
            # Contiguous: of another layout torch multiplies in another order once the weights are frozen.
            made_UPH = self.mlp(tokens_UPH if self.lstm is None else self.lstm(tokens_UPH)[0].contiguous())
        return {"inputs": made_UPH}

    def group_of(self, parameter: str) -> ParameterGroup:
        return "prompt" if parameter == "tokens_GPH" else "hypernetwork"
