"""`fabric.save` and `fabric.load`, at once and in the background, and with a CheckpointIO plugin around meshbolt's."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.engine_support import Net, batch, loss_of, made, whole
from tests.ranks.trainer.background_support import before_writing, full_disk_on, saver_of, slow_writer
from tests.rows import full

from meshbolt import Checkpoint, CheckpointError
from meshbolt.checkpoint import is_checkpoint
from meshbolt.fabric import MeshStrategy
from meshbolt.plugins import MeshCheckpointIO
from meshbolt.strategies.compat import WrappingCheckpointIO
from meshbolt.testing import run_ranks


class Run:
    """A Fabric loop that can take a step, and tell all of its state."""

    def __init__(self, zero: int = 3, *, asynchronous: bool = True, **options: Any) -> None:
        strategy = MeshStrategy(zero=zero, checkpoint=Checkpoint(asynchronous=asynchronous))
        self.fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **options)
        self.fabric.launch()
        module = made(Net)
        self.model, self.optimizer = self.fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
        self.steps = 0

    @property
    def strategy(self) -> MeshStrategy:
        assert isinstance(self.fabric.strategy, MeshStrategy)
        return self.fabric.strategy

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "steps": self.steps}

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.fabric.backward(loss_of(self.model, batch(self.steps, self.fabric.global_rank)))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def load(self, path: Path) -> None:
        state = self.state
        self.fabric.load(path, state)
        self.steps = state["steps"]

    def values(self) -> dict[str, torch.Tensor]:
        found = {name: whole(value) for name, value in self.model.state_dict().items()}
        state = self.strategy._state_of(self.optimizer.optimizer)["state"]
        return found | {f"{key} {name}": whole(value) for name, s in state.items() for key, value in s.items()}


def save_and_go_on(path: Path, zero: int) -> bool:
    run, gone_on = Run(zero), threading.Event()
    before_writing(lambda _: gone_on.wait(20))
    run.step(3)
    expected = run.values()
    run.fabric.save(path, run.state)
    run.step(4)
    early = is_checkpoint(path)
    gone_on.set()
    run.strategy.wait_for_checkpoint()
    assert is_checkpoint(path)
    later = run.values()
    assert run.steps == 7
    run.load(path)
    assert run.steps == 3
    assert expected.keys() == later.keys() == run.values().keys()
    assert [name for name, value in run.values().items() if not torch.equal(value, expected[name])] == []
    assert not torch.equal(later["into.weight"], expected["into.weight"])
    run.step(4)
    assert [name for name, value in run.values().items() if not torch.equal(value, later[name])] == []
    return early


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_what_loads_is_the_state_at_the_call_whatever_ran_meanwhile(tmp_path: Path, zero: int) -> None:
    assert run_ranks(save_and_go_on, 2, tmp_path / "a.ckpt", zero) == [False] * 2


def one_at_a_time(folder: Path) -> list[bool]:
    slow_writer(0.3)
    run, seen = Run(), []
    run.step()
    run.fabric.save(folder / "a.ckpt", run.state)
    seen.append(is_checkpoint(folder / "a.ckpt"))
    run.fabric.save(folder / "b.ckpt", run.state)
    seen += [is_checkpoint(folder / "a.ckpt"), is_checkpoint(folder / "b.ckpt")]
    run.load(folder / "b.ckpt")
    return seen


def test_the_next_save_and_a_load_wait(tmp_path: Path) -> None:
    assert run_ranks(one_at_a_time, 2, tmp_path) == [[False, True, False]] * 2


def fail_to_write(path: Path, optimizers: int) -> tuple[str, int]:
    full_disk_on(1)
    run = Run()
    again = torch.optim.SGD([p for g in run.optimizer.param_groups for p in g["params"]], lr=1e-3)
    others = [run.fabric.setup_optimizers(again) for _ in range(optimizers - 1)]
    run.step(2)
    run.fabric.save(path, run.state)
    while not saver_of(run).failed:
        time.sleep(0.01)
    taken: list[int] = []

    def go_on() -> None:
        for index in range(20):
            run.step()
            for other in others:
                other.step()
            taken.append(index)

    with pytest.raises(CheckpointError) as raised:
        go_on()
    run.step()
    return str(raised.value), len(taken)


@pytest.mark.parametrize("optimizers", [1, 2])
def test_an_error_of_the_writer_is_raised_by_all_ranks_at_the_same_of_the_next_steps(
    tmp_path: Path, optimizers: int
) -> None:
    first, second = run_ranks(fail_to_write, 2, tmp_path / "a.ckpt", optimizers)
    assert first == second
    assert "rank 1: file __1_0.distcp: OSError: [Errno 28] No space left on device" in first[0]
    assert first[1] == 1


def fail_and_wait(path: Path) -> str:
    full_disk_on(0)
    run = Run()
    run.fabric.save(path, run.state)
    with pytest.raises(CheckpointError) as raised:
        run.strategy.wait_for_checkpoint()
    run.strategy.wait_for_checkpoint()
    return str(raised.value)


def test_waiting_raises_the_error_once(tmp_path: Path) -> None:
    first, second = run_ranks(fail_and_wait, 2, tmp_path / "a.ckpt")
    assert first == second
    assert "No space left" in first


# A plugin around meshbolt's ----------------------------------------------------------------------------------------------


class Recording(WrappingCheckpointIO):
    """Notes who calls it with what, and adds something of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.seen.append(("save", sorted(checkpoint), Path(path).name, storage_options))
        super().save_checkpoint({**checkpoint, "note": "of the plugin"}, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().load_checkpoint(path, *args, **kwargs)
        self.seen.append(("load", found.pop("note"), Path(path).name))
        return found


def save_through(folder: Path, asynchronous: bool) -> list[Any]:
    io = Recording(MeshCheckpointIO())
    run = Run(asynchronous=asynchronous, plugins=[io])
    run.step(2)
    expected = run.values()
    # Each rank gives its own path; the first one's counts. Fabric itself unwraps optimizers, and has no storage options.
    state = {**run.state, "optimizer": run.optimizer.optimizer}
    run.strategy.save_checkpoint(folder / f"{dist.get_rank()}.ckpt", state, storage_options={"mine": 1})
    run.step()
    run.load(folder / "0.ckpt")
    assert [name for name, value in run.values().items() if not torch.equal(value, expected[name])] == []
    return io.seen


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_plugin_around_it_is_called_on_every_rank_with_dictionary_and_path(
    tmp_path: Path, asynchronous: bool
) -> None:
    saved = ("save", ["model", "optimizer", "steps"], "0.ckpt", {"mine": 1})
    seen = run_ranks(save_through, 2, tmp_path, asynchronous)
    assert seen == [[saved, ("load", "of the plugin", "0.ckpt")]] * 2


class Misbehaving(WrappingCheckpointIO):
    """Does something on rank 1 that it does not do on rank 0."""

    def __init__(self, call: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()
        self.call = call

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if dist.get_rank() == 0:
            return super().save_checkpoint(checkpoint, path)
        return self.call(super().save_checkpoint, checkpoint, path)


def fail(*_: Any) -> None:
    raise ValueError("not on this rank")


def save_badly(path: Path, call: Callable[[Any, Any, Any], None]) -> str:
    run = Run(plugins=[Misbehaving(call)])
    with pytest.raises((CheckpointError, ValueError)) as raised:
        run.fabric.save(path, run.state)
    run.step()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_plugin_that_calls_on_from_some_ranks_only_is_an_error_on_all(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for call, expected in ((lambda *_: None, "None"), (lambda save, c, p: save(c, f"{p}x"), "a.ckptx")):
        first, second = run_ranks(save_badly, 2, path, call)
        assert first == second
        assert "CheckpointError: The CheckpointIO plugin Misbehaving failed: it must call" in first
        assert expected in first
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_fails_on_some_ranks_only_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(save_badly, 2, tmp_path / "a.ckpt", fail)
    assert first.startswith("CheckpointError: The CheckpointIO plugin Misbehaving failed")
    assert "rank 1: ValueError: not on this rank" in first
    assert second == first


# The end of the program -------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys, time
    import torch
    from lightning.fabric import Fabric
    from meshbolt import Checkpoint, CheckpointError
    from meshbolt.checkpoint import background
    from meshbolt.fabric import MeshStrategy

    original = background.save_directory

    def save(*args, **kwargs):
        time.sleep(1)
        if sys.argv[2] == "fail":
            raise CheckpointError("the disk is full")
        original(*args, **kwargs)

    background.save_directory = save
    fabric = Fabric(accelerator="cpu", devices=1, strategy=MeshStrategy(checkpoint=Checkpoint(asynchronous=True)))
    fabric.launch()
    module = torch.nn.Linear(2, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.save(sys.argv[1], {"model": model})
    if sys.argv[2] == "raise":
        raise SystemExit("had enough")
    print("the end", flush=True)
"""


@pytest.mark.parametrize("ending", [full("return"), full("raise"), "fail"])
def test_a_program_ends_when_its_checkpoint_is_whole_and_is_never_silent_about_a_failure(
    tmp_path: Path, ending: str
) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "a.ckpt"), ending]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == (1 if ending == "raise" else 0), done.stderr[-3000:]
    assert is_checkpoint(tmp_path / "a.ckpt") == (ending != "fail"), done.stderr[-3000:]
    assert ("the disk is full" in done.stderr) == (ending == "fail")
