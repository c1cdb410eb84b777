"""Parameters that stay whole on every rank: their gradients are averaged in one all-reduce a window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import distributed_tensor, local_tensor


class ReplicatedParameters:
    """The few parameters that no unit shards.

    Their gradients are summed locally within a window and averaged over the data-parallel ranks at its end. A parameter
    that no rank used keeps `grad=None`, as in one process.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, group: dist.ProcessGroup) -> None:
        self._parameters = list(parameters)
        self._group = group

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """They, in the order of the module."""
        return self._parameters

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the group; a collective wherever there is such a parameter."""
        if self._group.size() == 1:
            return
        by_dtype: defaultdict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in self._parameters:
            if parameter.requires_grad:
                by_dtype[parameter.dtype].append(parameter)
        for parameters in by_dtype.values():
            self._average(parameters)

    @torch.no_grad()
    def _average(self, parameters: list[nn.Parameter]) -> None:
        dtype = torch.float32 if parameters[0].element_size() < 4 else parameters[0].dtype
        device = parameters[0].device
        gradients = [None if p.grad is None else local_tensor(p.grad) for p in parameters]
        used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=dtype, device=device)
        flat = [
            (torch.zeros_like(local_tensor(p)) if gradient is None else gradient).reshape(-1).to(dtype)
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        bucket = torch.cat([used, *flat])
        dist.all_reduce(bucket, group=self._group)
        counts, *means = bucket.split([len(parameters), *(local_tensor(p).numel() for p in parameters)])
        for parameter, count, mean in zip(parameters, counts.tolist(), means, strict=True):
            if count:
                own = (mean / self._group.size()).view_as(local_tensor(parameter)).to(parameter.dtype)
                if isinstance(parameter, DTensor):
                    own = distributed_tensor(own, like=parameter, placements=parameter.placements)
                parameter.grad = own
