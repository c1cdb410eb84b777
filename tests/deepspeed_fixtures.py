"""Checkpoints in the layouts of DeepSpeed's, cut by hand in plain torch from tensors that are known: DeepSpeed is not needed.

`Trained` has what is to be in a checkpoint, and each function writes it as DeepSpeed would; its docstring says what the layout
is. DeepSpeed's own classes are pickled by their names, as its files have them.

    mp_rank_00_model_states.pt                        weights in 16 bits and buffers; one for each stage of a pipeline
    zero_pp_rank_{rank}_mp_rank_00_model_states.pt    of stage 3, one for each data-parallel rank: only buffers are real
    [bf16_]zero_pp_rank_{rank}_mp_rank_00_optim_states.pt    a rank's part of master weights and moments
    layer_{number}-model_states.pt                    a layer of a pipeline, under names within the layer
    zero/{name}/fp32.pt, exp_avg.pt, ...              universal: a file for each tensor
"""

from __future__ import annotations

import contextlib
import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]


class _Stage(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class _Scaler:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class _Address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


_PICKLED_AS = {
    _Stage: ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    _Scaler: ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    _Address: ("deepspeed.utils.tensor_fragment", "fragment_address"),
}


@contextlib.contextmanager
def deepspeeds_classes() -> Iterator[None]:
    """Have classes pickled by the names that they have in DeepSpeed."""
    before = dict(sys.modules)
    kept = {kind: (kind.__module__, kind.__qualname__, kind.__name__) for kind in _PICKLED_AS}
    for kind, (module, name) in _PICKLED_AS.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], name, kind)
        kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    try:
        yield
    finally:
        for kind, (module, qualname, name) in kept.items():
            kind.__module__, kind.__qualname__, kind.__name__ = module, qualname, name
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


