from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshbolt.checkpoint import is_checkpoint, load_objects, make_link, save_directory
from meshbolt.errors import CheckpointError, UnsupportedError


def save(path: Path, value: int) -> Path:
    save_directory(path, tensors={"w": torch.ones(2)}, objects={"value": value})
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def test_a_link_is_made_and_led_elsewhere(tmp_path: Path) -> None:
    link = tmp_path / "last.ckpt"
    for value in (1, 2):
        make_link(link, to=save(tmp_path / f"{value}.ckpt", value))
        assert link.is_symlink()
        assert load_objects(link) == {"value": value}
    assert names_in(tmp_path) == ["1.ckpt", "2.ckpt", "last.ckpt"]


def test_a_link_takes_the_place_of_a_checkpoint_and_of_a_file(tmp_path: Path) -> None:
    target = save(tmp_path / "new.ckpt", 2)
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "file.ckpt").touch()
    for name in ("last.ckpt", "file.ckpt"):
        make_link(tmp_path / name, to=target)
        assert load_objects(tmp_path / name) == {"value": 2}
    assert names_in(tmp_path) == ["file.ckpt", "last.ckpt", "new.ckpt"]


def test_what_a_kill_left_of_a_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.partial-1234").symlink_to("gone.ckpt")
    make_link(tmp_path / "last.ckpt", to=save(tmp_path / "a.ckpt", 1))
    assert names_in(tmp_path) == ["a.ckpt", "last.ckpt"]


def test_a_link_survives_that_its_folder_is_moved(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    make_link(tmp_path / "before/last.ckpt", to=save(tmp_path / "before/a.ckpt", 1))
    (tmp_path / "before").rename(tmp_path / "after")
    assert is_checkpoint(tmp_path / "after/last.ckpt")


def test_a_directory_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt/mine").touch()
    with pytest.raises(CheckpointError, match="not a checkpoint of meshbolt"):
        make_link(tmp_path / "last.ckpt", to=save(tmp_path / "a.ckpt", 1))
    assert names_in(tmp_path / "last.ckpt") == ["mine"]


def test_a_link_to_itself_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 1)
    make_link(tmp_path / "folder/../last.ckpt", to=path)
    assert not path.is_symlink()
    assert load_objects(path) == {"value": 1}


@pytest.mark.parametrize("link", ["memory://runs/last.ckpt", "here/last.ckpt"])
def test_there_are_no_links_on_other_storage(link: str) -> None:
    with pytest.raises(UnsupportedError, match="only local file systems have links"):
        make_link(link, to="memory://runs/a.ckpt")
