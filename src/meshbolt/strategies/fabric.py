"""The strategy for `lightning.fabric.Fabric`: which of Fabric's calls calls what of the engine."""

from __future__ import annotations

import functools
import logging
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
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from meshbolt.collectives import agree_on_error
from meshbolt.engine import Engine
from meshbolt.engine.load import check_weights, load_model
from meshbolt.engine.rewire import names_by_parameter, rewire_optimizer
from meshbolt.engine.state import check_optimizer_state, optimizer_state, trained_state
from meshbolt.errors import CheckpointError, ConfigError, UnsupportedError
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.announcing import say_what_is_offloaded
from meshbolt.strategies.compat import BackwardSyncControl, FabricScriptLauncher
from meshbolt.strategies.core import MeshCore
from meshbolt.strategies.deepspeeds import is_deepspeeds, take_rates, tree_for_fabric
from meshbolt.strategies.directories import Loaded, LoadInto, buffers_of, left_out_of
from meshbolt.strategies.entry import Entry, behind_entry, redirect_entries
from meshbolt.strategies.examples import example_of
from meshbolt.strategies.failures import tell_at_exit
from meshbolt.strategies.files import agree_on_path
from meshbolt.strategies.launcher import LOOP, TellingLauncher
from meshbolt.strategies.meta import meta_tensors
from meshbolt.strategies.pipelined import FabricSteps

