"""Give every parameter its first value, equal on every layout, without ever holding the whole model on one rank.

A module that was built with real weights is broadcast from rank 0. A module built on the meta device is filled module by
module in the order of registration, from rank 0's random state, and each unit is sharded as soon as it is full: weights do not
depend on the number of ranks, and for modules that draw in their layers' constructors they are those of a plain build. Where
what the constructors do was noted (`deferred.py`), rank 0 does it, and weights are always those of a plain build.

Of a pipeline's stages each rank keeps its own. Rank 0's values count there too, so what is sent passes through every rank, one
tensor at a time; numbers are drawn for all tensors, one module at a time. What is read from files, or noted alike on all ranks,
only those take who keep it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.collectives import same_on_all_ranks
from meshbolt.engine.deferred import REMEDY, Deferred, attached, detach
from meshbolt.engine.pretrained import PretrainedWeights, pretrained_weights
from meshbolt.engine.stages import Stages
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import is_foreign

Shard = Callable[[nn.Module, Callable[[nn.Parameter], bool]], None]


def fill_and_shard(
    module: nn.Module,
    units: Mapping[str, nn.Module],
    shard: Shard,
    *,
    device: torch.device,
    stages: Stages | None = None,
) -> None:
    """Walk the module in the order of registration, fill it, and shard every unit when its last module is full.

    Args:
        module: the user's whole module; each tensor is real or on the meta device.
        units: modules to hand to `shard`, by name.
        shard: called once for each unit, inner units first, with a function that says of a parameter whether nobody else
            needs its values.
        device: where tensors are to live.
        stages: what of the module this rank holds; the rest is drawn too, where values are drawn in a row, and dropped.

    Raises:
        ConfigError: a module on the meta device cannot fill its own tensors.
        UnsupportedError: a module that was built without its values has changed since in a way that loses some.
    """
    stages = stages or Stages()
    ties = _ties(module)
    filler = _Filler(module, device, _noted(module), stages, ties)
    unfinished: list[tuple[str, nn.Module]] = []
    with _random_state_of_rank_zero(device):
        for name, child in module.named_modules():
            while unfinished and not name.startswith(unfinished[-1][0] + "."):
                shard(unfinished.pop()[1], filler.may_free)
            if name in units:
                unfinished.append((name, child))
            filler.fill(name, child)
            stages.leave_others(name, child, ties=ties, device=device)
        while unfinished:
            shard(unfinished.pop()[1], filler.may_free)


def _ties(module: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter that has several, by each of them: to hold on to parameters would keep them."""
    first: dict[nn.Parameter, str] = {}
    names = [(name, first.setdefault(p, name)) for name, p in module.named_parameters(remove_duplicate=False)]
    several = {first_name for name, first_name in names if name != first_name}
    return {name: first_name for name, first_name in names if first_name in several}


def _noted(module: nn.Module) -> Deferred | None:
    deferred = attached(module)
    if deferred is not None and (gap := deferred.gap(module)) is not None:
        raise UnsupportedError(f"{type(module).__name__} was built without its values, and {gap}." + REMEDY)
    return detach(module)


