"""What a module logs in steps that run once per microbatch, on the rank of the last stage only: on every rank, as of one step.

`record_logs` notes what a step logs, `combine` puts the notes of all microbatches together, and `replay` calls the module's own
`log` with the result, on every rank. So Lightning's checks, and whatever is kept for loggers, progress bar and callbacks, are
those of a step that ran once.

What is logged becomes, by its `reduce_fx`: for "mean" the mean over microbatches, weighted by their samples; for "sum", "max"
and "min" that of the microbatches. This is what one process logs for means, sums and extremes over samples. A value that is not
linear in the samples, such as the exponential of a loss, is the mean of its values for each microbatch; and a value that counts
batches, logged with "sum", counts microbatches. A name that only some microbatches log is combined over those. A metric object
is no value but a place in the module; `metrics.py` has what it returns for the whole batch. Values have no graph, also those
logged with `enable_graph`.

`batch_size` tells Lightning how much a batch counts in an epoch. `len(x)`, a number of tokens and the like are those of the
microbatch: they are the weights of its mean, and their sum is given. A number that does not come from the microbatch is given as
it is: recognised, in the first batch, by being the same for all, and either the samples of the whole batch, or 1, or the same in
spite of different numbers of samples.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

from meshbolt.compat import tree_leaves
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline import is_foreign
from meshbolt.strategies.pipelined.results import join_results, map_tensors, mean_of, placed

# The functions that Lightning takes beside their names.
_NAMED: dict[Any, str] = {
    torch.mean: "mean",
    torch.sum: "sum",
    torch.max: "max",
    torch.min: "min",
    sum: "sum",
    max: "max",
    min: "min",
}

# Where the metrics of a module were found: looking through all its children takes long, for every microbatch.
_paths: weakref.WeakKeyDictionary[nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class MetricAt:
    """A torchmetrics object that was logged, by its place in the module.

    Attributes:
        path: the module's attribute, as in `named_modules`; None: it is not the module's.
        forward_value: what calling it has returned last, without a graph; None if it was not called.
    """

    path: str | None
    forward_value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Logged:
    """One call of `LightningModule.log`; it can be sent to other ranks.

    Attributes:
        name: as given.
        value: a tensor without a graph, a number, or a `MetricAt`; whatever else was given, for Lightning to refuse.
        settings: the other arguments that were given, by name.
    """

    name: str
    value: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@contextmanager
def record_logs(module: pl.LightningModule, sink: list[Logged]) -> Iterator[None]:
    """Note what a module logs, instead of logging it; nothing is checked, since the replay does.

    `log_dict`, as Lightning has it, calls `log` for each of its items, so that it is noted too.

    Args:
        module: the one whose step runs.
        sink: what is noted is added to it.
    """
    noted = _Recorder(module, sink)
    replaced = {"log": noted.log}
    if module.fabric is not None:  # then Lightning's `log_dict` does without `log`
        replaced["log_dict"] = noted.log_dict
    with attributes_replaced([(module, replaced)]):
        yield


def refuse_foreign_logs(logged: Sequence[Logged], step: str) -> None:
    """Refuse what was logged of values that another stage has.

    Args:
        logged: by a step that came to its end.
        step: its name.

    Raises:
        UnsupportedError: there is such a value.
    """
    for each in logged:
        leaf = next(filter(is_foreign, tree_leaves(_content(each.value))), None)
        if leaf is not None:
            origin = getattr(leaf, "origin", "")
            raise UnsupportedError(
                f"{step} logged {each.name!r}, a value that depends on parameters or values of another pipeline stage"
                f"{f' ({origin})' if origin else ''}, which the rank of the last stage does not have: the step did not compute "
                "it so when it was looked at before training, and each batch has to take the same way. Compute the value in a "
                "module of that stage and return it from there, or log norms of parameters in a hook, inside of `with "
                "self.trainer.strategy.gathered(module):`."
            )


def combine(
    per_microbatch: Sequence[Sequence[Logged]], sizes: Sequence[int], *, constants: dict[str, bool] | None = None
) -> list[Logged]:
    """Return what one step would have logged for the whole batch; see this file for how.

    Calls of one name are matched in their order. Where their arguments differ between microbatches each is kept, for Lightning
    to refuse as it refuses two such calls in one step.

    Args:
        per_microbatch: what each microbatch has logged.
        sizes: number of samples of each microbatch.
        constants: what earlier batches of this kind of step have shown of each name: whether its `batch_size` is one that does
            not come from the microbatch. It is changed; give the same one for every batch.

    Returns:
        In the order in which they first appear; tensors are on the CPU.
    """
    calls: dict[tuple[str, int], list[list[tuple[Logged, int]]]] = {}
    for logged, size in zip(_fetched(per_microbatch), sizes, strict=True):
        count: dict[str, int] = {}
        for each in logged:
            count[each.name] = count.get(each.name, 0) + 1
            alike = calls.setdefault((each.name, count[each.name]), [])
            group = next((group for group in alike if _form_of(group[0][0]) == _form_of(each)), None)
            if group is None:
                alike.append(group := [])
            group.append((each, size))
    known = {} if constants is None else constants
    return [_combined(group, sum(sizes), known) for alike in calls.values() for group in alike]


def replay(module: pl.LightningModule, logged: Sequence[Logged]) -> None:
    """Log, on this rank, what was combined; inside the hook whose step it was.

    Args:
        module: this rank's.
        logged: the same on every rank that shares the batch.

    Raises:
        MisconfigurationException: Lightning refuses it, as it would in one process; the same on every rank.
        UnsupportedError: it holds what other ranks cannot be told.
    """
    for each in logged:
        if isinstance(each.value, Unsent):
            raise each.value.error
        value = each.value
        if isinstance(value, MetricAt):
            value = _metric_at(module, value, each.settings)
        else:
            value = placed(value, module.device)
        module.log(each.name, value, **each.settings)


@contextmanager
def attributes_replaced(new: Sequence[tuple[nn.Module, Mapping[str, Any]]]) -> Iterator[None]:
    """Give modules attributes of their own for a while, in front of those of their classes.

    Args:
        new: each module and its attributes; what was there comes back.
    """
    held = [{name: vars(module)[name] for name in names if name in vars(module)} for module, names in new]
    for module, attributes in new:
        vars(module).update(attributes)
    try:
        yield
    finally:
        for (module, attributes), before in zip(new, held, strict=True):
            for name in attributes:
                vars(module).pop(name, None)
            vars(module).update(before)


@dataclasses.dataclass(frozen=True)
class Unsent:
    """Stands for what cannot be sent to other ranks.

    Attributes:
        error: what every rank raises.
    """

    error: Exception


class _Recorder:
    """Takes the place of a module's `log`."""

    def __init__(self, module: pl.LightningModule, sink: list[Logged]) -> None:
        self._module = module
        self._sink = sink
        self._names = _argument_names(type(module).log)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Note a call."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        name, value = (given.pop(key) for key in self._names[:2])
        self._sink.append(self._portable(Logged(name, self._value(value), _as_given(given))))

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Note a call for each item, as Lightning's own does; those of a collection have their names with its prefix."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Metric):
            # A copy, as Lightning makes one: the user may change the tensor afterwards.
            return map_tensors(lambda tensor: tensor.detach().clone(), value)
        return MetricAt(_path_of(value, self._module), map_tensors(torch.Tensor.detach, value._forward_cache))

    def _portable(self, logged: Logged) -> Logged:
        """Return a call itself if it can be sent to other ranks, else one whose replay raises why not."""
        group = logged.settings.get("sync_dist_group")
        if group is not None:
            error: Exception = UnsupportedError(
                f"`self.log({logged.name!r}, ..., sync_dist_group={group!r})` was called. Under pipeline parallelism only the "
                "ranks of the last stage compute what is logged and tell the others, which are in no such group. Leave it out: "
                "sync_dist=True reduces over the ranks that have different samples."
            )
            return Logged(logged.name, Unsent(error))
        if isinstance(logged.value, (torch.Tensor, numbers.Number, MetricAt)) or _can_be_sent(logged.value):
            return logged
        try:
            type(self._module).log(self._module, logged.name, logged.value)
        except Exception as refusal:  # Lightning's, in its words, since it takes nothing else
            error = refusal if _can_be_sent(refusal) else UnsupportedError(str(refusal))
            return Logged(logged.name, Unsent(error))
        return logged


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # pickle raises whatever the objects' own hooks raise
        return False
    return True


