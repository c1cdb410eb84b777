"""Paths, the commit and removal: at no moment is there neither the old nor the new checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.checkpoint import directory, is_checkpoint, remove_directory
from meshbolt.checkpoint.local import LocalPlace
from meshbolt.checkpoint.manifest import Manifest
from meshbolt.errors import CheckpointError, UnsupportedError

NAME = "last.ckpt"


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def checkpoint(place: Path, *, save_id: str = "new") -> Path:
    place.mkdir()
    (place / "__0_0.distcp").write_text(save_id)
    (place / "manifest.json").write_text(
        Manifest(save_id=save_id, world_size=1, versions={}, plan={}, files={}).to_json()
    )
    return place


def content(place: Path) -> str:
    return (place / "__0_0.distcp").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def commit_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a checkpoint: the kernel's exchange, and what is left where it has none."""
    if request.param == "two renames":
        monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    return str(request.param)


def test_a_commit_gives_the_name(tmp_path: Path) -> None:
    directory.commit(checkpoint(tmp_path / ".partial"), target=tmp_path / NAME)
    assert names_in(tmp_path) == [NAME]
    assert content(tmp_path / NAME) == "new"


def test_a_commit_replaces_a_checkpoint_and_keeps_the_old_one_beside_it(tmp_path: Path, commit_way: str) -> None:
    checkpoint(tmp_path / NAME, save_id="old")
    partial = checkpoint(directory.partial_of(tmp_path / NAME, save_id="1"))
    directory.commit(partial, target=tmp_path / NAME)
    assert content(tmp_path / NAME) == "new"
    old = partial if commit_way == "exchange" else directory.previous_of(tmp_path / NAME)
    assert content(old) == "old"


@pytest.mark.parametrize("kind", ["file", "empty directory", "dangling link", "link to another checkpoint"])
def test_a_commit_replaces_a_file_an_empty_directory_and_a_link(tmp_path: Path, kind: str, commit_way: str) -> None:
    target, other = tmp_path / NAME, tmp_path / "other.ckpt"
    if kind == "file":
        target.write_text("a single file")
    elif kind == "empty directory":
        target.mkdir()
    else:
        if kind != "dangling link":
            checkpoint(other, save_id="other")
        target.symlink_to(other.name)
    directory.commit(checkpoint(tmp_path / ".partial"), target=target)
    assert content(target) == "new"
    assert not target.is_symlink()
    if other.exists():
        assert content(other) == "other"


def test_a_leftover_of_an_earlier_crash_is_no_obstacle_to_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    checkpoint(tmp_path / NAME, save_id="old")
    checkpoint(directory.previous_of(tmp_path / NAME), save_id="older")
    directory.commit(checkpoint(tmp_path / ".partial"), target=tmp_path / NAME)
    assert content(tmp_path / NAME) == "new"
    assert content(directory.previous_of(tmp_path / NAME)) == "old"


def test_the_old_checkpoint_gets_its_name_back_where_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    checkpoint(tmp_path / NAME, save_id="old")
    with pytest.raises(FileNotFoundError):
        directory.commit(tmp_path / "not there", target=tmp_path / NAME)
    assert names_in(tmp_path) == [NAME]


def test_the_kernel_exchanges_two_directories_in_one_step(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a", save_id="a"), checkpoint(tmp_path / "b", save_id="b")
    if not directory.exchange(first, second):
        pytest.skip("this system has no RENAME_EXCHANGE")
    assert (content(first), content(second)) == ("b", "a")


def test_an_exchange_with_nothing_fails_as_the_system_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        directory.exchange(checkpoint(tmp_path / "a"), tmp_path / "nothing")


def test_a_reader_takes_the_previous_checkpoint_only_while_there_is_none_of_the_name(tmp_path: Path) -> None:
    target = tmp_path / NAME
    checkpoint(directory.previous_of(target), save_id="old")
    assert content(directory.find(target)) == "old"
    assert is_checkpoint(target)
    checkpoint(target, save_id="new")
    assert content(directory.find(target)) == "new"


def test_a_reader_that_just_missed_a_replacement_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_too_early(place: Path) -> Path:
        monkeypatch.setattr(directory, "find", find)
        return directory.previous_of(place)

    find = directory.find
    monkeypatch.setattr(directory, "find", find_too_early)
    assert LocalPlace(checkpoint(tmp_path / NAME)).find().manifest.save_id == "new"


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_text("")
    (tmp_path / "unfinished.ckpt").mkdir()
    for name, message in (
        ("nothing.ckpt", "nothing at this path"),
        ("file.ckpt", "is a file"),
        ("unfinished.ckpt", r"no manifest\.json"),
    ):
        assert not is_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            directory.find(tmp_path / name)


@pytest.mark.parametrize("path", ["", "/", "//"])
def test_a_path_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="names no directory"):
        directory.local_path(path)


