"""The model's files of one save: weights as the model had them, buffers, frozen weights, shapes and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed.files import read_file
from meshbolt.checkpoint.deepspeed.layout import Layout
from meshbolt.checkpoint.deepspeed.pieces import Row, as_stored, joined
from meshbolt.checkpoint.deepspeed.pipeline import layer_weights
from meshbolt.checkpoint.deepspeed.trained import Shapes, Trained
from meshbolt.errors import CheckpointError, UnsupportedError

OWN_KEYS = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "universal_checkpoint_info",
        "num_experts",
    }
)
"""What DeepSpeed puts into a model's file; everything else there is the user's."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The model's files.

    Attributes:
        files: by slot (the stage of a pipeline), what the file of each data-parallel rank holds; where there is one for all,
            that one.
        state: tensors as the model had them, by name. Of stage 3 only buffers are real.
        notes: what the user should know, as sentences.
        buffers: names of those among the tensors.
        others: what else modules have in their state, by name, and is no tensor.
    """

    files: Mapping[int, Sequence[Mapping[str, Any]]]
    state: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()
    buffers: frozenset[str] = field(default=frozenset())
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Mapping[str, Any]:
        """The file of the first rank of all, which has what is the same for all."""
        return self.files[min(self.files)][0]

    def shapes(self, slot: int) -> list[Shapes]:
        """Return the shapes of the parameters that a slot trains, by group or part of a group; none where no file has them."""
        found = self.files[slot][0].get("param_shapes") or []
        return [dict(group) for group in found] if not isinstance(found, Mapping) else [dict(found)]

    def owners(self) -> dict[str, str]:
        """Return whose weights they are by the other names that they have."""
        told = self.first.get("shared_params") or {}
        found = dict(told)
        trained = {name for slot in self.files for group in self.shapes(slot) for name in group}
        # Not every file tells, but each keeps what shares memory.
        ordered = sorted(self.state, key=lambda name: name not in trained)
        first = {_place(self.state[name]): name for name in reversed(ordered) if self.state[name].numel()}
        for name, tensor in self.state.items():
            owner = first.get(_place(tensor), name)
            if owner != name and name not in trained and name not in self.buffers:
                found.setdefault(name, owner)
        return found

    def own_weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are neither buffers nor other names of one."""
        owners = self.owners()
        return {name: value for name, value in self.state.items() if name not in self.buffers and name not in owners}

    def whole(self, trained: Trained) -> dict[str, torch.Tensor]:
        """Return all weights and buffers by name, in full precision as far as it was kept.

        Args:
            trained: master weights.

        Raises:
            CheckpointError: no file has the values of some.
        """
        masters, owners = trained.masters, self.owners()
        kinds = {tensor.dtype for tensor in masters.values()}
        wide = torch.float32 if torch.float32 in kinds else None
        frozen = self._frozen()
        names = dict.fromkeys([*self.state, *frozen, *masters, *owners])
        found: dict[str, torch.Tensor] = {}
        for name in names:
            owner = owners.get(name, name)
            if owner in masters:
                found[name] = masters[owner]
            elif name in self.buffers:
                found[name] = as_stored(self.state[name])
            elif owner in frozen or owner in self.state:
                found[name] = _wide(frozen[owner] if owner in frozen else self.state[owner], wide)
        self._check_values(found, masters)
        return {**found, **self.others}

    def _check_values(self, found: Mapping[str, torch.Tensor], masters: Mapping[str, torch.Tensor]) -> None:
        """Check that no weight is what stage 3 has in its place in the model's file: a tensor without elements."""
        if not any(name in self.state and self.state[name].shape != master.shape for name, master in masters.items()):
            return
        real = {*masters, *self.buffers, *self.owners(), *self._frozen()}
        if lost := [name for name in self.state if not found[name].numel() and name not in real]:
            raise CheckpointError(
                f"no file has the values of {', '.join(lost[:3])}{f' and {len(lost) - 3} more' if lost[3:] else ''}: its "
                "optimizer files are of another model, or not all there"
            )

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Return the weights that were not trained and are in parts: of stage 3."""
        found: dict[str, torch.Tensor] = {}
        for ranks in self.files.values():
            shapes, fragments = (ranks[0].get(key) or {} for key in ("frozen_param_shapes", "frozen_param_fragments"))
            for name, shape in shapes.items():
                whole = self.state.get(name)
                if name in fragments and (whole is None or tuple(whole.shape) != tuple(shape)):
                    parts = [rank["frozen_param_fragments"][name] for rank in ranks]
                    numel = sum(part.numel() for part in parts)
                    made = joined([Row(parts)], start=0, count=numel, shape=shape, name=name)
                    found |= {} if made is None else {name: made}
        return found


def read_models(layout: Layout, *, weights_only: bool) -> Models:
    """Return what the model's files of a save hold.

    Args:
        layout: its files.
        weights_only: as for `read_file`.

    Raises:
        CheckpointError: one is missing, cannot be read, or is of another save.
        UnsupportedError: they are slices of tensor parallelism.
    """
    files = {
        slot: [read_file(path, weights_only=weights_only) for path in layout.models_of(slot)] for slot in layout.slots
    }
    _check_one_save(files, layout)
    buffers = {name for ranks in files.values() for name in ranks[0].get("buffer_names") or ()}
    modules = {slot: ranks[0].get("module") for slot, ranks in files.items()}
    if layout.layers:
        known: dict[str, tuple[int, ...] | None] = dict.fromkeys(buffers)
        made = Models(files=files, state={})
        known |= {name: tuple(shape) for slot in files for group in made.shapes(slot) for name, shape in group.items()}
        named = known if len(known) > len(buffers) else {}
        state, notes = layer_weights(layout.layers, named, weights_only=weights_only)
        return _models(files, state, buffers, notes=notes)
    if len(files) > 1 and layout.universal is None:
        raise UnsupportedError(
            f"it has the files of {len(files)} model-parallel ranks and none of layers: slices of tensor parallelism, which do "
            "not say how they belong together. Make it universal with DeepSpeed's ds_to_universal.py, and import that"
        )
    made = Models(files=files, state={})
    trained = {name for slot in files for group in made.shapes(slot) for name in group}
    return _models(files, _same_in_all(modules, trained), buffers)


def _models(
    files: Mapping[int, Sequence[Mapping[str, Any]]],
    state: Mapping[str, Any],
    buffers: set[str],
    *,
    notes: tuple[str, ...] = (),
) -> Models:
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in state.items() if name not in tensors}
    return Models(files=files, state=tensors, notes=notes, buffers=frozenset(buffers & tensors.keys()), others=others)


def _same_in_all(modules: Mapping[int, Any], trained: set[str]) -> dict[str, Any]:
    """Return the entries of the first slot; of others, those that it has not.

    Raises:
        UnsupportedError: slots have parts of one that no other file has whole.
    """
    found: dict[str, Any] = {}
    for module in modules.values():
        for name, value in (module or {}).items():
            is_same = not isinstance(value, torch.Tensor) or name not in found or torch.equal(found[name], value)
            if name not in trained and not is_same:
                raise UnsupportedError(
                    f"its model-parallel ranks have different values of {name!r}, which is not trained: of such a tensor no file "
                    "has the whole. Save the model's whole state dict with DeepSpeed, and import that"
                )
            found.setdefault(name, value)
    return found


def _check_one_save(files: Mapping[int, Sequence[Mapping[str, Any]]], layout: Layout) -> None:
    steps = {
        path.name: state.get("global_steps")
        for slot, ranks in files.items()
        for path, state in zip(layout.models_of(slot), ranks, strict=True)
    }
    if len(set(steps.values())) > 1:
        shown = ", ".join(f"{name} after {step} steps" for name, step in steps.items())
        raise CheckpointError(f"its files are of different saves: {shown}. Take the directory of one save")
    for path, state in ((layout.models_of(slot)[0], ranks[0]) for slot, ranks in files.items()):
        if "module" not in state:
            raise CheckpointError(
                f"{path} has no entry 'module', as a model's file of DeepSpeed's has: {sorted(state)[:8]}"
            )
    for slot, ranks in files.items():
        world = ranks[0].get("dp_world_size", len(ranks))
        # Of stage 3 each rank has a file, with its name; of others the first has one for all.
        is_for_all = len(ranks) == 1 and not layout.models_of(slot)[0].name.startswith("zero_")
        if is_for_all or layout.universal is not None or len(ranks) == world:
            continue
        absent = list(range(len(ranks), world))
        more = (
            f"those of ranks {absent} are missing"
            if absent
            else f"those from rank {world} on are left over from another save"
        )
        raise CheckpointError(
            f"{world} data-parallel ranks have saved it, and there are model files of {len(ranks)} in slot {slot}: {more}. "
            "Copy the whole directory that DeepSpeed has written"
        )


def _wide(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return as_stored(tensor, dtype=dtype if is_narrow else None)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
