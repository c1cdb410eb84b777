"""The orders in which stages compute and communicate: torch's schedules, by the names of our setting."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from meshbolt.compat import PipelineSchedule, PipelineScheduleSingle, schedule_class
from meshbolt.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One order.

    Attributes:
        kind: name of torch's class.
        single: it takes one stage a rank, others take two or more.
        folded: with two stages a rank, the first rank has the first and the last one.
        splits_backward: it computes the gradients of parameters apart from those of inputs.
        needs_stages: there have to be as many microbatches as stages.
        reverses: it runs microbatches backwards from the last to the first.
        in_rounds: a rank computes its stages in turns, of about as many microbatches as there are ranks, all of them equal.
    """

    kind: str
    single: bool = False
    folded: bool = False
    splits_backward: bool = False
    needs_stages: bool = False
    in_rounds: bool = False
    reverses: bool = False

    def stages_of(self, rank: int, *, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, in the order in which data passes them.

        Args:
            rank: which one.
            ranks: how many there are.
            stages_per_rank: how many each has.

        Example:
            >>> SCHEDULES["zbv"].stages_of(0, ranks=2, stages_per_rank=2)
            (0, 3)
        """
        if self.folded:
            return rank, 2 * ranks - 1 - rank
        return tuple(rank + ranks * turn for turn in range(stages_per_rank))

    def allows(self, microbatches: int, *, stages: int, ranks: int) -> bool:
        """Return whether a step may have so many microbatches.

        Args:
            microbatches: how many.
            stages: of all ranks.
            ranks: among which they are distributed.

        Example:
            >>> [count for count in range(1, 9) if SCHEDULES["interleaved_1f1b"].allows(count, stages=4, ranks=2)]
            [1, 2, 3, 4, 6, 8]
        """
        if self.needs_stages and microbatches < stages:
            return False
        return not self.in_rounds or microbatches % max(1, microbatches // ranks) == 0


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "gpipe": Schedule(kind="GPipe", single=True),
        "1f1b": Schedule(kind="1F1B", single=True, needs_stages=True),
        "interleaved_1f1b": Schedule(kind="Interleaved1F1B", in_rounds=True),
        "looped_bfs": Schedule(kind="LoopedBFS", reverses=True),
        "interleaved_zero_bubble": Schedule(kind="InterleavedZeroBubble", splits_backward=True, in_rounds=True),
        "zbv": Schedule(kind="ZBVZeroBubble", folded=True, splits_backward=True),
        "dualpipev": Schedule(kind="DualPipeV", folded=True, splits_backward=True, needs_stages=True),
    }
)


def find_schedule(name: str, *, stages: int, ranks: int, microbatches: int) -> Schedule:
    """Return a schedule by its name.

    Args:
        name: as the setting has it.
        stages: of all ranks.
        ranks: among which they are distributed.
        microbatches: of a step.

    Raises:
        ConfigError: there is none of that name, or it cannot be for these numbers.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r}: there is no such schedule{did_you_mean(name, SCHEDULES)}.")
    schedule, per_rank = SCHEDULES[name], stages // ranks
    asked = f"schedule={name!r} with {stages} stages on {ranks} ranks"
    if stages % ranks or not per_rank:
        raise ConfigError(f"{asked}: each rank needs as many stages as the others. Use a multiple of {ranks}.")
    if schedule.single and per_rank != 1:
        raise ConfigError(f"{asked}: it has one stage a rank. Use {ranks} stages, or schedule='interleaved_1f1b'.")
    if schedule.folded and per_rank != 2:
        raise ConfigError(f"{asked}: it has two stages a rank. Use {2 * ranks} stages.")
    if not schedule.single and per_rank < 2:
        raise ConfigError(f"{asked}: it has two stages a rank or more. Use {2 * ranks} stages, or schedule='1f1b'.")
    if schedule.needs_stages and microbatches < stages:
        raise ConfigError(
            f"{asked} needs as many microbatches as stages, and has {microbatches}. Use microbatches={stages} or more, or "
            "schedule='gpipe'."
        )
    if not schedule.allows(microbatches, stages=stages, ranks=ranks):
        less, more = microbatches - microbatches % ranks, microbatches + -microbatches % ranks
        raise ConfigError(
            f"{asked} computes in rounds of {ranks} microbatches or a few more, and {microbatches} cannot be divided into "
            f"{microbatches // ranks} equal rounds. Use microbatches={less} or {more}, or schedule='looped_bfs'."
        )
    return schedule