def test_a_url_of_another_storage_is_no_local_path() -> None:
    with pytest.raises(UnsupportedError, match=r"'s3://bucket/last\.ckpt' is a URL"):
        directory.local_path("s3://bucket/last.ckpt")


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_url_of_the_local_file_system_is_a_path(tmp_path: Path, scheme: str) -> None:
    assert directory.local_path(f"{scheme}://{tmp_path}/last.ckpt") == tmp_path / "last.ckpt"
    checkpoint(tmp_path / NAME)
    assert is_checkpoint(f"{scheme}://{tmp_path}/{NAME}")
    remove_directory(f"{scheme}://{tmp_path}/{NAME}")
    assert not names_in(tmp_path)


def test_removal_takes_the_checkpoint_and_all_that_saves_of_its_name_left(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / NAME)
    checkpoint(directory.previous_of(target))
    directory.partial_of(target, save_id="1").mkdir()
    neighbour = checkpoint(tmp_path / "last.ckpt-v1.ckpt")
    directory.partial_of(neighbour, save_id="2").mkdir()
    remove_directory(target)
    assert names_in(tmp_path) == [".last.ckpt-v1.ckpt.partial-2", "last.ckpt-v1.ckpt"]


def test_removal_of_nothing_does_nothing(tmp_path: Path) -> None:
    remove_directory(tmp_path / "no" / "such.ckpt")
    assert not names_in(tmp_path)


def test_removal_of_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    best = checkpoint(tmp_path / "best.ckpt")
    (tmp_path / NAME).symlink_to(best.name)
    remove_directory(tmp_path / NAME)
    assert names_in(tmp_path) == ["best.ckpt"]
    assert is_checkpoint(best)


def test_removal_takes_a_single_file(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("a single file")
    remove_directory(tmp_path / NAME)
    assert not names_in(tmp_path)


def test_a_directory_of_another_kind_is_neither_removed_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(CheckpointError, match="not a checkpoint of meshbolt"):
        remove_directory(tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="not a checkpoint of meshbolt"):
        directory.refuse_foreign(tmp_path / "thesis")
    assert names_in(tmp_path / "thesis") == ["chapter1.tex"]


@pytest.mark.parametrize("content", ["{}", '{"name": "an app", "version": "2", "files": {}}', "", "\x00\x01"])
def test_a_manifest_of_something_else_does_not_make_a_directory_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(content)
    for attempt in (remove_directory, directory.refuse_foreign):
        with pytest.raises(CheckpointError, match="not a checkpoint of meshbolt"):
            attempt(tmp_path / "app")
    assert names_in(tmp_path / "app") == ["manifest.json"]


def test_a_checkpoint_with_a_damaged_manifest_can_still_be_removed(tmp_path: Path) -> None:
    (checkpoint(tmp_path / NAME) / "manifest.json").write_text("{")
    remove_directory(tmp_path / NAME)
    assert not names_in(tmp_path)


def test_a_reader_with_an_open_file_reads_on_while_the_checkpoint_is_removed(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / NAME)
    with (target / "__0_0.distcp").open() as reader:
        remove_directory(target)
        assert reader.read() == "new"
    assert not is_checkpoint(target)


def test_what_cannot_be_deleted_is_told_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = checkpoint(tmp_path / "busy")
    monkeypatch.setattr(directory.shutil, "rmtree", lambda path, ignore_errors: None)
    directory.discard(place)
    assert "busy is not needed any more but cannot be deleted whole" in caplog.text
    assert not (place / "manifest.json").exists()
