"""A LightningModule cut into stages in one process, on one of its batches, to see what training would do with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import PipelineReport, compare_stages, split_batch
from meshbolt.strategies.pipelined.logs import record_logs
from meshbolt.strategies.pipelined.metrics import quiet_metrics

Step = Callable[[], Any]


def verify_module(
    module: pl.LightningModule,
    batch: Any,
    *,
    choose: Callable[[Step], Sequence[str]],
    microbatches: int,
    replicate: Sequence[str] = (),
) -> PipelineReport:
    """Cut a module into stages, run all of them in this process, and compare their gradients with the module's own.

    Nothing is trained or logged, and the module is left as it was.

    Args:
        module: with a `training_step`, on the CPU.
        batch: one of its batches.
        choose: returns the modules with which stages 1, 2, ... begin, for the step of a microbatch.
        microbatches: into how many the batch is divided.
        replicate: names of modules that every stage keeps.

    Raises:
        ConfigError: a name is that of no module, there are too few samples, or the module is not on the CPU.
        UnsupportedError: the module cannot be cut there; the message says which value is in the way.
    """
    _check(module)
    index = (0,) if len(inspect.signature(module.training_step).parameters) > 1 else ()
    steps = [functools.partial(module.training_step, part, *index) for part in split_batch(batch, microbatches)]
    with record_logs(module, []), quiet_metrics(module):
        return compare_stages(module, steps, tuple(choose(steps[0])), loss_of=_loss, replicate=replicate)


def _check(module: pl.LightningModule) -> None:
    elsewhere = next((name for name, p in module.named_parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ConfigError(
            f"Parameter {elsewhere!r} is on {module.get_parameter(elsewhere).device}; stages are verified on the CPU. Call "
            "module.cpu() first."
        )
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} optimises by itself (automatic_optimization = False), and cannot be cut into stages: they "
            "run the backward pass."
        )


def _loss(result: Any) -> Tensor:
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, torch.Tensor):
        raise UnsupportedError(f"training_step returned {type(loss).__name__} instead of a loss, which stages need.")
    return loss
