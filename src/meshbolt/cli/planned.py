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
from meshbolt.deepspeed_json.effective import origin_of
from meshbolt.deepspeed_json.translate import Translation
from meshbolt.environment import DEBUG, FAST_PATH
from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.plugins import MeshPrecision
from meshbolt.precision import PrecisionPolicy, precision_policy
from meshbolt.strategies import PRESETS, MeshStrategy
from meshbolt.strategies.from_deepspeed import Flags, compare_flags, precision_plugin

DEFAULT = "default"
_STRATEGY, _FROM_DEEPSPEED = "trainer.strategy", "from_deepspeed"
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


class Explained(NamedTuple):
    """What a configuration of `fit` comes to.

    Attributes:
        rows: every value of the plan, in the plan's own order, with its origin.
        translation: of the DeepSpeed file that the strategy was made from; None without one.
    """

    rows: list[Row]
    translation: Translation | None


def explain(loaded: Loaded) -> Explained:
    """Return what a configuration comes to.

    Args:
        loaded: a configuration of `fit`.

    Raises:
        ConfigError: the strategy is none of meshbolt's, a value is wrong, or a key is none of `fit`.
        TopologyError: the devices do not fit the strategy.
        UnsupportedError: a setting asks for what this version does not have.
    """
    check_keys(loaded)
    strategy = _strategy(loaded)
    plan, precision_origin = _plan(loaded, strategy)
    if (made := strategy.deepspeed_translation) is not None:
        _check_sizes(loaded, made, plan)
    rows = [
        Row(key, value, origin_in_plan(key, loaded, precision_origin, plan, made)) for key, value in plan.rows().items()
    ]
    return Explained([*rows, *stages_of(plan)], made)


def explain_plan(loaded: Loaded) -> list[Row]:
    """Return every value of the plan, in the plan's own order, with its origin.

    Args:
        loaded: a configuration of `fit`.

    Raises:
        MeshboltError: as `explain` has it.
    """
    return explain(loaded).rows


def stages_of(plan: Plan) -> list[Row]:
    """Return how many stages there are, which the setting may leave to its schedule.

    Args:
        plan: with or without a pipeline.
    """
    stages = plan.settings.pipeline_parallel.stages
    origin = "follows from pipeline_parallel.size, schedule and stages_per_rank"
    return [Row("pipeline_parallel.stages", stages, origin)] if stages > 1 else []


def _plan(loaded: Loaded, strategy: MeshStrategy) -> tuple[Plan, str]:
    devices = devices_of(loaded)
    settings: Settings = strategy.settings
    policy, origin = policy_of(loaded, strategy, device_type=devices.type)
    plan = resolve(
        settings,
        world_size=devices.number * devices.nodes,
        precision=policy,
        device_type=devices.type,
        ranks_per_node=devices.number,
    )
    return plan, origin


class Devices(NamedTuple):
    """The devices that a configuration asks for.

    Attributes:
        type: "cpu" or "cuda".
        number: on each machine.
        nodes: machines.
    """

    type: str
    number: int
    nodes: int


def devices_of(loaded: Loaded) -> Devices:
    """Return the devices that a configuration asks for, as Lightning counts them.

    Args:
        loaded: with the flags of a Trainer.

    Raises:
        ConfigError: a flag has a value that it cannot have.
    """
    kind = _device_type(str(loaded.get("trainer.accelerator", "auto")))
    number = _count_devices(loaded.get("trainer.devices", "auto"), device_type=kind)
    return Devices(kind, number, _count_nodes(loaded.get("trainer.num_nodes", 1)))


def _check_sizes(loaded: Loaded, made: Translation, plan: Plan) -> None:
    """Compare a DeepSpeed file with the flags of the Trainer and the ranks, as `fit` does when it begins."""
    steps = loaded.get("trainer.accumulate_grad_batches") or 1
    written = str(loaded.get("trainer.precision"))
    flags = Flags(
        accumulate=steps,
        clip=loaded.get("trainer.gradient_clip_val") or None,
        algorithm=loaded.get("trainer.gradient_clip_algorithm") or "norm",
        precision=_FLAGS.get(written, written),
    )
    compare_flags(made, flags)
    if isinstance(steps, int):
        made.batch.each_on(plan.mesh.dp_replicate * plan.mesh.dp_shard, steps=steps)


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
    if str(class_path_of(written)).endswith(f".{_FROM_DEEPSPEED}"):
        # What became of the file's keys is shown by who asks for it.
        written = {"class_path": class_path_of(written), "init_args": {**(_arguments(written)), "show": False}}
    strategy: MeshStrategy = _instantiate(MeshStrategy, written, key=_STRATEGY)
    return strategy


def _arguments(written: Any) -> Mapping[str, Any]:
    return (written.get("init_args") or {}) if isinstance(written, Mapping) else {}


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


def policy_of(loaded: Loaded, strategy: Any, *, device_type: str) -> tuple[PrecisionPolicy, str]:
    """Return the dtypes of a run, and where its precision is from.

    Args:
        loaded: with the Trainer's flags.
        strategy: that runs it.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: there is no such precision.
    """
    reduce_dtype = strategy.settings.zero.reduce_dtype
    made = strategy.deepspeed_translation
    if made is not None and (carried := precision_plugin(made.precision)) is not None:
        return carried.policy(reduce_dtype=reduce_dtype), origin_of(made, "precision.flag")
    for key in (f"{_STRATEGY}.init_args.precision_plugin", "trainer.plugins"):
        asked = loaded.get(key)
        for written in asked if isinstance(asked, list) else [asked]:
            is_ours = isinstance(written, MeshPrecision) or str(class_path_of(written)).startswith("meshbolt.plugins.")
            if is_ours:
                plugin = (
                    written if isinstance(written, MeshPrecision) else _instantiate(MeshPrecision, written, key=key)
                )
                return plugin.policy(reduce_dtype=reduce_dtype), _given(loaded, key)
    if loaded.get("trainer.precision") is None:
        own = strategy.precision_plugin.policy(reduce_dtype=reduce_dtype)
        return own, DEFAULT if own.flag == _FLAGS["None"] else _given(loaded, _STRATEGY)
    written = str(loaded.get("trainer.precision"))
    flag, origin = _FLAGS.get(written, written), _given(loaded, "trainer.precision")
    if flag == "16-mixed" and device_type == "cpu":
        flag, origin = "bf16-mixed", f"Lightning's choice on a CPU instead of 16-mixed ({origin})"
    return precision_policy(flag, reduce_dtype=reduce_dtype), origin


def class_path_of(written: Any) -> Any:
    """Return the class that is named, where arguments may stand beside it.

    Args:
        written: as a configuration has it.
    """
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


def origin_in_plan(key: str, loaded: Loaded, precision_origin: str, plan: Plan, made: Translation | None) -> str:
    """Return where a value of a plan is from, in words.

    Args:
        key: of the plan's rows.
        loaded: what was given.
        precision_origin: where the precision is from.
        plan: that the value is of.
        made: of the DeepSpeed file that the strategy was made from; None without one.
    """
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
    if made is not None and section not in _arguments(loaded.get(_STRATEGY)):
        return origin_of(made, key)
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
