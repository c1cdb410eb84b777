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
            disk. What is written is the state at the call. It takes the memory of one copy of each rank's state, but for
            optimizer state that lies in a file: the call waits until that is written.
        verify: compare the checksum of everything that is read, while it is read. False saves little time, and damaged
            values are then loaded as they are. The sizes of the files are compared in any case.
        keep_partial: keep the files of a save that failed, in a hidden directory beside the checkpoint, to look at
            them. The next save under the same name removes those of earlier failures unless it has this setting, too.
        trainable_only: leave out of checkpoints the frozen parameters that no optimizer has ever trained. They are
            loaded on top of the weights that the module already has; buffers are always saved.
        load_weights_only: `fit(ckpt_path=...)` takes the weights of the checkpoint and nothing else, and begins a new
            run with them: optimizers, schedulers, loops, callbacks and random state are fresh.
    """

    asynchronous: bool = False
    verify: bool = True
    keep_partial: bool = False
    trainable_only: bool = False
    load_weights_only: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise ConfigError(f"Checkpoint({field.name}={value!r}) is a switch. Use True or False.")
