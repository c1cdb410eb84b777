"""The errors meshbolt raises.

```
MeshboltError
├── ConfigError(ValueError)               a setting is wrong by itself or against another one
├── TopologyError(ValueError)             the world of ranks does not fit what was asked, or its ranks disagree
├── UnsupportedError(NotImplementedError) asked for something that meshbolt, or this version, cannot do
├── CheckpointError(RuntimeError)         a checkpoint cannot be written, or read as asked
├── RankError(RuntimeError)               another rank has failed, for which this one waited
│   └── StuckError                        ranks did not get on in time: one sleeps, is gone, or waits for what never comes
├── StorageError(OSError)                 a disk that holds state during training fails, or has no room
└── MissingPackageError(ImportError)      an optional package is needed
```

Every message says what was asked (with the values), why it cannot be, and what to do about it; every rank raises, or none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MeshboltError(Exception):
    """Base of every error that meshbolt raises on purpose."""


class ConfigError(MeshboltError, ValueError):
    """A setting is wrong by itself, or contradicts another setting."""


class TopologyError(MeshboltError, ValueError):
    """The ranks at hand do not fit what was asked of them, or they disagree with each other."""


class UnsupportedError(MeshboltError, NotImplementedError):
    """A feature does not exist here: in this version, on this device or in this combination."""


class CheckpointError(MeshboltError, RuntimeError):
    """A checkpoint cannot be written, or cannot be read as asked."""


class RankError(MeshboltError, RuntimeError):
    """Another rank has failed or is gone, for which this one waited; the message has that rank's error and its traceback."""


class StuckError(RankError):
    """Ranks did not get on in time, and the watchdog has ended the run; the message names who keeps the others waiting."""

    _meshbolt_told = True  # every rank's watchdog raises it: no rank needs to tell others


class StorageError(MeshboltError, OSError):
    """A file that holds state during training cannot be made, written or read; its cause says what the system answered."""


class MissingPackageError(MeshboltError, ImportError):
    """An optional package is needed; the message has the command that installs it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known one, and all of them.

    Example:
        >>> did_you_mean("zero4", ["zero3", "zero2"])
        " (did you mean 'zero3'? known: zero2, zero3)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f" ({hint}known: {', '.join(names)})"
