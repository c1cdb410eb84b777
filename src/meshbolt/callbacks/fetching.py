"""How long a training loop waits for its next batch, and when it has updated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from lightning.pytorch.profilers import Profiler

_LISTENERS = "_meshbolt_listeners"
# What a Trainer tells its profiler of: the loader's next batch, and its way to the device.
_ACTIONS = (".train_dataloader_next", ".batch_to_device")
# And, under manual optimisation, of each step of an optimizer.
_UPDATE = "optimizer_step"


class FetchTimer:
    """Adds up the time for which a Trainer's loop gets batches; validation's are left out by whoever takes the time.

    Args:
        begins: is called when it begins to get one.
        ends: is called when the batch is there.
        updated: is called after each step of an optimizer under manual optimisation.

    Attributes:
        under_way: whether it gets one now.
    """

    def __init__(
        self,
        *,
        begins: Callable[[], None] | None = None,
        ends: Callable[[], None] | None = None,
        updated: Callable[[], None] | None = None,
    ) -> None:
        self._begins, self._ends, self._updated = begins, ends, updated
        self.under_way = False
        self._seconds, self._since = 0.0, 0.0

    def take(self) -> float:
        """Return the seconds since it was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def listening(self, profiler: Profiler) -> Iterator[None]:
        """Listen to what a Trainer tells its profiler, for a while.

        Args:
            profiler: the Trainer's; it is told everything, as before.
        """
        listeners: list[FetchTimer] = vars(profiler).setdefault(_LISTENERS, [])
        if not listeners:
            _let_listen(profiler, listeners)
        listeners.append(self)
        try:
            yield
        finally:
            listeners.remove(self)
            if not listeners:
                for name in ("start", "stop", _LISTENERS):
                    delattr(profiler, name)

    def begin(self) -> None:
        """Note that it begins to get a batch."""
        self._since, self.under_way = perf_counter(), True
        if self._begins is not None:
            self._begins()

    def end(self) -> None:
        """Note that the batch is there."""
        self._seconds += perf_counter() - self._since
        self.under_way = False
        if self._ends is not None:
            self._ends()

    def update(self) -> None:
        """Note that parameters were updated."""
        if self._updated is not None:
            self._updated()


def _let_listen(profiler: Profiler, listeners: list[FetchTimer]) -> None:
    """Replace a profiler's methods, so that listeners hear of batches and updates; several come and go in any order."""
    starts, stops = profiler.start, profiler.stop

    def start(action_name: str) -> None:
        starts(action_name)
        if action_name.endswith(_ACTIONS):
            for each in listeners:
                each.begin()

    def stop(action_name: str) -> None:
        if action_name.endswith(_ACTIONS):
            for each in listeners:
                each.end()
        stops(action_name)
        for each in listeners if action_name == _UPDATE else ():
            each.update()

    vars(profiler).update(start=start, stop=stop)
