"""If these fail, what `state_shown` shows of a file has other values than the file, or changes of it are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.offload.faulty import FaultyFace, make_file
from tests.unit.offload.hosts import FUSED, assert_same, give_gradients, offloaded, parameters
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import StoredTensor
from meshbolt.errors import StorageError
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import PAGE_BYTES, Layout
from meshbolt.offload.tiers import FileTier

LARGE = 1  # the number of a parameter of ten pages, cut into several chunks


class Files:
    """Makes tiers in files, and has them."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options, self.tiers = folder, options, list[FileTier]()

    def __call__(self, layout: Layout) -> FileTier:
        self.tiers.append(FileTier(layout, lambda num_bytes: make_file(self.folder, num_bytes, **self.options)))
        return self.tiers[-1]

    @property
    def read_bytes(self) -> int:
        return sum(file.traffic.read_bytes for tier in self.tiers for file in tier.files)


def step(host: OffloadedOptimizer, other: Optimizer, number: int) -> None:
    for optimizer in (host.optimizer, other):
        give_gradients(optimizer.param_groups[0]["params"], number)
    host.step()
    other.step()


def trained(files: Files, *, name: str = "adamw") -> Any:
    mine, theirs = FUSED[name](parameters()), FUSED[name](parameters())
    return offloaded(mine, make_tier=files), mine, theirs


def large(optimizer: Optimizer) -> nn.Parameter:
    return optimizer.param_groups[0]["params"][LARGE]  # type: ignore[no-any-return]


def test_nothing_is_read_before_it_is_used_and_then_little_more_than_it_is(tmp_path: Path) -> None:
    files = Files(tmp_path)
    context, mine, theirs = trained(files)
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            shown = mine.state[large(mine)]["exp_avg"]
        assert isinstance(shown, StoredTensor)
        assert large(mine) not in {p for p, s in mine.state.items() if "exp_avg" in s}
        before = files.read_bytes
        found = torch.cat([run.clone() for run in shown.runs(100, 2000)])
        assert torch.equal(found, theirs.state[large(theirs)]["exp_avg"][100:2000])
        assert files.read_bytes - before <= 1900 * 4 + 4 * PAGE_BYTES


def test_a_read_waits_for_updates_that_are_under_way(tmp_path: Path) -> None:
    def slowly(what: str, _offset: int, num_bytes: int) -> int:
        time.sleep(0.02 if what == "write" else 0.0)
        return num_bytes

    context, mine, theirs = trained(Files(tmp_path, face=FaultyFace(slowly)))
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            shown = mine.state[large(mine)]["exp_avg"]
        for optimizer in (mine, theirs):
            give_gradients(optimizer.param_groups[0]["params"], 1)
        theirs.step()
        host.submit()
        assert torch.equal(shown.value(), theirs.state[large(theirs)]["exp_avg"])


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_changes_of_a_part_are_taken_when_it_is_shown_no_more(name: str, tmp_path: Path) -> None:
    context, mine, theirs = trained(Files(tmp_path), name=name)
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            for optimizer in (mine, theirs):
                for value in optimizer.state[large(optimizer)].values():
                    value.view(-1)[:1000].mul_(3) if value.dim() else None
        with host.state_shown():
            assert_same(mine, theirs)
        step(host, theirs, 1)
        with host.state_shown():
            assert_same(mine, theirs)


def test_what_is_shown_of_one_parameter_can_be_put_to_another(tmp_path: Path) -> None:
    context, mine, theirs = trained(Files(tmp_path))
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            own = mine.state[large(mine)]
            own["exp_avg"] = own["exp_avg_sq"].detach()
            own["exp_avg_sq"] = mine.state[large(mine)]["exp_avg"] * 2
        other = theirs.state[large(theirs)]
        other["exp_avg"] = other["exp_avg_sq"].clone()
        other["exp_avg_sq"] *= 2
        step(host, theirs, 1)
        with host.state_shown():
            assert_same(mine, theirs)


def test_state_of_others_comes_to_memory(tmp_path: Path) -> None:
    context, mine, theirs = trained(Files(tmp_path))
    stranger = nn.Parameter(torch.zeros(5000))
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            mine.state[stranger] = {"exp_avg": mine.state[large(mine)]["exp_avg"].detach()}
        found = mine.state[stranger]["exp_avg"]
        assert not isinstance(found, StoredTensor)
        assert torch.equal(found, theirs.state[large(theirs)]["exp_avg"])


def test_a_parameter_in_another_order_of_memory_is_shown_as_it_is(tmp_path: Path) -> None:
    values = torch.randn(30, 50)
    mine, theirs = (torch.optim.AdamW([nn.Parameter(values.clone().t())], fused=True) for _ in range(2))

    def both() -> None:
        gradient = torch.randn(30, 50)
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["params"][0].grad = gradient.clone().t()
        host.step()
        theirs.step()

    with offloaded(mine, make_tier=Files(tmp_path)) as host:
        both()
        with host.state_shown():
            assert_same(mine, theirs)
            for optimizer in (mine, theirs):
                optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].add_(torch.arange(30.0))
        both()
        with host.state_shown():
            own, other = (optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in (mine, theirs))
            assert_same(mine, theirs)
            new = torch.randn(50, 30)
            own["exp_avg"] = StoredTensor(Elsewhere(new), shape=(50, 30), dtype=torch.float32)
            other["exp_avg"].copy_(new)
        both()
        with host.state_shown():
            assert_same(mine, theirs)


class Elsewhere:
    """Values of a checkpoint, in row-major order."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        yield self.values.reshape(-1)[start:stop]


def test_it_follows_state_that_comes_back_to_memory(tmp_path: Path) -> None:
    context, mine, theirs = trained(Files(tmp_path))
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            shown = mine.state[large(mine)]["exp_avg"]
        assert host.bring_back(10**9) > 0
        step(host, theirs, 1)
        assert torch.equal(shown.value(), theirs.state[large(theirs)]["exp_avg"])
        for value in (shown, theirs.state[large(theirs)]["exp_avg"]):
            value.mul_(2)
        step(host, theirs, 2)
        with host.state_shown():
            assert_same(mine, theirs)


def test_a_read_that_is_left_half_way_leaves_the_file_usable(tmp_path: Path) -> None:
    context, mine, theirs = trained(Files(tmp_path))
    with context as host:
        step(host, theirs, 0)
        with host.state_shown():
            runs = mine.state[large(mine)]["exp_avg"].runs()
            next(runs)
            runs.close()
        step(host, theirs, 1)
        with host.state_shown():
            assert_same(mine, theirs)


def test_a_file_that_cannot_be_read_raises_and_is_not_out_of_use(tmp_path: Path) -> None:
    broken: list[bool] = []

    def fault(what: str, _offset: int, num_bytes: int) -> int:
        if broken and what == "read":
            raise OSError(5, "Input/output error")
        return num_bytes

    context, mine, theirs = trained(Files(tmp_path, face=FaultyFace(fault)))
    with context as host:
        step(host, theirs, 0)
        host.wait()
        with host.state_shown():
            shown = mine.state[large(mine)]["exp_avg"]
            broken.append(True)
            with pytest.raises(StorageError, match="Input/output error"):
                shown.value()
            broken.clear()
            assert torch.equal(shown.value(), theirs.state[large(theirs)]["exp_avg"])
