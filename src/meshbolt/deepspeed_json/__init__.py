"""DeepSpeed's JSON: what each of its keys means here, as data, and the settings that a file comes to.

May import: `config` and below; no Lightning. `keys_of_run.py`, `keys_of_zero.py` and `keys_of_blocks.py` are the tables of keys;
`read.py` reads a file; `check.py` holds it against the tables; `translate.py` makes settings of it, with `batch.py`,
`precision.py`, `placing.py`, `optimizers.py` and `schedules.py`; `receipt.py` tells what became of every key. To add a key, add
a row to a table. Read `translate.py` first.
"""

from meshbolt.deepspeed_json.receipt import Receipt
from meshbolt.deepspeed_json.translate import Options, Translation, translate

__all__ = ["Options", "Receipt", "Translation", "translate"]