def schedule_for(name: str, *, stages: int, ranks: int, microbatches: int) -> Schedule:
    """Return a schedule by its name, or for a number of microbatches that it cannot have one of the same stages that can.

    Args:
        name: of a schedule that fits the other numbers.
        stages: of all ranks.
        ranks: among which they are distributed.
        microbatches: of a step; of an epoch's last batch there may be few.
    """
    schedule = SCHEDULES[name]
    if schedule.needs_stages and microbatches < stages:
        name = "gpipe" if schedule.single else "zbv"
    elif not schedule.allows(microbatches, stages=stages, ranks=ranks):
        name = "looped_bfs"
    return find_schedule(name, stages=stages, ranks=ranks, microbatches=microbatches)


def order_of(schedule: Schedule, stages: int, ranks: int, microbatches: int) -> list[list[tuple[str, int, int]]]:
    """Return what each rank computes, in its order: work ("F", "B", "I" or "W"), stage and microbatch.

    Args:
        schedule: one that fits the numbers.
        stages: of all ranks.
        ranks: among which they are distributed.
        microbatches: of a step.
    """
    if schedule.single:
        return [_single_order(schedule, rank, ranks, microbatches) for rank in range(ranks)]
    own = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=stages,
            group_size=ranks,
            group_rank=0,
            is_first=stage == 0,
            is_last=stage == stages - 1,
            submod=torch.nn.Identity(),
        )
        for stage in schedule.stages_of(0, ranks=ranks, stages_per_rank=stages // ranks)
    ]
    order = build_schedule(schedule, own, microbatches).pipeline_order  # type: ignore[attr-defined]
    return [[each for action in order[rank] for each in _pieces(action)] for rank in range(ranks)]


def _single_order(schedule: Schedule, rank: int, ranks: int, microbatches: int) -> list[tuple[str, int, int]]:
    """Return what a rank with one stage computes, which torch's own listing has wrong for 1F1B's last rank."""
    ahead = min(ranks - rank, microbatches) if schedule.needs_stages else microbatches
    order = [("F", rank, number) for number in range(ahead)]
    for number in range(microbatches):
        order.append(("B", rank, number))
        if number + ahead < microbatches:
            order.append(("F", rank, number + ahead))
    return order


def _pieces(action: Any) -> list[tuple[str, int, int]]:
    if action is None:
        return []
    if action.sub_actions is not None:
        return [piece for each in action.sub_actions for piece in _pieces(each)]
    # As torch writes an action, which is the same in all of its versions: stage, work, microbatch.
    written = re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action))
    return [(written[2], int(written[1]), int(written[3]))] if written else []


def build_schedule(schedule: Schedule, stages: Sequence[Any], microbatches: int) -> PipelineSchedule:
    """Return torch's schedule for a rank's stages.

    Args:
        schedule: which.
        stages: of this rank.
        microbatches: of a step.
    """
    kind = schedule_class(schedule.kind)
    options: dict[str, Any] = {"n_microbatches": microbatches, "loss_fn": _loss_itself, "scale_grads": False}
    built: PipelineSchedule = kind(stages[0] if issubclass(kind, PipelineScheduleSingle) else list(stages), **options)
    return built


def _loss_itself(output: torch.Tensor, _target: None) -> torch.Tensor:
    """Return what the last stage has computed, which is the loss."""
    return output
