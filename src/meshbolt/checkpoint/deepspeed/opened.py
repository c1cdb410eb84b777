"""A checkpoint of DeepSpeed's, opened: everything in it by the names of the user's module, whatever wrote it in which pieces."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.deepspeed.files import read_file
from meshbolt.checkpoint.deepspeed.layout import Layout, find_layout
from meshbolt.checkpoint.deepspeed.models import OWN_KEYS, Models, read_models
from meshbolt.checkpoint.deepspeed.pipeline import tied_first, without_copies
from meshbolt.checkpoint.deepspeed.plain import is_wrapped, numbered_by_layer, trained_without_names
from meshbolt.checkpoint.deepspeed.settings import LossScale, loss_scale_of, optimizer_of
from meshbolt.checkpoint.deepspeed.trained import Trained, merged, stage_of, trained_by
from meshbolt.checkpoint.deepspeed.trainer import lightnings_dictionary
from meshbolt.checkpoint.deepspeed.universal import trained_universal
from meshbolt.errors import CheckpointError, MeshboltError

_LIGHTNING = "pytorch-lightning_version"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """What one save holds. Its tensors stay in its files, and are read when they are used, in runs.

    Attributes:
        name: its directory.
        tag: of the save.
        kind: "zero", "bf16" (DeepSpeed's optimizer for bfloat16 that keeps gradients in float32), "plain" (without ZeRO),
            "pipeline" or "universal".
        stage: of ZeRO.
        world: how many data-parallel ranks have written it.
        weights: by name: master weights where there are any, else as the model had them; buffers are among them.
        optimizer: "state" and "param_groups", by name; by number where no file has names; None where there is none.
        scheduler: the state of the learning rate scheduler, if any.
        loss_scaler: None where losses were not scaled.
        global_steps: of the optimizer, those that were skipped among them.
        global_samples: that they took.
        skipped_steps: for an overflow.
        client_state: what the user had saved with it; of Lightning, its dictionary.
        is_lightnings: whether Lightning has saved it.
        ds_config: DeepSpeed's JSON.
        ds_version: DeepSpeed's.
        notes: what the user should know, as sentences.
    """

    name: str
    tag: str
    kind: str
    stage: int
    world: int
    weights: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    loss_scaler: LossScale | None
    global_steps: int
    global_samples: int
    skipped_steps: int
    client_state: dict[str, Any]
    is_lightnings: bool
    ds_config: dict[str, Any]
    ds_version: str
    notes: tuple[str, ...]

    def as_lightning(self, *, prefix: str = "") -> dict[str, Any]:
        """Return the dictionary that a Trainer saves and resumes from, with the same tensors; see `trainer.py`.

        Args:
            prefix: what is put before each name: the attribute of the LightningModule that the weights belong to, with a dot.
        """
        counters = {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "stage": self.stage,
            "world": self.world,
            "ds_version": self.ds_version,
            "ds_config": self.ds_config,
        }
        return lightnings_dictionary(
            weights=self.weights,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            loss_scaler=self.loss_scaler,
            client_state=self.client_state,
            counters=counters,
            is_lightnings=self.is_lightnings,
            prefix=prefix,
        )


def open_deepspeed(
    directory: str | os.PathLike[str], tag: str | None = None, *, weights_only: bool = True
) -> DeepSpeedCheckpoint:
    """Return what DeepSpeed has saved, without DeepSpeed; nothing large is read yet.

    Args:
        directory: that DeepSpeed was told to save to, or of one save in it, or the `.ckpt` directory of Lightning's strategy.
        tag: which save; None: the one that the file `latest` names.
        weights_only: False builds objects of any class, which runs code from the files; else plain data only.

    Raises:
        CheckpointError: it cannot be read: a file is missing, damaged, of another save, or holds objects of classes that
            `weights_only` does not allow.
        UnsupportedError: it has experts, slices of tensor parallelism, or state in swap files.
    """
    try:
        layout = find_layout(directory, tag=tag)
        models = read_models(layout, weights_only=weights_only)
        return _opened(layout, models, weights_only=weights_only)
    except MeshboltError as error:
        raise type(error)(f"DeepSpeed's checkpoint {os.fspath(directory)!r} cannot be read: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"DeepSpeed's checkpoint {os.fspath(directory)!r} cannot be read: something in it is not as DeepSpeed writes it "
            f"({in_words(error)}). It is damaged, or of a release that is not known"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was found of the optimizer.

    Attributes:
        kind: of the checkpoint.
        stage: of ZeRO.
        trained: master weights and state by name.
        saved: DeepSpeed's own state of the optimizer, for the loss scale.
        numbered: state by number, where there are no names.
        notes: what the user should know.
    """

    kind: str
    stage: int
    trained: Trained
    saved: Mapping[str, Any]
    numbered: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def _opened(layout: Layout, models: Models, *, weights_only: bool) -> DeepSpeedCheckpoint:
    first = models.first
    config = _config_of(models)
    found = _find(layout, models, weights_only=weights_only)
    weights = models.whole(found.trained)
    client = {key: value for key, value in first.items() if key not in OWN_KEYS}
    without = _without_wrapper(weights, client)
    optimizer, notes = _optimizer(found, models, config, without)
    return DeepSpeedCheckpoint(
        name=str(layout.directory),
        tag=layout.tag,
        kind=found.kind,
        stage=found.stage,
        world=int(first.get("dp_world_size", 1)),
        weights={without(name): tensor for name, tensor in weights.items()},
        optimizer=optimizer,
        scheduler=first.get("lr_scheduler"),
        loss_scaler=loss_scale_of(found.saved),
        global_steps=int(first.get("global_steps", 0)),
        global_samples=int(first.get("global_samples", 0)),
        skipped_steps=int(first.get("skipped_steps", 0)),
        client_state=client,
        is_lightnings=_LIGHTNING in client,
        ds_config=config,
        ds_version=str(first.get("ds_version", "")),
        notes=(*models.notes, *found.notes, *notes),
    )


_MIXED_UP = (
    "it was made universal from a run with round_robin_gradients, whose parameters DeepSpeed's converter cuts out at wrong "
    "places: what it has written is not what was trained. Import the directory that the run has saved"
)


def _config_of(models: Models) -> dict[str, Any]:
    found = models.first.get("ds_config")
    return dict(found) if isinstance(found, Mapping) else {}


def _find(layout: Layout, models: Models, *, weights_only: bool) -> _Found:
    first_config = _config_of(models)
    if layout.universal is not None:
        if (first_config.get("zero_optimization") or {}).get("round_robin_gradients"):
            raise CheckpointError(_MIXED_UP)
        trained, common = trained_universal(layout.universal, _shapes_of_all(models), weights_only=weights_only)
        named = {name for ranks in models.files.values() for name in ranks[0].get("buffer_names") or ()}
        lost = sorted(named - models.state.keys())
        notes = (
            f"Buffers ({', '.join(lost[:3])}) are in no file: DeepSpeed's converter leaves out those of a pipeline.",
        )
        return _Found(
            kind="universal", stage=stage_of(common), trained=trained, saved=common, notes=notes if lost else ()
        )
    if layout.optimizers:
        return _in_parts(layout, models, weights_only=weights_only)
    kind = "pipeline" if layout.layers else "plain"
    if any(models.shapes(slot) for slot in models.files):
        return _without_files(models, kind=kind)
    return _without_zero(models, kind=kind)


def _shapes_of_all(models: Models) -> list[dict[str, Sequence[int]]]:
    found: list[dict[str, Sequence[int]]] = []
    for slot in models.files:
        for number, shapes in enumerate(models.shapes(slot)):
            found += [{}] if number == len(found) else []
            found[number] |= shapes
    return found


def _in_parts(layout: Layout, models: Models, *, weights_only: bool) -> _Found:
    slots = sorted(models.files)
    if absent := [slot for slot in slots if not layout.optimizers_of(slot)]:
        raise CheckpointError(f"the optimizer files of mp_rank {absent} are missing")
    saved = {
        slot: [
            read_file(path, weights_only=weights_only)["optimizer_state_dict"] for path in layout.optimizers_of(slot)
        ]
        for slot in slots
    }
    trained = merged([trained_by(models.shapes(slot), saved[slot]) for slot in slots])
    first = saved[slots[0]][0]
    is_bf16 = "zero_stage" not in first
    kind = "pipeline" if layout.layers else "bf16" if is_bf16 else "zero"
    return _Found(kind=kind, stage=stage_of(first), trained=trained, saved=first)


def _without_files(models: Models, *, kind: str) -> _Found:
    """Return what is left where the optimizer's files were deleted: the weights that the model computed with."""
    files = [ranks for ranks in models.files.values() if len(ranks) > 1]
    empty = [name for name, tensor in models.state.items() if not tensor.numel() and name not in models.buffers]
    if files or empty:
        raise CheckpointError(
            "its optimizer files (..._optim_states.pt) are missing, and with ZeRO-3 all weights are in these. Copy the whole "
            "directory"
        )
    note = (
        "Its optimizer files (..._optim_states.pt) are missing: weights are as the model computed with them, without master "
        "weights."
    )
    return _Found(kind="zero" if kind == "plain" else kind, stage=1, trained=Trained(), saved={}, notes=(note,))


def _without_zero(models: Models, *, kind: str) -> _Found:
    states: list[Mapping[str, Any]] = [ranks[0].get("optimizer") or {} for ranks in models.files.values()]
    if not all(states):
        return _Found(kind=kind, stage=0, trained=Trained(), saved={})
    saved = states[0]
    if is_wrapped(saved):
        rest, found = models.own_weights(), []
        for state in states:
            each = trained_without_names(state, rest)
            if each is None:
                return _Found(kind=kind, stage=0, trained=Trained(), saved=saved, notes=(_NOT_TOLD,))
            found.append(each)
            # What other stages train comes last: only tied layers are found there.
            taken = {name: rest.pop(name) for name in each.masters}
            rest = {**rest, **taken}
        return _Found(kind=kind, stage=0, trained=merged(found), saved=saved)
    if kind == "plain":
        return _Found(kind=kind, stage=0, trained=Trained(), saved=saved, numbered=dict(saved))
    weights = without_copies(models.own_weights())
    named = numbered_by_layer(states, weights)
    notes = () if named is not None else (_NOT_TOLD,)
    used = sum(len(group["params"]) for state in states for group in state["param_groups"])
    if named is not None and used > len(named.states):
        notes = (_TIED_WITHOUT_KEY,)
    return _Found(kind=kind, stage=0, trained=named or Trained(), saved=saved, notes=notes)


_TIED_WITHOUT_KEY = (
    "It has a layer that several stages use, and without ZeRO no file has its key: in the place of tied_modules.<key> its "
    "weights have the number of its first use before them."
)


_NOT_TOLD = (
    "Its files do not name the parameters that its optimizer's state belongs to, and they cannot be found out: the state is left "
    "out."
)


def _optimizer(
    found: _Found, models: Models, config: Mapping[str, Any], without: Callable[[str], str]
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    if found.numbered is not None:
        groups = found.numbered["param_groups"]
        return optimizer_of(found.numbered["state"], groups, config), ()
    trained = found.trained
    if trained.unknown:
        entries = ", ".join(sorted(trained.unknown))
        return None, (f"Its optimizer keeps {entries} in a form that is not known: its state is left out.",)
    groups = trained.groups
    if groups is None and trained.states:  # what was saved as elastic has no settings
        params = (config.get("optimizer") or {}).get("params") or {}
        groups = [{**params, "params": list(shapes)} for slot in models.files for shapes in models.shapes(slot)]
    if not groups:
        return None, ()
    order = _order_of(models, config)
    named = [{**group, "params": [without(name) for name in order(group["params"])]} for group in groups]
    states = {without(name): state for name, state in trained.states.items()}
    return optimizer_of(states, named, config), ()


def _order_of(models: Models, config: Mapping[str, Any]) -> Callable[[Sequence[str]], list[str]]:
    """Return what puts the names of a group in the order in which the user gave them."""
    if len(models.files) > 1:
        return tied_first
    zero = config.get("zero_optimization") or {}
    if not zero.get("round_robin_gradients"):
        return list
    places = {name: number for number, name in enumerate(models.state)}
    return lambda names: sorted(names, key=lambda name: places.get(name, len(places)))


def _without_wrapper(weights: Mapping[str, torch.Tensor], client: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what takes from a name what Lightning's strategies of old have put before it."""
    version = str(client.get(_LIGHTNING, ""))
    prefixes = ["_forward_module."] if version else []
    if version.startswith("1."):
        prefixes += ["module."]
    for prefix in prefixes:
        if weights and all(name.startswith(prefix) for name in weights):
            return lambda name: name.removeprefix(prefix)
    return str
