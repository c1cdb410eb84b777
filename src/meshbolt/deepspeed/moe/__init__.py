"""`deepspeed.moe`: layers of experts, which are not divided by expert here; scripts that only import them run."""

from meshbolt.deepspeed.moe import layer, utils

__all__ = ["layer", "utils"]
