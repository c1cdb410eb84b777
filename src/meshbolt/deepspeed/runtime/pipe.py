"""`deepspeed.runtime.pipe`, and what is in its modules there."""

from meshbolt.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from meshbolt.deepspeed.pipe_engine import PipelineEngine
from meshbolt.deepspeed.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineEngine",
    "PipelineModule",
    "PipelineParallelGrid",
    "ProcessTopology",
    "TiedLayerSpec",
]
