"""What the module returns, in the dtypes in which it made it: a script meets its 16-bit outputs with 16-bit targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meshbolt.compat import tree_map
from meshbolt.deepspeed_json.precision import Precision

_SIXTEEN = (torch.float16, torch.bfloat16)


class Outputs:
    """Gives outputs the dtypes back that they had inside: whatever leaves the sharded module is cast to float32."""

    def __init__(self, module: nn.Module, *, precision: Precision | None) -> None:
        """Look at what the module returns, where it computes in 16 bits throughout.

        Args:
            module: the caller's own.
            precision: of the run.
        """
        self._dtypes: list[torch.dtype] | None = None
        if precision is not None and precision.flag.endswith("-mixed") and not precision.autocast:
            module.register_forward_hook(self._look)

    def _look(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._dtypes = []
        tree_map(lambda leaf: self._dtypes.append(leaf.dtype) if _is_float(leaf) else None, output)  # type: ignore[union-attr]

    def as_made(self, output: Any) -> Any:
        """Return an output as the module made it.

        Args:
            output: what came out.
        """
        dtypes, self._dtypes = self._dtypes, None
        if not dtypes:
            return output
        left = iter(dtypes)

        def leaf_as_made(leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf
            made = next(left, leaf.dtype)
            return leaf.to(made) if made in _SIXTEEN else leaf

        return tree_map(leaf_as_made, output)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
