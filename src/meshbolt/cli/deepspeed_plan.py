"""What DeepSpeed's JSON comes to, without a configuration of `fit` around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshbolt.cli.planned import Devices, Row, devices_of, origin_in_plan, stages_of
from meshbolt.cli.sections import Explanation, Section, sections_of_deepspeed
from meshbolt.config import Plan, Settings, resolve
from meshbolt.config.load import Loaded
from meshbolt.deepspeed_json import Options, Translation, translate
from meshbolt.deepspeed_json.effective import OF_TRAINER, origin_of
from meshbolt.deepspeed_json.read import read
from meshbolt.errors import ConfigError
from meshbolt.precision import PrecisionPolicy, precision_policy
from meshbolt.strategies import MeshStrategy
from meshbolt.strategies.from_deepspeed import precision_plugin

_WORLD = ("trainer.devices", "trainer.num_nodes")
_TAKEN = ("trainer.accelerator", *_WORLD, "deepspeed_version", "auto")
OWN_OPTIONS = ("deepspeed_version", "auto")
"""What a DeepSpeed file takes that a configuration of `fit` does not."""


def is_deepspeed(path: str) -> bool:
    """Return whether a file is DeepSpeed's: JSON that is no configuration of `fit`.

    Args:
        path: of the file.

    Raises:
        ConfigError: it is no JSON although its name says so.
    """
    return path.endswith(".json") and "trainer" not in read(path)[0]


def explain_file(path: str, loaded: Loaded) -> Explanation:
    """Return what a DeepSpeed file comes to, and where each value is from.

    Args:
        path: of the file.
        loaded: overrides: devices, machines and accelerator of the Trainer, the version of DeepSpeed, values for keys that are
            "auto". Without devices, what follows from their number is left out.

    Raises:
        MeshboltError: the file is wrong, asks for what is not there, or does not go with the devices.
    """
    for key in loaded.origins:
        if not f"{key}.".startswith(tuple(f"{each}." for each in _TAKEN)):
            raise ConfigError(
                f"--{key} is none of what a DeepSpeed file takes: {', '.join(_TAKEN)}. The rest is in the file: change it there."
            )
    devices = devices_of(loaded) if any(loaded.get(key) is not None for key in _WORLD) else None
    made = translate(path, _options(loaded, devices))
    return Explanation([_plan_section(made, loaded, devices), *sections_of_deepspeed(made)], made.receipt)


def _options(loaded: Loaded, devices: Devices | None) -> Options:
    version, auto = loaded.get("deepspeed_version"), loaded.get("auto") or {}
    if not isinstance(auto, Mapping):
        raise ConfigError(
            f"--auto={auto!r} has no keys. Write --auto.KEY=VALUE, such as --auto.optimizer.params.lr=1e-4."
        )
    return Options(
        auto=_flat(auto),
        deepspeed_version=None if version is None else str(version),
        world_size=None if devices is None else devices.number * devices.nodes,
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _plan_section(made: Translation, loaded: Loaded, devices: Devices | None) -> Section:
    settings = MeshStrategy(**made.settings).settings
    dtype = settings.zero.reduce_dtype
    plugin = precision_plugin(made.precision)
    flag = made.precision.flag if made.precision is not None else "32-true"
    policy = precision_policy(flag, reduce_dtype=dtype) if plugin is None else plugin.policy(reduce_dtype=dtype)
    plan = plan_on(settings, policy, devices)
    origin = origin_of(made, "precision.flag") if made.precision is not None else OF_TRAINER
    rows = [Row(key, value, origin_in_plan(key, loaded, origin, plan, made)) for key, value in plan.rows().items()]
    return Section(
        "plan", "plan", [*(row for row in rows if devices or not follows_from_devices(row.key)), *stages_of(plan)]
    )


def plan_on(settings: Settings, policy: PrecisionPolicy, devices: Devices | None) -> Plan:
    """Return the plan that settings resolve into.

    Args:
        settings: of a strategy.
        policy: of the precision.
        devices: that it runs on; None: the fewest that will do.

    Raises:
        TopologyError: the devices do not go with the settings.
    """
    tensor, stages = settings.tensor_parallel.size, settings.pipeline_parallel.size
    least = (tensor if isinstance(tensor, int) else 1) * stages * settings.zero.replicate
    return resolve(
        settings,
        world_size=least if devices is None else devices.number * devices.nodes,
        precision=policy,
        device_type="cpu" if devices is None else devices.type,
        ranks_per_node=1 if devices is None else devices.number,
    )


def follows_from_devices(key: str) -> bool:
    """Return whether a value of a plan says nothing where devices are not known.

    Args:
        key: of the plan's rows.
    """
    return key in ("world_size", "device") or key.startswith("mesh.")
