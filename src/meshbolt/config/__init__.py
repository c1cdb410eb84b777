"""Settings as the user writes them, and the plan they are resolved into.

May import: `zero`, `precision`, `blocks`, `checkpoint`, `collectives`, `mesh`. A setting is a dataclass beside the code that
reads it; `schema.py` composes them; `resolve.py` turns every "auto" into a value, once, in a frozen `Plan`; `load.py` merges
YAML and overrides and remembers where each value came from. To add a setting, add its dataclass below, a field in `Settings`
and its row in `Plan.rows`. Read `resolve.py` first.
"""

from meshbolt.config.resolve import Plan, resolve
from meshbolt.config.schema import Settings

__all__ = ["Plan", "Settings", "resolve"]
