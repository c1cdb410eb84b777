"""Which optimizers run on shards, and how.

An elementwise optimizer updates each number from that number's own gradient and state, so it may run on this rank's shards as
plain tensors: the same result as on whole parameters, without DTensor's dispatch on every operation. Classes that are proved
elementwise are listed by exact class. Any other class runs on DTensors, whose operations mean whole tensors; those that cannot
are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from meshbolt.compat import local_tensor
from meshbolt.errors import UnsupportedError

ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.ASGD,
    }
)

_WHOLE_MATRIX = "it looks at whole matrices, and would be wrong on shards"
REFUSED: dict[str, str] = {
    "Adafactor": _WHOLE_MATRIX,
    "Muon": _WHOLE_MATRIX,
    "LBFGS": "it flattens all parameters into one vector and evaluates the loss several times a step",
    "SparseAdam": "it needs sparse gradients, which are reduced as dense ones",
}


def check_optimizer(optimizer: Optimizer, *, sharded: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer that cannot train the sharded module.

    Args:
        optimizer: the user's, made on the sharded parameters.
        sharded: the module's parameters as they are after sharding.

    Raises:
        UnsupportedError: its class cannot run on shards, or it holds parameters from before sharding.
    """
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("torch.optim") and kind.__name__ in REFUSED:
            raise UnsupportedError(
                f"{type(optimizer).__name__} cannot run on sharded parameters: {REFUSED[kind.__name__]}. Use an elementwise "
                f"optimizer instead: {', '.join(sorted(known.__name__ for known in ELEMENTWISE))}."
            )
    known = {id(parameter) for parameter in sharded}
    strangers = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise UnsupportedError(
            f"{type(optimizer).__name__} holds {strangers} tensors that are not parameters of the sharded module, so its steps "
            "would change nothing. Make it from the module's parameters after sharding: in configure_optimizers, or after "
            "fabric.setup_module."
        )


def step(optimizer: Optimizer, **kwargs: Any) -> Any:
    """Take one optimizer step, on local shards where its class is proved elementwise.

    Args:
        optimizer: made on sharded parameters.
        kwargs: further arguments of its `step`.
    """
    if type(optimizer) not in ELEMENTWISE:
        return optimizer.step(**kwargs)
    with _on_local_shards(optimizer):
        return optimizer.step(**kwargs)


@contextmanager
def _on_local_shards(optimizer: Optimizer) -> Iterator[None]:
    """Show the optimizer plain tensors that share their storage with the shards, for the time of one step."""
    groups = [group["params"] for group in optimizer.param_groups]
    state: Any = optimizer.state
    pairs = [(p, _stand_in(p)) for params in groups for p in params]
    stand_ins = dict(pairs)
    for parameter, stand_in in pairs:
        if parameter in state:
            # Adagrad makes its state at construction, from the DTensors it is given.
            state[stand_in] = _local_values(state.pop(parameter))
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [stand_ins[p] for p in params]
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params
        for parameter, stand_in in pairs:
            if stand_in is not parameter:
                stand_in.grad = None  # the stand-in lives on, and the gradient is not to
                if stand_in in state:
                    state[parameter] = state.pop(stand_in)


def _local_values(values: dict[str, Any]) -> dict[str, Any]:
    if not any(isinstance(value, DTensor) for value in values.values()):
        return values
    return {key: local_tensor(value) if isinstance(value, DTensor) else value for key, value in values.items()}


# By shard: what was made for it in an earlier step, which takes longer than all the rest around a step.
_STAND_INS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    local = local_tensor(parameter)
    known: nn.Parameter | None = _STAND_INS.get(parameter)
    if known is None or not _is_over(local, known) or known.requires_grad != parameter.requires_grad:
        known = _STAND_INS[parameter] = nn.Parameter(local, requires_grad=parameter.requires_grad)
    known.grad = None if parameter.grad is None else local_tensor(parameter.grad)
    return known


def _is_over(local: torch.Tensor, known: nn.Parameter) -> bool:
    return known.data_ptr() == local.data_ptr() and known.shape == local.shape and known.dtype == local.dtype
