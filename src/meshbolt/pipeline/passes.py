"""What surrounds the passes of stages: nothing, or a sharding engine that gathers parameters and reduces gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Passes(Protocol):
    """Surrounds each pass of a microbatch through a stage."""

    def forward_pass(self, function: Callable[[], T], *, is_last: bool) -> T:
        """Call what runs a microbatch forwards through a stage.

        Args:
            function: does it.
            is_last: it is the microbatch that is run backwards last.
        """

    def leaving(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what leaves a stage as the next one takes it: whole, where layers have divided it."""

    def backward_pass(self, stage: int, *, ends_stage: bool, ends_step: bool) -> AbstractContextManager[None]:
        """Surround what runs a microbatch backwards through a stage.

        Args:
            stage: which.
            ends_stage: it is the step's last one through this stage.
            ends_step: it is the step's last one on this rank.
        """

    def second_half(self, stage: int) -> AbstractContextManager[None]:
        """Surround what makes the gradients of a stage's parameters, after those of what the stage was sent.

        Args:
            stage: which.
        """


class PlainPasses:
    """Surrounds them with nothing."""

    def forward_pass(self, function: Callable[[], T], *, is_last: bool) -> T:
        """Call it."""
        return function()

    def leaving(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it as it is."""
        return tensor

    def backward_pass(self, stage: int, *, ends_stage: bool, ends_step: bool) -> AbstractContextManager[Any]:
        """Surround it with nothing."""
        return nullcontext()

    def second_half(self, stage: int) -> AbstractContextManager[Any]:
        """Surround it with nothing."""
        return nullcontext()
