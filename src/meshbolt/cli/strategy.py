"""What a configuration says about the strategy: its name, and whether there is one like it."""

from __future__ import annotations

import difflib
import pydoc
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.strategies import PRESETS, MeshStrategy


def check_strategy_name(strategy: Any) -> None:
    """Refuse a strategy that is written as a name which nobody has registered.

    Args:
        strategy: as the configuration has it; whatever is not a string passes.

    Raises:
        ConfigError: the name is unknown.
    """
    known = [*StrategyRegistry.available_strategies(), "auto"]
    if not isinstance(strategy, str) or strategy.lower() in known:
        return
    if "." in strategy:
        raise ConfigError(
            f"trainer.strategy={strategy!r} is read as a name, and there is none like it. To give a class, write "
            f"`class_path: {strategy}` below `strategy:`, or add one of its arguments: --trainer.strategy.zero=2."
        )
    close = difflib.get_close_matches(strategy, known, n=3)
    raise ConfigError(
        f"trainer.strategy={strategy!r} is not a strategy{did_you_mean(strategy, {*PRESETS, *close})}. For other "
        "settings, write `class_path: meshbolt.MeshStrategy` and its `init_args` below `strategy:`."
    )


def class_of(path: str) -> type | None:
    """Return the class that a class path names, or whose method makes what it names; None where it is neither.

    Args:
        path: such as "meshbolt.MeshStrategy" or "meshbolt.MeshStrategy.from_deepspeed".
    """
    found = pydoc.locate(path)
    owner = getattr(found, "__self__", found)
    return owner if isinstance(owner, type) else None


def is_own_strategy(path: str) -> bool:
    """Return whether a class path comes to a strategy of meshbolt's.

    Args:
        path: as `class_of` takes it.
    """
    kind = class_of(path)
    return kind is not None and issubclass(kind, MeshStrategy)
