"""What each precision flag means for shards, gathers, reductions and arithmetic, and the loss scale of fp16.

May import: `errors`, `compat`. `policy.py` is the table of flags; `loss_scale.py` the scaler whose decision all ranks share.
To add a recipe, add a row to the table. Read `policy.py` first.
"""

from meshbolt.precision.loss_scale import LossScaler
from meshbolt.precision.policy import PrecisionPolicy, precision_policy

__all__ = ["LossScaler", "PrecisionPolicy", "precision_policy"]
