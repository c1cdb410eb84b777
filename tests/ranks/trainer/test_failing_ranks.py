"""A rank that fails anywhere in a run ends all others within seconds, which say where and why; with every plan."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.fabric as lf
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, dataset, trainer
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meshbolt import Checkpoint, MeshStrategy, TensorParallel
from meshbolt.checkpoint import is_checkpoint
from meshbolt.errors import RankError
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.strategies.compat import default_store
from meshbolt.testing import RankFailure, run_ranks

pytestmark = [
    *ADVICE,
    pytest.mark.filterwarnings(
        "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
    ),
]

# Of a collective. A rank that was left alone would wait so long, since the others' processes stay.
TIMEOUT_SECONDS = 60
SOON_SECONDS = 20
FAILING, BATCH = 1, 2
DIVIDED = TensorParallel(2, plan={"inp": "colwise_gather"})


class FailsAlone(Regressor):
    """Meets an error at one place of the third batch, on one rank."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.batch = place, 0

    def fail_at(self, place: str, batch: int | None = None) -> None:
        if place == self.place and BATCH in (self.batch, batch) and dist.get_rank() == FAILING:
            raise ValueError(f"only here, in {place}")

    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        self.batch = index
        self.fail_at("on_train_batch_start")

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.fail_at("training_step")
        if self.place == "backward":
            loss.register_hook(lambda _gradient: self.fail_at("backward"))
        return loss

    def configure_optimizers(self) -> Any:
        self.fail_at("configure_optimizers", batch=BATCH)
        made = super().configure_optimizers()
        made["optimizer"].register_step_pre_hook(lambda *_: self.fail_at("optimizer_step"))
        return made

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking:
            self.fail_at("validation_step", batch=index)
        super().validation_step(batch, index)


