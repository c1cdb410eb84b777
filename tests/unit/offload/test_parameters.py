"""Shards in a file: what is looked at, what is gathered, and what updates write are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.offload.hosts import FUSED, give_gradients, parameters

from meshbolt.errors import StorageError
from meshbolt.offload.faces import SystemCalls
from meshbolt.offload.files import StateFile
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import PAGE_BYTES
from meshbolt.offload.parameters import AHEAD, ParameterFile
from meshbolt.offload.tiers import FileTier

CPU = torch.device("cpu")


class Slow(SystemCalls):
    """A disk that takes its time to write."""

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        time.sleep(0.003)
        return super().write(fd, data, offset)


class Broken(SystemCalls):
    """A disk that breaks when it is told to."""

    is_broken = False

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if self.is_broken:
            raise OSError(5, "Input/output error")
        return super().read(fd, into, offset)


Make = Callable[..., ParameterFile]


@pytest.fixture
def file_in() -> Iterator[Make]:
    made: list[ParameterFile] = []

    def make(path: Path, face: SystemCalls | None = None) -> ParameterFile:
        made.append(ParameterFile(lambda size: StateFile(path, size, face=face), device=CPU, pin_memory=True))
        return made[-1]

    yield make
    for file in made:
        file.is_changing = lambda _: False
        file.close()


def units(count: int = 5) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {str(n): [torch.randn(size, generator=generator) for size in (3000 + n, 0, 1, 17)] for n in range(count)}


def taken(file: ParameterFile) -> dict[str, list[torch.Tensor]]:
    return {name: file.take(name, shards) for name, shards in units().items()}


def passes(file: ParameterFile, shown: dict[str, list[torch.Tensor]], order: str) -> None:
    for name in order:
        for number, shard in enumerate(shown[name]):
            assert torch.equal(file.fetch(name, number), shard)
    file.drop()


def test_shards_are_what_they_were(file_in: Make, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    shown = taken(file)
    for mine, theirs in zip(shown.values(), units().values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    passes(file, shown, "0123443210")
    assert file.place_of(torch.zeros(3)) is None
    start, stop = file.place_of_unit("2")
    assert file.place_of(shown["2"][0][5:]) == start + 20
    assert file.place_of(shown["2"][3]) < stop  # type: ignore[operator]
    file.close()
    assert torch.equal(shown["0"][0], units()["0"][0])


def test_units_are_read_in_the_order_of_the_pass_before(file_in: Make, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    shown = taken(file)
    passes(file, shown, "0123443210")
    before = file.traffic.read_bytes
    passes(file, shown, "0123443210")
    # Nothing was read in vain, and nothing twice: a unit that is asked for again at once is there.
    assert file.traffic.read_bytes - before == sum(
        stop - start for start, stop in (file.place_of_unit(n) for n in "012343210")
    )
    file.fetch("0", 0)
    assert list(file._ahead) == ["1", "2"][:AHEAD]
    passes(file, shown, "3120340")  # another order is slower, and right


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.mul_(2.0),
        lambda shard: shard.data.add_(1.0),
        lambda shard: torch._foreach_mul_([shard], 2.0),
        lambda shard: shard.numpy().__setitem__(slice(0, 7), 5.0),
    ],
)
def test_what_others_change_is_noticed_and_gathered(
    change: Callable[[torch.Tensor], object], file_in: Make, tmp_path: Path
) -> None:
    file = file_in(tmp_path)
    shown = taken(file)
    passes(file, shown, "0123443210")
    assert not file.was_touched()
    file.fetch("0", 0)  # and "1" is read ahead
    for _ in range(2):  # a second change of the same pages is noticed as well
        change(shown["1"][0])
        assert file.was_touched()
        assert torch.equal(file.fetch("1", 0), shown["1"][0])
        file.clean()
        assert not file.was_touched()
        assert torch.equal(file.fetch("2", 0), shown["2"][0])


def test_a_disk_that_breaks_is_an_error_of_the_gather(file_in: Make, tmp_path: Path) -> None:
    face = Broken()
    file = file_in(tmp_path, face)
    taken(file)
    face.is_broken = True
    with pytest.raises(StorageError, match=r"Reading .* failed: Input/output error"):
        file.fetch("0", 0)


def test_a_unit_that_is_being_changed_is_not_read_ahead(file_in: Make, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    shown = taken(file)
    passes(file, shown, "01234")
    file.is_changing = lambda name: name == "1"
    file.fetch("0", 0)
    assert list(file._ahead) == ["2"]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adagrad"])
@pytest.mark.parametrize("at_once", [True, False])
def test_updates_of_a_slow_disk_are_those_of_memory(kind: str, at_once: bool, file_in: Make, tmp_path: Path) -> None:
    make = FUSED[kind]
    mine, theirs = (make(parameters()) for _ in range(2))
    params, others = (each.param_groups[0]["params"] for each in (mine, theirs))
    halves = {"first": params[: len(params) // 2], "second": params[len(params) // 2 :]}
    shards = file_in(tmp_path, Slow())
    for name, own in halves.items():
        for param, view in zip(own, shards.take(name, [p.detach().view(-1) for p in own]), strict=True):
            param.data = view.view(param.shape)
    host = OffloadedOptimizer(
        mine,
        units=halves,
        make_tier=lambda layout: FileTier(layout, lambda size: StateFile(tmp_path, size)),
        chunk_bytes=4 * PAGE_BYTES,
        threads=2,
        parameters=shards,
    )
    shards.is_changing = lambda name: host.is_updating(halves[name], place=shards.place_of_unit(name))
    for step in range(4):
        for each in (params, others):
            give_gradients(each, step)
        for own in (halves["second"], halves["first"]) if at_once else ():
            host.submit(own)
        host.step(waits=False)
        theirs.step()
        for name, own in halves.items():
            host.wait(own)
            for number, param in enumerate(own):
                found = shards.fetch(name, number)
                assert torch.equal(found, others[_place(params, param)].view(-1))
        shards.drop()
    host.close()


def _place(params: list[torch.nn.Parameter], wanted: torch.nn.Parameter) -> int:
    return next(number for number, param in enumerate(params) if param is wanted)


def test_memory_that_cannot_be_locked_is_refused_before_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("meshbolt.offload.buffers.pin_host_memory", lambda memory: asked.append(memory.nbytes))
    monkeypatch.setattr(ParameterFile, "_let_go_of_buffers", lambda self: None)  # there is no GPU to give them back to
    made: list[StateFile] = []
    file = ParameterFile(
        lambda size: made.append(StateFile(tmp_path, size)) or made[0],  # type: ignore[func-returns-value]
        device=torch.device("cuda"),
        pin_memory=True,
    )
    taken(file)
    with pytest.raises(StorageError, match=r"could not be locked for the GPU, with .*pin_memory=False"):
        file.prepare()
    assert len(asked) == 1
    made[0].close()
