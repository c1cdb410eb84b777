"""Checkpoints that DeepSpeed has written, read without DeepSpeed: all stages of ZeRO, pipelines, universal ones, Lightning's.

May import: the modules of `checkpoint`, not its formats. `layout.py` finds the files, `files.py` reads one without running code
from it, `models.py`, `trained.py`, `plain.py`, `pipeline.py` and `universal.py` know what each kind holds, `opened.py` puts it
together. Read `opened.py` first.
"""

from meshbolt.checkpoint.deepspeed.layout import is_deepspeed, is_deepspeed_save
from meshbolt.checkpoint.deepspeed.opened import DeepSpeedCheckpoint, open_deepspeed

__all__ = ["DeepSpeedCheckpoint", "is_deepspeed", "is_deepspeed_save", "open_deepspeed"]