class FailsInCallback(pl.Callback):
    def on_train_batch_end(self, _trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.fail_at("on_train_batch_end")


class Samples(Dataset[Any]):
    """Of which one cannot be read, on one rank."""

    def __init__(self, module: FailsAlone) -> None:
        self.module, self.values = module, dataset()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        self.module.fail_at("dataloader")
        return self.values[index]


def told(run: Callable[[], object]) -> tuple[float, float, str, str]:
    """Return when a run has ended, after how many seconds, and with what."""
    began = time.monotonic()
    try:
        run()
    except Exception as error:  # every kind is looked at by the test
        ended = time.monotonic()
        stay_for_the_others()
        return ended, ended - began, type(error).__name__, str(error)
    return 0.0, 0.0, "nothing", ""


def stay_for_the_others() -> None:
    """Keep this process, and so its connections, as a notebook does, until all ranks have ended, or would have."""
    store = default_store()
    store.set(f"ended/{dist.get_rank()}", "")
    with contextlib.suppress(RuntimeError):
        store.wait([f"ended/{rank}" for rank in range(dist.get_world_size())], timedelta(seconds=SOON_SECONDS))


def fit(place: str, settings: dict[str, Any], folder: Path) -> tuple[float, float, str, str]:
    module = FailsAlone(place)
    owner = trainer(MeshStrategy(**settings), callbacks=[FailsInCallback(), OnExceptionCheckpoint(folder)])
    loader = DataLoader(Samples(module), batch_size=3)
    return told(lambda: owner.fit(module, loader, batches()))


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("training_step", {"zero": 3}),
        ("on_train_batch_end", {"zero": 2}),
        ("optimizer_step", {"zero": 1}),
        ("dataloader", {"zero": 0}),
        full("training_step", {"zero": 0}),
        full("training_step", {"zero": 1}),
        full("training_step", {"zero": 2}),
        full("on_train_batch_end", {"zero": 3}),
        full("on_train_batch_start", {"zero": 2}),
        full("backward", {"zero": 1}),
        full("backward", {"zero": 2}),
        full("backward", {"zero": 3}),
        full("optimizer_step", {"zero": 3}),
        full("validation_step", {"zero": 3}),
        full("configure_optimizers", {"zero": 2}),
        full("training_step", {"zero": 2, "tensor_parallel": DIVIDED}),
        full("on_train_batch_end", {"zero": 0, "tensor_parallel": DIVIDED}),
        full("on_train_batch_end", {"zero": 1, "pipeline_parallel": 2}),
        full("dataloader", {"zero": 3, "offload": "cpu"}),
    ],
)
def test_all_ranks_end_soon_with_the_error_of_the_one_that_failed(
    place: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    (at, seconds, name, said), failing = run_ranks(fit, 2, place, settings, tmp_path, timeout=TIMEOUT_SECONDS)
    assert failing[2:] == ("ValueError", f"only here, in {place}"), failing[3]
    assert name == "RankError", said
    stage = r" \(stage 1 of 2\)" if "pipeline_parallel" in settings else ""
    first, *trace, last = said.splitlines()
    assert re.fullmatch(rf"rank 1{stage} failed: ValueError: only here, in {place}", first)
    assert "fail_at" in "".join(trace)
    assert re.fullmatch(r"This is rank 0.*, which (waited for it in \w+|cannot go on without it)\.", last)
    assert at > failing[0] or place == "dataloader", "the rank that failed shows its error first"
    assert max(seconds, failing[1]) < SOON_SECONDS
    # A batch that cannot be loaded ends all ranks together, which may still save; else there is no checkpoint of half of them.
    assert [each.name for each in tmp_path.iterdir()] == (["on_exception.ckpt"] if place == "dataloader" else [])


class KeepsSaving(pl.Callback):
    """Begins to write a checkpoint just before a rank fails, slowly."""

    def on_train_batch_end(self, owner: pl.Trainer, module: Any, _outputs: Any, _batch: Any, index: int) -> None:
        if index == BATCH:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("os.fsync", lambda fd, _plain=os.fsync: (time.sleep(0.2), _plain(fd)))
                owner.save_checkpoint(self.path)
                self.patched = patched
                module.fail_at("on_train_batch_end")

    def __init__(self, path: Path) -> None:
        self.path = path


def fail_while_saving(path: Path) -> tuple[float, float, str, str]:
    module = FailsAlone("on_train_batch_end")
    strategy = MeshStrategy(zero=2, checkpoint=Checkpoint(asynchronous=True))
    owner = trainer(strategy, callbacks=[KeepsSaving(path)])
    return told(lambda: owner.fit(module, batches()))


def test_a_checkpoint_that_is_being_written_when_a_rank_fails_is_finished(tmp_path: Path) -> None:
    waiting, failing = run_ranks(fail_while_saving, 2, tmp_path / "last.ckpt", timeout=TIMEOUT_SECONDS)
    assert (waiting[2], failing[2]) == ("RankError", "ValueError"), waiting[3]
    assert is_checkpoint(tmp_path / "last.ckpt")


class Dies(FailsAlone):
    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        if index == BATCH and self.global_rank == FAILING:
            os._exit(7)


def fit_until_a_rank_dies(folder: Path) -> None:
    trainer("zero3", callbacks=[OnExceptionCheckpoint(folder)]).fit(Dies(""), batches())


def test_a_rank_that_dies_is_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(fit_until_a_rank_dies, 2, tmp_path, timeout=TIMEOUT_SECONDS)
    waiting, dead = failure.value.outcomes
    assert (dead.kind, dead.exit_code) == ("died", 7)
    assert waiting.raised(RankError), waiting
    assert re.match(r"rank 0 waited in \w+ for another rank, which is gone .* has left no word", waiting.message), (
        waiting
    )
    assert "The above exception was the direct cause" in waiting.traceback
    assert not list(tmp_path.iterdir())


def test_a_rank_without_others_waits_for_nobody(tmp_path: Path) -> None:
    def alone() -> float:
        began = time.monotonic()
        with pytest.raises(ValueError, match="only here"):
            trainer("zero2").fit(_FailsAlways(), batches())
        return time.monotonic() - began

    assert run_ranks(alone, 1) < [1.5]


class _FailsAlways(Regressor):
    def training_step(self, batch: Any, index: int) -> Tensor:
        raise ValueError("only here")


def end_from_another_thread() -> tuple[str, str]:
    strategy = FabricStrategy(zero=2)
    lf.Fabric(accelerator="cpu", devices=2, strategy=strategy).launch()
    if dist.get_rank() == 0:
        threading.Timer(0.1, lambda: strategy.failures.end(RankError("rank 1 is late"))).start()
    else:
        time.sleep(1)
    _, _, *found = told(lambda: strategy.failures.run("a step", dist.barrier))
    return found[0], found[1]


def test_a_watch_in_another_thread_ends_the_wait_of_a_rank_with_its_own_error() -> None:
    watching, late = run_ranks(end_from_another_thread, 2, timeout=TIMEOUT_SECONDS)
    assert watching == ("RankError", "rank 1 is late")
    assert late[0] == "RankError"
    assert late[1].startswith("rank 0 failed: meshbolt.errors.RankError: rank 1 is late"), late[1]


# Fabric -----------------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.fail_at("forward")
        return self.layers(x)

    def fail_at(self, place: str) -> None:
        if self.place == place and dist.get_rank() == FAILING:
            raise ValueError(f"only here, in {place}")


def loop(place: str) -> None:
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(zero=3))
    fabric.launch()
    plain = Layers(place)
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    optimizer.register_step_pre_hook(lambda *_: plain.fail_at("step"))
    for _ in range(3):
        loss = model(torch.ones(2, 4)).sum()
        loss.register_hook(lambda _gradient: plain.fail_at("backward"))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        plain.fail_at("loop")


