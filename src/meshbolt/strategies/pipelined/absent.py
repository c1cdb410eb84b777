"""What stands in for what a step reads and does not exist yet, while it is only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

_METHODS = ("optimizers", "lr_schedulers")


@contextmanager
def optimizers_stood_in_for(module: pl.LightningModule) -> Iterator[None]:
    """Let a step read its optimizers and schedulers, such as a learning rate to log, before they are made.

    Args:
        module: whose step is looked at.
    """
    held = {name: vars(module)[name] for name in _METHODS if name in vars(module)}
    vars(module).update(dict.fromkeys(_METHODS, _Absent()))
    try:
        yield
    finally:
        for name in _METHODS:
            vars(module).pop(name, None)
        vars(module).update(held)


class _Absent:
    """Has every attribute, item and method; each is again such an object, and as a number it is zero."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _: Any) -> _Absent:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Absent:
        return self

    def __float__(self) -> float:
        return 0.0

    def __iter__(self) -> Iterator[_Absent]:
        return iter([self])
