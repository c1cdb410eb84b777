"""Prediction where ranks have different numbers of batches: each sample once, and as many forwards on every rank.

Lightning divides samples for prediction without copies, so that ranks may differ by a batch. A sharded module is gathered
in its forward by all ranks together. So a rank that has run out runs its last batch again beside the others, and drops what
comes out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from meshbolt.errors import TopologyError, UnsupportedError
from meshbolt.strategies.loaders import MOST_RANKS_WATCHED, AgreedLoader, checked_loader, num_batches_by_rank

_NOTHING = object()


def check_samples(trainer: pl.Trainer, loader: Any, *, ranks: int) -> None:
    """Check that the samples to predict can be divided such that every rank has one.

    Args:
        trainer: about to run; what it does not predict is not looked at.
        loader: with a sampler of a known length.
        ranks: number of ranks that see different samples.

    Raises:
        TopologyError: they cannot.
    """
    samples = len(loader.sampler) if trainer.state.fn == TrainerFn.PREDICTING else 0
    if 0 < samples < ranks:
        raise TopologyError(
            f"The loader to predict has {samples} samples for {ranks} ranks, so that some would have nothing to predict, while a "
            f"forward needs every rank. Use at least {ranks} samples, or fewer ranks."
        )


class Predicting:
    """The loaders of one `predict`, and the step that was taken last."""

    def __init__(self) -> None:
        """Begin without loaders."""
        self._uneven: list[int] = []
        self._has_stream = False
        self._last: Callable[[], Any] | None = None

    def loader(self, loader: Any, *, limit: float, group: dist.ProcessGroup | None, ranks: int) -> Any:
        """Check a loader, and return it such that every rank makes as many steps as the others.

        Args:
            loader: this rank's.
            limit: the Trainer's `limit_predict_batches`: a number of batches, or a share as a float.
            group: of all ranks, for tensors on the CPU; None where there is one rank only.
            ranks: how many see different samples.

        Raises:
            TopologyError: some ranks have no batch at all.
        """
        if group is None or group.size() == 1:
            return loader
        lengths = num_batches_by_rank(loader, group=group)
        known = [length for length in lengths if length is not None]
        self._has_stream |= len(known) < len(lengths)
        if len(known) < len(lengths) or len(set(known)) == 1:
            return checked_loader(loader, group=group, ranks=ranks)
        if min(known) == 0:
            raise TopologyError(
                f"Some ranks have nothing to predict: {known} batches by rank, while a forward needs every rank. Use at "
                f"least {ranks} samples, smaller batches, or fewer ranks."
            )
        self._uneven = known
        own = _share(known[group.rank()], limit)
        watched = group if group.size() <= MOST_RANKS_WATCHED else None
        return EvenLoader(
            loader,
            group=watched,
            length=max(known),
            own=max(own, 1),  # what the rank stands in with, where its share of few batches is none
            steps=_share(max(known), limit),
            stand_in=self._step_again,
        )

    def check(self, *, takes_iterator: bool) -> None:
        """Refuse what cannot be evened out, once all loaders are known; all ranks together.

        Args:
            takes_iterator: the user's predict_step fetches its batches itself.

        Raises:
            UnsupportedError: it cannot.
        """
        if self._uneven and (takes_iterator or self._has_stream):
            why = "predict_step takes a dataloader_iter" if takes_iterator else "another loader has no length"
            raise UnsupportedError(
                f"Ranks have different numbers of batches to predict, {self._uneven} by rank, and cannot be evened out where "
                f"{why}. Let predict_step take a batch, predict one loader a call, or use a number of samples that the ranks "
                "and the batch size divide."
            )

    def step(self, take: Callable[[], Any]) -> Any:
        """Take a step and return what it returns; keep it where it may have to be taken again.

        Args:
            take: predicts a batch.
        """
        self._last = take if self._uneven else None
        return take()

    def _step_again(self) -> None:
        if self._last is None:
            raise AssertionError("A rank was to stand in before it had predicted anything.")
        with isolate_rng():
            self._last()


def _share(batches: int, limit: float) -> int:
    """Return how many of a loader's batches Lightning takes under a limit."""
    return int(batches * limit) if isinstance(limit, float) else min(batches, int(limit))


class EvenLoader(AgreedLoader):
    """A loader that makes as many steps on every rank: after its last batch, it stands in for those that others still have.

    To Lightning it is as long as the longest: a loop asks no loader for more than its length.
    """

    __slots__ = ("_length", "_own", "_stand_in", "_steps")

    def __init__(
        self,
        loader: Any,
        *,
        group: dist.ProcessGroup | None,
        length: int,
        own: int,
        steps: int,
        stand_in: Callable[[], Any],
    ) -> None:
        """Wrap a loader.

        Args:
            loader: this rank's.
            group: of all ranks, for tensors on the CPU; None: do not ask the others before each batch.
            length: batches of the rank that has most.
            own: batches of this rank that are predicted.
            steps: batches that the loop will ask for.
            stand_in: takes a step beside the others.
        """
        super().__init__(loader, group=group)
        object.__setattr__(self, "_length", length)
        object.__setattr__(self, "_own", own)
        object.__setattr__(self, "_steps", steps)
        object.__setattr__(self, "_stand_in", stand_in)

    def __len__(self) -> int:
        return int(self._length)

    def __iter__(self) -> Iterator[Any]:
        padded: Any = _Padded(self._loader, self._own)
        if self._group is not None:
            padded = AgreedLoader(padded, group=self._group)
        # Up to that number and not a step further: the rank with most batches does not come to ask again.
        for batch in itertools.islice(padded, self._steps):
            if batch is _NOTHING:
                self._stand_in()
            else:
                yield batch


class _Padded:
    """The first batches of a loader, and nothings for ever after."""

    def __init__(self, loader: Any, batches: int) -> None:
        self._loader = loader
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.islice(self._loader, self._batches)
        yield from itertools.repeat(_NOTHING)
