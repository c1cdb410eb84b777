"""Find layers that can be divided by looking at a forward without memory: what cannot be proved stays whole.

Every linear layer that reads a whole activation is tried as column-parallel. Its output is then a split tensor, which is
followed by the very rules that a run would follow, with the numbers of ranks and sizes of the run. Where one reaches another
linear layer's input with its features still split, that layer is row-parallel, and the two (or q, k and v with what comes
after attention) belong together. Where an operation would have to gather, the layers it came from stay whole, and so do those
they belong together with. That is repeated until a forward gathers nothing. Layers of several projections are found by where
their output is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import attributes_restored
from meshbolt.compat import plain_calls, tensors_without_memory, tree_map_only
from meshbolt.errors import ConfigError
from meshbolt.tensor.axis import ImaginedAxis
from meshbolt.tensor.layout import Layout, SplitLostError
from meshbolt.tensor.part import Split, StrayError
from meshbolt.tensor.split import SplitTensor, is_fact, noted_sources
from meshbolt.tensor.styles import is_conv1d

Example = Callable[[nn.Module], Any]
"""Calls a module as a run would call it, on tensors without memory."""

_MAX_PASSES = 12


@dataclass
class _Found:
    """What one forward has shown."""

    rows: dict[str, set[str]] = field(default_factory=dict)
    row_sections: dict[str, int] = field(default_factory=dict)
    as_columns: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)


def trace_styles(
    module: nn.Module, example: Example, *, ranks: int, loss_parallel: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Find which layers can be divided.

    Args:
        module: the user's whole module, on any device; it is left as it was.
        example: calls it.
        ranks: that would divide layers.
        loss_parallel: leave a last layer divided whose output only the loss reads.

    Returns:
        The styles of layers that are to be divided, by name, and for all other linear layers why they stay whole.

    Raises:
        ConfigError: the module's forward cannot be looked at.
    """
    tracer = _Tracer(module, ranks)
    for _ in range(_MAX_PASSES):
        found = tracer.look(example)
        if not tracer.learn(found, loss_parallel=loss_parallel):
            return tracer.styles(found), tracer.left_out
    raise ConfigError(
        f"plan='auto' has looked {_MAX_PASSES} times at the forward of {type(module).__name__} without coming to an end. Give a "
        "mapping, TensorParallel(plan={pattern: style})."
    )


