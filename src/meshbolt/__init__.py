"""meshbolt: train a model that one GPU cannot hold, by changing one line of a Lightning script.

Importing it registers the strategy names `zero0` ... `zero3`, `tensor_parallel`, `pipeline_parallel` and `mesh_3d` with
Lightning's Trainer and with Fabric.

Example:
    >>> import meshbolt
    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(strategy="zero2", accelerator="cpu", devices=2)
"""

from __future__ import annotations

import sys as _sys

from meshbolt.version import __version__


def _is_doctor() -> bool:
    """Return whether this process is `meshbolt doctor`, which is for environments where the imports below fail."""
    words = _sys.argv
    if words[1:2] != ["doctor"]:
        return False
    is_module = words[0] == "-m" and _sys.orig_argv[-len(words)] == "meshbolt"
    return is_module or words[0].replace("\\", "/").rpartition("/")[2] in ("meshbolt", "meshbolt.exe")


if not _is_doctor():
    from meshbolt.blocks import Recompute
    from meshbolt.callbacks import LogProgress as _LogProgress
    from meshbolt.checkpoint import Checkpoint
    from meshbolt.deepspeed import initialize
    from meshbolt.engine import load_pretrained
    from meshbolt.errors import (
        CheckpointError,
        ConfigError,
        MeshboltError,
        MissingPackageError,
        TopologyError,
        UnsupportedError,
    )
    from meshbolt.offload.setting import Offload
    from meshbolt.pipeline import PipelineParallel
    from meshbolt.strategies import FabricMeshStrategy as _FabricMeshStrategy
    from meshbolt.strategies import MeshStrategy, load_from_checkpoint
    from meshbolt.strategies import register_presets as _register_presets
    from meshbolt.tensor import TensorParallel
    from meshbolt.zero import Zero

    _register_presets(MeshStrategy, _FabricMeshStrategy)
    MeshStrategy.default_progress_bar = _LogProgress

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "MeshStrategy",
    "MeshboltError",
    "MissingPackageError",
    "Offload",
    "PipelineParallel",
    "Recompute",
    "TensorParallel",
    "TopologyError",
    "UnsupportedError",
    "Zero",
    "__version__",
    "initialize",
    "load_from_checkpoint",
    "load_pretrained",
]
