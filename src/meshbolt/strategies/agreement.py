"""What all ranks must have been told alike: a difference would end in a hang, or in weights that silently part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from meshbolt.collectives import same_on_all_ranks
from meshbolt.errors import TopologyError
from meshbolt.plugins import MeshPrecision

# What decides how many steps a rank takes, and what it does with the others in each.
TRAINER_FLAGS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
)
_SCALING = ("current_scale", "growth_interval", "hysteresis", "min_scale")


def trainer_rows(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the flags of a Trainer that all ranks must have alike.

    Args:
        trainer: this rank's.
    """
    return {f"Trainer({name})": getattr(trainer, name) for name in TRAINER_FLAGS}


def precision_rows(plugin: MeshPrecision) -> dict[str, Any]:
    """Return what a precision plugin has beside its policy: the settings of its loss scale.

    Args:
        plugin: this rank's.
    """
    scaler = plugin.loss_scaler
    return {} if scaler is None else {f"precision.{name}": getattr(scaler, name) for name in _SCALING}


def agree_on_settings(rows: Mapping[str, Any], *, group: dist.ProcessGroup | None) -> None:
    """Compare the settings of all ranks.

    Args:
        rows: this rank's, by the names that users know; all ranks have the same names, unless they differ anyway.
        group: of all ranks, for tensors on the CPU.

    Raises:
        TopologyError: they differ; on every rank.
    """
    same, by_rank = same_on_all_ranks(dict(rows), group=group)
    if same:
        return
    # The sizes of the mesh follow from what was written: that is to be named.
    names = sorted(dict.fromkeys(name for each in by_rank for name in each), key=lambda name: name.startswith("mesh."))
    values = {name: [each.get(name) for each in by_rank] for name in names}
    name = next(name for name, found in values.items() if any(value != found[0] for value in found))
    raise TopologyError(
        f"Ranks have different settings: {name} is {values[name]} by rank. Give every rank the same arguments, files and "
        "MESHBOLT_ environment variables; do not let them depend on the rank."
    )
