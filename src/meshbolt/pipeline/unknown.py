"""Modules that cannot run on tensors without values, such as a router of experts: they are taken to return what they got."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meshbolt.compat import tree_leaves
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.taint import is_foreign


@contextmanager
def unknown_outputs_assumed(inside: Callable[[], bool], noted: Callable[[nn.Module], None]) -> Iterator[None]:
    """Have the innermost module that fails return a tensor like the first foreign one among its arguments.

    The stage that runs the module later compares shapes of what it sends with those that were assumed.

    Args:
        inside: whether a unit is running; code around units may not fail.
        noted: called with each module of which that was assumed.
    """
    plain = nn.Module.__call__

    @functools.wraps(plain)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(self, *args, **kwargs)
        except UnsupportedError:
            raise
        except Exception:
            first = next((leaf for leaf in tree_leaves((args, kwargs)) if is_foreign(leaf)), None)
            if first is None or not inside():
                raise
            noted(self)
            is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
            return torch.empty_like(first).requires_grad_(first.requires_grad or is_trained)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]
