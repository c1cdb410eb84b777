"""`deepspeed.runtime.pipe.engine`."""

from meshbolt.deepspeed.pipe_engine import PipelineEngine

__all__ = ["PipelineEngine"]
