"""A pipeline's files: a layer's weights stand in a file of their own, under names within the layer.

DeepSpeed's `PipelineModule` calls a layer by its number, and one that is used at several places `tied_modules.<key>`; so do the
optimizer's files. The files of tied layers have numbers too: by the names in the other files it is known whose they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed.files import read_file

_TIED = "tied_modules."


def layer_weights(
    layers: Mapping[int, Path], known: Mapping[str, tuple[int, ...] | None], *, weights_only: bool
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the tensors in the files of layers by their names in the module, and what to say of them.

    Args:
        layers: the files by number.
        known: names of parameters and buffers, with shapes where they are known; empty where the files do not have names.
        weights_only: as for `read_file`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    guessed = []
    for number in sorted(layers):
        state = read_file(layers[number], weights_only=weights_only)
        prefix = _prefix_of(number, state, known)
        if prefix is None:
            guessed.append(number)
            prefix = f"{number}."
        found |= {f"{prefix}{key}": value for key, value in state.items() if f"{prefix}{key}" not in found}
    notes: tuple[str, ...] = ()
    if known and guessed:
        notes = (
            f"Layers {guessed} are tied ones, and no file tells which: their weights are under their numbers. Rename them, or "
            "load with strict=False.",
        )
    return found, notes


def _prefix_of(number: int, state: Mapping[str, Any], known: Mapping[str, tuple[int, ...] | None]) -> str | None:
    """Return what a layer's names have before them; None where that is not known."""
    if not state or not known or any(f"{number}.{key}" in known for key in state):
        return f"{number}."
    tied = {name.removeprefix(_TIED).split(".")[0] for name in known if name.startswith(_TIED)}
    fitting = [key for key in sorted(tied) if _fits(state, known, prefix=f"{_TIED}{key}.")]
    return f"{_TIED}{fitting[0]}." if len(fitting) == 1 else None


def _fits(state: Mapping[str, Any], known: Mapping[str, tuple[int, ...] | None], *, prefix: str) -> bool:
    """Return whether known names under a prefix are all in a layer, in the same shapes."""
    inner = {name.removeprefix(prefix): shape for name, shape in known.items() if name.startswith(prefix)}
    return all(name in state and shape in (None, tuple(state[name].shape)) for name, shape in inner.items())


def tied_first(names: Collection[str]) -> list[str]:
    """Return names in the order in which a whole `PipelineModule` has them: tied layers, then the others by number."""
    return sorted(names, key=lambda name: (not name.startswith(_TIED), _number(name)))


def _number(name: str) -> int:
    head = name.split(".")[0]
    return int(head) if head.isdigit() else -1
