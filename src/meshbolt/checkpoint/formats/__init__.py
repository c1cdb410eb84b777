"""Other formats: checkpoints written in them, and made from them, tensor by tensor.

May import: the modules of `checkpoint`. `table.py` lists the formats, each of which has a file with its writer, its
`recognises` and its `read`; `convert.py` does what all have in common: checks, room on the disk, a name at the end. To add
a format, add its file and its rows in `table.py`. Read `convert.py` first.
"""

from meshbolt.checkpoint.formats.convert import Conversion, Watch, export_checkpoint, import_checkpoint
from meshbolt.checkpoint.formats.options import ExportOptions
from meshbolt.checkpoint.formats.table import FORMATS, SOURCES

__all__ = [
    "FORMATS",
    "SOURCES",
    "Conversion",
    "ExportOptions",
    "Watch",
    "export_checkpoint",
    "import_checkpoint",
]
