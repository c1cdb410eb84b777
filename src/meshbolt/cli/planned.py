"""The plan that a configuration of `fit` comes to, worked out without its devices, and where its values are from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jsonargparse
import torch

from meshbolt.cli.building import typed_errors
from meshbolt.cli.keys import check_keys
from meshbolt.cli.strategy import check_strategy_name
from meshbolt.config import Plan, Settings, resolve
from meshbolt.config.load import Loaded
from meshbolt.config.schema import PLAIN_FIELDS
from meshbolt.environment import DEBUG, FAST_PATH
from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.plugins import MeshPrecision
from meshbolt.precision import PrecisionPolicy, precision_policy
from meshbolt.strategies import PRESETS, MeshStrategy

DEFAULT = "default"
_STRATEGY = "trainer.strategy"
_FLAGS: Mapping[str, str] = MappingProxyType(
    {"None": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
)
_DEVICE_TYPES: Mapping[str, str] = MappingProxyType({"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"})


class Row(NamedTuple):
    """One value of a plan.

    Attributes:
        key: its dotted name.
        value: plain data.
        origin: where it is from, in words.
    """

    key: str
    value: Any
    origin: str


def explain_plan(loaded: Loaded) -> list[Row]:
    """Return every value of the plan, in the plan's own order, with its origin.

    Args:
        loaded: a configuration of `fit`.

    Raises:
        ConfigError: the strategy is none of meshbolt's, a value is wrong, or a key is none of `fit`.
        TopologyError: the devices do not fit the strategy.
        UnsupportedError: a setting asks for what this version does not have.
    """
    check_keys(loaded)
    plan, precision_origin = _plan(loaded)
    rows = [Row(key, value, _origin(key, loaded, precision_origin, plan)) for key, value in plan.rows().items()]
    return [*rows, *_stages(plan)]


def _stages(plan: Plan) -> list[Row]:
    """Return how many stages there are, which the setting may leave to its schedule."""
    stages = plan.settings.pipeline_parallel.stages
    origin = "follows from pipeline_parallel.size, schedule and stages_per_rank"
    return [Row("pipeline_parallel.stages", stages, origin)] if stages > 1 else []


def _plan(loaded: Loaded) -> tuple[Plan, str]:
    device_type = _device_type(str(loaded.get("trainer.accelerator", "auto")))
    strategy = _strategy(loaded)
    settings: Settings = strategy.settings
    policy, origin = _precision(loaded, device_type=device_type, reduce_dtype=settings.zero.reduce_dtype)
    num_devices = _count_devices(loaded.get("trainer.devices", "auto"), device_type=device_type)
    world_size = num_devices * _count_nodes(loaded.get("trainer.num_nodes", 1))
    plan = resolve(
        settings,
        world_size=world_size,
        precision=policy,
        device_type=device_type,
        ranks_per_node=num_devices,
    )
    return plan, origin


def _strategy(loaded: Loaded) -> MeshStrategy:
    asked = loaded.get(_STRATEGY, "auto")
    if isinstance(asked, str) and asked.lower() in PRESETS:
        return MeshStrategy(**PRESETS[asked.lower()])
    check_strategy_name(asked)
    if isinstance(asked, str):
        raise ConfigError(
            f"{_STRATEGY}={asked!r} is a strategy of Lightning, so there is no plan of meshbolt's to explain"
            f"{did_you_mean(asked, PRESETS)}."
        )
    return build_strategy(asked)


def build_strategy(written: Any) -> MeshStrategy:
    """Build a strategy of meshbolt's as it is written in a configuration.

    Args:
        written: the class path and its arguments.

    Raises:
        MeshboltError: a value is wrong.
    """
    strategy: MeshStrategy = _instantiate(MeshStrategy, written, key=_STRATEGY)
    return strategy


def _instantiate(kind: type, written: Any, *, key: str) -> Any:
    """Build what a class path and its arguments name, as the command line of `fit` does."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, key, fail_untyped=False, required=True)
    try:
        parsed = parser.parse_object({key: written})
    except jsonargparse.ArgumentError as error:
        raise ConfigError(f"{key} cannot be built as it is written. {error}") from error
    with typed_errors(parser):
        return parser.instantiate_classes(parsed)[key]


