"""Tensors that are read when they are used: whoever copies or writes many of them, one after the other, holds one.

To everybody else such a tensor is a tensor on the CPU: it has shape and dtype, and any operation on it sees its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.compat import aliased_arguments, tree_map, untouched_by_functions, written_arguments


class LazyTensor(torch.Tensor):
    """A tensor whose values are elsewhere; each operation reads them anew.

    Where its values are changed in place, it keeps them from then on, and so it does for an operation that returns a part
    of it, since that part may be changed.
    """

    _read: Callable[[], torch.Tensor]
    _kept: torch.Tensor | None
    _keeps_parts: bool

    __torch_function__ = untouched_by_functions  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, read: Callable[[], torch.Tensor], *, info: TensorInfo, keeps_parts: bool = True) -> LazyTensor:
        """Make one; nothing is read.

        Args:
            read: returns the values, in a tensor of its own.
            info: shape and dtype of what `read` returns.
            keeps_parts: False where nobody changes values by a part or alias of the tensor, so that none are kept.
        """
        lazy = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(info.shape), dtype=info.dtype, device=torch.device("cpu")
        )
        lazy._read, lazy._kept, lazy._keeps_parts = read, None, keeps_parts
        return lazy

    def value(self) -> torch.Tensor:
        """Return the values, as an ordinary tensor."""
        return self._read() if self._kept is None else self._kept

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""
        if operation is torch.ops.aten.is_pinned.default:  # asked of every tensor by who plans to write it
            return False
        kwargs = kwargs or {}
        written = [each for each in written_arguments(operation, args, kwargs) if isinstance(each, LazyTensor)]
        shared = [each for each in aliased_arguments(operation, args, kwargs) if isinstance(each, LazyTensor)]
        for lazy in shared:
            if lazy._keeps_parts or any(lazy is each for each in written):
                lazy._kept = lazy.value()
        plain_args, plain_kwargs = tree_map(_value_of, (args, dict(kwargs)))
        result = operation(*plain_args, **plain_kwargs)
        return written[0] if written else result

    def tolist(self) -> Any:
        """Return the values as lists; torch asks no operation for them."""
        return self.value().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array, which shares the memory that they are kept in from now on."""
        self._kept = self.value()
        return self._kept.numpy(force=force)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return the values in a tensor of their own."""
        return self.value().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as the values."""
        return self.value().__reduce_ex__(protocol)


def _value_of(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, LazyTensor) else leaf


def observed(tensor: torch.Tensor, on_bytes: Callable[[int], None]) -> LazyTensor:
    """Return a tensor that tells how many bytes it has each time it is read.

    Args:
        tensor: lazy or not.
        on_bytes: called with its bytes.
    """

    def read() -> torch.Tensor:
        on_bytes(tensor.nbytes)
        return tensor.value() if isinstance(tensor, LazyTensor) else tensor

    info = TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return LazyTensor(read, info=info, keeps_parts=False)


def read_all(tree: Any) -> Any:
    """Return a tree with ordinary tensors in the place of those whose values are elsewhere.

    Args:
        tree: of containers that torch's pytree knows; anything else in it stays as it is.
    """
    return tree_map(lambda leaf: leaf.value() if isinstance(leaf, LazyTensor) else leaf, tree)
