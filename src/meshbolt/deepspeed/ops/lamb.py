"""`deepspeed.ops.lamb`."""

from meshbolt.deepspeed.ops.refused import FusedLamb

__all__ = ["FusedLamb"]
