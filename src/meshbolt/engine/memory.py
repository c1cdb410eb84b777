"""What of a rank's memory the engine knows to the byte: parameters, gradients, optimizer state, whole parameters, buffers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from meshbolt import compat
from meshbolt.compat import local_tensor, storage_identity
from meshbolt.engine.compose import ROOT
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.offload.held import column_storages, held_by

if TYPE_CHECKING:
    from meshbolt.engine.engine import Engine

Category = Literal["parameters", "gradients", "optimizer", "gathered", "buffers"]
CATEGORIES: tuple[Category, ...] = ("parameters", "gradients", "optimizer", "gathered", "buffers")
Tier = Literal["device", "host", "file"]


_PASSING: tuple[Category, ...] = ("gradients", "gathered")


class Held(NamedTuple):
    """Something that takes memory.

    Attributes:
        category: what it is.
        tier: where it lies; on a CPU, host memory is the device's.
        owner: the name of its parameter or of its module, or what it is for.
        num_bytes: of its whole storage, with padding.
    """

    category: Category
    tier: Tier
    owner: str
    num_bytes: int


class HeldMemory:
    """What a rank holds at one moment.

    Args:
        held: each storage once.
    """

    def __init__(self, held: Iterable[Held]) -> None:
        self.held = [each for each in held if each.num_bytes]

    def total(self, category: Category | None = None, *, tier: Tier = "device") -> int:
        """Return the bytes in a tier.

        Args:
            category: only these; None: all.
            tier: the place.
        """
        return sum(h.num_bytes for h in self.held if h.tier == tier and category in (None, h.category))

    def without(self, category: Category) -> HeldMemory:
        """Return all but what is of a category."""
        return HeldMemory(each for each in self.held if each.category != category)

    def by_owner(self, owners: Iterable[str], *, tier: Tier = "device") -> Mapping[str, Mapping[Category, int]]:
        """Return the bytes of each module, the largest first.

        Args:
            owners: names of modules that are told apart, such as the units; what is in none of them counts for the first part of
                its own name.
            tier: the place.
        """
        names = sorted(owners, key=len, reverse=True)
        found: defaultdict[str, dict[Category, int]] = defaultdict(dict)
        for each in self.held:
            if each.tier == tier:
                inside = (name for name in names if each.owner == name or each.owner.startswith(f"{name}."))
                of_owner = found[next(inside, each.owner.split(".")[0])]
                of_owner[each.category] = of_owner.get(each.category, 0) + each.num_bytes
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def held_memory(engine: Engine, optimizers: Iterable[Optimizer], *, before: HeldMemory | None = None) -> HeldMemory:
    """Return what a rank holds now, each storage once; nothing is waited for.

    Args:
        engine: of its module.
        optimizers: of the run.
        before: what it held when the step began; what does not come and go in a step is taken from there.
    """
    count = _Count(engine)
    if before is None:
        return HeldMemory([*count.passing(), *count.lasting(optimizers)])
    return HeldMemory([*count.passing(), *(each for each in before.held if each.category not in _PASSING)])


def gathered_bytes(engine: Engine) -> int:
    """Return what whole parameters take now that are gathered."""
    # Asked often; what passes between ranks is shared by all units.
    storages = {storage_identity(t): t for unit in units_of(engine).values() for t in compat.gathered_tensors(unit)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def unit_bytes(engine: Engine) -> Mapping[str, int]:
    """Return what the whole parameters of each unit take while they are gathered, by its name; the root's is `ROOT`."""
    found = {}
    for name, unit in units_of(engine).items():
        cast = compat.cast_dtype(unit)
        own = compat.managed_parameters(unit)
        found[name] = sum(p.numel() * (p.element_size() if cast is None else cast.itemsize) for p in own)
    return found


def units_of(engine: Engine) -> Mapping[str, FSDPModule]:
    """Return what gathers parameters, by name."""
    return {ROOT: engine._root, **engine._units}


class _Count:
    """Counts each storage once, for the first that has it.

    Args:
        engine: whose.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._units = units_of(engine)
        self._names: dict[nn.Parameter, str] = {p: name for name, p in engine.parameters_by_name.items()}
        self._seen: set[int] = set()

    def passing(self) -> Iterator[Held]:
        """Yield what comes and goes in a step."""
        yield from self._gradients()
        for name, unit in self._units.items():
            for tensor in compat.gathered_tensors(unit):
                yield from self._one("gathered", name, tensor)

    def lasting(self, optimizers: Iterable[Optimizer]) -> Iterator[Held]:
        """Yield everything else."""
        yield from self._parameters()
        for optimizer in optimizers:
            yield from self._optimizer(optimizer)
        for name, buffer in self._engine.module.named_buffers():
            yield from self._one("buffers", name, buffer)

    def _parameters(self) -> Iterator[Held]:
        file = self._engine._hosted.file
        in_file = {p for unit in self._units.values() for p in compat.managed_parameters(unit)} if file else set()
        for parameter, name in self._names.items():
            yield from self._one("parameters", name, parameter, tier="file" if parameter in in_file else None)
        if file is not None:
            yield Held("parameters", self._tier("cpu"), "buffers of files", file.buffer_bytes)

    def _gradients(self) -> Iterator[Held]:
        for parameter, name in self._names.items():
            if parameter.grad is not None:
                yield from self._one("gradients", name, parameter.grad)
        for name, unit in self._units.items():
            for shard, gradient in compat.whole_gradients(unit):
                yield from self._one("gradients", name if shard is None else self._names.get(shard, name), gradient)

    def _optimizer(self, optimizer: Optimizer) -> Iterator[Held]:
        steps = self._engine._offloaded
        offloaded = steps.of(optimizer) if optimizer in steps else None
        if offloaded is not None:
            # What `state` shows of it are views.
            self._seen |= column_storages(offloaded)
            for place, owner, num_bytes in held_by(offloaded):
                yield Held("optimizer", self._tier("cpu") if place == "host" else place, owner, num_bytes)
        names: Mapping[Any, str] = self._names
        # Another thread may be updating, and put state there.
        for parameter, state in list(optimizer.state.items()):
            for value in list(state.values()) if isinstance(state, dict) else ():
                if isinstance(value, torch.Tensor):
                    yield from self._one("optimizer", names.get(parameter, "the optimizer"), value)

    def _one(self, category: Category, owner: str, tensor: torch.Tensor, *, tier: Tier | None = None) -> Iterator[Held]:
        if held_elsewhere(tensor):
            return
        local = local_tensor(tensor)
        storage = local.untyped_storage()
        identity = storage._cdata
        if identity not in self._seen:
            self._seen.add(identity)
            yield Held(category, tier or self._tier(local.device.type), owner, storage.nbytes())

    def _tier(self, device_type: str) -> Tier:
        return "host" if device_type == "cpu" and self._engine.device.type != "cpu" else "device"
