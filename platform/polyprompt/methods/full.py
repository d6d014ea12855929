"""Plain multi-task fine-tuning: the baseline without prompts."""

from torch import Tensor

from polyprompt.methods.base import Method, ParameterGroup, Prompts


class Full(Method):
    """No prompts: every weight of the backbone is trained on the mixture, and tasks differ by their text alone.

    Source: Raffel et al. 2020 (T5), section 3.5.2, multi-task learning; "MTL" in He et al. 2022.
    Parameters: 0.
    """

    task_aware = False

    def prompts(self, x_BTH: Tensor, mask_BT: Tensor, task_B: Tensor) -> Prompts:
        return Prompts()

    def group_of(self, parameter: str) -> ParameterGroup:
        raise KeyError(parameter)
