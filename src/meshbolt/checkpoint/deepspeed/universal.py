"""A universal checkpoint: DeepSpeed's own converter has joined the parts, and written a directory of files for each parameter.

Of stages 1 and 2 a file holds a tensor in its shape and what is known of it; of stage 3 it holds a flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed.files import read_any, read_file
from meshbolt.checkpoint.deepspeed.trained import Shapes, Trained
from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError

_MASTER, _STEP, _VALUES = "fp32", "step", "param"
_GLOBAL = "optimizer_state.pt"


def trained_universal(folder: Path, shapes: Sequence[Shapes], *, weights_only: bool) -> tuple[Trained, dict[str, Any]]:
    """Return what a universal checkpoint holds of the trained parameters, and what is said of all of them.

    Args:
        folder: with a directory for each parameter.
        shapes: of each group of parameters, or of each part of a group, as the models' files have them.
        weights_only: as for `read_file`.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    common = read_file(folder / _GLOBAL, weights_only=weights_only)
    groups = [dict(group) for group in common["param_groups"]]
    step = _common_step(common)
    found = Trained(groups=groups)
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        values = dict(_values(folder / name, tuple(shape), weights_only=weights_only))
        if _MASTER not in values:
            raise CheckpointError(f"{folder / name / (_MASTER + '.pt')} is missing: the conversion was not finished")
        found.masters[name] = values.pop(_MASTER)
        if values and step is not None:
            values.setdefault(_STEP, step)
        if values:
            found.states[name] = values
    _name_groups(groups, shapes)
    return found, common


def parameters_in(folder: Path) -> list[str]:
    """Return the names of the tensors that a universal checkpoint has."""
    return sorted(place.name for place in folder.iterdir() if (place / f"{_MASTER}.pt").is_file())


def _values(place: Path, shape: tuple[int, ...], *, weights_only: bool) -> Iterator[tuple[str, Any]]:
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is missing: the conversion was not finished, or its directory was not copied whole"
        )
    for file in sorted(place.glob("*.pt")):
        found = read_any(file, weights_only=weights_only)
        values = found[_VALUES] if isinstance(found, Mapping) else found
        if file.stem == _STEP or not isinstance(values, torch.Tensor) or values.dim() == 0:
            yield file.stem, torch.tensor(float(values))
            continue
        # Of stages 1 and 2 it has its shape, which the slices of tensor parallelism in the models' files have not.
        whole = tuple(values.shape) if isinstance(found, Mapping) else shape
        if values.numel() != math.prod(whole):
            raise CheckpointError(f"{file} has {values.numel()} elements, and the shape {whole} has {math.prod(whole)}")
        store = _File(file, weights_only=weights_only)  # opened when it is read: there are as many as tensors
        yield file.stem, StoredTensor(store, shape=whole, dtype=values.dtype, keeps_parts=False)


class _File:
    """The values of one file."""

    def __init__(self, path: Path, *, weights_only: bool) -> None:
        self._path, self._weights_only = path, weights_only

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Open it, and yield what is asked for."""
        found = read_any(self._path, weights_only=self._weights_only)
        values = found[_VALUES] if isinstance(found, Mapping) else found
        yield values.detach().reshape(-1)[start:stop]


def _common_step(common: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the count of steps that stage 3 has once for all parameters."""
    states = (common.get("optimizer_state_dict") or {}).get("state") or {}
    found = next((state["step"] for state in states.values() if "step" in state), None)
    return None if found is None else torch.tensor(float(found))


def _name_groups(groups: Sequence[dict[str, Any]], shapes: Sequence[Shapes]) -> None:
    """Put names in the place of numbers: of groups, or of their parts."""
    numbers = [number for group in groups for number in group["params"]]
    if sorted(numbers) != list(range(len(shapes))):
        raise CheckpointError(
            f"its optimizer has {len(groups)} groups of {len(numbers)} parts, and its model's files have {len(shapes)}: they are "
            "of different saves"
        )
    for group in groups:
        group["params"] = [name for number in group["params"] for name in shapes[number]]
