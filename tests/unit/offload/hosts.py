"""Optimizers whose state lies outside of their model, beside the same ones as torch runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import PAGE_BYTES

Make = Callable[[Sequence[nn.Parameter]], Optimizer]

# Odd sizes, one that is larger than the chunks of these tests, one without elements, and many tiny ones.
SHAPES: list[tuple[int, ...]] = [(17, 3), (5000,), (0, 4), (1,), (33, 65), *[(n,) for n in range(1, 40)]]

FUSED: dict[str, Make] = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, fused=True),
    "adam amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "adamw maximize": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.8, 0.9), maximize=True, fused=True),
    "adamw lr tensor": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=0.1, fused=True),
    "sgd momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.3, fused=True),
    "sgd nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, maximize=True, fused=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5, fused=True),
}
OWN_CLASS: dict[str, Make] = {
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.5),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01, t0=2.0),
    "adamax foreach": lambda ps: torch.optim.Adamax(ps, lr=0.01, foreach=True),
}


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: Sequence[nn.Parameter], step: int, *, without: Sequence[int] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if number in without else gradient


@contextmanager
def offloaded(optimizer: Optimizer, **options: Any) -> Iterator[OffloadedOptimizer]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    options = {"chunk_bytes": PAGE_BYTES, "threads": 2, **options}
    units = options.pop("units", {"first": params[: len(params) // 2], "second": params[len(params) // 2 :]})
    host = OffloadedOptimizer(optimizer, units=units, **options)
    try:
        yield host
    finally:
        host.close()


def assert_same(mine: Optimizer, theirs: Optimizer, *, exactly: bool = True) -> None:
    tolerance: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
    pairs = [
        (a, b)
        for ours, other in zip(mine.param_groups, theirs.param_groups, strict=True)
        for a, b in zip(ours["params"], other["params"], strict=True)
    ]
    for number, (a, b) in enumerate(pairs):
        torch.testing.assert_close(a, b, msg=lambda text, n=number: f"parameter {n}: {text}", **tolerance)
        assert set(mine.state[a]) == set(theirs.state[b]), number
        for key, value in theirs.state[b].items():
            if isinstance(value, torch.Tensor):
                own = mine.state[a][key]
                assert own.shape == value.shape
                torch.testing.assert_close(
                    own, value, msg=lambda text, k=key, n=number: f"{k} of {n}: {text}", **tolerance
                )
            else:
                assert mine.state[a][key] == value


def train(
    make: Make, *, steps: int = 4, dtype: torch.dtype = torch.float32, late: bool = True, **options: Any
) -> tuple[Optimizer, Optimizer]:
    """Take steps of two optimizers, one of them outside of its model.

    Args:
        late: some parameters get their first gradient in the second step only.
    """
    mine, theirs = make(parameters(dtype)), make(parameters(dtype))
    with offloaded(mine, **options) as host:
        for step in range(steps):
            for optimizer in (mine, theirs):
                without = {0: [0, 1, 7] if late else [], 2: [4]}.get(step, [])
                give_gradients(optimizer.param_groups[0]["params"], step, without=without)
            host.step()
            theirs.step()
    return mine, theirs
