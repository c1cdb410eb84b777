"""`deepspeed.ops.adam`: torch's Adam and AdamW under the names of DeepSpeed's kernels, with their defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from meshbolt.errors import UnsupportedError


class FusedAdam(Optimizer):
    """Makes torch's AdamW, or its Adam with `adam_w_mode=False`; it runs on shards, wherever they lie."""

    def __new__(  # type: ignore[misc]
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> torch.optim.Adam:
        """Make the optimizer.

        Args:
            params: parameters or groups of them.
            lr: the learning rate.
            bias_correction: True: torch always corrects.
            betas: decay of the two moments.
            eps: added to the root of the second.
            adam_w_mode: decouple weight decay from the gradient.
            weight_decay: 0 unless it is given, unlike torch's AdamW.
            amsgrad: as torch has it; DeepSpeed's kernel does not.
            set_grad_none: True: gradients are dropped, not filled with zeros.

        Raises:
            UnsupportedError: `bias_correction` or `set_grad_none` is False.
        """
        if not bias_correction or not set_grad_none:
            what = "bias_correction=False: torch always corrects" if not bias_correction else "set_grad_none=False"
            raise UnsupportedError(f"{cls.__name__}({what}). Leave it out.")
        kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
        return kind(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


class DeepSpeedCPUAdam(Optimizer):
    """Makes torch's AdamW, or its Adam with `adamw_mode=False`; where its state lies is said by offload_optimizer in the JSON."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Adam:
        """Make the optimizer; arguments as of `FusedAdam`.

        Raises:
            UnsupportedError: `bias_correction` or `fp32_optimizer_states` is False.
        """
        if not fp32_optimizer_states:
            raise UnsupportedError(
                "DeepSpeedCPUAdam(fp32_optimizer_states=False): state has the dtype of its parameters. Leave it out, or make "
                "both bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states true in the JSON."
            )
        kept: dict[str, Any] = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        return FusedAdam(model_params, adam_w_mode=adamw_mode, weight_decay=weight_decay, amsgrad=amsgrad, **kept)
