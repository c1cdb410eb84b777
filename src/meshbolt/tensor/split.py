"""A tensor of which each rank holds a part, in the hands of code that knows nothing of it.

To user code it is the whole tensor: its shape is the whole's, and `view`, `transpose`, attention and arithmetic mean what they
mean on the whole. What is computed is this rank's part, with plain torch operations that autograd records as such, so that a
backward costs nothing more. Operations are looked up in a table of rules (`rules/`), each of which is exact: what the rules do
not follow is computed on the gathered tensor instead, which is right, and slower, and said once.

It is to activations between parallel layers what `DTensor` is to parameters, and costs some microseconds an operation where
DTensor's dispatch costs a hundred, forward and backward: hence it stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from meshbolt.errors import UnsupportedError
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import whole
from meshbolt.tensor.layout import Layout, SplitLostError, whole_shape

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_RULES: dict[Any, Rule] = {}
_PLACES = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)
# Of torch's getters and the like, what the whole tensor answers.
_FACTS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex")
) | {torch.is_floating_point, torch.is_complex, torch.numel, torch.Tensor.__len__}


class SplitTensor(torch.Tensor):
    """This rank's part of a tensor, with the shape of the whole.

    Attributes:
        local: this rank's part, an ordinary tensor with a gradient's history.
        division: which dim is split, and how.
        axis: the ranks that hold the parts.
        sequence_dim: of a parameter, the dim of a layer's output that is to be left split, None for none.
        sources: names of the layers it comes from, where a module is being looked at.
    """

    local: Tensor
    division: Layout
    axis: Axis
    sequence_dim: int | None
    sources: frozenset[str]

    @staticmethod
    def __new__(
        cls,
        local: Tensor,
        layout: Layout,
        axis: Axis,
        *,
        sequence_dim: int | None = None,
        sources: frozenset[str] = frozenset(),
    ) -> SplitTensor:
        """Stand for the whole of which this rank has a part.

        Args:
            local: this rank's part.
            layout: of the whole.
            axis: the ranks.
            sequence_dim: as the attribute.
            sources: as the attribute.
        """
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            whole_shape(local.shape, layout, axis.size),
            dtype=local.dtype,
            device=local.device,
            requires_grad=local.requires_grad,
        )
        made.local, made.division, made.axis = local, layout, axis
        made.sequence_dim, made.sources = sequence_dim, sources
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        """Return what is where."""
        return f"SplitTensor({tuple(self.shape)}, {self.division} over {self.axis.size} ranks, local={self.local!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do on parts what a function of torch is to do on wholes."""
        given = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            try:
                result = rule(func, args, given)
            except SplitLostError as failure:
                return _on_wholes(func, args, given, failure)
            return result if not _NOTED else _with_all_sources(result, args, given)
        if func in _FACTS or getattr(func, "__name__", "") == "__get__":
            return _fact(func, args, given)
        return _on_wholes(func, args, given, SplitLostError("it is not among the operations that keep a split"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what reaches a tensor past torch's functions."""
        raise UnsupportedError(
            f"{func} reached an activation that is split over tensor-parallel ranks by a way that cannot be followed, such as a "
            "torch.autograd.Function or a compiled kernel. Leave the layers around it out of the plan of TensorParallel."
        )


def rule(*names: str, also: Iterable[Any] = ()) -> Callable[[Rule], Rule]:
    """Make a function the rule for torch's functions and methods of these names.

    Args:
        names: as in `torch`, `torch.Tensor` and `torch.nn.functional`; each has to be in one of them.
        also: further functions.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            found = [getattr(place, name) for place in _PLACES if callable(getattr(place, name, None))]
            if not found:
                raise AssertionError(f"torch has no {name}.")
            _RULES.update(dict.fromkeys(found, function))
        _RULES.update(dict.fromkeys(also, function))
        return function

    return register


def splits_in(*trees: Any) -> list[SplitTensor]:
    """Return the split tensors in arguments, nested ones too."""
    return [leaf for tree in trees for leaf in tree_leaves(tree) if isinstance(leaf, SplitTensor)]


def like(
    split: SplitTensor, local: Tensor, layout: Layout | None = None, *, of: Iterable[SplitTensor] = ()
) -> SplitTensor:
    """Return a result as a split tensor.

    Args:
        split: what it was computed from.
        local: this rank's part of the result.
        layout: of the result; None: as before.
        of: what else it was computed from.
    """
    sources = split.sources.union(*(other.sources for other in of)) if split.sources else split.sources
    return SplitTensor(local, layout or split.division, split.axis, sources=sources)


def gathered(value: Any) -> Any:
    """Return a value with whole tensors in the place of split ones, for what every rank computes alike."""
    if isinstance(value, SplitTensor):
        return whole(value.local, value.division, value.axis)
    if isinstance(value, Tensor):
        return value
    return tree_map_only(SplitTensor, gathered, value)


def _fact(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    if name in ("grad_fn", "is_leaf", "requires_grad"):
        return getattr(args[0].local, name)
    if name in ("data", "T", "mT", "H", "mH", "real", "imag", "grad"):
        if name in ("T", "mT"):
            return args[0].transpose(-2, -1)
        return _on_wholes(func, args, kwargs, SplitLostError("it is not among the operations that keep a split"))
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _on_wholes(func: Any, args: Any, kwargs: Mapping[str, Any], failure: SplitLostError) -> Any:
    name = getattr(func, "__name__", str(func))
    written = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if (written and args and isinstance(args[0], SplitTensor)) or isinstance(kwargs.get("out"), Tensor):
        raise UnsupportedError(
            f"{name} writes into an activation that is split over tensor-parallel ranks, which cannot be done: {failure}. Write "
            f"the operation without changing its input, or leave the layers around it out of the plan of TensorParallel."
        )
    splits = splits_in(args, kwargs)
    splits[0].axis.report(name, failure, splits)
    return func(*gathered(tuple(args)), **gathered(dict(kwargs)))


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
