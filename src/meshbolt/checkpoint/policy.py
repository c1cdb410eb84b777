"""How checkpoints are written and read, as the user sets it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from meshbolt.errors import ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """How checkpoints are written and read.

    Attributes:
        asynchronous: write in the background while training goes on, instead of waiting until the files are on the
            disk. What is written is the state at the call. It takes the memory of one copy of each rank's state.
        verify: compare the sizes of a checkpoint's files with its manifest before anything is loaded. False saves one
            look at each file, and a damaged checkpoint is then found only where its files cannot be read at all.
        keep_partial: keep the files of a save that failed, in a hidden directory beside the checkpoint, to look at
            them. The next save under the same name removes those of earlier failures unless it has this setting, too.
    """

    asynchronous: bool = False
    verify: bool = True
    keep_partial: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise ConfigError(f"Checkpoint({field.name}={value!r}) is a switch. Use True or False.")
