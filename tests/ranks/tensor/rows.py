"""A table of computations, each done on whole tensors and on parts of them; both have to agree, gradients too.

A row is one line: a function, and what it is called on. `split(...)` is a tensor of which each rank has a part, `plain(...)` one
that every rank has; both get gradients where their dtype can have them.
"""

from __future__ import annotations

import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import own_part
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.split import SplitTensor, gathered

TOLERANCE = 1e-12
# Gradients of float32 operands are sums of some hundred numbers, in another order.
TOLERANCE_OF_FLOAT32 = 5e-6

SPLIT, WHOLE, GATHERED = "split", "whole", "gathered"


@dataclass(frozen=True)
class Operand:
    """What a row is called on; `layout` None is a whole tensor."""

    shape: tuple[int, ...]
    layout: Layout | None = None
    dtype: torch.dtype = torch.float64
    kind: str = "signed"
    below: int = 0

    def make(self, generator: torch.Generator) -> Tensor:
        if self.below:
            return torch.randint(0, self.below, self.shape, generator=generator, dtype=self.dtype)
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) > 0.4
        real = torch.float64
        value = 0.05 + 0.9 * torch.rand(self.shape, generator=generator, dtype=real)
        if self.kind == "signed":
            value = torch.where(torch.rand(self.shape, generator=generator) > 0.5, value, -value)
        if self.dtype.is_complex:
            value = torch.complex(value, torch.rand(self.shape, generator=generator, dtype=real))
        return value.to(self.dtype)


def split(*shape: int, dim: int, sections: int = 1, **options: Any) -> Operand:
    return Operand(shape, Layout(dim, sections), **options)


def plain(*shape: int, **options: Any) -> Operand:
    return Operand(shape, **options)


@dataclass(frozen=True)
class Row:
    """A computation: whether its results stay split, are whole on every rank, or are computed on gathered tensors."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Operand, ...]
    result: str = SPLIT


class _Seen(TorchFunctionMode):
    """Notes which functions of torch are called with split tensors."""

    def __init__(self, seen: set[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, SplitTensor) for leaf in tree_leaves((args, kwargs))):
            self.seen.add(func)
        return func(*args, **(kwargs or {}))


def run_rows(rows: Sequence[Row], rules: Sequence[Any] = ()) -> tuple[dict[str, str], list[str]]:
    """Compute all rows; return what is wrong by row, and the functions of `rules` that none has called."""
    axis, seen, wrong = Axis(dist.group.WORLD), set(), {}
    for row in rows:
        try:
            if faults := _faults(row, axis, seen):
                wrong[row.name] = "\n".join(faults)
        except Exception:
            wrong[row.name] = traceback.format_exc()
    return wrong, [getattr(rule, "__qualname__", str(rule)) for rule in rules if rule not in seen]


def _faults(row: Row, axis: Axis, seen: set[Any]) -> list[str]:
    generator = torch.Generator().manual_seed(zlib.crc32(row.name.encode()))
    values = [operand.make(generator) for operand in row.operands]
    wholes = [_leaf(value) for value in values]
    parts = [
        _leaf(value if operand.layout is None else own_part(value, operand.layout, axis))
        for operand, value in zip(row.operands, values, strict=True)
    ]
    given = [
        part if operand.layout is None else SplitTensor(part, operand.layout, axis)
        for operand, part in zip(row.operands, parts, strict=True)
    ]
    torch.manual_seed(3)
    expected = _tensors(row.function(*wholes))
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught, _Seen(seen):
        warnings.simplefilter("always")
        computed = _tensors(row.function(*given))
    faults = _unlike(row, computed, caught)
    faults += _differences("value", expected, [gathered(tensor) for tensor in computed])
    if faults or not any(tensor.requires_grad for tensor in expected):
        return faults
    pairs = [(e, gathered(c)) for e, c in zip(expected, computed, strict=True) if e.requires_grad]
    seeds = [torch.randn(e.shape, generator=generator, dtype=e.dtype) for e, _ in pairs]
    torch.autograd.backward([e for e, _ in pairs], seeds)
    torch.autograd.backward([c for _, c in pairs], seeds)
    wanted = [
        None if w.grad is None else w.grad if operand.layout is None else own_part(w.grad, operand.layout, axis)
        for operand, w in zip(row.operands, wholes, strict=True)
    ]
    for number, (want, part) in enumerate(zip(wanted, parts, strict=True)):
        if (want is None) != (part.grad is None):
            faults.append(f"gradient {number} is {part.grad}, not {want}")
        elif want is not None:
            faults += _differences(f"gradient {number}", [want], [part.grad])
    return faults


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach().clone(memory_format=torch.contiguous_format)
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _unlike(row: Row, computed: Sequence[Tensor], caught: Iterable[Any]) -> list[str]:
    messages = [str(one.message) for one in caught if "gathered over" in str(one.message)]
    kinds = {isinstance(tensor, SplitTensor) for tensor in computed}
    if row.result == GATHERED:
        return [] if messages else ["was not gathered"]
    faults = [f"gathered: {message}" for message in messages]
    return faults if kinds == {row.result == SPLIT} else [*faults, f"results are split: {kinds}"]


def _differences(what: str, expected: Sequence[Tensor], computed: Sequence[Tensor]) -> list[str]:
    if len(expected) != len(computed):
        return [f"{what}: {len(computed)} tensors, not {len(expected)}"]
    faults = []
    for number, (want, have) in enumerate(zip(expected, computed, strict=True)):
        if (want.shape, want.dtype, want.requires_grad) != (have.shape, have.dtype, have.requires_grad):
            faults.append(
                f"{what} {number} is {tuple(have.shape)} {have.dtype} {have.requires_grad}, "
                f"not {tuple(want.shape)} {want.dtype} {want.requires_grad}"
            )
        elif not torch.equal(want.isnan(), have.isnan()):
            faults.append(f"{what} {number} has other NaNs")
        elif want.numel() and (off := _distance(want, have)) > _tolerance(want):
            faults.append(f"{what} {number} is off by {off}")
    return faults


def _tolerance(want: Tensor) -> float:
    return TOLERANCE_OF_FLOAT32 if want.dtype == torch.float32 else TOLERANCE


def _distance(want: Tensor, have: Tensor) -> float:
    want, have = want.detach(), have.detach()
    if not (want.is_floating_point() or want.is_complex()):
        return float((want != have).any())
    same = want == have  # infinities of the same sign among them
    return float((want - have).abs().masked_fill(same, 0).nan_to_num(0.0, posinf=float("inf")).max())
