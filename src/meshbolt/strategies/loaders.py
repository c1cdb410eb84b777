"""Data loaders of ranks that go together: as many batches on each, or one clear error on all instead of a hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from meshbolt.collectives import same_on_all_ranks
from meshbolt.errors import RankError, TopologyError
from meshbolt.strategies.failures import in_words
from meshbolt.strategies.position import Position

_BATCH, _END, _ERROR = 1, 0, -1

# Gloo passes a number from rank to rank, some 30 microseconds each. With more ranks than this, loaders of known length are
# left to themselves: a rank whose dataset fails tells the others as of any other error, and they end without a checkpoint.
MOST_RANKS_WATCHED = 64


def checked_loader(
    loader: Any, *, group: dist.ProcessGroup | None, ranks: int | None = None, position: Position | None = None
) -> Any:
    """Check a loader before it is used, and watch it while it is.

    Args:
        loader: this rank's; any iterable.
        group: of all ranks, for tensors on the CPU; None where there is one rank only.
        ranks: how many see different samples; None: all.
        position: of a training loader, where in its epochs it is.

    Raises:
        TopologyError: ranks have different numbers of batches, or there are fewer samples than ranks.
    """
    if group is None or group.size() == 1:
        return loader if position is None else AgreedLoader(loader, group=None, position=position)
    same, values = same_on_all_ranks((_length(loader), _num_samples(loader)), group=group)
    lengths, samples = [value[0] for value in values], values[0][1]
    ranks = ranks or group.size()
    if samples is not None and samples < ranks:
        raise TopologyError(
            f"The dataset has {samples} samples for {ranks} data-parallel ranks, so some ranks would have none of "
            f"their own, only copies. Use at least {ranks} samples, or fewer ranks."
        )
    sized = all(isinstance(length, int) for length in lengths)
    if sized and not same:
        raise TopologyError(
            f"Ranks have different numbers of batches: {lengths} by rank. Every rank must make as many steps as the "
            "others. Use torch's DistributedSampler, which Lightning puts in by itself and which pads with copies; or drop "
            "the rest with drop_last=True."
        )
    if sized and group.size() > MOST_RANKS_WATCHED:
        return loader if position is None else AgreedLoader(loader, group=None, position=position)
    return AgreedLoader(loader, group=group, position=position)


def num_batches_by_rank(loader: Any, *, group: dist.ProcessGroup) -> list[int | None]:
    """Return how many batches each rank's loader has; None for one that does not know.

    Args:
        loader: this rank's.
        group: of all ranks, for tensors on the CPU.
    """
    return same_on_all_ranks(_length(loader), group=group)[1]


class AgreedLoader:
    """A loader that stops all ranks with an error each when one of them runs out early, or fails to load a batch.

    Every batch costs one exchange of a number among the ranks, which a hang at the first collective of the step would
    otherwise take the place of. For everything but iteration it is the loader inside.
    """

    __slots__ = ("_group", "_loader", "_position")

    def __init__(self, loader: Any, *, group: dist.ProcessGroup | None, position: Position | None = None) -> None:
        """Wrap a loader.

        Args:
            loader: this rank's.
            group: of all ranks, for tensors on the CPU; None to ask nobody.
            position: told of every batch, and says where an epoch begins.
        """
        object.__setattr__(self, "_loader", loader)
        object.__setattr__(self, "_group", group)
        object.__setattr__(self, "_position", position)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the loader inside, for code that asks with isinstance."""
        return type(self._loader)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """The attributes of the loader inside, which Fabric copies."""
        return getattr(self._loader, "__dict__", {})

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets worker_init_fn on the loader it was given back.
        setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] | None = None
        count = 0
        while True:
            batch, state, error = None, _BATCH, None
            try:
                if iterator is None:
                    iterator, count = self._start()
                if self._position is not None:
                    self._position.before_batch(count)
                batch = next(iterator)
            except StopIteration:
                state = _END
            except Exception as raised:  # whatever the dataset raises, the other ranks must hear of it
                state, error = _ERROR, raised
            self._agree(state, error, count)
            if state == _END:
                return
            yield batch
            count += 1

    def _start(self) -> tuple[Iterator[Any], int]:
        return (iter(self._loader), 0) if self._position is None else self._position.start(self._loader)

    def _agree(self, state: int, error: Exception | None, count: int) -> None:
        if self._group is None:
            if error is not None:
                raise error
            return
        states = [torch.zeros(1, dtype=torch.int64) for _ in range(self._group.size())]
        dist.all_gather(states, torch.tensor([state]), group=self._group)
        found = [int(other) for other in states]
        if _ERROR in found:
            self._raise_first(error, count)
        if len(set(found)) > 1:
            have = [rank for rank, other in enumerate(found) if other == _BATCH]
            ended = [rank for rank, other in enumerate(found) if other == _END]
            raise TopologyError(
                f"Ranks {ended} have no batch {count}, but ranks {have} have: the iterables of the ranks are of different "
                "lengths. Make every rank's iterable yield as many batches, or bound them with limit_train_batches, "
                "limit_val_batches and their like."
            )

    def _raise_first(self, error: Exception | None, count: int) -> None:
        """Raise this rank's error, or, on a rank that has none, the words of the first one's."""
        place, doing = f"rank {dist.get_rank()}", f"loading batch {count}"
        words: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(words, error and in_words(error, place=place, doing=doing), group=self._group)
        if error is not None:
            raise error
        first = next(said for said in words if said is not None)
        raise RankError(f"{first}\nThis is {place}, which cannot go on without it.")


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
