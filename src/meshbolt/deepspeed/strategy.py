"""The strategy of the engine's loop: Fabric's, where a script that asks for a state dict gets whole tensors, or is told how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import local_tensor
from meshbolt.errors import UnsupportedError
from meshbolt.strategies import FabricMeshStrategy


class LoopStrategy(FabricMeshStrategy):
    """The strategy of the engine's loop: only its own saves and loads see the shards of a state dict."""

    _own_calls = 0

    @contextmanager
    def seeing_shards(self) -> Iterator[None]:
        """Let state dicts have shards for a while."""
        self._own_calls += 1
        try:
            yield
        finally:
            self._own_calls -= 1

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return a module's state, sharded parameters as DTensors."""
        with self.seeing_shards():
            return super().get_module_state_dict(module)

    def save_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint directory; every rank writes its shards."""
        with self.seeing_shards():
            super().save_checkpoint(path, *args, **kwargs)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; every rank reads what its shards need."""
        with self.seeing_shards():
            return super().load_checkpoint(path, *args, **kwargs)

    def refuse_shards(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        """Give whole tensors to a script that asks for a state dict, or refuse where ranks would have to be asked for them.

        Args:
            state: of a module; what is whole on each rank is replaced by plain tensors.
            prefix: of the names; those of a part of what is asked for are left to the whole.

        Raises:
            UnsupportedError: some of it is in shards.
        """
        if prefix or self._own_calls:
            return
        for name, value in state.items():
            if not isinstance(value, DTensor):
                continue
            if any(not placement.is_replicate() for placement in value.placements):
                raise UnsupportedError(
                    f"module.state_dict() would have a shard for {name!r}, and a file of it the weights of one rank. Call "
                    "engine.module_state_dict() on every rank, which returns whole weights, or engine.save_16bit_model(dir)."
                )
            state[name] = local_tensor(value)


def refuse_shards(module: nn.Module, strategy: Any) -> None:
    """Refuse from here on state dicts of a module, and of every part of it, that have shards.

    Args:
        module: the engine, with its sharded module.
        strategy: its, a `LoopStrategy`.
    """
    for child in module.modules():
        # A function, which copies of the module share: a method would bring along a copy of the strategy.
        child.register_state_dict_post_hook(lambda *args: strategy.refuse_shards(*args))
