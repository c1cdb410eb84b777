"""A small model and real text to try things on: an ordinary LightningModule that knows nothing of meshbolt.

May import: Lightning and torch; nothing of meshbolt. `model.py` is a GPT over bytes, `data.py` text that every CPython
carries, `sample.py` a callback that lets the model write at the end of a run. To add a demo, add a file here and a
recipe in `configs/`. Read `model.py` first.
"""

from meshbolt.demos.data import PydocText
from meshbolt.demos.model import ByteGPT
from meshbolt.demos.sample import WriteSample

__all__ = ["ByteGPT", "PydocText", "WriteSample"]
