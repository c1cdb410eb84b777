"""The strategy for Lightning Fabric: `from meshbolt.fabric import MeshStrategy`."""

from __future__ import annotations

from meshbolt.strategies import FabricMeshStrategy as MeshStrategy

__all__ = ["MeshStrategy"]
