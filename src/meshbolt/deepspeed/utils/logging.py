"""`deepspeed.utils.logging`: a logger, and messages of some ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

logger = logging.getLogger("meshbolt.deepspeed")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message on some ranks.

    Args:
        message: what to say.
        ranks: on which; None or -1 among them: on all.
        level: of Python's logging.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if ranks is None or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)
