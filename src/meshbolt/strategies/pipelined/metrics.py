"""torchmetrics objects where only the rank of the last stage updates them, once per microbatch.

Outside of steps every rank may ask for `compute()`, as Lightning does at the end of an epoch: the rank of the last stage
computes, and tells the others (`share_metrics`). What a metric returns for a batch, which is logged on_step, is computed over all
of its microbatches (`WholeBatch`). An object is updated once per microbatch: that changes nothing for what is a sum, a maximum or
a concatenation over samples, as nearly all metrics are. One that counts its updates, such as `wrappers.Running`, counts
microbatches; and what torchmetrics decides by looking at all that an update is given, whether predictions are logits (some of
them are outside of 0 to 1), it decides for each microbatch: give it probabilities.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, MultitaskWrapper

from meshbolt.collectives import agree_on_error
from meshbolt.strategies.gathering import GatherOver
from meshbolt.strategies.pipelined.logs import Logged, MetricAt, attributes_replaced
from meshbolt.strategies.pipelined.results import detached, map_tensors, placed

_RETURN_MAPPINGS = (BootStrapper, ClasswiseWrapper, MinMaxMetric, MultitaskWrapper)


def share_metrics(
    module: nn.Module,
    *,
    group: dist.ProcessGroup,
    source: int,
    is_in_step: Callable[[], bool],
    samples_group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Let every rank ask the metrics of a module for their values, which one of them knows.

    `compute()` of each then is a collective: the source computes, together with the ranks that its metrics sync with, and the
    others get its value, or raise its error. Metrics that a module gets later are not covered: call it again, which replaces what
    was there.

    Args:
        module: whose metrics; the same on every rank of the group.
        group: the ranks that share a batch, one for each stage; for objects on the CPU.
        source: the rank in the group that updates.
        is_in_step: whether a step is running, in which only the source may be: then its own values count.
        samples_group: over which metrics sync that were given neither a process group nor a function to sync; without it, as
            torchmetrics does, over all ranks, of which most would not come.

    Returns:
        What makes the metrics as they were.
    """
    sharing = _Sharing(group, source, is_in_step)
    held: list[tuple[Metric, dict[str, Any]]] = []
    for metric in _metrics_of(module).values():
        plain = getattr(metric.compute, "shares", metric.compute)
        sync = None if isinstance(metric.dist_sync_fn, GatherOver) else metric.dist_sync_fn
        held.append((metric, {"compute": plain, "dist_sync_fn": sync}))
        vars(metric)["compute"] = sharing.compute_of(metric, plain)
        is_free = samples_group is not None and metric.process_group is None and sync is None
        vars(metric)["dist_sync_fn"] = GatherOver(samples_group) if is_free else sync

    def undo() -> None:
        for metric, attributes in held:
            vars(metric).update(attributes)

    return undo


