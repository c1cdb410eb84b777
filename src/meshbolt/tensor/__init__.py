"""Tensor parallelism: single layers divided among the ranks of the `tp` axis, under modules that know nothing of it.

May import: `errors` and `compat`. `setting.py` is what users write; `plans.py` decides which layer is divided how, by what
`families.py` knows or by looking at the forward (`trace.py`), in the styles of `styles.py`. `divide.py` divides parameters, and
`shown.py` shows them to a layer's forward as split tensors (`split.py`), on which torch's functions follow `rules/`.
`layout.py` is their arithmetic, `exchange.py` what travels, over an `axis.py`. Read `split.py` first.
"""

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.divide import Division, for_compiled, let_splits_through, plain_leaves, shard_dim
from meshbolt.tensor.plans import TensorPlan, choose_plan
from meshbolt.tensor.rules import elementwise, heads, products, reductions, tokens, views
from meshbolt.tensor.setting import NODE, TensorParallel
from meshbolt.tensor.split import SplitTensor, add_methods, gathered
from meshbolt.tensor.trace import trace_styles

RULES = (elementwise, heads, products, reductions, tokens, views)
"""Modules of rules: importing them fills the table."""

add_methods()

__all__ = [
    "NODE",
    "RULES",
    "Axis",
    "Division",
    "SplitTensor",
    "TensorParallel",
    "TensorPlan",
    "choose_plan",
    "for_compiled",
    "gathered",
    "let_splits_through",
    "plain_leaves",
    "shard_dim",
    "trace_styles",
]
