"""Warnings of a run, heard by whoever wants to keep them; they are shown as before."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

# Loggers that may not hand their records on to the root.
_LOGGERS = ("", "lightning.pytorch", "lightning.fabric", "meshbolt")
MOST_TEXTS = 100


class Warned:
    """Hears Python's warnings and records of logging from WARNING on, each text once.

    Args:
        hear: takes a text.
    """

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear
        self._heard: set[str] = set()
        self._before: Any = warnings.showwarning
        self._handler = _Handler(self._take)
        warnings.showwarning = self._show
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._handler)

    def close(self) -> None:
        """Hear no more."""
        if warnings.showwarning == self._show:
            warnings.showwarning = self._before
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)

    def _show(self, message: Warning | str, category: type[Warning], *further: Any, **named: Any) -> None:
        self._take(f"{category.__name__}: {message}")
        self._before(message, category, *further, **named)

    def _take(self, text: str) -> None:
        text = text.strip()[:2000]
        if text not in self._heard and len(self._heard) < MOST_TEXTS:
            self._heard.add(text)
            self._hear(text)


class _Handler(logging.Handler):
    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(level=logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record over."""
        try:
            self._take(record.getMessage())
        except Exception:
            self.handleError(record)
