"""What a split tensor has, in the form that code runs on and in the one that is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshbolt.errors import UnsupportedError
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.layout import Layout, whole_shape


class StrayError(UnsupportedError):
    """A split tensor has got to where it cannot be followed, nor gathered.

    Attributes:
        sources: of the tensor.
    """

    def __init__(self, sources: frozenset[str], message: str) -> None:
        """Say what has happened.

        Args:
            sources: of the tensor.
            message: to the user.
        """
        super().__init__(message)
        self.sources = sources


if TYPE_CHECKING:
    _Whole = torch.Tensor  # as which it can be used
else:
    _Whole = object


class Split(_Whole):
    """This rank's part of a tensor, with the shape of the whole.

    Attributes:
        local: this rank's part, an ordinary tensor with a gradient's history.
        division: which dim is split, and how.
        axis: the ranks that hold the parts.
        sequence_dim: of a parameter, the dim of a layer's output that is to be left split, None for none.
        samples: of a parameter whose layer flattens its input, the number of sequences in that.
        along_sequence: of an activation, it is split for sequence parallelism only: each rank could have the whole as well.
        sources: names of the layers it comes from, where a module is being looked at.
    """

    local: Tensor
    _shape: torch.Size
    division: Layout
    axis: Axis
    sequence_dim: int | None
    samples: int
    along_sequence: bool
    sources: frozenset[str]

    def _hold(
        self,
        local: Tensor,
        layout: Layout,
        axis: Axis,
        *,
        sequence_dim: int | None = None,
        samples: int = 1,
        along_sequence: bool = False,
        sources: frozenset[str] = frozenset(),
    ) -> None:
        self.local, self.division, self.axis = local, layout, axis
        self._shape = torch.Size(whole_shape(local.shape, layout, axis.size))
        self.sequence_dim, self.samples = sequence_dim, samples
        self.along_sequence, self.sources = along_sequence, sources

    # What is asked most often is answered without a way through torch.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The whole's."""
        return self._shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """How many dims there are."""
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The part's, and the whole's."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the part is."""
        return self.local.device

    def dim(self) -> int:
        """Return how many dims there are."""
        return len(self._shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the whole's shape, or its size along a dim."""
        return self._shape if dim is None else self._shape[dim]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return what is where."""
        return f"SplitTensor({tuple(self.shape)}, {self.division} over {self.axis.size} ranks, local={self.local!r})"

    def __format__(self, specification: str) -> str:
        """Return what is where: whoever prints on one rank must not wait for the others."""
        return format(repr(self), specification)
