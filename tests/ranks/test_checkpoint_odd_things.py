"""What is seldom in a checkpoint, or seldom beside one, and must not be lost, changed or waited for."""

from __future__ import annotations

import functools
import logging
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.engine_support import made
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from tests.shelf import Shelf
from torch import nn

from meshbolt import CheckpointError
from meshbolt.checkpoint import is_checkpoint, save_directory, saved_tensors
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE


class Versioned(nn.Module):
    """Converts what an older version of it has saved."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: int | None = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.seen = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Odd(Regressor):
    """Buffers whose elements share a place, or whose dtype no backend sends, and a part with versions."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Versioned()
        self.register_buffer("expanded", torch.full((1, 1), float(dist.get_rank())).expand(3, 4))
        self.register_buffer("small", torch.arange(4.0).to(torch.float8_e4m3fn))
        self.register_buffer("phase", torch.full((2,), 1j))
        self.register_buffer("single", torch.zeros(1, 5)[:, 0])


class Counts(pl.Callback):
    """Keeps its state in mappings of other classes than dict."""

    def __init__(self) -> None:
        self.counts: Any = Counter()
        self.order: Any = OrderedDict()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts["batches"] += 1
        self.order["last"] = torch.tensor(self.counts["batches"])

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.order = state["counts"], state["order"]


def save_and_resume(path: Path) -> dict[str, Any]:
    first, again, counts = Odd(), Odd(), Counts()
    owner = trainer("zero2", max_epochs=1, callbacks=[Counts()])
    owner.fit(first, batches())
    owner.save_checkpoint(path)
    trainer("zero3", max_epochs=2, callbacks=[counts]).fit(again, batches(), ckpt_path=path)
    buffers = zip(first.buffers(), again.buffers(), strict=True)
    return {
        "same": all(torch.equal(a.view(-1).float(), b.view(-1).float()) for a, b in buffers if not a.is_complex()),
        "expanded": float(again.expanded.sum()),
        "small": again.small.float().tolist(),
        "phase": again.phase.tolist(),
        "version": again.part.seen,
        "classes": [type(counts.counts).__name__, type(counts.order).__name__],
        "counted": counts.counts["batches"] == int(counts.order["last"]),
    }


def test_odd_buffers_versions_of_modules_and_classes_of_mappings_come_back(tmp_path: Path) -> None:
    for found in run_ranks(save_and_resume, 2, tmp_path / "a.ckpt"):
        assert found == {
            "same": True,
            "expanded": 0.0,
            "small": [0.0, 1.0, 2.0, 3.0],
            "phase": [1j, 1j],
            "version": 2,
            "classes": ["Counter", "OrderedDict"],
            "counted": True,
        }


class FailsToLoad(Regressor):
    """Cannot take its state on one rank."""

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no room for it here")
        return super().load_state_dict(state_dict, *args, **options)


def load_on_one(path: Path) -> None:
    owner = trainer("zero1", max_epochs=1)
    owner.fit(FailsToLoad(), batches())
    owner.save_checkpoint(path)
    trainer("zero1", max_epochs=2).fit(FailsToLoad(), batches(), ckpt_path=path)


def test_a_module_that_fails_to_load_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks_expecting(load_on_one, 2, tmp_path / "a.ckpt", error=ValueError, match="no room for it", timeout=20)


# Fabric -----------------------------------------------------------------------------------------------------------------


def save_in_fabric(path: Path, more: dict[str, Any], **options: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FabricStrategy(zero=2))
    fabric.launch()
    module = made()
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.save(path, {"model": model, **more}, **options)


def fails_on_rank_1(_name: str, _value: Any) -> bool:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("of a filter")
    return True


def test_a_filter_that_fails_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    save = functools.partial(save_in_fabric, tmp_path / "a.ckpt", {}, filter={"model": fails_on_rank_1})
    run_ranks_expecting(save, 2, error=ZeroDivisionError, match="of a filter", timeout=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model.scale": torch.ones(1)}, "have the path 'model.scale'"),
        ({"meshbolt": {"a": 1}}, "keeps notes of its own under 'meshbolt'"),
        ({"meshbolt.random.0.torch": torch.ones(1)}, "keeps notes of its own under 'meshbolt'"),
    ],
)
def test_entries_that_would_take_the_place_of_others_are_refused(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    run_ranks_expecting(save_in_fabric, 2, tmp_path / "a.ckpt", more, error=CheckpointError, match=said, timeout=20)
    assert not list(tmp_path.iterdir())


class FailsOnRank1:
    """An object with a state that one rank cannot take, with an error that cannot travel."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, _: dict[str, int]) -> None:
        if dist.get_rank() == 1:
            raise ValueError("odd here", lambda: None)


def load_an_object(path: Path) -> str:
    save_in_fabric(path, {"object": FailsOnRank1()})
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FabricStrategy(zero=2))
    fabric.launch()
    module = made()
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        fabric.load(path, {"model": model, "object": FailsOnRank1()})
    dist.barrier()
    return str(raised.value)


def test_an_object_that_fails_to_load_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    assert all("odd here" in said for said in run_ranks(load_an_object, 2, tmp_path / "a.ckpt", timeout=20))


# Places -----------------------------------------------------------------------------------------------------------------


class Keeping(Shelf):
    """A storage that nobody may delete from."""

    protocol = "keeping"

    def rm(self, *_: Any, **__: Any) -> None:
        raise PermissionError("nothing is deleted here")

    def rm_file(self, *_: Any, **__: Any) -> None:
        raise PermissionError("nothing is deleted here")


def save_where_nothing_is_deleted(folder: Path) -> list[Any]:
    fsspec.register_implementation("keeping", Keeping, clobber=True)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("meshbolt").addHandler(handler)
    path = f"keeping://{folder}/a.ckpt"
    for value in (1.0, 2.0, 3.0):
        save_directory(path, tensors={"w": torch.full((2,), value)} if dist.get_rank() == 0 else {}, objects={})
        dist.barrier()
    return [sorted(saved_tensors(path)), any("cannot be deleted" in text for text in said)]


def test_a_storage_that_refuses_to_delete_keeps_the_old_and_takes_the_new(tmp_path: Path) -> None:
    assert run_ranks(save_where_nothing_is_deleted, 2, tmp_path, timeout=20) == [[["w"], True], [["w"], False]]


def test_a_checkpoint_inside_another_one_is_refused(tmp_path: Path) -> None:
    outer, value = tmp_path / "outer.ckpt", {"w": torch.ones(2)}
    save_directory(outer, tensors=value, objects={})
    with pytest.raises(CheckpointError, match="is a checkpoint itself"):
        save_directory(outer / "inner.ckpt", tensors=value, objects={})
    save_directory(outer, tensors=value, objects={})


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_directory("~/a.ckpt", tensors={"w": torch.ones(2)}, objects={})
    assert sorted(saved_tensors("~/a.ckpt")) == ["w"]
    assert [place.name for place in tmp_path.iterdir()] == ["a.ckpt"]
    assert not is_checkpoint("~nosuchuser/a.ckpt")
