"""Where the numbers of a chart lie, and which of them are written at its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# From here on a linear axis would show one value, and the others as a line at its foot.
_SPREAD_OF_LOGARITHMS = 50.0
_NUM_TICKS = 4


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        low: where it begins.
        high: where it ends; above `low`.
        is_logarithmic: whether equal factors are equally far apart.
        ticks: values that are written, and how.
    """

    low: float
    high: float
    is_logarithmic: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 at the beginning to 1 at the end.

        Args:
            value: finite.
        """
        if self.is_logarithmic:
            bounds = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - bounds[0]) / (bounds[1] - bounds[0])
        return (value - self.low) / (self.high - self.low)


def axis_of_values(values: Iterable[float], unit: str, *, from_zero: bool) -> Axis:
    """Return an axis for values.

    Args:
        values: finite.
        unit: as the catalogue has it.
        from_zero: whether heights are to be compared, as of amounts.
    """
    found = sorted(values)
    if not found:
        found = [0.0, 1.0]
    low, high = found[0], found[-1]
    middle = found[len(found) // 2]
    if not from_zero and low > 0 and high / middle > _SPREAD_OF_LOGARITHMS:
        return _logarithmic(low, high, unit)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if from_zero and low >= 0 else low - margin), high + margin
    return Axis(low, high, False, tuple(_ticks(low, high, unit)))


def axis_of_steps(first: int, last: int) -> Axis:
    """Return an axis of steps.

    Args:
        first: step.
        last: step.
    """
    high = max(last, first + 1)
    step = max(_nice((high - first) / _NUM_TICKS), 1.0)
    begin = math.ceil(first / step)
    ticks = [index * step for index in range(begin, math.floor(high / step) + 1)]
    return Axis(first, high, False, tuple((tick, _short(tick, _THOUSANDS)) for tick in ticks))


def _logarithmic(low: float, high: float, unit: str) -> Axis:
    low, high = low / 1.1, high * 1.1
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / (_NUM_TICKS + 1)))
    return Axis(
        low, high, True, tuple((10.0**power, _written(10.0**power, 10.0**power, unit)) for power in decades[::every])
    )


def _ticks(low: float, high: float, unit: str) -> list[tuple[float, str]]:
    size = max(abs(low), abs(high))
    scale = _scale(size, unit)[0]
    step = _nice((high - low) / scale / _NUM_TICKS) * scale
    first = math.ceil(low / step - 1e-9)
    ticks = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(tick, _written(tick, size, unit, step)) for tick in ticks]


def _nice(step: float) -> float:
    """Return the next larger of 1, 2, 2.5, 5, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(each * power for each in _STEPS if each * power >= step * (1 - 1e-9))


def _scale(size: float, unit: str) -> tuple[float, str]:
    if unit in ("bytes", "bytes/s"):
        size_of_unit, name = next((each for each in _BINARY if size >= each[0]), _BINARY[-1])
        return float(size_of_unit), f" {name}" + ("/s" if unit == "bytes/s" else "")
    if unit == "seconds":
        scale, name = next((each for each in _TIMES if size >= each[0]), _TIMES[-1])
        return scale, f" {name}"
    if unit == "fraction":
        return 0.01, " %"
    return next((each for each in _THOUSANDS if size >= each[0]), (1.0, ""))


def _written(value: float, size: float, unit: str, step: float = 0.0) -> str:
    scale, name = _scale(size, unit)
    if value == 0:
        return "0"
    if not step:
        return f"{value / scale:g}{name}"
    digits = max(0, -math.floor(math.log10(step / scale) + 1e-9)) if step else 0
    if digits > 4:
        return f"{value / scale:.3g}{name}"
    text = f"{value / scale:.{digits + (1 if _needs_one_more(step / scale, digits) else 0)}f}"
    return "0" if float(text) == 0 else f"{text}{name}"


def _needs_one_more(step: float, digits: int) -> bool:
    """Return whether a step such as 2.5 would be rounded away."""
    return bool(abs(step * 10**digits - round(step * 10**digits)) > 1e-6)


def _short(value: float, scales: Sequence[tuple[float, str]]) -> str:
    scale, name = next((each for each in scales if abs(value) >= each[0]), (1.0, ""))
    return f"{value / scale:g}{name}"
