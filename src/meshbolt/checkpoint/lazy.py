"""Tensors that are read when they are used: whoever copies or writes many of them, one after the other, holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.compat import StoredTensor, tree_map


class LazyTensor(StoredTensor):
    """A tensor whose values are elsewhere, and are all read by each operation."""

    @staticmethod
    def __new__(cls, read: Callable[[], torch.Tensor], *, info: TensorInfo, keeps_parts: bool = True) -> LazyTensor:
        """Make one; nothing is read.

        Args:
            read: returns the values, in a tensor of its own.
            info: shape and dtype of what `read` returns.
            keeps_parts: as for `StoredTensor`.
        """
        return StoredTensor.__new__(cls, _Whole(read), shape=info.shape, dtype=info.dtype, keeps_parts=keeps_parts)

    def value(self) -> torch.Tensor:
        """Return the values, as an ordinary tensor."""
        return cast("_Whole", self.store).values() if self.kept is None else self.kept


class _Whole:
    """Values that are read all at once."""

    def __init__(self, values: Callable[[], torch.Tensor]) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Read all, and yield what is asked for."""
        yield self.values().reshape(-1)[start:stop]


def observed(tensor: torch.Tensor, on_bytes: Callable[[int], None]) -> LazyTensor:
    """Return a tensor that tells how many bytes it has each time it is read.

    Args:
        tensor: lazy or not.
        on_bytes: called with its bytes.
    """

    def read() -> torch.Tensor:
        on_bytes(tensor.nbytes)
        return tensor.value() if isinstance(tensor, StoredTensor) else tensor

    info = TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return LazyTensor(read, info=info, keeps_parts=False)


def read_all(tree: Any) -> Any:
    """Return a tree with ordinary tensors in the place of those whose values are elsewhere.

    Args:
        tree: of containers that torch's pytree knows; anything else in it stays as it is.
    """
    return tree_map(lambda leaf: leaf.value() if isinstance(leaf, StoredTensor) else leaf, tree)
