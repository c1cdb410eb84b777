"""The precision that a file asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshbolt.deepspeed_json.given import Given
from meshbolt.deepspeed_json.key import DTYPES, IGNORED, MAPPED
from meshbolt.errors import ConfigError, UnsupportedError

_SIXTEEN, _BFLOAT, _TORCH = "fp16", "bf16", "torch_autocast"
_LARGEST_STEPS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision flag, and how it is meant.

    Attributes:
        flag: as the Trainer writes it.
        autocast: whether operations are cast one by one, by torch; False: everything runs in 16 bits, as under DeepSpeed.
        scaling: arguments of the loss scale.
    """

    flag: str
    autocast: bool = False
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def written(self) -> str:
        """Return it as Python writes it."""
        if self.autocast or self.flag == "32-true":
            return f"Trainer(precision={self.flag!r})"
        kind = "HalfPrecision" if self.flag.endswith("true") else "MixedPrecision"
        return f"{kind}({self.flag!r}{', autocast=False' if kind == 'MixedPrecision' else ''})"


def precision_of(given: Given) -> Precision | None:
    """Return the precision of a file; None where the Trainer decides.

    Raises:
        ConfigError: two of its blocks are on, or a value does not go with another.
        UnsupportedError: it asks for master weights without float32, and for state with it.
    """
    on = [block for block in (_SIXTEEN, _BFLOAT, _TORCH) if given.get(f"{block}.enabled", False)]
    if len(on) > 1:
        asked = " and ".join(f'"{block}": {{"enabled": true}}' for block in on)
        raise ConfigError(f"{given.source} has {asked}: a run has one precision. Turn one of them off.")
    precision = _of_block(given, on[0]) if on else _of_none(given)
    _note(given, precision, on)
    return precision


def _of_none(given: Given) -> Precision | None:
    """A block that is off asks for float32; without any, or where one is "auto", the Trainer decides."""
    switches = [f"{block}.enabled" for block in (_SIXTEEN, _BFLOAT, _TORCH)]
    is_left = any(given.is_auto(key) for key in switches) or all(given.get(key) is None for key in switches)
    return None if is_left else Precision(flag="32-true")


def _of_block(given: Given, block: str) -> Precision:
    if block == _TORCH:
        dtype = DTYPES[given.get("torch_autocast.dtype", "bfloat16")]
        return Precision(flag="bf16-mixed" if dtype == "bfloat16" else "16-mixed", autocast=True)
    if block == _SIXTEEN:
        return Precision(flag="16-mixed", scaling=_scaling(given))
    masters, state = (
        given.get(f"bf16.{name}", False) for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    )
    if masters != state:
        raise UnsupportedError(
            f"{given.source}: 'bf16.bf16_master_weights_and_grads' is {str(masters).lower()} and 'bf16.bf16_optimizer_states' "
            f"{str(state).lower()}: state has the dtype of its parameters here. Make both true, or both false."
        )
    return Precision(flag="bf16-true" if masters else "bf16-mixed")


def _scaling(given: Given) -> dict[str, Any]:
    static = float(given.get("fp16.loss_scale", 0))
    if static:
        return {"init_scale": static, "min_scale": static, "growth_interval": _LARGEST_STEPS, "hysteresis": 1}
    first, least = 2.0 ** given.get("fp16.initial_scale_power", 16), float(given.get("fp16.min_loss_scale", 1))
    if not 0 < least <= first:
        raise ConfigError(
            f"{given.source}: 'fp16.min_loss_scale' {least:g} is to be above 0 and at most the first scale, 2 ** "
            f"{given.get('fp16.initial_scale_power', 16)} = {first:g}. Lower it, or raise 'fp16.initial_scale_power'."
        )
    return {
        "init_scale": first,
        "growth_interval": given.get("fp16.loss_scale_window", 1000),
        "hysteresis": given.get("fp16.hysteresis", 2),
        "consecutive_hysteresis": given.get("fp16.consecutive_hysteresis", False),
        "min_scale": least,
    }


def _note(given: Given, precision: Precision | None, on: list[str]) -> None:
    for block in (_SIXTEEN, _BFLOAT, _TORCH):
        if given.is_auto(f"{block}.enabled"):
            given.note(f"{block}.enabled", "Trainer(precision=...)", why="auto: the Trainer decides", outcome=MAPPED)
        for key in given.order:
            if key.startswith(f"{block}.") and key != f"{block}.enabled" and block not in on and not given.is_auto(key):
                given.note(key, "", why=_unused(given, block), outcome=IGNORED)
    if precision is None:
        return
    if on:
        given.note(f"{on[0]}.enabled", precision.written())
    if on == [_SIXTEEN]:
        _note_scale(given, precision.scaling)
    if on and on != [_TORCH] and "communication_data_type" not in given.order:
        given.add(
            "communication_data_type",
            becomes="Zero(reduce_dtype='auto')",
            why=f"DeepSpeed sums gradients over ranks in {on[0]}, meshbolt in float32",
        )


def _unused(given: Given, block: str) -> str:
    """Return why a key of a block has no effect."""
    if given.is_auto(f"{block}.enabled"):
        key = f"{block}.enabled"
        return (
            f"the Trainer decides about precision, with settings of its own: auto={{{key!r}: True}} makes these count"
        )
    return f"{block} is not enabled"


def _note_scale(given: Given, scaling: Mapping[str, Any]) -> None:
    names = {
        "loss_scale": "init_scale",
        "initial_scale_power": "init_scale",
        "loss_scale_window": "growth_interval",
        "hysteresis": "hysteresis",
        "consecutive_hysteresis": "consecutive_hysteresis",
        "min_loss_scale": "min_scale",
    }
    is_static = bool(given.get("fp16.loss_scale", 0))
    for key, name in names.items():
        if is_static and key != "loss_scale":
            given.note(f"fp16.{key}", "", why="'fp16.loss_scale' is fixed", outcome=IGNORED)
        elif key == "loss_scale" and not is_static:
            given.note("fp16.loss_scale", "", why="0: the scale is dynamic")
        else:
            given.note(f"fp16.{key}", f"MixedPrecision({name}={scaling[name]!r})")


def reduce_dtype_of(given: Given) -> str:
    """Return the dtype in which gradients are summed over ranks, as `Zero` takes it."""
    asked = given.get("communication_data_type")
    dtype = "auto" if asked is None else DTYPES[asked]
    given.note("communication_data_type", f"Zero(reduce_dtype={dtype!r})")
    for_sums = given.get("data_types.grad_accum_dtype")
    if for_sums is not None and DTYPES[for_sums] != "float32":
        given.note(
            "data_types.grad_accum_dtype",
            "",
            why="gradients are added up in float32, which is more exact",
            outcome="ignored",
        )
    return dtype
