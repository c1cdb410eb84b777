"""Batches for the ranks, and the seeds they start with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from meshbolt.testing.parity.case import Case


def seed(value: int) -> None:
    """Seed all generators without a word."""
    pl.seed_everything(value, verbose=False)


def loader_of_rank(case: Case, rank: int) -> DataLoader[Any]:
    """Return the loader of a rank; for a dataset, as a user writes it, before Lightning divides it among ranks."""
    if case.has_batches:
        batches = [case.batch(index, rank) for index in range(case.num_batches)]
        return loader_of(batches, collate=_SeedFirst(as_it_is, case.seed + rank))
    options: dict[str, Any] = {
        "batch_size": case.batch_size,
        "collate_fn": _SeedFirst(default_collate, case.seed + rank),
    }
    data: Any = case.data
    if (
        case.ranks > 1 and case.data_ranks == 1
    ):  # whose loaders are left as they are: this is Lightning's order elsewhere
        return DataLoader(data, sampler=DistributedSampler(data, 1, 0, shuffle=True, seed=case.seed), **options)
    return DataLoader(data, shuffle=True, **options)


def loader_of(batches: list[Any], *, collate: Callable[[Any], Any]) -> DataLoader[Any]:
    """Return a loader that yields ready batches.

    Args:
        batches: in order.
        collate: called with each of them.
    """
    return DataLoader(batches, batch_size=None, collate_fn=collate)  # type: ignore[arg-type]


def as_it_is(batch: Any) -> Any:
    """Return a batch as it is, where a loader would make tensors of its numbers."""
    return batch


class _SeedFirst:
    """Starts the rank's random generators with its first batch, after all that loops draw when they start."""

    def __init__(self, collate: Callable[[Any], Any], value: int) -> None:
        self._collate, self._value, self._is_first = collate, value, True

    def __call__(self, batch: Any) -> Any:
        if self._is_first:
            # The seed of samplers stays: a batch may be made before they are.
            before = os.environ.get("PL_GLOBAL_SEED")
            seed(self._value)
            if before is not None:
                os.environ["PL_GLOBAL_SEED"] = before
            self._is_first = False
        return self._collate(batch)
