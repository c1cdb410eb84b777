"""How a module was before it was sharded, divided or compiled: a step of another form is looked at as the first one was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# What sharding, division, recomputation and compilation change of a module, beside its parameters.
_CHANGED = (
    "forward",
    "generate",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_compiled_call_impl",
)


class Pristine:
    """Remembers a module.

    Args:
        module: as the user has built it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._then = {child: _taken(child) for child in module.modules()}

    def hooks_since(self) -> frozenset[int]:
        """Return the numbers of the hooks on calls that modules have now and did not have then."""
        return frozenset(
            number
            for child, then in self._then.items()
            for kind in ("_forward_hooks", "_forward_pre_hooks")
            for number in child.__dict__[kind].keys() - then[kind].keys()
        )

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Let the module be as it was for a while; its parameters and the user's attributes stay those of now."""
        now = {child: _taken(child) for child in self._then}
        _put(self._then)
        try:
            yield
        finally:
            _put(now)


def _taken(child: nn.Module) -> dict[str, Any]:
    held = {key: child.__dict__[key] for key in _CHANGED if key in child.__dict__}
    return {key: value.copy() if isinstance(value, dict) else value for key, value in held.items()}


def _put(states: dict[nn.Module, dict[str, Any]]) -> None:
    for child, state in states.items():
        for key in _CHANGED:
            child.__dict__.pop(key, None)
        child.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in state.items()})
