"""The run bundle: a folder that explains itself and can be trusted or is refused by name.

    adapter_model.safetensors   what was trained: the method, and the whole backbone where it was trained; and what the
                                method was given: source prompts
    optimizer.pt                optimizer and schedule, read with weights_only=True
    state.json                  step, curves, best scores: everything else that makes the run go on exactly
    config.json                 the resolved RunConfig
    manifest.json               versions, git commit, backbone identity, sha256 of every other file

A bundle is written to a temporary folder and renamed, so a killed process leaves a whole bundle or none. Nothing in it
is unpickled; it cannot run code.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from polyprompt import __version__
from polyprompt.config import RunConfig
from polyprompt.errors import BundleError, ConfigError
from polyprompt.recipe import check

FORMAT = 1
TENSORS, OPTIMIZER, STATE, CONFIG, MANIFEST = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "state.json",
    "config.json",
    "manifest.json",
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. tensors: name → PromptedModel.trained_state (CPU). backbone: the identity it was trained on."""

    folder: Path
    config: RunConfig
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    backbone: Mapping[str, Any]
    #: Of a folded bundle (folding.py) the names of its tables and the texts beside them.
    folded: Mapping[str, Any] | None = None
    #: The sha256 of the file of its tensors.
    weights: str = ""

    def optimizer(self) -> dict[str, Any]:
        """Read the optimizer and schedule state."""
        return torch.load(self.folder / OPTIMIZER, map_location="cpu", weights_only=True)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    config: RunConfig,
    backbone: Mapping[str, Any],
    commit: str,
) -> Path:
    """Write root/step_XXXXXXXX atomically and return it. Replaces a bundle of the same step. commit: see git_commit.

    Raises OSError, and leaves nothing, if it cannot be written.
    """
    target = root / folder_name(step)
    for left in root.glob(".step_*.tmp"):  # of a killed process; a run has one writer
        shutil.rmtree(left)
    draft = root / f".{target.name}.tmp"
    draft.mkdir(parents=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, draft / TENSORS, metadata={"format": "pt"})
        torch.save(dict(optimizer), draft / OPTIMIZER)
        (draft / STATE).write_text(json.dumps(state))
        (draft / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=1))
        manifest = {
            "format": FORMAT,
            "step": step,
            "backbone": dict(backbone),
            "versions": versions(),
            "git_commit": commit,
            "files": {file.name: _sha256(file) for file in sorted(draft.iterdir())},
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk the log needs the room
        if isinstance(error, OSError):
            raise
        # What safetensors and torch make of a full disk.
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(draft)) from error
    return target


def read(folder: Path, *, backbone: Mapping[str, Any] | None = None) -> Bundle:
    """Open a bundle after checking every byte of it.

    backbone: the identity of the backbone it is to be used with. Raises BundleError if the bundle is damaged,
    of an unknown format, or was trained on another backbone.
    """
    manifest = verify(folder)
    try:
        bundle = Bundle(
            folder=folder,
            config=check(json.loads((folder / CONFIG).read_text())),
            state=json.loads((folder / STATE).read_text()),
            tensors=safetensors.torch.load_file(folder / TENSORS),
            backbone=manifest["backbone"],
            folded=manifest.get("folded"),
            weights=manifest["files"][TENSORS],
        )
    except (ConfigError, SafetensorError, ValueError) as error:
        raise BundleError(f"bundle {folder} was written by another version and cannot be read: {error}") from error
    if backbone is not None:
        check_backbone(bundle, backbone)
    return bundle


def newest(root: Path) -> Bundle | None:
    """Open the newest undamaged bundle under root (see `newest_whole`)."""
    folder = newest_whole(root)
    return None if folder is None else read(folder)


def check_prompts(bundle: Bundle, backbone: Mapping[str, Any], key: str) -> None:
    """Refuse another run's prompts for a backbone that they were not trained on: in its space they would be noise.

    key: of the config, which names the bundle. backbone: its identity as it was loaded. Raises BundleError or
    ConfigError.
    """
    check_backbone(bundle, backbone)
    if bundle.config.train_backbone:
        raise ConfigError(
            f"{key}: {bundle.folder} was trained together with its backbone, so its prompts do not fit the backbone as "
            "it was; expected backbone.trainable=false there. Name a bundle of prompts that were trained alone"
        )