class _Tracer:
    """Looks at one module again and again, and remembers what cannot be divided."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        self._module, self._ranks = module, ranks
        self.left_out: dict[str, str] = {}
        self._sections: dict[str, int] = {}
        self._heads: list[str] = []
        self._layers: dict[str, nn.Module] = {}
        shared = _shared_parameters(module)
        for name, child in module.named_modules():
            if isinstance(child, nn.MultiheadAttention):
                self._consider_attention(name, child)
            elif _is_linear(child) and not any(name.startswith(f"{head}.") for head in self._heads):
                self._consider(name, child, shared)

    def _consider_attention(self, name: str, child: nn.MultiheadAttention) -> None:
        if child.num_heads % self._ranks:
            self.left_out[name] = f"{child.num_heads} heads cannot be shared by {self._ranks} ranks"
        elif child.bias_k is not None or child.add_zero_attn:
            self.left_out[name] = "it adds a key and a value of its own"
        else:
            self._heads.append(name)

    def _consider(self, name: str, child: nn.Module, shared: set[nn.Parameter]) -> None:
        self._layers[name] = child
        if any(parameter in shared for parameter in child.parameters(recurse=False)):
            self.left_out[name] = "it shares its weight with another module"

    # One forward ------------------------------------------------------------------------------------------------------

    def look(self, example: Example) -> _Found:
        """Call the module without memory, with every layer that is not left out as column-parallel."""
        found = _Found()
        axis = ImaginedAxis(self._ranks, on_gather=lambda *lost: _note_lost(found, *lost))
        with tensors_without_memory(beside_others=True), noted_sources(), _without_memory(self._module) as weights:
            handles = [
                handle
                for name, layer in self._layers.items()
                for handle in self._try(name, layer, weights, axis=axis, found=found)
            ]
            try:
                example(self._module)
            except StrayError as error:
                # What comes after is seen the next time, when these layers are whole.
                reason = "its output goes where it cannot be followed, such as a torch.autograd.Function"
                found.lost.update(dict.fromkeys(error.sources, reason))
            except Exception as error:
                raise ConfigError(
                    f"plan='auto' cannot look at the forward of {type(self._module).__name__}: {type(error).__name__}: {error}. "
                    "It has to run on tensors without values, so without .item() and branches on them. Set example_input_array, "
                    "with which forward() is looked at instead of training_step(), or give a mapping, "
                    "TensorParallel(plan={pattern: style})."
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        return found

    def _try(
        self, name: str, layer: nn.Module, weights: Mapping[str, torch.Tensor], *, axis: ImaginedAxis, found: _Found
    ) -> list[Any]:
        outputs = 1 if is_conv1d(layer) else 0
        own = {
            key: weights[f"{name}.{key}" if name else key]
            for key in layer._parameters
            if layer._parameters[key] is not None
        }
        held = dict(layer._parameters)
        mine = frozenset({name})

        def outside(key: str) -> torch.Tensor:
            return _Watched(own[key], lambda: found.lost.setdefault(name, "its weight is used outside of the layer"))

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            read = next(iter((*args, *kwargs.values())), None)
            if isinstance(read, Split) and read.division.dim == read.dim() - 1:
                found.rows.setdefault(name, set()).update(read.sources)
                sections = found.row_sections.setdefault(name, read.division.sections)
                if sections != read.division.sections:
                    found.lost.update(dict.fromkeys(read.sources, "one layer reads it divided in two ways"))
                part = _imagined_part(own["weight"], Layout(1 - outputs, sections), self._ranks)
                layer._parameters["weight"] = SplitTensor(part, Layout(1 - outputs, sections), axis)  # type: ignore[assignment]
                layer._parameters["bias"] = own.get("bias")  # type: ignore[assignment]
                return
            sections = self._sections.get(name, 1)
            if name in self.left_out or own["weight"].shape[outputs] % (sections * self._ranks):
                layer._parameters.update(own)  # type: ignore[arg-type]
                return
            found.as_columns.add(name)
            for key, whole in own.items():
                layout = Layout(outputs if whole.dim() > 1 else 0, sections)
                part = _imagined_part(whole, layout, self._ranks)
                layer._parameters[key] = SplitTensor(part, layout, axis, sources=mine)  # type: ignore[assignment]

        def leave(*_: Any) -> None:
            for key in own:
                layer._parameters[key] = outside(key)  # type: ignore[assignment]

        leave()
        handles: list[Any] = [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave, always_call=True),
        ]
        return [*handles, _Restore(layer, held)]

    # What it means ----------------------------------------------------------------------------------------------------

    def learn(self, found: _Found, *, loss_parallel: bool) -> bool:
        """Leave out what cannot be divided; return whether anything is new, so that another look is needed."""
        before = dict(self.left_out), dict(self._sections)
        for name, sections in found.wanted.items():
            if self._sections.get(name, 1) == 1 and name not in self.left_out:
                self._sections[name] = sections
                found.lost.pop(name, None)
        for name, reason in found.lost.items():
            self.left_out.setdefault(name, reason)
        if before != (self.left_out, self._sections):
            return True
        for row, sources in found.rows.items():
            out = sorted(source for source in sources if source in self.left_out)
            together = f"it belongs together with {out[0]}, which stays whole" if out else ""
            for source in sources if out else ():
                self.left_out.setdefault(source, together)
            if row in found.as_columns:
                for source in sources:
                    self.left_out.setdefault(source, f"{row} reads it, and other activations too")
        read = set().union(*found.rows.values()) if found.rows else set()
        for name in found.as_columns - read:
            if not loss_parallel:
                self.left_out.setdefault(name, "no layer follows that could read its output divided")
        for name, layer in self._layers.items():
            if name not in found.as_columns and name not in found.rows:
                self.left_out.setdefault(name, self._why_not(name, layer))
        return before != (self.left_out, self._sections)

    def _why_not(self, name: str, layer: nn.Module) -> str:
        size, sections = layer.get_parameter("weight").shape[1 if is_conv1d(layer) else 0], self._sections.get(name, 1)
        if size % (sections * self._ranks):
            each = f"{sections} times " if sections > 1 else ""
            return f"its {size} outputs cannot be divided {each}by {self._ranks}"
        return "the forward does not use it"

    def styles(self, found: _Found) -> dict[str, str]:
        """Return what a look that has shown nothing new has found."""
        styles = dict.fromkeys(self._heads, "heads")
        for name in self._layers:
            if name in found.rows:
                styles[name] = _written("rowwise", found.row_sections[name])
                self.left_out.pop(name, None)
            elif name in found.as_columns:
                styles[name] = _written("colwise", self._sections.get(name, 1))
        return styles


class _Restore:
    """Gives a layer its parameters back, in the manner of a hook's handle."""

    def __init__(self, layer: nn.Module, held: Mapping[str, Any]) -> None:
        self._layer, self._held = layer, held

    def remove(self) -> None:
        """Give them back."""
        self._layer._parameters.update(self._held)


