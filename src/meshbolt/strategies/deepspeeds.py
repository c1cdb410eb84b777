"""A directory that DeepSpeed has written in the place of a checkpoint of ours: what it holds, under this run's names.

The tensors stay in their files; each rank reads of them what its shards need, when it needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from meshbolt.checkpoint.deepspeed import DeepSpeedCheckpoint, is_deepspeed, is_deepspeed_save, open_deepspeed
from meshbolt.checkpoint.directory import is_remote
from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.errors import CheckpointError
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.compat import plain_optimizer
from meshbolt.strategies.directories import Loaded, LoadInto
from meshbolt.strategies.files import check_schedules

_log = logging.getLogger(__name__)

_SHOWN = 3
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def is_deepspeeds(path: str, *, group: dist.ProcessGroup | None) -> bool:
    """Return whether a path is a directory that DeepSpeed has written; a collective of all ranks.

    Args:
        path: the same on every rank.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: it is for some ranks, and for others it is not; or it would be a save in such a directory, and is not
            there; on every rank.
    """
    same, found = same_on_all_ranks(not is_remote(path) and is_deepspeed(path), group=group)
    if not same:
        kinds = ["a checkpoint of DeepSpeed's" if there else "something else, or nothing" for there in found]
        raise CheckpointError(
            f"{path} is not the same on all ranks: {kinds} by rank. Put it on a file system that all ranks share."
        )
    if not found[0]:
        agree_on_error(lambda: _check_tag(path), group=group)
    return bool(found[0])


def _check_tag(path: str) -> None:
    place = Path(path)
    if is_remote(path) or place.exists() or not is_deepspeed(place.parent) or is_deepspeed_save(place.parent):
        return
    tags = sorted(entry.name for entry in place.parent.iterdir() if is_deepspeed_save(entry))
    raise CheckpointError(
        f"There is no {path}. {place.parent} has what DeepSpeed has saved under other tags: {', '.join(tags)}. Give one of "
        "them, or the directory alone for the save that its file 'latest' names."
    )


def read_deepspeed(path: str, into: LoadInto, *, weights_only: bool | None, group: dist.ProcessGroup | None) -> Loaded:
    """Return what a directory of DeepSpeed's holds; its tensors are whole, and in its files.

    Args:
        path: the same on every rank.
        into: what it is read for.
        weights_only: False builds objects of any class, which runs code from the files; else plain data only.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: it cannot be read, or is another one for other ranks; on every rank.
        Exception: what `into.check` raises; likewise.
    """
    found: list[Loaded] = []
    seen: list[tuple[Any, ...]] = []

    def read() -> None:
        opened = open_deepspeed(path, weights_only=weights_only is not False)
        seen.append((opened.tag, opened.global_steps, sorted(opened.weights)))
        if into.of_deepspeeds is None:
            raise CheckpointError(
                f"{path} was written by DeepSpeed. Give a module, an optimizer, or a dictionary of them."
            )
        found.append(Loaded(tree=into.of_deepspeeds(opened), is_file=True))

    agree_on_error(read, group=group)
    same, saves = same_on_all_ranks(seen[0], group=group)
    if not same:
        raise CheckpointError(
            f"{path} is not the same on all ranks: {[f'{tag} after {steps} steps' for tag, steps, _ in saves]} by rank. It was "
            "saved to at this moment, in which case load again, or the machines do not share the file system."
        )
    agree_on_error(lambda: into.check(found[0]), group=group)
    return found[0]


def tree_for_trainer(opened: DeepSpeedCheckpoint, module: pl.LightningModule, *, resumes: bool) -> dict[str, Any]:
    """Return Lightning's dictionary of what DeepSpeed has saved, under Lightning or without it.

    Args:
        opened: the checkpoint.
        module: of this run, with nothing gathered.
        resumes: the run goes on from there; else the optimizer's state is left out.

    Raises:
        CheckpointError: its weights fit nothing of the module, or several attributes as well as each other.
    """
    tree: dict[str, Any] = opened.as_lightning()
    renamed = renaming(tree["state_dict"], module, within=not opened.is_lightnings, source=opened.name)
    tree["state_dict"] = {renamed(name): value for name, value in tree["state_dict"].items()}
    states = tree.pop("optimizer_states", [])
    if resumes:
        tree["optimizer_states"] = [_renamed(state, renamed) for state in states]
        _say_what_is_not_taken(opened, module.trainer.precision_plugin)
        _say_what_is_by_number(opened)
    return tree


def tree_for_fabric(opened: DeepSpeedCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DeepSpeed has saved under the keys of those who take it; beside them the caller's entries and its counters.

    Args:
        opened: the checkpoint.
        state: what is loaded into: the user's module, its optimizer, its scheduler.

    Raises:
        CheckpointError: there are two of a kind, and DeepSpeed saves one; or none of its weights fits the module.
    """
    module = next((each for each in state.values() if isinstance(each, nn.Module)), nn.Module())
    renamed = renaming(opened.weights, module, within=False, source=opened.name)
    tree: dict[str, Any] = {**{key: getattr(opened, key) for key in _COUNTERS}, **opened.client_state}
    taken: dict[str, str] = {}
    for key, target in state.items():
        what, value = _for(target, opened, renamed)
        if what in taken:
            raise CheckpointError(
                f"{opened.name} was written by DeepSpeed, which saves one {what}, and {taken[what]!r} and {key!r} are both given "
                f"to take it. Leave one of them out, or load it from another checkpoint."
            )
        if what:
            taken[what] = key
            tree.pop(key, None)
        if value is not None:
            tree[key] = value
    return tree


