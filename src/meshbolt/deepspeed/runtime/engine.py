"""`deepspeed.runtime.engine`."""

from meshbolt.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
