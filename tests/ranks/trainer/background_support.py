"""What tests of background saving share: writers that are slow, or that fail; always in a rank, which ends with the test."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from meshbolt import Checkpoint, MeshStrategy
from meshbolt.checkpoint import BackgroundSaver, background
from meshbolt.checkpoint.local import LocalFiles
from meshbolt.strategies.core import MeshCore


def strategy(zero: Any = 3, **options: Any) -> MeshStrategy:
    return MeshStrategy(zero=zero, checkpoint=Checkpoint(asynchronous=True), **options)


def before_writing(happening: Callable[[Path], None]) -> None:
    """Let something happen in the writing thread of this rank, before anything is written."""
    original = background.save_directory

    def save(path: Any, **kwargs: Any) -> None:
        happening(Path(path))
        original(path, **kwargs)

    background.save_directory = save


def slow_writer(seconds: float) -> None:
    before_writing(lambda _: time.sleep(seconds))


def full_disk(*, after_saves: int = 0) -> None:
    """Leave this rank no room for its shards."""
    original, saves = LocalFiles.open, set()

    def open_if_there_is_room(self: LocalFiles, name: str, mode: Any) -> Any:
        if mode == "wb" and name.endswith(".distcp"):
            saves.add(self.directory)
            if len(saves) > after_saves:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, name, mode)

    LocalFiles.open = open_if_there_is_room  # type: ignore[method-assign]


def full_disk_on(rank: int, *, after_saves: int = 0) -> None:
    if dist.get_rank() == rank:
        full_disk(after_saves=after_saves)


def saver_of(owner: Any) -> BackgroundSaver:
    strategy = owner.strategy
    assert isinstance(strategy, MeshCore)
    assert strategy._saving._saver is not None
    return strategy._saving._saver


class At(pl.Callback):
    """Does something after some steps."""

    def __init__(self, *steps: int, do: Callable[[pl.Trainer], None]) -> None:
        self.steps, self.do = steps, do

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.do(trainer)
