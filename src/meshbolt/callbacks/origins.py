"""The settings of a run that was written in Python, with where each came from, as far as a Trainer tells."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from meshbolt.config import Plan, Settings, resolve
from meshbolt.environment import DEBUG, FAST_PATH

DEFAULT = "default"
_VARIABLES = {"debug": DEBUG, "fast_path": FAST_PATH}
# What a run does beside its plan, and what the Trainer does where nothing is said.
_FLAGS: Mapping[str, Any] = {
    "max_steps": -1,
    "max_epochs": None,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
    "log_every_n_steps": 50,
    "num_nodes": 1,
}

Row = tuple[str, str | None, str]


def settings_of(trainer: pl.Trainer, known: Mapping[str, str]) -> list[Row]:
    """Return every effective setting: its name, its value, and where that is from.

    Args:
        trainer: with its ranks connected.
        known: where values are from, by the names of settings, as the command line knows it.
    """
    plan = getattr(trainer.strategy, "plan", None)
    return [*([] if not isinstance(plan, Plan) else _rows_of(plan, known)), *flags_of(trainer, known)]


def flags_of(trainer: pl.Trainer, known: Mapping[str, str]) -> list[Row]:
    """Return what a Trainer does beside its plan: the name of each flag, its value, and where that is from.

    Args:
        trainer: as it was made.
        known: where values are from, by the names of settings.
    """
    rows: list[Row] = []
    for flag, default in _FLAGS.items():
        value = getattr(trainer, flag, default)
        if flag == "max_epochs" and value == -1:  # what Lightning makes of None beside max_steps
            value = default
        key = f"trainer.{flag}"
        rows.append((key, _written(value), known.get(key, DEFAULT if value == default else f"Trainer({flag}=...)")))
    return rows


def _rows_of(plan: Plan, known: Mapping[str, str]) -> list[Row]:
    plain = resolve(
        Settings(),
        world_size=plan.mesh.world_size,
        precision=plan.precision,
        device_type=plan.device_type,
        environment=plan.environment,
    ).rows()
    return [
        (key, _written(value), known.get(key) or _origin(key, is_default=plain.get(key) == value))
        for key, value in plan.rows().items()
    ]


def _origin(key: str, *, is_default: bool) -> str:
    section = key.partition(".")[0]
    if key == "world_size":
        return "Trainer(devices=..., num_nodes=...)"
    if key == "device":
        return "Trainer(accelerator=...)"
    if key == "precision.flag":
        return "Trainer(precision=...)"
    if section == "precision":
        return "follows from precision.flag"
    if section == "mesh":
        return "follows from world_size and the strategy"
    if key in _VARIABLES:
        return f"environment variable {_VARIABLES[key]}" if os.environ.get(_VARIABLES[key]) else DEFAULT
    return DEFAULT if is_default else f"strategy: {section}"


def _written(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
