"""Give every parameter its first value, equal on every layout, without ever holding the whole model on one rank.

A module that was built with real weights is broadcast from rank 0. A module built on the meta device is filled module by
module in the order of registration, from rank 0's random state, and each unit is sharded as soon as it is full: weights do not
depend on the number of ranks, and for modules that draw in their layers' constructors they are those of a plain build. Where
what the constructors do was noted (`deferred.py`), rank 0 does it, and weights are always those of a plain build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.engine.deferred import REMEDY, Deferred, attached, detach
from meshbolt.engine.pretrained import PretrainedWeights, pretrained_weights
from meshbolt.engine.stages import Stages
from meshbolt.errors import ConfigError, UnsupportedError

Shard = Callable[[nn.Module], None]


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
        shard: called once for each unit, inner units first.
        device: where tensors are to live.
        stages: what of the module this rank holds; the rest is drawn too, where values are drawn in a row, and dropped.

    Raises:
        ConfigError: a module on the meta device cannot fill its own tensors.
        UnsupportedError: a module that was built without its values has changed since in a way that loses some.
    """
    stages = stages or Stages()
    filler = _Filler(module, device, _noted(module), stages)
    unfinished: list[tuple[str, nn.Module]] = []
    with _random_state_of_rank_zero(device):
        for name, child in module.named_modules():
            while unfinished and not name.startswith(unfinished[-1][0] + "."):
                shard(unfinished.pop()[1])
            if name in units:
                unfinished.append((name, child))
            filler.fill(name, child)
            stages.leave_others(name, child, device=device)
        while unfinished:
            shard(unfinished.pop()[1])


def _noted(module: nn.Module) -> Deferred | None:
    deferred = attached(module)
    if deferred is not None and (gap := deferred.gap(module)) is not None:
        raise UnsupportedError(f"{type(module).__name__} was built without its values, and {gap}." + REMEDY)
    return detach(module)


class _Filler:
    """Fills one module's own tensors at a time, keeping tied parameters tied."""

    def __init__(self, module: nn.Module, device: torch.device, deferred: Deferred | None, stages: Stages) -> None:
        self._root, self._stages, self._group = module, stages, stages.group
        self._device = device
        self._deferred = deferred
        names = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
        # Only tied parameters are remembered: to hold on to all would keep the whole model in memory.
        self._tied = {parameter for parameter, count in names.items() if count > 1}
        self._real: dict[nn.Parameter, nn.Parameter] = {}
        self._pretrained: dict[str, PretrainedWeights] = {}

    def fill(self, name: str, child: nn.Module) -> None:
        """Give the module's own tensors, not those of its children, their values."""
        if (weights := pretrained_weights(child)) is not None:
            self._pretrained[name] = weights
        computed = self._compute(name, child)
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        if any(tensor.is_meta for _, tensor in own):
            self._initialise(name, child, computed)
            return
        self._read_pretrained(name, child)
        for key, tensor in own:
            if tensor not in computed and not self._is_elsewhere(name, key):
                self._broadcast(tensor)

    def _is_elsewhere(self, name: str, key: str) -> bool:
        return (f"{name}.{key}" if name else key) in self._stages.elsewhere

    def _compute(self, name: str, child: nn.Module) -> set[torch.Tensor]:
        """Give values to tensors whose making was noted, and return them."""
        computed: set[torch.Tensor] = set()
        for key, parameter in list(child.named_parameters(recurse=False)):
            if not self._is_noted(parameter):
                continue
            if self._is_elsewhere(name, key):
                self._stages.leave(child, key, device=self._device)
                continue
            if parameter not in self._real:
                real = nn.Parameter(self._value(parameter), requires_grad=parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)
                if parameter in self._tied:
                    self._real[parameter] = real
            else:
                real = self._real[parameter]
            setattr(child, key, real)
            computed.add(real)
        for key, buffer in list(child.named_buffers(recurse=False)):
            if self._is_noted(buffer):
                child._buffers[key] = value = self._value(buffer)
                computed.add(value)
        return computed

    def _is_noted(self, tensor: torch.Tensor) -> bool:
        return self._deferred is not None and self._deferred.knows(tensor)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._deferred is None:
            raise AssertionError("Nothing was noted.")
        is_first = dist.get_rank(self._group) == 0
        value = self._deferred.value(tensor) if is_first else torch.empty_like(tensor, device="cpu")
        self._broadcast(value)
        return value

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if tensor in self._real:
            return
        if tensor in self._tied:
            self._real[cast("nn.Parameter", tensor)] = cast("nn.Parameter", tensor)
        tensor.data = tensor.data.to(self._device)
        if dist.get_world_size(self._group) > 1:
            whole = tensor.data.clone(memory_format=torch.contiguous_format)
            # As bytes: backends know few of the dtypes.
            dist.broadcast(whole.view(-1).view(torch.uint8), group=self._group, group_src=0)
            if _is_expanded(tensor):
                tensor.data = whole  # no value can be written where several elements share a place
            else:
                tensor.data.copy_(whole)

    def _initialise(self, name: str, child: nn.Module, computed: set[torch.Tensor]) -> None:
        tied = self._make_real(child)
        before: dict[torch.Tensor, torch.Tensor] = {parameter: parameter.detach().clone() for parameter in tied}
        if not self._read_pretrained(name, child):
            with _kept(computed):
                self._call_initialiser(name, child)
            self._read_pretrained(name, child)  # some of its tensors may have weights
        _put_back(before)
        _check_filled(name, child)

    def _make_real(self, child: nn.Module) -> list[nn.Parameter]:
        """Replace meta tensors by real ones full of NaN; return those that another module has filled already."""
        tied = []
        for key, parameter in list(child.named_parameters(recurse=False)):
            if parameter in self._real:
                tied.append(self._real[parameter])
                setattr(child, key, self._real[parameter])
            elif parameter.is_meta:
                real = nn.Parameter(_unfilled(parameter, self._device), requires_grad=parameter.requires_grad)
                if parameter in self._tied:
                    self._real[parameter] = real
                setattr(child, key, real)
        for key, buffer in list(child.named_buffers(recurse=False)):
            child._buffers[key] = _unfilled(buffer, self._device) if buffer.is_meta else buffer.to(self._device)
        return tied

    def _read_pretrained(self, name: str, child: nn.Module) -> bool:
        """Fill what pretrained weights there are; return whether that was everything."""
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        found = [self._read_tensor(f"{name}.{key}" if name else key, tensor) for key, tensor in own]
        return all(found)

    @torch.no_grad()
    def _read_tensor(self, name: str, tensor: torch.Tensor) -> bool:
        for owner, weights in self._pretrained.items():
            inside = name.removeprefix(f"{owner}.") if owner else name
            if (not owner or name.startswith(f"{owner}.")) and inside in weights.files:
                tensor.copy_(weights.read(inside))
                return True
        return False

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
    own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
    for key, tensor in own:
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.detach().isnan().any()):
            raise ConfigError(
                f"{name + '.' if name else ''}{key} of {type(child).__name__} was built on the meta device, and "
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
