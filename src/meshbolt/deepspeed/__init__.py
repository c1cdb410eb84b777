"""Coming from DeepSpeed: its JSON as it is, and its loop.

`trainer_arguments` makes the arguments of a Trainer from a file; `receipt` only says what would become of its keys. The schedules
that a file can name are here, too. `initialize` returns the engine of DeepSpeed's loop, so that a script written for it trains
with `from meshbolt import deepspeed`; what such scripts call beside it has the place that it has there: `zero`, `comm`,
`checkpointing`, `ops`, `utils`, `accelerator`, `pipe`. Read `initialize.py` first, then `engine.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from meshbolt.deepspeed import checkpointing, comm, moe, ops, pipe, runtime, utils, zero
from meshbolt.deepspeed.accelerator import get_accelerator
from meshbolt.deepspeed.engine import DeepSpeedEngine
from meshbolt.deepspeed.initialize import initialize
from meshbolt.deepspeed.pipe import PipelineModule
from meshbolt.deepspeed.ranks import init_distributed
from meshbolt.deepspeed_json import Options, Receipt
from meshbolt.deepspeed_json import translate as _translate
from meshbolt.deepspeed_json.schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from meshbolt.strategies import MeshStrategy as _MeshStrategy

__all__ = [
    "DeepSpeedEngine",
    "LRRangeTest",
    "OneCycle",
    "Options",
    "PipelineModule",
    "Receipt",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "moe",
    "ops",
    "pipe",
    "receipt",
    "runtime",
    "trainer_arguments",
    "utils",
    "zero",
]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed and --deepspeed_config to a script's parser, and return it."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for the script to read; without effect by itself")
    group.add_argument("--deepspeed_config", type=str, default=None, help="path of the JSON file")
    return parser


def trainer_arguments(config: str | Path | dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the arguments of a Trainer that DeepSpeed's JSON comes to: the strategy, precision, clipping and accumulation.

    Args:
        config: path of the JSON file, or what it says as a dictionary.
        options: as `MeshStrategy.from_deepspeed` has them: auto, deepspeed_version, data_parallel_size, recompute, compile,
            start_method, show.

    Raises:
        ConfigError: the file is no JSON, or a key is unknown, has a wrong value or contradicts another.
        UnsupportedError: a key asks for what is not there.

    Example:
        >>> trainer = Trainer(**trainer_arguments("ds_config.json"), devices=8, max_epochs=1)
    """
    return _MeshStrategy.from_deepspeed(config, **options).deepspeed_arguments()


def receipt(config: str | Path | dict[str, Any], options: Options | None = None) -> Receipt:
    """Return what becomes of every key of DeepSpeed's JSON; nothing is made.

    Args:
        config: path of the JSON file, or what it says as a dictionary.
        options: what the file does not say.

    Raises:
        ConfigError: the file is no JSON, or a key is unknown, has a wrong value or contradicts another.
        UnsupportedError: a key asks for what is not there.
    """
    return _translate(config, options).receipt
