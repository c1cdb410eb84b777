"""Background saving in a single process; `tests/ranks/test_checkpoint_background.py` has it on several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from meshbolt.checkpoint import (
    BackgroundSaver,
    background,
    is_checkpoint,
    load_objects,
    load_tensors,
    remove_directory,
    shard_writer,
    verify_checkpoint,
)
from meshbolt.checkpoint.background import HostCopies
from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError, ConfigError, UnsupportedError


class Gate:
    """Holds the writer until it is opened, and counts how many write at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.writing, self.most = threading.Event(), 0, 0
        self.original = background.save_directory
        monkeypatch.setattr(background, "save_directory", self.save)

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.opened.wait(10)
        self.original(*args, **kwargs)
        self.writing -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def saved(path: Path) -> tuple[float, Any]:
    tensors = {"w": torch.zeros(3)}
    load_tensors(path, tensors)
    return float(tensors["w"][0]), load_objects(path)


def begin(saver: BackgroundSaver, path: Path, value: float) -> torch.Tensor:
    tensor = torch.full((3,), value)
    saver.save(path, tensors={"w": tensor}, objects={"value": [value]})
    return tensor


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path, gate: Gate) -> None:
    saver, path, tensor, objects = BackgroundSaver(), tmp_path / "a.ckpt", torch.ones(3), {"list": [1]}
    saver.save(path, tensors={"w": tensor}, objects=objects)
    tensor.fill_(7)
    objects["list"].append(2)
    assert saver.pending
    assert not is_checkpoint(path)

    gate.opened.set()
    saver.wait()

    assert not saver.pending
    assert saved(path) == (1.0, {"list": [1]})


def test_the_next_save_waits_and_reuses_the_memory(tmp_path: Path, gate: Gate) -> None:
    saver = BackgroundSaver()
    begin(saver, tmp_path / "a.ckpt", 1.0)
    memory = saver._copies._buffers["w"].data_ptr()
    threading.Timer(0.2, gate.opened.set).start()
    begin(saver, tmp_path / "b.ckpt", 2.0)
    assert saved(tmp_path / "a.ckpt")[0] == 1.0
    assert saver._copies._buffers["w"].data_ptr() == memory
    saver.free()

    assert saved(tmp_path / "b.ckpt")[0] == 2.0
    assert gate.most == 1
    assert not saver._copies._buffers


def test_copies_are_apart_from_what_they_are_copies_of() -> None:
    copies, base = HostCopies(), torch.arange(6.0).view(2, 3)
    taken = copies.take({"transposed": base.t(), "part": base[:, 1], "none": torch.empty(0, 3), "one": torch.tensor(2)})
    expected = base.t().clone(), base[:, 1].clone()
    base.zero_()

    assert torch.equal(taken["transposed"], expected[0])
    assert torch.equal(taken["part"], expected[1])
    assert taken["none"].shape == (0, 3)
    assert int(taken["one"]) == 2
    assert copies.take({"part": torch.ones(5)})["part"].shape == (5,)


def test_memory_is_used_again_whether_the_call_is_in_inference_mode_or_not() -> None:
    copies = HostCopies()
    for value in (1.0, 2.0):
        with torch.inference_mode():
            inside = copies.take({"w": torch.full((2,), value)})["w"]
        assert torch.equal(inside, torch.full((2,), value))
        assert torch.equal(copies.take({"w": torch.full((2,), value + 10)})["w"], torch.full((2,), value + 10))
        assert not inside.is_inference()


def refuse_to_write(*_args: Any, **_kwargs: Any) -> None:
    raise CheckpointError("the disk is full")


def test_an_error_is_raised_once_by_whoever_waits_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver, original = BackgroundSaver(), background.save_directory
    monkeypatch.setattr(background, "save_directory", refuse_to_write)
    begin(saver, tmp_path / "a.ckpt", 1.0)
    with pytest.raises(CheckpointError, match="the disk is full"):
        begin(saver, tmp_path / "b.ckpt", 2.0)
    assert "the disk is full" in caplog.text  # also where the program ends and nobody is there to raise it
    assert not saver.failed

    monkeypatch.setattr(background, "save_directory", original)
    begin(saver, tmp_path / "b.ckpt", 2.0)
    saver.wait()
    assert saved(tmp_path / "b.ckpt")[0] == 2.0


def test_an_error_of_any_class_becomes_one_that_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise SystemExit("in a thread")

    monkeypatch.setattr(background, "save_directory", fail)
    saver = BackgroundSaver()
    begin(saver, tmp_path / "a.ckpt", 1.0)
    with pytest.raises(CheckpointError, match=r"a\.ckpt' was not saved.*SystemExit: in a thread"):
        saver.wait()


