"""The proof that a strategy trains a module as one process does.

May import: `strategies`, `plugins` and what is below them, and `run_ranks`. `assertion.py` has `assert_parity`; `case.py` says
what is compared; `in_trainer.py` and `in_fabric.py` run it on ranks, and `reference.py` in one process, where `simulated.py`
plays the ranks and `rounding.py` casts as a precision says; all fill a `record.py`, and `report.py` compares two. Read
`assertion.py` first.
"""

from __future__ import annotations

from meshbolt.testing.parity.assertion import assert_parity
from meshbolt.testing.parity.report import ParityError, ParityReport

__all__ = ["ParityError", "ParityReport", "assert_parity"]
