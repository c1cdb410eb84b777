"""ZeRO: which state is sharded over the data-parallel ranks, and when it is gathered.

May import: `mesh`, `blocks`, `errors`, `compat`. A stage is a value in `policy.py`; `units.py` decides which modules share
one all-gather; `shard.py` calls torch's `fully_shard`; `replicated.py` looks after parameters that cannot be sharded.
Read `policy.py` first.
"""

from meshbolt.zero.policy import POLICIES, StagePolicy, Zero
from meshbolt.zero.replicated import ReplicatedParameters
from meshbolt.zero.shard import Root, shard_unit
from meshbolt.zero.units import KeepNorms, UnitPlan, plan_units

__all__ = [
    "POLICIES",
    "KeepNorms",
    "ReplicatedParameters",
    "Root",
    "StagePolicy",
    "UnitPlan",
    "Zero",
    "plan_units",
    "shard_unit",
]