def _path_of(metric: Metric, module: pl.LightningModule) -> str | None:
    known = _paths.setdefault(module, {})
    path = known.get(id(metric))
    if path is None or _child_at(module, path) is not metric:
        path = next((path for path, child in module.named_modules() if child is metric), None)
    if path is not None:
        known[id(metric)] = path
    return path


def _child_at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


@functools.lru_cache(16)
def _argument_names(log: Callable[..., None]) -> list[str]:
    """Return the names of `log`'s arguments in their order, also where a class has its own."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own, known = (
        [each.name for each in inspect.signature(function).parameters.values() if each.kind is positional][1:]
        for function in (log, pl.LightningModule.log)
    )
    return [*own, *known[len(own) :]]


def _as_given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return arguments as given, in a form that can be compared and sent."""
    if callable(reduce_fx := settings.get("reduce_fx")):
        # By the name that means the same to Lightning; or in the words of its error.
        settings["reduce_fx"] = _NAMED.get(reduce_fx, str(reduce_fx))
    if isinstance(batch_size := settings.get("batch_size"), torch.Tensor):
        settings["batch_size"] = batch_size.item()
    if "sync_dist_group" in settings and settings["sync_dist_group"] is dist.group.WORLD:
        settings["sync_dist_group"] = None
    return settings


