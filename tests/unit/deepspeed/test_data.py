"""Loaders of `initialize(training_data=...)`, and those that begin again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from meshbolt import ConfigError
from meshbolt.deepspeed.data import RepeatingLoader, loader_of


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


def test_a_dataset_is_divided_among_ranks_and_shuffled_for_training_only() -> None:
    data = TensorDataset(torch.arange(10))
    parts = [
        [
            torch.cat(
                [each for (each,) in loader_of(data, batch_size=2, ranks=2, rank=rank, route=route, num_workers=0)]
            )
            for rank in range(2)
        ]
        for route in ("train", "eval")
    ]
    assert sorted(torch.cat(parts[0]).tolist()) == list(range(10))
    assert parts[1][1].tolist() == [1, 3, 5, 7, 9]
    assert parts[0][1].tolist() != parts[1][1].tolist()


def test_a_stream_divides_its_samples_itself() -> None:
    loader = loader_of(Stream(), batch_size=2, ranks=2, rank=1, num_workers=0)
    assert [each.tolist() for each in loader] == [[0, 1], [2, 3], [4]]
    assert loader.data_sampler is None


def test_the_next_batch_can_be_taken_from_the_loader_itself() -> None:
    loader = loader_of(TensorDataset(torch.arange(4)), batch_size=2, ranks=1, rank=0, route="eval", num_workers=0)
    assert (len(loader), loader.batch_size) == (2, 2)
    assert [next(loader)[0].tolist(), next(loader)[0].tolist()] == [[0, 1], [2, 3]]
    with pytest.raises(StopIteration):
        next(loader)


def test_a_loader_that_repeats_begins_again() -> None:
    assert list(itertools.islice(RepeatingLoader([1, 2]), 5)) == [1, 2, 1, 2, 1]
    with pytest.raises(ConfigError, match="without a batch"):
        next(RepeatingLoader([]))


def test_what_is_no_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a list_iterator"):
        loader_of(iter([1]), batch_size=1, ranks=1, rank=0)
    with pytest.raises(ConfigError, match="'train', 'eval', 'predict'"):
        loader_of([1], batch_size=1, ranks=1, rank=0, route="test")
