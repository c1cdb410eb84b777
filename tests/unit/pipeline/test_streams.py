"""Random numbers of a unit depend on the step, the microbatch and the unit, and on nothing else."""

from __future__ import annotations

import torch

from meshbolt.pipeline.plan import Call
from meshbolt.pipeline.streams import stream, stream_seed

CPU = torch.device("cpu")


def test_seeds_differ_by_step_microbatch_unit_and_call() -> None:
    calls = [None, Call("a"), Call("a", 1), Call("b")]
    seeds = {stream_seed(step, microbatch, call) for step in range(3) for microbatch in range(3) for call in calls}
    assert len(seeds) == 3 * 3 * len(calls)


def test_a_seed_is_the_same_in_every_process() -> None:
    assert stream_seed(1, 2, Call("layers.3", 4)) == stream_seed(1, 2, Call("layers.3", 4)) == 52281105811116741


def test_a_stream_leaves_the_surrounding_one_where_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with stream(7, device=CPU):
        inside = torch.rand(3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with stream(7, device=CPU):
        assert torch.equal(torch.rand(3), inside)