def _form_of(logged: Logged) -> tuple[Any, ...]:
    """Return what calls of one name have alike in every microbatch."""
    settings = {key: value for key, value in logged.settings.items() if key != "batch_size"}
    return (logged.value.path if isinstance(logged.value, MetricAt) else "", settings)


def _combined(group: Sequence[tuple[Logged, int]], total: int, constants: dict[str, bool]) -> Logged:
    first = group[0][0]
    weights = sizes = [size for _, size in group]
    settings = dict(first.settings)
    given = [each.settings.get("batch_size") for each, _ in group]
    if any(each is not None for each in given):
        weights = [size if each is None else each for each, size in zip(given, sizes, strict=True)]
        is_constant = constants[first.name] = _is_constant(weights, sizes, total, constants.get(first.name))
        settings["batch_size"] = weights[0] if is_constant else sum(weights)
        weights = sizes if is_constant or not sum(weights) else weights
    values = [each.value for each, _ in group]
    return Logged(first.name, _reduced(values, settings.get("reduce_fx", "mean"), weights, sizes), settings)


def _is_constant(given: Sequence[Any], sizes: Sequence[int], total: int, before: bool | None) -> bool:
    """Return whether batch sizes are one that was given for every microbatch without regard to it."""
    if any(each != given[0] for each in given):
        return False
    if before is not None:
        return before
    return list(given) != list(sizes) and (given[0] in (1, total) or len(set(sizes)) > 1)


def _reduced(values: Sequence[Any], reduce_fx: Any, weights: Sequence[float], sizes: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, MetricAt):
        return MetricAt(first.path, join_results([value.forward_value for value in values], sizes))
    if all(isinstance(value, numbers.Number) for value in values):
        return _reduced_numbers(values, reduce_fx, weights)
    if not all(isinstance(value, (torch.Tensor, numbers.Number)) for value in values):
        return first  # which Lightning refuses
    tensors = [torch.as_tensor(value) for value in values]
    if any(tensor.numel() != 1 for tensor in tensors):
        return join_results(tensors, sizes)  # which Lightning refuses too, with the shape that the whole batch has
    return _reduced_tensors([tensor.reshape(tensors[0].shape) for tensor in tensors], reduce_fx, weights)


