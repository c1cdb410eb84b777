"""From a file of DeepSpeed's to settings: of a strategy, of the Trainer, and an optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshbolt.config import Settings
from meshbolt.deepspeed_json.batch import Batch, batch_of
from meshbolt.deepspeed_json.given import Given, check, raise_all
from meshbolt.deepspeed_json.key import MAPPED
from meshbolt.deepspeed_json.optimizers import Named, optimizer_of, scheduler_of
from meshbolt.deepspeed_json.placing import ranks_of_a_copy, settings_of
from meshbolt.deepspeed_json.precision import Precision, precision_of
from meshbolt.deepspeed_json.read import read
from meshbolt.deepspeed_json.receipt import Receipt
from meshbolt.errors import ConfigError, MeshboltError

_CLIPS_SINCE = (0, 19, 3)
_CLIP = "gradient_clipping"
_STAGES = "pipeline.stages"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a file does not say.

    Attributes:
        auto: by dotted key, values for keys that are "auto", such as `{"optimizer.params.lr": 1e-4}`.
        deepspeed_version: of the DeepSpeed that the file was written for, such as "0.19.8", whose defaults then count; None: of
            defaults that differ between versions the one that changes nothing: the Trainer decides about clipping.
        data_parallel_size: ranks that see different samples, where accumulation follows from it.
        world_size: all ranks, where they are known: those that see different samples follow.
        stages: of a module that knows how many it has.
    """

    auto: Mapping[str, Any] = field(default_factory=dict)
    deepspeed_version: str | None = None
    data_parallel_size: int | None = None
    world_size: int | None = None
    stages: int | None = None


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What a file comes to.

    Attributes:
        settings: arguments of a strategy.
        precision: of the run; None where the Trainer decides.
        clip: largest norm of gradients, 0.0 for no clipping; None where the Trainer decides.
        accumulate: batches of a window; None where the Trainer decides.
        batch: the sizes of a batch.
        optimizer: to use where the module makes none.
        scheduler: to use where the module makes none.
        receipt: what became of every key.
        version: of the DeepSpeed whose defaults count; None: not given.
    """

    settings: Mapping[str, Any]
    precision: Precision | None
    clip: float | None
    accumulate: int | None
    batch: Batch
    optimizer: Named | None
    scheduler: Named | None
    receipt: Receipt
    version: str | None = None


def translate(config: str | Path | Mapping[str, Any], options: Options | None = None) -> Translation:
    """Return what a file comes to.

    Args:
        config: path of a JSON file, or what such a file says.
        options: what it does not say.

    Raises:
        ConfigError: it is no JSON, a key is unknown, has a wrong value or contradicts another.
        UnsupportedError: a key asks for what is not there.
    """
    options = options or Options()
    if not isinstance(options.auto, Mapping):
        raise ConfigError(f"auto={options.auto!r} is no dictionary. Give values by dotted key.")
    values, source = read(config)
    given = check(values, source=source, auto=options.auto)
    if options.stages is not None:
        _take_stages(given, options.stages)
    version = _version(options.deepspeed_version)
    precision, batch = precision_of(given), batch_of(given, ranks=_data_parallel(given, options))
    settings = settings_of(given, version=version, microbatches=batch.steps)
    _check_settings(given, settings)
    clip = _clip(given, version)
    optimizer, scheduler = optimizer_of(given), scheduler_of(given)
    accumulate = batch.steps
    if "pipeline_parallel" in settings:
        if batch.quotient is not None:
            raise ConfigError(f"{source}: {batch.needs_ranks()}")
        accumulate = 1
        given.note(
            "gradient_accumulation_steps",
            f"PipelineParallel(microbatches={settings['pipeline_parallel'].microbatches})",
            why="a loader's batch has all microbatches of a step",
        )
        batch = _whole_step(batch)
        if batch.each is not None:
            given.note(
                "train_micro_batch_size_per_gpu",
                f"checked: {batch.each}",
                why="a loader's batch has all microbatches of a step",
            )
    return Translation(
        settings=settings,
        precision=precision,
        clip=clip,
        accumulate=accumulate,
        batch=batch,
        optimizer=optimizer,
        scheduler=scheduler,
        receipt=given.receipt(),
        version=options.deepspeed_version,
    )


def _data_parallel(given: Given, options: Options) -> int | None:
    """Return the ranks that see different samples, as far as they are known."""
    if options.world_size is None:
        return options.data_parallel_size
    copies = ranks_of_a_copy(given)
    if options.world_size % copies:
        raise ConfigError(
            f"{given.source}: tensor and pipeline parallelism take {copies} ranks together, and {options.world_size} is no "
            f"multiple of that. Start a multiple of {copies} ranks."
        )
    return options.world_size // copies


def _take_stages(given: Given, stages: int) -> None:
    """Let the module say how many stages there are.

    Raises:
        ConfigError: the file has another number.
    """
    asked = given.get(_STAGES)
    if asked not in (None, stages):
        raise ConfigError(
            f"{given.source}: {_STAGES!r} is {asked}, and the PipelineModule has num_stages={stages}. Leave the key out, or make "
            "them equal."
        )
    given.values[_STAGES] = stages
    if given.is_auto(_STAGES):
        given.autos.remove(_STAGES)
        given.filled[_STAGES] = stages
    given.add(_STAGES, becomes=f"MeshStrategy(pipeline_parallel={stages})", why="as the PipelineModule has it")


def _whole_step(batch: Batch) -> Batch:
    """Return the sizes where a loader gives all microbatches of a step at once."""
    each = None if batch.each is None else batch.each * (batch.steps or 1)
    return Batch(total=batch.total, each=each, steps=1, ranks=batch.ranks)


def _check_settings(given: Given, settings: Mapping[str, Any]) -> None:
    """Let the strategy's own checks see the settings together."""
    usual: dict[str, Any] = {
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "offload": None,
        "recompute": "none",
        "compile": False,
        "checkpoint": None,
    }
    try:
        Settings.from_arguments(**{**usual, **settings})
    except MeshboltError as error:
        raise_all(given.source, [error])


def _clip(given: Given, version: tuple[int, ...] | None) -> float | None:
    if given.is_auto(_CLIP):
        given.note(_CLIP, "Trainer(gradient_clip_val=...)", why="auto: the Trainer decides", outcome=MAPPED)
        return None
    clip: float | None = given.get(_CLIP)
    if clip is None:
        clip = 1.0 if version is not None and version >= _CLIPS_SINCE else None
        told = (
            "of the version given" if version is not None else 'give deepspeed_version="0.19.8" for that of a version'
        )
        given.add(
            _CLIP,
            becomes=f"Trainer(gradient_clip_val={clip or '...'})",
            why=f"DeepSpeed's default is 0.0 (no clipping) before 0.19.3 and 1.0 since; {told}",
        )
    given.note(_CLIP, f"Trainer(gradient_clip_val={clip or None})")
    return None if clip is None else float(clip)


def _version(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"deepspeed_version={text!r} is no version. Write it as DeepSpeed does: '0.19.8'.")
    return tuple(int(part or 0) for part in found.groups())
