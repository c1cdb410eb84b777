"""The repeated blocks of a model, and what is done to each of them before it is sharded.

May import: `errors`. `find.py` finds the blocks of any module; `recompute.py` frees their activations; `compile.py` compiles
them; `dry_run.py` is for those who call a module only to look at it. To add a treatment of blocks, write a file with a function
that takes the blocks. Read `find.py` first.
"""

from meshbolt.blocks.compile import compile_blocks
from meshbolt.blocks.dry_run import attributes_restored
from meshbolt.blocks.find import find_blocks, modules_by_name_or_class
from meshbolt.blocks.recompute import Recompute, recompute_blocks

__all__ = [
    "Recompute",
    "attributes_restored",
    "compile_blocks",
    "find_blocks",
    "modules_by_name_or_class",
    "recompute_blocks",
]
