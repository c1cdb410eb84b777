"""`meshbolt verify`: whether a run of `meshbolt fit` would do what one process does, found out before it, in one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
from jsonargparse import Namespace
from typing_extensions import override

from meshbolt.callbacks.console import write_line
from meshbolt.cli.commands import DONE, NO
from meshbolt.cli.planned import strategy_of
from meshbolt.cli.train import MeshCLI
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import PipelineParallel, PipelineReport, Timeline, batch_size, cuts_of, draw
from meshbolt.strategies.pipelined.verify import verify_module

USAGE = "meshbolt verify --pipeline --config FILE [--KEY VALUE ...] [--json] [--draw FILE]"
EXAMPLE = "example: meshbolt verify --pipeline --config configs/pipeline_parallel.yaml --draw plan.svg"
DESCRIPTION = (
    "Cut the model of a configuration of `meshbolt fit` into pipeline stages, in this process and on the CPU, and compare their "
    "gradients for the first batch with those of the whole model. Shows what each stage holds, what passes between them, and how "
    "long ranks would wait; or why the model cannot be cut. Exit code 1 where it cannot, or where gradients differ. Everything "
    "else is an option of `meshbolt fit`. Without pipeline_parallel in the strategy, two stages are tried."
)
"""What a run on one CPU takes instead of what the configuration says of it; nothing of it changes gradients."""
_ON_ONE_CPU: Mapping[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "plugins": None,
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "fast_dev_run": False,
    "max_epochs": 1,
    "max_steps": -1,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "accumulate_grad_batches": 1,
    "sync_batchnorm": False,
    "barebones": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_IN_FLOAT64 = ("64", "64-true")


class _Found(BaseException):
    """Ends a fit at its first batch, with what was found; no handler of the user's is to catch it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the first batch was looked at")
        self.answer = answer
