"""Loaders: each data-parallel rank's part of a dataset, as `initialize(training_data=...)` gives it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from meshbolt.errors import ConfigError

_WORKERS = 2
ROUTES = ("train", "eval", "predict")


class DeepSpeedDataLoader:
    """A DataLoader over this rank's part of a dataset.

    Attributes:
        dataloader: torch's.
        data_sampler: chooses the samples; its `set_epoch` gives each epoch an order of its own.
    """

    def __init__(self, dataset: Dataset[Any], *, sampler: Any, **arguments: Any) -> None:
        """Make the loader.

        Args:
            dataset: of all ranks.
            sampler: of this rank; None where the dataset decides.
            arguments: of torch's DataLoader.
        """
        self.dataset, self.data_sampler = dataset, sampler
        self.dataloader: DataLoader[Any] = DataLoader(dataset, sampler=sampler, **arguments)
        self.batch_size = self.dataloader.batch_size
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Begin the data again."""
        self._iterator = iter(self.dataloader)
        return self._iterator

    def __next__(self) -> Any:
        """Return the next batch of what was begun last."""
        return next(self._iterator if self._iterator is not None else iter(self))

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.dataloader)


class RepeatingLoader:
    """A loader that begins again when it is through.

    Example:
        >>> batches = iter(RepeatingLoader(loader))
    """

    def __init__(self, loader: Any) -> None:
        """Take the loader."""
        self.loader = loader
        self._iterator = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        """Go on."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, of the first ones again after the last."""
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ConfigError(
                "RepeatingLoader was given a loader without a batch, so that it can repeat nothing."
            ) from None


def loader_of(
    dataset: Any,
    *,
    batch_size: int,
    ranks: int,
    rank: int,
    route: str = "train",
    data_sampler: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int | None = None,
    **arguments: Any,
) -> DeepSpeedDataLoader:
    """Return a loader of this rank's part of a dataset.

    Args:
        dataset: a map-style one, of which each rank gets its part, or an iterable one, which parts its samples itself.
        batch_size: of this rank.
        ranks: that see different samples.
        rank: which of them this is.
        route: "train" shuffles; "eval" and "predict" do not.
        data_sampler: chooses this rank's samples instead.
        collate_fn: makes a batch of samples.
        num_workers: processes that load; None: two, or as many as there are cores.
        arguments: further ones of torch's DataLoader.

    Raises:
        ConfigError: it is no dataset, or the route is unknown.
    """
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError(
            f"The training data is a {type(dataset).__name__}, and has to be a dataset of torch's: with __getitem__ and __len__, "
            "or an IterableDataset. Give the dataset, not a loader of it."
        )
    if route not in ROUTES:
        raise ConfigError(f"deepspeed_io(route={route!r}): use one of {', '.join(map(repr, ROUTES))}.")
    sampler = data_sampler
    if sampler is None and not is_stream:
        sampler = DistributedSampler(dataset, num_replicas=ranks, rank=rank, shuffle=route == "train")
    workers = min(_WORKERS, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    return DeepSpeedDataLoader(
        dataset, sampler=sampler, batch_size=batch_size, collate_fn=collate_fn, num_workers=workers, **arguments
    )
