"""Start ranks as functions (notebooks), and bring the trained weights back to the process that started them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from meshbolt.strategies.compat import TrainerForkLauncher

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy


class CollectingLauncher(TrainerForkLauncher):
    """Lightning's launcher for functions; results leave a rank as whole tensors, which a process without ranks can read."""

    def __init__(self, strategy: ParallelStrategy, *, start_method: Any) -> None:
        """Prepare to start ranks.

        Args:
            strategy: whose ranks are started.
            start_method: "fork", "spawn" or "forkserver".
        """
        super().__init__(strategy, start_method=start_method)

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        module = trainer.lightning_module
        whole = {name: _whole(value) for name, value in trainer.strategy.lightning_module_state_dict().items()}
        module.__dict__["state_dict"] = lambda *_, **__: whole
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            del module.__dict__["state_dict"]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.detach().full_tensor().cpu()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
