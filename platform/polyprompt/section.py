"""What every part of the config is made of, and the folders that relative places and caches lie in."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _absolute(path: Path) -> Path:
    """Ray changes the working folder of its workers, so no path stays relative."""
    if ":/" in str(path):
        raise ValueError(f"{str(path)!r} looks like an address; give a folder that every worker can reach (local, NFS)")
    return path.expanduser().absolute()


def home() -> Path:
    """Return the folder of runs/ and mlflow.db: $POLYPROMPT_HOME, else the working folder.

    A job that was submitted to a cluster loses its working folder when it ends: without the variable, ~/polyprompt.
    """
    if stated := os.environ.get("POLYPROMPT_HOME"):
        return Path(stated).expanduser().absolute()
    return Path.home() / "polyprompt" if is_submitted() else Path.cwd()


def cache() -> Path:
    """Return the folder of what can be made anew: $XDG_CACHE_HOME/polyprompt or ~/.cache/polyprompt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "polyprompt"


def is_submitted() -> bool:
    """Is this process the driver of a Ray job that was submitted?"""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def mask(text: str) -> str:
    """Hide the passwords in the addresses of a text: user:password@, and password= behind a question mark."""
    return re.sub(r"(?<=[?&]password=)[^&\s'\"]+", MASKED, re.sub(r"(?<=://)[^/\s]*@", f"{MASKED}@", text))


MASKED = "***"
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
