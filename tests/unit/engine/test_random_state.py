import random

import numpy as np
import torch

from meshbolt.engine.random_state import branch_random_state, collect_random_state, restore_random_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_every_generator_goes_on_where_it_was() -> None:
    draws()  # leaves the second number of a pair of gaussians behind, in both libraries
    state = collect_random_state(CPU)
    expected = [draws() for _ in range(3)]
    restore_random_state(state, CPU)
    assert [draws() for _ in range(3)] == expected


def test_the_state_is_made_of_tensors_alone() -> None:
    assert all(isinstance(value, torch.Tensor) for value in collect_random_state(CPU).values())


def test_collecting_draws_nothing() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    collect_random_state(CPU)
    first = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() == first


def test_ranks_branch_from_one_state_the_same_each_time_and_apart_from_each_other() -> None:
    state = collect_random_state(CPU)
    seen = []
    for coordinate in (0, 1, 0):
        branch_random_state(state, coordinate, CPU)
        seen.append(draws())
    restore_random_state(state, CPU)
    first, second, again = seen
    assert first == again
    assert not set(first) & set(second)
    assert not set(first) & set(draws())
