"""`deepspeed.ops.adagrad`: torch's Adagrad under the name of DeepSpeed's kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from meshbolt.errors import UnsupportedError


class DeepSpeedCPUAdagrad(Optimizer):
    """Makes torch's Adagrad; where its state lies is said by offload_optimizer in the JSON."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> torch.optim.Adagrad:
        """Make the optimizer.

        Args:
            model_params: parameters or groups of them.
            lr: the learning rate.
            eps: added to the root of the sum.
            weight_decay: added to the gradient.
            amsgrad: False: Adagrad has nothing of the kind.

        Raises:
            UnsupportedError: `amsgrad` is True.
        """
        if amsgrad:
            raise UnsupportedError("DeepSpeedCPUAdagrad(amsgrad=True): Adagrad has nothing of the kind. Leave it out.")
        return torch.optim.Adagrad(model_params, lr=lr, eps=eps, weight_decay=weight_decay)
