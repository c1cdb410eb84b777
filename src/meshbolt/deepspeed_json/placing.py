"""Where things of a run lie: the stage, offload, parallelism, checkpoints, as settings of a strategy."""

from __future__ import annotations

from typing import Any

from meshbolt.blocks import Recompute
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.deepspeed_json.given import Given
from meshbolt.deepspeed_json.key import IGNORED
from meshbolt.deepspeed_json.precision import reduce_dtype_of
from meshbolt.errors import ConfigError
from meshbolt.offload.setting import Offload
from meshbolt.pipeline import PipelineParallel
from meshbolt.zero import Zero

_ZERO = "zero_optimization"
_OPTIMIZER, _PARAMETERS = f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"
_GATHERS_BY_UNIT = 3


def settings_of(given: Given, *, version: tuple[int, ...] | None, microbatches: int | None) -> dict[str, Any]:
    """Return the arguments of a strategy that a file comes to.

    Args:
        given: the file.
        version: of the DeepSpeed that it was written for; None: unknown.
        microbatches: of a step, where there is a pipeline; None: not given.

    Raises:
        ConfigError: keys contradict each other.
    """
    zero = _zero(given)
    settings: dict[str, Any] = {"zero": zero}
    if (offload := _offload(given, zero, version)).is_used:
        settings["offload"] = offload
    if (size := _tensor_parallel(given)) > 1:
        settings["tensor_parallel"] = size
    if (pipeline := _pipeline(given, microbatches)) is not None:
        settings["pipeline_parallel"] = pipeline
    if (every := given.get("pipeline.activation_checkpoint_interval", 0)) and pipeline is not None:
        settings["recompute"] = Recompute(mode="full")
        why = "" if every == 1 else f"each block by itself, not {every} together: the same results with more memory"
        given.note("pipeline.activation_checkpoint_interval", "recompute='full'", why=why)
    elif every:
        given.note("pipeline.activation_checkpoint_interval", "", why="pipeline.stages is not given", outcome=IGNORED)
    if (checkpoint := _checkpoint(given)) is not None:
        settings["checkpoint"] = checkpoint
    return settings


def ranks_of_a_copy(given: Given) -> int:
    """Return how many ranks share one copy of the model: those of tensor and of pipeline parallelism.

    Args:
        given: the file.

    Raises:
        ConfigError: keys contradict each other.
    """
    return _tensor_parallel(given) * int(given.get("pipeline.stages", 1))


def _zero(given: Given) -> Zero:
    stage = given.get(f"{_ZERO}.stage", 0)
    names = [*given.get(f"{_ZERO}.leaf_module.classes", []), *given.get(f"{_ZERO}.leaf_module.names", [])]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{given.source}: '{_ZERO}.leaf_module' names {names!r}: give names, as strings.")
    given.note(f"{_ZERO}.stage", f"Zero(stage={stage})")
    given.add(f"{_ZERO}.stage", becomes="Zero(stage=0)", why="without it every rank holds everything whole")
    dtype = reduce_dtype_of(given)
    return Zero(stage=stage, unit=names or "auto", reduce_dtype=dtype)


def _offload(given: Given, zero: Zero, version: tuple[int, ...] | None) -> Offload:
    optimizer, parameters = _tier(given, _OPTIMIZER, "cpu_offload"), _tier(given, _PARAMETERS, "cpu_offload_param")
    if parameters is not None and zero.stage != _GATHERS_BY_UNIT:
        raise ConfigError(
            f"{given.source}: '{_PARAMETERS}.device' is {parameters!r} with '{_ZERO}.stage' {zero.stage}, which holds all "
            "parameters on each device through a step. Make the stage 3, or leave offload_param out."
        )
    if parameters is not None and optimizer is None:
        raise ConfigError(
            f"{given.source}: '{_PARAMETERS}.device' is {parameters!r}, and the optimizer's state stays on the device; updates "
            f'run where parameters lie. Add "offload_optimizer": {{"device": "cpu"}} or "nvme".'
        )
    arguments: dict[str, Any] = {"optimizer": optimizer, "parameters": parameters}
    if optimizer is None:
        _note_unused(given)
        return Offload()
    ratio = given.get(f"{_OPTIMIZER}.ratio", 1.0)
    if ratio > 1 or (ratio != 1 and parameters is not None):
        raise ConfigError(
            f"{given.source}: '{_OPTIMIZER}.ratio' is {ratio!r}: it is the part of the state that leaves the device, 0.0 to "
            "1.0, and 1.0 where parameters do. Change it, or leave it out."
        )
    arguments |= {
        "fraction": float(ratio),
        "pin_memory": _pin_memory(given, version),
        "path": _path(given, optimizer, parameters),
    }
    given.note(f"{_OPTIMIZER}.ratio", f"Offload(fraction={float(ratio)})")
    try:
        return Offload(**arguments)
    except ConfigError as error:
        raise ConfigError(
            f"{given.source}: '{_OPTIMIZER}' and '{_PARAMETERS}' come to "
            f"{', '.join(f'{k}={v!r}' for k, v in arguments.items())}. {error}"
        ) from error