class _Filler:
    """Fills one module's own tensors at a time, keeping tied parameters tied."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        deferred: Deferred | None,
        stages: Stages,
        ties: Mapping[str, str],
    ) -> None:
        self._root, self._stages, self._ties = module, stages, ties
        self._device = device
        self._deferred = deferred
        self._notes_agree = deferred is not None and _agree(deferred, stages)
        # Only tied parameters are remembered, and only here: to hold on to all would keep the whole model in memory.
        self._real: dict[str, nn.Parameter] = {}
        self._done: set[str] = set()
        self._made: dict[int, weakref.ref[nn.Parameter]] = {}
        self._pretrained: dict[str, PretrainedWeights] = {}

    def fill(self, name: str, child: nn.Module) -> None:
        """Give the module's own tensors, not those of its children, their values."""
        if (weights := pretrained_weights(child)) is not None:
            self._pretrained[name] = weights
        computed = self._compute(name, child)
        own = _own(name, child)
        if any(tensor.is_meta for tensor in own.values()):
            if all(self._weights_of(full) for full in own):
                self._stages.leave_others(name, child, ties=self._ties, device=self._device)
            self._initialise(name, child, computed)
            return
        self._read_pretrained(name, child)
        for full, tensor in own.items():
            if tensor not in computed and not is_foreign(tensor):
                self._broadcast(full, tensor)

    def _is_first(self, full: str) -> bool:
        """Return whether a tensor comes by for the first time, under any of its names; the same on every rank."""
        first = self._ties.get(full, full)
        is_new = first not in self._done
        self._done.add(first)
        return is_new

    def may_free(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter was made here, and nobody else needs its values."""
        made = self._made.get(id(parameter))
        return made is not None and made() is parameter

    def _make(self, full: str, value: torch.Tensor, *, like: torch.Tensor) -> nn.Parameter:
        made = nn.Parameter(value, requires_grad=like.requires_grad)
        if full in self._ties:
            self._remember(full, made)
        else:
            self._made[id(made)] = weakref.ref(made)
        return made

    def _remember(self, full: str, parameter: nn.Parameter) -> None:
        if full in self._ties and full not in self._stages.elsewhere:
            self._real[self._ties[full]] = parameter

    def _remembered(self, full: str) -> nn.Parameter | None:
        return self._real.get(self._ties.get(full, ""))

    def _compute(self, name: str, child: nn.Module) -> set[torch.Tensor]:
        """Give values to tensors whose making was noted, and return them."""
        computed: set[torch.Tensor] = set()
        for full, tensor in _own(name, child).items() if self._deferred is not None else ():
            key = full.rpartition(".")[2]
            if not self._is_noted(tensor):
                continue
            if not isinstance(tensor, nn.Parameter):
                child._buffers[key] = value = self._value(tensor)
                computed.add(value)
            elif full not in self._stages.elsewhere:
                setattr(child, key, real := self._computed(full, tensor))
                computed.add(real)
            else:
                if not self._notes_agree and self._is_first(full):
                    self._value(tensor)  # for those who keep it
                first = self._ties.get(full, full)
                self._stages.leave(child, key, first=first, device=self._device)
        return computed

    def _computed(self, full: str, parameter: nn.Parameter) -> nn.Parameter:
        real = self._remembered(full)
        if real is None:
            self._is_first(full)
            real = self._make(full, self._value(parameter), like=parameter)
            real.__dict__.update(parameter.__dict__)
        return real

    def _is_noted(self, tensor: torch.Tensor) -> bool:
        return self._deferred is not None and self._deferred.knows(tensor)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._deferred is None:
            raise AssertionError("Nothing was noted.")
        group = self._stages.group if self._notes_agree else None
        is_first = dist.get_rank(group) == 0
        value = self._deferred.value(tensor) if is_first else torch.empty_like(tensor, device="cpu")
        return _sent(value.to(self._device), group=group)

    def _broadcast(self, full: str, tensor: torch.Tensor) -> None:
        if not self._is_first(full):
            return
        if full in self._stages.elsewhere:
            _sent(tensor.data.to(self._device))  # for those who keep it
            return
        if isinstance(tensor, nn.Parameter):
            self._remember(full, tensor)
        tensor.data = _sent(tensor.data.to(self._device))

    def _initialise(self, name: str, child: nn.Module, computed: set[torch.Tensor]) -> None:
        tied = self._make_real(name, child)
        before: dict[torch.Tensor, torch.Tensor] = {parameter: parameter.detach().clone() for parameter in tied}
        if not self._read_pretrained(name, child):
            with _kept(computed):
                self._call_initialiser(name, child)
            self._read_pretrained(name, child)  # some of its tensors may have weights
        _put_back(before)
        _check_filled(name, child)

    def _make_real(self, name: str, child: nn.Module) -> set[nn.Parameter]:
        """Replace meta tensors by real ones full of NaN; return those that another module has filled already."""
        tied, made = set[nn.Parameter](), set[nn.Parameter]()
        for full, tensor in _own(name, child).items():
            key = full.rpartition(".")[2]
            if not isinstance(tensor, nn.Parameter):
                child._buffers[key] = _unfilled(tensor, self._device) if tensor.is_meta else tensor.to(self._device)
                continue
            real = self._remembered(full)
            if real is not None and real not in made:
                tied.add(real)
            elif real is None and tensor.is_meta:
                real = self._make(full, _unfilled(tensor, self._device), like=tensor)
                made.add(real)
            if real is not None:
                setattr(child, key, real)
        return tied

    def _read_pretrained(self, name: str, child: nn.Module) -> bool:
        """Fill what pretrained weights there are; return whether that was everything."""
        found = [self._read_tensor(full, tensor) for full, tensor in _own(name, child).items()]
        return all(found)

    def _weights_of(self, full: str) -> tuple[PretrainedWeights, str] | None:
        """Return which weights have a tensor, and its name in them."""
        for owner, weights in self._pretrained.items():
            inside = full.removeprefix(f"{owner}.") if owner else full
            if (not owner or full.startswith(f"{owner}.")) and inside in weights.files:
                return weights, inside
        return None

    @torch.no_grad()
    def _read_tensor(self, full: str, tensor: torch.Tensor) -> bool:
        found = self._weights_of(full)
        if found is not None and not is_foreign(tensor):
            weights, inside = found
            tensor.copy_(weights.read(inside))
        return found is not None

    def _call_initialiser(self, name: str, child: nn.Module) -> None:
        own = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
        by_ancestor = self._ancestor_initialiser(name)
        if own is None and by_ancestor is None:
            raise ConfigError(
                f"Module {name or type(self._root).__name__!r} ({type(child).__name__}) was built on the meta device, and has "
                "no reset_parameters() to fill its tensors. Define reset_parameters() in its class (or _init_weights(module) "
                "in a parent's), or build the model in __init__ instead of configure_model."
            )
        if own is not None:
            own()
        if by_ancestor is not None:
            by_ancestor(child)

    def _ancestor_initialiser(self, name: str) -> Callable[[nn.Module], None] | None:
        parts = name.split(".") if name else []
        for depth in range(len(parts), -1, -1):
            ancestor = self._root.get_submodule(".".join(parts[:depth]))
            if callable(initialise := getattr(ancestor, "_init_weights", None)):
                return cast("Callable[[nn.Module], None]", initialise)
        return None


def _own(name: str, child: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own tensors by their whole names, parameters first."""
    parameters = child.named_parameters(name, recurse=False, remove_duplicate=False)
    buffers = child.named_buffers(name, recurse=False, remove_duplicate=False)
    return dict[str, torch.Tensor]([*parameters, *buffers])


def _agree(deferred: Deferred, stages: Stages) -> bool:
    """Return whether all stages would compute the same values, so that each can compute its own."""
    return stages.pipeline is None or same_on_all_ranks(deferred.fingerprint())[0]


def _sent(value: torch.Tensor, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the first rank's value on all ranks of a group, in place where that can be."""
    if dist.get_world_size(group) == 1:
        return value
    # Of one element any stride counts as contiguous.
    is_dense = value.is_contiguous() and (value.numel() != 1 or value.view(-1).stride(0) == 1)
    whole = value if is_dense else value.clone(memory_format=torch.contiguous_format)
    # As bytes: backends know few of the dtypes.
    dist.broadcast(whole.view(-1).view(torch.uint8), group=group, group_src=0)
    # No value can be written where several elements share a place.
    return whole if whole is value or _is_expanded(value) else value.copy_(whole)


@contextmanager
def _kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    before = {tensor: tensor.detach().clone() for tensor in tensors}
    yield
    _put_back(before)


@torch.no_grad()
def _put_back(values: Mapping[torch.Tensor, torch.Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)


def _unfilled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    real = torch.empty_like(tensor, device=device)
    return real.fill_(float("nan")) if real.is_floating_point() else real.zero_()


def _check_filled(name: str, child: nn.Module) -> None:
    for full, tensor in _own(name, child).items():
        has_values = tensor.is_floating_point() and tensor.numel() and not is_foreign(tensor)
        if has_values and bool(tensor.detach().isnan().any()):
            raise ConfigError(
                f"{full} of {type(child).__name__} was built on the meta device, and "
                "reset_parameters() left it without values. Fill it there, create it with device='cpu', or build the model "
                "in __init__ instead of configure_model."
            )


@contextmanager
def _random_state_of_rank_zero(device: torch.device) -> Iterator[None]:
    """Draw as rank 0 does; ranks that were in another state return to it."""
    own = _random_state(device)
    shared = [own]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(shared, src=0)
    differs = any(not torch.equal(mine, theirs) for mine, theirs in zip(own, shared[0], strict=True))
    _set_random_state(shared[0], device)
    yield
    if differs:
        _set_random_state(own, device)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
