"""What errors of torch mean that come from parameters being sharded, in words that lead on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.errors import UnsupportedError


def explained(error: Exception, *, units: Mapping[str, Any], divided: Collection[str] = ()) -> UnsupportedError | None:
    """Return what an error from user code on a sharded module means; None where it is no matter of sharding.

    Args:
        error: as it was caught.
        units: all but the root, by name.
        divided: names of layers that are divided among ranks.
    """
    said = str(error)
    if "got mixed torch.Tensor and DTensor" in said:
        return _called_past_its_unit(error, units) or used_outside_of_its_unit(divided)
    if "storage of size 0" in said or "data is not allocated yet" in said:
        return UnsupportedError(
            "A derivative needed a whole parameter that was freed already. A graph made with create_graph=True can be used up to "
            "the step, or the next batch after a backward: take all of its derivatives before that, or run its forward again."
        )
    if "appears to not have been used in the graph" in said and _asked_for_shards(error):
        return UnsupportedError(
            "torch.autograd.grad was asked for the derivative with respect to a parameter of a unit, which is a shard outside of "
            "its unit's forward, and not what that forward has used. Call the backward of the loss and read the gradient in "
            "on_before_optimizer_step, or leave the parameter to no unit with zero=Zero(unit=[...])."
        )
    return None


def used_outside_of_its_unit(divided: Collection[str] = ()) -> UnsupportedError:
    """Return the error for a parameter that was used by itself while it was a shard.

    Args:
        divided: names of layers that are divided among ranks, whose parameters may be meant.
    """
    hint = (
        " Or it is that of a layer which TensorParallel divides, used outside of the layer, as where a head multiplies with an "
        f"embedding's weight: leave that layer out of the plan ('replicate'). Divided are {', '.join(list(divided)[:8])}"
        f"{' and others' if len(divided) > 8 else ''}."
        if divided
        else ""
    )
    return UnsupportedError(
        "A parameter was used outside of its unit's forward, where it is a shard (a DTensor), as in a penalty over "
        "self.parameters(). For an L2 penalty use the optimizer's weight_decay: in SGD and Adam, 2 * c does what c * "
        "p.pow(2).sum() in the loss would do. For others add the derivative in on_before_optimizer_step, such as "
        "p.grad.add_(p.detach().sign(), alpha=c), or use the parameter inside its unit's forward. With zero=Zero(unit=[...]) "
        f"name units that leave it out; it is whole in all of training_step then.{hint}"
    )


def _called_past_its_unit(error: Exception, units: Mapping[str, Any]) -> UnsupportedError | None:
    """Return the error for a layer that was called although its unit was not, if that is what happened."""
    called = {id(module) for module in _modules_in(error)}
    for name, unit in units.items():
        inside = {id(layer): path for path, layer in unit.named_modules() if layer is not unit}
        path = next((path for each, path in inside.items() if each in called), None)
        if path is not None and id(unit) not in called:
            return UnsupportedError(
                f"The layer '{name}.{path}' was called while its parameters were sharded. It lies in the unit {name!r}, which is "
                "gathered for that unit's forward only, so call the unit itself, not a layer in it. If the layer has to be "
                "used from elsewhere, name units that leave it out: zero=Zero(unit=[...]) with class names or module paths."
            )
    return None


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _modules_in(error: BaseException) -> Iterator[nn.Module]:
    """Yield the modules whose methods were running."""
    for frame in _frames(error):
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            yield module


def _asked_for_shards(error: BaseException) -> bool:
    for frame in _frames(error):
        if frame.f_code is torch.autograd.grad.__code__:
            asked = frame.f_locals.get("inputs")
            several = asked if isinstance(asked, (tuple, list)) else [asked]
            return any(isinstance(each, DTensor) for each in several)
    return False
