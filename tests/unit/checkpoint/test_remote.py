"""Checkpoints on fsspec's storage, in a single process: the manifest alone says what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.shelf import Shelf

from meshbolt.checkpoint import (
    is_checkpoint,
    load,
    load_objects,
    load_tensors,
    remove_directory,
    save_directory,
    saved_tensors,
    verify_checkpoint,
)
from meshbolt.checkpoint.manifest import seal
from meshbolt.checkpoint.remote import RemotePlace
from meshbolt.errors import CheckpointError, ConfigError, MissingPackageError, UnsupportedError

URL = "memory://runs/last.ckpt"
FOLDER = "/runs/last.ckpt"


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    for path in memory.find("/"):
        memory.rm_file(path)
    memory.pseudo_dirs[:] = [""]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300, 50), value), "step": torch.tensor(value)}


def save(value: float, **options: Any) -> None:
    save_directory(URL, tensors=tensors(value), objects={"value": value}, **options)


def loaded() -> float:
    into = tensors(-1.0)
    load_tensors(URL, into)
    found = {value for tensor in into.values() for value in tensor.unique().tolist()} | {load_objects(URL)["value"]}
    assert len(found) == 1, f"a mix of {found}"
    return float(found.pop())


def folders(store: Any) -> list[str]:
    return sorted(path.rsplit("/", 1)[-1] for path in store.ls(FOLDER, detail=False))


def test_what_is_saved_is_what_is_loaded_and_a_save_replaces(store: Any) -> None:
    for value in (1.0, 2.0):
        save(value)
        assert loaded() == value
        assert len(folders(store)) == 2
    assert is_checkpoint(URL)
    assert set(saved_tensors(URL)) == {"w", "step"}
    assert verify_checkpoint(URL) == ()


def test_removal_leaves_nothing_of_it_and_all_of_its_neighbours(store: Any) -> None:
    save(1.0)
    store.pipe_file("/runs/last.ckpt.txt", b"notes")
    remove_directory(URL)
    assert store.find("/") == ["/runs/last.ckpt.txt"]
    assert not is_checkpoint(URL)
    remove_directory(URL)


def test_the_put_of_the_manifest_is_the_commit(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before it leaves the old checkpoint, and the next save removes what it left."""

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    save(1.0)
    with monkeypatch.context() as patches:
        patches.setattr(type(store), "pipe_file", crash)
        patches.setattr(RemotePlace, "clean_up", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            save(2.0)
    assert loaded() == 1.0
    assert len(folders(store)) == 3
    save(3.0)
    assert loaded() == 3.0
    assert len(folders(store)) == 2


def test_a_crash_after_the_commit_leaves_the_new_one(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1.0)
    with monkeypatch.context() as patches:
        patches.setattr(RemotePlace, "clean_up", lambda *args, **options: None)
        save(2.0)
    assert len(folders(store)) == 3
    assert loaded() == 2.0


def test_a_first_save_that_was_cut_short_is_no_checkpoint_and_no_obstacle(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(RemotePlace, "commit", lambda *args, **options: None)
        patches.setattr(RemotePlace, "clean_up", lambda *args, **options: None)
        save(1.0)
    assert not is_checkpoint(URL)
    with pytest.raises(CheckpointError, match=r"nothing at this path with a manifest\.json"):
        load_objects(URL)
    save(2.0)
    assert loaded() == 2.0
    assert len(folders(store)) == 2


def test_a_manifest_that_a_crash_has_torn_is_found_again_beside_the_data(store: Any) -> None:
    save(1.0)
    content = store.cat_file(f"{FOLDER}/manifest.json")
    store.pipe_file(f"{FOLDER}/manifest.json", content[: len(content) // 2])
    assert is_checkpoint(URL)
    assert loaded() == 1.0
    (data,) = [name for name in folders(store) if name.startswith("data-")]
    store.pipe_file(f"{FOLDER}/{data}/manifest.json", content[:50])
    assert not is_checkpoint(URL)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_objects(URL)


def test_a_save_that_fails_leaves_a_checkpoint_of_another_version_whole(store: Any) -> None:
    """Which of the data belongs to it, only that version knows."""
    save(1.0)
    content = store.cat_file(f"{FOLDER}/manifest.json").decode()
    body = content.replace('"format_version": 3', '"format_version": 4').split(',\n  "checksum": ')[0]
    store.pipe_file(f"{FOLDER}/manifest.json", seal(body).encode())
    before = {path: store.cat_file(path) for path in store.find(FOLDER)}
    assert is_checkpoint(URL)
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        save_directory(URL, tensors=tensors(2.0), objects={"f": lambda: None})
    assert {path: store.cat_file(path) for path in store.find(FOLDER)} == before
    save(3.0)
    assert loaded() == 3.0
    assert len(folders(store)) == 2


@pytest.mark.parametrize("keep_partial", [False, True])
def test_a_failed_save_keeps_its_files_only_if_asked(store: Any, keep_partial: bool) -> None:
    save(1.0)
    with pytest.raises(CheckpointError, match=r"'memory://runs/last\.ckpt' was not saved, .*cannot be pickled"):
        save_directory(URL, tensors=tensors(2.0), objects={"f": lambda: None, "a": 1}, keep_partial=keep_partial)
    assert loaded() == 1.0
    save_directory(URL, tensors=tensors(3.0), objects={"value": 3.0}, keep_partial=keep_partial)
    assert loaded() == 3.0


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("change", ["missing", "short", "flipped"])
def test_damage_is_found_and_named(store: Any, name: str, change: str) -> None:
    save(1.0)
    (path,) = [path for path in store.find(FOLDER) if path.endswith(name)]
    content = bytearray(store.cat_file(path))
    content[len(content) // 2] ^= 1
    if change == "missing":
        store.rm_file(path)
    else:
        store.pipe_file(path, bytes(content if change == "flipped" else content[:-1]))
    with pytest.raises(CheckpointError, match=f"'memory://runs/last.ckpt' cannot be loaded: .*{name}"):
        loaded()
    assert [fault for fault in verify_checkpoint(URL) if fault.startswith(name)]


def test_a_checkpoint_that_is_replaced_under_the_reader_is_read_anew(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_once(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(load, "read_shards", read_shards)
        save(2.0)
        read_shards(*args, **kwargs)

    save(1.0)
    read_shards = load.read_shards
    monkeypatch.setattr(load, "read_shards", replace_once)
    assert loaded() == 2.0


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_checkpoint_is_neither_read_nor_replaced_nor_removed(store: Any, kind: str) -> None:
    path = FOLDER if kind == "file" else f"{FOLDER}/thesis.tex"
    store.pipe_file(path, b"...")
    assert not is_checkpoint(URL)
    with pytest.raises(CheckpointError, match="it is a file" if kind == "file" else "nothing at this path with a"):
        load_objects(URL)
    for act in (lambda: save(1.0), lambda: remove_directory(URL)):
        with pytest.raises(CheckpointError, match=r"there is a (file|folder) of that name already"):
            act()
    assert store.cat_file(path) == b"..."


def test_options_reach_the_file_system_and_are_refused_for_local_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_with_token(self: Shelf, path: str, mode: str = "rb", **options: Any) -> Any:
        assert self.token == "sesame"
        return open_file(self, path, mode, **options)

    open_file = Shelf.open
    monkeypatch.setattr(Shelf, "open", open_with_token)
    url, options = f"shelf://{tmp_path}/runs/a.ckpt", {"token": "sesame"}
    save_directory(url, tensors=tensors(1.0), objects={}, storage_options=options)
    assert (tmp_path / "runs" / "a.ckpt" / "manifest.json").is_file()
    assert is_checkpoint(url, storage_options=options)
    assert "w" in saved_tensors(url, storage_options=options)
    into = tensors(0.0)
    load_tensors(url, into, storage_options=options)
    assert into["w"].eq(1.0).all()
    assert load_objects(url, storage_options=options) == {}
    assert verify_checkpoint(url, storage_options=options) == ()
    remove_directory(url, storage_options=options)
    assert not is_checkpoint(url, storage_options=options)
    with pytest.raises(ConfigError, match=r"storage_options=\['token'\]"):
        is_checkpoint(tmp_path / "a.ckpt", storage_options=options)


def test_schemes_that_cannot_be_reached_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"'shelves://a\.ckpt' cannot be reached.*register_implementation"):
        save_directory("shelves://a.ckpt", tensors={}, objects={})
    with pytest.raises(
        MissingPackageError, match=r"needs a package that is not installed: .*(s3fs|gcsfs|adlfs|pyarrow)"
    ):
        is_checkpoint("hdfs://cluster/a.ckpt")
    with pytest.raises(CheckpointError, match="'memory://' names no directory"):
        load_objects("memory://")
