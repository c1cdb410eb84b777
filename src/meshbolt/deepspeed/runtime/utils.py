"""`deepspeed.runtime.utils`."""

from meshbolt.deepspeed.utils import see_memory_usage, set_random_seed

__all__ = ["see_memory_usage", "set_random_seed"]
