"""The casts of each precision, written out for one process: Lightning's stock plugins, and what sharding adds to them.

Under `*-mixed`, parameters are used in 16 bits, but for those that stay whole on every rank; batches and the inputs of a unit
are cast where autocast does not do it; the loss leaves in float32. What is a unit, and what stays whole, is asked of the code
that decides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch.plugins.precision as stock
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from meshbolt.plugins import MixedPrecision
from meshbolt.testing.parity.case import Case
from meshbolt.zero import KeepNorms, Zero, plan_units


class Rounding:
    """The dtypes of one case's precision."""

    def __init__(self, case: Case, zero: Zero) -> None:
        """Look the dtypes up.

        Args:
            case: has the precision.
            zero: how ranks divide the module.
        """
        self._zero = zero
        plugin = case.plugin()
        self._flag = case.precision if plugin is None else str(plugin.precision)
        self._autocast = getattr(plugin, "autocast", True)
        self._scaler = plugin.loss_scaler if isinstance(plugin, MixedPrecision) else None
        self._used = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self._flag))
        self._whole: frozenset[nn.Parameter] = frozenset()

    def prepare(self, module: nn.Module) -> set[nn.Parameter]:
        """Let the module's units cast their inputs where ranks do so, and return the parameters that ranks shard."""
        norms = KeepNorms.ALL if self._autocast else KeepNorms.RUNNING_STATISTICS
        units = plan_units(module, self._zero, keep_norms=norms if self._used is not None else KeepNorms.NONE)
        self._whole = units.whole
        if self._used is not None and not self._autocast:
            for unit in units.units.values():
                unit.register_forward_pre_hook(self._cast_inputs, with_kwargs=True)
        return set(module.parameters()) - units.whole

    def used_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype that a parameter is used in."""
        return parameter.dtype if self._used is None or parameter in self._whole else self._used

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss in the dtype in which it leaves the module."""
        return loss if self._used is None else loss.float()

    def plugin(self, backward: Any) -> stock.Precision:
        """Return a stock plugin of Lightning for this precision, whose backward is the given function."""
        if self._used is None:
            return _PLUGINS[str(self._flag)](backward)
        scaler = None
        if self._scaler is not None:
            scaler = torch.amp.GradScaler(
                "cpu", init_scale=self._scaler.current_scale, growth_interval=self._scaler.growth_interval
            )
        return _Mixed(backward, str(self._flag), scaler, autocast=self._autocast)

    def _cast_inputs(self, _unit: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, self._used), _cast(kwargs, self._used)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)


class _GivenBackward(stock.Precision):
    """A plugin that leaves backward to a function."""

    def __init__(self, backward: Any, *args: Any) -> None:
        super().__init__(*args)
        self._backward = backward

    def backward(self, tensor: Tensor, model: Any, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Run the given function instead of a backward of the loss."""
        self._backward(self)


class _Single(_GivenBackward):
    pass


class _Double(_GivenBackward, stock.DoublePrecision):
    pass


class _Bfloat(_GivenBackward, stock.HalfPrecision):
    def __init__(self, backward: Any) -> None:
        super().__init__(backward, "bf16-true")

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by a norm in float64: torch's function keeps it in bfloat16, which is off by some thousandths."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(torch.clamp(clip_val / (norm + 1e-6), max=1.0).float())


class _Mixed(_GivenBackward, stock.MixedPrecision):
    def __init__(self, backward: Any, flag: str, scaler: Any, *, autocast: bool) -> None:
        super().__init__(backward, flag, "cpu", scaler)
        self._autocast = autocast
        self._used = torch.bfloat16 if flag == "bf16-mixed" else torch.float16

    def convert_input(self, data: Any) -> Any:
        """Round a batch where autocast does not."""
        return data if self._autocast else _cast(data, self._used)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Run a forward under autocast, unless it was switched off."""
        if not self._autocast:
            yield
            return
        with super().forward_context():
            yield


_PLUGINS: dict[str, type[_GivenBackward]] = {"32-true": _Single, "64-true": _Double, "bf16-true": _Bfloat}
