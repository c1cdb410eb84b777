"""Modules built without the values of their large tensors, which are computed later, one after the other.

While a module is built here, its large tensors are on the meta device, and what is done to them is written down: every
operation with its arguments, and the state of the random generator where one draws. From that a tensor's value can be
computed at any time: by the same kernels from the same numbers, so that it is bit for bit what a plain build makes. Draws
are also made while the module is built, into memory that is freed at once: whatever draws next gets what it would have got.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from meshbolt.compat import TorchDispatchMode, plain_calls, tree_leaves, tree_map, written_arguments
from meshbolt.errors import UnsupportedError

SMALL_ELEMENTS = 1024
HELD_LIMIT_BYTES = 64 * 2**20
REMEDY = " Build the module with its values (--meta false)."
_ATTRIBUTE = "_meshbolt_deferred"
_META, _CPU = torch.device("meta"), torch.device("cpu")
_READ = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensor without values: which part of which storage it is."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def blank(self) -> torch.Tensor:
        """Return a real tensor of the same layout, full of whatever was in memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One operation: its arguments with parts in place of tensors without values, what it returns, and how it draws."""

    operation: Callable[..., Any]
    args: Any
    kwargs: Any
    returned: tuple[_Part | None, ...]
    generator: torch.Generator
    drawn_from: torch.Tensor | None

    def storages(self) -> Iterator[StorageWeakRef]:
        """Yield every storage that the operation touches."""
        for leaf in itertools.chain(tree_leaves((self.args, self.kwargs)), self.returned):
            if isinstance(leaf, _Part):
                yield leaf.storage

    def run(self, real: dict[StorageWeakRef, torch.UntypedStorage]) -> None:
        """Do the operation on real storages, and add those that it makes."""

        def tensor(leaf: Any) -> Any:
            if not isinstance(leaf, _Part):
                return leaf
            empty = torch.empty(0, dtype=leaf.dtype)
            return empty.set_(real[leaf.storage], leaf.offset, leaf.shape, leaf.stride)

        with _from_state(self.generator, self.drawn_from):
            result = self.operation(*tree_map(tensor, self.args), **tree_map(tensor, self.kwargs))
        for part, made in zip(self.returned, tree_leaves(result), strict=True):
            if part is not None and part.storage not in real:
                real[part.storage] = _laid_out(made, part).untyped_storage()


def _laid_out(made: torch.Tensor, part: _Part) -> torch.Tensor:
    """Return a result in the layout that was foreseen: on the meta device some operations foresee another one."""
    if (made.stride(), made.storage_offset()) == (part.stride, part.offset):
        return made
    if made.shape != part.shape or part.offset:
        raise AssertionError(f"An operation returned shape {tuple(made.shape)} instead of {tuple(part.shape)}.")
    return part.blank().copy_(made)


@contextmanager
def _from_state(generator: torch.Generator, state: torch.Tensor | None) -> Iterator[None]:
    if state is None:
        yield
        return
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


class Deferred:
    """What was done to tensors that have no values yet."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._steps: list[_Step] = []
        self._touched_by: dict[StorageWeakRef, list[int]] = {}
        self._shapes: dict[StorageWeakRef, torch.Size] = {}
        self._valued: set[StorageWeakRef] = set()
        self._held_bytes = 0
        self._watch = ExitStack()

    def __deepcopy__(self, _memo: Any) -> Deferred:
        """Stay one: a copy of a module has its own tensors, and they are noted here too."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to go to another process, where these storages do not exist."""
        raise UnsupportedError("A module that was built without its values cannot be pickled." + REMEDY)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Make large tensors without values, and note what is done to them.

        Raises:
            UnsupportedError: something needs values in a way that cannot be noted.
        """
        with _Notes(self, makes=True), _Pretence(self):
            yield

    def watch(self) -> None:
        """Note what is done to the tensors from here on, until `stop`; new ones are made as usual."""
        self.stop()
        self._watch.enter_context(_Notes(self, makes=False))
        self._watch.enter_context(_Pretence(self))

    def stop(self) -> None:
        """End `watch`; again is nothing."""
        self._watch.close()

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's value is to be computed from the notes."""
        with plain_calls():
            is_candidate = tensor.is_meta and tensor.layout == torch.strided
            return is_candidate and StorageWeakRef(tensor.untyped_storage()) in self._touched_by

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compute a tensor's value on the CPU; it takes memory for that tensor and what it was made from.

        Args:
            tensor: one that is known.
        """
        part = self._part(tensor)
        steps: set[int] = set()
        unseen = [part.storage]
        while unseen:
            fresh = [number for number in self._touched_by[unseen.pop()] if number not in steps]
            steps.update(fresh)
            unseen.extend(storage for number in fresh for storage in self._steps[number].storages())
        real: dict[StorageWeakRef, torch.UntypedStorage] = {}
        with torch.no_grad(), plain_calls():
            for number in sorted(steps):
                self._steps[number].run(real)
            empty = torch.empty(0, dtype=part.dtype)
            return empty.set_(real[part.storage], part.offset, part.shape, part.stride)

    def fingerprint(self) -> str:
        """Return what is equal in processes that would compute equal values; files that would be read are taken to be."""
        digest = hashlib.sha256()
        for step in self._steps:
            state = () if step.drawn_from is None else (step.drawn_from,)
            digest.update(str(step.operation).encode())
            for leaf in (*state, *tree_leaves((step.args, step.kwargs))):
                digest.update(_bytes_of(leaf))
        return digest.hexdigest()

    def gap(self, module: nn.Module) -> str | None:
        """Return why the module would not be what a plain build makes, if so.

        Args:
            module: every tensor without values should be one of its parameters and buffers.
        """
        named = itertools.chain(module.named_parameters(), module.named_buffers())
        own = {StorageWeakRef(t.untyped_storage()): name for name, t in named if self.knows(t)}
        for storage, name in own.items():
            if storage not in self._valued:
                return f"{name} was made without giving it a value"
        for storage, shape in self._shapes.items():
            if not storage.expired() and storage not in own:
                return f"a tensor of shape {tuple(shape)} is kept outside the parameters and buffers"
        return None

    def make(self, operation: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Do an operation that makes a tensor of nothing; without values if it is large, None if it is to be done as usual."""
        takes = {argument.name for argument in operation._schema.arguments}
        is_usual = kwargs.get("layout") in (None, torch.strided) and not kwargs.get("pin_memory")
        if "device" not in takes or not is_usual or not _is_cpu(kwargs.get("device")):
            return None
        made = operation(*args, **{**kwargs, "device": _META})
        if not isinstance(made, torch.Tensor) or made.numel() < SMALL_ELEMENTS:
            return None
        # As it is now: the defaults may be others when the value is computed.
        dtype = {"dtype": made.dtype} if "dtype" in takes else {}
        self._note(operation, args, {**kwargs, "device": _CPU, **dtype}, made, written=())
        return made

    def do(self, operation: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Do an operation on tensors of which some are known."""
        if operation is _READ:
            return self.value(args[0]).item()
        written = list(written_arguments(operation, args, kwargs))
        if "batch_norm" in str(operation) or any(not self.knows(tensor) for tensor in written):
            raise UnsupportedError(f"{operation} changes a tensor with values by one that has none yet." + REMEDY)
        if kwargs.get("device") not in (None, _CPU, _META):
            raise UnsupportedError(f"A tensor that has no values yet is moved to {kwargs['device']}." + REMEDY)
        there, here = ({**kwargs, "device": device} if kwargs.get("device") else kwargs for device in (_META, _CPU))
        made = operation(*tree_map(_without_values, args), **tree_map(_without_values, there))
        self._note(operation, args, here, made, written=written)
        return made

    def _note(self, operation: Any, args: Any, kwargs: Any, made: Any, *, written: Iterable[torch.Tensor]) -> None:
        changed = {StorageWeakRef(tensor.untyped_storage()) for tensor in written}
        returned = tuple(self._part(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in tree_leaves(made))
        new = {
            part.storage: part.shape for part in returned if part is not None and part.storage not in self._touched_by
        }
        if not changed and not new:
            return  # a view: the storage says all
        for storage, shape in new.items():
            self._touched_by[storage], self._shapes[storage] = [], shape
        parts = tree_map(self._argument, (args, dict(kwargs)))
        generators = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Generator)]
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state() if _draws(operation) else None
        step = _Step(
            operation=operation,
            args=parts[0],
            kwargs=parts[1],
            returned=returned,
            generator=generator,
            drawn_from=state,
        )
        if state is not None:
            self._draw(step, changed)
        for storage in {*changed, *new}:
            self._touched_by[storage].append(len(self._steps))
        self._steps.append(step)
        self._valued.update(changed if "empty" in str(operation) else {*changed, *new})

    def _draw(self, step: _Step, changed: set[StorageWeakRef]) -> None:
        """Bring the generator to where the operation leaves it."""
        read = {leaf.storage for leaf in tree_leaves((step.args, step.kwargs)) if isinstance(leaf, _Part)} - changed
        if read and "_like" not in str(step.operation):
            raise UnsupportedError(
                f"How much {step.operation} draws depends on values that are not there yet." + REMEDY
            )
        blank = tree_map(lambda leaf: leaf.blank() if isinstance(leaf, _Part) else leaf, (step.args, step.kwargs))
        step.operation(*blank[0], **blank[1])

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_meta:
            if not self.knows(leaf):
                raise UnsupportedError("A tensor of which no values are known is used to make another." + REMEDY)
            return self._part(leaf)
        self._held_bytes += leaf.nbytes
        if self._held_bytes > HELD_LIMIT_BYTES:
            limit = HELD_LIMIT_BYTES // 2**20
            raise UnsupportedError(f"More than {limit} MiB of values come from outside, such as a file." + REMEDY)
        return leaf.detach().clone()

    def _part(self, tensor: torch.Tensor) -> _Part:
        with plain_calls():
            storage = StorageWeakRef(tensor.untyped_storage())
            stride, offset = tensor.stride(), int(tensor.storage_offset())
            return _Part(storage=storage, dtype=tensor.dtype, shape=tensor.shape, stride=stride, offset=offset)

    def note_read(self, tensor: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
        """Note that a tensor gets its value from a file, which is read when the value is computed."""
        part = self._part(tensor)
        self._touched_by[part.storage].append(len(self._steps))
        self._steps.append(
            _Step(
                operation=_read_into,
                args=(part, read),
                kwargs={},
                returned=(None,),
                generator=torch.default_generator,
                drawn_from=None,
            )
        )
        self._valued.add(part.storage)


def read_into(tensor: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
    """Copy into a tensor what a function reads; where the tensor has no value yet, when it gets one.

    Args:
        tensor: of any device.
        read: returns what has the same shape; may be called again.
    """
    if has_torch_function((tensor,)):
        handle_torch_function(read_into, (tensor,), tensor, read)
    else:
        _read_into(tensor, read)


@torch.no_grad()
def _read_into(tensor: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
    tensor.copy_(read())


class _Notes(TorchDispatchMode):
    """Hands operations to `Deferred` that are about its tensors."""

    def __init__(self, deferred: Deferred, *, makes: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._deferred, self._makes = deferred, makes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        with plain_calls():
            if any(self._deferred.knows(tensor) for tensor in tensors) or _loses_number(tensors, kwargs):
                return self._deferred.do(func, args, kwargs)
            if self._makes and not tensors:
                made = self._deferred.make(func, args, kwargs)
                if made is not None:
                    return made
            return func(*args, **kwargs)


class _Pretence(TorchFunctionMode):
    """Shows the tensors of `Deferred` as what they will be, since some initialisers do nothing on the meta device."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.Tensor.__setitem__
            and isinstance(args[2], (bool, int, float))
            and self._deferred.knows(args[0])
        ):
            # torch would put the number into a tensor without values.
            args = (args[0], args[1], torch.tensor(args[2], dtype=args[0].dtype))
        if func is read_into and self._deferred.knows(args[0]):
            return self._deferred.note_read(*args)
        asked = getattr(func, "__self__", None)
        if asked in (torch.Tensor.device, torch.Tensor.is_meta, torch.Tensor.is_cpu) and self._deferred.knows(args[0]):
            return {torch.Tensor.device: _CPU, torch.Tensor.is_meta: False, torch.Tensor.is_cpu: True}[asked]
        try:
            return func(*args, **(kwargs or {}))
        except UnsupportedError:
            raise
        except (NotImplementedError, RuntimeError, TypeError) as error:
            leaves = tree_leaves((args, kwargs))
            if not any(isinstance(leaf, torch.Tensor) and self._deferred.knows(leaf) for leaf in leaves):
                raise
            name, said = getattr(func, "__name__", func), str(error).partition("\n")[0]
            raise UnsupportedError(f"{name}() fails on a tensor that has no values yet: {said}." + REMEDY) from error


