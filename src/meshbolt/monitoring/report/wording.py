"""Numbers as people read them, by their unit."""

from __future__ import annotations

import math
import time

from meshbolt.monitoring.catalogue import CATALOGUE
from meshbolt.units import format_bytes, format_seconds

NOTHING = "–"
_DAY_SECONDS = 86_400


def unit_of(name: str) -> str:
    """Return the unit of a metric; empty where it is not in the catalogue, as what users log.

    Args:
        name: of the metric.
    """
    return CATALOGUE[name].unit if name in CATALOGUE else ""


def meaning_of(name: str) -> str:
    """Return what a metric means, in a sentence; empty where it is not in the catalogue.

    Args:
        name: of the metric.
    """
    return CATALOGUE[name].meaning if name in CATALOGUE else ""


def write(value: float | None, unit: str = "") -> str:
    """Return a number with its unit.

    Args:
        value: None where there is none.
        unit: as the catalogue has it.

    Example:
        >>> write(2**21, "bytes"), write(0.012, "seconds"), write(0.5, "fraction"), write(1234.5)
        ('2.0 MiB', '12.0 ms', '50.0 %', '1,234')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if unit == "bytes":
        return format_bytes(value)
    if unit == "bytes/s":
        return f"{format_bytes(value)}/s"
    if unit == "seconds":
        return format_duration(value) if value >= 60 else _short_time(value)
    if unit == "fraction":
        return f"{value * 100:.1f} %"
    if unit == "rank":
        return f"rank {plain(value)}"
    return plain(value) if unit in ("number", "count", "text") else f"{plain(value)} {unit}".rstrip()


def plain(value: float) -> str:
    """Return a number with as many digits as one reads.

    Args:
        value: finite.

    Example:
        >>> plain(0.000123456), plain(3.14159265), plain(250000)
        ('0.0001235', '3.142', '250,000')
    """
    size = abs(value)
    if value == int(value) and size < 1e12:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e12 else f"{value:.3e}"
    if size >= 1e-4:
        return f"{value:.4g}"
    return f"{value:.3g}"


def exact(value: float) -> float | None:
    """Return a number for a page's data: five digits, None for one that JSON does not know.

    Args:
        value: any.
    """
    return float(f"{value:.5g}") if math.isfinite(value) else None


def format_duration(seconds: float) -> str:
    """Return how long something took, with days where there are some.

    Args:
        seconds: 0 or more.

    Example:
        >>> format_duration(93784)
        '1 d 2:03:04'
    """
    days, rest = divmod(seconds, _DAY_SECONDS)
    return (f"{int(days)} d " if days else "") + format_seconds(rest)


def format_date(seconds: float) -> str:
    """Return a moment, in UTC.

    Args:
        seconds: since 1970.

    Example:
        >>> format_date(0)
        '1970-01-01 00:00:00 UTC'
    """
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _short_time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if 0 < abs(seconds) < 1e-3 else format_seconds(seconds)
