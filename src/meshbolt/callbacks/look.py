"""A step of a module, looked at as if one process ran it whole: on tensors without values, in the middle of a run of any plan."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from meshbolt.blocks import Recompute, recompute_blocks
from meshbolt.callbacks.amount import tensors_in
from meshbolt.compat import NeedsValues, plain_calls
from meshbolt.config import Plan
from meshbolt.engine.random_state import Snapshot
from meshbolt.errors import UnsupportedError
from meshbolt.monitoring.flops import CountFlops, Flops
from meshbolt.pipeline import Foreign, buffers_apart, calls_unseen
from meshbolt.pipeline.apart import attributes_kept
from meshbolt.pipeline.pristine import Pristine
from meshbolt.zero import plan_units

# What a step tells a Trainer, which is to hear nothing of one that is only looked at.
_TELLING = ("log", "log_dict", "print")
# Forms of batches that are looked at in any case; beyond, those that are not nearly as large as one of these.
MAX_FORMS = 16
NEAR = 0.03


class Look:
    """Remembers a module as it is before it is divided, cut or sharded, and looks at steps of it later.

    Args:
        module: whole; its parameters may be without values.
        plan: of the run, which may have blocks recomputed; None: of another strategy.
    """

    def __init__(self, module: pl.LightningModule, plan: Plan | None) -> None:
        self._module, self._pristine = module, Pristine(module)
        self._recompute = Recompute() if plan is None else plan.settings.recompute
        is_used = plan is not None and self._recompute.mode != "none"
        self._blocks = list(plan_units(module, plan.settings.zero).blocks.values()) if plan and is_used else []
        shapes: dict[int, torch.Tensor] = {}
        self._shapes: dict[str, torch.Tensor] = {}
        with plain_calls():
            for name, each in module.named_parameters(remove_duplicate=False):
                self._shapes[name] = shapes.setdefault(id(each), _without_memory(each))

    def is_of(self, module: pl.LightningModule) -> bool:
        """Return whether it is this module that is remembered."""
        return module is self._module

    def flops(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> Flops:
        """Return the operations of a batch's forward and backward pass; nothing of the run is changed or waited for.

        Args:
            trainer: that trains the module, which is by now in whatever form.
            batch: as training_step gets it.
            batch_idx: likewise.

        Raises:
            UnsupportedError: the step cannot be looked at, with the reason.
        """
        device, module = trainer.strategy.root_device, self._module
        if not module.automatic_optimization:
            raise UnsupportedError("with manual optimisation, training_step takes steps of its own")
        before = Snapshot.take(device)
        counter = CountFlops()
        try:
            with ExitStack() as stack:
                enter = stack.enter_context
                enter(self._pristine.as_before())
                enter(calls_unseen(module))
                enter(_eager())
                buffers = enter(buffers_apart(module, device=device))
                enter(self._without_values(Foreign(may_change=buffers.values()), device=device))
                enter(attributes_kept(module))
                enter(_alone(module))
                enter(_recomputing(self._blocks, self._recompute))
                enter(trainer.precision_plugin.train_step_context())
                enter(torch.enable_grad())
                enter(counter)
                loss = _loss_of(_step(module, batch, batch_idx))
                counter.in_backward = True
                loss.backward()
        except UnsupportedError:
            raise
        except NeedsValues as error:
            raise UnsupportedError(
                "it reads a value that depends on parameters, as .item() and branches do, and none is there when it is looked at"
            ) from error
        except Exception as error:  # whatever the user's code and torch raise where tensors have no values
            raise UnsupportedError(f"{type(error).__name__}: {error}") from error
        finally:
            before.restore()
        return counter.counted

    @contextmanager
    def _without_values(self, mode: Foreign, *, device: torch.device) -> Iterator[None]:
        """Put whole tensors without values in the place of parameters, of which this rank may hold a part, or none."""
        made: dict[int, nn.Parameter] = {}
        held: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            shape = self._shapes[name]
            if id(shape) not in made:
                made[id(shape)] = nn.Parameter(mode.like(shape, device=device), requires_grad=parameter.requires_grad)
            owner, _, key = name.rpartition(".")
            held.append((self._module.get_submodule(owner), key, parameter, made[id(shape)]))
        try:
            for owner_module, key, _, stand_in in held:
                setattr(owner_module, key, stand_in)
            yield
        finally:
            for owner_module, key, parameter, _ in held:
                setattr(owner_module, key, parameter)


class FlopsOfBatches:
    """Counts the operations of the batches of a step, looking once at each form of batch.

    Args:
        look: at the module; None: it never was whole here.
        given: returns the operations of a batch, where the user knows better; None: they are counted.
    """

    def __init__(self, look: Look | None, *, given: Callable[[Any], float] | None) -> None:
        self._look, self._given = look, given
        self._forms: dict[tuple[Any, ...], Flops] = {}
        self._step: Flops | None = Flops()
        self._is_unknown = False

    def count(self, trainer: pl.Trainer, batch: Any, batch_idx: int, *, around: Any) -> None:
        """Add a batch to the step.

        Args:
            trainer: that trains the module.
            batch: as training_step gets it.
            batch_idx: likewise.
            around: a clock, which leaves the time of a look out.
        """
        if self._step is None or self._is_unknown:
            self._step = None
        elif self._given is not None:
            self._step += Flops(model=float(self._given(batch)))
        else:
            form = form_of(batch)
            if form not in self._forms and (len(self._forms) < MAX_FORMS or not self._is_near(form)):
                around.begin("pause")
                self._forms[form] = self._first(trainer, batch, batch_idx)
                around.begin("between")
            self._step = None if self._is_unknown else self._step + self._of(form)

    def take(self) -> Flops | None:
        """Return the operations of the step, and begin the next; None where they are not known."""
        step, self._step = self._step, Flops()
        return step

    def _first(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> Flops:
        try:
            if self._look is None:
                raise UnsupportedError(f"{type(trainer.strategy).__name__} may hold the module in parts")
            counted = self._look.flops(trainer, batch, batch_idx)
        except UnsupportedError as error:
            self._say(str(error))
            return Flops()
        if not counted.model:
            self._say("it has no matrix products, convolutions or attention")
        return counted

    def _of(self, form: tuple[Any, ...]) -> Flops:
        """Return the operations of a form; beyond the first ones, by the size of its tensors from the nearest one."""
        if form in self._forms:
            return self._forms[form]
        nearest = self._nearest(form)
        return self._forms[nearest] * (_elements(form) / max(1, _elements(nearest)))

    def _nearest(self, form: tuple[Any, ...]) -> tuple[Any, ...]:
        return min(self._forms, key=lambda known: abs(_elements(known) - _elements(form)))

    def _is_near(self, form: tuple[Any, ...]) -> bool:
        known = _elements(self._nearest(form))
        return abs(known - _elements(form)) <= NEAR * known

    def _say(self, why: str) -> None:
        self._is_unknown = True
        rank_zero_warn(
            f"The floating-point operations of training_step are not known, and there is no MFU: {why}. Give them, forwards and "
            "backwards, of a batch: ThroughputMonitor(flops=lambda batch: ...)."
        )


def _elements(form: tuple[Any, ...]) -> int:
    return sum(math.prod(shape) for shape, _ in form)


def form_of(batch: Any) -> tuple[Any, ...]:
    """Return what batches of equal work have alike: the shapes and dtypes of their tensors."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_in(batch))


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def _step(module: pl.LightningModule, batch: Any, batch_idx: int) -> Any:
    # The class's own: what a strategy has put in its place gathers parameters, which are not there.
    step = type(module).training_step
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):  # as Lightning asks
        return step(module, batch, batch_idx)
    return step(module, batch)


