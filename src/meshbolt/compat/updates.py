"""torch's fused kernels of optimizer steps, on plain tensors: what `fused=True` calls, without the optimizer around it.

Each updates lists of tensors of one dtype and one device in place, in one call, and lets other threads of Python run meanwhile.
An element's result depends on whether it lies in the last, incomplete vector of its tensor: a tensor cut at multiples of 64 bytes
gets the same bits as the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

_Tensors = Sequence[torch.Tensor]


def fused_adam_(
    params: _Tensors,
    gradients: _Tensors,
    state: Mapping[str, list[torch.Tensor]],
    counts: _Tensors,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Update parameters by Adam or AdamW.

    Args:
        params: what is updated.
        gradients: one per parameter, of its dtype.
        state: "exp_avg", "exp_avg_sq" and, with amsgrad, "max_exp_avg_sq", one tensor per parameter each.
        counts: of steps, this one included, one per parameter; float32 scalars on the parameters' device. They are read only.
        settings: of a parameter group, with numbers in the place of tensors.
    """
    kernel = torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = settings["betas"]
    kernel(
        list(params),
        list(gradients),
        state["exp_avg"],
        state["exp_avg_sq"],
        state["max_exp_avg_sq"] if settings["amsgrad"] else [],
        list(counts),
        lr=settings["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        amsgrad=settings["amsgrad"],
        maximize=settings["maximize"],
    )


def fused_sgd_(
    params: _Tensors,
    gradients: _Tensors,
    momentum: list[torch.Tensor],
    *,
    settings: Mapping[str, Any],
    is_first: bool,
) -> None:
    """Update parameters by SGD.

    Args:
        params: what is updated.
        gradients: one per parameter, of its dtype.
        momentum: one per parameter, or none where the settings have no momentum.
        settings: of a parameter group, with numbers in the place of tensors.
        is_first: the momentum is to become the gradient, whatever it is now.
    """
    torch._fused_sgd_(
        list(params),
        list(gradients),
        momentum,
        weight_decay=settings["weight_decay"],
        momentum=settings["momentum"],
        lr=settings["lr"],
        dampening=settings["dampening"],
        nesterov=settings["nesterov"],
        maximize=settings["maximize"],
        is_first_step=is_first,
    )


def fused_adagrad_(
    params: _Tensors,
    gradients: _Tensors,
    sums: list[torch.Tensor],
    counts: _Tensors,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Update parameters by Adagrad.

    Args:
        params: what is updated.
        gradients: one per parameter, of its dtype.
        sums: of squares, one per parameter.
        counts: as in `fused_adam_`.
        settings: of a parameter group, with numbers in the place of tensors.
    """
    torch._fused_adagrad_(
        list(params),
        list(gradients),
        sums,
        list(counts),
        lr=settings["lr"],
        lr_decay=settings["lr_decay"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        maximize=settings["maximize"],
    )


def pin_host_memory(memory: torch.Tensor) -> bool:
    """Lock host memory in its place, so that a GPU reads and writes it by itself; return whether that could be done.

    torch's own allocator of such memory rounds large requests up to a power of two.

    Args:
        memory: on the CPU, contiguous; it is to stay locked until `unpin_host_memory`.
    """
    runtime: Any = torch.cuda.cudart()
    return int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0


def unpin_host_memory(memory: torch.Tensor) -> None:
    """Undo `pin_host_memory`; no copy of this memory may be under way."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())


def step_hooks(optimizer: Optimizer) -> tuple[int, int]:
    """Return how many hooks are called before a step of an optimizer, and how many after it.

    Args:
        optimizer: any.
    """
    before, after = of_torch._global_optimizer_pre_hooks, of_torch._global_optimizer_post_hooks
    return len(before) + len(optimizer._optimizer_step_pre_hooks), len(after) + len(
        optimizer._optimizer_step_post_hooks
    )


def add_step_hook(optimizer: Optimizer, hook: Callable[..., None]) -> None:
    """Have a function called before each step of an optimizer, once however often it is added.

    Args:
        optimizer: any.
        hook: as `Optimizer.register_step_pre_hook` takes it.
    """
    if hook not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(hook)
