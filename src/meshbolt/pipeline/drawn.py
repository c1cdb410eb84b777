"""Random numbers for parameters that other ranks hold: drawn as well, and dropped.

Code of the user's that initialises layers again, or adds noise to weights, goes through all parameters on every rank, whose
generators are in the same state. If a rank drew nothing for those that it does not hold, it would draw other numbers than the
other ranks for what comes after them: not those of one process, and for a weight that lies on several ranks not the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meshbolt.compat import FakeTensor, tree_map_only
from meshbolt.pipeline.calls import is_in_step

# How many numbers these draw depends on shapes, not on values.
_BY_SHAPE = frozenset(
    {
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "normal",
        "normal_",
        "rand_like",
        "randint_like",
        "randn_like",
        "random_",
        "uniform_",
    }
)


def draw_as_well(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Draw what an operation would draw if its tensors had values; it takes their memory for a moment.

    In a step nothing is drawn: there every draw has a stream of its own.

    Args:
        operation: as a dispatch mode gets it; of one that does not draw, nothing comes.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    name = operation.overloadpacket.__name__
    if name in _BY_SHAPE and torch.Tag.nondeterministic_seeded in operation.tags and not is_in_step():
        with torch.no_grad():
            args, kwargs = tree_map_only(FakeTensor, _with_values, (tuple(args), dict(kwargs)))
            operation(*args, **kwargs)


def _with_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
