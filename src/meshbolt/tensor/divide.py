"""Divide the parameters of a plan's modules, and let their forwards see them as split tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_flatten, tree_unflatten

from meshbolt.compat import distributed_part, divided_placement, sections_of
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import own_part
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.part import Split
from meshbolt.tensor.plans import TensorPlan
from meshbolt.tensor.shown import as_objects, as_tensors, owner_of, show_split
from meshbolt.tensor.split import like


class Division:
    """A module's parallel layers, over the `tp` axis of a mesh."""

    def __init__(self, plan: TensorPlan, *, mesh: DeviceMesh) -> None:
        """Take a plan; nothing is changed yet.

        Args:
            plan: which layers are divided, and how.
            mesh: the `tp` axis.
        """
        self._plan, self._mesh, self._sequence = plan.modules, mesh, plan.sequence
        self.axis = Axis(mesh.get_group(), insists=plan.insists)
        self._made: dict[nn.Parameter, nn.Parameter] = {}

    def watch(self, module: nn.Module, *, compiled: Iterable[nn.Module]) -> None:
        """Let the forwards of parallel modules see their parameters as split tensors.

        Args:
            module: the user's whole module, before it is sharded.
            compiled: the blocks in it that will be compiled.
        """
        inside = {child for block in compiled for child in block.modules()}
        for child in module.modules():
            if isinstance(child, nn.TransformerEncoder):
                # In evaluation it would make nested tensors, for a kernel that does not know of divided weights.
                child.use_nested_tensor = False
        for name, entry in self._plan.items():
            child, sequence = module.get_submodule(name), self._sequence and entry.sums
            show_split(child, entry, axis=self.axis, sequence=sequence, is_compiled=child in inside)

    def divide(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Replace whole parameters by this rank's parts of them, as DTensors over the axis.

        Args:
            root: the user's whole module.
            modules: by name, those whose own parameters are to be divided now, if they are in the plan; all are full.
        """
        for name, entry in self._plan.items():
            for key, layout in entry.layouts.items():
                owner, own_key = owner_of(name, key)
                if owner in modules:
                    self._divide(root.get_submodule(owner), own_key, layout)

    def _divide(self, owner: nn.Module, key: str, layout: Layout) -> None:
        parameter = owner._parameters[key]
        if parameter is None or isinstance(parameter, DTensor):
            return
        if parameter not in self._made:
            part = own_part(parameter.detach(), layout, self.axis).contiguous().clone()
            placement = divided_placement(layout.dim, layout.sections)
            shared = distributed_part(part, mesh=self._mesh, placements=[placement], shape=parameter.shape)
            made = nn.Parameter(shared, requires_grad=parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            self._made[parameter] = made
        owner._parameters[key] = self._made[parameter]

    def forget(self) -> None:
        """Let go of the whole parameters that were divided."""
        self._made.clear()


def shard_dim(parameter: nn.Parameter) -> Shard | None:
    """Return along which dim a divided parameter is sharded over the data-parallel ranks; None for the first.

    Parameters of several sections are sharded along the other dim: of their first one, a rank's part is not one run.
    """
    if isinstance(parameter, DTensor) and max(sections_of(parameter).values()) > 1:
        return Shard(1 - parameter.placements[0].dim)  # type: ignore[attr-defined]
    return None


def let_splits_through(unit: nn.Module) -> None:
    """Let split activations pass the hooks of a sharded unit, which see ordinary tensors and put autograd's hooks on those.

    Args:
        unit: sharded already, so that its hooks are there.
    """
    slot: list[Any] = []

    def plain_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        slot[:] = [_plain((args, kwargs))]
        return slot[0][0]

    def split_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _split_again((args, kwargs), slot.pop()[1])

    def plain_outputs(_: nn.Module, __: Any, output: Any) -> Any:
        slot[:] = [_plain(output)]
        return slot[0][0]

    def split_outputs(_: nn.Module, __: Any, output: Any) -> Any:
        return _split_again(output, slot.pop()[1])

    unit.register_forward_pre_hook(plain_inputs, prepend=True, with_kwargs=True)
    unit.register_forward_pre_hook(split_inputs, with_kwargs=True)
    unit.register_forward_hook(plain_outputs, prepend=True)
    unit.register_forward_hook(split_outputs)


def for_compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a compiled one with split tensors in the form that can be compiled.

    Args:
        forward: compiled.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = as_objects((args, kwargs))
        return as_tensors(forward(*args, **kwargs))

    return called


def plain_leaves(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Take arguments apart into leaves without split tensors, for what saves them as ordinary ones.

    Args:
        tree: arguments in any nesting.

    Returns:
        The leaves, split tensors as this rank's parts; and a function that makes the arguments of leaves again.
    """
    plain, splits = _plain(tree)
    leaves, structure = tree_flatten(plain)
    return leaves, lambda again: _split_again(tree_unflatten(list(again), structure), splits)


def _plain(tree: Any) -> tuple[Any, Mapping[int, Split]]:
    leaves, structure = tree_flatten(tree)
    splits = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Split)}
    if not splits:
        return tree, splits
    return tree_unflatten([leaf.local if isinstance(leaf, Split) else leaf for leaf in leaves], structure), splits


def _split_again(tree: Any, splits: Mapping[int, Split]) -> Any:
    if not splits:
        return tree
    leaves, structure = tree_flatten(tree)
    for index, split in splits.items():
        leaves[index] = like(split, leaves[index])
    return tree_unflatten(leaves, structure)
