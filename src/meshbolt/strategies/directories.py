"""A state dict of any shape as a checkpoint directory: tensors sharded as they are, everything else beside them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint import TensorInfo, load_objects, load_tensors, open_tensors, saved_tensors
from meshbolt.checkpoint.agreement import Ranks
from meshbolt.checkpoint.chunks import bytes_of
from meshbolt.checkpoint.deepspeed import DeepSpeedCheckpoint
from meshbolt.checkpoint.optimizers import OWN, owners_in
from meshbolt.checkpoint.tree import join_tensors, markers, split_tensors
from meshbolt.collectives import agree_on_error
from meshbolt.config import Plan
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.engine.state import empty_like_saved
from meshbolt.errors import CheckpointError

_log = logging.getLogger(__name__)

# By data-parallel coordinate: random states, the buffers that differ from those of the first one, and those that a run which
# resumes goes on with, where they are others still.
_RANDOM, _BUFFERS, _RESUMED = (f"{OWN}.{kind}" for kind in ("random", "buffers", "resumed_buffers"))


def _nothing_to_check(_: object) -> None:
    """Accept anything; a function with a name, which can be sent to ranks that are spawned."""


@dataclass(frozen=True, kw_only=True)
class LoadInto:
    """What a checkpoint is read for; nothing of it is changed while it is read.

    Attributes:
        weights: tensors of modules, by key; saved ones are read in their layout, and those that another stage holds are not
            read.
        parameters: by the beginning of keys, the parameters by name that other sharded tensors under these keys belong to,
            and the state of optimizers. What belongs to those that another stage holds is not read.
        check: raises if the checkpoint does not fit; called, before any tensor is read, with what `load_tree` returns
            but for descriptions in the places of tensors.
        leave_out: entries at the top of the tree that are not read.
        resumes: it is read for a run that goes on where the saved one goes back to, such as the beginning of a window.
        of_deepspeeds: makes the tree of what DeepSpeed has saved; None: nothing here is loaded from such a directory.
        state_moves: the state of optimizers is copied to another place next; it stays in the checkpoint till then, and its
            tensors are read when they are used.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, nn.Parameter]] = field(default_factory=dict)
    check: Callable[[Loaded], object] = _nothing_to_check
    leave_out: frozenset[str] = field(default=frozenset())
    resumes: bool = False
    of_deepspeeds: Callable[[DeepSpeedCheckpoint], dict[str, Any]] | None = None
    state_moves: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint holds.

    Attributes:
        tree: what was saved, with tensors in their places, and placeholders on the meta device for those that another stage
            holds.
        notes: what was said about it when it was saved.
        random_state: of this rank's data-parallel coordinate, or of the first one where the numbers of them differ;
            empty if none was saved.
        same_ranks: whether as many data-parallel coordinates have saved it as load it.
        is_file: whether it is a single file or a directory of DeepSpeed's, which Lightning may have to bring up to date before
            it is compared.
    """

    tree: dict[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    random_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    same_ranks: bool = False
    is_file: bool = False


@dataclass(frozen=True, kw_only=True)
class ToSave:
    """What a checkpoint is to hold.

    Attributes:
        tree: a state dict of any shape; of rank 0 everything is saved, of the others the sharded tensors. Where ranks have
            stages of a pipeline, tensors that others hold are on the meta device, or without values: rank 0's tree says what
            there is, and the first stage that holds a tensor saves it, as rank 0 would.
        notes: plain data about the tree, for whoever loads it.
        random_state: this rank's.
        buffers: keys of tensors of modules that are no parameters: of them, each rank may have its own.
        resumed: by key, what a run that resumes puts in the place of some of them.
    """

    tree: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    random_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    buffers: frozenset[str] = field(default=frozenset())
    resumed: Mapping[str, torch.Tensor] = field(default_factory=dict)


def buffers_of(module: nn.Module, state: Mapping[str, Any], *, key: str) -> frozenset[str]:
    """Return the keys, in a tree, of the buffers of a module.

    Not of other tensors that it saves, such as the states of metrics: those may be lists, of other lengths on other ranks.

    Args:
        module: the module.
        state: its state dict, or a part of it.
        key: what the tree has it under.
    """
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return frozenset(f"{key}.{name}" for name in state if name in buffers)


def savable(state: ToSave, *, plan: Plan, ranks: Ranks, failing: str) -> dict[str, Any]:
    """Return what `save_directory` takes to write a checkpoint; a collective of all ranks.

    Of this rank, its shards, its random state, those buffers that differ from rank 0's, and those that a run which resumes has
    others for; of ranks that see the same samples, one saves the latter three, of a pipeline each stage its buffers.

    Args:
        state: this rank's.
        plan: what the run does.
        ranks: all of them.
        failing: how an error's message begins.

    Raises:
        CheckpointError: two tensors would have the same name, some rank has buffers that cannot be read, or no stage holds a
            tensor that the first one has in its tree; the same on every rank.
    """
    objects, tensors = ranks.agree(lambda: _split(state.tree), failing=failing)
    share = _share_of(tensors, plan=plan, ranks=ranks, failing=failing)
    sharded = {key for key, value in share.tensors.items() if isinstance(value, DTensor)}
    held = share.tensors if dist.get_rank() == share.first else {key: share.tensors[key] for key in sorted(sharded)}
    buffers = {key: share.tensors[key] for key in sorted(state.buffers & share.tensors.keys() - sharded)}
    resumed = {key: value for key, value in state.resumed.items() if key in buffers}
    apart = _stored_apart(buffers, resumed, first=share.first, ranks=ranks, failing=failing)
    # The random state is the same in all stages.
    own = {_RANDOM: {} if share.first else state.random_state, **apart}
    coordinate = plan.mesh.data_parallel_rank(dist.get_rank())
    if dist.get_rank() % plan.mesh.tp:
        own = {}  # the first of those that share a coordinate, and are in the same state, saves it
    return {
        "tensors": {
            **held,
            **{_prefix(kind, coordinate) + key: value for kind, values in own.items() for key, value in values.items()},
        },
        "objects": {**objects, OWN: {**state.notes, "sharded": share.sharded}},
        "plan": dict(plan.rows()),
        "versions": {"lightning": lightning.__version__},
        "keep_partial": plan.settings.checkpoint.keep_partial,
    }


def _split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in tree.items()}
    if taken := [key for key in (*objects, *tensors) if key == OWN or str(key).startswith(f"{OWN}.")]:
        raise CheckpointError(
            f"what is to be saved has an entry {taken[0]!r}, and meshbolt keeps notes of its own under {OWN!r}. Rename it"
        )
    return objects, tensors


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What is saved by the ranks that have the same stages of a pipeline as this one; without a pipeline, all ranks.

    Attributes:
        tensors: what they save, by key, as this rank has it.
        sharded: keys of all tensors that are sharded, whoever saves them.
        first: the first of these ranks, which saves what is not sharded.
    """

    tensors: Mapping[str, torch.Tensor]
    sharded: list[str]
    first: int


