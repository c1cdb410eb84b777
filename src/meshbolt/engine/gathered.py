"""Whole parameters for a while, to read or to change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt.compat import (
    StoredTensor,
    device_of,
    distributed_tensor,
    local_tensor,
    own_pieces,
    sections_of,
    sharded_parameters_away,
    tree_map_only,
    whole_of,
)
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.fingerprint import fingerprint


@dataclass
class _Gathered:
    """A whole tensor that stands in for what this rank holds of it.

    Attributes:
        held: the shard, or the whole one; None: another stage of a pipeline holds it.
        whole: stands in for it.
        before: on the rank whose changes count, the fingerprint of what was gathered.
    """

    held: torch.Tensor | None
    whole: torch.Tensor
    before: torch.Tensor | None = None


Place = tuple[nn.Module, str]
"""A module, and the key of one of its own parameters."""

_ITSELF = ""  # beside the keys of its optimizer's state, the parameter
_CONTIGUOUS = torch.contiguous_format


def places_of(
    wanted: nn.Module | nn.Parameter | Iterable[nn.Parameter], *, modules: Iterable[nn.Module]
) -> list[Place]:
    """Return where parameters stand, in the same order on every rank; nowhere if they are none of the modules'.

    Args:
        wanted: a module, whose parameters they are; or parameters, as they stand in the modules now.
        modules: those that were sharded, whole.
    """
    if isinstance(wanted, nn.Module):
        return [place for place, _ in _standing(wanted)]
    chosen = {wanted} if isinstance(wanted, nn.Parameter) else set(wanted)
    return [place for module in modules for place, parameter in _standing(module) if parameter in chosen]


def _standing(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for child in module.modules():
        yield from (((child, key), value) for key, value in child._parameters.items() if value is not None)


@contextmanager
def gathered(
    places: Iterable[Place],
    *,
    names: Mapping[nn.Parameter, str],
    optimizers: Sequence[Optimizer],
    pipeline: dist.ProcessGroup | None = None,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Replace parameters that this rank does not hold whole by whole ones; changes made in place are kept.

    Every rank enters and leaves together. Of what ranks change, rank 0's changes count.

    Args:
        places: where the parameters stand, the same on every rank; their units must not be gathered otherwise.
        names: names of all parameters, by sharded parameter.
        optimizers: also gather the state that these keep for the parameters.
        pipeline: the ranks that hold stages of the module, each of which then gets what the others hold; every tensor is
            replaced. None: this one holds parts of everything, and what it holds whole stays as it is.

    Yields:
        Optimizer state by parameter name and key, whole; empty without optimizers.

    Raises:
        ConfigError: on every rank, where rank 0 has put another parameter into the place of one, or has removed it.
    """
    held = [(child, key, child._parameters[key]) for child, key in places]
    # What stands in for a parameter already, inside of another such context, has no name.
    parameters = list(dict.fromkeys(each for *_, each in held if each is not None and each in names))
    wholes = _Wholes([_held_of(each, optimizers) for each in parameters], pipeline=pipeline)
    values = [wholes.take(parameter, number) for number, parameter in enumerate(parameters)]
    copies = {parameter: of_each.pop(_ITSELF) for parameter, of_each in zip(parameters, values, strict=True)}
    placed = [each if each is None else copies.get(each, each) for *_, each in held]
    try:
        for (child, key, _), whole in zip(held, placed, strict=True):
            child._parameters[key] = whole
        with sharded_parameters_away():
            yield {names[parameter]: state for parameter, state in zip(parameters, values, strict=True) if state}
        left = [child._parameters.get(key) for child, key, _ in held]
    finally:
        for child, key, parameter in held:
            child._parameters[key] = parameter
    wholes.replaced = [key for (_, key, _), one, now in zip(held, placed, left, strict=True) if now is not one]
    for parameter, whole in copies.items():
        if whole is not parameter:
            _refuse_gradient(whole)
    wholes.write_back()


def _refuse_gradient(whole: nn.Parameter) -> None:
    """Let a backward fail that would leave a gradient on a parameter which nobody has any more."""

    def refuse(_: torch.Tensor) -> None:
        raise UnsupportedError(
            "A loss uses a parameter as it stood inside strategy.gathered(...), to where no gradient can flow back. Detach what "
            "you take from there. For a penalty on weights use the optimizer's weight_decay, or add its derivative to the "
            "gradients in on_before_optimizer_step."
        )

    if whole.requires_grad:
        whole.register_hook(refuse)