def _for(target: Any, opened: DeepSpeedCheckpoint, renamed: Callable[[str], str]) -> tuple[str, Any]:
    """Return what kind of thing takes a part of the checkpoint, or "", and that part; None where there is none."""
    if isinstance(target, nn.Module):
        return "module", {renamed(name): value for name, value in opened.weights.items()}
    if isinstance(target, Optimizer):
        _say_what_is_by_number(opened)
        return "optimizer", opened.optimizer and _renamed(opened.optimizer, renamed)
    if isinstance(target, LRScheduler):
        check_schedules([opened.scheduler or {}], [target])
        return "learning rate scheduler", opened.scheduler
    if isinstance(target, MeshPrecision):
        _say_what_is_not_taken(opened, target)
        return "loss scale", {} if opened.loss_scaler is None else opened.loss_scaler.as_state()
    return "", None


def _say_what_is_not_taken(opened: DeepSpeedCheckpoint, precision: Any) -> None:
    scaler = opened.loss_scaler
    if scaler is None or not scaler.is_dynamic or getattr(precision, "loss_scaler", None) is not None:
        return
    if dist.get_rank() == 0:
        _log.warning(
            "The loss scale of %s (%g) is not taken: this run's precision has none. Use 16-mixed or fp16 to go on with it.",
            opened.name,
            scaler.scale,
        )


def _say_what_is_by_number(opened: DeepSpeedCheckpoint) -> None:
    groups = [] if opened.optimizer is None else opened.optimizer["param_groups"]
    if dist.get_rank() == 0 and any(not isinstance(key, str) for group in groups for key in group["params"]):
        _log.warning(
            "The optimizer's state in %s has numbers for parameters, no names: it is taken in the order of this run's groups, "
            "which must be as they were when it was saved.",
            opened.name,
        )


def take_rates(states: Iterable[Mapping[str, Any]], optimizers: Iterable[Any], schedulers: Collection[Any]) -> None:
    """Give optimizers whose settings were not saved the rates that their schedulers, which were, stand at.

    DeepSpeed's elastic saves are such: without this the first step would be taken at the rates of a new run.

    Args:
        states: the saved state of each optimizer.
        optimizers: of this run, with that state.
        schedulers: of this run, with their state.
    """
    for state, optimizer in zip(states, optimizers, strict=False):
        if any("lr" in group for group in state["param_groups"]):
            continue
        own = plain_optimizer(optimizer)
        for scheduler in (each for each in schedulers if plain_optimizer(each.optimizer) is own):
            for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate


def renaming(saved: Mapping[str, Any], module: nn.Module, *, within: bool, source: str) -> Callable[[str], str]:
    """Return what gives a saved name as this run's module has it.

    Args:
        saved: weights by name.
        module: of this run; where it has an `on_load_checkpoint`, that has the last word on what fits.
        within: the module that was saved may be an attribute of this one: the one that most of the names, shapes and trained
            parameters fit.
        source: where the weights come from, for messages.

    Raises:
        CheckpointError: no name fits, or several attributes fit as well as each other.
    """
    own = module.state_dict()
    # Layers of a pipeline that share weights stand in files under their numbers.
    tied: Mapping[str, str] = getattr(module, "tied_prefixes", {})

    def as_here(name: str) -> str:
        first = None if name in own else next((prefix for prefix in tied if name.startswith(prefix)), None)
        return name if first is None else f"{tied[first]}{name.removeprefix(first)}"

    best = _best_places({as_here(name): value for name, value in saved.items()}, module, own, within=within)
    is_hooked = isinstance(module, pl.LightningModule) and is_overridden("on_load_checkpoint", module)
    if not best and saved and own and not is_hooked:
        raise CheckpointError(
            f"The weights in {source} do not fit this module{', nor an attribute of it' if within else ''}: not one name is in "
            f"both. There are {_some(saved)}; here {_some(own)}. Give the module that was saved, or one that has it "
            "as an attribute."
        )
    if len(best) > 1 and not is_hooked:
        places = ", ".join(f"self.{each.removesuffix('.')}" if each else "the module itself" for each in best)
        raise CheckpointError(
            f"The weights in {source} fit several parts of this module as well as each other: {places}. Freeze those that they "
            "are not meant for by requires_grad_(False), or import the checkpoint under the names of one: meshbolt checkpoint "
            f"import --from deepspeed {source} start.ckpt --prefix {best[-1]}"
        )
    before = best[0] if len(best) == 1 else ""
    return lambda name: f"{before}{as_here(name)}"


def _best_places(saved: Mapping[str, Any], module: nn.Module, own: Mapping[str, Any], *, within: bool) -> list[str]:
    """Return the attributes, with a dot, that the most of saved names fit; "" for the module itself; empty where none does."""
    trained = {name for name, each in module.named_parameters(remove_duplicate=False) if each.requires_grad}
    found: dict[str, tuple[int, int, int]] = {}
    for name, value in own.items():
        starts = [0, *(at + 1 for at, letter in enumerate(name) if letter == "." and within)]
        for start in (each for each in starts if name[each:] in saved):
            names, shapes, trained_ones = found.get(name[:start], (0, 0, 0))
            other = saved[name[start:]]
            is_same = getattr(value, "shape", None) == getattr(other, "shape", None)
            found[name[:start]] = (names + 1, shapes + is_same, trained_ones + (name in trained))
    most = max(found.values(), default=None)
    return sorted(place for place, fit in found.items() if fit == most)


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def _renamed(state: Mapping[str, Any], renamed: Callable[[str], str]) -> dict[str, Any]:
    """Return an optimizer's state with other names; numbers stay."""

    def named(key: Any) -> Any:
        return renamed(key) if isinstance(key, str) else key

    groups = [{**group, "params": [named(key) for key in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {named(key): value for key, value in state["state"].items()}, "param_groups": groups}
