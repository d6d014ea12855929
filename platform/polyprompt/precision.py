"""Which precision a machine computes in, and which it only emulates."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

AUTO = "auto"
#: Of torch.cpu.get_capabilities(): x86's and Arm's.
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
log = logging.getLogger(__name__)


def cpu_has_bf16() -> bool:
    """Does this machine's CPU multiply in bf16? Without, a step in bf16 takes more than ten times one in fp32."""
    import torch  # takes seconds, and configs are read without it

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16)


def resolved(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's table with train.precision=auto made bf16 or fp32.

    bf16 with compute.use_gpu (whoever reads the recipe may have no GPU itself), else where this machine's CPU has it.
    """
    train, compute = table.get("train"), table.get("compute", {})
    if not isinstance(train, Mapping) or train.get("precision") != AUTO:
        return dict(table)
    use_gpu = compute.get("use_gpu", False) if isinstance(compute, Mapping) else compute.use_gpu
    return {**table, "train": {**train, "precision": "bf16" if use_gpu is True or cpu_has_bf16() else "fp32"}}


def autocast(precision: str, device: str) -> "torch.autocast":
    """Return the context in which a model of that precision is computed on a kind of device."""
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def warn_of_emulation(precision: Literal["fp32", "bf16"], device: "torch.device") -> None:
    """Log it where a model of that precision is about to be computed on a CPU that has no bf16."""
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        log.warning(
            "train.precision=bf16 is emulated on this CPU, which has no bf16: more than ten times slower than "
            "train.precision=fp32. train.precision=auto takes what the machine has"
        )
