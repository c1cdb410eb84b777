"""Pipeline parallelism over modules that know nothing of it.

A stage is the module's own step, entered where its first unit is called and left after its last. `taint.py` has the tensors that
stand for what other stages hold, `calls.py` stands between callers and units, `analyse.py` finds out by one run on tensors
without values what crosses each cut and who needs which parameter (`plan.py`), and what layers leave each other beside that
(`left.py`); `shapes.py` makes such runs fast. `stage.py` runs a stage, `streams.py` has the random numbers, `cuts.py` finds cuts
as the user's `setting.py` says, `balance.py` chooses them by the work that `cost.py` counts, among the places of `survey.py`,
`microbatch.py` divides batches, and `emulate.py` runs all stages in one process, whose attributes `apart.py` keeps apart.
`compare.py` compares them with the module, and `report.py` says what was found. `runtime.py` runs stages on ranks, in the
orders of `schedule.py`, which `timeline.py` plays through and `picture.py` draws. May import: `blocks`, `compat`, `errors`.
"""

from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.balance import balanced, choose_cuts
from meshbolt.pipeline.calls import Calls, calls_unseen, is_in_step
from meshbolt.pipeline.compare import compare_stages
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.cuts import cuts_of
from meshbolt.pipeline.emulate import emulate
from meshbolt.pipeline.held import Elsewhere, HeldElsewhereError
from meshbolt.pipeline.microbatch import Microbatches, batch_size, part_sizes, split_batch
from meshbolt.pipeline.picture import draw
from meshbolt.pipeline.plan import Call, Crossing, CutError, PipelinePlan, plan_of_layers
from meshbolt.pipeline.report import PipelineReport
from meshbolt.pipeline.runtime import Pipeline
from meshbolt.pipeline.schedule import SCHEDULES
from meshbolt.pipeline.setting import PipelineParallel
from meshbolt.pipeline.stage import run_stage
from meshbolt.pipeline.taint import Foreign, Gathered, buffers_apart, is_foreign
from meshbolt.pipeline.timeline import Span, Timeline, plan_timeline

__all__ = [
    "SCHEDULES",
    "Call",
    "Calls",
    "Cost",
    "CountCost",
    "Crossing",
    "CutError",
    "Elsewhere",
    "Foreign",
    "Gathered",
    "HeldElsewhereError",
    "Microbatches",
    "Pipeline",
    "PipelineParallel",
    "PipelinePlan",
    "PipelineReport",
    "Span",
    "Timeline",
    "analyse",
    "balanced",
    "batch_size",
    "buffers_apart",
    "calls_unseen",
    "choose_cuts",
    "compare_stages",
    "cuts_of",
    "draw",
    "emulate",
    "is_foreign",
    "is_in_step",
    "part_sizes",
    "plan_of_layers",
    "plan_timeline",
    "run_stage",
    "split_batch",
]
