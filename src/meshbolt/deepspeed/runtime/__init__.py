"""`deepspeed.runtime`: names that scripts import from there."""

from meshbolt.deepspeed.runtime import config, engine, lr_schedules, pipe, utils

__all__ = ["config", "engine", "lr_schedules", "pipe", "utils"]
