"""What a step is told that takes another way through the module than when it was looked at, as in a later epoch."""

from __future__ import annotations

from typing import Any

from torch import nn

from meshbolt.compat import tree_leaves
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.held import Held
from meshbolt.pipeline.plan import Call, PipelinePlan
from meshbolt.pipeline.taint import is_foreign

_LATER = (
    "What a step does was found out before training, and has to stay so: it may not take another way through the module in a "
    "later epoch or step. Call the same modules each time and multiply by 0.0 what does not count, or let an argument of the "
    "module decide and train the parts of the run apart."
)


def refuse_strayed(call: Call, module: nn.Module, plan: PipelinePlan, *, stage: int, has_ended: bool) -> None:
    """Refuse a call on a stage that does not hold what the module needs.

    Args:
        call: which, inside of the stage.
        module: that is called.
        plan: by which the stage runs.
        stage: its number.
        has_ended: the stage has ended before, and the step goes on.

    Raises:
        UnsupportedError: the module belongs to another stage.
    """
    is_known = call in plan.stubs and (call.number > 0 or plan.stages_of_units.get(call.unit) == stage)
    if is_known or not any(map(is_foreign, module.parameters())):
        return
    if has_ended:
        raise went_on(stage)
    home = plan.stages_of_units.get(call.unit)
    there = "another stage holds" if home in (None, stage) else f"stage {home} holds"
    raise UnsupportedError(
        f"On stage {stage} the step calls {call}, whose parameters {there}: when it was looked at, it did not come there. "
        f"{_LATER}"
    )


def went_on(stage: int) -> UnsupportedError:
    """Return the error for a step that goes on although its stage has ended.

    Args:
        stage: which.
    """
    return UnsupportedError(
        f"The step went on after the last unit of stage {stage}: a bare `except:` around the model, or `except BaseException:`, "
        "has caught what ends a stage. Write `except Exception:`."
    )


def never_came(stage: int, cut: Call) -> UnsupportedError:
    """Return the error for a step that has come to its end without the call with which the next stage begins.

    Args:
        stage: that has not ended.
        cut: the call.
    """
    return UnsupportedError(f"On stage {stage} the step came to its end without calling {cut}. {_LATER}")


def never_called(call: Call) -> UnsupportedError:
    """Return the error for a call, in front of a stage, that the plan does not know.

    Args:
        call: which.
    """
    return UnsupportedError(f"The step calls {call}, which it did not when it was looked at. {_LATER}")


def returned_foreign(result: Any) -> UnsupportedError | None:
    """Return the error for a step that has returned what another stage holds; None if it has not.

    Args:
        result: of the last stage.
    """
    leaf = next(filter(is_foreign, tree_leaves(result)), None)
    if leaf is None:
        return None
    why = f" ({leaf.origin})" if isinstance(leaf, Held) else ""
    return UnsupportedError(
        f"What the step returns or logs depends on parameters or values of another stage{why}, which code outside of modules "
        "reads, such as F.linear(x, self.embedding.weight), and did not read when the step was looked at. Read them in a module, "
        f"or name the module in `replicate`. {_LATER}"
    )
