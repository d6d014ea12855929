"""The models that one process holds: which version a source means, and predictors that share equal backbones."""

import re
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from polyprompt import backbone as backbones
from polyprompt import checkpoint, registry
from polyprompt.backbone_base import Backbone
from polyprompt.backbone_config import BackboneConfig
from polyprompt.checkpoint import Bundle
from polyprompt.config import LoRAConfig
from polyprompt.errors import BundleError, ConfigError
from polyprompt.predictor import Predictor, find_bundle
from polyprompt.serving_schema import NAME, TaskInfo
from polyprompt.sources import content_hash
from polyprompt.tasks import catalog

#: How long a model that is served no more stays, for requests that were taken before.
LINGER_SECONDS = 30.0


@dataclass(frozen=True)
class Spec:
    """A version of a model. place: of its bundle on disk, or models:/NAME/NUMBER of the registry at `uri`. digest:
    of a bundle on disk. Equal specs are the same model."""

    name: str
    source: str
    version: str
    place: str
    uri: str = field(default="", repr=False)  # it may hold a password
    digest: str = ""


@dataclass(frozen=True)
class Loaded:
    """What a process says of a model that it holds. shared: does it use a backbone that others may use too?"""

    backbone_sha256: str
    shared: bool
    tasks: tuple[TaskInfo, ...]


def locate(name: str, source: str, uri: str) -> Spec:
    """Return what a source means now. uri: of the tracking store, for models:/….

    Raises BundleError, ConfigError, TrackingError.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"a model cannot be called {name!r}; expected up to 64 letters, digits and . _ -, the first a letter or "
            f"digit. Call it otherwise: NAME={source}"
        )
    if source.startswith(registry.ADDRESS):
        version = registry.current(source, uri)
        return Spec(name, source, version.number, version.uri, uri)
    try:
        bundle = find_bundle(Path(source).absolute())
        digest = content_hash(bundle / checkpoint.MANIFEST)
    except (OSError, ValueError) as error:
        raise BundleError(f"{source!r} cannot be read: {error}; give a run's folder or a bundle") from error
    return Spec(name, source, f"{bundle.name}-{digest[:8]}", str(bundle), digest=digest)


def named(argument: str) -> tuple[str, str]:
    """Return the name and the source of NAME=SOURCE, or of a SOURCE, which is called as its registered model or
    folder is."""
    name, equals, source = argument.partition("=")
    if equals and "/" not in name:
        return name, source
    if argument.startswith(registry.ADDRESS):
        return registry.parse(argument)[0], argument
    path = Path(argument).absolute()
    # runs/NAME/bundles/step_… is called NAME.
    return (path.parents[1] if path.parent.name == "bundles" else path).name, argument


class Shelf:
    """Predictors by spec. Models whose backbone was frozen and is equal share one in memory."""

    def __init__(self, *, backbone: str | None = None, device: str = "cpu") -> None:
        """backbone: where all backbones are now, if not where they were in training."""
        self._backbone, self._device = backbone, device
        self._held: dict[Spec, Predictor] = {}
        self._used: dict[Spec, float] = {}
        self._shared: WeakValueDictionary[Any, Backbone] = WeakValueDictionary()
        self._lock = threading.Lock()

    def holds(self, spec: Spec) -> bool:
        return spec in self._held

    def get(self, spec: Spec) -> Predictor:
        """Return the model, loaded if it is not held yet. Raises BundleError, ConfigError, TrackingError."""
        # One that is held never waits for another one that is being loaded.
        held = self._held.get(spec)
        if held is None:
            with self._lock:
                held = self._held.get(spec) or self._load(spec)
                self._used[spec] = time.monotonic()
                self._held[spec] = held
        self._used[spec] = time.monotonic()
        return held

    def keep(self, wanted: frozenset[Spec]) -> None:
        """Forget the models that are not wanted and were not asked for lately."""
        ago = time.monotonic() - LINGER_SECONDS
        for spec in [spec for spec in list(self._held) if spec not in wanted and self._used.get(spec, 0) < ago]:
            del self._held[spec]
            self._used.pop(spec, None)

    def describe(self, spec: Spec) -> Loaded:
        """Load the model and say what it is."""
        predictor = self.get(spec)
        tasks = [task for task in predictor.tasks if task is not None]
        return Loaded(
            backbone_sha256=str(predictor.model.backbone.identity()["sha256"]),
            shared=predictor.model.backbone in self._shared.values(),
            tasks=tuple(
                TaskInfo(name=task.name, fields=list(catalog.fields(task)), choices=list(task.choices))
                for task in tasks
            ),
        )

    def _load(self, spec: Spec) -> Predictor:
        place, folder = Path(spec.place), None
        if spec.uri:
            folder = Path(tempfile.mkdtemp(prefix="polyprompt-"))
            place = registry.fetch(registry.Version(*registry.parse(spec.place)), spec.uri, folder)
        try:
            opened = checkpoint.read(place)
            if spec.digest and content_hash(place / checkpoint.MANIFEST) != spec.digest:
                raise BundleError(f"{place} has changed since it was chosen; load {spec.source} again")
            return Predictor(
                opened, backbone=self._backbone, device=self._device, load=partial(self._load_backbone, opened)
            )
        finally:
            if folder is not None:
                shutil.rmtree(folder)

    def _load_backbone(
        self, opened: Bundle, config: BackboneConfig, *, train: Any, precision: Any, seed: int
    ) -> Backbone:
        """Return a held backbone of the same content, or load one. One that a run changed is its own alone."""
        load = partial(backbones.load, config, train=train, precision=precision, seed=seed)
        if train is not False or isinstance(opened.config.method, LoRAConfig):
            return load()
        key = (opened.backbone["sha256"], precision, config.attention, config.input_end)
        backbone = self._shared.get(key)
        if backbone is None:
            backbone = load()
            checkpoint.check_backbone(opened, backbone.identity())
            self._shared[key] = backbone
        return backbone
