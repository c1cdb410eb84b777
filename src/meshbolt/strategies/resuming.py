"""Where `meshbolt launch` has started all ranks again: a fit goes on from the newest whole checkpoint that it has saved itself.

The launcher names a file in which rank 0 notes each checkpoint; a fit is told from others of the program by its number. Rank 0
alone looks at the checkpoints, byte by byte, and tells the others through the store in which the launcher lets them meet.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and not listed

from meshbolt.checkpoint import is_checkpoint, verify_checkpoint
from meshbolt.checkpoint.directory import find, is_remote, local_path
from meshbolt.checkpoint.manifest import FILE_NAME
from meshbolt.environment import SAVES, restarts

# Rank 0 reads a whole checkpoint meanwhile.
_PATIENCE = timedelta(hours=2)
_log = logging.getLogger(__name__)
_fits = 0
_stores: list[TCPStore] = []


def begin_fit() -> int:
    """Return the number of the fit that begins, from 1; checkpoints that are noted from now on are its own."""
    global _fits  # of the process, as the file is of the run
    _fits += 1
    return _fits


def note_save(path: str) -> None:
    """Note on rank 0 that a checkpoint is saved; where nobody would read it, do nothing.

    Args:
        path: of the checkpoint.
    """
    file = os.environ.get(SAVES)
    if not file or os.environ.get("RANK", "0") != "0":
        return
    absolute = path if is_remote(path) else str(local_path(path))
    try:
        with Path(file).open("a") as stream:
            stream.write(json.dumps({"fit": _fits, "path": absolute}) + "\n")
    except OSError as error:
        _log.warning("%s cannot be written (%s): a restart will not know of checkpoint %s.", file, error, path)


def from_newest(
    function: Callable[..., Any], args: Any, kwargs: Any, fit: int, trainer: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a fit, with the checkpoint to go on from after a restart in the place of the user's.

    Args:
        function: what the Trainer launches.
        args: its arguments.
        kwargs: its arguments.
        fit: its number.
        trainer: that fits.
    """
    if not restarts() or not os.environ.get(SAVES):
        return args, kwargs
    path = _agreed(fit)
    if path is None:
        rank_zero_info("restart: this fit has left no whole checkpoint, and begins as it was called.")
        return args, kwargs
    if trainer.strategy.settings.checkpoint.load_weights_only:
        _log.warning(
            "restart: Checkpoint(load_weights_only=True) begins a new run of every checkpoint; %s is not used.", path
        )
        return args, kwargs
    rank_zero_info(f"restart: going on from {path}, the newest whole checkpoint of this fit.")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments["ckpt_path"] = path
    return bound.args, bound.kwargs


def _agreed(fit: int) -> str | None:
    """Return what rank 0 has chosen, on every rank."""
    is_first = os.environ["RANK"] == "0"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        # Where it is not the launcher's, rank 0 serves it, and serves the process group with it later.
        is_master=is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=_PATIENCE,
        wait_for_workers=False,
        multi_tenant=True,
    )
    _stores.append(store)  # others may come to read it late
    key = f"meshbolt/resuming/{restarts()}/{fit}"
    if is_first:
        store.set(key, newest_of(fit) or "")
    return store.get(key).decode() or None


def newest_of(fit: int) -> str | None:
    """Return the newest checkpoint of a fit that is whole, byte by byte; None: there is none.

    Args:
        fit: its number, as it was in the ranks before.
    """
    try:
        lines = Path(os.environ[SAVES]).read_text().splitlines()
    except FileNotFoundError:
        return None
    noted = [json.loads(line) for line in lines]
    # The last mention of each counts: a name may have been written again.
    paths: list[str] = list(dict.fromkeys(each["path"] for each in reversed(noted) if each["fit"] == fit))
    there = [path for path in paths if Path(path).is_file() or is_checkpoint(path)]
    for path in sorted(there, key=_written_at, reverse=True):
        faults = () if Path(path).is_file() else verify_checkpoint(path)
        if not faults:
            return path
        _log.warning("restart: checkpoint %s is passed over: %s.", path, faults[0])
    return None


def _written_at(path: str) -> float:
    """Return when a checkpoint was written, seconds; equal for all of a storage that does not tell."""
    if is_remote(path):
        return 0.0
    place = local_path(path)
    return (place if place.is_file() else find(place) / FILE_NAME).stat().st_mtime
