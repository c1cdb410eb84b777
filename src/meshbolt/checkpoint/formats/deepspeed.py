"""DeepSpeed: a directory that its engine has saved, or Lightning's strategy for it, read without DeepSpeed by `../deepspeed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed import DeepSpeedCheckpoint, is_deepspeed, open_deepspeed
from meshbolt.checkpoint.formats.options import Source
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.optimizers import OWN, by_name, sharded_keys
from meshbolt.checkpoint.tree import split_tensors
from meshbolt.compat import StoredTensor


def recognises(path: Path) -> bool:
    """Return whether a path is a directory of DeepSpeed's."""
    return is_deepspeed(path)


def read(path: Path, *, prefix: str, weights_only: bool | None, tag: str | None = None) -> Source:
    """Return what DeepSpeed has saved as a checkpoint.

    Args:
        path: the directory.
        prefix: what is put before each weight's name.
        weights_only: False builds objects of any class, which runs code from the files; else plain data only.
        tag: which of the saves in it; None: the one that its file `latest` names.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: it holds what is not read.
    """
    opened = open_deepspeed(path, tag, weights_only=weights_only is not False)
    found, notes = by_name(opened.as_lightning(prefix=prefix))
    tensors: dict[str, torch.Tensor] = {}
    objects: dict[str, Any] = {key: split_tensors(value, key, tensors) for key, value in found.items()}
    lazy = {key: _on_use(tensor) for key, tensor in tensors.items()}
    objects[OWN] = {"sharded": sharded_keys(objects, lazy)}
    return Source(
        tensors=lazy, objects=objects, notes=(_told(opened), *opened.notes, *notes, *_without_optimizer(opened))
    )


def _told(opened: DeepSpeedCheckpoint) -> str:
    """Return what it is, in a sentence."""
    made = (
        f"Tag {opened.tag!r}: "
        + {
            "zero": f"ZeRO stage {opened.stage}",
            "bf16": "BF16_Optimizer",
            "plain": "no ZeRO",
            "pipeline": f"a pipeline with ZeRO stage {opened.stage}",
            "universal": f"universal, from ZeRO stage {opened.stage}",
        }[opened.kind]
    )
    ranks = f"{opened.world} data-parallel rank{'s' if opened.world > 1 else ''}"
    by = f"DeepSpeed {opened.ds_version or 'of unknown version'}"
    return f"{made}, written by {ranks} of {by} after {opened.global_steps} steps."


def _without_optimizer(opened: DeepSpeedCheckpoint) -> tuple[str, ...]:
    if opened.optimizer is not None:
        return ()
    return (
        "It has no optimizer state that could be taken: the checkpoint holds weights, and a run can begin with them.",
    )


def _on_use(tensor: torch.Tensor) -> torch.Tensor:
    def read_now() -> torch.Tensor:
        return tensor.value() if isinstance(tensor, StoredTensor) else tensor

    info = TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return LazyTensor(read_now, info=info, keeps_parts=False)