class WholeBatch:
    """What metrics return for a batch whose microbatches they are called with one after another.

    Beside each metric that is called stands a copy without a past, which is updated with the same arguments; parameters of a
    metric, if it has a network, are not copied.

    Example:
        >>> whole = WholeBatch(module)
        >>> with whole.watching():  # while the steps of all microbatches run
        ...     module.training_step(microbatch, 0)
        >>> logged = whole.complete(combine(...))
    """

    def __init__(self, module: nn.Module) -> None:
        """Look for the metrics of a module.

        Args:
            module: whose metrics; those that it gets later are not watched.
        """
        self._module = module
        self._metrics = _metrics_of(module)
        self._copies: dict[str, Metric] = {}
        self._called: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the calls of metrics while a microbatch's step runs, or those of all microbatches."""
        handles = [
            metric.register_forward_hook(self._following(path, metric), with_kwargs=True)
            for path, metric in self._metrics.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def complete(self, logged: Sequence[Logged]) -> list[Logged]:
        """Return what was combined with the values of metrics over the whole batch, and begin a new batch.

        Args:
            logged: combined; what is not a metric, or is not logged on_step, stays as it is.
        """
        try:
            return [self._completed(each) for each in logged]
        finally:
            for path in self._called:
                self._copies[path].reset()
            self._called.clear()

    def _completed(self, logged: Logged) -> Logged:
        place = logged.value
        if not isinstance(place, MetricAt) or place.path not in self._called or place.forward_value is None:
            return logged
        on_step = logged.settings.get("on_step")
        if not (self._module.training if on_step is None else on_step):
            return logged
        value = detached(self._copies[place.path].compute())
        return Logged(logged.name, MetricAt(place.path, value), logged.settings)

    def _following(self, path: str, followed: Metric) -> Callable[..., None]:
        # A function, which copies of a metric share: copying a method would copy all that it belongs to.
        def follow(metric: nn.Module, args: Any, kwargs: Any, _value: Any) -> None:
            if metric is not followed:  # a copy that the step made
                return
            if path not in self._copies:
                self._copies[path] = _without_past(followed)
            self._called.add(path)
            self._copies[path].to(followed.device).update(*args, **kwargs)

        return follow


@contextmanager
def quiet_metrics(module: nn.Module) -> Iterator[None]:
    """Have the metrics of a module do nothing and return a zero, while a step is looked at with tensors without values.

    Their states, and the groups of a collection, stay as they are.

    Args:
        module: whose metrics.
    """
    new: list[tuple[nn.Module, dict[str, Any]]] = []
    for child in module.modules():
        if isinstance(child, Metric):
            zero = functools.partial(_zero_of, child)
            new.append((child, {"update": zero, "reset": _nothing, "forward": zero, "compute": zero}))
        elif isinstance(child, MetricCollection):  # which asks its metrics for all else
            new.append((child, {"update": _nothing, "reset": _nothing}))
    with attributes_replaced(new):
        yield


def _metrics_of(module: nn.Module) -> dict[str, Metric]:
    return {path: child for path, child in module.named_modules() if isinstance(child, Metric)}


class _Sharing:
    """How the metrics of a module are computed: once, for all ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, source: int, is_in_step: Callable[[], bool]) -> None:
        self._group = group
        self._source = source
        self._is_in_step = is_in_step
        self._is_computing = False

    def compute_of(self, metric: Metric, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return what takes the place of a metric's `compute`."""

        @functools.wraps(plain)
        def compute(*args: Any, **kwargs: Any) -> Any:
            # A metric inside of another is computed with it, where that is.
            if self._is_in_step() or self._is_computing:
                return plain(*args, **kwargs)
            return self._shared(functools.partial(plain, *args, **kwargs), metric)

        vars(compute)["shares"] = plain
        return compute

    def _shared(self, plain: Callable[[], Any], metric: Metric) -> Any:
        found: list[Any] = []
        message = [b""]

        def ask() -> None:
            if self._group.rank() == self._source:
                found.append(self._alone(plain))
                message[0] = pickle.dumps(detached(found[0]))

        agree_on_error(ask, group=self._group)
        dist.broadcast_object_list(message, group=self._group, group_src=self._source)
        return found[0] if found else placed(pickle.loads(message[0]), metric.device)

    def _alone(self, plain: Callable[[], Any]) -> Any:
        self._is_computing = True
        try:
            return plain()
        finally:
            self._is_computing = False


def _without_past(metric: Metric) -> Metric:
    """Return a copy of a metric as it is before its first update, which syncs only where each call of the metric does."""
    shared: list[Any] = [*metric.parameters(), *metric.buffers()]
    memo: dict[int, Any] = {}
    for child in (child for child in metric.modules() if isinstance(child, Metric)):
        shared += [child.process_group] if child.process_group is not None else []
        # The hooks that watch it hold the whole module.
        memo |= {id(vars(child)[key]): OrderedDict() for key in vars(child) if key.startswith("_forward_hooks")}
        # What it has seen may have a graph, which cannot be copied.
        held = (child.metric_state, child._forward_cache, child._computed)
        map_tensors(functools.partial(_note_detached, memo), held)
    made = copy.deepcopy(metric, {**memo, **{id(each): each for each in shared}})
    for copied in made.modules():
        if isinstance(copied, Metric) and not copied.dist_sync_on_step:
            vars(copied)["distributed_available_fn"] = _never
    made.reset()
    return made


def _note_detached(memo: dict[int, Any], tensor: torch.Tensor) -> None:
    memo[id(tensor)] = tensor.detach()


def _never() -> bool:
    return False


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing."""


class _Zeros(dict[str, torch.Tensor]):
    """What a metric that returns a mapping returns while it is quiet: a zero for whatever is asked."""

    def __init__(self, zero: torch.Tensor) -> None:
        super().__init__()
        self._zero = zero

    def __missing__(self, key: str) -> torch.Tensor:
        return self._zero


def _zero_of(metric: Metric, *_args: Any, **_kwargs: Any) -> Any:
    zero = torch.zeros((), device=metric.device)
    return _Zeros(zero) if isinstance(metric, _RETURN_MAPPINGS) else zero
