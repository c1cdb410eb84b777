"""Read whole or sharded tensors into the sharded module, whatever layout they come from.

Everything is compared before anything is written, so that a load that fails leaves the module as it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import distributed_tensor, local_tensor, tree_map
from meshbolt.engine.gathered import local_part
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.errors import CheckpointError, UnsupportedError
from meshbolt.pipeline.taint import is_foreign

_SHOWN_NAMES = 10


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
            "Build the module as it was when they were saved, or rename what was renamed since in its on_load_checkpoint. Names "
            "may differ with strict_loading=False on the LightningModule (strict=False in Fabric), which loads what fits; shapes "
            "may not."
        )
    return lists


def load_model(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict into the sharded module, as far as the names go; it was compared with `check_weights` before.

    Args:
        module: sharded, with nothing gathered; its `load_state_dict` is called, so that parts which keep state in ways of
            their own (metrics, quantised layers) get it back.
        state: by name, whole tensors or tensors in the layout of the module's own. What belongs to parameters that another
            stage of a pipeline holds is not looked at, and placeholders are passed over, but not where a parameter has
            values here.
    """
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    device = next((local_tensor(parameter).device for parameter in module.parameters()), torch.device("cpu"))
    placed: Any = copy.copy(state)  # with the versions of modules that it may have
    for name in (module.state_dict().keys() & state.keys()) - own.keys():
        if _is_placeholder(state[name]):
            del placed[name]
            continue
        # Modules may keep these as they are, instead of copying them to where their own are.
        placed[name] = tree_map(functools.partial(_placed, device=device), state[name])
    for name in state.keys() & own.keys():
        if is_foreign(own[name]) or (_is_placeholder(state[name]) and not isinstance(own[name], nn.Parameter)):
            # Its own, since modules may ask for all of their names.
            placed[name] = own[name].detach()
    module.load_state_dict(placed, strict=False)


def follow_state_dicts(module: nn.Module, *, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Let `state_dict` and `load_state_dict`, of the module and of every part of it, work on shards at any time.

    Args:
        module: sharded, with nothing gathered, before its first forward.
        before: called before anything is read or written; leaves nothing gathered.
        after: called after it.
    """
    for child in module.modules():
        if not any(isinstance(parameter, DTensor) for parameter in child._parameters.values()):
            continue
        child.register_state_dict_pre_hook(lambda *_: before())
        child.register_state_dict_post_hook(lambda *_: after())
        child.register_load_state_dict_pre_hook(lambda *args: _divide(*args[:4], before=before))
        child.register_load_state_dict_post_hook(lambda *_: after())


def _divide(
    child: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *, before: Callable[[], None]
) -> None:
    """Put this rank's part in the place of every whole tensor that is to be loaded into one of the child's shards."""
    if metadata.get("assign_to_params_buffers", False):
        raise UnsupportedError(
            f"load_state_dict(assign=True) would put its tensors in the place of the shards of {type(child).__name__}, which "
            "would not be used. Leave assign out: the values are copied into the shards."
        )
    before()
    for key, parameter in child._parameters.items():
        value = state.get(prefix + key)
        is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        # torch itself says which values are of another shape.
        if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
            part = local_part(value.detach(), like=parameter).to(local_tensor(parameter).device)
            state[prefix + key] = distributed_tensor(part, like=parameter, placements=parameter.placements)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and held_elsewhere(value)


def _placed(leaf: Any, *, device: torch.device) -> Any:
    is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor)
    return leaf.to(device, copy=True) if is_plain else leaf


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
