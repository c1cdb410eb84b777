"""Pipeline parallelism as the user writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.pipeline.schedule import SCHEDULES, Schedule, find_schedule

AUTO = "auto"


@dataclass(frozen=True)
class PipelineParallel:
    """How a module is cut into stages, which are distributed among ranks.

    Lists may be given as tuples and are kept as such; a single name stands for a list of one.

    Attributes:
        size: ranks among which the stages are distributed.
        microbatches: into how many parts a batch is divided; "auto": 2 x `size`, lowered to the nearest divisor of the
            batch's samples that the schedule allows.
        schedule: the order of computations: gpipe or 1f1b with one stage a rank, interleaved_1f1b, looped_bfs or
            interleaved_zero_bubble with several, zbv or dualpipev with two.
        cuts: names of the modules with which stages 1, 2, ... begin, in the order in which the forward reaches them; "auto":
            chosen so that stages take the same time.
        blocks: paths of the lists of modules that may be cut, such as "model.layers"; "auto": with `split` all repeated
            blocks of the model, without it any module.
        split: how many blocks each stage has; "auto": balanced.
        stages_per_rank: "auto": one, or two where the schedule has several.
        replicate: names of modules that every stage keeps and computes, so that what they return crosses no cut; their
            gradients are added up.
        example_batch: name of a method or attribute of the module that gives a batch like those of training, where the loader
            cannot be asked for one, such as a loader of an iterable dataset.
        align_reductions: gradients of all stages are reduced over data-parallel ranks at the same time, in the pass in which the
            first of them ends; False: each as soon as it can be.
        split_backward: schedules that make gradients of parameters apart from those of inputs, which fills their gaps, do so on
            each stage where the first microbatch has shown the same gradients; False: all gradients at once.
    """

    size: int = 1
    microbatches: int | str = AUTO
    schedule: str = "1f1b"
    cuts: str | list[str] | tuple[str, ...] = AUTO
    blocks: str | list[str] | tuple[str, ...] = AUTO
    split: str | list[int] | tuple[int, ...] = AUTO
    stages_per_rank: int | str = AUTO
    replicate: list[str] | tuple[str, ...] = ()
    example_batch: str | None = None
    align_reductions: bool = True
    split_backward: bool = True

    def __post_init__(self) -> None:
        if not _is_count(self.size):
            raise ConfigError(f"pipeline_parallel={self.size!r} is not a number of ranks. Use 1 or more.")
        for name, kind in (("cuts", "modules"), ("blocks", "lists of modules"), ("replicate", "modules")):
            object.__setattr__(self, name, self._names(name, kind))
        if isinstance(self.split, (list, tuple)):
            object.__setattr__(self, "split", tuple(self.split))
        self._check_values()
        if self.size == 1:
            self._check_unused()
            return
        self._check_stages()
        self._check_cuts()
        if self.microbatches != AUTO:
            find_schedule(self.schedule, stages=self.stages, ranks=self.size, microbatches=int(self.microbatches))

    # What it means --------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> Schedule:
        """The schedule."""
        return SCHEDULES[self.schedule]

    @property
    def resolved_stages_per_rank(self) -> int:
        """How many stages each rank has."""
        if self.stages_per_rank != AUTO:
            return int(self.stages_per_rank)
        return 1 if self.size == 1 or self.order.single else 2

    @property
    def stages(self) -> int:
        """Number of stages of all ranks."""
        return self.size * self.resolved_stages_per_rank

    def microbatches_of(self, samples: int) -> int:
        """Return into how many microbatches a batch is divided.

        Where "auto" finds no divisor of the samples that the schedule allows, as for the last batch of an epoch, microbatches
        differ by one sample.

        Args:
            samples: of the batch on each pipeline rank.

        Raises:
            ConfigError: the batch is too small.

        Example:
            >>> setting = PipelineParallel(size=4)
            >>> setting.microbatches_of(32), setting.microbatches_of(20), setting.microbatches_of(7)
            (8, 5, 7)
        """
        if self.size == 1:
            return 1
        if self.microbatches != AUTO:
            return self._checked_against(samples, int(self.microbatches))
        most = min(2 * self.size, samples)
        allowed = [count for count in range(1, most + 1) if self._allows(count)]
        if not allowed:
            least = next(count for count in range(1, 2 * self.stages + 1) if self._allows(count))
            raise ConfigError(
                f"schedule={self.schedule!r} with {self.stages} stages needs {least} microbatches or more, and a batch of "
                f"{samples} samples cannot be divided into as many. Use batches of {least} samples or more, drop_last=True in "
                "the loader if it is the last of an epoch, or schedule='gpipe'."
            )
        return max(allowed, key=lambda count: (samples % count == 0, count))

    def _allows(self, microbatches: int) -> bool:
        return self.order.allows(microbatches, stages=self.stages, ranks=self.size)

    def _checked_against(self, samples: int, count: int) -> int:
        if samples < count:
            raise ConfigError(
                f"PipelineParallel(microbatches={count}) divides each batch, and one of {samples} samples cannot be. Use batches "
                f"of {count} samples or more, drop_last=True in the loader if it is the last of an epoch, or microbatches='auto'."
            )
        return count

    # What is refused ------------------------------------------------------------------------------------------------------

    def _names(self, field: str, kind: str) -> str | tuple[str, ...]:
        """Return a field that names modules as a tuple; "auto" stays."""
        value: Any = getattr(self, field)
        if value == AUTO and field != "replicate":
            return AUTO
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"PipelineParallel({field}={value!r}) is to name {kind}, as a list of strings.")
        if not names and field != "replicate":
            raise ConfigError(f"PipelineParallel({field}={value!r}) names no {kind}. Name some, or leave it out.")
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"PipelineParallel({field}={value!r}) names {twice!r} twice. Name it once.")
        return tuple(names)

    def _check_values(self) -> None:
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise ConfigError(
                f"PipelineParallel(schedule={self.schedule!r}): there is no such schedule"
                f"{did_you_mean(str(self.schedule), SCHEDULES)}."
            )
        for name in ("microbatches", "stages_per_rank"):
            value = getattr(self, name)
            if value != AUTO and not _is_count(value):
                raise ConfigError(f"PipelineParallel({name}={value!r}) is not a number. Use 1 or more, or 'auto'.")
        for name in ("align_reductions", "split_backward"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"PipelineParallel({name}={getattr(self, name)!r}) is a switch. Use True or False.")
        counts = self.split
        if counts != AUTO and not (isinstance(counts, Sequence) and counts and all(map(_is_count, counts))):
            raise ConfigError(
                f"PipelineParallel(split={self.split!r}) is to say how many blocks each stage has, such as [7, 5], or 'auto'."
            )
        batch = self.example_batch
        if batch is not None and not (isinstance(batch, str) and batch.isidentifier()):
            raise ConfigError(
                f"PipelineParallel(example_batch={batch!r}) is not the name of a method or attribute of the module, which gives "
                "a batch. Use a plain name, such as 'example_batch'."
            )

    def _check_unused(self) -> None:
        if any(getattr(self, each.name) != each.default for each in fields(self)):
            raise ConfigError(
                "PipelineParallel(size=1) keeps the module on one rank, which leaves nothing for its other settings to say. Give "
                "a size of 2 or more, or leave pipeline_parallel out."
            )

    def _check_stages(self) -> None:
        asked = f"PipelineParallel(schedule={self.schedule!r}, stages_per_rank={self.stages_per_rank})"
        count = self.resolved_stages_per_rank
        if self.order.single and count != 1:
            raise ConfigError(
                f"{asked}: this schedule has one stage a rank. Leave stages_per_rank out, or use schedule='interleaved_1f1b'."
            )
        if self.order.folded and count != 2:
            raise ConfigError(
                f"{asked}: this schedule has two stages a rank. Leave stages_per_rank out, or use schedule='interleaved_1f1b'."
            )
        if not self.order.single and count < 2:
            raise ConfigError(
                f"{asked}: this schedule has two stages a rank or more. Leave stages_per_rank out, or use schedule='1f1b'."
            )

    def _check_cuts(self) -> None:
        stages = f"{self.stages} stages ({self.size} ranks with {self.resolved_stages_per_rank} each)"
        if self.cuts != AUTO and (self.blocks, self.split) != (AUTO, AUTO):
            raise ConfigError(
                f"PipelineParallel(cuts={list(self.cuts)}) says where every stage begins, which leaves nothing for blocks and "
                "split to say. Give cuts, or blocks and split."
            )
        if self.cuts != AUTO and len(self.cuts) != self.stages - 1:
            raise ConfigError(
                f"PipelineParallel(cuts={list(self.cuts)}) begins {len(self.cuts) + 1} stages with the first, and there are "
                f"{stages}. Name {self.stages - 1} modules{self._other_number(len(self.cuts) + 1)}."
            )
        if self.split != AUTO and len(self.split) != self.stages:
            raise ConfigError(
                f"PipelineParallel(split={list(self.split)}) is for {len(self.split)} stages, and there are {stages}. Give "
                f"{self.stages} numbers of blocks{self._other_number(len(self.split))}."
            )

    def _other_number(self, stages: int) -> str:
        """Return the end of a message: the number of stages for each rank that was meant, where the schedule has it."""
        if self.order.single or self.order.folded or stages % self.size or stages < 2 * self.size:
            return ""
        return f", or use stages_per_rank={stages // self.size}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
