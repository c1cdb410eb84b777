"""The engine: runs a plan on a module, for whichever loop drives it.

It knows nothing of Lightning. A loop calls, in this order: `compose`, then for each batch `call` and `backward` (inside
`accumulate` where the batch is not the window's last), then `clip_norm` or `clip_value` where asked, and `step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt import compat
from meshbolt.config import Plan
from meshbolt.engine import optimizer as optimizers
from meshbolt.engine.clip import clip_norm_, clip_value_, global_norm
from meshbolt.engine.compose import ROOT, compose
from meshbolt.engine.debug import BranchWatch
from meshbolt.engine.derivatives import Derivatives
from meshbolt.engine.draws import draw_whole_tensors
from meshbolt.engine.edits import Edits
from meshbolt.engine.fast_path import FastPath, wants_fast_path
from meshbolt.engine.hosted import HostedParameters
from meshbolt.engine.load import follow_state_dicts
from meshbolt.engine.misuse import explained, used_outside_of_its_unit
from meshbolt.engine.offloaded import OffloadedSteps
from meshbolt.engine.stages import Stages
from meshbolt.engine.state import load_optimizer_state
from meshbolt.engine.used import UsedParameters
from meshbolt.engine.window import Window
from meshbolt.mesh import data_parallel_group
from meshbolt.offload.planning import Needs
from meshbolt.offload.traffic import Observer, OffloadTraffic
from meshbolt.tensor import gathered as whole_of_splits
from meshbolt.zero import ReplicatedParameters


class Engine:
    """One module under one plan.

    Attributes:
        plan: what is run.
        mesh: the ranks.
        module: the user's module, sharded in place.
        parameters_by_name: sharded parameters by their name in the user's module.
        tensor_plan: which layers are divided; None where none is.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        plan: Plan,
        mesh: DeviceMesh,
        device: torch.device,
        timeout: timedelta | None = None,
        example: Callable[[nn.Module], Any] | None = None,
        stages: Stages | None = None,
    ) -> None:
        """Shard the module in place; see `compose` for what can go wrong.

        Args:
            module: the user's whole module.
            plan: what to do with it.
            mesh: built once for the run, of the plan's shape.
            device: this rank's device.
            timeout: how long debug mode waits for the other ranks; None: torch's default.
            example: calls a module as the run will; only called where a plan is found by that.
            stages: what of the module this rank holds; None: all.
        """
        self.plan, self.mesh, self.module, self.device = plan, mesh, module, device
        if device.type == "cpu":
            draw_whole_tensors()
        fast = wants_fast_path(plan)
        if fast:
            compat.lighten_hooks()
        self._hosted = HostedParameters(plan.settings.offload, device=device)
        composed = compose(
            module, plan=plan, mesh=mesh, device=device, example=example, stages=stages, hosted=self._hosted
        )
        self._root, self._units, self._hooks = composed.root, composed.units, composed.hooks
        # In the order of the module, which is the same on every rank; the order of a set is not.
        self.tensor_plan, self._tensor_axis = composed.tensor, composed.tensor_axis
        self._divided = () if composed.tensor is None else tuple(composed.tensor.modules)
        self._replicated = ReplicatedParameters(
            (p for p in module.parameters() if p in composed.whole), group=data_parallel_group(mesh, timeout=timeout)
        )
        self._all_units: list[FSDPModule] = [*composed.units.values(), composed.root]
        self.parameters_by_name: dict[str, nn.Parameter] = dict(module.named_parameters())
        is_watched = plan.environment.debug
        of_stage = None if stages is None else stages.group
        units = self._modules(composed.units)
        self._watch = BranchWatch(units, timeout=timeout, ranks=of_stage) if is_watched else None
        self._edits = Edits(module, units=self._all_units)
        self._fast = FastPath(module, units=self._units, root=self._root, plan=plan) if fast else None
        self._window = Window(
            {**composed.units, ROOT: composed.root},
            whole=composed.whole,
            keeps_parts=plan.stage.reduces_every_batch and plan.mesh.dp_replicate > 1,
        )
        self._derivatives = Derivatives(
            composed.units,
            root=composed.root,
            whole=composed.whole,
            frees_after_forward=plan.stage.reshards_after_forward,
        )
        self._offloaded = OffloadedSteps(
            plan.settings.offload,
            {ROOT: composed.root, **composed.units},
            others=self._replicated.parameters,
            device=device,
            hosted=self._hosted,
        )
        self._used = None if stages is not None else UsedParameters(self.parameters_by_name, device=device)
        follow_state_dicts(module, before=self._before_state_dict, after=self._after_state_dict)
        self._is_last_batch = True
        self._settled = self._state_dicts = 0
        self._covers_forward = self._inside = self._reentered = self._primed = False

    @property
    def spans_stages(self) -> bool:
        """Whether other ranks have parameters that this one has not."""
        return False

    @property
    def inside(self) -> bool:
        """Whether a call is running, so that the root's parameters are gathered."""
        return self._inside

    # Forward and backward ---------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that uses the module, with the root's parameters gathered.

        Every entry into the module comes through here (Lightning calls `training_step`, never the module itself); calls
        within a call are plain.

        Args:
            function: takes `args` and `kwargs`.

        Returns:
            What the function returns.
        """
        if self._inside:
            return function(*args, **kwargs)
        training = torch.is_grad_enabled()
        self._derivatives.release_used()
        kept = self._derivatives.kept()
        self._state_dicts = 0  # one that raised may have been left behind
        self._prime()
        self.sync_requires_grad()
        self._edits.refuse_other_data()
        self._inside, self._reentered = True, False
        if training and self._fast is not None:
            self._fast.enter_forward(keeps_gradients=self._covers_forward and not self._is_last_batch)
        try:
            return self._root(functools.partial(self._run, function, *args, **kwargs))  # type: ignore[operator]
        except Exception as error:
            self._recover()
            self._explain(error)
            raise
        finally:
            self._inside = False
            if not training:
                # What stays gathered after a forward that no backward follows would miss the next update.
                self._keep_edits()
                self._free()
                self._derivatives.release_others(kept)

    @contextmanager
    def accumulate(self, *, covers_forward: bool = False) -> Iterator[None]:
        """Treat the batches inside as ones that the window goes on after: stage 0 and 1 do not communicate gradients.

        Args:
            covers_forward: each forward inside has its only backward inside as well, so that less has to be watched.
        """
        before = self._is_last_batch, self._covers_forward
        self._is_last_batch, self._covers_forward = False, covers_forward
        self._apply_window()
        try:
            yield
        finally:
            self._is_last_batch, self._covers_forward = before
            self._apply_window()

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Prepare a backward; return the loss to call it on.

        Args:
            loss: scalar, with a graph through the module.
        """
        if isinstance(loss, DTensor):
            raise used_outside_of_its_unit()
        self._refuse_strays()
        if self._watch is not None:
            self._watch.announce("backward")
        if self._is_last_batch or self.plan.stage.reshards_after_forward:
            # Backward frees what it has used, and user code has run with anything gathered since the forward.
            self._keep_edits()
        if self._inside:
            # Manual optimisation: the root's own forward has not returned yet, so its hooks are put on the loss here.
            loss = self._root(lambda: loss)  # type: ignore[operator]
            # What goes on inside wants the root gathered; a step frees it.
            self._root.set_reshard_after_backward(False, recurse=False)
        self.sync_requires_grad()
        if not (self._is_last_batch or self.plan.stage.reduces_every_batch):
            self._gather_unused()
        self._window.before_backward(last=self._is_last_batch)
        self._derivatives.before_backward(reduces=self._is_last_batch or self.plan.stage.reduces_every_batch)
        self._offloaded.before_backward(reduces=self._is_last_batch)
        if self._fast is not None:
            self._fast.before_backward()
        return loss

    def after_backward(self) -> None:
        """Finish a backward: afterwards the gradients of this window are where its policy says."""
        self._derivatives.after_backward()
        if self._fast is not None:
            self._fast.after_backward()
        self._window.after_backward(last=self._is_last_batch)
        if self._is_last_batch:
            self._replicated.average_gradients()
            for parameter, hooks in self._hooks.items():
                for hook in hooks if parameter.grad is not None else ():
                    hook(parameter)
        if self._inside:
            self._apply_window()
        reduces = self._is_last_batch or self.plan.stage.reduces_every_batch
        if reduces and self._used is not None and not self._offloaded.takes_gradients:
            self._used.compare()
        self._reenter()

    @contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[torch.Tensor]:
        """Surround a backward: `with engine.backward(loss) as loss: loss.backward()`.

        Args:
            loss: scalar, with a graph through the module.
        """
        loss = self.before_backward(loss)
        try:
            yield loss
        except Exception as error:
            self._offloaded.after_error(error)
            self._recover()
            self._apply_window()
            self._explain(error)
            raise
        self.after_backward()

    # Gradients and steps ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Free everything that is gathered, so that parameters are shards: before a step, a clip, a save, an edit."""
        self._offloaded.wait()
        self._keep_edits()
        self._free()
        self._hosted.settle()

    def require_whole(self) -> None:
        """Wait for updates of offloaded state, and refuse to save it where one has failed: what is left of it is of two steps.

        Raises:
            BaseException: what an update raised, if nobody has seen it yet; else a MeshboltError.
        """
        self._offloaded.require_whole()

    @contextmanager
    def settled(self, *, restores: bool = False) -> Iterator[None]:
        """Hold parameters as shards for a while; inside a call, the root is gathered again after it for the code that goes on.

        Args:
            restores: gather the other units again too, whose parameters that code may have used by themselves.
        """
        gathered = self._all_units if self._inside and restores else []
        gathered = [unit for unit in gathered if compat.is_gathered(unit)]
        self.settle()
        self._settled += 1
        try:
            yield
        finally:
            self._settled -= 1
        if not self._settled:
            self._reenter()
            for unit in gathered:
                unit.unshard()

    def _before_state_dict(self) -> None:
        self._state_dicts += 1
        if not self._settled and self._state_dicts == 1:
            self.settle()

    def _after_state_dict(self) -> None:
        self._state_dicts -= 1
        if not self._settled and self._state_dicts == 0:
            self._reenter()

    def _keep_edits(self) -> None:
        self._edits.keep(self._all_units)

    def _free(self) -> None:
        if self._fast is not None:
            self._fast.drop()
        for unit in self._all_units:
            compat.drop_pending_gather(unit)
            compat.reshard(unit)

    def sync_requires_grad(self) -> None:
        """Make gathered and sharded parameters agree on `requires_grad`, after somebody changed it."""
        self._edits.follow_requires_grad(self._all_units)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, **options: Any) -> torch.Tensor:
        """Clip gradients by their norm over all ranks; see `clip_norm_`."""
        chosen = self._edits.shards_of(parameters)
        self._window.refuse_inside(chosen, what="clipped")
        return clip_norm_(chosen, max_norm, **options)

    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Clip every gradient to [-value, value]."""
        chosen = self._edits.shards_of(parameters)
        self._window.refuse_inside(chosen, what="clipped")
        clip_value_(chosen, value)

    def grad_norm(self, parameters: Iterable[nn.Parameter] | None = None, *, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of the gradients over all ranks.

        Args:
            parameters: parameters, of which those of this module count; None for all of the module.
            norm_type: p of the p-norm, or infinity.
        """
        own = dict.fromkeys(self.parameters_by_name.values())
        chosen = [p for p in self._edits.shards_of(own if parameters is None else parameters) if p in own]
        self._window.refuse_inside(chosen, what="measured")
        return global_norm(chosen, norm_type=norm_type)

    def take_optimizers(self, chosen: Iterable[Optimizer]) -> None:
        """Take the optimizers of a run in place of earlier ones, and refuse those that cannot train this module.

        Args:
            chosen: made on the sharded parameters.

        Raises:
            UnsupportedError: see `optimizers.check_optimizer`, and `OffloadedSteps.add` where state is offloaded.
            StorageError: likewise.
        """
        self._offloaded.close()
        for optimizer in chosen:
            self.add_optimizer(optimizer)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Take one more optimizer; see `take_optimizers`."""
        optimizers.check_optimizer(optimizer, sharded=self.parameters_by_name.values())
        if self.plan.settings.offload.is_used:
            self._offloaded.add(optimizer)
        compat.add_step_hook(optimizer, self._settle_before_step)

    def _settle_before_step(self, *_: Any) -> None:
        self.settle()

    def shown_state(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Show in `optimizer.state` all that is kept for the parameters here, wherever it lies; changes are kept."""
        return self._offloaded.shown(optimizer)

    def offloaded_needs(self) -> tuple[Needs, Needs]:
        """Return what this rank's optimizers need in host memory and on a disk, and what its parameters need there."""
        return self._offloaded.needs(), self._hosted.needs()

    def tell_returns(self, say: Callable[[str], None]) -> None:
        """Tell somebody what state comes back to the device in the middle of training, where that is asked for.

        Args:
            say: takes a sentence.
        """
        self._offloaded.on_return = say

    def offload_traffic(self) -> OffloadTraffic:
        """Return what offloading has moved on this rank since its optimizers were taken; nothing is waited for."""
        return self._offloaded.traffic()

    def observe_offload(self, observer: Observer | None) -> None:
        """Tell somebody what offloading does, and when, in whichever thread does it.

        Args:
            observer: who; None: nobody any more.
        """
        self._offloaded.observe(observer)

    def load_state(self, optimizer: Optimizer, *saved: Any, **options: Any) -> None:
        """Give an optimizer the state of a checkpoint, wherever it is to lie; see `load_optimizer_state`."""
        is_moved = self.plan.settings.offload.optimizer is not None
        with self.shown_state(optimizer):
            device = torch.device("cpu") if is_moved else None
            load_optimizer_state(optimizer, *saved, **options, device=device, moves=is_moved)

    def overlap_updates(self, *, early: bool, late: bool) -> None:
        """Let updates of an offloaded optimizer run beside other work; see `OffloadedSteps.overlap`."""
        # The fast path gathers units before somebody comes to them.
        self._offloaded.overlap(early=early, late=late and self._fast is None)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Take an optimizer step on the shards.

        Args:
            optimizer: made on the sharded parameters.
            kwargs: further arguments of its `step`.
        """
        parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._window.refuse_inside(parameters, what="used for a step")
        self._edits.refuse_other_data()
        self._refuse_strays()
        with self.settled():
            stepped = {p for p in parameters if p.grad is not None}
            taken = self._offloaded if optimizer in self._offloaded else optimizers
            result = taken.step(optimizer, **kwargs)
            # A closure may have made gradients, and a step may have dropped them.
            self._derivatives.release_changed(stepped | {p for p in parameters if p.grad is not None})
        return result

    # Inside -----------------------------------------------------------------------------------------------------------

    def _apply_window(self) -> None:
        stage, last = self.plan.stage, self._is_last_batch
        for unit in self._all_units:
            if not stage.reduces_every_batch:
                unit.set_requires_gradient_sync(last, recurse=False)
            elif self.plan.mesh.dp_replicate > 1:
                unit.set_requires_all_reduce(last, recurse=False)
            unit.set_reshard_after_backward(last or stage.reshards_after_forward, recurse=False)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if self._tensor_axis is not None:
            result = whole_of_splits(result)
            self._tensor_axis.forget()
        if self._reentered:
            # Steps of manual optimisation: what follows them may have changed parameters, and the root is freed next.
            self._edits.keep(self._all_units)
        return result

    def _reenter(self) -> None:
        """Gather the root again where user code goes on inside a call, after what freed it."""
        if self._inside:
            self._root.unshard()
            self._reentered = True

    def _prime(self) -> None:
        """Allocate gathered parameters as ordinary tensors once, before inference mode would make them inference tensors."""
        if self._primed or not torch.is_inference_mode_enabled():
            return
        self._offloaded.wait()
        with torch.inference_mode(False), torch.no_grad():
            for unit in self._all_units:
                unit.unshard()
                unit.reshard()
        self._primed = True

    def _gather_unused(self) -> None:
        """Gather units once that no forward has used: where gradients stay whole, torch looks for theirs in 16 bits."""
        for unit in self._all_units:
            if not compat.was_gathered(unit):
                unit.unshard()
                unit.reshard()

    def _refuse_strays(self) -> None:
        if self.plan.stage.reduces_every_batch or not self._window.is_open:
            self._derivatives.refuse_strays()

    def _explain(self, error: Exception) -> None:
        """Raise what an error means, where sharding is its cause."""
        if (meant := explained(error, units=self._units, divided=self._divided)) is not None:
            raise meant from error

    def _recover(self) -> None:
        # What waits for ranks that are gone fails in turn; the error that is on its way says more.
        with suppress(RuntimeError):
            if self._fast is not None:
                self._fast.reset()
            self._derivatives.reset()
            compat.reset_after_error(self._root)
            if self.plan.stage.reduces_every_batch or not self._window.is_open:
                self._derivatives.drop_strays()
            self._window.after_error()

    @staticmethod
    def _modules(units: Any) -> dict[str, nn.Module]:
        return dict(units)
