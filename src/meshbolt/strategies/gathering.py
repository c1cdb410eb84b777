"""How metrics gather their states over some of the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torchmetrics.utilities.distributed import gather_all_tensors


class GatherOver:
    """torchmetrics' own gathering, over a group. A copy of a metric shares it; in a file it is the plain one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Gather over a group.

        Args:
            group: the ranks; None: all.
        """
        self._group = group

    def __call__(self, result: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        """Return a tensor of every rank, as `gather_all_tensors` does."""
        return gather_all_tensors(result, group or self._group)

    def __deepcopy__(self, _memo: Any) -> GatherOver:
        """Return the same: a group cannot be copied."""
        return self

    def __reduce__(self) -> Any:
        """Be nothing where a metric is unpickled: there it gathers as metrics do."""
        return _plain_gathering, ()


def _plain_gathering() -> None:
    """Return no function to gather, for which torchmetrics takes its own."""
