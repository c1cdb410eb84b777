"""Entries into a sharded module that Lightning does not know of: calls of the module and its methods from anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from meshbolt.engine import Engine

ENTRIES = ("forward", "generate")


def redirect_entries(module: nn.Module, engine: Engine) -> None:
    """Let `module(...)` and `module.generate(...)` work from any hook, with the root's parameters gathered.

    Args:
        module: the user's; sharded by the engine. Once is enough; again is nothing.
        engine: gathers the root's parameters for the time of a call.
    """
    for name in ENTRIES:
        method = getattr(module, name, None)
        if callable(method) and name not in vars(module):
            # Straight into __dict__: a LightningModule is free to give __setattr__ a meaning of its own.
            module.__dict__[name] = _redirected(method, engine)


def _redirected(method: Callable[..., Any], engine: Engine) -> Callable[..., Any]:
    @functools.wraps(method)
    def entered(*args: Any, **kwargs: Any) -> Any:
        return engine.call(method, *args, **kwargs)

    return entered


class Entry(nn.Module):
    """What Fabric calls in place of a sharded module.

    Fabric redirects `training_step`, and methods marked with `mark_forward_method`, through the forward of the module that a
    strategy returns, but only where that is not the user's module itself.
    """

    def __init__(self, module: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.module = module
        self._engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the root's parameters gathered."""
        return self._engine.call(self.module, *args, **kwargs)


def behind_entry(module: nn.Module) -> nn.Module:
    """Return the user's module, of an entry or as it is."""
    return module.module if isinstance(module, Entry) else module
