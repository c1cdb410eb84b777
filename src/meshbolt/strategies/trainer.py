"""The strategy for `lightning.pytorch.Trainer`: which of Lightning's hooks calls what of the engine."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from meshbolt.blocks import Recompute
from meshbolt.checkpoint import is_checkpoint, remove_directory
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.config import Settings
from meshbolt.engine.load import load_model
from meshbolt.engine.state import load_optimizer_state, optimizer_state
from meshbolt.errors import CheckpointError, UnsupportedError
from meshbolt.plugins import MeshPrecision, convert_precision
from meshbolt.strategies.checks import check_trainer, refuse_checkpoint_io, refuse_compiled
from meshbolt.strategies.compat import TrainerScriptLauncher, reduce_over_ranks
from meshbolt.strategies.core import DEFAULT_TIMEOUT, MeshCore, StartMethod
from meshbolt.strategies.entry import redirect_entries
from meshbolt.strategies.hooks import follow_requires_grad, hold_schedulers_on_skips, meta_tensors, report_norm
from meshbolt.strategies.launcher import CollectingLauncher
from meshbolt.strategies.loaders import checked_loader
from meshbolt.zero import Zero


class MeshStrategy(MeshCore, ParallelStrategy):
    """Train any LightningModule sharded over a mesh of ranks; the module is not changed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt import MeshStrategy
        >>> trainer = Trainer(strategy=MeshStrategy(zero=2), accelerator="cpu", devices=2)
    """

    strategy_name = "meshbolt"

    def __init__(
        self,
        *,
        zero: int | Zero = 3,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        offload: str | None = None,
        recompute: str | Recompute = "none",
        compile: bool = False,
        checkpoint: Checkpoint | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
    ) -> None:
        """Take the settings; nothing is started.

        Args:
            zero: ZeRO stage, or `Zero` with more: stage, replicate, unit, reduce_dtype.
            tensor_parallel: not in this version; 1.
            pipeline_parallel: not in this version; 1.
            offload: not in this version; None.
            recompute: "none", "full" or "selective", or `Recompute`.
            compile: compile each repeated block with torch's default mode.
            checkpoint: how checkpoints are written and read.
            accelerator: as Lightning's strategies have it.
            parallel_devices: as Lightning's strategies have it.
            cluster_environment: as Lightning's strategies have it.
            checkpoint_io: not in this version; None.
            precision_plugin: one of `meshbolt.plugins`, or a stock one, which is converted.
            process_group_backend: "gloo" or "nccl"; None: the device's own.
            timeout: how long a collective waits for its peers.
            start_method: how ranks are started on this machine where no launcher has done it: "popen" runs the script
                again for each; "fork", "spawn" and "forkserver" start functions (notebooks need "fork").

        Raises:
            ConfigError: a value is wrong by itself.
            UnsupportedError: a value asks for what this version does not have.
        """
        settings = Settings.from_arguments(
            zero=zero,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            offload=offload,
            recompute=recompute,
            compile=compile,
            checkpoint=checkpoint,
        )
        refuse_checkpoint_io(checkpoint_io)
        self._init_core(settings, backend=process_group_backend, timeout=timeout, start_method=start_method)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
        )

    def __repr__(self) -> str:
        """Return the call that makes this strategy, and the Trainer that it is for."""
        return f"meshbolt.MeshStrategy(zero={self.settings.zero}) (for lightning.pytorch.Trainer: `import lightning.pytorch`)"

    # Construction: called in the parent process, before ranks exist ------------------------------------------------------

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The accelerator that the Trainer chose, or the one given."""
        return self._chosen_accelerator or self._accelerator

    @accelerator.setter
    @override
    def accelerator(self, accelerator: Accelerator) -> None:
        self._chosen_accelerator = accelerator

    _chosen_accelerator: Accelerator | None = None

    @property
    @override
    def precision_plugin(self) -> MeshPrecision:
        """meshbolt's plugin for the Trainer's precision flag."""
        if self._mesh_precision is None:
            self._mesh_precision = convert_precision(None)
        return self._mesh_precision

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = self._mesh_precision = (
            None if precision_plugin is None else convert_precision(precision_plugin)
        )

    _mesh_precision: MeshPrecision | None = None

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's own, used only for the single file that carries results out of forked ranks."""
        return super().checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        refuse_checkpoint_io(io)

    @property
    def _lightning_module(self) -> pl.LightningModule | None:  # type: ignore[override]
        return self._user_module

    @_lightning_module.setter
    def _lightning_module(self, module: pl.LightningModule | None) -> None:
        refuse_compiled(module)
        self._user_module = module

    _user_module: pl.LightningModule | None = None

    def set_world_ranks(self) -> None:
        """Tell the cluster environment which rank this process is."""
        self._set_ranks()

    @override
    def _configure_launcher(self) -> None:
        self._refuse_second_use()
        environment = self.cluster_environment
        if environment is None or environment.creates_processes_externally:
            return
        if self._start_method == "popen":
            self._launcher = TrainerScriptLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = CollectingLauncher(self, start_method=self._start_method)

    # Set-up, in the order of the calls -----------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Connect the ranks and build the mesh, after everything that needs no rank was checked."""
        super().setup_environment()
        module = self._module()
        check_trainer(module.trainer, world_size=self.world_size)
        self._connect(self.precision_plugin)

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
        if self._engine is None or self._engine.module is not module:
            if self._layer_sync is not None:
                self.model = module = self._layer_sync.apply(module)  # type: ignore[assignment]
            self.precision_plugin.convert_module(module)
            self._compose(module)
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
        for optimizer in self.optimizers:
            self.engine.check_optimizer(optimizer)
            optimizer.register_step_pre_hook(lambda *_: self.engine.settle())

    @override
    def model_to_device(self) -> None:
        """Do nothing: parameters reach their device when they are sharded."""

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Check that the loaders of all ranks agree."""
        return checked_loader(dataloader, group=self._control_group)

    # Steps ----------------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's training_step with the root's parameters gathered."""
        with self.precision_plugin.train_step_context():
            return self.engine.call(self._module().training_step, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's validation_step with the root's parameters gathered."""
        with self.precision_plugin.val_step_context():
            return self.engine.call(self._module().validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's test_step with the root's parameters gathered."""
        with self.precision_plugin.test_step_context():
            return self.engine.call(self._module().test_step, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's predict_step with the root's parameters gathered."""
        with self.precision_plugin.predict_step_context():
            return self.engine.call(self._module().predict_step, *args, **kwargs)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Lightning's word that the batch is not the window's last."""
        with self.engine.accumulate():
            yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a value over the ranks that see different samples."""
        return reduce_over_ranks(tensor, group, reduce_op)

    # Checkpoints ------------------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are read straight into the shards."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state, sharded parameters as DTensors."""
        self.engine.settle()
        return self._module().state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state by parameter name, sharded as the parameters are."""
        names = {parameter: name for name, parameter in self.engine.parameters_by_name.items()}
        return optimizer_state(getattr(optimizer, "_optimizer", optimizer), names)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint directory; every rank writes its shards."""
        self._save(filepath, checkpoint, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint directory into the shards, or a plain Lightning file to be divided among them."""
        path = self.broadcast(str(checkpoint_path))
        self.engine.settle()
        if not is_checkpoint(path):
            if Path(path).is_file():
                return dict(torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True))
            raise CheckpointError(f"{path} is neither a committed checkpoint directory nor a file. Give the path of one.")
        live = {f"state_dict.{k}": v for k, v in self._module().state_dict().items() if isinstance(v, torch.Tensor)}
        owners = {"optimizer_states": self.engine.parameters_by_name}
        tree = self._load(path, live, owners, weights_only=weights_only)
        if self._module().trainer.state.fn == TrainerFn.FITTING:
            self._restore_random_state()
        return tree

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy weights that are not in the shards yet: those of a plain file, and those that a hook has changed."""
        load_model(self._module(), checkpoint["state_dict"], strict=strict, source="the checkpoint")

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every optimizer its state back."""
        names = {parameter: name for name, parameter in self.engine.parameters_by_name.items()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if any(not isinstance(key, str) for key in saved["state"]):
                raise UnsupportedError(
                    "The checkpoint holds optimizer state by number, as a plain Lightning file does, not by parameter name. "
                    "Load its weights only: remove 'optimizer_states' from the file, or use load_from_checkpoint and fit "
                    "without ckpt_path."
                )
            load_optimizer_state(optimizer, saved, names)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint directory (on rank 0), or a file."""
        if self.is_global_zero:
            remove_directory(str(filepath))

    @override
    def teardown(self) -> None:
        """Free what a fit or evaluation held; ranks stay connected for the next one."""
        if self._engine is not None:
            self._engine.settle()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()

    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise AssertionError("The strategy was used before Lightning connected a module.")
        return self.lightning_module