def _loss_of(output: Any) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise UnsupportedError(f"training_step returned {type(loss).__name__} instead of a loss")
    return loss


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Let a module log nothing, count in no metric, and normalise its batch without asking other ranks, for a while."""
    new: list[tuple[nn.Module, dict[str, Any]]] = []
    for child in module.modules():
        if isinstance(child, pl.LightningModule):
            new.append((child, dict.fromkeys(_TELLING, _nothing)))
        elif isinstance(child, Metric):
            new.append((child, dict.fromkeys(("forward", "update", "compute"), functools.partial(_zero, child))))
        elif isinstance(child, nn.SyncBatchNorm):
            new.append((child, {"forward": functools.partial(_BatchNorm.forward, child)}))
    held = [(child, {name: vars(child)[name] for name in names if name in vars(child)}) for child, names in new]
    for child, attributes in new:
        vars(child).update(attributes)
    try:
        yield
    finally:
        for (child, attributes), (_, before) in zip(new, held, strict=True):
            for name in attributes:
                vars(child).pop(name, None)
            vars(child).update(before)


@contextmanager
def _recomputing(blocks: Sequence[nn.Module], setting: Recompute) -> Iterator[None]:
    """Let blocks compute their activations again, for a while; they do not do so before."""
    held = [(block, vars(block).get("forward")) for block in blocks]
    recompute_blocks(blocks, setting)
    try:
        yield
    finally:
        for block, forward in held:
            vars(block).pop("forward", None)
            if forward is not None:
                vars(block)["forward"] = forward


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(metric: Metric, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros((), device=metric.device)


@contextmanager
def _eager() -> Iterator[None]:
    """Let what is compiled run as it is written; without the compiler where nobody has asked for it."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
