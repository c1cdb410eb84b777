"""What cannot be done is refused by name; what fails on the way is raised once, and leaves no thread."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests.unit.offload.faulty import FaultyFace, error_of, make_file
from tests.unit.offload.hosts import FUSED, give_gradients, offloaded, parameters
from torch import nn

from meshbolt.errors import ConfigError, MeshboltError, StorageError, UnsupportedError
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.line import UpdateLine
from meshbolt.offload.tiers import FileTier


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_settings_that_do_not_go_with_it_are_refused(name: str) -> None:
    optimizer = torch.optim.AdamW(parameters(), foreach=False, **{name: True})
    with (
        pytest.raises(UnsupportedError, match=rf"AdamW\({name}=True\) was to keep its state outside"),
        offloaded(optimizer),
    ):
        pass


def test_a_complex_parameter_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"'second' is torch\.complex64"), offloaded(optimizer):
        pass


def test_memory_with_gaps_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(4, 6)[:, :3])], lr=0.1)
    with (
        pytest.raises(UnsupportedError, match=r"parameter 0 \(of 'second'\) .* do not lie side by side"),
        offloaded(optimizer),
    ):
        pass


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    with offloaded(torch.optim.SGD(embedding.parameters(), lr=0.1)) as host:
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(UnsupportedError, match="sparse"):
            host.step()


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_fraction_outside_of_its_bounds_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="give 0 to 1"), offloaded(FUSED["adamw"](parameters()), fraction=fraction):
        pass


def test_settings_that_need_more_room_than_was_made_are_refused() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    host = OffloadedOptimizer(optimizer, units={"all": optimizer.param_groups[0]["params"]})
    give_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"needs \['momentum_buffer'\]"):
        host.step()
    host.close()


def test_a_failing_disk_is_raised_once_and_nothing_goes_on(tmp_path: Path) -> None:
    def fault(what: str, _offset: int, num_bytes: int) -> int:
        if what == "write":
            raise error_of(errno.ENOSPC)
        return num_bytes

    optimizer = FUSED["adamw"](parameters())
    params = optimizer.param_groups[0]["params"]
    before = threading.active_count()
    with offloaded(
        optimizer,
        make_tier=lambda layout: FileTier(layout, lambda n: make_file(tmp_path, n, face=FaultyFace(fault))),
    ) as host:
        give_gradients(params, 0)
        host.submit(params[:2])
        with pytest.raises(StorageError, match="No space left on device"):
            host.wait(params[:2])
        for act in (host.step, host.wait, lambda: host.wait(params[5:6])):
            with pytest.raises(MeshboltError, match="Start again from the last checkpoint"):
                act()
        assert all(param.grad is not None for param in params)
    assert threading.active_count() == before


def test_a_failure_that_nobody_has_waited_for_is_raised_by_close(tmp_path: Path) -> None:
    def fault(what: str, _offset: int, _bytes: int) -> int:
        raise error_of(errno.EIO)

    optimizer = FUSED["adamw"](parameters())
    give_gradients(optimizer.param_groups[0]["params"], 0)
    with (
        pytest.raises(StorageError),
        offloaded(
            optimizer,
            make_tier=lambda layout: FileTier(layout, lambda n: make_file(tmp_path, n, face=FaultyFace(fault))),
        ) as host,
    ):
        host.submit()


def test_threads_of_updates_leave_torchs_own_number_alone() -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(before := 2)
    line = UpdateLine(3)
    seen: list[int] = []
    line.submit(lambda: seen.append(torch.get_num_threads())).result()
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    line.close()
    assert seen == [3]
    assert new == [before] == [torch.get_num_threads()]
    torch.set_num_threads(own)


@pytest.mark.full
def test_a_program_that_closes_nothing_ends() -> None:
    program = (
        "import torch; from meshbolt.offload.host import OffloadedOptimizer\n"
        "p = torch.nn.Parameter(torch.ones(1000)); o = torch.optim.AdamW([p]); p.grad = torch.ones(1000)\n"
        "h = OffloadedOptimizer(o, units={'a': [p]}, threads=2); h.submit(); print('end')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr
