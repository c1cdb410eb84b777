"""Precision plugins: Lightning's classes, with backward, clipping and steps done by the engine.

One class serves the Trainer and Fabric: the Trainer's plugin classes are Fabric's too, and where the two call differently the
Fabric strategy goes to the engine itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.fabric.plugins.precision as fabric_plugins
import lightning.pytorch as pl
import lightning.pytorch.plugins.precision as trainer_plugins
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshbolt.engine import Engine
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.precision import LossScaler, PrecisionPolicy, precision_policy


class MeshPrecision(trainer_plugins.Precision):
    """What all of meshbolt's precision plugins do: hand over to the engine."""

    loss_scaler: LossScaler | None = None
    _engine: Engine | None = None
    _report_norm: Callable[[Tensor], None] | None = None

    def policy(self, *, reduce_dtype: str) -> PrecisionPolicy:
        """Return the dtypes that this plugin stands for.

        Args:
            reduce_dtype: the user's `Zero.reduce_dtype`.
        """
        return precision_policy(str(self.precision), reduce_dtype=reduce_dtype)

    def attach(self, engine: Engine, *, report_norm: Callable[[Tensor], None] | None = None) -> None:
        """Take the engine that does the work.

        Args:
            engine: with the module sharded.
            report_norm: called with the norm of the gradients whenever they are clipped by norm.
        """
        self._engine, self._report_norm = engine, report_norm
        if self.loss_scaler is not None:
            self.loss_scaler.device = engine.device  # where the ranks can compare what they have found

    @property
    def engine(self) -> Engine:
        """The engine; only there after the strategy has set the module up."""
        if self._engine is None:
            raise AssertionError("The precision plugin was used before the strategy attached its engine.")
        return self._engine

    def convert_output(self, data: Any) -> Any:
        """Return what a module gives back in Fabric: floats in torch's default dtype, as under Fabric's own plugins."""
        return data if self.precision == "32-true" else fabric_plugins.DoublePrecision().convert_output(data)

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss where the precision needs it, then run the hooks before backward."""
        if self.loss_scaler is not None:
            tensor = self.loss_scaler.scale(tensor)
        return super().pre_backward(tensor, module)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run backward on the loss, inside the engine."""
        with self.engine.backward(tensor) as loss:
            super().backward(loss, model, optimizer, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure (forward and backward), the hooks and clipping, then step on the shards."""
        result = closure()
        # Hooks see the shards, which have the gradients.
        with self.engine.settled():
            if result is None and model.automatic_optimization and self.loss_scaler is not None:
                self._after_closure(model, optimizer)
                return result  # training_step skipped this batch: there are no gradients to unscale
            self.unscale(optimizer)
            self._after_closure(model, optimizer)
            stepped = self.step(optimizer, self.engine, **kwargs)
        return stepped if result is None else result

    def _after_closure(self, model: pl.LightningModule, optimizer: Any) -> None:
        """Run the hooks before a step and clip; explain the one error that Lightning's own grad_norm ends in."""
        try:
            super()._after_closure(model, optimizer)
        except RuntimeError as error:
            if "data is not allocated yet" not in str(error):
                raise
            raise UnsupportedError(
                "A number was to be read from sharded gradients as if they were whole, as lightning's "
                "utilities.grad_norm(module, ...) does. Use trainer.strategy.grad_norm(), or grad_norm(module) for a part of "
                "the model: it is the norm over all ranks. `grad_norm` is logged by itself where gradients are clipped by norm."
            ) from error

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the loss scale, once a step; without scaling do nothing."""
        scaler = self.loss_scaler
        if scaler is None or scaler.is_unscaled(owner=id(optimizer)):
            return
        scaler.unscale_([p.grad for p in _parameters(optimizer) if p.grad is not None], owner=id(optimizer))

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Unscale, as Fabric asks for before it clips."""
        self.unscale(optimizer)

    def step(self, optimizer: Optimizer, engine: Engine, **kwargs: Any) -> Any:
        """Step, unless the gradients of any rank overflowed under the loss scale.

        Args:
            optimizer: made on the shards of the engine.
            engine: takes the step.
            kwargs: further arguments of the optimizer's `step`.
        """
        if self.loss_scaler is None:
            return engine.step(optimizer, **kwargs)
        engine.settle()
        self.unscale(optimizer)
        may_step = self.loss_scaler.decide(owner=id(optimizer))
        result = engine.step(optimizer, **kwargs) if may_step else None
        self.skipped_last_step = not may_step
        self.loss_scaler.update()
        return result

    skipped_last_step: bool = False

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip by norm or by value, over all ranks and on unscaled gradients; without gradients there is nothing to unscale."""
        if self.engine.spans_stages or any(parameter.grad is not None for parameter in _parameters(optimizer)):
            self.unscale(optimizer)
            super().clip_gradients(optimizer, *args, **kwargs)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip the gradients of an optimizer by their common norm, and report the norm."""
        norm = self.engine.clip_norm(_parameters(optimizer), float(clip_val))
        if self._report_norm is not None:
            self._report_norm(norm)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip every gradient of an optimizer to [-clip_val, clip_val]."""
        self.engine.clip_value(_parameters(optimizer), float(clip_val))

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale and its counters, where there is one."""
        return {} if self.loss_scaler is None else self.loss_scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the loss scale and its counters back."""
        if self.loss_scaler is not None and state_dict:
            self.loss_scaler.load_state_dict(state_dict)


class FullPrecision(MeshPrecision):
    """`32-true`: everything in the dtype in which the module made it."""

    precision = "32-true"


class DoublePrecision(MeshPrecision, trainer_plugins.DoublePrecision):
    """`64-true`: everything in float64."""


class HalfPrecision(MeshPrecision, trainer_plugins.HalfPrecision):
    """`bf16-true` and `16-true`: parameters, gradients and optimizer state in 16 bits, without float32 copies."""

    def __init__(
        self, precision: Literal["bf16-true", "16-true"] = "bf16-true", *, allow_no_master: bool = False
    ) -> None:
        """Check the flag.

        Args:
            precision: "bf16-true", or "16-true".
            allow_no_master: train with "16-true" although small updates are lost in float16.

        Raises:
            ConfigError: "16-true" without `allow_no_master`, or an unknown flag.
        """
        self._allow_no_master = allow_no_master
        precision_policy(precision, allow_no_master=allow_no_master)
        super().__init__(precision)

    def policy(self, *, reduce_dtype: str) -> PrecisionPolicy:
        """Return the dtypes that this plugin stands for."""
        return precision_policy(str(self.precision), reduce_dtype=reduce_dtype, allow_no_master=self._allow_no_master)


class MixedPrecision(MeshPrecision, trainer_plugins.MixedPrecision):
    """`bf16-mixed` and `16-mixed`: float32 shards and reductions, 16-bit gathers and arithmetic.

    fp16 scales the loss dynamically, and all ranks skip a step together.
    """

    def __init__(
        self,
        precision: Literal["bf16-mixed", "16-mixed"] = "bf16-mixed",
        device: str = "cuda",
        *,
        autocast: bool = True,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
    ) -> None:
        """Make the plugin.

        Args:
            precision: "bf16-mixed" or "16-mixed".
            device: "cuda" or "cpu"; for autocast.
            autocast: cast operation by operation, as on one device; False runs everything in 16 bits, as DeepSpeed does.
            init_scale: first loss scale (16-mixed only, like all that follow).
            growth_interval: steps without overflow after which the scale doubles.
            hysteresis: overflows before the scale is halved.
            consecutive_hysteresis: count only overflows in a row.
            min_scale: the scale is never halved below it.

        Raises:
            ConfigError: a value is out of range, or the flag is unknown.
        """
        policy = precision_policy(precision, autocast=autocast)
        if policy.storage_dtype is not torch.float32:
            raise ConfigError(f"MixedPrecision(precision={precision!r}): use 'bf16-mixed' or '16-mixed'.")
        self.precision = precision
        self.device = device
        self.scaler = None  # torch's; ours is `loss_scaler`
        self.autocast = autocast
        if policy.scales_loss:
            self.loss_scaler = LossScaler(
                init_scale=init_scale,
                growth_interval=growth_interval,
                hysteresis=hysteresis,
                consecutive_hysteresis=consecutive_hysteresis,
                min_scale=min_scale,
            )

    def policy(self, *, reduce_dtype: str) -> PrecisionPolicy:
        """Return the dtypes that this plugin stands for."""
        return precision_policy(str(self.precision), autocast=self.autocast, reduce_dtype=reduce_dtype)

    def convert_input(self, data: Any) -> Any:
        """Round a batch to 16 bits where autocast does not: layers of the root would meet it in float32."""
        if self.autocast:
            return super().convert_input(data)
        flag: Literal["bf16-true", "16-true"] = "bf16-true" if self.precision == "bf16-mixed" else "16-true"
        return trainer_plugins.HalfPrecision(flag).convert_input(data)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Run a forward under autocast, unless it was switched off."""
        if not self.autocast:
            yield
            return
        with self.autocast_context_manager():
            yield


def convert_precision(plugin: Any) -> MeshPrecision:
    """Return meshbolt's plugin for one of Lightning's, of the Trainer or of Fabric.

    Args:
        plugin: meshbolt's own, or a stock plugin made from a precision flag.

    Raises:
        UnsupportedError: it is another kind of plugin.
    """
    if plugin is None:
        return FullPrecision()
    if isinstance(plugin, MeshPrecision):
        return plugin
    kind = type(plugin)
    if kind in (trainer_plugins.Precision, fabric_plugins.Precision):
        return FullPrecision()
    if kind in (trainer_plugins.DoublePrecision, fabric_plugins.DoublePrecision):
        return DoublePrecision()
    if kind in (trainer_plugins.HalfPrecision, fabric_plugins.HalfPrecision):
        return HalfPrecision(plugin.precision)
    if kind in (trainer_plugins.MixedPrecision, fabric_plugins.MixedPrecision):
        return MixedPrecision(plugin.precision, plugin.device, **_scaling(plugin.scaler))
    raise UnsupportedError(
        f"The precision plugin {kind.__name__} cannot be used with sharded parameters. Use precision='32-true', '64-true', "
        "'bf16-mixed', '16-mixed' or 'bf16-true', or a plugin from meshbolt.plugins."
    )


def _scaling(scaler: Any) -> dict[str, Any]:
    if scaler is None:
        return {}
    return {"init_scale": float(scaler._init_scale), "growth_interval": int(scaler.get_growth_interval())}


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
