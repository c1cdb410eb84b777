"""The learning rate schedules that DeepSpeed's JSON names, as schedulers of torch's.

Each gives, for a number of optimizer steps done, the rates that DeepSpeed's schedule of that name has then, and steps once for
each of them. Before the first step a schedule stands one before its beginning, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from meshbolt.errors import CheckpointError, ConfigError

# The state of DeepSpeed's own schedules.
_DEEPSPEEDS = {"last_batch_iteration"}

_SECOND_BETA = 0.99  # what OneCycle sets it to, beside the beta that it cycles


class Schedule(LRScheduler):
    """A schedule of steps; `rates` says what they are."""

    def rates(self, position: int) -> Sequence[float]:
        """Return the rate of each group.

        Args:
            position: optimizer steps done, less one.
        """
        raise NotImplementedError

    @property
    def last_batch_iteration(self) -> int:
        """The position of the rates now: steps done, less one."""
        return int(self.last_epoch) - 1

    def step(self, last_batch_iteration: int | None = None, *, batch_iteration: int | None = None) -> None:
        """Go on by one step, or to a position.

        Args:
            last_batch_iteration: optimizer steps done, less one; None: the next.
            batch_iteration: the same.
        """
        position = batch_iteration if last_batch_iteration is None else last_batch_iteration
        if position is not None:
            self.last_epoch = position
        super().step()

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group now."""
        return list(self.rates(self.last_epoch - 1))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that this class has returned, or DeepSpeed's schedule of the name.

        Raises:
            CheckpointError: it is that of another schedule.
        """
        self.check_state(state_dict)
        if set(state_dict) != _DEEPSPEEDS:
            super().load_state_dict(state_dict)
            return
        self.last_epoch = int(state_dict["last_batch_iteration"]) + 1
        self._step_count = self.last_epoch + 1
        self._last_lr = [*self.get_lr()]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a state is one that this class has returned, or DeepSpeed's schedule of the name.

        Args:
            state: as a checkpoint has it.

        Raises:
            CheckpointError: it is that of another schedule.
        """
        # Names that begin with _ are torch's, and others in each of its releases.
        there, here = ({key for key in each if not key.startswith("_")} for each in (state, self.state_dict()))
        if there != _DEEPSPEEDS and (strange := sorted((there ^ here) - {"verbose"})):
            raise CheckpointError(
                f"The checkpoint has the state of another learning rate schedule than {type(self).__name__}, which this run has: "
                f"they differ in {', '.join(strange)}. Use the schedule that the checkpoint was written with, or load without "
                "its state: MeshStrategy(checkpoint=Checkpoint(load_weights_only=True)) in a Trainer; in Fabric leave it out."
            )

    def _each(self, name: str, value: Any) -> list[float]:
        """Return one value for each group, of a number or a list."""
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(self.optimizer.param_groups)
        if len(values) != len(self.optimizer.param_groups) or not all(_is_number(each) for each in values):
            raise ConfigError(
                f"{type(self).__name__}({name}={value!r}): give a number, or a list of {len(self.optimizer.param_groups)}, one "
                "for each parameter group."
            )
        return [float(each) for each in values]


