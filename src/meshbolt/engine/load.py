"""Read whole or sharded tensors into the sharded module, whatever layout they come from.

Everything is compared before anything is written, so that a load that fails leaves the module as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import local_part
from meshbolt.errors import CheckpointError

_SHOWN_NAMES = 10
_EXTRA_STATE = "_extra_state"


@runtime_checkable
class _Described(Protocol):
    """A tensor, or what is known of one that is not read yet."""

    @property
    def shape(self) -> Any:
        """Of the whole tensor."""

    @property
    def dtype(self) -> Any:
        """Of its elements."""


def check_weights(
    live: Mapping[str, Any],
    saved: Mapping[str, Any],
    *,
    strict: bool,
    source: str,
    left_out: frozenset[str] = frozenset(),
) -> str:
    """Compare the weights of a checkpoint with the module's, by name, shape and kind of numbers.

    Args:
        live: the module's state dict.
        saved: by name, the checkpoint's tensors, or what is known of them.
        strict: refuse missing and unknown names. What differs in shape is refused always.
        source: where the weights come from, for messages.
        left_out: names that were left out of the checkpoint on purpose.

    Returns:
        The names that differ, as lines of a message; empty where none do, and always where `strict`.

    Raises:
        CheckpointError: they differ; lists how.
    """
    both = [(name, live[name], saved[name]) for name in live if name in saved]
    missing = sorted(set(live) - set(saved) - left_out)
    unexpected = sorted((set(saved) | left_out) - set(live))
    wrong = [f"{name}: {_words(value)} there, {_words(own)} here" for name, own, value in both if not _fits(own, value)]
    lists = _listed("missing there", missing) + _listed("unknown here", unexpected)
    if wrong or (strict and lists):
        raise CheckpointError(
            f"The weights in {source} do not fit this module.{lists}{_listed('of another shape or kind', wrong)}\n"
            "Build the module as it was when they were saved. Names may differ with strict_loading=False on the "
            "LightningModule (strict=False in Fabric), which loads what fits; shapes may not."
        )
    return lists


@torch.no_grad()
def load_model(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy a state dict into the sharded module, as far as the names go; it was compared with `check_weights` before.

    Args:
        module: sharded, with nothing gathered.
        state: by name, whole tensors or tensors in the layout of the module's own.
    """
    for name, target in module.state_dict().items():
        value = state.get(name, target)
        if value is target:
            continue
        if isinstance(target, torch.Tensor):
            local_tensor(target).copy_(_own_part(target, value))
        elif name.endswith(_EXTRA_STATE):
            module.get_submodule(name.removesuffix(_EXTRA_STATE).rstrip(".")).set_extra_state(value)


def _own_part(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, DTensor):
        return local_tensor(value)
    return local_part(value, like=target) if isinstance(target, DTensor) else value


def _fits(own: Any, value: Any) -> bool:
    if not isinstance(own, torch.Tensor):
        return True
    return (
        isinstance(value, _Described)
        and tuple(own.shape) == tuple(value.shape)
        and torch.can_cast(value.dtype, own.dtype)
    )


def _words(value: Any) -> str:
    if not isinstance(value, _Described):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f"\n    and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"\n  {len(names)} {what}:" + "".join(f"\n    {name}" for name in names[:_SHOWN_NAMES]) + more
