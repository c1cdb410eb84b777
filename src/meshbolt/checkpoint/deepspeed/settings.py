"""Settings of DeepSpeed's optimizers, in the words of torch's, and its loss scale, in the words of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.checkpoint.optimizers import CLASS

# What DeepSpeed's own Adams have in a group, and torch's do not.
_NOT_TORCHS = ("step", "bias_correction", "param_group_id", "moe", "use_muon")
_PLAIN = (bool, int, float, str, tuple, list, type(None), torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The state of DeepSpeed's loss scaler.

    Attributes:
        scale: that losses are multiplied by.
        is_dynamic: whether it changes.
        iteration: how many steps it has seen.
        last_overflow: the last of them that overflowed; -1: none.
        window: steps without overflow after which it grows.
        factor: by which it grows and shrinks.
        minimum: below which it does not go.
        hysteresis: overflows that it takes to shrink once.
        hysteresis_left: how many are left of them.
    """

    scale: float
    is_dynamic: bool
    iteration: int = 0
    last_overflow: int = -1
    window: int = 1000
    factor: float = 2.0
    minimum: float = 1.0
    hysteresis: int = 1
    hysteresis_left: int = 1

    def as_state(self) -> dict[str, Any]:
        """Return the state in the form of `meshbolt.precision`'s scaler, which goes on in the same way."""
        stable = self.iteration - self.last_overflow - 1
        return {
            "scale": self.scale,
            "growth_factor": self.factor,
            "backoff_factor": 1.0 / self.factor,
            "growth_interval": self.window,
            # DeepSpeed counts from the step after the overflow.
            "_growth_tracker": (stable - 1) % self.window if stable > 0 else -1,
            "min_scale": self.minimum,
            "_hysteresis_tracker": self.hysteresis_left,
            "num_skipped": 0,
        }


def loss_scale_of(state: Mapping[str, Any] | None) -> LossScale | None:
    """Return the loss scale in an optimizer's state; None where losses are not scaled.

    Args:
        state: DeepSpeed's, of any stage; None: there is none.
    """
    state = state or {}
    scaler = state.get("loss_scaler")
    found = {**vars(scaler), "dynamic": state.get("dynamic_loss_scale", False)} if scaler is not None else dict(state)
    is_dynamic = bool(found.get("dynamic", found.get("dynamic_loss_scale", False)))
    scale = float(found.get("cur_scale", 1.0))
    if not is_dynamic and scale == 1.0:
        return None
    names = {
        "iteration": "cur_iter",
        "last_overflow": "last_overflow_iter",
        "window": "scale_window",
        "factor": "scale_factor",
        "minimum": "min_scale",
        "hysteresis": "delayed_shift",
        "hysteresis_left": "cur_hysteresis",
    }
    given = {name: found[key] for name, key in names.items() if found.get(key) is not None}
    return LossScale(scale=scale, is_dynamic=is_dynamic, **given)


def optimizer_of(
    states: Mapping[Any, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of an optimizer as torch's would have it.

    Args:
        states: what it keeps for each parameter.
        groups: its settings, with the parameters under "params".
        config: DeepSpeed's JSON.
    """
    steps = {name: group["step"] for group in groups if "step" in group for name in group["params"]}
    made = {
        name: {**({"step": _as_step(steps[name])} if name in steps else {}), **_with_step(state)}
        for name, state in states.items()
    }
    optimizer: dict[str, Any] = {"state": made, "param_groups": [_as_torchs(group) for group in groups]}
    kind = config.get("optimizer") or {}
    kind_name = str(kind.get("type", "")).lower()
    if kind_name in ("adam", "adamw"):
        decoupled = kind_name == "adamw" or (kind.get("params") or {}).get("adam_w_mode", True)
        optimizer[CLASS] = "AdamW" if decoupled else "Adam"
    return optimizer


def _with_step(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _as_step(value) if key == "step" else value for key, value in state.items()}


def _as_step(value: Any) -> torch.Tensor:
    return torch.tensor(float(value))


def _as_torchs(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in _NOT_TORCHS and isinstance(value, _PLAIN)}
    if "betas" in kept and "eps" in kept and "bias_correction" in group:
        kept.setdefault("amsgrad", False)
    return kept