def _tier(given: Given, block: str, old: str) -> str | None:
    """Return where something lies, by the block or by its old name."""
    device: str | None = given.get(f"{block}.device")
    device = None if device == "none" else device
    if given.get(f"{_ZERO}.{old}"):
        if device not in (None, "cpu"):
            raise ConfigError(
                f"{given.source}: '{_ZERO}.{old}' is true, and '{block}.device' {device!r}. Leave the old one out."
            )
        device = "cpu"
    name = "optimizer" if block == _OPTIMIZER else "parameters"
    given.note(f"{block}.device", f"Offload({name}={device!r})", why="" if device else "stays on the device")
    return device


def _pin_memory(given: Given, version: tuple[int, ...] | None) -> bool:
    keys = [f"{_OPTIMIZER}.pin_memory", f"{_PARAMETERS}.pin_memory", f"{_ZERO}.cpu_offload_use_pin_memory"]
    said = {key: given.get(key) for key in keys if given.get(key) is not None}
    if len(set(said.values())) > 1:
        raise ConfigError(
            f"{given.source}: {' and '.join(f'{key!r} is {str(value).lower()}' for key, value in said.items())}: there is one "
            "setting for both here. Make them equal."
        )
    if said:
        pin = next(iter(said.values()))
        for key in said:
            given.note(key, f"Offload(pin_memory={pin})")
        return bool(pin)
    pin = version is None or version >= (0, 19, 5)
    given.add(
        keys[0],
        becomes=f"Offload(pin_memory={pin})",
        why="DeepSpeed's default is false before 0.19.5 and true since; speed only",
    )
    return pin


def _path(given: Given, optimizer: str | None, parameters: str | None) -> str | None:
    """Return the directory of files, which is one for both."""
    said: dict[str, str] = {}
    for block, tier in ((_OPTIMIZER, optimizer), (_PARAMETERS, parameters)):
        path = given.get(f"{block}.nvme_path")
        if tier != "nvme":
            given.note(f"{block}.nvme_path", "", why="nothing of it lies in files", outcome=IGNORED)
        elif path:
            said[f"{block}.nvme_path"] = path
        elif not path and not given.get(f"{_PARAMETERS if block == _OPTIMIZER else _OPTIMIZER}.nvme_path"):
            raise ConfigError(
                f"{given.source}: '{block}.device' is 'nvme' and there is no '{block}.nvme_path'. Add it: a directory on a fast "
                "local disk."
            )
    if len(set(said.values())) > 1:
        raise ConfigError(
            f"{given.source}: {' and '.join(f'{key!r} is {value!r}' for key, value in said.items())}: files of both lie in one "
            "directory here. Make them equal."
        )
    for key, path in said.items():
        given.note(key, f"Offload(path={path!r})")
    return next(iter(said.values()), None)


def _note_unused(given: Given) -> None:
    for key in given.order:
        inside = key.startswith((f"{_OPTIMIZER}.", f"{_PARAMETERS}.")) and not key.endswith(".device")
        if inside or key == f"{_ZERO}.cpu_offload_use_pin_memory":
            given.note(key, "", why="nothing is offloaded", outcome=IGNORED)


def _tensor_parallel(given: Given) -> int:
    whole, inner = given.get("tensor_parallel.autotp_size"), given.get("tensor_parallel.tp.tp_size")
    if whole and inner and inner > 1 and whole != inner:
        raise ConfigError(
            f"{given.source}: 'tensor_parallel.autotp_size' is {whole} and 'tensor_parallel.tp.tp_size' {inner}. Leave one out."
        )
    size = int(max(whole or 1, inner or 1))
    for key in ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size"):
        given.note(key, f"MeshStrategy(tensor_parallel={size})")
    return size


def _pipeline(given: Given, microbatches: int | None) -> PipelineParallel | None:
    size = given.get("pipeline.stages", 1)
    given.note(
        "pipeline.stages", f"MeshStrategy(pipeline_parallel={size})", why="" if size > 1 else "one stage is no pipeline"
    )
    if given.is_auto("pipeline.stages"):
        given.note(
            "pipeline.stages", "", why="auto: no pipeline; give the number of stages to have one", outcome=IGNORED
        )
    if size == 1:
        return None
    # With fewer microbatches than stages nothing can take turns: all forward passes come first.
    schedule = "gpipe" if microbatches is not None and microbatches < size else "1f1b"
    return PipelineParallel(size=size, microbatches=microbatches or "auto", schedule=schedule)


def _checkpoint(given: Given) -> Checkpoint | None:
    in_background = bool(given.get("checkpoint.writer.decoupled", False)) or bool(given.get("datastates_ckpt"))
    given.note("checkpoint.writer.decoupled", f"Checkpoint(asynchronous={in_background})")
    return Checkpoint(asynchronous=True) if in_background else None
