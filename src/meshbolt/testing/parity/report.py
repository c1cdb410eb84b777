"""Compare two runs, and say how far they are apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meshbolt.errors import MeshboltError
from meshbolt.testing.parity.record import Named, Record

# What is compared, in the order in which a difference would first show.
QUANTITIES = ("initial", "losses", "gradients", "parameters", "optimizer_state", "settings", "buffers")
# The update of these follows the gradient's size, so that rounding noise in a gradient of zero stays noise.
_PROPORTIONAL = ("SGD", "ASGD")
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far two numbers may be apart: `atol + rtol * |reference|`.

    Attributes:
        rtol: relative part.
        atol: absolute part.
        zero_gradient: a gradient that never exceeds it counts as zero. An optimizer that divides by the gradient's size
            makes a step of full length out of rounding noise there, in any direction.
    """

    rtol: float
    atol: float
    zero_gradient: float


FLOAT64 = Limits(rtol=0.0, atol=1e-12, zero_gradient=1e-10)
FLOAT32 = Limits(rtol=1e-5, atol=1e-6, zero_gradient=1e-6)
SIXTEEN_BIT = Limits(rtol=0.0, atol=1e-6, zero_gradient=1e-6)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor that differs too much, or stands on one side only.

    Attributes:
        quantity: what kind of thing it is.
        name: which one.
        words: the two values, or what is missing.
        excess: difference over what is allowed; infinite where a tensor is missing or not finite.
    """

    quantity: str
    name: str
    words: str
    excess: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All tensors of one kind.

    Attributes:
        quantity: the kind.
        count: number of tensors.
        largest: largest absolute difference.
        where: the tensor that has it.
    """

    quantity: str
    count: int
    largest: float
    where: str


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How a run on several ranks compares with one process.

    Attributes:
        limits: what was allowed.
        comparisons: one for each kind of quantity.
        differences: what is not within the limits, by quantity, then by the step or batch it shows in, worst first; empty
            is parity.
        zero_gradients: parameters with elements whose true gradient is zero and that are not held to the limits, with the
            number of these elements.
    """

    limits: Limits
    comparisons: tuple[Comparison, ...]
    differences: tuple[Difference, ...]
    zero_gradients: Mapping[str, int]

    def __str__(self) -> str:
        """Return a table, what is excepted, and the worst differences."""
        lines = [f"{'quantity':<16}{'tensors':>8}  {'largest difference':<20}where"]
        lines += [f"{c.quantity:<16}{c.count:>8}  {c.largest:<20.3g}{c.where}" for c in self.comparisons]
        lines.append(f"allowed: {self.limits.atol:g} + {self.limits.rtol:g} * |one process|")
        if self.zero_gradients:
            named = ", ".join(f"{name} ({count})" for name, count in self.zero_gradients.items())
            lines.append(f"not compared after the step, as their true gradient is zero (elements): {named}")
        for comparison in self.comparisons:
            lines += self._worst(comparison.quantity)
        return "\n".join(lines)

    def _worst(self, quantity: str) -> list[str]:
        found = [each for each in self.differences if each.quantity == quantity]
        lines = [f"{quantity}: {each.name}: {each.words}" for each in found[:_SHOWN]]
        return [*lines, f"{quantity}: ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else lines


class ParityError(MeshboltError, AssertionError):
    """Training on several ranks differs from training in one process.

    Attributes:
        report: the comparison.
    """

    def __init__(self, report: ParityReport, *, case: str) -> None:
        """Make the message.

        Args:
            report: with differences.
            case: what was compared, in words.
        """
        super().__init__(f"{case} does not train as one process does.\n{report}")
        self.report = report


def compare(meshed: Record, reference: Record, *, limits: Limits) -> ParityReport:
    """Compare a run with its reference.

    Args:
        meshed: complete, with the losses and buffers of all ranks.
        reference: of one process.
        limits: see `limits_for`.
    """
    comparisons: list[Comparison] = []
    differences: list[Difference] = []
    zero = {} if reference.optimizer in _PROPORTIONAL else _zero_gradients(reference, limits)
    excepted: dict[str, int] = {}
    for quantity in QUANTITIES:
        ours, theirs = getattr(meshed, quantity), getattr(reference, quantity)
        masks = zero if quantity == "parameters" else {}
        found, used = _compare_named(quantity, ours, theirs, limits, masks)
        differences += sorted(found, key=lambda each: (_moment(each), -each.excess))
        excepted.update(used)
        comparisons.append(_summary(quantity, ours, theirs))
    return ParityReport(
        limits=limits, comparisons=tuple(comparisons), differences=tuple(differences), zero_gradients=excepted
    )


def limits_for(flag: str, reference: Record) -> Limits:
    """Return the limits for a run: those of the coarsest dtype that it computes in.

    Args:
        flag: of its precision.
        reference: its parameters and losses.
    """
    dtypes = {t.dtype for t in (*reference.initial.values(), *reference.losses.values()) if t.is_floating_point()}
    if flag in ("bf16-mixed", "16-mixed") or any(dtype.itemsize < 4 for dtype in dtypes):
        return SIXTEEN_BIT
    return FLOAT64 if dtypes == {torch.float64} else FLOAT32


def _zero_gradients(reference: Record, limits: Limits) -> Named:
    """Return, by parameter, where its gradient is zero but for rounding in every step."""
    largest: Named = {}
    for name, gradient in reference.gradients.items():
        parameter = name.partition(": ")[2]
        size = gradient.abs()
        largest[parameter] = torch.maximum(largest[parameter], size) if parameter in largest else size
    return {name: size <= limits.zero_gradient for name, size in largest.items()}


def _compare_named(
    quantity: str, ours: Named, theirs: Named, limits: Limits, masks: Named
) -> tuple[list[Difference], dict[str, int]]:
    differences, excepted = [], {}
    for name in theirs.keys() ^ ours.keys():
        side = "one process" if name in theirs else "several ranks"
        differences.append(Difference(quantity=quantity, name=name, words=f"only on {side}", excess=float("inf")))
    for name in theirs.keys() & ours.keys():
        mine, other = ours[name], theirs[name]
        if mine.shape != other.shape or mine.dtype != other.dtype:
            words = f"{tuple(mine.shape)} {mine.dtype} instead of {tuple(other.shape)} {other.dtype}"
            differences.append(Difference(quantity=quantity, name=name, words=words, excess=float("inf")))
            continue
        excess = _excess(mine, other, limits)
        if name in masks and bool((excess[masks[name]] > 1).any()):
            excepted[name] = int(masks[name].sum())
            excess = excess.masked_fill(masks[name], 0.0)
        if excess.numel() and (worst := float(excess.max())) > 1:
            words = _words(mine, other, int(excess.argmax()))
            differences.append(Difference(quantity=quantity, name=name, words=words, excess=worst))
    return differences, excepted


def _moment(difference: Difference) -> int:
    """Return the step or batch that a name begins with; what was noted at the end has none."""
    found = re.match(r"(?:step|batch) (\d+)", difference.name)
    return int(found[1]) if found else 0


def _excess(mine: torch.Tensor, other: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return each difference over what is allowed; infinite where only one side is a number."""
    mine, other = mine.double(), other.double()
    excess = (mine - other).abs() / (limits.atol + limits.rtol * other.abs())
    alike = (mine == other) | (mine.isnan() & other.isnan())
    return excess.masked_fill(alike, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))


def _words(mine: torch.Tensor, other: torch.Tensor, flat: int) -> str:
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), other.shape)] if other.dim() else ""
    a, b = mine.reshape(-1)[flat].item(), other.reshape(-1)[flat].item()
    return f"{a!r} instead of {b!r} at {index} (off by {abs(a - b):.3g})" if index else f"{a!r} instead of {b!r}"


def _summary(quantity: str, ours: Named, theirs: Named) -> Comparison:
    largest, where = 0.0, ""
    for name in theirs.keys() & ours.keys():
        if ours[name].shape != theirs[name].shape or not theirs[name].numel():
            continue
        gap = float((ours[name].double() - theirs[name].double()).abs().max())
        if gap > largest or gap != gap:
            largest, where = gap, name
    return Comparison(quantity=quantity, count=len(theirs), largest=largest, where=where)
