"""Optimizers whose state lies in host memory or in a file, and whose steps are taken there.

A step may begin early and end late: a unit is updated as soon as its gradients are reduced, under the rest of the backward pass,
and waited for only when it is gathered again. Whoever asks for that makes sure that nobody looks at gradients, parameters or
optimizers in between; `settle` and everything that stands on it (checkpoints, whole weights, averages) waits by itself.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt import compat
from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.engine.hosted import HostedParameters
from meshbolt.engine.optimizer import ELEMENTWISE
from meshbolt.errors import MeshboltError, UnsupportedError
from meshbolt.offload.files import StateFile
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import Layout
from meshbolt.offload.planning import Needs, layout_of, needs_of
from meshbolt.offload.room import Room, check_room, room_of, spare_bytes
from meshbolt.offload.setting import AUTO, NVME, Offload
from meshbolt.offload.tiers import FileTier, Tier
from meshbolt.offload.traffic import Observer, OffloadTraffic
from meshbolt.units import format_bytes

# What is trained in 16 bits without offloading is so with it.
_FULL_PRECISION = False


class OffloadedSteps:
    """The optimizers of one engine.

    Args:
        setting: what lies where.
        units: what gathers parameters, by name, in the order of the forward pass.
        others: parameters that no unit gathers.
        device: this rank's.
        hosted: where parameters lie.
    """

    def __init__(
        self,
        setting: Offload,
        units: Mapping[str, FSDPModule],
        *,
        others: Sequence[nn.Parameter],
        device: torch.device,
        hosted: HostedParameters,
    ) -> None:
        self._hosted = hosted
        if hosted.file is not None:
            hosted.file.is_changing = self._is_changing
        self._setting, self._units, self._others, self._device = setting, units, others, device
        self._needs: dict[int, Needs] = {}
        self._by_optimizer: dict[int, OffloadedOptimizer] = {}
        self._early = self._late = self._is_watched = self._is_told = False
        # From a backward pass that updates on, until the step is taken.
        self._is_stepping = False
        self._due: dict[str, set[nn.Parameter]] = {}
        self._torn: Exception | None = None
        # Optimizers some of whose state is to come back when it is known how much memory training leaves.
        # Of parameters whose updates may go on after their step, until they are waited for.
        self._versions: dict[nn.Parameter, int] = {}
        self._returning: set[int] = set()
        self._neighbours = 1
        self.on_return: Callable[[str], None] = lambda _: None
        """Told what has come back to the device, by name of the optimizer and bytes."""

    # Optimizers -------------------------------------------------------------------------------------------------------

    @property
    def takes_gradients(self) -> bool:
        """Whether updates begin under the backward pass, so that gradients may be gone at its end."""
        return self._early

    def add(self, optimizer: Optimizer) -> None:
        """Make room for an optimizer's state; all ranks of the world together.

        Args:
            optimizer: made on the shards.

        Raises:
            UnsupportedError: its class is not known to be elementwise, or a setting of it does not go with this.
            StorageError: it does not fit, or a file cannot be made.
        """
        rooms: list[Room] = []
        agree_on_error(lambda: rooms.append(self._room(optimizer)))
        every: Sequence[Room] = same_on_all_ranks(rooms[0])[1]
        check_room(every)
        self._neighbours = sum(room.machine == rooms[0].machine for room in every)
        agree_on_error(functools.partial(self._add, optimizer))
        if self._setting.fraction == AUTO and (self._device.type != "cpu" or self._setting.optimizer == NVME):
            self._returning.add(id(optimizer))
        self._needs[id(optimizer)] = rooms[0].needs

    def _room(self, optimizer: Optimizer) -> Room:
        if type(optimizer) not in ELEMENTWISE:
            raise UnsupportedError(
                f"offload={self._setting.optimizer!r} updates an optimizer's state piece by piece, and "
                f"{type(optimizer).__name__} is not known to update each number by itself. Use one of "
                f"{', '.join(sorted(known.__name__ for known in ELEMENTWISE))}, or offload=None."
            )
        in_file = self._setting.optimizer == NVME
        units = self._chosen(optimizer)
        layout = layout_of(
            optimizer,
            units=units,
            fraction=self._fraction,
            full_precision=_FULL_PRECISION,
            parameters=self._hosted.file,
        )
        needs = needs_of(layout, device=self._device, in_file=in_file)
        return room_of(needs, path=self._setting.path if in_file else None)

    def _add(self, optimizer: Optimizer) -> None:
        self._by_optimizer[id(optimizer)] = OffloadedOptimizer(
            optimizer,
            units=self._chosen(optimizer),
            fraction=self._fraction,
            make_tier=self._file if self._setting.optimizer == NVME else None,
            pin_memory=self._setting.pin_memory,
            full_precision=_FULL_PRECISION,
            parameters=self._hosted.file,
        )

    @property
    def _fraction(self) -> float:
        return 1.0 if self._setting.fraction == AUTO else float(self._setting.fraction)

    def _is_changing(self, unit: str) -> bool:
        """Return whether updates of a unit are under way, or anything is being written to the file of shards."""
        parameters = self._parameters(unit)
        place = self._hosted.place_of(unit)
        return any(offloaded.is_updating(parameters, place=place) for offloaded in self._by_optimizer.values())

    def _chosen(self, optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
        """Return the optimizer's parameters by what gathers them."""
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        held = {"others": self._others, **{name: self._parameters(name) for name in self._units}}
        chosen = {name: [p for p in parameters if p in own] for name, parameters in held.items()}
        return {name: parameters for name, parameters in chosen.items() if parameters}

    def needs(self) -> Needs:
        """Return what this rank's optimizers need, all together."""
        each = self._needs.values()
        return Needs(
            host_bytes=sum(needs.host_bytes for needs in each),
            device_bytes=sum(needs.device_bytes for needs in each),
            file_bytes=sum(needs.file_bytes for needs in each),
        )

    def traffic(self) -> OffloadTraffic:
        """Return what this rank has moved so far, and waited for; nothing is waited for."""
        return sum((each.traffic() for each in self._by_optimizer.values()), self._hosted.traffic())

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody what is done, and when; see `OffloadedOptimizer.observe`."""
        for each in self._by_optimizer.values():
            each.observe(observer)
        if self._hosted.file is not None:
            self._hosted.file.observer = observer

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return list(compat.managed_parameters(self._units[name]))

    def _file(self, layout: Layout) -> Tier:
        path, rank = str(self._setting.path), dist.get_rank()
        say = warnings.warn if rank == 0 else _say_nothing
        # Where parameters lie on the host, nothing goes from the pieces of a file to a GPU.
        pins = self._setting.pin_memory and self._device.type == "cuda" and not self._hosted.are_elsewhere

        def make(num_bytes: int) -> StateFile:
            return StateFile(path, num_bytes, name=f"meshbolt-rank{rank}", say=say)

        return FileTier(layout, make, pin=pins)

    def __contains__(self, optimizer: Optimizer) -> bool:
        return id(optimizer) in self._by_optimizer

    def of(self, optimizer: Optimizer) -> OffloadedOptimizer:
        """Return what holds an optimizer's state."""
        return self._by_optimizer[id(optimizer)]

    @contextmanager
    def shown(self, optimizer: Optimizer) -> Iterator[None]:
        """Show in an optimizer's `state` all that is kept, wherever it lies; what is changed or put there inside is kept.

        Args:
            optimizer: any; nothing is done for one that was not added.
        """
        if optimizer not in self:
            yield
            return
        with self.of(optimizer).state_shown():
            yield

    def close(self) -> None:
        """Let go of all optimizers, and give memory and files back."""
        while self._by_optimizer:
            _, offloaded = self._by_optimizer.popitem()
            offloaded.close()
        self._needs.clear()
        self._returning.clear()
        self._torn = None
        self.overlap(early=False, late=False)

    # Steps ------------------------------------------------------------------------------------------------------------

    def overlap(self, *, early: bool, late: bool) -> None:
        """Choose when updates run beside other work; only with one optimizer.

        Args:
            early: a unit's begins when its gradients are reduced.
            late: a step returns before all are done.
        """
        is_alone = len(self._by_optimizer) == 1
        # A hook on shards that lie on the host would make FSDP2 wait for each gradient to come there.
        early = early and not (self._hosted.are_elsewhere and self._device.type != "cpu")
        self._early, self._late = early and is_alone, late and is_alone
        if (self._early or self._late) and not self._is_watched:
            self._is_watched = True
            for name, unit in self._units.items():
                cast("nn.Module", unit).register_forward_pre_hook(self._waiting_for(name), prepend=True)
        if self._early and not self._is_told:
            self._is_told = True
            for name, unit in self._units.items():
                compat.on_reduced_gradient(unit, _weakly(self, name))

    def _waiting_for(self, name: str) -> Callable[..., None]:
        # Whoever calls the module comes by its outermost unit, the first of all.
        others = self._others if name == next(iter(self._units)) else ()
        return compat.without_compiling(lambda *_: self.wait([*self._parameters(name), *others]))

    def before_backward(self, *, reduces: bool) -> None:
        """Prepare a backward pass.

        Args:
            reduces: afterwards gradients are final, and a step follows.
        """
        self._refuse_torn()
        self._is_stepping = False
        if self._early and reduces:
            optimizer = next(iter(self._by_optimizer.values())).optimizer
            # The engine has one of its own, which settles.
            self._is_stepping = compat.step_hooks(optimizer)[0] <= 1
        if self._is_stepping:
            own = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            self._due = {name: own.intersection(self._parameters(name)) for name in self._units}

    def _refuse_torn(self) -> None:
        if self._torn is not None:
            raise MeshboltError(
                "An exception has ended a step in which some parameters had been updated and others not. Start again "
                "from the last checkpoint; with Offload(overlap=False) no update begins before a step."
            ) from self._torn

    def require_whole(self) -> None:
        """Wait for updates, and refuse to go on where one of them has failed or has reached some parameters only.

        Raises:
            BaseException: what an update raised, if nobody has seen it yet; else a MeshboltError.
        """
        for offloaded in self._by_optimizer.values():
            offloaded.wait()
        self._refuse_torn()

    def after_error(self, error: Exception) -> None:
        """Note that a pass was cut short.

        Args:
            error: by which.
        """
        if self._is_stepping and any(offloaded.has_submitted for offloaded in self._by_optimizer.values()):
            self._torn = error
        self._is_stepping = False

    def _arrived(self, name: str, parameter: torch.Tensor) -> None:
        """Update a unit when the last of its gradients is there; those that are never used wait for the step."""
        if not self._is_stepping:
            return
        due = self._due[name]
        due.discard(cast("nn.Parameter", parameter))
        # What user code has changed in gathered parameters is not in the shards yet.
        if not due and not compat.is_gathered(self._units[name]):
            offloaded = next(iter(self._by_optimizer.values()))
            wanted = [parameter for parameter in self._parameters(name) if parameter.requires_grad]
            offloaded.submit(wanted)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Take an optimizer step where the state lies.

        Args:
            optimizer: that was added.
            kwargs: further arguments of its `step`.
        """
        late = self._late and not compat.step_hooks(optimizer)[1]
        has_begun = self._is_stepping and self.of(optimizer).has_submitted
        try:
            with torch.enable_grad():
                result = self.of(optimizer).step(waits=not late, **kwargs)
        except Exception as error:
            self._torn = error if has_begun else self._torn
            raise
        finally:
            self._is_stepping = False
        if id(optimizer) in self._returning:
            self._bring_back(optimizer)
        if late:
            own: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
            # An update changes the version of a plain parameter too.
            is_sharded = [isinstance(p, DTensor) for p in own]
            self._versions = {p: p._version for p, sharded in zip(own, is_sharded, strict=True) if sharded}
        return result

    def _bring_back(self, optimizer: Optimizer) -> None:
        """Move as much state to the device as its memory has left, once a step has shown how much that is."""
        offloaded = self.of(optimizer)
        offloaded.wait()
        if not offloaded.counters.updated_bytes:
            return  # the loss scale was too high
        spare = spare_bytes(self._device, ranks=self._neighbours) // len(self._returning)
        self._returning.discard(id(optimizer))
        moved = offloaded.bring_back(spare)
        rest = offloaded.away_bytes
        self.on_return(
            f"{format_bytes(moved)} of the state of {type(optimizer).__name__} came back to the device, {format_bytes(rest)} "
            f"stayed away: fraction={rest / (moved + rest):.2f}"
            if moved
            else f"the device has no memory left for the state of {type(optimizer).__name__}: fraction=1.0"
        )

    def wait(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Wait for updates.

        Args:
            parameters: that are to be used; None: all, unless a step is being taken.
        """
        if parameters is None and self._is_stepping:
            return
        for offloaded in self._by_optimizer.values():
            offloaded.wait(parameters)
        if self._versions:
            self._refuse_changes(list(self._versions) if parameters is None else parameters)

    def _refuse_changes(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse that the user's step changes parameters whose update may not have been over.

        Raises:
            MeshboltError: it did.
        """
        versions = [(p, self._versions.pop(p, None)) for p in parameters]
        changed = next((p for p, version in versions if version not in (None, p._version)), None)
        if changed is not None:
            self._versions.clear()
            raise MeshboltError(
                f"A sharded parameter of shape {tuple(changed.shape)} was changed in training_step before its layer ran, while "
                "updates of the step before were still under way. Change it in a hook, such as on_train_batch_start, which is "
                "waited for; or use Offload(overlap=False)."
            )


def _weakly(steps: OffloadedSteps, name: str) -> Callable[[torch.Tensor], None]:
    """Return a hook that does not keep its owner alive: torch holds hooks of gradients where Python finds no cycles."""
    owner = weakref.ref(steps)

    def arrived(parameter: torch.Tensor) -> None:
        if (alive := owner()) is not None:
            alive._arrived(name, parameter)

    return arrived


def _say_nothing(_text: str) -> None:
    """Leave it to the first rank."""
