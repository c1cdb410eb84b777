"""Resolve settings into a plan: every "auto" becomes a value here, and nothing downstream decides again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshbolt.config.schema import Settings
from meshbolt.environment import Environment, read_environment
from meshbolt.mesh import MeshShape, shape_for
from meshbolt.precision import PrecisionPolicy
from meshbolt.zero import POLICIES, StagePolicy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does: the object that the engine executes.

    Attributes:
        settings: what the user wrote.
        mesh: sizes of the axes.
        stage: the ZeRO stage as a policy.
        precision: dtypes of gathering, reduction, storage and autocast.
        device_type: "cpu" or "cuda".
        environment: switches from environment variables.
    """

    settings: Settings
    mesh: MeshShape
    stage: StagePolicy
    precision: PrecisionPolicy
    device_type: str
    environment: Environment

    def rows(self) -> Mapping[str, Any]:
        """Return every effective value as plain data, keyed by its dotted name."""
        rows: dict[str, Any] = {
            "world_size": self.mesh.world_size,
            **{f"mesh.{name}": size for name, size in self.mesh.sizes().items()},
            "device": self.device_type,
        }
        for setting in dataclasses.fields(self.settings):
            value = getattr(self.settings, setting.name)
            nested = dataclasses.asdict(value) if not isinstance(value, bool) else {"": value}
            lists = {key: list(item) if isinstance(item, tuple) else item for key, item in nested.items()}
            rows.update({f"{setting.name}.{key}" if key else setting.name: item for key, item in lists.items()})
        for part in dataclasses.fields(self.precision):
            rows[f"precision.{part.name}"] = _plain(getattr(self.precision, part.name))
        rows["debug"] = self.environment.debug
        rows["fast_path"] = self.environment.fast_path
        return rows


def resolve(
    settings: Settings,
    *,
    world_size: int,
    precision: PrecisionPolicy,
    device_type: str,
    environment: Environment | None = None,
    ranks_per_node: int | None = None,
) -> Plan:
    """Resolve settings for a world of ranks.

    Args:
        settings: what the user wrote.
        world_size: number of ranks.
        precision: the policy of the run's precision flag.
        device_type: "cpu" or "cuda".
        environment: switches; None reads them from the environment variables.
        ranks_per_node: of one machine; None: all ranks.

    Raises:
        TopologyError: the axes do not divide the world.
        ConfigError: an environment variable is malformed.
    """
    stage = POLICIES[settings.zero.stage]
    size = settings.tensor_parallel.size
    tensor_parallel = size if isinstance(size, int) else ranks_per_node or world_size
    return Plan(
        settings=settings,
        mesh=shape_for(
            world_size=world_size,
            shards=stage.shards,
            replicate=settings.zero.replicate,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel.size,
        ),
        stage=stage,
        precision=precision,
        device_type=device_type,
        environment=environment or read_environment(),
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value).removeprefix("torch.")