def train_in_fabric(place: str) -> tuple[float, float, str, str]:
    return told(lambda: loop(place))


@pytest.mark.parametrize(
    ("place", "waiting_in"),
    [
        ("forward", "the forward pass|fabric.backward"),
        full("backward", "fabric.backward"),
        full("step", "the forward pass"),
    ],
)
def test_all_ranks_of_a_loop_of_fabric_end_soon(place: str, waiting_in: str) -> None:
    (at, seconds, name, said), failing = run_ranks(train_in_fabric, 2, place, timeout=TIMEOUT_SECONDS)
    assert failing[2:] == ("ValueError", f"only here, in {place}")
    assert name == "RankError", said
    assert said.startswith(f"rank 1 failed: ValueError: only here, in {place}\n")
    assert re.search(rf"This is rank 0, which waited for it in ({waiting_in})\.$", said), said
    assert at > failing[0]
    assert seconds < SOON_SECONDS


def end_as_a_script(place: str) -> str:
    """Leave an exception to the interpreter, which would end the process; return what it shows."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        try:
            loop(place)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return shown.getvalue().replace(f"[rank{dist.get_rank()}]: ", "")  # torch's


def test_what_ends_a_script_in_its_own_loop_is_told_as_well() -> None:
    waiting, failing = run_ranks(end_as_a_script, 2, "loop", timeout=TIMEOUT_SECONDS)
    assert failing.endswith("ValueError: only here, in loop\n")
    assert "RankError" not in failing
    assert "RankError: rank 1 failed: ValueError: only here, in loop\n(in the loop; what it was doing:)" in waiting


def fork_in_fabric() -> tuple[str, str]:
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(zero=2, start_method="fork"))
    try:
        fabric.launch(_evaluate_alone)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _evaluate_alone(fabric: lf.Fabric) -> None:
    if fabric.global_rank == FAILING:
        raise ValueError("only here")
    fabric.barrier()


@pytest.mark.full
def test_what_ends_a_function_that_fabric_has_started_is_told_as_well(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.ranks.trainer.test_failing_ranks import fork_in_fabric\nprint(*fork_in_fabric(), sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    assert "ValueError: only here" in done.stdout + done.stderr
