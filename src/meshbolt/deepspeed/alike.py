"""What all ranks have to be told alike, compared before anything is sharded."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.optim import Optimizer

from meshbolt.collectives import agree_on_error
from meshbolt.deepspeed_json import Translation
from meshbolt.deepspeed_json.key import IGNORED
from meshbolt.strategies.agreement import agree_on_settings

Found = TypeVar("Found")

# Without effect in a Trainer, and with one in this loop.
_USED_HERE = ("bf16.check_grad_overflow", "dataloader_drop_last")
_OF_A_MACHINE = "nvme_path"


def group_of_all(timeout: timedelta) -> dist.ProcessGroup | None:
    """Return the group of all ranks in which objects on the CPU can be sent.

    Args:
        timeout: how long a collective waits for its peers.
    """
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)


def on_all(find: Callable[[], Found], group: dist.ProcessGroup | None) -> Found:
    """Return what a function returns on this rank; what one rank raises is raised by all.

    Args:
        find: called on every rank.
        group: of all ranks.

    Raises:
        Exception: what the function of a rank has raised.
    """
    found: list[Found] = []
    agree_on_error(lambda: found.append(find()), group=group)
    return found[0]


def compare_files(translation: Translation, group: dist.ProcessGroup | None) -> None:
    """Compare what the files of all ranks say, but for keys without effect and paths on a machine.

    Args:
        translation: of this rank's file.
        group: of all ranks.

    Raises:
        TopologyError: they differ; on every rank.
    """
    rows = {row.key: row.value for row in translation.receipt.rows if row.outcome != IGNORED or row.key in _USED_HERE}
    rows = {key: value for key, value in rows.items() if not key.endswith(_OF_A_MACHINE)}
    agree_on_settings({**rows, "deepspeed_version": translation.version}, group=group)


def compare_optimizers(optimizer: Optimizer | None, group: dist.ProcessGroup | None) -> None:
    """Compare the optimizers of all ranks: class, groups, and what each group is trained with.

    Args:
        optimizer: this rank's.
        group: of all ranks.

    Raises:
        TopologyError: they differ; on every rank.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rows: dict[str, Any] = {"optimizer": None if optimizer is None else type(optimizer).__name__}
    rows["len(optimizer.param_groups)"] = len(groups)
    for number, each in enumerate(groups):
        simple = {name: value for name, value in each.items() if _is_simple(value)}
        rows |= {f"optimizer.param_groups[{number}][{name!r}]": value for name, value in simple.items()}
        rows[f"shapes of optimizer.param_groups[{number}]['params']"] = [tuple(p.shape) for p in each["params"]]
    agree_on_settings(rows, group=group)


def compare_schedulers(scheduler: Any, group: dist.ProcessGroup | None) -> None:
    """Compare the schedulers of all ranks: class, and rates.

    Args:
        scheduler: this rank's.
        group: of all ranks.

    Raises:
        TopologyError: they differ; on every rank.
    """
    rates = scheduler.get_last_lr() if getattr(scheduler, "_last_lr", None) is not None else None
    rows = {
        "lr_scheduler": None if scheduler is None else type(scheduler).__name__,
        "lr_scheduler.get_last_lr()": None if rates is None else [float(rate) for rate in rates],
    }
    agree_on_settings(rows, group=group)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(each, (int, float)) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))
