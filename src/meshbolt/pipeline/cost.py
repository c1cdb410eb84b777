"""What the parts of a step cost, counted while it runs on tensors without values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.compat import TorchDispatchMode, flops_of, tree_leaves


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of a forward pass; a backward pass takes about twice as much.

    Attributes:
        flops: of matrix products, convolutions and attention; a multiplication and an addition are two.
        num_bytes: written by all operations.
    """

    flops: int = 0
    num_bytes: int = 0

    def __sub__(self, earlier: Cost) -> Cost:
        """Return what came after an earlier count."""
        return Cost(flops=self.flops - earlier.flops, num_bytes=self.num_bytes - earlier.num_bytes)

    @property
    def time(self) -> float:
        """How long it takes, in no unit: a byte is written while about fifty operations are done."""
        return self.flops + 50.0 * self.num_bytes


class CountCost(TorchDispatchMode):
    """Counts the work of all operations inside."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops = self._num_bytes = 0

    @property
    def so_far(self) -> Cost:
        """The work until now."""
        return Cost(flops=self._flops, num_bytes=self._num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        self._flops += flops_of(func, args, kwargs or {}, result)
        if not func.is_view:
            tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            self._num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
