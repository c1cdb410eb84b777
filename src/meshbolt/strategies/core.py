"""What the Trainer's and Fabric's strategies share: ranks, the mesh, the plan, and checkpoints of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from meshbolt.checkpoint import load_objects, load_tensors, save_directory, saved_tensors
from meshbolt.config import Plan, Settings, resolve
from meshbolt.engine import Engine, gathered
from meshbolt.engine.random_state import collect_random_state, restore_random_state
from meshbolt.engine.state import empty_like_saved, join_tensors, markers, split_tensors
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.mesh import build_mesh
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.compat import connect_ranks, default_backend, ranks_are_connected, set_rank_zero_only

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
Owners = Mapping[str, Mapping[str, nn.Parameter]]
DEFAULT_TIMEOUT = timedelta(minutes=30)


class MeshCore:
    """The part of a strategy that does not depend on whose loop runs it."""

    is_distributed = True
    settings: Settings
    parallel_devices: list[torch.device] | None
    cluster_environment: ClusterEnvironment | None

    def _init_core(
        self, settings: Settings, *, backend: str | None, timeout: timedelta, start_method: StartMethod
    ) -> None:
        self.settings = settings
        self._backend = backend
        self._timeout = timeout
        self._start_method = start_method
        self._nodes = 1
        self._was_configured = False
        self._plan: Plan | None = None
        self._mesh: DeviceMesh | None = None
        self._control_group: dist.ProcessGroup | None = None
        self._engine: Engine | None = None

    # Ranks ------------------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        """The number of machines."""
        return self._nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
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
            raise ConfigError("The strategy has no devices yet: they are known once a Trainer or Fabric was made with it.")
        local_rank = self.cluster_environment.local_rank() if self.cluster_environment is not None else 0
        return self.parallel_devices[local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the samples this rank sees, by its place on the data-parallel axes."""
        shape = self.plan.mesh
        return {"num_replicas": shape.data_parallel_size, "rank": shape.data_parallel_rank(dist.get_rank())}

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

    @property
    def engine(self) -> Engine:
        """The engine that holds the sharded module."""
        if self._engine is None:
            raise ConfigError("The module is not set up yet, so there is nothing sharded to work on.")
        return self._engine

    def _set_ranks(self) -> None:
        environment = self.cluster_environment
        if environment is None:
            return
        environment.set_global_rank(environment.node_rank() * self.num_processes + environment.local_rank())
        environment.set_world_size(self.num_nodes * self.num_processes)
        set_rank_zero_only(environment.global_rank())

    def _refuse_second_use(self) -> None:
        """One strategy object belongs to one Trainer or Fabric: its mesh and engine are those of one run."""
        if self._was_configured:
            raise ConfigError(
                f"This {self!r} was given to a Trainer or Fabric before. Make a new one for each: its ranks, mesh and sharded "
                "module belong to one run."
            )
        self._was_configured = True

    def _connect(self, precision: MeshPrecision) -> None:
        """Initialise the process group, resolve the plan and build the mesh; again is nothing."""
        if self._mesh is not None:
            return
        self._set_ranks()
        if self.cluster_environment is None:
            raise ConfigError("The strategy has no cluster environment; give it to a Trainer or Fabric before using it.")
        world_size = self.cluster_environment.world_size()
        reduce_dtype = self.settings.zero.reduce_dtype
        self._plan = resolve(
            self.settings,
            world_size=world_size,
            precision=precision.policy(reduce_dtype=reduce_dtype),
            device_type=self.root_device.type,
        )
        self._backend = self._backend or default_backend(self.root_device)
        connect_ranks(self.cluster_environment, self._backend, timeout=self._timeout, device=self.root_device)
        self._mesh = build_mesh(self._plan.mesh, device_type=self.root_device.type)
        gloo = dist.get_backend() == "gloo"
        self._control_group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=self._timeout)

    def barrier(self, *_args: Any, **_kwargs: Any) -> None:
        """Wait for all ranks."""
        if not ranks_are_connected():
            return
        ids = [self.root_device.index] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return one rank's object on all ranks.

        Args:
            obj: anything that can be pickled.
            src: the rank whose object counts.
        """
        if not ranks_are_connected():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    # The sharded module -----------------------------------------------------------------------------------------------

    def _compose(self, module: nn.Module) -> Engine:
        """Shard a module, unless it is the one that is sharded already."""
        if self._engine is None or self._engine.module is not module:
            self._engine = Engine(module, plan=self.plan, mesh=self.device_mesh, device=self.root_device)
        return self._engine

    @contextmanager
    def gathered(self, module: nn.Module, *, optimizer: Optimizer | None = None) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
        """Hold whole parameters instead of shards for a while, to read or to change them on every rank.

        All ranks must enter and leave together. Changes made in place are kept; where ranks differ, rank 0's count.

        Args:
            module: the module, or one inside it.
            optimizer: also gather the state that it keeps for the module's parameters.

        Yields:
            The optimizer's state by parameter name and key, whole; empty without an optimizer.

        Example:
            >>> with trainer.strategy.gathered(model.head):
            ...     model.head.weight.norm()
        """
        self.engine.settle()
        names = {parameter: name for name, parameter in self.engine.parameters_by_name.items()}
        with gathered(module, names=names, optimizers=[] if optimizer is None else [optimizer]) as state:
            yield state

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """In manual optimisation: backwards inside are of batches that the window goes on after."""
        with self.engine.accumulate():
            yield

    def grad_norm(self, module: nn.Module | None = None, *, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of the gradients over all ranks.

        Args:
            module: whose parameters; None for the whole module.
            norm_type: p of the p-norm, or infinity.
        """
        self.engine.settle()
        return self.engine.grad_norm(None if module is None else list(module.parameters()), norm_type=norm_type)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self, path: Any, tree: Mapping[str, Any], *, storage_options: Any) -> None:
        """Write a checkpoint directory; the tree's tensors go to shards, the rest to one file."""
        if storage_options is not None:
            raise UnsupportedError("storage_options are not available for checkpoint directories. Leave them out.")
        tensors: dict[str, torch.Tensor] = {}
        objects = {key: split_tensors(value, key, tensors) for key, value in tree.items()}
        held = {key: value for key, value in tensors.items() if _is_sharded(value) or dist.get_rank() == 0}
        random_state = collect_random_state(self.root_device)
        held.update({f"random.{dist.get_rank()}.{key}": value for key, value in random_state.items()})
        save_directory(
            self.broadcast(str(path)),
            tensors=held,
            objects=objects,
            plan=dict(self.plan.rows()),
            policy=self.settings.checkpoint,
            group=self._control_group,
        )

    def _load(
        self, path: str, live: Mapping[str, torch.Tensor], owners: Owners, *, weights_only: bool | None
    ) -> dict[str, Any]:
        """Read a checkpoint directory.

        Args:
            path: equal on every rank.
            live: tensors to read into, by key; the checkpoint's other tensors are read into new ones.
            owners: by the prefix of optimizer state's keys, the parameters that the state belongs to, by name.
            weights_only: as `torch.load` has it, for the objects.

        Returns:
            The tree that was saved, with tensors in their places.
        """
        objects = load_objects(path, weights_only=weights_only, policy=self.settings.checkpoint, group=self._control_group)
        infos = saved_tensors(path)
        into = {}
        for key in markers(objects):
            info = infos[key]
            into[key] = live[key] if key in live else empty_like_saved(info.shape, info.dtype, _owner(key, owners))
        own = f"random.{dist.get_rank()}."
        random_state = {key: torch.empty(infos[key].shape, dtype=infos[key].dtype) for key in infos if key.startswith(own)}
        load_tensors(path, {**into, **random_state}, group=self._control_group)
        self._loaded_random_state = {key.removeprefix(own): value for key, value in random_state.items()}
        return {key: join_tensors(value, into) for key, value in objects.items()}

    _loaded_random_state: dict[str, torch.Tensor]

    def _restore_random_state(self) -> None:
        if self._loaded_random_state:
            restore_random_state(self._loaded_random_state, self.root_device)


def _owner(key: str, owners: Owners) -> nn.Parameter | None:
    """Return the parameter whose state a key names: `<prefix>...state.<name>.<what>`."""
    for prefix, parameters in owners.items():
        if key.startswith(prefix + ".") and ".state." in key:
            name = key.split(".state.", 1)[1].rpartition(".")[0]
            return parameters.get(name)
    return None


def _is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.distributed.tensor.DTensor)