def check_backbone(bundle: Bundle, backbone: Mapping[str, Any]) -> None:
    """Raise BundleError unless the bundle was trained on the backbone of this identity."""
    trained_on = bundle.backbone
    if trained_on["sha256"] != backbone["sha256"]:
        raise BundleError(
            f"bundle {bundle.folder} was trained on backbone {trained_on['name']!r} (sha256 "
            f"{trained_on['sha256'][:12]}), not on {backbone['name']!r} (sha256 {backbone['sha256'][:12]}); set "
            "backbone.name to the former, name another bundle, or start a new run under another name"
        )


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a whole bundle; raise BundleError naming the damaged or missing file."""
    mend = "use another bundle of the run, or delete this folder"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            raise BundleError(
                f"bundle {folder} has format {manifest['format']}, this version reads {FORMAT}; use the polyprompt "
                f"version it was written with ({manifest.get('versions', {}).get('polyprompt')})"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"bundle {folder} has no readable {MANIFEST} ({error}); {mend}") from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"bundle {folder} is damaged: {name} is missing; {mend}")
        if _sha256(file) != expected:
            raise BundleError(f"bundle {folder} is damaged: {name} does not match its sha256; {mend}")
    return manifest


def write_folded(bundle: Bundle, target: Path, tensors: Mapping[str, Tensor], folded: Mapping[str, Any]) -> Path:
    """Write a bundle for prediction alone, with other tensors in it (folding.py), to a new folder; return that one."""
    with filled(target) as draft:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, draft / TENSORS, metadata={"format": "pt"})
        for name in (STATE, CONFIG):
            shutil.copyfile(bundle.folder / name, draft / name)
        files = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
        manifest = {**json.loads((bundle.folder / MANIFEST).read_text()), "folded": dict(folded), "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return target


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Hand out a folder aside, which becomes `folder`, that is not there yet or empty, once it is filled."""
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    os.replace(draft, folder)


def without_optimizer(folder: Path, target: Path) -> Path:
    """Copy a bundle that was found whole, without what only training needs, to a new folder; return that one."""
    manifest = json.loads((folder / MANIFEST).read_text())
    target.mkdir(parents=True)
    kept = {name: digest for name, digest in manifest["files"].items() if name != OPTIMIZER}
    for name in kept:
        shutil.copyfile(folder / name, target / name)
    (target / MANIFEST).write_text(json.dumps({**manifest, "files": kept}, indent=1))
    return target


def bundles(root: Path) -> list[Path]:
    """Return the bundle folders under root, oldest first, whole or not."""
    return sorted(path for path in root.glob("step_*") if path.is_dir())


def newest_whole(root: Path) -> Path | None:
    """Return the newest undamaged bundle under root, None if there is none at all.

    Each damaged one that is passed over is named in the log. Raises BundleError if all are damaged.
    """
    found = bundles(root)
    for folder in reversed(found):
        try:
            verify(folder)
        except BundleError as error:
            log.warning("%s. It is passed over; an older bundle is tried.", error)
        else:
            return folder
    if found:
        raise BundleError(
            f"all {len(found)} bundles in {root} are damaged, the newest is {found[-1].name}; restore one, or delete "
            "the folder to start from the beginning"
        )
    return None


def prune(root: Path, keep: set[int], newest: int) -> None:
    """Delete the bundles under root but for the steps in `keep` and the `newest` ones."""
    for folder in bundles(root)[:-newest]:
        if int(folder.name.removeprefix("step_")) not in keep:
            shutil.rmtree(folder)


@cache
def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"polyprompt": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "datasets", "ray", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def git_commit() -> str:
    """Return the commit of the code that runs, "-dirty" behind it if files differ, "" outside a git checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", cwd=folder)
        return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no", cwd=folder) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
