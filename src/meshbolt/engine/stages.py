"""What of a module this rank holds, where a pipeline divides its stages among ranks; by default all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.pipeline import Elsewhere, is_foreign
from meshbolt.zero import UnitPlan


@dataclass(frozen=True, kw_only=True)
class Stages:
    """This rank's part of a module.

    Attributes:
        elsewhere: names of the parameters that only other ranks of the pipeline hold.
        holders: who holds them, in words for messages.
        called_in: where the module can be called, in words.
        around: modules that hold the beginning of a stage inside of them, which no unit can be.
        of_units: the stage, of this rank's, of each module that begins with a name.
        tied: by name, the ranks of the pipeline that hold a parameter which several hold.
        pipeline: the ranks of the pipeline.
        group: the ranks that hold parts of the same parameters; None: all.
    """

    elsewhere: frozenset[str] = frozenset()
    holders: Mapping[str, str] = field(default_factory=dict)
    called_in: str = "a step"
    around: frozenset[str] = frozenset()
    of_units: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pipeline: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    _foreign: Elsewhere = field(default_factory=Elsewhere, repr=False)
    _made: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)  # by name: what is let go of must be free

    def parameters_elsewhere(self, module: nn.Module) -> frozenset[nn.Parameter]:
        """Return the parameters of a module that other ranks hold, as they are now."""
        named = module.named_parameters(remove_duplicate=False) if self.elsewhere else ()
        return frozenset(parameter for name, parameter in named if name in self.elsewhere)

    def without_cuts(self, units: UnitPlan, module: nn.Module) -> UnitPlan:
        """Return units without those in which a stage begins, and without the blocks of others.

        Args:
            units: of the whole module.
            module: the module.
        """
        others = self.parameters_elsewhere(module)
        kept = {name: unit for name, unit in units.units.items() if name not in self.around}
        blocks = {name: block for name, block in units.blocks.items() if _is_here(block, others)}
        return dataclasses.replace(units, units=kept, blocks={n: b for n, b in blocks.items() if n not in self.around})

    def leave_others(self, name: str, child: nn.Module, *, ties: Mapping[str, str], device: torch.device) -> None:
        """Let go of a module's own parameters that other ranks hold; what stands in their places has no values.

        Args:
            name: of the module.
            child: the module.
            ties: the first name of each parameter that has several, by each of them, so that it stays one.
            device: where computations with them would take place.
        """
        for key in list(child._parameters) if self.elsewhere else ():
            full = f"{name}.{key}" if name else key
            if full in self.elsewhere:
                self.leave(child, key, first=ties.get(full, full), device=device)

    def leave(self, child: nn.Module, key: str, *, first: str, device: torch.device) -> None:
        """Let go of one parameter of a module.

        Args:
            child: the module.
            key: of the parameter in it.
            first: the parameter's first name in the whole module.
            device: where computations with it would take place.
        """
        parameter = child._parameters[key]
        if parameter is None or is_foreign(parameter):
            return
        if first not in self._made:
            holder = self.holders.get(first, "")
            foreign = self._foreign.stand_in(first, parameter, holder=holder, device=device)
            self._made[first] = nn.Parameter(foreign, requires_grad=parameter.requires_grad)
        # By assignment: recurrent layers keep a list of their parameters.
        setattr(child, key, self._made[first])


def _is_here(block: nn.Module, others: frozenset[nn.Parameter]) -> bool:
    return not others or any(parameter not in others for parameter in block.parameters())
