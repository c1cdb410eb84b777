"""What stands in the places of parameters that other ranks hold, and says so to whoever asks for their values.

Hooks of the user see every parameter of the module, on every rank. Shapes, dtypes, `requires_grad` and optimizers need no
values, and whatever is computed from such a parameter is again a tensor without values; printing it says where it is. What reads
a number of it, compares it, writes it into another tensor or saves it is refused by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshbolt.compat import FakeTensor, NeedsValues, tree_leaves, tree_map_only
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.drawn import draw_as_well
from meshbolt.pipeline.taint import Foreign


class HeldElsewhereError(UnsupportedError):
    """A value was asked for that another rank of the pipeline holds."""


class Held(FakeTensor):
    """A parameter that another rank holds, or what was computed from one.

    Attributes:
        origin: the parameter, in words: its name and who holds it.
    """

    origin: str = "a parameter of another stage"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it is and who holds it."""
        kind = "Parameter" if isinstance(self, torch.nn.Parameter) else "tensor of"
        return f"<{kind} {self.origin}: {list(self.shape)} {str(self.dtype).removeprefix('torch.')}, no values on this rank>"

    def __format__(self, _spec: str) -> str:
        """Return what it is and who holds it, whatever the format."""
        return repr(self)

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise _refusal(self.origin, "numpy() asks for its values")

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise _refusal(self.origin, "numpy asks for its values")

    def tolist(self) -> Any:
        """Refuse."""
        raise _refusal(self.origin, "tolist() asks for its values")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return another one, as of an average of weights that is kept beside them."""
        if id(self) not in memo:
            made = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Refuse to be saved or sent."""
        raise HeldElsewhereError(
            f"{self.origin}, and this rank has no values of it that could be saved or sent, as torch.save(module.state_dict()) "
            "would. Save with trainer.save_checkpoint(path) or fabric.save(path, state), which write the parameters of all "
            "stages; or save inside of `with strategy.gathered(module):` on all ranks, which has them whole."
        )


class Elsewhere(Foreign):
    """Makes tensors that stand for parameters of other ranks, and computes with them."""

    def stand_in(self, name: str, parameter: torch.Tensor, *, holder: str, device: torch.device) -> torch.Tensor:
        """Return what stands for a parameter.

        Args:
            name: the parameter's.
            parameter: itself, which is not read.
            holder: who holds it, in words.
            device: where computations with it would take place.
        """
        made = self.like(parameter, device=device)
        return _marked(made, f"{name!r} is held by {holder}" if holder else Held.origin)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute; what comes out remembers where it is from."""
        origin = _origin((*args, *kwargs.values()) if kwargs else args)
        draw_as_well(func, args, kwargs or {})
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except NeedsValues:
            raise _refusal(origin, f"{func} asks for its values") from None
        if isinstance(result, torch.Tensor):
            return _marked(result, origin)
        return tree_map_only(FakeTensor, lambda tensor: _marked(tensor, origin), result)

    def refuse_write(self, func: Any, written: torch.Tensor, given: Sequence[Any]) -> UnsupportedError:
        """Return the error for a foreign value that is to be written into a tensor of this rank.

        Args:
            func: what writes.
            written: to which tensor.
            given: the arguments of what writes.
        """
        return _refusal(
            _origin(tree_leaves(given)), f"{func} writes it into a tensor of {list(written.shape)} of this rank"
        )


def _marked(tensor: torch.Tensor, origin: str) -> torch.Tensor:
    # By its class: what torch makes of one of our tensors is one of torch's.
    if type(tensor) is FakeTensor:
        tensor.__class__ = Held
        tensor.origin = origin  # type: ignore[attr-defined]
    return tensor


def _origin(given: Sequence[Any]) -> str:
    for each in given:
        if type(each) is Held:
            return each.origin
        if isinstance(each, (tuple, list)) and (origin := _origin(each)) is not Held.origin:
            return origin
    return Held.origin


def _refusal(origin: str, what: str) -> HeldElsewhereError:
    return HeldElsewhereError(
        f"{origin}, and this rank has no values of it: {what}. Under pipeline parallelism each rank has the parameters of its "
        "own stages. Read weights on all ranks inside of `with strategy.gathered(module):`, norms of gradients with "
        "strategy.grad_norm(), and leave out what this rank does not hold where each may do its own: "
        "`if not meshbolt.pipeline.is_foreign(parameter)`."
    )
