"""What a Trainer, its arguments or a strategy come to that are written in Python."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.accelerators import CPUAccelerator

from meshbolt.callbacks.origins import flags_of
from meshbolt.cli.deepspeed_plan import follows_from_devices, plan_on
from meshbolt.cli.keys import check_keys
from meshbolt.cli.planned import DEFAULT, Row, devices_of, origin_in_plan, policy_of, stages_of
from meshbolt.cli.sections import Explanation, Section, sections_of_deepspeed
from meshbolt.config import Settings
from meshbolt.config.load import Loaded
from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.strategies import PRESETS, MeshStrategy

_NAME = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*)(?::(?P<attribute>[A-Za-z_][\w.]*))?")
_KINDS = "a Trainer, a dictionary of its arguments, a strategy of meshbolt's, or a function without arguments that returns one"
_PLANNED = ("strategy", "devices", "num_nodes", "accelerator", "precision")


def is_python(name: str) -> bool:
    """Return whether a word names something in Python: `file.py:name` or `module:name`.

    Args:
        name: the word.
    """
    found = _NAME.fullmatch(name)
    return (
        found is not None
        and (name.endswith(".py") or found["attribute"] is not None)
        and not name.endswith((".yaml", ".yml"))
    )


def explain_object(name: str, loaded: Loaded) -> Explanation:
    """Return what an object comes to, and where each value is from.

    Args:
        name: `file.py:name` or `module:name`; the file or module is imported.
        loaded: overrides of the Trainer's flags, where the object is no Trainer.

    Raises:
        MeshboltError: it cannot be imported, is of another kind, or a value is wrong.
    """
    found = _find(name)
    if isinstance(found, pl.Trainer):
        if loaded.origins:
            raise ConfigError(
                f"--{next(iter(loaded.origins))} cannot change {name}, a Trainer that is made. Change it there."
            )
        return _of_trainer(name, found)
    if isinstance(found, MeshStrategy):
        found = {"strategy": found}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name} is of {type(found).__name__}, and nothing to explain. Name {_KINDS}.")
    return _of_arguments(name, found, loaded)


def _find(name: str) -> Any:
    where, attribute = _parts(name)
    found = _import(where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise ConfigError(f"{name} is not there{did_you_mean(part, known)}.")
        found = getattr(found, part)
    if inspect.isfunction(found):
        try:
            with redirect_stdout(sys.stderr):
                return found()
        except Exception as error:
            raise ConfigError(f"{name}() raises {type(error).__name__}: {error}. Name {_KINDS}.") from error
    return found


def _parts(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    if found is None or found["attribute"] is None:
        raise ConfigError(f"{name} names no object. Write {name}:NAME, where NAME is {_KINDS}.")
    return found["where"], found["attribute"]


def _import(where: str) -> Any:
    """Import a file, or a module by its name."""
    try:
        with redirect_stdout(sys.stderr):  # what it prints is none of what is asked for
            return _imported(where)
    except FileNotFoundError as error:
        raise ConfigError(f"{where} cannot be read: {error}. Give the path of a Python file, or a module.") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}. Correct it there.") from error


def _imported(where: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(where)
    path = Path(where).resolve()
    sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _of_trainer(name: str, trainer: pl.Trainer) -> Explanation:
    strategy = trainer.strategy
    if not isinstance(strategy, MeshStrategy):
        raise ConfigError(
            f"{name} has the strategy {type(strategy).__name__}, so there is no plan of meshbolt's to explain. Use "
            "Trainer(strategy=MeshStrategy(...)), or a name such as 'zero2'."
        )
    kind = "cpu" if isinstance(trainer.accelerator, CPUAccelerator) else "cuda"
    flags = {
        "accelerator": kind,
        "devices": trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "plugins": strategy.precision_plugin,
    }
    given = [Row(key, value, origin) for key, value, origin in flags_of(trainer, {}) if origin != DEFAULT]
    return _explanation(name, strategy, _written(name, flags), given)


def _of_arguments(name: str, arguments: Mapping[str, Any], overrides: Loaded) -> Explanation:
    written = _written(name, arguments, overrides)
    flags = written.values["trainer"]
    strategy = flags.get("strategy")
    if isinstance(strategy, str) and strategy.lower() in PRESETS:
        strategy = MeshStrategy(**PRESETS[strategy.lower()])
    if not isinstance(strategy, MeshStrategy):
        raise ConfigError(
            f"{name} has strategy={strategy!r}, so there is no plan of meshbolt's to explain. Use a MeshStrategy, or one of "
            f"{', '.join(PRESETS)}."
        )
    given = [Row(f"trainer.{key}", _plain(value), name) for key, value in arguments.items() if key not in _PLANNED]
    return _explanation(name, strategy, written, given)


def _written(name: str, flags: Mapping[str, Any], overrides: Loaded | None = None) -> Loaded:
    """Return flags of a Trainer as if a configuration had them."""
    values, origins = dict(flags), {f"trainer.{key}": name for key in flags}
    if overrides is not None:
        values |= overrides.get("trainer", {})
        origins |= overrides.origins
    loaded = Loaded(values={"trainer": values}, origins=origins)
    check_keys(loaded)
    return loaded


def _explanation(name: str, strategy: MeshStrategy, loaded: Loaded, given: Sequence[Row]) -> Explanation:
    settings, made = strategy.settings, strategy.deepspeed_translation
    is_counted = any(loaded.get(f"trainer.{key}") is not None for key in ("devices", "num_nodes"))
    devices = devices_of(loaded)
    policy, flag = policy_of(loaded, strategy, device_type=devices.type)
    plan = plan_on(settings, policy, devices if is_counted else None)
    usual = plan_on(Settings(), policy, None).rows()
    rows = []
    for key, value in plan.rows().items():
        section = key.partition(".")[0]
        origin = origin_in_plan(key, loaded, flag, plan, made)
        if made is None and hasattr(settings, section):
            origin = DEFAULT if usual[key] == value else f"{name}: {section}"
        if is_counted or not follows_from_devices(key):
            rows.append(Row(key, value, origin))
    parts = [Section("plan", "plan", [*rows, *stages_of(plan)]), Section("given", "also given", given)]
    if made is None:
        return Explanation(parts)
    return Explanation([*parts, *sections_of_deepspeed(made)], made.receipt)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else repr(value)