class WarmupLR(Schedule):
    """From one rate to another over a number of steps, then constant.

    Example:
        >>> scheduler = WarmupLR(optimizer, warmup_max_lr=1e-3, warmup_num_steps=100, warmup_type="linear")
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        """Make the schedule.

        Args:
            optimizer: whose rates are set.
            warmup_min_lr: at the beginning; a list has one for each group.
            warmup_max_lr: after the warm-up; None: the optimizer's own.
            warmup_num_steps: of the warm-up.
            warmup_type: "log" or "linear".

        Raises:
            ConfigError: a value is wrong.
        """
        self.optimizer = optimizer
        own = [float(group["lr"]) for group in optimizer.param_groups]
        self.low = self._each("warmup_min_lr", warmup_min_lr)
        self.high = own if warmup_max_lr is None else self._each("warmup_max_lr", warmup_max_lr)
        self.warmup = max(2, _count(self, "warmup_num_steps", warmup_num_steps))
        self.kind = _kind(self, warmup_type)
        super().__init__(optimizer)

    def rates(self, position: int) -> Sequence[float]:
        """Return the rate of each group."""
        share = 0.0 if position < 0 else self.share(position)
        return [low + (high - low) * share for low, high in zip(self.low, self.high, strict=True)]

    def share(self, position: int) -> float:
        """Return how far the rate is from its minimum to its maximum."""
        return _warmed(position, self.warmup, self.kind) if position < self.warmup else 1.0


class WarmupDecayLR(WarmupLR):
    """From one rate to another over a number of steps, then down to zero along a line."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        """Make the schedule.

        Args:
            optimizer: whose rates are set.
            total_num_steps: of training; the rate is zero then.
            warmup_min_lr: at the beginning; a list has one for each group.
            warmup_max_lr: after the warm-up.
            warmup_num_steps: of the warm-up.
            warmup_type: "log" or "linear".

        Raises:
            ConfigError: a value is wrong.
        """
        self.total = _count(self, "total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)

    def share(self, position: int) -> float:
        """Return how far the rate is from its minimum to its maximum."""
        if position < self.warmup:
            return super().share(position)
        return max(0.0, (self.total - position) / max(1.0, self.total - self.warmup))


class WarmupCosineLR(Schedule):
    """From a part of the optimizer's rates up to them over a number of steps, then down along a cosine."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
    ) -> None:
        """Make the schedule.

        Args:
            optimizer: whose rates are scaled.
            total_num_steps: of training.
            warmup_min_ratio: part of the rate at the beginning.
            warmup_num_steps: of the warm-up.
            cos_min_ratio: part of the rate at the end.
            warmup_type: "log" or "linear".

        Raises:
            ConfigError: a value is wrong.
        """
        self.total = _count(self, "total_num_steps", total_num_steps)
        self.first, self.last = (
            _number(self, "warmup_min_ratio", warmup_min_ratio),
            _number(self, "cos_min_ratio", cos_min_ratio),
        )
        self.warmup = max(2, _count(self, "warmup_num_steps", warmup_num_steps))
        self.kind = _kind(self, warmup_type)
        super().__init__(optimizer)

    def rates(self, position: int) -> Sequence[float]:
        """Return the rate of each group."""
        return [float(rate) * self.ratio(position) for rate in self.base_lrs]

    def ratio(self, position: int) -> float:
        """Return the part of the optimizer's rates."""
        if position < 0:
            return 0.0
        if position < self.warmup:
            return self.first + (1.0 - self.first) * _warmed(position, self.warmup, self.kind)
        progress = min(1.0, (position - self.warmup + 1) / max(1, self.total - self.warmup))
        return max(0.0, self.last + (1.0 - self.last) * (1 + math.cos(math.pi * progress)) / 2)


class LRRangeTest(Schedule):
    """A rate that grows without end, to find the largest with which a model trains."""

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
    ) -> None:
        """Make the schedule.

        Args:
            optimizer: whose rates are set.
            lr_range_test_min_lr: at the beginning; a list has one for each group.
            lr_range_test_step_size: steps in which the rate grows by `lr_range_test_step_rate` times its first value.
            lr_range_test_step_rate: see above.
            lr_range_test_staircase: grow once in that many steps, not in each.

        Raises:
            ConfigError: a value is wrong.
        """
        self.optimizer = optimizer
        self.low = self._each("lr_range_test_min_lr", lr_range_test_min_lr)
        self.size = _count(self, "lr_range_test_step_size", lr_range_test_step_size)
        self.rate = _number(self, "lr_range_test_step_rate", lr_range_test_step_rate)
        self.has_stairs = _switch(self, "lr_range_test_staircase", lr_range_test_staircase)
        super().__init__(optimizer)

    def rates(self, position: int) -> Sequence[float]:
        """Return the rate of each group."""
        interval = (position + 1) / self.size
        return [low * (1 + self.rate * (math.floor(interval) if self.has_stairs else interval)) for low in self.low]


