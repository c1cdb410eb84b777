"""How much a batch holds, in the unit that people compare: tokens where it is text, else samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy


@dataclass(frozen=True)
class Amount:
    """A number of tokens or of samples."""

    count: int
    unit: str


def amount_in(batch: Any) -> Amount | None:
    """Return how much a batch holds, judged by its first tensor; None where there is none.

    Args:
        batch: as a loader yields it: a tensor, or tuples, lists and dictionaries with tensors. Whole numbers in two
            dimensions, (samples, length), count as tokens. The first tensor of a mapping is that of its first key, in the
            order in which the loader made it.
    """
    tensor = next(tensors_in(batch), None)
    if tensor is None or tensor.dim() == 0:
        return None
    is_text = tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    return Amount(tensor.numel(), "tokens") if is_text else Amount(tensor.shape[0], "samples")


def samples_in(batch: Any) -> int | None:
    """Return how many samples a batch holds: the first dim of its first tensor; None where there is none.

    Args:
        batch: as for `amount_in`.
    """
    tensor = next(tensors_in(batch), None)
    return None if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def data_parallel_size(trainer: pl.Trainer) -> int:
    """Return how many ranks see different samples: ranks that share them must not be counted twice."""
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy):
        return 1
    return int(strategy.distributed_sampler_kwargs["num_replicas"])


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, in mappings, sequences and dataclasses of any depth.

    Args:
        batch: as `training_step` gets it.
    """
    if isinstance(batch, torch.Tensor):
        yield batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        for each in fields(batch):
            yield from tensors_in(getattr(batch, each.name))
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for value in batch:
            yield from tensors_in(value)