class _Watched(torch.Tensor):
    """A weight as it stands outside of its layer's forward: whoever computes with it is noticed."""

    def __new__(cls, whole: torch.Tensor, noticed: Callable[[], Any]) -> _Watched:
        made: _Watched = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype, device=whole.device)
        made.__dict__.update(whole=whole, noticed=noticed)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the weight itself."""
        if is_fact(func):
            with plain_calls():
                return func(*args, **(kwargs or {}))
        return func(*_unwatched(args), **_unwatched(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute with the weight itself."""
        return func(*_unwatched(args), **_unwatched(kwargs or {}))


def _unwatched(tree: Any) -> Any:
    def whole(tensor: _Watched) -> torch.Tensor:
        tensor.__dict__["noticed"]()
        found: torch.Tensor = tensor.__dict__["whole"]
        return found

    return tree_map_only(_Watched, whole, tree)


def _note_lost(found: _Found, operation: str, failure: SplitLostError, operands: Sequence[SplitTensor]) -> None:
    for operand in operands:
        for source in operand.sources:
            found.lost.setdefault(source, f"{operation} cannot keep its output divided: {failure}")
            if failure.sections is not None and len(operand.sources) == 1:
                found.wanted.setdefault(source, failure.sections)


@contextmanager
def _without_memory(module: nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """Put tensors without memory in the place of parameters and buffers for a while; yields the parameters' by name."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[tensor] = empty.requires_grad_(tensor.requires_grad)
        return made[tensor]

    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    weights: dict[str, torch.Tensor] = {}
    for name, child in module.named_modules():
        for places in (child._parameters, child._buffers):
            held.append((places, dict(places)))
            for key, tensor in places.items():
                if tensor is not None:
                    places[key] = weights[f"{name}.{key}" if name else key] = stand_in(tensor)
    try:
        with attributes_restored(module):
            yield weights
    finally:
        for places, values in held:
            places.update(values)


def _imagined_part(whole: torch.Tensor, layout: Layout, ranks: int) -> torch.Tensor:
    shape = list(whole.shape)
    shape[layout.dim] //= ranks
    return whole.new_empty(shape).requires_grad_(whole.requires_grad)


def _is_linear(module: nn.Module) -> bool:
    if module._parameters.get("weight") is None:
        return False  # it is computed, as by a parametrization
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return is_conv1d(module)


def _shared_parameters(module: nn.Module) -> set[nn.Parameter]:
    seen: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for child in module.modules():
        for _, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            (shared if parameter in seen else seen).add(parameter)
    return shared


def _written(style: str, sections: int) -> str:
    return style if sections == 1 else f"{style}/{sections}"
