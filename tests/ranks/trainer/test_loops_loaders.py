"""The loader that ranks go through together is, to all appearance, the user's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from meshbolt.strategies import loaders
from meshbolt.strategies.loaders import AgreedLoader, checked_loader
from meshbolt.testing import run_ranks


def alone() -> bool:
    loader = [1, 2, 3]
    return checked_loader(loader, group=None) is loader and checked_loader(loader, group=dist.group.WORLD) is loader


def test_one_rank_keeps_its_loader_as_it_is() -> None:
    assert run_ranks(alone, 1) == [True]


def in_a_large_world() -> list[bool]:
    loaders.MOST_RANKS_WATCHED = 1
    sized, stream = DataLoader(TensorDataset(torch.arange(6))), iter([1, 2])
    return [checked_loader(loader, group=dist.group.WORLD) is loader for loader in (sized, stream)]


def test_in_a_large_world_only_loaders_without_a_length_are_watched() -> None:
    assert run_ranks(in_a_large_world, 2) == [[True, False]] * 2


def agreed() -> dict[str, Any]:
    inner = DataLoader(TensorDataset(torch.arange(6)), batch_size=2)
    loader = checked_loader(inner, group=dist.group.WORLD)
    loader.worker_init_fn = print
    numbers = checked_loader([1, 2], group=dist.group.WORLD)
    return {
        "kind": type(loader) is AgreedLoader and isinstance(loader, DataLoader) and isinstance(numbers, list),
        "reached": inner.worker_init_fn is print and loader.dataset is inner.dataset,
        "copied": {**loader.__dict__} == {**inner.__dict__} and numbers.__dict__ == {},
        "lengths": (len(loader), len(numbers)),
        "batches": [[batch[0].tolist() for batch in loader] for _ in range(2)],
        "numbers": list(numbers),
        "missing": hasattr(loader, "no_such_thing"),
    }


def test_a_watched_loader_looks_and_behaves_like_the_one_inside() -> None:
    for rank in run_ranks(agreed, 2):
        assert rank == {
            "kind": True,
            "reached": True,
            "copied": True,
            "lengths": (3, 2),
            "batches": [[[0, 1], [2, 3], [4, 5]]] * 2,
            "numbers": [1, 2],
            "missing": False,
        }
