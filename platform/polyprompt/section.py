"""What every part of the config is made of."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _absolute(path: Path) -> Path:
    """Ray changes the working folder of its workers, so no path stays relative."""
    if ":/" in str(path):
        raise ValueError(f"{str(path)!r} looks like an address; give a folder that every worker can reach (local, NFS)")
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
