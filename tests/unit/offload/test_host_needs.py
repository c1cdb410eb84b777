"""What is said to be needed before training is what is taken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.offload.faulty import FaultyFace, make_file
from tests.unit.offload.hosts import FUSED, Make, give_gradients, offloaded, parameters

from meshbolt.offload.layout import PAGE_BYTES
from meshbolt.offload.pages import use_huge_pages
from meshbolt.offload.planning import layout_of, needs_of
from meshbolt.offload.tiers import FileTier

HOST, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["adamw", "adam amsgrad", "sgd", "adagrad"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_layout_is_known_before_it_is_made(name: str, fraction: float) -> None:
    make: Make = FUSED[name]
    optimizer = make(parameters(torch.bfloat16))
    optimizer.param_groups[0]["params"][4].requires_grad_(False)
    params = optimizer.param_groups[0]["params"]
    units = {"first": params[: len(params) // 2], "second": params[len(params) // 2 :]}
    layout = layout_of(optimizer, units=units, fraction=fraction, chunk_bytes=PAGE_BYTES)
    with offloaded(optimizer, fraction=fraction) as host:
        assert layout.slots == host.layout.slots
        assert [chunk.file_offset for chunk in layout.chunks] == [chunk.file_offset for chunk in host.layout.chunks]


def test_a_fraction_counts_bytes_of_what_could_leave() -> None:
    optimizer = torch.optim.AdamW(parameters(shapes=[(100_000,)] * 10))
    units = {"all": optimizer.param_groups[0]["params"]}
    whole = layout_of(optimizer, units=units).bytes_of(stays=False)
    free = 0.35 * whole
    layout = layout_of(optimizer, units=units, fraction=1.0 - free / whole)
    assert 0.29 * whole < layout.bytes_of(stays=True) <= free


def test_needs_name_the_memory_of_the_way_too() -> None:
    optimizer = torch.optim.AdamW(parameters(torch.bfloat16, [(4_000_000,)]))
    layout = layout_of(optimizer, units={"all": optimizer.param_groups[0]["params"]}, chunk_bytes=2**20)
    column = max(chunk.column_bytes for chunk in layout.chunks)
    assert 0.9 * 2**20 < 3 * column <= 2**20
    state = layout.bytes_of(stays=False)
    assert 48_000_000 <= state < 48_000_000 + 3 * 2 * PAGE_BYTES
    assert needs_of(layout, device=HOST, in_file=False).host_bytes == state
    on_gpu = needs_of(layout, device=GPU, in_file=False)
    assert (on_gpu.host_bytes, on_gpu.device_bytes, on_gpu.file_bytes) == (state + 3 * column, 2 * column, 0)
    in_file = needs_of(layout, device=HOST, in_file=True)
    assert in_file.host_bytes == 3 * layout.largest_chunk_bytes < 4 * 2**20
    assert state <= in_file.file_bytes == layout.file_bytes < state + len(layout.chunks) * PAGE_BYTES


def test_a_file_is_as_large_as_was_said(tmp_path: Path) -> None:
    asked: list[int] = []

    def make_tier(layout: Any) -> FileTier:
        return FileTier(layout, lambda num_bytes: asked.append(num_bytes) or make_file(tmp_path, num_bytes))

    with offloaded(FUSED["adamw"](parameters()), make_tier=make_tier) as host:
        assert asked == [host.layout.file_bytes]


def test_submitting_does_not_wait_for_a_slow_disk(tmp_path: Path) -> None:
    goes_on = threading.Event()

    def wait(_what: str, _offset: int, num_bytes: int) -> int:
        assert goes_on.wait(20)
        return num_bytes

    def make_tier(layout: Any) -> FileTier:
        return FileTier(layout, lambda num_bytes: make_file(tmp_path, num_bytes, face=FaultyFace(wait)))

    optimizer = FUSED["adamw"](parameters())
    params = optimizer.param_groups[0]["params"]
    before = params[1].detach().clone()
    with offloaded(optimizer, make_tier=make_tier) as host:
        give_gradients(params, 0)
        host.submit()
        assert torch.equal(params[1], before)
        goes_on.set()
        host.wait(params[1:2])
        assert not torch.equal(params[1], before)
        assert host.counters.waited_seconds > 0
        host.step()
        assert host.counters.updated_bytes == 2 * 4 * sum(chunk.elements for chunk in host.layout.chunks)


def test_memory_moves_into_huge_pages_where_it_is() -> None:
    memory = torch.arange(3 * 2**20, dtype=torch.float32)
    before, values = memory.data_ptr(), memory.clone()
    use_huge_pages(memory)
    assert memory.data_ptr() == before
    assert torch.equal(memory, values)
    assert not use_huge_pages(torch.zeros(1000))
