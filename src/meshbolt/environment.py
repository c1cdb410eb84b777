"""Every environment variable that meshbolt reads, and what its values mean."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from meshbolt.errors import ConfigError

DEBUG = "MESHBOLT_DEBUG"
FAST_PATH = "MESHBOLT_FAST_PATH"
RESTARTS = "MESHBOLT_RESTARTS"
SAVES = "MESHBOLT_SAVES"
_FLAGS = {"0": False, "1": True, "": None}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The settings that come from environment variables.

    Attributes:
        debug: `MESHBOLT_DEBUG=1` checks, before every unit is gathered, that all ranks gather the same one, and that ranks
            which share layers see the same batches and draw the same random numbers.
        fast_path: `MESHBOLT_FAST_PATH=0` switches the faster collectives for gloo off; by default they are used where
            they are proved equal.
    """

    debug: bool = False
    fast_path: bool = True


def read_environment() -> Environment:
    """Read and check the variables.

    Raises:
        ConfigError: a variable has a value other than 0 or 1.
    """
    return Environment(debug=_flag(DEBUG, default=False), fast_path=_flag(FAST_PATH, default=True))


def restarts() -> int:
    """Return how often the ranks of this run were started again after a failure, by `meshbolt launch` or torchrun."""
    return sum(int(os.environ.get(name) or 0) for name in (RESTARTS, "TORCHELASTIC_RESTART_COUNT"))


def expanded(path: str, *, asked: str) -> str:
    """Return a path with its environment variables replaced.

    Args:
        path: as it was written.
        asked: where, for the message.

    Raises:
        ConfigError: a variable in it is not set.
    """
    found = str(Path(os.path.expandvars(path)).expanduser())
    if "$" in found:
        name = found[found.index("$") :].partition("/")[0]
        raise ConfigError(
            f"{asked} needs the environment variable {name}, which is not set: it names a directory on a fast local disk. Set "
            f"it, such as `export {name.strip('${}')}=/local/nvme`, or give the directory itself."
        )
    return found


def _flag(name: str, *, default: bool) -> bool:
    text = os.environ.get(name, "")
    if text not in _FLAGS:
        raise ConfigError(f"{name}={text!r} is not a switch. Set it to 0 or 1, or unset it.")
    value = _FLAGS[text]
    return default if value is None else value
