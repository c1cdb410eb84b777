"""The engine that `initialize` returns: DeepSpeed's loop, over the strategy that Fabric runs."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.deepspeed.answers import Answers
from meshbolt.deepspeed.checkpoints import load_checkpoint, save_16bit_model, save_checkpoint
from meshbolt.deepspeed.data import DeepSpeedDataLoader, loader_of
from meshbolt.deepspeed.outputs import Outputs
from meshbolt.deepspeed.run import Run
from meshbolt.deepspeed.strategy import refuse_shards
from meshbolt.deepspeed.weights import load_whole, whole_state
from meshbolt.deepspeed.whole import mark
from meshbolt.errors import ConfigError, UnsupportedError

_log = logging.getLogger(__name__)
_living: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()


class DeepSpeedEngine(Answers):
    """A module that is trained by `loss = engine(batch); engine.backward(loss); engine.step()`.

    `backward` divides the loss by the batches of a window, and `step` updates after the last of them only. Attributes that it
    does not have are those of the module.

    Attributes:
        module: the caller's own, sharded.
        optimizer: on the shards; `step` of the engine steps it.
        lr_scheduler: stepped by `step`, but not where the update is skipped.
        training_dataloader: of `training_data`; None without.
        fabric: what all of it runs in.
        global_steps: windows so far.
        global_samples: samples in them, on all ranks.
        micro_steps: calls of `step` so far.
        skipped_steps: windows whose gradients were not finite, so that the update was skipped.
    """

    def __init__(self, module: nn.Module, *, run: Run, optimizer: Optimizer | None, lr_scheduler: Any = None) -> None:
        """Take a module that is sharded next, and an optimizer on its whole parameters.

        Args:
            module: the caller's own.
            run: what the file comes to.
            optimizer: that trains it; None: it is only evaluated.
            lr_scheduler: of the optimizer.
        """
        super().__init__()
        self.module = module
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.training_dataloader: DeepSpeedDataLoader | None = None
        self.collate_fn: Any = None
        self._run, self.fabric, self.config = run, run.fabric, run.config
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self._is_boundary: bool | None = None
        self._backwards = 0
        self._has_run = self._has_warned = False
        self._is_stepping = self._is_inside_no_sync = self._step_applied = False
        self._norm: torch.Tensor | None = None
        self._copies: dict[int, str] = {}
        self._set_up()
        _living.add(self)

    def _set_up(self) -> None:
        """Shard the module, and point the optimizer at the shards."""
        strategy, optimizers = self._run.strategy, [] if self.optimizer is None else [self.optimizer]
        entry, *_ = strategy.setup_module_and_optimizers(self.module, optimizers)
        # Beside the modules of this one, or parameters would have two names.
        self.__dict__["_entry"], self.__dict__["_core"] = entry, strategy.engine
        self._outputs = Outputs(self.module, precision=self._run.translation.precision)
        mark(self.module)
        refuse_shards(self, strategy)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._refuse_other_steps)
            self._tell_scale(overflow=False)

    def __getattr__(self, name: str) -> Any:
        """Return what the module has of a name that the engine has not."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(
            f"The engine has no {name!r}, and neither has its {type(module).__name__}. docs/deepspeed.md lists what of "
            "DeepSpeed's engine is there."
        )

    # Forward and backward ---------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module; float inputs are rounded to 16 bits under an fp16 or bf16 block, whose outputs are left in them."""
        precision, self._has_run = self._run.strategy.precision, self._has_run or torch.is_grad_enabled()
        inputs, kwargs = precision.convert_input((inputs, kwargs))
        with precision.forward_context():
            output = self._entry(*inputs, **kwargs)
        return self._outputs.as_made(output)

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Run the backward of a batch.

        Args:
            loss: one number, with a graph through the module.
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: divide the loss by the batches of a window.

        Returns:
            The loss, divided.

        Raises:
            ConfigError: it is no such loss, or there is no optimizer.
        """
        self._need_optimizer("backward")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            graph = "" if not isinstance(loss, torch.Tensor) or loss.requires_grad else " without a graph"
            raise ConfigError(
                f"engine.backward was given {what}{graph}. It needs the loss of a batch: one number, computed from what the "
                "engine returned, with gradients enabled."
            )
        self._look_at_window()
        if scale_wrt_gas:
            loss = loss / self.gradient_accumulation_steps()
        with ExitStack() as stack:
            is_last = self.is_gradient_accumulation_boundary() and not self._is_inside_no_sync
            if not is_last:
                stack.enter_context(self._core.accumulate())
            # The loss may have come through the modules of other engines, as a generator's does through the discriminator.
            inside: Any = loss
            for engine in _living:
                if engine is not self and engine._has_run:
                    if not engine.is_gradient_accumulation_boundary():
                        stack.enter_context(engine._core.accumulate())
                    inside = stack.enter_context(engine._core.backward(inside))
            self._run.strategy.backward(inside, None, retain_graph=retain_graph)
        self._backwards += 1
        self._has_run = False
        if not is_last:
            # Until the window's end the module has copies in the places of shards, which a script may hold on to.
            self._copies |= {id(parameter): name for name, parameter in self.module.named_parameters()}
        return loss.detach()

    def _look_at_window(self) -> None:
        """Warn, once, where somebody has dropped what a window has accumulated: DeepSpeed's ZeRO stages keep it."""
        if not self._backwards or self._has_warned or any(p.grad is not None for p in self._trained()):
            return
        self._has_warned = True
        _log.warning(
            "The gradients of %s batches were dropped before the end of their window, by zero_grad() of the engine, the module "
            "or the optimizer, and do not count. engine.step() drops gradients by itself: leave zero_grad() out.",
            self._backwards,
        )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Treat the backwards inside as ones that the window goes on after; in every stage."""
        if self._is_inside_no_sync:
            raise ConfigError("engine.no_sync() was entered inside of itself. Enter it once.")
        self._is_inside_no_sync = True
        try:
            yield
        finally:
            self._is_inside_no_sync = False

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the batch under way is the last of its window, after which `step` updates."""
        if self._is_boundary is not None:
            return self._is_boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the batches from here on are the last of their window, instead of counting them."""
        self._is_boundary = is_boundary

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a batch; after the last of a window clip, update, drop the gradients and step the scheduler.

        Args:
            lr_kwargs: further arguments of the scheduler's step.

        Raises:
            ConfigError: there is no optimizer, no backward since the last update, or the scheduler does not take `lr_kwargs`.
        """
        self._need_optimizer("step")
        if self._is_inside_no_sync:
            raise ConfigError("engine.step() was called inside of engine.no_sync(). Leave it before.")
        self._check_kwargs(lr_kwargs or {})
        self._step_applied = False
        if self.is_gradient_accumulation_boundary():
            self._update(lr_kwargs)
        self.micro_steps += 1

    def _check_kwargs(self, lr_kwargs: Mapping[str, Any]) -> None:
        if not lr_kwargs or self.lr_scheduler is None:
            return
        try:
            inspect.signature(self.lr_scheduler.step).bind(**lr_kwargs)
        except TypeError as error:
            raise ConfigError(
                f"engine.step(lr_kwargs={dict(lr_kwargs)!r}): the step of {type(self.lr_scheduler).__name__} does not take that: "
                f"{error}. Correct it, or leave it out."
            ) from error

    def _update(self, lr_kwargs: Mapping[str, Any] | None) -> None:
        if not self._backwards:
            raise ConfigError(
                "engine.step() was called, and engine.backward(loss) not since the last update, so that there is nothing to "
                "step by. Call engine.backward(loss) for every batch."
            )
        strategy, optimizer = self._run.strategy, self.optimizer
        strategy.precision.unscale_gradients(optimizer)
        if self._run.clip > 0:
            options = {"error_if_nonfinite": False}
            self._norm = strategy.clip_gradients_norm(self.module, optimizer, self._run.clip, **options)
        else:
            self._norm = self._core.grad_norm(self._trained())
        # Of all ranks, so that all of them skip or none does.
        is_skipped = self._run.skips_nonfinite and not bool(torch.isfinite(self._norm))
        if is_skipped:
            self._core.settle()
        else:
            self._step_optimizer()
            is_skipped = strategy.precision.skipped_last_step
        self.zero_grad()
        self._backwards = 0
        self._count(overflow=is_skipped, lr_kwargs=lr_kwargs or {})

    def _step_optimizer(self) -> None:
        self._is_stepping = True
        try:
            self._run.strategy.optimizer_step(self.optimizer)
        finally:
            self._is_stepping = False

    def _count(self, *, overflow: bool, lr_kwargs: Mapping[str, Any]) -> None:
        self._step_applied = not overflow
        self._tell_scale(overflow=overflow)
        if overflow:
            self._norm = torch.tensor(float("inf"))
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        every = self.steps_per_print()
        if every and self.global_steps % every == 0 and self.global_rank == 0:
            numbers = self.global_steps, self.skipped_steps, self.get_lr(), self.get_mom()
            _log.info("step=%s, skipped=%s, lr=%s, mom=%s", *numbers)

    def _tell_scale(self, *, overflow: bool) -> None:
        """Show the loss scale where scripts look for it, beside the optimizer."""
        if self.fp16_enabled():
            optimizer: Any = self.optimizer
            optimizer.cur_scale = optimizer.loss_scale = self.cur_scale
            optimizer.overflow = overflow

    def _refuse_other_steps(self, *_: Any) -> None:
        if not self._is_stepping:
            raise ConfigError(
                "optimizer.step() was called. Call engine.step() instead, which clips, updates at the end of a window and steps "
                "the scheduler."
            )

    def _need_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ConfigError(
                f'engine.{call} was called, and the engine has no optimizer. Give initialize(optimizer=...), or an "optimizer" '
                "block in the JSON."
            )

    def _trained(self) -> list[nn.Parameter]:
        optimizer: Any = self.optimizer
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def was_step_applied(self) -> bool:
        """Return whether the last `step` has changed parameters."""
        return self._step_applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, also those of a window that is not at its end.

        Args:
            set_to_none: without effect: they are dropped, not filled with zeros.
        """
        # Inside of a window the module has whole copies, and the shards the gradients.
        for parameter in (*self.module.parameters(), *self._core.parameters_by_name.values()):
            parameter.grad = None

    def get_global_grad_norm(self) -> float | None:
        """Return the norm of the gradients of the last update over all ranks, before clipping.

        Returns:
            The norm; infinity where the update was skipped, and None before the first.
        """
        return None if self._norm is None else float(self._norm)

    # Modes and data ---------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        """Put the module in training mode."""
        super().train(mode)
        return self

    def take_training_data(self, dataset: Any) -> None:
        """Make the loader of training.

        Args:
            dataset: of all ranks.
        """
        self.training_dataloader = self.deepspeed_io(dataset)

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """Return a loader of this rank's part of a dataset.

        Args:
            dataset: of all ranks.
            batch_size: of this rank; None: that of training.
            route: "train" shuffles; "eval" and "predict" do not.
            pin_memory: put batches where GPUs copy from without waiting, where there is a GPU.
            data_sampler: chooses this rank's samples instead.
            collate_fn: makes a batch of samples; None: that of `initialize`.
            num_local_io_workers: processes that load; None: two.

        Raises:
            ConfigError: it is no dataset, or the route is unknown.
        """
        strategy = self._run.strategy
        return loader_of(
            dataset,
            batch_size=batch_size or self.train_micro_batch_size_per_gpu(),
            ranks=strategy.data_parallel_size,
            rank=strategy.data_parallel_rank,
            route=route,
            data_sampler=data_sampler,
            collate_fn=collate_fn or self.collate_fn,
            num_workers=num_local_io_workers,
            pin_memory=pin_memory and self.device.type == "cuda",
            drop_last=bool(self._run.get("dataloader_drop_last", False)),
        )

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save module, optimizer, scheduler, loss scale, counters and the caller's state; on every rank. See `checkpoints.py`."""
        options = {"save_latest": save_latest, "exclude_frozen_parameters": exclude_frozen_parameters}
        save_checkpoint(self, save_dir, tag, client_state or {}, **options)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
        weights_only: bool | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load what `save_checkpoint` has saved, under any stage and number of ranks; on every rank. See `checkpoints.py`.

        Args:
            load_dir: that it was saved in.
            tag: of the checkpoint; None: what the file `latest` says.
            load_module_strict: refuse missing and unknown weights.
            load_optimizer_states: also the optimizer's state.
            load_lr_scheduler_states: also the scheduler's.
            load_module_only: weights only.
            custom_load_fn: None.
            weights_only: False builds objects of any class that `client_state` has, which runs code from the file.

        Returns:
            The path, and the caller's state; None and None where there is no file `latest`, which is warned of.

        Raises:
            CheckpointError: it cannot be read, or does not fit.
            UnsupportedError: there is a `custom_load_fn`.
        """
        if custom_load_fn is not None:
            raise UnsupportedError("load_checkpoint(custom_load_fn=...): weights are loaded by name. Leave it out.")
        found = load_checkpoint(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            weights_only=weights_only,
        )
        if found[0] is not None:
            # What was accumulated belongs to other weights.
            self.zero_grad()
            self._backwards = 0
            self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
        return found

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save the whole weights in one file, in the 16 bits of the run or as they are; on every rank. See `checkpoints.py`."""
        save_16bit_model(self, Path(save_dir) / save_filename, exclude_frozen_parameters=exclude_frozen_parameters)
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(self, *, prefix: str = "", exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Return the whole weights, in every stage, in the 16 bits of the run or as they are; on every rank. See `weights.py`."""
        return whole_state(self, prefix=prefix, exclude_frozen_parameters=exclude_frozen_parameters)

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights into the shards; on every rank. See `weights.py`."""
        load_whole(self, state_dict, strict=strict)

    def names_by_id(self) -> dict[int, str]:
        """Return the name of each parameter, by the identity of the shard and of what stands for it inside of a window."""
        now = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {id(shard): name for name, shard in self._core.parameters_by_name.items()} | self._copies | now

    def shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the shard of a parameter of the module.

        Args:
            parameter: the shard, or what stands for it in the module now.
        """
        shard: nn.Parameter = self._core.parameters_by_name[self.names_by_id()[id(parameter)]]
        return shard

    def destroy(self) -> None:
        """End the run: wait for the checkpoint that is being written, and free what the engine held."""
        _living.discard(self)
        self._run.strategy.teardown()

    def compile(self, *_: Any, **__: Any) -> None:
        """Refuse: blocks are compiled where they are sharded, which is before this.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "engine.compile(): blocks are compiled before they are sharded. Leave it out, or use MeshStrategy(compile=True) in "
            "a Trainer or Fabric."
        )


def engine_of(parameters: Sequence[nn.Parameter]) -> DeepSpeedEngine | None:
    """Return the engine that has sharded some parameters; None where there is none.

    Args:
        parameters: of one module.
    """
    wanted = {id(parameter) for parameter in parameters}
    return next((engine for engine in _living if not wanted.isdisjoint(engine.names_by_id())), None)