_log = logging.getLogger(__name__)


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

    @override
    def _refuse_settings(self) -> None:
        if self.settings.checkpoint.load_weights_only:
            raise ConfigError(
                "Checkpoint(load_weights_only=True) is for a Trainer's fit. In Fabric, load what you name: "
                'fabric.load(path, {"model": model}).'
            )
        if self.settings.offload.overlap is True:
            raise ConfigError(
                "Offload(overlap=True) is for a Trainer's fit, of which it is known who looks at gradients and parameters. In "
                "Fabric steps begin and end where your loop takes them: leave overlap out."
            )

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
        return TellingLauncher(self.failures, self, start_method=self._start_method)

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
        if self._mesh is None:
            tell_at_exit(self.failures, LOOP)
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
        staged = None
        if self.plan.mesh.pp > 1:
            self._refuse_second(module)
            options: dict[str, Any] = {"plan": self.plan, "mesh": self.device_mesh, "device": self.root_device}
            staged = self._staged = FabricSteps(module, precision=self.precision, **options)
        engine = self._compose(module, example=example_of(module, self.precision.convert_input), staged=staged)
        self.precision.attach(engine)
        if staged is None:
            redirect_entries(module, engine)
        return Entry(module, engine, look=self._look_at_call, failures=self.failures)

    _staged: FabricSteps | None = None

    def _refuse_second(self, module: nn.Module) -> None:
        if self._engines:
            raise UnsupportedError(
                f"{type(module).__name__} is the second module of this Fabric, and under pipeline parallelism one module is cut "
                "into stages. Put both into one module, or train without pipeline_parallel."
            )

    def pipeline_step(self, batch: Any, loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> torch.Tensor:
        """Run a batch forwards and backwards through the stages of a pipeline, in microbatches.

        Gradients are added to those of the parameters, as by `fabric.backward`; steps, clipping and `no_backward_sync` are as
        without a pipeline.

        Args:
            batch: the whole one, on every rank of the pipeline; its tensors are divided along their first dim. Or
                `meshbolt.pipeline.Microbatches`, which is divided already.
            loss_fn: takes the module and a microbatch, and returns the microbatch's mean loss.

        Returns:
            The loss of the batch, a tensor without a graph; the same on every rank of the pipeline.

        Raises:
            ConfigError: there is no pipeline, or the batch has fewer samples than it needs.

        Example:
            >>> loss = fabric.strategy.pipeline_step(batch, lambda model, part: F.mse_loss(model(part["x"]), part["y"]))
            >>> optimizer.step()
        """
        self._look_at_step("pipeline_step", (batch,))
        self._is_new_window = True
        with self.failures.told("pipeline_step"):
            return self._pipelined().train(batch, loss_fn)

    def pipeline_evaluate(self, batch: Any, function: Callable[[nn.Module, Any], Any]) -> Any:
        """Run a batch forwards only through the stages of a pipeline, without gradients.

        Args:
            batch: the whole one, on every rank of the pipeline.
            function: takes the module and a microbatch.

        Returns:
            What the function returns for the whole batch, on every rank of the pipeline: tensors whose first dim is the
            microbatch's samples are joined, numbers are averaged. Of `Microbatches` a list with what it returns for each.

        Raises:
            ConfigError: there is no pipeline.

        Example:
            >>> logits = fabric.strategy.pipeline_evaluate(batch, lambda model, part: model(part["x"]))
        """
        self._look_at_step("pipeline_evaluate", (batch,))
        with self.failures.told("pipeline_evaluate"):
            return self._pipelined().evaluate(batch, function)

    def _pipelined(self) -> FabricSteps:
        if self._staged is None:
            raise ConfigError(
                "There is no pipeline: call the module and fabric.backward(loss). With MeshStrategy(pipeline_parallel=2) there "
                "is one once the module is set up."
            )
        return self._staged

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
        engine.add_optimizer(optimizer)
        say_what_is_offloaded(engine)
        return optimizer

    # Steps ------------------------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward inside the engines of all modules: the loss may go through several."""
        self._is_new_window = True
        loss = tensor if self.precision.loss_scaler is None else self.precision.loss_scaler.scale(tensor)
        with ExitStack() as stack:
            stack.enter_context(self.failures.told("fabric.backward"))
            for engine in self._engines.values():
                loss = stack.enter_context(engine.backward(loss))
            loss.backward(*args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Take an optimizer step on the shards; a closure runs first. A checkpoint that could not be written is raised here."""
        with self.failures.told("optimizer.step"):
            return self._step(optimizer, **kwargs)

    def _step(self, optimizer: Any, **kwargs: Any) -> Any:
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
        with self.failures.told("fabric.clip_gradients"):
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
        state = module.state_dict()
        return state if self._staged is None else self._staged.model_state(state)

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
        modules = {key: behind_entry(value) for key, value in state.items() if isinstance(value, nn.Module)}
        left_out: dict[str, list[str]] = {}
        if self.settings.checkpoint.trainable_only:
            optimizers = [value for value in state.values() if isinstance(value, Optimizer)]
            for key, module in modules.items():
                stages = None if self._staged is None else self._staged.group
                tree[key], left_out[key] = trained_state(tree[key], module, optimizers, stages=stages)
        agree_on_error(lambda: _apply_filters(tree, filter or {}), group=self._control_group)
        buffers = [buffers_of(module, tree[key], key=key) for key, module in modules.items()]
        self._save(
            path,
            tree,
            notes={"left_out": left_out},
            buffers=frozenset().union(*buffers),
            storage_options=storage_options,
            in_background=True,
        )

    def after_save(self, action: Callable[[], None], *, makes: str) -> None:
        """Do something on rank 0, once the checkpoint that was saved last is whole, and never if it fails.

        Args:
            action: without collectives.
            makes: the path of what it makes.
        """
        self._saving.after(action, makes=makes)

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
            path: of a directory, of one that DeepSpeed has written, or of a single file that torch.save has written.
            state: what to read into, under the keys it was saved with; or, for a file of a state dict, one module. Of DeepSpeed's
                a module, an optimizer and a scheduler under any keys, or one of them alone.
            strict: refuse any difference.
            weights_only: as `torch.load` has it.

        Returns:
            What the checkpoint holds under keys that `state` has not.
        """
        place, is_file = agree_on_path(str(path), group=self._control_group)
        if is_file and isinstance(state, nn.Module):
            content = self._load(place, LoadInto(), weights_only=weights_only).tree
            self._load_objects({"": state}, Loaded(tree={"": content}), strict=strict)
            return {}
        if isinstance(state, (nn.Module, Optimizer)) and is_deepspeeds(place, group=self._control_group):
            return self.load_checkpoint(place, {"": state}, strict=strict, weights_only=weights_only)
        if not isinstance(state, MutableMapping):
            raise CheckpointError(
                f"{place} cannot be read into {type(state).__name__}. Give the path of a checkpoint directory and a dictionary "
                "of the objects to read into, or the file of one module's state dict and that module."
            )
        loaded = self._load(place, self._wanted(state, strict=strict), weights_only=weights_only)
        self._load_objects(state, loaded, strict=strict)
        found = {key: each for key, each in state.items() if isinstance(each, Optimizer) and key in loaded.tree}
        schedulers = [each for each in state.values() if isinstance(each, LRScheduler)]
        take_rates([loaded.tree[key] for key in found], found.values(), schedulers)
        return {key: value for key, value in loaded.tree.items() if key not in state}

    def _wanted(self, state: Mapping[str, Any], *, strict: bool) -> LoadInto:
        weights: dict[str, torch.Tensor] = {}
        owners: dict[str, Mapping[str, nn.Parameter]] = {}
        for key, target in state.items():
            if isinstance(target, nn.Module):
                own = self._state_of(target)
                weights.update({f"{key}.{k}": value for k, value in own.items() if isinstance(value, torch.Tensor)})
            elif isinstance(target, Optimizer):
                owners[key] = self._engine_of(target).parameters_by_name
        return LoadInto(
            weights=weights,
            parameters=owners,
            check=lambda loaded: self._check(state, loaded, strict=strict),
            of_deepspeeds=lambda opened: tree_for_fabric(
                opened,
                {key: behind_entry(each) if isinstance(each, nn.Module) else each for key, each in state.items()},
            ),
        )

    def _check(self, state: Mapping[str, Any], loaded: Loaded, *, strict: bool) -> str:
        """Compare what was saved with all that it is to be read into; return the names that differ where they may."""
        missing = sorted(set(state) - set(loaded.tree))
        if strict and missing:
            raise CheckpointError(
                f"The checkpoint does not hold {missing}; it holds {sorted(loaded.tree)}. Leave them out (of an engine's "
                "load_checkpoint by load_optimizer_states=False or load_lr_scheduler_states=False), or use strict=False."
            )
        lists = ""
        for key, saved in loaded.tree.items():
            target = state.get(key)
            if isinstance(target, nn.Module):
                lists += check_weights(
                    self._state_of(target),
                    saved,
                    strict=strict,
                    source=f"the checkpoint's {key!r}" if key else "the file",
                    left_out=left_out_of(key, loaded.notes),
                )
            elif isinstance(target, Optimizer):
                check_optimizer_state(target, saved, self._names(target))
        return lists

    def _load_objects(self, state: MutableMapping[str, Any], loaded: Loaded, *, strict: bool) -> None:
        """Put a checkpoint into modules, optimizers and other objects, once all of it is known to fit."""
        lists: list[str] = []
        agree_on_error(lambda: lists.append(self._check(state, loaded, strict=strict)), group=self._control_group)
        if lists[0] and self.is_global_zero:
            _log.warning("Of the weights in the checkpoint only what fits is loaded.%s", lists[0])
        found = {key: target for key, target in state.items() if key in loaded.tree}
        # The user's objects first: they may raise, and on some ranks only.
        for key, target in found.items():
            if hasattr(target, "load_state_dict") and not isinstance(target, (nn.Module, Optimizer)):
                load = functools.partial(target.load_state_dict, loaded.tree[key])
                agree_on_error(load, group=self._control_group)
            elif not hasattr(target, "load_state_dict"):
                state[key] = loaded.tree[key]
        dtypes: dict[nn.Module, dict[str, torch.dtype]] = {}
        for key, target in found.items():
            if isinstance(target, nn.Module):
                self._load_module(target, loaded.tree[key])
                own = loaded.tree[key].items()
                dtypes[behind_entry(target)] = {k: v.dtype for k, v in own if isinstance(v, torch.Tensor)}
        for key, target in found.items():
            if isinstance(target, Optimizer):
                own_dtypes = dtypes.get(self._engine_of(target).module)
                engine = self._engine_of(target)
                engine.load_state(target, loaded.tree[key], self._names(target), dtypes=own_dtypes)
        self._take_random_state(loaded)

    def _load_module(self, module: nn.Module, saved: Mapping[str, Any]) -> None:
        module = behind_entry(module)
        if module in self._engines:
            self._engines[module].settle()
        # What differs was refused, or is to be left; and code of the user's may fail on some ranks only.
        agree_on_error(lambda: load_model(module, saved), group=self._control_group)

    def _names(self, optimizer: Optimizer) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._engine_of(optimizer).parameters_by_name.items()}

    def _state_of(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            sharded = behind_entry(value) in self._engines
            return self.get_module_state_dict(value) if sharded else value.state_dict()
        if isinstance(value, Optimizer):
            with self._engine_of(value).shown_state(value):
                state = optimizer_state(value, self._names(value))
            return state if self._staged is None else self._staged.optimizer_state(state)
        return value.state_dict() if hasattr(value, "state_dict") else value

    def _engine_of(self, optimizer: Optimizer) -> Engine:
        """Return the engine whose shards an optimizer trains."""
        first = next((parameter for group in optimizer.param_groups for parameter in group["params"]), None)
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


def _apply_filters(tree: dict[str, Any], filters: Mapping[str, Callable[[str, Any], bool]]) -> None:
    for key, keep in filters.items():
        tree[key] = {name: value for name, value in tree[key].items() if keep(name, value)}