def _reduced_numbers(values: Sequence[Any], reduce_fx: Any, weights: Sequence[float]) -> Any:
    how = _reduction(reduce_fx)
    if how == "mean" and any(value != values[0] for value in values):
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    if how in ("max", "min"):
        return max(values) if how == "max" else min(values)
    return sum(values) if how == "sum" and len(values) > 1 else values[0]


def _reduction(reduce_fx: Any) -> str:
    """Return "mean", "sum", "max" or "min"; "none" for what Lightning refuses."""
    name = reduce_fx.lower() if isinstance(reduce_fx, str) else "none"
    name = "mean" if name == "avg" else name
    return name if name in _NAMED.values() else "none"


def _reduced_tensors(tensors: Sequence[torch.Tensor], reduce_fx: Any, weights: Sequence[float]) -> torch.Tensor:
    how = _reduction(reduce_fx)
    if len(tensors) == 1 or how == "none":
        return tensors[0]
    if how == "mean":
        return mean_of([_wide(tensor) for tensor in tensors], weights) if _differ(tensors) else tensors[0]
    if how == "sum":
        return torch.stack([_wide(tensor) if tensor.is_floating_point() else tensor for tensor in tensors]).sum(0)
    return torch.stack(list(tensors)).amax(0) if how == "max" else torch.stack(list(tensors)).amin(0)


def _differ(tensors: Sequence[torch.Tensor]) -> bool:
    return not all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the dtype that Lightning keeps it in: of at least 32 bits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(_default_dtype())


def _default_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _fetched(per_microbatch: Sequence[Sequence[Logged]]) -> list[list[Logged]]:
    """Return the calls with their values on the CPU, fetched from a device all at once: each fetch waits for the device."""
    waiting: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def await_single(tensor: torch.Tensor) -> None:
        if tensor.numel() == 1:
            waiting.setdefault((tensor.device, tensor.dtype), []).append(tensor)

    map_tensors(await_single, [[_content(each.value) for each in logged] for logged in per_microbatch])
    here = {
        id(tensor): value.reshape(tensor.shape)
        for tensors in waiting.values()
        for tensor, value in zip(tensors, torch.stack([each.reshape(()) for each in tensors]).cpu(), strict=True)
    }

    def fetch(logged: Logged) -> Logged:
        found = map_tensors(lambda tensor: here.get(id(tensor), tensor).cpu(), _content(logged.value))
        is_metric = isinstance(logged.value, MetricAt)
        return dataclasses.replace(logged, value=MetricAt(logged.value.path, found) if is_metric else found)

    return [[fetch(each) for each in logged] for logged in per_microbatch]


def _content(value: Any) -> Any:
    return value.forward_value if isinstance(value, MetricAt) else value


def _metric_at(module: pl.LightningModule, place: MetricAt, settings: Mapping[str, Any]) -> Metric:
    """Return this rank's metric, and let it have been called as the one that was logged."""
    path = place.path if place.path is not None else settings.get("metric_attribute")
    metric = _child_at(module, path or "")
    if not isinstance(metric, Metric):
        if path is not None:
            raise UnsupportedError(
                f"A metric was logged with metric_attribute={path!r}, but is not part of the module, so that the ranks that do "
                "not run the last pipeline stage cannot find it. Assign it to an attribute of the module."
            )
        return _Nowhere()
    vars(metric)["_forward_cache"] = placed(place.forward_value, module.device)
    return metric


class _Nowhere(Metric):
    """A metric that is not the module's, which Lightning refuses by saying so."""

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> torch.Tensor:
        """Return a zero."""
        return torch.zeros(())
