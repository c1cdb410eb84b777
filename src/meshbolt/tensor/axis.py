"""The ranks among which tensors are split: the `tp` axis of the mesh, or what stands for it where nothing is computed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from meshbolt.compat import gather_into, sum_into
from meshbolt.errors import ConfigError
from meshbolt.tensor.layout import SplitLostError

_log = logging.getLogger(__name__)


class Axis:
    """The ranks of one tensor-parallel group, and their collectives, outside of autograd.

    Attributes:
        exchanges: operations may exchange activations over the ranks to keep a split; else they lose it.
        insists: refuse sequences that the ranks do not divide, where they are to be divided.
        size: number of ranks.
        rank: this one's place among them.
    """

    exchanges = True
    insists = False

    def __init__(self, group: dist.ProcessGroup, *, insists: bool = False) -> None:
        """Take the group of the `tp` axis that this rank belongs to.

        Args:
            group: its ranks in the order of the axis.
            insists: as the attribute.
        """
        self.insists = insists
        self.size, self.rank, self._group = group.size(), group.rank(), group
        self._is_gloo = dist.get_backend(group) == "gloo"
        self._entered: tuple[Any, Any, Any] | None = None
        self._told_length = False

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over the ranks, in place where it is contiguous, and return the sum."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Return the parts of all ranks, (ranks, *part)."""
        part = part.contiguous()
        parts = part.new_empty((self.size, *part.shape))
        # Without dims in front, which gloo does not take.
        gather_into(parts.view(-1), part.view(-1), self._group)
        return parts

    def sum_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of what each has for this one.

        Args:
            parts: (ranks, *part), this rank's addend for each.
        """
        parts = parts.contiguous()
        if self._is_gloo:
            # gloo's own reduce-scatter moves the bytes of an all-reduce, twice what is needed.
            received = torch.empty_like(parts)
            dist.all_to_all_single(received.view(-1), parts.view(-1), group=self._group)
            return received.sum(dim=0)
        own = torch.empty_like(parts[0])
        sum_into(own.view(-1), parts.view(-1), self._group)
        return own

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the largest of the ranks' values, element by element."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def report(self, operation: str, failure: SplitLostError, operands: Sequence[Any]) -> None:
        """Take notice that an operation is computed on gathered tensors.

        Args:
            operation: its name.
            failure: why.
            operands: the split tensors it was called on.
        """
        if all(operand.along_sequence for operand in operands):
            # Gathering what a layer's sum was left divided for makes up the message that plain tensor parallelism sends.
            return
        warnings.warn(
            f"{operation} is computed on whole tensors, gathered over the tensor-parallel ranks, which is right and slow: "
            f"{failure}. Leave the layers around it out of the plan of TensorParallel, or write it another way.",
            stacklevel=5,
        )

    def report_length(self, length: int) -> None:
        """Take notice that activations are not divided along their sequence, since the ranks do not divide its length.

        Args:
            length: of the sequence.

        Raises:
            ConfigError: the user insists on it.
        """
        if self.insists:
            raise ConfigError(
                f"TensorParallel(sequence_parallel=True): a sequence of {length} cannot be shared evenly by {self.size} ranks. "
                f"Pad sequences to a multiple of {self.size}, or take sequence_parallel='auto', which leaves such ones whole."
            )
        if torch.compiler.is_compiling() or self._told_length:
            return
        self._told_length = True
        if dist.get_rank() == 0:
            _log.warning(
                "sequence_parallel='auto' leaves sequences whole whose length the %d tensor-parallel ranks do not divide, such "
                "as one of %d: what lies between parallel layers is then on every rank.",
                self.size,
                length,
            )

    def remembered(self, tensor: Any, state: Any) -> Any:
        """Return what was made of this very tensor the last time one was remembered, or None.

        Args:
            tensor: whole or split.
            state: what else has to be as it was then, for what was made to be right again.
        """
        if self._entered is not None and self._entered[0] is tensor and self._entered[1] == state:
            return self._entered[2]
        return None

    def remember(self, tensor: Any, state: Any, made: Any) -> None:
        """Keep what was made of a tensor, until the next one, or until its gradient is here."""
        self._entered = (tensor, state, made)

    def forget(self) -> None:
        """Let go of what is remembered; a compiled backward cannot, and need not: what it was made of is not remembered there."""
        if not torch.compiler.is_compiling():
            self._entered = None


class ImaginedAxis(Axis):
    """An axis of which only one rank exists, for tensors without memory: shapes are right, values are none."""

    exchanges = False

    def __init__(self, size: int, *, on_gather: Callable[[str, SplitLostError, Sequence[Any]], None]) -> None:
        """Imagine ranks.

        Args:
            size: how many.
            on_gather: told what `report` is told.
        """
        self.size, self.rank, self._entered = size, 0, None
        self.on_gather = on_gather

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the sum's shape."""
        return tensor.clone()

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of all parts."""
        return part.new_empty((self.size, *part.shape))

    def sum_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Return a tensor of a part's shape."""
        return parts[0].clone()

    def report_length(self, length: int) -> None:
        """Take no notice: a run may have other lengths."""

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape."""
        return tensor.clone()

    def report(self, operation: str, failure: SplitLostError, operands: Sequence[Any]) -> None:
        """Hand what was noticed to who looks at the module."""
        self.on_gather(operation, failure, operands)
