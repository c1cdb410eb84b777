"""Every value that a file comes to, and the key that it is from, or whose default it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from meshbolt.deepspeed_json.batch import EACH, STEPS, TOTAL
from meshbolt.deepspeed_json.key import AUTO, IGNORED
from meshbolt.deepspeed_json.optimizers import LATE, Named
from meshbolt.deepspeed_json.schedules import ONE_CYCLE, OneCycle
from meshbolt.deepspeed_json.translate import Translation

OF_MESHBOLT, OF_TRAINER = "default of meshbolt", "default of the Trainer"
_CLIP = "gradient_clipping"
_OFFLOAD = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_PRECISION = ("fp16.enabled", "bf16.enabled", "torch_autocast.enabled")
SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "zero.stage": ("zero_optimization.stage",),
        "zero.unit": ("zero_optimization.leaf_module.classes", "zero_optimization.leaf_module.names"),
        "zero.reduce_dtype": ("communication_data_type",),
        "offload.optimizer": (f"{_OFFLOAD[0]}.device", "zero_optimization.cpu_offload"),
        "offload.parameters": (f"{_OFFLOAD[1]}.device", "zero_optimization.cpu_offload_param"),
        "offload.path": tuple(f"{block}.nvme_path" for block in _OFFLOAD),
        "offload.fraction": (f"{_OFFLOAD[0]}.ratio",),
        "offload.pin_memory": (
            *(f"{block}.pin_memory" for block in _OFFLOAD),
            "zero_optimization.cpu_offload_use_pin_memory",
        ),
        "tensor_parallel.size": ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size"),
        "pipeline_parallel.size": ("pipeline.stages",),
        "pipeline_parallel.microbatches": (STEPS,),
        "recompute.mode": ("pipeline.activation_checkpoint_interval",),
        "checkpoint.asynchronous": ("checkpoint.writer.decoupled", "datastates_ckpt"),
        "precision.flag": _PRECISION,
        "loss_scale.init_scale": ("fp16.loss_scale", "fp16.initial_scale_power"),
        "loss_scale.growth_interval": ("fp16.loss_scale_window",),
        "loss_scale.hysteresis": ("fp16.hysteresis",),
        "loss_scale.consecutive_hysteresis": ("fp16.consecutive_hysteresis",),
        "loss_scale.min_scale": ("fp16.min_loss_scale",),
    }
)
"""By the name of a setting, the keys that it may be from."""
_OF_DEEPSPEED = ("zero.stage", "offload.pin_memory")
"""Settings of a strategy for which DeepSpeed's default counts, not ours."""
_IF_USED = ("pipeline_parallel", "tensor_parallel", "offload")
"""Settings that are ours where a file asks for nothing of the kind, or asks for none."""


class Effective(NamedTuple):
    """A value that counts.

    Attributes:
        key: what it is for.
        value: plain data.
        origin: where it is from, in words.
    """

    key: str
    value: Any
    origin: str


def origin_of(made: Translation, setting: str) -> str:
    """Return where a setting of the strategy is from: keys of the file, or whose default it is.

    Args:
        made: what the file came to.
        setting: dotted, such as "zero.stage".
    """
    section = setting.partition(".")[0]
    if section in _IF_USED and section not in made.settings:
        return OF_MESHBOLT
    if found := _keys(made, SOURCES.get(setting, ())):
        return found
    return _of_deepspeed(made) if setting in _OF_DEEPSPEED else OF_MESHBOLT


def trainer_values(made: Translation) -> list[Effective]:
    """Return what a file sets of a Trainer: accumulation, clipping and precision, and the sizes of a batch.

    Args:
        made: what the file came to.
    """
    return [*_accumulation(made), *_sizes(made), _clipping(made), *_precision(made)]


def optimizer_values(made: Translation) -> list[Effective]:
    """Return every argument of the optimizer that a file names; nothing without one.

    Args:
        made: what the file came to.
    """
    named = made.optimizer
    if named is None:
        return []
    kind: Any = named.kind
    late = {key.rpartition(".")[2]: 1.0 for key in named.missing}
    values = named.build([torch.zeros(1, requires_grad=True)], **late).defaults
    own = [name for name in inspect.signature(kind).parameters if name in values]
    is_plain = "optimizer.params.torch_adam" in _given(made)
    rows = [Effective("type", f"torch.optim.{kind.__name__}", _keys(made, ["optimizer.type"]))]
    for name in own:
        usual = _of_deepspeed(made) if name == "weight_decay" and name in named.arguments and not is_plain else ""
        value = AUTO if name in late else _plain(values[name])
        rows.append(Effective(name, value, _argument(made, named, name, usual or "default of torch")))
    return rows