@dataclass
class Trained:
    """What a run has at the time of a save.

    Attributes:
        groups: master weights by name, in float32, for each group of parameters.
        frozen: weights that are not trained.
        buffers: by name.
        tied: owners by the other names of their weights.
        dtype: in which the model computes.
        step: how many the optimizer has done; 0: it has no state yet.
        world: data-parallel ranks.
        client: what the user saves with it.
        loss_scale: of the dynamic scaler; None: a static one of 1.
    """

    groups: list[dict[str, torch.Tensor]]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    step: int = 3
    world: int = 2
    client: dict[str, Any] = field(default_factory=dict)
    loss_scale: float | None = None
    moments: dict[str, dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.moments = {
            key: {name: torch.randn(value.shape, generator=generator) for name, value in self.masters.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """All master weights by name."""
        return {name: value for group in self.groups for name, value in group.items()}

    def weights(self, *, is_narrow: bool = False) -> dict[str, torch.Tensor]:
        """Return what a reader should find.

        Args:
            is_narrow: no master weights were kept.
        """
        wide = {name: value.to(self.dtype) if is_narrow else value for name, value in self.masters.items()}
        wide |= {
            name: value.to(self.dtype).to(torch.float32 if not is_narrow else self.dtype)
            for name, value in self.frozen.items()
        }
        return {**wide, **self.buffers, **{name: wide[owner] for name, owner in self.tied.items()}}

    def module(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict as it computes, tied weights in one memory."""
        found = {name: value.to(self.dtype) for name, value in {**self.masters, **self.frozen}.items()}
        return {**found, **self.buffers, **{name: found[owner] for name, owner in self.tied.items()}}

    def shapes(self) -> list[OrderedDict[str, torch.Size]]:
        """Return the shapes of each group, as files have them."""
        return [OrderedDict((name, value.shape) for name, value in group.items()) for group in self.groups]

    def settings(self, numbers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Return the optimizer's settings of each group."""
        return [
            {
                "lr": 0.1 / (1 + index),
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 0.01,
                "amsgrad": False,
                "params": list(each),
            }
            for index, each in enumerate(numbers)
        ]

    def state(self, values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return what the optimizer keeps for one flat tensor."""
        return {"step": torch.tensor(float(self.step)), **values} if self.step else {}

    def scaler(self) -> Any:
        """Return DeepSpeed's object."""
        if self.loss_scale is None:
            return _Scaler(cur_scale=1.0, dynamic=False)
        return _Scaler(
            cur_scale=self.loss_scale,
            dynamic=True,
            cur_iter=9,
            last_overflow_iter=4,
            scale_factor=2.0,
            scale_window=100,
            min_scale=1,
            delayed_shift=2,
            cur_hysteresis=1,
            consecutive_hysteresis=False,
            dtype=torch.float16,
        )

    def common(self, **entries: Any) -> dict[str, Any]:
        """Return a model's file."""
        return {
            "module": self.module(),
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": self.shapes(),
            "frozen_param_shapes": None,
            "shared_params": dict(self.tied),
            "frozen_param_fragments": None,
            "lr_scheduler": {"last_epoch": 7},
            "skipped_steps": 1,
            "global_steps": 10,
            "global_samples": 40,
            "dp_world_size": self.world,
            "mp_world_size": 1,
            "ds_config": {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "ds_version": "0.19.8",
            **self.client,
            **entries,
        }


def trained(shapes: Sequence[Shapes], **options: Any) -> Trained:
    """Return a run with weights of these shapes, each with values of its own."""
    generator = torch.Generator().manual_seed(5)
    groups = [{name: torch.randn(shape, generator=generator) for name, shape in group.items()} for group in shapes]
    return Trained(groups=groups, **options)


def write(path: Path, content: Any, *, old: bool = False) -> None:
    """Write a file as DeepSpeed does.

    Args:
        path: of the file.
        content: what it holds.
        old: in torch's old kind, as with `checkpoint_serialization: false`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with deepspeeds_classes():
        torch.save(content, path, _use_new_zipfile_serialization=not old)


def rows_of(run: Trained, *, align: int = 0) -> list[dict[str, Any]]:
    """Return, for each group, the rows that stages 1 and 2 cut: parameters one behind the other.

    Each row is padded to a multiple of twice the ranks. With `parameter_alignment` each parameter but the last begins at a
    multiple of `align` elements, too.
    """
    found = []
    for group in run.groups:
        paddings, at = [], 0
        for number, value in enumerate(group.values()):
            at += value.numel()
            paddings.append(-at % align if align and number < len(group) - 1 else 0)
            at += paddings[-1]
        length = 2 * run.world * math.ceil(at / (2 * run.world))

        def row(
            values: Mapping[str, torch.Tensor], group: Any = group, paddings: Any = paddings, end: int = length - at
        ) -> Any:
            parts = [
                part
                for name, pad in zip(group, paddings, strict=True)
                for part in (values[name].flatten(), torch.zeros(pad))
            ]
            return torch.cat([*parts, torch.zeros(end)])

        found.append({"row": row, "paddings": paddings, "used": at, "part": length // run.world})
    return found


def write_rows(
    root: Path,
    run: Trained,
    *,
    stage: int = 2,
    tag: str = "global_step10",
    bf16: bool = False,
    align: int = 0,
    elastic: bool = False,
    old: bool = False,
    slot: int = 0,
) -> Path:
    """Write stage 1 or 2, or DeepSpeed's optimizer for bfloat16, and return the directory of the save.

    Each rank has one part of each group's row. The master weights of the last ranks come without the padding at the end, the
    moments with it; of the optimizer for bfloat16 both have it, and the stage is not told. Elastic saves have both without
    padding, and a list in the place of the optimizer's state dict.
    """
    place = root / tag
    is_two = stage == 2
    fragments = {name: value.to(run.dtype) for name, value in run.frozen.items()} if is_two else None
    shapes = {name: value.shape for name, value in run.frozen.items()} if is_two else None
    model = run.common(frozen_param_fragments=fragments, frozen_param_shapes=shapes)
    write(place / f"mp_rank_{slot:02d}_model_states.pt", model, old=old)
    rows = rows_of(run, align=align)
    for rank in range(run.world):
        state: dict[str, Any] = _rank_of_rows(run, rows, rank=rank, bf16=bf16, elastic=elastic)
        if not bf16:
            state |= {"zero_stage": _Stage(stage), "loss_scaler": run.scaler(), "overflow": False}
            state |= {"dynamic_loss_scale": run.loss_scale is not None}
            state |= {"param_alignment_paddings": [row["paddings"] for row in rows]}
        prefix = "bf16_" if bf16 else ""
        content = {"optimizer_state_dict": state, "ds_config": model["ds_config"], "ds_version": "0.19.8"}
        write(place / f"{prefix}zero_pp_rank_{rank}_mp_rank_{slot:02d}_optim_states.pt", content, old=old)
    (root / "latest").write_text(tag)
    return place


def _rank_of_rows(
    run: Trained, rows: Sequence[Mapping[str, Any]], *, rank: int, bf16: bool, elastic: bool
) -> dict[str, Any]:
    masters, states, paddings, addresses = [], [], [], []
    for group, row in zip(run.groups, rows, strict=True):
        begin, end = rank * row["part"], (rank + 1) * row["part"]
        padding = min(row["part"], max(0, end - row["used"]))
        kept = end if bf16 else end - padding
        masters.append(row["row"](group)[begin:kept])
        moments = {key: row["row"](values)[begin : kept if elastic else end] for key, values in run.moments.items()}
        states.append(run.state(moments))
        paddings.append(padding)
        addresses.append(OrderedDict((name, _Address(1, 0)) for name in group))
    settings = run.settings([[number] for number in range(len(rows))])
    base: Any = {"state": dict(enumerate(states)) if run.step else {}, "param_groups": settings}
    if elastic:
        base = [{key: value for key, value in state.items() if key != "step"} for state in states]
    return {
        "clip_grad": 1.0,
        "base_optimizer_state": base,
        **({"base_optimizer_state_step": run.step} if elastic else {}),
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        "partition_count": [run.world] * len(rows),
        "param_slice_mappings": addresses,
        "ds_version": "0.19.8",
    }


def write_shards(
    root: Path, run: Trained, *, tag: str = "global_step10", pieces: int = 0, old: bool = False, bf16: bool = False
) -> Path:
    """Write stage 3, and return the directory of the save.

    Each parameter is cut into as many parts as there are ranks, the last ones padded; each rank lays its parts one behind the
    other. Each group's row is cut again after `pieces` elements, wherever in a parameter that is. In the place of weights the
    model's files have tensors without elements, and of frozen weights each rank has its part.
    """
    place = root / tag
    empty = {name: torch.empty(0, dtype=run.dtype) for name in run.module() if name not in run.buffers}
    for rank in range(run.world):
        fragments = {name: _part(value.to(run.dtype), rank, run.world) for name, value in run.frozen.items()}
        model = run.common(
            module={**empty, **run.buffers},
            frozen_param_shapes={name: value.shape for name, value in run.frozen.items()},
            frozen_param_fragments=fragments,
            shared_params=dict(run.tied) if rank == 0 else {},
        )
        write(place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model, old=old)
        flats, states, numbers = [], {}, []
        for group in run.groups:
            columns = {"fp32": group, **run.moments}
            cut = {
                key: _cut([_part(values[name], rank, run.world) for name in group], pieces)
                for key, values in columns.items()
            }
            numbers.append(list(range(len(flats), len(flats) + len(cut["fp32"]))))
            for at, number in enumerate(numbers[-1]):
                states[number] = run.state({key: cut[key][at] for key in run.moments})
            flats += cut["fp32"]
        state = {
            "zero_stage": _Stage(3),
            "loss_scaler": run.scaler(),
            "dynamic_loss_scale": run.loss_scale is not None,
            "overflow": False,
            "partition_count": run.world,
            "optimizer_state_dict": {"state": states if run.step else {}, "param_groups": run.settings(numbers)},
            "fp32_flat_groups": [torch.nn.Parameter(flat) for flat in flats],
        }
        content = {"optimizer_state_dict": state, "ds_config": model["ds_config"], "ds_version": "0.19.8"}
        prefix = "bf16_" if bf16 else ""
        write(place / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", content, old=old)
    (root / "latest").write_text(tag)
    return place


def _part(value: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    count = -(-value.numel() // world)
    padded = torch.cat([value.flatten(), torch.zeros(count * world - value.numel(), dtype=value.dtype)])
    return padded[rank * count : (rank + 1) * count].clone()


def _cut(parts: Sequence[torch.Tensor], pieces: int) -> list[torch.Tensor]:
    row = torch.cat(list(parts))
    return [each.clone() for each in (row.split(pieces) if pieces else [row])]


def write_plain(root: Path, run: Trained, *, kind: str, tag: str = "global_step10") -> Path:
    """Write a save without ZeRO, and return its directory.

    Args:
        root: of all saves.
        run: what is saved.
        kind: "torch": the optimizer's own state by number; "flat": master weights in one tensor for each group, and moments
            likewise; "each": master weights in one tensor for each parameter; "none": no optimizer.
        tag: of the save.
    """
    names = [list(group) for group in run.groups]
    numbers = iter(range(sum(map(len, names)) + len(names)))
    flat = kind == "flat"
    given = [[next(numbers) for _ in (group[:1] if flat else group)] for group in names]
    states = {}
    for group, each in zip(names, given, strict=True):
        for position, number in enumerate(each):
            kept = {
                key: _flat(values, group) if flat else values[group[position]] for key, values in run.moments.items()
            }
            states[number] = run.state(kept)
    inner = {"state": states if run.step else {}, "param_groups": run.settings(given)}
    scale = {"dynamic_loss_scale": run.loss_scale is not None, "cur_scale": run.loss_scale or 1.0, "cur_iter": 9}
    masters = {
        "flat": {"fp32_groups_flat": [_flat(group, list(group)) for group in run.groups]},
        "each": {"fp32_groups": [list(group.values()) for group in run.groups]},
    }
    optimizer: Any = {**scale, "optimizer_state_dict": inner, **masters[kind]} if kind in masters else inner
    model = run.common(optimizer=None if kind == "none" else optimizer, param_shapes=None, shared_params=None)
    write(root / tag / "mp_rank_00_model_states.pt", model)
    (root / "latest").write_text(tag)
    return root / tag


def _flat(values: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    return torch.cat([values[name].flatten() for name in names])


def write_universal(root: Path, run: Trained, *, stage: int, tag: str = "global_step10_universal") -> Path:
    """Write what DeepSpeed's converter makes of a save, and return its directory.

    Of stages 1 and 2 each file has a tensor in its shape under "param", buffers and frozen weights as float32 among them, and
    the count of steps has a file. Of stage 3 each file has a flat tensor, and the count stands in the optimizer's file. The
    model's files are copied as they were.
    """
    save = write_shards(root, run, tag=tag) if stage == 3 else write_rows(root, run, stage=stage, tag=tag)
    (root / "latest").unlink()
    (root / "latest_universal").write_text(tag)
    first = min(save.glob("*_optim_states.pt"))
    with deepspeeds_classes():
        state = torch.load(first, weights_only=False)["optimizer_state_dict"]
    for path in save.glob("*_optim_states.pt"):
        path.unlink()
    for name, master in run.masters.items():
        columns = {"fp32": master, **({key: values[name] for key, values in run.moments.items()} if run.step else {})}
        for key, value in columns.items():
            write(save / "zero" / name / f"{key}.pt", value.flatten() if stage == 3 else {"param": value, "cat_dim": 0})
        if stage != 3 and run.step:
            write(save / "zero" / name / "step.pt", torch.tensor(float(run.step)))
    if stage != 3:
        for name, value in {**run.frozen, **run.buffers}.items():
            write(save / "zero" / name / "fp32.pt", {"param": value.float()})
        state["param_groups"] = state.pop("base_optimizer_state")["param_groups"]
        state.pop("single_partition_of_fp32_groups")
    else:
        state["param_groups"] = state["optimizer_state_dict"]["param_groups"]
    write(save / "zero" / "optimizer_state.pt", state)
    return save


def write_pipeline(
    root: Path, stages: Sequence[Trained], layers: Mapping[int, str], *, zero: bool = True, tag: str = "global_step10"
) -> Path:
    """Write a pipeline's save, and return its directory.

    Each layer has a file, its tensors under names within the layer; a tied layer has one under each number at which it is used.
    The models' files have no weights; with ZeRO-1 they have the names and shapes of what the stage trains.

    Args:
        root: of all saves.
        stages: what each trains; a tied layer is among what each stage that uses it trains.
        layers: what the names of each layer begin with, by its number.
        zero: stage 1; else each stage has torch's own optimizer.
        tag: of the save.
    """
    place = root / tag
    weights = {name: value for run in stages for name, value in run.module().items()}
    for number, prefix in layers.items():
        local = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        write(place / f"layer_{number:02d}-model_states.pt", local)
    for slot, run in enumerate(stages):
        part = root / f"part{slot}"
        save = write_rows(part, run, stage=1, slot=slot) if zero else write_plain(part, run, kind="torch")
        for path in save.iterdir():
            with deepspeeds_classes():
                content = torch.load(path, weights_only=False)
            if "module" in content:
                content |= {"module": None, "mp_world_size": len(stages), "shared_params": {} if zero else None}
            write(place / path.name.replace("mp_rank_00_model", f"mp_rank_{slot:02d}_model"), content)
            path.unlink()
        save.rmdir()
        (part / "latest").unlink()
        part.rmdir()
    (root / "latest").write_text(tag)
    return place
