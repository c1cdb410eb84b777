"""Can a module be cut into pipeline stages as it is? In one process, on the CPU, before any ranks are started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from meshbolt.pipeline import PipelineReport, choose_cuts
from meshbolt.strategies.pipelined.verify import verify_module

__all__ = ["PipelineReport", "verify_pipeline"]


def verify_pipeline(
    module: pl.LightningModule,
    batch: Any,
    *,
    stages: int = 2,
    cuts: Sequence[str] | None = None,
    microbatches: int = 2,
) -> PipelineReport:
    """Cut a module into pipeline stages, run all of them in this process, and compare their gradients with the module's own.

    Between stages only what the report names is handed over, and each stage has values only for its own parameters: a module
    that passes here computes the same when its stages are on different ranks, unless it hands values from one layer to another
    in attributes or containers, which all stages share here. Nothing is trained, and the module is left as it was.

    Args:
        module: an ordinary LightningModule with a `training_step`, on the CPU.
        batch: one of its batches.
        stages: how many, where `cuts` is not given; they are chosen so that the slowest takes as little time as can be.
        cuts: names of the modules with which stages 1, 2, ... begin.
        microbatches: into how many the batch is divided.

    Returns:
        The report; print it.

    Raises:
        ConfigError: a cut names no module, there are too few units or samples, or the module is not on the CPU.
        UnsupportedError: the module cannot be cut there; the message says which value is in the way.

    Example:
        >>> from meshbolt.demos import ByteGPT
        >>> tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
        >>> report = verify_pipeline(ByteGPT(dim=16, num_layers=4, num_heads=2, max_length=16), (tokens[:, :-1], tokens[:, 1:]))
        >>> report.cuts, report.is_equal
        (('blocks.3',), True)
    """

    def choose(step: Callable[[], Any]) -> Sequence[str]:
        return cuts if cuts is not None else choose_cuts(module, step, stages, device=torch.device("cpu"))

    return verify_module(module, batch, choose=choose, microbatches=microbatches)
