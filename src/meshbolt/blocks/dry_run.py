"""Call a module only to look at it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Give a module and those in it their attributes back at the end: a step that is only looked at may count itself.

    Parameters and buffers are those that were there at the beginning; put others in their place before, if at all.

    Args:
        module: what is called inside.
    """
    before = [(child, _Attributes(child)) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            attributes.restore(child)


class _Attributes:
    """What a module has noted in attributes of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._values: Mapping[str, Any] = dict(module.__dict__)
        self._contents = {
            key: copy.copy(value)
            for key, value in module.__dict__.items()
            if isinstance(value, (list, dict, set))  # hooks, too, which a forward may register
        }

    def restore(self, module: nn.Module) -> None:
        """Give the module its attributes back."""
        for key in module.__dict__.keys() - self._values.keys():
            del module.__dict__[key]
        module.__dict__.update(self._values)
        for key, content in self._contents.items():
            value = self._values[key]
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
