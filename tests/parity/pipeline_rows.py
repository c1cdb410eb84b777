"""The parity rows of pipelines in a Trainer as data: models of the table of cuts, under settings of the strategy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.parity.pipeline_models import CUTS
from tests.parity.tensor_models import Model, Task, tokens

from meshbolt import PipelineParallel, TensorParallel, Zero
from meshbolt.testing.parity.case import Case

STEPS, DRAWS = 3, 4
_CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}

# Noise, of which each microbatch has its own; and layers that compute in float32, in which a sum over microbatches is another one
# than over the batch.
OTHERWISE = frozenset({"noise", "gemma", "gemma2"})
# A mean over tokens is that of the batch where every microbatch has as many, so that none is left out of the loss.
OF_ALL_TOKENS = frozenset({"bert"})
# Without repeated blocks, none is recomputed.
WITHOUT_BLOCKS = frozenset({"unet", "recurrent", "sequential"})
OF_THREE_MODULES = frozenset({"recurrent"})  # which are no four stages


class Steady(Task):
    """A task whose network never drops anything out, nor normalises by a batch: both are others for microbatches."""

    def train(self, mode: bool = True) -> Steady:
        """Set the mode of all but the network."""
        super().train(mode)
        self.network.eval()
        return self


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained.

    Attributes:
        ranks: in all.
        pipeline: arguments of `PipelineParallel`; without cuts those of the model are taken, as many as there are stages.
        arguments: further arguments of `MeshStrategy`.
        trainer: arguments of the Trainer.
        models: that it is for; None: all.
    """

    ranks: int = 2
    pipeline: Mapping[str, Any] = field(default_factory=lambda: {"size": 2})
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    models: frozenset[str] | None = None


_DIVIDED = frozenset({"llama", "qwen3", "gpt2"})
SETTINGS: Mapping[str, Setting] = {
    "pp2": Setting(arguments={"zero": 0}),
    "pp2_chosen": Setting(pipeline={"size": 2, "cuts": "auto"}, arguments={"zero": 1}),
    "pp2_gpipe_odd": Setting(pipeline={"size": 2, "schedule": "gpipe", "microbatches": 3}, arguments={"zero": 1}),
    "pp2_interleaved": Setting(
        pipeline={"size": 2, "schedule": "interleaved_1f1b", "cuts": "auto"}, arguments={"zero": 1}, trainer=_CLIPPED
    ),
    "pp2_zbv": Setting(pipeline={"size": 2, "schedule": "zbv", "cuts": "auto"}, arguments={"zero": 2}),
    "pp2_zero0_accumulated": Setting(ranks=4, arguments={"zero": 0}, trainer=_CLIPPED),
    "pp2_zero1_accumulated": Setting(ranks=4, arguments={"zero": 1}, trainer=_CLIPPED),
    "pp2_zero2_accumulated": Setting(ranks=4, arguments={"zero": 2}, trainer=_CLIPPED),
    "pp2_zero3_accumulated": Setting(ranks=4, arguments={"zero": 3}, trainer=_CLIPPED),
    "pp2_zero3_recompute": Setting(ranks=4, arguments={"zero": 3, "recompute": "full"}),
    "pp2_tp2": Setting(ranks=4, arguments={"zero": 0, "tensor_parallel": 2}, trainer=_CLIPPED, models=_DIVIDED),
    "pp2_tp2_whole_sequences": Setting(
        ranks=4,
        arguments={"zero": 1, "tensor_parallel": TensorParallel(2, sequence_parallel=False)},
        models=_DIVIDED,
    ),
    "pp2_replicas_accumulated": Setting(ranks=8, arguments={"zero": Zero(2, replicate=2)}, trainer=_CLIPPED),
    "pp2_dp2_tp2": Setting(ranks=8, arguments={"zero": 1, "tensor_parallel": 2}, trainer=_CLIPPED, models=_DIVIDED),
    "pp2_dp2_tp2_interleaved": Setting(
        ranks=8,
        pipeline={"size": 2, "schedule": "interleaved_1f1b", "cuts": "auto"},
        arguments={"zero": 2, "tensor_parallel": 2},
        models=_DIVIDED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PipelineRow:
    """One comparison, in words of the tables."""

    model: str
    setting: str

    def __str__(self) -> str:
        """Return the row as a test id."""
        return f"{self.model}-{self.setting}"

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return SETTINGS[self.setting].ranks

    def case(self) -> Case:
        """Return the comparison that the row stands for."""
        cut, setting = CUTS[self.model], SETTINGS[self.setting]
        pipeline = dict(setting.pipeline)
        if "cuts" not in pipeline:
            middle = len(cut.cuts) // 2
            pipeline["cuts"] = list(cut.cuts[middle : middle + 1])
        strategy = {"pipeline_parallel": PipelineParallel(**pipeline), **setting.arguments}
        window = setting.trainer.get("accumulate_grad_batches", 1)
        blank = Case(module=Steady, data=range(10**6), strategy=strategy, ranks=setting.ranks)  # type: ignore[arg-type]
        return Case(
            module=functools.partial(steady, model_of(self.model)),
            data=batches(self.model, STEPS * window * blank.data_ranks),
            strategy=strategy,
            ranks=setting.ranks,
            steps=STEPS,
            precision="64-true",
            **setting.trainer,
        )

    def zero(self) -> Zero:
        """Return how the row's ranks divide the module."""
        zero = SETTINGS[self.setting].arguments["zero"]
        return zero if isinstance(zero, Zero) else Zero(stage=zero)

    def reference(self) -> PipelineRow:
        """Return a row that has the same reference in one process: of as many batches, in as large windows."""
        alike = (self.case().data_ranks, SETTINGS[self.setting].trainer)
        others = (dataclasses.replace(self, setting=name) for name in SETTINGS)
        return next(row for row in others if (row.case().data_ranks, SETTINGS[row.setting].trainer) == alike)


def model_of(name: str) -> Model:
    """Return a model as it is trained here."""
    model = CUTS[name].model
    return dataclasses.replace(model, batch=tokens) if name in OF_ALL_TOKENS else model


def steady(model: Model) -> Steady:
    """Return a task, in the mode of training."""
    task = Steady(model)
    task.train()
    return task


@functools.cache
def batches(model: str, count: int) -> list[Any]:
    """Return batches of a model, of several of its draws each, the same every time."""
    generator = torch.Generator().manual_seed(1)
    drawn = [[model_of(model).batch(generator) for _ in range(DRAWS)] for _ in range(count)]
    return [{key: torch.cat([each[key] for each in draws]) for key in draws[0]} for draws in drawn]


def pipeline_rows() -> tuple[PipelineRow, ...]:
    """Return every row: each model in each setting that it can be trained in."""
    return tuple(
        PipelineRow(model=model, setting=setting)
        for model, cut in CUTS.items()
        if cut.tolerance == 1e-12 and model not in OTHERWISE
        for setting, how in SETTINGS.items()
        if how.models is None or model in how.models
        if model not in WITHOUT_BLOCKS or "recompute" not in how.arguments
        if model not in OF_THREE_MODULES or how.pipeline.get("cuts") != "auto" or "schedule" not in how.pipeline
    )
