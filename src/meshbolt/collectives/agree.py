"""Agreement among ranks, before anything that could hang."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def same_on_all_ranks(value: Any, *, group: dist.ProcessGroup | None = None) -> tuple[bool, list[Any]]:
    """Return whether all ranks gave an equal value, and the values by rank.

    Args:
        value: anything that can be pickled and compared.
        group: the ranks to ask; None for all.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return all(other == values[0] for other in values), values


def agree_on_error(check: Callable[[], object], *, group: dist.ProcessGroup | None = None) -> None:
    """Run a check that may fail on some ranks only, and fail on all of them if it fails on one.

    Args:
        check: raises the error that a rank has found.
        group: the ranks that run the check; None for all.

    Raises:
        Exception: the first failing rank's error (by rank), on every rank; a RuntimeError with its words where it cannot
            travel, on the others.
    """
    own: Exception | None = None
    try:
        check()
    except Exception as error:  # every kind is handed to all ranks
        own = error
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, own and _portable(own), group=group)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise own or first


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises whatever the error's own hooks raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
