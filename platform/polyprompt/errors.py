"""Errors that users see. Each message says what is wrong, with which value, what was expected, and how to mend it.

They cross process borders with Ray, so every one pickles: the message is the only argument.
"""

import difflib
from collections.abc import Iterable


class PolypromptError(Exception):
    """Base of all errors that polyprompt raises on purpose. Retrying never helps: the cause must be mended first."""


class ConfigError(PolypromptError):
    """A recipe or an override asks for something that does not exist, does not fit or is out of range."""


class DataError(PolypromptError):
    """A data file or a row is missing, malformed or does not match its task. Names the file, line and field."""


class BundleError(PolypromptError):
    """A run bundle is damaged, incomplete, or belongs to another run, backbone or config."""


class StorageError(PolypromptError):
    """A run's folder is full, gone or not to be written, and stayed so. Its bundles are kept."""


class TrackingError(PolypromptError):
    """The tracking store cannot be reached or used when a run starts."""


class TrainingError(PolypromptError):
    """Training cannot go on: the workers cannot be had, or the loss is not finite."""


class LostWorkersError(TrainingError):
    """Workers died, and died again when they were started anew. The cause may have passed at another time."""


class NotFiniteError(TrainingError):
    """The loss or the gradient is not finite."""


class StoppedError(PolypromptError):
    """The run was told to stop, by a search or its user. Its bundles are kept, and it can go on from them."""


def hint(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of the known names, or "" if none is near.

    A name without its "group/" prefix counts as near: `rte` finds `super_glue/rte`.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [k for k in known if k.rpartition("/")[2] == name.rpartition("/")[2] and k not in near]
    return f" Did you mean {' or '.join(repr(n) for n in near[:3])}?" if near else ""
