"""Lightning's plugin classes, with no logic of their own: they hand Lightning's calls to the engine.

May import: `engine` and below, and Lightning. `precision.py` has one class per kind of precision flag, for the Trainer and for
Fabric, and the table that converts Lightning's own plugins to them; `checkpoint_io.py` carries checkpoint directories;
`onlooker.py` marks callbacks that only look on. Read `precision.py` first.
"""

from meshbolt.plugins.checkpoint_io import MeshCheckpointIO
from meshbolt.plugins.onlooker import Onlooker
from meshbolt.plugins.precision import (
    DoublePrecision,
    FullPrecision,
    HalfPrecision,
    MeshPrecision,
    MixedPrecision,
    convert_precision,
)

__all__ = [
    "DoublePrecision",
    "FullPrecision",
    "HalfPrecision",
    "MeshCheckpointIO",
    "MeshPrecision",
    "MixedPrecision",
    "Onlooker",
    "convert_precision",
]
