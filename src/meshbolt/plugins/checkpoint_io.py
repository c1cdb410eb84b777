"""The plugin that carries checkpoint directories between Lightning, the user's own plugins around it, and the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from meshbolt.errors import ConfigError, UnsupportedError


class Carrier(Protocol):
    """What does the work: a strategy's, with its ranks, mesh and shards."""

    def write(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Write a checkpoint; called on every rank."""

    def read(self, path: str, *, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint; called on every rank."""

    def remove(self, path: str) -> None:
        """Delete a checkpoint; called on rank 0."""


class MeshCheckpointIO(CheckpointIO):
    """Saves and loads checkpoint directories, which all ranks write and read together.

    Every strategy of meshbolt has one. Name it only to put a plugin of your own around it, a subclass of Lightning's
    `_WrappingCheckpointIO`. That plugin is called on every rank, sees Lightning's dictionary with the shards in it and
    the path, and must call on to this one on every rank or on none; checkpoints are deleted on rank 0 alone.

    Example:
        >>> trainer = Trainer(strategy="zero3", plugins=[MyPlugin(MeshCheckpointIO())])
    """

    _carrier: Carrier | None = None

    def attach(self, carrier: Carrier) -> None:
        """Take who does the work.

        Args:
            carrier: of the strategy that calls next.
        """
        self._carrier = carrier

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint directory; on every rank.

        Args:
            checkpoint: with the shards of this rank.
            path: of the directory, the same on every rank.
            storage_options: not available; None.

        Raises:
            CheckpointError: it was not saved; the same on every rank.
            UnsupportedError: there are storage options.
        """
        if storage_options is not None:
            raise UnsupportedError("storage_options are not available for checkpoint directories. Leave them out.")
        self._attached().write(checkpoint, str(path))

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint directory into the shards of this rank; on every rank.

        Args:
            path: of the directory, the same on every rank.
            map_location: not available; None.
            weights_only: False builds objects of any class, which runs code from the checkpoint; else plain data only.

        Returns:
            What was saved, with tensors in the layout of this run.

        Raises:
            CheckpointError: there is no whole checkpoint that fits; the same on every rank.
            UnsupportedError: there is a map_location.
        """
        if map_location is not None:
            raise UnsupportedError(
                f"map_location={map_location!r} is not available for checkpoint directories: each rank reads its shards to "
                "where they belong. Leave it out."
            )
        return self._attached().read(str(path), weights_only=weights_only)

    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete a checkpoint directory; on rank 0."""
        self._attached().remove(str(path))

    def _attached(self) -> Carrier:
        if self._carrier is None:
            raise ConfigError(
                "MeshCheckpointIO saves and loads what a strategy of meshbolt holds, and no strategy has used it yet. Give it "
                "to a Trainer or Fabric with such a strategy, and call trainer.save_checkpoint or fabric.save."
            )
        return self._carrier