def _share_of(tensors: Mapping[str, torch.Tensor], *, plan: Plan, ranks: Ranks, failing: str) -> _Share:
    """Divide what is saved among the stages: each tensor goes to the first one that holds it.

    Args:
        tensors: of this rank's tree, by key.
        plan: what the run does.
        ranks: all of them.
        failing: how an error's message begins.
    """
    sharded = sorted(key for key, value in tensors.items() if isinstance(value, DTensor))
    if plan.mesh.pp == 1:
        return _Share(tensors=tensors, sharded=sharded, first=0)
    size = plan.mesh.world_size // plan.mesh.pp
    stage, position = divmod(dist.get_rank(), size)
    held = {key: value for key, value in tensors.items() if not held_elsewhere(value)}
    # Ranks of the same stages hold the same: the first of them speaks for all.
    told = ranks.gather(None if position else (list(tensors), list(held), sharded), failing=failing)[::size]
    named = told[0][0]
    holders = {key: number for number, (_, keys, _) in reversed(list(enumerate(told))) for key in keys}
    if lost := [key for key in named if key not in holders]:
        more = f", nor have {len(lost) - 1} others" if lost[1:] else ""
        raise CheckpointError(
            f"{failing}: {lost[0]!r} has no values on any rank{more}. Each stage of a pipeline saves what it holds: let the tree "
            "have such a tensor on every rank, with values on one of them."
        )
    if stray := sorted(holders.keys() - set(named)):
        _say_what_is_lost(stray)
    mine = {key for key in named if holders[key] == stage}
    return _Share(
        tensors={key: value for key, value in held.items() if key in mine},
        sharded=sorted({key for _, _, keys in told for key in keys}.intersection(named)),
        first=stage * size,
    )


