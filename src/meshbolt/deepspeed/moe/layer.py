"""`deepspeed.moe.layer`."""

from __future__ import annotations

from typing import Any

from torch import nn

from meshbolt.errors import UnsupportedError


class MoE(nn.Module):
    """Refused: experts are sharded like all parameters, not divided by expert."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "deepspeed.moe.layer.MoE: ranks do not divide experts among them here. Write experts as ordinary modules, which are "
            "sharded like all others, or take a model that has them, such as one of Hugging Face's."
        )
