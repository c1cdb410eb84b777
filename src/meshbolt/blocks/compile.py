"""Compile each repeated block by itself: one graph serves all of them, and gathers stay outside of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.errors import ConfigError

Around = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes a compiled forward, and returns what is to be called in its place."""


def compile_blocks(blocks: Sequence[nn.Module], *, enabled: bool, around: Around | None = None) -> None:
    """Compile every block with torch's default mode, in place.

    Args:
        blocks: in the order of the model.
        enabled: the user's `compile` setting.
        around: what goes on between a block's hooks and its compiled forward; None: the hooks are compiled with it.

    Raises:
        ConfigError: compile is asked for, but the model has no blocks.
    """
    if not enabled:
        return
    if not blocks:
        raise ConfigError(
            "compile=True compiles the repeated blocks of a model, and none was found. Name them with "
            "zero=Zero(unit=[...]), or call `.compile()` on submodules in your module's `__init__` and set compile=False."
        )
    for block in blocks:
        if around is None:
            block.compile()
        else:
            block.forward = around(torch.compile(block.forward))