def _say_what_is_lost(keys: list[str]) -> None:
    if dist.get_rank() == 0:
        _log.warning(
            "%r%s is not saved: only ranks of later pipeline stages have it, and rank 0 says what a checkpoint holds. Save an "
            "entry of that name on every rank, with a tensor on the meta device where it has no values.",
            keys[0],
            f" (like {len(keys) - 1} more)" if keys[1:] else "",
        )


def load_tree(
    path: str, into: LoadInto, *, weights_only: bool | None, plan: Plan, group: dist.ProcessGroup | None
) -> Loaded:
    """Read a checkpoint directory, whatever layout it was written in.

    Args:
        path: the same on every rank.
        into: what it is read for.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.
        plan: what this run does.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: it cannot be read.
        Exception: what `into.check` raises; on every rank, and before any tensor is read.
    """
    objects = load_objects(path, weights_only=weights_only, verify=plan.settings.checkpoint.verify, group=group)
    notes = objects.pop(OWN, {})
    objects = {key: value for key, value in objects.items() if key not in into.leave_out}
    saved = saved_tensors(path)
    agree_on_error(
        lambda: into.check(Loaded(tree=_joined(objects, saved), notes=notes)),  # type: ignore[arg-type]
        group=group,
    )
    coordinate = plan.mesh.data_parallel_rank(dist.get_rank())
    prefix, same_ranks = _random_state_for(coordinate, saved, plan=plan)
    own = [_prefix(_BUFFERS, coordinate)] if same_ranks else []
    if into.resumes:
        own.insert(0, _prefix(_RESUMED, coordinate if same_ranks else 0))
    places = {key: next((p + key for p in own if p + key in saved), key) for key in markers(objects)}
    states = owners_in(objects)
    owners = _owners(places, saved, sharded=set(notes.get("sharded", ())), states=states, into=into)
    stay = {key for key in states if into.state_moves and _may_stay(saved[places[key]], owners[key])}
    tensors = {
        key: empty_like_saved(torch.Size(saved[place].shape), saved[place].dtype, owners[key])
        for key, place in places.items()
        if key not in stay
    }
    random_keys = [key for key in saved if prefix and key.startswith(prefix)]
    random_state = {key: torch.empty(saved[key].shape, dtype=saved[key].dtype) for key in random_keys}
    held = {places[key]: tensor for key, tensor in tensors.items() if not held_elsewhere(tensor)}
    asked = {**held, **random_state}
    options: dict[str, Any] = {"verify": plan.settings.checkpoint.verify, "group": group}
    # Nothing is unexpected, since the objects name what is read; and all of it was made for this load.
    load_tensors(path, asked, prefix=(), fresh=asked.keys(), **options)
    if into.state_moves:
        tensors |= open_tensors(path, {key: _layout(saved[key], owners[key]) for key in sorted(stay)}, **options)
    return Loaded(
        tree=_joined(objects, tensors),
        notes=notes,
        random_state={key.removeprefix(prefix): value for key, value in random_state.items()},
        same_ranks=same_ranks,
    )


