"""One parameter whose optimizer state lies outside of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshbolt.compat import StoredTensor, local_tensor
from meshbolt.errors import UnsupportedError
from meshbolt.offload.layout import Slot

MASTER = "master"
"""The column that has the parameter itself, where the model's own one is on another device or in fewer bits."""


@dataclass(kw_only=True, eq=False)
class Entry:
    """A parameter and what is kept for it.

    Attributes:
        parameter: the model's, plain or a DTensor.
        name: for messages.
        number: in the layout.
        slot: what it needs there.
        shape: of this rank's part.
        stride: likewise; memory is walked through in its own order, whatever the shape.
        shown: what `optimizer.state` has for it, if nobody has put something else there.
        views: of its columns, without the master; empty where they are in memory only for a visit.
        stored: in the place of views, tensors that are read when they are used, once somebody has asked for them.
        scalars: for each piece, what an optimizer of another class keeps beside the columns.
        started: whether the columns hold values of a step.
        is_stale: the parameter may have been changed since its master was equal to it.
    """

    parameter: nn.Parameter
    name: str
    number: int
    slot: Slot
    shape: torch.Size
    stride: tuple[int, ...]
    shown: dict[str, Any] = field(default_factory=dict)
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    scalars: list[dict[str, Any]] = field(default_factory=list)
    started: bool = False
    is_stale: bool = False

    @property
    def has_master(self) -> bool:
        """Whether the parameter lies outside of the model as well."""
        return MASTER in self.slot.columns

    @property
    def shard(self) -> torch.Tensor:
        """This rank's part of the parameter, in one dim, in the order of its memory."""
        return in_memory_order(local_tensor(self.parameter), name=self.name)

    @property
    def is_in_order(self) -> bool:
        """Whether its memory is in row-major order, as values are that are read in runs."""
        return self.stride == torch.empty(self.shape, device="meta").stride()

    def flat_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a gradient in one dim, in the order of the parameter's memory; a copy where its own order is another.

        Args:
            gradient: of the parameter, plain or a DTensor.

        Raises:
            UnsupportedError: it is sparse.
        """
        if gradient.layout != torch.strided:
            raise UnsupportedError(
                f"The gradient of {self.name} is sparse ({gradient.layout}), and its optimizer state lies outside of the model, "
                "where only dense gradients are updated from. Make it dense (nn.Embedding(sparse=False))."
            )
        return self.flat(gradient)

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """Return values in one dim, in the order of the parameter's memory; a copy where their own order is another.

        Those whose values are not in memory stay as they are where they have this order.

        Args:
            values: of the parameter's shape, plain or a DTensor.
        """
        values = local_tensor(values)
        if isinstance(values, StoredTensor):
            if self.is_in_order and not isinstance(values.store, OwnStore):
                return values
            values = values.value()
        if values.stride() != self.stride:
            ordered = torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device)
            values = ordered.copy_(values.detach())
        return in_memory_order(values, name=self.name)

    def shaped(self, column: torch.Tensor) -> torch.Tensor:
        """Return its part of a column in the parameter's shape.

        Args:
            column: its elements, one dim.
        """
        return column.as_strided(self.shape, self.stride, column.storage_offset())


class OwnStore:
    """Where values are that a tier has outside of memory: what a subclass reads cannot be read while the tier is visited."""


def in_memory_order(tensor: torch.Tensor, *, name: str) -> torch.Tensor:
    """Return a tensor's memory as one dim.

    Args:
        tensor: dense, in any order of dims.
        name: for the message.

    Raises:
        UnsupportedError: its memory has gaps, or elements that share it.
    """
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            raise UnsupportedError(
                f"{name} has the shape {tuple(tensor.shape)} with strides {tensor.stride()}: its elements do not lie side by "
                "side in memory, and its optimizer state cannot lie outside of the model. Make it contiguous before training."
            )
        expected *= size
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
