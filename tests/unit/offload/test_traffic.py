"""If these fail, the numbers of a run with offloading are not what it moved, or hide that it waited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.unit.offload.faulty import FaultyFace
from tests.unit.offload.hosts import FUSED, give_gradients, offloaded, parameters
from torch import nn

from meshbolt.offload import StateFile
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import PAGE_BYTES, Layout
from meshbolt.offload.tiers import FileTier
from meshbolt.offload.traffic import Moved, OffloadTraffic, Ways

# Two columns of 1024 elements in float32 are two pages, and nothing is rounded up.
SHAPES = [(32, 32)] * 4
STATE_BYTES = len(SHAPES) * 32 * 32 * 4 * 2


@contextmanager
def host_of(place: str, path: Path, *, face: FaultyFace | None = None, **options: Any) -> Iterator[OffloadedOptimizer]:
    """An AdamW of four units, each of two pages of state."""

    def file(layout: Layout) -> FileTier:
        return FileTier(layout, lambda size: StateFile(path, size, face=face, say=lambda _: None))

    optimizer = FUSED["adamw"](parameters(shapes=SHAPES))
    own: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    units = {f"unit {number}": [parameter] for number, parameter in enumerate(own)}
    if place == "nvme":
        options["make_tier"] = file
    with offloaded(optimizer, units=units, chunk_bytes=2 * PAGE_BYTES, **options) as host:
        yield host


def step(host: OffloadedOptimizer, number: int, **options: Any) -> OffloadTraffic:
    """Take a step; return what it has moved."""
    before = host.traffic()
    give_gradients(host.optimizer.param_groups[0]["params"], number)
    host.step(**options)
    return host.traffic() - before


@pytest.mark.parametrize(("place", "fraction", "in_file"), [("cpu", 1.0, 0), ("nvme", 1.0, 1), ("nvme", 0.5, 0.5)])
def test_each_step_moves_the_bytes_of_the_state_that_is_elsewhere(
    place: str, fraction: float, in_file: float, tmp_path: Path
) -> None:
    with host_of(place, tmp_path, fraction=fraction) as host:
        for number in range(4):
            moved = step(host, number)
            assert moved.updated.num_bytes == STATE_BYTES
            assert moved.state.read.num_bytes == moved.state.written.num_bytes == in_file * STATE_BYTES
            assert moved.state.to_host == moved.state.to_device == Moved()
            assert moved.parameters == Ways()
        total = host.traffic().state
    assert in_file * 3 * STATE_BYTES <= total.read.done_bytes <= in_file * 5 * STATE_BYTES
    assert (total.read.seconds > 0) == (total.written.seconds > 0) == bool(in_file)


def test_parameters_without_a_gradient_move_nothing(tmp_path: Path) -> None:
    with host_of("nvme", tmp_path) as host:
        step(host, 0)
        before = host.traffic()
        give_gradients(host.optimizer.param_groups[0]["params"], 1, without=[0, 2])
        host.step()
        assert (host.traffic() - before).state.read.num_bytes == STATE_BYTES // 2


DELAY = 0.03  # seconds of each transfer of a chunk, of which four are read and four are written in a step


def slow(what: str, offset: int, num_bytes: int) -> int:
    time.sleep(DELAY)
    return num_bytes


def test_a_slow_disk_is_waited_for_in_a_step_that_waits(tmp_path: Path) -> None:
    with host_of("nvme", tmp_path, face=FaultyFace(slow)) as host:
        face = host._tiers[False].files[0]._face  # type: ignore[attr-defined]
        face.arm()
        moved = step(host, 0)
        # Three buffers: while a chunk is written the next is read, but the fourth waits for room.
        assert moved.step_wait_seconds >= 2 * DELAY
        assert moved.read_wait_seconds >= DELAY
        assert moved.busy_seconds >= 2 * DELAY
        assert moved.not_hidden_seconds == moved.step_wait_seconds
        assert moved.hidden_fraction == pytest.approx(0.0, abs=0.1)
        assert moved.state.read.bytes_per_second is not None
        assert moved.state.read.bytes_per_second <= STATE_BYTES / DELAY


def test_what_other_work_hides_is_not_counted(tmp_path: Path) -> None:
    with host_of("nvme", tmp_path, face=FaultyFace(slow)) as host:
        host._tiers[False].files[0]._face.arm()  # type: ignore[attr-defined]
        before = host.traffic()
        give_gradients(host.optimizer.param_groups[0]["params"], 0)
        host.step(waits=False)
        time.sleep(12 * DELAY)  # the next forward
        host.wait(host.optimizer.param_groups[0]["params"])
        moved = host.traffic() - before
        assert moved.busy_seconds >= 2 * DELAY
        assert moved.not_hidden_seconds < DELAY / 2
        assert moved.hidden_fraction is not None
        assert moved.hidden_fraction > 0.8


def test_waiting_is_counted_where_it_is(tmp_path: Path) -> None:
    with host_of("nvme", tmp_path, face=FaultyFace(slow)) as host:
        host._tiers[False].files[0]._face.arm()  # type: ignore[attr-defined]
        own = host.optimizer.param_groups[0]["params"]
        for where, wait in {"forward": lambda: host.wait(own[:1]), "other": lambda: host.wait()}.items():
            before = host.traffic()
            give_gradients(own, 0)
            host.step(waits=False)
            wait()
            moved = host.traffic() - before
            assert getattr(moved, f"{where}_wait_seconds") >= DELAY
            assert moved.step_wait_seconds == 0
            host.wait()


def test_an_observer_sees_each_update_and_each_transfer_and_nothing_when_it_has_gone(tmp_path: Path) -> None:
    seen: list[tuple[str, str, float, float]] = []
    with host_of("nvme", tmp_path) as host:
        step(host, 0)
        host.observe(lambda *span: seen.append(span))
        begun = time.perf_counter()
        step(host, 1)
        ended = time.perf_counter()
        host.observe(None)
        count = len(seen)
        step(host, 2)
    assert len(seen) == count
    lanes = [lane for lane, *_ in seen]
    assert lanes.count("updates") == lanes.count("file: read") == 4
    assert all(start <= end for *_, start, end in seen)
    assert all(begun <= start and end <= ended for lane, _, start, end in seen if lane == "updates")
    assert all(end <= ended for *_, end in seen)


def test_totals_of_several_optimizers_are_summed() -> None:
    one = OffloadTraffic(state=Ways(read=Moved(1, 2, 0.5)), busy_seconds=2.0, step_wait_seconds=1.0)
    both = one + one
    assert both.state.read == Moved(2, 4, 1.0)
    assert both.state.read.bytes_per_second == 4.0
    assert both.hidden_fraction == 0.5
    assert dict(both.moved())["state_read"] == Moved(2, 4, 1.0)
    assert OffloadTraffic().hidden_fraction is None
    assert Moved().bytes_per_second is None
