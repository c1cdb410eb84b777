"""A loss whose backward pass has been run by a schedule already."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from meshbolt.engine import PipelinedEngine
from meshbolt.errors import UnsupportedError


def played(loss: Tensor, engine: PipelinedEngine, factor: float) -> Tensor:
    """Return a loss to call backward on, which gives parameters the gradients that were made.

    Args:
        loss: without a graph.
        engine: has the gradients.
        factor: by which a loop multiplies the loss before, as the gradients are.
    """
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    result: Tensor = _Played.apply(anchor, loss, engine, factor)  # type: ignore[no-untyped-call]
    return result


class _Played(Function):
    """A loss whose backward pass has been: it gives the parameters the gradients that were made."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, engine: PipelinedEngine, factor: float) -> Tensor:
        """Return the loss."""
        ctx.engine, ctx.factor, ctx.precision = engine, factor, torch.finfo(loss.dtype).eps
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Give the gradients.

        Raises:
            UnsupportedError: they would have to be others.
        """
        if not math.isclose(float(gradient), ctx.factor, rel_tol=4 * ctx.precision):
            raise UnsupportedError(
                f"backward was called on {float(gradient) / ctx.factor:g} times the loss that training_step has returned, whose "
                "gradients are made already under pipeline parallelism. Change the loss in training_step, not in backward()."
            )
        ctx.engine.give_gradients()
        return None, None, None, None
