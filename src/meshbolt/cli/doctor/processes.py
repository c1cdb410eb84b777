"""How processes end, in words."""

from __future__ import annotations

import signal


def ended_how(code: int) -> str:
    """Return how a process ended.

    Args:
        code: as `subprocess` has it, negative for a signal.
    """
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code}"