def _held_of(parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Return a parameter and its optimizers' state, as this rank holds them; nothing where another stage does."""
    if held_elsewhere(parameter):
        return {}
    held: dict[str, Any] = {_ITSELF: parameter}
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            is_part = isinstance(parameter, DTensor) and isinstance(value, torch.Tensor)
            held[key] = as_sharded(value, like=cast("DTensor", parameter)) if is_part else value
    return held


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the ranks of a pipeline tell each other of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str


class _Wholes:
    """Makes whole tensors of what ranks hold, and writes back those that were changed."""

    def __init__(self, held: Sequence[Mapping[str, Any]], *, pipeline: dist.ProcessGroup | None) -> None:
        """Find out who holds what; a collective of the pipeline.

        Args:
            held: by parameter and key, what this rank has.
            pipeline: as for `gathered`.
        """
        self._held, self._pipeline = held, pipeline
        self._made: list[_Gathered] = []
        self._decides = dist.get_rank() == 0
        self.replaced: list[str] = []
        each: list[Any] = [held]
        if pipeline is not None:
            each = [None] * pipeline.size()
            dist.all_gather_object(each, tree_map_only(torch.Tensor, _told, list(held)), group=pipeline)
        # By parameter, the first rank that has it, and what it has told.
        self._sources = [
            next((rank, entries) for rank, entries in enumerate(of_ranks) if entries)
            for of_ranks in zip(*each, strict=True)
        ]

    def take(self, parameter: nn.Parameter, number: int) -> dict[str, Any]:
        """Return a parameter and its optimizers' state, whole; a collective.

        Args:
            parameter: as it stands in the module.
            number: of it.
        """
        source, entries = self._sources[number]
        values: dict[str, Any] = {}
        for key, entry in entries.items():
            held = self._held[number].get(key)
            whole = self._whole(held, entry, source=source, device=parameter.device)
            if isinstance(whole, torch.Tensor) and whole is not held:
                if key == _ITSELF:
                    whole = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                before = fingerprint(whole) if self._decides else None
                self._made.append(_Gathered(held, whole, before))
            values[key] = whole
        return values

    def _whole(self, held: Any, entry: Any, *, source: int, device: torch.device) -> Any:
        if self._pipeline is None:
            return whole_of(held) if isinstance(held, DTensor) else held
        if not isinstance(entry, _Told):
            return entry
        if self._pipeline.rank() == source:
            whole = whole_of(held) if isinstance(held, DTensor) else held.detach().clone(memory_format=_CONTIGUOUS)
        else:
            on = device if entry.device_type == device.type else torch.device(entry.device_type)
            whole = torch.empty(entry.shape, dtype=entry.dtype, device=on)
        return _broadcast(whole, self._pipeline, source=source)

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the whole tensors that rank 0 has changed into what ranks hold of them; a collective of all ranks.

        Raises:
            ConfigError: others stand where they stood.
        """
        if not self._made:
            self._refuse(bool(self.replaced))
            return
        changed = torch.zeros(len(self._made) + 1, dtype=torch.uint8)
        changed[-1] = bool(self.replaced)
        for number, made in enumerate(self._made if self._decides else ()):
            changed[number] = fingerprint(made.whole) != made.before
        flags = _broadcast(changed, _world(), source=0)
        self._refuse(bool(flags[-1]))
        for made in itertools.compress(self._made, flags[:-1].tolist()):
            whole = _broadcast(made.whole.detach(), _world(), source=0)
            if isinstance(made.held, DTensor):
                local_tensor(made.held).copy_(local_part(whole, like=made.held))
            elif made.held is not None:
                made.held.copy_(whole)

    def _refuse(self, is_replaced: bool) -> None:
        if is_replaced:
            which = ", ".join(map(repr, dict.fromkeys(self.replaced))) or "one on rank 0"
            raise ConfigError(
                f"Inside strategy.gathered(...) parameters were replaced by others or removed ({which}), which changes no shard. "
                "Change them in place: `with torch.no_grad(): parameter.copy_(...)`, or load_state_dict without assign=True."
            )


def _told(tensor: torch.Tensor) -> _Told:
    return _Told(shape=tuple(tensor.shape), dtype=tensor.dtype, device_type=tensor.device.type)


def _world() -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.group.WORLD)


def _broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, *, source: int) -> torch.Tensor:
    """Return a tensor as one rank of a group has it, where that can be in the memory of this rank's."""
    content = tensor.contiguous().to(device_of(group))
    if content.numel():
        # As bytes: backends know few of the dtypes.
        dist.broadcast(content.view(-1).view(torch.uint8), group=group, group_src=source)
    return content.to(tensor.device)


def as_sharded(value: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return optimizer state as a DTensor of the parameter's layout, where it has the shape of the parameter's shard.

    Args:
        value: state of one parameter: this rank's part in plain form, a DTensor, or a step count.
        like: the parameter.
    """
    if isinstance(value, DTensor) or value.shape != local_tensor(like).shape or (value.dim() == 0 and like.dim() > 0):
        return value
    return distributed_tensor(value, like=like, placements=like.placements)


def local_part(whole: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return the part of a whole tensor that this rank would hold, without communication.

    Args:
        whole: of the shape of `like`.
        like: a sharded tensor; its layout.
    """
    pieces = own_pieces(like)
    if isinstance(whole, StoredTensor):
        return _stored_part(whole, pieces, shape=local_tensor(like).shape)
    if len(pieces) == 1:
        return whole[pieces[0][1]].reshape(local_tensor(like).shape)
    part = whole.new_empty(local_tensor(like).shape)
    for here, there in pieces:
        part[here] = whole[there]
    return part


def _stored_part(whole: StoredTensor, pieces: Sequence[tuple[Any, Any]], *, shape: torch.Size) -> torch.Tensor:
    """Return a part of a tensor whose values are elsewhere; only its own are read, and where they are one run not even these."""
    if len(pieces) == 1 and whole.part(pieces[0][1]).shape == shape:
        return whole.part(pieces[0][1])
    part = torch.empty(shape, dtype=whole.dtype)
    for here, there in pieces:
        part[here] = whole.part(there).value().reshape(part[here].shape)
    return part


def own_part_of_copy(copy: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return the part of a gathered copy that this rank holds as a shard; a view.

    Args:
        copy: whole, or over the ranks that share a layer divided as the shard is.
        like: the shard.
    """
    if not isinstance(copy, DTensor):
        return local_part(copy, like=like)
    part, placements = local_tensor(copy), like.placements
    # Of a divided layer the copy has what this rank has of it: units share that among the data-parallel ranks only.
    names = like.device_mesh.mesh_dim_names or ()
    for axis in (axis for axis in sections_of(like) if names[axis].startswith("dp_")):
        dim: int = placements[axis].dim  # type: ignore[attr-defined]
        pieces = part.chunk(like.device_mesh.size(axis), dim)
        own = like.device_mesh.get_local_rank(axis)
        part = pieces[own] if own < len(pieces) else part.narrow(dim, 0, 0)
    return part
