"""How checkpoints are written and read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """How checkpoints are written and read.

    Attributes:
        asynchronous: write in the background.
        verify: check the sizes of files against the manifest when a checkpoint is read.
        keep_partial: keep what a failed save has written, for inspection.
    """

    asynchronous: bool = False
    verify: bool = True
    keep_partial: bool = False
