"""An optimizer of a rank whose state lies outside of the model, and whose steps run there, beside what else the rank does.

    offloaded = OffloadedOptimizer(optimizer, units={"layers.0": [...], "layers.1": [...]})
    ...
    offloaded.submit(parameters_of_the_unit)  # as soon as their gradients are final; returns at once
    offloaded.step()                          # all others, the optimizer's own hooks, and waits

A step computes what the optimizer's own step does. Adam, AdamW, SGD and Adagrad run torch's fused kernels, on the same elements
with the same bits as `fused=True` on the parameters themselves; other elementwise optimizers run an instance of their own class.
Parameters without a gradient are left alone.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import local_tensor
from meshbolt.errors import ConfigError, MeshboltError
from meshbolt.offload.book import Book
from meshbolt.offload.columns import stored_columns
from meshbolt.offload.entries import MASTER, Entry
from meshbolt.offload.job import Job, scale_gradients
from meshbolt.offload.layout import CHUNK_BYTES, Layout, Piece, StateChunk
from meshbolt.offload.line import UpdateLine
from meshbolt.offload.parameters import ParameterFile
from meshbolt.offload.passing import Counters, Order, Pass, traffic_of
from meshbolt.offload.planning import Places
from meshbolt.offload.rules import Rule, rule_of
from meshbolt.offload.tiers import MemoryTier, Tier
from meshbolt.offload.to_file import HostToFile, ways_between
from meshbolt.offload.traffic import Observer, OffloadTraffic
from meshbolt.offload.transfers import Visit


class OffloadedOptimizer:
    """The state and the steps of one optimizer.

    Attributes:
        optimizer: the user's; its `state` shows views of what lies here, see `book.py`.
        layout: what lies where, in bytes.
        counters: what was done.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        units: Mapping[str, Sequence[nn.Parameter]],
        fraction: float = 1.0,
        make_tier: Callable[[Layout], Tier] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        threads: int | None = None,
        pin_memory: bool = True,
        full_precision: bool = True,
        parameters: ParameterFile | None = None,
    ) -> None:
        """Make room for the state; it takes memory when it is first written to.

        Args:
            optimizer: elementwise, which the caller has made sure of, on the rank's parameters, plain or DTensors.
            units: its parameters, by the unit they are updated with, in the order of the forward pass. Those that need no
                gradient are left out, and included when they have one.
            fraction: of the state's bytes leaves the parameters' device; the rest, whole parameters, stays.
            make_tier: makes the place for what leaves, given what is laid out; None: host memory.
            chunk_bytes: the most that is updated at once.
            threads: that update; None: as many as torch's operations use.
            pin_memory: lock host memory in its place if the parameters are on a GPU.
            full_precision: 16-bit parameters are updated in float32, in a copy; False: in their own dtype.
            parameters: the file in which shards lie, of which the state has copies; None: they lie in memory.

        Raises:
            ConfigError: the fraction is outside of [0, 1], or parameters are on several GPUs.
            UnsupportedError: a setting of the optimizer, or a parameter, does not go with this.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"A fraction of {fraction} of an optimizer's state was to leave the device; give 0 to 1.")
        self.optimizer, self.counters = optimizer, Counters()
        self.layout = Layout(chunk_bytes=chunk_bytes, in_pages=parameters is not None)
        self._rule: Rule = rule_of(optimizer)
        # Of parameters that lie on the host, some layers' few may lie on the GPU all the same.
        self._device, hosts = _device_of(units)
        places = Places(fraction=fraction, full_precision=full_precision, hosts_others=hosts, parameters=parameters)
        self._book = Book(optimizer, rule=self._rule, layout=self.layout, places=places)
        is_far = self._device.type == "cuda" and not hosts
        leaves = MemoryTier(pin=is_far and pin_memory) if make_tier is None else make_tier(self.layout)
        self._tiers: dict[bool, Tier] = {True: MemoryTier(self._device), False: leaves}
        self._transfers = ways_between(self._device, is_far=is_far, parameters=parameters)
        self._book.use(self._tiers, self._transfers)
        self._line = UpdateLine(threads or torch.get_num_threads())
        self._orders = {True: Order(), False: Order()}
        self._jobs: deque[Job] = deque()
        self._futures: list[Future[None]] = []
        # By number, how many pieces of parameters wait for their update.
        self._left: Counter[int] = Counter()
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._is_reported = False
        self._submitted: set[nn.Parameter] = set()
        self._include(units)

    # Steps ------------------------------------------------------------------------------------------------------------

    def submit(
        self,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        scale: float | torch.Tensor | None = None,
        found_inf: torch.Tensor | bool = False,
        ready: torch.cuda.Event | None = None,
    ) -> None:
        """Begin to update parameters whose gradients are final, and return.

        The optimizer's settings (learning rates, ...) are those of this moment. Gradients stay as they are, and parameters are
        not used, until `wait`; gradients may be taken off the parameters.

        Args:
            parameters: of the optimizer, each once a step; those without a gradient are left alone. None: all of the optimizer.
            scale: gradients are multiplied by it in their own place, for clipping or a loss scale; a number or a scalar.
            found_inf: whether to leave everything as it is; a scalar on a GPU is not waited for here.
            ready: an event after which the gradients are there; None: all that was put on the caller's stream so far.

        Raises:
            UnsupportedError: a gradient is sparse, or a setting does not go with this.
            MeshboltError: an earlier update has failed; or that failure itself, if nobody has seen it yet.
        """
        self._raise_failure()
        gradients = self._gradients(self._all() if parameters is None else parameters)
        if not gradients:
            return
        on_gpu = self._device.type == "cuda"
        if on_gpu and scale is not None:
            scale_gradients((gradient for gradient, _ in gradients.values()), scale)
            scale = None
        if on_gpu and ready is None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        job = Job(
            gradients=gradients,
            settings=self._book.settings(),
            scale=None if scale is None else float(scale),
            found_inf=found_inf,
            ready=ready,
        )
        with self._change:
            for number in gradients:
                self._left[number] += self.layout.pieces_of(number)
            self._jobs.append(job)
        self._futures = [future for future in self._futures if not future.done()]
        self._futures.append(self._line.submit(self._work_off))

    @property
    def has_submitted(self) -> bool:
        """Whether the update of some parameters has begun before the step."""
        return bool(self._submitted)

    def is_updating(self, parameters: Iterable[nn.Parameter], *, place: tuple[int, int]) -> bool:
        """Return whether updates of some parameters, at a place in the file of shards, have been submitted and are not over."""
        leaving = self._transfers[False]
        if isinstance(leaving, HostToFile) and leaving.is_writing(*place):
            return True
        with self._change:
            return any(self._left[self._number(parameter)] for parameter in parameters)

    def wait(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Wait for updates; afterwards parameters may be used.

        Args:
            parameters: that are needed, on any stream. None: all that were submitted, which may be used on the caller's stream
                and on those that wait for it.

        Raises:
            BaseException: what an update raised; the next time, a MeshboltError.
        """
        with self.counters.waiting("other" if parameters is None else "forward"):
            self._wait(parameters)

    def step(self, closure: Callable[[], Any] | None = None, *, waits: bool = True) -> Any:
        """Take the optimizer's step: call its hooks, and update what was not submitted since the last step.

        Args:
            closure: computes gradients, and returns a loss.
            waits: until all is updated; False: the caller calls `wait` before parameters or state are used.

        Returns:
            What the closure returned; None without one.
        """

        def update_instead() -> Any:
            loss = None if closure is None else closure()
            rest = [p for p in self._all() if p not in self._submitted]
            if waits:
                with self.counters.waiting("step"), self._line.here(self._device.type == "cpu"):
                    self.submit(rest, **self._scaling())
                    self._wait(None)
            else:
                self.submit(rest, **self._scaling())
            hidden.update((p, p.grad) for p in self._all() if p.grad is not None)
            for parameter in hidden:
                parameter.grad = None
            return loss

        hidden: dict[nn.Parameter, torch.Tensor | None] = {}
        try:
            # Hooks and schedulers watch the optimizer's own step. It finds no gradients, and does nothing.
            return self.optimizer.step(update_instead)
        finally:
            self._submitted.clear()
            for parameter, gradient in hidden.items():
                parameter.grad = gradient

    def traffic(self) -> OffloadTraffic:
        """Return what was moved so far, and how long the caller waited."""
        return traffic_of(self.counters, tiers=self._tiers.values(), transfers=self._transfers.values())

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody what is done, and when, in this thread and in others.

        Args:
            observer: who; None: nobody any more.
        """
        self.counters.observer = observer
        self._tiers[False].observe(observer)
        for transfers in dict.fromkeys(self._transfers.values()):
            transfers.observe(observer)

    # State ------------------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Take what somebody has put into the optimizer's state now, which the next update would do; it frees their memory."""
        self.wait()
        self._book.take_over(self._book.entries, settings=self._book.settings())
        self._book.take_over_others()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return what the optimizer keeps for a parameter: as it shows it, or copied from where it lies; empty before a step.

        Args:
            parameter: of the optimizer.
        """
        self.wait()
        entry = self._book.entry_of(parameter)
        if entry is not None:
            self._book.take_over([entry], settings=self._book.settings())
        shown = dict(self._book.state.get(parameter) or {})
        if entry is None or not entry.started or entry.views:
            return shown
        return {**shown, **self._book.read(entry, _state_names(entry))}

    @contextmanager
    def state_shown(self) -> Iterator[None]:
        """Show all of the optimizer's state in its `state`, wherever it lies; what is changed or put there is kept.

        Where it lies in memory this is so all the time. Elsewhere tensors stand there that are read when they are used
        (`columns.py`); they can be read after this too, and then have the values of that moment.
        """
        self.take_over()
        entries = [entry for entry in self._book.entries if entry.started and not entry.views]
        for entry in entries:
            self._book.state[entry.parameter].update(stored_columns(entry, self._book, settle=self.wait))
        try:
            yield
        finally:
            self.take_over()
            for entry in entries:
                state = self._book.state.get(entry.parameter, {})
                for name in [name for name, value in entry.stored.items() if state.get(name) is value]:
                    del state[name]

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return a copy of a parameter as it is updated, with all its bits; None where that is the parameter itself.

        Args:
            parameter: of the optimizer.
        """
        self.wait()
        entry = self._book.entry_of(parameter)
        if entry is None or not entry.has_master:
            return None
        return self._book.read(entry, [MASTER])[MASTER]

    def load_master(self, parameter: nn.Parameter, values: torch.Tensor) -> None:
        """Set a parameter, with all the bits it is updated with.

        Args:
            parameter: of the optimizer.
            values: of its shape, plain or a DTensor; rounded to the parameter's dtype in the model.
        """
        self.wait()
        entry = self._book.entry_of(parameter)
        if entry is not None and entry.has_master:
            self._book.put_master(entry, values)
        else:
            with torch.no_grad():
                local_tensor(parameter).copy_(local_tensor(values))

    @property
    def away_bytes(self) -> int:
        """Of the state that lies elsewhere than on the parameters' device."""
        return sum(entry.slot.num_bytes for entry in self._book.entries if not entry.slot.stays)

    def bring_back(self, budget_bytes: int) -> int:
        """Move state to the parameters' device, of as many whole parameters as fit, the first ones of the forward pass.

        Args:
            budget_bytes: the most that it takes there.

        Returns:
            The bytes that it takes there now.
        """
        self.take_over()
        return self._book.bring_back(budget_bytes)

    def close(self) -> None:
        """Wait for updates, end the threads and give all memory and files back; the state is lost.

        Raises:
            BaseException: what an update raised, if nobody has seen it yet.
        """
        self._line.close()
        for transfers in dict.fromkeys(self._transfers.values()):
            transfers.close()
        for tier in self._tiers.values():
            tier.close()
        if not self._is_reported and self._error is not None:
            self._raise_failure()

    # Inside -----------------------------------------------------------------------------------------------------------

    def _include(self, units: Mapping[str, Sequence[nn.Parameter]]) -> None:
        needed = {unit: [p for p in parameters if p.requires_grad] for unit, parameters in units.items()}
        self._book.include(needed)

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _wait(self, parameters: Iterable[nn.Parameter] | None) -> None:
        if parameters is None:
            for future in self._futures:
                future.result()
            self._futures.clear()
        else:
            numbers = {self._number(parameter) for parameter in parameters}
            with self._change:
                self._change.wait_for(lambda: self._error is not None or not any(self._left[n] for n in numbers))
        self._raise_failure()
        for transfers in dict.fromkeys(self._transfers.values()):
            # Units are gathered on streams of their own, which have waited for the caller's before the first of them.
            transfers.join() if parameters is None else transfers.settle()

    def _number(self, parameter: nn.Parameter) -> int:
        entry = self._book.entry_of(parameter)
        return -1 if entry is None else entry.number

    def _scaling(self) -> dict[str, Any]:
        """Return what torch's GradScaler leaves to optimizers with a fused step."""
        inverse, found_inf = getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)
        return {
            "scale": None if inverse is None else 1.0 / inverse,
            "found_inf": False if found_inf is None else found_inf,
        }

    def _gradients(self, parameters: Iterable[nn.Parameter]) -> dict[int, tuple[torch.Tensor, int]]:
        groups = self._book.groups()
        own = [p for p in parameters if p.grad is not None and p in groups]
        unknown = [p for p in own if self._book.entry_of(p) is None]
        if unknown:
            self.wait()  # nothing is visited meanwhile
            self._book.include({"added": unknown})
        found = {}
        for parameter in own:
            entry, gradient = self._book.entry_of(parameter), parameter.grad
            if entry is not None and gradient is not None:
                found[entry.number] = entry.flat_gradient(gradient), groups[parameter]
        self._submitted.update(own)
        return found

    def _raise_failure(self) -> None:
        if self._error is None:
            return
        if not self._is_reported:
            self._is_reported = True
            raise self._error
        raise MeshboltError(
            f"{type(self.optimizer).__name__} was to go on after an update of it had failed, which left some of its parameters "
            f"updated and others not. Start again from the last checkpoint. The failure was: {self._error!r}"
        ) from self._error

    def _work_off(self) -> None:
        """Work off one job in the thread of updates: the last one, whose parameters the next forward pass needs first."""
        if self._error is not None:
            return
        job = self._next_job()
        try:
            if job.is_skipped():
                self._forget(job.gradients)
            else:
                with self.counters.working():
                    self._update(job)
            self._rest()
        except BaseException as error:  # another thread is told
            with self._change:
                self._error = error
                self._change.notify_all()

    def _rest(self) -> None:
        """Bring what is on its way to its end where no job waits, which has not written anything meanwhile."""
        leaving = self._transfers[False]
        if isinstance(leaving, HostToFile) and not self._jobs:
            leaving.rest()

    def _next_job(self) -> Job:
        with self._change:
            waiting = Counter(number for job in self._jobs for number in job.gradients)
            is_repeated = any(count > 1 for count in waiting.values())
            return self._jobs.popleft() if is_repeated else self._jobs.pop()

    def _forget(self, numbers: Iterable[int]) -> None:
        """Note that parameters are not updated after all."""
        with self._change:
            for number in numbers:
                self._left[number] -= self.layout.pieces_of(number)
            self._change.notify_all()

    def _done(self, visit: Visit) -> None:
        """Note that a chunk is updated."""
        with self._change:
            for piece in visit.pieces:
                self._left[piece.slot] -= 1
            self._change.notify_all()

    @torch.no_grad()
    def _update(self, job: Job) -> None:
        self._require_columns(job)
        live = self._book.begin(job.gradients, job.settings, ready=job.ready)
        visits = [self._visit(chunk, job, live) for chunk in self.layout.chunks_of(list(live))]
        for stays in (True, False):
            own = {visit.chunk.number: visit for visit in visits if visit.chunk.stays is stays}
            if own:
                self._pass(own, stays=stays)
        self._book.end([each.entry for each in live.values()])

    def _pass(self, visits: Mapping[int, Visit], *, stays: bool) -> None:
        then = self._orders[stays].after([visit.chunk for visit in visits.values()])
        way = Pass(
            visits,
            rule=self._rule,
            threads=self._line.threads,
            transfers=self._transfers[stays],
            done=self._done,
            then=then,
        )
        way.run(self._tiers[stays], self.counters)

    @staticmethod
    def _visit(chunk: StateChunk, job: Job, live: Mapping[int, Any]) -> Visit:
        pieces: list[Piece] = [piece for piece in chunk.pieces if piece.slot in live]
        return Visit(chunk=chunk, live=live, pieces=pieces, settings=job.settings, scale=job.scale, ready=job.ready)

    def _require_columns(self, job: Job) -> None:
        needed = {number: set(self._rule.columns(settings)) for number, settings in job.settings.items()}
        for number, (_, group) in job.gradients.items():
            missing = needed[group] - set(self.layout.slots[number].columns)
            if missing:
                raise ConfigError(
                    f"A group of {type(self.optimizer).__name__} needs {sorted(missing)} for its parameters since its settings "
                    "were changed, and no room was made for that when training began. Set momentum, amsgrad and the like before."
                )


def _state_names(entry: Entry) -> list[str]:
    return [name for name in entry.slot.columns if name != MASTER]


def _device_of(units: Mapping[str, Sequence[nn.Parameter]]) -> tuple[torch.device, bool]:
    """Return the device of parameters, and whether others lie on the host beside it."""
    every = {local_tensor(p).device for parameters in units.values() for p in parameters}
    devices = {device for device in every if device.type != "cpu"}
    if len(devices) > 1:
        raise ConfigError(
            f"An optimizer whose state leaves the model has parameters on {sorted(map(str, devices))}; give it those "
            "of one device."
        )
    hosts = bool(devices) and any(device.type == "cpu" for device in every)
    return devices.pop() if devices else torch.device("cpu"), hosts
