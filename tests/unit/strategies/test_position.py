from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from meshbolt.strategies.position import _has_known_order, _has_own_state, _iterate_from


class Watched(Dataset[int]):
    """Notes what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Placed(DataLoader[int]):
    """Keeps its place by itself."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def lists(batches: Any) -> list[list[int]]:
    return [batch.tolist() if batch.dim() else [int(batch)] for batch in batches]


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 5}, {"batch_size": None}], ids=str)
def test_a_loader_begins_at_a_later_batch_and_loads_none_before(options: dict[str, Any]) -> None:
    data = Watched()
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=2, rank=1, seed=3)
    loader = DataLoader(data, sampler=sampler, **options)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        whole = lists(map(torch.as_tensor, loader))
        data.loaded.clear()
        assert lists(map(torch.as_tensor, _iterate_from(loader, 1))) == whole[1:]
        assert data.loaded == [index for batch in whole[1:] for index in batch]
        assert lists(map(torch.as_tensor, loader)) == whole


def test_an_epoch_set_after_the_loader_has_begun_counts() -> None:
    data = Watched()
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, sampler=sampler, batch_size=3)
    late = _iterate_from(loader, 2)
    sampler.set_epoch(4)
    assert lists(late) == lists(loader)[2:]


def test_more_batches_than_there_are_leave_none() -> None:
    assert list(_iterate_from(DataLoader(Watched(), batch_size=5), 9)) == []


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_begin_later_and_those_that_persist_only_once(persistent_workers: bool) -> None:
    loader = DataLoader(Watched(), batch_size=4, num_workers=1, persistent_workers=persistent_workers)
    try:
        first, second = lists(_iterate_from(loader, 2)), lists(loader)
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
    assert first == [[8, 9, 10, 11]]
    assert second == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_order_is_known_of_two_samplers_and_of_no_loader_that_is_not_torchs() -> None:
    data = Watched()
    spread: DistributedSampler[int] = DistributedSampler(data, num_replicas=2, rank=0)
    known = [DataLoader(data), DataLoader(data, sampler=spread), DataLoader(data, batch_size=None)]
    unknown = [
        DataLoader(data, shuffle=True),
        DataLoader(data, sampler=RandomSampler(data)),
        DataLoader(data, batch_sampler=[[1], [2]]),
        range(3),
    ]
    assert isinstance(known[0].sampler, SequentialSampler)
    assert [_has_known_order(loader) for loader in known] == [True] * 3
    assert [_has_known_order(loader) for loader in unknown] == [False] * 4


def test_a_loader_with_a_state_is_told_from_one_without() -> None:
    assert _has_own_state(Placed(Watched()))
    assert not _has_own_state(DataLoader(Watched()))
