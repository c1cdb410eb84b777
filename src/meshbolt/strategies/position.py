"""Where in an epoch a Trainer is, so that a run that resumes there goes on with the batch that would have come next.

Lightning counts batches, and begins the data anew. Here the batches that are done are left out without being loaded, where
the order of samples is known: that of a `DistributedSampler`, which Lightning puts in by itself, or no shuffling at all.
Gradients are not saved, so that a run which stopped in the middle of an accumulation window goes back to its first batch,
and to the random state and the buffers that it had then.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from meshbolt.engine.random_state import Snapshot
from meshbolt.strategies.compat import BatchCount

_KNOWN_ORDER = (DistributedSampler, SequentialSampler)


class Position:
    """Follows the training batches of one fit, and goes to where a checkpoint was saved."""

    def __init__(self, trainer: pl.Trainer, *, ranks: int, device: torch.device) -> None:
        """Begin at the start.

        Args:
            trainer: whose batches are followed.
            ranks: number of ranks that see different samples.
            device: this rank's.
        """
        self._trainer, self._ranks, self._device = trainer, ranks, device
        self._count = BatchCount(trainer)
        self._saved: dict[str, Any] = {}
        self._loaders = 0
        # Batches to leave out of the first epoch; None where it begins as epochs do.
        self._skip: int | None = None
        self._window_start: Snapshot | None = None
        # Of which epoch and batch, and the buffers.
        self._buffers_then: tuple[tuple[int, int], dict[str, torch.Tensor]] = ((-1, -1), {})
        self._samples: int | None = None

    # Saving -----------------------------------------------------------------------------------------------------------

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint says of its position, beside Lightning's counters."""
        return {"samples_per_batch": self._samples, "unfinished_batches": self._unfinished()}

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return the random state that a run which resumes goes on with."""
        now = (
            self._window_start if self._goes_back() and self._window_start is not None else Snapshot.take(self._device)
        )
        return now.tensors()

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return by name the buffers that a run which resumes goes on with, where they are not those of now."""
        when, then = self._buffers_then
        begins = self._count.done - self._unfinished()
        # Before its first batch begins, a window has no buffers of its own yet.
        return then if self._goes_back() and when == (self._trainer.current_epoch, begins) else {}

    def _goes_back(self) -> bool:
        return self._unfinished() > 0 or self._count.is_inside_a_batch

    def _unfinished(self) -> int:
        """Return how many batches are done of a window that is not."""
        return 0 if self._count.epoch_is_done else self._count.done % self._window()

    def _window(self) -> int:
        module = self._trainer.lightning_module
        return self._trainer.accumulate_grad_batches if module.automatic_optimization else 1

    # Loading ----------------------------------------------------------------------------------------------------------

    def resume(self, notes: dict[str, Any]) -> None:
        """Go, when the training loader is there, to where Lightning's counters are.

        Args:
            notes: of the checkpoint; empty for one that is not of meshbolt, of whose samples nothing is known.
        """
        self._saved, self._loaders = notes, 0

    def take_loader(self, loader: Any) -> None:
        """Take a training loader of this rank, before its first batch."""
        self._loaders += 1
        size = getattr(loader, "batch_size", None)
        self._samples = size * self._ranks if isinstance(size, int) else None
        if not self._saved or self._loaders > 1 or self._count.epoch_is_done or _has_own_state(loader):
            return
        done = self._count.done - self._saved["unfinished_batches"]
        before = self._saved["samples_per_batch"]
        if before and self._samples:
            done = done * before // self._samples
        # A window begins where the count of batches says so.
        done -= done % self._window()
        self._count.go_back_to(done)
        self._skip = done if _has_known_order(loader) else None

    def on_train_start(self) -> None:
        """Silence Lightning's advice about loaders that begin anew, where this one does not."""
        self._saved = {}
        if self._skip is not None and self._loaders == 1:
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        self._count.settle()

    # Batches ----------------------------------------------------------------------------------------------------------

    def start(self, loader: Any) -> tuple[Iterator[Any], int]:
        """Begin an epoch; return its batches and how many are left out at the beginning.

        Args:
            loader: of this rank.
        """
        skip, self._skip = self._skip, None
        if skip is None or self._loaders > 1:
            return iter(loader), 0
        # The iterator draws a seed for its workers, as the one did that stopped.
        now = Snapshot.take(self._device)
        try:
            return _iterate_from(loader, skip), skip
        finally:
            now.restore()

    def before_batch(self, index: int) -> None:
        """Note the random state where a window begins.

        Args:
            index: of the batch within the epoch, that is about to be loaded.
        """
        if index % self._window() == 0:
            self._window_start = Snapshot.take(self._device)

    def begin_batch(self, index: int) -> None:
        """Note the buffers where a window begins; loaders may have loaded its first batch long before.

        Args:
            index: of the batch within the epoch, that is about to be trained on.
        """
        if index % self._window() == 0:
            # Always copied: BatchNorm changes its statistics without a trace that could be looked for.
            buffers = self._trainer.lightning_module.named_buffers(remove_duplicate=False)
            copies = {name: buffer.detach().clone() for name, buffer in buffers}
            self._buffers_then = (self._trainer.current_epoch, index), copies


def _has_own_state(loader: Any) -> bool:
    """Return whether a loader keeps its place by itself, which Lightning saves and gives back."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _has_known_order(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and type(loader.sampler) in _KNOWN_ORDER
        and type(loader.batch_sampler) in (BatchSampler, type(None))
    )


def _iterate_from(loader: DataLoader[Any], batches: int) -> Iterator[Any]:
    """Return an iterator over a loader that begins at a later batch, without loading those before."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = getattr(loader, name)
    # DataLoader refuses to have its sampler replaced, because its other settings follow from it; here they stay true.
    vars(loader)[name] = _From(sampler, batches)
    try:
        iterator: Iterator[Any] = iter(loader)
    finally:
        vars(loader)[name] = sampler
    return iterator


class _From:
    """A sampler without its first entries, the first time: workers that persist keep it for the epochs that follow."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self._sampler, self._skip = sampler, skip

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: workers ask for an iterator twice and use one, and the epoch may be set in between.
        skip, self._skip = self._skip, 0
        yield from itertools.islice(self._sampler, skip, None)
