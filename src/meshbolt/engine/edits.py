"""What user code changes in gathered parameters, carried over to the shards.

While a unit is gathered, its parameters are whole copies in the user's eyes: in `training_step`, and in the hooks between two
batches of a window. A change made there in place (weights that are clamped or normalised) would be freed with the copy, without
a word. So before copies are freed, this rank's part of each is compared with its shard, and what differs is taken over. Every
rank takes its own part, and nothing is communicated: like any code that changes parameters, the edit has to be the same on all.

`requires_grad` can be changed on either: on a copy by `module.requires_grad_`, on a shard by who holds the optimizer.

Data that is given by assignment (`p.data = p.data * 0.5`) would reach neither the shard nor the buffer that the next gather
fills. It is refused, wherever it is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshbolt import compat
from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import own_part_of_copy
from meshbolt.errors import UnsupportedError


class Edits:
    """Knows where in the user's module each parameter stands, and takes over what was changed there."""

    def __init__(self, module: nn.Module, *, units: Iterable[FSDPModule] = ()) -> None:
        """Note the places of all parameters.

        Args:
            module: sharded, with nothing gathered.
            units: all of them, the root too.
        """
        self._places: dict[nn.Parameter, tuple[dict[str, nn.Parameter | None], str]] = {
            parameter: (child._parameters, key)
            for child in module.modules()
            for key, parameter in child._parameters.items()
            if parameter is not None
        }
        # By shard, what it is compared with: torch empties and fills the same tensors, so that views of them stay good.
        self._parts: dict[nn.Parameter, _Part] = {}
        self._trained = {parameter: parameter.requires_grad for parameter in self._places}
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._identities = {p: compat.storage_identity(p) for p in self._places if isinstance(p, DTensor)}
        # By shard, of copies that are divided among the ranks that share a layer. To look at them tells nothing of whether they
        # were given other data, so that they are noted where they are gathered for the first time.
        self._divided: dict[nn.Parameter, int] = {}
        self._watch_divided(units)

    @torch.no_grad()
    def keep(self, units: Iterable[FSDPModule]) -> None:
        """Take over what differs from the shards in those of the units that are gathered.

        A copy is compared in the dtype in which it was gathered: what nobody has changed is not rounded.

        Args:
            units: to look at.

        Raises:
            UnsupportedError: a copy was given other data by assignment.
        """
        for unit in units:
            if compat.is_gathered(unit):
                self._refuse(compat.given_other_data(unit))
                self._refuse(
                    [
                        shard
                        for shard, copy in compat.copies_by_shard(unit)
                        if self._divided.get(shard, 0) not in (0, compat.storage_identity(copy))
                    ]
                )
                for shard in compat.managed_parameters(unit):
                    self._keep(shard)

    def _watch_divided(self, units: Iterable[FSDPModule]) -> None:
        def note(unit: Any, *_: Any) -> None:
            for shard, copy in compat.copies_by_shard(unit):
                if isinstance(copy, DTensor):
                    self._divided.setdefault(shard, compat.storage_identity(copy))

        for unit in units:
            if any(isinstance(p, DTensor) and "tp" in _axes(p) for p in compat.managed_parameters(unit)):
                cast("nn.Module", unit).register_forward_pre_hook(note)

    def refuse_other_data(self) -> None:
        """Refuse shards that were given other data by assignment.

        Raises:
            UnsupportedError: there is one.
        """
        self._refuse([p for p, identity in self._identities.items() if compat.storage_identity(p) != identity])

    def _refuse(self, parameters: list[nn.Parameter]) -> None:
        if parameters:
            raise UnsupportedError(
                f"Parameter {self._names[parameters[0]]!r} was given other data by assignment (p.data = ...), which a sharded "
                "parameter does not take. Change it in place under torch.no_grad(): p.mul_(0.5), p.copy_(new); or hold whole "
                "tensors with strategy.gathered(module) and change those in place."
            )

    def follow_requires_grad(self, units: Iterable[FSDPModule]) -> None:
        """Make shards and copies agree on `requires_grad` again, after it was changed on either.

        Args:
            units: to look at.
        """
        for unit in units:
            for shard in compat.managed_parameters(unit):
                whole = self._whole(shard)
                if whole is not shard and whole.requires_grad != shard.requires_grad:
                    wanted = not self._trained[shard]
                    shard.requires_grad_(wanted)
                    whole.requires_grad_(wanted)
                self._trained[shard] = shard.requires_grad

    def shards_of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the shards of parameters, whose gradients are the ones that count.

        Args:
            parameters: each a shard, or what stands in the module while it is gathered.
        """
        standing = {id(self._whole(shard)): shard for shard in self._places}
        return [standing.get(id(parameter), parameter) for parameter in parameters]

    def _whole(self, shard: nn.Parameter) -> nn.Parameter:
        """Return what stands in the module now: the whole copy, or the shard where it is not gathered."""
        standing, key = self._places[shard]
        whole = standing[key]
        return shard if whole is None else whole

    def _keep(self, shard: nn.Parameter) -> None:
        whole = self._whole(shard)
        if whole is shard or whole.shape != shard.shape or not isinstance(shard, DTensor):
            return
        mine, known = local_tensor(shard), self._parts.get(shard)
        if known is None or known.whole is not whole or known.mine is not mine:
            known = self._parts[shard] = _Part(whole, like=shard)
        known.take_over()


def _axes(parameter: DTensor) -> tuple[str, ...]:
    return parameter.device_mesh.mesh_dim_names or ()


class _Part:
    """This rank's part of a whole copy, beside the shard that it was gathered from."""

    def __init__(self, whole: nn.Parameter, *, like: DTensor) -> None:
        self.whole, self.mine = whole, local_tensor(like)
        # Of a layer that is divided, the whole copy is whole over the data-parallel ranks only.
        self._part = part = own_part_of_copy(whole.detach(), like=like)
        # A CPU knows at once whether anything differs; a GPU is not waited for.
        self._is_on_cpu = self.mine.device.type == part.device.type == "cpu"
        is_plain = part.dtype == self.mine.dtype and part.is_contiguous() and self.mine.is_contiguous()
        self._same = compat.same_bytes if is_plain else torch.equal

    def take_over(self) -> None:
        """Copy what differs into the shard."""
        part = self._part
        # Shards that lie on the host go to the GPU for this, where the copy is.
        as_gathered = self.mine.to(part.device, part.dtype)
        if self._is_on_cpu and self._same(part, as_gathered):
            return
        if self.mine.device != part.device:
            if not torch.equal(part, as_gathered):
                self.mine.copy_(torch.where(part == as_gathered, self.mine.to(part.device), part.to(self.mine.dtype)))
            return
        same = part == as_gathered
        self.mine.copy_(torch.where(same, self.mine, part.to(self.mine.dtype)))