def bad_saves(path: Path) -> list[tuple[Callable[[BackgroundSaver], None], type[Exception], str]]:
    tensors = {"w": torch.ones(2)}
    return [
        (lambda s: s.save(path, tensors={"w": 3}, objects={}), CheckpointError, "'w' is a int"),  # type: ignore[dict-item]
        (lambda s: s.save(path, tensors=tensors, objects={"f": lambda: 1}), CheckpointError, "cannot be pickled"),
        (lambda s: s.save("nowhere://b/a.ckpt", tensors=tensors, objects={}), UnsupportedError, "no such URL"),
        (lambda s: s.save(path.parent, tensors=tensors, objects={}), CheckpointError, "not a checkpoint of meshbolt"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_what_cannot_be_saved_is_refused_at_the_call(tmp_path: Path, number: int) -> None:
    (tmp_path / "other").touch()
    save, error, said = bad_saves(tmp_path / "a.ckpt")[number]
    saver = BackgroundSaver()
    with pytest.raises(error, match=said):
        save(saver)
    assert not saver.pending
    assert [place.name for place in tmp_path.iterdir()] == ["other"]


def test_a_checkpoint_at_a_url_is_written_in_the_background_too(gate: Gate) -> None:
    url, old, saver = "memory://background/a.ckpt", "memory://background/old.ckpt", BackgroundSaver()
    tensor = torch.ones(3)
    saver.save(f"{url}/", tensors={"w": tensor}, objects={"value": 1})
    saver.follow(lambda: remove_directory(old), removes=old)
    tensor.fill_(7)
    assert [saver.will_exist(place) for place in (url, f"{old}/", "memory://other")] == [True, False, None]
    assert not is_checkpoint(url)

    gate.opened.set()
    saver.wait()
    loaded = {"w": torch.zeros(3)}
    load_tensors(url, loaded)
    assert torch.equal(loaded["w"], torch.ones(3))
    assert load_objects(url) == {"value": 1}
    assert verify_checkpoint(url) == ()


def test_a_file_at_a_url_is_refused_at_the_call() -> None:
    fsspec.filesystem("memory").pipe_file("/background/mine.txt", b"mine")
    saver = BackgroundSaver()
    with pytest.raises(CheckpointError, match="a file of that name already"):
        saver.save("memory://background/mine.txt", tensors={"w": torch.ones(1)}, objects={})
    assert not saver.pending


def test_storage_options_reach_the_storage_and_are_refused_for_a_disk(tmp_path: Path) -> None:
    saver, options = BackgroundSaver(), {"skip_instance_cache": True}
    saver.save("memory://background/options.ckpt", tensors={}, objects={"value": 1}, storage_options=options)
    saver.wait()
    assert load_objects("memory://background/options.ckpt", storage_options=options) == {"value": 1}
    with pytest.raises(ConfigError, match="skip_instance_cache"):
        saver.save(tmp_path / "a.ckpt", tensors={}, objects={}, storage_options=options)


def test_a_relative_path_is_meant_where_the_call_was_made(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saver = BackgroundSaver()
    saver.save("a.ckpt", tensors={}, objects={"value": 1})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    gate.opened.set()
    saver.wait()
    assert load_objects(tmp_path / "a.ckpt") == {"value": 1}


def test_what_follows_waits_for_the_checkpoint(tmp_path: Path, gate: Gate) -> None:
    saver, path, seen = BackgroundSaver(), tmp_path / "a.ckpt", []
    old, link = tmp_path / "old.ckpt", tmp_path / "last.ckpt"
    begin(saver, path, 1.0)
    saver.follow(lambda: seen.append(is_checkpoint(path)), removes=str(old))
    saver.follow(lambda: seen.append(len(seen)), makes=str(link))
    assert seen == []
    assert [saver.will_exist(place) for place in (path, old, link, tmp_path)] == [True, False, True, None]

    gate.opened.set()
    saver.wait()
    assert seen == [True, 1]
    assert saver.will_exist(path) is None
    saver.follow(lambda: seen.append("now"))
    assert seen[-1] == "now"


def test_nothing_follows_a_checkpoint_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_fail = threading.Event()

    def fail(*_args: Any, **_kwargs: Any) -> None:
        may_fail.wait(10)
        refuse_to_write()

    monkeypatch.setattr(background, "save_directory", fail)
    saver, seen = BackgroundSaver(), []
    begin(saver, tmp_path / "a.ckpt", 1.0)
    saver.follow(lambda: seen.append("before"))
    may_fail.set()
    while not saver.failed:
        pass
    saver.follow(lambda: seen.append("after"))
    with pytest.raises(CheckpointError):
        saver.wait()
    assert seen == []


def test_what_follows_and_fails_is_an_error_too(tmp_path: Path, gate: Gate) -> None:
    def fail() -> None:
        raise PermissionError("not yours")

    saver = BackgroundSaver()
    begin(saver, tmp_path / "a.ckpt", 1.0)
    saver.follow(fail)
    gate.opened.set()
    with pytest.raises(
        CheckpointError, match=r"was saved, but what was to follow it failed: PermissionError: not yours"
    ):
        saver.wait()
    assert is_checkpoint(tmp_path / "a.ckpt")


class InThree:
    """Values in three runs."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        yield from (self.values[at : at + 1].clone() for at in range(start, stop))


def test_what_is_not_in_memory_is_written_before_the_call_returns_and_all_else_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, write = threading.Event(), shard_writer.write_chunk

    def write_later(stream: Any, tensor: torch.Tensor, **options: Any) -> Any:
        if not isinstance(tensor, StoredTensor):
            assert opened.wait(10)
        return write(stream, tensor, **options)

    monkeypatch.setattr(shard_writer, "write_chunk", write_later)
    saver, store = BackgroundSaver(), InThree(torch.full((3,), 5.0))
    tensors = {"a": torch.ones(3), "w": StoredTensor(store, shape=(3,), dtype=torch.float32), "z": torch.ones(3)}
    saver.save(tmp_path / "a", tensors=tensors, objects={})
    assert saver.pending
    store.values.fill_(-1)
    opened.set()
    saver.wait()
    found = {key: torch.zeros(3) for key in tensors}
    load_tensors(tmp_path / "a", found)
    assert [float(tensor[0]) for tensor in found.values()] == [1.0, 5.0, 1.0]


def test_a_save_that_fails_does_not_wait_for_what_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "save_directory", fails)
    saver = BackgroundSaver()
    stored = StoredTensor(InThree(torch.ones(3)), shape=(3,), dtype=torch.float32)
    saver.save(tmp_path / "a", tensors={"w": stored}, objects={})
    with pytest.raises(CheckpointError, match="No space left"):
        saver.wait()
