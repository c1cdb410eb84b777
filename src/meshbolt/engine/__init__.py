"""The engine: one module under one plan, for any loop.

May import: `config` and everything below it; never Lightning. `compose.py` is the order in which a module is transformed;
`engine.py` is what a loop calls; `optimizer.py` decides which optimizers run on shards; `state.py` names what a checkpoint
holds; `memory.py` counts what a rank holds, and `savings.py` knows what would save it. To add a transformation, add a step to
`compose`. Read `compose.py` first.
"""

from meshbolt.engine.compose import gathered_in
from meshbolt.engine.engine import Engine
from meshbolt.engine.gathered import gathered
from meshbolt.engine.pipelined import PipelinedEngine
from meshbolt.engine.pretrained import load_pretrained
from meshbolt.engine.stages import Stages

__all__ = ["Engine", "PipelinedEngine", "Stages", "gathered", "gathered_in", "load_pretrained"]
