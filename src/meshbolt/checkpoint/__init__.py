"""Checkpoints: directories that a crash cannot spoil and that any layout of ranks can load.

May import: `units`, `compat`, `errors`. A checkpoint is a directory `name.ckpt/` with the tensors (`shards.py`, planned by
torch's distributed checkpoint with the parts that `planners.py` tells it of), everything else (`objects.py`, one file) and a
manifest (`manifest.py`) with checksums (`checksum.py`) of every byte, without which the directory does not count.
`storage.py` is the seam to where it lies: `local.py` with the paths and the commit of `directory.py`, or `remote.py` for what
fsspec reaches. `agreement.py` makes all ranks raise the same error or none; `background.py` saves while training goes on.
`reader.py` reads single tensors in one process, which `formats/` is built on. Keys belong to the user's module, never to a
layout. Read `save.py` first, then `load.py`.
"""

from meshbolt.checkpoint.background import BackgroundSaver
from meshbolt.checkpoint.compare import LoadReport
from meshbolt.checkpoint.links import make_link
from meshbolt.checkpoint.load import load_objects, load_tensors, open_tensors
from meshbolt.checkpoint.metadata import TensorInfo, saved_tensors
from meshbolt.checkpoint.places import is_checkpoint, remove_directory
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.checkpoint.save import save_directory
from meshbolt.checkpoint.verify import verify_checkpoint

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "LoadReport",
    "TensorInfo",
    "is_checkpoint",
    "load_objects",
    "load_tensors",
    "make_link",
    "open_tensors",
    "remove_directory",
    "save_directory",
    "saved_tensors",
    "verify_checkpoint",
]
