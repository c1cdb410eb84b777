"""Data loaders whose ranks must agree: as many batches on every rank, or one clear error instead of a hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from meshbolt.collectives import same_on_all_ranks
from meshbolt.errors import TopologyError

_BATCH, _END, _ERROR = 1, 0, -1


def checked_loader(loader: Any, *, group: dist.ProcessGroup | None) -> Any:
    """Check a loader before it is used, and watch it while it is, where its length cannot be known.

    Args:
        loader: this rank's; any iterable.
        group: of all ranks, for tensors on the CPU; None where there is one rank only.

    Raises:
        TopologyError: ranks have different numbers of batches, or there are fewer samples than ranks.
    """
    if group is None or group.size() == 1:
        return loader
    length = _length(loader)
    same, values = same_on_all_ranks((length, _num_samples(loader)), group=group)
    lengths = [value[0] for value in values]
    samples = values[0][1]
    if samples is not None and samples < group.size():
        raise TopologyError(
            f"The dataset has {samples} samples for {group.size()} data-parallel ranks, so some ranks would train on copies. "
            f"Use at least {group.size()} samples, or fewer ranks."
        )
    if not same and all(isinstance(other, int) for other in lengths):
        raise TopologyError(
            f"Ranks have different numbers of batches: {lengths} by rank. Every rank must make as many steps as the others. "
            "Use a DistributedSampler (Lightning's default), drop the rest with drop_last=True, or pad."
        )
    return loader if all(isinstance(other, int) for other in lengths) else AgreedLoader(loader, group=group)


class AgreedLoader:
    """An iterable of unknown length that stops all ranks with one error when one of them runs out early."""

    def __init__(self, loader: Any, *, group: dist.ProcessGroup) -> None:
        self._loader = loader
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        count = 0
        while True:
            batch, state, error = None, _BATCH, None
            try:
                batch = next(iterator)
            except StopIteration:
                state = _END
            except Exception as raised:
                state, error = _ERROR, raised
            self._agree(state, error, count)
            if state == _END:
                return
            yield batch
            count += 1

    def _agree(self, state: int, error: Exception | None, count: int) -> None:
        states = torch.zeros(self._group.size(), dtype=torch.int64)
        dist.all_gather_into_tensor(states, torch.tensor([state]), group=self._group)
        found = states.tolist()
        if _ERROR in found:
            rank = found.index(_ERROR)
            raise error or TopologyError(f"Rank {rank} failed to load batch {count}; its own error says why.")
        if len(set(found)) > 1:
            have = [rank for rank, other in enumerate(found) if other == _BATCH]
            ended = [rank for rank, other in enumerate(found) if other == _END]
            raise TopologyError(
                f"Ranks {ended} have no batch {count}, but ranks {have} have: the iterables of the ranks are of different "
                "lengths. Make every rank's iterable yield as many batches, or bound them with limit_train_batches."
            )


def _length(loader: Any) -> int | None:
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _num_samples(loader: Any) -> int | None:
    """Return the size of a dataset that is divided among ranks, if it is."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler):
        return len(loader.dataset)  # type: ignore[arg-type]
    return None
