"""Disks that fail while they hold the state of a run: all ranks end, with a typed error, and the last checkpoint is as it was.

Faults come in the middle of a run of the real Trainer on two ranks. Files are cut short and limits reached for real; what a disk
does not do at will (an unreadable sector, a short transfer, no answer) is asked of the file engine's own face of the system.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.faults.offload_support import (
    SAVED,
    SOON_SECONDS,
    TIMEOUT_SECONDS,
    resume,
    train,
    undisturbed,
)
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full

from meshbolt.checkpoint import is_checkpoint
from meshbolt.testing import run_ranks

pytestmark = ADVICE


@pytest.mark.parametrize(
    ("fault", "words", "settings"),
    [
        full("a read error", r"Reading .*Input/output error \(EIO\)", {"zero": 3}),
        ("a full disk", r"Writing .*No space left on device \(ENOSPC\)", {"zero": 1, "overlap": True}),
        full("a file cut short", r"the file was cut from \d+ to 4096 bytes", {}),
        full("a read error", r"Reading .*Input/output error \(EIO\)", {"overlap": True}),
        full("a write error", r"Writing .*Input/output error \(EIO\)", {"zero": 3, "overlap": True}),
        full("a write error", r"Writing .*Input/output error \(EIO\)", {"zero": 1}),
        full("a full disk", r"Writing .*No space left on device \(ENOSPC\)", {"zero": 2}),
        full("a file cut short", r"the file was cut from \d+ to 4096 bytes", {"zero": 3, "overlap": True}),
        full("a limit of the process", r"Writing .*\(EFBIG\)", {"width": 512}),
        full("no answer", r"has not ended after 1.5 s: the disk does not answer", {"zero": 1}),
        full("no answer", r"has not ended after 1.5 s: the disk does not answer", {"zero": 3, "overlap": True}),
    ],
)
@pytest.mark.parametrize("ranks", [(1,), full((0, 1))])
def test_a_disk_that_fails_ends_all_ranks_and_leaves_the_last_checkpoint(
    fault: str, words: str, ranks: tuple[int, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    results = run_ranks(train, 2, tmp_path, fault, ranks, settings, timeout=TIMEOUT_SECONDS)

    for rank, (name, said, _, seconds) in enumerate(results):
        # Met while the state is written into a checkpoint, it is an error of that, on all ranks.
        assert name in ("StorageError" if rank in ranks else "RankError", "RankError", "CheckpointError"), said
        assert name != "RankError" or re.match(r"rank [01] failed: meshbolt\.errors\.StorageError", said), said
        assert re.search(words, said), said
        assert seconds < SOON_SECONDS
    assert {name for name, *_ in results} & {"StorageError", "CheckpointError"}
    assert not is_checkpoint(tmp_path / "exception/on_exception.ckpt"), "what is left of the state is no checkpoint"
    last = tmp_path / "checkpoints/step=2.ckpt"
    assert [each.name for each in last.parent.iterdir() if is_checkpoint(each)] == [last.name]
    assert not list((tmp_path / "disk").iterdir())
    resumed = run_ranks(resume, 2, tmp_path, str(last), settings, timeout=TIMEOUT_SECONDS)
    assert resumed == [losses[SAVED:] for losses in undisturbed(tmp_path, **settings)]


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        full("short writes", {"zero": 1}),
        full("short reads", {"zero": 2, "overlap": True}),
        full("a slow disk", {"zero": 3, "overlap": True}),
        full("a slow disk", {"zero": 1}),
        ("its directory removed", {"zero": 2}),
    ],
)
def test_what_is_no_failure_changes_nothing(fault: str, settings: dict[str, Any], tmp_path: Path) -> None:
    found = run_ranks(train, 2, tmp_path, fault, (1,), settings, timeout=TIMEOUT_SECONDS)
    assert [losses for _, _, losses, _ in found] == undisturbed(tmp_path, **settings)


# Parameters in files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "ranks"),
    [
        full("a read error", (1,)),
        full("a file cut short", (1,)),
        full("a write error", (1,)),
        full("a write error", (0, 1)),
        full("no answer", (1,)),
    ],
)
def test_a_disk_that_fails_with_parameters_ends_all_ranks_and_nothing_is_saved(
    fault: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    settings = {"zero": 3, "parameters": True}
    results = run_ranks(train, 2, tmp_path, fault, ranks, settings, timeout=TIMEOUT_SECONDS)
    for rank, (name, said, _, seconds) in enumerate(results):
        assert name in ("StorageError" if rank in ranks else "RankError", "RankError", "CheckpointError"), said
        assert "meshbolt-" in said
        assert seconds < SOON_SECONDS
    assert not is_checkpoint(tmp_path / "exception/on_exception.ckpt")
    # Units that were read ahead take the run one step further.
    last = max(each.name for each in (tmp_path / "checkpoints").iterdir() if is_checkpoint(each))
    resumed = run_ranks(resume, 2, tmp_path, str(tmp_path / "checkpoints" / last), settings, timeout=TIMEOUT_SECONDS)
    assert resumed == [losses[int(last[len("step=")]) :] for losses in undisturbed(tmp_path)]
