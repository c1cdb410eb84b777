"""Tensors that every rank holds whole: made equal again after user code may have changed them on one rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def whole_tensors(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> Iterator[torch.Tensor]:
    """Yield those of some parameters that every rank holds whole, and such tensors of optimizer state.

    Args:
        parameters: of a sharded module, with nothing gathered; in the same order on every rank.
        optimizers: whose state for these parameters to look at; empty for none.
    """
    for parameter in dict.fromkeys(parameters):
        if not isinstance(parameter, DTensor):
            yield parameter.data
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and (value.dim() == 0 or not isinstance(parameter, DTensor)):
                    yield value


def take_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors with those of rank 0; a collective of all ranks, one for each dtype and device.

    Args:
        tensors: the same on every rank but for their values.
    """
    alike: defaultdict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype, tensor.device].append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, values in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.view_as(tensor))
