"""A checkpoint of DeepSpeed's as the dictionary that a Trainer saves and resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from meshbolt.checkpoint.deepspeed.loops import loops_of
from meshbolt.checkpoint.deepspeed.settings import LossScale

CLIENT, COUNTERS = "client_state", "deepspeed"
"""Where the dictionary of a run without Lightning has what the user saved, and DeepSpeed's counters and settings."""

SCALER = "MixedPrecision"
"""Where it has the loss scale: under the name of the precision plugin."""


def lightnings_dictionary(
    *,
    weights: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None,
    scheduler: Mapping[str, Any] | None,
    loss_scaler: LossScale | None,
    client_state: Mapping[str, Any],
    counters: Mapping[str, Any],
    is_lightnings: bool,
    prefix: str = "",
) -> dict[str, Any]:
    """Return a Trainer's dictionary.

    Args:
        weights: by name.
        optimizer: its state; None: only weights are there.
        scheduler: the state of the learning rate scheduler that DeepSpeed stepped.
        loss_scaler: if losses were scaled.
        client_state: what the user has saved with them; of Lightning, its dictionary without weights.
        counters: DeepSpeed's own, with "global_steps".
        is_lightnings: whether Lightning has saved it.
        prefix: what is put before each name: the attribute of the LightningModule that the weights belong to, with a dot.
    """
    found = dict(client_state) if is_lightnings else _begun(client_state, counters)
    found["state_dict"] = {f"{prefix}{name}": value for name, value in weights.items()}
    if optimizer is None:
        for key in ("optimizer_states", "lr_schedulers"):
            found.pop(key, None)
        return found if is_lightnings else {key: value for key, value in found.items() if key != "loops"}
    found["optimizer_states"] = [_prefixed(optimizer, prefix)]
    found.setdefault("lr_schedulers", [])
    if scheduler is not None and not found["lr_schedulers"]:
        found["lr_schedulers"] = [dict(scheduler)]
    if loss_scaler is not None and loss_scaler.is_dynamic:
        found[SCALER] = loss_scaler.as_state()
    return found


def _begun(client_state: Mapping[str, Any], counters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Lightning has beside the state, for a run that it knows nothing of."""
    steps = counters["global_steps"]
    return {
        "epoch": 0,
        "global_step": steps,
        "pytorch-lightning_version": version("lightning"),
        "loops": loops_of(steps),
        "callbacks": {},
        CLIENT: dict(client_state),
        COUNTERS: dict(counters),
    }


def _prefixed(optimizer: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    def named(key: Any) -> Any:
        return f"{prefix}{key}" if isinstance(key, str) else key

    return {
        **optimizer,
        "state": {named(key): value for key, value in optimizer["state"].items()},
        "param_groups": [{**group, "params": list(map(named, group["params"]))} for group in optimizer["param_groups"]],
    }
