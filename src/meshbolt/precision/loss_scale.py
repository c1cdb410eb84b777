"""Dynamic loss scaling for float16, with one decision for the whole world of ranks.

Gradients below 6e-8 vanish in float16, so the loss is multiplied by a large scale before backward and the gradients are
divided by it before they are used. If the scale was too large some gradient is inf or NaN: the step is skipped and the
scale lowered; after enough clean steps it is raised again.

torch's `GradScaler` decides per rank, or per group that shares a gradient's shards. That is not enough: in a hybrid
mesh an overflow in one replica makes that replica skip while the others step, and the replicas part for good. Here
whether an optimizer steps is a maximum over all ranks, so all step or all skip, and their scales stay equal. Gradients
are divided as plain local tensors, because torch's kernel refuses lists that hold DTensors beside plain tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshbolt.compat import local_tensor
from meshbolt.errors import CheckpointError, ConfigError, MeshboltError

_LARGEST_SCALE = torch.finfo(torch.float32).max


class LossScaler:
    """Scales the loss, divides the gradients, and agrees with every rank which optimizer steps are skipped.

    One step of the training loop, with one optimizer or several (each an `owner`):

        scaler.scale(loss).backward()
        scaler.unscale_(gradients, owner=optimizer)  # then clip
        if scaler.decide(owner=optimizer):
            optimizer.step()
        scaler.update()

    An optimizer is skipped for its own overflow only; the scale is lowered if any of them was skipped.

    With `hysteresis=1` the scale follows `torch.amp.GradScaler` step by step (but for `min_scale`). With more it
    follows DeepSpeed: that many overflows are needed before the scale is lowered; from then on each further overflow
    lowers it again, until it next grows; and the first clean step, at the start or after an overflow, does not count
    towards growth.

    At `min_scale` an overflow still skips the step and keeps the scale, and the first such step warns: nothing that the
    scaler can do will help then.

    Args:
        device: where flags are kept and reduced; a device that the ranks' process group can communicate from.
        init_scale: scale to start with. With powers of two for this and both factors, dividing gradients is exact.
        growth_interval: number of clean steps in a row after which the scale grows.
        growth_factor: what the scale is multiplied with to grow it, > 1.
        backoff_factor: what the scale is multiplied with to lower it, in (0, 1).
        hysteresis: number of overflows that lower the scale once.
        consecutive_hysteresis: count only overflows in a row: each clean step starts the count anew.
        min_scale: the scale is never lowered below this.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
    ) -> None:
        _require(0 < min_scale <= _LARGEST_SCALE, f"min_scale={min_scale}", "must be positive and finite")
        _require(
            min_scale <= init_scale <= _LARGEST_SCALE,
            f"init_scale={init_scale}",
            f"must be finite and at least min_scale={min_scale}",
        )
        _require(growth_interval >= 1, f"growth_interval={growth_interval}", "must be at least 1 step")
        _require(1 < growth_factor < math.inf, f"growth_factor={growth_factor}", "must be finite and above 1")
        _require(0 < backoff_factor < 1, f"backoff_factor={backoff_factor}", "must lie between 0 and 1")
        _require(hysteresis >= 1, f"hysteresis={hysteresis}", "must be at least 1 overflow")
        self.device = torch.device(device)
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.hysteresis = hysteresis
        self.consecutive_hysteresis = consecutive_hysteresis
        self.min_scale = min_scale
        self._scale = float(init_scale)
        self._clean_steps = self._clean_steps_after_overflow
        self._overflows_left = hysteresis
        self._num_skipped = 0
        self._warned = False
        self._found_inf: dict[Hashable, Tensor] = {}  # owners that are unscaled and not decided: this rank's flag
        self._skipped: dict[Hashable, bool] = {}  # owners decided since the last update: the world's answer

    @property
    def current_scale(self) -> float:
        """The number that the next loss is multiplied with; the same on every rank."""
        return self._scale

    @property
    def num_skipped(self) -> int:
        """Number of steps so far in which an optimizer was skipped."""
        return self._num_skipped

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale.

        Args:
            loss: any shape. A 0-dim float16 loss comes back in float32, since its product rarely fits in float16.
        """
        return loss * torch.full((), self._scale, dtype=torch.float32, device=loss.device)

    @torch.no_grad()
    def unscale_(self, gradients: Iterable[Tensor], *, owner: Hashable = None) -> None:
        """Divide gradients by the scale in place, and note whether this rank holds a value that is not finite.

        Communicates nothing, and does not wait for the device.

        Args:
            gradients: plain tensors or DTensors of any mesh, also empty ones and none at all. Each only once.
            owner: whose gradients these are, usually the optimizer.

        Raises:
            MeshboltError: the owner's gradients were divided already in this step.
            ConfigError: a gradient is float16, where the division would lose what the scale has saved.
        """
        if owner in self._found_inf or owner in self._skipped:
            raise MeshboltError(
                "The gradients of an optimizer were to be divided by the loss scale twice in one step. Clip the "
                "gradients of an optimizer once, and let that optimizer step before clipping them again."
            )
        local = [local_tensor(gradient) for gradient in gradients]
        if any(gradient.dtype == torch.float16 for gradient in local):
            raise ConfigError(
                "Loss scaling was asked for (precision='16-mixed') and a gradient is float16: dividing it by the scale "
                "would turn small values into zero. Keep parameters in float32 (no module.half()); they are gathered "
                "in float16 all the same."
            )
        self._found_inf[owner] = self._divide(local)

    def is_unscaled(self, *, owner: Hashable = None) -> bool:
        """Return whether the owner's gradients are divided already and wait for `decide`."""
        return owner in self._found_inf

    def decide(self, group: dist.ProcessGroup | None = None, *, owner: Hashable = None) -> bool:
        """Return whether the owner may step: True if no rank found a gradient that is not finite.

        One all-reduce of a number, which every rank of the group has to join, also those without gradients. Waits for
        the device.

        Args:
            group: the ranks that decide together; None: all of them.
            owner: as given to `unscale_`.
        """
        if owner not in self._found_inf:
            raise AssertionError("decide() was called for gradients that unscale_() has not seen in this step")
        found_inf = self._found_inf.pop(owner)
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=group)
        self._skipped[owner] = bool(found_inf.item())
        return not self._skipped[owner]

    def update(self) -> None:
        """Adjust the scale after one or several `decide`; an owner that has not decided yet keeps its state."""
        if not self._skipped:
            raise AssertionError("update() was called although no decide() came before it")
        overflow = any(self._skipped.values())
        self._skipped.clear()
        if overflow:
            self._count_overflow()
        else:
            self._count_clean_step()

    def state_dict(self) -> dict[str, Any]:
        """Return scale, counters and settings as numbers, under the keys of `torch.amp.GradScaler` and three more."""
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._clean_steps,
            "min_scale": self.min_scale,
            "_hysteresis_tracker": self._overflows_left,
            "num_skipped": self._num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the scale and the counters of a saved scaler, ours or a `torch.amp.GradScaler`.

        The settings (factors, interval, hysteresis, minimum) stay those this scaler was made with: what the running
        program says wins over what a checkpoint remembers.

        Raises:
            CheckpointError: the state lacks the scale or the growth counter.
        """
        missing = [key for key in ("scale", "_growth_tracker") if key not in state]
        if missing:
            raise CheckpointError(
                f"The state of a loss scaler lacks {missing} (it has {sorted(state)}): it was saved by a run that did "
                "not scale its loss. Resume with the precision of that run, or load the weights only."
            )
        self._scale = max(float(state["scale"]), self.min_scale)
        self._clean_steps = int(state["_growth_tracker"])
        self._overflows_left = min(int(state.get("_hysteresis_tracker", self.hysteresis)), self.hysteresis)
        self._num_skipped = int(state.get("num_skipped", 0))

    @property
    def _clean_steps_after_overflow(self) -> int:
        # DeepSpeed counts from the step after the overflow, torch from the overflow itself.
        return 0 if self.hysteresis == 1 else -1

    def _divide(self, gradients: list[Tensor]) -> Tensor:
        """Divide plain tensors in place; return 1.0 on this scaler's device if a value was not finite, else 0.0."""
        found_inf = torch.zeros((), dtype=torch.float32, device=self.device)
        for tensors in _alike(gradients):
            found_here = torch.zeros((), dtype=torch.float32, device=tensors[0].device)
            inverse_scale = torch.full_like(found_here, 1.0 / self._scale)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_here, inverse_scale)
            found_inf = torch.maximum(found_inf, found_here.to(self.device))
        return found_inf

    def _count_overflow(self) -> None:
        self._num_skipped += 1
        self._clean_steps = self._clean_steps_after_overflow
        if self._overflows_left > 1:
            self._overflows_left -= 1
            return
        if self._scale <= self.min_scale:
            self._warn_at_minimum()
        self._scale = max(self._scale * self.backoff_factor, self.min_scale)

    def _count_clean_step(self) -> None:
        self._clean_steps += 1
        if self.consecutive_hysteresis:
            self._overflows_left = self.hysteresis
        if self._clean_steps < self.growth_interval:
            return
        self._clean_steps = 0
        self._overflows_left = self.hysteresis
        if self._scale * self.growth_factor <= _LARGEST_SCALE:
            self._scale *= self.growth_factor

    def _warn_at_minimum(self) -> None:
        # On every rank, not on the first only: where warnings are errors, all ranks must raise.
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"Gradients are inf or NaN although the loss scale is at its minimum, {self.min_scale:g}: the step was "
            "skipped, and every further one like it will be, without another warning. The scale is not the cause: look "
            "for inf or NaN in the loss (Trainer(detect_anomaly=True)), lower the learning rate, or use "
            "precision='bf16-mixed'; if min_scale is above 1, lower it.",
            stacklevel=4,
        )


def _alike(tensors: Iterable[Tensor]) -> Collection[list[Tensor]]:
    """Return the tensors in lists of one device and one dtype, which is what torch's kernel takes."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return lists.values()


def _require(holds: bool, asked: str, rule: str) -> None:
    if not holds:
        raise ConfigError(f"Loss scaling was asked for with {asked}, which {rule}.")
