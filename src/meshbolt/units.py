"""Sizes and durations as people read them."""

from __future__ import annotations

import re

KIB, MIB, GIB = 2**10, 2**20, 2**30

_UNITS = {"B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def format_bytes(num_bytes: float) -> str:
    """Return a size in the largest binary unit that keeps it above 1.

    Example:
        >>> format_bytes(3 * 2**20)
        '3.0 MiB'
    """
    for size, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {name}"
    return f"{num_bytes:.0f} B"


def parse_bytes(text: str) -> int:
    """Return the bytes that a size in words means: a number, and if it is not of bytes one of KiB, MiB, GiB, KB, MB, GB.

    Raises:
        ValueError: it is no size.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2 GB")
        (536870912, 2000000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size. Write a number of bytes, or one with a unit such as 512MiB or 5GB.")
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])


def format_seconds(seconds: float) -> str:
    """Return a duration: milliseconds below one second, else seconds, minutes and hours.

    Example:
        >>> format_seconds(0.0123), format_seconds(75)
        ('12.3 ms', '1:15')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
