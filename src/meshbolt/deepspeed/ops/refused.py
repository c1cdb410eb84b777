"""Optimizers of DeepSpeed's that torch has nothing for: made to be imported, refused where they are to be used."""

from __future__ import annotations

from typing import Any, NoReturn

from meshbolt.deepspeed_json.optimizers import REFUSED_OPTIMIZERS
from meshbolt.errors import UnsupportedError


class _Refused:
    reason: str

    def __init__(self, *_: Any, **__: Any) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"deepspeed.ops has no {type(self).__name__} here: {self.reason}. Use deepspeed.ops.adam.FusedAdam, or an optimizer "
            "of torch.optim, and hand it to initialize(optimizer=...)."
        )


class FusedLamb(_Refused):
    """Refused: torch has no LAMB."""

    reason = REFUSED_OPTIMIZERS["lamb"]


class FusedLion(_Refused):
    """Refused: torch has no Lion."""

    reason = REFUSED_OPTIMIZERS["lion"]


class DeepSpeedCPULion(FusedLion):
    """Refused: torch has no Lion."""
