"""A tensor of which each rank holds a part, in the hands of code that knows nothing of it.

To user code it is the whole tensor: its shape is the whole's, and `view`, `transpose`, attention and arithmetic mean what they
mean on the whole. What is computed is this rank's part, with plain torch operations that autograd records as such, so that a
backward costs nothing more. Operations are looked up in a table of rules (`rules/`), each of which is exact: what the rules do
not follow is computed on the gathered tensor instead, which is right, and slower, and said once.

It is to activations between parallel layers what `DTensor` is to parameters, and costs some microseconds an operation where
DTensor's dispatch costs a hundred, forward and backward: hence it stands here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from meshbolt.compat import plain_calls
from meshbolt.errors import UnsupportedError
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import whole
from meshbolt.tensor.layout import Layout, SplitLostError, whole_shape
from meshbolt.tensor.part import Split, StrayError

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_RULES: dict[Any, Rule] = {}
_PLACES = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)
# What the whole tensor answers.
_FACTS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex"),
        *("is_signed", "get_device", "__len__"),
    )
) | {torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel}
# Attributes that this rank's part answers; a gradient's history is the part's.
_OF_PART = frozenset(("grad_fn", "is_leaf", "requires_grad", "retains_grad", "_version", "output_nr"))
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
# Names that torch takes from numpy's users.
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x2": "other"}
_OTHER_NAMES = _NUMPY_NAMES.keys() | {"input", "out"}


class SplitTensor(Split, torch.Tensor):
    """A split tensor as code that runs sees it: a `torch.Tensor`."""

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, axis: Axis, **notes: Any) -> SplitTensor:
        """Stand for the whole of which this rank has a part.

        Args:
            local: this rank's part.
            layout: of the whole.
            axis: the ranks.
            notes: `sequence_dim`, `samples`, `along_sequence` and `sources`, as the attributes.
        """
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            whole_shape(local.shape, layout, axis.size),
            dtype=local.dtype,
            device=local.device,
            requires_grad=local.requires_grad,
        )
        made._hold(local, layout, axis, **notes)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do on parts what a function of torch is to do on wholes."""
        _refuse_strays(args)
        return follow(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what reaches a tensor past torch's functions."""
        sources = frozenset().union(*(value.sources for value in splits_in(args, kwargs)))
        raise StrayError(
            sources,
            f"{func} reached an activation that is split over tensor-parallel ranks by a way that cannot be followed, such as a "
            "torch.autograd.Function or a compiled kernel. Leave the layers around it out of the plan of TensorParallel.",
        )


class SplitObject(Split):
    """A split tensor as `torch.compile` sees it: an object with a tensor's methods, whose part is what is compiled."""

    def __init__(self, local: Tensor, layout: Layout, axis: Axis, **notes: Any) -> None:
        """Stand for the whole of which this rank has a part; the arguments are those of `SplitTensor`."""
        self._hold(local, layout, axis, **notes)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """The part's."""
        return self.local.requires_grad

    @property
    def T(self) -> Any:  # type: ignore[override]  # noqa: N802 - torch's name
        """The transposed matrix."""
        return follow(torch.Tensor.transpose, (self, -2, -1), {})

    mT = T  # noqa: N815 - torch's name

    def __len__(self) -> int:
        """Return the size of the first dim."""
        return int(self._shape[0])

    def __iter__(self) -> Iterator[Any]:
        """Return the slices along the first dim."""
        return iter(follow(torch.Tensor.unbind, (self, 0), {}))

    def numel(self) -> int:
        """Return the number of elements of the whole."""
        return self.local.numel() * self.axis.size

    def is_floating_point(self) -> bool:
        """Return whether the elements are floating-point numbers."""
        return self.local.is_floating_point()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do on parts what a function of torch is to do on wholes."""
        return follow(func, args, kwargs or {})


TENSORS = (Tensor, Split)
"""What is a tensor, whole or split."""


def split_of(local: Tensor, layout: Layout, axis: Axis, **notes: Any) -> Split:
    """Return a split tensor: where code is being compiled, an object that stands for it.

    Args:
        local: this rank's part.
        layout: of the whole.
        axis: the ranks.
        notes: the other arguments of `SplitTensor`.
    """
    return (
        SplitObject(local, layout, axis, **notes)
        if torch.compiler.is_compiling()
        else SplitTensor(local, layout, axis, **notes)
    )


def follow(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do on parts what a function of torch is to do on wholes.

    Args:
        func: torch's.
        args: by place; one of all arguments, at least, is split.
        kwargs: by name.
    """
    rule = _RULES.get(func)
    return _without_rule(func, args, kwargs) if rule is None else _by_rule(rule, func, args, kwargs)


def _by_rule(rule: Rule, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        if kwargs and not _OTHER_NAMES.isdisjoint(kwargs):
            args, kwargs = _usual_names(args, kwargs)
        result = rule(func, args, kwargs)
    except SplitLostError as failure:
        return _on_wholes(func, args, kwargs, failure)
    return result if not _NOTED else _with_all_sources(result, args, kwargs)


def add_methods() -> None:
    """Give the object the methods of a tensor that there are rules for; once they are all there."""
    functions = {getattr(func, "__name__", ""): None for func in _RULES}
    methods = {name: name for name in functions} | _OPERATORS
    for name, called in methods.items():
        is_method = callable(getattr(torch.Tensor, called, None))
        if is_method and name not in SplitObject.__dict__ and name not in Split.__dict__:
            setattr(SplitObject, name, _method(getattr(torch.Tensor, called)))


# Which of a tensor's methods Python's operators call.
_OPERATORS = {
    f"__{operator}__": method
    for operator, method in {
        **{name: name for name in ("add", "sub", "mul", "neg", "matmul", "lt", "le", "gt", "ge", "abs")},
        "truediv": "div",
        "mod": "remainder",
    }.items()
}


def _method(func: Any) -> Any:
    rule = _RULES.get(func)
    if rule is None:
        return lambda self, *args, **kwargs: follow(func, (self, *args), kwargs)

    # Looked up before: a compiler does not find functions that are written in Python in the table.
    def called(self: SplitObject, *args: Any, **kwargs: Any) -> Any:
        return _by_rule(rule, func, (self, *args), kwargs)

    return called


def rule(*names: str, also: Iterable[Any] = ()) -> Callable[[Rule], Rule]:
    """Make a function the rule for torch's functions and methods of these names.

    Args:
        names: as in `torch`, `torch.Tensor` and `torch.nn.functional`; each has to be in one of them.
        also: further functions.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            places = (torch.Tensor,) if name.startswith("__") else _PLACES
            found = [getattr(place, name) for place in places if callable(getattr(place, name, None))]
            if not found:
                raise AssertionError(f"torch has no {name}.")
            _RULES.update(dict.fromkeys(found, function))
        _RULES.update(dict.fromkeys(also, function))
        return function

    return register


def splits_in(*trees: Any) -> list[Split]:
    """Return the split tensors in arguments, nested ones too."""
    return [leaf for tree in trees for leaf in tree_leaves(tree) if isinstance(leaf, Split)]


def like(split: Split, local: Tensor, layout: Layout | None = None) -> Split:
    """Return a result as a split tensor.

    Args:
        split: what it was computed from.
        local: this rank's part of the result.
        layout: of the result; None: as before.
    """
    return split_of(local, layout or split.division, split.axis, along_sequence=split.along_sequence)


def gathered(value: Any) -> Any:
    """Return a value with whole tensors in the place of split ones, for what every rank computes alike."""
    if isinstance(value, Split):
        _refuse_strays((value,))
        return whole(value.local, value.division, value.axis)
    if isinstance(value, Tensor):
        return value
    return tree_map_only(Split, gathered, value)


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by their names.

    Args:
        names: of a function's parameters, in their order.
        args: given by place.
        kwargs: given by name.

    Raises:
        SplitLostError: there are others.
    """
    found = dict(zip(names, args, strict=False))
    if len(args) > len(names) or any(key not in names or key in found for key in kwargs):
        raise SplitLostError("its arguments are written in a way that is not followed")
    found.update(kwargs)
    return found


def _usual_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments as they are called in torch, with the first one in its place."""
    if kwargs.get("out") is not None:
        raise SplitLostError("it writes into a tensor that it is given")
    kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items() if key != "out"}
    if not args and "input" in kwargs and "condition" not in kwargs:
        args = (kwargs.pop("input"),)
    return args, kwargs


def _refuse_strays(operands: Iterable[Any]) -> None:
    """Refuse tensors that are handed to a torch.autograd.Function, or come out of one: its gradients would not reach the parts.

    Inside of such a function nothing that is computed has a history, and gradients are disabled.
    """
    graded = torch.is_grad_enabled()
    for value in operands:
        if type(value) is SplitTensor and value.local.requires_grad is not graded:
            lost = _came_out_of_function(value) if graded else _is_inside_function()
            if lost:
                raise StrayError(
                    value.sources,
                    f"A tensor of shape {tuple(value.shape)}, split over tensor-parallel ranks, was handed to a "
                    f"torch.autograd.Function, which cannot be followed. {_remedy(value)}",
                )


def _remedy(value: Split) -> str:
    causes = "One is behind checkpoint(use_reentrant=True), for which use_reentrant=False does, and behind full backward hooks"
    if value.along_sequence:
        return f"{causes}. Or set TensorParallel(sequence_parallel=False): only the sequence is divided here."
    return f"{causes}. Or leave the layers around it out of the plan of TensorParallel."


def _came_out_of_function(value: SplitTensor) -> bool:
    with plain_calls():
        return value.grad_fn is not None


def _is_inside_function() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


def _without_rule(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return _attribute(func, args, kwargs)
    if name in ("__set__", "__delete__") and isinstance(args[0], Split):
        raise UnsupportedError(
            f"{getattr(func.__self__, '__name__', 'An attribute')!r} of an activation that is split over tensor-parallel ranks "
            "was written to. Leave the layers around it out of the plan of TensorParallel."
        )
    if func in _FACTS:
        with plain_calls():
            return func(*args, **kwargs)
    return _on_wholes(func, args, kwargs, SplitLostError("it is not among the operations that keep a split"))


def _attribute(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    split = args[0]
    if name in _OF_PART:
        return getattr(split.local, name)
    if name in ("T", "H", "mT", "mH"):
        if (name in ("T", "H") and split.dim() != 2) or (name in ("H", "mH") and split.is_complex()):
            return _on_wholes(func, args, kwargs, SplitLostError("it is not among the operations that keep a split"))
        return split.transpose(-2, -1)
    if name in ("data", "real", "imag", "grad"):
        found = getattr(split.local, name)
        return None if found is None else like(split, found)
    with plain_calls():
        return func(*args, **kwargs)


def _on_wholes(func: Any, args: Any, kwargs: Mapping[str, Any], failure: SplitLostError) -> Any:
    name = getattr(func, "__name__", str(func))
    if _writes_into_split(func, name, args, kwargs):
        raise UnsupportedError(
            f"{name} writes into an activation that is split over tensor-parallel ranks, which cannot be done: {failure}. Write "
            f"the operation without changing its input, or leave the layers around it out of the plan of TensorParallel."
        )
    splits = splits_in(args, kwargs)
    splits[0].axis.report(name, failure, splits)
    return func(*gathered(tuple(args)), **gathered(dict(kwargs)))


def _writes_into_split(func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a split tensor would have to be changed, or watched: a gathered one is another tensor."""
    first = args[0] if args else kwargs.get("input")
    if splits_in(kwargs.get("out")):
        return True
    if not isinstance(first, Split):
        return False
    written = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return written or name == "register_post_accumulate_grad_hook" or _asks_in_place(func, args, kwargs)


def _asks_in_place(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if getattr(func, "__module__", None) != F.__name__:
        return bool(kwargs.get("inplace"))
    try:
        return bool(inspect.signature(func).bind(*args, **kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):
        return False


_NOTED: list[None] = []


@contextmanager
def noted_sources() -> Iterator[None]:
    """Note, inside, on every split tensor which layers it comes from."""
    _NOTED.append(None)
    try:
        yield
    finally:
        _NOTED.pop()


def _with_all_sources(result: Any, args: Any, kwargs: Any) -> Any:
    sources = frozenset().union(*(split.sources for split in splits_in(args, kwargs)))
    for split in splits_in(result):
        split.sources = split.sources | sources
    return result


def is_fact(func: Any) -> bool:
    """Return whether a function only asks what a tensor is, not for its values."""
    return func in _FACTS or getattr(func, "__name__", "") == "__get__"
