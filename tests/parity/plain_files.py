"""What a checkpoint directory would be as the single file of a run that knows nothing of meshbolt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint import load_objects, load_tensors, saved_tensors
from meshbolt.checkpoint.tree import join_tensors


def write_plain_file(directory: Path, file: Path) -> None:
    """Gather a checkpoint into one file, optimizer state by number; in one process."""
    tensors = {key: torch.empty(info.shape, dtype=info.dtype) for key, info in saved_tensors(directory).items()}
    load_tensors(directory, tensors)
    objects = load_objects(directory)
    del objects["meshbolt"]
    tree = {key: join_tensors(value, tensors) for key, value in objects.items()}
    for key, value in tree.items():
        if key == "optimizer_states":
            tree[key] = [_by_number(state) for state in value]
        elif key == "optimizer":
            tree[key] = _by_number(value)
    torch.save(tree, file)


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}