def _precision(loaded: Loaded, *, device_type: str, reduce_dtype: str) -> tuple[PrecisionPolicy, str]:
    for key in (f"{_STRATEGY}.init_args.precision_plugin", "trainer.plugins"):
        asked = loaded.get(key)
        for written in asked if isinstance(asked, list) else [asked]:
            if str(_class_path(written)).startswith("meshbolt.plugins."):
                plugin: MeshPrecision = _instantiate(MeshPrecision, written, key=key)
                return plugin.policy(reduce_dtype=reduce_dtype), _given(loaded, key)
    written = str(loaded.get("trainer.precision"))
    flag, origin = _FLAGS.get(written, written), _given(loaded, "trainer.precision")
    if flag == "16-mixed" and device_type == "cpu":
        flag, origin = "bf16-mixed", f"Lightning's choice on a CPU instead of 16-mixed ({origin})"
    return precision_policy(flag, reduce_dtype=reduce_dtype), origin


def _class_path(written: Any) -> Any:
    return written.get("class_path") if isinstance(written, Mapping) else written


def _device_type(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator not in _DEVICE_TYPES:
        known = did_you_mean(accelerator, ["auto", *_DEVICE_TYPES])
        raise ConfigError(f"trainer.accelerator={accelerator!r} is not one that meshbolt runs on{known}.")
    return _DEVICE_TYPES[accelerator]


def _count_devices(devices: Any, *, device_type: str) -> int:
    """Return how many devices of a machine are asked for, as Lightning counts them."""
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count() if device_type == "cuda" else 1
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    if not str(devices).isdigit() or int(devices) == 0:
        raise ConfigError(f"trainer.devices={devices!r} is not a number of devices. Give a number, a list, or 'auto'.")
    return int(devices)


def _count_nodes(nodes: Any) -> int:
    if isinstance(nodes, bool) or not str(nodes).isdigit() or int(nodes) == 0:
        raise ConfigError(f"trainer.num_nodes={nodes!r} is not a number of machines. Give 1 or more.")
    return int(nodes)


def _origin(key: str, loaded: Loaded, precision_origin: str, plan: Plan) -> str:
    if key == "world_size":
        return _given(loaded, "trainer.devices", "trainer.num_nodes")
    if key == "device":
        return _given(loaded, "trainer.accelerator")
    if key in ("debug", "fast_path"):
        variable = {"debug": DEBUG, "fast_path": FAST_PATH}[key]
        return f"environment variable {variable}" if os.environ.get(variable) else DEFAULT
    if key == "precision.flag":
        return precision_origin
    if key == "precision.reduce_dtype" and plan.settings.zero.reduce_dtype != "auto":
        return "follows from zero.reduce_dtype"
    section, _, name = key.partition(".")
    if section in ("mesh", "precision"):
        return f"follows from world_size{_sizes_of(plan)}" if section == "mesh" else "follows from precision.flag"
    return _setting_origin(section, name, loaded)


def _sizes_of(plan: Plan) -> str:
    others = {"tensor_parallel": plan.mesh.tp, "pipeline_parallel": plan.mesh.pp}
    (*first, last) = ["zero", *(name for name, size in others.items() if size > 1)]
    return "".join(f", {name}" for name in first) + f" and {last}"


def _setting_origin(section: str, name: str, loaded: Loaded) -> str:
    preset = loaded.get(_STRATEGY)
    if isinstance(preset, str):
        is_set = section in PRESETS[preset.lower()] and name in ("", PLAIN_FIELDS.get(section))
        return f"preset {preset}, {_given(loaded, _STRATEGY)}" if is_set else DEFAULT
    key = f"{_STRATEGY}.init_args.{section}"
    # A plain value stands for a field of its dataclass: `zero: 2` for the stage, `recompute: full` for the mode.
    value = loaded.get(key)
    is_plain = not isinstance(value, Mapping)
    if is_plain and name in ("", PLAIN_FIELDS.get(section)):
        return _given(loaded, key)
    is_class = isinstance(value, Mapping) and "class_path" in value
    return _given(loaded, f"{key}.init_args.{name}" if is_class else f"{key}.{name}")


def _given(loaded: Loaded, *keys: str) -> str:
    """Return where the values under some keys are from."""
    found = [
        f"{origin}: {key}"
        for key in keys
        for given, origin in loaded.origins.items()
        if f"{given}.".startswith(f"{key}.")
    ]
    return ", ".join(dict.fromkeys(found)) or DEFAULT
