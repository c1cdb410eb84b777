"""What the Trainer's and Fabric's strategies share: their constructor, ranks, the mesh, the plan and the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from meshbolt.blocks import Recompute
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.collectives import agree_on_error
from meshbolt.config import Plan, Settings, resolve
from meshbolt.engine import Engine, PipelinedEngine
from meshbolt.engine.random_state import branch_random_state, collect_random_state, restore_random_state
from meshbolt.errors import ConfigError
from meshbolt.mesh import build_mesh
from meshbolt.offload.setting import Offload
from meshbolt.pipeline import PipelineParallel
from meshbolt.plugins import MeshPrecision, convert_precision
from meshbolt.strategies.agreement import agree_on_settings, precision_rows
from meshbolt.strategies.announcing import say_what_is_divided, say_what_is_let_go, say_where_it_is_cut
from meshbolt.strategies.arguments import DEFAULT_TIMEOUT, StartMethod, check_arguments, written_call
from meshbolt.strategies.attendance import Attendance
from meshbolt.strategies.compat import (
    connect_ranks,
    default_backend,
    set_rank_zero_only,
)
from meshbolt.strategies.data_parallel import DataParallelRanks
from meshbolt.strategies.directories import Loaded, LoadInto, ToSave
from meshbolt.strategies.examples import Example
from meshbolt.strategies.failures import Failures
from meshbolt.strategies.loaders import checked_loader
from meshbolt.strategies.pipelined import StagedModule
from meshbolt.strategies.resuming import note_save
from meshbolt.strategies.saving import Saving
from meshbolt.strategies.whole_weights import State, Wanted, whole_weights
from meshbolt.tensor import TensorParallel
from meshbolt.zero import Zero


class MeshCore(DataParallelRanks):
    """The part of a strategy that does not depend on whose loop runs it; stands before Lightning's class in the bases."""

    call: ClassVar[str]
    is_for: ClassVar[str]
    parallel_devices: list[torch.device] | None
    cluster_environment: ClusterEnvironment | None

    def __init__(
        self,
        *,
        zero: int | Zero = 3,
        tensor_parallel: int | str | TensorParallel = 1,
        pipeline_parallel: int | PipelineParallel = 1,
        offload: str | Offload | None = None,
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
            tensor_parallel: ranks that share each layer, or `TensorParallel` with more: size, plan, sequence_parallel,
                loss_parallel.
            pipeline_parallel: ranks among which the stages of the model are distributed, or `PipelineParallel` with more: size,
                microbatches, schedule, cuts.
            offload: "cpu" or "nvme" for where the state of optimizers lies, or `Offload` with more: optimizer, path, fraction.
            recompute: "none", "full" or "selective", or `Recompute`.
            compile: compile each repeated block with torch's default mode.
            checkpoint: how checkpoints are written and read.
            accelerator: as Lightning's strategies have it.
            parallel_devices: as Lightning's strategies have it.
            cluster_environment: as Lightning's strategies have it.
            checkpoint_io: a plugin of yours around `meshbolt.plugins.MeshCheckpointIO`, which carries checkpoints.
            precision_plugin: one of `meshbolt.plugins`, or a stock one, which is converted.
            process_group_backend: "gloo" or "nccl"; None: the device's own.
            timeout: how long a collective waits for its peers.
            start_method: how ranks are started on this machine where no launcher has done it: "popen" runs the script
                again for each; "fork", "spawn" and "forkserver" start functions (notebooks need "fork").

        Raises:
            ConfigError: a value is wrong by itself.
            UnsupportedError: a value asks for what this version does not have.
        """
        self.settings = Settings.from_arguments(
            zero=zero,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            offload=offload,
            recompute=recompute,
            compile=compile,
            checkpoint=checkpoint,
        )
        self._arguments = {
            "accelerator": accelerator,
            "parallel_devices": parallel_devices,
            "cluster_environment": cluster_environment,
            "checkpoint_io": checkpoint_io,
            "precision_plugin": precision_plugin,
            "process_group_backend": process_group_backend,
            "timeout": timeout,
            "start_method": start_method,
        }
        check_arguments(self._arguments)
        self._refuse_settings()
        self._saving = Saving(self.settings.checkpoint, checkpoint_io)
        self._single_file_io: CheckpointIO | None = None
        self._backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method
        self._nodes = 1
        self._was_configured = False
        self._plan: Plan | None = None
        self._mesh: DeviceMesh | None = None
        self._control_group: dist.ProcessGroup | None = None
        self._engines: dict[nn.Module, Engine] = {}
        self._pipeline: StagedModule | None = None
        self._attendance = Attendance(timeout=timeout)
        self.failures = Failures(self._attendance, self._saving)
        self._chosen_accelerator: Accelerator | None = None
        self._mesh_precision: MeshPrecision | None = None
        # Lightning's two classes take the same arguments in this order, the last under different names.
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        """Return the call that makes this strategy, and what it is for."""
        return f"{written_call(self.call, self.settings, self._arguments)} for {self.is_for}"

    def _refuse_settings(self) -> None:
        """Raise where a setting makes no sense for whose strategy this is."""

    # What a Trainer or Fabric sets before ranks exist -----------------------------------------------------------------

    @property
    def accelerator(self) -> Any:
        """The accelerator that was chosen, or the one given."""
        # Apart from `_accelerator`, lest a second Trainer takes the first one's choice for an argument of the user.
        return self._chosen_accelerator or self._accelerator  # type: ignore[attr-defined]

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        """Take the accelerator that was chosen."""
        self._chosen_accelerator = accelerator

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin that carries checkpoints: meshbolt's, or the user's around it."""
        return self._single_file_io or self._saving.io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        """Take the user's plugin, which must stand around meshbolt's."""
        self._saving.use(io)

    @contextmanager
    def results_in_one_file(self) -> Iterator[None]:
        """Let Lightning carry results out of ranks that were started as functions: a file of whole tensors, no checkpoint."""
        self._single_file_io = TorchCheckpointIO()
        try:
            yield
        finally:
            self._single_file_io = None

    def _get_precision(self) -> MeshPrecision:
        if self._mesh_precision is None:
            self._mesh_precision = convert_precision(None)
        return self._mesh_precision

    def _set_precision(self, precision: Precision | None) -> MeshPrecision | None:
        self._mesh_precision = None if precision is None else convert_precision(precision)
        return self._mesh_precision

    def _configure_launcher(self) -> None:
        """Choose how ranks are started; the last thing that a Trainer or Fabric does with its strategy."""
        if self._was_configured:
            raise ConfigError(
                f"This {self!r} was given to a Trainer or Fabric before. Make a new one for each: its ranks, mesh and sharded "
                "module belong to one run."
            )
        self._was_configured = True
        if self.cluster_environment is not None:
            self._launcher = self._choose_launcher(self.cluster_environment)

    def _choose_launcher(self, environment: ClusterEnvironment) -> Any:
        raise NotImplementedError

    # Ranks ------------------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        """The number of machines."""
        return self._nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        """Take the number of machines."""
        self._nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """The number of ranks on this machine."""
        return len(self.parallel_devices or ())

    @property
    def process_group_backend(self) -> str | None:
        """The backend of the default process group, once it is decided."""
        return self._backend

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        if self.parallel_devices is None:
            raise ConfigError(
                "The strategy has no devices yet: they are known once a Trainer or Fabric was made with it."
            )
        local_rank = self.cluster_environment.local_rank() if self.cluster_environment is not None else 0
        return self.parallel_devices[local_rank]

    @property
    def plan(self) -> Plan:
        """The resolved plan of this run."""
        if self._plan is None:
            raise ConfigError("The plan is resolved when the ranks are known: read it in `setup` or later.")
        return self._plan

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of this run, with its named axes."""
        if self._mesh is None:
            raise ConfigError("The mesh is built when the ranks are known: read it in `setup` or later.")
        return self._mesh

    def _set_ranks(self) -> None:
        environment = self.cluster_environment
        if environment is None:
            return
        environment.set_global_rank(environment.node_rank() * self.num_processes + environment.local_rank())
        environment.set_world_size(self.num_nodes * self.num_processes)
        set_rank_zero_only(environment.global_rank())

    def _connect(self) -> None:
        """Connect the ranks, agree on a plan and build its mesh; once they are connected, only compare what they are told."""
        if self._mesh is None:
            self._connect_ranks()
        agree_on_error(self._resolve, group=self._control_group)
        rows = {**self.plan.rows(), **precision_rows(self._get_precision()), **self._rows()}
        agree_on_settings(rows, group=self._control_group)
        if self._mesh is None:
            self._mesh = build_mesh(self.plan.mesh, device_type=self.root_device.type, timeout=self._timeout)
            self._saving.connect(self.plan, timeout=self._timeout)
            self._take_places(timeout=self._timeout)
        self._draw_alike()

    def _connect_ranks(self) -> None:
        self._set_ranks()
        if self.cluster_environment is None:
            raise ConfigError(
                "The strategy has no cluster environment; give it to a Trainer or Fabric before using it."
            )
        self._backend = self._backend or default_backend(self.root_device)
        connect_ranks(self.cluster_environment, self._backend, timeout=self._timeout, device=self.root_device)
        self.failures.connect()
        gloo = dist.get_backend() == "gloo"
        self._control_group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=self._timeout)

    def _resolve(self) -> None:
        """Make the plan, once; raise what this rank finds wrong."""
        environment = self.cluster_environment
        self._plan = self._plan or resolve(
            self.settings,
            world_size=dist.get_world_size() if environment is None else environment.world_size(),
            precision=self._get_precision().policy(reduce_dtype=self.settings.zero.reduce_dtype),
            device_type=self.root_device.type,
            ranks_per_node=self.num_processes,
        )

    def _rows(self) -> dict[str, Any]:
        """Return what all ranks must have alike beside the plan."""
        return {}

    def barrier(self, *_args: Any, **_kwargs: Any) -> None:
        """Wait for all ranks."""
        if (group := self._reachable()) is None:
            return
        dist.barrier(group, device_ids=[self.root_device.index] if dist.get_backend(group) == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return one rank's object on all ranks.

        Args:
            obj: anything that can be pickled.
            src: the rank whose object counts.
        """
        if (group := self._reachable()) is None:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src, group=group)
        return box[0]

    def process_dataloader(self, dataloader: Any) -> Any:
        """Check that the loaders of all ranks agree."""
        self._seed_workers(dataloader)
        return checked_loader(dataloader, group=self._control_group, ranks=self.data_parallel_size)

    # The sharded module -----------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that holds the sharded module; in Fabric, of the module that was set up last."""
        if not self._engines:
            raise ConfigError("The module is not set up yet, so there is nothing sharded to work on.")
        return next(reversed(self._engines.values()))

    def _compose(self, module: nn.Module, *, example: Example, staged: StagedModule | None = None) -> Engine:
        """Shard a module, unless that was done already."""
        if module not in self._engines:
            options: dict[str, Any] = {
                "plan": self.plan,
                "mesh": self.device_mesh,
                "device": self.root_device,
                "timeout": self._timeout,
                "example": example,
            }
            if staged is None:
                self._engines[module] = Engine(module, **options)
            else:
                say_what_is_let_go(module, staged.stages)
                self._engines[module] = engine = PipelinedEngine(module, stages=staged.stages, **options)
                staged.run_by(engine)
                self._pipeline, self.failures.place = staged, staged.place
                say_where_it_is_cut(module, staged)
            say_what_is_divided(self._engines[module])
        self._count_samples_once(module)
        return self._engines[module]

    @contextmanager
    def _settled(self) -> Iterator[dict[nn.Parameter, str]]:
        """Leave nothing gathered for a while, and yield the names of all sharded parameters."""
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.enter_context(engine.settled(restores=True))
            yield {p: name for engine in self._engines.values() for name, p in engine.parameters_by_name.items()}

    def module_to_device(self, *_: Any) -> None:
        """Do nothing: parameters reach their device when they are sharded."""

    model_to_device = module_to_device  # the Trainer's name for it

    @contextmanager
    def gathered(self, module: Wanted, *, optimizer: Optimizer | None = None) -> Iterator[State]:
        """Hold whole parameters instead of shards for a while, to read or to change them on every rank.

        All ranks must enter and leave together. Changes made in place are kept; where ranks differ, rank 0's count. Under a
        pipeline each rank gets what is asked for of all stages.

        Args:
            module: the module, one inside it, or parameters of it.
            optimizer: also gather the state that it keeps for these parameters.

        Yields:
            The optimizer's state by parameter name and key, whole; empty without an optimizer.

        Raises:
            ConfigError: the module is not part of one that was sharded.
            UnsupportedError: ranks cannot meet, since they are in a step of different stages.

        Example:
            >>> with trainer.strategy.gathered(model.head):
            ...     model.head.weight.norm()
        """
        options: dict[str, Any] = {"plan": self.plan, "pipeline": self._pipeline, "settled": self._settled}
        with whole_weights(module, optimizer, engines=self._engines, **options) as state:
            yield state

    def of_all_stages(self, value: Any) -> Any:
        """Return, on the first rank of a pipeline, what the first rank has that has it; without a pipeline the value.

        Args:
            value: this rank's; None: it has none.
        """
        return value if self._pipeline is None else self._pipeline.of_all_stages(value)

    @property
    def pipeline(self) -> StagedModule | None:
        """The stages of the module on this rank, once it is set up; None without a pipeline."""
        return self._pipeline

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """In manual optimisation: backwards inside are of batches that the window goes on after."""
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.enter_context(engine.accumulate())
            yield

    def grad_norm(self, module: nn.Module | None = None, *, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of the gradients over all ranks.

        Args:
            module: whose parameters; None for all that are sharded.
            norm_type: p of the p-norm, or infinity.
        """
        asked = None if module is None else list(module.parameters())
        engines = self._engines.values() if self._engines else [self.engine]
        norms = [engine.grad_norm(asked, norm_type=norm_type) for engine in engines]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), ord=norm_type)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that is being written in the background is whole; without one, do nothing.

        The end of fit does so by itself, and the next save, and the end of the program. All ranks must call it.

        Raises:
            CheckpointError: it was not saved; the same on every rank.

        Example:
            >>> fabric.save("last.ckpt", state)
            >>> fabric.strategy.wait_for_checkpoint()
        """
        self._saving.finish()

    def _save(
        self,
        path: str | Path,
        tree: Mapping[str, Any],
        *,
        notes: Mapping[str, Any],
        buffers: frozenset[str],
        storage_options: Any,
        in_background: bool,
    ) -> None:
        place = self.broadcast(str(path))
        self._saving.save(
            place,
            ToSave(
                tree=tree,
                notes=notes,
                random_state=self._random_state(),
                buffers=buffers,
                resumed=self._resumed_buffers(),
            ),
            storage_options=storage_options,
            in_background=in_background,
            group=self._control_group,
        )
        note_save(place)

    def _random_state(self) -> dict[str, torch.Tensor]:
        """Return the random state that a run which resumes on this rank goes on with."""
        return collect_random_state(self.root_device)

    def _resumed_buffers(self) -> dict[str, torch.Tensor]:
        """Return, by key in what is saved, the buffers that a run which resumes goes on with in the place of those of now."""
        return {}

    def _load(self, path: str, into: LoadInto, *, weights_only: bool | None) -> Loaded:
        if self.settings.offload.optimizer is not None:
            into = dataclasses.replace(into, state_moves=True)
        return self._saving.load(path, into, weights_only=weights_only, group=self._control_group)

    def _take_random_state(self, loaded: Loaded) -> None:
        """Go on with the random state of a checkpoint, or, on another number of ranks, with one that branches from it."""
        if loaded.random_state and loaded.same_ranks:
            restore_random_state(loaded.random_state, self.root_device)
        elif loaded.random_state:
            branch_random_state(loaded.random_state, self.data_parallel_rank, self.root_device)
