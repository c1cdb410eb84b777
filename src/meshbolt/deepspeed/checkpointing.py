"""`deepspeed.checkpointing`: parts of a forward that are computed again for the backward, by `torch.utils.checkpoint`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from meshbolt.errors import UnsupportedError

_log = logging.getLogger(__name__)
_configured = False
_MEMORY_ONLY = (
    "partition_activations",
    "contiguous_checkpointing",
    "num_checkpoints",
    "checkpoint_in_cpu",
    "synchronize",
)


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Take the settings of `checkpoint`; they change where inputs wait for the backward, not what is computed.

    What is kept for the backward stays whole on its device here; a setting that asks for another place is logged, once.

    Args:
        mpu_: None; layers are divided by `tensor_parallel` in the JSON.
        deepspeed_config: without effect: its block is told of in the receipt.
        partition_activations: without effect on results, as all that follow.
        contiguous_checkpointing: likewise.
        num_checkpoints: likewise.
        checkpoint_in_cpu: likewise.
        synchronize: likewise.
        profile: likewise.

    Raises:
        UnsupportedError: there is an `mpu_`.
    """
    global _configured
    if mpu_ is not None:
        raise UnsupportedError(
            'checkpointing.configure(mpu_=...): layers are not divided by a script\'s own groups. Use "tensor_parallel" in the '
            "JSON, and give None."
        )
    given = (partition_activations, contiguous_checkpointing, num_checkpoints, checkpoint_in_cpu, synchronize)
    asked = [name for name, value in zip(_MEMORY_ONLY, given, strict=True) if value]
    if asked and not _configured:
        _log.warning("checkpointing.configure: %s has no effect; results are the same.", ", ".join(asked))
    _configured = True


def is_configured() -> bool:
    """Return whether `configure` was called."""
    return _configured


def reset() -> None:
    """Do nothing: nothing is kept between steps."""


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose inner results are not kept, but computed again in the backward, with the same random numbers.

    Args:
        function: takes `args`.

    Example:
        >>> hidden = deepspeed.checkpointing.checkpoint(layer, hidden, mask)
    """
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Do what `checkpoint` does."""
    return checkpoint(function, *args)
