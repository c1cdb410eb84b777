"""The table of all keys, and looking one up."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshbolt.deepspeed_json import keys_of_blocks, keys_of_run, keys_of_zero
from meshbolt.deepspeed_json.key import Key

KEYS: Mapping[str, Key] = MappingProxyType(
    {key.path: key for key in (*keys_of_run.KEYS, *keys_of_zero.KEYS, *keys_of_blocks.KEYS)}
)


def names_in(block: str) -> list[str]:
    """Return the names of the keys that stand directly in a block.

    Args:
        block: its path; empty for the top of the file.
    """
    depth = block.count(".") + 1 if block else 0
    prefix = f"{block}." if block else ""
    return [path.rpartition(".")[2] for path in KEYS if path.startswith(prefix) and path.count(".") == depth]
