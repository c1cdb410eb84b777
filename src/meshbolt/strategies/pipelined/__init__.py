"""Steps that run once per microbatch, under a Trainer: what they log and return becomes what one process would have.

`results.py` puts together what a step returned for each microbatch; `logs.py` records what it logged, combines that and logs it
on every rank; `metrics.py` lets every rank ask torchmetrics objects that only the rank of the last stage updates. Nothing here
knows schedules: see `meshbolt.pipeline`. `steps.py` takes a
Trainer's steps through the stages. Read `steps.py` first.
"""

from meshbolt.strategies.pipelined.in_fabric import FabricSteps
from meshbolt.strategies.pipelined.staged import StagedModule
from meshbolt.strategies.pipelined.steps import PipelinedSteps

__all__ = ["FabricSteps", "PipelinedSteps", "StagedModule"]