def scheduler_values(made: Translation) -> list[Effective]:
    """Return every argument of the schedule that a file names; nothing without one.

    Args:
        made: what the file came to.
    """
    named = made.scheduler
    if named is None:
        return []
    kind: Any = named.kind
    usual = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in ("optimizer", "others")
    } | (dict(ONE_CYCLE) if kind is OneCycle else {})
    missing = [key.rpartition(".")[2] for key in named.missing]
    rows = [Effective("type", f"meshbolt.deepspeed.{kind.__name__}", _keys(made, ["scheduler.type"]))]
    for name, default in usual.items():
        value = LATE.get(name, AUTO) if name in missing else _plain(named.arguments.get(name, default))
        rows.append(Effective(name, value, _argument(made, named, name, _of_deepspeed(made), block="scheduler")))
    return rows


def _argument(made: Translation, named: Named, name: str, usual: str, *, block: str = "optimizer") -> str:
    return _keys(made, [f"{block}.params.{name}"]) or usual


def _accumulation(made: Translation) -> Iterable[Effective]:
    key, batch = "accumulate_grad_batches", made.batch
    if "pipeline_parallel" in made.settings:
        return [
            Effective(key, 1, f"{_keys(made, ['pipeline.stages'])}: a loader's batch has all microbatches of a step")
        ]
    if batch.quotient is not None:
        return [Effective(key, f"{batch.quotient} / data-parallel ranks", _keys(made, [TOTAL, EACH]))]
    if made.accumulate is None:
        return [Effective(key, 1, _left(made, STEPS))]
    return [Effective(key, made.accumulate, _keys(made, [STEPS]) or f"follows from {_keys(made, [TOTAL, EACH])}")]


def _sizes(made: Translation) -> Iterable[Effective]:
    for key, value in (("samples of a step", made.batch.total), ("batch_size of your DataLoader", made.batch.each)):
        own = TOTAL if value == made.batch.total and key.startswith("samples") else EACH
        is_given = own in _given(made) and _given(made)[own] != AUTO
        others = [each for each in (TOTAL, EACH, STEPS) if each != own]
        if value is not None:
            yield Effective(key, value, _keys(made, [own]) if is_given else f"follows from {_keys(made, others)}")


def _clipping(made: Translation) -> Effective:
    key = "gradient_clip_val"
    if made.clip is None:
        return Effective(key, None, _left(made, _CLIP))
    return Effective(key, made.clip or None, _keys(made, [_CLIP]) or _of_deepspeed(made))


def _precision(made: Translation) -> Iterable[Effective]:
    if made.precision is None:
        return [Effective("precision", "32-true", next(filter(None, (_keys(made, _PRECISION),)), OF_TRAINER))]
    rows = [Effective("precision", made.precision.written(), origin_of(made, "precision.flag"))]
    is_static = bool(_given(made).get("fp16.loss_scale"))
    for name, value in made.precision.scaling.items():
        keys = ["fp16.loss_scale"] if is_static else SOURCES[f"loss_scale.{name}"]
        rows.append(Effective(f"loss_scale.{name}", value, _keys(made, keys) or _of_deepspeed(made)))
    return rows


def _left(made: Translation, key: str) -> str:
    """Return where a value is from that the file leaves to the Trainer."""
    return f"the Trainer's: {found}" if (found := _keys(made, [key])) else OF_TRAINER


def _given(made: Translation) -> dict[str, Any]:
    return {row.key: row.value for row in made.receipt if row.given}


def _keys(made: Translation, keys: Iterable[str]) -> str:
    """Return the keys among some that the file has and that count, with the file's name; empty without any."""
    rows = {row.key: row for row in made.receipt if row.given and row.outcome != IGNORED}
    found = [f"{key} (auto)" if rows[key].value == AUTO else key for key in keys if key in rows]
    return f"{made.receipt.source}: {', '.join(found)}" if found else ""


def _of_deepspeed(made: Translation) -> str:
    return f"default of DeepSpeed {made.version}" if made.version else "default of DeepSpeed"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
