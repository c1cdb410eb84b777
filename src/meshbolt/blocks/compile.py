"""Compile each repeated block by itself: one graph serves all of them, and gathers stay outside of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from meshbolt.errors import ConfigError


def compile_blocks(blocks: Sequence[nn.Module], *, enabled: bool) -> None:
    """Compile every block with torch's default mode, in place.

    Args:
        blocks: in the order of the model.
        enabled: the user's `compile` setting.

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
        block.compile()
