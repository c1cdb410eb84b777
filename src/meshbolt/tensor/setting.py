"""Tensor parallelism as the user writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshbolt.errors import ConfigError

NODE = "node"
"""A size: as many ranks as there are on one machine."""


@dataclass(frozen=True)
class TensorParallel:
    """How single layers are divided among ranks.

    Attributes:
        size: ranks that share each layer; "node": as many as one machine has.
        plan: "auto" (a registered plan, else the model's own `_tp_plan`, else one found by tracing the model), the name of a
            registered plan, "_tp_plan" or "traced" for one of the others alone, or a mapping from patterns of module names to
            styles, such as `{"layers.*.attention.query": "colwise", "layers.*.attention.out": "rowwise"}`.
        sequence_parallel: divide activations between parallel layers along the sequence; "auto": where the plan supports it
            and the length divides, True insists, False never does.
        loss_parallel: leave the logits divided by classes for the loss, where the head is in the plan.
    """

    size: int | str = 1
    plan: str | dict[str, str] = "auto"
    sequence_parallel: bool | str = "auto"
    loss_parallel: bool = False

    def __post_init__(self) -> None:
        is_number = isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 1
        if not is_number and self.size != NODE:
            raise ConfigError(
                f"tensor_parallel={self.size!r} is not a number of ranks. Use 1 or more, or {NODE!r} for those of one machine."
            )
        if isinstance(self.plan, Mapping):
            wrong = next((item for item in self.plan.items() if not all(isinstance(each, str) for each in item)), None)
            if wrong is not None or not self.plan:
                raise ConfigError(
                    f"TensorParallel(plan={self.plan!r}) is to map patterns of module names to styles, each a string."
                )
        elif not isinstance(self.plan, str) or not self.plan:
            raise ConfigError(
                f"TensorParallel(plan={self.plan!r}) is neither a name of a plan nor a mapping from patterns to styles."
            )
        if self.sequence_parallel not in (True, False, "auto"):
            raise ConfigError(
                f"TensorParallel(sequence_parallel={self.sequence_parallel!r}) is unknown. Use True, False or 'auto'."
            )
        if not isinstance(self.loss_parallel, bool):
            raise ConfigError(f"TensorParallel(loss_parallel={self.loss_parallel!r}) is a switch. Use True or False.")
        if self.size == 1 and (self.plan, self.sequence_parallel, self.loss_parallel) != ("auto", "auto", False):
            raise ConfigError(
                "TensorParallel(size=1) shares layers among one rank, which leaves nothing for its other settings to say. Give "
                "a size of 2 or more, or leave tensor_parallel out."
            )
