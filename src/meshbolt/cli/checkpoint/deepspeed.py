"""What the commands say of a directory that DeepSpeed has saved."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed import DeepSpeedCheckpoint
from meshbolt.units import format_bytes


def described(opened: DeepSpeedCheckpoint, *, tensors: bool) -> dict[str, Any]:
    """Return what a checkpoint of DeepSpeed's holds, as plain data.

    Args:
        opened: the checkpoint.
        tensors: list every weight.
    """
    weights = {name: each for name, each in opened.weights.items() if isinstance(each, torch.Tensor)}
    optimizer = opened.optimizer or {"state": {}, "param_groups": []}
    states = [value for state in optimizer["state"].values() for value in state.values() if hasattr(value, "nbytes")]
    content: dict[str, Any] = {
        "path": opened.name,
        "tag": opened.tag,
        "kind": opened.kind,
        "zero": opened.stage,
        "world_size": opened.world,
        "versions": {"deepspeed": opened.ds_version},
        "global_steps": opened.global_steps,
        "skipped_steps": opened.skipped_steps,
        "entries": {
            "weights": {"tensors": len(weights), "bytes": sum(each.nbytes for each in weights.values())},
            "optimizer": {"tensors": len(states), "bytes": sum(each.nbytes for each in states)},
        },
        "objects": {key: type(value).__name__ for key, value in opened.client_state.items()},
        "notes": list(opened.notes),
    }
    if tensors:
        content["tensors"] = {
            name: {"dtype": str(each.dtype).removeprefix("torch."), "shape": list(each.shape), "bytes": each.nbytes}
            for name, each in weights.items()
        }
    return content


def summary(opened: DeepSpeedCheckpoint) -> list[tuple[str, str]]:
    """Return the rows of a table about a checkpoint of DeepSpeed's."""
    size, _ = size_and_time(Path(opened.name))
    kept = {key for state in (opened.optimizer or {"state": {}})["state"].values() for key in state}
    return [
        ("path", opened.name),
        ("written by", f"DeepSpeed {opened.ds_version or 'of unknown version'}{_under(opened)}"),
        ("kind", f"{opened.kind}, ZeRO stage {opened.stage}"),
        ("files", format_bytes(size)),
        ("saved by", f"{opened.world} data-parallel ranks"),
        ("steps", f"{opened.global_steps}, {opened.skipped_steps} of them skipped"),
        ("optimizer keeps", ", ".join(sorted(kept)) or "nothing"),
        ("loss scale", "none" if opened.loss_scaler is None else f"{opened.loss_scaler.scale:g}"),
        ("beside", ", ".join(opened.client_state) or "nothing"),
        *(("note", note) for note in opened.notes),
        ("to use it", f"as ckpt_path, or: meshbolt checkpoint import {opened.name} OUT"),
    ]


def size_and_time(directory: Path) -> tuple[int, str]:
    """Return the bytes of all files in a directory, and when the last of them was written.

    Args:
        directory: of one save.
    """
    stats = [path.stat() for path in directory.rglob("*") if path.is_file()]
    latest = max((each.st_mtime for each in stats), default=0.0)
    return sum(each.st_size for each in stats), datetime.fromtimestamp(latest).strftime("%Y-%m-%d %H:%M:%S")


def _under(opened: DeepSpeedCheckpoint) -> str:
    version = opened.client_state.get("pytorch-lightning_version")
    return f" under Lightning {version}" if opened.is_lightnings else ""
