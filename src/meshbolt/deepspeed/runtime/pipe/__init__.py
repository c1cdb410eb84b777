"""`deepspeed.runtime.pipe`: names that scripts import from there."""

from meshbolt.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from meshbolt.deepspeed.runtime.pipe import engine, module, topology
from meshbolt.deepspeed.topology import ProcessTopology

__all__ = ["LayerSpec", "PipelineModule", "ProcessTopology", "TiedLayerSpec", "engine", "module", "topology"]