def attach(module: nn.Module, deferred: Deferred) -> None:
    """Leave the notes on a module, for when it is sharded."""
    setattr(module, _ATTRIBUTE, deferred)


def attached(module: nn.Module) -> Deferred | None:
    """Return the notes that were left on a module, if any."""
    return getattr(module, _ATTRIBUTE, None)


def detach(module: nn.Module) -> Deferred | None:
    """Take the notes from a module, and end `watch`."""
    deferred = attached(module)
    if deferred is not None:
        deferred.stop()
        delattr(module, _ATTRIBUTE)
    return deferred


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, _Part):
        return repr((leaf.dtype, leaf.shape, leaf.stride, leaf.offset)).encode()
    is_plain = isinstance(leaf, (int, float, complex, str, torch.dtype, torch.device))
    return (repr(leaf) if is_plain else type(leaf).__name__).encode()


def _draws(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags


def _is_cpu(device: torch.device | None) -> bool:
    return device is None or device.type == "cpu"


def _loses_number(tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Return whether this is how torch brings a number to the device of what it is written into."""
    return kwargs.get("device") == _META and any(not tensor.is_meta and not tensor.dim() for tensor in tensors)


def _without_values(leaf: Any) -> Any:
    # What has no dimensions may stay, and must where it takes part in type promotion.
    return leaf.to(_META) if isinstance(leaf, torch.Tensor) and leaf.dim() and not leaf.is_meta else leaf
