"""Entries into a sharded module that Lightning does not know of: calls of the module and of its parts from anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from meshbolt import compat
from meshbolt.engine import Engine
from meshbolt.strategies.failures import Failures

ENTRIES = ("forward", "generate")


def redirect_entries(module: nn.Module, engine: Engine) -> None:
    """Let `module(...)`, `module.generate(...)` and those of its parts work from any hook, with parameters gathered.

    Args:
        module: the user's; sharded by the engine. Once is enough; again is nothing.
        engine: gathers parameters for the time of a call.
    """
    if not hasattr(module.forward, "_meshbolt_entry"):
        # FSDP takes whatever is called first for the outermost unit; from now on that may be any part.
        with torch.no_grad():
            engine.call(lambda: None)
    for part in _outside_of_units(module):
        for name in ENTRIES:
            method = getattr(part, name, None)
            if callable(method) and not hasattr(method, "_meshbolt_entry"):
                # Straight into __dict__: a LightningModule is free to give __setattr__ a meaning of its own.
                part.__dict__[name] = _redirected(method, engine)


def _outside_of_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose own parameters the root gathers; a unit gathers its own when it is called."""
    if isinstance(module, FSDPModule):
        return
    yield module
    for child in module.children():
        yield from _outside_of_units(child)


def _redirected(method: Callable[..., Any], engine: Engine) -> Callable[..., Any]:
    @functools.wraps(method)
    def entered(*args: Any, **kwargs: Any) -> Any:
        if compat.current_pass() >= 0:
            # A block is recomputed for its backward, which has gathered what it needs.
            return method(*args, **kwargs)
        return engine.call(method, *args, **kwargs)

    entered._meshbolt_entry = True  # type: ignore[attr-defined]
    return entered


class Entry(nn.Module):
    """What Fabric calls in place of a sharded module.

    Fabric redirects `training_step`, and methods marked with `mark_forward_method`, through the forward of the module that a
    strategy returns, but only where that is not the user's module itself.
    """

    def __init__(self, module: nn.Module, engine: Engine, *, look: Callable[..., None], failures: Failures) -> None:
        """Stand for a module.

        Args:
            module: the user's, sharded.
            engine: runs it.
            look: is shown the module and what it is about to be called with.
            failures: tells other ranks of errors in what they wait for.
        """
        super().__init__()
        self.module = module
        self._engine = engine
        self._look, self._failures = look, failures

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the root's parameters gathered."""
        if not self._engine.inside:
            self._look(self.module, args, kwargs)
        if not torch.is_grad_enabled():
            return self._engine.call(self.module, *args, **kwargs)  # a loop may go on after an error in an evaluation
        with self._failures.told("the forward pass"):
            return self._engine.call(self.module, *args, **kwargs)


def behind_entry(module: nn.Module) -> nn.Module:
    """Return the user's module, of an entry or as it is."""
    return module.module if isinstance(module, Entry) else module
