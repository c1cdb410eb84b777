from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from meshbolt.environment import SAVES
from meshbolt.strategies.resuming import newest_of


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three files that were saved in this order: two by the first fit, one by the second."""
    paths = [tmp_path / name for name in ("a.ckpt", "b.ckpt", "c.ckpt")]
    lines = []
    for seconds, (path, fit) in enumerate(zip(paths, (1, 1, 2), strict=True)):
        path.touch()
        os.utime(path, (seconds, seconds))
        lines.append(json.dumps({"fit": fit, "path": str(path)}))
    (tmp_path / "saves").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv(SAVES, str(tmp_path / "saves"))
    return paths


def test_a_fit_goes_on_from_the_newest_of_its_own_checkpoints(noted: list[Path]) -> None:
    assert newest_of(1) == str(noted[1])
    assert newest_of(2) == str(noted[2])
    assert newest_of(3) is None


def test_a_checkpoint_that_was_deleted_or_is_none_is_passed_over(noted: list[Path]) -> None:
    noted[1].unlink()
    noted[1].mkdir()  # a directory without a manifest

    assert newest_of(1) == str(noted[0])


def test_nothing_is_known_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SAVES, str(tmp_path / "saves"))

    assert newest_of(1) is None
