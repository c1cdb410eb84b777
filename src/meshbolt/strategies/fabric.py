"""The strategy for `lightning.fabric.Fabric`: which of Fabric's calls calls what of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies.parallel import ParallelStrategy
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from meshbolt.engine import Engine
from meshbolt.engine.load import load_model
from meshbolt.engine.rewire import names_by_parameter, rewire_optimizer
from meshbolt.engine.state import load_optimizer_state, optimizer_state
from meshbolt.errors import CheckpointError, ConfigError
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.compat import BackwardSyncControl, FabricForkLauncher, FabricScriptLauncher
from meshbolt.strategies.core import MeshCore
from meshbolt.strategies.directories import LoadInto
from meshbolt.strategies.entry import Entry, behind_entry, redirect_entries
from meshbolt.strategies.meta import meta_tensors


class MeshStrategy(MeshCore, ParallelStrategy):
    """Train any module in a Fabric loop, sharded over a mesh of ranks.

    Example:
        >>> from lightning.fabric import Fabric
        >>> from meshbolt.fabric import MeshStrategy
        >>> fabric = Fabric(strategy=MeshStrategy(zero=2), accelerator="cpu", devices=2)
    """

    call = "meshbolt.fabric.MeshStrategy"
    is_for = "lightning.fabric.Fabric"
    _is_new_window = True

    @property
    @override
    def precision(self) -> MeshPrecision:
        """meshbolt's plugin for Fabric's precision flag."""
        return self._get_precision()

    @precision.setter
    @override
    def precision(self, precision: Precision | None) -> None:
        """Convert Lightning's plugin to meshbolt's."""
        self._precision = self._set_precision(precision)

    @property
    def _backward_sync_control(self) -> _WindowControl:
        return _WindowControl(self)

    @_backward_sync_control.setter
    def _backward_sync_control(self, control: object) -> None:
        """Ignore the one that Lightning's constructor sets."""

    # Set-up -----------------------------------------------------------------------------------------------------------

    @override
    def _choose_launcher(self, environment: ClusterEnvironment) -> Any:
        if environment.creates_processes_externally:
            return None
        if self._start_method == "popen":
            return FabricScriptLauncher(environment, self.num_processes, self.num_nodes)
        return FabricForkLauncher(self, start_method=self._start_method)

    def _set_world_ranks(self) -> None:
        self._set_ranks()

    @override
    def teardown(self) -> None:
        """Wait for the checkpoint that is being written, and free what the run held."""
        self._saving.finish(for_good=True)
        super().teardown()

    @override
    def setup_environment(self) -> None:
        """Connect the ranks and build the mesh."""
        super().setup_environment()
        self._connect()

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Build modules on the meta device where `empty_init` says so; they are filled when they are sharded."""
        stack = ExitStack()
        stack.enter_context(meta_tensors() if empty_init else nullcontext())
        stack.enter_context(self.precision.module_init_context())
        return stack

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard a module, in place, and return what Fabric is to call in its place."""
        engine = self._compose(module)
        self.precision.attach(engine)
        redirect_entries(module, engine)
        return Entry(module, engine)

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard a module, and point optimizers that were made on its whole parameters at the shards."""
        names = names_by_parameter(module)
        entry = self.setup_module(module)
        for optimizer in optimizers:
            rewire_optimizer(optimizer, names, self._engines[module].parameters_by_name)
        return entry, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refuse an optimizer that cannot run on shards."""
        engine = self._engine_of(optimizer)
        engine.check_optimizer(optimizer)
        optimizer.register_step_pre_hook(lambda *_: engine.settle())
        return optimizer

    # Steps ------------------------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward inside the engines of all modules: the loss may go through several."""
        self._is_new_window = True
        loss = tensor if self.precision.loss_scaler is None else self.precision.loss_scaler.scale(tensor)
        with ExitStack() as stack:
            for engine in self._engines.values():
                loss = stack.enter_context(engine.backward(loss))
            loss.backward(*args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Take an optimizer step on the shards; a closure runs first. A checkpoint that could not be written is raised here."""
        if self._is_new_window:
            # Several optimizers may step in one window; in the backward of the next all ranks meet.
            self._is_new_window = False
            self._saving.before_window()
        closure: Callable[[], Any] | None = kwargs.pop("closure", None)
        result = closure() if closure is not None else None
        stepped = self.precision.step(optimizer, self._engine_of(optimizer), **kwargs)
        return stepped if closure is None else result

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor:
        """Clip the gradients of an optimizer by their norm over all ranks, and return the norm."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return self._engine_of(optimizer).clip_norm(
            parameters, float(max_norm), norm_type=float(norm_type), error_if_nonfinite=error_if_nonfinite
        )

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        """Clip every gradient of an optimizer to [-clip_val, clip_val]."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._engine_of(optimizer).clip_value(parameters, float(clip_val))

    @override
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a value over the ranks that see different samples."""
        return self._reduce(tensor, group, reduce_op)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return a module's state, sharded parameters as DTensors."""
        module = behind_entry(module)
        self._engines[module].settle()
        return module.state_dict()

    @override
    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save a checkpoint directory; every rank writes its shards.

        Args:
            path: of the directory.
            state: modules, optimizers, objects with a state dict, and plain values.
            storage_options: not available.
            filter: by key of `state`, says of each entry of a state dict whether it is saved.
        """
        tree = {key: self._state_of(value) for key, value in state.items()}
        for key, keep in (filter or {}).items():
            tree[key] = {name: value for name, value in tree[key].items() if keep(name, value)}
        self._save(path, tree, storage_options=storage_options, in_background=True)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint into modules, optimizers and other objects, in place.

        Args:
            path: of a directory; or, with a module as `state`, of a file with its state dict.
            state: what to read into, under the keys it was saved with; or one module.
            strict: refuse any difference.
            weights_only: as `torch.load` has it.

        Returns:
            What the checkpoint holds under keys that `state` has not.
        """
        place: str = self.broadcast(str(path))
        if Path(place).is_file() and isinstance(state, nn.Module):
            saved = torch.load(place, map_location="cpu", weights_only=weights_only, mmap=True)
            self._load_module(state, saved, strict=strict)
            return {}
        if isinstance(state, MutableMapping):
            return self._load_directory(place, state, strict=strict, weights_only=weights_only)
        raise CheckpointError(
            f"{place} cannot be read into {type(state).__name__}. Give the path of a checkpoint directory and a dictionary "
            "of the objects to read into, or the file of one module's state dict and that module."
        )

    def _load_directory(
        self, path: str, state: MutableMapping[str, Any], *, strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        live: dict[str, torch.Tensor] = {}
        owners: dict[str, Mapping[str, nn.Parameter]] = {}
        for key, target in state.items():
            if isinstance(target, nn.Module):
                own = self._state_of(target)
                live.update({f"{key}.{name}": value for name, value in own.items() if isinstance(value, torch.Tensor)})
            elif isinstance(target, Optimizer):
                owners[key] = self._engine_of(target).parameters_by_name
        into = LoadInto(live=live, parameters=owners)
        tree = self._load(path, into, weights_only=weights_only, with_random_state=True)
        missing = sorted(set(state) - set(tree))
        if strict and missing:
            raise CheckpointError(
                f"{path} does not hold {missing}; it holds {sorted(tree)}. Leave them out, or use strict=False."
            )
        for key, target in state.items():
            if key in tree:
                state[key] = self._restore(target, tree.pop(key), strict=strict)
        return tree

    def _restore(self, target: Any, saved: Any, *, strict: bool) -> Any:
        if isinstance(target, nn.Module):
            self._load_module(target, saved, strict=strict)
        elif isinstance(target, Optimizer):
            names = {parameter: name for name, parameter in self._engine_of(target).parameters_by_name.items()}
            load_optimizer_state(target, saved, names)
        elif hasattr(target, "load_state_dict"):
            target.load_state_dict(saved)
        else:
            return saved
        return target

    def _load_module(self, module: nn.Module, saved: Mapping[str, Any], *, strict: bool) -> None:
        module = behind_entry(module)
        if module not in self._engines:
            module.load_state_dict(saved, strict=strict)
            return
        self._engines[module].settle()
        load_model(module, saved, strict=strict, source="the checkpoint")

    def _state_of(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            sharded = behind_entry(value) in self._engines
            return self.get_module_state_dict(value) if sharded else value.state_dict()
        if isinstance(value, Optimizer):
            names = {parameter: name for name, parameter in self._engine_of(value).parameters_by_name.items()}
            return optimizer_state(value, names)
        return value.state_dict() if hasattr(value, "state_dict") else value

    def _engine_of(self, optimizer: Optimizer) -> Engine:
        """Return the engine whose shards an optimizer trains."""
        first = optimizer.param_groups[0]["params"][0]
        for engine in self._engines.values():
            if any(first is parameter for parameter in engine.parameters_by_name.values()):
                return engine
        raise ConfigError(
            f"{type(optimizer).__name__} was made on parameters that are not sharded. Hand it over together with its module, "
            "fabric.setup(module, optimizer), or make it from the module that fabric.setup_module returned."
        )


class _WindowControl(BackwardSyncControl):
    """`fabric.no_backward_sync`: batches that the window goes on after."""

    def __init__(self, strategy: MeshStrategy) -> None:
        self._strategy = strategy

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Return the context of a batch that the window goes on after."""
        return self._strategy._engines[behind_entry(module)].accumulate() if enabled else nullcontext()
