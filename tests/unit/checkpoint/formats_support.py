"""A checkpoint as a Trainer's, saved by one process without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint import save_directory
from meshbolt.checkpoint.optimizers import OWN
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.checkpoint.tree import split_tensors


def weights() -> dict[str, torch.Tensor]:
    """Return weights of several dtypes and shapes, one of them not in the order of its rows."""
    generator = torch.Generator().manual_seed(1)
    return {
        "net.a": torch.randn(6, 5, generator=generator),
        "net.b": torch.randn(4, 3, generator=generator).t(),
        "net.scale": torch.tensor(2.5, dtype=torch.float64),
        "net.half": torch.randn(7, generator=generator).bfloat16(),
        "net.none": torch.empty(0, 3),
        "net.seen": torch.tensor([3, 4]),
        "net.mask": torch.tensor([True, False, True]),
    }


def trainer_tree(**more: Any) -> dict[str, Any]:
    """Return what Lightning's dictionary holds after some steps, optimizer state by name."""
    names = ["net.b", "net.a"]
    state = {name: {"step": torch.tensor(3.0), "exp_avg": torch.full_like(weights()[name], 0.5)} for name in names}
    return {
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights(),
        "optimizer_states": [{"class": "AdamW", "state": state, "param_groups": [{"lr": 0.1, "params": names}]}],
        "callbacks": {},
        "loops": {"by_number": {1: "one"}, "pair": (torch.ones(2), 3)},
        **more,
    }


def saved(path: Path, tree: dict[str, Any] | None = None, *, notes: dict[str, Any] | None = None) -> Path:
    """Save a tree, with a random state beside it and notes of our own, and return the path."""
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in (tree or trainer_tree()).items()}
    objects[OWN] = {**(notes or {}), "sharded": sorted(key for key in tensors if "net." in key)}
    save_directory(path, tensors={**tensors, "meshbolt.random.0.torch": torch.arange(5)}, objects=objects)
    return path


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and objects of a checkpoint."""
    with CheckpointReader(path) as reader:
        return {key: reader.read(key) for key in reader.tensors}, reader.objects()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that two groups of tensors are the same."""
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in found)
