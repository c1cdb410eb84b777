"""The strategies for Lightning's Trainer and for Fabric: which hook calls what of the engine, and nothing more.

May import: `plugins` and below, and Lightning. `trainer.py` and `fabric.py` are the two adapters; `core.py` is what they
share, and `data_parallel.py` its part that knows which ranks see different samples; `saving.py` carries checkpoints;
`from_checkpoint.py` needs no strategy; `arguments.py` and `checks.py` refuse what cannot be honoured, `agreement.py` what
differs between ranks; `registry.py` has the preset names. To add a preset, add a row to `PRESETS`. Read `trainer.py` first.
"""

from meshbolt.strategies.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.strategies.from_checkpoint import load_from_checkpoint
from meshbolt.strategies.registry import PRESETS, register_presets
from meshbolt.strategies.trainer import MeshStrategy

__all__ = ["PRESETS", "FabricMeshStrategy", "MeshStrategy", "load_from_checkpoint", "register_presets"]