def left_out_of(key: str, notes: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of what was left out on purpose of the state under a key, as the notes of a checkpoint say it."""
    return frozenset(notes.get("left_out", {}).get(key, ()))


def _joined(objects: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {key: join_tensors(value, tensors) for key, value in objects.items()}


def _owners(
    places: Mapping[str, str],
    saved: Mapping[str, TensorInfo],
    *,
    sharded: set[str],
    states: Mapping[str, str],
    into: LoadInto,
) -> dict[str, torch.Tensor | None]:
    """Return, by key in the tree, the tensor in whose layout each is read; None: whole.

    Args:
        places: the key under which each was saved, by its key in the tree.
        saved: what is known of them.
        sharded: keys of those that were sharded.
        states: the name of its parameter, by the key of what is an optimizer's state.
        into: what they belong to.
    """
    owners: dict[str, torch.Tensor | None] = {}
    for key, place in places.items():
        owner = into.weights.get(key)
        if owner is None:
            owner = _trained_elsewhere(key, states.get(key), into.parameters)
        if owner is None and key in sharded:
            owner = _owner(key, torch.Size(saved[place].shape), into.parameters)
        owners[key] = owner
    return owners


def _may_stay(info: TensorInfo, owner: torch.Tensor | None) -> bool:
    """Return whether an optimizer's tensor may stay in the checkpoint for now: this rank needs it, and it is no count."""
    return bool(info.shape) and not (owner is not None and held_elsewhere(owner))


def _layout(info: TensorInfo, owner: torch.Tensor | None) -> DTensor | None:
    return owner if isinstance(owner, DTensor) and tuple(owner.shape) == info.shape else None


def _prefix(kind: str, coordinate: int) -> str:
    return f"{kind}.{coordinate}."


def _stored_apart(
    buffers: Mapping[str, torch.Tensor],
    resumed: Mapping[str, torch.Tensor],
    *,
    first: int,
    ranks: Ranks,
    failing: str,
) -> dict[str, dict[str, torch.Tensor]]:
    """Return those buffers of this rank that differ from the first one's in any bit, and those to resume with that differ."""
    digests = ranks.each(
        lambda: [{key: _digest(value) for key, value in values.items()} for values in (buffers, resumed)],
        failing=failing,
    )
    (now, then), (firsts, _) = digests[ranks.rank], digests[first]
    return {
        _BUFFERS: {key: value for key, value in buffers.items() if now[key] != firsts.get(key)},
        _RESUMED: {key: value for key, value in resumed.items() if then[key] != now[key]},
    }


def _digest(tensor: torch.Tensor) -> bytes:
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(bytes_of(tensor.detach().cpu().contiguous()))
    return content.digest()


def _random_state_for(coordinate: int, saved: Iterable[str], *, plan: Plan) -> tuple[str, bool]:
    """Return the beginning of the keys of the random state that a coordinate takes, and whether it is its own."""
    matches = (re.match(rf"{re.escape(_RANDOM)}\.(\d+)\.", key) for key in saved)
    found = {int(match[1]) for match in matches if match}
    if not found:
        return "", False
    same_ranks = found == set(range(plan.mesh.data_parallel_size))
    return _prefix(_RANDOM, coordinate if same_ranks else min(found)), same_ranks


def _owner(key: str, shape: torch.Size, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> nn.Parameter | None:
    """Return the parameter that a tensor belongs to: its name ends the key, or stands before the last part of it."""
    for prefix, named in parameters.items():
        parts = key.split(".") if key.startswith(prefix) else []
        for start in range(len(parts)):
            for end in (len(parts), len(parts) - 1):
                found = named.get(".".join(parts[start:end]))
                if found is not None and found.shape == shape:
                    return found
    return None


def _trained_elsewhere(
    key: str, name: str | None, parameters: Mapping[str, Mapping[str, nn.Parameter]]
) -> nn.Parameter | None:
    """Return the parameter of another stage that an optimizer's state belongs to, whatever its shape is; None if it is ours."""
    named = (found.get(name) for prefix, found in parameters.items() if name is not None and key.startswith(prefix))
    return next((found for found in named if found is not None and held_elsewhere(found)), None)
