"""`deepspeed.ops.lion`."""

from meshbolt.deepspeed.ops.refused import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
