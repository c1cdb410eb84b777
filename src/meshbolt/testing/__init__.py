"""Tools to test code on several ranks; shipped, for users' own modules.

`run_ranks(fn, n)` runs a function on `n` ranks and returns what each returned. Start reading in `ranks.py`, the test's
side of a call; `worker.py` is the rank's side, `outcomes.py` says what can become of a rank, `values.py` how results
travel, `warm.py` why a call takes milliseconds. `assert_parity` proves that a module trains under a strategy as it does in
one process; see `parity/`. `verify_pipeline` cuts a module into pipeline stages in
this process. As a top layer it may import all of meshbolt but `cli`.
"""

from __future__ import annotations

from meshbolt.testing.needs import needs
from meshbolt.testing.outcomes import Outcome, RankFailure
from meshbolt.testing.parity import ParityError, ParityReport, assert_parity
from meshbolt.testing.pipeline import PipelineReport, verify_pipeline
from meshbolt.testing.ranks import run_ranks, run_ranks_expecting
from meshbolt.testing.warm import warm

__all__ = [
    "Outcome",
    "ParityError",
    "ParityReport",
    "PipelineReport",
    "RankFailure",
    "assert_parity",
    "needs",
    "run_ranks",
    "run_ranks_expecting",
    "verify_pipeline",
    "warm",
]
