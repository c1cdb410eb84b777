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
    unclear = []
    for number in sorted(layers):
        state = read_file(layers[number], weights_only=weights_only)
        prefixes = _prefixes_of(number, state, known=known, found=found)
        if len(prefixes) > 1:
            # What is trained is in the optimizer's files under its name.
            state = {key: value for key, value in state.items() if f"{prefixes[0]}{key}" not in known}
            unclear += [number] if state else []
        prefix = prefixes[0] if len(prefixes) == 1 else f"{number}."
        found |= {f"{prefix}{key}": value for key, value in state.items() if f"{prefix}{key}" not in found}
    notes: tuple[str, ...] = ()
    if unclear:
        notes = (
            f"Layers {unclear} are tied ones, and no file tells which of several alike: in the place of tied_modules.<key> their "
            "names have the number.",
        )
    return found, notes


def _prefixes_of(
    number: int,
    state: Mapping[str, Any],
    *,
    known: Mapping[str, tuple[int, ...] | None],
    found: Mapping[str, torch.Tensor],
) -> list[str]:
    """Return what a layer's names can have before them."""
    own = f"{number}."
    if any(f"{own}{key}" in known for key in state):
        return [own]
    keys = dict.fromkeys(name.removeprefix(_TIED).split(".")[0] for name in known if name.startswith(_TIED))
    fitting = [f"{_TIED}{key}." for key in keys if _fits(state, known, prefix=f"{_TIED}{key}.")]
    # A layer that nobody trains has no names in other files, and may look like a tied one.
    return [each for each in fitting if _is_same(state, found, prefix=each)] or [own]


def _fits(state: Mapping[str, Any], known: Mapping[str, tuple[int, ...] | None], *, prefix: str) -> bool:
    """Return whether known names under a prefix are all in a layer, in the same shapes."""
    inner = {name.removeprefix(prefix): shape for name, shape in known.items() if name.startswith(prefix)}
    return all(name in state and shape in (None, tuple(state[name].shape)) for name, shape in inner.items())


def _is_same(state: Mapping[str, Any], found: Mapping[str, torch.Tensor], *, prefix: str) -> bool:
    """Return whether what was found under a prefix, if anything, is what a layer has."""
    tensors = {f"{prefix}{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return all(torch.equal(found[name], value) for name, value in tensors.items() if name in found)


def without_copies(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights without the layers that have the same values as one before them: a tied layer has a file for each use.

    Args:
        weights: by name, in the order of layers, each of which has its number before its names.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        number, _, local = name.partition(".")
        layers.setdefault(number, {})[local] = value
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for number, layer in layers.items():
        if not any(_is_equal(layer, other) for other in kept.values()):
            kept[number] = layer
    return {f"{number}.{local}": value for number, layer in kept.items() for local, value in layer.items()}


def _is_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def tied_first(names: Collection[str]) -> list[str]:
    """Return names in the order in which a whole `PipelineModule` has them: tied layers, then the others by number."""
    return sorted(names, key=lambda name: (not name.startswith(_TIED), _number(name)))


def _number(name: str) -> int:
    head = name.split(".")[0]
    return int(head) if head.isdigit() else -1
