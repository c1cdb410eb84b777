"""Show a parallel layer's forward its parameters as split tensors, and everybody else as what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from meshbolt.compat import local_in_graph, without_compiling
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.part import Split
from meshbolt.tensor.split import SplitObject, SplitTensor, gathered, split_of
from meshbolt.tensor.styles import ParallelModule, is_conv1d


def owner_of(name: str, key: str) -> tuple[str, str]:
    """Return the module that a parameter stands in, and its name there.

    Args:
        name: of a module.
        key: of a parameter in it, or in a module inside.
    """
    inner, _, own_key = key.rpartition(".")
    return ".".join(part for part in (name, inner) if part), own_key


def as_objects(tree: Any) -> Any:
    """Return arguments or results with split tensors in the form that is compiled."""
    return tree_map_only(SplitTensor, lambda split: _as(SplitObject, split), tree)


def as_tensors(tree: Any) -> Any:
    """Return arguments or results with split tensors in the form that code runs on."""
    return tree_map_only(SplitObject, lambda split: _as(SplitTensor, split), tree)


def _as(form: Any, split: Split) -> Any:
    return form(split.local, split.division, split.axis, along_sequence=split.along_sequence)


def show_split(module: nn.Module, entry: ParallelModule, *, axis: Axis, sequence: bool, is_compiled: bool) -> None:
    """Let a module's forward see its parameters as split tensors.

    Args:
        module: a parallel one, before it is sharded.
        entry: how it is divided.
        axis: the ranks.
        sequence: its output may be left split along the sequence.
        is_compiled: it stands in a block that will be compiled.
    """
    shown = _Shown(module, entry, axis=axis, sequence=sequence, is_compiled=is_compiled)
    is_plain = getattr(type(module).forward, "__code__", None) in _PLAIN_FORWARDS or is_conv1d(module)
    # What somebody has put in the place of a module's forward is called as it is.
    if is_plain and "forward" not in module.__dict__:
        module.forward = shown.forward
    else:
        if is_compiled:
            # It runs as it is, between what is compiled before and after it.
            module.forward = without_compiling(module.forward)
        module.register_forward_pre_hook(without_compiling(shown.swap), with_kwargs=True)
        module.register_forward_hook(without_compiling(shown.swap_back), prepend=True, always_call=True)


# Forwards that only read attributes of their module, which something else may have instead.
_PLAIN_FORWARDS = {nn.Linear.forward.__code__, nn.Embedding.forward.__code__}


class _Shown:
    """A parallel module's parameters, as its forward is to see them."""

    def __init__(
        self, module: nn.Module, entry: ParallelModule, *, axis: Axis, sequence: bool, is_compiled: bool
    ) -> None:
        self._is_compiled = is_compiled
        self._module, self._layouts, self._gathers, self._axis = module, entry.layouts, entry.gathers, axis
        self._sequence_dim = entry.sequence_dim if sequence else None
        self._flattens = sequence and is_conv1d(module)
        self._held: list[list[tuple[dict[str, Any], str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward on a stand-in that has split parameters."""
        stand_in = _StandIn(self._module, {key: tensor for _, key, _, tensor in self._split(args, kwargs)})
        out = type(self._module).forward(stand_in, *args, **kwargs)
        return gathered(out) if self._gathers else out

    def swap(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Put split parameters in the place of the module's, before a forward that something else calls."""
        swapped = []
        for places, key, whole, tensor in list(self._split(args, kwargs)):
            swapped.append((places, key, whole))
            places[key] = tensor
        self._held.append(swapped)
        return as_tensors((args, kwargs)) if self._is_compiled else None

    def swap_back(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Put the module's own back, after it."""
        for places, key, whole in self._held.pop() if self._held else ():
            places[key] = whole
        output = gathered(output) if self._gathers else output
        return as_objects(output) if self._is_compiled else output

    def _split(self, args: Any, kwargs: Any) -> Iterator[tuple[dict[str, Any], str, Any, Any]]:
        """Yield where each parameter stands, its name there, the parameter, and what is to be seen of it."""
        samples = math.prod((*args, *kwargs.values())[0].shape[:-2]) if self._flattens else 1
        dtype: torch.dtype | None = None
        where = 0 if self._flattens else self._sequence_dim
        for key, layout in self._layouts.items():
            inner, own_key = owner_of("", key)
            places: dict[str, Any] = (self._module.get_submodule(inner) if inner else self._module)._parameters
            whole = places[own_key]
            local = local_in_graph(whole) if isinstance(whole, DTensor) else whole
            if dtype is not None and local.dtype != dtype and not torch.is_autocast_enabled(local.device.type):
                # A bias in sections is whole over the data-parallel ranks, and has not been cast by a gather as its weight has.
                local = local.to(dtype)
            dtype = local.dtype
            yield places, own_key, whole, split_of(local, layout, self._axis, sequence_dim=where, samples=samples)


class _StandIn:
    """Has a module's attributes, but for its parameters."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Any]) -> None:
        self._module, self._parameters = module, parameters

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, or the module's attribute."""
        return self._parameters[name] if name in self._parameters else getattr(self._module, name)
