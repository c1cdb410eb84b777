"""Faster collectives for gloo on CPUs, behind torch's own interfaces for FSDP2.

May import: `errors`, `compat`. `reduce_scatter.py` sums gradients by an all-to-all that finishes behind the backward;
`prefetch.py` launches all-gathers ahead of the forward. Both give the same numbers as torch's own path, which is used
wherever they are not proved (see `usable_fast_path`). To add a collective, implement torch's `AllGather` or
`ReduceScatter` here and hand it to the units. Read `reduce_scatter.py` first.
"""

from meshbolt.collectives.agree import agree_on_error, same_on_all_ranks
from meshbolt.collectives.prefetch import Prefetch
from meshbolt.collectives.reduce_scatter import DeferredReductions, usable_fast_path

__all__ = ["DeferredReductions", "Prefetch", "agree_on_error", "same_on_all_ranks", "usable_fast_path"]
