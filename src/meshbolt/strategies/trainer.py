"""The strategy for `lightning.pytorch.Trainer`: which of Lightning's hooks calls what of the engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import Optimizer
from typing_extensions import override

from meshbolt.collectives import agree_on_error
from meshbolt.engine.deferred import attached
from meshbolt.engine.load import check_weights, load_model
from meshbolt.engine.state import keys_of_average, optimizer_state, trained_state
from meshbolt.errors import CheckpointError, MeshboltError
from meshbolt.plugins import MeshPrecision, Onlooker
from meshbolt.strategies.agreement import trainer_rows
from meshbolt.strategies.checks import check_trainer, refuse_compiled, refuse_skipped_batch
from meshbolt.strategies.compat import look_before_dividing, plain_optimizer, trainer_of
from meshbolt.strategies.core import MeshCore
from meshbolt.strategies.deepspeeds import take_rates, tree_for_trainer
from meshbolt.strategies.directories import Loaded, LoadInto, buffers_of, left_out_of
from meshbolt.strategies.entry import redirect_entries
from meshbolt.strategies.examples import example_of_run
from meshbolt.strategies.files import (
    agree_on_path,
    check_is_lightnings,
    check_training_state,
    without_training_state,
)
from meshbolt.strategies.from_deepspeed import DeepSpeedSettings
from meshbolt.strategies.hooks import (
    follow_requires_grad,
    hold_schedulers_on_skips,
    let_finetuning_catch_up,
    look_at_files_as_now,
    look_at_files_as_when_saved,
    optimizers_regrouped_by,
    report_norm,
)
from meshbolt.strategies.interrupted import AfterExceptions
from meshbolt.strategies.launcher import CollectingLauncher, DirectLauncher, ScriptLauncher
from meshbolt.strategies.loaders import checked_loader
from meshbolt.strategies.meta import meta_tensors
from meshbolt.strategies.overlapping import overlap_updates
from meshbolt.strategies.own_progress import OwnProgress
from meshbolt.strategies.pipelined import PipelinedSteps
from meshbolt.strategies.position import Position
from meshbolt.strategies.predicting import Predicting, check_samples
from meshbolt.strategies.signals import Signals

_log = logging.getLogger(__name__)


class MeshStrategy(OwnProgress, AfterExceptions, DeepSpeedSettings, MeshCore, ParallelStrategy):
    """Train any LightningModule sharded over a mesh of ranks; the module is not changed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt import MeshStrategy
        >>> trainer = Trainer(strategy=MeshStrategy(zero=2), accelerator="cpu", devices=2)
    """

    strategy_name = "meshbolt"
    call = "meshbolt.MeshStrategy"
    is_for = "lightning.pytorch.Trainer (`import lightning.pytorch`, not `pytorch_lightning`)"

    # Construction: called in the parent process, before ranks exist ------------------------------------------------------

    @property
    @override
    def precision_plugin(self) -> MeshPrecision:
        """meshbolt's plugin for the Trainer's precision flag."""
        return self._get_precision()

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Convert Lightning's plugin to meshbolt's."""
        self._precision_plugin = self._set_precision(precision_plugin)

    @property
    def _lightning_module(self) -> pl.LightningModule | None:
        return self._user_module

    @_lightning_module.setter
    def _lightning_module(self, module: pl.LightningModule | None) -> None:
        refuse_compiled(module)
        self._user_module = module

    _user_module: pl.LightningModule | None = None

    set_world_ranks = MeshCore._set_ranks  # the Trainer's name for it

    @override
    def _choose_launcher(self, environment: ClusterEnvironment) -> Any:
        remember = functools.partial(setattr, self, "_asked_weights_only")
        if environment.creates_processes_externally:
            return DirectLauncher(remember, self.failures)
        if self._start_method == "popen":
            return ScriptLauncher(remember, self.failures, environment, self.num_processes, self.num_nodes)
        return CollectingLauncher(remember, self.failures, self, start_method=self._start_method)

    _asked_weights_only: bool | None = None
    _has_loaded = _is_training = False
    _fits = 0
    _steps: PipelinedSteps | None = None  # through the stages of a pipeline, where there is one

    # Set-up, in the order of the calls --------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Connect the ranks, check what they are told, and build the mesh."""
        super().setup_environment()
        self._attendance.forget()
        self._predicting = Predicting()
        self._has_begun = self._has_loaded = False
        self._written: set[str] = set()
        trainer = self._module().trainer
        self._connect()
        self._position = Position(trainer, ranks=self.data_parallel_size, device=self.root_device)
        look_before_dividing(trainer, lambda loader: check_samples(trainer, loader, ranks=self.data_parallel_size))
        if (deferred := attached(self._module())) is not None:
            deferred.watch()  # the user's setup hooks may change the module before it is sharded

    @override
    def _resolve(self) -> None:
        self._check_deepspeed(self._module().trainer)
        check_trainer(self._module().trainer, world_size=self.world_size)
        super()._resolve()

    @override
    def _rows(self) -> dict[str, Any]:
        return trainer_rows(self._module().trainer)

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Build modules on the meta device, unless told otherwise; they are filled when they are sharded."""
        building = meta_tensors() if empty_init in (None, True) else nullcontext()
        with building, self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module, and make its optimizers on the shards."""
        module = self._module()
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        if module not in self._engines:
            self._engines.clear()
            if self._layer_sync is not None:
                self.model = module = self._layer_sync.apply(module)  # type: ignore[assignment]
            self.precision_plugin.convert_module(module)
            for callback in (each for each in trainer.callbacks if isinstance(each, Onlooker)):  # type: ignore[attr-defined]
                callback.before_sharding(trainer, module)
            if self.plan.mesh.pp > 1:
                self._steps = PipelinedSteps(trainer, plan=self.plan, mesh=self.device_mesh, device=self.root_device)
            example = example_of_run(trainer, module, self.precision_plugin.convert_input)
            self._compose(module, example=example, staged=self._steps)
        if self._steps is None:
            redirect_entries(module, self.engine)
        if not module.automatic_optimization:
            follow_requires_grad(module, self.engine)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.precision_plugin.attach(self.engine, report_norm=report_norm(module))
        if self.precision_plugin.loss_scaler is not None:
            hold_schedulers_on_skips(module, self.precision_plugin)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimizers and refuse those that cannot run on shards."""
        self.optimizers, self.lr_scheduler_configs = [], []
        super().setup_optimizers(trainer)
        self.engine.take_optimizers(self.optimizers)

    # Steps ------------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Check that the loaders of all ranks agree, begin where a checkpoint was saved, and predict each sample once."""
        trainer, group, ranks = self._module().trainer, self._control_group, self.data_parallel_size
        self._seed_workers(dataloader)
        if trainer.state.fn == TrainerFn.PREDICTING:
            limit = trainer.limit_predict_batches
            return self._predicting.loader(dataloader, limit=limit, group=group, ranks=ranks)
        if not trainer.training:
            return super().process_dataloader(dataloader)
        self._check_loader(dataloader)
        self._position.take_loader(dataloader)
        return checked_loader(dataloader, group=group, ranks=ranks, position=self._position)

    @override
    def on_train_start(self) -> None:
        """Begin to train, and to watch for signals that end the job."""
        self._count_samples_once(self._module())
        self._position.on_train_start()
        self._has_begun = self._is_training = True
        self._fits += 1
        look_at_files_as_when_saved(self._module().trainer, self._saving)
        self._signals = Signals(self._module().trainer, number=self._fits)
        overlap_updates(self._module().trainer, self.engine)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Act on those signals, and on a checkpoint that could not be written, between two steps."""
        with self._saving.urgent():
            self._signals.before_batch(batch_idx)
        self._position.begin_batch(batch_idx)
        if batch_idx % self._module().trainer.accumulate_grad_batches == 0:
            self._saving.before_window()

    @override
    def on_train_end(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._is_training = False
        look_at_files_as_now(self._module().trainer)
        self._saving.finish(for_good=True)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's training_step with the root's parameters gathered."""
        module = self._module()
        self._look_at_step("training_step", args)
        if self._steps is not None:
            return self._steps.train(args)
        with self.precision_plugin.train_step_context():
            output = self.engine.call(module.training_step, *args, **kwargs)
        refuse_skipped_batch(module, output)
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's validation_step with the root's parameters gathered."""
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's test_step with the root's parameters gathered."""
        return self._evaluate("test_step", self.precision_plugin.test_step_context, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's predict_step with the root's parameters gathered."""
        context = self.precision_plugin.predict_step_context
        return self._predicting.step(lambda: self._evaluate("predict_step", context, args, kwargs))

    def _evaluate(self, name: str, context: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        self._look_at_step(name, args)
        if self._steps is not None:
            return self._steps.evaluate(name, args)
        with context():
            return self.engine.call(getattr(self._module(), name), *args, **kwargs)

    @override
    def on_predict_start(self) -> None:
        """Refuse loaders of different lengths that cannot be made to agree."""
        step = self._module().predict_step
        self._predicting.check(takes_iterator=is_param_in_hook_signature(step, "dataloader_iter", explicit=True))

    @override
    def on_predict_end(self) -> None:
        """Let go of the last batch."""
        self._predicting = Predicting()

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Lightning's word that the batch is not the window's last."""
        with self.engine.accumulate(covers_forward=self._module().automatic_optimization):
            yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a value over the ranks that see different samples."""
        return self._reduce(tensor, group, reduce_op)

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if name == "_CheckpointConnector.resume_end":
            self._end_of_resuming()
        super().barrier(name)

    def _end_of_resuming(self) -> None:
        if not self._has_loaded:
            agree_on_path(None, group=self._control_group)
        elif self._resumes:
            schedulers = [config.scheduler for config in self.lr_scheduler_configs]
            take_rates(self._loaded.tree["optimizer_states"], self.optimizers, schedulers)
            self._take_random_state(self._loaded)
            self._position.resume(self._loaded.notes.get("position", {}))
        self._loaded = Loaded(tree={})  # its memory is needed from now on

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are read straight into the shards."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state, sharded parameters as DTensors; nothing where it cannot be saved anyway."""
        if self._reachable() is None:
            return {}
        self.engine.require_whole()
        with self.engine.settled():
            state = self._module().state_dict()
            if self._steps is not None:
                state = self._steps.model_state(state)
            self._left_out: list[str] = []
            if self.settings.checkpoint.trainable_only:
                stages = None if self._steps is None else self._steps.group
                state, self._left_out = trained_state(state, self._module(), self.optimizers, stages=stages)
            return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state by parameter name, sharded as the parameters are; nothing where it cannot be saved."""
        if self._reachable() is None:
            return {}
        with self._settled() as names, self.engine.shown_state(plain := plain_optimizer(optimizer)):
            state = optimizer_state(plain, names)
        return state if self._steps is None else self._steps.optimizer_state(state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint directory; every rank writes its shards. After an exception on some ranks only: nothing."""
        if self._reachable() is None:
            return
        if self._was_interrupted():
            self._saving.abandon()
        goes_on = self._is_training and not self._was_interrupted()
        try:
            self._save(
                filepath,
                checkpoint,
                notes={"left_out": {"state_dict": self._left_out}, "position": self._position.notes()},
                buffers=buffers_of(self._module(), checkpoint.get("state_dict", {}), key="state_dict"),
                storage_options=storage_options,
                in_background=goes_on,
            )
            self._written.add(str(filepath))
        except CheckpointError as error:
            if not self._was_interrupted():
                raise
            # The exception that ended the run is the one to be seen; and nothing may be deleted in favour of this save.
            _log.error("%s", error)
            self._attendance.dismiss()

    @override
    def _random_state(self) -> dict[str, torch.Tensor]:
        return self._position.random_state()

    @override
    def _resumed_buffers(self) -> dict[str, torch.Tensor]:
        return {f"state_dict.{name}": buffer for name, buffer in self._position.buffers().items()}

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint directory, or a plain file of Lightning's; nothing of this run is changed yet."""
        self._has_loaded = True
        path, _ = agree_on_path(str(checkpoint_path), group=self._control_group)
        weights_only = self._asked_weights_only if weights_only is None else weights_only
        is_fit = self._module().trainer.state.fn == TrainerFn.FITTING
        # The learning rate finder goes back to where it began: to a checkpoint of this very fit.
        self._resumes = is_fit and (not self.settings.checkpoint.load_weights_only or path in self._written)
        self.engine.settle()
        self._loaded = self._load(path, self._wanted(path), weights_only=weights_only)
        if self._resumes or not is_fit:
            return self._loaded.tree
        trainer = self._module().trainer
        others = (type(trainer.datamodule), type(self.precision_plugin))  # type: ignore[attr-defined]
        return without_training_state(self._loaded.tree, states_of=others)

    _loaded = Loaded(tree={})
    _resumes = False  # whether it was read to go on from it, not for its weights

    def _wanted(self, path: str) -> LoadInto:
        module = self._module()

        def check(loaded: Loaded) -> None:
            check_is_lightnings(loaded.tree, path)
            # A hook of the user's may make it fit, and Lightning may have to bring a file up to date first.
            if not loaded.is_file and not is_overridden("on_load_checkpoint", module):
                self._check(loaded.tree, loaded.notes, strict=module.strict_loading)

        own = {f"state_dict.{k}": v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
        return LoadInto(
            weights={**own, **keys_of_average(self.engine.parameters_by_name)},
            parameters={"": self.engine.parameters_by_name},
            check=check,
            leave_out=frozenset() if self._resumes else frozenset({"optimizer_states"}),
            resumes=self._resumes,
            of_deepspeeds=lambda opened: tree_for_trainer(opened, module, resumes=self._resumes),
        )

    def _check(self, checkpoint: Mapping[str, Any], notes: Mapping[str, Any], *, strict: bool) -> str:
        """Compare a checkpoint with all that it is to be read into; return the names that differ where they may."""
        module = self._module()
        lists = check_weights(
            module.state_dict(),
            checkpoint["state_dict"],
            strict=strict,
            source="the checkpoint",
            left_out=left_out_of("state_dict", notes),
        )
        if self._resumes:
            check_training_state(
                checkpoint,
                self.optimizers,
                {parameter: name for name, parameter in self.engine.parameters_by_name.items()},
                schedulers=[config.scheduler for config in self.lr_scheduler_configs],
                max_epochs=module.trainer.max_epochs,
                regrouped=optimizers_regrouped_by(checkpoint, module.trainer),
            )
        return lists

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the weights into the shards, once all of the checkpoint is known to fit."""
        lists: list[str] = []
        notes = self._loaded.notes
        agree_on_error(lambda: lists.append(self._check(checkpoint, notes, strict=strict)), group=self._control_group)
        if lists[0] and self.is_global_zero:
            _log.warning("Of the weights in the checkpoint only what fits is loaded.%s", lists[0])
        weights = checkpoint["state_dict"]
        self._saved_dtypes = {key: value.dtype for key, value in weights.items() if isinstance(value, torch.Tensor)}
        # Code of the user's may run in it, and fail on some ranks only.
        agree_on_error(lambda: load_model(self._module(), weights), group=self._control_group)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Whether optimizers get their state from a checkpoint."""
        return self._resumes

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every optimizer its state back; that it fits was checked before the weights were loaded."""
        let_finetuning_catch_up(self._module().trainer)
        with self._settled() as names:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                self.engine.load_state(optimizer, state, names, dtypes=self._saved_dtypes)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint directory (on rank 0), or a file; not where its successor could not be saved."""
        if self.is_global_zero and self._reachable() is not None:
            self._saving.delete(str(filepath))

    @override
    def teardown(self) -> None:
        """Free what a fit or evaluation held; ranks stay connected for the next one."""
        if self.lightning_module is not None and (deferred := attached(self.lightning_module)) is not None:
            deferred.stop()  # it ended before the module was sharded
        self._is_training = False
        if (trainer := trainer_of(self.lightning_module)) is not None:
            look_at_files_as_now(trainer)
        if self._was_interrupted():
            self._saving.abandon()
        else:
            self._saving.finish(for_good=True)
        # After an exception, what is gathered may never arrive: its peers are gone; and updates may have failed.
        with suppress(RuntimeError, MeshboltError) if self._was_interrupted() else nullcontext():
            for engine in self._engines.values():
                engine.settle()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()

    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise AssertionError("The strategy was used before Lightning connected a module.")
        return self.lightning_module
