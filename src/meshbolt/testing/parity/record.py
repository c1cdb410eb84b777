"""What a training run leaves behind to be compared: plain tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from meshbolt.compat import whole_of
from meshbolt.zero import Zero

Named = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Record:
    """One run.

    Attributes:
        initial: parameters before the first step.
        losses: of every batch, under `batch 3 on rank 1`.
        gradients: of every optimizer step before clipping, under `step 2: layer.weight`.
        parameters: after the last step.
        optimizer_state: after the last step, under `exp_avg of layer.weight`.
        settings: numbers in the optimizer's groups after the last step, under `lr of group 0`.
        buffers: after the last step, under `norm.running_mean on rank 1`.
        optimizer: class of the optimizer.
        zero: how the ranks divided the module and its gradients.
    """

    initial: Named = field(default_factory=dict)
    losses: Named = field(default_factory=dict)
    gradients: Named = field(default_factory=dict)
    parameters: Named = field(default_factory=dict)
    optimizer_state: Named = field(default_factory=dict)
    settings: Named = field(default_factory=dict)
    buffers: Named = field(default_factory=dict)
    optimizer: str = ""
    zero: Zero = field(default_factory=Zero)

    def add(self, other: Record) -> None:
        """Take over what another rank has noted.

        Args:
            other: of the same run.
        """
        for each in fields(self):
            if isinstance(noted := getattr(self, each.name), dict):
                noted.update(getattr(other, each.name))

    def add_loss(self, loss: torch.Tensor, *, batch: int, rank: int) -> None:
        """Note the loss that training_step returned."""
        self.losses[f"batch {batch} on rank {rank}"] = loss.detach().clone()

    def add_gradients(self, parameters: Mapping[str, torch.Tensor], *, step: int) -> None:
        """Note the gradients of all parameters that have one; sharded ones are gathered, so that all ranks must call."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.gradients[f"step {step}: {name}"] = whole(parameter.grad)

    def add_optimizer(self, state: Mapping[str, Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
        """Note an optimizer's state by parameter name, and the numbers in its groups."""
        for name, values in state.items():
            for key, value in values.items():
                if isinstance(value, (torch.Tensor, int, float)):
                    self.optimizer_state[f"{key} of {name}"] = whole(torch.as_tensor(value))
        for index, group in enumerate(groups):
            for key, value in group.items():
                if isinstance(value, (int, float)):
                    self.settings[f"{key} of group {index}"] = torch.tensor(float(value), dtype=torch.float64)

    def add_buffers(self, buffers: Iterable[tuple[str, torch.Tensor]], *, rank: int) -> None:
        """Note a rank's buffers."""
        self.buffers.update({f"{name} on rank {rank}": buffer.detach().clone() for name, buffer in buffers})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
    return whole_of(tensor) if isinstance(tensor, DTensor) else tensor.detach().clone()