class OneCycle(Schedule):
    """Up and down again between two rates, while the first beta goes down and up; then both decay."""

    def __init__(self, optimizer: Optimizer, cycle_min_lr: Any, cycle_max_lr: Any, **others: Any) -> None:
        """Make the schedule.

        Args:
            optimizer: whose rates are set.
            cycle_min_lr: the lower rate; a list has one for each group.
            cycle_max_lr: the upper rate; a list has one for each group.
            others: as in `ONE_CYCLE`, which has their defaults.

        Raises:
            ConfigError: a value is wrong.
        """
        if unknown := sorted(set(others) - set(ONE_CYCLE)):
            raise ConfigError(f"OneCycle has no argument {unknown[0]!r}. It has {', '.join(sorted(ONE_CYCLE))}.")
        values = {**ONE_CYCLE, **others}
        self.optimizer = optimizer
        self.low, self.high = self._each("cycle_min_lr", cycle_min_lr), self._each("cycle_max_lr", cycle_max_lr)
        self.up = float(_count(self, "cycle_first_step_size", values["cycle_first_step_size"]))
        down, stairs = values["cycle_second_step_size"], values["cycle_second_stair_count"]
        self.down = self.up if down is None else _number(self, "cycle_second_step_size", down)
        self.stairs_up = _number(self, "cycle_first_stair_count", values["cycle_first_stair_count"])
        self.stairs_down = self.stairs_up if stairs is None else _number(self, "cycle_second_stair_count", stairs)
        self.decay_size = _number(self, "decay_step_size", values["decay_step_size"])
        self.lr_decay = _number(self, "decay_lr_rate", values["decay_lr_rate"])
        self.beta_decay = _number(self, "decay_mom_rate", values["decay_mom_rate"])
        is_cycled = _switch(self, "cycle_momentum", values["cycle_momentum"])
        self.cycles_betas = is_cycled and "betas" in optimizer.defaults
        self.low_beta = self._each("cycle_min_mom", values["cycle_min_mom"])
        self.high_beta = self._each("cycle_max_mom", values["cycle_max_mom"])
        super().__init__(optimizer)

    def rates(self, position: int) -> Sequence[float]:
        """Return the rate of each group."""
        if position < self.up + self.down:
            height = self._height(position)
            return [low + (high - low) * height for low, high in zip(self.low, self.high, strict=True)]
        decay = 1.0 if not self.decay_size else 1 + self.lr_decay * self._decays(position)
        return [low / decay for low in self.low]

    def betas(self, position: int) -> Sequence[float]:
        """Return the first beta of each group."""
        if position < 0:
            return self.low_beta
        if position < self.up + self.down:
            height = self._height(position)
            return [high - (high - low) * height for low, high in zip(self.low_beta, self.high_beta, strict=True)]
        decay = 1.0 if not self.decay_size else 1 + self.beta_decay * self._decays(position)
        return [high * decay for high in self.high_beta]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group now, and set its betas."""
        if self.cycles_betas:
            for group, beta in zip(self.optimizer.param_groups, self.betas(self.last_epoch - 1), strict=True):
                group["betas"] = (beta, _SECOND_BETA)
        return super().get_lr()

    def _height(self, position: int) -> float:
        """Return how far up a step is, 0.0 to 1.0."""
        at = (position + 1) % (self.up + self.down)
        height, stairs = (
            (at / self.up, self.stairs_up)
            if at <= self.up
            else ((self.up + self.down - at) / self.down, self.stairs_down)
        )
        return math.floor(round(height * stairs, 9)) / stairs if stairs > 0 else height

    def _decays(self, position: int) -> float:
        return (position - (self.up + self.down) + 1) / self.decay_size


ONE_CYCLE: Mapping[str, Any] = MappingProxyType(
    {
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    }
)
"""Arguments of `OneCycle` beside the two rates, and their defaults."""

SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {each.__name__: each for each in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)}
)


def _warmed(position: int, steps: int, kind: str) -> float:
    return math.log(position + 1) / math.log(steps) if kind == "log" else position / steps


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _number(owner: Schedule, name: str, value: Any) -> float:
    if not _is_number(value):
        raise ConfigError(f"{type(owner).__name__}({name}={value!r}): give a number of 0 or more.")
    return float(value)


def _count(owner: Schedule, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{type(owner).__name__}({name}={value!r}): give a whole number of steps, 1 or more.")
    return value


def _switch(owner: Schedule, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{type(owner).__name__}({name}={value!r}) is a switch. Use true or false.")
    return value


def _kind(owner: Schedule, value: Any) -> str:
    if value not in ("log", "linear"):
        raise ConfigError(f"{type(owner).__name__}(warmup_type={value!r}): use 'log' or 'linear'.")
    return str(value)
