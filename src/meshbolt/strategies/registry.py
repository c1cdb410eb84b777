"""The names that `strategy="..."` understands, and the calls they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from lightning.fabric.strategies import STRATEGY_REGISTRY as FABRIC_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from meshbolt.offload.setting import Offload

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "zero0": {"zero": 0},
        "zero1": {"zero": 1},
        "zero2": {"zero": 2},
        "zero3": {"zero": 3},
        "zero2_offload": {"zero": 2, "offload": "cpu"},
        "zero3_offload": {"zero": 3, "offload": "cpu"},
        "zero_infinity": {
            "zero": 3,
            "offload": Offload(optimizer="nvme", parameters="nvme", path="$MESHBOLT_NVME_PATH"),
        },
        "tensor_parallel": {"zero": 0, "tensor_parallel": "node"},
        "pipeline_parallel": {"zero": 1, "pipeline_parallel": 2},
        "mesh_3d": {"zero": 1, "tensor_parallel": 2, "pipeline_parallel": 2},
    }
)


def register_presets(trainer_strategy: type, fabric_strategy: type) -> None:
    """Register every preset in the registries of the Trainer and of Fabric; again is nothing.

    Args:
        trainer_strategy: the class for the Trainer.
        fabric_strategy: the class for Fabric.
    """
    for name, arguments in PRESETS.items():
        written = ", ".join(f"{key}={_written(value)}" for key, value in arguments.items())
        for registry, strategy in ((StrategyRegistry, trainer_strategy), (FABRIC_REGISTRY, fabric_strategy)):
            registry.register(name, strategy, description=f"MeshStrategy({written})", override=True, **arguments)


def _written(value: Any) -> str:
    """Return a setting as a user writes it, without what is default."""
    if not is_dataclass(value):
        return repr(value)
    given = {
        each.name: getattr(value, each.name) for each in fields(value) if getattr(value, each.name) != each.default
    }
    return f"{type(value).__name__}({', '.join(f'{key}={item!r}' for key, item in given.items())})"
